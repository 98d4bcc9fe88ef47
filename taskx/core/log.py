"""What TaskX logs itself: where that cannot be logged, what it tells of goes on all the same."""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from contextlib import suppress
from typing import Any

from taskx.core.errors import ConfigurationError, on_main_thread


class GuardedLogger(logging.Logger):
    """Logs to another logger, or to an adapter of one; what that raises goes nowhere but to stderr.

    A handler sees to its own errors, if it is written by the book. A filter that raises, or a factory of
    records, would end the thread that logs, or keep it from what comes after.
    """

    def __init__(self, logger: Any) -> None:
        super().__init__(logger.name)
        self.logger = logger  #: the same, unguarded
        # Asked several times for each task, whose lines nobody wants as a rule: it costs no call more.
        self.isEnabledFor = logger.isEnabledFor  # type: ignore[method-assign]

    def _log(  # type: ignore[override]
        self, level: int, msg: object, args: Any, *, stacklevel: int = 1, **more: Any
    ) -> None:
        """Where all methods that log come together."""
        try:
            self.logger.log(level, msg, *args, stacklevel=stacklevel + 1, **more)
        except BaseException as error:
            if is_for_the_program(error):
                raise
            if more.get("exc_info"):  # perhaps it is that which raises when it is looked at
                words = f"{msg} (and its error cannot be shown)"
                self._log(level, words, args, stacklevel=stacklevel + 1)
            else:
                _show(msg, args)


def _show(msg: object, args: Any) -> None:
    """Show on stderr what could not be logged, and why, as handlers do that fail."""
    if logging.raiseExceptions and sys.stderr is not None:
        with suppress(BaseException):  # of a class of the user's, too
            record = logging.LogRecord("", 0, "", 0, msg, args, None)
            sys.stderr.write(f"could not be logged: {record.getMessage()}\n")
            traceback.print_exc()


def is_for_the_program(error: BaseException) -> bool:
    """Whether it is to end the program, and does: Ctrl-C, or a handler that exits at a grave error.

    In a thread of ours ``SystemExit`` would end that thread alone, in silence.
    """
    return not isinstance(error, Exception) and on_main_thread()


#: For what knows no queue, and so not the logger of one.
log = GuardedLogger(logging.getLogger("taskx"))


def is_told(failures: int) -> bool:
    """Return whether so many failures in a row are told of: the 1st, 2nd, 4th, 8th … is."""
    return failures & (failures - 1) == 0


class Complaint:
    """Failures in a row, of whoever meets them, logged ever more rarely: see :func:`is_told`."""

    def __init__(self, log: GuardedLogger) -> None:
        self._log = log
        self._lock = threading.Lock()
        self._failures = 0

    def make(self, words: str, *what: object) -> None:
        """Count a failure, and log it if it is its turn; ``words`` has a place for each of ``what``."""
        with self._lock:
            self._failures += 1
            failures = self._failures
        if is_told(failures):
            self._log.warning(words, *what)

    def over(self) -> None:
        """It works again."""
        if self._failures:
            with self._lock:
                self._failures = 0


def check_logger(logger: Any) -> logging.Logger:
    """A logger, or ours for None; ConfigurationError says what is wrong with it."""
    if logger is None:
        return logging.getLogger("taskx")
    if not isinstance(logger, logging.Logger):
        raise ConfigurationError(
            f"logger must be a Logger, such as logging.getLogger('tasks'), not {logger!r}"
        )
    return logger
