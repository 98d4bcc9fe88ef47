"""The bounded buffer between those who submit and the workers: ids, and no task data."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from heapq import heapify, heappop, heappush
from itertools import count
from typing import NamedTuple

from taskx.common.bell import Bell
from taskx.core.record import Stub, rank

#: Polling interval, in seconds, of a thread that waits for room: a signal may cost it a wake-up.
LOOK_AGAIN = 0.5
# The heap is tidied if more than half of it, and more than this many items, have left the buffer.
_FEW_GONE = 64


class Item(NamedTuple):
    """A pending task in the buffer; sorts by priority (or what ageing makes of it), then age."""

    rank: int  # the smaller, the sooner
    created_at: int
    order: int
    id: str
    type: str
    fetched: bool


class Buffer:
    """A priority queue of ids with room for ``maxsize`` submitted tasks.

    A submit reserves its slot before the record is committed, so that what was accepted always
    fits. What is fetched from the repository has room of its own (``fetch_size``) and never makes a
    submit fail.

    Everything here can be done twice without harm, and cut short between any two lines: slots and
    tasks are known by name, not counted. A heap item that is not known any more is passed over.

    Args:
        maxsize: how many submitted tasks there is room for.
        fetch_size: how many fetched ones there is room for.
        wake: called when something was put in; False if no worker was woken for it, though some wait.
        ageing: milliseconds of waiting that count as one priority more; 0 for none.
    """

    def __init__(
        self, maxsize: int, fetch_size: int, wake: Callable[[], bool], ageing: int = 0
    ) -> None:
        self.maxsize = maxsize
        self.ageing = ageing
        self.fetch_size = fetch_size
        self._wake = wake
        #: What a worker has taken and starts, or puts back.
        self.starting: list[Item] = []
        # A finalizer that submits may run in any thread at any time, inside here, too.
        self._mutex = threading.RLock()
        self._heap: list[Item] = []
        self._submitted: dict[str, Item] = {}
        self._fetched: dict[str, Item] = {}
        #: The turns of submits that have a slot and have not put in their task yet.
        self.reserved: set[int] = set()
        self.closed = False
        #: Rung for threads that wait for room.
        self.room = Bell()
        self._order = count()
        self._before = count(-1, -1)
        # The time of the last submit; and the time to which the clock was set back since then, if it was.
        self._latest, self._set_back_to = -math.inf, math.inf

    # --- what is inside

    def __len__(self) -> int:
        return len(self._submitted) + len(self._fetched)

    def __contains__(self, task_id: str) -> bool:
        return task_id in self._submitted or task_id in self._fetched

    @property
    def submitted(self) -> int:
        """The number of slots that are taken, by submitted tasks and by tasks that are being stored."""
        return len(self._submitted) + len(self.reserved)

    @property
    def fetched(self) -> int:
        """The number of tasks that were fetched from the repository, or put back."""
        return len(self._fetched)

    @property
    def fetched_ids(self) -> list[str]:
        """The ids of the tasks that were fetched, or put back."""
        return list(self._fetched)

    @property
    def entered(self) -> bool:
        """True if the calling thread is inside one of these methods."""
        return self._mutex._is_owned()  # type: ignore[attr-defined, no-any-return]

    # --- for those who submit

    def reserve(self, turns: Sequence[int], timeout: float | None = 0.0) -> bool:
        """Reserve slots, waiting for room at most ``timeout`` seconds (None: for ever).

        Args:
            turns: a :meth:`turn` for each slot, which it is known by; :meth:`add` or :meth:`release`
                must follow.
            timeout: 0 to wait for nothing.
        """
        deadline = 0.0 if not timeout else time.monotonic() + timeout
        while True:
            with self._mutex:
                if self.closed:
                    return False
                if self.submitted + len(turns) <= self.maxsize:
                    self.reserved.update(turns)
                    return True
                if timeout == 0.0:
                    return False
                ear = self.room.listen()
            left = LOOK_AGAIN if timeout is None else deadline - time.monotonic()
            if left <= 0:
                self.room.leave(ear)
                return False
            self.room.wait(ear, min(left, LOOK_AGAIN))

    def release(self, turns: Collection[int]) -> None:
        """Give back the reserved slots that no task has taken."""
        self.reserved.difference_update(turns)
        self.room.ring(len(turns))

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
        """Put in a task: a submitted one into the slot that ``order`` reserved; a fetched one beside those.

        False if no worker was woken for it, though some wait.
        """
        with self._mutex:
            since = self._in_order(created_at, fetched=fetched)
            place = rank(priority, since, run_at, self.ageing) if self.ageing else -priority
            self._add(Item(place, since, order, task_id, type, fetched))
            return self._wake()

    def _in_order(self, created_at: int, *, fetched: bool) -> int:
        """Return the time by which a task is sorted: never earlier than that of a task submitted before it.

        After the clock was set back, what is stored later has an earlier time; it must not overtake.
        """
        if created_at >= self._latest:
            if not fetched:
                self._latest, self._set_back_to = created_at, math.inf
            return created_at
        if not fetched:
            self._set_back_to = min(self._set_back_to, created_at)
        return int(self._latest) if created_at >= self._set_back_to else created_at

    def add_fetched(self, stub: Stub) -> None:
        """Put in a task as the repository lists it."""
        order = self.turn()
        self.add(stub.id, stub.type, stub.priority, stub.created_at, stub.run_at, order)

    def put_back(self, items: Iterable[Item]) -> None:
        """Put back items that were taken, to where they were in the order."""
        with self._mutex:
            for item in items:
                self._add(item._replace(fetched=True))
            self._wake()

    def discard(self, task_ids: Iterable[str]) -> None:
        """Take out tasks that will not run, so that their slots are free."""
        with self._mutex:
            for task_id in task_ids:
                self._fetched.pop(task_id, None)
                if self._submitted.pop(task_id, None) is not None:
                    self.room.ring()
            self._tidy()

    def sweep(self, gone: Callable[[str], bool]) -> list[Item]:
        """Take out the tasks of certain types; returns them."""
        with self._mutex:
            inside = [*self._submitted.values(), *self._fetched.values()]
        out = [item for item in inside if gone(item.type)]
        self.discard([item.id for item in out])
        return out

    def _add(self, item: Item) -> None:
        heappush(self._heap, item)  # first: an id that is known but not in the heap would never run
        (self._fetched if item.fetched else self._submitted)[item.id] = item
        self.reserved.discard(item.order)

    def _is_here(self, item: Item) -> bool:
        return (self._fetched if item.fetched else self._submitted).get(item.id) is item

    def _tidy(self) -> None:
        """Remove items that have left the buffer from the heap, once they are many."""
        if len(self._heap) <= 2 * len(self) + _FEW_GONE:
            return
        while True:
            heap = [*self._fetched.values(), *self._submitted.values()]
            heapify(heap)
            self._heap = heap
            if len(heap) >= len(self):
                return  # else a finalizer submitted before the last assignment

    # --- for the workers

    def take(self, most: int) -> list[Item]:
        """Take the next tasks, at most ``most``, to start them; none while another worker starts some.

        The worker calls :meth:`started` when it has started them or put them back.
        """
        with self._mutex:
            if self.starting or self.closed:
                return []
            items: list[Item] = []
            while len(items) < most and self._heap:
                item = heappop(self._heap)
                if not self._is_here(item):
                    continue
                if item.fetched:
                    del self._fetched[item.id]
                else:
                    del self._submitted[item.id]
                    if self.room.listening:
                        self.room.ring()
                items.append(item)
            self.starting = items
            return items

    def started(self) -> None:
        """Let another worker take tasks."""
        with self._mutex:
            self.starting = []
            if len(self):
                self._wake()

    def has_next(self) -> bool:
        """Return whether :meth:`take` would give a worker anything; once closed, none need wait."""
        return self.closed or (not self.starting and len(self) > 0)

    # --- for the housekeeper

    def room_to_fetch(self) -> int:
        """Return how many more fetched items there is room for; none once it is closed."""
        return 0 if self.closed else self.fetch_size - self.fetched

    def close(self) -> None:
        """Wake who waits for room, and hand out nothing more."""
        with self._mutex:
            self.closed = True
            self._submitted.clear()
            self._fetched.clear()
            self._heap.clear()
        self.room.ring_all()
