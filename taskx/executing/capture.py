"""What an executor logs, kept for the record of its task.

One handler at the root hears all loggers, and finds by the thread whose lines they are. It is there only
while an executor runs whose lines are kept.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from taskx.core import payload
from taskx.core.lifecycle import MAX_LOG

#: Longest line that is kept, in characters.
MAX_LINE = MAX_LOG // 8

_formatter = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
_formatter.converter = time.gmtime
_formatter.default_time_format, _formatter.default_msec_format = "%Y-%m-%dT%H:%M:%S", "%s.%03dZ"


class Capture:
    """The last lines that a run logged of at least a level, at most :data:`MAX_LOG` characters.

    ``prefix`` is what ``ctx.logger`` begins its lines with, and a record need not say.
    """

    def __init__(self, level: int, prefix: str) -> None:
        self.level = level
        self._prefix = prefix
        self._lines: deque[str] = deque()
        self._size = 0
        self._lock = threading.Lock()

    def add(self, record: logging.LogRecord) -> None:
        """Keep a record, unless its level is too low; it must not raise."""
        if record.levelno < self.level:
            return
        try:
            text = _formatter.format(record).replace(f": {self._prefix}", ": ", 1)
            line = payload.clean_text(text, MAX_LINE) + "\n"
        except Exception:  # noqa: BLE001  (a message that cannot be formatted; whatever logs it shows it)
            line = f"<a {record.levelname} message that cannot be formatted>\n"
        with self._lock:
            self._lines.append(line)
            self._size += len(line)
            while self._size > MAX_LOG and len(self._lines) > 1:
                self._size -= len(self._lines.popleft())

    def text(self) -> str:
        """What was kept so far."""
        with self._lock:
            return "".join(self._lines)


class CapturedLogger(logging.Logger):
    """What ``ctx.logger`` logs to where lines are kept: they are, and go on to the queue's logger.

    So they are also kept where that one does not let them through, or does not hand them on.
    """

    def __init__(self, logger: logging.Logger, capture: Capture) -> None:
        super().__init__(logger.name)
        self._logger = logger
        self._capture = capture

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802  (logging's name)
        return level >= self._capture.level or self._logger.isEnabledFor(level)

    def callHandlers(self, record: logging.LogRecord) -> None:  # noqa: N802  (logging's name)
        self._capture.add(record)
        record.taskx_kept = True
        if self._logger.isEnabledFor(record.levelno):
            self._logger.handle(record)


class _Router(logging.Handler):
    """Gives each record to the run whose executor is at work in this thread."""

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
        """Have what this thread logs kept there."""
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
        """Without the handler's lock, for which threads would wait."""
        capture = getattr(self._thread, "capture", None)
        if capture is not None and not hasattr(record, "taskx_kept"):
            capture.add(record)
        if (last := logging.lastResort) and record.levelno >= last.level and self._alone(record):
            last.handle(record)
        return True

    def _alone(self, record: logging.LogRecord) -> bool:
        """Whether nobody else handles a record, so that logging would have shown it itself."""
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
