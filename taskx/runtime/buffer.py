"""The bounded buffer between those who submit and the workers: ids, and no task data."""

from __future__ import annotations

import queue
import time
from collections import deque
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from taskx.runtime.runner import Run


class Item(NamedTuple):
    """A pending task in the buffer; sorts by priority, then age."""

    rank: int  # minus the priority
    created_at: int
    order: int
    id: str
    fetched: bool


class Buffer(queue.PriorityQueue):  # type: ignore[type-arg]
    """A ``queue.PriorityQueue`` of ids with room for ``maxsize`` submitted tasks.

    A submit reserves its slot before the record is committed, so that what was accepted always
    fits. What is fetched from the repository has room of its own (``fetch_size``) and never makes a
    submit fail. Beside the ids lie the tasks that were started ahead, for the next free worker.
    """

    def __init__(self, maxsize: int, fetch_size: int) -> None:
        super().__init__(maxsize)
        self.fetch_size = fetch_size
        self.submitted = 0  # submitted items and reserved slots
        self.fetched = 0
        self.ids: set[str] = set()
        self.ahead: deque[Run] = deque()
        self.ahead_since = 0.0
        self.closed = False
        self.idle = 0
        self._order = count()

    # --- for those who submit

    def reserve(self, slots: int = 1, timeout: float | None = 0.0) -> bool:
        """Reserve slots, waiting for room at most ``timeout`` seconds (None: for ever)."""
        with self.not_full:
            if self.submitted + slots > self.maxsize and timeout != 0.0:
                deadline = None if timeout is None else time.monotonic() + timeout
                while self.submitted + slots > self.maxsize and not self.closed:
                    left = None if deadline is None else deadline - time.monotonic()
                    if left is not None and left <= 0:
                        break
                    self.not_full.wait(left)
            if self.closed or self.submitted + slots > self.maxsize:
                return False
            self.submitted += slots
            return True

    def release(self, slots: int = 1) -> None:
        """Give reserved slots back."""
        with self.mutex:
            self.submitted -= slots
            self.not_full.notify(slots)

    def add(self, task_id: str, priority: int, created_at: int, *, fetched: bool) -> None:
        """Put in a task: a submitted one into its reserved slot, a fetched one beside those."""
        with self.mutex:
            if fetched:
                self.fetched += 1
            self.ids.add(task_id)
            self._put(Item(-priority, created_at, next(self._order), task_id, fetched))
            if self.idle:
                self.not_empty.notify()

    # --- for the workers

    def take(self, most: int, *, block: bool) -> Run | list[Item] | None:
        """A task started ahead, else up to ``most`` items; None: empty, or closed while waiting."""
        with self.mutex:
            while True:
                if self.closed:
                    return None
                if self.ahead:
                    run = self.ahead.popleft()
                    if self.ahead and self.idle:
                        self.not_empty.notify()
                    return run
                if self.queue:
                    return [self._take_one() for _ in range(min(most, len(self.queue)))]
                if not block:
                    return None
                self.idle += 1
                try:
                    self.not_empty.wait()
                finally:
                    self.idle -= 1

    def _take_one(self) -> Item:
        item: Item = self._get()
        self.ids.discard(item.id)
        if item.fetched:
            self.fetched -= 1
        else:
            self.submitted -= 1
            self.not_full.notify()
        return item

    def lay_out(self, runs: list[Run]) -> None:
        """Offer tasks that were started ahead to whichever worker is free."""
        with self.mutex:
            if not self.ahead:
                self.ahead_since = time.monotonic()
            self.ahead.extend(runs)
            if self.idle:
                self.not_empty.notify()

    def clear_ahead(self, older_than: float = 0.0) -> list[Run]:
        """Take away all tasks started ahead, if none was taken for ``older_than`` seconds."""
        with self.mutex:
            if not self.ahead or time.monotonic() - self.ahead_since < older_than:
                return []
            runs = list(self.ahead)
            self.ahead.clear()
            return runs

    # --- for the scheduler

    def room_to_fetch(self) -> int:
        """How many more fetched items there is room for."""
        return self.fetch_size - self.fetched

    def close(self) -> list[Item]:
        """Wake everybody, hand out nothing more; returns what was inside."""
        with self.mutex:
            self.closed = True
            items: list[Item] = list(self.queue)
            self.queue.clear()
            self.ids.clear()
            self.not_empty.notify_all()
            self.not_full.notify_all()
            return items
