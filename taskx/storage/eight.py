"""The eight methods of a repository: what users implement, and how ours come to them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from taskx.core import lifecycle
from taskx.core.clock import Clock, to_ms
from taskx.core.codec import Codecs
from taskx.core.creation import new_record, storable
from taskx.core.errors import DuplicateTask, InvalidTransition, TaskNotFound
from taskx.core.model import TASK_FIELDS, Task, TaskFilter, TaskStatus, check_name, check_status
from taskx.core.payload import clean_text
from taskx.core.record import (
    MAX_MESSAGE,
    check_progress,
    known_status,
    parents_from_text,
    task_from_row,
)
from taskx.core.writes import Write


class TaskRepository(ABC):
    """The eight methods of a repository; implement them and ``Queue`` works with it.

    Such a queue takes itself for the only process on the repository: what it finds running when it
    starts counts as left behind by a process that died. Calls come from several threads. Keep every
    field of the task (``to_dict``/``from_dict`` help); give back copies, not what is stored.

    A method that raises, before or after it has changed something, is called once more if the change is
    not there. Raise ``RepositoryUnavailable`` or an ``OSError`` for what may work later.
    """

    @abstractmethod
    def create(self, task: Task) -> None:
        """Store a new task; ``DuplicateTask`` if one has its id."""

    @abstractmethod
    def get_by_id(self, task_id: str) -> Task:
        """The task with that id; ``TaskNotFound`` if there is none."""

    @abstractmethod
    def update(self, task: Task) -> None:
        """Replace the stored task that has this one's id; ``TaskNotFound`` if there is none."""

    @abstractmethod
    def update_status(self, task_id: str, status: TaskStatus, message: str = "") -> None:
        """Set status and message; ``TaskNotFound`` if there is no such task."""

    @abstractmethod
    def update_progress(self, task_id: str, progress: int, message: str = "") -> None:
        """Set progress (0 to 100) and message; ``TaskNotFound`` if there is no such task."""

    @abstractmethod
    def list(self, filter: TaskFilter) -> Sequence[Task]:
        """The tasks that meet the filter, newest first, from its offset, at most its limit."""

    @abstractmethod
    def count(self, filter: TaskFilter) -> int:
        """How many tasks meet the filter, whatever its offset and limit."""

    @abstractmethod
    def delete(self, task_id: str) -> None:
        """Remove the task; ``TaskNotFound`` if there is none."""


class ByMoves(TaskRepository):
    """Six of the eight, by the moves of ``lifecycle``: its rules hold whichever way a record is changed."""

    clock: Clock
    codecs: Codecs

    @abstractmethod
    def apply(self, writes: Sequence[Write], *, all_or_nothing: bool = False) -> Sequence[bool]:
        """Apply guarded writes; says for each whether its guard held."""

    @abstractmethod
    def find(
        self, column: Any, values: Sequence[str], fields: tuple[str, ...], limit: int | None = None
    ) -> Sequence[tuple[Any, ...]]:
        """Rows that have one of these values in a lookup column: of each the fields asked for."""

    def get_many(self, task_ids: Sequence[str]) -> dict[str, Task]:
        """The tasks with these ids that exist, by id."""
        found = self.find("id", task_ids, TASK_FIELDS)
        return {row[0]: task_from_row(row, self.codecs) for row in found}

    def statuses(self, task_ids: Sequence[str]) -> dict[str, str]:
        """The status of each of these tasks that exists, by id."""
        found = self.find("id", task_ids, ("id", "status"))
        return {task_id: known_status(status) for task_id, status in found}

    def create(self, task: Task) -> None:
        """Store a new pending task.

        Raises:
            DuplicateTask: one has its id, or holds its unique key.
            InvalidTransition: it is not pending.
            PayloadError: its params break the JSON rules.
            ConfigurationError: another field holds what it may not.
        """
        task = storable(task)
        now = self.clock.now_ms()
        insert = new_record(task, now if task.created_at is None else to_ms(task.created_at))
        # Whether they have ended is seen by whoever runs.
        if parents := parents_from_text(insert.row.get("depends_on")):
            lifecycle.wait_for(insert, parents[-1])
        if not self.apply([insert])[0]:
            holder = self._holder(task.unique_key)
            raise DuplicateTask(holder or task.id, task.unique_key if holder else None)

    def get_by_id(self, task_id: str) -> Task:
        """The task with that id; ``TaskNotFound`` if there is none."""
        found = self.get_many([check_name(task_id, "id")])
        if task_id not in found:
            raise TaskNotFound(task_id)
        return found[task_id]

    def update(self, task: Task) -> None:
        """Replace what may be replaced of the stored task: not its identity, fence and owner.

        Raises:
            TaskNotFound: there is no such task.
            InvalidTransition: its status may not move as asked, or it moved meanwhile.
            DuplicateTask: it would take a unique key again that another task holds.
            PayloadError: params or result break the JSON rules.
            ConfigurationError: another field holds what it may not.
        """
        task = storable(task)
        stored = self.get_by_id(task.id)
        if not any(self.apply(lifecycle.amend(stored, task, self.clock.now_ms()))):
            if task.status is TaskStatus.PENDING:
                self.refuse_if_key_held(stored)
            raise InvalidTransition(f"task {task.id} moved on while it was being updated")

    def update_status(self, task_id: str, status: TaskStatus, message: str = "") -> None:
        """Set status and message.

        Raises:
            TaskNotFound: there is no such task.
            InvalidTransition: no move leads there, or it moved meanwhile.
            DuplicateTask: it would take a unique key again that another task holds.
        """
        stored = self.get_by_id(task_id)
        write = lifecycle.set_status(
            stored, check_status(status), clean_text(message, MAX_MESSAGE), self.clock.now_ms()
        )
        if not self.apply([write])[0]:
            if status == TaskStatus.PENDING:
                self.refuse_if_key_held(stored)
            raise InvalidTransition(f"task {task_id} moved on while its status was being set")

    def refuse_if_key_held(self, task: Task) -> None:
        """``DuplicateTask`` where another task holds the unique key that this one would take again."""
        holder = self._holder(task.unique_key)
        if holder is not None and holder != task.id:
            raise DuplicateTask(holder, task.unique_key)

    def _holder(self, key: str | None) -> str | None:
        """The task that holds a unique key."""
        found = () if key is None else self.find("unique_lock", [key], ("id",))
        return next((task_id for (task_id,) in found), None)

    def update_progress(self, task_id: str, progress: int, message: str = "") -> None:
        """Set progress, clamped to 0 to 100, and message of a running task; of another, nothing.

        Raises:
            TaskNotFound: there is no such task.
        """
        percent, text = check_progress(progress, message)
        if not self.apply([lifecycle.progress(task_id, None, percent, text)])[0]:
            self.get_by_id(task_id)

    def delete(self, task_id: str) -> None:
        """Remove a task that is not running.

        Raises:
            TaskNotFound: there is no such task.
            InvalidTransition: it is running, or a thread of an ended attempt still runs.
        """
        if not self.apply([lifecycle.delete(check_name(task_id, "id"))])[0]:
            raise lifecycle.not_deleted(self.get_by_id(task_id))
