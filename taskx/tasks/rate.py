"""Rates: a token bucket whose whole state is one moment.

A bucket holds at most ``burst`` tokens and gets a new one every ``interval`` seconds. Each start takes one
token. The state is the *mark*: the moment at which the bucket will be full again (the theoretical arrival
time of the generic cell rate algorithm). In any period of time, at most
``burst`` + ``count`` / ``seconds`` · time tokens are taken.
"""

from __future__ import annotations

import math
import re
from typing import Any, Literal, NamedTuple

import attrs

from taskx.tasks.checks import check_int, check_number
from taskx.tasks.errors import ConfigurationError

MAX_COUNT = 1_000_000
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
# In seconds: a token counts as available if only the rounding of the clock is missing.
_ROUNDING = 1e-6

#: A limit for each node separately, or for all nodes together.
LimitScope = Literal["node", "global"]
#: The mark of a bucket that was never used: full at any time.
FULL = float("-inf")


@attrs.frozen
class Rate:
    """A rate: ``count`` starts per ``seconds``, and up to ``burst`` starts at once after a pause."""

    count: int
    seconds: float
    burst: int

    @property
    def interval(self) -> float:
        """Seconds between two tokens."""
        return self.seconds / self.count

    def tokens(self, mark: float, now: float) -> int:
        """Return the number of tokens that are available now."""
        if mark <= now:
            return self.burst
        missing = math.ceil(max(0.0, mark - now - _ROUNDING) / self.interval)
        return max(0, self.burst - missing)

    def take(self, mark: float, now: float, count: int) -> float:
        """Return the mark after ``count`` tokens are taken; they must be available."""
        return max(mark, now) + count * self.interval

    def put_back(self, mark: float, count: int, after: float) -> float:
        """Return the mark after ``count`` tokens are put back that were taken ``after`` seconds ago.

        The part that time has brought meanwhile is not put back: a full bucket would have lost it.
        """
        return mark - count * max(0.0, self.interval - after)

    def mark_of(self, tokens: int, now: float) -> float:
        """Return the mark of a bucket that has ``tokens`` tokens now (at most ``burst``)."""
        return FULL if tokens >= self.burst else now + (self.burst - tokens) * self.interval

    def when(self, mark: float, count: int) -> float:
        """Return the time at which ``count`` tokens (at most ``burst``) will be available."""
        return mark - (self.burst - min(count, self.burst)) * self.interval


class Limit(NamedTuple):
    """The limits of a type."""

    max_concurrency: int | None  #: number of tasks that may run at once; None for no limit
    rate: Rate | None  #: rate of starts; None for no limit
    scope: LimitScope  #: whether each node has the limits for itself, or all nodes share them


def rate_of(given: Any, burst: int | None) -> Rate | None:
    """Return the rate of an executor's options; None for no rate.

    ``given`` is text such as ``"100/m"`` (``s``, ``m``, ``h`` or ``d``), or a pair of a count and a
    period: seconds or a ``timedelta``.

    Raises:
        ConfigurationError: an option is not valid.
    """
    if burst is not None:
        check_int(burst, "burst", 1, MAX_COUNT)
    if given is None:
        return None
    count, seconds = _parts(given)
    check_int(count, "rate", 1, MAX_COUNT)
    period = check_number(seconds, "the period of a rate")
    if period == 0:
        raise ConfigurationError(
            f"the period of a rate must be more than 0 seconds, not {seconds!r}"
        )
    return Rate(count, period, count if burst is None else burst)


def _parts(given: Any) -> tuple[Any, Any]:
    if isinstance(given, str) and (found := re.fullmatch(r"([0-9]{1,9})/([smhd])", given)):
        return int(found[1]), _SECONDS[found[2]]
    if isinstance(given, tuple) and len(given) == 2:
        return given
    raise ConfigurationError(
        f"rate must be text like '100/m' (s, m, h or d) or a pair (count, seconds), not {given!r}"
    )


def rate_as_given(rate: Rate) -> str | tuple[int, float]:
    """Return the count and the period of a rate in the form of an option."""
    units = {seconds: unit for unit, seconds in _SECONDS.items()}
    unit = units.get(rate.seconds)
    return (rate.count, rate.seconds) if unit is None else f"{rate.count}/{unit}"
