"""Suspects: a task on its last chance runs alone, so that only its own crash counts against it."""

from __future__ import annotations

import threading
import time

import pytest
from helpers import PATIENCE, eventually, frequent_checks, joined_node, pool_of

from taskx import Task, TaskStatus
from taskx.tasks.timing import DEFAULT_TIMING


@pytest.fixture
def queue(make_queue):
    """A queue that notes the tasks that begin; ``hold`` submits one, ``gates`` let it go on."""
    queue = make_queue(worker_num=3)
    queue.begun, queue.gates = [], {}

    @queue.executor("wait")
    def wait(ctx, name):
        queue.begun.append(name)
        ctx.on_cancel(queue.gates[name].set)
        queue.gates[name].wait(PATIENCE)

    queue.executor("other")(wait.function)

    def submit(name, crashes=0, type="wait", max_crashes=3):
        queue.gates[name] = threading.Event()
        task = Task(type=type, params={"name": name}, id=name, max_crashes=max_crashes)
        if crashes:  # as a process that died left it
            insert = queue._intake.prepare(task)
            insert.row["crashes"] = crashes
            assert list(queue.repository.apply([insert])) == [True]
        else:
            queue.submit(task)

    queue.hold = submit
    yield queue
    for gate in queue.gates.values():
        gate.set()


def begun(queue, *names):
    return eventually(lambda: set(queue.begun) == set(names))


def test_a_task_on_its_last_chance_runs_alone(queue):
    queue.start()
    queue.hold("neighbour")
    assert begun(queue, "neighbour")
    queue.hold("last", crashes=2)
    assert eventually(lambda: pool_of(queue).buffer.starting)
    queue.hold("later")
    queue.gates["neighbour"].set()
    assert begun(queue, "neighbour", "last")
    assert eventually(lambda: pool_of(queue).buffer.starting)  # a worker waits with "later"
    assert set(pool_of(queue).runs) == {"last"}
    queue.gates["last"].set()
    assert begun(queue, "neighbour", "last", "later")
    queue.gates["later"].set()
    assert queue.drain(PATIENCE)


def test_tasks_that_may_crash_again_run_together(queue):
    queue.start()
    queue.hold("neighbour")
    assert begun(queue, "neighbour")
    for name in ("one", "another"):
        queue.hold(name, crashes=1)
    assert begun(queue, "neighbour", "one", "another")


def test_tasks_that_may_crash_again_are_started_in_one_transaction(make_queue):
    queue = make_queue(worker_num=3)
    queue.executor("fine")(lambda: None)
    for name in ("one", "another"):
        insert = queue._intake.prepare(Task(type="fine", id=name))
        insert.row["crashes"] = 1
        assert list(queue.repository.apply([insert])) == [True]
    node = joined_node(queue)
    runs = node.pool.starter.start(node.pool.buffer.take(2), "worker")
    assert {run.task.id for run in runs} == {"one", "another"}
    node.pool.starter.hand_back(runs)
    node.withdraw()


@pytest.mark.timing(alone_within=0.0)
@frequent_checks
@pytest.mark.parametrize("how", ["deleted", "paused"])
def test_the_next_suspect_starts_if_the_one_before_it_is_gone(queue, how):
    """Suspects take turns; one that waits for its turn may be gone by then."""
    queue.start()
    queue.hold("first", crashes=2)
    assert begun(queue, "first")
    for name in ("second", "third"):
        queue.hold(name, crashes=2, type="other" if name == "second" else "wait")
        assert eventually(lambda name=name: name in waiting_ids(queue))
    if how == "deleted":
        queue.delete("second")
    else:
        queue.pause("other")
    queue.gates["first"].set()
    assert begun(queue, "first", "third")


def waiting_ids(queue):
    return [item.id for item in pool_of(queue).starter.suspects.waiting]


@pytest.mark.timing(alone_within=0.2)
def test_a_task_on_its_last_chance_waits_at_most_a_minute_for_others(queue):
    assert DEFAULT_TIMING.alone_within == 60
    queue.start()
    queue.hold("neighbour")
    assert begun(queue, "neighbour")
    queue.hold("last", crashes=2)
    assert begun(queue, "neighbour", "last")
    queue.hold("later")
    assert begun(queue, "neighbour", "last", "later")


@pytest.mark.timing(alone_within=0.0)
def test_only_one_task_on_its_last_chance_runs_at_a_time(queue):
    """A long one lets other tasks start after a minute, but none that could fail at its crash."""
    queue.start()
    queue.hold("first", crashes=2)
    assert begun(queue, "first")
    queue.hold("second", crashes=2)
    assert eventually(lambda: waiting_ids(queue) == ["second"])
    queue.hold("other")
    assert begun(queue, "first", "other")
    queue.gates["first"].set()
    assert begun(queue, "first", "other", "second")


def test_a_task_on_its_last_chance_does_not_wait_for_one_that_has_run_for_a_minute(queue):
    """Else each of them would wait for a task of an hour, and so would all others."""
    queue.start()
    queue.hold("long")
    assert begun(queue, "long")
    at_work = pool_of(queue).ahead.at_work
    for run in list(at_work):
        at_work[run] -= DEFAULT_TIMING.alone_within
    queue.hold("last", crashes=2)
    assert begun(queue, "long", "last")


@pytest.mark.parametrize("max_crashes", [1, 2, 3])
def test_a_task_that_never_crashed_is_on_no_last_chance(queue, max_crashes):
    queue.start()
    queue.hold("neighbour")
    assert begun(queue, "neighbour")
    queue.hold("new", max_crashes=max_crashes)
    assert begun(queue, "neighbour", "new")


def test_a_task_that_may_crash_twice_runs_alone_after_its_first_crash(queue):
    queue.start()
    queue.hold("last", crashes=1, max_crashes=2)
    assert begun(queue, "last")
    queue.hold("later")
    assert eventually(lambda: pool_of(queue).buffer.starting)  # a worker waits with it
    assert set(pool_of(queue).runs) == {"last"}
    queue.gates["last"].set()
    assert begun(queue, "last", "later")


def test_a_stop_does_not_wait_for_a_task_on_its_last_chance(queue):
    queue.start()
    queue.hold("neighbour")
    assert begun(queue, "neighbour")
    queue.hold("last", crashes=2)
    assert eventually(lambda: pool_of(queue).buffer.starting)
    began = time.monotonic()
    assert queue.stop(timeout=PATIENCE, cancel=True) == []
    assert time.monotonic() - began < DEFAULT_TIMING.alone_within / 2
    assert queue.get_task_status("last").status is TaskStatus.PENDING


@frequent_checks
def test_a_deleted_suspect_lets_the_next_one_start(queue):
    queue.start()
    queue.hold("neighbour")
    assert begun(queue, "neighbour")
    queue.hold("last", crashes=2)
    assert eventually(lambda: pool_of(queue).buffer.starting)
    queue.hold("next", crashes=2)
    queue.delete("last")
    queue.gates["neighbour"].set()
    assert begun(queue, "neighbour", "next")
