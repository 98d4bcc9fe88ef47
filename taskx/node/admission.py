"""The admission of tasks whose types have limits.

A task of such a type never blocks other tasks: it stays in the repository until it may start, is fetched
then, and is counted when it starts. The count at the fetch is an estimate, which keeps tasks that cannot
start out of the buffer. The count at the start is exact.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence

from taskx.node.shared_limits import SharedBucket, SharedSlots
from taskx.stores.base import Repository
from taskx.tasks.clock import Clock
from taskx.tasks.errors import RepositoryError
from taskx.tasks.log import GuardedLogger, log
from taskx.tasks.rate import FULL, Limit, Rate

_ENDLESS = 1 << 31
NO_LIMIT = Limit(None, None, "node")


class OwnSlots:
    """The slots of one node, for running tasks."""

    def __init__(self, most: int, taken: int = 0) -> None:
        self._most = most
        #: The number of slots that are used; after a change of the limit it may be more than there are.
        self.taken = taken

    def free(self) -> int:
        """Return the number of free slots; 0, too, if more are taken than there are now."""
        return max(0, self._most - self.taken)

    def take(self, count: int) -> int:
        """Take ``count`` slots, or as many as are free; return how many."""
        got = min(count, self.free())
        self.taken += got
        return got

    def give(self, count: int) -> None:
        """Give back ``count`` slots."""
        self.taken -= count

    def rest(self, wanted: int) -> None:
        """Note that tasks wait for only ``wanted`` more slots; one node's own slots stay with it."""


class OwnBucket:
    """The token bucket of one node: each start takes a token.

    It is full when the node starts. If it replaces another bucket, because the rate was changed, it has as
    many tokens as that one.
    """

    def __init__(self, rate: Rate, clock: Clock, before: OwnBucket | None = None) -> None:
        self._rate = rate
        self._clock = clock
        self._mark = FULL
        if before is not None:
            self._mark = rate.mark_of(before.tokens(), clock.monotonic())

    def tokens(self) -> int:
        """Return the number of tokens."""
        return self._rate.tokens(self._mark, self._clock.monotonic())

    def take(self, count: int) -> int:
        """Take ``count`` tokens, or as many as there are; return how many."""
        now = self._clock.monotonic()
        got = min(count, self._rate.tokens(self._mark, now))
        self._mark = self._rate.take(self._mark, now, got)
        return got

    def put_back(self, count: int, taken_at: float) -> None:
        """Put back ``count`` tokens that were taken at this time and not used."""
        self._mark = self._rate.put_back(self._mark, count, self._clock.monotonic() - taken_at)

    def when(self, count: int) -> float:
        """Return the time, on the monotonic clock, at which there will be ``count`` tokens."""
        return self._rate.when(self._mark, count)


_Slots = OwnSlots | SharedSlots
_Bucket = OwnBucket | SharedBucket


def until_token(bucket: _Bucket, clock: Clock) -> float:
    """Return the seconds until a token comes into a bucket; 0 if there is one."""
    return 0.0 if bucket.tokens() else max(0.0, bucket.when(1) - clock.monotonic())


class _Gate:
    """The limits of one type, and the fetched tasks that they will admit."""

    def __init__(self, clock: Clock) -> None:
        #: The limits that ``slots`` and ``bucket`` keep.
        self.limit = NO_LIMIT
        self.slots: _Slots | None = None
        self.bucket: _Bucket | None = None
        self._clock = clock
        #: Tasks that were fetched and have not started. A task that left the buffer in another way stays
        #: here until the next fetch.
        self.fetched: set[str] = set()
        #: True if more tasks may be stored than the last fetch asked for.
        self.more = True
        #: The time of the next fetch, on the monotonic clock; None: not before a run ends.
        self.fetch_at: float | None = None

    def admit_resumed(self, count: int) -> int:
        """Admit tasks that go on with an attempt: that takes no token."""
        return count if self.slots is None else self.slots.take(count)

    def admit(self, count: int) -> int:
        got = count if self.slots is None else self.slots.take(count)
        if self.bucket is None:
            return got
        try:
            tokens = self.bucket.take(got) if got else 0
        except BaseException:  # an interrupt, too: no other code knows of these slots
            self._give(got)
            raise
        self._give(got - tokens)
        return tokens

    def _give(self, count: int) -> None:
        if self.slots is not None and count:
            self.slots.give(count)

    def leave(self, unused: float | None) -> None:
        """Note that a task has ended; ``unused`` is when it took a token that it did not use."""
        self._give(1)
        if self.bucket is not None and unused is not None:
            self.bucket.put_back(1, unused)

    def room(self) -> int:
        slots = _ENDLESS if self.slots is None else self.slots.free()
        tokens = _ENDLESS if self.bucket is None else self.bucket.tokens()
        return min(slots, tokens)

    def plan_fetch(self, waiting: int) -> None:
        """Fetch more tasks when there is a token more than tasks that wait: that may be now."""
        if self.bucket is None:
            return
        now = self._clock.monotonic()
        self.fetch_at = self.bucket.when(waiting + 1)
        if self.fetch_at <= now and not (self.more and self.room() > waiting):
            self.fetch_at = None


class Admission:
    """Admits the tasks of limited types, on one node.

    Args:
        limits: the limits of each type; types may be added later.
        repository: keeps the limits that all nodes share.
        node: the id of the node.
        clock: the clock of the token buckets.
        freed: called when a task of a limited type may start that could not before.
        scheduled: called when :meth:`next_fetch` may be sooner than before.
        log: the logger.
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
        # Shared slots that are no longer used, and may not have been given back yet.
        self._left: list[SharedSlots] = []
        #: The gate that admitted each task that has not ended.
        self.admitted: dict[str, _Gate] = {}
        # When those of them took a token that did not only go on, on the monotonic clock.
        self._tokens: dict[str, float] = {}

    def _gate(self, type: str) -> _Gate:
        gate = self._gates.get(type)
        if gate is None:
            gate = _Gate(self._clock)
            self._set_limit(gate, type, self._limits.get(type, NO_LIMIT))
            self._gates[type] = gate
        return gate

    def _set_limit(self, gate: _Gate, type: str, limit: Limit) -> None:
        """Give a gate other limits; the running tasks that it has admitted keep their slots."""
        gate.slots = self._slots(type, limit, self._taken(gate))
        gate.bucket = self._bucket(type, limit, gate.bucket)
        gate.limit, gate.more, gate.fetch_at = limit, True, None

    def _slots(self, type: str, limit: Limit, taken: int) -> _Slots | None:
        most = limit.max_concurrency
        if most is None:
            return None
        if limit.scope == "global":
            return SharedSlots(self._repository, self._node, type, most, log=self._log, taken=taken)
        return OwnSlots(most, taken)

    def _bucket(self, type: str, limit: Limit, before: _Bucket | None) -> _Bucket | None:
        if limit.rate is None:
            return None
        if limit.scope == "global":
            return SharedBucket(self._repository, type, limit.rate, self._clock, self._log)
        return OwnBucket(limit.rate, self._clock, before if isinstance(before, OwnBucket) else None)

    # --- limits that change while tasks run

    def follow_limits(self) -> None:
        """Follow the limits that were changed, in the mapping that the object was given."""
        with self._lock:
            for type, gate in list(self._gates.items()):
                limit = self._limits.get(type, NO_LIMIT)
                if limit != gate.limit:
                    before = gate.slots
                    self._set_limit(gate, type, limit)
                    if isinstance(before, SharedSlots) and not isinstance(gate.slots, SharedSlots):
                        self._left.append(before)
                elif gate.slots is not None:  # an interrupt may have cut adopt() short
                    gate.slots.taken = self._taken(gate)

    def adopt(self, type: str, task_id: str, runs: Container[str]) -> None:
        """Count a running task that was started before its type was limited.

        ``runs`` has the ids of the tasks that run, and loses each of them before :meth:`over` is called.
        """
        with self._lock:
            if task_id in self.admitted:
                return
            gate = self._gate(type)
            self.admitted[task_id] = gate
            if task_id not in runs:  # it has ended since; over() may have been called already
                del self.admitted[task_id]
            elif gate.slots is not None:
                gate.slots.taken = self._taken(gate)

    def _taken(self, gate: _Gate) -> int:
        return sum(one is gate for one in self.admitted.values())

    # --- at the fetch

    def room(self, type: str, held: Collection[str]) -> tuple[int, int]:
        """Return how many tasks of a type to fetch, and how many of that type are in the buffer.

        ``held`` has the ids of the tasks in the buffer.
        """
        with self._lock:
            gate = self._gate(type)
            gate.fetched = {i for i in gate.fetched if i in held and i not in self.admitted}
            waiting = len(gate.fetched)
            room = max(0, gate.room() - waiting)
            if not room:
                gate.more = True
                gate.plan_fetch(waiting)  # another node may have taken the last token
                self._tell_scheduled(gate)
            return room, waiting

    def fetch_done(self, type: str, asked: int, found: int) -> None:
        """Note that a fetch asked for ``asked`` tasks of a type, and found ``found``."""
        with self._lock:
            gate = self._gate(type)
            waiting = len(gate.fetched) + found
            gate.more = found == asked
            if gate.more:
                gate.plan_fetch(waiting)
                self._tell_scheduled(gate)
            elif gate.slots is not None:
                gate.slots.rest(waiting)

    def fetched(self, type: str, task_id: str) -> None:
        """Note that a fetched task goes into the buffer."""
        with self._lock:
            self._gate(type).fetched.add(task_id)

    def until_token(self, type: str) -> float:
        """Return the seconds until a token of a type with a rate of this node comes; 0 if there is one.

        Without the lock: the caller may be in a transaction for which the thread that has the lock waits.
        """
        gate = self._gates.get(type)
        bucket = None if gate is None else gate.bucket
        return until_token(bucket, self._clock) if isinstance(bucket, OwnBucket) else 0.0

    def open(self, type: str) -> bool:
        """Return True if a stored task may start now, assuming that no other task of its type waits.

        This is an estimate. True, too, if the repository fails.
        """
        with self._lock:
            gate = self._gate(type)
            try:
                is_open = gate.room() > 0
            except RepositoryError:
                return True
            gate.more |= not is_open
            return is_open

    # --- at the start, and at the end

    def slots_free(self, type: str) -> bool:
        """Return True if a task of the type that goes on with an attempt may start now."""
        with self._lock:
            slots = self._gate(type).slots
            return slots is None or slots.free() > 0

    def admit(
        self, waiting: Mapping[str, Sequence[str]], resumed: Collection[str] = ()
    ) -> set[str]:
        """Admit tasks that are about to start, as far as the limits allow.

        Args:
            waiting: the ids of the tasks of each type, in order.
            resumed: those that go on with an attempt, and take no token.

        Returns:
            The ids of the admitted tasks. :meth:`over` must be called for each when it ends.

        Raises:
            RepositoryError: the repository failed; no task is admitted.
        """
        admitted: set[str] = set()
        with self._lock:
            now = self._clock.monotonic()  # before a token is taken
            try:
                for type, task_ids in waiting.items():
                    gate = self._gate(type)
                    gate.fetched.difference_update(task_ids)
                    known = [task_id for task_id in task_ids if task_id in resumed]
                    for task_id in known[: gate.admit_resumed(len(known))]:
                        self.admitted[task_id] = gate
                        admitted.add(task_id)
                    new = [task_id for task_id in task_ids if task_id not in resumed]
                    for task_id in new[: gate.admit(len(new))]:
                        if gate.bucket is not None:
                            self._tokens[task_id] = now
                        self.admitted[task_id] = gate
                        admitted.add(task_id)
                    gate.more |= not admitted.issuperset(task_ids)
                    gate.plan_fetch(len(gate.fetched))
                    self._tell_scheduled(gate)
            except BaseException:  # an interrupt, too: the caller calls over() for none of them
                for task_id in admitted:
                    self.admitted.pop(task_id).leave(self._tokens.pop(task_id, None))
                raise
        return admitted

    def over(self, task_id: str, *, ran: bool) -> None:
        """Note that an admitted task has ended. If it did not run, its token is put back."""
        with self._lock:
            gate = self.admitted.pop(task_id, None)
            if gate is not None:
                taken_at = self._tokens.pop(task_id, None)
                gate.leave(None if ran else taken_at)
        if gate is not None:
            self._freed()

    # --- time

    def _tell_scheduled(self, gate: _Gate) -> None:
        if gate.fetch_at is not None:
            self._scheduled()

    def next_fetch(self) -> float | None:
        """Return the time, on the monotonic clock, at which a token for more tasks will have come.

        None if no type waits for a token.
        """
        if not self._gates:
            return None
        return min(
            (gate.fetch_at for gate in list(self._gates.values()) if gate.fetch_at is not None),
            default=None,
        )

    def is_time(self) -> bool:
        """Return True if the time of a fetch has come since the last call."""
        moment = self.next_fetch()
        if moment is None or moment > self._clock.monotonic():
            return False
        with self._lock:
            now = self._clock.monotonic()
            for gate in self._gates.values():
                if gate.fetch_at is not None and gate.fetch_at <= now:
                    gate.fetch_at = None
        return True

    # --- limits that all nodes share

    def _shared(self) -> Iterator[SharedSlots | SharedBucket]:
        for gate in list(self._gates.values()):  # a log handler may submit a task, which adds one
            for part in (gate.slots, gate.bucket):
                if isinstance(part, (SharedSlots, SharedBucket)):
                    yield part

    def forget(self) -> None:
        """Read the shared limits again before their next use, because other nodes may have changed them."""
        if self._gates:
            with self._lock:
                for part in self._shared():
                    part.forget()

    def tend(self) -> None:
        """Maintain the shared limits; after a ``RepositoryError``, the next call does the rest."""
        if self._gates:
            with self._lock:
                while self._left:
                    self._left[-1].leave()
                    self._left.pop()
                for part in self._shared():
                    part.tend()

    def end(self) -> None:
        """Give back the node's part of the shared limits, because the node ends."""
        with self._lock:
            for part in [*self._left, *self._shared()]:
                part.leave()
