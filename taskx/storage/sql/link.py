"""A connection inside a transaction, as the statements need it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from taskx.storage.base import Rows

Values = Sequence[Any]


class Apart(Exception):
    """Writes that share a statement must be applied one by one, in another transaction.

    Only some of them held, and the statement does not tell which; or one takes a unique value.
    """


class Taken(Apart):
    """A statement was refused because another row has the same value in a unique column."""


class Link(ABC):
    """A connection inside a transaction. Its statements have ``?`` for their values."""

    @abstractmethod
    def rows(self, sql: str, values: Values = ()) -> Rows:
        """Execute a statement, and return its rows."""

    @abstractmethod
    def execute(self, sql: str, values: Values = ()) -> int:
        """Execute a statement, and return the number of rows that it changed.

        Raises:
            Taken: a unique value is taken, and the statement does not say what to do then.
        """

    @abstractmethod
    def execute_each(self, sql: str, rows: Sequence[Values]) -> int:
        """Execute a statement for each of some rows of values, and return the number of changed rows."""

    def passing(self, sql: str) -> str:
        """Return a ``SELECT … FOR UPDATE`` that passes over rows which other transactions have locked."""
        return f"{sql} SKIP LOCKED"
