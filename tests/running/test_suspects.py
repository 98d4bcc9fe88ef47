"""Suspects: a task on its last chance runs alone, so that only its own crash counts against it."""

from __future__ import annotations

import threading
import time

import pytest
from helpers import PATIENCE, eventually, pool_of, services_of

from taskx import Task, TaskStatus
from taskx.running import starter
from taskx.submitting.intake import prepare

pytestmark = pytest.mark.every_store


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

    def submit(name, crashes=0, type="wait"):
        queue.gates[name] = threading.Event()
        task = Task(type=type, params={"name": name}, id=name, max_crashes=3)
        if crashes:  # as a process that died left it
            insert = prepare(services_of(queue), task)
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


def test_a_suspect_that_may_crash_again_runs_together_with_other_tasks(queue):
    queue.start()
    queue.hold("neighbour")
    assert begun(queue, "neighbour")
    queue.hold("suspect", crashes=1)
    assert begun(queue, "neighbour", "suspect")
    queue.hold("later")
    assert begun(queue, "neighbour", "suspect", "later")


@pytest.mark.usefixtures("frequent_checks")
@pytest.mark.parametrize("how", ["deleted", "paused"])
def test_the_next_suspect_starts_if_the_one_before_it_is_gone(queue, how):
    """Suspects take turns; one that waits for its turn may be gone by then."""
    queue.start()
    queue.hold("first", crashes=1)
    assert begun(queue, "first")
    for name in ("second", "third"):
        queue.hold(name, crashes=1, type="other" if name == "second" else "wait")
        assert eventually(lambda name=name: name in waiting_ids(queue))
    if how == "deleted":
        queue.delete("second")
    else:
        queue.pause("other")
    queue.gates["first"].set()
    assert begun(queue, "first", "third")


def waiting_ids(queue):
    return [item.id for item in pool_of(queue).starter.suspects.waiting]


def test_a_task_on_its_last_chance_waits_at_most_a_minute_for_others(queue, monkeypatch):
    assert starter.ALONE == 60
    monkeypatch.setattr(starter, "ALONE", 0.2)
    queue.start()
    queue.hold("neighbour")
    assert begun(queue, "neighbour")
    queue.hold("last", crashes=2)
    assert begun(queue, "neighbour", "last")
    queue.hold("later")
    assert begun(queue, "neighbour", "last", "later")


def test_a_stop_does_not_wait_for_a_task_on_its_last_chance(queue):
    queue.start()
    queue.hold("neighbour")
    assert begun(queue, "neighbour")
    queue.hold("last", crashes=2)
    assert eventually(lambda: pool_of(queue).buffer.starting)
    began = time.monotonic()
    assert queue.stop(timeout=PATIENCE, cancel=True) == []
    assert time.monotonic() - began < starter.ALONE / 2
    assert queue.get_task_status("last").status is TaskStatus.PENDING


@pytest.mark.usefixtures("frequent_checks")
def test_a_deleted_suspect_lets_the_next_one_start(queue):
    queue.start()
    queue.hold("neighbour")
    assert begun(queue, "neighbour")
    queue.hold("last", crashes=2)
    assert eventually(lambda: pool_of(queue).buffer.starting)
    queue.hold("next", crashes=1)
    queue.delete("last")
    queue.gates["neighbour"].set()
    assert begun(queue, "neighbour", "next")
