"""A queue of processes before SQLite's write lock.

SQLite's own busy handler sleeps and tries again, so that a process which writes without pause leaves
another next to no chance. Two ``flock`` locks give turns: who wants to write holds the outer one
while it waits for the inner one, and gives it up when it has that. A process that has just written
finds the outer one held by whoever waits, and comes after it. As long as nobody else writes, the
inner one alone is tried, which is two system calls a transaction, but for a look at the outer one now
and then: who comes to a file that another process keeps busy would hardly ever find the inner one free.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from taskx.storage.sqlite.file import DatabaseFile

try:
    import fcntl
except ImportError:  # not a POSIX system: processes take their chances
    fcntl = None  # type: ignore[assignment]

# Seconds between two tries for a lock that another process holds: about the time of a small commit.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.00005, 0.001

#: Seconds for which a process keeps to its turns after it has met another one.
CROWDED = 1.0
#: Seconds between two looks for others while none was met.
LOOK_EVERY = 0.01

#: The names of the two lock files of the turnstile, which belong to no node.
NAMES = ("outer", "inner")

#: The numbers of the open files of each turnstile, by the identity of their list: for forks.
_open: dict[int, list[int]] = {}


class Turnstile:
    """The two locks of one database file; used by one thread at a time.

    Where the lock files cannot be opened, it lets everybody through: it is for fairness, not for safety.
    They are closed at the latest when the turnstile is garbage collected. The database is open when it is
    entered.
    """

    def __init__(self, file: DatabaseFile) -> None:
        self._file = file
        self._fds: list[int] = []
        self._crowded_until = self._look_at = 0.0
        #: Let the next one through. One call in C: no signal handler comes between.
        self.leave: Callable[[], object] = dict
        weakref.finalize(self, _close, self._fds).atexit = False

    def enter(self, timeout: float) -> float:
        """Wait for one's turn, at most ``timeout`` seconds; return how many of these are left.

        Past them SQLite's own lock decides.
        """
        if fcntl is None or not (self._fds or self._open_files()):
            return timeout
        outer, inner = self._fds
        now = time.monotonic()
        alone = self._crowded_until <= now < self._look_at
        if alone and _try(inner):
            return timeout
        met = alone
        try:
            if not _try(outer):
                met = True
                _wait(outer, now + timeout)
            if not _try(inner):
                met = True
                _wait(inner, now + timeout)
        finally:
            fcntl.flock(outer, fcntl.LOCK_UN)
        self._look_at = now + LOOK_EVERY
        if not met:
            return timeout
        self._crowded_until = now + CROWDED
        return max(0.0, now + timeout - time.monotonic())

    def close(self) -> None:
        """Close the files; entering opens them again."""
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
        except BaseException as error:  # an interrupt, too: one lock without the other is no use
            self.close()
            if not isinstance(error, OSError):
                raise
        return bool(self._fds)


def _open_file(path: str) -> int:
    try:
        return os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
    except PermissionError:  # it belongs to another user; reading is enough to lock it
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


def _wait(fd: int, deadline: float) -> bool:
    # Not a blocking flock: that has no time-out, and a stopped process may hold the lock.
    pause = _FIRST_PAUSE
    while time.monotonic() < deadline:
        time.sleep(pause)
        if _try(fd):
            return True
        pause = min(pause * 1.2, _LONGEST_PAUSE)
    return False


def _close_in_child() -> None:
    for fds in list(_open.values()):
        _close(fds)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
