"""Transactions of callers: the connection that an object leads to, and a link inside its transaction."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from taskx.stores.sql.link import Link, Links, Sent
from taskx.stores.transactions import Active
from taskx.tasks.errors import ConfigurationError, RepositoryUnavailable, TaskxError
from taskx.tasks.writes import Write

T = TypeVar("T")
C = TypeVar("C")

#: The errors of SQLAlchemy and Django for a database that cannot be reached now.
_AWAY = frozenset(("InterfaceError", "OperationalError"))

# Each savepoint has its own name: one that an interrupt has left behind must not be rolled back to.
savepoints = itertools.count()


def driver_connection(given: object, kind: type[C], name: str) -> tuple[C, Active]:
    """Return the driver's connection that an object is or leads to, and what tells if it is in use.

    A ``Session`` or ``Connection`` of SQLAlchemy leads to one, and a connection of Django. SQLAlchemy hands
    its connections on to other threads, but knows when a transaction has ended.

    Raises:
        ConfigurationError: it leads to none of this kind, belongs to another thread, or is closed.
        RepositoryUnavailable: it cannot connect now.
    """
    try:
        led = _led(given, kind)
    except Exception as error:
        package, _, _ = type(error).__module__.partition(".")
        if package not in ("sqlalchemy", "django"):
            raise
        raised = RepositoryUnavailable if type(error).__name__ in _AWAY else ConfigurationError
        raise raised(f"connection cannot be used: {error}; nothing was stored") from error
    if led is None:
        raise ConfigurationError(
            f"connection must be {name}, or a Session or Connection of SQLAlchemy or a "
            f"connection of Django that leads to one, not {given!r:.80}; nothing was stored"
        )
    return led


def _led(found: Any, kind: type[C]) -> tuple[C, Active] | None:
    active: Active = None
    for _ in range(4):
        if isinstance(found, kind):
            return found, active
        if hasattr(found, "sync_session") or hasattr(found, "sync_connection"):
            return None  # its methods must be awaited
        if hasattr(found, "get_bind") and callable(getattr(found, "connection", None)):  # a Session
            found = found.connection()
            continue
        if hasattr(found, "exec_driver_sql"):
            active = _begin_in_sqlalchemy(found)
        elif hasattr(found, "validate_thread_sharing"):
            found.validate_thread_sharing()
            found.ensure_connection()
        found = getattr(found, "driver_connection", None) or getattr(found, "connection", None)
    return None


def _begin_in_sqlalchemy(connection: Any) -> Callable[[], bool]:
    """Let a Connection know that it is in a transaction: its ``commit`` would do nothing otherwise.

    Return a function that tells if this transaction is open.
    """
    if not connection.in_transaction():
        connection.begin()
    transaction = weakref.ref(connection.get_transaction())
    return lambda: (found := transaction()) is not None and found.is_active


class CallersLinks(Links):
    """A link over the connection of a caller, inside its transaction on a server.

    Args:
        link: the connection.
        translated: returns TaskX's error for an error of the driver; None for any other error.
        lost: is called if what was done cannot be taken back, as the connection is lost.

    Attributes:
        applied: the writes so far whose guards held.
        wrote: True if a write took place, also one of a note.
    """

    wrote = False

    def __init__(
        self,
        link: Link,
        translated: Callable[[Exception], TaskxError | None],
        lost: Callable[[], object] = lambda: None,
    ) -> None:
        self.applied: list[Write] = []
        self._link = link
        self._translated = translated
        self._lost = lost

    def tell_others(self, writes: Sequence[Write]) -> None:
        """Note writes: others are told of them after the commit."""
        self.applied += writes

    def transaction(
        self, work: Callable[[Link], T], durable: bool, sent: Sent = None, single: bool = False
    ) -> T:
        with self.savepoint(), self._translating():
            results: Any = work(self._link)
        # What was undone counts as a change of the connection, so its own count does not tell.
        self.wrote = self.wrote or any(results)
        return cast("T", results)

    def rows(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        with self._translating():
            return [*self._link.rows(sql, values)]

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        """Undo what is done inside if it raises. The errors of the block stay as they are."""
        name = f"taskx_{next(savepoints)}"
        self.execute(f"SAVEPOINT {name}")
        try:
            yield
            self.execute(f"RELEASE SAVEPOINT {name}")
        except BaseException:
            try:
                self.execute(f"ROLLBACK TO SAVEPOINT {name}")
                self.execute(f"RELEASE SAVEPOINT {name}")
            except TaskxError:  # the connection is lost, or the database has rolled back everything
                self._lost()
            raise

    def execute(self, sql: str) -> None:
        """Execute a statement that has no rows."""
        with self._translating():
            self._link.execute(sql)

    @contextmanager
    def _translating(self) -> Iterator[None]:
        """Raise TaskX's errors for those of the driver."""
        try:
            yield
        except Exception as error:
            if (translated := self._translated(error)) is not None:
                raise translated from error
            raise
