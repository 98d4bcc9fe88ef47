"""Limits that all nodes on a repository share: kept in notes, changed by compare-and-set.

``limit/slots/<type>`` says how many places each node has. A node keeps those that it has as long as it
finds tasks for them, so that a busy type costs no write for each; those of a node that is dead are taken
from it by whoever looks. ``limit/rate/<type>`` has the mark of the type's bucket, by the wall clock.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from typing import Generic, TypeVar

from taskx.core.clock import LAST, Clock
from taskx.core.errors import RepositoryError
from taskx.core.log import GuardedLogger, log
from taskx.core.rate import FULL, Rate
from taskx.core.writes import Note
from taskx.storage.base import Repository

_SLOTS, _RATE = "limit/slots/", "limit/rate/"
#: How often a change is tried that others get in the way of.
_TRIES = 50
# Seconds that the clocks of two hosts, or of one before and after it was set, may be apart.
_APART = 1.0

T = TypeVar("T")


class _Shared(ABC, Generic[T]):
    """A limit in the note of that name, as it was last read."""

    def __init__(self, repository: Repository, name: str, log: GuardedLogger) -> None:
        self._repository = repository
        self._name = name
        self._log = log
        self._damaged = 0  # the version of which it was told
        self._note: Note | None = None
        self._stale = True  # others may have changed it since

    @abstractmethod
    def _parse(self, text: str | None) -> T:
        """Return what a text says; raise ``ValueError`` if it is damaged. None: there is no note."""

    @abstractmethod
    def _is(self, value: T) -> None:
        """Note what the note says now."""

    def forget(self) -> None:
        """Others may have changed it."""
        self._stale = True

    def _look(self) -> None:
        if self._stale:
            self._read()

    def _read(self) -> None:
        """Read the note; what is damaged says nothing, as where there is none."""
        self._stale = True  # should this be cut short, the version is not that of what is known
        self._note = self._repository.notes(self._name).get(self._name)
        flaw = None
        try:
            value = self._parse(self._note.text if self._note else None)
        except (ValueError, RecursionError) as error:
            flaw, value = str(error), self._parse(None)
        self._is(value)
        self._stale = False
        if flaw is not None and self._note and self._damaged != self._note.version:
            self._damaged = self._note.version
            self._log.warning("%s is damaged, and is begun anew: %s", self._name, flaw)

    def _put(self, text: str | None, value: T) -> bool:
        """Change the note, unless others did since it was read."""
        self._stale = True  # should this be cut short, it is not known what was put
        version = self._note.version if self._note else 0
        done = self._repository.put_note(self._name, text, version)
        if done and version and text is not None:
            self._note = Note(text, version + 1)
            self._is(value)
            self._stale = False
        else:  # it is a new one, or gone, or another's
            self._read()
        return done

    def tend(self) -> None:
        """Look after what this node has of it."""

    def leave(self) -> None:
        """The node ends: what it has of it may be others'."""


class SharedSlots(_Shared[Mapping[str, int]]):
    """The ``most`` places of all nodes, of which one node has some."""

    def __init__(
        self, repository: Repository, node: str, type: str, most: int, log: GuardedLogger = log
    ) -> None:
        super().__init__(repository, _SLOTS + type, log)
        self._node = node
        self._most = most
        self._shares: Mapping[str, int] = {}
        self._taken = 0
        self._idle = False

    def _parse(self, text: str | None) -> Mapping[str, int]:
        return _shares_of(text)

    def _is(self, value: Mapping[str, int]) -> None:
        self._shares = value

    def free(self) -> int:
        """The number of places that this node has left or could get, as far as is known."""
        self._look()
        others = sum(self._shares.values()) - self._mine
        return max(0, self._most - others - self._taken)

    @property
    def _mine(self) -> int:
        return self._shares.get(self._node, 0)

    def take(self, count: int) -> int:
        """Take so many, or as many as are free: of the node's own, then of those that nobody has."""
        self._idle = False
        for _ in range(_TRIES):
            self._look()
            wanted = self._taken + count - self._mine
            unowned = self._most - sum(self._shares.values())
            if wanted <= 0 or unowned <= 0 or self._set_mine(self._mine + min(wanted, unowned)):
                break
        got = max(0, min(count, self._mine - self._taken))
        self._taken += got
        return got

    def give(self, count: int) -> None:
        """Give so many back; the node keeps them as long as there are tasks for them."""
        self._taken -= count

    def rest(self, wanted: int) -> None:
        """There are tasks for no more than so many at present: the rest may be others'."""
        for _ in range(_TRIES):
            self._look()
            kept = self._taken + wanted
            if self._mine <= kept or self._set_mine(kept):
                break

    def tend(self) -> None:
        """Give back what was not taken for a while, show what is taken, and take from the dead."""
        self._read()
        if self._idle:
            self.rest(0)
        self._idle = self._mine > self._taken
        if self._mine < self._taken:  # the note was damaged, or others took this node for dead
            self._set_mine(self._taken)
        if self._shares.keys() - {self._node}:
            self._bury()

    def _bury(self) -> None:
        # After the note was read: who has a place in it, had joined.
        nodes = self._repository.nodes()
        alive = {self._node, *(node.id for node in nodes if node.alive is not False)}
        left = {node: share for node, share in self._shares.items() if node in alive}
        if left != self._shares:
            self._share_out(left)

    def leave(self) -> None:
        self._taken = 0
        self.rest(0)

    def _set_mine(self, count: int) -> bool:
        return self._share_out({**self._shares, self._node: count})

    def _share_out(self, shares: Mapping[str, int]) -> bool:
        left = {node: share for node, share in shares.items() if share > 0}
        return self._put(json.dumps(left) if left else None, left)


def _shares_of(text: str | None) -> dict[str, int]:
    shares = json.loads(text) if text else {}
    if not isinstance(shares, dict) or not all(type(n) is int and n >= 0 for n in shares.values()):
        raise ValueError("it does not say how many places each node has")
    return shares


class SharedBucket(_Shared[float]):
    """The tokens of all nodes.

    The mark is by the wall clock of whoever wrote it. Where that is ahead of the clock here, by more than a
    full bucket, tokens come as they would to an empty one from when the mark was first seen: the rate is
    kept, whatever the clocks say.
    """

    def __init__(
        self, repository: Repository, type: str, rate: Rate, clock: Clock, log: GuardedLogger = log
    ) -> None:
        super().__init__(repository, _RATE + type, log)
        self._rate = rate
        self._clock = clock
        self._mark = FULL
        self._seen = 0.0  # on the monotonic clock

    def _parse(self, text: str | None) -> float:
        mark = float(text) if text else FULL
        if text and not abs(mark) <= LAST / 1000:
            raise ValueError(f"{mark!r} is no moment")
        return mark

    def _is(self, value: float) -> None:
        if value != self._mark:
            self._mark, self._seen = value, self._clock.monotonic()

    def _now(self) -> float:
        """The present, by a clock that the mark is not ahead of."""
        now = self._clock.now_ms() / 1000
        full = self._rate.burst * self._rate.interval
        if self._mark > now + full + _APART:
            return self._mark - full + self._clock.monotonic() - self._seen
        return now

    def tokens(self) -> int:
        """The number of tokens, as far as is known."""
        self._look()
        return self._rate.tokens(self._mark, self._now())

    def take(self, count: int) -> int:
        """Take so many, or as many as there are."""
        for _ in range(_TRIES):
            got = min(count, self.tokens())
            if not got or self._set(self._rate.take(self._mark, self._now(), got)):
                return got
        return 0

    def put_back(self, count: int) -> None:
        """Put so many back; where others get in the way, or the repository fails, they are lost."""
        with suppress(RepositoryError):  # who puts some back has more to undo
            for _ in range(_TRIES):
                self._look()
                if self._mark == FULL or self._set(self._rate.put_back(self._mark, count)):
                    break

    def _set(self, mark: float) -> bool:
        return self._put(repr(mark), mark)

    def when(self, count: int) -> float:
        """The time at which there will be so many, as far as is known."""
        return self._clock.monotonic() + self._rate.when(self._mark, count) - self._now()
