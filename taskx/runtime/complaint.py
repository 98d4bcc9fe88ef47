"""Saying that something fails, ever more rarely while it goes on failing."""

from __future__ import annotations

import threading

from taskx.core.log import GuardedLogger


class Complaint:
    """Failures in a row, of whoever meets them; the 1st, 2nd, 4th, 8th … is logged.

    Args:
        log: where they are logged.
    """

    def __init__(self, log: GuardedLogger) -> None:
        self._log = log
        self._lock = threading.Lock()
        self._failures = 0

    def make(self, words: str, error: Exception) -> None:
        """Count a failure, and log it if it is its turn; ``words`` has a place for the error."""
        with self._lock:
            self._failures += 1
            failures = self._failures
        if failures & (failures - 1) == 0:
            self._log.warning(words, error)

    def over(self) -> None:
        """It works again."""
        if self._failures:
            with self._lock:
                self._failures = 0
