"""What is done to stored tasks from outside, cancel, requeue and delete, and what follows from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from taskx.core import lifecycle
from taskx.core.errors import (
    InvalidTransition,
    QueueStopped,
    RepositoryCorrupt,
    RepositoryError,
    TaskNotFound,
)
from taskx.core.model import TaskFilter
from taskx.core.token import CancelReason
from taskx.core.writes import Update
from taskx.runtime.dead_letters import requeue_all, requeue_one, requeue_these
from taskx.runtime.intake import Intake
from taskx.runtime.starter import Services

#: Tasks that are cancelled in one transaction.
BATCH = 200
# Attempts to cancel a task that moves between the write and the look.
_TRIES = 20


class Operations:
    """Changes tasks that are stored, started or not: as the methods of ``Queue`` with these names say.

    Args:
        services: what it works with.
        intake: knows the running node, and whether the queue was stopped.
    """

    def __init__(self, services: Services, intake: Intake) -> None:
        self._services = services
        self._intake = intake

    # --- cancel

    def cancel(self, task_id: str) -> bool:
        """Cancel a task: True if it never runs, False if it runs and was asked to stop."""
        for _ in range(_TRIES):
            writes = lifecycle.cancel(task_id, self._services.clock.now_ms())
            *cancelled, asked = self._services.ledger.commit(writes)
            if any(cancelled):
                self._never_run([writes[cancelled.index(True)]])
                return True
            if not asked:
                task = self._services.repository.get_by_id(task_id)
                if task.status.finished:
                    raise InvalidTransition(f"task {task_id} is {task.status} already")
                if task_id not in self._services.repository.asked_to_cancel([task_id]):
                    continue  # it moved between the write and the look
            self.fire(task_id)
            return False
        raise RepositoryCorrupt(
            f"task {task_id} cannot be cancelled: its stored record is damaged; remove it with "
            "delete(), or repair it by hand"
        )

    def cancel_many(self, task_ids: Sequence[str]) -> int:
        """Cancel those of these tasks that have not ended; returns how many of them never run."""
        never_run, settled = 0, set[str]()
        for start in range(0, len(task_ids), BATCH):
            cancelled, asked = self._cancel_some(task_ids[start : start + BATCH])
            self._never_run(cancelled)
            for task_id in asked:
                self.fire(task_id)
            never_run += len(cancelled)
            settled.update((write.id for write in cancelled), asked)
        rest = self._services.repository.statuses([i for i in task_ids if i not in settled])
        for task_id, status in rest.items():
            if status not in lifecycle.FINISHED:  # it moved meanwhile, or was asked before
                try:
                    never_run += self.cancel(task_id)
                except RepositoryCorrupt as error:
                    self._services.log.warning("%s", error)
                except (InvalidTransition, TaskNotFound):
                    continue
        return never_run

    def _cancel_some(self, task_ids: Sequence[str]) -> tuple[list[Update], list[str]]:
        """The writes by which tasks were cancelled that were pending; those that were asked to stop."""
        now = self._services.clock.now_ms()
        writes = [write for task_id in task_ids for write in lifecycle.cancel(task_id, now)]
        results = self._services.ledger.commit(writes)
        done = [write for write, held in zip(writes, results, strict=True) if held]
        never_run = [write for write in done if "status" in write.changes]
        asked = [write.id for write in done if "status" not in write.changes]
        return never_run, asked

    def fire(self, task_id: str) -> None:
        """Fire the token of a task, if it runs in this queue."""
        engine = self._intake.engine
        if engine is not None and (run := engine.runs.get(task_id)) is not None:
            run.token.fire(CancelReason.CANCEL)

    def _never_run(self, writes: Sequence[Update]) -> None:
        """Pending tasks were cancelled."""
        if not writes:
            return
        task_ids = [write.id for write in writes]
        self._forget(task_ids)
        self._tell_cancelled(writes)
        self._look_at_dependents(task_ids)
        self._look_at_lines()

    def _tell_cancelled(self, writes: Sequence[Update]) -> None:
        hooks = self._services.hooks
        if not hooks.finished:
            return
        try:
            tasks = self._services.repository.get_many([write.id for write in writes])
        except RepositoryError as error:
            cancelled = ", ".join(write.id for write in writes[:10])
            self._services.log.warning(
                "no hook is told that tasks are cancelled: %s: %s", cancelled, error
            )
            return
        for write in writes:
            if write.id in tasks:
                hooks.tell_changed(hooks.finished, tasks[write.id], write.changes)

    # --- requeue, delete

    def requeue(self, task_id: str) -> None:
        """Have a failed or cancelled task run again, and what failed or was cancelled because of it."""
        self._refuse_if_stopped()
        task = self._services.repository.get_by_id(task_id)
        if not self._requeue(lambda: requeue_one(self._services, task)):
            self._services.repository.refuse_if_key_held(task)
            raise InvalidTransition(f"task {task_id} moved on while it was being requeued")

    def requeue_many(self, task_ids: Sequence[str]) -> int:
        """Have those of these tasks run again that failed or were cancelled; returns how many."""
        return self._requeue(lambda: requeue_these(self._services, task_ids))

    def requeue_dead_letters(self, filter: TaskFilter | None) -> int:
        """Have every dead letter that meets a filter run again; returns how many."""
        return self._requeue(lambda: requeue_all(self._services, filter))

    def _requeue(self, requeue: Callable[[], int]) -> int:
        self._refuse_if_stopped()
        requeued = requeue()
        self._look_at_lines()
        self._intake.look_for_work()
        return requeued

    def _refuse_if_stopped(self) -> None:
        if self._intake.stopped:
            raise QueueStopped("the queue was stopped; nothing was requeued")

    def delete(self, task_id: str) -> None:
        """Remove the record of a task that is not running."""
        if not self._services.ledger.commit([lifecycle.delete(task_id)])[0]:
            raise lifecycle.not_deleted(self._services.repository.get_by_id(task_id))
        self._forget([task_id])
        self._look_at_dependents([task_id])
        self._look_at_lines()

    # --- what follows

    def _forget(self, task_ids: Sequence[str]) -> None:
        """Pending tasks will not run any more."""
        if self._intake.engine is not None:
            self._intake.engine.buffer.discard(task_ids)
        for task_id in task_ids:
            self._services.watcher.look_if_watched(task_id)

    @property
    def _has_scheduler(self) -> bool:
        """Whether there is one that looks after what follows from a change: from the start to the stop."""
        return self._intake.engine is not None and not self._intake.stopped

    def _look_at_dependents(self, task_ids: Sequence[str]) -> None:
        dependents = self._services.dependents
        if self._has_scheduler and not dependents.any:
            return
        for task_id in task_ids:
            dependents.parent_ended(task_id)
        if not self._has_scheduler:
            try:
                dependents.look()
            except RepositoryError as error:
                self._services.log.warning(
                    "what waits for cancelled tasks is looked at later: %s", error
                )

    def _look_at_lines(self) -> None:
        """Of the tasks that were changed only the ids are known: one may have had the turn of its key."""
        lines = self._services.lines
        lines.look_soon()
        if not self._has_scheduler:
            try:
                lines.look()
            except RepositoryError as error:
                self._services.log.warning("whose turn has come is looked at later: %s", error)
