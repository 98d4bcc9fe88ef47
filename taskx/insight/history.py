"""Ended tasks over time, and how long they ran: the answer of ``Queue.history``.

As in ``stats``, the ended tasks that are counted are those that were submitted last, by one bounded read
of each status.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime

import attrs

from taskx.node.moving import Services
from taskx.stores import queries
from taskx.stores.base import Repository
from taskx.tasks.checks import Duration, check_int, check_number
from taskx.tasks.clock import to_datetime
from taskx.tasks.errors import ConfigurationError
from taskx.tasks.findings import Answer
from taskx.tasks.lifecycle import COMPLETED, FAILED, NO_WORK

#: The upper limits of the groups of run times, in seconds; longer run times are in a last group.
BOUNDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
#: Most intervals of an answer.
MOST_INTERVALS = 1000

_FIELDS = ("type", "created_at", "started_at", "completed_at", "duration")


@attrs.frozen(kw_only=True)
class TypeHistory:
    """The ended tasks of one type: see :meth:`Queue.history`.

    Attributes:
        completed: the number of tasks that completed in each interval, oldest interval first.
        failed: the number of tasks that failed in each interval.
        run_times: the number of these tasks in each group of run times, of their last attempts. Group ``i``
            has run times up to ``bounds[i]`` seconds, the last group all longer ones.
    """

    completed: tuple[int, ...]
    failed: tuple[int, ...]
    run_times: tuple[int, ...]


@attrs.frozen(kw_only=True)
class History(Answer):
    """The answer of :meth:`Queue.history`.

    Attributes:
        start: the begin of the first interval.
        interval: the length of each interval, in seconds. The last one ends when the answer was made.
        completed: the number of tasks of all types that completed in each interval, oldest first.
        failed: the number of tasks of all types that failed in each interval.
        types: the same by type, sorted by name, of the types that have an ended task in the period.
        bounds: the upper limits of the groups of run times, in seconds.
        since: all ended tasks that were submitted after this time were read; None if all were read.
        complete: True if every task that was submitted in the period is counted.
    """

    start: datetime
    interval: float
    completed: tuple[int, ...]
    failed: tuple[int, ...]
    types: Mapping[str, TypeHistory]
    bounds: tuple[float, ...] = BOUNDS
    since: datetime | None
    complete: bool

    def of(self, type: str) -> History:
        """Return the history of one type."""
        found = self.types.get(type)
        nothing = (0,) * len(self.completed)
        return attrs.evolve(
            self,
            completed=nothing if found is None else found.completed,
            failed=nothing if found is None else found.failed,
            types={} if found is None else {type: found},
        )


def history(
    repository: Repository,
    services: Services,
    period: Duration,
    intervals: int,
    at_most: int,
) -> History:
    """Count the tasks that ended in each interval of a period: see ``Queue.history``."""
    most, number = check_int(at_most, "at_most", 1), check_int(intervals, "intervals", 1)
    if number > MOST_INTERVALS:
        raise ConfigurationError(f"intervals must be at most {MOST_INTERVALS}, not {number}")
    span = round(check_number(period, "period") * 1000)
    if span < number:
        raise ConfigurationError(
            f"an interval must be a millisecond or longer: period {period!r} has {number} intervals"
        )
    end = services.clock.now_ms()
    start = end - span
    found: defaultdict[str, _Found] = defaultdict(lambda: _Found(number))
    times: list[int] = []
    for status in (COMPLETED, FAILED):
        rows, since = queries.newest(repository, status, most, _FIELDS)
        times += () if since is None else (since,)
        for type, _, started_at, ended_at, duration in rows:
            with suppress(TypeError):  # a damaged record
                if start < ended_at <= end and type not in NO_WORK:
                    place = (ended_at - start - 1) * number // span
                    found[str(type)].add(status, place, started_at, duration)
    types = {type: found[type].history() for type in sorted(found)}
    since = max(times, default=None)
    return History(
        start=to_datetime(start),
        interval=span / number / 1000,
        completed=_sums([of.completed for of in types.values()], number),
        failed=_sums([of.failed for of in types.values()], number),
        types=types,
        since=None if since is None else to_datetime(since),
        complete=since is None or since <= start,
    )


class _Found:
    """The ended tasks of one type that were found so far."""

    def __init__(self, intervals: int) -> None:
        self._numbers = {COMPLETED: [0] * intervals, FAILED: [0] * intervals}
        self._run_times = [0] * (len(BOUNDS) + 1)

    def add(self, status: str, place: int, started_at: int | None, duration: float) -> None:
        """Add a task.

        Raises:
            TypeError: the duration is damaged; the task was not added.
        """
        group = bisect_left(BOUNDS, duration)
        self._numbers[status][place] += 1
        if started_at is not None:  # else it failed because of its parent
            self._run_times[group] += 1

    def history(self) -> TypeHistory:
        return TypeHistory(
            completed=(*self._numbers[COMPLETED],),
            failed=(*self._numbers[FAILED],),
            run_times=(*self._run_times,),
        )


def _sums(rows: Sequence[Sequence[int]], length: int) -> tuple[int, ...]:
    return tuple(map(sum, zip(*rows, strict=True))) if rows else (0,) * length
