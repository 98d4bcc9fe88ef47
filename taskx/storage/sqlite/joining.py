"""Calls inside a transaction that the caller has opened on the same file.

All statements of such a call go over the caller's connection. It waits for no lock of this process: the
caller may hold SQLite's write lock, for which other threads wait.
"""

from __future__ import annotations

import os
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from itertools import compress
from typing import Any, TypeVar
from urllib.parse import quote

import attrs

from taskx.core.errors import ConfigurationError, RepositoryError, RepositoryUnavailable, TaskxError
from taskx.core.writes import Write
from taskx.storage import queries
from taskx.storage.base import Repository, Then
from taskx.storage.sqlite import schema
from taskx.storage.sqlite.connections import FAILURES
from taskx.storage.sqlite.repository import SQLiteRepository, text_or_bytes

T = TypeVar("T")

# Seconds between two looks at the open transactions, and the longest pause when they take long.
_SHORTEST, _LONGEST = 0.001, 0.01
# Seconds after which a transaction that seems to be open is looked up, and the longest time between two
# look-ups. Its connection may be in the next transaction already.
_FIRST_LOOK_UP, _LAST_LOOK_UP = 0.02, 1.0
# Seconds between two looks while no transaction is open.
_IDLE = 0.25
# Seconds for which a transaction that has ended is looked up: SQLite says so before a commit is complete.
_COMMITTING = 1.0
_LEGACY = -1  # sqlite3.LEGACY_TRANSACTION_CONTROL, which Python 3.12 added


def driver_connection(given: object) -> sqlite3.Connection:
    """Return the connection of ``sqlite3`` that an object is or leads to.

    A ``Session`` or ``Connection`` of SQLAlchemy leads to one.

    Raises:
        ConfigurationError: it leads to none.
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
        found = getattr(found, "driver_connection", None) or getattr(found, "connection", None)
    raise ConfigurationError(
        "connection must be an sqlite3.Connection, or a Session or Connection of SQLAlchemy that is "
        f"connected to one, not {given!r:.80}; nothing was stored"
    )


def _begin_in_sqlalchemy(connection: Any) -> None:
    """Let a Connection know that it is in a transaction: its ``commit`` would do nothing otherwise."""
    if not connection.in_transaction():
        connection.begin()


@contextmanager
def join(outer: SQLiteRepository, given: object, then: Then | None) -> Iterator[Joined]:
    """Do what :meth:`Repository.joined` describes."""
    connection = driver_connection(given)
    made = Joined(outer, connection)
    began = False
    text_factory, connection.text_factory = connection.text_factory, str
    try:
        with made.translating():
            made.check()
            began = made.begin()
        with made.savepoint("taskx"):  # what the block itself raises is not translated
            yield made
    except BaseException:
        if began and connection.in_transaction:
            connection.rollback()
        raise
    finally:
        connection.text_factory = text_factory
        made.let_go()
    if made.applied and then is not None:
        outer.callers.watch(connection, made.applied, then)


@contextmanager
def own_transaction(outer: SQLiteRepository) -> Iterator[sqlite3.Connection]:
    """Do what :meth:`Repository.transaction` describes."""
    outer.open()
    connection = _connect(outer)
    guard = _Guard()
    try:
        _check_own(outer, connection)
        connection.set_authorizer(guard.authorize)
        if outer.durability == "process":
            connection.execute("PRAGMA synchronous = NORMAL")
        with _translating(outer):
            outer.begin_on(connection)
        guard.locked = True
        yield connection
        guard.locked = False
        with _translating(outer):
            _commit(connection)
    finally:
        connection.close()  # which rolls back what was not committed


def _connect(outer: SQLiteRepository) -> sqlite3.Connection:
    if outer.connect is not None:
        connection = outer.connect()
        if not isinstance(connection, sqlite3.Connection):
            raise ConfigurationError(
                f"connect() must return an sqlite3.Connection, not {connection!r:.80}"
            )
        return connection
    return sqlite3.connect(
        f"file://{quote(os.fsencode(outer.file.path))}?mode=rw",
        uri=True,
        timeout=outer.busy_timeout,
        isolation_level=None,
    )


def _check_own(outer: SQLiteRepository, connection: sqlite3.Connection) -> None:
    outer.file.check()
    Joined(outer, connection).check()
    if connection.in_transaction:
        raise ConfigurationError("connect() must return a connection that is in no transaction")


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
def _translating(outer: SQLiteRepository) -> Iterator[None]:
    try:
        yield
    except _InDoubt as error:
        translated = outer.translated(error)
        if isinstance(translated, RepositoryError):
            translated.in_doubt = True
        raise translated from error.__cause__
    except FAILURES as error:
        raise outer.translated(error) from error


class Joined(SQLiteRepository):
    """The repository as a transaction of the caller sees it.

    Attributes:
        applied: the writes so far whose guards held.
    """

    def __init__(self, outer: SQLiteRepository, connection: sqlite3.Connection) -> None:
        Repository.__init__(self, outer.clock)
        self.codecs = outer.codecs
        self.path, self.durability, self.prefix = outer.path, outer.durability, outer.prefix
        self.applied: list[Write] = []
        self._outer = outer
        self._connection = connection
        self._cursor_class = schema.cursor_class(outer.prefix)
        self._wakeups = _Noting(self.applied)  # type: ignore[assignment]

    def let_go(self) -> None:
        """Drop the connection, so that this object keeps it no longer than its owner does."""
        del self._connection

    # --- the transaction

    def check(self) -> None:
        """Check that the connection is open on the repository's file, in this thread.

        Raises:
            ConfigurationError: it is not.
            RepositoryError: the tables do not exist, or are of another version.
        """
        outer = self._outer
        try:
            files = {name: file for _, name, file in self._fetch("PRAGMA database_list")}
        except sqlite3.ProgrammingError as error:
            raise ConfigurationError(
                f"connection cannot be used: {error}; nothing was stored"
            ) from error
        if not outer.file.is_at(path := files["main"]):
            raise ConfigurationError(
                f"connection is open on {path or 'a database in memory'}, but the tasks are in "
                f"{outer.file.path}; nothing was stored. Keep them in one file: "
                "SQLiteRepository(path, prefix='taskx_')"
            )
        version = outer.schema.check(self._cursor(), path)  # type: ignore[arg-type]
        if version == schema.VERSION:
            return
        if self._connection.in_transaction:
            raise RepositoryError(
                f"the tables of TaskX in {path} do not exist yet or are of an older version, and cannot be "
                "made in your transaction; nothing was stored. Start the queue, or list some tasks, before "
                "it begins"
            )
        outer.open()

    def begin(self) -> bool:
        """Begin a transaction if the connection is in none. Return True if it did.

        Raises:
            ConfigurationError: the connection commits each statement at once.
        """
        connection = self._connection
        if not connection.in_transaction:
            self._outer.callers.ended(connection)
            automatic = getattr(connection, "autocommit", _LEGACY)
            if automatic is True or (automatic == _LEGACY and connection.isolation_level is None):
                raise ConfigurationError(
                    "connection is in autocommit mode and in no transaction: execute BEGIN IMMEDIATE "
                    "first; nothing was stored"
                )
            self._outer.note_caller(connection)
            self._cursor().execute("BEGIN IMMEDIATE")
            return True
        self._outer.note_caller(connection)
        return False

    @contextmanager
    def savepoint(self, name: str) -> Iterator[sqlite3.Cursor]:
        """Undo what is done inside if it raises."""
        cursor = self._cursor()
        with self.translating():
            cursor.execute(f"SAVEPOINT {name}")
        try:
            yield cursor
            with self.translating():
                cursor.execute(f"RELEASE {name}")
        except BaseException:
            # SQLite rolls back by itself, for example if the disk is full.
            if self._connection.in_transaction:
                cursor.execute(f"ROLLBACK TO {name}")
                cursor.execute(f"RELEASE {name}")
            raise

    @contextmanager
    def translating(self) -> Iterator[None]:
        """Raise TaskX's error for an error of SQLite."""
        try:
            yield
        except FAILURES as error:
            if "locked" in str(error):
                raise RepositoryUnavailable(
                    f"{self._outer.file.path} is locked by another writer, and this transaction could not "
                    "wait longer; nothing was stored. Begin it with BEGIN IMMEDIATE, and set the "
                    "connection's timeout"
                ) from error
            raise self._outer.translated(error) from error

    # --- statements

    def _cursor(self) -> sqlite3.Cursor:
        # A subclass of the connection may have changed ``cursor``, and its rows may be of any kind.
        cursor: sqlite3.Cursor = sqlite3.Connection.cursor(self._connection, self._cursor_class)
        cursor.row_factory = None
        return cursor

    def _transact(
        self,
        work: Callable[[sqlite3.Cursor], T],
        durable: bool,
        writes: Sequence[Write] | None = None,
    ) -> T:
        with self.translating(), self.savepoint("taskx_write") as cursor:
            return work(cursor)

    def _rows(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        with self.translating():
            return self._fetch(sql, values)

    def _fetch(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        try:
            return self._cursor().execute(sql, values).fetchall()
        except sqlite3.OperationalError as error:
            if "decode" not in str(error):
                raise
        self._connection.text_factory = text_or_bytes
        try:
            return self._cursor().execute(sql, values).fetchall()
        finally:
            self._connection.text_factory = str

    _rows_near = _rows

    @property
    def entered(self) -> bool:
        return False


class _Noting:
    """Notes the writes whose guards held. Nobody is told of them before the commit."""

    def __init__(self, applied: list[Write]) -> None:
        self._applied = applied

    def send(self, writes: Sequence[Write], results: Sequence[bool], *, to_own: bool) -> None:
        del to_own
        self._applied.extend(compress(writes, results))


@attrs.define(eq=False)
class _Stored:
    """Writes in a transaction that is open, as far as is known."""

    writes: Sequence[Write]
    then: Then
    since: float = attrs.field(factory=time.monotonic)
    look_up_at: float = 0.0
    ended_at: float | None = None

    def __attrs_post_init__(self) -> None:
        self.look_up_at = self.since + _FIRST_LOOK_UP

    def end(self) -> None:
        """Note that the transaction has ended, so it is looked up at once."""
        if self.ended_at is None:
            self.ended_at = self.look_up_at = time.monotonic()

    def put_off(self) -> bool:
        """Set the time of the next look-up. Return False if no further one is needed."""
        now = time.monotonic()
        if self.ended_at is None:
            self.look_up_at = now + min(_LAST_LOOK_UP, now - self.since)
            return True
        self.look_up_at = now + max(_SHORTEST, now - self.ended_at)
        return now < self.ended_at + _COMMITTING


@lru_cache
def _references_of_one() -> int:
    """Return the reference count of a connection that one name refers to: its cache refers to it, too."""
    connection = sqlite3.connect(":memory:")
    try:
        return sys.getrefcount(connection)
    finally:
        connection.close()


@attrs.define(eq=False)
class _Given:
    """A connection that a caller has given; None if its owner has closed or dropped it."""

    connection: sqlite3.Connection | None
    stored: list[_Stored] = attrs.field(factory=list)

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

    def __init__(self, repository: SQLiteRepository) -> None:
        self._repository = repository
        self._given: list[_Given] = []
        self._threads: dict[int, _Given] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._bell = threading.Event()

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
        given = self._threads.get(threading.get_ident())
        if given is not None and given.dropped:
            self._let_go()
        return given is not None and given.in_transaction

    def watch(self, connection: sqlite3.Connection, writes: Sequence[Write], then: Then) -> None:
        """Call ``then`` with those of the writes that are stored, when the transaction has ended."""
        for given in list(self._given):
            if given.connection is connection:
                given.stored.append(_Stored(writes, then))
        self._bell.set()

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
                age = time.monotonic() - min(since)
                time.sleep(min(_LONGEST, max(_SHORTEST, age / 20)))
            else:
                self._bell.wait(_IDLE)
            self._bell.clear()

    def _look_up(self, given: _Given) -> None:
        if given.stored and not given.in_transaction:
            given.end()
        for one in list(given.stored):
            if time.monotonic() >= one.look_up_at and (self._tell(one) or not one.put_off()):
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

    def _tell(self, one: _Stored) -> bool:
        """Tell of the writes that are stored. Return True if any is."""
        repository = self._repository
        try:
            shown = queries.shown(repository, one.writes)
        except TaskxError:  # polling finds the tasks
            return False
        if done := [*compress(one.writes, shown)]:
            repository.tell_others(done)
            one.then(done)
        return bool(done)


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
