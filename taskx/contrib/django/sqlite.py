"""Beginnings of transactions in Django's SQLite file, in which other writers take no turns."""

from __future__ import annotations

import os
import time
from typing import Any

from django.db.utils import OperationalError

from taskx.contrib.django.connections import Link
from taskx.storage.sqlite.file import DatabaseFile
from taskx.storage.sqlite.turnstile import Turnstile

#: The prefix of TaskX's tables, and of the folder of its lock files next to the database.
PREFIX = "taskx_"
# Seconds between two tries to begin. SQLite's own busy handler sleeps up to 0.1 s.
_SHORTEST, _LONGEST = 0.0001, 0.001


def file_of(settings: dict[str, Any]) -> DatabaseFile | None:
    """Return the file of a database in SQLite; None if it is in memory."""
    name = os.fspath(settings["NAME"])
    if ":memory:" in name or "mode=memory" in name:
        return None
    return DatabaseFile(name.removeprefix("file:").partition("?")[0], create=False, prefix=PREFIX)


class Turns:
    """The turns of this process's transactions among those of other nodes on the file."""

    def __init__(self, file: DatabaseFile) -> None:
        self._turnstile = Turnstile(file)

    def begin(self, link: Link, timeout: float) -> None:
        """Begin a transaction, when it is this process's turn and no other program writes."""
        deadline = time.monotonic() + self._turnstile.enter(timeout)
        pause = _SHORTEST
        link.rows("PRAGMA busy_timeout = 0")
        try:
            while True:
                try:
                    link.rows_of_none("BEGIN IMMEDIATE")
                    return
                except OperationalError as error:
                    if "locked" not in str(error) or time.monotonic() >= deadline:
                        raise
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST)
        finally:
            link.rows(f"PRAGMA busy_timeout = {timeout * 1000:.0f}")

    def leave(self) -> None:
        """Let the next process through."""
        self._turnstile.leave()

    def close(self) -> None:
        """Close the lock files."""
        self._turnstile.close()

    def renew_after_fork(self) -> None:
        """Start over in a forked child."""
        self._turnstile.leave = dict
