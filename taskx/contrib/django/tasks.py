"""Tasks of Django with the options of TaskX, and the decorator that makes them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

from django.conf import settings
from django.utils import timezone
from django.utils.module_loading import import_string

from taskx import ConfigurationError, RetryPolicy, executor
from taskx.attempt.executors import check_batch
from taskx.contrib.django.compat import InvalidTask, Task
from taskx.tasks.options import Options, refuse_others

if TYPE_CHECKING:
    from taskx.tasks.options import (
        ExecutorOptions,
        Isolation,
        OnConflict,
        SubmitOptions,
        UniqueScope,
    )
    from taskx.tasks.rate import Cost
    from taskx.tasks.retry import Backoff

T = TypeVar("T", bound=Task)

# The queue name that is not part of a type.
_DEFAULT_QUEUE = "default"
# The options that Queue.submit takes under the same name.
_PASSED = (
    *("max_attempts", "timeout", "unique_key", "unique_scope", "on_conflict"),
    *("concurrency_key", "cost", "tags", "depends_on", "expires"),
)
# The options that only an executor takes: they hold for all tasks of the type.
_OF_TYPE = (
    *("rate", "max_concurrency", "limit", "isolation", "capture_log", "version"),
    *("stall", "max_snoozes"),
    *("batch", "wait"),
)
# The options that an executor takes, too: schedules and the command line get them from there.
_OF_EXECUTOR = ("max_attempts", "timeout", "tags", "expires", *_OF_TYPE)
# The names that Celery has for what tasks of Django do otherwise.
_CELERY = {
    "delay": "enqueue(…)",
    "apply_async": "enqueue(…), with its options as using(…).enqueue(…)",
}


@executor("task")
def _any() -> None:
    """Do nothing: it checks the options of tasks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskxTask(Task):
    """A task of Django with the options of TaskX.

    Tasks are equal if all that Django knows of them is equal: the task of a result that is read later does
    not have the options below that ``using`` gave.

    Attributes:
        max_attempts: number of attempts that may raise before the task fails; 1 by default, or 3 with a
            ``backoff``.
        backoff: the wait before another attempt: seconds, a ``timedelta``, ``"exponential"``,
            ``"linear"``, ``"fixed"``, a function of the number of the attempt that raised, or a
            ``RetryPolicy``.
        timeout: seconds, or a ``timedelta``, after which an attempt's token fires.
        unique_key, unique_scope, on_conflict, concurrency_key, cost, depends_on: as in ``Queue.submit``.
        tags: short texts to filter by.
        expires: a task that has not started by then is cancelled: as in ``Queue.submit``.
        rate, max_concurrency, limit, isolation, capture_log, version, stall, max_snoozes: as in
            ``Queue.executor``. They hold for all tasks of the type, so ``using`` does not take them.
        batch, wait: as these. The function takes a list, with the argument of each of many tasks, and
            ``enqueue`` takes one argument.
    """

    max_attempts: int | None = field(default=None, compare=False)
    backoff: float | timedelta | Backoff | RetryPolicy | None = field(default=None, compare=False)
    timeout: float | timedelta | None = field(default=None, compare=False)
    unique_key: str | None = field(default=None, compare=False)
    unique_scope: UniqueScope | None = field(default=None, compare=False)
    on_conflict: OnConflict | None = field(default=None, compare=False)
    concurrency_key: str | None = field(default=None, compare=False)
    cost: Cost | None = field(default=None, compare=False)
    tags: Sequence[str] | None = field(default=None, compare=False)
    depends_on: Sequence[Any] | None = field(default=None, compare=False)
    expires: float | timedelta | datetime | None = field(default=None, compare=False)
    rate: str | tuple[int, float | timedelta] | None = field(default=None, compare=False)
    max_concurrency: int | None = field(default=None, compare=False)
    limit: str | Sequence[str] | None = field(default=None, compare=False)
    isolation: Isolation | None = field(default=None, compare=False)
    capture_log: bool | int | str | None = field(default=None, compare=False)
    version: int | str | None = field(default=None, compare=False)
    stall: float | timedelta | None = field(default=None, compare=False)
    max_snoozes: int | None = field(default=None, compare=False)
    batch: int | None = field(default=None, compare=False)
    wait: float | timedelta | str | None = field(default=None, compare=False)

    @property
    def type(self) -> str:
        """The type of its tasks: its path, and its queue name if that is not the default."""
        return type_of(self)

    if not TYPE_CHECKING:  # a type checker finds out by itself

        def __getattr__(self, name: str) -> Any:
            hint = f": write {self.name}.{_CELERY[name]}" if name in _CELERY else ""
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}{hint}")

    def using(self, **changes: Any) -> TaskxTask:
        """Return a copy with other options: those of Django's tasks, and those of this class.

        Raises:
            TypeError: there is no such option.
            InvalidTask: the value of an option is not valid.
        """
        if misplaced := sorted(changes.keys() & {*_OF_TYPE}):
            raise TypeError(
                f"using() has no option {', '.join(misplaced)}: give it to @task(…), for all its tasks"
            )
        refuse_others(changes, _option_names(self) - {"takes_context", *_OF_TYPE}, "using")
        return replace(self, **{name: v for name, v in changes.items() if v is not None})

    def __reduce__(self) -> tuple[Any, ...]:
        return _loaded, (type(self), self.module_path, _values(self))


def _option_names(kind: Any) -> Set[str]:
    return {field.name for field in fields(kind)} - {"func"}


def _values(task: Any) -> dict[str, Any]:
    return {field.name: getattr(task, field.name) for field in fields(task) if field.name != "func"}


def _loaded(kind: type[Any], path: str, values: Mapping[str, Any]) -> Any:
    """Return the task that was pickled. Its function is imported."""
    return kind(func=imported(path).func, **values)


@overload
def task(function: Callable[..., Any]) -> TaskxTask: ...
@overload
def task(function: None = None, **options: Any) -> Callable[[Callable[..., Any]], TaskxTask]: ...
def task(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Make a task of Django from the decorated function: ``@task`` or ``@task(max_attempts=3)``.

    It is Django's own decorator for every version of Django, and takes the options of
    :class:`TaskxTask`, too. Other backends ignore these.

    Args:
        function: the function, if the decorator has no parentheses.
        options: ``priority``, ``queue_name``, ``backend`` and ``takes_context`` as in Django, and the
            options of :class:`TaskxTask`.

    Raises:
        TypeError: there is no such option; or ``run_after`` was given, which only ``using`` takes.
        InvalidTask: the function, or the value of an option, is not valid.
    """
    if "run_after" in options:
        raise TypeError(
            "run_after cannot be given to the decorator: use task.using(run_after=…).enqueue(…)"
        )
    refuse_others(options, _option_names(TaskxTask), "task")
    given = {
        "priority": 0,
        "queue_name": _DEFAULT_QUEUE,
        "backend": "default",
        "run_after": None,
        **options,
    }

    def make(function: Callable[..., Any]) -> TaskxTask:
        return TaskxTask(func=function, **given)

    return make if function is None else make(function)


def changed(task: T, **changes: Any) -> T:
    """Return a copy of a task, without asking its backend if it is valid."""
    copy = object.__new__(type(task))
    for name in [one.name for one in fields(task)]:
        object.__setattr__(copy, name, changes.get(name, getattr(task, name)))
    return copy


def dated(task: T) -> T:
    """Return the task with a datetime as ``run_after`` if it has a ``timedelta``, from now on.

    Raises:
        InvalidTask: it has something else.
    """
    if not isinstance(task.run_after, timedelta):
        if not isinstance(task.run_after, datetime | None):
            raise InvalidTask(
                f"run_after must be a datetime or a timedelta, not {task.run_after!r}"
            )
        return task
    return changed(task, run_after=timezone.now() + task.run_after)


# --- types


def type_of(task: Task) -> str:
    """Return the type of a task in TaskX: its path, and its queue name if that is not the default."""
    path: str = task.module_path
    return path if task.queue_name == _DEFAULT_QUEUE else f"{path}@{task.queue_name}"


def queue_name_of(type: str) -> str:
    """Return the queue name in a type."""
    return type.partition("@")[2] or _DEFAULT_QUEUE


def imported(path: str) -> Task:
    """Return the task at a path.

    Raises:
        ImportError: there is none.
    """
    if not all(map(str.isidentifier, path.split("."))):  # no path at all
        raise ImportError(f"{path!r} is not the path of a task of Django")
    found = import_string(path)
    if not isinstance(found, Task):
        raise ImportError(f"{path!r} is not a task of Django, but {found!r}")
    return found


def task_of(type: str, alias: str) -> Task:
    """Return the task of a type.

    Raises:
        ImportError: the type is not the path of a task.
    """
    return changed(imported(type.partition("@")[0]), queue_name=queue_name_of(type), backend=alias)


# --- options


def policy(task: Task) -> RetryPolicy | None:
    """Return the retry policy of a task; None if it has none."""
    backoff: Any = getattr(task, "backoff", None)
    if backoff is None or isinstance(backoff, RetryPolicy):
        return backoff
    most = {} if task.max_attempts is None else {"max_attempts": task.max_attempts}
    if isinstance(backoff, (int, float, timedelta)) and not isinstance(backoff, bool):
        return RetryPolicy(backoff="fixed", base=backoff, **most)
    return RetryPolicy(backoff=backoff, **most)


def _given(task: Task, names: Sequence[str]) -> dict[str, Any]:
    options = {name: getattr(task, name, None) for name in names}
    options["retry"] = policy(task)
    return {name: value for name, value in options.items() if value is not None}


def submit_options(task: Task) -> SubmitOptions:
    """Return the options of ``Queue.submit`` for a task, without its priority and time.

    Raises:
        InvalidTask: an option is not valid.
    """
    try:
        given = _given(task, _PASSED)
        return cast("SubmitOptions", dict(_any.using(**given).options) if given else given)
    except ConfigurationError as error:
        raise InvalidTask(str(error)) from error


def check_type_options(task: Task) -> None:
    """Check the options that only an executor takes.

    Raises:
        InvalidTask: an option is not valid.
    """
    if given := {
        name: value for name in _OF_TYPE if (value := getattr(task, name, None)) is not None
    }:
        try:
            check_batch(type_of(task), Options(**given), batches=True)
        except ConfigurationError as error:
            raise InvalidTask(str(error)) from error


def check_arguments(task: Task, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Check that the function of a task takes these arguments.

    Raises:
        TypeError: it does not.
    """
    if getattr(task, "batch", None) is not None and (len(args) != 1 or kwargs):
        raise TypeError(
            f"{task.module_path} has batch=…: enqueue takes one argument, an item of the list that its "
            "function gets; nothing was stored"
        )
    if (signature := _signature_of(task.func, task.takes_context)) is None:
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{task.module_path}{signature}: {error}; nothing was stored") from None


@lru_cache(maxsize=1024)
def _signature_of(function: Callable[..., Any], takes_context: bool) -> inspect.Signature | None:
    """Return the arguments that a task has; None if its function, perhaps written in C, does not tell."""
    try:
        # A decorator between @task and the function may give it arguments of its own.
        signature = inspect.signature(function, follow_wrapped=False)
    except ValueError:
        return None
    parameters = list(signature.parameters.values())
    if takes_context and parameters and parameters[0].kind is not parameters[0].VAR_POSITIONAL:
        return signature.replace(parameters=parameters[1:])
    return signature


def executor_options(task: Task) -> ExecutorOptions:
    """Return the options of the executor of a task."""
    given = _given(task, _OF_EXECUTOR)
    if isinstance(given.get("expires"), datetime):  # of one task, not of a type
        del given["expires"]
    return cast("ExecutorOptions", given)


def run_at(task: Task) -> datetime | None:
    """Return when a task may start, as an aware datetime; None for at once."""
    moment: datetime | None = dated(task).run_after
    if moment is not None and not settings.USE_TZ and timezone.is_naive(moment):
        return cast(datetime, timezone.make_aware(moment, timezone.get_default_timezone()))
    return moment
