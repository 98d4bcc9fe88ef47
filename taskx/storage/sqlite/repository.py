"""The repository on one SQLite file."""

from __future__ import annotations

import itertools
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from taskx.core import lifecycle
from taskx.core.checks import check_number
from taskx.core.clock import SYSTEM_CLOCK, Clock
from taskx.core.codec import Codec
from taskx.core.errors import (
    ConfigurationError,
    RepositoryError,
    RepositoryUnavailable,
    SchemaMismatch,
    TaskxError,
)
from taskx.core.model import CONDITIONS
from taskx.core.timing import DEFAULT_TIMING, Timing
from taskx.core.writes import Write
from taskx.liveness.locks import KernelLocks
from taskx.storage import queries
from taskx.storage.base import Fields, Listener, Lookup, Reentered, Rows, tell_of_forks
from taskx.storage.sql import Link, Sent, SQLRepository
from taskx.storage.sqlite import schema, turnstile
from taskx.storage.sqlite.connections import FAILURES, Connection, Connections
from taskx.storage.sqlite.dialect import FREE_PAGES, statements
from taskx.storage.sqlite.file import DatabaseFile
from taskx.storage.sqlite.joining import FileTransactions, connect_to, driver_connection
from taskx.storage.sqlite.turnstile import Turnstile, until_unlocked
from taskx.storage.sqlite.wakeups import Wakeups
from taskx.storage.transactions import Then

if TYPE_CHECKING:
    from taskx.core.verdict import Check

Durability = Literal["accepted", "full", "process"]
T = TypeVar("T")

_LEGACY = -1  # sqlite3.LEGACY_TRANSACTION_CONTROL, which Python 3.12 added
_FEW = 32  # rows that may be read on the writing connection, which keeps writers waiting
_KEPT_PAGES = 2000  # free pages (2 KiB in a new file) that are not worth a vacuum
_PAGES_AT_ONCE = 200
_NEAR = frozenset({"id", "unique_lock", "waiting_on"})  # columns with few rows for each value


class SQLiteRepository(SQLRepository):
    """A repository in one SQLite file, which any number of processes on this host may share.

    The file is opened at the first operation, and created if it is missing. It is in WAL mode, so readers
    never wait for writers. It must be on a local file system. While it is open, it is identified by its
    real path and its inode. If it is moved, deleted or replaced, every operation raises
    ``RepositoryUnavailable``.

    Args:
        path: the path of the file. A relative path is made absolute at once.
        durability: the commits that a power cut may undo. The death of the process never undoes a commit.

            - ``"accepted"``: a power cut undoes nothing that a caller was told (submit, cancel, requeue,
              delete). It may undo the last outcomes; those tasks run again.
            - ``"full"``: a power cut undoes nothing.
            - ``"process"``: a power cut may undo the last commits.
        prefix: what the names of the tables begin with, such as ``"taskx_"``, to have them in the
            application's own file. That must exist and be in WAL mode. TaskX changes nothing else in it.
            Empty: the file is TaskX's own.
        busy_timeout: seconds to wait for another process's write before an error is raised.
        create: True to create a missing file; with a prefix, missing tables. With False, operations raise
            ``RepositoryUnavailable`` if something is missing, and nothing is created.
        clock: the clock for the timestamps that the eight methods write.
        codec: the codec or codecs of params, results and checkpoints. The first one writes, all of them
            read.
        connect: a function that opens the ``sqlite3.Connection`` of each ``ctx.transaction()``, with
            settings such as ``PRAGMA foreign_keys``. It is closed after the transaction.

    Raises:
        ConfigurationError: an argument is not valid.
    """

    conditions = CONDITIONS
    one_host = True

    def __init__(
        self,
        path: str | os.PathLike[str],
        durability: Durability = "accepted",
        *,
        prefix: str = "",
        busy_timeout: float | timedelta = 10.0,
        create: bool = True,
        clock: Clock = SYSTEM_CLOCK,
        codec: Codec | Iterable[Codec] | None = None,
        connect: Callable[[], sqlite3.Connection] | None = None,
        timing: Timing = DEFAULT_TIMING,
    ) -> None:
        self.path = os.fspath(path) if isinstance(path, (str, os.PathLike)) else ""
        if not isinstance(self.path, str) or self.path in ("", ":memory:") or "\0" in self.path:
            raise ConfigurationError(
                f"path must be the path of a file, not {path!r}; "
                "use MemoryRepository to keep tasks in memory"
            )
        if durability not in get_args(Durability):
            raise ConfigurationError(
                f"durability must be one of {', '.join(get_args(Durability))}, not {durability!r}"
            )
        self.durability = durability
        seconds = check_number(busy_timeout, "busy_timeout")
        if not isinstance(create, bool):
            raise ConfigurationError(f"create must be True or False, not {create!r}")
        if connect is not None and not (callable(connect) and prefix):
            raise ConfigurationError(
                f"connect must be a function, and requires a prefix, not {connect!r:.80}"
            )
        self.connect = connect
        self.prefix = prefix
        self.schema = schema.OWN if prefix == "" else schema.PrefixedSchema(prefix)
        super().__init__(statements(prefix), clock, codec, timing)
        self.file = self._file = DatabaseFile(self.path, create, prefix)
        self._connections = Connections(self._file, seconds, self.schema, timing)
        self.busy_timeout = seconds
        self._short_wait = timing.short_wait
        self._turnstile = Turnstile(self._file, timing)
        self._wakeups = Wakeups(self._file, timing)
        self._write_lock = threading.RLock()
        # The writing connection's number and its count of others' commits; and the number of our own
        # commits.
        self._seen, self._commits = (0, 0), 0
        self._newer: SchemaMismatch | None = None
        self._inherited: list[object] = []  # the parent's, which a forked child never closes
        tell_of_forks(self)

    def _make_transactions(self) -> FileTransactions:
        #: The transactions as this class uses them, also if others extend them.
        self.callers = FileTransactions(self, partial(queries.shown, self), partial(_join, self))
        return self.callers

    def __repr__(self) -> str:
        prefix = f", prefix={self.prefix!r}" if self.prefix else ""
        return f"SQLiteRepository({self.path!r}, durability={self.durability!r}{prefix})"

    # --- writing

    @property
    def entered(self) -> bool:
        return self._write_lock._is_owned()  # type: ignore[attr-defined, no-any-return]

    def _transact(
        self,
        work: Callable[[Link], T],
        durable: bool,
        sent: Sent | None = None,
        *,
        single: bool = False,
    ) -> T:
        """Do work in one transaction. Nothing is committed if it raises.

        If another process has migrated the file to a newer schema, only writes that end a run or give a
        task back are allowed.
        """
        if self._write_lock._is_owned():  # type: ignore[attr-defined]
            raise Reentered
        with self._write_lock:
            connection = self._connections.writer()
            if connection.in_transaction:  # signals interrupted the last transaction twice
                self._roll_back(connection)
                connection = self._connections.writer()  # a new one if the rollback failed
            self._file.check()
            try:
                cursor = connection.cursor(_Cursor)
                timeout = self._connections.busy_timeout
                hurry = self.callers.blocked
                left = self._turnstile.enter(self.timing.file_free_within if hurry else timeout)
                full = self.durability == "full" or (durable and self.durability == "accepted")
                if connection.synchronous != (wanted := "FULL" if full else "NORMAL"):
                    self._set_synchronous(connection, wanted)
                if self.prefix:
                    self._begin_among_others(connection, left)
                elif timeout - left < self._short_wait:
                    cursor.execute("BEGIN IMMEDIATE")
                else:
                    self._begin_within(cursor, left)
                result = work(cursor)
                self._refuse_if_newer(connection, sent)
                cursor.execute("COMMIT")
                self._commits += 1
                return result
            except BaseException as error:
                self._undo(connection, error)
                raise
            finally:
                self._turnstile.leave()

    def _begin_within(self, cursor: _Cursor, seconds: float) -> None:
        """Begin a transaction; SQLite waits at most so long for other programs."""
        cursor.execute(f"PRAGMA busy_timeout = {seconds * 1000:.0f}")
        try:
            cursor.execute("BEGIN IMMEDIATE")
        finally:
            cursor.execute(f"PRAGMA busy_timeout = {self.busy_timeout * 1000:.0f}")

    def _begin_among_others(self, connection: sqlite3.Connection, seconds: float) -> None:
        """Begin a transaction in a file whose other writers take no turns."""
        begin = partial(connection.execute, "BEGIN IMMEDIATE")
        deadline = time.monotonic() + seconds
        hurry = lambda: self.callers.blocked  # noqa: E731
        connection.execute("PRAGMA busy_timeout = 0").fetchall()
        try:
            until_unlocked(begin, deadline, sqlite3.OperationalError, self.timing, hurry)
        finally:
            connection.execute(f"PRAGMA busy_timeout = {self.busy_timeout * 1000:.0f}").fetchall()

    def _undo(self, connection: sqlite3.Connection, error: BaseException) -> None:
        """Roll back, and raise TaskX's error for an error of SQLite."""
        # If the disk is full, SQLite has rolled back by itself.
        if connection.in_transaction:
            self._roll_back(connection)
        if isinstance(error, FAILURES):
            raise self._connections.translated(error) from error

    def _refuse_if_newer(self, connection: sqlite3.Connection, sent: Sent | None) -> None:
        if self._connections.compiling.seen:
            self._check_schema_version(connection)
        if self._newer is not None and not _let_go(sent):
            raise SchemaMismatch(*self._newer.args)

    def _check_schema_version(self, connection: sqlite3.Connection) -> None:
        try:
            self._newer = self.schema.newer(connection, self._file.path)
        except sqlite3.Error as error:
            raise self._connections.translated(error) from error
        self._connections.compiling.forget()

    def _roll_back(self, connection: sqlite3.Connection) -> None:
        try:
            connection.rollback()
        except sqlite3.Error:  # closing the connection undoes the transaction
            self._connections.discard_writer()

    def _set_synchronous(self, connection: Connection, wanted: str) -> None:
        connection.synchronous = ""  # unknown if an interrupt comes after the next line
        connection.execute(f"PRAGMA synchronous = {wanted}")
        connection.synchronous = wanted

    # --- inside a transaction of the caller

    def check_own(self, connection: sqlite3.Connection) -> None:
        """Check a connection that ``connect`` has made for a transaction of an executor."""
        Joined(self, connection).check()
        if connection.in_transaction:
            raise ConfigurationError("connect() must return a connection that is in no transaction")

    def begin_on(self, connection: sqlite3.Connection) -> None:
        """Begin a transaction on another connection, when it is this process's turn."""
        if self.entered:
            raise Reentered
        with self._write_lock:
            try:
                left = self._turnstile.enter(self.busy_timeout)
                self._begin_among_others(connection, left)
            finally:
                self._turnstile.leave()

    def lock_is_free(self) -> bool:
        """Return True if nobody holds the write lock of the file, or only for a moment."""
        try:
            with closing(connect_to(self.file, self.timing.file_free_within)) as connection:
                connection.execute("BEGIN IMMEDIATE")
                connection.execute("ROLLBACK")
        except sqlite3.Error as error:
            return "locked" not in str(error)
        return True

    def tell_others(self, writes: Sequence[Write]) -> None:
        """Tell other processes of committed writes."""
        self._wakeups.send(writes, to_own=len(self.queues) > 1)

    def translated(self, error: Exception) -> TaskxError:
        """Return TaskX's error for an error of SQLite."""
        return self._connections.translated(error)

    # --- reading

    def _rows(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        self.open()
        return self._connections.read(_fetch, sql, values)

    def find(
        self, column: Lookup, values: Sequence[str], fields: Fields, limit: int | None = None
    ) -> Rows:
        """Find a few rows on the writing connection if it is free, others on a reader.

        The writing connection has the pages that it wrote last in memory. A reader must read them again
        after each commit.
        """
        near = column in _NEAR and 0 < len(values) <= _FEW and limit is None
        if not near or self.entered:
            return super().find(column, values, fields, limit)
        self.open()
        got: list[bool] = []
        try:
            # One step acquires the lock and records that it did: a signal handler may raise between any two
            # steps. In `finally`, it may raise after each call except the last.
            got.extend(map(self._write_lock.acquire, (False,)))
            # Not inside a transaction that an interrupt cut short: its writes will be undone.
            if got == [True] and not (writer := self._connections.writer()).in_transaction:
                return writer.execute(
                    *self.statements.find(column, values, fields, False)
                ).fetchall()
        except sqlite3.Error:
            pass  # the reader meets the same error, and translates it
        finally:
            if got == [True]:
                self._write_lock.release()
        return super().find(column, values, fields)

    def open(self) -> None:
        """Create and check the file before the first read. Later, check that it still exists.

        Only the first read takes the lock: a thread inside a transaction of its own may read, and those
        that write may wait for that transaction.
        """
        if self._connections.opened:
            self._file.check()
        else:
            with self._write_lock:
                self._connections.writer()

    def shrink(self) -> bool:
        """Cut a few free pages off the file if many are free. Return True if there are more to cut.

        Some free pages stay, as later tasks use them again and moving pages takes time. The file of an
        application is left as it is.
        """
        if self.prefix:
            return False
        self.open()
        ((free, pages),) = self._rows(FREE_PAGES)
        spare = free - max(_KEPT_PAGES, pages // 4)
        if spare <= 0:
            return False
        few = min(spare, _PAGES_AT_ONCE)
        sql = f"PRAGMA incremental_vacuum({few})"
        self._transact(lambda link: link.rows(sql), durable=False)
        return bool(spare > few)

    def version(self) -> object:
        """Return counters of commits: those of others, and our own if several queues share this object.

        SQLite counts in memory, for each connection, the commits of other connections. A new connection
        starts a new count, so its number is part of the value.
        """
        seen, own = self.revision()
        return (*seen, own if len(self.queues) > 1 else 0)

    def revision(self) -> tuple[tuple[int, int], int]:
        """Return the counter of others' commits, and that of our own."""
        self.open()
        # If the lock stays taken, a write is in progress, and the next call reads the counter.
        if self._write_lock.acquire(timeout=0.005):
            try:
                self._seen = self._read_data_version()
            finally:
                self._write_lock.release()
        return self._seen, self._commits

    def _read_data_version(self) -> tuple[int, int]:
        connection = self._connections.writer()
        try:
            ((others,),) = connection.execute("PRAGMA data_version").fetchall()
        except sqlite3.Error as error:
            raise self._connections.translated(error) from error
        seen = connection.number, int(others)
        if seen != self._seen:
            self._check_schema_version(connection)
        return seen

    def listen(self, news: str) -> Listener | None:
        return self._wakeups.listen(news)

    # --- nodes, files

    def _make_liveness(self) -> KernelLocks:
        place = lambda: (self._file.folder, self._file.inode)  # noqa: E731
        return KernelLocks(self, place, turnstile.NAMES, self.timing.orphan_within)

    def only_existing(self) -> None:
        self._file.create = False
        self._connections.migrates = False

    def examine(self) -> Iterator[Check]:
        from taskx.storage.sqlite.examination import examine  # not needed to run tasks

        return examine(self._file, self.schema, self.timing.examine_within)

    def ensure_there(self) -> None:
        """Raise an error if the file was moved, deleted, replaced or migrated since it was opened."""
        self._file.check()
        if self._newer is not None:
            raise SchemaMismatch(*self._newer.args)

    def file_sizes(self) -> dict[str, int]:
        """Return the bytes that the file and its write-ahead log take, by path."""
        self.open()
        return self._file.sizes()

    # --- opening and closing

    def close(self) -> None:
        """Close the file. A later operation opens it again.

        It then opens the file that is at the path at that time. But if a node on this repository is still
        at work, it accepts only the same file.
        """
        if self.entered:
            raise Reentered
        with self._write_lock:
            try:
                self._turnstile.close()
                self._connections.close()
                if not self.liveness.at_work:
                    self._file.forget()
            except sqlite3.Error as error:
                raise RepositoryUnavailable(f"{self.path} could not be closed: {error}") from error
            finally:
                self._newer = None

    def before_fork(self) -> None:
        # Not if this thread is in the middle of a transaction: it would wait for itself, or end it.
        self._forking = not self.entered and self._write_lock.acquire(
            timeout=self.timing.fork_within
        )
        if self._forking:
            self._connections.discard_writer()
        self._connections.close_before_fork(self.timing.fork_within)

    def after_fork(self) -> None:
        self._connections.reopen()
        if self._forking:
            self._write_lock.release()

    def renew_after_fork(self) -> None:
        self._write_lock = threading.RLock()
        self._connections.renew_after_fork()
        self._turnstile.leave = dict
        self._wakeups.renew_after_fork()
        self.transactions.renew()


# Each savepoint has its own name: one that an interrupt has left behind must not be rolled back to.
_savepoints = itertools.count()


@contextmanager
def _join(outer: SQLiteRepository, given: object, then: Then | None) -> Iterator[Joined]:
    """Do what :meth:`Repository.joined` describes."""
    connection, active = driver_connection(given)
    made = Joined(outer, connection)
    began, counting, savepoint = False, False, f"taskx_{next(_savepoints)}"
    text_factory, connection.text_factory = connection.text_factory, str
    try:
        with made.translating():
            made.check()
            counting = made.counting()
            if counting:
                made.execute("PRAGMA count_changes = 0")
            began = made.begin()
            made.execute(f"SAVEPOINT {savepoint}")
        yield made  # what the block itself raises is not translated
        with made.translating():
            made.execute(f"RELEASE {savepoint}")
            if began and not made.applied:
                made.execute("COMMIT")  # it would keep the write lock for nothing
    except BaseException:
        made.take_back(savepoint)
        if began and connection.in_transaction:
            connection.rollback()
        raise
    finally:
        connection.text_factory = text_factory
        if counting:
            with suppress(sqlite3.Error):  # it was closed
                made.execute("PRAGMA count_changes = 1")
        made.let_go()
    if made.applied and then is not None:
        outer.callers.add(connection, active, made.applied, then)


class Joined(SQLiteRepository):
    """The repository as a transaction of the caller sees it.

    All its statements go over the caller's connection. It waits for no lock of this process: the caller may
    hold SQLite's write lock, for which other threads wait.

    Attributes:
        applied: the writes so far whose guards held.
    """

    def __init__(self, outer: SQLiteRepository, connection: sqlite3.Connection) -> None:
        SQLRepository.__init__(self, outer.statements, outer.clock, timing=outer.timing)
        self.codecs = outer.codecs
        self.path, self.durability, self.prefix = outer.path, outer.durability, outer.prefix
        self.applied: list[Write] = []
        self._outer = outer
        self._connection = connection

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
        version = outer.schema.check(self._cursor(), path)
        if version == schema.VERSION:
            return
        if self._connection.in_transaction:
            raise RepositoryError(
                f"the tables of TaskX in {path} do not exist yet or are of an older version, and cannot be "
                "made in your transaction; nothing was stored. Start the queue, or list some tasks, before "
                "it begins"
            )
        outer.open()

    def counting(self) -> bool:
        """Return True if each write returns a row with the number of its changes, as ``rowcount`` says."""
        return self._fetch("PRAGMA count_changes") == [(1,)]

    def begin(self) -> bool:
        """Begin a transaction if the connection is in none. Return True if it did.

        Raises:
            ConfigurationError: the connection commits each statement at once.
        """
        connection = self._connection
        callers = self._outer.callers
        if not connection.in_transaction:
            callers.enter(connection, None)
            automatic = getattr(connection, "autocommit", _LEGACY)
            if automatic is True or (automatic == _LEGACY and connection.isolation_level is None):
                raise ConfigurationError(
                    "connection is in autocommit mode and in no transaction: execute BEGIN IMMEDIATE "
                    "first, or call inside transaction.atomic() of Django; nothing was stored"
                )
            self._cursor().execute("BEGIN IMMEDIATE")
            return True
        callers.enter(connection, self)
        return False

    def execute(self, sql: str) -> None:
        """Execute a statement that has no rows."""
        self._cursor().execute(sql)

    def take_back(self, savepoint: str) -> None:
        """Undo what was done since a savepoint, if it is still there."""
        try:
            if not self._connection.in_transaction:
                return  # SQLite has rolled back by itself, for example because the disk is full
            self.execute(f"ROLLBACK TO {savepoint}")
            self.execute(f"RELEASE {savepoint}")
        except sqlite3.ProgrammingError:
            return  # the connection is closed, or is another thread's
        except sqlite3.Error as error:
            if "no such savepoint" not in str(error):  # an interrupt came before or after it
                raise self._outer.translated(error) from error

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

    def tell_others(self, writes: Sequence[Write]) -> None:
        """Note writes: nobody is told of them before the commit."""
        self.applied += writes

    # --- statements

    def _cursor(self) -> _Cursor:
        # A subclass of the connection may have changed ``cursor``, and its rows may be of any kind.
        cursor = sqlite3.Connection.cursor(self._connection, _Cursor)
        cursor.row_factory = None
        return cursor

    def _transact(
        self,
        work: Callable[[Link], T],
        durable: bool,
        sent: Sent | None = None,
        *,
        single: bool = False,
    ) -> T:
        # Not in a context manager: an interrupt must not come between its exit and the code here.
        with self.translating():
            cursor = self._cursor()
            savepoint = f"taskx_{next(_savepoints)}"
            try:
                cursor.execute(f"SAVEPOINT {savepoint}")
                result = work(cursor)
                cursor.execute(f"RELEASE {savepoint}")
                return result
            except BaseException:
                self.take_back(savepoint)
                raise

    def _rows(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        with self.translating():
            return self._fetch(sql, values)

    find = SQLRepository.find

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

    @property
    def entered(self) -> bool:
        return False


class _Cursor(sqlite3.Cursor):
    """A cursor inside a transaction: a link."""

    def rows(self, sql: str, values: Sequence[Any] = (), /) -> list[Any]:
        return self.execute(sql, values).fetchall()

    def passing(self, sql: str, /) -> str:
        return sql


def _let_go(sent: Sent | None) -> bool:
    return sent is not None and all(map(lifecycle.lets_go, sent[0]))


def _fetch(connection: sqlite3.Connection, sql: str, values: Sequence[Any]) -> list[Any]:
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
