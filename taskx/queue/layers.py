"""Middleware around the storing of submitted tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from taskx.attempt.registry import Layer, Middleware
from taskx.queue.intake import Intake
from taskx.tasks.model import Task
from taskx.tasks.options import OnConflict
from taskx.tasks.writes import Insert

#: Store tasks, and return their ids.
Store = Callable[[Sequence[Task]], Sequence[str]]


class LayeredIntake:
    """An intake inside the ``submit`` methods of middleware."""

    def __init__(self, intake: Intake, layers: Sequence[Middleware]) -> None:
        self._intake = intake
        self._layers = layers

    def accept(
        self,
        task: Task,
        priority: int | None = None,
        on_conflict: OnConflict = "reject",
        **more: Any,
    ) -> str:
        """Do the same as :meth:`Intake.accept`."""

        def store(tasks: Sequence[Task]) -> Sequence[str]:
            (given,) = tasks
            return [self._intake.accept(given, priority, on_conflict, **more)]

        (task_id,) = self._inside(store, [task])
        return task_id

    def accept_plain(self, type: str, params: Any) -> None:
        """Return None: middleware is given tasks."""

    def accept_many(
        self, tasks: Iterable[Task], *, spill: bool = False, also: Sequence[Insert] = ()
    ) -> Sequence[str]:
        """Do the same as :meth:`Intake.accept_many`."""
        return self._inside(partial(self._intake.accept_many, spill=spill, also=also), [*tasks])

    def _inside(self, store: Store, tasks: Sequence[Task]) -> Sequence[str]:
        for layer in reversed(self._layers):
            store = _around(store, layer)
        return store(tasks)


def _around(store: Store, layer: Middleware) -> Store:
    return lambda tasks: layer.submit(tasks, store)


def layered(intake: Intake, middleware: Iterable[Layer]) -> Intake | LayeredIntake:
    """Return the intake inside the middleware that overrides ``submit``; the intake itself if none does."""
    layers = [
        layer
        for layer in middleware
        if isinstance(layer, Middleware) and type(layer).submit is not Middleware.submit
    ]
    return LayeredIntake(intake, layers) if layers else intake
