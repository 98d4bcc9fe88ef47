"""Results of Django's tasks, read from the records of TaskX."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from django.conf import settings
from django.utils import timezone

import taskx
from taskx import Attempt, Context, TaskHandle, TaskStatus
from taskx.contrib.django.compat import (
    Task,
    TaskContext,
    TaskError,
    TaskResult,
    TaskResultStatus,
    task_backends,
)
from taskx.contrib.django.tasks import changed

_STATUS: Mapping[TaskStatus, Any] = {
    TaskStatus.PENDING: TaskResultStatus.READY,
    TaskStatus.RUNNING: TaskResultStatus.RUNNING,
    TaskStatus.COMPLETED: TaskResultStatus.SUCCESSFUL,
    TaskStatus.FAILED: TaskResultStatus.FAILED,
    TaskStatus.CANCELLED: TaskResultStatus.FAILED,  # Django has no such status
}
# The classes that stand for endings without an exception.
_CANCELLED, _FAILED = "taskx.TaskCancelled", "taskx.TaskFailed"
# The outcomes of attempts that count as errors.
_ERRORS = frozenset({"failed", "retried", "crashed"})


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class TaskxResult(TaskResult):
    """A result of Django with the handle of TaskX."""

    def __repr__(self) -> str:
        return f"<TaskxResult {self.id} of {self.task.module_path}, {self.status}>"

    @property
    def taskx(self) -> TaskHandle[Any]:
        """The handle: ``task()`` has the progress, the log and the attempts; ``cancel()``; ``why()``."""
        handle: TaskHandle[Any] = task_backends[self.backend].queue.handle(self.id)
        return handle


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskxContext(TaskContext):
    """A context of Django with the context of TaskX.

    Attributes:
        taskx: reports progress, notices a cancel, logs, and stores checkpoints.
    """

    taskx: Context


def params_of(args: Any, kwargs: Any) -> dict[str, Any]:
    """Return the params of a task in TaskX."""
    return {"args": args, "kwargs": kwargs}


def arguments(params: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments of the function. Params of another form are keyword arguments.

    So a schedule, or the command line, can name the arguments.
    """
    args, kwargs = params.get("args"), params.get("kwargs")
    if params.keys() == {"args", "kwargs"} and isinstance(args, list) and isinstance(kwargs, dict):
        return args, kwargs
    return [], dict(params)


def as_shown(moment: datetime | None) -> datetime | None:
    """Return a moment as Django gives it: aware with ``USE_TZ``, else naive in the local time zone."""
    if moment is None or settings.USE_TZ:
        return moment
    naive: datetime = timezone.make_naive(moment, timezone.get_default_timezone())
    return naive


def result_of(record: taskx.Task, task: Task, alias: str) -> TaskxResult:
    """Return the result of a task from its record.

    Args:
        record: the record of the task.
        task: the task of Django with that type.
        alias: the alias of the backend.
    """
    runs = [attempt for attempt in record.attempts if attempt.outcome != "requeued"]
    args, kwargs = arguments(record.params)
    changes = {"priority": record.priority, "run_after": as_shown(record.run_at), "backend": alias}
    result = TaskxResult(
        task=changed(task, **changes),
        id=record.id,
        status=_STATUS[record.status],
        enqueued_at=as_shown(record.created_at),
        started_at=as_shown(runs[0].started_at) if runs else None,
        finished_at=as_shown(record.completed_at),
        last_attempted_at=as_shown(runs[-1].started_at) if runs else None,
        args=args,
        kwargs=kwargs,
        backend=alias,
        errors=_errors(record, runs),
        worker_ids=[attempt.worker for attempt in runs],
    )
    if record.status is TaskStatus.COMPLETED:
        object.__setattr__(result, "_return_value", record.result)
    return result


def _errors(record: taskx.Task, runs: list[Attempt]) -> list[Any]:
    errors = [_error(run) for run in runs if run.error_type or run.outcome in _ERRORS]
    if record.status is TaskStatus.CANCELLED:
        text = record.error or "the task was cancelled"
        return [*errors, TaskError(exception_class_path=_CANCELLED, traceback=text)]
    if record.status is TaskStatus.FAILED and not errors:  # it never ran: its parent failed
        return [TaskError(exception_class_path=_FAILED, traceback=record.error)]
    return errors


def _error(run: Attempt) -> Any:
    kind = run.error_type or _FAILED
    path = kind if "." in kind else f"builtins.{kind}"
    return TaskError(exception_class_path=path, traceback=run.traceback or run.error)
