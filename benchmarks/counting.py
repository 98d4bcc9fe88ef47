"""Which statements SQLite runs, and on which thread: seen through its trace callback."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

READS = ("SELECT",)
WRITES = ("INSERT", "UPDATE", "DELETE")
COMMITS = ("COMMIT", "END")


class Seen:
    """The statements of every connection opened in :func:`watching`, in order."""

    def __init__(self) -> None:
        self._log: list[tuple[int, str]] = []

    def note(self, sql: str) -> None:
        """SQLite calls this before each statement, on the thread that runs it."""
        self._log.append((threading.get_ident(), sql.split(None, 1)[0].upper()))

    def clear(self) -> None:
        """Forget what was seen."""
        self._log.clear()

    def count(self, verbs: tuple[str, ...], *, not_on: int | None = None) -> int:
        """How many statements of these kinds were run, on threads other than ``not_on``."""
        return sum(verb in verbs and thread != not_on for thread, verb in list(self._log))


@contextmanager
def watching() -> Iterator[Seen]:
    """Watch every connection that is opened from now on."""
    seen = Seen()
    connect = sqlite3.connect

    def connect_and_watch(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        connection = connect(*args, **kwargs)
        connection.set_trace_callback(seen.note)
        return connection

    sqlite3.connect = connect_and_watch  # type: ignore[assignment]
    try:
        yield seen
    finally:
        sqlite3.connect = connect
