"""Limits and rates. The whole state of a rate, a token bucket, is one moment.

A bucket holds at most ``burst`` tokens and gets a new one every ``interval`` seconds. Each start takes one
token, or as many as its cost in the unit of the rate. The state is the *mark*: the moment at which the
bucket will be full again (the theoretical arrival time of the generic cell rate algorithm). In any period
of time, at most ``burst`` + ``count`` / ``seconds`` · time tokens are taken.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import attrs

from taskx.tasks.checks import check_int, check_number
from taskx.tasks.errors import ConfigurationError

MAX_COUNT = 1_000_000
#: The most tokens of a unit that a rate or a cost may name.
MAX_UNITS = 1_000_000_000
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
# In seconds: a token counts as available if only the rounding of the clock is missing.
_ROUNDING = 1e-6

#: A limit for each node separately, or for all nodes together.
LimitScope = Literal["node", "global"]
#: The mark of a bucket that was never used: full at any time.
FULL = float("-inf")
#: A number of tasks that no limit reaches.
ENDLESS = 1 << 31

#: What a start takes from rates with units, beside the one token of those without: ``{"tokens": 1200}``.
Cost = Mapping[str, int]
NOTHING: Cost = {}
#: The name of the limit that the options of an executor set begins with this; the type follows.
OF_TYPE = "type/"


@attrs.frozen
class Rate:
    """A rate: ``count`` starts per ``seconds``, and up to ``burst`` starts at once after a pause.

    With a ``unit``, these are numbers of that unit, of which the cost of each start says how many it takes.
    """

    count: int
    seconds: float
    burst: int
    unit: str = ""

    def __str__(self) -> str:
        given = _as_given(self)
        return given if isinstance(given, str) else f"{self.count} in {self.seconds:g} s"

    @property
    def interval(self) -> float:
        """Seconds between two tokens."""
        return self.seconds / self.count

    def share(self, cost: Cost) -> int:
        """Return the number of tokens that a start of this cost takes."""
        return cost.get(self.unit, 0) if self.unit else 1

    def need(self, cost: Cost) -> int:
        """Return the number of tokens at which a start is possible: a full bucket is always enough."""
        return min(self.share(cost), self.burst)

    def tokens(self, mark: float, now: float) -> int:
        """Return the number of tokens that are available now."""
        if mark <= now:
            return self.burst
        missing = math.ceil(max(0.0, mark - now - _ROUNDING) / self.interval)
        return max(0, self.burst - missing)

    def take(self, mark: float, now: float, count: int) -> float:
        """Return the mark after ``count`` tokens are taken; they must be available."""
        return max(mark, now) + count * self.interval

    def put_back(self, mark: float, count: int, age: float = 0.0) -> float:
        """Return the mark after ``count`` tokens are put back that were taken ``age`` seconds ago.

        What time has brought meanwhile is not put back: a full bucket would have lost it.
        """
        return mark - max(0.0, count * self.interval - age)

    def mark_of(self, tokens: int, now: float) -> float:
        """Return the mark of a bucket that has ``tokens`` tokens now (at most ``burst``)."""
        return FULL if tokens >= self.burst else now + (self.burst - tokens) * self.interval

    def when(self, mark: float, count: int) -> float:
        """Return the time at which ``count`` tokens (at most ``burst``) will be available."""
        return mark - (self.burst - min(count, self.burst)) * self.interval


#: The longest time, in seconds, for which a corrected cost keeps a rate from starting tasks.
MOST_DEBT = 3600.0


class Rates(tuple[Rate, ...]):
    """The rates of one limit. Their state is a mark each."""

    __slots__ = ()

    def room(self, marks: Sequence[float], now: float, cost: Cost) -> int:
        """Return how many tasks of this cost may start now: none in a debt, even if they cost nothing."""
        room = ENDLESS
        for rate, mark in zip(self, marks, strict=True):
            if need := rate.need(cost):
                room = min(room, rate.tokens(mark, now) // need)
            elif rate.when(mark, 0) > now + _ROUNDING:
                return 0
        return room

    def take(
        self, marks: Sequence[float], now: float, costs: Sequence[Cost]
    ) -> tuple[int, Sequence[float]]:
        """Return how many of these tasks may start, in order, and the marks after they have started."""
        for started, cost in enumerate(costs):
            if not self.room(marks, now, cost):
                return started, marks
            marks = [
                rate.take(mark, now, share) if (share := rate.share(cost)) else mark
                for rate, mark in zip(self, marks, strict=True)
            ]
        return len(costs), marks

    def put_back(self, marks: Sequence[float], cost: Cost, age: float) -> list[float]:
        """Return the marks after the tokens of a start are put back that were taken ``age`` seconds ago."""
        pairs = zip(self, marks, strict=True)
        return [rate.put_back(mark, rate.share(cost), age) for rate, mark in pairs]

    def correct(self, marks: Sequence[float], now: float, unit: str, more: int) -> list[float]:
        """Return the marks after ``more`` tokens of a unit are taken, or put back if it is negative."""

        def after(rate: Rate, mark: float) -> float:
            if rate.unit != unit:
                return mark
            if more < 0:
                return rate.put_back(mark, -more)
            latest = now + rate.burst * rate.interval + MOST_DEBT
            return max(mark, min(rate.take(mark, now, more), latest))

        return [after(rate, mark) for rate, mark in zip(self, marks, strict=True)]

    def until(self, marks: Sequence[float], now: float, cost: Cost, count: int) -> float:
        """Return the seconds until tasks of this cost may start; less than 0 in the past."""
        pairs = zip(self, marks, strict=True)
        waits = (rate.when(mark, count * rate.need(cost)) - now for rate, mark in pairs)
        return max(waits, default=-math.inf)

    def held(self, marks: Sequence[float], until: float) -> Sequence[float]:
        """Return the marks as they count if nothing could be taken until a moment: no burst follows it."""
        pairs = zip(self, marks, strict=True)
        return [max(mark, until + rate.burst * rate.interval) for rate, mark in pairs]

    @property
    def seconds(self) -> float:
        """The seconds in which all buckets are filled."""
        return max((rate.burst * rate.interval for rate in self), default=0.0)

    @property
    def units(self) -> dict[str, int]:
        """The units in which tasks have a cost here, each with the largest cost that fits."""
        found: dict[str, int] = {}
        for rate in self:
            if rate.unit:
                found[rate.unit] = min(rate.burst, found.get(rate.unit, rate.burst))
        return found


NO_RATES = Rates()
#: The most turns of a key: how many of its tasks a limit may let run at once.
MOST_TURNS = 100
#: The largest weight of a share.
MOST_SHARE = 1000


class Limit(NamedTuple):
    """A limit: that of a type, or one with a name."""

    max_concurrency: int | None  #: number of tasks that may run at once; None for no limit
    rates: Rates  #: rates of starts; empty for no limit
    scope: LimitScope  #: whether each node has the limit for itself, or all nodes share it
    share: int | None = None  #: the weight of each key that shares the workers; None if none does


NO_LIMIT = Limit(None, NO_RATES, "node")


def is_key(name: str) -> bool:
    """Return True if the limit with a name is for a key, or for all keys that begin so."""
    return ":" in name and not name.startswith(OF_TYPE)


def limit_to_json(limit: Limit) -> list[Any]:
    """Return a limit as a JSON value. Only one with a share has a fourth item, as older versions expect."""
    rates = [attrs.astuple(rate) for rate in limit.rates]
    share = () if limit.share is None else (limit.share,)
    return [limit.max_concurrency, rates, limit.scope, *share]


def limit_from_json(value: Sequence[Any]) -> Limit:
    """Return the limit of a value from :func:`limit_to_json`."""
    most, rates, scope, *share = value
    return Limit(most, Rates(Rate(*rate) for rate in rates), scope, *share)


def check_share(value: Any) -> int | None:
    """Return the weight of a share: 1 for True; None for False and None.

    Raises:
        ConfigurationError: it is not a number from 1 to :data:`MOST_SHARE`.
    """
    if value is None or isinstance(value, bool):
        return 1 if value else None
    return check_int(value, "share", 1, MOST_SHARE)


def rates_of(given: Any, burst: Any) -> Rates:
    """Return the rates of options; none for None.

    ``given`` is text such as ``"100/m"`` (``s``, ``m``, ``h`` or ``d``) or ``"90000 tokens/m"``, a pair of
    a count and a period (seconds or a ``timedelta``), or a list of these. ``burst`` is that of the only
    rate, or a list, too.

    Raises:
        ConfigurationError: an option is not valid.
    """
    givens = given if isinstance(given, list) else [given]
    bursts = burst if isinstance(burst, list) else [burst]
    if burst is None:
        bursts = [None] * len(givens)
    if not givens or len(bursts) != len(givens):
        raise ConfigurationError(
            f"burst must have a number for each rate: there are {len(givens)}, and it is {burst!r:.80}"
        )
    rates = (rate_of(*pair) for pair in zip(givens, bursts, strict=True))
    return Rates(rate for rate in rates if rate is not None)


def rate_of(given: Any, burst: int | None) -> Rate | None:
    """Return one rate of options, as for :func:`rates_of`; None for no rate."""
    if given is None:
        if burst is not None:
            check_int(burst, "burst", 1, MAX_COUNT)
        return None
    count, seconds, unit = _parts(given)
    most = MAX_UNITS if unit else MAX_COUNT
    if burst is not None:
        check_int(burst, "burst", 1, most)
    check_int(count, "rate", 1, most)
    period = check_number(seconds, "the period of a rate")
    if period == 0:
        raise ConfigurationError(
            f"the period of a rate must be more than 0 seconds, not {seconds!r}"
        )
    return Rate(count, period, count if burst is None else burst, unit)


_TEXT = re.compile(r"([0-9]{1,10})(?: ([A-Za-z_][A-Za-z0-9_-]{0,39}))?/([smhd])")


def _parts(given: Any) -> tuple[Any, Any, str]:
    if isinstance(given, str) and (found := _TEXT.fullmatch(given)):
        return int(found[1]), _SECONDS[found[3]], found[2] or ""
    if isinstance(given, tuple) and len(given) == 2:
        return (*given, "")
    raise ConfigurationError(
        "rate must be text like '100/m' or '9000 tokens/m' (s, m, h or d), a pair (count, seconds), or a "
        f"list of these, not {given!r}"
    )


def rates_as_given(rates: Rates) -> Any:
    """Return the counts and periods of rates in the form of an option."""
    shown = [_as_given(rate) for rate in rates]
    return shown[0] if len(shown) == 1 else shown


def bursts_as_given(rates: Rates) -> Any:
    """Return the bursts of rates in the form of an option."""
    return rates[0].burst if len(rates) == 1 else [rate.burst for rate in rates]


def _as_given(rate: Rate) -> str | tuple[int, float]:
    units = {seconds: unit for unit, seconds in _SECONDS.items()}
    if (unit := units.get(rate.seconds)) is None:  # a rate with another unit is always a text
        return (rate.count, rate.seconds)
    return f"{rate.count} {rate.unit}/{unit}" if rate.unit else f"{rate.count}/{unit}"


def check_cost(value: Any) -> dict[str, int] | None:
    """Return the cost of a task; None if it is empty.

    Raises:
        ConfigurationError: it is not a mapping of units to whole numbers.
    """
    if not isinstance(value, Mapping):
        raise ConfigurationError(
            f"cost must be a dict such as {{'tokens': 1200}}, not {value!r:.80}"
        )
    for unit in value:
        if not isinstance(unit, str) or not _TEXT.fullmatch(f"1 {unit}/s"):
            raise ConfigurationError(f"the unit of a cost must be a name, not {unit!r:.80}")
    return {
        unit: check_int(n, f"cost in {unit}", 0, MAX_UNITS) for unit, n in value.items()
    } or None
