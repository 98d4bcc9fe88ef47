"""Threads that wait for one another, where a signal may strike."""

from __future__ import annotations

import _thread
import threading
from collections import deque
from contextlib import suppress


class Bell:
    """Wakes threads that wait: a ``Condition`` without a lock of its own.

    ``Condition`` takes and gives back its lock in Python code. The exception of a signal handler that
    strikes there leaves the lock locked, for ever and for all threads. Here nothing is held, so
    nothing can be left behind but a wake-up that wakes nobody.

    A thread calls :meth:`listen`, looks whether it has to wait at all, and then calls :meth:`wait`.
    """

    def __init__(self) -> None:
        #: The threads that listen, each by a lock that is unlocked to wake it.
        self.listening: deque[_thread.LockType] = deque()

    def listen(self) -> _thread.LockType:
        """Hear every ring from now on; to be given to :meth:`wait` or :meth:`leave`."""
        ear = _thread.allocate_lock()
        ear.acquire()
        self.listening.append(ear)
        return ear

    def wait(self, ear: _thread.LockType, timeout: float | None = None) -> None:
        """Wait for a ring since :meth:`listen`, at most ``timeout`` seconds (None: for ever)."""
        try:
            ear.acquire(timeout=-1 if timeout is None else _bounded(timeout))
        finally:
            self.leave(ear)

    def leave(self, ear: _thread.LockType) -> None:
        """Listen no more."""
        with suppress(ValueError):  # it was rung
            self.listening.remove(ear)

    def ring(self, most: int = 1) -> None:
        """Wake some of the threads that listen, those first that have listened longest."""
        while most > 0 and self.listening:
            try:
                ear = self.listening[0]
            except IndexError:  # it left
                return
            try:
                ear.release()
                most -= 1
            except RuntimeError:  # another thread wakes it, or was struck before the next line
                pass
            self.leave(ear)

    def ring_all(self) -> None:
        """Wake all threads that listen."""
        self.ring(len(self.listening))


class Signal:
    """Wakes the one thread that waits for it: an ``Event`` made of a raw lock.

    An exception that strikes in an ``Event`` may leave it locked; then whoever sets it waits for ever.
    """

    def __init__(self) -> None:
        self._lock = _thread.allocate_lock()
        self.clear()

    def clear(self) -> None:
        """Have the next wait wait."""
        self._lock.acquire(blocking=False)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it rings, which ends with that; False if ``timeout`` seconds passed before."""
        if timeout is None:
            return self._lock.acquire()
        return self._lock.acquire(timeout=_bounded(timeout))

    def set(self) -> None:
        """Ring."""
        if self._lock.locked():
            with suppress(RuntimeError):  # another thread rang meanwhile
                self._lock.release()

    def __call__(self, _: object) -> None:
        self.set()


def _bounded(timeout: float) -> float:
    """The time-out, within what a lock takes."""
    return min(max(timeout, 0.0), threading.TIMEOUT_MAX)
