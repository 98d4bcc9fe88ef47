"""The loggers that TaskX itself writes to. An error in logging never stops the work that is logged."""

from __future__ import annotations

import logging
import math
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from taskx.tasks.errors import ConfigurationError, on_main_thread

_MINUTE = 60.0


class GuardedLogger(logging.Logger):
    """A logger that writes to another logger or adapter, and sends errors of that logger to stderr.

    A well-written handler deals with its own errors. But an exception in a filter or in a record factory
    would end the thread that logs, or make it skip the code that follows.
    """

    def __init__(self, logger: Any) -> None:
        super().__init__(logger.name)
        self.logger = logger  #: the logger without the guard
        # Called several times per task, and usually the level is off: this saves one call each time.
        self.isEnabledFor = logger.isEnabledFor  # type: ignore[method-assign]

    def _log(  # type: ignore[override]
        self, level: int, msg: object, args: Any, *, stacklevel: int = 1, **more: Any
    ) -> None:
        """Write one record: all logging methods end here."""
        try:
            self.logger.log(level, msg, *args, stacklevel=stacklevel + 1, **more)
        except BaseException as error:
            if is_for_the_program(error):
                raise
            if more.get("exc_info"):  # perhaps formatting that exception raises
                words = f"{msg} (and its error cannot be shown)"
                self._log(level, words, args, stacklevel=stacklevel + 1)
            else:
                _show(msg, args)


def _show(msg: object, args: Any) -> None:
    """Write a message that could not be logged to stderr, with the error, as failing handlers do."""
    if logging.raiseExceptions and sys.stderr is not None:
        with suppress(BaseException):  # user code can raise any class
            record = logging.LogRecord("", 0, "", 0, msg, args, None)
            sys.stderr.write(f"could not be logged: {record.getMessage()}\n")
            traceback.print_exc()


def is_for_the_program(error: BaseException) -> bool:
    """Return True if an error must end the program: Ctrl-C, or a handler that exits, in the main thread.

    In a thread of TaskX, ``SystemExit`` would silently end only that thread.
    """
    return not isinstance(error, Exception) and on_main_thread()


#: The logger of code that belongs to no queue and so does not know a queue's logger.
log = GuardedLogger(logging.getLogger("taskx"))


def is_told(failures: int) -> bool:
    """Return True if this number of failures in a row is logged: 1, 2, 4, 8 and so on."""
    return failures & (failures - 1) == 0


class Once:
    """Calls a function once for each subject, such as a type of task, in whichever thread."""

    def __init__(self, function: Callable[[str], object]) -> None:
        self._function = function
        self._first: dict[str, object] = {}

    def __call__(self, subject: str) -> None:
        """Call the function with the subject, if this is the first call with it."""
        call = object()
        if self._first.setdefault(subject, call) is call:
            self._function(subject)


class Complaint:
    """A counter of failures in a row, in any thread. It logs them ever more rarely: see :func:`is_told`.

    Args:
        again: logged when the operation works again.
    """

    def __init__(self, log: GuardedLogger, again: str) -> None:
        self._log, self._again = log, again
        self._lock = threading.Lock()
        self._failures = 0

    def make(self, words: str, *what: object) -> None:
        """Count a failure and log it if it is due. ``words`` is the format, ``what`` its arguments."""
        with self._lock:
            self._failures += 1
            failures = self._failures
        if is_told(failures):
            self._log.warning(words, *what)

    def over(self) -> None:
        """Reset the count, and log that the operation works again."""
        if self._failures:
            with self._lock:
                failures, self._failures = self._failures, 0
            if failures:
                self._log.info("%s, after %d failures in a row", self._again, failures)


class Digest:
    """Logs events: each at INFO, and at WARNING once a minute for each kind of them, with their number.

    The first event of a kind is logged at once, at WARNING only: nobody reads the same line twice.

    Args:
        words: what happened, a format of the facts of one event.
        many: the number of events, a format of ``count`` and the facts of the last one.
        now: a clock, in seconds.
    """

    def __init__(self, log: GuardedLogger, words: str, many: str, now: Callable[[], float]) -> None:
        self._log, self._words, self._many, self._now = log, words, many, now
        self._lock = threading.Lock()
        # For each kind: when it was last told, the number of events since, and the facts of the last one.
        self._kinds: dict[str, tuple[float, int, dict[str, Any]]] = {}

    def add(self, kind: str, facts: dict[str, Any]) -> None:
        """Count an event and log it."""
        with self._lock:
            told, count, _ = self._kinds.get(kind, (-math.inf, 0, facts))
            self._kinds[kind] = (told, count + 1, facts)
        if not self._tell(kind, _MINUTE, now=True):
            self._log.log(logging.INFO, self._words, facts)

    def tell(self, after: float = _MINUTE) -> None:
        """Log the number of events of each kind that was last told ``after`` seconds ago."""
        for kind in list(self._kinds):
            self._tell(kind, after)

    def _tell(self, kind: str, after: float, *, now: bool = False) -> bool:
        """Log the number of events of a kind if it is due. Return True if it was one, which happens now."""
        moment = self._now()
        with self._lock:
            told, count, facts = self._kinds.get(kind, (moment, 0, {}))
            if moment - told < after:
                return False
            if count:
                self._kinds[kind] = (moment, 0, facts)
            else:
                self._kinds.pop(kind, None)
        if count == 1:
            when = "" if now else "in the last minute: "
            self._log.log(logging.WARNING, when + self._words, facts)
        elif count:
            self._log.log(logging.WARNING, self._many + self._words, {**facts, "count": count})
        return now and count == 1


def check_logger(logger: Any) -> logging.Logger:
    """Return the logger, or TaskX's own for None. Raises ConfigurationError if it is not a Logger."""
    if logger is None:
        return logging.getLogger("taskx")
    if not isinstance(logger, logging.Logger):
        raise ConfigurationError(
            f"logger must be a Logger, such as logging.getLogger('tasks'), not {logger!r}"
        )
    return logger
