"""The ticks of schedules: the arithmetic of cron expressions and intervals, and decisions about due ticks.

Moments are milliseconds since 1970, UTC. No function here reads a clock or a repository.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from datetime import datetime, timedelta, tzinfo
from itertools import takewhile
from typing import Any, Literal, NamedTuple, Protocol, get_args

import attrs

from taskx.tasks.checks import Duration, as_seconds, check_number
from taskx.tasks.clock import LAST, to_datetime
from taskx.tasks.errors import ConfigurationError
from taskx.tasks.findings import counted

#: The action for ticks that were missed while nothing was running.
Misfire = Literal["skip", "one", "all"]
MISFIRES = get_args(Misfire)
#: Shortest interval, in seconds.
SHORTEST = 0.1
#: Longest interval, in seconds: a century.
LONGEST = 3.2e9
#: Largest number of ticks that are decided about at once.
BATCH = 100

# Local times have no zone in this module: the offset is computed for each of them.
_EPOCH = datetime(1970, 1, 1)  # noqa: DTZ001
_DAY, _MILLISECOND = timedelta(days=1), timedelta(milliseconds=1)
_EVERY_HOUR = set(range(24))
# The names of cron(8) for expressions.
_NAMES = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
# The calendar begins in the year 1; from here on a day less is still in it. In milliseconds.
_FIRST = (datetime(1, 1, 3) - _EPOCH) // _MILLISECOND  # noqa: DTZ001


def _interval(_: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if not SHORTEST <= check_number(value, attribute.name) <= LONGEST:
        raise ConfigurationError(
            f"an interval must be from {SHORTEST:g} to {LONGEST:g} seconds, not {value!r}"
        )


@attrs.frozen
class Every:
    """An interval between ticks."""

    seconds: float = attrs.field(converter=as_seconds, validator=_interval)

    def __str__(self) -> str:
        return f"every {self.seconds:g} s"


def every(
    seconds: Duration = 0.0, *, minutes: float = 0.0, hours: float = 0.0, days: float = 0.0
) -> Every:
    """Return an interval of at least 0.1 seconds: ``every(30)``, ``every("1h30m")``, ``every(minutes=5)``.

    It is counted from the schedule's declaration.

    Args:
        seconds: a number of seconds, a ``timedelta``, or a text.
        minutes, hours, days: numbers that are added.

    Raises:
        ConfigurationError: an argument is not such a number, or the sum is too short or too long.
    """
    more = {"minutes": minutes, "hours": hours, "days": days}
    units = (60, 3600, 86400)
    added = [unit * check_number(more[name], name) for unit, name in zip(units, more, strict=True)]
    return Every(check_number(seconds, "seconds") + sum(added) if any(added) else seconds)


class Ticks(Protocol):
    """The moments at which a schedule ticks."""

    def after(self, moment: int) -> Iterator[int]:
        """Yield the ticks later than a moment, in order. They are always the same for the same moment."""
        ...

    def __hash__(self) -> int:
        """Return a hash that is the same for equal objects, which tick at the same moments."""
        ...


class IntervalTicks(NamedTuple):
    """The ticks of an interval."""

    period: int  #: milliseconds between two ticks
    since: int  #: the moment from which ticks are counted, in both directions

    def after(self, moment: int) -> Iterator[int]:
        tick = moment + self.period - (moment - self.since) % self.period
        while tick <= LAST:
            yield tick
            tick += self.period


class CronTicks(NamedTuple):
    """The ticks of a cron expression, in the local time of a zone.

    A local time that does not exist because clocks are set forward ticks once, at that moment. A local time
    that exists twice ticks the first time only. An expression that matches every hour of the day goes by
    elapsed time instead, so that it is not silent for an hour when clocks are set back.
    """

    expression: str  #: five fields
    zone: tzinfo

    def after(self, moment: int) -> Iterator[int]:
        try:
            for tick in self._all_from(moment):
                if tick > moment:
                    moment = tick
                    yield tick
        except (OverflowError, ValueError):
            return  # the calendar has ended

    def _all_from(self, moment: int) -> Iterator[int]:
        """Yield ticks in order, some of them twice, from a little before a moment."""
        cron = _cron(self.expression, self._local_before(moment))
        names_hours = set(cron.hours) != _EVERY_HOUR
        waiting: list[int] = []
        for local in cron:
            first, second = self._utc(local, 0), self._utc(local, 1)
            if first > second:  # the local time does not exist: clocks are set forward over it
                if names_hours:
                    heapq.heappush(waiting, self._shift(second, first))
            else:
                heapq.heappush(waiting, first)
                if first < second and not names_hours:
                    heapq.heappush(waiting, second)
            while waiting and waiting[0] <= first:
                yield heapq.heappop(waiting)

    def _local_before(self, moment: int) -> datetime:
        """Return a local time that is early enough: no tick before it is later than the moment.

        This also holds if clocks are set back soon.
        """
        start = to_datetime(max(moment, _FIRST))
        offsets = (_offset(start, self.zone), _offset(start + _DAY, self.zone))
        return start.replace(tzinfo=None) + min(offsets)

    def _utc(self, local: datetime, fold: int) -> int:
        offset = local.replace(tzinfo=self.zone, fold=fold).utcoffset()
        assert offset is not None  # a zone of zoneinfo
        return (local - offset - _EPOCH) // _MILLISECOND

    def _shift(self, before: int, after: int) -> int:
        """Return the moment between two moments at which clocks are set forward."""
        offset = _offset(to_datetime(after), self.zone)
        while after - before > 1000:
            middle = before + (after - before) // 2000 * 1000
            if _offset(to_datetime(middle), self.zone) == offset:
                after = middle
            else:
                before = middle
        return after


def _offset(moment: datetime, zone: tzinfo) -> timedelta:
    offset = moment.astimezone(zone).utcoffset()
    assert offset is not None  # a zone of zoneinfo
    return offset


def _cron(expression: str, start: datetime) -> Any:
    """Return the library's iterator. It gets local times without a zone, so it ignores daylight saving."""
    try:
        from cronsim import CronSim, CronSimError
    except ImportError as error:
        raise ConfigurationError(
            "cron expressions need the package cronsim: run pip install 'taskx-queue[schedules]', "
            "or use every(seconds)"
        ) from error
    try:
        return CronSim(expression, start)
    except CronSimError as error:
        raise ConfigurationError(
            f"cron expression {expression!r}: {error}; its five fields are minute, hour, "
            "day of the month, month, day of the week, as in '0 3 * * *'"
        ) from None


# --- specs of schedules


def check_spec(spec: Any) -> str | Every:
    """Return a cron expression with single spaces, or an interval. Raises ConfigurationError if invalid."""
    if isinstance(spec, Every):
        return spec
    if not isinstance(spec, str):
        raise ConfigurationError(
            f"a schedule takes a cron expression such as '0 3 * * *' or every(seconds), not {spec!r}"
        )
    expression = " ".join(spec.split())
    if expression.startswith("@"):
        if (known := _NAMES.get(expression.lower())) is None:
            raise ConfigurationError(f"{spec!r} is none of {', '.join(_NAMES)}")
        return known
    if (fields := len(expression.split())) != 5:
        raise ConfigurationError(
            f"cron expression {spec!r} has {counted(fields, 'field')}, but it must have five: minute, "
            "hour, day of the month, month, day of the week, as in '0 3 * * *'"
        )
    if next(_cron(expression, _EPOCH), None) is None:
        raise ConfigurationError(f"cron expression {spec!r} never matches: no such date exists")
    return expression


def zone(name: Any) -> tzinfo:
    """Return the time zone with this name. Raises ConfigurationError if this host does not know it."""
    from zoneinfo import ZoneInfo  # not needed by a program without schedules

    if not isinstance(name, str):
        raise ConfigurationError(f"tz must be a name such as 'Europe/Berlin', not {name!r}")
    try:
        return ZoneInfo(name)
    except (LookupError, ValueError, OSError):  # unknown; not a valid name; a folder of zones
        raise ConfigurationError(
            f"unknown time zone {name!r}: use a name such as 'Europe/Berlin'. If this host has no "
            "zone database, run pip install 'taskx-queue[schedules]'"
        ) from None


def ticks_of(spec: str | Every, tz: str, since: int) -> Ticks:
    """Return the ticks of a spec: an expression in the local time of ``tz``, or an interval from ``since``.

    Raises:
        ConfigurationError: this host does not know the zone, or lacks a package.
    """
    if isinstance(spec, Every):
        return IntervalTicks(round(spec.seconds * 1000), since)
    _cron(spec, _EPOCH)
    return CronTicks(spec, zone(tz))


# --- due ticks


def upcoming(ticks: Ticks, moment: int) -> int | None:
    """Return the first tick later than a moment; None if there are no more ticks."""
    return next(ticks.after(moment), None)


def between(ticks: Ticks, start: int, end: int) -> Iterator[int]:
    """Yield the ticks from ``start`` to ``end``, including both."""
    return takewhile(lambda tick: tick <= end, ticks.after(start - 1))


def latest(ticks: Ticks, start: int, end: int, most: int = 1) -> list[int]:
    """Return the last ticks from ``start`` to ``end``, at most ``most`` of them, in order.

    The cost does not depend on the length of the span.
    """
    span = 1000
    while True:
        begin = max(start, end - span)
        found = list(deque(between(ticks, begin, end), maxlen=most))
        if begin == start or len(found) == most:
            return found
        span *= 4


class Decision(NamedTuple):
    """The decision about due ticks."""

    run: list[int]  #: the ticks that get a task, in order
    next: int | None  #: the first tick without a decision; None if there are no more ticks


def decide(
    ticks: Ticks, due: int, now: int, misfire: Misfire, grace: int | None, most: int = BATCH
) -> Decision:
    """Decide about all ticks from ``due``, the first one without a decision, until ``now``.

    A tick that was missed by more than ``grace`` milliseconds gets no task, whatever the policy. With
    ``misfire="all"`` every other tick gets a task: at most ``most`` of them now, the rest at the next
    decision. With any other policy only the last one gets a task.
    """
    start = due if grace is None else max(due, now - grace)
    if misfire != "all":
        return Decision(latest(ticks, start, now), upcoming(ticks, max(now, due - 1)))
    run: list[int] = []
    for tick in ticks.after(start - 1):
        if tick > now or len(run) == most:
            return Decision(run, tick)
        run.append(tick)
    return Decision(run, None)
