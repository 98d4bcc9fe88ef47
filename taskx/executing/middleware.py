"""Middleware: what is wrapped around every execution."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from taskx.core.checks import check_plain
from taskx.core.errors import ConfigurationError
from taskx.core.model import Task
from taskx.executing.context import Context

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


def wrapped(
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
