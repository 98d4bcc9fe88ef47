"""Statistics of the stored tasks, by type: the answer of ``Queue.stats``.

What waits and runs is read from the tasks, by bounded reads. What began and ended was counted by the nodes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

import attrs

from taskx.insight.counted import Counted, beginning, counted, numbers_of, percentile
from taskx.node.counts import TYPES, Cell, Counts
from taskx.stores import queries
from taskx.stores.base import Lookup, Repository
from taskx.tasks.checks import Duration, check_int
from taskx.tasks.clock import to_datetime
from taskx.tasks.findings import Answer, duration
from taskx.tasks.lifecycle import ANSWER, CHILDREN, PENDING
from taskx.tasks.record import BY_THREAD
from taskx.tasks.tables import html_table

# Approximate number of waiting tasks that are read to find the oldest of each type.
_OLDEST = 1000

# The columns by which tasks are found that wait for their parents or their turn.
_BLOCKED: tuple[Literal["waiting_on", "line"], ...] = ("waiting_on", "line")


@attrs.frozen
class Percentiles:
    """Two percentiles of durations, in seconds, at most a fifth too long or too short.

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
        started: attempts that began in the period.
        completed: tasks that completed in it.
        failed: tasks that failed in it.
        retried: attempts that failed in it and were followed by another.
        cancelled: tasks that were cancelled in it.
        seconds: how long the attempts took that ended in it.
        cost: what these have taken of each unit of their cost: as ``ctx.spent`` said, or else ``cost``; of
            an attempt that raised ``Snooze`` only what ``ctx.spent`` said.
        error_share: the share of failed tasks, 0 to 1, in those that completed or failed; None if there are
            none.
        start_latency: how long tasks waited from when they could start until they did; of the first
            attempts that began in the period. None if there are none.
        run_time: how long the last attempts of the tasks took that completed or failed; None if there are
            none.
    """

    waiting: int = 0
    delayed: int = 0
    blocked: int = 0
    running: int = 0
    stuck: int = 0
    oldest_due: float | None = None
    started: int = 0
    completed: int = 0
    failed: int = 0
    retried: int = 0
    cancelled: int = 0
    seconds: float = 0.0
    cost: Mapping[str, int] = attrs.field(factory=dict)
    error_share: float | None = None
    start_latency: Percentiles | None = None
    run_time: Percentiles | None = None


@attrs.frozen(kw_only=True, repr=False)
class Stats(Answer):
    """The answer of :meth:`Queue.stats`.

    Attributes:
        types: the types that have an executor in this queue, a task that was read or one that was counted,
            sorted by name; without that of answers.
        answers: pending answers, which people give; they are no work that waits.
        checked_at: the time of the answer.
        period: the seconds before it for which tasks that began or ended are counted.
        since: the beginning of the first minute that is counted: of ten if it is more than 3 hours ago, of
            an hour after a day, of a day after two months. It is the time at which counting began, if that
            is later.
        complete: True if counting had begun before ``since``, and all that waits and runs was read.
            Otherwise all numbers are at least so high.
    """

    types: Mapping[str, TypeStats]
    answers: int
    checked_at: datetime
    period: float
    since: datetime
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
    counts: Counts,
    types: Iterable[str],
    now: int,
    *,
    period: Duration,
    since: datetime | None,
    at_most: int,
    waiting_at_most: int,
) -> Stats:
    """Count what waits, runs and has ended, by type: see ``Queue.stats``."""
    start = beginning(period, since, now)
    most = check_int(at_most, "at_most", 1), check_int(waiting_at_most, "waiting_at_most", 1)
    ended = (
        counted(repository, counts, now, TYPES, start) if start < now else Counted(now, True, ())
    )
    return _Reading(repository, types, now, *most).stats(start, ended)


class _Reading:
    """The reads for one answer."""

    def __init__(
        self,
        repository: Repository,
        types: Iterable[str],
        now: int,
        at_most: int,
        waiting_at_most: int,
    ) -> None:
        self._repository = repository
        self._at_most = at_most
        self._waiting_at_most = waiting_at_most
        self._capped = False
        self._now = now
        self._found: defaultdict[str, _Found] = defaultdict(_Found)
        for type in types:
            self._found[type]

    def stats(self, start: int, ended: Counted) -> Stats:
        self._count_waiting()
        self._count_delayed()
        self._count_blocked()
        self._count("running", "running_on", [*queries.every(self._repository, "running_on")])
        for type, cell in ended.sums().items():
            self._found[type].cell = cell
        answers = self._found.pop(ANSWER, _Found()).numbers["blocked"]
        self._found.pop(CHILDREN, None)
        return Stats(
            types={type: self._found[type].stats(self._now) for type in sorted(self._found)},
            answers=answers,
            checked_at=to_datetime(self._now),
            period=(self._now - start) / 1000,
            since=to_datetime(ended.since),
            complete=not self._capped and ended.complete,
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


class _Found:
    """The tasks of one type that were found so far, and what was counted."""

    def __init__(self) -> None:
        self.numbers: Counter[str] = Counter()
        self.cell: Cell = {}
        self._waits_since: int | None = None

    def waits_since(self, moment: int) -> None:
        """Note that a task could have started since then."""
        known = self._waits_since
        self._waits_since = moment if known is None else min(known, moment)

    def stats(self, now: int) -> TypeStats:
        since, cell = self._waits_since, self.cell
        failed = cell.get("failed", 0)
        ended = failed + cell.get("completed", 0)
        return TypeStats(
            **{**self.numbers, **numbers_of(cell)},
            oldest_due=None if since is None else max(0, now - since) / 1000,
            error_share=failed / ended if ended else None,
            start_latency=percentiles(cell.get("waits", {})),
            run_time=percentiles(cell.get("runs", {})),
        )


def percentiles(groups: Mapping[str, int]) -> Percentiles | None:
    """Return the percentiles of times that were counted by group; None if there are none."""
    if not groups:
        return None
    return Percentiles(percentile(groups, 0.5), percentile(groups, 0.95))
