"""The connections to the file: opening them, pooling them, and translating SQLite's errors."""

from __future__ import annotations

import _thread
import os
import sqlite3
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from inspect import CO_ASYNC_GENERATOR, CO_COROUTINE, CO_GENERATOR
from itertools import count
from math import inf
from types import FrameType
from typing import Any, TypeVar

from taskx.core.errors import RepositoryCorrupt, RepositoryError, RepositoryUnavailable, TaskxError
from taskx.core.stacks import top_frames
from taskx.core.timing import DEFAULT_TIMING, Timing
from taskx.storage.sqlite import schema
from taskx.storage.sqlite.file import DatabaseFile

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

# Arguments of ``list.pop``, to be called by ``map``.
_LAST, _FIRST = (-1,), (0,)
_numbers = count(1)
_MAY_YIELD = CO_GENERATOR | CO_COROUTINE | CO_ASYNC_GENERATOR


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


class Compiling:
    """A recorder that notes when the writing connection compiles a statement.

    After a change of the schema, SQLite compiles every statement again. So a write into a file that another
    process has migrated is noticed, and other writes cost nothing more.

    Attributes:
        authorizer: the callback that SQLite asks for permission when it compiles a statement. It permits
            everything.
    """

    def __init__(self) -> None:
        self._noted: dict[str, int] = {}
        # ``min`` returns its first argument, SQLITE_OK (0), as all arguments have the same key. Computing
        # the key makes the note. No Python code runs here: an interrupt could strike in it, and SQLite
        # would swallow that and report "not authorized".
        self.authorizer = partial(
            min, sqlite3.SQLITE_OK, key=partial(self._noted.setdefault, "seen")
        )

    @property
    def seen(self) -> bool:
        """True if a statement was compiled since the last call of :meth:`forget`."""
        return bool(self._noted)

    def forget(self) -> None:
        """Clear the note, so that the next compiled statement is noticed."""
        self._noted.clear()


class Connection(sqlite3.Connection):
    """A connection that weak references can refer to.

    Attributes:
        number: the number of a writing connection; each one gets a new number.
        synchronous: the current value of ``PRAGMA synchronous``, which says how commits are synced.
        used: the monotonic time when it was last given back to the pool.
    """

    number = 0
    synchronous = "NORMAL"
    used = 0.0

    def __del__(self) -> None:
        # Python 3.13 would warn of an open connection, but a repository need not be closed.
        try:
            self.close()
        except sqlite3.ProgrammingError:  # it could not be opened
            return


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
        self._most_readers, self._every = timing.most_readers, timing.reader_every
        self._close_after = timing.close_reader_after
        self.schema = tables
        self.busy_timeout = busy_timeout
        self.migrates = True  # if False, a file of an older version is refused
        #: True once the file was checked, and created if it was missing, until :meth:`close`.
        self.opened = False
        self._writer: Connection | None = None
        self._idle: list[Connection] = []
        # Readers in use, by thread and by the number of reads that the thread was already in. A signal
        # handler may raise between any two lines, and a kept traceback keeps everything that its frames
        # refer to. So a connection moves between the idle list and this dict in one step in C. If a read is
        # interrupted, its connection stays here, and the next thread that finds it closes it.
        self._taken: dict[tuple[int, float], Connection] = {}
        # When a waiting thread next scans for connections that were left behind.
        self._scan_at = 0.0
        self._readers: weakref.WeakSet[Connection] = weakref.WeakSet()  # all of them
        self._waiting: deque[_thread.LockType] = deque()  # the bells of the waiting threads
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
                f"{path} was locked for {self.busy_timeout:g} s by another connection; nothing was changed"
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
        """Return the writing connection. The caller holds the write lock."""
        return self._writer or self._open_file()

    def read(self, work: Callable[..., T], *arguments: object) -> T:
        """Return ``work(connection, *arguments)``, called with a reader, and translate SQLite's errors.

        Raises:
            RepositoryUnavailable: all readers were in use for ``busy_timeout`` seconds.
        """
        identity, idle, taken = self.file.identity, self._idle, self._taken
        key: tuple[int, float] = _thread.get_ident(), 0
        if key in taken:
            # A finalizer reads in the middle of a read, or the last read was interrupted.
            key = key[0], _depth(sys._getframe(1))
            self._close_own(*key)
        try:
            try:
                taken.update(zip((key,), map(idle.pop, _LAST)))  # noqa: B905  (stops after one)
            except IndexError:
                self._wait_for_reader(key)
            connection = taken[key]
            result = work(connection, *arguments)
        except BaseException as error:
            self._close(key)
            if isinstance(error, FAILURES):
                raise self.translated(error) from error
            raise
        if identity is None or self.file.identity != identity:
            # The file was closed in the meantime; this may be another file's connection.
            self._close(key)
            return result
        now = time.monotonic()
        idle.extend(map(taken.pop, (key,)))
        connection.used = now  # set last: see _close_left
        if self._waiting:
            self._ring()
        # The connection given back last is taken first, so the first in the list is needed least.
        try:
            if now - idle[0].used > self._close_after:
                self._close_first()
        except IndexError:  # another thread took it
            pass
        return result

    def _wait_for_reader(self, key: tuple[int, float]) -> None:
        """Open a reader or, if there are ``Timing.most_readers``, wait for one."""
        deadline = time.monotonic() + self.busy_timeout
        while True:
            bell = _thread.allocate_lock()
            bell.acquire()
            # Added first, so that every thread that gives one back from now on rings.
            self._waiting.append(bell)
            try:
                if self._take_idle(key) or self._open_reader(key):
                    return
                now = time.monotonic()
                if now >= min(self._scan_at, deadline):
                    self._scan_at = now + self._every
                    if self._close_left():
                        continue
                if now >= deadline:
                    raise RepositoryUnavailable(
                        f"{self._most_readers} threads were reading {self.file.path} for "
                        f"{self.busy_timeout:g} s; read from fewer threads at once, or raise busy_timeout"
                    )
                bell.acquire(timeout=min(deadline - now, self._every))
            finally:
                with suppress(ValueError):  # it was removed when it rang
                    self._waiting.remove(bell)

    def _take_idle(self, key: tuple[int, float]) -> bool:
        try:
            self._taken.update(zip((key,), map(self._idle.pop, _LAST)))  # noqa: B905
        except IndexError:
            return False
        return True

    def _open_reader(self, key: tuple[int, float]) -> bool:
        opened: list[Connection] = []
        try:
            with self._opening:
                # A list holds only those that still exist.
                if len(list(self._readers)) >= self._most_readers:
                    return False
                connection = self._connect(opened)
                self.file.check()  # another file may have replaced it just before
                self._taken[key] = connection
                self._readers.add(connection)
        except BaseException:
            _close_all(opened)
            raise
        return True

    def _ring(self) -> None:
        with suppress(IndexError):  # no thread waits
            self._waiting.popleft().release()

    def _close(self, key: tuple[int, float]) -> None:
        """Close a connection in use, if it is there. After an exception in here, it can be called again."""
        if (connection := self._taken.get(key)) is not None:
            connection.close()
            self._readers.discard(connection)
            self._taken.pop(key, None)
            self._ring()

    def _close_own(self, thread: int, depth: float) -> None:
        """Close the connections that the calling thread took at this depth of reads or deeper, and left."""
        with self._opening:  # another thread may do the same
            for key in list(self._taken):
                if key[0] == thread and key[1] >= depth:
                    self._close(key)

    def _close_left(self) -> bool:
        """Close the connections that threads left behind in interrupted reads. Return True if any."""
        taken = [(key, one, one.used) for key, one in list(self._taken.items())]
        frames, found = top_frames(), False
        with self._opening:
            for key, one, used in taken:
                left = key[1] >= _depth(frames.get(key[0]))
                # It must not have been given back and taken again, perhaps after the frames were read.
                if left and self._taken.get(key) is one and one.used == used:
                    self._close(key)
                    found = True
        return found

    def _close_first(self) -> None:
        """Close the idle connection that is needed least. Raise ``IndexError`` if none is idle."""
        key = _thread.get_ident(), inf
        with self._opening:
            self._close(key)  # the one that an exception left behind here
            self._taken.update(zip((key,), map(self._idle.pop, _FIRST)))  # noqa: B905
            self._close(key)

    def discard_writer(self) -> None:
        """Close the writing connection. The next write opens a new one. The caller holds the write lock."""
        with suppress(sqlite3.Error):
            self._close_writer()

    def _close_writer(self) -> None:
        try:
            if self._writer is not None:
                self._writer.close()
        finally:
            self._writer = None

    def close(self) -> None:
        """Close all connections that are not in use."""
        self.opened = False
        self._close_writer()
        self._close_idle()

    def _close_idle(self) -> None:
        self._close_left()
        with suppress(IndexError):
            while True:
                self._close_first()

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
            if not list(self._readers) or time.monotonic() > deadline:
                return
            time.sleep(0.001)

    def only_existing(self) -> None:
        """Create no file from now on, and refuse one of an older version."""
        self.file.only_existing()
        self.migrates = False

    def reopen(self) -> None:
        """Allow connections to be opened again, in the parent, after the fork."""
        self._opening.release()

    def renew_after_fork(self) -> None:
        """Start over, in a forked child, with connections of its own."""
        self._abandoned += [*self._readers, *([self._writer] if self._writer else [])]
        self._idle, self._taken, self._readers = [], {}, weakref.WeakSet()
        self._writer = None
        self._waiting.clear()
        self._opening = threading.RLock()

    # --- opening

    def _connect(self, into: list[Connection], mode: str = "rw") -> Connection:
        """Open a connection and add it to a list in the same step. The list's owner closes it."""
        from urllib.parse import quote  # slow to load, and not needed before a file is opened

        connect: partial[Any] = partial(
            sqlite3.connect,
            uri=True,
            timeout=self.busy_timeout,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=256,
            factory=Connection,
        )
        into.extend(map(connect, (f"file://{quote(os.fsencode(self.file.path))}?mode={mode}",)))
        connection = into[-1]
        # In WAL mode, NORMAL loses nothing when the process dies. The writer raises it for commits that
        # must survive a power cut.
        connection.execute("PRAGMA synchronous = NORMAL")
        return connection

    def _open_file(self) -> Connection:
        if sqlite3.sqlite_version_info < MINIMUM_SQLITE:
            raise RepositoryError(f"SQLite {sqlite3.sqlite_version} is too old: use 3.34 or later")
        known = self.file.known
        opened: list[Connection] = []
        try:
            self.file.find()
            self._check_before_touching()
            connection = self._connect(opened, "rwc" if self.file.create and not known else "rw")
            self.file.opened()
            if self._prepare(connection):
                connection = self._replace(opened)
            connection.set_authorizer(self.compiling.authorizer)
            connection.number = next(_numbers)
            self._writer = connection  # set here, as an interrupt may come right after the return
            self.opened = True
            return connection
        except BaseException as error:
            self._writer, self.opened = None, False
            _close_all(opened)
            if not known:
                self.file.forget()
            if isinstance(error, sqlite3.Error):
                raise self.translated(error) from error
            raise

    def _check_before_touching(self) -> None:
        """Check an existing file in a way that does not change another program's file.

        When the last connection closes, it writes the log into the file, unless it is read-only. But if
        there is no log, a read-only connection leaves an empty one behind.
        """
        path = self.file.path
        if _size(path) == 0:
            return
        opened: list[Connection] = []
        try:
            self.schema.check(self._connect(opened, "ro" if _size(f"{path}-wal") else "rw"), path)
        finally:
            _close_all(opened)

    def _prepare(self, connection: sqlite3.Connection) -> bool:
        """Migrate the file. Return True if the connection has changed the schema."""
        # The switch to WAL fails with "locked" at once if another process is switching at the same time:
        # SQLite does not call the busy handler then.
        deadline = time.monotonic() + self.busy_timeout
        while True:
            try:
                version = self.schema.check(connection, self.file.path)
                if version == 0:
                    self._refuse_empty_file()
                elif version < schema.VERSION and not self.migrates:
                    raise schema.older(version, self.file.path)
                if self.schema.prefix:
                    self._require_log(connection)
                else:
                    if version == 0:
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

    def _replace(self, opened: list[Connection]) -> Connection:
        """Replace a connection that has changed the schema: its statements would stay slower."""
        fresh = self._connect(opened)
        fresh.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_EVERY}").fetchone()
        self.schema.check(
            fresh, self.file.path
        )  # opens the log, which closing the other would remove
        opened[0].close()
        return fresh

    def _require_log(self, connection: sqlite3.Connection) -> None:
        """Raise an error if the application's file has no write-ahead log, which is for it to decide."""
        ((mode,),) = connection.execute("PRAGMA journal_mode").fetchall()
        if mode != "wal":
            raise RepositoryError(
                f"{self.file.path} has journal_mode={mode}, and TaskX requires WAL; it was not changed. "
                "The application must run PRAGMA journal_mode = WAL once: the file keeps it"
            )

    def _refuse_empty_file(self) -> None:
        if not self.file.create:
            state = f"has no tables {self.schema.prefix}*" if self.schema.prefix else "is empty"
            raise RepositoryUnavailable(
                f"{self.file.path} {state}, and no tables may be made: check the path; it was not changed"
            )


def _close_all(connections: list[Connection]) -> None:
    for connection in connections:
        connection.close()


def _depth(frame: FrameType | None) -> float:
    """Count the reads in a stack. Return infinity if another thread's stack changed in the meantime."""
    depth, last = 0, frame
    while frame is not None:
        depth += frame.f_code is Connections.read.__code__
        last, frame = frame, frame.f_back
    # A generator that has yielded no longer leads to its caller.
    return inf if last is not None and last.f_code.co_flags & _MAY_YIELD else depth
