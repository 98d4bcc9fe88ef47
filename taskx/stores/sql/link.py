"""Links: connections inside a transaction, for the statements, and the objects that give them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from taskx.stores.base import Lookup, Rows
from taskx.tasks.writes import Write

T = TypeVar("T")
#: Writes as they were given, and as they are stored; None for work of another kind.
Sent = tuple[Sequence[Write], Sequence[Write]] | None


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


class Links(ABC):
    """Gives a repository its connections: a pool, or the connection of a transaction that is open."""

    @property
    def entered(self) -> bool:
        """True if the calling thread holds a lock for which a transaction would wait for ever."""
        return False

    @abstractmethod
    def rows(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        """Return the rows of a query outside of :meth:`transaction`."""

    def few_rows(self, column: Lookup, sql: str, values: Sequence[Any]) -> list[Any]:
        """Return the rows of a query that finds rows by a lookup column."""
        return self.rows(sql, values)

    @abstractmethod
    def transaction(
        self, work: Callable[[Link], T], durable: bool, sent: Sent = None, single: bool = False
    ) -> T:
        """Do work in one transaction, and return its result; undo it if it raises.

        ``sent`` are the writes that the work applies. ``single`` is True if the work is one statement.
        Raises ``Apart`` if the work does, and else the errors of TaskX.
        """

    @abstractmethod
    def tell_others(self, writes: Sequence[Write]) -> None:
        """Tell other processes of writes that took place: now, or after the commit of a caller."""
