"""Questions that several parts of the runtime ask of a repository, put together from its primitives."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from taskx.core.model import Task, TaskFilter
from taskx.core.record import COLUMNS
from taskx.core.writes import Write, shows
from taskx.storage.base import Listed, Repository

# Values that are read at a time.
_PAGE = 1000
# Tasks, about, among which the one is sought that waits longest.
_OLDEST = 1000


def every(repository: Repository, column: Listed) -> Iterator[str]:
    """All values of a column, in order."""
    after = ""
    while page := repository.distinct(column, after, _PAGE):
        yield from page
        after = page[-1]


def owners(repository: Repository) -> Sequence[str]:
    """The ids of all nodes that hold tasks, or on which one is stuck."""
    columns: tuple[Listed, ...] = ("buffered_on", "running_on", "stuck_on")
    return [*{owner: None for column in columns for owner in every(repository, column)}]


def oldest_ready(repository: Repository) -> int | None:
    """Return since when the task waits that waits longest of all that may start now, in milliseconds.

    None if no task may start. A task waits since it was stored or, if that was later, since its ``run_at``.
    Of each type, only the tasks that were stored first are looked at.
    """
    types = [*every(repository, "ready_type")]
    holders = ["", *every(repository, "buffered_on")]
    most = max(1, _OLDEST // max(1, len(types)))
    found = (stub for owner in holders for stub in repository.ready(types, most, owner, ageing=1))
    return min((max(stub.created_at, stub.run_at or 0) for stub in found), default=None)


def asked_to_cancel(repository: Repository, task_ids: Sequence[str]) -> Collection[str]:
    """The ids of these tasks whose cancel was requested, even if their records are damaged."""
    found = repository.find("id", task_ids, ("id", "cancel_requested_at"))
    return [task_id for task_id, asked_at in found if asked_at is not None]


def shown(repository: Repository, writes: Sequence[Write]) -> Sequence[bool]:
    """Say for each write whether the record shows that it took place."""
    found = repository.find("id", [*{write.id: None for write in writes}], COLUMNS)
    rows = {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in found}
    return [shows(rows.get(write.id), write, repository.codecs.same) for write in writes]


def page(repository: Repository, filter: TaskFilter) -> tuple[Sequence[Task], int]:
    """The tasks that meet the filter, newest first, and how many meet it in all.

    The two do not contradict each other, whatever is stored or deleted between two looks. A page that is
    not full says itself where the list ends; one that is empty, that it ends before.
    """
    tasks = repository.list(filter)
    end = filter.offset + len(tasks)
    if len(tasks) < filter.limit and (tasks or not filter.offset):
        return tasks, end
    count = repository.count(filter)
    if tasks:
        return tasks, max(count, end)
    return tasks, min(count, end) if filter.limit else count


class Changes:
    """Tells one that asks whether others changed something since it last asked; true at first.

    Args:
        repository: what others may have changed.
    """

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._seen: object = None

    def __call__(self) -> bool:
        """Return whether something may have changed since the last call.

        Raises:
            RepositoryError: the repository cannot be read.
        """
        before, self._seen = self._seen, self._repository.version()
        return bool(self._seen != before)
