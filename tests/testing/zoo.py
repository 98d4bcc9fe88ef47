"""Programs for the simulator that use what the promises are about, and the search for planted bugs.

python -m tests.testing.zoo --seeds 1000         draws new seeds, and runs each in two processes
python -m tests.testing.zoo --planted            finds the planted bugs
"""

import argparse
import os
import secrets
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from itertools import cycle

import pytest

from taskx import (
    DuplicateTask,
    InvalidTransition,
    RetryPolicy,
    Snooze,
    Task,
    TaskNotFound,
    Uncertain,
    answer,
    chain,
    every,
    executor,
    group,
)
from taskx.testing import simulate
from taskx.testing.simulation import FAULTS, _runs, _Seeded

from .planted import PLANTED

#: The seeds that each call of the simulator gets here.
CHUNK = 200
#: The seeds among which a planted bug must be found.
MOST = 20_000


@executor("plain")
def plain(n: int) -> int:
    return n


@executor("flaky", max_attempts=3)
def flaky(ctx, n: int) -> int:
    if ctx.task.errors < n:
        raise ValueError("again")
    return n


@executor("later", retry=RetryPolicy(3, base=5, backoff="fixed"))
def later(ctx, n: int) -> int:
    if ctx.task.errors < n:
        raise ValueError("later")
    return n


@executor("one", max_concurrency=1, limit_scope="global")
def one(n: int) -> int:
    return n


@executor("two", max_concurrency=2, limit_scope="global", max_attempts=2)
def two(ctx, n: int) -> int:
    if n and not ctx.task.errors:
        raise ValueError("once more")
    return n


@executor("mine", max_concurrency=1)
def mine(n: int) -> int:
    return n


@executor("rated", rate=(2, 10.0), burst=2, limit_scope="global")
def rated(n: int) -> int:
    return n


@executor("fragile", max_crashes=1)
def fragile(n: int) -> int:
    return n


@executor("steps")
def steps(ctx, n: int) -> int:
    first = ctx.step("a", lambda: n + 1)
    ctx.sleep(1)
    return ctx.step("b", lambda: first + 1)


@executor("nap")
def nap(ctx, n: int) -> int:
    if ctx.task.snoozes < n:
        raise Snooze(3)
    return n


class Zoo:
    """Everything that the promises are about, in a program."""

    def __init__(self):
        self.numbers = 0
        self.asked = set()  # the tasks that somebody asked to change

    def __call__(self, queue):
        for one_of_them in (plain, flaky, later, one, two, mine, rated, fragile, steps, nap):
            queue.register_executor(one_of_them)
        self.declare(queue)
        return [*self.submits(queue), *self.flows(queue), *self.changes(queue)]

    def declare(self, queue):
        @queue.executor("parent")
        def parent(n: int) -> int:
            queue.submit("plain", {"n": n})
            return n

        queue.schedule("tick", every(5), "plain", {"n": 0}, misfire="one")
        queue.schedule("alone", every(2), "one", {"n": 0}, overlap="skip")

    def submits(self, queue):
        def submit(type, n, **options):
            return lambda: queue.submit(type, {"n": n}, **options)

        return [
            submit("plain", 1),
            submit("plain", 0, concurrency_key="k"),
            submit("plain", 1, concurrency_key="k"),
            submit("flaky", 1, concurrency_key="k"),
            submit("flaky", 9, concurrency_key="k"),
            submit("flaky", 1),
            submit("flaky", 9),
            submit("later", 1, concurrency_key="l"),
            submit("later", 2),
            submit("one", 1),
            submit("one", 2),
            submit("two", 0),
            submit("two", 1),
            submit("mine", 1),
            submit("rated", 0),
            submit("rated", 1),
            submit("fragile", 1),
            submit("steps", 1),
            submit("parent", 1),
            submit("nap", 2),
            submit("plain", 1, delay=3),
            submit("plain", 1, expires=2),
            submit("later", 1, expires=4, concurrency_key="k"),
            lambda: queue.submit_many([plain.task(1), one.task(2), flaky.task(1)]),
            self.unique(queue, "return"),
            self.unique(queue, "replace"),
            self.unique(queue, "replace", delay=1),
            self.unique(queue, "reject", delay=3),
        ]

    def unique(self, queue, on_conflict, **options):
        def submit():
            self.numbers += 1
            params = {"n": self.numbers}
            with suppress(DuplicateTask):
                queue.submit("plain", params, unique_key="u", on_conflict=on_conflict, **options)

        return submit

    def flows(self, queue):
        def good():
            middle = group(flaky.task(1), plain.task(2))
            queue.submit_flow(chain(plain.task(1), middle, plain.task(3)))

        def bad():
            queue.submit_flow(chain(plain.task(1), flaky.task(9), plain.task(3)))

        def children(n):
            def submit():
                a, b = queue.submit("flaky", {"n": n}), queue.submit("one", {"n": 0})
                options = {"depends_on": [a, b], "on_parent_failure": "run"}
                queue.submit("plain", {"n": 0}, **options)
                options = {"depends_on": [a], "on_parent_failure": "fail", "concurrency_key": "k"}
                queue.submit("plain", {"n": 0}, **options)

            return submit

        def orphan(policy):
            def submit():
                for task in queue.iter_tasks(status="failed"):
                    options = {"depends_on": [task.id], "on_parent_failure": policy}
                    queue.submit("plain", {"n": 1}, **options)
                    return

            return submit

        return [good, bad, children(1), children(9), orphan("cancel"), orphan("fail")]

    def change(self, how, *statuses):
        def ask():
            for status in statuses:
                for task in how.__self__.iter_tasks(status=status):
                    with suppress(TaskNotFound, InvalidTransition, DuplicateTask):
                        self.asked.add(task.id)
                        how(task.id)
                        return

        return ask

    def changes(self, queue):
        change = self.change
        return [
            change(queue.cancel_task, "running", "pending"),
            change(queue.cancel_task, "pending"),
            change(queue.requeue, "failed", "cancelled"),
            change(queue.requeue, "cancelled"),
            lambda: queue.pause("plain"),
            lambda: queue.resume("plain"),
            lambda: queue.tune("two", max_concurrency=1),
        ]


def told(ctx, name, timeout=None):
    try:
        return ctx.ask(name, timeout=timeout)
    except TimeoutError:
        return "nobody"


@executor("ask", max_attempts=3)
def ask(ctx, n: int) -> list:
    got = [told(ctx, "a", 600)]
    if ctx.task.errors < n:
        raise ValueError("after an answer")
    return [*got, told(ctx, "b", 40)]


@executor("ask at a rate", rate=(2, 10.0), burst=2, limit_scope="global")
def ask_at_a_rate(ctx, n: int) -> list:
    return [told(ctx, "a", 60), told(ctx, "b")]


@executor("ask alone", max_concurrency=1, limit_scope="global")
def ask_alone(ctx, n: int) -> list:
    return [told(ctx, "a", 200), told(ctx, "b", 3)]


@executor("sleep")
def sleep(ctx, n: int) -> int:
    ctx.sleep(20, step="long")
    ctx.step("awake", lambda: n)
    ctx.sleep(4, step="short")
    return n


@executor("poll")
def poll(ctx, n: int) -> str:
    try:
        return ctx.poll(
            "look", lambda: "found" if ctx.task.starts > n else None, every=3, timeout=9
        )
    except TimeoutError:
        return "nobody"


@executor("follow")
def follow(ctx, n: int, awaited: str) -> list:
    try:
        first = ctx.wait("event/" + "12"[n % 2], timeout=40)
    except TimeoutError:
        first = "nobody"
    return [first, ctx.wait(awaited)] if awaited else [first]


class Patient(Zoo):
    """Everything that waits: for people, other tasks and times."""

    def __init__(self):
        super().__init__()
        # The answers that counted; all that were tried, and perhaps counted; payments, and second ones.
        self.first, self.tried, self.paid, self.again = {}, {}, Counter(), Counter()

    def __call__(self, queue):
        for one_of_them in (plain, one, ask, ask_at_a_rate, ask_alone, sleep, poll, follow):
            queue.register_executor(one_of_them)

        @queue.executor("pay", max_crashes=20)
        def pay(ctx, n: int) -> str:
            def call():
                self.paid[ctx.task.id] += 1
                if n and ctx.task.starts == 1:
                    raise Uncertain("perhaps")
                return "paid"

            return ctx.once("pay", call)

        answers = cycle(self.answers(queue))

        def and_answer(ask):
            def both():
                ask()
                next(answers)()

            return both

        return [and_answer(ask) for ask in (*self.submits(queue), *self.changes(queue))]

    def submits(self, queue):
        def submit(type, n=0, **options):
            return lambda: queue.submit(type, {"n": n}, **options)

        def follow_last(n):
            def ask():
                last = next((task.id for task in queue.iter_tasks(type="ask")), "")
                queue.submit("follow", {"n": n, "awaited": last})

            return ask

        return [
            submit("ask"),
            submit("ask", 1),
            submit("ask", 2, concurrency_key="k"),
            submit("ask", concurrency_key="k"),
            submit("plain", concurrency_key="k"),
            submit("ask at a rate"),
            submit("ask alone"),
            submit("one"),
            submit("sleep"),
            submit("sleep", concurrency_key="k"),
            submit("poll", 2),
            submit("poll", 9),
            submit("pay"),
            submit("pay", 1),
            follow_last(0),
            follow_last(1),
            lambda: queue.submit_flow(
                chain(plain.task(1), answer("legal", timeout=30), plain.task(2))
            ),
        ]

    def answers(self, queue):
        def tell(answer_id):
            """Give an answer, which counts once; after an error nobody knows if it does."""
            self.numbers += 1
            value = self.numbers
            self.tried.setdefault(answer_id, set()).add(value)
            with suppress(TaskNotFound, InvalidTransition):
                if queue.finish(answer_id, value):
                    self.first[answer_id] = value

        def give(name, type, times=1):
            """Answer a task that has perhaps not asked yet."""

            def ask():
                for status in ("running", "pending"):
                    for task in queue.iter_tasks(type=type, status=status):
                        for _ in range(times):
                            tell(f"{task.id}/{name}")
                        return

            return ask

        def ask_and_answer(name, times=1):
            def ask():
                task_id = queue.submit("ask", {"n": 0})
                for _ in range(times):
                    tell(f"{task_id}/{name}")

            return ask

        def give_open():
            """Give an answer that somebody waits for."""
            for task in queue.iter_tasks(type="answer", status="pending"):
                if "once" not in task.params:
                    tell(task.id)
                    return

        def look(told, *, again=0):
            """Say how a call has ended that must not happen twice, or that it shall be made again."""

            def ask():
                for task in queue.iter_tasks(type="answer", status="pending"):
                    if "once" in task.params:
                        self.again[task.id.rpartition("/")[0]] += again
                        with suppress(TaskNotFound, InvalidTransition):
                            queue.finish(task.id, **told)
                        return

            return ask

        return [
            ask_and_answer("b", 2),
            give("a", "ask"),
            give_open,
            give("b", "ask at a rate"),
            look({"again": True}, again=1),
            give("a", "ask alone"),
            lambda: tell("event/1"),
            give("b", "ask", 2),
            look({"result": "told"}),
        ]

    def changes(self, queue):
        return [*super().changes(queue)[:4], self.change(queue.wake, "pending")]

    def check(self, tasks):
        for task in tasks:
            if task.type.startswith("ask") and task.status == "completed":
                for name, got in zip("ab", task.result, strict=True):
                    self.check_answer(f"{task.id}/{name}", got)
            count, most = self.paid[task.id], 1 + self.again[task.id]
            assert count <= most, f"paid {count} times instead of {most}"

    def check_answer(self, answer_id, got):
        first, tried = self.first.get(answer_id, got), self.tried.get(answer_id, ())
        assert got == first, f"{got} was taken instead of {first}"
        assert got == "nobody" or got in tried, f"{got} was never given"


@executor("parts", max_attempts=2)
def parts(ctx, n: int) -> list:
    first = ctx.run_all("first", [plain.task(0), flaky.task(1), one.task(2)])
    return [*first, *ctx.run_all("then", [plain.task(m) for m in range(3, 3 + n)])]


@executor("mixed")
def mixed(ctx, n: int) -> list:
    tasks = [plain.task(0), flaky.task(9), ask.task(0)]
    told = ctx.run_all("mixed", tasks, on_failure="return")
    return ["failed" if isinstance(one, Exception) else one for one in told]


@executor("race")
def race(ctx, n: int) -> list:
    told = ctx.run_all("race", [ask.task(0), plain.task(1), plain.task(2)], needed=1 + n)
    return [one for one in told if not isinstance(one, Exception)]


@executor("tree")
def tree(ctx, n: int) -> int:
    return sum(ctx.run_all("below", [Task(type="tree", params={"n": n - 1})] * 2)) if n else 1


@executor("fork")
def fork(ctx, n: int) -> list:
    return ctx.fork("more", [flaky.task(1), plain.task(2)])


class Family(Patient):
    """Tasks that have children."""

    def __call__(self, queue):
        for one_of_them in (plain, one, flaky, ask, parts, mixed, race, tree, fork):
            queue.register_executor(one_of_them)

        @queue.executor("after")
        def after(ctx, n: int) -> list:
            return [parent.result for parent in ctx.parents[1:]]

        def submit(type, n, **options):
            return lambda: queue.submit(type, {"n": n}, **options)

        change = self.change
        return [
            submit("parts", 0),
            submit("parts", 2),
            submit("parts", 1, concurrency_key="k"),
            submit("mixed", 0),
            submit("race", 0),
            submit("race", 1),
            submit("tree", 2),
            submit("tree", 1),
            lambda: queue.submit_flow(chain(fork.task(0), Task(type="after", params={"n": 0}))),
            submit("plain", 0, concurrency_key="k"),
            *self.answers(queue)[1:3],
            change(queue.cancel_task, "running", "pending"),
            change(queue.cancel_task, "pending"),
            change(queue.requeue, "failed", "cancelled"),
        ]

    def check(self, tasks):
        super().check(tasks)
        for task in tasks:
            assert "was not needed" not in task.error or task.type == "race", task.error
            if task.status == "completed":
                n, got = task.params.get("n"), task.result
                wanted = {"parts": [*range(3 + (n or 0))], "tree": 2 ** (n or 0)}
                if task.type == "after":
                    # Requeued alone, it waits neither for the fork nor for the children of it.
                    alone = task.id in self.asked
                    assert got == [1, 2] or (alone and not got), f"after has got {got}"
                assert got == wanted.get(task.type, got), f"{task.type} {n} has got {got}"
                if task.type == "mixed":  # the first child may have been cancelled
                    assert got[0] in (0, "failed"), f"mixed has got {got}"
                    assert got[1] == "failed", f"mixed has got {got}"
                assert task.type != "race" or len(got) > n, f"race {n} has got {got}"


class Rated(Zoo):
    """Tasks with a rate that all nodes share."""

    def __call__(self, queue):
        queue.register_executor(rated)
        queue.register_executor(ask_at_a_rate)
        cancel = self.change(queue.cancel_task, "pending", "running")
        submits = [
            lambda type=one.type: queue.submit(type, {"n": 0}) for one in (rated, ask_at_a_rate)
        ]
        return [*submits, submits[0], cancel]


class Keyed(Patient):
    """Keys that have several turns, and rates."""

    def __call__(self, queue):
        for one_of_them in (plain, flaky, later, ask):
            queue.register_executor(one_of_them)
        queue.limit("tenant:", concurrency=2, rate=(2, 10.0), burst=2)
        queue.limit("tenant:big", concurrency=3)
        queue.limit("cost:", concurrency=2, rate="6 tokens/m")

        def submit(type, n, key, **options):
            return lambda: queue.submit(type, {"n": n}, key=key, **options)

        change = self.change
        return [
            submit("plain", 0, "tenant:a"),
            submit("flaky", 1, "tenant:a"),
            submit("ask", 1, "tenant:a"),
            submit("later", 1, "tenant:a", delay=1),
            submit("plain", 0, "tenant:b"),
            submit("plain", 0, "tenant:big"),
            submit("flaky", 9, "tenant:big"),
            submit("ask", 0, "tenant:big"),
            submit("plain", 0, "cost:c", cost={"tokens": 2}),
            submit("flaky", 1, "cost:c", cost={"tokens": 3}),
            submit("plain", 0, "cost:c", cost={"tokens": 6}, expires=5),
            *self.answers(queue)[1:3],
            change(queue.cancel_task, "running", "pending"),
            change(queue.cancel_task, "pending"),
            change(queue.requeue, "failed", "cancelled"),
        ]


class Delayed(Zoo):
    """Tasks that are put off before their time has come."""

    def __call__(self, queue):
        queue.register_executor(plain)
        queue.register_executor(nap)
        return [
            self.unique(queue, "replace", delay=0.3),
            self.unique(queue, "replace", delay=20),
            lambda: queue.submit("nap", {"n": 1}, delay=2),
            self.change(queue.cancel_task, "pending"),
            self.change(queue.requeue, "cancelled"),
        ]


PROGRAMS = {
    "zoo": Zoo,
    "patient": Patient,
    "family": Family,
    "rated": Rated,
    "keyed": Keyed,
    "delayed": Delayed,
}


def find(name, seeds):
    """Return the first of these seeds that finds a planted bug, and what it says; None if none does."""
    program = PROGRAMS[PLANTED[name].program]
    with pytest.MonkeyPatch.context() as patch, _runs(program, 3, None) as run:
        PLANTED[name].plant(patch.setattr)
        for seed in seeds:
            if problem := run(_Seeded(seed, 3, FAULTS)).problem:
                return seed, problem
    return None


def run_new(count):
    """Run new seeds, each in two processes, and compare what happened."""
    first = secrets.randbelow(1 << 48)
    print(f"seeds {first} to {first + count - 1}", flush=True)
    command = [
        sys.executable,
        "-m",
        "tests.testing.zoo",
        "--from",
        str(first),
        "--seeds",
        str(count),
    ]
    twins = [
        subprocess.Popen(
            command,
            env={**os.environ, "PYTHONHASHSEED": str(number)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in (1, 2)
    ]
    done = 0
    for lines in zip(*(twin.stdout for twin in twins), strict=False):
        if lines[0] != lines[1]:
            print("the processes differ:", *lines, sep="\n")
            return 1
        done += CHUNK
        print(f"{min(done, count)} seeds", flush=True)
    return max(twin.wait() for twin in twins)


def run_these(first, count):
    for chunk in range(first, first + count, CHUNK):
        seeds = range(chunk, min(chunk + CHUNK, first + count))
        program = [*PROGRAMS.values()][chunk // CHUNK % len(PROGRAMS)]
        print(chunk, simulate(program, seeds=seeds), flush=True)


def run_planted(names):
    missed = 0
    for name in names or PLANTED:
        found = find(name, range(MOST))
        missed += found is None
        print(name, *(found or ("was not found",)), flush=True)
    return missed


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--from", type=int, dest="first")
    parser.add_argument("--planted", nargs="*")
    options = parser.parse_args()
    if options.planted is not None:
        return run_planted(options.planted)
    if options.first is not None:
        return run_these(options.first, options.seeds)
    return run_new(options.seeds)


if __name__ == "__main__":
    sys.exit(main())
