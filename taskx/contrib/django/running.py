"""Running tasks of Django: their executors, and the signals about them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import suppress
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Any

import django
from asgiref.sync import AsyncToSync, SyncToAsync, ThreadSensitiveContext
from django.apps import apps

import taskx
from taskx import (
    BatchContext,
    CancelReason,
    Context,
    Executor,
    Hook,
    PayloadError,
    TaskCancelled,
    TaskExecutor,
    TaskFailed,
    TaskStatus,
)
from taskx.attempt.executors import ContextExecutor, wait_for
from taskx.attempt.together import results_of
from taskx.contrib.django.compat import (
    Task,
    TaskResultStatus,
    normalize_json,
    task_backends,
    task_finished,
    task_started,
)
from taskx.contrib.django.results import TaskxContext, TaskxResult, arguments, result_of
from taskx.contrib.django.surroundings import surroundings
from taskx.contrib.django.tasks import (
    changed,
    check_arguments,
    imported,
    queue_name_of,
    task_of,
    type_of,
)
from taskx.tasks.options import Options

if TYPE_CHECKING:
    from taskx.attempt.coroutines import Awaited

# Most exceptions that are kept for the signal task_finished. Those of lost runs stay until then.
_MOST_RAISED = 1000
#: The tasks that this process has stored, and has not sent the signal task_enqueued for yet: the thread
#: that does, and an event that it sets then.
announcing: dict[str, tuple[int, threading.Event]] = {}
# Most seconds that a task waits for that signal: a receiver may wait for the task.
_PATIENCE = 5.0
# The exceptions of attempts whose outcome is not told yet, by the ids of their tasks and their ``starts``:
# hooks may hear of an attempt after the next one has raised.
_raised: dict[tuple[str, int], BaseException] = {}


class InChild(TaskExecutor):
    """The executor of tasks of Django with ``isolation="process"``. A child process makes one, too."""

    def __init__(self, type: str = "any") -> None:
        self.type = type

    def execute(self, ctx: Context, task: taskx.Task) -> Any:
        """Run the task of Django at the path in the task's type."""
        if not apps.ready:
            django.setup()
        found = imported(task.type.partition("@")[0])
        return _run(changed(found, queue_name=queue_name_of(task.type)), ctx, task.params)


class _Checking(ContextExecutor[..., Any]):
    """The executor of a task of Django, which checks params by the arguments of its function."""

    def __init__(self, task: Task, run: Callable[..., Any]) -> None:
        super().__init__(type_of(task), run, Options())
        self._task = task

    def _check_params(self, params: Mapping[str, Any]) -> None:
        args, kwargs = arguments(params)
        try:
            check_arguments(self._task, args, kwargs)
        except TypeError as error:
            raise PayloadError("params", str(error)) from None


def executor_of(task: Task) -> Executor[..., Any] | TaskExecutor:
    """Return the executor of a task of Django."""
    if getattr(task, "isolation", None) is not None:
        return InChild(type_of(task))

    def run(ctx: Context, /, **params: Any) -> Any:
        try:
            return _run(task, ctx, params)
        except BaseException as error:
            _keep(ctx.task, error)
            raise

    def run_many(ctx: BatchContext, tasks: list[dict[str, Any]]) -> list[Any]:
        records = [one.task for one in ctx.each]
        try:
            results = _run_many(task, ctx, records, tasks)
        except BaseException as error:
            for record in records:
                _keep(record, error)
            raise
        for record, result in zip(records, results, strict=False):
            if isinstance(result, BaseException):
                _keep(record, result)
        return results

    if (batch := getattr(task, "batch", None)) is not None:
        return taskx.executor(type_of(task), batch=batch)(run_many)
    return _Checking(task, run)


def _keep(record: taskx.Task, error: BaseException) -> None:
    """Keep the exception of an attempt until its outcome is told."""
    _raised[record.id, record.starts] = error
    for oldest in list(_raised)[:-_MOST_RAISED]:
        _raised.pop(oldest, None)


def _run(task: Task, ctx: Context, params: dict[str, Any]) -> Any:
    """Call the function of a task, and return its value as JSON."""
    result = _begin(task, ctx.task)
    args, kwargs = arguments(params)
    return normalize_json(_call(task, ctx, result, args, kwargs))


def _run_many(
    task: Task, ctx: BatchContext, records: Sequence[taskx.Task], params: list[dict[str, Any]]
) -> list[Any]:
    """Call the function of a task with the arguments of many tasks; return their values as JSON."""
    results = [_begin(task, record) for record in records]
    given = [args[0] if args else kwargs for args, kwargs in map(arguments, params)]
    values = results_of(_call(task, ctx, results[0], [given], {}), len(params))
    return [_json(value) for value in values]


def _json(value: Any) -> Any:
    """Return the value of a task as JSON, or the exception of a task."""
    if isinstance(value, BaseException):
        return value
    try:
        return normalize_json(value)
    except Exception as error:  # noqa: BLE001  (it affects no other task)
        return error


def _begin(task: Task, record: taskx.Task) -> TaskxResult:
    """Tell that a task has begun, and return its result, which is not there yet."""
    _wait_until_announced(record.id)
    result = result_of(record, task, task.backend)
    task_started.send(sender=_sender(task.backend), task_result=result)
    return result


def _call(
    task: Task, ctx: Context, result: TaskxResult, args: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    """Call the function of a task, and return its value."""
    if task.takes_context:
        args = (TaskxContext(task_result=result, taskx=ctx), *args)
    if iscoroutinefunction(task.func):
        return _awaited(task.func(*args, **kwargs))
    return task.func(*args, **kwargs)


def _wait_until_announced(task_id: str) -> None:
    if (told := announcing.get(task_id)) is not None and told[0] != threading.get_ident():
        told[1].wait(_PATIENCE)


def _awaited(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine on the queue's loop. The ORM is called in this thread, which waits for the result."""

    def enter(begun: Awaited) -> None:
        with suppress(AttributeError):  # set if async code has called the calling code
            del AsyncToSync.executors.current
        mine = ThreadSensitiveContext()
        SyncToAsync.thread_sensitive_context.set(mine)
        SyncToAsync.context_to_thread_executor[mine] = begun.thread

    of_thread = vars(SyncToAsync.threadlocal)
    outer = of_thread.get("main_event_loop")
    try:
        return wait_for(coroutine, enter)
    finally:  # calls of the ORM have set it: ``async_to_sync`` of the next task would use it
        of_thread["main_event_loop"] = outer


def _sender(alias: str) -> Any:
    return type(task_backends[alias])


def tasks_of(alias: str) -> Iterator[Task]:
    """Yield the tasks of an alias in the imported modules ``tasks`` of the installed apps."""
    for app in apps.get_app_configs():
        module = sys.modules.get(f"{app.name}.tasks")
        for thing in list(vars(module).values()) if module is not None else ():
            if isinstance(thing, Task) and thing.backend == alias:
                yield thing


class Signals(Hook):
    """Sends ``task_finished`` when a task of Django has ended in any way, once, after the commit.

    The signal is sent inside an ``except`` block if the task failed, as Django's own backends do, so that
    receivers can log the exception.
    """

    def __init__(self, alias: str) -> None:
        self._alias = alias

    def finished(self, task: taskx.Task) -> None:
        """Send the signal."""
        error = _raised.pop((task.id, task.starts), None)
        try:
            result = result_of(task, task_of(task.type, self._alias), self._alias)
        except ImportError:  # a task of TaskX's own, or its code is gone
            return
        with surroundings():
            if result.status != TaskResultStatus.FAILED:
                task_finished.send(sender=_sender(self._alias), task_result=result)
                return
            try:
                raise error or _ending_of(task)
            except BaseException:  # noqa: BLE001  (receivers read it as the current exception)
                task_finished.send(sender=_sender(self._alias), task_result=result)

    def retried(self, task: taskx.Task, error: str, delay: float) -> None:
        """Forget the exception: the task goes on."""
        _raised.pop((task.id, task.starts), None)

    def snoozed(self, task: taskx.Task, delay: float) -> None:
        """Forget the exception: the task goes on."""
        _raised.pop((task.id, task.starts), None)

    def interrupted(self, task: taskx.Task) -> None:
        """Forget the exception: the task goes on."""
        _raised.pop((task.id, task.starts), None)


def _ending_of(task: taskx.Task) -> BaseException:
    """Return an exception for a task that has ended without one."""
    if task.status is TaskStatus.CANCELLED:
        return TaskCancelled(CancelReason.CANCEL)
    return TaskFailed(task.id, task.error, max(1, task.errors), task.traceback, task.error_type)
