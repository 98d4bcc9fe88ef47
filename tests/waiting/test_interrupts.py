"""An interrupt at any point loses no answer, takes none twice, and leaves no task waiting."""

from __future__ import annotations

import pytest
from strikes import every_strike, strike_at

from taskx import MemoryRepository, Queue, Task, TaskFilter
from taskx.testing import ManualQueue

#: Every so many points are struck.
STEP = 41


def asking(repository, clock):
    queue = ManualQueue(repository, clock=clock)
    # A strike inside of an executor is an error of the executor.
    queue.executor("ask", max_attempts=1000)(lambda ctx: ctx.ask("one"))
    return queue


@pytest.fixture
def repository(clock):
    return MemoryRepository(clock)


def test_of_an_answer(repository, clock):
    """A call that was struck has finished the answer, or has not; the next one says which."""
    queue, waiting = asking(repository, clock), []

    def parked():
        handle = queue.submit("ask")
        queue.run_all()
        waiting.append(handle)
        return f"{handle.id}/one"

    answer_id, given = parked(), {}
    web = Queue(repository, clock=clock)
    web.finish("event/warm", 1)
    point = 0
    while strike_at(point, lambda: web.finish(answer_id, "first")) is not None:  # noqa: B023
        given[waiting[-1].id] = "second" if web.finish(answer_id, "second") else "first"
        answer_id = parked()
        point += STEP
    given[waiting[-1].id] = "first"
    assert point > 500
    assert set(given.values()) == {"first", "second"}
    queue.stop()
    asking(repository, clock).run_all()  # the next queue that starts finds what was missed
    assert {h.id: repository.get_by_id(h.id).result for h in waiting} == given


def test_of_the_thread_that_asks(repository, clock):
    """As with ``caller_runs``, in the main thread. The task is asked for again, or waits."""
    handles = []

    def run(point):
        queue = asking(repository, clock)
        handles.append(queue.submit("ask"))
        try:
            queue.run_all()
        finally:
            queue.stop()

    for _ in every_strike(run, first=400, step=1499):
        pass
    queue = asking(repository, clock)
    for _ in range(3):  # the audit puts right what it finds two times in a row
        queue.advance(5)
    for handle in handles:
        if repository.statuses([handle.id]):
            assert queue.finish(f"{handle.id}/one", "given")
    queue.advance(5)
    ended = [repository.get_many([h.id]).get(h.id) for h in handles]
    assert {task.result for task in ended if task is not None} == {"given"}
    assert {task.status.value for task in ended if task is not None} == {"completed"}


def having_children(repository, clock):
    queue = ManualQueue(repository, clock=clock)
    queue.executor("leaf", max_attempts=1000)(lambda n: n)

    @queue.executor("top", max_attempts=1000)
    def top(ctx):
        for n in range(3):
            ctx.step(f"step {n}", lambda: 9000 * "x")
        return ctx.run_all("leaves", [Task(type="leaf", params={"n": n}) for n in range(3)])

    return queue


def test_of_the_thread_that_has_children(repository, clock):
    """No child is lost, or there twice, and no step is lost that was stored."""

    def run(point):
        queue = having_children(repository, clock)
        queue.submit("top")
        try:
            queue.run_all()
        finally:
            queue.stop()

    for _ in every_strike(run, first=400, step=2503):
        pass
    queue = having_children(repository, clock)
    for _ in range(4):
        queue.advance(5)
    # Also one whose submit was struck after it was stored.
    stored = repository.list(TaskFilter(type="top"))
    assert len(stored) > 5
    assert {task.status.value for task in stored} == {"completed"}
    assert all(task.result == [0, 1, 2] for task in stored)
    assert queue.count_tasks(type="leaf") == 3 * len(stored)
    assert queue.count_tasks(type="children", status="completed") == len(stored)
