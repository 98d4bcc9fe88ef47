"""The connections to the file: opening them, pooling them, and translating SQLite's errors."""

from __future__ import annotations

import gc
import os
import sqlite3
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from itertools import count
from typing import TypeVar

from taskx.stores.sqlite import schema
from taskx.stores.sqlite.file import DatabaseFile
from taskx.tasks.errors import RepositoryCorrupt, RepositoryError, RepositoryUnavailable, TaskxError
from taskx.tasks.timing import DEFAULT_TIMING, Timing

T = TypeVar("T")

#: The errors of SQLite's driver, and the errors that binding a value can raise.
FAILURES = (sqlite3.Error, OverflowError, UnicodeEncodeError)

#: Earlier versions lack features that the statements use.
MINIMUM_SQLITE = (3, 34, 0)
#: Bytes of a page of a new file; an older file keeps its 4,096. A commit writes whole pages, and the write
#: of a task changes a few bytes in each of three to five pages. With even smaller pages there are more of
#: them, so counting takes longer.
PAGE_SIZE = 2048
#: Pages in the log before a commit copies them into the file. Copying delays a task by some milliseconds.
#: With four times SQLite's default it happens rarely, and a page that is written many times is copied once.
CHECKPOINT_EVERY = 4000

_numbers = count(1)


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        # No such file: a log disappears when another process closes the last connection.
        return 0


def _why_not_opened(path: str) -> str:
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path):
        return "it is a folder"
    if not os.path.isdir(folder):
        return f"there is no folder {folder}"
    missing = "" if os.path.exists(path) else "it is missing and cannot be created; "
    if not os.access(folder, os.W_OK):
        return f"{missing}{unwritable(folder)}"
    return f"{missing}no permission, or too many open files"


def unwritable(folder: str) -> str:
    """Return words about the folder of a file, to which this user cannot write."""
    return f"SQLite keeps files beside it, also to read, and this user cannot write to {folder}"


#: While this item is 1, a statement that must be compiled is refused.
REFUSES = sqlite3.SQLITE_OK


class Compiling:
    """A recorder that notes when the writing connection compiles a statement.

    After a change of the schema, SQLite compiles every statement again. So a write into a file that another
    process has migrated is noticed, and other writes cost nothing more.

    Attributes:
        authorizer: the callback that SQLite asks for permission when it compiles a statement.
        noted: what it was asked about. It permits everything, unless the item :data:`REFUSES` is 1.
    """

    def __init__(self) -> None:
        self.noted: defaultdict[object, int] = defaultdict(int)
        # ``min`` returns its first argument with the least key: SQLITE_OK (0), or SQLITE_DENY (1) while the
        # key of 0 is 1. All other keys are 0, and looking them up makes the note. No Python code runs here:
        # an interrupt could strike in it, and SQLite would swallow that and report "not authorized".
        self.authorizer = partial(
            min, sqlite3.SQLITE_OK, sqlite3.SQLITE_DENY, key=self.noted.__getitem__
        )

    @property
    def seen(self) -> bool:
        """True if a statement was compiled since the last call of :meth:`forget`."""
        return len(self.noted) > 1

    def forget(self) -> None:
        """Clear the note, so that the next compiled statement is noticed."""
        self.noted.clear()


class Connection(sqlite3.Connection):
    """A connection that weak references can refer to.

    Attributes:
        number: the number of a writing connection; each one gets a new number.
        synchronous: the current value of ``PRAGMA synchronous``, which says how commits are synced.
        used: the monotonic time when it was last given back to the pool.
        closed: True after :meth:`close`.
    """

    number = 0
    synchronous = "NORMAL"
    used = 0.0
    closed = False

    def close(self) -> None:
        super().close()
        self.closed = True

    def __del__(self) -> None:
        # Python 3.13 would warn of an open connection, but a repository need not be closed.
        try:
            super().close()
        except sqlite3.ProgrammingError:  # it could not be opened
            return


def require_log(executes: schema.Executes, path: str) -> None:
    """Raise an error if the application's file has no write-ahead log, which is for it to decide."""
    ((mode,),) = executes.execute("PRAGMA journal_mode").fetchall()
    if mode != "wal":
        raise RepositoryError(
            f"{path} has journal_mode={mode}, and TaskX requires WAL; it was not changed. The application "
            "must run PRAGMA journal_mode = WAL once: the file keeps it"
        )


class Connections:
    """The connections of one process to one file: one that writes, and a pool of readers.

    One thread at a time uses a connection. Connections are opened when they are needed, with at most
    ``Timing.most_readers`` readers. A reader that was not used for ``Timing.close_reader_after`` seconds is
    closed.
    """

    def __init__(
        self,
        file: DatabaseFile,
        busy_timeout: float,
        tables: schema.Schema = schema.OWN,
        timing: Timing = DEFAULT_TIMING,
    ) -> None:
        self.file = file
        self._timing = timing
        self.schema = tables
        self.busy_timeout = busy_timeout
        #: True once the file was checked, and created if it was missing, until :meth:`close`.
        self.opened = False
        #: The writing connection; None before the first write and after :meth:`close`.
        self.current: Connection | None = None
        # Readers that nobody uses; the one that was given back last is at the end. An interrupt may lose a
        # reader on its way. It is closed when nothing refers to it any more.
        self._idle: list[Connection] = []
        # All of them. After an interrupt in its iteration, a WeakSet would forget no member any more.
        self._readers: list[weakref.ref[Connection]] = []
        self._collected_at = 0.0  # the monotonic time at which lost readers were collected last
        # A finalizer may read while its thread opens a connection.
        self._opening = threading.RLock()
        self.compiling = Compiling()
        # Connections that a forked child has inherited all the same. They are kept for ever: closing one
        # would drop the locks that the parent holds on the file.
        self._abandoned: list[Connection] = []

    def translated(self, error: Exception) -> TaskxError:
        """Return TaskX's error for an error of SQLite. Its text decides: Python 3.10 has no error codes."""
        text, path = str(error), self.file.path
        if "locked" in text or "busy" in text:
            return RepositoryUnavailable(
                f"{path} was locked for {self.busy_timeout:g} s by another connection; nothing was "
                "changed. If this thread has an open transaction on the file, pass its connection: "
                "connection=…"
            )
        if "disk is full" in text:
            return RepositoryUnavailable(
                f"the disk is full: {path} cannot grow; nothing was changed. Free some space"
            )
        if "readonly" in text or "read-only" in text:
            return RepositoryUnavailable(
                f"{path} or its folder is read-only: give this process write access"
            )
        if "unable to open" in text:
            return RepositoryUnavailable(f"{path} cannot be opened: {_why_not_opened(path)}")
        if "not a database" in text:
            return RepositoryCorrupt(
                f"{path} is not an SQLite database; it was not changed. Check the path"
            )
        if "malformed" in text or "corrupt" in text:
            return RepositoryCorrupt(f"{path} is damaged: {text}")
        if "disk I/O" in text:
            return RepositoryUnavailable(f"{path}: {text}")
        return RepositoryError(f"{path}: {text}")

    def writer(self) -> Connection:
        """Return :attr:`current`, or open the file. The caller holds the write lock."""
        return self.current or self._open_file()

    def read(self, work: Callable[..., T], *arguments: object) -> T:
        """Return ``work(connection, *arguments)``, called with a reader, and translate SQLite's errors.

        Raises:
            RepositoryUnavailable: all readers were in use for ``busy_timeout`` seconds.
        """
        identity, idle = self.file.identity, self._idle
        connection = None
        try:
            try:
                connection = idle.pop()
            except IndexError:
                connection = self._wait_for_reader()
            result = work(connection, *arguments)
        except BaseException as error:
            if connection is not None:
                connection.close()  # it may be in the middle of a statement, which keeps a lock
            if isinstance(error, FAILURES):
                raise self.translated(error) from error
            raise
        if identity is None or self.file.identity != identity:
            # The file was closed in the meantime; this may be another file's connection.
            connection.close()
            return result
        connection.used = now = time.monotonic()
        idle.append(connection)
        # The connection given back last is taken first, so the first in the list is needed least.
        try:
            if now - idle[0].used > self._timing.close_reader_after:
                idle.pop(0).close()
        except IndexError:  # another thread took it
            pass
        return result

    def _wait_for_reader(self) -> Connection:
        """Open a reader or, if there are ``Timing.most_readers``, wait for one."""
        deadline = time.monotonic() + self.busy_timeout
        pause = self._timing.reader_pause
        while (opened := self._open_reader()) is None:
            if time.monotonic() >= deadline:
                raise RepositoryUnavailable(
                    f"{self._timing.most_readers} threads were reading {self.file.path} for "
                    f"{self.busy_timeout:g} s; read from fewer threads at once, or raise busy_timeout"
                )
            time.sleep(pause)
            pause = min(2 * pause, self._timing.longest_reader_pause)
            if pause == self._timing.longest_reader_pause:
                self._collect_lost()
            with suppress(IndexError):
                return self._idle.pop()
        return opened

    def _collect_lost(self) -> None:
        """Have readers closed that an interrupt has lost. Do so at most once a second: it takes a while.

        Before Python 3.11 a connection and its cache of statements refer to each other, so it ends when it
        is collected.
        """
        if (now := time.monotonic()) - self._collected_at > 1.0:
            self._collected_at = now
            gc.collect()

    def _open_reader(self) -> Connection | None:
        """Open a reader. Return None if there are ``Timing.most_readers``."""
        with self._opening:
            self._readers = [weakref.ref(one) for one in self.open_readers()]
            if len(self._readers) >= self._timing.most_readers:
                return None
            connection = self._connect("rw")
            try:
                self.file.check()  # another file may have replaced it just before
            except BaseException:
                connection.close()
                raise
            self._readers.append(weakref.ref(connection))
            return connection

    def open_readers(self) -> list[Connection]:
        """Return the readers that are open, whether in use or not."""
        readers = [reader() for reader in self._readers]
        return [reader for reader in readers if reader is not None and not reader.closed]

    def discard_writer(self) -> None:
        """Close the writing connection. The next write opens a new one. The caller holds the write lock."""
        with suppress(sqlite3.Error):
            self._close_writer()

    def _close_writer(self) -> None:
        try:
            if self.current is not None:
                self.current.close()
        finally:
            self.current = None

    def close(self) -> None:
        """Close all connections that are not in use."""
        self.opened = False
        self._close_writer()
        self._close_idle()

    def _close_idle(self) -> None:
        with suppress(IndexError):
            while True:
                self._idle.pop().close()

    # --- forks

    def close_before_fork(self, timeout: float) -> None:
        """Close all connections, and open none until :meth:`reopen`. The caller holds the write lock.

        A child that inherits an open connection takes the connection's locks for its own, as SQLite counts
        them in memory. If another thread was writing, the child would find the file locked for ever. And
        the child would not keep the log in place when the parent closes it.

        Args:
            timeout: seconds to wait for threads that are reading.
        """
        self._opening.acquire()
        deadline = time.monotonic() + timeout
        while True:
            self._close_idle()
            if not self.open_readers() or time.monotonic() > deadline:
                return
            time.sleep(0.001)

    def reopen(self) -> None:
        """Allow connections to be opened again, in the parent, after the fork."""
        self._opening.release()

    def renew_after_fork(self) -> None:
        """Start over, in a forked child, with connections of its own."""
        self._abandoned += [*self.open_readers(), *([self.current] if self.current else [])]
        self._idle, self._readers = [], []
        self.current = None
        self._opening = threading.RLock()

    # --- opening

    def _connect(self, mode: str) -> Connection:
        from urllib.parse import quote  # slow to load, and not needed before a file is opened

        connection: Connection = sqlite3.connect(
            f"file://{quote(os.fsencode(self.file.path))}?mode={mode}",
            uri=True,
            timeout=self.busy_timeout,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=256,
            factory=Connection,
        )
        try:
            # In WAL mode, NORMAL loses nothing when the process dies. The writer raises it for commits that
            # must survive a power cut.
            connection.execute("PRAGMA synchronous = NORMAL")
        except BaseException:
            connection.close()
            raise
        return connection

    def _open_file(self) -> Connection:
        if sqlite3.sqlite_version_info < MINIMUM_SQLITE:
            raise RepositoryError(f"SQLite {sqlite3.sqlite_version} is too old: use 3.34 or later")
        known, connection = self.file.known, None
        try:
            self.file.find()
            self._check_before_touching()
            connection = self._connect("rwc" if self.file.create and not known else "rw")
            self.file.opened()
            if self._prepare(connection):
                connection = self._replace(connection)
            # For the statements of ``OwnWriter``: the disk of temporary files may be full.
            connection.execute("PRAGMA temp_store = MEMORY")
            connection.set_authorizer(self.compiling.authorizer)
            connection.number = next(_numbers)
        except BaseException as error:
            self.opened = False
            if connection is not None:
                connection.close()
            if not known:
                self.file.forget()
            if isinstance(error, sqlite3.Error):
                raise self.translated(error) from error
            raise
        self.current, self.opened = connection, True
        return connection

    def _check_before_touching(self) -> None:
        """Check an existing file in a way that does not change another program's file.

        When the last connection closes, it writes the log into the file, unless it is read-only. But if
        there is no log, a read-only connection leaves an empty one behind.
        """
        path = self.file.path
        if _size(path) > 0:
            with closing(self._connect("ro" if _size(f"{path}-wal") else "rw")) as connection:
                self.schema.check(connection, path)

    def _prepare(self, connection: Connection) -> bool:
        """Migrate the file. Return True if the connection has changed the schema."""
        # The switch to WAL fails with "locked" at once if another process is switching at the same time:
        # SQLite does not call the busy handler then.
        deadline = time.monotonic() + self.busy_timeout
        while True:
            try:
                version = self.schema.check(connection, self.file.path)
                if version == 0:
                    self._refuse_empty_file()
                elif version < schema.VERSION and self.file.lookers:
                    raise schema.older(version, self.file.path)
                if self.schema.prefix:
                    require_log(connection, self.file.path)
                else:
                    if version == 0:
                        # Before there is a log, a power cut may damage the file otherwise.
                        connection.execute("PRAGMA synchronous = FULL")
                        connection.synchronous = "FULL"
                        connection.execute(f"PRAGMA page_size = {PAGE_SIZE}")
                        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
                    connection.execute("PRAGMA journal_mode = WAL").fetchone()
                connection.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_EVERY}").fetchone()
                if self.schema.prefix:
                    return self._migrate_among_others(connection)
                return self.schema.migrate(connection, self.file.path)
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.001)

    def _migrate_among_others(self, connection: sqlite3.Connection) -> bool:
        """Migrate a file whose other writers take no turns; raise at once if one of them is writing.

        SQLite's own busy handler sleeps too long to find the file free beside a writer that hardly pauses.
        """
        connection.execute("PRAGMA busy_timeout = 0").fetchall()
        try:
            return self.schema.migrate(connection, self.file.path)
        finally:
            connection.execute(f"PRAGMA busy_timeout = {self.busy_timeout * 1000:.0f}").fetchall()

    def _replace(self, connection: Connection) -> Connection:
        """Replace a connection that has changed the schema: its statements would stay slower."""
        with closing(connection):
            fresh = self._connect("rw")
            fresh.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_EVERY}").fetchone()
            # This opens the log, which closing the other one would remove.
            self.schema.check(fresh, self.file.path)
            return fresh

    def _refuse_empty_file(self) -> None:
        if not self.file.create:
            state = f"has no tables {self.schema.prefix}*" if self.schema.prefix else "is empty"
            raise RepositoryUnavailable(
                f"{self.file.path} {state}, and no tables may be made: start the application or a "
                "worker first, or check the path; it was not changed"
            )
