"""Opening the file, the connections to it, and what SQLite's errors mean."""

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
from taskx.storage.sqlite import schema
from taskx.storage.sqlite.file import DatabaseFile

T = TypeVar("T")

#: What SQLite's driver raises, and what binding a value can.
FAILURES = (sqlite3.Error, OverflowError, UnicodeEncodeError)

#: Versions before lack what the statements rely on.
MINIMUM_SQLITE = (3, 34, 0)
#: Bytes of a page of a new file; an older one keeps its 4,096. A commit writes each page that it changes as
#: a whole, and the write of a task changes a few bytes in each of three to five. With still smaller pages
#: counting takes longer, as there are more of them.
PAGE_SIZE = 2048
#: Pages in the log before a commit copies them into the file. That takes some milliseconds
#: on the way of a task; four times SQLite's default makes it a rare one, and pages that are written
#: again and again are copied once.
CHECKPOINT_EVERY = 4000

#: Most connections that read at once; further threads wait. Each holds two files open.
MOST_READERS = 16
#: Seconds after which a connection that was not needed is closed.
IDLE = 10.0
# Polling interval, in seconds, of a thread that waits for a connection: a wake-up may be lost.
_LOOK_AGAIN = 0.05
# Arguments of ``list.pop``, for ``map``.
_LAST, _FIRST = (-1,), (0,)
_numbers = count(1)
_MAY_YIELD = CO_GENERATOR | CO_COROUTINE | CO_ASYNC_GENERATOR


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
    missing = "" if os.path.exists(path) else "it is missing and cannot be made; "
    return f"{missing}no permission, or too many open files"


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
    """A connection that can be referred to weakly.

    Attributes:
        number: another one for each that writes.
        synchronous: how its commits are synced, as ``PRAGMA synchronous`` says it.
        used: when it was given back last, on the monotonic clock.
    """

    number = 0
    synchronous = "NORMAL"
    used = 0.0


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
        # Those in use, by their thread and how many reads that was in already. The exception of a signal
        # handler may strike between any two lines, and whoever keeps its traceback keeps all that the
        # frames refer to. So one goes from the idle ones to these and back in one step in C, and what a
        # thread has left here is closed by whoever comes upon it.
        self._taken: dict[tuple[int, float], Connection] = {}
        self._look_at = 0.0  # when the next thread that waits looks for such
        self._readers: weakref.WeakSet[Connection] = weakref.WeakSet()  # all of them
        self._waiting: deque[_thread.LockType] = deque()  # bells of threads that wait for one
        self._opening = threading.RLock()  # a finalizer may read while its thread opens one
        self.compiling = Compiling()
        # What a forked child inherits all the same is kept here for ever: closing it would drop the
        # locks that the parent holds on the file.
        self._abandoned: list[Connection] = []

    def __del__(self) -> None:
        # Before they are collected, which Python 3.13 warns of.
        _close_all([*self._taken.values(), *self._idle, *([self._writer] if self._writer else [])])

    def translated(self, error: Exception) -> TaskxError:
        """Our error for one of SQLite's; the words decide, as Python 3.10 gives no error codes."""
        text, path = str(error), self.file.path
        if "locked" in text or "busy" in text:
            return RepositoryUnavailable(
                f"{path} was locked for {self.busy_timeout:g} s by another process; nothing was changed"
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

    def writer(self) -> Connection:
        """The writing connection; the caller holds the write lock."""
        return self._writer or self._open_file()

    @property
    def opened(self) -> bool:
        """Whether the file was made and checked."""
        return self._writer is not None

    def read(self, work: Callable[..., T], *arguments: object) -> T:
        """Do ``work(connection, *arguments)`` with one that reads; sqlite3's errors become ours.

        Raises:
            RepositoryUnavailable: all were in use for ``busy_timeout`` seconds.
        """
        identity, idle, taken = self.file.identity, self._idle, self._taken
        key: tuple[int, float] = _thread.get_ident(), 0
        if key in taken:  # a finalizer reads in the middle of a read, or the last one was struck
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
            self._close(key)  # all was closed before or meanwhile; this may be another file's
            return result
        now = time.monotonic()
        idle.extend(map(taken.pop, (key,)))
        connection.used = now  # only now: see _close_left
        if self._waiting:
            self._ring()
        # The one given back last is taken first, so the first one in the list is needed least.
        try:
            if now - idle[0].used > IDLE:
                self._close_first()
        except IndexError:  # another thread took it
            pass
        return result

    def _wait_for_reader(self, key: tuple[int, float]) -> None:
        """Open a connection to read with or, where there are as many as there may be, wait for one."""
        deadline = time.monotonic() + self.busy_timeout
        while True:
            bell = _thread.allocate_lock()
            bell.acquire()
            self._waiting.append(bell)  # first: whoever gives one back from now on rings
            try:
                if self._take_idle(key) or self._open_reader(key):
                    return
                now = time.monotonic()
                if now >= min(self._look_at, deadline):
                    self._look_at = now + _LOOK_AGAIN
                    if self._close_left():
                        continue
                if now >= deadline:
                    raise RepositoryUnavailable(
                        f"{MOST_READERS} threads were reading {self.file.path} for "
                        f"{self.busy_timeout:g} s; read from fewer threads at once, or raise busy_timeout"
                    )
                bell.acquire(timeout=min(deadline - now, _LOOK_AGAIN))
            finally:
                with suppress(ValueError):  # it rang
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
                if len(list(self._readers)) >= MOST_READERS:  # the live ones
                    return False
                connection = self._connect(opened)
                self.file.check()  # another one may have come in its place just before
                self._taken[key] = connection
                self._readers.add(connection)
        except BaseException:
            _close_all(opened)
            raise
        return True

    def _ring(self) -> None:
        with suppress(IndexError):  # nobody waits
            self._waiting.popleft().release()

    def _close(self, key: tuple[int, float]) -> None:
        """Close one that was taken, if it is there; once more, should an exception strike here."""
        if (connection := self._taken.get(key)) is not None:
            connection.close()
            self._readers.discard(connection)
            self._taken.pop(key, None)
            self._ring()

    def _close_own(self, thread: int, depth: float) -> None:
        """Close those that the calling thread took in that many reads or more, and has left."""
        with self._opening:  # another thread may do the same
            for key in list(self._taken):
                if key[0] == thread and key[1] >= depth:
                    self._close(key)

    def _close_left(self) -> bool:
        """Close those that threads took in reads that they have left; whether there were any."""
        taken = [(key, one, one.used) for key, one in list(self._taken.items())]
        frames, found = top_frames(), False
        with self._opening:
            for key, one, used in taken:
                left = key[1] >= _depth(frames.get(key[0]))
                # And not given back and taken again, which was perhaps after the look at the frames.
                if left and self._taken.get(key) is one and one.used == used:
                    self._close(key)
                    found = True
        return found

    def _close_first(self) -> None:
        """Close the idle one that is needed least; ``IndexError`` if there is none."""
        key = _thread.get_ident(), inf
        with self._opening:
            self._close(key)  # as an exception left it
            self._taken.update(zip((key,), map(self._idle.pop, _FIRST)))  # noqa: B905
            self._close(key)

    def discard_writer(self) -> None:
        """Have the next write open a new connection; the caller holds the write lock."""
        with suppress(sqlite3.Error):
            self._close_writer()

    def _close_writer(self) -> None:
        try:
            if self._writer is not None:
                self._writer.close()
        finally:
            self._writer = None

    def close(self) -> None:
        """Close all that is not in use."""
        self._close_writer()
        self._close_idle()

    def _close_idle(self) -> None:
        self._close_left()
        with suppress(IndexError):
            while True:
                self._close_first()

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
        while True:
            self._close_idle()
            if not list(self._readers) or time.monotonic() > deadline:  # the live ones
                return
            time.sleep(0.001)

    def reopen(self) -> None:
        """In the parent, after the fork: connections may be opened again."""
        self._opening.release()

    def renew_after_fork(self) -> None:
        """In a forked child: start over with connections of one's own."""
        self._abandoned += [*self._readers, *([self._writer] if self._writer else [])]
        self._idle, self._taken, self._readers = [], {}, weakref.WeakSet()
        self._writer = None
        self._waiting.clear()
        self._opening = threading.RLock()

    # --- opening

    def _connect(self, into: list[Connection], mode: str = "rw") -> Connection:
        """Open a connection, and put it into a list in the same step: whoever has that closes it."""
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
        # NORMAL loses nothing at process death in WAL mode. The writer raises it where a power cut
        # must be survived.
        connection.execute("PRAGMA synchronous = NORMAL")
        return connection

    def _open_file(self) -> Connection:
        if sqlite3.sqlite_version_info < MINIMUM_SQLITE:
            raise RepositoryError(
                f"SQLite {sqlite3.sqlite_version} is too old: TaskX needs 3.34 or later"
            )
        known = self.file.known
        opened: list[Connection] = []
        try:
            self.file.find()
            self._check_before_touching()
            connection = self._connect(opened, "rw" if known or not self.file.create else "rwc")
            self.file.opened()
            if self._prepare(connection):
                connection = self._anew(opened)
            connection.set_authorizer(self.compiling.authorizer)
            connection.number = next(_numbers)
            self._writer = connection  # here, as the exception may strike once this has returned
            return connection
        except BaseException as error:
            self._writer = None
            _close_all(opened)
            if not known:
                self.file.forget()
            if isinstance(error, sqlite3.Error):
                raise self.translated(error) from error
            raise

    def _check_before_touching(self) -> None:
        """Look at an existing file in a way that leaves another program's as it was.

        The last connection that closes writes what a log holds into the file, unless it is one that
        cannot write; but that one leaves empty files of a log behind where there was none.
        """
        path = self.file.path
        if _size(path) == 0:
            return
        opened: list[Connection] = []
        try:
            schema.check(self._connect(opened, "ro" if _size(f"{path}-wal") else "rw"), path)
        finally:
            _close_all(opened)

    def _prepare(self, connection: sqlite3.Connection) -> bool:
        """Bring the file up to date; True if the connection has changed the schema."""
        # The switch to WAL answers "locked" at once where another process is switching, too: the
        # busy handler is not asked.
        deadline = time.monotonic() + self.busy_timeout
        while True:
            try:
                if schema.check(connection, self.file.path) == 0:
                    self._refuse_empty_file()
                    connection.execute(f"PRAGMA page_size = {PAGE_SIZE}")
                    connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
                connection.execute("PRAGMA journal_mode = WAL").fetchone()
                connection.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_EVERY}").fetchone()
                return schema.migrate(connection, self.file.path)
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.005)

    def _anew(self, opened: list[Connection]) -> Connection:
        """Replace a connection that has changed the schema: its statements are slower from then on."""
        fresh = self._connect(opened)
        fresh.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_EVERY}").fetchone()
        schema.check(fresh, self.file.path)  # opens the log, which closing the other would remove
        opened[0].close()
        return fresh

    def _refuse_empty_file(self) -> None:
        if not self.file.create:
            raise RepositoryUnavailable(
                f"{self.file.path} is empty, and create=False: check the path; it was not touched"
            )


def _close_all(connections: list[Connection]) -> None:
    for connection in connections:
        connection.close()


def _depth(frame: FrameType | None) -> float:
    """Count the reads in a stack; infinite if another thread went on meanwhile."""
    depth, last = 0, frame
    while frame is not None:
        depth += frame.f_code is Connections.read.__code__
        last, frame = frame, frame.f_back
    # A generator that has yielded does not lead to its caller any more.
    return inf if last is not None and last.f_code.co_flags & _MAY_YIELD else depth
