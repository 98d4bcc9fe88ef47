"""What is done to many dead letters at once."""

from __future__ import annotations

from collections.abc import Callable

import attrs

from taskx.core import lifecycle
from taskx.core.clock import to_ms
from taskx.core.errors import ConfigurationError
from taskx.core.model import Task, TaskFilter, TaskStatus
from taskx.core.writes import Update, Write
from taskx.runtime.starter import Services

#: Most tasks changed in one transaction.
BATCH = 200


def dead(filter: TaskFilter | None) -> TaskFilter:
    """The filter, of dead letters only.

    Raises:
        ConfigurationError: it asks for another status.
    """
    if filter is None:
        return TaskFilter(status=TaskStatus.FAILED)
    if filter.status not in (None, TaskStatus.FAILED):
        raise ConfigurationError(f"dead letters are failed tasks, not {filter.status} ones")
    return attrs.evolve(filter, status=TaskStatus.FAILED)


def requeue_all(services: Services, filter: TaskFilter | None) -> int:
    """Let every dead letter that meets the filter run again; returns how many."""
    now, hooks = services.clock.now_ms(), services.hooks

    def tell(task: Task, write: Write) -> None:
        if hooks.requeued and isinstance(write, Update):
            hooks.tell_changed(hooks.requeued, task, write.changes)

    return _change_all(services, dead(filter), lambda task: lifecycle.requeue(task, now), tell)


def discard_all(services: Services, filter: TaskFilter | None) -> int:
    """Remove every dead letter that meets the filter; returns how many."""
    return _change_all(services, dead(filter), lifecycle.discard, lambda task, write: None)


def _change_all(
    services: Services,
    filter: TaskFilter,
    write_for: Callable[[Task], Write],
    changed: Callable[[Task, Write], None],
) -> int:
    until, most = services.clock.now_ms(), services.repository.count(filter)
    offset = done = 0
    while done < most:
        page = services.repository.list(attrs.evolve(filter, offset=offset, limit=BATCH))
        # One that failed again since is left where it is.
        writes = [(task, write_for(task)) for task in page if _ended(task) <= until]
        results = services.ledger.commit([write for _, write in writes]) if writes else ()
        for (task, write), held in zip(writes, results, strict=True):
            if held:
                done += 1
                changed(task, write)
            elif task.unique_key is not None:
                offset += 1  # it stays, as another task holds its key
        offset += len(page) - len(writes)
        if len(page) < BATCH:
            break
    return done


def _ended(task: Task) -> int:
    return 0 if task.completed_at is None else to_ms(task.completed_at)
