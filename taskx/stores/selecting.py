"""The tasks of a change: those with given ids, or those that match a filter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from heapq import merge
from itertools import islice
from typing import NamedTuple

import attrs

from taskx.stores import queries
from taskx.stores.base import Repository
from taskx.tasks.checks import check_int
from taskx.tasks.errors import ConfigurationError
from taskx.tasks.model import CONDITIONS, Task, TaskCount, TaskFilter, TaskStatus, check_name

_EARLY = datetime(1, 1, 1, tzinfo=timezone.utc)
_ALL = TaskFilter()
#: The statuses of tasks; None for all of them.
Statuses = Sequence[TaskStatus | None]


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


class Chosen(NamedTuple):
    """The tasks that a change is for, in words: ids, or a filter.

    Attributes:
        ids: the ids of the tasks; None if a filter chooses them.
        filter: the conditions.
        also: a further condition.
    """

    ids: Iterable[str] | None = None
    filter: TaskFilter = _ALL
    also: Also = ANY


def given(task_ids: Iterable[str]) -> Chosen:
    """Choose the tasks with these ids. Raises ConfigurationError if one cannot be an id."""
    return Chosen([check_name(task_id, "id") for task_id in task_ids])


def deliberate(filter: TaskFilter, what: str, *, everything: bool) -> Chosen:
    """Choose all that match. Raises ConfigurationError if a filter of all tasks was given by mistake."""
    if not (filter.given or everything):
        raise ConfigurationError(
            f"{what}() without a condition is for every task in the repository: give a condition, such as "
            "type='report', or say everything=True"
        )
    if filter.given and everything:
        raise ConfigurationError(
            f"{what}() takes conditions or everything=True, not both: {', '.join(sorted(filter.given))}"
        )
    return Chosen(filter=filter)


#: The ids of some tasks, and those of the tasks that were read, by id: all of them or none.
Page = tuple[Sequence[str], dict[str, Task]]


class Selection(ABC):
    """The chosen tasks as they are found in the repository, each of them once.

    A task may be changed before its page comes, because of its child. Then it is reported by ``passed``,
    and its page leaves it out, even if it has failed again in the meantime.
    """

    @abstractmethod
    def pages(self) -> Iterator[Page]:
        """Yield the tasks, in pages that are not empty."""

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
    """The tasks with the given ids, if they have one of these statuses when they are read.

    Without statuses they are not read: they are changed by their ids alone.
    """

    def __init__(self, repository: Repository, task_ids: Iterable[str], statuses: Statuses) -> None:
        self._repository = repository
        self._left = dict.fromkeys(task_ids)
        self._statuses = statuses

    def pages(self) -> Iterator[Page]:
        while some := [*islice(self._left, self._repository.timing.batch)]:
            if not self._statuses:
                yield some, {}
            elif tasks := self._wanted(self._repository.get_many(some), some):
                yield [*tasks], tasks
            for task_id in some:
                self._left.pop(task_id, None)

    def _wanted(self, tasks: Mapping[str, Task], task_ids: Iterable[str]) -> dict[str, Task]:
        some = {i: tasks[i] for i in task_ids if i in tasks and i in self._left}
        if None in self._statuses:
            return some
        return {i: task for i, task in some.items() if task.status in self._statuses}

    def of(self, tasks: Mapping[str, Task]) -> set[str]:
        return {*self._wanted(tasks, tasks)}

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

    def pages(self) -> Iterator[Page]:
        wanted = attrs.evolve(self._filter, limit=self._repository.timing.batch)
        for page in queries.pages(self._repository, wanted):
            self._newest, self._oldest = created_at(page[0]), created_at(page[-1])
            tasks = {t.id: t for t in page if t.id not in self._apart and self._also(t)}
            if self._repository.shortcoming:  # its lists lack the fields that are only in memory
                found = self._repository.get_many([*tasks])
                tasks = {i: found[i] for i in tasks if i in found and wanted.matches(found[i])}
            self._page = tasks
            if tasks:
                yield [*tasks], tasks
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


def selections(repository: Repository, chosen: Chosen, statuses: Statuses) -> Iterator[Selection]:
    """Return the chosen tasks with one of the statuses; ids without statuses are not read.

    A limit and an offset are those of all of them together. Then all ids are read before the first task
    is changed.
    """
    task_ids, filter, also = chosen
    if task_ids is not None:
        yield Given(repository, task_ids, statuses)
    elif not (filter.limited or filter.offset):
        for status in statuses:
            yield Matching(repository, attrs.evolve(filter, status=status), also)
    else:
        lists = [_matching(repository, filter, status) for status in {*statuses}]
        newest = merge(*lists, key=created_at, reverse=True)
        most = filter.offset + filter.limit if filter.limited else None
        found = islice((task for task in newest if also.meets(task)), filter.offset, most)
        yield Given(repository, [task.id for task in found], statuses)


def count(
    repository: Repository, chosen: Chosen, statuses: Statuses, at_most: int | None
) -> TaskCount:
    """Return the number of tasks that :func:`selections` would return, at most ``at_most``."""
    task_ids, wanted, also = chosen
    if task_ids is not None:
        return TaskCount(sum(len(ids) for ids, _ in Given(repository, task_ids, statuses).pages()))
    exact = True
    if also is ANY:
        filters = [attrs.evolve(wanted, status=status) for status in {*statuses}]
        counts = [queries.count(repository, each, at_most) for each in filters]
        number, exact = sum(map(int, counts)), all(count.exact for count in counts)
    else:
        [status] = statuses
        found = filter(also.meets, _matching(repository, wanted, status))
        most = None if at_most is None else check_int(at_most, "at_most", 1) + 1
        number = sum(1 for _ in islice(found, most))
    if at_most is not None and number > at_most:
        number, exact = at_most, False
    number = max(0, number - wanted.offset)
    if wanted.limited and number >= wanted.limit:
        number, exact = wanted.limit, True
    return TaskCount(number, exact)


def _matching(
    repository: Repository, wanted: TaskFilter, status: TaskStatus | None
) -> Iterator[Task]:
    """Iterate over all tasks with a status that match the conditions of a filter, newest first."""
    every = attrs.evolve(wanted, status=status, offset=0, limit=_ALL.limit)
    return queries.matching(repository, every)
