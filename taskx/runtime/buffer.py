"""The bounded buffer between those who submit and the workers: ids, and no task data."""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from heapq import heapify
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

from taskx.core.order import rank

if TYPE_CHECKING:
    from taskx.core.record import Stub
    from taskx.runtime.runner import Run


#: Waiting workers that one start serves at most. What starts together ends together and then waits
#: together, again and again: in small portions, the workers drift apart and find their way clear.
MOST_WAITING = 5
#: Seconds after which a worker's task counts as not short, whatever the others were.
TIED_UP = 0.002


class Item(NamedTuple):
    """A pending task in the buffer; sorts by priority (or what ageing makes of it), then age."""

    rank: int  # the smaller, the sooner
    created_at: int
    order: int
    id: str
    type: str
    fetched: bool


class Buffer(queue.PriorityQueue):  # type: ignore[type-arg]
    """A ``queue.PriorityQueue`` of ids with room for ``maxsize`` submitted tasks.

    A submit reserves its slot before the record is committed, so that what was accepted always
    fits. What is fetched from the repository has room of its own (``fetch_size``) and never makes a
    submit fail. Beside the ids lie the tasks that were started ahead, for the next free worker.
    """

    def __init__(self, maxsize: int, fetch_size: int, workers: int, ageing: int = 0) -> None:
        super().__init__(maxsize)
        #: Milliseconds of waiting that count as one priority more; 0 for none.
        self.ageing = ageing
        self.fetch_size = fetch_size
        self.workers = workers
        self.short = False  # whether tasks have lately been so short that waking costs more
        self.starting: list[Item] = []
        #: Since when each task that is being executed has been, on the monotonic clock.
        self.executing: dict[str, float] = {}
        self._taken = self._taken_before = 0
        self.submitted = 0  # submitted items and reserved slots
        self.fetched = 0
        self.ids: set[str] = set()
        self.ahead: deque[Run] = deque()
        self.ahead_since = 0.0
        self.closed = False
        self.idle = 0
        self._order = count()
        self._before = count(-1, -1)

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

    def turn(self) -> int:
        """A place in the order of tasks of equal priority and age; later ones come after it."""
        return next(self._order)

    def turn_before(self) -> int:
        """The place of one that was taken already: before all that are there, those put back included."""
        return next(self._before)

    def add(
        self,
        task_id: str,
        type: str,
        priority: int,
        created_at: int,
        run_at: int | None,
        order: int,
        *,
        fetched: bool = True,
    ) -> bool:
        """Put in a task: a submitted one into its reserved slot; a fetched one beside those.

        Returns:
            False if no worker was woken for it, though some wait.
        """
        with self.mutex:
            place = rank(priority, created_at, run_at, self.ageing) if self.ageing else -priority
            self._add(Item(place, created_at, order, task_id, type, fetched))
            return self._wake()

    def add_fetched(self, stub: Stub) -> None:
        """Put in a task as the repository lists it."""
        order = self.turn()
        self.add(stub.id, stub.type, stub.priority, stub.created_at, stub.run_at, order)

    def put_back(self, items: Iterable[Item]) -> None:
        """Put back items that were taken, to where they were in the order."""
        with self.mutex:
            for item in items:
                self._add(item._replace(fetched=True))
            self._wake()

    def discard(self, task_ids: Collection[str]) -> None:
        """Take out tasks that will not run, so that their slots are free."""
        with self.mutex:
            if not self.ids.isdisjoint(task_ids):
                gone = set(task_ids)
                self._take_out(lambda item: item.id in gone)

    def sweep(self, gone: Callable[[str], bool]) -> list[Item]:
        """Take out the tasks of certain types; returns them."""
        with self.mutex:
            return self._take_out(lambda item: gone(item.type))

    def _take_out(self, gone: Callable[[Item], bool]) -> list[Item]:
        out = [item for item in self.queue if gone(item)]
        if out:
            self.queue[:] = [item for item in self.queue if not gone(item)]
            heapify(self.queue)
            for item in out:
                self._account(item)
        return out

    def _add(self, item: Item) -> None:
        if item.fetched:
            self.fetched += 1
        self.ids.add(item.id)
        self._put(item)

    def _wake(self) -> bool:
        """Wake a waiting worker, unless tasks are short and another worker is at it.

        To wake a thread, and to have two of them want the interpreter, costs more than a short task.
        """
        if not self.idle:
            return True
        if self.short and self.workers - self.idle > self._tied_up():
            return False
        self.not_empty.notify()
        return True

    def _tied_up(self) -> int:
        """How many workers are at a task that is not short after all."""
        limit = time.monotonic() - TIED_UP
        return sum(began < limit for began in list(self.executing.values()))

    # --- for the workers

    def take(self, ahead: int, *, block: bool) -> Run | list[Item] | None:
        """A task started ahead, or items to start; None: nothing now, or closed while waiting.

        One worker at a time is given items, one for itself, one for each of a few that wait, and up to
        ``ahead`` in all; it must call :meth:`lay_out` or :meth:`put_back` and then
        :meth:`starting_done`. The others wait for what it lays out.
        """
        with self.mutex:
            while True:
                if self.closed:
                    return None
                if self.ahead:
                    self._taken += 1
                    self.ahead_since = time.monotonic()
                    run = self.ahead.popleft()
                    if self.ahead:
                        self._wake()
                    return run
                if self.queue and not self.starting:
                    most = min(max(ahead, 1 + min(self.idle, MOST_WAITING)), len(self.queue))
                    self.starting = [self._take_one() for _ in range(most)]
                    return self.starting
                if not block:
                    return None
                self.idle += 1
                try:
                    self.not_empty.wait()
                finally:
                    self.idle -= 1

    def _take_one(self) -> Item:
        item: Item = self._get()
        self._taken += 1
        self._account(item)
        return item

    def _account(self, item: Item) -> None:
        """An item has left: its room is free."""
        self.ids.discard(item.id)
        if item.fetched:
            self.fetched -= 1
        else:
            self.submitted -= 1
            self.not_full.notify()

    def lay_out(self, runs: list[Run]) -> None:
        """Offer tasks that were started to whichever worker is free."""
        with self.mutex:
            self.ahead_since = time.monotonic()
            self.ahead.extend(runs)
            if not self.short:
                self.not_empty.notify(len(runs))

    def starting_done(self) -> None:
        """Let another worker start tasks."""
        with self.mutex:
            self.starting = []
            if self.queue:
                self._wake()

    def nudge(self) -> bool:
        """Wake the waiting workers if there is something for them that nobody has taken any of since
        the last call; False if no worker waits."""
        with self.mutex:
            if self.idle and self._taken == self._taken_before:
                self.not_empty.notify(len(self.queue) + len(self.ahead))
            self._taken_before = self._taken
            return self.idle > 0

    def needs_care(self) -> bool:
        """Whether something lies here that may have to be handed on soon."""
        return bool(self.ahead or (self.idle and self.queue))

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
