"""Opening the file, the connections to it, and what SQLite's errors mean."""

from __future__ import annotations

import _thread
import os
import sqlite3
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial

from taskx.core.errors import (
    RepositoryCorrupt,
    RepositoryError,
    RepositoryUnavailable,
    TaskxError,
)
from taskx.storage.sqlite import schema
from taskx.storage.sqlite.file import DatabaseFile

#: Versions before lack what the statements rely on.
MINIMUM_SQLITE = (3, 34, 0)
#: Pages of 4 KiB in the log before a commit copies them into the file. That takes some milliseconds
#: on the way of a task; four times SQLite's default makes it a rare one, and pages that are written
#: again and again are copied once.
CHECKPOINT_EVERY = 4000


#: Most connections that read at once; further threads wait. Each holds two files open.
MOST_READERS = 16
#: Seconds after which a connection that was not needed is closed.
IDLE = 10.0
# Polling interval, in seconds, of a thread that waits for a connection: a wake-up may be lost.
_LOOK_AGAIN = 0.05


def translated(error: Exception, path: str, busy_timeout: float) -> TaskxError:
    """Our error for one of SQLite's; the words decide, as Python 3.10 gives no error codes."""
    text = str(error)
    if "locked" in text or "busy" in text:
        return RepositoryUnavailable(
            f"{path} was locked for {busy_timeout:g} s by another process; nothing was changed"
        )
    if "disk is full" in text:
        return RepositoryUnavailable(f"no room on the disk for {path}; nothing was changed")
    if "readonly" in text or "read-only" in text:
        return RepositoryUnavailable(f"{path} or its folder is read-only")
    if "unable to open" in text:
        return RepositoryUnavailable(f"{path} cannot be opened: {_why_not_opened(path)}")
    if "not a database" in text:
        return RepositoryCorrupt(f"{path} is not an SQLite database; it was not touched")
    if "malformed" in text or "corrupt" in text:
        return RepositoryCorrupt(f"{path} is damaged: {text}")
    if "disk I/O" in text:
        return RepositoryUnavailable(f"{path}: {text}")
    return RepositoryError(f"{path}: {text}")


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:  # none; a log goes when another process closes its last connection
        return 0


def _why_not_opened(path: str) -> str:
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path):
        return "it is a folder"
    if not os.path.isdir(folder):
        return f"there is no folder {folder}"
    if not os.path.exists(path):
        return "it is missing and cannot be made; no permission, or too many open files"
    return "no permission, or too many open files"


class Compiling:
    """Notes when the writing connection compiles a statement.

    After a change of the schema SQLite compiles every statement again. So a write into a file that
    another process has migrated is noticed, at no cost for all other writes.

    Attributes:
        authorizer: the callback that SQLite asks for permission when it compiles; permits everything.
    """

    def __init__(self) -> None:
        self._noted: dict[str, int] = {}
        # The first argument, 0 or SQLITE_OK, is returned, as all have the same key; and to get the key
        # makes the note. Without a line of Python, in which an interrupt might strike: SQLite would
        # swallow it, and say "not authorized".
        self.authorizer = partial(
            min, sqlite3.SQLITE_OK, key=partial(self._noted.setdefault, "seen")
        )

    @property
    def seen(self) -> bool:
        """True if a statement was compiled since the last call of :meth:`forget`."""
        return bool(self._noted)

    def forget(self) -> None:
        """Wait for the next statement that is compiled."""
        self._noted.clear()


class Connection(sqlite3.Connection):
    """A connection that can be referred to weakly, and is closed when nobody has it any more.

    Attributes:
        used: when it was given back last, on the monotonic clock.
    """

    used = 0.0

    def __del__(self) -> None:
        with suppress(sqlite3.Error):
            self.close()


class Connections:
    """The connections of one process to one file: one that writes, and a pool of readers.

    Each is used by one thread at a time. They are opened when first needed, at most
    :data:`MOST_READERS` that read; those that nobody needed for :data:`IDLE` seconds are closed.
    """

    def __init__(self, file: DatabaseFile, busy_timeout: float) -> None:
        self.file = file
        self.busy_timeout = busy_timeout
        self._writer: Connection | None = None
        self._idle: list[Connection] = []
        # The idle ones, and those in use. Weakly: an exception of a signal handler may strike before one
        # is given back, which counts until it is collected.
        self._readers: weakref.WeakSet[Connection] = weakref.WeakSet()
        self._waiting: deque[_thread.LockType] = deque()  # bells of threads that wait for one
        self._opening = threading.RLock()  # a finalizer may read while its thread opens one
        self.compiling = Compiling()
        # What a forked child inherits all the same is kept here for ever: closing it would drop the
        # locks that the parent holds on the file.
        self._abandoned: list[Connection] = []

    def writer(self) -> Connection:
        """The writing connection; the caller holds the write lock."""
        if self._writer is None:
            self._writer = self._open_file()
        return self._writer

    @property
    def opened(self) -> bool:
        """Whether the file was made and checked."""
        return self._writer is not None

    @contextmanager
    def reader(self) -> Iterator[Connection]:
        """A connection to read with, given back afterwards; sqlite3's errors become ours.

        Raises:
            RepositoryUnavailable: all were in use for ``busy_timeout`` seconds.
        """
        connection, identity = None, self.file.identity
        try:
            try:
                connection = self._idle.pop()
            except IndexError:
                connection = self._another_reader()
            yield connection
        except BaseException as error:
            if connection is not None:
                self._close_reader(connection)
            if isinstance(error, (sqlite3.Error, OverflowError, UnicodeEncodeError)):
                raise translated(error, self.file.path, self.busy_timeout) from error
            raise
        if identity is not None and self.file.identity == identity:
            self._give_back(connection)
        else:  # all was closed before or meanwhile, and perhaps another file was opened
            self._close_reader(connection)

    def _give_back(self, connection: Connection) -> None:
        connection.used = now = time.monotonic()
        self._idle.append(connection)
        if self._waiting:
            self._ring()
        try:
            # The one given back last is taken first, so the first one in the list is needed least.
            if now - self._idle[0].used > IDLE:
                self._close_reader(self._idle.pop(0))
        except IndexError:  # another thread took it
            pass

    def _another_reader(self) -> Connection:
        """Open a connection to read with or, where there are as many as there may be, wait for one."""
        deadline = time.monotonic() + self.busy_timeout
        while True:
            bell = _thread.allocate_lock()
            bell.acquire()
            self._waiting.append(bell)  # first: whoever gives one back from now on rings
            try:
                with suppress(IndexError):
                    return self._idle.pop()
                with self._opening:
                    if len(list(self._readers)) < MOST_READERS:  # the live ones
                        return self._open_reader()
                left = deadline - time.monotonic()
                if left <= 0:
                    raise RepositoryUnavailable(
                        f"{MOST_READERS} threads were reading {self.file.path} for "
                        f"{self.busy_timeout:g} s; read from fewer threads at once, or raise busy_timeout"
                    )
                bell.acquire(timeout=min(left, _LOOK_AGAIN))
            finally:
                with suppress(ValueError):  # it rang
                    self._waiting.remove(bell)

    def _ring(self) -> None:
        with suppress(IndexError):  # nobody waits
            self._waiting.popleft().release()

    def discard_writer(self) -> None:
        """Have the next write open a new connection; the caller holds the write lock."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with suppress(sqlite3.Error):
                writer.close()

    def close(self) -> None:
        """Close all that is not in use."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
        while self._idle:
            self._close_reader(self._idle.pop())

    def _open_reader(self) -> Connection:
        connection = self._connect()
        try:
            self.file.check()  # another one may have come in its place just before
        except BaseException:
            connection.close()
            raise
        self._readers.add(connection)
        return connection

    def _close_reader(self, connection: Connection) -> None:
        self._readers.discard(connection)
        connection.close()
        self._ring()

    # --- forks

    def close_before_fork(self, timeout: float) -> None:
        """Close all, and open none until :meth:`reopen`; the caller holds the write lock.

        A child that inherits an open connection takes the locks in it for its own: SQLite's counts of
        them are kept in memory. It would find the file locked for ever where another thread was
        writing, and would not hold its log in place when the parent closes it.

        Args:
            timeout: seconds to wait for those who are reading.
        """
        self._opening.acquire()
        deadline = time.monotonic() + timeout
        while list(self._readers):  # the live ones
            try:
                self._close_reader(self._idle.pop())
            except IndexError:
                if time.monotonic() > deadline:
                    return
                time.sleep(0.001)

    def reopen(self) -> None:
        """In the parent, after the fork: connections may be opened again."""
        self._opening.release()

    def renew_after_fork(self) -> None:
        """In a forked child: start over with connections of one's own."""
        self._abandoned += [*self._readers, *([self._writer] if self._writer else [])]
        self._idle, self._readers, self._writer = [], weakref.WeakSet(), None
        self._waiting.clear()
        self._opening = threading.RLock()

    def _connect(self, mode: str = "rw") -> Connection:
        from urllib.parse import quote  # slow to load, and not needed before a file is opened

        path = quote(os.fsencode(self.file.path))
        connection = sqlite3.connect(
            f"file://{path}?mode={mode}",
            uri=True,
            timeout=self.busy_timeout,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=256,
            factory=Connection,
        )
        # NORMAL loses nothing at process death in WAL mode. The writer raises it where a power cut
        # must be survived.
        try:
            connection.execute("PRAGMA synchronous = NORMAL")
        except BaseException:
            connection.close()
            raise
        return connection

    def _open_file(self) -> Connection:
        if sqlite3.sqlite_version_info < MINIMUM_SQLITE:
            raise RepositoryError(
                f"SQLite {sqlite3.sqlite_version} is too old: TaskX needs 3.34 or later"
            )
        known = self.file.known
        try:
            self.file.find()
            self._check_before_touching()
            connection = self._connect("rw" if known or not self.file.create else "rwc")
            try:
                self.file.opened()
                if self._prepare(connection):
                    connection = self._anew(connection)
                connection.set_authorizer(self.compiling.authorizer)
            except BaseException:
                connection.close()
                raise
            return connection
        except BaseException as error:
            if not known:
                self.file.forget()
            if isinstance(error, sqlite3.Error):
                raise translated(error, self.file.path, self.busy_timeout) from error
            raise

    def _check_before_touching(self) -> None:
        """Look at an existing file in a way that leaves another program's as it was.

        The last connection that closes writes what a log holds into the file, unless it is one that
        cannot write; but that one leaves empty files of a log behind where there was none.
        """
        path = self.file.path
        if _size(path) == 0:
            return
        connection = self._connect("ro" if _size(f"{path}-wal") else "rw")
        try:
            schema.check(connection, path)
        finally:
            connection.close()

    def _prepare(self, connection: sqlite3.Connection) -> bool:
        """Bring the file up to date; True if the connection has changed the schema."""
        # The switch to WAL answers "locked" at once where another process is switching, too: the
        # busy handler is not asked.
        deadline = time.monotonic() + self.busy_timeout
        while True:
            try:
                if schema.check(connection, self.file.path) == 0:
                    self._refuse_empty_file()
                    connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
                connection.execute("PRAGMA journal_mode = WAL").fetchone()
                connection.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_EVERY}").fetchone()
                return schema.migrate(connection, self.file.path)
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.005)

    def _anew(self, connection: Connection) -> Connection:
        """Replace a connection that has changed the schema: its statements are slower from then on."""
        fresh = self._connect()
        try:
            fresh.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_EVERY}").fetchone()
            schema.check(
                fresh, self.file.path
            )  # opens the log, which closing the other would remove
        except BaseException:
            fresh.close()
            raise
        connection.close()
        return fresh

    def _refuse_empty_file(self) -> None:
        if not self.file.create:
            raise RepositoryUnavailable(
                f"{self.file.path} is empty, and create=False: check the path; it was not touched"
            )
