"""The context of the executor that the calling thread is inside."""

from __future__ import annotations

import logging
import os
import threading
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from taskx.attempt.context import Context


class _Current(threading.local):
    context: Context | None = None


#: Holds the context of each thread. A forked child is outside of the executor that has forked.
current = _Current()

#: The context of the executor that a coroutine, or what it has called in another thread, belongs to.
awaited: ContextVar[Context | None] = ContextVar("awaited", default=None)

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: setattr(current, "context", None))


def current_context() -> Context | None:
    """Return the context of the executor that the calling thread is inside, None outside of one.

    A coroutine is inside of its executor, and so is what it calls by ``asyncio.to_thread``. A thread that
    an executor has started itself is outside.
    """
    return current.context or awaited.get()


class TaskLogFilter(logging.Filter):
    """A filter that gives every log record the attributes ``task_id`` and ``task_type``.

    They are those of the executor that the logging thread is inside, and empty outside of one. Add the
    filter to a handler, so that it sees the records of all loggers: ``handler.addFilter(TaskLogFilter())``.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Set the attributes that the record lacks, and let every record through."""
        known = ("", "") if (context := current_context()) is None else context._known_as
        for name, value in zip(("task_id", "task_type"), known, strict=True):
            record.__dict__.setdefault(name, value)
        return True
