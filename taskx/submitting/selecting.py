"""The tasks of a bulk change: those with given ids, or those that match a filter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from heapq import merge
from itertools import islice
from typing import NamedTuple

import attrs

from taskx.core.checks import check_int
from taskx.core.errors import ConfigurationError
from taskx.core.model import CONDITIONS, Task, TaskCount, TaskFilter, TaskStatus
from taskx.storage import queries
from taskx.storage.base import Repository

_EARLY = datetime(1, 1, 1, tzinfo=timezone.utc)
_NO_LIMIT = TaskFilter().limit


def dead(filter: TaskFilter) -> TaskFilter:
    """Return the filter, limited to dead letters. Raises ConfigurationError if it has another status."""
    if filter.status not in (None, TaskStatus.FAILED):
        raise ConfigurationError(
            f"dead letters are failed tasks: the filter must not have status {filter.status}"
        )
    return attrs.evolve(filter, status=TaskStatus.FAILED)


def created_at(task: Task) -> datetime:
    """Return the date by which lists are sorted."""
    return task.created_at or _EARLY


def conditions(filter: TaskFilter) -> object:
    """Return the conditions of a filter except dates: an age is another date in each call."""
    names = sorted(CONDITIONS - {"start_date", "end_date"})
    return [(name, getattr(filter, name)) for name in names]


class Also(NamedTuple):
    """A further condition, and a name that is the same in every process."""

    name: str
    meets: Callable[[Task], bool]


#: No further condition.
ANY = Also("", lambda task: True)


class Selection(ABC):
    """The tasks of a bulk change, each of them once.

    A task may be changed before its page comes, because of its child. Then it is reported by ``passed``,
    and its page leaves it out, even if it has failed again in the meantime.
    """

    @abstractmethod
    def pages(self) -> Iterator[dict[str, Task]]:
        """Yield the tasks by id, in pages that are not empty."""

    @abstractmethod
    def of(self, tasks: Mapping[str, Task]) -> set[str]:
        """Return the ids of those tasks that are in this page or in one that is still to come."""

    @abstractmethod
    def passed(self, tasks: Mapping[str, Task], parents: Collection[str]) -> None:
        """Note that tasks were changed: those of the page, and others. Tasks depend on ``parents``."""

    @abstractmethod
    def may_have(self, task_id: str) -> bool:
        """Return False if it is certain, without a read, that :meth:`of` leaves out a task."""


class Given(Selection):
    """The tasks with the given ids, if they are wanted when they are read."""

    def __init__(
        self, repository: Repository, task_ids: Iterable[str], wanted: Callable[[Task], bool]
    ) -> None:
        self._repository = repository
        self._left = dict.fromkeys(task_ids)
        self._wanted = wanted

    def pages(self) -> Iterator[dict[str, Task]]:
        while some := [*islice(self._left, self._repository.timing.batch)]:
            found = self._repository.get_many(some)
            if tasks := {i: found[i] for i in some if i in found and self._wanted(found[i])}:
                yield tasks
            for task_id in some:
                self._left.pop(task_id, None)

    def of(self, tasks: Mapping[str, Task]) -> set[str]:
        return {i for i, task in tasks.items() if i in self._left and self._wanted(task)}

    def passed(self, tasks: Mapping[str, Task], parents: Collection[str]) -> None:
        for task_id in tasks:
            self._left.pop(task_id, None)

    def may_have(self, task_id: str) -> bool:
        return task_id in self._left


class Matching(Selection):
    """The tasks that match a filter without a limit, newest first. Only one page of them is in memory.

    Args:
        repository: the repository to read.
        filter: the conditions.
        also: a further condition.
    """

    def __init__(
        self,
        repository: Repository,
        filter: TaskFilter,
        also: Also,
    ) -> None:
        self._repository = repository
        self._filter = filter
        self._also = also.meets
        # The page, and the dates of its first and last task.
        self._page: Mapping[str, Task] = {}
        self._newest = self._oldest = _EARLY
        # Changed tasks that may be met again, in a later page or as the parent of a task there.
        self._apart: dict[str, datetime] = {}

    def pages(self) -> Iterator[dict[str, Task]]:
        wanted = attrs.evolve(self._filter, limit=self._repository.timing.batch)
        for page in queries.pages(self._repository, wanted):
            self._newest, self._oldest = created_at(page[0]), created_at(page[-1])
            tasks = {t.id: t for t in page if t.id not in self._apart and self._also(t)}
            if self._repository.shortcoming:  # its lists lack the fields that are only in memory
                found = self._repository.get_many([*tasks])
                tasks = {i: found[i] for i in tasks if i in found and wanted.matches(found[i])}
            self._page = tasks
            if tasks:
                yield tasks
            self._apart = {i: date for i, date in self._apart.items() if date <= self._oldest}

    def of(self, tasks: Mapping[str, Task]) -> set[str]:
        return {
            task_id
            for task_id, task in tasks.items()
            if task_id not in self._apart
            and created_at(task) <= self._newest
            and self._filter.matches(task)
            and self._also(task)
        }

    def passed(self, tasks: Mapping[str, Task], parents: Collection[str]) -> None:
        for task_id, task in tasks.items():
            date = created_at(task)
            if date <= self._oldest and (task_id not in self._page or task_id in parents):
                self._apart[task_id] = date

    def may_have(self, task_id: str) -> bool:
        return task_id not in self._apart


def selections(
    repository: Repository, filters: Sequence[TaskFilter], also: Also = ANY
) -> Iterator[Selection]:
    """Return the tasks that match one of the filters, which differ in their status only.

    A limit and an offset are those of all of them together. Then all ids are read before the first task
    is changed.
    """
    first = filters[0]
    if not (first.limited or first.offset):
        yield from (Matching(repository, wanted, also) for wanted in filters)
        return
    statuses = {wanted.status for wanted in filters}
    lists = [_matching(repository, first, status) for status in statuses]
    newest = merge(*lists, key=created_at, reverse=True)
    most = first.offset + first.limit if first.limited else None
    chosen = islice((task for task in newest if also.meets(task)), first.offset, most)
    task_ids = [task.id for task in chosen]
    yield Given(repository, task_ids, lambda task: None in statuses or task.status in statuses)


def count(
    repository: Repository,
    filters: Sequence[TaskFilter],
    at_most: int | None,
    also: Also = ANY,
) -> TaskCount:
    """Return the number of tasks that :func:`selections` would return, at most ``at_most``."""
    first, exact = filters[0], True
    if also is ANY:
        counts = [queries.count(repository, wanted, at_most) for wanted in filters]
        number, exact = sum(map(int, counts)), all(count.exact for count in counts)
    else:
        found = filter(also.meets, _matching(repository, first, first.status))
        most = None if at_most is None else check_int(at_most, "at_most", 1) + 1
        number = sum(1 for _ in islice(found, most))
    if at_most is not None and number > at_most:
        number, exact = at_most, False
    number = max(0, number - first.offset)
    if first.limited and number >= first.limit:
        number, exact = first.limit, True
    return TaskCount(number, exact)


def _matching(
    repository: Repository, wanted: TaskFilter, status: TaskStatus | None
) -> Iterator[Task]:
    """Iterate over all tasks with a status that match the conditions of a filter, newest first."""
    every = attrs.evolve(wanted, status=status, offset=0, limit=_NO_LIMIT)
    return queries.matching(repository, every)
