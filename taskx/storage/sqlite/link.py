"""A connection to SQLite inside a transaction, and rows with damaged text."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any


class Cursor(sqlite3.Cursor):
    """A cursor inside a transaction: a link."""

    def rows(self, sql: str, values: Sequence[Any] = (), /) -> list[Any]:
        return self.execute(sql, values).fetchall()

    def passing(self, sql: str, /) -> str:
        return sql


def fetch(connection: sqlite3.Connection, sql: str, values: Sequence[Any]) -> list[Any]:
    """Return the rows of a query."""
    try:
        return connection.execute(sql, values).fetchall()
    except sqlite3.OperationalError as error:
        if "decode" not in str(error):
            raise
        return _fetch_broken_text(connection, sql, values)


def _fetch_broken_text(
    connection: sqlite3.Connection, sql: str, values: Sequence[Any]
) -> list[Any]:
    """Return the rows, with invalid UTF-8 as bytes: one damaged record must not hide the others."""
    connection.text_factory = text_or_bytes
    try:
        return connection.execute(sql, values).fetchall()
    finally:
        connection.text_factory = str


def text_or_bytes(stored: bytes) -> str | bytes:
    """Return a stored text, or its bytes if it is not UTF-8."""
    try:
        return stored.decode()
    except UnicodeDecodeError:
        return stored
