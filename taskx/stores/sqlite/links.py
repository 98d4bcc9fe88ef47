"""The connections of a process to its file, and how it takes turns with others."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from taskx.stores.base import Lookup, Reentered
from taskx.stores.parts import Forks, House, Listener, News, looking
from taskx.stores.sql import Link, Links, Sent
from taskx.stores.sqlite import schema
from taskx.stores.sqlite.connections import FAILURES, REFUSES, Connection, Connections
from taskx.stores.sqlite.dialect import FREE_PAGES
from taskx.stores.sqlite.file import DatabaseFile
from taskx.stores.sqlite.turnstile import Turnstile, until_unlocked
from taskx.stores.sqlite.wakeups import Wakeups
from taskx.tasks import lifecycle
from taskx.tasks.errors import RepositoryUnavailable, SchemaMismatch, TaskxError
from taskx.tasks.timing import Timing
from taskx.tasks.writes import Write

if TYPE_CHECKING:
    from taskx.tasks.findings import Check, Problem

Durability = Literal["accepted", "full", "process"]
T = TypeVar("T")

_FEW = 32  # rows that may be read on the writing connection, which keeps writers waiting
_KEPT_PAGES = 2000  # free pages (2 KiB in a new file) that are not worth a vacuum
_PAGES_AT_ONCE = 200
_NEAR = frozenset({"id", "unique_lock", "waiting_on"})  # columns with few rows for each value


class FileLinks(Links, News, House, Forks):
    """A file, as a process uses it: one connection that writes, and others that read.

    Args:
        file: the file.
        schema: the schema of its tables.
        durability: the commits that a power cut may undo.
        busy_timeout: seconds to wait for another process's write.
        several: tells if several queues of this process must hear of each other's commits.
        timing: the intervals of its work.
    """

    one_host = True

    def __init__(
        self,
        file: DatabaseFile,
        schema: schema.Schema,
        durability: Durability,
        busy_timeout: float,
        several: Callable[[], bool],
        timing: Timing,
    ) -> None:
        self.file = file
        self.schema = schema
        self.prefix = schema.prefix
        self.durability = durability
        self.timing = timing
        self.connections = Connections(file, busy_timeout, schema, timing)
        self.turnstile = Turnstile(file, timing)
        self.wakeups = Wakeups(file, timing)
        self._several = several
        self._short_wait = timing.short_wait
        self.write_lock = threading.RLock()
        #: The threads that hold the write lock of the file and wait for threads that want it.
        self.blocking: set[int] = set()
        # The writing connection's number and its count of others' commits; and the number of our own
        # commits.
        self._seen, self._commits = (0, 0), 0
        self._newer: SchemaMismatch | None = None

    # --- writing

    @property
    def entered(self) -> bool:
        return self.write_lock._is_owned()  # type: ignore[attr-defined, no-any-return]

    def transaction(
        self, work: Callable[[Link], T], durable: bool, sent: Sent = None, single: bool = False
    ) -> T:
        """Do work in one transaction. Nothing is committed if it raises.

        If another process has migrated the file to a newer schema, only writes that end a run or give a
        task back are allowed.
        """
        if self.write_lock._is_owned():  # type: ignore[attr-defined]
            raise Reentered
        noted = self.connections.compiling.noted
        with self.write_lock:
            connection = self.connections.current or self.connections.writer()
            if connection.in_transaction:  # signals interrupted the last transaction twice
                self._roll_back(connection)
                connection = self.connections.writer()  # a new one if the rollback failed
            self.file.check()
            try:
                cursor = connection.cursor(Cursor)
                timeout = self.connections.busy_timeout
                left = self.turnstile.enter(
                    self.timing.file_free_within if self.blocking else timeout
                )
                full = self.durability == "full" or (durable and self.durability == "accepted")
                if connection.synchronous != (wanted := "FULL" if full else "NORMAL"):
                    self._set_synchronous(connection, wanted)
                soon = timeout - left < self._short_wait
                if single and soon and not self.prefix and self._newer is None:
                    # The statement commits itself, unless SQLite must compile it: then another process may
                    # have migrated the file.
                    try:
                        noted[REFUSES] = 1
                        result = work(cursor)
                        self._commits += 1
                        return result
                    except sqlite3.DatabaseError as error:
                        if "not authorized" not in str(error):
                            raise
                    finally:
                        noted[REFUSES] = 0  # not a call, before which an interrupt could come
                if self.prefix:
                    self._begin_among_others(connection, left)
                elif soon:
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
                self.turnstile.leave()

    def _begin_within(self, cursor: Cursor, seconds: float) -> None:
        """Begin a transaction; SQLite waits at most so long for other programs."""
        cursor.execute(f"PRAGMA busy_timeout = {seconds * 1000:.0f}")
        try:
            cursor.execute("BEGIN IMMEDIATE")
        finally:
            cursor.execute(f"PRAGMA busy_timeout = {self.connections.busy_timeout * 1000:.0f}")

    def _begin_among_others(self, connection: sqlite3.Connection, seconds: float) -> None:
        """Begin a transaction in a file whose other writers take no turns."""
        begin = partial(connection.execute, "BEGIN IMMEDIATE")
        deadline = time.monotonic() + seconds
        hurry = lambda: bool(self.blocking)  # noqa: E731
        connection.execute("PRAGMA busy_timeout = 0").fetchall()
        try:
            until_unlocked(begin, deadline, sqlite3.OperationalError, self.timing, hurry)
        finally:
            connection.execute(
                f"PRAGMA busy_timeout = {self.connections.busy_timeout * 1000:.0f}"
            ).fetchall()

    def _undo(self, connection: sqlite3.Connection, error: BaseException) -> None:
        """Roll back, and raise TaskX's error for an error of SQLite."""
        # If the disk is full, SQLite has rolled back by itself.
        if connection.in_transaction:
            self._roll_back(connection)
        if isinstance(error, FAILURES):
            raise self.connections.translated(error) from error

    def _refuse_if_newer(self, connection: sqlite3.Connection, sent: Sent) -> None:
        if self.connections.compiling.seen:
            self._check_schema_version(connection)
        if self._newer is not None and not _let_go(sent):
            raise SchemaMismatch(*self._newer.args)

    def _check_schema_version(self, connection: sqlite3.Connection) -> None:
        try:
            self._newer = self.schema.newer(connection, self.file.path)
        except sqlite3.Error as error:
            raise self.connections.translated(error) from error
        self.connections.compiling.forget()

    def _roll_back(self, connection: sqlite3.Connection) -> None:
        try:
            connection.rollback()
        except sqlite3.Error:  # closing the connection undoes the transaction
            self.connections.discard_writer()

    def _set_synchronous(self, connection: Connection, wanted: str) -> None:
        connection.synchronous = ""  # unknown if an interrupt comes after the next line
        connection.execute(f"PRAGMA synchronous = {wanted}")
        connection.synchronous = wanted

    # --- inside a transaction of the caller

    def begin_on(self, connection: sqlite3.Connection) -> None:
        """Begin a transaction on another connection, when it is this process's turn."""
        if self.entered:
            raise Reentered
        with self.write_lock:
            try:
                left = self.turnstile.enter(self.connections.busy_timeout)
                self._begin_among_others(connection, left)
            finally:
                self.turnstile.leave()

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
        self.wakeups.send(writes, self._several)

    def translated(self, error: Exception) -> TaskxError:
        """Return TaskX's error for an error of SQLite."""
        return self.connections.translated(error)

    # --- reading

    def rows(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        self.open()
        return self.connections.read(fetch, sql, values)

    def few_rows(self, column: Lookup, sql: str, values: Sequence[Any]) -> list[Any]:
        """Read a few rows on the writing connection if it is free, otherwise on a reader.

        The writing connection has the pages that it wrote last in memory. A reader must read them again
        after each commit.
        """
        if column not in _NEAR or len(values) > _FEW or self.entered:
            return self.rows(sql, values)
        self.open()
        got: list[bool] = []
        try:
            # One step acquires the lock and records that it did: a signal handler may raise between any two
            # steps. In `finally`, it may raise after each call except the last.
            got.extend(map(self.write_lock.acquire, (False,)))
            # Not inside a transaction that an interrupt cut short: its writes will be undone.
            if got == [True] and not (writer := self.connections.writer()).in_transaction:
                return writer.execute(sql, values).fetchall()
        except FAILURES:
            pass  # the reader meets the same error, and translates it
        finally:
            if got == [True]:
                self.write_lock.release()
        return self.rows(sql, values)

    def open(self) -> None:
        """Create and check the file before the first read. Later, check that it still exists.

        Only the first read takes the lock: a thread inside a transaction of its own may read, and those
        that write may wait for that transaction. One of these may have opened the file by then.
        """
        if self.connections.opened:
            self.file.check()
        soon = self.timing.file_free_within
        while not self.connections.opened:
            got: list[bool] = []
            try:
                got.extend(map(self.write_lock.acquire, (True,), (soon,)))  # in one step, as above
                if got == [True]:
                    self.connections.writer()
                    return  # also if an interrupted close() has left it open
            finally:
                if got == [True]:
                    self.write_lock.release()

    def revision(self) -> tuple[tuple[int, int], int]:
        """Return the counter of others' commits, and that of our own."""
        self.open()
        # If the lock stays taken, a write is in progress, and the next call reads the counter.
        if self.write_lock.acquire(timeout=0.005):
            try:
                self._seen = self._read_data_version()
            finally:
                self.write_lock.release()
        return self._seen, self._commits

    def _read_data_version(self) -> tuple[int, int]:
        connection = self.connections.writer()
        try:
            ((others,),) = connection.execute("PRAGMA data_version").fetchall()
        except sqlite3.Error as error:
            raise self.connections.translated(error) from error
        seen = connection.number, int(others)
        if seen != self._seen:
            self._check_schema_version(connection)
        return seen

    def listen(self, news: str) -> Listener | None:
        return self.wakeups.listen(news)

    # --- opening and closing

    def ensure_there(self) -> None:
        """Raise an error if the file was moved, deleted, replaced or migrated since it was opened."""
        self.file.check()
        if self._newer is not None:
            raise SchemaMismatch(*self._newer.args)

    def only_existing(self) -> AbstractContextManager[None]:
        return looking(self.file.lookers)

    def examine(self) -> Iterator[Check]:
        from taskx.stores.sqlite.examination import examine  # not needed to run tasks

        return examine(self.file, self.schema, self.timing.examine_within)

    def problems(self) -> Iterator[Problem]:
        from taskx.stores.sqlite.examination import full_disk  # not needed to run tasks

        return full_disk(self.file.path)

    def file_sizes(self) -> dict[str, int]:
        """Return the bytes that the file and its write-ahead log take, by path."""
        self.open()
        return self.file.sizes()

    def shrink(self) -> bool:
        """Cut a few free pages off the file if many are free. Return True if there are more to cut.

        Some free pages stay, as later tasks use them again and moving pages takes time. The file of an
        application is left as it is.
        """
        if self.prefix:
            return False
        ((free, pages),) = self.rows(FREE_PAGES)
        spare = free - max(_KEPT_PAGES, pages // 4)
        if spare <= 0:
            return False
        few = min(spare, _PAGES_AT_ONCE)
        sql = f"PRAGMA incremental_vacuum({few})"
        self.transaction(lambda link: link.rows(sql), durable=False)
        return bool(spare > few)

    def close(self, *, forget: bool) -> None:
        """Close the file. If ``forget`` is True, another file may be opened later."""
        if self.entered:
            raise Reentered
        with self.write_lock:
            try:
                self.turnstile.close()
                self.connections.close()
                if forget:
                    self.file.forget()
            except sqlite3.Error as error:
                path = self.file.path
                raise RepositoryUnavailable(f"{path} could not be closed: {error}") from error
            finally:
                self._newer = None

    def before_fork(self) -> None:
        # Not if this thread is in the middle of a transaction: it would wait for itself, or end it.
        seconds = self.timing.fork_within
        self._forking = not self.entered and self.write_lock.acquire(timeout=seconds)
        if self._forking:
            self.connections.discard_writer()
        self.connections.close_before_fork(seconds)

    def after_fork(self) -> None:
        self.connections.reopen()
        if self._forking:
            self.write_lock.release()

    def renew_after_fork(self) -> None:
        self.write_lock = threading.RLock()
        self.blocking = set()
        self.connections.renew_after_fork()
        self.turnstile.renew_after_fork()
        self.wakeups.renew_after_fork()


def _let_go(sent: Sent) -> bool:
    return sent is not None and all(map(lifecycle.lets_go, sent[0]))


def connect_to(file: DatabaseFile, timeout: float) -> sqlite3.Connection:
    """Open a connection to an existing file. It begins no transactions by itself."""
    from urllib.parse import quote  # slow to load

    url = f"file://{quote(os.fsencode(file.path))}?mode=rw"
    return sqlite3.connect(url, uri=True, timeout=timeout, isolation_level=None)


class Cursor(sqlite3.Cursor):
    """A cursor inside a transaction: a link."""

    def rows(self, sql: str, values: Sequence[Any] = (), /) -> list[Any]:
        return self.execute(sql, values).fetchall()

    def passing(self, sql: str, /) -> str:
        return sql


def fetch(
    connection: sqlite3.Connection,
    sql: str,
    values: Sequence[Any],
    execute: Callable[..., sqlite3.Cursor] | None = None,
) -> list[Any]:
    """Return the rows of a query, which ``execute`` or the connection executes."""
    execute = execute or connection.execute
    try:
        return execute(sql, values).fetchall()
    except sqlite3.OperationalError as error:
        if "decode" not in str(error):
            raise
    # Invalid UTF-8 as bytes: one damaged record must not hide the others.
    connection.text_factory = text_or_bytes
    try:
        return execute(sql, values).fetchall()
    finally:
        connection.text_factory = str


def text_or_bytes(stored: bytes) -> str | bytes:
    """Return a stored text, or its bytes if it is not UTF-8."""
    try:
        return stored.decode()
    except UnicodeDecodeError:
        return stored
