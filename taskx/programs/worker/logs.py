"""The log of the processes of a worker."""

from __future__ import annotations

import logging
import os
import threading
from typing import Any
from weakref import ref


def set_up_log(level: str) -> None:
    """Write the log to stderr, unless the program has set up logging itself, and each record once."""
    if not (logging.getLogger().handlers or logging.getLogger("taskx").handlers):
        # The journal of systemd adds the time itself.
        when = "" if "JOURNAL_STREAM" in os.environ else "%(asctime)s "
        logging.basicConfig(
            level=level, format=f"{when}[%(process)d] %(levelname)s %(name)s: %(message)s"
        )
    write_once(logging.Logger.manager)


def write_once(manager: logging.Manager) -> None:
    """Let each stream get a record once, from the first of its handlers.

    A program may have handlers of one stream for a logger and for those above it. Django, for example, has
    a handler for the logger ``django``, which writes to the same stream as that of the root.
    """
    for logger in (manager.root, *manager.loggerDict.values()):
        for handler in getattr(logger, "handlers", ()):  # a placeholder has none
            if isinstance(handler, logging.StreamHandler) and not any(
                isinstance(found, _Once) for found in handler.filters
            ):
                handler.addFilter(_Once(handler))


class _Once(logging.Filter):
    """The last filter of a handler: it refuses a record that another handler has written to the stream."""

    _last = threading.local()

    def __init__(self, handler: logging.StreamHandler[Any]) -> None:
        super().__init__()
        self._handler = handler

    def filter(self, record: logging.LogRecord) -> bool:
        """Return False if the thread has just written the record to the stream."""
        last = self._last
        # A weak reference: a record holds its exception, and so the variables of a task.
        if getattr(last, "record", lambda: None)() is not record:
            last.record, last.streams = ref(record), []
        stream = self._handler.stream
        if stream in last.streams:  # equal, not identical: the stream of Flask's handler is a proxy
            return False
        last.streams.append(stream)
        return True
