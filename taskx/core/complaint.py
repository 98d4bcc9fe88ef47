"""Saying that something fails, ever more rarely while it goes on failing."""

from __future__ import annotations

import threading

from taskx.core.log import GuardedLogger


def is_told(failures: int) -> bool:
    """Return whether so many failures in a row are told of: the 1st, 2nd, 4th, 8th … is."""
    return failures & (failures - 1) == 0


class Complaint:
    """Failures in a row, of whoever meets them; some are logged, as :func:`is_told` says.

    Args:
        log: where they are logged.
    """

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
