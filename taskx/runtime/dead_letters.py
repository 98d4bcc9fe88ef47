"""What is done to many dead letters at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from graphlib import TopologicalSorter

import attrs

from taskx.core import lifecycle
from taskx.core.clock import to_ms
from taskx.core.errors import ConfigurationError
from taskx.core.model import Task, TaskFilter, TaskStatus, check_filter
from taskx.runtime.starter import Services

#: Most tasks changed in one transaction.
BATCH = 200


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
    wanted, until = dead(filter), services.clock.now_ms()

    def requeue(tasks: Sequence[Task]) -> set[str]:
        done: set[str] = set()
        for some in _parents_first(services, wanted, until, tasks):
            for start in range(0, len(some), BATCH):
                done |= _requeue(services, some[start : start + BATCH])
        return done

    return _change_all(services, wanted, until, requeue)


def _requeue(services: Services, tasks: Sequence[Task]) -> set[str]:
    """Let tasks run again, when those of their parents have ended that are under way; returns which."""
    parents = list({parent: None for task in tasks for parent in task.depends_on})
    statuses = services.repository.statuses(parents) if parents else {}
    writes = [
        lifecycle.requeue(task, lifecycle.unfinished_parent(task.depends_on, statuses))
        for task in tasks
    ]
    results = services.ledger.commit(writes)
    done = [(t, w) for t, w, held in zip(tasks, writes, results, strict=True) if held]
    if (hooks := services.hooks).requeued:
        for task, write in done:
            hooks.tell_changed(hooks.requeued, task, write.changes)
    waiting = {task.id: write.changes.get("waiting_on") for task, write in done}
    services.dependents.waits({child: on for child, on in waiting.items() if on is not None})
    return set(waiting)


def _parents_first(
    services: Services, wanted: TaskFilter, until: int, tasks: Sequence[Task]
) -> Iterator[Sequence[Task]]:
    """These and the dead letters that they depend on, in an order in which children can wait for those."""
    known = {task.id: task for task in tasks}
    ahead = {parent for task in tasks for parent in task.depends_on} - known.keys()
    while ahead:
        found = services.repository.get_many([*ahead])
        more = {i: t for i, t in found.items() if wanted.matches(t) and _ended(t) <= until}
        known.update(more)
        ahead = {parent for task in more.values() for parent in task.depends_on} - known.keys()
    order = TopologicalSorter(
        {i: [parent for parent in task.depends_on if parent in known] for i, task in known.items()}
    )
    order.prepare()
    while ready := order.get_ready():
        yield [known[task_id] for task_id in ready]
        order.done(*ready)


def discard_all(services: Services, filter: TaskFilter | None) -> int:
    """Remove every dead letter that meets the filter; returns how many."""

    def discard(tasks: Sequence[Task]) -> set[str]:
        results = services.ledger.commit([lifecycle.discard(task) for task in tasks])
        return {task.id for task, held in zip(tasks, results, strict=True) if held}

    return _change_all(services, dead(filter), services.clock.now_ms(), discard)


def _change_all(
    services: Services,
    filter: TaskFilter,
    until: int,
    change: Callable[[Sequence[Task]], set[str]],
) -> int:
    """Change all that ended before a moment; ``change`` says which it changed, perhaps others, too."""
    most = services.repository.count(filter)
    offset = done = 0
    while done < most:
        page = services.repository.list(attrs.evolve(filter, offset=offset, limit=BATCH))
        # One that failed again since is left where it is.
        tasks = [task for task in page if _ended(task) <= until]
        changed = change(tasks) if tasks else set()
        done += len(changed)
        # So is one whose key another task holds.
        stay = [t for t in tasks if t.id not in changed and t.unique_key is not None]
        offset += len(page) - len(tasks) + len(stay)
        if len(page) < BATCH:
            break
    return done


def _ended(task: Task) -> int:
    return 0 if task.completed_at is None else to_ms(task.completed_at)
