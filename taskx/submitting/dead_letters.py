"""What is done to many failed or cancelled tasks at once: dead letters, what is left of a flow."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from graphlib import TopologicalSorter
from itertools import islice

import attrs

from taskx.core import lifecycle
from taskx.core.errors import ConfigurationError
from taskx.core.model import Task, TaskFilter, TaskStatus, check_filter
from taskx.moving import Services
from taskx.storage.base import Repository

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
    """Let the dead letters that a filter chooses run again, and what ended with them; returns how many."""
    left = _listed(services, dead(filter))

    def requeue(tasks: Mapping[str, Task]) -> int:
        known, before = dict(tasks), 0
        while len(known) > before:
            before = len(known)
            known = _with_orphans(services, _with_parents(services, left, known))
        for task_id in known:
            left.pop(task_id, None)
        return len(_requeue(services, known))

    return _change_all(services, left, requeue)


def requeue_these(services: Services, task_ids: Sequence[str]) -> int:
    """Let those of these tasks run again that failed or were cancelled, and what ended with them.

    Returns:
        how many run again.
    """
    known = _found(services, task_ids, lambda task: task.status in _ENDED_BADLY)
    return len(_requeue(services, _with_orphans(services, known)))


def requeue_one(services: Services, task: Task) -> bool:
    """Let a task run again, and what ended with it; False if it moved on meanwhile.

    Raises:
        InvalidTransition: it neither failed nor was cancelled.
    """
    lifecycle.check_requeue(task)
    return task.id in _requeue(services, _with_orphans(services, {task.id: task}))


def _found(
    services: Services, task_ids: Sequence[str], wanted: Callable[[Task], bool]
) -> dict[str, Task]:
    known: dict[str, Task] = {}
    for start in range(0, len(task_ids), BATCH):
        found = services.repository.get_many(task_ids[start : start + BATCH])
        known.update((task_id, task) for task_id, task in found.items() if wanted(task))
    return known


def _with_orphans(services: Services, tasks: Mapping[str, Task]) -> dict[str, Task]:
    """Return these tasks and all that ended because of them, directly or through other tasks."""
    known = dict(tasks)
    more: Mapping[str, Task] = tasks
    while more:
        parents = more
        more_ids = [i for i in children(services.repository, parents) if i not in known]
        more = _found(services, more_ids, lambda child: lifecycle.ended_with(child, parents))  # noqa: B023
        known.update(more)
    return known


def children(repository: Repository, task_ids: Iterable[str]) -> list[str]:
    """The tasks that depend on one of these, whatever their status, each once."""
    found = repository.find("parent", [*task_ids], ("id",))
    return [*dict.fromkeys(task_id for (task_id,) in found)]


def _requeue(services: Services, known: Mapping[str, Task]) -> set[str]:
    """Let tasks run again, each when those of its parents have ended that are under way.

    Returns:
        those that run again.
    """
    parents = {i: [p for p in task.depends_on if p in known] for i, task in known.items()}
    order = [known[task_id] for task_id in TopologicalSorter(parents).static_order()]
    requeued = set[str]()
    for start in range(0, len(order), BATCH):
        requeued |= _requeue_some(services, order[start : start + BATCH])
    services.consequences.look_if_alone()
    return requeued


def _requeue_some(services: Services, tasks: Sequence[Task]) -> set[str]:
    parents = list({parent: None for task in tasks for parent in task.depends_on})
    statuses = services.repository.statuses(parents) if parents else {}
    statuses.update((task.id, TaskStatus.PENDING) for task in tasks)  # by the same transaction
    now = services.clock.now_ms()
    writes = [
        lifecycle.requeue(task, now, lifecycle.unfinished_parent(task.depends_on, statuses))
        for task in tasks
    ]
    results = services.consequences.commit(writes, {task.id: task for task in tasks})
    return {task.id for task, held in zip(tasks, results, strict=True) if held}


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
    """Remove the dead letters that a filter chooses and that nobody waits for; returns how many."""

    def discard(tasks: Mapping[str, Task]) -> int:
        needed = _asked_for(services, tasks)
        writes = [lifecycle.discard(task) for i, task in tasks.items() if i not in needed]
        return sum(services.consequences.commit(writes)) if writes else 0

    return _change_all(services, _listed(services, dead(filter)), discard)


def _asked_for(services: Services, tasks: Mapping[str, Task]) -> set[str]:
    """Return the parents of unfinished tasks: an executor may still ask for their results."""
    statuses = services.repository.statuses(children(services.repository, tasks))
    unfinished = [i for i, status in statuses.items() if status in lifecycle.UNFINISHED]
    found = _found(services, unfinished, lambda child: True)
    return {parent for child in found.values() for parent in child.depends_on}


def _listed(services: Services, filter: TaskFilter) -> dict[str, int]:
    """Return the ids of all tasks that meet a filter, newest first, each with its ``starts``.

    The filter's offset applies, and its limit if it was given one.

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
