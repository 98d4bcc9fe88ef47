"""The bounded buffer between submitters and workers: ids, and no task data."""

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
from taskx.core.timing import DEFAULT_TIMING

# The heap is tidied if more than half of it, and more than this many items, have left the buffer.
_FEW_GONE = 64


class Item(NamedTuple):
    """A pending task in the buffer; sorts by priority (or what ageing makes of it), then age."""

    rank: int  # the smallest comes first
    created_at: int
    order: int
    id: str
    type: str
    fetched: bool


class Buffer:
    """A priority queue of ids with room for ``maxsize`` submitted tasks.

    A submit reserves its slot before the record is committed, so that an accepted task always fits.
    Tasks fetched from the repository have room of their own (``fetch_size``) and never make a submit
    fail.

    Each step can be done twice without harm, and interrupted between any two lines: slots and tasks
    are known by name, not counted. A heap item that is no longer known is passed over.

    Args:
        maxsize: the number of submitted tasks that fit.
        fetch_size: the number of fetched tasks that fit.
        wake: called when a task was put in; returns False if workers wait and none was woken.
        ageing: milliseconds of waiting that count as one step of priority; 0 for no ageing.
        room_every: seconds between polls of a thread that waits for room: a signal may lose its wake-up.
    """

    def __init__(
        self,
        maxsize: int,
        fetch_size: int,
        wake: Callable[[], bool],
        ageing: int = 0,
        room_every: float = DEFAULT_TIMING.signals_every,
    ) -> None:
        self.maxsize = maxsize
        self._room_every = room_every
        self.ageing = ageing
        self.fetch_size = fetch_size
        self._wake = wake
        #: The items that a worker has taken and is about to start or put back.
        self.starting: list[Item] = []
        # Reentrant: a finalizer that submits may run in any thread at any time, also inside this class.
        self._mutex = threading.RLock()
        self._heap: list[Item] = []
        self._submitted: dict[str, Item] = {}
        self._fetched: dict[str, Item] = {}
        #: The numbers of reserved slots whose submits have not put in their task yet.
        self.reserved: set[int] = set()
        self.closed = False
        #: Rung for threads that wait for room.
        self.room = Bell()
        self._numbers = count()
        self._before = count(-1, -1)
        # The time of the last submit, and the time to which the clock was set back since then (or inf).
        self._latest, self._set_back_to = -math.inf, math.inf

    # --- contents

    def __len__(self) -> int:
        return len(self._submitted) + len(self._fetched)

    def __contains__(self, task_id: str) -> bool:
        return task_id in self._submitted or task_id in self._fetched

    @property
    def submitted(self) -> int:
        """The number of taken slots: submitted tasks, and tasks that are being stored."""
        return len(self._submitted) + len(self.reserved)

    @property
    def fetched(self) -> int:
        """The number of tasks in the buffer that were fetched from the repository, or put back."""
        return len(self._fetched)

    @property
    def fetched_ids(self) -> list[str]:
        """The ids of tasks that were fetched or put back, or that a worker is about to start."""
        with self._mutex:  # else a task that is put back in between would be in neither of the two
            return [*self._fetched, *(item.id for item in self.starting)]

    @property
    def entered(self) -> bool:
        """True if the calling thread is inside a method of this buffer."""
        return self._mutex._is_owned()  # type: ignore[attr-defined, no-any-return]

    # --- for submitters

    def reserve(self, slots: Sequence[int], timeout: float | None = 0.0) -> bool:
        """Reserve slots; return False if there is no room in time, or the buffer is closed.

        Args:
            slots: a number from :meth:`new_slot` for each slot. :meth:`add` or :meth:`release` must
                follow.
            timeout: the most seconds to wait for room; 0: do not wait; None: wait for ever.
        """
        deadline = 0.0 if not timeout else time.monotonic() + timeout
        while True:
            with self._mutex:
                if self.closed:
                    return False
                if self.submitted + len(slots) <= self.maxsize:
                    self.reserved.update(slots)
                    return True
                if timeout == 0.0:
                    return False
                ear = self.room.listen()
            left = self._room_every if timeout is None else deadline - time.monotonic()
            if left <= 0:
                self.room.leave(ear)
                return False
            self.room.wait(ear, min(left, self._room_every))

    def release(self, slots: Collection[int]) -> None:
        """Give back the reserved slots that no task has taken."""
        self.reserved.difference_update(slots)
        self.room.ring(len(slots))

    def new_slot(self) -> int:
        """Return the number of a new slot.

        It sorts a task among those of equal priority and age: after the tasks with earlier numbers.
        """
        return next(self._numbers)

    def slot_before(self) -> int:
        """Return a number that sorts before all others, for a task that was taken once already."""
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
        """Put in a task: a submitted one into its reserved slot ``order``, a fetched one beside the slots.

        Return False if workers wait and none was woken.
        """
        with self._mutex:
            self._insert(task_id, type, priority, created_at, run_at, order, fetched=fetched)
            return self._wake()

    def _insert(
        self,
        task_id: str,
        type: str,
        priority: int,
        created_at: int,
        run_at: int | None,
        order: int,
        *,
        fetched: bool,
    ) -> None:
        since = self._in_order(created_at, fetched=fetched)
        place = rank(priority, since, run_at, self.ageing) if self.ageing else -priority
        self._add(Item(place, since, order, task_id, type, fetched))

    def _in_order(self, created_at: int, *, fetched: bool) -> int:
        """Return the time by which a task is sorted: never earlier than for a task submitted before it.

        After the clock was set back, a task that is stored later has an earlier time. It must not overtake.
        """
        if created_at >= self._latest:
            if not fetched:
                self._latest, self._set_back_to = created_at, math.inf
            return created_at
        if not fetched:
            self._set_back_to = min(self._set_back_to, created_at)
        return int(self._latest) if created_at >= self._set_back_to else created_at

    def add_fetched(self, stubs: Iterable[Stub]) -> None:
        """Put in tasks that the repository listed."""
        with self._mutex:
            for task_id, _, _, priority, created_at, _, type, run_at in stubs:
                order = next(self._numbers)
                self._insert(task_id, type, priority, created_at, run_at, order, fetched=True)
            self._wake()  # one worker: it takes some of them, and wakes the next one

    def put_back(self, items: Iterable[Item]) -> None:
        """Put back items that were taken, in their old place in the sort order."""
        with self._mutex:
            for item in items:
                self._add(item._replace(fetched=True))
            self._wake()

    def discard(self, task_ids: Iterable[str]) -> None:
        """Remove tasks that will not run, and free their slots."""
        with self._mutex:
            for task_id in task_ids:
                self._fetched.pop(task_id, None)
                if self._submitted.pop(task_id, None) is not None:
                    self.room.ring()
            self._tidy()

    def sweep(self, gone: Callable[[str], bool]) -> list[Item]:
        """Remove and return the tasks of each type for which ``gone`` returns True."""
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
        """Remove items that have left the buffer from the heap, once there are many."""
        if len(self._heap) <= 2 * len(self) + _FEW_GONE:
            return
        while True:
            heap = [*self._fetched.values(), *self._submitted.values()]
            heapify(heap)
            self._heap = heap
            if len(heap) >= len(self):
                return  # otherwise a finalizer submitted before the last assignment

    # --- for the workers

    def take(self, most: int) -> list[Item]:
        """Take the next tasks, at most ``most``, to start them; none while another worker starts tasks.

        The worker must call :meth:`started` when it has started them or put them back.
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
        """Return True if :meth:`take` would return a task, or if the buffer is closed."""
        return self.closed or (not self.starting and len(self) > 0)

    # --- for the housekeeper

    def set_fetch_size(self, number: int) -> None:
        """Set the number of fetched tasks that fit."""
        self.fetch_size = number

    def room_to_fetch(self) -> int:
        """Return the number of further fetched tasks that fit; 0 if the buffer is closed."""
        return 0 if self.closed else self.fetch_size - self.fetched

    def close(self) -> None:
        """Hand out nothing more, and wake the threads that wait for room."""
        with self._mutex:
            self.closed = True
            self._submitted.clear()
            self._fetched.clear()
            self._heap.clear()
        self.room.ring_all()
