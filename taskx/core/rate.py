"""Rates: so many in so many seconds, as a token bucket of which one moment is all there is to remember.

A bucket holds ``burst`` tokens at most and is given one every ``interval`` seconds; to start something
takes one out. Its state is its *mark*: the moment at which it is full again (the theoretical arrival time
of the generic cell rate algorithm). So in any time at most ``burst`` + ``count`` / ``seconds`` · time are
taken.
"""

from __future__ import annotations

import math
import re
from typing import Any, Literal, NamedTuple

import attrs

from taskx.core.checks import check_int, check_number
from taskx.core.errors import ConfigurationError

MAX_COUNT = 1_000_000
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
# Seconds: a moment which is a token's but for the rounding of the clock is that token's.
_ROUNDING = 1e-6

#: For each node by itself, or for all of them together.
LimitScope = Literal["node", "global"]
#: An empty bucket has been full for ever.
FULL = float("-inf")


@attrs.frozen
class Rate:
    """So many in so many seconds, and so many at once when there were none for a while."""

    count: int
    seconds: float
    burst: int

    @property
    def interval(self) -> float:
        """Seconds between two tokens."""
        return self.seconds / self.count

    def tokens(self, mark: float, now: float) -> int:
        """How many may be taken now."""
        if mark <= now:
            return self.burst
        missing = math.ceil(max(0.0, mark - now - _ROUNDING) / self.interval)
        return max(0, self.burst - missing)

    def take(self, mark: float, now: float, count: int) -> float:
        """The mark when so many were taken, of which there must be as many."""
        return max(mark, now) + count * self.interval

    def put_back(self, mark: float, count: int) -> float:
        """The mark when so many that were taken have not been used."""
        return mark - count * self.interval

    def when(self, mark: float, count: int) -> float:
        """The time at which so many may be taken, at most ``burst``."""
        return mark - (self.burst - min(count, self.burst)) * self.interval


class Limit(NamedTuple):
    """The limits of a type."""

    max_concurrency: int | None  #: how many run at once; None for any number
    rate: Rate | None  #: how many start in a time; None for any number
    scope: LimitScope  #: who shares them


def rate_of(given: Any, burst: int | None) -> Rate | None:
    """The rate that an executor's options say, None for none; ConfigurationError says what is wrong.

    It is ``"100/m"`` (``s``, ``m``, ``h`` or ``d``), or a pair of a count and seconds.
    """
    if burst is not None:
        check_int(burst, "burst", 1, MAX_COUNT)
    if given is None:
        return None
    count, seconds = _parts(given)
    check_int(count, "rate", 1, MAX_COUNT)
    if check_number(seconds, "the period of a rate") == 0:
        raise ConfigurationError(f"the period of a rate must be above 0 seconds, not {seconds!r}")
    return Rate(count, float(seconds), count if burst is None else burst)


def _parts(given: Any) -> tuple[Any, Any]:
    if isinstance(given, str) and (found := re.fullmatch(r"([0-9]{1,9})/([smhd])", given)):
        return int(found[1]), _SECONDS[found[2]]
    if isinstance(given, tuple) and len(given) == 2:
        return given
    raise ConfigurationError(
        f"rate must be like '100/m' (s, m, h or d), or (count, seconds), not {given!r}"
    )
