"""Tests of the defects that the campaign has found, each as small as possible."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from taskx import Config, Queue, SQLiteRepository
from taskx.tasks import lifecycle

from .campaign import LONGEST, until
from .hooks import wrap


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[Queue]:
    with SQLiteRepository(tmp_path / "tasks.db") as repository:
        queue = Queue(repository, Config(worker_num=1))
        yield queue
        queue.stop(10.0, cancel=True)


class Held:
    """Makes a caller of a function wait until the test sets ``go``."""

    def __init__(self) -> None:
        self.reached, self.go = threading.Event(), threading.Event()

    def __call__(self, inner, *args, **kwargs):
        self.reached.set()
        assert self.go.wait(LONGEST)
        return inner(*args, **kwargs)


def test_a_task_that_a_worker_starts_during_the_stop_does_not_run(queue, monkeypatch):
    """Stop did not see the task and left, and another process ran the task a second time."""
    held, ran = Held(), []
    monkeypatch.setattr(lifecycle, "start", lifecycle.start)  # restored at the end
    wrap(lifecycle, "start", held)
    queue.executor("note")(lambda: ran.append(1))
    queue.start()
    handle = queue.submit("note", id="a")  # a caller's id: a worker starts it, not this thread
    assert held.reached.wait(LONGEST)
    assert queue.stop(timeout=0.0) == []
    until(
        lambda: [node.stopping for node in queue.repository.liveness.nodes()] == [True],
        "the node stops",
    )
    held.go.set()
    until(lambda: not queue.repository.liveness.nodes(), "the node leaves")
    task = handle.task()
    assert (task.status, task.owner, task.errors, task.crashes) == ("pending", "", 0, 0)
    assert not ran


def test_a_task_that_a_caller_starts_during_the_stop_does_not_run(tmp_path, monkeypatch):
    held, ran = Held(), []
    monkeypatch.setattr(lifecycle, "start", lifecycle.start)
    with SQLiteRepository(tmp_path / "tasks.db") as repository:
        queue = Queue(repository, Config(worker_num=1, buffer_size=1, overflow="caller_runs"))
        never = threading.Event()
        queue.executor("wait")(lambda: never.wait(LONGEST))
        queue.executor("note")(lambda: ran.append(1))
        queue.start()
        first = queue.submit("wait")
        until(first.running, "the first task runs")
        queue.submit("note")  # fills the buffer
        wrap(lifecycle, "start", held)
        caller = threading.Thread(target=queue.submit, args=("note",), kwargs={"id": "late"})
        caller.start()
        assert held.reached.wait(LONGEST)
        queue.stop(timeout=0.0)
        held.go.set()
        caller.join(LONGEST)
        assert repository.get_by_id("late").status == "pending"
        assert not ran
        never.set()
        until(lambda: not repository.liveness.nodes(), "the node leaves")


@pytest.mark.parametrize("after", [False, True], ids=["before the commit", "after the commit"])
def test_an_outcome_survives_a_memory_error(queue, monkeypatch, after):
    """The leader's MemoryError counted as an error of the write, and the outcome was dropped."""
    failed = []

    def around(inner, writes, **options):
        ends = [
            write
            for write in writes
            if write.id == "a" and "completed_at" in getattr(write, "changes", ())
        ]
        if not ends or failed:
            return inner(writes, **options)
        failed.append(1)
        if after:
            inner(writes, **options)
        raise MemoryError

    queue.executor("deep")(lambda: 42)
    queue.start()
    monkeypatch.setattr(queue.repository, "apply", queue.repository.apply)
    wrap(queue.repository, "apply", around)
    handle = queue.submit("deep", id="a")
    assert handle.result(LONGEST) == 42
    assert failed
    assert handle.task().starts == 1
