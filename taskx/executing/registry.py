"""The registry: the types that a queue runs, wrapped in its middleware, and those that it only accepts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from taskx.core.checks import check_plain
from taskx.core.errors import ConfigurationError, UnknownTaskType
from taskx.core.model import Task
from taskx.core.options import Options
from taskx.core.payload import DEFAULT_MAX_SIZE
from taskx.core.rate import Limit
from taskx.executing.context import Context
from taskx.executing.executors import Executor, Registered, TaskExecutor, entry_of

#: What ``Queue(..., middleware=[...])`` takes: an instance of :class:`Middleware`, or a function.
Layer = Callable[[Context, Task, Callable[[], Any]], Any]


class Middleware:
    """Is wrapped around every execution of a queue: ``Queue(..., middleware=[...])``.

    Called in the worker's thread with the context and the task of the run (``ctx.task``). The first
    of several is the outermost. A function of the same signature will do as well.
    """

    def __call__(self, ctx: Context, task: Task, call_next: Callable[[], Any]) -> Any:
        """Do something before and after ``call_next()``, which is the next one or the executor.

        What is returned is the task's result, and what is raised is the attempt's error, as if the
        executor had returned or raised it. So return what ``call_next()`` returns.
        """
        return call_next()


class Registry:
    """The types that a queue runs or, where they were only declared, accepts.

    ``require`` refuses what the repository cannot do, given in words.
    """

    def __init__(
        self,
        middleware: Sequence[Layer] = (),
        require: Callable[[str], object] = lambda what: None,
        max_payload_size: int = DEFAULT_MAX_SIZE,
    ) -> None:
        self._middleware = middleware
        self._require = require
        self.max_payload_size = max_payload_size
        #: What is known of each type that it runs.
        self.registered: dict[str, Registered] = {}
        #: The limits of those types that have any.
        self.limits: dict[str, Limit] = {}
        self._declared: set[str] = set()

    @property
    def types(self) -> tuple[str, ...]:
        """The types that it runs."""
        return tuple(self.registered)

    @property
    def isolated(self) -> frozenset[str]:
        """The types that it runs in child processes."""
        return frozenset(
            type for type, entry in self.registered.items() if entry.options.isolation is not None
        )

    def runs(self, type: str) -> bool:
        """Whether this queue has an executor for the type."""
        return type in self.registered

    def register(self, executor: TaskExecutor | Executor[Any, Any], options: Options) -> None:
        """Add an executor; options given here win over its own.

        ``ConfigurationError`` if its type is taken, it is none, or a child process could not find it.
        """
        entry = entry_of(executor, options)
        if entry.type in self.registered:
            raise ConfigurationError(
                f"type {entry.type!r} has an executor already: make a new queue, or choose another type"
            )
        if entry.log_level is not None:
            self._require("logs (capture_log)")
        if entry.options.limit_scope == "global":
            self._require('limits of all nodes (limit_scope="global")')
        limit = entry.options.limit
        function, takes_context = entry.function, entry.takes_context
        if entry.options.isolation is not None:
            # Not every program starts processes.
            from taskx.executing.process.isolation import Isolated

            function, takes_context = Isolated(executor, entry, self.max_payload_size), True
        if self._middleware:
            function = _wrapped(function, self._middleware, takes_context=takes_context)
            takes_context = True
        if limit is not None:  # first: as soon as it is registered, its tasks are taken
            self.limits[entry.type] = limit
        self.registered[entry.type] = entry._replace(function=function, takes_context=takes_context)

    def declare(self, type: str) -> None:
        """Accept a type whose executor lives in another process."""
        self._declared.add(type)

    def get(self, type: str) -> Registered | None:
        """The executor of a type, None if it is only declared; UnknownTaskType if it is neither."""
        entry = self.registered.get(type)
        if entry is None and type not in self._declared:
            known = ", ".join(sorted({*self.registered, *self._declared})) or "none"
            raise UnknownTaskType(
                f"no executor is registered for type {type!r} (known: {known}); register one, or "
                "declare() the type if it runs in another process"
            )
        return entry


def check_middleware(layers: Iterable[Layer]) -> tuple[Layer, ...]:
    """The layers; ConfigurationError if one of them cannot be called, is a class, or is async."""
    known = tuple(layers)
    for layer in known:
        if not callable(layer) or inspect.isclass(layer):
            raise ConfigurationError(
                "middleware must be instances of Middleware, or functions of (ctx, task, call_next), "
                f"not {layer!r}"
            )
        check_plain(layer, f"middleware {layer!r}")
    return known


def _wrapped(
    function: Callable[..., Any], layers: Sequence[Layer], *, takes_context: bool
) -> Callable[..., Any]:
    """Return a function that takes the context, and calls another one with layers around it."""

    def call(ctx: Context, /, **_: Any) -> Any:
        params = ctx.task.params  # itself, as a layer may change what is in it
        call_next = partial(_call, function, (ctx,) if takes_context else (), params)
        for layer in reversed(layers):
            call_next = partial(layer, ctx, ctx.task, call_next)
        return call_next()

    return call


def _call(function: Callable[..., Any], given: tuple[Context, ...], params: dict[str, Any]) -> Any:
    return function(*given, **params)
