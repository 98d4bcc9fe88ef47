"""Failed tasks in groups of the same cause: the answer of ``Queue.failures``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from operator import attrgetter
from typing import Any, NamedTuple

import attrs

from taskx.insight.places import Place, place_of
from taskx.stores import queries
from taskx.stores.base import Repository
from taskx.stores.selecting import Also, Chosen
from taskx.tasks.checks import check_int
from taskx.tasks.clock import to_datetime, to_ms
from taskx.tasks.errors import ConfigurationError
from taskx.tasks.findings import Answer
from taskx.tasks.lifecycle import FAILED
from taskx.tasks.model import TaskFilter, TaskStatus, check_key, check_moment

_FIELDS = ("id", "type", "created_at", "completed_at", "error", "error_type", "traceback")


@attrs.frozen(kw_only=True)
class FailureGroup(Answer):
    """Failed tasks of one type, whose last attempts raised the same class of error at the same place.

    Attributes:
        type: the type of the tasks.
        error_type: the full class name of the exception; empty if there was none, as after a crash.
        place: the deepest frame of user code in the traceback; None if there is no traceback.
        count: the number of tasks.
        first: the time at which the first of them failed.
        last: the time at which the last of them failed.
        example: the id of the task that failed last.
        error: the error text of that task.
        task_ids: the ids of all of them, the last failure first. ``queue.requeue_failures(group)`` runs
            them again, and those of the same cause that were not read.
        times: the times at which they failed, in the same order.
    """

    type: str
    error_type: str
    place: Place | None
    count: int
    first: datetime
    last: datetime
    example: str
    error: str
    task_ids: Sequence[str] = attrs.field(repr=False)
    times: Sequence[datetime] = attrs.field(repr=False)


@attrs.frozen(kw_only=True)
class Failures(Answer):
    """The answer of :meth:`Queue.failures`: iterate over it, or count it with ``len``.

    Attributes:
        groups: the groups, the one with the most tasks first.
        since: failed tasks that were submitted before this time were not read; None if all were read.
    """

    groups: Sequence[FailureGroup]
    since: datetime | None

    @property
    def complete(self) -> bool:
        """True if all failed tasks in the repository were read."""
        return self.since is None

    def __iter__(self) -> Iterator[FailureGroup]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def to_dict(self) -> dict[str, Any]:
        """Return it as a dict of JSON values; times are ISO text."""
        return {**Answer.to_dict(self), "complete": self.complete}


def tasks_of(group: FailureGroup, repository: Repository) -> Chosen:
    """Choose all failed tasks of a group, also those that it has not read."""
    if not isinstance(group, FailureGroup):
        raise ConfigurationError(
            f"requeue_failures() takes a group of queue.failures(), not {group!r:.80}"
        )
    if repository.shortcoming:  # it has only the eight methods, and may not keep tracebacks
        return Chosen(group.task_ids)
    wanted = TaskFilter(status=TaskStatus.FAILED, type=group.type, error_type=group.error_type)
    here = Also(str(group.place), lambda task: place_of(task.traceback) == group.place)
    return Chosen(filter=wanted, also=here)


class _Failed(NamedTuple):
    at: int
    id: str
    error: str


def failures(
    repository: Repository, type: str | None, since: datetime | None, at_most: int
) -> Failures:
    """Return failed tasks in groups of the same cause: see ``Queue.failures``."""
    wanted = None if type is None else check_key(type, "type")
    check_moment(since, "since")
    start = None if since is None else to_ms(since)
    most = check_int(at_most, "at_most", 1)
    rows, read_since = queries.newest(repository, FAILED, most, _FIELDS)
    found: dict[tuple[str, str, Place | None], list[_Failed]] = {}
    for task_id, kind, _, at, error, error_type, traceback in rows:
        if not isinstance(at, int):  # requeued in the meantime, or damaged
            continue
        if wanted in (None, kind) and (start is None or at >= start):
            key = str(kind), str(error_type), place_of(str(traceback))
            found.setdefault(key, []).append(_Failed(at, task_id, str(error)))
    groups = [_group(*key, failed) for key, failed in found.items()]
    groups.sort(key=attrgetter("count", "last"), reverse=True)
    return Failures(groups=groups, since=None if read_since is None else to_datetime(read_since))


def _group(type: str, error_type: str, place: Place | None, failed: list[_Failed]) -> FailureGroup:
    failed.sort(reverse=True)
    return FailureGroup(
        type=type,
        error_type=error_type,
        place=place,
        count=len(failed),
        first=to_datetime(failed[-1].at),
        last=to_datetime(failed[0].at),
        example=failed[0].id,
        error=failed[0].error,
        task_ids=[task.id for task in failed],
        times=[to_datetime(task.at) for task in failed],
    )
