"""Questions about tasks that run in another process."""

from __future__ import annotations

import pytest
from helpers import eventually

from taskx import Queue

HOLD = """
import threading

@queue.executor("hold", max_concurrency=1)
def hold():
    note("holds")
    threading.Event().wait()
"""


@pytest.fixture
def queue(workers):
    """A queue that is not started; a program runs the tasks of its type ``hold``, one at a time."""
    queue = Queue(workers.repository)
    queue.declare("hold")
    return queue


def kinds(queue, handle):
    return [reason.kind for reason in queue.why(handle.id)]


def test_a_process_explains_the_tasks_of_another_one_and_sees_its_death(workers, queue):
    holder, waits = queue.submit("hold"), queue.submit("hold", priority=-1)
    assert kinds(queue, holder) == ["no_node"]
    assert [problem.kind for problem in queue.health().problems] == ["nodes"]

    [child] = workers.start(HOLD)
    eventually(workers.log)
    [running] = queue.why(holder.id)
    assert (running.kind, running.facts["stack"]) == ("running", "")
    assert str(child.process.pid) in running.facts["worker"]
    [slot] = queue.why(waits.id)
    assert (slot.kind, slot.facts["holders"]) == ("slot", [holder.id])
    assert queue.health().ok

    child.process.kill()
    child.process.wait()
    eventually(lambda: "dead_node" in kinds(queue, holder))
    assert kinds(queue, waits) == ["no_node"]
    assert [problem.kind for problem in queue.health().problems] == ["nodes"]
