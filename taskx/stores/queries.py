"""Queries that several parts of the runtime need, built from a repository's primitives."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple

import attrs

from taskx.stores.base import Fields, Listed, Repository, Rows
from taskx.stores.liveness.base import Node
from taskx.tasks.checks import check_int
from taskx.tasks.clock import LAST, to_datetime, to_ms
from taskx.tasks.errors import ConfigurationError
from taskx.tasks.lifecycle import FINISHED
from taskx.tasks.model import Task, TaskCount, TaskFilter, TaskPage, TaskStatus
from taskx.tasks.record import COLUMNS
from taskx.tasks.writes import Write, shows

# Approximate number of tasks that are read to find the one that has waited longest.
_OLDEST = 1000


def every(repository: Repository, column: Listed) -> Iterator[str]:
    """Yield all values of a column, sorted."""
    after, most = "", repository.timing.scan_batch
    while page := repository.distinct(column, after, most):
        yield from page
        if len(page) < most:
            return
        after = page[-1]


def owners(repository: Repository) -> Sequence[str]:
    """Return the ids of all nodes that hold tasks or on which a task is stuck."""
    columns: tuple[Listed, ...] = ("buffered_on", "running_on", "stuck_on")
    return [*{owner: None for column in columns for owner in every(repository, column)}]


def live_node(repository: Repository, node: str) -> Node | None:
    """Return the node with this id, if it is recorded and not known to be dead."""
    found = (one for one in repository.nodes() if one.id == node and one.alive is not False)
    return next(found, None)


def runs_somewhere(repository: Repository, type: str) -> bool:
    """Return True if a node that counts as alive has an executor for the type."""
    return any(type in node.types for node in repository.nodes() if node.lives)


def oldest_ready(repository: Repository) -> int | None:
    """Return since when the longest waiting task that may start has waited, in milliseconds.

    Return None if no task may start. A task waits from the moment it was stored or, if that is later, from
    its ``run_at``.
    """
    types = [*every(repository, "ready_type")]
    waiting = waiting_since(repository, types, max(1, _OLDEST // max(1, len(types))))
    return min((since for since, _ in waiting), default=None)


def waiting_since(repository: Repository, types: Sequence[str], most: int) -> list[tuple[int, str]]:
    """Return since when tasks of these types may start, and their ids.

    At most ``most`` tasks of each node and of no node are read, those that were stored first.
    """
    holders = ["", *every(repository, "buffered_on")]
    found = (stub for owner in holders for stub in repository.ready(types, most, owner, ageing=1))
    return [(stub.waits_since, stub.id) for stub in found]


def newest(
    repository: Repository, status: str, at_most: int, fields: Fields
) -> tuple[Rows, int | None]:
    """Return fields of the tasks of a finished status that were submitted last; one is ``created_at``.

    Returns:
        the rows, and the time before which no task was read; None if there are fewer than ``at_most``.
    """
    rows = repository.reads.newest(status, at_most, fields)
    times = (row[fields.index("created_at")] for row in rows)
    known = [time for time in times if isinstance(time, int)]
    return rows, min(known, default=None) if len(rows) >= at_most else None


def families(repository: Repository, task_ids: Iterable[str]) -> Rows:
    """Return pairs of one of these tasks and a task that depends on it, in any status."""
    return repository.find("parent", [*task_ids], ("parent", "id"))


def asked_to_cancel(repository: Repository, task_ids: Sequence[str]) -> Collection[str]:
    """Return the ids of these tasks that have a cancel request, even if their records are damaged."""
    found = repository.find("id", task_ids, ("id", "cancel_requested_at"))
    return [task_id for task_id, asked_at in found if asked_at is not None]


def shown(repository: Repository, writes: Sequence[Write]) -> Sequence[bool]:
    """Return for each write True if the record shows that it took place."""
    found = repository.find("id", [*{write.id: None for write in writes}], COLUMNS)
    rows = {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in found}
    return [shows(rows.get(write.id), write, repository.codecs.same) for write in writes]


def is_uncommitted(inside: Repository, outside: Repository, task_id: str) -> bool:
    """Return True if a task exists, or has ended, only inside an open transaction.

    Args:
        inside: the repository as the transaction sees it.
        outside: the repository as all others see it.
        task_id: the id of the task.
    """
    seen = inside.statuses([task_id])
    # Read last: what others commit in between is no write of this transaction.
    known = outside.statuses([task_id])
    return any(
        task_id not in known or (status in FINISHED and known[task_id] not in FINISHED)
        for status in seen.values()
    )


def page(
    repository: Repository,
    filter: TaskFilter,
    after: str | None = None,
    at_most: int | None = None,
) -> TaskPage:
    """Return the tasks that match the filter, newest first, and the number of all that match it.

    Tasks and total agree, whatever is stored or deleted between the two reads. A page that is not full
    shows where the list ends. An empty page shows that the list ends before it.

    Args:
        repository: the repository to read.
        filter: the conditions.
        after: the ``next`` of the page before. The page then costs the same wherever it is: the tasks are
            counted once, with the first page.
        at_most: stop counting there.
    """
    if at_most is not None:
        check_int(at_most, "at_most", 1)
    before = _Place.from_text(after, filter) if after is not None else None
    if before is None:
        searched, since = _searched(repository, filter)
        before = _Place(None, filter.offset, None, True, None if since is None else to_ms(since))
    else:
        since = None if before.since is None else to_datetime(before.since)
        searched = filter if since is None else attrs.evolve(filter, start_date=since)
    tasks, place = list_after(repository, searched, before.place)
    end, total, exact = before.seen + len(tasks), before.total, before.exact
    full = len(tasks) >= filter.limit
    if not full and (tasks or not before.seen):
        total, exact = end, True
    elif total is None:
        counted = _count_to(repository, searched, at_most)
        total, exact = int(counted), counted.exact
    if tasks:
        total = max(total, end)
    elif filter.limit:
        total = min(total, end)
    more = max(0, total - end)
    goes_on = full and bool(tasks) and (more > 0 or not exact or after is not None)
    following = _Place(place, end, total, exact, before.since).as_text() if goes_on else None
    return TaskPage(
        tasks, total, more, following, exact=exact and since is None, searched_since=since
    )


class _Place(NamedTuple):
    """A place between two pages of a list."""

    place: Any  #: the place in the list of the repository
    seen: int  #: the number of tasks before it
    total: int | None  #: the number of all tasks; None if they were not counted yet
    exact: bool  #: False if there may be more
    since: int | None  #: the moment before which no tasks are looked at, in milliseconds

    def as_text(self) -> str:
        text = json.dumps(self, separators=(",", ":"), default=str)
        return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")

    @classmethod
    def from_text(cls, after: str, filter: TaskFilter) -> _Place:
        """Return the place of a text. Raises ConfigurationError if it is none."""
        if filter.offset:
            raise ConfigurationError("after and offset exclude each other: give only one of them")
        try:
            text = base64.b64decode(after + "=" * (-len(after) % 4), "-_", validate=True)
            found = cls(*json.loads(text))
            if type(found.exact) is not bool or not all(
                type(number) is int and 0 <= number <= LAST
                for number in (found.seen, found.total, found.since or 0)
            ):
                raise ValueError("a value has a wrong type")
        except (ValueError, TypeError, RecursionError) as error:
            raise ConfigurationError(
                f"after must be the `next` of a page, not {after!r:.100}"
            ) from error
        return found


def count(repository: Repository, filter: TaskFilter, at_most: int | None = None) -> TaskCount:
    """Return the number of tasks that match the filter, at most ``at_most``.

    With ``at_most``, a search in params looks at the newest tasks only, as a page does.
    """
    if at_most is None:
        return _count_to(repository, filter, None)
    searched, since = _searched(repository, filter)
    counted = _count_to(repository, searched, at_most)
    return TaskCount(counted, exact=counted.exact and since is None)


def _count_to(repository: Repository, filter: TaskFilter, at_most: int | None) -> TaskCount:
    most = None if at_most is None else check_int(at_most, "at_most", 1)
    if filter.given - repository.conditions:
        every = _every(repository, attrs.evolve(filter, offset=0, limit=repository.timing.batch))
        number = sum(1 for _ in islice(every, None if most is None else most + 1))
    elif most is None:
        number = repository.count(filter)
    else:
        number = repository.reads.count_to(filter, most + 1)
    if most is None or number <= most:
        return TaskCount(number)
    return TaskCount(most, exact=False)


def count_by_status(repository: Repository, filter: TaskFilter, most: int) -> dict[TaskStatus, int]:
    """Return how many of at most ``most`` matching tasks have each status, in the order of statuses."""
    if filter.given - repository.conditions:
        every = _every(repository, attrs.evolve(filter, offset=0, limit=repository.timing.batch))
        found: Mapping[str, int] = Counter(task.status.value for task in islice(every, most))
    else:
        found = repository.reads.count_by_status(filter, most)
    return {status: found[status.value] for status in TaskStatus if found.get(status.value)}


def _searched(repository: Repository, filter: TaskFilter) -> tuple[TaskFilter, datetime | None]:
    """Return the filter, for the newest tasks only if it searches in params, and since when it searches."""
    if filter.params is None:
        return filter, None
    # By a condition that has no index, skipping tasks would cost as much as the search.
    indexed = {"status", "start_date", "end_date", "tag", "flow"} & repository.conditions
    every = TaskFilter(**{name: getattr(filter, name) for name in indexed})
    last = repository.list(attrs.evolve(every, offset=repository.timing.most_searched - 1, limit=2))
    if len(last) < 2 or last[0].created_at is None:
        return filter, None
    return attrs.evolve(filter, start_date=last[0].created_at), last[0].created_at


#: Returns tasks that match a filter, after a place (None for the first), and the place after them.
PageAfter = Callable[[TaskFilter, Any], tuple[Sequence[Task], Any]]


def matching(repository: Repository, filter: TaskFilter) -> Iterator[Task]:
    """Iterate over the tasks that match the filter, newest first: all of them if it has no limit.

    Tasks that are stored or removed in the meantime neither hide nor repeat another one.
    """
    return read_all(partial(list_after, repository), filter, repository.timing.batch)


def read_all(page_after: PageAfter, filter: TaskFilter, batch: int) -> Iterator[Task]:
    """Do what :func:`matching` does, by a function that reads each page of ``batch`` tasks."""
    most = filter.offset + filter.limit if filter.limited else None
    limit = batch if most is None else min(batch, most)
    some = _pages(page_after, attrs.evolve(filter, offset=0, limit=limit))
    return islice(chain.from_iterable(some), filter.offset, most)


def pages(repository: Repository, filter: TaskFilter) -> Iterator[Sequence[Task]]:
    """Yield all tasks that match the filter, newest first, in pages of at most its limit.

    A task that is changed before the next page is read neither hides nor repeats another one.
    """
    return _pages(partial(list_after, repository), filter)


def _pages(page_after: PageAfter, filter: TaskFilter) -> Iterator[Sequence[Task]]:
    tasks, after = page_after(filter, None)
    while tasks:
        yield tasks
        tasks, after = page_after(filter, after)


def _every(repository: Repository, filter: TaskFilter) -> Iterator[Task]:
    """Yield all tasks that match the filter, reading at most its limit at a time."""
    return chain.from_iterable(pages(repository, filter))


def list_after(
    repository: Repository, filter: TaskFilter, after: Any = None
) -> tuple[Sequence[Task], Any]:
    """Call ``list_after``; apply the conditions that the repository does not know task by task."""
    unknown = filter.given - repository.conditions
    if not unknown:
        return repository.reads.list_after(filter, after)
    known = attrs.evolve(filter, **dict.fromkeys(unknown), offset=0, limit=repository.timing.batch)
    skip, found = filter.offset, list[Task]()
    while (left := skip + filter.limit - len(found)) > 0:
        tasks, following = repository.reads.list_after(known, after)
        if not tasks:
            break
        kept = [place for place, task in enumerate(tasks) if filter.matches(task)]
        if len(kept) > left:
            # Read again up to the last one that fits: only a whole read says at which place it ends.
            some = attrs.evolve(known, limit=kept[left - 1] + 1)
            tasks, following = repository.reads.list_after(some, after)
        found += (task for task in tasks if filter.matches(task))
        after = following
    return found[skip:], after


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
