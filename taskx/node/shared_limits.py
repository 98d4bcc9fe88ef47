"""Limits that all nodes on a repository share: kept in notes, changed by compare-and-set.

The note ``limit/slots/<name>`` has the number of slots of each node. A node keeps its slots as long as it
finds tasks for them, so that a busy type does not cost a write for each task. The other nodes take back
the slots of a dead node. The note ``limit/rate/<name>`` has the marks of the limit's rates, by the wall
clock.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from taskx.stores.base import Repository
from taskx.tasks.clock import LAST, Clock
from taskx.tasks.errors import RepositoryError
from taskx.tasks.log import GuardedLogger, log
from taskx.tasks.rate import FULL, NOTHING, Cost, Rates
from taskx.tasks.writes import Note

_SLOTS = "limit/slots/"
#: What the names of the notes of rates begin with; the name of the limit, or the key, follows.
RATE = "limit/rate/"
#: Most attempts at a change, if other nodes change the note at the same time.
_TRIES = 50
# Seconds by which the clocks of two hosts may differ, or one clock before and after it was set.
_APART = 1.0

T = TypeVar("T")
#: Returns the time until which the limit with a name is or was held, in milliseconds; 0 if it was not.
Held = Callable[[str], int]


def never_held(name: str) -> int:
    """Return 0: no limit is held."""
    return 0


class _Shared(ABC, Generic[T]):
    """A limit that is kept in a note: its value as last read."""

    def __init__(self, repository: Repository, name: str, log: GuardedLogger) -> None:
        self._repository = repository
        self._name = name
        self._log = log
        self._damaged = 0  # the last version that was logged as damaged
        self._note: Note | None = None
        self._stale = True  # other nodes may have changed it since

    @abstractmethod
    def _parse(self, text: str | None) -> T:
        """Return the value of a note's text (None: there is no note); raise ``ValueError`` if damaged."""

    @abstractmethod
    def _store(self, value: T) -> None:
        """Store the note's current value in memory."""

    def forget(self) -> None:
        """Read the note again before its next use, because other nodes may have changed it."""
        self._stale = True

    def _refresh(self) -> None:
        if self._stale:
            self._read()

    def _read(self) -> None:
        """Read the note; a damaged one counts as missing."""
        self._stale = True  # until it was read
        self._note = self._repository.notes(self._name).get(self._name)
        flaw = None
        try:
            value = self._parse(self._note.text if self._note else None)
        except (ValueError, RecursionError) as error:
            flaw, value = str(error), self._parse(None)
        self._store(value)
        self._stale = False
        if flaw is not None and self._note and self._damaged != self._note.version:
            self._damaged = self._note.version
            self._log.warning("note %s is damaged and is replaced: %s", self._name, flaw)

    def _put(self, text: str | None, value: T) -> bool:
        """Change the note, unless another node did since it was read; return True if it was changed."""
        self._stale = True  # if the next call raises, it is not known what was stored
        version = self._note.version if self._note else 0
        done = self._repository.put_note(self._name, text, version)
        if done and version and text is not None:
            self._note = Note(text, version + 1)
            self._store(value)
            self._stale = False
        else:  # the note is new or gone, or another node has changed it
            self._read()
        return done

    def tend(self) -> None:
        """Maintain this node's part of the limit."""

    def leave(self) -> None:
        """Give back this node's part of the limit, because the node ends."""


class SharedSlots(_Shared[Mapping[str, int]]):
    """The ``most`` slots of all nodes, of which this node has some."""

    def __init__(
        self,
        repository: Repository,
        node: str,
        limit: str,
        most: int,
        log: GuardedLogger = log,
        taken: int = 0,
    ) -> None:
        super().__init__(repository, _SLOTS + limit, log)
        self._node = node
        self._most = most
        self._shares: Mapping[str, int] = {}
        #: The number of slots that this node uses.
        self.taken = taken
        self._idle = False

    def _parse(self, text: str | None) -> Mapping[str, int]:
        return _shares_of(text)

    def _store(self, value: Mapping[str, int]) -> None:
        self._shares = value

    def free(self) -> int:
        """Return the number of slots that this node has free or could get, by the note as last read."""
        self._refresh()
        return max(0, self._most - self._others - self.taken)

    @property
    def _mine(self) -> int:
        return self._shares.get(self._node, 0)

    @property
    def _others(self) -> int:
        return sum(self._shares.values()) - self._mine

    def take(self, count: int) -> int:
        """Take ``count`` slots, or as many as are free; return how many.

        The node's own slots come first, then those that no node has.
        """
        self._idle = False
        for _ in range(_TRIES):
            self._refresh()
            wanted = self.taken + count - self._mine
            unowned = self._most - sum(self._shares.values())
            if wanted <= 0 or unowned <= 0 or self._set_mine(self._mine + min(wanted, unowned)):
                break
        usable = min(self._mine, self._most - self._others)  # fewer if the limit was lowered
        got = max(0, min(count, usable - self.taken))
        self.taken += got
        return got

    def give(self, count: int) -> None:
        """Give back ``count`` slots; the node keeps them as long as there are tasks for them."""
        self.taken -= count

    def rest(self, wanted: int) -> None:
        """Leave to other nodes all free slots but ``wanted``: this node has no tasks for more."""
        for _ in range(_TRIES):
            self._refresh()
            kept = self.taken + wanted
            if self._mine <= kept or self._set_mine(kept):
                break

    def tend(self) -> None:
        """Give back slots that were idle for a while, record used ones, and free those of the dead."""
        self._read()
        if self._idle or self._mine + self._others > self._most:  # it was lowered
            self.rest(0)
        self._idle = self._mine > self.taken
        if self._mine < self.taken:  # the note was damaged, or others thought it was dead
            self._set_mine(self.taken)
        if self._shares.keys() - {self._node}:
            self._bury()

    def _bury(self) -> None:
        # The nodes are read after the note: a node joins before it can have slots in the note.
        nodes = self._repository.nodes()
        alive = {self._node, *(node.id for node in nodes if node.alive is not False)}
        left = {node: share for node, share in self._shares.items() if node in alive}
        if left != self._shares:
            self._share_out(left)

    def leave(self) -> None:
        self.taken = 0
        self.rest(0)

    def _set_mine(self, count: int) -> bool:
        return self._share_out({**self._shares, self._node: count})

    def _share_out(self, shares: Mapping[str, int]) -> bool:
        left = {node: share for node, share in shares.items() if share > 0}
        return self._put(json.dumps(left) if left else None, left)


def slots_by_node(repository: Repository, limit: str) -> dict[str, int]:
    """Return the slots of a limit that each node has; none for a damaged note, which a node replaces."""
    note = repository.notes(_SLOTS + limit).get(_SLOTS + limit)
    with suppress(ValueError, RecursionError):
        return _shares_of(note.text if note else None)
    return {}


def _shares_of(text: str | None) -> dict[str, int]:
    shares = json.loads(text) if text else {}
    if not isinstance(shares, dict) or not all(type(n) is int and n >= 0 for n in shares.values()):
        raise ValueError("expected a JSON object with the number of slots of each node")
    return shares


class _Marks(NamedTuple):
    at: float  #: when they were written, by the clock of the writer
    marks: Sequence[float]


class SharedBucket(_Shared[_Marks]):
    """The token buckets of all nodes for the rates of one limit.

    The marks are times by the wall clock of the node that wrote them. If that is ahead of the local clock,
    time goes on from the moment at which they were first seen. So the rate is kept even if the clocks
    differ.
    """

    def __init__(
        self,
        repository: Repository,
        limit: str,
        rates: Rates,
        clock: Clock,
        log: GuardedLogger = log,
        held: Held = never_held,
    ) -> None:
        super().__init__(repository, RATE + limit, log)
        self._rates = rates
        self._clock = clock
        self._limit, self._held = limit, held
        self._known = _Marks(FULL, [FULL] * len(rates))
        self._seen = 0.0  # on the monotonic clock

    @property
    def _marks(self) -> Sequence[float]:
        return self._known.marks

    def _counting(self) -> Sequence[float]:
        """Return the marks as they count after a hold."""
        until = self._held(self._limit)
        return self._rates.held(self._marks, until / 1000) if until else self._marks

    def _parse(self, text: str | None) -> _Marks:
        times = json.loads(text) if text else [FULL]
        if not isinstance(times, list) or not times or not all(map(_is_time, times)):
            raise ValueError("expected a JSON list with times in seconds")
        at, *marks = times
        number = len(self._rates)  # it may have been another one, before a change of the limit
        return _Marks(at, [*marks, *[FULL] * number][:number])

    def _store(self, value: _Marks) -> None:
        if value.at != self._known.at:
            self._seen = self._clock.monotonic()
        self._known = value

    def _now(self) -> float:
        """Return the current time, by a clock that is not behind that of the last writer."""
        now, at = self._clock.now_ms() / 1000, self._known.at
        return at + self._clock.monotonic() - self._seen if at > now + _APART else now

    def tokens(self) -> tuple[int, ...]:
        """Return the number of tokens of each rate."""
        self._refresh()
        now = self._now()
        pairs = zip(self._rates, self._counting(), strict=True)
        return tuple(rate.tokens(mark, now) for rate, mark in pairs)

    def room(self, cost: Cost = NOTHING) -> int:
        """Return how many tasks of this cost may start, by the note as last read."""
        self._refresh()
        return self._rates.room(self._counting(), self._now(), cost)

    def take(self, costs: Sequence[Cost]) -> int:
        """Take the tokens of the first of these tasks, of as many as may start; return how many."""
        for _ in range(_TRIES):
            self._refresh()
            got, marks = self._rates.take(self._counting(), self._now(), costs)
            if not got or self._set(marks):
                return got
        return 0

    def put_back(self, cost: Cost, taken_at: float) -> None:
        """Put back the tokens of a start; they are lost if others interfere or the repository fails."""

        def change() -> Sequence[float]:  # the note is read before the look at the clock
            age = self._clock.monotonic() - taken_at
            return self._rates.put_back(self._marks, cost, age)

        with suppress(RepositoryError):  # the caller has more to undo
            self._change(change)

    def correct(self, unit: str, more: int) -> None:
        """Take more tokens of a unit, or put back some if ``more`` is negative; as :meth:`put_back`."""
        with suppress(RepositoryError):
            self._change(lambda: self._rates.correct(self._marks, self._now(), unit, more))

    def _change(self, change: Callable[[], Sequence[float]]) -> None:
        for _ in range(_TRIES):
            self._refresh()
            marks = change()
            if list(marks) == list(self._marks) or self._set(marks):
                break

    def _set(self, marks: Sequence[float]) -> bool:
        value = _Marks(self._now(), list(marks))
        return self._put(json.dumps([value.at, *value.marks]), value)

    def until(self, cost: Cost = NOTHING, count: int = 1) -> float:
        """Return the seconds until tasks of this cost may start, by the note as last read."""
        return self._rates.until(self._counting(), self._now(), cost, count)


class Bucket(Protocol):
    """The token buckets for the rates of one limit, of one node or of all."""

    def room(self, cost: Cost = NOTHING) -> int: ...
    def take(self, costs: Sequence[Cost]) -> int: ...
    def put_back(self, cost: Cost, taken_at: float) -> None: ...
    def correct(self, unit: str, more: int) -> None: ...
    def until(self, cost: Cost = NOTHING, count: int = 1) -> float: ...


def until_token(bucket: Bucket, cost: Cost = NOTHING, number: int = 1) -> float:
    """Return the seconds until a number of tasks may start; 0 if they may now."""
    return 0.0 if bucket.room(cost) >= number else max(0.0, bucket.until(cost, number))


def is_full(note: Note, clock: Clock) -> bool:
    """Return True if the buckets of a note are full: without the note they are, too."""
    with suppress(ValueError, TypeError, RecursionError):
        times = json.loads(note.text)
        return isinstance(times, list) and max(times) <= clock.now_ms() / 1000 - _APART
    return False


def _is_time(time: Any) -> bool:
    return type(time) in (int, float) and (time == FULL or abs(time) <= LAST / 1000)
