"""The queues of a site, and their start in processes that serve requests, and in no others."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Collection
from typing import Any

from django.core.signals import request_finished, request_started
from django.utils.autoreload import autoreload_started
from django.utils.module_loading import autodiscover_modules

from taskx import Queue, QueueStopped, TaskxError
from taskx.contrib.django import schedules
from taskx.contrib.django.places import has_tasks, made, place_of
from taskx.contrib.django.settings import DEFAULT, in_tests, ours

_log = logging.getLogger("taskx")
# Seconds between two tries to start a queue.
_PATIENCE = 5.0

# The processes that have started their queues: a fork copies it.
_started_in: dict[int, object] = {}
_again_at = 0.0


def get_queue(alias: str = DEFAULT) -> Queue:
    """Return the queue of an alias: the same one for the whole process.

    It opens no file and starts nothing. It starts with the first request that the process serves, unless
    the option ``embedded`` is False.

    Args:
        alias: a key of ``TASKS``.

    Raises:
        ConfigurationError: there is no such alias, or an option is not valid.
    """
    return place_of(alias).queue


def load_queue(alias: str = DEFAULT, queue_names: Collection[str] = ()) -> Queue:
    """Return the queue of an alias with the executors of all modules ``tasks`` of the installed apps.

    Args:
        alias: a key of ``TASKS``.
        queue_names: the queue names of the tasks of Django that it may run; empty for all. Executors of
            the native API have none, and it runs them in any case.

    Raises:
        ConfigurationError: as :func:`get_queue`.
    """
    place = place_of(alias)
    place.queue_names.update(queue_names)
    autodiscover_modules("tasks")
    if has_tasks():
        from taskx.contrib.django.running import tasks_of

        for task in tasks_of(alias):
            if place.runs(task.queue_name):
                place.register(task)
    return place.queue


def _on_request(sender: Any, **more: Any) -> None:
    """Start the queues at the first request of this process. A later one tries again after an error.

    Often that request imports the first module with tasks, and this one. Then its end starts them.
    """
    pid = os.getpid()
    if pid in _started_in or time.monotonic() < _again_at or _is_test(sender):
        return
    mine = object()
    if _started_in.setdefault(pid, mine) is mine:  # else another thread starts them
        _start(pid)


def _is_test(sender: Any) -> bool:
    """Return True for the request of a test: its client answers it in its own process."""
    client = sys.modules.get("django.test.client")
    handlers = () if client is None else (client.ClientHandler, client.AsyncClientHandler)
    return in_tests() or not isinstance(sender, type) or issubclass(sender, handlers)


def _on_reload(sender: Any, **more: Any) -> None:
    """Start the queues in the process of ``runserver`` that serves, without waiting for a request.

    Django sends the signal in the child of the reloader, when the modules of the addresses are imported.
    So tasks go on after each reload.
    """
    pid = os.getpid()
    if sys.argv[1:2] == ["runserver"] and _started_in.setdefault(pid, sender) is sender:
        _start(pid)


def _start(pid: int) -> None:
    global _again_at
    try:
        for alias in embedded():
            queue = load_queue(alias)
            schedules.declare(alias, queue)
            queue.start()
    except QueueStopped:  # the process ends
        return
    except Exception as error:  # noqa: BLE001  (the request must be answered)
        _again_at = time.monotonic() + _PATIENCE
        _started_in.pop(pid, None)
        # The message of an error of TaskX says what to do, such as migrate.
        unknown = not isinstance(error, TaskxError)
        _log.error("the task queue cannot be started yet: %s", error, exc_info=unknown)


def embedded() -> list[str]:
    """Return the aliases whose queues run in the processes of the site."""
    found = [place_of(alias).settings for alias in {*made(), *ours()}]
    return sorted(one.alias for one in found if one.embedded and not one.inline)


request_started.connect(_on_request, dispatch_uid="taskx")
request_finished.connect(_on_request, dispatch_uid="taskx")
autoreload_started.connect(_on_reload, dispatch_uid="taskx")
