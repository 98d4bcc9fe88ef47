"""Threads that wake one another, where a signal may strike; and what they have the housekeeper look at."""

from __future__ import annotations

import _thread
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

#: Seconds between two looks at least: what is told meanwhile is looked at together.
SHORTEST_REST = 0.002
# Looks in vain cost 2 % of a core at most: a rest grows to so many times the processor time of one. It need
# not be longer than the interval in which all is polled. After so many seconds of quiet there is none.
_TIMES, _LONGEST_REST, _QUIET = 50, 0.06, 1.0


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

    #: The clock of its time-outs, in seconds.
    now: Callable[[], float] = staticmethod(time.monotonic)
    #: True if its time-outs are measured on a clock that a test moves.
    virtual = False

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


class Rest:
    """The rests of a thread that others wake: longer while one look after the other is in vain.

    Made and used in that thread: it measures the processor time of that.
    """

    def __init__(self) -> None:
        self._seconds, self._at = 0.0, 0.0
        self._used = time.thread_time()

    @property
    def seconds(self) -> float:
        """The rest that is due: none after a look that brought something, or a second of quiet."""
        return self._seconds if time.monotonic() - self._at < _QUIET else 0.0

    def after(self, *, vain: bool) -> None:
        """Note that a look brought something, or was in vain."""
        used = time.thread_time()
        longer = min(2 * self.seconds, _TIMES * (used - self._used), _LONGEST_REST)
        self._seconds = max(longer, SHORTEST_REST) if vain else 0.0
        self._at, self._used = time.monotonic(), used


class Agenda:
    """The duties that are due soon. Anybody posts, in any thread; the housekeeper reads, if one does."""

    def __init__(self) -> None:
        #: Whether a housekeeper reads this.
        self.attended = False
        #: Whether the repository may hold free tasks that would fit into the buffer.
        self.more_stored = True
        #: Whether it is known when the next delayed task is due.
        self.due_known = False
        #: Names of schedules that were changed in this process.
        self.schedules: deque[str] = deque()
        self._bell = Signal()
        self._asleep_long = False
        self._told = False  # to wake from a long sleep, since the last round began

    def wake(self) -> None:
        """Have the next round now."""
        self._bell.set()

    def wake_from_long_sleep(self) -> None:
        """Have a round every few milliseconds from now on, as long as something waits for it."""
        self._told = True
        if self._asleep_long:
            self._asleep_long = False
            self.wake()

    def check_due_soon(self) -> None:
        """A task must not start before its time: look when that is, and wake then."""
        self.due_known = False
        self.wake()

    def fetch_soon(self) -> None:
        """Free tasks in the repository may start that could not before."""
        self.more_stored = True
        self.wake_from_long_sleep()

    def check_schedule_soon(self, name: str) -> None:
        """A schedule was changed: look when it ticks, and wake then."""
        if self.attended:
            self.schedules.append(name)
            self.wake()

    # --- for the housekeeper

    def begin_round(self) -> None:
        """A round begins: from now on, what is posted is for the next one."""
        self._told = False

    def sleep(self, timeout: float) -> None:
        """Wait until :meth:`wake`, at most ``timeout`` seconds."""
        self._bell.wait(timeout)
        self._asleep_long = False

    def sleep_long(self, longest: Callable[[], float], often: float) -> None:
        """Wait as :meth:`sleep`, or until something is to be looked at every ``often`` seconds."""
        self._asleep_long = True  # before looking: who posts from now on wakes
        timeout = longest()
        self.sleep(min(timeout, often) if self._told else timeout)


def _bounded(timeout: float) -> float:
    """The time-out, within what a lock takes."""
    return min(max(timeout, 0.0), threading.TIMEOUT_MAX)
