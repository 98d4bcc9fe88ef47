"""The connections of callers, the watch over their transactions, and the transactions of executors."""

from __future__ import annotations

import gc
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from itertools import compress
from typing import Any, TypeVar

import attrs

from taskx.stores import queries
from taskx.stores.base import Repository
from taskx.stores.parts import Forks
from taskx.stores.sql import Link, Links, Sent, SQLRepository, callers
from taskx.stores.sql.callers import savepoints
from taskx.stores.sqlite.connections import FAILURES, require_log
from taskx.stores.sqlite.links import Cursor, FileLinks, connect_to, fetch
from taskx.stores.sqlite.schema import VERSION
from taskx.stores.transactions import Active, Stored, Then, Transactions, Unit
from taskx.tasks.errors import (
    ConfigurationError,
    RepositoryError,
    RepositoryUnavailable,
    TaskxError,
)
from taskx.tasks.writes import Write

_LEGACY = -1  # sqlite3.LEGACY_TRANSACTION_CONTROL, which Python 3.12 added
# The most writes of a transaction that are looked up to know it again.
_FEW = 20
_LONGEST_CHAIN = 5  # collections
# The savepoint at the beginning of an executor's transaction: it is gone if that is not the same any more.
_WHOLE = "taskx_whole"


#: Opens the connection of an executor's transaction.
Connect = Callable[[], sqlite3.Connection]
T = TypeVar("T")


def driver_connection(given: object) -> tuple[sqlite3.Connection, Active]:
    """Return the connection of ``sqlite3`` that an object leads to, as its namesake of ``callers`` does."""
    return callers.driver_connection(given, sqlite3.Connection, "an sqlite3.Connection")


@contextmanager
def own_transaction(outer: FileLinks, connect: Connect | None) -> Iterator[sqlite3.Connection]:
    """Do what :meth:`Transactions.begin` describes."""
    outer.open()
    guard = _Guard()
    connection = _connect(outer, connect)
    try:
        outer.file.check()
        CallersLinks(outer, connection).check()
        if connection.in_transaction:
            raise ConfigurationError("connect() must return a connection that is in no transaction")
        with _translating(outer):
            level = "NORMAL" if outer.durability == "process" else "FULL"
            connection.execute(f"PRAGMA synchronous = {level}")  # whatever connect() has set
            outer.begin_on(connection)
            connection.execute(f"SAVEPOINT {_WHOLE}")
        _forbid_another(connection)
        guard.connection = connection
        # After BEGIN: a statement that the driver has kept from before would not ask the guard.
        connection.set_authorizer(guard.authorize)
        yield connection
        guard.connection = None
        with _translating(outer):
            connection.execute(f"RELEASE {_WHOLE}")
            _commit(connection)
    finally:
        guard.connection = None
        _close(connection)


def _forbid_another(connection: sqlite3.Connection) -> None:
    """Let no change follow by itself after SQLite has rolled back: the driver begins before it, in vain."""
    if getattr(connection, "autocommit", _LEGACY) is True:
        connection.autocommit = _LEGACY  # type: ignore[attr-defined]
    connection.isolation_level = "DEFERRED"


def _close(connection: sqlite3.Connection) -> None:
    """Close a connection. A cursor that is still in use would keep the transaction of a closed one open."""
    try:
        if in_transaction(connection):
            with suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
    finally:
        connection.close()


def _connect(outer: FileLinks, connect: Connect | None) -> sqlite3.Connection:
    if connect is not None:
        connection = connect()
        if not isinstance(connection, sqlite3.Connection):
            raise ConfigurationError(
                f"connect() must return an sqlite3.Connection, not {connection!r:.80}"
            )
        return connection
    return connect_to(outer.file, outer.connections.busy_timeout)


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
    """Forbids the statements that would end a transaction, and all others after SQLite itself has ended it.

    Attributes:
        connection: the connection in the transaction; None before and after that.
    """

    connection: sqlite3.Connection | None = None

    def authorize(self, action: int, *_: object) -> int:
        if (connection := self.connection) is None:
            return sqlite3.SQLITE_OK
        denied = action == sqlite3.SQLITE_TRANSACTION or not connection.in_transaction
        return sqlite3.SQLITE_DENY if denied else sqlite3.SQLITE_OK


@contextmanager
def _translating(outer: FileLinks) -> Iterator[None]:
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
class _Held:
    """The only reference of TaskX to a connection; None after its owner has closed or dropped it."""

    connection: sqlite3.Connection | None

    @property
    def in_transaction(self) -> bool:
        return self.connection is not None and in_transaction(self.connection)

    @property
    def is_left(self) -> bool:
        """True if its owner has closed or dropped the connection: nobody else refers to it.

        A look of another thread is a reference, too: then it is left a moment later.
        """
        if sys.getrefcount(self.connection) <= _references_of_one():  # None has many
            return True
        connection = self.connection
        return connection is not None and _is_closed(connection)

    def let_go(self) -> None:
        """Let go of a connection that is left. That of another thread goes on until it is collected."""
        with suppress(sqlite3.Error, AttributeError):  # it is another thread's, or has just gone
            self.connection.close()  # type: ignore[union-attr]
        self.connection = None

    @property
    def belongs_to_a_thread(self) -> bool:
        """True if only the thread that has made it can use it."""
        refused: list[Exception] = []

        def use() -> None:
            try:
                sqlite3.Connection.cursor(self.connection)  # type: ignore[arg-type]
            except (sqlite3.Error, TypeError) as error:
                refused.append(error)

        another = threading.Thread(target=use, name="taskx-commits")
        another.start()
        another.join()
        return bool(refused)


@attrs.define(eq=False, repr=False)
class _Given(Unit):
    """A transaction on a connection."""

    held: _Held = attrs.field(kw_only=True)
    own: bool = False  # True if TaskX has begun it, for an executor
    ended: bool = False

    def may_be_open(self) -> bool:
        self.ended = self.ended or not self.held.in_transaction
        return not self.ended and super().may_be_open()


def begin(connection: sqlite3.Connection) -> bool:
    """Begin a transaction if a connection is in none. Return True if it was in none.

    Raises:
        ConfigurationError: the connection commits each statement at once.
    """
    if connection.in_transaction:
        return False
    automatic = getattr(connection, "autocommit", _LEGACY)
    if automatic is True or (automatic == _LEGACY and connection.isolation_level is None):
        raise ConfigurationError(
            "connection is in autocommit mode and in no transaction: execute BEGIN IMMEDIATE "
            "first, or call inside transaction.atomic() of Django; nothing was stored"
        )
    sqlite3.Connection.cursor(connection, Cursor).execute("BEGIN IMMEDIATE")
    return True


def in_transaction(connection: sqlite3.Connection) -> bool:
    """Return True if a connection is open and in a transaction."""
    try:
        return connection.in_transaction
    except sqlite3.ProgrammingError:  # it was closed
        return False


class CallersLinks(Links):
    """A link over the connection of a caller, inside its transaction.

    It waits for no lock of this process: the caller may hold SQLite's write lock, for which other threads
    wait.

    Attributes:
        applied: the writes so far whose guards held.
    """

    def __init__(self, outer: FileLinks, connection: sqlite3.Connection) -> None:
        self.applied: list[Write] = []
        self._outer = outer
        self._connection = connection

    # --- the transaction

    @contextmanager
    def joined(self, enter: Callable[[bool], object]) -> Iterator[None]:
        """Take part in the transaction, or in a new one, for a ``with`` block.

        ``enter`` is told before that if a transaction has begun.
        """
        connection = self._connection
        began, counting, savepoint = False, False, f"taskx_{next(savepoints)}"
        text_factory, connection.text_factory = connection.text_factory, str
        try:
            with self._translating():
                self.check()
                # Does each write return a row with the number of its changes, as ``rowcount`` says?
                counting = self._fetch("PRAGMA count_changes") == [(1,)]
                if counting:
                    self._execute("PRAGMA count_changes = 0")
                enter(connection.in_transaction)
                began = begin(connection)
                self._execute(f"SAVEPOINT {savepoint}")
            yield  # what the block itself raises is not translated
            with self._translating():
                self._execute(f"RELEASE {savepoint}")
                if began and not self.applied:
                    self._execute("COMMIT")  # it would keep the write lock for nothing
        except BaseException:
            self._take_back(savepoint)
            if began and connection.in_transaction:
                connection.rollback()
            raise
        finally:
            connection.text_factory = text_factory
            if counting:
                with suppress(sqlite3.Error):  # it was closed
                    self._execute("PRAGMA count_changes = 1")
            del self._connection  # nobody keeps it longer than its owner does

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
        version = outer.schema.check(self._cursor(), path)
        if version == VERSION:
            return
        if self._connection.in_transaction:
            require_log(self._cursor(), path)  # else no queue could make the tables
            raise RepositoryError(
                f"the tables of TaskX in {path} do not exist yet or are of an older version, and cannot be "
                "made in your transaction; nothing was stored. Start the queue, or list some tasks, before "
                "it begins; a test can use taskx.testing.inline(queue)"
            )
        outer.open()

    def _execute(self, sql: str) -> None:
        """Execute a statement that has no rows."""
        self._cursor().execute(sql)

    def _take_back(self, savepoint: str) -> None:
        """Undo what was done since a savepoint, if it is still there."""
        try:
            if not self._connection.in_transaction:
                return  # SQLite has rolled back by itself, for example because the disk is full
            self._execute(f"ROLLBACK TO {savepoint}")
            self._execute(f"RELEASE {savepoint}")
        except sqlite3.ProgrammingError:
            return  # the connection is closed, or is another thread's
        except sqlite3.Error as error:
            if "no such savepoint" not in str(error):  # an interrupt came before or after it
                raise self._outer.translated(error) from error

    @contextmanager
    def _translating(self) -> Iterator[None]:
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
            if "disk is full" in str(error) and not in_transaction(self._connection):
                raise RepositoryUnavailable(
                    f"the disk is full: {self._outer.file.path} cannot grow, and SQLite has rolled back "
                    "the whole transaction of the connection, with all that it had written. Free some space"
                ) from error
            raise self._outer.translated(error) from error

    def tell_others(self, writes: Sequence[Write]) -> None:
        """Note writes: nobody is told of them before the commit."""
        self.applied += writes

    # --- statements

    def _cursor(self) -> Cursor:
        # A subclass of the connection may have changed ``cursor``, and its rows may be of any kind.
        cursor = sqlite3.Connection.cursor(self._connection, Cursor)
        cursor.row_factory = None
        return cursor

    def transaction(
        self, work: Callable[[Link], T], durable: bool, sent: Sent = None, single: bool = False
    ) -> T:
        # Not in a context manager: an interrupt must not come between its exit and the code here.
        with self._translating():
            cursor = self._cursor()
            savepoint = f"taskx_{next(savepoints)}"
            try:
                cursor.execute(f"SAVEPOINT {savepoint}")
                result = work(cursor)
                cursor.execute(f"RELEASE {savepoint}")
                return result
            except BaseException:
                self._take_back(savepoint)
                raise

    def rows(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        with self._translating():
            return self._fetch(sql, values)

    def _fetch(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        return fetch(self._connection, sql, values, self._cursor().execute)


class FileTransactions(Transactions, Forks):
    """The transactions of callers and executors on one file.

    It reads and writes over no connection: it was given them for one call each. It finds out by other means
    that a transaction has ended: its writes can be seen from outside, its connection is in no transaction,
    SQLAlchemy says so, or nobody holds the write lock of the file. For SQLite tells of the commits of other
    connections only as a number that changes.

    There are no weak references to connections. So it looks for those that nobody else refers to, and lets
    go of them: one that was dropped in the middle of a transaction must roll back.

    Args:
        repository: the repository on the file.
        outer: the links of the process to the file.
        connect: opens the connections of executors; None: as the links do.
    """

    def __init__(
        self, repository: SQLRepository, outer: FileLinks, connect: Connect | None
    ) -> None:
        super().__init__("SQLiteRepository", outer.timing)
        self._repository = repository
        self._outer = outer
        self._connect = connect

    def renew_after_fork(self) -> None:
        """Start again. A queue does so, too, but there may be none yet that uses the repository."""
        self.renew()

    def renew(self) -> None:
        self._inherited.append(vars(self).get("_last"))
        super().renew()
        # For each thread the connection that it has given last, unless SQLAlchemy keeps account of it.
        self._last: dict[int, _Held] = {}
        self._dropped = False

    @contextmanager
    def join(self, connection: object, then: Then | None) -> Iterator[SQLRepository]:
        driver, active = driver_connection(connection)
        has_ended = not (in_transaction(driver) or _is_closed(driver))
        if has_ended and any(unit.own and unit.held.connection is driver for unit in self._given):
            raise RepositoryError(
                "SQLite itself has rolled back the transaction of this block, because of an error that the "
                "executor has caught; nothing of the block is stored. Let such an error end the block"
            )
        links = CallersLinks(self._outer, driver)
        inside = self._repository.over(links)
        with links.joined(partial(self.enter, driver, inside)):
            yield inside
        if links.applied and then is not None:
            self.add(driver, active, links.applied, then)

    @contextmanager
    def begin(self) -> Iterator[sqlite3.Connection]:
        if not self._outer.prefix:
            raise ConfigurationError(
                f"{self._outer.file.path} is TaskX's own file, so it has no data of yours, and "
                "ctx.transaction() is not available: use SQLiteRepository(path, prefix='taskx_') on the "
                "application's file"
            )
        with own_transaction(self._outer, self._connect) as connection, self.own(connection):
            yield connection

    def tell_others(self, writes: Sequence[Write]) -> None:
        self._outer.tell_others(writes)

    def refuse_write(self) -> None:
        if self.known and self.inside():
            raise ConfigurationError(
                f"this thread is in a transaction of its own on {self._outer.file.path}, so it would wait "
                "for itself; nothing was stored. Pass connection=..., or commit first"
            )

    def refuse_wait(self) -> None:
        if self.known and self.inside():
            raise ConfigurationError(
                f"this thread is in a transaction of its own on {self._outer.file.path}, and nobody else "
                "can write before it ends, so this call would wait for itself: commit first"
            )

    @contextmanager
    def blocking(self) -> Iterator[None]:
        me = threading.get_ident()
        try:
            if self.inside():
                self._outer.blocking.add(me)
            yield
        finally:
            self._outer.blocking.discard(me)

    def inside(self) -> bool:
        """Return True if the calling thread is in a transaction that holds the write lock of the file.

        It may also be a later transaction on the connection that the thread has given last, unless other
        threads may use that.
        """
        self._let_go()
        if super().inside():
            return True
        last = self._last.get(threading.get_ident())
        return (
            last is not None
            and last.in_transaction
            and not self._outer.lock_is_free()
            and last.belongs_to_a_thread
        )

    def is_open(self, unit: Unit) -> bool:
        return super().is_open(unit) and (unit.active is not None or not self._outer.lock_is_free())

    @property
    def _given(self) -> list[_Given]:
        return [unit for unit in list(self.units) if isinstance(unit, _Given)]

    def enter(self, connection: sqlite3.Connection, inside: Repository, begun: bool) -> None:
        """Note that a connection was given, in a transaction that has ``begun`` or in none.

        ``inside`` is the repository as the transaction sees it. Another transaction that was given on this
        connection has ended if what it wrote cannot be seen there.
        """
        for unit in self._given:
            others = unit.held.connection is not connection or unit.active is not None
            if others or unit.ended:
                continue
            writes = [write for one in list(unit.stored) for write in one.writes]
            if begun and not any(queries.shown(inside, writes[:_FEW])):
                unit.stored.clear()  # it was rolled back
                self.forget(unit)
            elif not begun or any(one.look_up() for one in list(unit.stored)):
                unit.ended = True

    def add(
        self,
        connection: sqlite3.Connection,
        active: Active,
        writes: Sequence[Write],
        then: Then,
    ) -> None:
        """Call ``then`` with those of the writes that are stored, when their transaction has ended."""
        same = [one for one in self._given if one.held.connection is connection]
        held = [*self._last.values(), *(one.held for one in same), _Held(connection)]
        held = [one for one in held if one.connection is connection]
        unit = next(filter(_Given.may_be_open, same), None) or _Given(active, held=held[0])
        if active is None:
            self._last[unit.thread] = unit.held
        unit.ids.update(write.id for write in writes)
        look_up = partial(self._committed, writes)
        self.watch(unit, Stored(look_up, partial(self._tell, then), self.timing, writes))

    @contextmanager
    def own(self, connection: sqlite3.Connection) -> Iterator[None]:
        """Note for a ``with`` block that this thread is in a transaction that TaskX has begun itself."""
        ended = threading.Lock()  # locked at the end: one step, which no interrupt divides
        unit = _Given(lambda: not ended.locked(), held=_Held(connection), own=True)
        self.watch(unit)
        try:
            yield
        finally:
            ended.acquire()
            unit.held.connection = None
            if not unit.stored:
                self.forget(unit)

    def look(self) -> bool:
        more = super().look()
        # Again, for a connection that another thread was looking at when its owner's garbage was collected.
        if self._dropped:
            self._dropped = not self._collect()
        self._let_go()
        return more or bool(self._last) or self._dropped

    def _let_go(self) -> None:
        """Let go of the connections that their owners have closed or dropped."""
        held = {id(one): one for one in [*self._last.values(), *(one.held for one in self._given)]}
        for one in held.values():
            if one.is_left:
                if goes_on := one.in_transaction:
                    # First: the thread that watches may find no connection left.
                    self._dropped = True
                one.let_go()
                if goes_on:
                    self._collect()
        for thread, last in self._last.copy().items():
            if last.connection is None:
                self._last.pop(thread, None)

    def _collect(self) -> bool:
        """Collect garbage: a connection and its cache of statements refer to each other.

        Without the interpreter's lock, the objects of another thread end one after another, each in a
        collection of its own: the connection, its cache, a statement.

        Return False if another thread is in the middle of that, and may miss what has just become garbage.
        """
        for _ in range(_LONGEST_CHAIN):
            garbage: list[object] = []
            garbage.append(garbage)
            del garbage
            if not gc.collect():
                return False
            if self._outer.lock_is_free():
                break
        return True

    def _tell(self, then: Then, done: Sequence[Write]) -> None:
        self._outer.tell_others(done)
        then(done)

    def _committed(self, writes: Sequence[Write]) -> Sequence[Write]:
        """Return those of the writes that are stored."""
        try:
            return [*compress(writes, queries.shown(self._repository, writes))]
        except TaskxError:  # polling finds the tasks
            return ()


def _is_closed(connection: sqlite3.Connection) -> bool:
    try:
        connection.in_transaction  # noqa: B018
    except sqlite3.ProgrammingError:
        return True
    return False
