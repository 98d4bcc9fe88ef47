"""The backend for Django's setting ``TASKS``."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import taskx
from taskx import ConfigurationError, Queue, TaskNotFound
from taskx.contrib.django.blocks import uncommitted_writes
from taskx.contrib.django.checks import check_alias
from taskx.contrib.django.compat import (
    BaseTaskBackend,
    Task,
    TaskResultDoesNotExist,
    task_enqueued,
)
from taskx.contrib.django.places import Place, place_of
from taskx.contrib.django.queues import get_queue
from taskx.contrib.django.results import TaskxResult, params_of, result_of
from taskx.contrib.django.running import announcing
from taskx.contrib.django.tasks import (
    TaskxTask,
    check_arguments,
    check_type_options,
    dated,
    run_at,
    submit_options,
    task_of,
)
from taskx.tasks.clock import SYSTEM_CLOCK, to_datetime, to_ms
from taskx.tasks.ids import new_id
from taskx.tasks.model import check_name
from taskx.tasks.record import created_task
from taskx.tasks.writes import Insert


class TaskxBackend(BaseTaskBackend):
    """The backend that stores tasks in TaskX: ``"BACKEND": "taskx.contrib.django.TaskxBackend"``.

    Django makes an instance for each thread. All of them use the same queue.
    """

    task_class = TaskxTask
    supports_defer = True
    supports_async_task = True
    supports_get_result = True
    supports_priority = True
    #: True if ``enqueue`` runs the task.
    inline = False

    @property
    def queue(self) -> Queue:
        """The queue of the alias.

        Raises:
            ConfigurationError: an option is not valid.
        """
        return get_queue(self.alias)

    @property
    def _place(self) -> Place:
        return place_of(self.alias)

    def validate_task(self, task: Task) -> None:
        """Check a task, when it is made and again when it is enqueued.

        Raises:
            InvalidTask: the backend cannot run it, or an option is not valid.
        """
        super().validate_task(dated(task))
        submit_options(task)
        check_type_options(task)

    def enqueue(self, task: Task, args: Sequence[Any], kwargs: Mapping[str, Any]) -> TaskxResult:
        """Store a task, and return its result, which is not there yet.

        Inside ``atomic()`` of the database that holds the tasks, the task is part of the transaction.
        Inside ``atomic()`` of another database, it is stored after the commit.

        Raises:
            InvalidTask: the task is not valid with the settings of now.
            TypeError: an argument is not JSON, or the function does not take it, or requires another one.
            DuplicateTask: another task holds its ``unique_key``.
            ConfigurationError: the option ``on_commit`` is ``"refuse"``, and a transaction is open on
                another database.
            TaskxError: the other errors of ``Queue.submit``.
        """
        self.validate_task(task)
        check_arguments(task, args, kwargs)
        now, moment = SYSTEM_CLOCK.now_ms(), run_at(task)
        record = taskx.Task(
            id=new_id(),
            params=params_of(list(args), dict(kwargs)),
            priority=task.priority,
            created_at=to_datetime(now),
            run_at=None if moment is None else to_datetime(to_ms(moment)),
        )
        return self._enqueue(result_of(record, task, self.alias), now)

    def _enqueue(self, result: TaskxResult, now: int) -> TaskxResult:
        """Store a task now, and tell the receivers of the signal before a thread here begins to run it."""
        told = announcing[result.id] = (threading.get_ident(), threading.Event())
        try:
            stored_as = self._submit(result, now)
            if stored_as != result.id:  # on_conflict: another task has the key
                return self._uncommitted(stored_as) or self.get_result(stored_as)
            task_enqueued.send(sender=type(self), task_result=result)
            return result
        finally:
            del announcing[result.id]
            told[1].set()

    def _submit(self, result: TaskxResult, now: int) -> str:
        """Submit the task of a result, enqueued at ``now`` in milliseconds; return the id that it got."""
        task, place = result.task, self._place
        options = submit_options(task)
        options["id"], options["priority"] = result.id, task.priority
        options["run_at"] = run_at(task)
        params = params_of(result.args, result.kwargs)
        return place.queue._submit(place.register(task), params, None, options, now).id

    def _uncommitted(self, task_id: str) -> TaskxResult | None:
        """Return the result of a task that this thread has enqueued inside an open block, else None.

        In another database than that of the tasks, nobody can read it before the commit.
        """
        row: dict[str, Any] = {}
        for write in uncommitted_writes(self.queue.repository):
            if write.id == task_id:
                row |= write.row if isinstance(write, Insert) else write.changes
        return self._result(created_task(row)) if "id" in row else None

    def _result(self, record: taskx.Task) -> TaskxResult:
        try:
            return result_of(record, task_of(record.type, self.alias), self.alias)
        except ImportError as error:
            raise TaskResultDoesNotExist(f"{record.id}: {error}") from error

    def get_result(self, result_id: str) -> TaskxResult:
        """Return the result of a task as it is now.

        Raises:
            TaskResultDoesNotExist: no task of Django has this id.
        """
        try:
            task_id = check_name(result_id, "id")
        except ConfigurationError as error:  # no task can have this id
            raise TaskResultDoesNotExist(str(error)) from None
        return self._read(task_id)

    def _read(self, result_id: str) -> TaskxResult:
        queue = self.queue
        try:
            return self._result(queue.get_task_status(result_id))
        except TaskNotFound:
            later = queue.repository.transactions.changed(result_id)
            why = (
                ": it is stored at the commit of atomic(), and cannot be read before"
                if later
                else ""
            )
            raise TaskResultDoesNotExist(f"{result_id}{why}") from None

    def check(self, **kwargs: Any) -> Sequence[Any]:
        """Return what is wrong with the options of the alias."""
        return check_alias(self.alias)
