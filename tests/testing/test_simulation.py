"""The simulator: fixed seeds keep all promises, planted bugs are found, failures are shrunk."""

import os
import re
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from taskx import Config, ConfigurationError, InvalidTransition, Queue, Task, TaskxError
from taskx.node import pool
from taskx.node.shared_limits import SharedSlots
from taskx.tasks import ids
from taskx.testing import BrokenPromise, replay, simulate
from taskx.testing.simulation import FAULTS, _runs, _Scripted, _Seeded

from .planted import PLANTED
from .zoo import PROGRAMS, Patient, Zoo, find

ROOT = Path(__file__).parents[2]
#: If the engine has changed, other seeds find a planted bug: one of the first ones must, or its own.
FEW = 300


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("chunk", range(2))
def test_all_promises_hold_for_fixed_seeds(chunk, program):
    simulate(PROGRAMS[program], seeds=range(25 * chunk, 25 * chunk + 25))


def test_all_promises_hold_for_calls_for_many_tasks():
    def program(queue):
        @queue.executor("many", batch=4, max_attempts=2)
        def many(tasks):
            if any(task["n"] == 4 for task in tasks):
                raise ValueError("poison")
            return [task["n"] for task in tasks]

        def some():
            queue.submit_many([Task(type="many", params={"n": n}) for n in range(6)])

        def cancel():
            for task in queue.list_tasks(status="pending")[0][:2]:
                with suppress(InvalidTransition):  # another node was faster
                    queue.cancel_task(task.id)

        return [some, some, lambda: queue.submit("many", {"n": 9}, key="k"), cancel]

    simulate(program, seeds=range(8))


def test_seeds_that_once_failed_hold():
    simulate(Zoo, seeds=[825, 4625, 1_002_069, 2_008_776, 2_016_201])
    simulate(PROGRAMS["rated"], seeds=[1565, 1892])
    simulate(PROGRAMS["family"], seeds=[138_843_782_646_389, 138_843_782_662_110])
    simulate(PROGRAMS["family"], seeds=[257_423_201_213_296])


def test_a_token_that_time_has_brought_in_part_is_put_back_in_part():
    """A run that a seed has found: node 2 gives back a token two seconds after it was taken."""
    replay(
        Zoo,
        [
            ("boot", 0),
            ("boot", 1, 0, {5: [("boot", 2)], 16: [("pass", 2, 31.0)]}),
            (
                "round",
                0,
                0,
                {9: [("round", 1), ("pass", 2, 5.0)], 14: [("ask", 1, 23)], 15: "dies"},
            ),
            ("ask", 2, 15),
            ("round", 1, 0, {4: [("ask", 2, 15)], 6: [("ask", 2, 15)], 22: [("pass", 2, 0.6)]}),
            ("kill", 2),
            ("round", 1, 0, {21: [("boot", 2)], 29: [("start", 2, 1)]}),
            ("pass", 1, 2.1),
        ],
    )


def test_the_time_out_of_an_answer_in_a_flow_begins_once():
    """A run that a seed has found: two nodes see the end of the task before it, one of them much later."""
    replay(
        PROGRAMS["patient"],
        [
            *[("boot", node) for node in range(3)],
            ("ask", 2, 16),
            ("round", 1),
            ("start", 1, 1),
            ("pass", 1, 2.1),
            ("execute", 1),
            ("round", 1, 0, {8: [("round", 0), ("pass", 2, 120.0)]}),
        ],
    )


def test_a_task_that_was_cancelled_before_its_begin_is_not_executed():
    """A run that a seed has found: a node starts a child ahead, hears of its cancel, then seems dead."""
    replay(
        PROGRAMS["family"],
        [
            ("boot", 0),
            ("boot", 2, 0, {7: [("ask", 0, 1)]}),
            ("round", 0, 0, {15: [("start", 2)]}),
            ("execute", 2),
            ("start", 2, 1, {4: [("pass", 1, 31.0)]}),
            ("ask", 2, 12),
            ("late", 2),
        ],
    )


def test_a_task_that_runs_here_already_does_not_start_without_a_token():
    """A run that a seed has found: a node loses a task, gets it again, and its old run ends meanwhile."""
    replay(
        PROGRAMS["rated"],
        [
            ("boot", 1),
            ("boot", 0),
            ("ask", 0, 2),
            ("round", 0, 0, {13: [("ask", 1, 2)]}),
            ("pass", 2, 120.0),
            ("ask", 0),
            ("start", 0, 1, {3: [("round", 1)]}),
            ("round", 0, 0, {21: [("late", 0)]}),
            ("round", 1, 0, {13: [("pass", 2, 0.6)], 25: [("pass", 2, 0.001)]}),
            (
                "round",
                1,
                0,
                {10: [("execute", 0)], 14: [("round", 0)], 16: [("boot", 2), ("late", 1)]},
            ),
            ("start", 0, 1),
            ("round", 0, 0, {3: [("late", 0), ("round", 2, 0, {28: "fails"})]}),
            ("round", 2, 0, {11: [("pass", 2, 2.1)]}),
        ],
    )


def test_a_node_that_seems_dead_comes_back_even_if_nobody_else_lives():
    """Another node has found that its lease is over, and has died before it took back the tasks."""
    replay(Zoo, [("boot", 0), ("boot", 1), ("late", 1), ("kill", 0), ("ask", 1)])


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("chunk", range(2))
def test_all_promises_hold_for_more_seeds(chunk, program):
    simulate(PROGRAMS[program], seeds=range(10_000 + 100 * chunk, 10_100 + 100 * chunk))


@pytest.mark.process
def test_a_seed_does_the_same_in_every_process():
    seeds = range(500, 520)
    code = f"from tests.testing.zoo import *; print(simulate(Patient, seeds={seeds}))"
    settings = {**os.environ, "PYTHONHASHSEED": "4711"}
    twin = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=settings, stdout=subprocess.PIPE, text=True
    )
    here = simulate(Patient, seeds=seeds)
    out, _ = twin.communicate()
    assert out.strip() == here


@pytest.mark.slow  # if the engine has changed, it searches
@pytest.mark.parametrize("name", [name for name, planted in PLANTED.items() if planted.seed >= 0])
def test_a_planted_bug_is_found(name):
    assert find(name, [PLANTED[name].seed, *range(FEW)]) is not None


def test_at_least_twenty_planted_bugs_are_found():
    assert sum(planted.seed >= 0 for planted in PLANTED.values()) >= 20


def test_the_page_lists_the_planted_bugs():
    page = (ROOT / "docs" / "simulation.rst").read_text(encoding="utf-8")
    for planted in PLANTED.values():
        if planted.seed >= 0:
            row = rf"^{re.escape(planted.text)} +{planted.seed:,}$"
            assert re.search(row, page, re.MULTILINE), planted


def test_a_failure_is_printed_as_a_program_that_shows_it_again(monkeypatch):
    monkeypatch.setattr(SharedSlots, "_bury", lambda self: None)
    with pytest.raises(BrokenPromise) as caught:
        simulate(slots, seeds=range(2000), faults=("kill",))
    told, _, program = str(caught.value).partition("\n\n")
    assert re.match(r"seed \d+: .*(never end|left over)", told)
    assert len(program.splitlines()) < 15
    with pytest.raises(BrokenPromise):
        exec(program, {"slots": slots})
    monkeypatch.undo()
    exec(program, {"slots": slots})


def test_a_failure_that_needs_a_config_is_shown_again_with_it():
    def program(queue):
        queue.executor("long")(lambda text: None)
        return [lambda: queue.submit("long", {"text": "x" * 200})]

    config = Config(max_payload_size=100)
    with pytest.raises(BrokenPromise, match="PayloadError") as caught:
        simulate(program, seeds=range(20), config=config)
    shown = str(caught.value).partition("\n\n")[2].replace(program.__qualname__, "program")
    with pytest.raises(BrokenPromise, match="PayloadError"):
        exec(shown, {"program": program, "config": config})


def slots(queue):
    @queue.executor("one", max_concurrency=1, limit_scope="global")
    def one() -> None:
        pass

    return [one.submit]


class Bank:
    """A world outside of the queue, which each seed makes anew."""

    def __init__(self):
        self.paid = []

    def __call__(self, queue):
        @queue.executor("pay")
        def pay(ctx) -> None:
            self.paid.append(ctx.task.id)

        return [pay.submit]

    def check(self, tasks):
        assert len(self.paid) == len(tasks), "paid twice"


class Shop:
    """A shop that waits until an order is done, and believes that no order runs twice."""

    def __init__(self):
        self.calls = 0

    def __call__(self, queue):
        @queue.executor("order", max_attempts=3)
        def order() -> None:
            self.calls += 1

        def buy():
            with suppress(TimeoutError, TaskxError):
                order.submit().result(timeout=20)

        return [buy]

    def check(self, tasks):
        assert self.calls <= len(tasks)


def test_what_fails_while_a_thread_waits_can_be_shown_again():
    """Seed 3: another node dies before it writes an outcome, which a thread waits for."""
    with pytest.raises(BrokenPromise, match="seed 3: the check of the program failed") as caught:
        simulate(Shop, seeds=[3])
    with pytest.raises(BrokenPromise, match="the check of the program failed"):
        exec(str(caught.value).partition("\n\n")[2], {"Shop": Shop})


def test_the_script_of_a_run_leads_to_the_same_run_also_if_threads_wait():
    with _runs(Shop, 3, None) as run:
        for seed in range(10):
            made = run(_Seeded(seed, 3, FAULTS))
            assert run(_Scripted(made.script)).trace == made.trace


def test_the_check_of_a_program_sees_all_tasks_at_the_end():
    simulate(Bank, seeds=range(20), faults=())


def test_a_program_that_counts_on_a_single_run_breaks_if_nodes_die():
    with pytest.raises(BrokenPromise, match="paid twice"):
        simulate(Bank, seeds=range(500))


def test_an_error_that_no_request_may_raise_is_shown():
    def program(queue: Queue):
        return [lambda: 1 / 0]

    with pytest.raises(BrokenPromise, match="ZeroDivisionError"):
        simulate(program, seeds=range(20))


def test_other_threads_go_on_in_the_real_time():
    """A queue may run beside a simulation, whose time its threads must not move."""
    over, slept = threading.Event(), []

    def sleep():
        while not over.is_set():
            pool.time.sleep(0.0001)  # blocks on purpose
            slept.append(pool.time.monotonic())

    beside = threading.Thread(target=sleep)
    beside.start()
    try:
        simulate(Patient, seeds=range(20))
    finally:
        over.set()
        beside.join()
    assert slept == sorted(slept)


def test_a_program_may_return_nothing():
    simulate(lambda queue: queue.declare("any"), seeds=range(5), nodes=1)


@pytest.mark.parametrize("wrong", [{"nodes": 0}, {"faults": ("flood",)}])
def test_wrong_arguments_are_refused(wrong):
    with pytest.raises(ConfigurationError):
        simulate(Bank, **wrong)


def test_a_simulation_leaves_time_and_ids_as_they_were():
    simulate(Bank, seeds=[1])
    assert ids.time is sys.modules["time"]
    assert ids.os is os
    assert ids.made_at(ids.new_id()) > 1_704_067_200_000 + 31_536_000_000


class Letters:
    """A person who answers what is asked first, at any time and any number of times."""

    def __init__(self):
        self.first = {}

    def __call__(self, queue):
        @queue.executor("letter", max_attempts=2)
        def letter(ctx) -> int:
            return ctx.ask("text")

        def answer():
            for task in queue.iter_tasks(type="letter", status="pending"):
                if queue.finish(f"{task.id}/text", number := len(self.first)):
                    self.first[task.id] = number

        return [letter.submit, answer]

    def check(self, tasks):
        for task in tasks:
            assert task.type != "letter" or task.result == self.first.get(task.id)


def test_a_task_that_nobody_answers_fails_at_the_end():
    simulate(Letters, seeds=range(30), faults=())
