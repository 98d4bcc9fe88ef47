"""The bounded buffer between submitters and workers: ids, and the rows of small tasks of this process."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from heapq import heappop, heappush
from itertools import count, islice
from types import MappingProxyType
from typing import Any, NamedTuple

from taskx.node.place import Place
from taskx.tasks.bell import Bell
from taskx.tasks.record import Stub, is_plain, rank
from taskx.tasks.timing import DEFAULT_TIMING
from taskx.tasks.writes import Insert, maker

# The line is tidied if more than half of it, and more than this many items, have left the buffer.
_FEW_GONE = 64


class Item(NamedTuple):
    """A pending task in the buffer; sorts by priority (or what ageing makes of it), then age."""

    rank: int  # the smallest comes first
    created_at: int
    order: int
    id: str
    type: str
    fetched: bool
    #: The row of a small task, so that its start need not read it; None if it must. Whatever changes it in
    #: the repository raises ``starts``, by which a start is guarded.
    row: Mapping[str, Any] | None = None
    #: The time at which it entered its lot; 0 if it is in none.
    entered: float = 0.0
    #: True if it is known to start in a transaction of its own, and to belong to no lot of its type.
    apart: bool = False


_make_item = maker(Item)
#: The most tasks of each type that one call takes, and the seconds that a call waits for more.
Batches = Mapping[str, tuple[int, float]]
_SINGLE = (1, 0.0)


class Lot:
    """The tasks of one type that wait in the buffer to be started together, for one call."""

    def __init__(self) -> None:
        #: By id. One that is no longer known is passed over, as in the line.
        self.items: dict[str, Item] = {}
        self._in_order = True

    def add(self, item: Item) -> None:
        """Put in an item."""
        if self._in_order and self.items:
            self._in_order = next(reversed(self.items.values()), item) <= item
        self.items[item.id] = item

    def first(self) -> Item | None:
        """Return the item that comes first; None if there is none."""
        if not self._in_order:
            self._in_order = True  # first: whatever is added in between says if it is
            self.items = dict(sorted(self.items.items(), key=lambda pair: pair[1]))
        return next(iter(self.items.values()), None)


class Line:
    """Items that come out in their order. Most also come in so, and then cost no search for their place.

    An interrupt may lose the item that is taken out, and no other. If a finalizer puts in an item while
    another one is put in, one of them may come out too early.
    """

    def __init__(self, items: Iterable[Item] = ()) -> None:
        self._in_order = deque(sorted(items))
        self._others: list[Item] = []  # a heap of those that came after a later one

    def __len__(self) -> int:
        return len(self._in_order) + len(self._others)

    def push(self, item: Item) -> None:
        """Put in an item."""
        if self._in_order and item < self._in_order[-1]:
            heappush(self._others, item)
        else:
            self._in_order.append(item)

    def first(self) -> Item:
        """Return the first item, without removing it."""
        return min((*islice(self._in_order, 1), *islice(self._others, 1)))

    def pop(self) -> Item | None:
        """Remove and return the first item; None if there is none."""
        line, others = self._in_order, self._others
        if others and not (line and line[0] < others[0]):
            return heappop(others)
        return line.popleft() if line else None

    def clear(self) -> None:
        """Remove all items."""
        self._in_order.clear()
        self._others.clear()


class Slots(Place):
    """The place of new tasks in the buffer: slots, which are reserved before the tasks are stored.

    So an accepted task always fits. The tasks are stored with this node as their owner.

    Args:
        buffer: the buffer.
        node: the id of its node.
        writes: the writes that store the tasks.
        short_of_workers: called if workers wait and none was woken for the tasks.
    """

    def __init__(
        self,
        buffer: Buffer,
        node: str,
        writes: Sequence[Insert],
        short_of_workers: Callable[[], object],
    ) -> None:
        self.writes = writes
        self._buffer, self._node, self._short_of_workers = buffer, node, short_of_workers
        self._numbers = [next(buffer._numbers) for _ in writes]

    def reserve(self, timeout: float | None = 0.0) -> bool:
        """Reserve the slots; return False if there is no room in time, or the buffer is closed.

        ``timeout`` is the most seconds to wait for room; 0: do not wait; None: wait for ever.
        """
        buffer, numbers = self._buffer, self._numbers
        deadline = time.monotonic() + timeout if timeout else 0.0
        while True:
            with buffer._mutex:
                if buffer.closed:
                    return False
                taken = len(buffer._submitted) + len(buffer.reserved)
                if taken + len(numbers) <= buffer.maxsize:
                    buffer.reserved.update(numbers)
                    break
                if timeout == 0.0:
                    return False
                ear = buffer.room.listen()
            every = buffer._room_every
            left = every if timeout is None else deadline - time.monotonic()
            if left <= 0:
                buffer.room.leave(ear)
                return False
            buffer.room.wait(ear, min(left, every))
        for write in self.writes:
            write.row["owner"] = self._node
        return True

    def fill(self) -> None:
        """Put the tasks, which are stored now, into their slots."""
        buffer = self._buffer
        for write, number in zip(self.writes, self._numbers, strict=True):
            row = write.row
            since, priority = row["created_at"], row["priority"]
            with buffer._mutex:
                # After the clock was set back, a task that is stored later has an earlier time. It must not
                # overtake.
                if since >= buffer._latest:
                    buffer._latest, buffer._set_back_to = since, math.inf
                else:
                    buffer._set_back_to = min(buffer._set_back_to, since)
                    since = int(buffer._latest)
                ageing = buffer.ageing
                place = rank(priority, since, row["run_at"], ageing) if ageing else -priority
                bound = write.key or "seq" in row  # no other record can be taken for this one
                kept = row if bound and is_plain(row) else None
                what = row["id"], row["type"], False, kept, 0.0, False
                item = _make_item((place, since, number, *what))
                if buffer.batches and item.type in buffer.batches:
                    item = buffer._enter_lot(item)
                else:
                    buffer._line.push(item)  # first: one that is not in the line never runs
                buffer._submitted[item.id] = item
                buffer.reserved.discard(number)
        if self.writes and not buffer._call():
            self._short_of_workers()

    def release(self, error: BaseException | None) -> None:
        """Give back the slots that no task has taken."""
        self._buffer.release(self._numbers)


class Buffer:
    """A priority queue of tasks with room for ``maxsize`` submitted tasks.

    Tasks fetched from the repository have room of their own (``fetch_size``) and never make a submit
    fail.

    Each step can be done twice without harm, and interrupted between any two lines: slots and tasks
    are known by name, not counted. An item in line that is no longer known is passed over.

    Args:
        maxsize: the number of submitted tasks that fit.
        fetch_size: the number of fetched tasks that fit.
        wake: called when a task was put in; returns False if workers wait and none was woken.
        ageing: milliseconds of waiting that count as one step of priority; 0 for no ageing.
        room_every: seconds between polls of a thread that waits for room: a signal may lose its wake-up.
        batches: the types whose tasks wait in lots.
        waits: False if no lot waits for more tasks.
    """

    def __init__(
        self,
        maxsize: int,
        fetch_size: int,
        wake: Callable[[], bool],
        *,
        ageing: int = 0,
        room_every: float = DEFAULT_TIMING.signals_every,
        batches: Batches = MappingProxyType({}),
        waits: bool = True,
    ) -> None:
        self.maxsize = maxsize
        self.batches = batches
        self._waits = waits
        self.lots: dict[str, Lot] = {}
        self._room_every = room_every
        self.ageing = ageing
        self.fetch_size = fetch_size
        self._wake = wake
        #: The items that a worker has taken and is about to start or put back.
        self.starting: list[Item] = []
        # Reentrant: a finalizer that submits may run in any thread at any time, also inside this class.
        self._mutex = threading.RLock()
        self._line = Line()
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
    def ids(self) -> set[str]:
        """The ids of the tasks in the buffer."""
        with self._mutex:
            return {*self._submitted, *self._fetched}

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

    def release(self, slots: Collection[int]) -> None:
        """Give back the reserved slots that no task has taken."""
        self.reserved.difference_update(slots)
        self.room.ring(len(slots))

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
    ) -> None:
        """Put in a task that was stored before, beside the slots."""
        with self._mutex:
            self._enter([self._item(task_id, type, priority, created_at, run_at, order)])

    def _item(
        self,
        task_id: str,
        type: str,
        priority: int,
        created_at: int,
        run_at: int | None,
        order: int,
        row: Mapping[str, Any] | None = None,
    ) -> Item:
        # A task that was spilled after the clock was set back has an earlier time. It must not overtake.
        late = self._set_back_to <= created_at < self._latest
        since = int(self._latest) if late else created_at
        place = rank(priority, since, run_at, self.ageing) if self.ageing else -priority
        return _make_item((place, since, order, task_id, type, True, row, 0.0, False))

    def add_fetched(self, stubs: Iterable[Stub]) -> None:
        """Put in tasks that the repository listed."""
        item, numbers = self._item, self._numbers
        with self._mutex:
            self._enter(
                [
                    item(task_id, type, priority, created_at, run_at, next(numbers), row)
                    for task_id, _, _, priority, created_at, _, type, run_at, row in stubs
                ]
            )

    def holds(self, task_id: str) -> bool:
        """Return True if a task is in the buffer, or a worker is about to start it."""
        with self._mutex:  # else a task that is taken in between would be in neither of the two
            return task_id in self or any(item.id == task_id for item in self.starting)

    def put_back(self, items: Iterable[Item]) -> None:
        """Put back items that were taken, in their old place in the sort order."""
        self._enter(item._replace(fetched=True, row=None) for item in items)

    def _enter(self, items: Iterable[Item]) -> None:
        with self._mutex:
            for item in items:
                if item.type in self.batches and not item.apart:
                    item = self._enter_lot(item)
                else:  # first: an id that is known but not in line never runs
                    self._line.push(item)
                self._fetched[item.id] = item
            if len(self):  # a fetch may find nothing
                self._call()  # one worker: it takes some of them, and calls the next one

    def discard(self, task_ids: Iterable[str]) -> None:
        """Remove tasks that will not run, and free their slots."""
        with self._mutex:
            for task_id in task_ids:
                self._fetched.pop(task_id, None)
                if self._submitted.pop(task_id, None) is not None:
                    self.room.ring()
                for lot in self.lots.values():
                    lot.items.pop(task_id, None)
            self._tidy()

    def sweep(self, gone: Callable[[str], bool]) -> list[Item]:
        """Remove and return the tasks of each type for which ``gone`` returns True."""
        with self._mutex:
            inside = [*self._submitted.values(), *self._fetched.values()]
        out = [item for item in inside if gone(item.type)]
        self.discard([item.id for item in out])
        return out

    def _call(self) -> bool:
        """Wake a worker, unless one is just starting tasks, which calls the next one itself."""
        return bool(self.starting) or bool(self.lots and self._watched()) or self._wake()

    def _tidy(self) -> None:
        """Remove items that have left the buffer from the line, once there are many."""
        if len(self._line) > 2 * len(self) + _FEW_GONE:  # those in lots are counted, too
            self._renew_line()

    def _renew_line(self) -> None:
        while True:
            every = [*self._fetched.values(), *self._submitted.values()]
            self._line = Line(item for item in every if not item.entered)
            if len(every) >= len(self):
                return  # otherwise a finalizer submitted before the last assignment

    # --- for the workers

    def take(self, most: int) -> list[Item]:
        """Take the next tasks, at most ``most``, to start them; none while another worker starts tasks.

        The worker must call :meth:`started` when it has started them or put them back.
        """
        with self._mutex:
            if self.starting or self.closed:
                return []
            items = self._take_lot() if self.lots else []
            if items:
                self.starting = items
                return items
            line = self._line
            try:
                while len(items) < most:
                    if (item := line.pop()) is None:
                        break
                    inside = self._fetched if item.fetched else self._submitted
                    # Not ``get``: without the interpreter's lock, it waits for each other thread's object.
                    if item.id not in inside or inside[item.id] is not item:
                        continue
                    if item.apart:
                        if items:
                            self._line.push(item)
                            break
                        most = 1
                    del inside[item.id]
                    if self.room.listening and not item.fetched:
                        self.room.ring()
                    items.append(item)
                self.starting = items
            except BaseException:  # an interrupt: a known item may not be in line any more
                self._renew_line()
                raise
            return items

    def started(self) -> None:
        """Let a worker take tasks again; the caller wakes one if some are left."""
        with self._mutex:
            self.starting = []

    def has_next(self) -> bool:
        """Return True if :meth:`take` would return a task, or if the buffer is closed."""
        return self.closed or (not self.starting and self.ready > 0)

    # --- lots

    @property
    def ready(self) -> int:
        """The number of tasks in the buffer, without those of lots that wait for more."""
        number = len(self._submitted) + len(self._fetched)
        return number - self._waiting() if self.lots else number

    def _waiting(self) -> int:
        now = time.monotonic()
        return sum(
            len(lot.items)
            for type, lot in self.lots.copy().items()
            if (due := self._due(type, lot)) is not None and due > now
        )

    def _due(self, type: str, lot: Lot) -> float | None:
        """Return the time at which a lot can be taken; None if it is empty."""
        with self._mutex:
            first = lot.first()
            if first is None:
                return None
            most, wait = self.batches.get(type, _SINGLE)
            full = not self._waits or len(lot.items) >= most
            return -math.inf if full else first.entered + wait

    def _watched(self) -> bool:
        """Return True if all tasks are in lots that wait, and a worker was told of each lot before."""
        with self._mutex:
            sizes = [len(lot.items) for lot in self.lots.values()]
        return not self.ready and 1 not in sizes

    def until_lot(self) -> float | None:
        """Return the seconds until the next lot that waits can be taken; None if none waits."""
        now = time.monotonic()
        every = [self._due(type, lot) for type, lot in self.lots.copy().items()]
        return min((due - now for due in every if due is not None and due > now), default=None)

    def _enter_lot(self, item: Item) -> Item:
        """Put an item into the lot of its type."""
        lot = self.lots.get(item.type) or self.lots.setdefault(item.type, Lot())
        lot.add(item := item._replace(entered=time.monotonic()))
        return item

    def _take_lot(self) -> list[Item]:
        """Take the next lot; none if no lot can be taken, or another task comes first."""
        now = time.monotonic()
        due = [
            (first, lot)
            for type, lot in self.lots.items()
            if (at := self._due(type, lot)) is not None
            and at <= now
            and (first := lot.first()) is not None
        ]
        if not due:
            return []
        first, lot = min(due, key=lambda pair: pair[0])
        if self._line and self._line.first() < first:
            return []
        most, _ = self.batches.get(first.type, _SINGLE)
        items: list[Item] = []
        for item in [*islice(lot.items.values(), most)]:
            inside = self._fetched if item.fetched else self._submitted
            if inside.get(item.id) is item:
                del inside[item.id]  # first: one that is known but in no lot would never run
                items.append(item)
                if self.room.listening and not item.fetched:
                    self.room.ring()
            lot.items.pop(item.id, None)
        return items

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
            self._line.clear()
            self.lots.clear()
        self.room.ring_all()
