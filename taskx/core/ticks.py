"""When a schedule ticks: the arithmetic of cron expressions and intervals, and what is due.

Moments are milliseconds since 1970, UTC. Nothing here reads a clock or a repository.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from datetime import datetime, timedelta, tzinfo
from itertools import takewhile
from typing import Any, Literal, NamedTuple, Protocol, get_args

import attrs

from taskx.core.checks import check_number
from taskx.core.clock import LAST, to_datetime
from taskx.core.errors import ConfigurationError

#: What is done about ticks at which nobody was there.
Misfire = Literal["skip", "one", "all"]
MISFIRES = get_args(Misfire)
#: Shortest interval, in seconds.
SHORTEST = 0.1
#: Longest interval, in seconds: a century.
LONGEST = 3.2e9
#: Most ticks that are decided about at once.
BATCH = 100

# Local times know no zone here: it is looked up for each of them.
_EPOCH = datetime(1970, 1, 1)  # noqa: DTZ001
_DAY, _MILLISECOND = timedelta(days=1), timedelta(milliseconds=1)
_EVERY_HOUR = set(range(24))


def _interval(_: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if not SHORTEST <= check_number(value, attribute.name) <= LONGEST:
        raise ConfigurationError(
            f"an interval is {SHORTEST:g} to {LONGEST:g} seconds long, not {value!r}"
        )


@attrs.frozen
class Every:
    """An interval between ticks."""

    seconds: float = attrs.field(validator=_interval)

    def __str__(self) -> str:
        return f"every {self.seconds:g} s"


def every(seconds: float) -> Every:
    """Tick every so many seconds (from 0.1), counted from when the schedule was declared.

    Raises:
        ConfigurationError: this is no such number.
    """
    return Every(seconds)


class Ticks(Protocol):
    """The moments at which a schedule ticks."""

    def after(self, moment: int) -> Iterator[int]:
        """The ticks later than a moment, in order; for a given moment always the same ones."""
        ...

    def __hash__(self) -> int:
        """A number that is the same for equal ones, which tick at the same moments."""
        ...


@attrs.frozen
class IntervalTicks:
    """The ticks of an interval."""

    period: int  #: milliseconds between two of them
    since: int  #: a moment from which they are counted, in both directions

    def after(self, moment: int) -> Iterator[int]:
        tick = moment + self.period - (moment - self.since) % self.period
        while tick <= LAST:
            yield tick
            tick += self.period


@attrs.frozen
class CronTicks:
    """The ticks of a cron expression, read in the local time of a zone.

    A local time that does not exist, as clocks are set forward, ticks once at the shift; one that
    exists twice ticks the first time. An expression for every hour of the day names no hour: it goes
    by elapsed time, so that clocks that are set back do not silence it for an hour.
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
        """Ticks in order, some of them twice, from a little before a moment."""
        cron = _cron(self.expression, self._local_before(moment))
        names_hours = set(cron.hours) != _EVERY_HOUR
        waiting: list[int] = []
        for local in cron:
            first, second = self._utc(local, 0), self._utc(local, 1)
            if first > second:  # clocks pass over it
                if names_hours:
                    heapq.heappush(waiting, self._shift(second, first))
            else:
                heapq.heappush(waiting, first)
                if first < second and not names_hours:
                    heapq.heappush(waiting, second)
            while waiting and waiting[0] <= first:
                yield heapq.heappop(waiting)

    def _local_before(self, moment: int) -> datetime:
        """A local time before which no time is later than the moment, though clocks are set back soon."""
        start = to_datetime(moment)
        offsets = (_offset(start, self.zone), _offset(start + _DAY, self.zone))
        return start.replace(tzinfo=None) + min(offsets)

    def _utc(self, local: datetime, fold: int) -> int:
        offset = local.replace(tzinfo=self.zone, fold=fold).utcoffset()
        assert offset is not None  # a zone of zoneinfo
        return (local - offset - _EPOCH) // _MILLISECOND

    def _shift(self, before: int, after: int) -> int:
        """The moment between two at which the clocks are set forward."""
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
    """The library's iterator; where it is given local times without a zone, it knows no DST."""
    try:
        from cronsim import CronSim, CronSimError
    except ImportError as error:
        raise ConfigurationError(
            "cron expressions need the package cronsim: pip install 'taskx-queue[schedules]'; "
            "every(seconds) does not"
        ) from error
    try:
        return CronSim(expression, start)
    except CronSimError as error:
        raise ConfigurationError(
            f"cron expression {expression!r}: {error}; its five fields are minute, hour, "
            "day of the month, month, day of the week, as in '0 3 * * *'"
        ) from None


# --- what was asked for


def check_spec(spec: Any) -> str | Every:
    """A cron expression, its blanks made single ones, or an interval; ConfigurationError says why not."""
    if isinstance(spec, Every):
        return spec
    if not isinstance(spec, str):
        raise ConfigurationError(
            f"a schedule takes a cron expression such as '0 3 * * *' or every(seconds), not {spec!r}"
        )
    expression = " ".join(spec.split())
    if (fields := len(expression.split())) != 5:
        raise ConfigurationError(
            f"cron expression {spec!r} has {fields} fields and not five: minute, hour, "
            "day of the month, month, day of the week, as in '0 3 * * *'"
        )
    if next(_cron(expression, _EPOCH), None) is None:
        raise ConfigurationError(f"cron expression {spec!r} never comes")
    return expression


def zone(name: Any) -> tzinfo:
    """The time zone of a name; ConfigurationError if this host knows none."""
    from zoneinfo import ZoneInfo  # not needed by a program without schedules

    if not isinstance(name, str):
        raise ConfigurationError(f"tz must be a name such as 'Europe/Berlin', not {name!r}")
    try:
        return ZoneInfo(name)
    except (LookupError, ValueError, OSError):  # unknown; no name at all; a folder of zones
        raise ConfigurationError(
            f"no time zone {name!r} is known: give a name such as 'Europe/Berlin'; to a host without "
            "a zone database, pip install 'taskx-queue[schedules]' gives one"
        ) from None


def ticks_of(spec: str | Every, tz: str, since: int) -> Ticks:
    """The ticks of a spec: an expression read in the local time of ``tz``, or an interval from ``since``.

    Raises:
        ConfigurationError: this host does not know the zone, or lacks a package.
    """
    if isinstance(spec, Every):
        return IntervalTicks(round(spec.seconds * 1000), since)
    _cron(spec, _EPOCH)
    return CronTicks(spec, zone(tz))


# --- what is due


def upcoming(ticks: Ticks, moment: int) -> int | None:
    """The first tick later than a moment; None if there is none any more."""
    return next(ticks.after(moment), None)


def between(ticks: Ticks, start: int, end: int) -> Iterator[int]:
    """The ticks of a span, both of its ends included."""
    return takewhile(lambda tick: tick <= end, ticks.after(start - 1))


def latest(ticks: Ticks, start: int, end: int, most: int = 1) -> list[int]:
    """The last ticks of a span, ``most`` of them if there are so many, in order.

    What it costs does not depend on how long the span is.
    """
    span = 1000
    while True:
        begin = max(start, end - span)
        found = list(deque(between(ticks, begin, end), maxlen=most))
        if begin == start or len(found) == most:
            return found
        span *= 4


class Decision(NamedTuple):
    """The decision about the ticks that are due."""

    run: list[int]  #: those for which there is to be a task, in order
    next: int | None  #: the first tick that is not decided about yet; None if there is none


def decide(
    ticks: Ticks, due: int, now: int, misfire: Misfire, grace: int | None, most: int = BATCH
) -> Decision:
    """Decide about all ticks from ``due``, the first that nobody has decided about, until ``now``.

    A tick that is later than ``grace`` milliseconds gets no task, whatever the policy. Of the others,
    ``all`` get one (``most`` of them now, the rest when they are decided about next), or else the
    last one does.
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
