"""Schedules that a site declares in its modules: :func:`schedule`."""

from __future__ import annotations

from typing import Any

from taskx import ConfigurationError, PayloadError
from taskx.queue.queue import Queue
from taskx.tasks.ticks import Every

# The arguments of Queue.schedule by alias and name; a module that is reloaded declares them again.
_declared: dict[str, dict[str, tuple[tuple[Any, ...], dict[str, Any]]]] = {}


def schedule(
    name: str,
    spec: str | Every,
    task: Any,
    params: dict[str, Any] | None = None,
    /,
    *,
    backend: str | None = None,
    **options: Any,
) -> None:
    """Declare a schedule, such as in a module ``tasks`` of an app.

    It is stored when a queue starts, in a worker or in a process that serves requests, and not by
    ``manage.py migrate`` and other commands. ``Queue.schedule`` checks its arguments then.

    Args:
        name: a unique name.
        spec: the times of the ticks: a cron expression of five fields, or ``taskx.every(seconds)``.
        task: a task of Django, or a type.
        params: the keyword arguments of its function.
        backend: the alias in ``TASKS``; that of the task by default.
        options: further options of ``Queue.schedule``, such as ``tz``, ``misfire`` and ``overlap``.
    """
    type = task
    if not isinstance(task, str):
        from taskx.contrib.django.tasks import type_of  # needs a Django that has tasks

        type = type_of(task)
    alias = str(backend or getattr(task, "backend", "default"))
    _declared.setdefault(alias, {})[name] = (name, spec, type, params or {}), options


def declare(alias: str, queue: Queue) -> None:
    """Declare the schedules of an alias to its queue, also those of tasks that this process does not run.

    Raises:
        ConfigurationError: a schedule is not valid. The message names it.
        TaskxError: the other errors of ``Queue.schedule``.
    """
    for name, (given, options) in _declared.get(alias, {}).items():
        queue.declare(given[2])
        try:
            queue.schedule(*given, **options)
        except (ConfigurationError, PayloadError, TypeError) as error:
            raise ConfigurationError(f"schedule {name!r}: {error}") from error
