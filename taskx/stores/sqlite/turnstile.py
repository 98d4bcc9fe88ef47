"""A queue of processes in front of SQLite's write lock.

SQLite's own busy handler sleeps and tries again. So a process that writes without pause leaves others
almost no chance. Here the processes take turns of some milliseconds, in which one may write many times: to
pass the file to another process costs as much as several small transactions.

A queue with two places leads to the turn. Each is a ``flock`` lock. A process takes ``queue``, then
``outer``, then ``inner``, which is the turn; it gives up a place when it has the next one. So two processes
wait in the order in which they came, and all behind them have the same chance. With one place only, a
process that has just written would often be faster than one that has waited for long.

During its turn, a process takes ``inner`` for each transaction, and nothing else. In between, the next
process may take it, which ends the turn: one that has nothing more to write keeps nobody waiting. A process
that is killed keeps no lock.
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


#: The names of the turnstile's lock files, which do not belong to a node.
NAMES = ("queue", "outer", "inner")

#: The open file descriptors of each turnstile, by the ``id`` of their list. A forked child closes them.
_open: dict[int, list[int]] = {}


class Turnstile:
    """The locks of one database file. One thread uses it at a time.

    If the lock files cannot be opened, every process passes: the locks are for fairness, not for safety.
    The files are closed at the latest when the turnstile is garbage collected. The database must be open
    before a thread enters.
    """

    def __init__(self, file: DatabaseFile, timing: Timing) -> None:
        self._file = file
        self._timing = timing
        self._fds: list[int] = []
        self._turn_until = 0.0
        #: Let the next process through. It is one call in C, which no signal handler can interrupt.
        self.leave: Callable[[], object] = dict
        weakref.finalize(self, _close, self._fds).atexit = False

    def enter(self, timeout: float) -> float:
        """Wait at most ``timeout`` seconds for this process's turn. Return the number of seconds left.

        After the time-out, SQLite's own lock decides.
        """
        if fcntl is None or not (self._fds or self._open_files()):
            return timeout
        queue, outer, inner = self._fds
        now = time.monotonic()
        if now < self._turn_until:
            try:
                fcntl.flock(inner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return timeout
            except OSError:
                pass
        deadline = now + timeout
        try:
            try:
                _take(queue, deadline, self._timing.place_pause)
                _take(outer, deadline, self._timing.place_pause)
            finally:
                fcntl.flock(queue, fcntl.LOCK_UN)
            _take(inner, deadline, self._timing.turn_pause)
        finally:
            fcntl.flock(outer, fcntl.LOCK_UN)
        now = time.monotonic()
        self._turn_until = now + self._timing.turn
        return max(0.0, deadline - now)

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
            self.leave = partial(fcntl.flock, self._fds[-1], fcntl.LOCK_UN)
        except BaseException as error:  # also an interrupt: one lock is useless without the others
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


def _take(fd: int, deadline: float, pause: float) -> None:
    # A blocking flock has no time-out, and a stopped process may hold the lock. All pauses are equal: if
    # they grew, a process that has just come would have a better chance than one that has waited.
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError:
            if time.monotonic() >= deadline:
                return
        time.sleep(pause)


def _close_in_child() -> None:
    for fds in list(_open.values()):
        _close(fds)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
