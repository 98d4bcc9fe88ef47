"""The promises that hold on every engine. One program has the executors, and nothing in it differs."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from concurrent.futures import CancelledError

import pytest
from helpers import PATIENCE
from kinds import NO_RABBITMQ

from engines.conftest import Ground, with_workers
from engines.servers import RABBITMQ, Broker, Rabbit
from taskx import TaskFailed, TaskStatus, chain, group

RABBIT = pytest.mark.skipif(not RABBITMQ.exists(), reason=NO_RABBITMQ)
ENGINES = [
    pytest.param(("threads", Broker), id="threads"),
    pytest.param(("celery", Broker), id="celery"),
    pytest.param(("dramatiq", Broker), id="dramatiq"),
    pytest.param(("celery", Rabbit), id="celery-rabbitmq", marks=RABBIT),
    pytest.param(("dramatiq", Rabbit), id="dramatiq-rabbitmq", marks=RABBIT),
]


@pytest.fixture(scope="module", params=ENGINES)
def site(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Ground]:
    """A ground with two workers, which all tests of an engine share."""
    engine, server = request.param
    with with_workers(engine, tmp_path_factory.mktemp(engine), server) as ground:
        yield ground


@pytest.fixture
def word() -> str:
    """A word that no other test uses."""
    return uuid.uuid4().hex[:12]


def fill(site: Ground, word: str) -> list:
    """Keep both workers busy. Return the functions that free them."""
    gates = []
    for number in range(2):
        _, free = site.hold(f"{word}-{number}")
        gates.append(free)
    for number in range(2):
        site.begun(f"{word}-{number}")
    return gates


def look_again(site: Ground) -> None:
    """Wait until the node with threads has read what is stored now. It reads after it has answered."""
    [node] = [node.id for node in site.queue.nodes() if node.workers and node.alive]
    for _ in range(2):
        site.queue.stacks(node, timeout=PATIENCE)


def test_a_task_runs_in_a_worker_process_and_returns_its_result(site, word):
    assert site.queue.submit("add", {"a": 1, "b": 2}).result(PATIENCE) == 3
    assert site.note(word).result(PATIENCE) != os.getpid()


def test_each_of_many_tasks_runs_once(site, word):
    handles = [site.note(f"{word}-{number}") for number in range(60)]
    for handle in handles:
        handle.result(PATIENCE)
    assert sorted(site.began(word)) == sorted(f"{word}-{number}" for number in range(60))


def test_an_error_is_retried_and_at_last_fails(site):
    assert site.queue.submit("fail", {"times": 2}).result(PATIENCE) == 2
    failing = site.queue.submit("fail", {"times": 9})
    with pytest.raises(TaskFailed, match="error 2"):
        failing.result(PATIENCE)
    task = failing.task()
    assert (task.errors, task.crashes) == (3, 0)
    assert [attempt.outcome for attempt in task.attempts] == ["retried", "retried", "failed"]


def test_delays_and_parents_are_kept_in_the_record(site):
    later = site.queue.submit("add", {"a": 1, "b": 1}, delay=0.3)
    flow = chain(group(_task("add", a=1, b=2), _task("add", a=3, b=4)), _task("total"))
    assert site.queue.submit_flow(flow).result(PATIENCE) == 10
    assert later.result(PATIENCE) == 2
    task = later.task()
    assert task.started_at >= task.run_at


def test_the_highest_priority_starts_first_even_if_it_was_submitted_last(site, word):
    gates = fill(site, word + "x")
    tasks = [site.hold(f"{word}-low{number}") for number in range(6)]
    tasks += [site.hold(f"{word}-high{number}", priority=5) for number in range(2)]
    if site.engine == "threads":  # a ticket reads the store anew
        look_again(site)
    for free in gates:
        free()
    for number in range(2):
        site.begun(f"{word}-high{number}")
    assert len(site.began(word + "-")) == 2  # both workers are busy with these two
    for _, free in tasks:
        free()
    for handle, _ in tasks:
        handle.result(PATIENCE)


def test_a_limit_of_all_nodes_holds(site, word):
    params = [{"log": site.log, "word": f"{word}-{number}"} for number in range(8)]
    for handle in [site.queue.submit("limited", each) for each in params]:
        handle.result(PATIENCE)
    lines = [what for what, which, *_ in site.lines() if which.startswith(word)]
    assert lines == ["begin", "end"] * 8


def test_tasks_with_a_concurrency_key_run_one_at_a_time_in_order(site, word):
    handles = [site.note(f"{word}-{n}", 0.02, concurrency_key=word) for n in range(6)]
    for handle in handles:
        handle.result(PATIENCE)
    expected = [
        what for n in range(6) for what in (["begin", f"{word}-{n}"], ["end", f"{word}-{n}"])
    ]
    assert [line[:2] for line in site.lines() if line[1].startswith(word)] == expected


def test_a_paused_type_waits_and_goes_on(site, word):
    site.queue.pause("note")
    paused = site.note(word)
    for _ in range(3):  # the workers go on with other types meanwhile
        assert site.queue.submit("add", {"a": 1, "b": 2}).result(PATIENCE) == 3
    assert paused.task().status is TaskStatus.PENDING
    assert site.queue.why(paused.id)[0].kind == "paused"
    site.queue.resume("note")
    paused.result(PATIENCE)


def test_a_running_task_is_cancelled_and_a_pending_one_never_starts(site, word):
    running, _ = site.hold(word)
    site.begun(word)
    running.cancel()
    with pytest.raises(CancelledError):
        running.result(PATIENCE)
    gates = fill(site, word + "x")
    pending = site.note(word + "-pending")
    assert pending.cancel()
    for free in gates:
        free()
    for _ in range(3):
        site.queue.submit("add", {"a": 1, "b": 2}).result(PATIENCE)
    assert site.began(word + "-pending") == []


def test_a_type_that_no_worker_knows_stays_pending_and_why_says_so(site):
    site.queue.declare("unheard")
    unheard = site.queue.submit("unheard")
    for _ in range(3):
        site.queue.submit("add", {"a": 1, "b": 2}).result(PATIENCE)
    assert unheard.task().status is TaskStatus.PENDING
    reason = site.queue.why(unheard.id)[0]
    assert (reason.kind, "unheard" in str(reason)) == ("no_node", True)
    assert unheard.cancel()


def test_a_killed_worker_loses_no_task(site, word):
    held = [site.hold(f"{word}-held{number}") for number in range(2)]
    for number in range(2):
        site.begun(f"{word}-held{number}")
    others = [site.note(f"{word}-other{number}") for number in range(10)]
    site.crew.kill(site.crew.processes[-1])
    for _, free in held:
        free()
    site.crew.start()
    for handle in [*(handle for handle, _ in held), *others]:
        handle.result(PATIENCE)
    assert [handle.task().crashes for handle, _ in held] == [1, 1]
    assert sorted(site.began(f"{word}-other")) == sorted(f"{word}-other{n}" for n in range(10))


def _task(type: str, **params: object):
    from taskx import Task

    return Task(type=type, params=params)
