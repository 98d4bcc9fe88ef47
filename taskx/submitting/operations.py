"""What is done to stored tasks from outside: cancel, requeue and delete."""

from __future__ import annotations

from collections.abc import Sequence

from taskx.core import lifecycle
from taskx.core.errors import InvalidTransition, QueueStopped, RepositoryCorrupt, TaskNotFound
from taskx.core.model import TaskFilter
from taskx.core.writes import Delete, Update
from taskx.moving import Services
from taskx.running.state import State
from taskx.storage import queries
from taskx.submitting.dead_letters import requeue_all, requeue_one, requeue_these

#: Tasks that are cancelled in one transaction.
BATCH = 200
# Attempts to cancel a task that moves between the write and the look.
_TRIES = 20


class Operations:
    """Changes tasks that are stored, started or not: as the methods of ``Queue`` with these names say.

    Args:
        services: what it works with.
        state: whether the queue is started, and whether it was stopped.
    """

    def __init__(self, services: Services, state: State) -> None:
        self._services = services
        self._state = state

    def _commit(self, writes: Sequence[Update | Delete]) -> Sequence[bool]:
        results = self._services.consequences.commit(writes)
        self._services.consequences.look_if_alone()
        return results

    # --- cancel

    def cancel(self, task_id: str) -> bool:
        """Cancel a task: True if it never runs, False if it runs and was asked to stop."""
        for _ in range(_TRIES):
            *cancelled, asked = self._commit(
                lifecycle.cancel(task_id, self._services.clock.now_ms())
            )
            if any(cancelled):
                return True
            if asked:
                return False
            task = self._services.repository.get_by_id(task_id)
            if task.status.finished:
                raise InvalidTransition(f"task {task_id} is {task.status} already")
            if queries.asked_to_cancel(self._services.repository, [task_id]):
                if self._state.engine is not None:
                    self._state.engine.fire(task_id)
                return False
            # else it moved between the write and the look
        raise RepositoryCorrupt(
            f"task {task_id} cannot be cancelled: its stored record is damaged; remove it with "
            "delete(), or repair it by hand"
        )

    def cancel_many(self, task_ids: Sequence[str]) -> int:
        """Cancel those of these tasks that have not ended; returns how many of them never run."""
        never_run, settled = 0, set[str]()
        now = self._services.clock.now_ms()
        for start in range(0, len(task_ids), BATCH):
            some = task_ids[start : start + BATCH]
            writes = [write for task_id in some for write in lifecycle.cancel(task_id, now)]
            done = [w for w, held in zip(writes, self._commit(writes), strict=True) if held]
            never_run += sum("status" in write.changes for write in done)
            settled.update(write.id for write in done)
        left = [task_id for task_id in task_ids if task_id not in settled]
        rest = self._services.repository.statuses(left) if left else {}
        for task_id, status in rest.items():
            if status not in lifecycle.FINISHED:  # it moved meanwhile, or was asked before
                try:
                    never_run += self.cancel(task_id)
                except RepositoryCorrupt as error:
                    self._services.log.warning("%s", error)
                except (InvalidTransition, TaskNotFound):
                    continue
        return never_run

    # --- requeue, delete

    def requeue(self, task_id: str) -> None:
        """Have a failed or cancelled task run again, and what failed or was cancelled because of it."""
        self._refuse_if_stopped()
        task = self._services.repository.get_by_id(task_id)
        if not requeue_one(self._services, task):
            self._services.repository.refuse_if_key_held(task)
            raise InvalidTransition(f"task {task_id} moved on while it was being requeued")

    def requeue_many(self, task_ids: Sequence[str]) -> int:
        """Have those of these tasks run again that failed or were cancelled; returns how many."""
        self._refuse_if_stopped()
        return requeue_these(self._services, task_ids)

    def requeue_dead_letters(self, filter: TaskFilter | None) -> int:
        """Have every dead letter that meets a filter run again; returns how many."""
        self._refuse_if_stopped()
        return requeue_all(self._services, filter)

    def _refuse_if_stopped(self) -> None:
        if self._state.stopped:
            raise QueueStopped("the queue was stopped; nothing was requeued")

    def delete(self, task_id: str) -> None:
        """Remove the record of a task that is not running."""
        if not self._commit([lifecycle.delete(task_id)])[0]:
            raise lifecycle.not_deleted(self._services.repository.get_by_id(task_id))
