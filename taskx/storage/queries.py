"""Queries that several parts of the runtime need, built from a repository's primitives."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import islice

import attrs

from taskx.core.model import Task, TaskFilter, TaskPage
from taskx.core.record import COLUMNS, Stub
from taskx.core.writes import Write, shows
from taskx.storage.base import Listed, Repository

# Values read at a time.
_PAGE = 1000
#: Tasks read at a time.
TASKS = 200
# Approximate number of tasks that are read to find the one that has waited longest.
_OLDEST = 1000


def every(repository: Repository, column: Listed) -> Iterator[str]:
    """Yield all values of a column, sorted."""
    after = ""
    while page := repository.distinct(column, after, _PAGE):
        yield from page
        after = page[-1]


def owners(repository: Repository) -> Sequence[str]:
    """Return the ids of all nodes that hold tasks or on which a task is stuck."""
    columns: tuple[Listed, ...] = ("buffered_on", "running_on", "stuck_on")
    return [*{owner: None for column in columns for owner in every(repository, column)}]


def runs_somewhere(repository: Repository, type: str) -> bool:
    """Return True if a node that may be alive has an executor for the type."""
    return any(type in node.types for node in repository.nodes() if node.alive is not False)


def oldest_ready(repository: Repository) -> int | None:
    """Return since when the longest waiting task that may start has waited, in milliseconds.

    Return None if no task may start. A task waits from the moment it was stored or, if that is later, from
    its ``run_at``.
    """
    oldest = longest_waiting(repository, [*every(repository, "ready_type")])
    return None if oldest is None else oldest.waits_since


def longest_waiting(repository: Repository, types: Sequence[str]) -> Stub | None:
    """Return the task of these types that may start and has waited longest; None if none may start.

    Only the tasks of each type that were stored first are read.
    """
    holders = ["", *every(repository, "buffered_on")]
    most = max(1, _OLDEST // max(1, len(types)))
    found = (stub for owner in holders for stub in repository.ready(types, most, owner, ageing=1))
    return min(found, key=lambda stub: stub.waits_since, default=None)


def asked_to_cancel(repository: Repository, task_ids: Sequence[str]) -> Collection[str]:
    """Return the ids of these tasks that have a cancel request, even if their records are damaged."""
    found = repository.find("id", task_ids, ("id", "cancel_requested_at"))
    return [task_id for task_id, asked_at in found if asked_at is not None]


def shown(repository: Repository, writes: Sequence[Write]) -> Sequence[bool]:
    """Return for each write True if the record shows that it took place."""
    found = repository.find("id", [*{write.id: None for write in writes}], COLUMNS)
    rows = {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in found}
    return [shows(rows.get(write.id), write, repository.codecs.same) for write in writes]


def page(repository: Repository, filter: TaskFilter) -> TaskPage:
    """Return the tasks that match the filter, newest first, and the number of all that match it.

    Tasks and total agree, whatever is stored or deleted between the two reads. A page that is not full
    shows where the list ends. An empty page shows that the list ends before it.
    """
    tasks = repository.list(filter)
    end = filter.offset + len(tasks)
    if len(tasks) < filter.limit and (tasks or not filter.offset):
        return TaskPage(tasks, end)
    total = repository.count(filter)
    if tasks:
        total = max(total, end)
    elif filter.limit:
        total = min(total, end)
    return TaskPage(tasks, total, more=max(0, total - end))


def matching(repository: Repository, filter: TaskFilter) -> Iterator[Task]:
    """Iterate over the tasks that match the filter, newest first: all of them if it has no limit.

    Tasks that are stored or removed in the meantime neither hide nor repeat another one.
    """
    most = filter.offset + filter.limit if filter.limited else None
    limit = TASKS if most is None else min(TASKS, most)
    every = _pages(repository, attrs.evolve(filter, offset=0, limit=limit))
    return islice(every, filter.offset, most)


def _pages(repository: Repository, filter: TaskFilter) -> Iterator[Task]:
    """Yield all tasks that match the filter, reading at most its limit at a time."""
    tasks, after = repository.list_after(filter)
    while tasks:
        yield from tasks
        tasks, after = repository.list_after(filter, after)


class Changes:
    """A callable that returns True if others may have changed something since its last call.

    The first call returns True.

    Args:
        repository: the repository to watch.
    """

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._seen: object = None

    def __call__(self) -> bool:
        """Return True if something may have changed since the last call.

        Raises:
            RepositoryError: the repository cannot be read.
        """
        before, self._seen = self._seen, self._repository.version()
        return bool(self._seen != before)
