"""Finished tasks are removed when they are old enough, a few at a time."""

from __future__ import annotations

from collections.abc import Mapping

from taskx.core import lifecycle
from taskx.core.clock import within_calendar
from taskx.core.model import TaskStatus
from taskx.runtime.starter import Services

#: Most tasks removed in one transaction: others who write wait some milliseconds for it.
BATCH = 200
#: Seconds between looks for tasks that are old enough.
EVERY = 60.0
# Seconds, of which the calendar has fewer.
_FOR_EVER = 1e12


def prune(services: Services, status: TaskStatus, before: int) -> tuple[int, bool]:
    """Remove a batch of the tasks of a status that ended before a moment, in milliseconds.

    Returns:
        how many were removed, and whether there may be more.
    """
    stubs = services.repository.ended(status.value, within_calendar(before), BATCH)
    removed = sum(
        services.ledger.commit([lifecycle.prune(stub) for stub in stubs]) if stubs else ()
    )
    return removed, len(stubs) == BATCH


def prune_all(services: Services, before: int, status: TaskStatus | None) -> int:
    """Remove all that ended before a moment, of one status or of each; returns how many."""
    removed = 0
    for kind in lifecycle.FINISHED if status is None else (status,):
        more = True
        while more:
            some, more = prune(services, TaskStatus(kind), before)
            removed += some
    while services.repository.shrink():
        continue
    return removed


class Retention:
    """Removes what the configuration does not want to be kept for longer.

    Args:
        services: what it works with.
        periods: seconds for which tasks that ended in a status are kept; for ever where none is given.
    """

    def __init__(self, services: Services, periods: Mapping[TaskStatus, float]) -> None:
        self._services = services
        self._periods = periods
        self._next = services.clock.monotonic()

    def tick(self) -> None:
        """Remove a batch of each status, and give some space back, if it is time.

        Raises:
            RepositoryError: the repository failed; what is left is removed later.
        """
        if not self._periods or (now := self._services.clock.monotonic()) < self._next:
            return
        self._next = now + EVERY
        wall, more = self._services.clock.now_ms(), False
        for status, seconds in self._periods.items():
            removed, some_left = prune(
                self._services, status, wall - round(min(seconds, _FOR_EVER) * 1000)
            )
            if removed:
                self._services.log.debug("removed %d old %s tasks", removed, status)
            more = more or some_left
        if self._services.repository.shrink() or more:
            self._next = now
