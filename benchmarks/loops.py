"""What a floor is: the same writes as TaskX's, in a bare loop."""

from __future__ import annotations

import queue
import threading
import time
from abc import ABC, abstractmethod

from benchmarks.harness import IDLE


class Loop(ABC):
    """One thread that stores, starts and finishes tasks by their index, on a fresh store.

    Attributes:
        count: how many tasks it has.
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
        """Read a task, and write that it runs, durably."""

    @abstractmethod
    def finish(self, index: int) -> None:
        """Write a task's outcome, durably."""

    @abstractmethod
    def insert_many(self) -> None:
        """Store all tasks at once."""

    def insert(self) -> None:
        """Store them one by one."""
        for index in range(self.count):
            self.store(index)

    def start_and_finish(self) -> None:
        """Run what is stored."""
        for index in range(self.count):
            self.start(index)
            self.finish(index)

    def insert_start_finish(self) -> None:
        """Store each, and run it."""
        for index in range(self.count):
            self.store(index)
            self.start(index)
            self.finish(index)

    def one_at_a_time(self) -> tuple[list[float], list[float]]:
        """Store on one thread, start and finish on another, with pauses.

        Returns:
            microseconds from before the insert to after each start, and to when the end is seen.
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
