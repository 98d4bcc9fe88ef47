"""What is done to many failed or cancelled tasks at once: dead letters, what is left of a flow."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from graphlib import TopologicalSorter
from itertools import islice

import attrs

from taskx.core import lifecycle
from taskx.core.errors import ConfigurationError
from taskx.core.model import Task, TaskFilter, TaskStatus, check_filter
from taskx.runtime.starter import Services

#: Most tasks changed in one transaction.
BATCH = 200
_ENDED_BADLY = (TaskStatus.FAILED, TaskStatus.CANCELLED)


def dead(filter: TaskFilter | None) -> TaskFilter:
    """The filter, of dead letters only.

    Raises:
        ConfigurationError: it is none, or asks for another status.
    """
    wanted = check_filter(filter)
    if wanted.status not in (None, TaskStatus.FAILED):
        raise ConfigurationError(f"dead letters are failed tasks, not {wanted.status} ones")
    return attrs.evolve(wanted, status=TaskStatus.FAILED)


def requeue_all(services: Services, filter: TaskFilter | None) -> int:
    """Let every dead letter that meets the filter run again; returns how many."""
    left = _listed(services, dead(filter))

    def requeue(tasks: Mapping[str, Task]) -> int:
        return _requeue(services, _with_parents(services, left, tasks))

    return _change_all(services, left, requeue)


def requeue_these(services: Services, task_ids: Sequence[str]) -> int:
    """Let those of these tasks run again that failed or were cancelled; returns how many."""
    known: dict[str, Task] = {}
    for start in range(0, len(task_ids), BATCH):
        found = services.repository.get_many(task_ids[start : start + BATCH])
        known.update((i, task) for i, task in found.items() if task.status in _ENDED_BADLY)
    return _requeue(services, known)


def _requeue(services: Services, known: Mapping[str, Task]) -> int:
    """Let tasks run again, each when those of its parents have ended that are under way; how many may."""
    parents = {i: [p for p in task.depends_on if p in known] for i, task in known.items()}
    order = [known[task_id] for task_id in TopologicalSorter(parents).static_order()]
    return sum(
        _requeue_some(services, order[start : start + BATCH])
        for start in range(0, len(order), BATCH)
    )


def _requeue_some(services: Services, tasks: Sequence[Task]) -> int:
    parents = list({parent: None for task in tasks for parent in task.depends_on})
    statuses = services.repository.statuses(parents) if parents else {}
    statuses.update((task.id, TaskStatus.PENDING) for task in tasks)  # by the same transaction
    now = services.clock.now_ms()
    writes = [
        lifecycle.requeue(task, now, lifecycle.unfinished_parent(task.depends_on, statuses))
        for task in tasks
    ]
    results = services.ledger.commit(writes)
    done = [(t, w) for t, w, held in zip(tasks, writes, results, strict=True) if held]
    if (hooks := services.hooks).requeued:
        for task, write in done:
            hooks.tell_changed(hooks.requeued, task, write.changes)
    waiting = {task.id: write.changes.get("waiting_on") for task, write in done}
    services.dependents.waits({child: on for child, on in waiting.items() if on is not None})
    return len(done)


def _with_parents(
    services: Services, left: dict[str, int], tasks: Mapping[str, Task]
) -> dict[str, Task]:
    """These and the dead letters that they depend on, which are requeued before them."""
    known = dict(tasks)
    more = tasks
    while ahead := {parent for task in more.values() for parent in task.depends_on} & left.keys():
        more = _take(services, left, ahead)
        known.update(more)
    return known


def discard_all(services: Services, filter: TaskFilter | None) -> int:
    """Remove every dead letter that meets the filter; returns how many."""

    def discard(tasks: Mapping[str, Task]) -> int:
        return sum(services.ledger.commit([lifecycle.discard(task) for task in tasks.values()]))

    return _change_all(services, _listed(services, dead(filter)), discard)


def _listed(services: Services, filter: TaskFilter) -> dict[str, int]:
    """The ids of all tasks that meet a filter, newest first, each with how often it had been started.

    Its offset counts, and its limit where one was given.

    All before the first is changed: one that fails again meanwhile is not among them a second time, and is
    known by its starts. No clock tells it, which may be set back, or be another host's.
    """
    found: dict[str, int] = {}
    first, most = filter.offset, filter.offset + filter.limit if filter.limited else None
    offset = 0
    while True:
        page = services.repository.list(attrs.evolve(filter, offset=offset, limit=BATCH))
        found.update((task.id, task.starts) for task in page)
        if len(page) < BATCH or (most is not None and len(found) >= most):
            return dict(islice(found.items(), first, most))
        # By the date of the last one, not by how many came before it: those may leave the list.
        oldest = page[-1].created_at
        if oldest in (None, filter.end_date) or page[-1].damage:
            offset += len(page)
        else:
            filter, offset = attrs.evolve(filter, end_date=oldest), 0


def _change_all(
    services: Services, left: dict[str, int], change: Callable[[Mapping[str, Task]], int]
) -> int:
    """Change what was listed; ``change`` says how many it changed, and may take others of these, too."""
    done = 0
    ids = list(left)
    for start in range(0, len(ids), BATCH):
        if tasks := _take(services, left, ids[start : start + BATCH]):
            done += change(tasks)
    return done


def _take(services: Services, left: dict[str, int], task_ids: Collection[str]) -> dict[str, Task]:
    """Those of what is left that are still as they were listed; none of them is left then."""
    starts = {task_id: left.pop(task_id) for task_id in task_ids if task_id in left}
    found = services.repository.get_many([*starts])
    return {
        task_id: task
        for task_id, task in found.items()
        if task.status is TaskStatus.FAILED and task.starts == starts[task_id]
    }
