"""Statistics of the stored tasks, by type: the answer of ``Queue.stats``.

There is no index of tasks by their end, and no counter that every task would pay for. So the ended tasks
that are counted are those that were submitted last. All reads are bounded.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, Literal

import attrs

from taskx.node.moving import Services
from taskx.stores import queries
from taskx.stores.base import Lookup, Repository
from taskx.tasks.checks import Duration, check_int, check_number
from taskx.tasks.clock import to_datetime
from taskx.tasks.findings import Answer, duration
from taskx.tasks.lifecycle import ANSWER, CHILDREN, COMPLETED, FAILED, PENDING
from taskx.tasks.record import BY_THREAD
from taskx.tasks.tables import html_table

# Approximate number of waiting tasks that are read to find the oldest of each type.
_OLDEST = 1000

# The columns by which tasks are found that wait for their parents or their turn.
_BLOCKED: tuple[Literal["waiting_on", "line"], ...] = ("waiting_on", "line")

_FIELDS = (
    *("type", "status", "created_at", "run_at", "started_at", "completed_at", "duration"),
    *("errors", "crashes", "interruptions", "snoozes"),
)


@attrs.frozen
class Percentiles:
    """Two percentiles of durations, in seconds.

    Attributes:
        p50: half of the durations are at most this long.
        p95: 95 of 100 durations are at most this long.
    """

    p50: float
    p95: float


@attrs.frozen(kw_only=True)
class TypeStats:
    """The tasks of one type: see :meth:`Queue.stats`.

    Attributes:
        waiting: pending tasks that may start now.
        delayed: pending tasks whose ``run_at`` has not come, such as retries that wait.
        blocked: pending tasks that wait for other tasks, for an answer, for their turn of a concurrency
            key, or for a thread of an earlier attempt.
        running: running tasks.
        stuck: threads that run on after the time-out of an attempt. A task may have been retried or
            cancelled since, or have failed.
        oldest_due: seconds for which the oldest waiting task could have started; None if none waits.
        completed: tasks that completed in the period.
        failed: tasks that failed in the period.
        error_share: the share of failed tasks, 0 to 1, in those of them that were submitted after ``since``
            of :class:`Stats`; None if there are none.
        start_latency: how long these tasks waited from when they could start until they did; of those that
            ended with their first attempt. None if there are none.
        run_time: how long the last attempts of these tasks took; None if there are none.
    """

    waiting: int = 0
    delayed: int = 0
    blocked: int = 0
    running: int = 0
    stuck: int = 0
    oldest_due: float | None = None
    completed: int = 0
    failed: int = 0
    error_share: float | None = None
    start_latency: Percentiles | None = None
    run_time: Percentiles | None = None


@attrs.frozen(kw_only=True, repr=False)
class Stats(Answer):
    """The answer of :meth:`Queue.stats`.

    Attributes:
        types: the types that have an executor in this queue or a task that was read, sorted by name;
            without that of answers.
        answers: pending answers, which people give; they are no work that waits.
        checked_at: the time of the answer.
        period: the seconds before it in which tasks are counted as completed or failed.
        since: all ended tasks that were submitted after this time were read; None if all were read.
        complete: True if every task that was submitted in the period is counted. False if there are more
            tasks than were read: then all numbers are at least so high.
    """

    types: Mapping[str, TypeStats]
    answers: int
    checked_at: datetime
    period: float
    since: datetime | None
    complete: bool

    def __repr__(self) -> str:
        told = [
            f"{name}: " + (", ".join(f"{v} {k}" for k, v in counts.items() if v) or "nothing")
            for name, counts in self._counts().items()
        ]
        return f"Stats({'; '.join(told)})"

    def _repr_html_(self) -> str:
        rows = [(name, *counts.values()) for name, counts in self._counts().items()]
        caption = f"The last {duration(round(self.period))}"
        return html_table(("type", *_COUNTS), rows, caption)

    def _counts(self) -> dict[str, dict[str, Any]]:
        return {t: {name: getattr(of, name) for name in _COUNTS} for t, of in self.types.items()}


#: What a line and a table say of each type.
_COUNTS = ("waiting", "delayed", "blocked", "running", "stuck", "completed", "failed")


def stats(
    repository: Repository,
    services: Services,
    period: Duration,
    at_most: int,
    waiting_at_most: int,
) -> Stats:
    """Count what waits, runs and has ended, by type: see ``Queue.stats``."""
    seconds = check_number(period, "period")
    most = check_int(at_most, "at_most", 1), check_int(waiting_at_most, "waiting_at_most", 1)
    return _Reading(repository, services, *most).stats(seconds)


class _Reading:
    """The reads for one answer."""

    def __init__(
        self, repository: Repository, services: Services, at_most: int, waiting_at_most: int
    ) -> None:
        self._repository = repository
        self._at_most = at_most
        self._waiting_at_most = waiting_at_most
        self._capped = False
        self._now = services.clock.now_ms()
        self._found: defaultdict[str, _Found] = defaultdict(_Found)
        for type in services.registry.types:
            self._found[type]

    def stats(self, period: float) -> Stats:
        self._count_waiting()
        self._count_delayed()
        self._count_blocked()
        self._count("running", "running_on", [*queries.every(self._repository, "running_on")])
        start = self._now - round(period * 1000)
        since = self._count_ended(start) if period else self._now
        answers = self._found.pop(ANSWER, _Found()).numbers["blocked"]
        self._found.pop(CHILDREN, None)
        return Stats(
            types={type: self._found[type].stats(self._now) for type in sorted(self._found)},
            answers=answers,
            checked_at=to_datetime(self._now),
            period=period,
            since=None if since is None else to_datetime(since),
            complete=not self._capped and (since is None or since <= start),
        )

    def _count_waiting(self) -> None:
        types = [*queries.every(self._repository, "ready_type")]
        most = max(1, _OLDEST // max(1, len(types)))
        for owner in ("", *queries.every(self._repository, "buffered_on")):
            for type in types:
                if number := self._repository.reads.count_ready(type, owner, self._waiting_at_most):
                    self._capped |= number == self._waiting_at_most
                    self._found[type].numbers["waiting"] += number
                    for stub in self._repository.ready([type], most, owner, ageing=1):
                        self._found[type].waits_since(stub.waits_since)

    def _count_delayed(self) -> None:
        run_at = dict(self._read(self._repository.due(None, self._at_most)))
        for task_id, type in self._repository.find("id", [*run_at], ("id", "type")):
            found = self._found[str(type)]
            if run_at[task_id] > self._now:
                found.numbers["delayed"] += 1
            else:  # no queue has released it yet
                found.numbers["waiting"] += 1
                found.waits_since(run_at[task_id])

    def _count_blocked(self) -> None:
        for column in _BLOCKED:
            values = self._repository.distinct(column, "", self._at_most)
            self._count("blocked", column, values)
        nodes = [*queries.every(self._repository, "stuck_on")]
        fields = ("type", "status", "held")
        rows = self._repository.find("stuck_on", nodes, fields, self._at_most)
        for type, *state in self._read(rows):
            numbers = self._found[str(type)].numbers
            numbers["stuck"] += 1
            numbers["blocked"] += state == [PENDING, BY_THREAD]

    def _count(self, name: str, column: Lookup, values: Sequence[str]) -> None:
        rows = self._repository.find(column, values, ("type",), self._at_most) if values else ()
        for (type,) in self._read(rows):
            self._found[str(type)].numbers[name] += 1

    def _read(self, rows: Sequence[Any]) -> Sequence[Any]:
        """Return these rows, and note if there may be more."""
        self._capped |= len(rows) >= self._at_most
        return rows

    def _count_ended(self, start: int) -> int | None:
        """Count the tasks that ended since ``start``; return since when all submitted ones are counted."""
        pages = [
            queries.newest(self._repository, status, self._at_most, _FIELDS)
            for status in (COMPLETED, FAILED)
        ]
        since = max((since for _, since in pages if since is not None), default=None)
        for row in (row for rows, _ in pages for row in rows):
            with suppress(TypeError):  # a damaged record
                self._found[str(row[0])].add(row, start, since)
        return since


class _Found:
    """The tasks of one type that were found so far."""

    def __init__(self) -> None:
        self.numbers: Counter[str] = Counter()
        self._shares: Counter[str] = Counter()
        self._waits_since: int | None = None
        self._latencies: list[float] = []
        self._run_times: list[float] = []

    def waits_since(self, moment: int) -> None:
        """Note that a task could have started since then."""
        known = self._waits_since
        self._waits_since = moment if known is None else min(known, moment)

    def add(self, row: Sequence[Any], start: int, since: int | None) -> None:
        """Add a task if it ended after ``start``; to the shares only if it was submitted after ``since``.

        Raises:
            TypeError: a value is damaged; the task was not added.
        """
        _, status, created_at, run_at, started_at, completed_at, duration, *trials = row
        if completed_at is None or completed_at < start:
            return
        waited = None if started_at is None else started_at - max(created_at, run_at or 0)
        trial, run_time = sum(trials), duration + 0.0
        self._shares[status] += since is None or created_at >= since
        self.numbers[status] += 1
        if waited is not None:  # else it failed because of its parent
            self._run_times.append(run_time)
            if trial <= (status == FAILED):
                self._latencies.append(max(0, waited) / 1000)

    def stats(self, now: int) -> TypeStats:
        since, ended = self._waits_since, self._shares.total()
        return TypeStats(
            **self.numbers,
            oldest_due=None if since is None else max(0, now - since) / 1000,
            error_share=self._shares[FAILED] / ended if ended else None,
            start_latency=_percentiles(self._latencies),
            run_time=_percentiles(self._run_times),
        )


def _percentiles(values: Iterable[float]) -> Percentiles | None:
    if not (ordered := sorted(values)):
        return None
    p50, p95 = (ordered[math.ceil(len(ordered) * share) - 1] for share in (0.5, 0.95))
    return Percentiles(p50, p95)
