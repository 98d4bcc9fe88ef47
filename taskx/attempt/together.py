"""One call of an executor for many tasks: its context, and what it returns for each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from taskx.attempt.context import Context, Shared, TaskLogger
from taskx.attempt.current import current
from taskx.tasks.errors import ConfigurationError
from taskx.tasks.model import Task
from taskx.tasks.token import CancelToken
from taskx.tasks.values import Values

if TYPE_CHECKING:
    from taskx.attempt.checkpoints import Checkpoints

#: Calls a function with the context of the call and the params of its tasks; returns what that returns.
Together = Callable[["BatchContext", list[Any]], Any]


class BatchTask:
    """One of the tasks of a call: an item of ``ctx.each``."""

    __slots__ = ("_context",)

    def __init__(self, context: Context) -> None:
        self._context = context

    @property
    def token(self) -> CancelToken:
        """The token of the task: it fires if the task is cancelled, at its time-out, and on a stop."""
        return self._context.token

    @property
    def logger(self) -> TaskLogger:
        """A logger that writes the task's id and type into each line."""
        return self._context.logger

    @property
    def task(self) -> Task:
        """This run's copy of the task."""
        return self._context.task

    @property
    def parents(self) -> list[Task]:
        """The tasks that the task depends on: see :attr:`Context.parents`."""
        return self._context.parents

    def progress(self, percent: float, message: str = "") -> None:
        """Report the progress of this task alone: see :meth:`Context.progress`."""
        self._context.progress(percent, message)

    def emit(self, value: Any) -> None:
        """Show a part of the result of this task alone: see :meth:`Context.emit`."""
        self._context.emit(value)

    def spent(self, **units: int) -> None:
        """Say what this task has taken of the units of its cost: see :meth:`Context.spent`."""
        self._context.spent(**units)


class BatchContext(Context):
    """The context of a call for many tasks: that of an executor with ``batch=``.

    Its token fires when those of all its tasks have fired: all are cancelled, the time-out of the last one
    has passed, or the queue stops. What belongs to a single task, such as steps, is refused.
    """

    __slots__ = ("_contexts",)

    def __init__(self, contexts: Sequence[Context], token: CancelToken, shared: Shared) -> None:
        super().__init__(contexts[0]._task, token, shared)
        self._contexts = contexts

    @property
    def each(self) -> list[BatchTask]:
        """The tasks of the call, in the order of their params."""
        return [BatchTask(context) for context in self._contexts]

    @property
    def _known_as(self) -> tuple[str, str]:
        """The id of the task or the number of tasks, and their type, for log lines."""
        task, number = self._task, len(self._contexts)
        return (task.id if number == 1 else f"{number} tasks", task.type)

    def progress(self, percent: float, message: str = "") -> None:
        """Report the progress of all tasks of the call."""
        for context in self._contexts:
            context.progress(percent, message)

    @property
    def task(self) -> Task:
        """Refused: use ``ctx.each``."""
        self._refuse("ctx.task", "ctx.each has the tasks")

    @property
    def parents(self) -> list[Task]:
        """Refused: use ``ctx.each``."""
        self._refuse("ctx.parents", "each task of ctx.each has its own")

    def emit(self, value: Any) -> None:
        """Refused: use ``ctx.each``."""
        self._refuse("ctx.emit()", "each task of ctx.each has its own")

    def spent(self, **units: int) -> None:
        """Refused: use ``ctx.each``."""
        self._refuse("ctx.spent()", "each task of ctx.each has its own")

    def key(self, name: str) -> str:
        """Refused: use the ids of ``ctx.each``."""
        self._refuse("ctx.key()", "use the ids of ctx.each")

    def _kept(self) -> Checkpoints:
        self._refuse("steps, cursors, transactions and waits", _OWN_TYPE)

    def _refuse_wait(self, what: str) -> None:
        self._refuse(what, _OWN_TYPE)

    def _refuse(self, what: str, instead: str) -> NoReturn:
        raise ConfigurationError(
            f"executor {self._task.type!r} has batch=…: its context is that of all tasks of a call, which "
            f"has no {what}; {instead}"
        )


_OWN_TYPE = "submit a task of another type for what belongs to a single task"


def results_of(returned: Any, count: int) -> Sequence[Any]:
    """Return what an executor has returned for each of ``count`` tasks.

    Raises:
        TypeError: it has returned no list.
        ValueError: it has returned a wrong number of results.
    """
    if isinstance(returned, str | bytes) or not isinstance(returned, Sequence):
        raise TypeError(
            "an executor with batch=… must return a list: a result, or an exception, for each task in "
            f"order; it has returned {returned!r:.80}"
        )
    if len(returned) != count:
        raise ValueError(
            f"the executor has returned {len(returned)} results for {count} tasks: it must return one "
            "result, or one exception, for each task in order"
        )
    return returned


def alone(together: Together, values: Values | None) -> Callable[..., Any]:
    """Return a function that calls an executor for many tasks with a single one."""

    def call(ctx: Context, /, **params: Any) -> Any:
        context = BatchContext([ctx], ctx.token, ctx._shared)
        outer, current.context = current.context, context
        try:
            (result,) = results_of(together(context, [params]), 1)
        finally:
            current.context = outer
        if isinstance(result, BaseException):
            raise result
        return result if values is None else values.encode_result(result)

    return call


def layered(together: Together, layers: Sequence[Callable[..., Any]]) -> Together:
    """Return a function that makes a call for many tasks inside the layers of middleware."""

    def call(ctx: BatchContext, params: list[Any]) -> Any:
        call_next = partial(together, ctx, params)
        for layer in reversed(layers):
            call_next = partial(layer, ctx, ctx.each[0].task, call_next)
        return call_next()

    return call
