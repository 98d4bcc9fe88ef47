"""Ended tasks over time, and how long they ran: the answer of ``Queue.history``, as nodes counted it."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime

import attrs

from taskx.insight.counted import counted, grain_at
from taskx.insight.stats import Percentiles, percentiles
from taskx.node import counts
from taskx.stores.base import Repository
from taskx.tasks.checks import Duration, check_int, check_number
from taskx.tasks.clock import FIRST, to_datetime
from taskx.tasks.errors import ConfigurationError
from taskx.tasks.findings import Answer, duration

#: The upper limits of the groups of run times, in seconds; longer run times are in a last group.
BOUNDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
#: Most intervals of an answer.
MOST_INTERVALS = 1000


@attrs.frozen(kw_only=True)
class TypeHistory:
    """The ended tasks of one type: see :meth:`Queue.history`.

    Attributes:
        completed: the number of tasks that completed in each interval, oldest interval first.
        failed: the number of tasks that failed in each interval.
        run_times: the number of these tasks in each group of run times, of their last attempts. Group ``i``
            has run times up to ``bounds[i]`` seconds, the last group all longer ones.
        start_latency: how long the tasks waited whose first attempts began in each interval; None where
            none began.
    """

    completed: tuple[int, ...]
    failed: tuple[int, ...]
    run_times: tuple[int, ...]
    start_latency: tuple[Percentiles | None, ...] = ()


@attrs.frozen(kw_only=True)
class History(Answer):
    """The answer of :meth:`Queue.history`.

    Attributes:
        start: the begin of the first interval.
        interval: the length of each interval, in seconds. The last one is not over: it ends with the
            present minute.
        completed: the number of tasks of all types that completed in each interval, oldest first.
        failed: the number of tasks of all types that failed in each interval.
        start_latency: how long tasks of all types waited until their first attempts began in each interval;
            None where none began.
        types: the same by type, sorted by name, of the types that have an ended task in the period.
        bounds: the upper limits of the groups of run times, in seconds.
        since: ``start``, or the time at which counting began, if that is later.
        complete: True if counting had begun before ``start``.
    """

    start: datetime
    interval: float
    completed: tuple[int, ...]
    failed: tuple[int, ...]
    start_latency: tuple[Percentiles | None, ...] = ()
    types: Mapping[str, TypeHistory]
    bounds: tuple[float, ...] = BOUNDS
    since: datetime
    complete: bool

    def of(self, type: str) -> History:
        """Return the history of one type."""
        found = self.types.get(type)
        nothing = (0,) * len(self.completed)
        return attrs.evolve(
            self,
            completed=nothing if found is None else found.completed,
            failed=nothing if found is None else found.failed,
            start_latency=(None,) * len(nothing) if found is None else found.start_latency,
            types={} if found is None else {type: found},
        )


def history(
    repository: Repository, known: counts.Counts, now: int, period: Duration, intervals: int
) -> History:
    """Count the tasks that ended in each interval of a period: see ``Queue.history``."""
    number = check_int(intervals, "intervals", 1)
    if number > MOST_INTERVALS:
        raise ConfigurationError(f"intervals must be at most {MOST_INTERVALS}, not {number}")
    span = round(check_number(period, "period") * 1000)
    grain = grain_at(counts.TYPES, span)
    if span < number * grain:
        raise ConfigurationError(
            f"an interval must be {duration(grain // 1000)} or longer in a period of "
            f"{duration(span // 1000)}: it is divided into {number}"
        )
    end = (now // grain + 1) * grain
    start = (end - span) // grain * grain
    if start < FIRST:
        raise ConfigurationError("the period begins before the calendar: give a shorter one")
    read = counted(repository, known, now, counts.TYPES, start)
    found: defaultdict[str, _Found] = defaultdict(lambda: _Found(number))
    waits: list[Counter[str]] = [Counter() for _ in range(number)]
    for moment, cells in read.parts:
        place = min(
            number - 1, (moment - start) * number // (end - start)
        )  # the clock was set back
        for type, cell in cells.items():
            found[type].add(cell, place)
            waits[place].update(cell.get("waits", {}))
    types = {type: found[type].history() for type in sorted(found) if found[type].some}
    return History(
        start=to_datetime(start),
        interval=(end - start) / number / 1000,
        completed=_sums([of.completed for of in types.values()], number),
        failed=_sums([of.failed for of in types.values()], number),
        start_latency=(*map(percentiles, waits),),
        types=types,
        since=to_datetime(max(start, read.since)),
        complete=read.complete,
    )


class _Found:
    """The ended tasks of one type that were found so far."""

    def __init__(self, intervals: int) -> None:
        self._completed, self._failed = [0] * intervals, [0] * intervals
        self._run_times = [0] * (len(BOUNDS) + 1)
        self._waits: list[Counter[str]] = [Counter() for _ in range(intervals)]

    def add(self, cell: counts.Cell, place: int) -> None:
        """Add what was counted in an interval."""
        self._completed[place] += cell.get("completed", 0)
        self._failed[place] += cell.get("failed", 0)
        for group, times in cell.get("runs", {}).items():
            self._run_times[_GROUPS[int(group)]] += times
        self._waits[place].update(cell.get("waits", {}))

    @property
    def some(self) -> bool:
        """True if a task ended."""
        return any(self._completed) or any(self._failed)

    def history(self) -> TypeHistory:
        return TypeHistory(
            completed=(*self._completed,),
            failed=(*self._failed,),
            run_times=(*self._run_times,),
            start_latency=(*map(percentiles, self._waits),),
        )


# The group of each of the smaller groups in which run times are counted.
_GROUPS = (*(bisect_left(BOUNDS, bound) for bound in counts.BOUNDS), len(BOUNDS))


def _sums(rows: Sequence[Sequence[int]], length: int) -> tuple[int, ...]:
    return tuple(map(sum, zip(*rows, strict=True))) if rows else (0,) * length
