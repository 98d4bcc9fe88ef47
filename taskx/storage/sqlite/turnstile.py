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
from contextlib import suppress

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

_open: set[int] = set()


class Turnstile:
    """The two locks of one database file; used by one thread at a time.

    Where the files cannot be had, it lets everybody through: it is for fairness, not for safety.
    """

    def __init__(self, folder: str) -> None:
        self._paths = (os.path.join(folder, "outer.lock"), os.path.join(folder, "inner.lock"))
        self._fds: tuple[int, int] | None = None
        self._crowded_until = self._look_at = 0.0

    def enter(self, timeout: float) -> None:
        """Wait for one's turn, at most ``timeout`` seconds; past that SQLite's own lock decides."""
        if fcntl is None or not (fds := self._fds or self._open_files()):
            return
        outer, inner = fds
        now = time.monotonic()
        alone = self._crowded_until <= now < self._look_at
        if alone and _try(inner):
            return
        met = alone
        try:
            if not _try(outer):
                met = True
                _wait(outer, timeout)
            if not _try(inner):
                met = True
                _wait(inner, timeout)
        finally:
            fcntl.flock(outer, fcntl.LOCK_UN)
        self._look_at = now + LOOK_EVERY
        if met:
            self._crowded_until = now + CROWDED

    def leave(self) -> None:
        """Let the next one through."""
        if self._fds:
            fcntl.flock(self._fds[1], fcntl.LOCK_UN)

    def close(self) -> None:
        """Close the files; entering opens them again."""
        fds, self._fds = self._fds, None
        for fd in fds or ():
            _open.discard(fd)
            os.close(fd)

    def renew_after_fork(self) -> None:
        """In a forked child, which has closed its copies: open files of its own when needed."""
        self._fds = None

    def _open_files(self) -> tuple[int, int] | None:
        with suppress(OSError):
            os.makedirs(os.path.dirname(self._paths[0]), exist_ok=True)
            outer, inner = (
                os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666) for path in self._paths
            )
            _open.update((outer, inner))
            self._fds = (outer, inner)
        return self._fds


def _try(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _wait(fd: int, timeout: float) -> bool:
    # Not a blocking flock: that has no time-out, and a stopped process may hold the lock.
    deadline = time.monotonic() + timeout
    pause = _FIRST_PAUSE
    while time.monotonic() < deadline:
        time.sleep(pause)
        if _try(fd):
            return True
        pause = min(pause * 1.2, _LONGEST_PAUSE)
    return False


def _close_in_child() -> None:
    for fd in _open:
        os.close(fd)
    _open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
