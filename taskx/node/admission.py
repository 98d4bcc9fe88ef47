"""The admission of tasks whose types have limits.

A task of such a type never blocks other tasks: it stays in the repository until it may start, is fetched
then, and is counted when it starts. The count at the fetch is an estimate, which keeps tasks that cannot
start out of the buffer. The count at the start is exact.

Each limit has a gate, which all its types share. A task passes all gates of its type, or none.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from taskx.node.shared_limits import (
    Bucket,
    Held,
    SharedBucket,
    SharedSlots,
    never_held,
    until_token,
)
from taskx.stores.base import Repository
from taskx.tasks.clock import Clock
from taskx.tasks.errors import RepositoryError
from taskx.tasks.log import GuardedLogger, log
from taskx.tasks.rate import ENDLESS, FULL, NO_LIMIT, NOTHING, Cost, Limit, Rates, is_key

#: The names of the limits of a type.
Names = tuple[str, ...]
# Most seconds for which a task is put off because its key is held.
_LOOK_AGAIN = 10.0


class Asking(NamedTuple):
    """A task that is about to start."""

    id: str
    cost: Cost = NOTHING
    resumed: bool = False  #: it goes on with an attempt, which takes no token


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
    """The token buckets of one node for the rates of one limit: each start takes its tokens.

    They are full when the node starts. If they replace others, because the rates were changed, they have as
    many tokens as those.
    """

    def __init__(
        self,
        rates: Rates,
        clock: Clock,
        before: OwnBucket | None = None,
        held: Callable[[], int] = lambda: 0,
    ) -> None:
        self._rates = rates
        self._clock = clock
        self._held = held
        marks = [FULL] * len(rates)
        if before is not None:
            now = clock.monotonic()
            pairs = zip(rates, before._rates, before._marks, strict=False)
            kept = [rate.mark_of(old.tokens(mark, now), now) for rate, old, mark in pairs]
            marks[: len(kept)] = kept
        self._marks: Sequence[float] = marks

    def _counting(self) -> Sequence[float]:
        """Return the marks as they count after a hold."""
        if not (until := self._held()):
            return self._marks
        return self._rates.held(self._marks, self._now() + (until - self._clock.now_ms()) / 1000)

    def _now(self) -> float:
        return self._clock.monotonic()

    def room(self, cost: Cost = NOTHING) -> int:
        """Return how many tasks of this cost may start."""
        return self._rates.room(self._counting(), self._now(), cost)

    def take(self, costs: Sequence[Cost]) -> int:
        """Take the tokens of the first of these tasks, of as many as may start; return how many."""
        got, marks = self._rates.take(self._counting(), self._now(), costs)
        if got:
            self._marks = marks
        return got

    def put_back(self, cost: Cost, taken_at: float) -> None:
        """Put back the tokens of a start that were taken at this time and not used."""
        self._marks = self._rates.put_back(self._marks, cost, self._clock.monotonic() - taken_at)

    def correct(self, unit: str, more: int) -> None:
        """Take more tokens of a unit, or put back some if ``more`` is negative."""
        self._marks = self._rates.correct(self._marks, self._now(), unit, more)

    def until(self, cost: Cost = NOTHING, count: int = 1) -> float:
        """Return the seconds until tasks of this cost may start."""
        return self._rates.until(self._counting(), self._now(), cost, count)


_Slots = OwnSlots | SharedSlots


class _Gate:
    """One limit, and the fetched tasks that it will admit."""

    def __init__(self, name: str, clock: Clock, held: Held) -> None:
        self.name = name
        self._held = held
        #: The limit that ``slots`` and ``bucket`` keep.
        self.limit = NO_LIMIT
        self.slots: _Slots | None = None
        self.bucket: Bucket | None = None
        self._clock = clock
        #: Tasks that were fetched and have not started. A task that left the buffer in another way stays
        #: here until the next fetch.
        self.fetched: set[str] = set()
        #: True if more tasks may be stored than the last fetch asked for.
        self.more = True
        #: The time of the next fetch, on the monotonic clock; None: not before a run ends.
        self.fetch_at: float | None = None
        #: The cost of the last task that was refused or admitted: as that of the next, which is not known.
        self.cost: Cost = NOTHING
        # True if the last task with tokens to take was refused. It comes first, however cheap others are.
        self._refused = False

    def held_for(self) -> float:
        """Return the seconds for which the limit is held; 0 if it is not."""
        until = self._held(self.name)
        return max(0.0, (until - self._clock.now_ms()) / 1000) if until else 0.0

    def admit(self, tasks: Sequence[Asking]) -> int:
        """Take slots and tokens for the first of these tasks, for as many as may start; return how many."""
        if self.held_for():
            return 0
        got = len(tasks) if self.slots is None else self.slots.take(len(tasks))
        if self.bucket is None:
            return got
        new = [task.cost for task in tasks[:got] if not task.resumed]
        try:
            waits = self._refused and not self.bucket.room(self.cost)
            paid = self.bucket.take(new) if new and not waits else 0
        except BaseException:  # an interrupt, too: no other code knows of these slots
            self._give(got)
            raise
        if new and not waits:
            self.cost, self._refused = new[min(paid, len(new) - 1)], paid < len(new)
        started = 0
        for task in tasks[:got]:
            if not task.resumed and not paid:
                break
            paid -= not task.resumed
            started += 1
        self._give(got - started)
        return started

    def _give(self, count: int) -> None:
        if self.slots is not None and count:
            self.slots.give(count)

    def leave(self, cost: Cost, unused: float | None) -> None:
        """Note that a task has ended; ``unused`` is when it took tokens that it did not use."""
        self._give(1)
        if self.bucket is not None and unused is not None:
            self.bucket.put_back(cost, unused)

    @property
    def _least(self) -> Cost:
        """The cost for which there must be tokens before a task is fetched."""
        return self.cost if self._refused else dict.fromkeys(self.cost, 1)

    def room(self) -> int:
        if self.held_for():
            return 0
        slots = ENDLESS if self.slots is None else self.slots.free()
        if self.bucket is None:
            return slots
        return min(slots, self.bucket.room(self.cost) or min(1, self.bucket.room(self._least)))

    def plan_fetch(self, waiting: int) -> None:
        """Fetch more tasks when there is a token more than tasks that wait: that may be now."""
        wait = self.held_for()
        if self.bucket is None and not wait:
            return
        now = self._clock.monotonic()
        if self.bucket is not None:
            wait = max(wait, self.bucket.until(self._least, waiting + 1))
        self.fetch_at = max(0.0, now + wait)
        if self.fetch_at <= now and not (self.more and self.room() > waiting):
            self.fetch_at = None


class _Admitted(NamedTuple):
    """An admitted task that has not ended."""

    gates: Sequence[_Gate]
    cost: Cost
    took_at: float | None  #: when it took tokens, on the monotonic clock; None if it only goes on

    def leave(self, *, ran: bool) -> None:
        """Pass the gates again, on the way out. If it did not run, its tokens are put back."""
        for gate in self.gates:
            gate.leave(self.cost, None if ran else self.took_at)


class Admission:
    """Admits the tasks of limited types, on one node.

    Args:
        limits: the limits, by name; some may be added later.
        limited: the names of the limits of each type that has some.
        repository: keeps the limits that all nodes share.
        node: the id of the node.
        clock: the clock of the token buckets.
        freed: called when a task of a limited type may start that could not before.
        scheduled: called when :meth:`next_fetch` may be sooner than before.
        log: the logger.
        limit_of_key: returns the limit of a key.
        held: returns until when a limit is held, in milliseconds; 0 if it is not.
    """

    def __init__(
        self,
        limits: Mapping[str, Limit],
        limited: Mapping[str, Names],
        repository: Repository,
        node: str,
        clock: Clock,
        *,
        freed: Callable[[], None],
        scheduled: Callable[[], None],
        log: GuardedLogger = log,
        limit_of_key: Callable[[str], Limit | None] = lambda key: None,
        held: Held = never_held,
    ) -> None:
        self._limits = limits
        self._limit_of_key = limit_of_key
        self._held = held
        self._limited = limited
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
        #: The tasks that have been admitted and have not ended.
        self.admitted: dict[str, _Admitted] = {}

    def _gate(self, name: str) -> _Gate:
        gate = self._gates.get(name)
        if gate is None:
            gate = _Gate(name, self._clock, self._held)
            self._set_limit(gate, self._limits.get(name, NO_LIMIT))
            self._gates[name] = gate
        return gate

    def _rate_of(self, key: str) -> _Gate:
        """Return a gate for the rate of a key, which has turns for slots. It is not kept: keys are many."""
        gate = _Gate(key, self._clock, self._held)
        limit = self._limit_of_key(key) or NO_LIMIT
        gate.bucket = self._bucket(key, limit, None)
        return gate

    def until_rate(self, key: str, cost: Cost, number: int) -> float:
        """Return the seconds until the rate of a key may let a number of tasks start.

        A hold may end early, by hand: then it is at most the time after which to look again.
        """
        gate = self._rate_of(key)
        if wait := gate.held_for():
            return min(wait, _LOOK_AGAIN)
        return 0.0 if gate.bucket is None else until_token(gate.bucket, cost, number)

    def _of(self, type: str) -> list[_Gate]:
        return [self._gate(name) for name in self._limited.get(type, ())]

    def _set_limit(self, gate: _Gate, limit: Limit) -> None:
        """Give a gate another limit; the running tasks that it has admitted keep their slots."""
        gate.slots = self._slots(gate.name, limit, self._taken(gate))
        gate.bucket = self._bucket(gate.name, limit, gate.bucket)
        gate.limit, gate.more, gate.fetch_at = limit, True, None

    def _slots(self, name: str, limit: Limit, taken: int) -> _Slots | None:
        most = limit.max_concurrency
        if most is None:
            return None
        if limit.scope == "global":
            return SharedSlots(self._repository, self._node, name, most, log=self._log, taken=taken)
        return OwnSlots(most, taken)

    def _bucket(self, name: str, limit: Limit, before: Bucket | None) -> Bucket | None:
        if not limit.rates:
            return None
        if limit.scope == "global":
            return SharedBucket(
                self._repository, name, limit.rates, self._clock, self._log, self._held
            )
        own = before if isinstance(before, OwnBucket) else None
        return OwnBucket(limit.rates, self._clock, own, partial(self._held, name))

    # --- limits that change while tasks run

    def follow_limits(self) -> None:
        """Follow the limits that were changed, in the mapping that the object was given."""
        with self._lock:
            for name, gate in list(self._gates.items()):
                limit = self._limits.get(name, NO_LIMIT)
                if limit != gate.limit:
                    before = gate.slots
                    self._set_limit(gate, limit)
                    if isinstance(before, SharedSlots) and not isinstance(gate.slots, SharedSlots):
                        self._left.append(before)
                elif gate.slots is not None:  # an interrupt may have cut adopt() short
                    gate.slots.taken = self._taken(gate)

    def adopt(self, type: str, task_id: str, runs: Container[str]) -> None:
        """Count a running task that was started before its type was limited.

        ``runs`` has the ids of the tasks that run, and loses each of them before :meth:`over` is called.
        """
        with self._lock:
            gates, known = self._of(type), self.admitted.get(task_id)
            if known is not None and not {*gates} - {*known.gates}:
                return
            whole = [*dict.fromkeys([*(known.gates if known else ()), *gates])]
            before = known or _Admitted((), NOTHING, None)
            self.admitted[task_id] = before._replace(gates=whole)
            if task_id not in runs:  # it has ended since; over() may have been called already
                del self.admitted[task_id]
            for gate in whole:
                if gate.slots is not None:
                    gate.slots.taken = self._taken(gate)

    def keep_only(self, task_ids: Container[str]) -> None:
        """Forget all admitted tasks but these, after an interrupt of a start or an end."""
        with self._lock:
            for task_id in [task_id for task_id in self.admitted if task_id not in task_ids]:
                del self.admitted[task_id]
            for gate in self._gates.values():
                if gate.slots is not None:
                    gate.slots.taken = self._taken(gate)

    def _taken(self, gate: _Gate) -> int:
        return sum(gate in one.gates for one in self.admitted.values())

    # --- at the fetch

    def room(self, names: Names, held: Collection[str]) -> tuple[int, int]:
        """Return how many tasks of these limits to fetch, and how many of them are in the buffer.

        ``held`` has the ids of the tasks in the buffer.
        """
        with self._lock:
            least, most_waiting = ENDLESS, 0
            for name in names:
                gate = self._gate(name)
                gate.fetched = {i for i in gate.fetched if i in held and i not in self.admitted}
                waiting = len(gate.fetched)
                room = max(0, gate.room() - waiting)
                if not room:
                    gate.more = True
                    gate.plan_fetch(waiting)  # another node may have taken the last token
                    self._tell_scheduled(gate)
                least, most_waiting = min(least, room), max(most_waiting, waiting)
            return least, most_waiting

    def fitting(self, found: Iterable[Names]) -> list[bool]:
        """Return which of these tasks fit, the best first: types that share a limit share its room."""
        with self._lock:
            left: dict[str, int] = {}
            fitting = []
            for names in found:
                for name in names:
                    if name not in left:
                        gate = self._gate(name)
                        left[name] = gate.room() - len(gate.fetched)
                fits = all(left[name] > 0 for name in names)
                for name in names:
                    left[name] -= 1 if fits else 0
                fitting.append(fits)
            return fitting

    def fetch_done(self, asked: Mapping[Names, int], found: Mapping[Names, int]) -> None:
        """Note how many tasks of these limits a fetch asked for, and how many it found."""
        with self._lock:
            for name in dict.fromkeys(name for names in asked for name in names):
                gate = self._gate(name)
                mine = [names for names in asked if name in names]
                waiting = len(gate.fetched) + sum(found[names] for names in mine)
                gate.more = any(found[names] == asked[names] for names in mine)
                if gate.more:
                    gate.plan_fetch(waiting)
                    self._tell_scheduled(gate)
                elif gate.slots is not None:
                    gate.slots.rest(waiting)

    def fetched(self, type: str, task_id: str) -> None:
        """Note that a fetched task goes into the buffer."""
        with self._lock:
            for gate in self._of(type):
                gate.fetched.add(task_id)

    def until_token(self, name: str, cost: Cost = NOTHING) -> float:
        """Return the seconds until a task may start by the rates of this node; 0 if one may now.

        Without the lock: the caller may be in a transaction for which the thread that has the lock waits.
        """
        gate = self._gates.get(name)
        bucket = None if gate is None else gate.bucket
        return until_token(bucket, cost) if isinstance(bucket, OwnBucket) else 0.0

    def open(self, type: str) -> bool:
        """Return True if a stored task may start now, assuming that no other task of its limits waits.

        This is an estimate. True, too, if the repository fails.
        """
        with self._lock:
            is_open = True
            for gate in self._of(type):
                try:
                    has_room = gate.room() > 0
                except RepositoryError:
                    return True
                gate.more |= not has_room
                is_open &= has_room
            return is_open

    # --- at the start, and at the end

    def only_tokens_lack(self, names: Names) -> bool:
        """Return True if tasks of these limits that go on with an attempt may start now, and others not."""
        with self._lock:
            gates = [self._gate(name) for name in names]
            slots = [gate.slots for gate in gates if gate.slots is not None]
            if any(gate.held_for() for gate in gates):
                return False
            return any(gate.bucket for gate in gates) and all(some.free() > 0 for some in slots)

    def admit(self, waiting: Mapping[Names, Sequence[Asking]]) -> set[str]:
        """Admit tasks that are about to start, as far as the limits allow.

        Args:
            waiting: the tasks of each set of limits, in order.

        Returns:
            The ids of the admitted tasks. :meth:`over` must be called for each when it ends.

        Raises:
            RepositoryError: the repository failed; no task is admitted.
        """
        admitted: set[str] = set()
        with self._lock:
            refusing: set[_Gate] = set()
            now = self._clock.monotonic()  # before a token is taken
            try:
                for names, tasks in waiting.items():
                    gates = [
                        self._rate_of(name) if is_key(name) else self._gate(name) for name in names
                    ]
                    for gate in gates:
                        gate.fetched.difference_update(task.id for task in tasks)
                    closed = not refusing.isdisjoint(gates)  # others come first
                    got = 0 if closed else self._pass(gates, tasks, now, admitted, refusing)
                    for gate in gates:
                        if gate.name not in self._gates:
                            continue
                        gate.more |= got < len(tasks)
                        gate.plan_fetch(len(gate.fetched))
                        self._tell_scheduled(gate)
            except BaseException:  # an interrupt, too: the caller calls over() for none of them
                for task_id in admitted:
                    if (one := self.admitted.pop(task_id, None)) is not None:
                        one.leave(ran=False)
                raise
        return admitted

    def _pass(
        self,
        gates: Sequence[_Gate],
        tasks: Sequence[Asking],
        now: float,
        admitted: set[str],
        refusing: set[_Gate],
    ) -> int:
        """Take the first of these tasks through all gates, as many as may pass; return how many."""
        passed: list[tuple[_Gate, int]] = []
        got = len(tasks)
        try:
            for gate in gates:
                if (here := gate.admit(tasks[:got])) < got:
                    refusing.add(gate)
                passed.append((gate, here))
                got = here
            for task in tasks[:got]:
                admitted.add(task.id)
                self.admitted[task.id] = _Admitted(gates, task.cost, None if task.resumed else now)
        except BaseException:
            got = sum(task.id in self.admitted for task in tasks)
            raise
        finally:
            for gate, here in passed:
                for task in tasks[got:here]:
                    gate.leave(task.cost, None if task.resumed else now)
        return got

    def over(self, task_id: str, *, ran: bool, spent: Cost = NOTHING) -> None:
        """Note that an admitted task has ended. If it did not run, its tokens are put back.

        ``spent`` is what it has taken of some units in truth.
        """
        with self._lock:
            one = self.admitted.pop(task_id, None)
            if one is not None:
                one.leave(ran=ran)
                for unit, number in spent.items():
                    more = number - (0 if one.took_at is None else one.cost.get(unit, 0))
                    for gate in one.gates:
                        if gate.bucket is not None and more:
                            gate.bucket.correct(unit, more)
        if one is not None:
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
        moments = [gate.fetch_at for gate in list(self._gates.values())]  # a start may change them
        return min((moment for moment in moments if moment is not None), default=None)

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
