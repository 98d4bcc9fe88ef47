"""The admission of tasks whose types have limits.

A task of such a type is never in anybody's way: it is left in the repository until it may start, is fetched
then, and counted when it starts. What is counted at the fetch is an estimate, which keeps the buffer free
of what cannot start; what is counted at the start is exact.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from taskx.core.clock import Clock
from taskx.core.errors import RepositoryError
from taskx.core.log import GuardedLogger, log
from taskx.core.rate import FULL, Limit, Rate
from taskx.limiting.shared import SharedBucket, SharedSlots
from taskx.storage.base import Repository

_ENDLESS = 1 << 31


class OwnSlots:
    """Places for running tasks, of one node."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken = 0

    def free(self) -> int:
        """The number of free places."""
        return self._most - self._taken

    def take(self, count: int) -> int:
        """Take so many, or as many as are free; returns how many."""
        got = min(count, self.free())
        self._taken += got
        return got

    def give(self, count: int) -> None:
        """Give so many back that were taken."""
        self._taken -= count

    def rest(self, wanted: int) -> None:
        """There are tasks for no more than so many beside those that were taken: they stay its own."""


class OwnBucket:
    """Tokens of one node, one of which each start takes; all are there when the node starts."""

    def __init__(self, rate: Rate, clock: Clock) -> None:
        self._rate = rate
        self._clock = clock
        self._mark = FULL

    def tokens(self) -> int:
        """The number of tokens."""
        return self._rate.tokens(self._mark, self._clock.monotonic())

    def take(self, count: int) -> int:
        """Take so many, or as many as there are; returns how many."""
        now = self._clock.monotonic()
        got = min(count, self._rate.tokens(self._mark, now))
        self._mark = self._rate.take(self._mark, now, got)
        return got

    def put_back(self, count: int) -> None:
        """Put so many back that were taken, and not used."""
        self._mark = self._rate.put_back(self._mark, count)

    def when(self, count: int) -> float:
        """The time at which there will be so many, on the monotonic clock."""
        return self._rate.when(self._mark, count)


_Slots = OwnSlots | SharedSlots
_Bucket = OwnBucket | SharedBucket


class _Gate:
    """The limits of one type, and the tasks that were fetched for it."""

    def __init__(self, slots: _Slots | None, bucket: _Bucket | None, clock: Clock) -> None:
        self.slots = slots
        self.bucket = bucket
        self._clock = clock
        #: Fetched, and not started yet; what has left the buffer otherwise is in here a while longer.
        self.fetched: set[str] = set()
        #: Whether more may be stored than was asked for at the last look.
        self.more = True
        #: When to look for more, on the monotonic clock; None for not before something ends.
        self.look_at: float | None = None

    def admit(self, count: int) -> int:
        got = count if self.slots is None else self.slots.take(count)
        if self.bucket is None:
            return got
        try:
            tokens = self.bucket.take(got) if got else 0
        except BaseException:  # an interrupt, too: nobody else knows of these places
            self._give(got)
            raise
        self._give(got - tokens)
        return tokens

    def _give(self, count: int) -> None:
        if self.slots is not None and count:
            self.slots.give(count)

    def leave(self, *, ran: bool) -> None:
        self._give(1)
        if self.bucket is not None and not ran:
            self.bucket.put_back(1)

    def room(self) -> int:
        slots = _ENDLESS if self.slots is None else self.slots.free()
        tokens = _ENDLESS if self.bucket is None else self.bucket.tokens()
        return min(slots, tokens)

    def look_again(self, waiting: int) -> None:
        """Look for more when there is a token beyond those for what waits: that may be now."""
        if self.bucket is None:
            return
        now = self._clock.monotonic()
        self.look_at = self.bucket.when(waiting + 1)
        if self.look_at <= now and not (self.more and self.room() > waiting):
            self.look_at = None


class Admission:
    """Admits tasks of the types that have limits, on one node.

    Args:
        limits: those of each type; types may be added.
        repository: keeps those that all nodes share.
        node: the id of the node.
        freed: called when a task of a limited type may start that could not before.
        scheduled: called when :meth:`next_look` may be sooner than it was.
    """

    def __init__(
        self,
        limits: Mapping[str, Limit],
        repository: Repository,
        node: str,
        clock: Clock,
        freed: Callable[[], None],
        scheduled: Callable[[], None],
        log: GuardedLogger = log,
    ) -> None:
        self._limits = limits
        self._repository = repository
        self._node = node
        self._clock = clock
        self._freed = freed
        self._scheduled = scheduled
        self._log = log
        self._lock = threading.RLock()
        self._gates: dict[str, _Gate] = {}
        #: By what each task was admitted that has not ended.
        self.admitted: dict[str, _Gate] = {}

    def _gate(self, type: str) -> _Gate:
        gate = self._gates.get(type)
        if gate is None:
            slots, bucket = self._parts(type, self._limits[type])
            gate = self._gates[type] = _Gate(slots, bucket, self._clock)
        return gate

    def _parts(self, type: str, limit: Limit) -> tuple[_Slots | None, _Bucket | None]:
        most, rate, clock = limit.max_concurrency, limit.rate, self._clock
        slots: _Slots | None = None
        bucket: _Bucket | None = None
        if limit.scope == "global":
            repository, node, log = self._repository, self._node, self._log
            if most is not None:
                slots = SharedSlots(repository, node, type, most, log)
            if rate is not None:
                bucket = SharedBucket(repository, type, rate, clock, log)
        else:
            slots = None if most is None else OwnSlots(most)
            bucket = None if rate is None else OwnBucket(rate, clock)
        return slots, bucket

    # --- at the fetch

    def room(self, type: str, held: Collection[str]) -> tuple[int, int]:
        """Return how many tasks of a type to fetch; and how many of it are among those in the buffer."""
        with self._lock:
            gate = self._gate(type)
            gate.fetched = {i for i in gate.fetched if i in held and i not in self.admitted}
            waiting = len(gate.fetched)
            room = max(0, gate.room() - waiting)
            gate.more |= not room
            return room, waiting

    def looked(self, type: str, asked: int, found: int) -> None:
        """So many tasks of a type were asked for, and so many found."""
        with self._lock:
            gate = self._gate(type)
            waiting = len(gate.fetched) + found
            gate.more = found == asked
            if gate.more:
                gate.look_again(waiting)
                self._tell_scheduled(gate)
            elif gate.slots is not None:
                gate.slots.rest(waiting)

    def fetched(self, type: str, task_id: str) -> None:
        """A task goes into the buffer."""
        with self._lock:
            self._gate(type).fetched.add(task_id)

    def open(self, type: str) -> bool:
        """Return whether a stored task may start now, if no other of its type waits; as far as is known."""
        with self._lock:
            gate = self._gate(type)
            try:
                is_open = gate.room() > 0
            except RepositoryError:
                return True
            gate.more |= not is_open
            return is_open

    # --- at the start, and at the end

    def admit(self, waiting: Mapping[str, Sequence[str]]) -> set[str]:
        """Of tasks that are about to start, by type and in order, those that may.

        Each must be told of by :meth:`over`.

        Raises:
            RepositoryError: the repository failed; none may.
        """
        admitted: set[str] = set()
        with self._lock:
            try:
                for type, task_ids in waiting.items():
                    gate = self._gate(type)
                    gate.fetched.difference_update(task_ids)
                    got = gate.admit(len(task_ids))
                    for task_id in task_ids[:got]:
                        self.admitted[task_id] = gate
                        admitted.add(task_id)
                    gate.more |= got < len(task_ids)
                    gate.look_again(len(gate.fetched))
                    self._tell_scheduled(gate)
            except BaseException:  # an interrupt, too: whoever asked will tell of none of them
                for task_id in admitted:
                    self.admitted.pop(task_id).leave(ran=False)
                raise
        return admitted

    def over(self, task_id: str, *, ran: bool) -> None:
        """A task that was admitted has ended, or has not been executed."""
        with self._lock:
            gate = self.admitted.pop(task_id, None)
            if gate is not None:
                gate.leave(ran=ran)
        if gate is not None:
            self._freed()

    # --- time

    def _tell_scheduled(self, gate: _Gate) -> None:
        if gate.look_at is not None:
            self._scheduled()

    def next_look(self) -> float | None:
        """The time at which the token of more tasks will have come, on the monotonic clock."""
        if not self._gates:
            return None
        return min(
            (gate.look_at for gate in list(self._gates.values()) if gate.look_at is not None),
            default=None,
        )

    def is_time(self) -> bool:
        """Return whether such a moment has come since the last call."""
        moment = self.next_look()
        if moment is None or moment > self._clock.monotonic():
            return False
        with self._lock:
            now = self._clock.monotonic()
            for gate in self._gates.values():
                if gate.look_at is not None and gate.look_at <= now:
                    gate.look_at = None
        return True

    # --- what all nodes share

    def _shared(self) -> Iterator[SharedSlots | SharedBucket]:
        for gate in list(self._gates.values()):  # a log handler may submit what adds one
            for part in (gate.slots, gate.bucket):
                if isinstance(part, (SharedSlots, SharedBucket)):
                    yield part

    def forget(self) -> None:
        """Others may have changed what they share with this node."""
        if self._gates:
            with self._lock:
                for part in self._shared():
                    part.forget()

    def tend(self) -> None:
        """Look after what is shared; what a ``RepositoryError`` cuts short is done next time."""
        if self._gates:
            with self._lock:
                for part in self._shared():
                    part.tend()

    def end(self) -> None:
        """The node ends: what it has of what is shared may be others'."""
        with self._lock:
            for part in self._shared():
                part.leave()
