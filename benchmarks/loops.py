"""The base of the floors: TaskX's own writes in a plain loop."""

from __future__ import annotations

import queue
import threading
import time
from abc import ABC, abstractmethod

from benchmarks.harness import IDLE
from taskx import Task
from taskx.tasks import lifecycle
from taskx.tasks.clock import SYSTEM_CLOCK
from taskx.tasks.ids import new_id
from taskx.tasks.lifecycle import Ending
from taskx.tasks.writes import Insert, Update


def created(task_id: str) -> Insert:
    """Return the write by which ``submit`` stores a task."""
    now = SYSTEM_CLOCK.now_ms()
    return lifecycle.create(task_id=task_id, type="noop", params="{}", created_by="", now=now)


def started_and_finished(task_id: str) -> tuple[Update, Update]:
    """Return the writes of a task's start and of its outcome. The loop fills in other ids."""
    now = SYSTEM_CLOCK.now_ms()
    task = Task(type="noop", params={}, id=task_id, max_attempts=1, max_crashes=3)
    start = lifecycle.start(task, now, new_id())
    assert start is not None
    lifecycle.mark_started([task], [start])
    ending = Ending(
        returned=True, result="1", duration=0.00001, worker="host:1:aaaaaa taskx-worker-1"
    )
    [finish] = lifecycle.conclude(task, ending, now)
    return start, finish


class Loop(ABC):
    """One thread that stores, starts and finishes tasks by their index, on a fresh store.

    Attributes:
        count: the number of tasks.
    """

    count: int

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Close the store."""

    @abstractmethod
    def store(self, index: int) -> None:
        """Store a task, durably."""

    @abstractmethod
    def start(self, index: int) -> None:
        """Read a task and write its start, durably."""

    @abstractmethod
    def finish(self, index: int) -> None:
        """Write a task's outcome, durably."""

    @abstractmethod
    def insert_many(self) -> None:
        """Store all tasks at once."""

    def insert(self) -> None:
        """Store all tasks one by one."""
        for index in range(self.count):
            self.store(index)

    def start_and_finish(self) -> None:
        """Start and finish all stored tasks."""
        for index in range(self.count):
            self.start(index)
            self.finish(index)

    def insert_start_finish(self) -> None:
        """Store, start and finish each task."""
        for index in range(self.count):
            self.store(index)
            self.start(index)
            self.finish(index)

    def one_at_a_time(self) -> tuple[list[float], list[float]]:
        """Store on one thread, start and finish on another, with pauses.

        Returns:
            Microseconds from before each insert until after the start, and until the end is seen.
        """
        begins: list[float] = []
        results: list[float] = []
        handed: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        ended: queue.SimpleQueue[None] = queue.SimpleQueue()
        submitted = 0.0

        def work() -> None:
            while (index := handed.get()) is not None:
                self.start(index)
                begins.append(1e6 * (time.perf_counter() - submitted))
                self.finish(index)
                ended.put(None)

        thread = threading.Thread(target=work)
        thread.start()
        for index in range(self.count):
            time.sleep(IDLE)
            submitted = time.perf_counter()
            self.store(index)
            handed.put(index)
            ended.get()
            results.append(1e6 * (time.perf_counter() - submitted))
        handed.put(None)
        thread.join()
        return begins, results
