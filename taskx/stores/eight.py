"""The eight methods of a repository, which users implement."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from taskx.tasks.model import Task, TaskFilter, TaskStatus


class TaskRepository(ABC):
    """The eight methods of a repository: implement them, and ``Queue`` works with it.

    A queue on such a repository must be the only process that uses it. Tasks that are running when the
    queue starts count as left behind by a process that died.

    Several threads may call at the same time. Store every field of the task (``to_dict`` and ``from_dict``
    help). Return copies, not the stored objects.

    If a method raises, the queue reads the task to find out whether the change was made, and calls the
    method once more if it was not. Raise ``RepositoryUnavailable`` or an ``OSError`` if the call may
    succeed later.
    """

    @abstractmethod
    def create(self, task: Task) -> None:
        """Store a new task. Raise ``DuplicateTask`` if a task with its id exists."""

    @abstractmethod
    def get_by_id(self, task_id: str) -> Task:
        """Return the task with this id. Raise ``TaskNotFound`` if it does not exist."""

    @abstractmethod
    def update(self, task: Task) -> None:
        """Replace the stored task that has the same id. Raise ``TaskNotFound`` if it does not exist."""

    @abstractmethod
    def update_status(self, task_id: str, status: TaskStatus, message: str = "") -> None:
        """Set status and message. Raise ``TaskNotFound`` if the task does not exist."""

    @abstractmethod
    def update_progress(self, task_id: str, progress: int, message: str = "") -> None:
        """Set progress (0 to 100) and message. Raise ``TaskNotFound`` if the task does not exist."""

    @abstractmethod
    def list(self, filter: TaskFilter) -> Sequence[Task]:
        """Return the tasks that match the filter, newest first, at most its limit and from its offset."""

    @abstractmethod
    def count(self, filter: TaskFilter) -> int:
        """Return the number of tasks that match the filter, ignoring its offset and limit."""

    @abstractmethod
    def delete(self, task_id: str) -> None:
        """Remove the task. Raise ``TaskNotFound`` if it does not exist."""
