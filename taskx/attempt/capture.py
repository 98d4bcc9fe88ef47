"""The log lines of an executor, kept for the record of its task.

One handler at the root logger gets the records of all loggers. The thread that logs tells it which run
a record belongs to. The handler is installed only while an executor with a kept log runs.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from taskx.tasks import payload
from taskx.tasks.lifecycle import MAX_LOG

#: The longest line that is kept, in characters.
MAX_LINE = MAX_LOG // 8

# Most characters that are stored in each second while a run goes on.
_EACH_SECOND = MAX_LOG // 4

_formatter = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
_formatter.converter = time.gmtime
_formatter.default_time_format, _formatter.default_msec_format = "%Y-%m-%dT%H:%M:%S", "%s.%03dZ"
_TIME = len("2026-01-01T00:00:00.000Z")


class Capture:
    """The last lines of a run with at least a given level, at most :data:`MAX_LOG` characters.

    ``prefix`` is the beginning of each line of ``ctx.logger``; it is left out here, as the record of the
    task says the same. ``beat`` is called for each line that is kept.
    """

    def __init__(self, level: int, prefix: str, beat: Callable[[], object] = int) -> None:
        self._beat = beat
        self.level = level
        self._prefix = prefix
        self._lines: deque[str] = deque()
        self._size = 0
        # True if there are lines that ``new`` has not returned, and the time from which on it does.
        self._fresh, self._due = False, math.inf
        self._lock = threading.Lock()

    def add(self, record: logging.LogRecord) -> None:
        """Keep a log record, unless its level is too low. Never raises an exception."""
        if record.levelno < self.level:
            return
        self._beat()
        try:
            text = _formatter.format(record).replace(f": {self._prefix}", ": ", 1)
            line = payload.clean_text(text, MAX_LINE) + "\n"
        except Exception:  # noqa: BLE001  (the handlers of the program report a message with a bad format)
            line = f"<a {record.levelname} message that cannot be formatted>\n"
        with self._lock:
            self._lines.append(line)
            self._size += len(line)
            self._fresh = True
            self._shorten()

    def add_all(self, other: Capture) -> None:
        """Keep the lines of another capture, too."""
        with self._lock, other._lock:
            both = [*self._lines, *other._lines]
            both.sort(key=lambda line: line[:_TIME])
            self._lines, self._size = deque(both), self._size + other._size
            self._shorten()

    def _shorten(self) -> None:
        while self._size > MAX_LOG and len(self._lines) > 1:
            self._size -= len(self._lines.popleft())

    def new(self, now: float) -> str | None:
        """Return the lines to store while the run goes on; None if it is not time, or all are stored.

        It is time a second after this has first seen a new line; for a long log, which is stored whole, up
        to four seconds.
        """
        with self._lock:
            if not self._fresh:
                return None
            if self._due == math.inf:
                self._due = now + max(1.0, self._size / _EACH_SECOND)
            if now < self._due:
                return None
            self._fresh, self._due = False, math.inf
            return "".join(self._lines)

    def not_stored(self) -> None:
        """Note that what ``new`` returned last was not stored."""
        self._fresh = True

    def text(self) -> str:
        """Return the lines that were kept so far."""
        with self._lock:
            return "".join(self._lines)


class CapturedLogger(logging.Logger):
    """The logger behind ``ctx.logger`` when lines are kept: keeps each line, then passes it on.

    The next logger is the queue's. A line is kept even if the queue's logger filters it out, or does not
    propagate it.
    """

    def __init__(self, logger: logging.Logger, capture: Capture) -> None:
        super().__init__(logger.name)
        self._logger = logger
        self.capture = capture

    def captured_by(self, capture: Capture) -> CapturedLogger:
        """Return a logger that passes lines on to the same logger, and keeps them elsewhere."""
        return CapturedLogger(self._logger, capture)

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802  (logging's name)
        return level >= self.capture.level or self._logger.isEnabledFor(level)

    def callHandlers(self, record: logging.LogRecord) -> None:  # noqa: N802  (logging's name)
        self.capture.add(record)
        record.taskx_kept = True
        if self._logger.isEnabledFor(record.levelno):
            self._logger.handle(record)


#: What keeps the log lines of a coroutine.
in_coroutine: ContextVar[Capture | None] = ContextVar("in_coroutine", default=None)


class _Router(logging.Handler):
    """A handler that gives each log record to the run whose executor works in this thread."""

    def __init__(self) -> None:
        super().__init__()
        self._renew()

    def _renew(self) -> None:
        logging.getLogger().removeHandler(self)
        self._counting = threading.Lock()
        self._users = 0
        self._thread = threading.local()

    @contextmanager
    def capturing(self, capture: Capture) -> Iterator[None]:
        """Keep in ``capture`` what this thread logs inside the block."""
        with self._counting:
            self._users += 1
            if self._users == 1:
                logging.getLogger().addHandler(self)
        before, self._thread.capture = getattr(self._thread, "capture", None), capture
        try:
            yield
        finally:
            self._thread.capture = before
            with self._counting:
                self._users -= 1
                if self._users == 0:
                    logging.getLogger().removeHandler(self)

    def handle(self, record: logging.LogRecord) -> bool:
        """Handle a record without the handler's lock, so that threads do not wait for one another."""
        capture = getattr(self._thread, "capture", None)
        if capture is None:
            capture = in_coroutine.get()
        if capture is not None and not hasattr(record, "taskx_kept"):
            capture.add(record)
        if (last := logging.lastResort) and record.levelno >= last.level and self._alone(record):
            last.handle(record)
        return True

    def _alone(self, record: logging.LogRecord) -> bool:
        """Return True if no other handler gets the record: without this one, logging would print it."""
        logger: logging.Logger | None = logging.getLogger(record.name)
        while logger is not None:
            if any(handler is not self for handler in logger.handlers):
                return False
            logger = logger.parent
        return True


_router = _Router()
capturing = _router.capturing

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_router._renew)
