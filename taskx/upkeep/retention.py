"""Finished tasks are removed when they are old enough, a few at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from taskx.core import lifecycle
from taskx.core.clock import to_ms, within_calendar
from taskx.core.errors import ConfigurationError
from taskx.core.model import TaskStatus, check_moment, check_status
from taskx.moving import Services
from taskx.storage.base import Repository

#: Most tasks removed in one transaction: others who write wait some milliseconds for it.
BATCH = 200
#: Seconds between looks for tasks that are old enough.
EVERY = 60.0
# Dependents that are read at a time.
_MOST_PAIRS = 1000
# Seconds, of which the calendar has fewer.
_FOR_EVER = 1e12
# Tasks that did not complete usually depend on tasks that did, seldom the other way round.
_CHILDREN_FIRST = (TaskStatus.CANCELLED, TaskStatus.FAILED, TaskStatus.COMPLETED)


def prune(
    services: Services, status: TaskStatus, before: int, after: Any = None
) -> tuple[int, Any]:
    """Look at a batch of the tasks of a status that ended before a moment, and remove what may go.

    Args:
        services: what it works with.
        status: of which tasks.
        before: the moment, in milliseconds.
        after: where to go on, as the call before returned it; None to begin with the newest.

    Returns:
        how many were removed, and where to go on; None where there are no more.
    """
    repository = services.repository
    page = repository.ended(status.value, within_calendar(before), BATCH, after)
    if not page:
        return 0, None
    kept = needed(repository, [task.stub.id for task in page])
    stubs = lifecycle.prunable(page, kept, services.clock.now_ms())
    removed = sum(
        services.consequences.commit([lifecycle.prune(stub) for stub in stubs]) if stubs else ()
    )
    return removed, page[-1].place if len(page) == BATCH else None


def needed(repository: Repository, task_ids: Sequence[str]) -> set[str]:
    """Return those of these tasks on which another stored task depends."""
    these, pairs = set(task_ids), ("parent", "id")
    found = repository.find("parent", task_ids, pairs, _MOST_PAIRS)
    if len(found) == _MOST_PAIRS:
        # Of one that many depend on, one more than there are here will do.
        found = [
            pair
            for task_id in task_ids
            for pair in repository.find("parent", [task_id], pairs, len(these) + 1)
        ]
    return {parent for parent, child in found if child not in these}


def prune_all(services: Services, before: datetime, status: TaskStatus | str | None) -> int:
    """Remove all that ended before a moment, of one status or of each; returns how many.

    Again and again, as what was removed may be all that kept others.

    Raises:
        ConfigurationError: the moment is no aware datetime, or no task ends in that status.
    """
    if before is None:
        raise ConfigurationError("before must be a datetime, not None")
    check_moment(before, "before")
    wanted = None if status is None else check_status(status)
    if wanted is not None and not wanted.finished:
        raise ConfigurationError(f"only tasks that have ended can be pruned, not {wanted} ones")
    removed, some = 0, 1
    while some:
        some = 0
        for kind in _CHILDREN_FIRST if wanted is None else (wanted,):
            after, begun = None, False
            while after is not None or not begun:
                count, after = prune(services, kind, to_ms(before), after)
                some, begun = some + count, True
        removed += some
    while services.repository.shrink():
        continue
    return removed


class Retention:
    """Removes tasks that ended in a status longer ago than the seconds that it is kept for."""

    def __init__(self, services: Services, periods: Mapping[TaskStatus, float]) -> None:
        self._services = services
        self._periods = periods
        self._next = services.clock.monotonic()
        # The place where the look under way goes on, for each status of which it has not seen all.
        self._left: dict[TaskStatus, Any] = {}

    def tick(self) -> None:
        """Remove a batch of each status, and give some space back, if it is time."""
        if not self._periods or (now := self._services.clock.monotonic()) < self._next:
            return
        self._next = now + EVERY
        wall = self._services.clock.now_ms()
        looks, self._left = self._left or dict.fromkeys(self._periods), {}
        for status, after in looks.items():
            before = wall - round(min(self._periods[status], _FOR_EVER) * 1000)
            removed, after = prune(self._services, status, before, after)
            if removed:
                self._services.log.debug("removed %d old %s tasks", removed, status)
            if after is not None:
                self._left[status] = after
        if self._services.repository.shrink() or self._left:
            self._next = now
