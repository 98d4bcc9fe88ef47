"""Changes to stored tasks on request: cancel and delete, one task or many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs

from taskx.core import lifecycle
from taskx.core.errors import (
    ConfigurationError,
    InvalidTransition,
    RepositoryCorrupt,
    TaskNotFound,
)
from taskx.core.model import Task, TaskFilter, TaskStatus
from taskx.core.writes import Delete, Update
from taskx.moving import Services
from taskx.running.pool import State
from taskx.storage import queries
from taskx.submitting.bulk import PLAIN, Bulk, Tally, Terms, counted
from taskx.submitting.selecting import count, dead, selections

# Attempts to cancel a task that moves between the write and the read.
_TRIES = 20


def _check_deliberate(wanted: TaskFilter, what: str, *, everything: bool) -> None:
    """Raise ConfigurationError if a filter of all tasks was given by mistake."""
    if not (wanted.given or everything):
        raise ConfigurationError(
            f"{what}() without a condition is for every task in the repository: give a condition, such as "
            "type='report', or say everything=True"
        )
    if wanted.given and everything:
        raise ConfigurationError(
            f"{what}() takes conditions or everything=True, not both: {', '.join(sorted(wanted.given))}"
        )


class Operations:
    """Cancels and deletes stored tasks; the queue need not be started.

    Its public methods implement the methods of ``Queue`` with the same names (``cancel``: ``cancel_task``).

    Args:
        services: the shared parts of the queue.
        state: tells if the queue is started, and if it was stopped.
    """

    def __init__(self, services: Services, state: State) -> None:
        self._services = services
        self._repository = services.repository
        self._batch = services.timing.batch
        self._moves = services.moves
        self._state = state

    # --- cancel

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
                if self._state.pool is not None:
                    self._state.pool.fire(task_id)
                return False
            # else it moved between the write and the read: try again
        raise RepositoryCorrupt(
            f"task {task_id} cannot be cancelled: its stored record is damaged; delete it, or "
            "repair it by hand"
        )

    def cancel_many(self, task_ids: Sequence[str]) -> int:
        return sum(
            len(self._cancel_some(task_ids[start : start + self._batch])[0])
            for start in range(0, len(task_ids), self._batch)
        )

    def cancel_all(
        self, filter: TaskFilter, terms: Terms = PLAIN, *, everything: bool = False
    ) -> Bulk:
        _check_deliberate(filter, "cancel_all", everything=everything)
        if filter.status is not None and filter.status.finished:
            raise ConfigurationError(
                "only pending and running tasks can be cancelled: the filter must not have status "
                f"{filter.status}"
            )
        # A pending task may start before its page is read; a running one may be retried.
        some = (TaskStatus.PENDING, TaskStatus.RUNNING, TaskStatus.PENDING)
        wanted = [
            attrs.evolve(filter, status=status)
            for status in ((filter.status,) if filter.status else some)
        ]
        if terms.dry_run:
            return counted("cancel", count(self._repository, wanted[:2], terms.at_most))
        tally = Tally("cancel", terms)
        for selection in selections(self._repository, wanted):
            for tasks in selection.pages():
                self._cancel_page(tasks, tally)
        return tally.bulk

    def _cancel_page(self, tasks: Mapping[str, Task], tally: Tally) -> None:
        new = [i for i, task in tasks.items() if task.cancel_requested_at is None]
        cancelled, asked = self._cancel_some(new, tasks)
        changed = len(cancelled) + len(asked)
        tally.add(
            len(tasks),
            changed=changed,
            asked=len(asked),
            skipped=["asked"] * (len(tasks) - len(new)) + ["changed"] * (len(new) - changed),
            reached=[*tasks.values()][-1].created_at,
        )

    def _cancel_some(
        self, task_ids: Sequence[str], tasks: Mapping[str, Task] | None = None
    ) -> tuple[set[str], set[str]]:
        """Cancel tasks; return the ids of those that will never run, and of those asked to stop."""
        now = self._services.clock.now_ms()
        writes = [write for task_id in task_ids for write in lifecycle.cancel(task_id, now)]
        done = [w for w, held in zip(writes, self._commit(writes, tasks), strict=True) if held]
        cancelled = {write.id for write in done if "status" in write.changes}
        asked = {write.id for write in done} - cancelled
        left = [i for i in task_ids if i not in cancelled and i not in asked]
        rest = self._repository.statuses(left) if left else {}
        for task_id, status in rest.items():
            # An unfinished task moved in the meantime, or was already asked to stop.
            if status not in lifecycle.FINISHED:
                try:
                    (cancelled if self.cancel(task_id) else asked).add(task_id)
                except RepositoryCorrupt as error:
                    self._services.log.warning("%s", error)
                except (InvalidTransition, TaskNotFound):
                    continue
        return cancelled, asked

    # --- delete

    def delete(self, task_id: str) -> None:
        if not self._commit([lifecycle.delete(task_id)])[0]:
            raise lifecycle.not_deleted(self._repository.get_by_id(task_id))

    def delete_many(self, task_ids: Sequence[str]) -> int:
        return sum(
            sum(self._commit([lifecycle.delete(i) for i in task_ids[start : start + self._batch]]))
            for start in range(0, len(task_ids), self._batch)
        )

    def delete_all(
        self, filter: TaskFilter, terms: Terms = PLAIN, *, everything: bool = False
    ) -> Bulk:
        _check_deliberate(filter, "delete_all", everything=everything)
        if filter.status is TaskStatus.RUNNING:
            raise ConfigurationError("running tasks cannot be deleted: cancel them first")
        if terms.dry_run:
            return counted("delete", count(self._repository, [filter], terms.at_most))
        tally = Tally("delete", terms)
        for selection in selections(self._repository, [filter]):
            for tasks in selection.pages():
                self._delete_page(tasks, tally)
        return tally.bulk

    def discard_dead_letters(self, filter: TaskFilter) -> int:
        return self.delete_all(dead(filter)).changed

    def _delete_page(self, tasks: Mapping[str, Task], tally: Tally) -> None:
        reasons = {i: "running" for i, t in tasks.items() if t.status is TaskStatus.RUNNING}
        reasons.update((i, "thread") for i, task in tasks.items() if task.stuck_on)
        free = {i: task for i, task in tasks.items() if i not in reasons}
        needed = self._needed(free)
        reasons.update(dict.fromkeys(needed, "needed"))
        writes = [lifecycle.discard(task) for i, task in free.items() if i not in needed]
        results = self._commit(writes, {}) if writes else []
        deleted = sum(results)
        skipped = [*reasons.values(), *["changed"] * (len(results) - deleted)]
        reached = [*tasks.values()][-1].created_at
        tally.add(len(tasks), changed=deleted, skipped=skipped, reached=reached)

    def _needed(self, tasks: Mapping[str, Task]) -> set[str]:
        """Return the tasks on which unfinished tasks depend that are not deleted with them.

        An executor may still ask for the results of its parents.
        """
        families = queries.families(self._repository, tasks)
        others = [*{child for _, child in families}]
        statuses = self._repository.statuses(others) if others else {}
        needed = set[str]()
        before = -1
        while len(needed) > before:
            before = len(needed)
            needed |= {
                parent
                for parent, child in families
                if statuses.get(child) in lifecycle.UNFINISHED
                and (child not in tasks or child in needed)
            }
        return needed

    def _commit(
        self, writes: Sequence[Update | Delete], tasks: Mapping[str, Task] | None = None
    ) -> Sequence[bool]:
        self._repository.transactions.refuse_write()
        results = self._moves.commit(writes, tasks)
        self._moves.process_if_unattended()
        return results
