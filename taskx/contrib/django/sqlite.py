"""Beginnings of transactions in Django's SQLite file, in which other writers take no turns."""

from __future__ import annotations

import time
from collections.abc import Callable

from django.db.utils import OperationalError

from taskx.contrib.django.link import Link
from taskx.stores.sqlite.file import DatabaseFile
from taskx.stores.sqlite.turnstile import Turnstile, until_unlocked
from taskx.tasks.timing import Timing


class Turns:
    """The turns of this process's transactions among those of other nodes on the file."""

    def __init__(self, file: DatabaseFile, timing: Timing) -> None:
        self._turnstile = Turnstile(file, timing)
        self._timing = timing

    def begin(self, link: Link, timeout: float, *steps: Callable[[], object]) -> None:
        """Begin a transaction in some steps, when it is this process's turn and no other program writes.

        A step is called again while another program holds the write lock.
        """
        deadline = time.monotonic() + self._turnstile.enter(timeout)
        link.rows("PRAGMA busy_timeout = 0")
        try:
            for step in steps:
                until_unlocked(step, deadline, OperationalError, self._timing)
        finally:
            link.rows(f"PRAGMA busy_timeout = {timeout * 1000:.0f}")

    @staticmethod
    def set_durable(link: Link, durable: bool) -> None:
        """Choose if the next commits survive a power cut.

        Without a write-ahead log, the removal of the journal is the commit, which only EXTRA syncs.
        """
        if link.durable is not durable:
            link.durable = None  # unknown if an interrupt comes after the next line
            levels = ("NORMAL", "FULL") if link.keeps_log else ("FULL", "EXTRA")
            link.rows(f"PRAGMA synchronous = {levels[durable]}")
            link.durable = durable

    def leave(self) -> None:
        """Let the next process through."""
        self._turnstile.leave()

    def close(self) -> None:
        """Close the lock files."""
        self._turnstile.close()

    def renew_after_fork(self) -> None:
        """Start over in a forked child."""
        self._turnstile.renew_after_fork()
