"""The bounded buffer between those who submit and the workers: ids, and no task data."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from heapq import heapify, heappop, heappush
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

from taskx.core.order import rank
from taskx.runtime.bell import Bell

if TYPE_CHECKING:
    from taskx.core.record import Stub
    from taskx.runtime.runner import Run


#: Waiting workers that one start serves at most. What starts together ends together and then waits
#: together, again and again: in small portions, the workers drift apart and find their way clear.
MOST_WAITING = 5
#: Seconds after which a worker's task counts as not short, whatever the others were.
TIED_UP = 0.002
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
    submit fail. Beside the ids lie the tasks that were started ahead, for the next free worker.

    Everything here can be done twice without harm, and cut short between any two lines: slots and
    tasks are known by name, not counted. A heap item that is not known any more is passed over.
    """

    def __init__(self, maxsize: int, fetch_size: int, workers: int, ageing: int = 0) -> None:
        self.maxsize = maxsize
        #: Milliseconds of waiting that count as one priority more; 0 for none.
        self.ageing = ageing
        self.fetch_size = fetch_size
        self.workers = workers
        self.short = False  # whether tasks have lately been so short that waking costs more
        self.starting: list[Item] = []
        #: Since when each task that is being executed has been, on the monotonic clock.
        self.executing: dict[str, float] = {}
        self._taken = self._taken_before = 0
        # A finalizer that submits may run in any thread at any time, inside here, too.
        self._mutex = threading.RLock()
        self._heap: list[Item] = []
        self._submitted: dict[str, Item] = {}
        self._fetched: dict[str, Item] = {}
        #: The turns of submits that have a slot and have not put in their task yet.
        self.reserved: set[int] = set()
        self.ahead: deque[Run] = deque()
        self.ahead_since = 0.0
        self.closed = False
        self.idle = 0
        #: Rung for workers, and for threads that wait for room.
        self._work, self.room = Bell(), Bell()
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
    def ids(self) -> set[str]:
        """The ids of all tasks in the buffer. The cost grows with their number."""
        return {*self._submitted, *self._fetched}

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

        Returns:
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

    def _wake(self) -> bool:
        """Wake a waiting worker, unless tasks are short and another worker is at it.

        To wake a thread, and to have two of them want the interpreter, costs more than a short task.
        """
        if not self.idle:
            return True
        if self.short and self.workers - self.idle > self._tied_up():
            return False
        self._work.ring()
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
        while True:
            with self._mutex:
                if self.closed:
                    return None
                if self.ahead:
                    self._taken += 1
                    self.ahead_since = time.monotonic()
                    run = self.ahead.popleft()
                    if self.ahead:
                        self._wake()
                    return run
                if not self.starting and (items := self._take_some(ahead)):
                    self.starting = items
                    return items
                if not block:
                    return None
                ear = self._work.listen()
                self.idle += 1
            try:
                self._work.wait(ear)
            finally:
                with self._mutex:
                    self.idle -= 1

    def _take_some(self, ahead: int) -> list[Item]:
        most = min(max(ahead, 1 + min(self.idle, MOST_WAITING)), len(self))
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
        self._taken += len(items)
        return items

    def lay_out(self, runs: list[Run]) -> None:
        """Offer tasks that were started to whichever worker is free."""
        with self._mutex:
            self.ahead_since = time.monotonic()
            self.ahead.extend(runs)
            if not self.short:
                self._work.ring(len(runs))

    def starting_done(self) -> None:
        """Let another worker start tasks."""
        with self._mutex:
            self.starting = []
            if len(self):
                self._wake()

    def nudge(self) -> bool:
        """Wake the waiting workers if there is something for them that nobody has taken any of since
        the last call; False if no worker waits."""
        with self._mutex:
            if self.idle and self._taken == self._taken_before:
                self._work.ring(len(self) + len(self.ahead))
            self._taken_before = self._taken
            return self.idle > 0

    def needs_care(self) -> bool:
        """Whether something lies here that may have to be handed on soon."""
        return bool(self.ahead or (self.idle and len(self)))

    def clear_ahead(self, older_than: float = 0.0) -> list[Run]:
        """Take away all tasks started ahead, if none was taken for ``older_than`` seconds."""
        with self._mutex:
            if not self.ahead or time.monotonic() - self.ahead_since < older_than:
                return []
            runs = list(self.ahead)
            self.ahead.clear()
            return runs

    # --- for the scheduler

    def room_to_fetch(self) -> int:
        """How many more fetched items there is room for."""
        return self.fetch_size - self.fetched

    def close(self) -> None:
        """Wake everybody, and hand out nothing more."""
        with self._mutex:
            self.closed = True
            self._submitted.clear()
            self._fetched.clear()
            self._heap.clear()
        self._work.ring_all()
        self.room.ring_all()
