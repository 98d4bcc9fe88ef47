"""A connection inside a transaction, as the statements need it."""

from __future__ import annotations

from typing import Any, Protocol

from taskx.storage.base import Rows


class Apart(Exception):
    """Writes that share a statement must be applied one by one, in another transaction.

    Only some of them held, and the statement does not tell which; or one takes a unique value.
    """


class Taken(Apart):
    """A statement was refused because another row has the same value in a unique column."""


class Done(Protocol):
    """A statement that was executed: ``rowcount`` is the number of rows that it changed."""

    @property
    def rowcount(self) -> int: ...


class Link(Protocol):
    """A connection inside a transaction. Its statements have ``?`` for their values."""

    def rows(self, sql: str, values: Any = (), /) -> Rows:
        """Execute a statement, and return its rows."""
        ...

    def execute(self, sql: str, values: Any = (), /) -> Done:
        """Execute a statement.

        Raises:
            Taken: a unique value is taken, and the statement does not say what to do then.
        """
        ...

    def executemany(self, sql: str, rows: Any, /) -> Done:
        """Execute a statement for each of some rows of values."""
        ...

    def passing(self, sql: str, /) -> str:
        """Return a ``SELECT … FOR UPDATE`` that passes over rows which other transactions have locked."""
        return f"{sql} SKIP LOCKED"
