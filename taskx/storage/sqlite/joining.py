"""The connections of callers, the watch over their transactions, and the transactions of executors."""

from __future__ import annotations

import os
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from itertools import compress
from typing import Any, Protocol

import attrs

from taskx.core.errors import ConfigurationError, RepositoryError, TaskxError
from taskx.core.writes import Write
from taskx.storage import queries
from taskx.storage.base import Repository, Then
from taskx.storage.commits import Stored, pause
from taskx.storage.sqlite.connections import FAILURES
from taskx.storage.sqlite.file import DatabaseFile


class Outer(Protocol):
    """The parts of a repository that a transaction of an executor uses."""

    file: DatabaseFile
    busy_timeout: float
    durability: Any
    connect: Callable[[], sqlite3.Connection] | None

    def open(self) -> None: ...

    def begin_on(self, connection: sqlite3.Connection, /) -> None: ...

    def translated(self, error: Exception, /) -> TaskxError: ...


def driver_connection(given: object) -> sqlite3.Connection:
    """Return the connection of ``sqlite3`` that an object is or leads to.

    A ``Session`` or ``Connection`` of SQLAlchemy leads to one, and a connection of Django.

    Raises:
        ConfigurationError: it leads to none, or belongs to another thread.
    """
    found: Any = given
    for _ in range(4):
        if isinstance(found, sqlite3.Connection):
            return found
        if hasattr(found, "get_bind") and callable(getattr(found, "connection", None)):  # a Session
            found = found.connection()
            continue
        if hasattr(found, "exec_driver_sql"):
            _begin_in_sqlalchemy(found)
        elif hasattr(found, "validate_thread_sharing"):
            _open_in_django(found)
        found = getattr(found, "driver_connection", None) or getattr(found, "connection", None)
    raise ConfigurationError(
        "connection must be an sqlite3.Connection, or a Session or Connection of SQLAlchemy or a "
        f"connection of Django that leads to one, not {given!r:.80}; nothing was stored"
    )


def _begin_in_sqlalchemy(connection: Any) -> None:
    """Let a Connection know that it is in a transaction: its ``commit`` would do nothing otherwise."""
    if not connection.in_transaction():
        connection.begin()


def _open_in_django(connection: Any) -> None:
    """Open a connection of Django, if no query has done so, and check that it belongs to this thread."""
    try:
        connection.validate_thread_sharing()
    except Exception as error:  # a class of Django, which need not be imported for this
        raise ConfigurationError(
            f"connection cannot be used: {error}; nothing was stored"
        ) from error
    connection.ensure_connection()


@contextmanager
def own_transaction(
    outer: Outer, check: Callable[[sqlite3.Connection], object]
) -> Iterator[sqlite3.Connection]:
    """Do what :meth:`Repository.transaction` describes; ``check`` raises if a connection is of no use."""
    outer.open()
    guard = _Guard()
    connection = _connect(outer)
    try:
        outer.file.check()
        check(connection)
        connection.set_authorizer(guard.authorize)
        with _translating(outer):
            if outer.durability == "process":
                connection.execute("PRAGMA synchronous = NORMAL")
            outer.begin_on(connection)
        guard.locked = True
        yield connection
        guard.locked = False
        with _translating(outer):
            _commit(connection)
    finally:
        guard.locked = False
        _close(connection)


def _close(connection: sqlite3.Connection) -> None:
    """Close a connection. A cursor that is still in use would keep the transaction of a closed one open."""
    try:
        if _in_transaction(connection):
            with suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
    finally:
        connection.close()


def _connect(outer: Outer) -> sqlite3.Connection:
    if outer.connect is not None:
        connection = outer.connect()
        if not isinstance(connection, sqlite3.Connection):
            raise ConfigurationError(
                f"connect() must return an sqlite3.Connection, not {connection!r:.80}"
            )
        return connection
    from urllib.parse import quote  # slow to load

    return sqlite3.connect(
        f"file://{quote(os.fsencode(outer.file.path))}?mode=rw",
        uri=True,
        timeout=outer.busy_timeout,
        isolation_level=None,
    )


def _commit(connection: sqlite3.Connection) -> None:
    try:
        connection.execute("COMMIT")
    except sqlite3.Error as error:
        if connection.in_transaction:
            raise
        # SQLite has ended the transaction itself, one way or the other.
        raise _InDoubt(str(error)) from error


class _InDoubt(Exception):
    """A COMMIT failed, and no transaction is open."""


class _Guard:
    """Forbids the statements that would end a transaction, as long as it is locked."""

    locked = False

    def authorize(self, action: int, *_: object) -> int:
        denied = self.locked and action == sqlite3.SQLITE_TRANSACTION
        return sqlite3.SQLITE_DENY if denied else sqlite3.SQLITE_OK


@contextmanager
def _translating(outer: Outer) -> Iterator[None]:
    try:
        yield
    except _InDoubt as error:
        translated = outer.translated(error)
        if isinstance(translated, RepositoryError):
            translated.in_doubt = True
        raise translated from error.__cause__
    except FAILURES as error:
        raise outer.translated(error) from error


@lru_cache
def _references_of_one() -> int:
    """Return the reference count of a connection that one name refers to: its cache refers to it, too."""
    connection = sqlite3.connect(":memory:")
    try:
        return sys.getrefcount(connection)
    finally:
        connection.close()


@attrs.define(eq=False, repr=False)
class _Given:
    """A connection that a caller has given; None if its owner has closed or dropped it."""

    connection: sqlite3.Connection | None
    stored: list[Stored] = attrs.field(factory=list)

    @property
    def dropped(self) -> bool:
        """True if nobody else refers to the connection."""
        return sys.getrefcount(self.connection) <= _references_of_one()

    @property
    def in_transaction(self) -> bool:
        return self.connection is not None and _in_transaction(self.connection)

    def end(self) -> None:
        """Note that the last transaction of the connection has ended."""
        for one in list(self.stored):
            one.end()


class Callers:
    """Watches the callers' transactions, and tells of their writes when they are committed.

    SQLite reports the commits of other connections only as a number that changes. So a thread looks at
    each connection every few milliseconds as long as one is in a transaction with writes of TaskX. Nothing
    depends on it: nodes also find the tasks by polling.

    It also remembers the connection that each thread has given last. There are no weak references to
    connections. So the thread looks for those that nobody else refers to, and lets go of them: one that was
    dropped in the middle of a transaction must roll back.
    """

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._timing = repository.timing
        self._given: list[_Given] = []
        self._threads: dict[int, _Given] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        # Released to wake the thread. An interrupt inside a method of an Event could leave it locked.
        self._bell = threading.Lock()
        self._bell.acquire()

    def note(self, connection: sqlite3.Connection) -> None:
        """Remember the connection of a transaction that the calling thread is in."""
        with self._lock:
            given = next((one for one in self._given if one.connection is connection), None)
            if given is None:
                given = _Given(connection)
                self._given.append(given)
            self._threads[threading.get_ident()] = given
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="taskx-commits", daemon=True)
                with suppress(RuntimeError):  # no thread can be started: polling finds the tasks
                    self._thread.start()

    def inside(self) -> bool:
        """Return True if the calling thread is in a transaction on a connection that it has given."""
        return self.open_connection() is not None

    def open_connection(self) -> sqlite3.Connection | None:
        """Return the connection that the calling thread has given and is in a transaction on, if any."""
        given = self._threads.get(threading.get_ident())
        if given is not None and given.dropped:
            self._let_go()
        return given.connection if given is not None and given.in_transaction else None

    def watch(self, connection: sqlite3.Connection, writes: Sequence[Write], then: Then) -> None:
        """Call ``then`` with those of the writes that are stored, when the transaction has ended."""
        for given in list(self._given):
            if given.connection is connection:
                given.stored.append(Stored(partial(self._committed, writes), then, self._timing))
        with suppress(RuntimeError):  # it was released already
            self._bell.release()

    def ended(self, connection: sqlite3.Connection) -> None:
        """Note that the last transaction of a connection has ended, as it is in none."""
        for given in list(self._given):
            if given.connection is connection:
                given.end()

    def _run(self) -> None:
        while True:
            for given in list(self._given):
                self._look_up(given)
            self._let_go()
            with self._lock:
                if not self._given:
                    self._thread = None
                    return
            since = [one.since for given in self._given for one in given.stored]
            if since:
                time.sleep(pause(min(since), self._timing))
            else:
                self._bell.acquire(timeout=self._timing.connections_every)

    def _look_up(self, given: _Given) -> None:
        if given.stored and not given.in_transaction:
            given.end()
        for one in list(given.stored):
            if one.settled():
                given.stored.remove(one)

    def _let_go(self) -> None:
        """Forget the connections that their owners have closed or dropped."""
        left: list[
            sqlite3.Connection
        ] = []  # until the lock is free, as their finalizers may do anything
        with self._lock:
            for given in self._given:
                if given.connection is not None and (given.dropped or is_closed(given.connection)):
                    left.append(given.connection)
                    given.connection = None
            self._given = [one for one in self._given if one.connection is not None or one.stored]
            self._threads = {
                thread: one
                for thread, one in self._threads.items()
                if one.connection is not None or one.stored
            }

    def _committed(self, writes: Sequence[Write]) -> Sequence[Write]:
        """Return those of the writes that are stored, and tell other processes of them."""
        repository = self._repository
        try:
            shown = queries.shown(repository, writes)
        except TaskxError:  # polling finds the tasks
            return ()
        if done := [*compress(writes, shown)]:
            repository.tell_others(done)
        return done


def _in_transaction(connection: sqlite3.Connection) -> bool:
    try:
        return connection.in_transaction
    except sqlite3.ProgrammingError:  # it was closed
        return False


def is_closed(connection: sqlite3.Connection) -> bool:
    """Return True if a connection was closed; any thread may ask."""
    try:
        connection.in_transaction  # noqa: B018
    except sqlite3.ProgrammingError:
        return True
    return False
