"""The limits of a type: how many of its tasks run at once, and how many start in a time."""

from __future__ import annotations

from typing import Protocol

from taskx.core.clock import Clock
from taskx.core.rate import FULL, Rate


class Slots(Protocol):
    """Places for running tasks."""

    def free(self) -> int:
        """How many are free, as far as is known."""
        ...

    def take(self, count: int) -> int:
        """Take so many, or as many as are free; returns how many."""
        ...

    def give(self, count: int) -> None:
        """Give so many back that were taken."""
        ...

    def rest(self, wanted: int) -> None:
        """There are tasks for no more than so many at present, beside those that were taken."""
        ...


class Bucket(Protocol):
    """Tokens, one of which each start takes."""

    def tokens(self) -> int:
        """How many there are, as far as is known."""
        ...

    def take(self, count: int) -> int:
        """Take so many, or as many as there are; returns how many."""
        ...

    def put_back(self, count: int) -> None:
        """Put so many back that were taken, and not used."""
        ...

    def when(self, count: int) -> float:
        """From when on there are so many, on the monotonic clock."""
        ...


class OwnSlots:
    """Those of one node."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken = 0

    def free(self) -> int:
        """How many are free."""
        return self._most - self._taken

    def take(self, count: int) -> int:
        """Take so many, or as many as are free."""
        got = min(count, self.free())
        self._taken += got
        return got

    def give(self, count: int) -> None:
        """Give so many back."""
        self._taken -= count

    def rest(self, wanted: int) -> None:
        """They are nobody else's anyway."""


class OwnBucket:
    """That of one node, full when it starts."""

    def __init__(self, rate: Rate, clock: Clock) -> None:
        self._rate = rate
        self._clock = clock
        self._mark = FULL

    def tokens(self) -> int:
        """How many there are."""
        return self._rate.tokens(self._mark, self._clock.monotonic())

    def take(self, count: int) -> int:
        """Take so many, or as many as there are."""
        now = self._clock.monotonic()
        got = min(count, self._rate.tokens(self._mark, now))
        self._mark = self._rate.take(self._mark, now, got)
        return got

    def put_back(self, count: int) -> None:
        """Put so many back."""
        self._mark = self._rate.put_back(self._mark, count)

    def when(self, count: int) -> float:
        """From when on there are so many."""
        return self._rate.when(self._mark, count)
