"""The statements that SQLite runs, with their threads, recorded by its trace callback."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

READS = ("SELECT",)
WRITES = ("INSERT", "UPDATE", "DELETE")
COMMITS = ("COMMIT", "END")


class Seen:
    """The statements of every connection opened in :func:`watching`, in order."""

    def __init__(self) -> None:
        self._log: list[tuple[int, str]] = []

    def note(self, connection: sqlite3.Connection, sql: str) -> None:
        """Record a statement. SQLite calls this before each one, on the thread that runs it.

        A write in no transaction commits itself, so it counts as a commit, too.
        """
        thread, verb = threading.get_ident(), sql.split(None, 1)[0].upper()
        self._log.append((thread, verb))
        if verb in WRITES and not connection.in_transaction:
            self._log.append((thread, COMMITS[0]))

    def clear(self) -> None:
        """Forget all statements."""
        self._log.clear()

    def count(self, verbs: tuple[str, ...], *, not_on: int | None = None) -> int:
        """Return how many statements of these kinds ran, on threads other than ``not_on``."""
        return sum(verb in verbs and thread != not_on for thread, verb in list(self._log))


@contextmanager
def watching() -> Iterator[Seen]:
    """Record the statements of every connection that is opened in the block."""
    seen = Seen()
    connect = sqlite3.connect

    def connect_and_watch(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(*args, **kwargs)
        connection.set_trace_callback(partial(seen.note, connection))
        return connection

    sqlite3.connect = connect_and_watch  # type: ignore[assignment]
    try:
        yield seen
    finally:
        sqlite3.connect = connect
