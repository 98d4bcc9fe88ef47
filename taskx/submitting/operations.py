"""Changes to stored tasks on request: cancel, requeue, delete, and the handling of dead letters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from graphlib import TopologicalSorter

import attrs

from taskx.core import lifecycle
from taskx.core.errors import (
    ConfigurationError,
    InvalidTransition,
    QueueStopped,
    RepositoryCorrupt,
    TaskNotFound,
)
from taskx.core.model import Task, TaskFilter, TaskStatus
from taskx.core.writes import Delete, Update
from taskx.moving import Services
from taskx.running.pool import State
from taskx.storage import queries
from taskx.storage.base import Repository

#: Most tasks changed in one transaction.
BATCH = 200
# Attempts to cancel a task that moves between the write and the read.
_TRIES = 20


def dead(filter: TaskFilter) -> TaskFilter:
    """Return the filter, limited to dead letters. Raises ConfigurationError if it has another status."""
    if filter.status not in (None, TaskStatus.FAILED):
        raise ConfigurationError(
            f"dead letters are failed tasks: the filter must not have status {filter.status}"
        )
    return attrs.evolve(filter, status=TaskStatus.FAILED)


def children(repository: Repository, task_ids: Iterable[str]) -> list[str]:
    """Return the ids of the tasks that depend on the given ones, in any status, each once."""
    found = repository.find("parent", [*task_ids], ("id",))
    return [*dict.fromkeys(task_id for (task_id,) in found)]


class Operations:
    """Changes stored tasks; the queue need not be started.

    Its public methods implement the methods of ``Queue`` with the same names (``cancel``: ``cancel_task``).

    Args:
        services: the shared parts of the queue.
        state: tells if the queue is started, and if it was stopped.
    """

    def __init__(self, services: Services, state: State) -> None:
        self._services = services
        self._repository = services.repository
        self._consequences = services.consequences
        self._state = state

    # --- cancel, delete

    def cancel(self, task_id: str) -> bool:
        for _ in range(_TRIES):
            *cancelled, asked = self._commit(
                lifecycle.cancel(task_id, self._services.clock.now_ms())
            )
            if any(cancelled):
                return True
            if asked:
                return False
            task = self._repository.get_by_id(task_id)
            if task.status.finished:
                raise InvalidTransition(f"task {task_id} is already {task.status}")
            if queries.asked_to_cancel(self._repository, [task_id]):
                if self._state.engine is not None:
                    self._state.engine.fire(task_id)
                return False
            # else it moved between the write and the read: try again
        raise RepositoryCorrupt(
            f"task {task_id} cannot be cancelled: its stored record is damaged; delete it with "
            "delete(), or repair it by hand"
        )

    def cancel_many(self, task_ids: Sequence[str]) -> int:
        never_run, handled = 0, set[str]()
        now = self._services.clock.now_ms()
        for start in range(0, len(task_ids), BATCH):
            some = task_ids[start : start + BATCH]
            writes = [write for task_id in some for write in lifecycle.cancel(task_id, now)]
            done = [w for w, held in zip(writes, self._commit(writes), strict=True) if held]
            never_run += sum("status" in write.changes for write in done)
            handled.update(write.id for write in done)
        left = [task_id for task_id in task_ids if task_id not in handled]
        rest = self._repository.statuses(left) if left else {}
        for task_id, status in rest.items():
            # An unfinished task moved in the meantime, or was already asked to stop.
            if status not in lifecycle.FINISHED:
                try:
                    never_run += self.cancel(task_id)
                except RepositoryCorrupt as error:
                    self._services.log.warning("%s", error)
                except (InvalidTransition, TaskNotFound):
                    continue
        return never_run

    def delete(self, task_id: str) -> None:
        if not self._commit([lifecycle.delete(task_id)])[0]:
            raise lifecycle.not_deleted(self._repository.get_by_id(task_id))

    def _commit(self, writes: Sequence[Update | Delete]) -> Sequence[bool]:
        results = self._consequences.commit(writes)
        self._consequences.process_if_unattended()
        return results

    # --- requeue

    def requeue(self, task_id: str) -> None:
        self._refuse_if_stopped()
        task = self._repository.get_by_id(task_id)
        lifecycle.check_requeue(task)
        if task_id not in self._requeue(self._with_orphans({task_id: task})):
            self._repository.refuse_if_key_held(task)
            raise InvalidTransition(
                f"task {task_id} was changed while it was being requeued; try again"
            )

    def requeue_many(self, task_ids: Sequence[str]) -> int:
        self._refuse_if_stopped()
        ended_badly = (TaskStatus.FAILED, TaskStatus.CANCELLED)
        known = self._found(task_ids, lambda task: task.status in ended_badly)
        return len(self._requeue(self._with_orphans(known)))

    def requeue_dead_letters(self, filter: TaskFilter) -> int:
        self._refuse_if_stopped()
        left = self._listed(dead(filter))

        def requeue(tasks: Mapping[str, Task]) -> int:
            known, before = dict(tasks), 0
            while len(known) > before:
                before = len(known)
                known = self._with_orphans(self._with_parents(left, known))
            for task_id in known:
                left.pop(task_id, None)
            return len(self._requeue(known))

        return self._change_all(left, requeue)

    def _refuse_if_stopped(self) -> None:
        if self._state.stopped:
            raise QueueStopped("the queue was stopped: create a new queue; nothing was requeued")

    def _found(self, task_ids: Sequence[str], wanted: Callable[[Task], bool]) -> dict[str, Task]:
        known: dict[str, Task] = {}
        for start in range(0, len(task_ids), BATCH):
            found = self._repository.get_many(task_ids[start : start + BATCH])
            known.update((task_id, task) for task_id, task in found.items() if wanted(task))
        return known

    def _with_orphans(self, tasks: Mapping[str, Task]) -> dict[str, Task]:
        """Return these tasks and all that ended because of them, directly or through other tasks."""
        known = dict(tasks)
        more: Mapping[str, Task] = tasks
        while more:
            parents = more
            more_ids = [i for i in children(self._repository, parents) if i not in known]
            more = self._found(more_ids, lambda child: lifecycle.ended_with(child, parents))  # noqa: B023
            known.update(more)
        return known

    def _with_parents(self, left: dict[str, int], tasks: Mapping[str, Task]) -> dict[str, Task]:
        """Return these tasks and the dead letters that they depend on, which are requeued first."""
        known = dict(tasks)
        more = tasks
        while ahead := {p for task in more.values() for p in task.depends_on} & left.keys():
            more = self._take(left, ahead)
            known.update(more)
        return known

    def _requeue(self, known: Mapping[str, Task]) -> set[str]:
        """Requeue tasks; each one waits for its unfinished parents.

        Returns:
            the ids of the tasks that run again.
        """
        parents = {i: [p for p in task.depends_on if p in known] for i, task in known.items()}
        order = [known[task_id] for task_id in TopologicalSorter(parents).static_order()]
        requeued = set[str]()
        for start in range(0, len(order), BATCH):
            requeued |= self._requeue_some(order[start : start + BATCH])
        self._consequences.process_if_unattended()
        return requeued

    def _requeue_some(self, tasks: Sequence[Task]) -> set[str]:
        parents = list({parent: None for task in tasks for parent in task.depends_on})
        statuses = self._repository.statuses(parents) if parents else {}
        statuses.update((task.id, TaskStatus.PENDING) for task in tasks)  # in the same transaction
        now = self._services.clock.now_ms()
        writes = [
            lifecycle.requeue(task, now, lifecycle.unfinished_parent(task.depends_on, statuses))
            for task in tasks
        ]
        results = self._consequences.commit(writes, {task.id: task for task in tasks})
        return {task.id for task, held in zip(tasks, results, strict=True) if held}

    # --- dead letters

    def discard_dead_letters(self, filter: TaskFilter) -> int:
        def discard(tasks: Mapping[str, Task]) -> int:
            needed = self._asked_for(tasks)
            writes = [lifecycle.discard(task) for i, task in tasks.items() if i not in needed]
            return sum(self._consequences.commit(writes)) if writes else 0

        return self._change_all(self._listed(dead(filter)), discard)

    def _asked_for(self, tasks: Mapping[str, Task]) -> set[str]:
        """Return the parents of unfinished tasks: an executor may still ask for their results."""
        statuses = self._repository.statuses(children(self._repository, tasks))
        unfinished = [i for i, status in statuses.items() if status in lifecycle.UNFINISHED]
        found = self._found(unfinished, lambda child: True)
        return {parent for child in found.values() for parent in child.depends_on}

    def _listed(self, filter: TaskFilter) -> dict[str, int]:
        """Return the ids of all tasks that match a filter, newest first, each with its ``starts``.

        The filter's offset applies, and its limit if one was given.

        All ids are read before the first task is changed. So a task that fails again in the meantime does
        not appear twice: its ``starts`` has changed. A clock could not tell this: it may be set back, or
        belong to another host.
        """
        return {task.id: task.starts for task in queries.matching(self._repository, filter)}

    def _change_all(self, left: dict[str, int], change: Callable[[Mapping[str, Task]], int]) -> int:
        """Change the listed tasks in batches; return the sum of what ``change`` returns.

        ``change`` may take further tasks out of ``left``.
        """
        done = 0
        ids = list(left)
        for start in range(0, len(ids), BATCH):
            if tasks := self._take(left, ids[start : start + BATCH]):
                done += change(tasks)
        return done

    def _take(self, left: dict[str, int], task_ids: Collection[str]) -> dict[str, Task]:
        """Take tasks out of the list; return the ones that did not change since they were listed."""
        starts = {task_id: left.pop(task_id) for task_id in task_ids if task_id in left}
        found = self._repository.get_many([*starts])
        return {
            task_id: task
            for task_id, task in found.items()
            if task.status is TaskStatus.FAILED and task.starts == starts[task_id]
        }
