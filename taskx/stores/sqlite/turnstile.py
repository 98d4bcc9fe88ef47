"""A queue of processes in front of SQLite's write lock.

SQLite's own busy handler sleeps and tries again. So a process that writes without pause leaves others
almost no chance. Two ``flock`` locks make the processes take turns. A process that wants to write holds the
outer lock while it waits for the inner lock, and releases the outer one when it has the inner one. A
process that has just written finds the outer lock held by a waiting process, and comes after it.

As long as no other process writes, a process takes the inner lock only, which costs two system calls a
transaction. It still takes the outer lock now and then: otherwise a process that comes to a busy file would
hardly ever find the inner lock free.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from taskx.stores.sqlite.file import DatabaseFile
from taskx.tasks.timing import Timing

try:
    import fcntl
except ImportError:  # not a POSIX system: processes do not take turns
    fcntl = None  # type: ignore[assignment]


#: The names of the turnstile's two lock files, which do not belong to a node.
NAMES = ("outer", "inner")

#: The open file descriptors of each turnstile, by the ``id`` of their list. A forked child closes them.
_open: dict[int, list[int]] = {}


class Turnstile:
    """The two locks of one database file. One thread uses it at a time.

    If the lock files cannot be opened, every process passes: the locks are for fairness, not for safety.
    The files are closed at the latest when the turnstile is garbage collected. The database must be open
    before a thread enters.
    """

    def __init__(self, file: DatabaseFile, timing: Timing) -> None:
        self._file = file
        self._timing = timing
        self._fds: list[int] = []
        self._crowded_until = self._check_at = 0.0
        #: Let the next process through. It is one call in C, which no signal handler can interrupt.
        self.leave: Callable[[], object] = dict
        weakref.finalize(self, _close, self._fds).atexit = False

    def enter(self, timeout: float) -> float:
        """Wait at most ``timeout`` seconds for this process's turn. Return the number of seconds left.

        After the time-out, SQLite's own lock decides.
        """
        if fcntl is None or not (self._fds or self._open_files()):
            return timeout
        outer, inner = self._fds
        now = time.monotonic()
        alone = self._crowded_until <= now < self._check_at
        if alone:
            try:
                fcntl.flock(inner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return timeout
            except OSError:
                pass
        met = alone
        try:
            if not _try(outer):
                met = True
                _wait(outer, now + timeout, self._timing)
            if not _try(inner):
                met = True
                _wait(inner, now + timeout, self._timing)
        finally:
            fcntl.flock(outer, fcntl.LOCK_UN)
        self._check_at = now + self._timing.crowd_every
        if not met:
            return timeout
        self._crowded_until = now + self._timing.crowded_for
        return max(0.0, now + timeout - time.monotonic())

    def renew_after_fork(self) -> None:
        """Start over in a forked child: it is the parent that holds a lock."""
        self.leave = dict

    def close(self) -> None:
        """Close the files. The next :meth:`enter` opens them again."""
        self.leave = dict
        _close(self._fds)

    def _open_files(self) -> bool:
        folder, self.leave = self._file.folder, dict
        _open[id(self._fds)] = self._fds
        try:
            os.makedirs(folder, exist_ok=True)
            for name in NAMES:
                self._fds.append(_open_file(os.path.join(folder, f"{name}.lock")))
            self.leave = partial(fcntl.flock, self._fds[1], fcntl.LOCK_UN)
        except BaseException as error:  # also an interrupt: one lock is useless without the other
            self.close()
            if not isinstance(error, OSError):
                raise
        return bool(self._fds)


def until_unlocked(
    step: Callable[[], object],
    deadline: float,
    error: type[Exception],
    timing: Timing,
    hurry: Callable[[], bool] = lambda: False,
) -> None:
    """Call a step again and again while a program that takes no turns holds SQLite's write lock.

    SQLite's own busy handler sleeps up to 100 ms. Beside a writer that hardly pauses, it would hardly ever
    find the file free. ``error`` is the driver's class of errors for a locked file. As soon as ``hurry``
    returns True, nobody waits any longer.
    """
    pause = timing.begin_pause
    while True:
        try:
            step()
            return
        except error as raised:
            if "locked" not in str(raised) or hurry() or time.monotonic() >= deadline:
                raise
        time.sleep(pause)
        pause = min(2 * pause, timing.longest_begin_pause)


def _open_file(path: str) -> int:
    try:
        return os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
    except PermissionError:  # it belongs to another user; read access is enough to lock it
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _close(fds: list[int]) -> None:
    _open.pop(id(fds), None)
    with suppress(IndexError):
        while True:
            os.close(fds.pop())


def _try(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _wait(fd: int, deadline: float, timing: Timing) -> bool:
    # A blocking flock has no time-out, and a stopped process may hold the lock.
    pause = timing.turn_pause
    while time.monotonic() < deadline:
        time.sleep(pause)
        if _try(fd):
            return True
        pause = min(pause * 1.2, timing.longest_turn_pause)
    return False


def _close_in_child() -> None:
    for fds in list(_open.values()):
        _close(fds)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
