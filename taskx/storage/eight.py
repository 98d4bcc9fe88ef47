"""The eight methods of a repository, which users implement."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from taskx.core.model import Task, TaskFilter, TaskStatus


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
