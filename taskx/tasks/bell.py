"""Wake-ups between threads that a signal handler cannot break, and the agenda of the housekeeper."""

from __future__ import annotations

import _thread
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from taskx.tasks.timing import Timing

# Checks without a result cost at most 0.7 % of a core: a rest grows up to _TIMES times the processor time
# of one check.
_TIMES = 150

_release = _thread.LockType.release


class Bell:
    """Wakes threads that wait: a ``Condition`` without its own lock.

    ``Condition`` takes and releases its lock in Python code. If a signal handler raises an exception
    there, the lock stays locked, for ever and for all threads. A bell holds no lock. An exception can
    leave behind only a wake-up that wakes no thread.

    A thread calls :meth:`listen`, checks if it must wait at all, and then calls :meth:`wait`.
    """

    def __init__(self) -> None:
        #: The threads that listen: for each a lock, which is released to wake the thread.
        self.listening: deque[_thread.LockType] = deque()

    def listen(self) -> _thread.LockType:
        """Begin to listen for rings. Pass the returned lock to :meth:`wait` or :meth:`leave`."""
        ear = _thread.allocate_lock()
        ear.acquire()
        self.listening.append(ear)
        return ear

    def wait(self, ear: _thread.LockType, timeout: float | None = None) -> None:
        """Wait for a ring since :meth:`listen`, at most ``timeout`` seconds; None waits for ever."""
        try:
            ear.acquire(timeout=-1 if timeout is None else _bounded(timeout))
        finally:
            self.leave(ear)

    def leave(self, ear: _thread.LockType) -> None:
        """Stop listening."""
        with suppress(ValueError):  # a ring has already removed it
            self.listening.remove(ear)

    def ring(self, most: int = 1) -> None:
        """Wake up to ``most`` of the threads that listen, first the threads that have listened longest."""
        while most > 0 and self.listening:
            try:
                # In one step: no other thread rings it, too, and no exception strikes in between.
                next(map(_release, iter(self.listening.popleft, None)))
            except IndexError:  # the thread has left
                return
            most -= 1

    def ring_all(self) -> None:
        """Wake all threads that listen."""
        self.ring(len(self.listening))


class Signal:
    """Wakes the one thread that waits for it: an ``Event`` made of a raw lock.

    An exception that strikes in an ``Event`` may leave its lock locked. The next thread that sets the
    event would then wait for ever.
    """

    #: The clock of its time-outs, in seconds.
    now: Callable[[], float] = staticmethod(time.monotonic)
    #: True if its waits do not wait, but move the clock of a test.
    virtual = False

    def __init__(self) -> None:
        self._lock = _thread.allocate_lock()
        self.clear()

    def clear(self) -> None:
        """Reset the signal, so that the next :meth:`wait` waits."""
        self._lock.acquire(blocking=False)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the signal is set, and reset it. Return False after ``timeout`` seconds."""
        if timeout is None:
            return self._lock.acquire()
        return self._lock.acquire(timeout=_bounded(timeout))

    def set(self) -> None:
        """Wake the thread that waits, or the next one that will wait."""
        if self._lock.locked():
            with suppress(RuntimeError):  # another thread has set it in the meantime
                self._lock.release()

    def __call__(self, _: object) -> None:
        self.set()


class Rest:
    """The rests of a thread that others wake. They get longer while its checks bring no result.

    Create and use it on that thread, because it measures the processor time of the current thread.
    """

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        self._seconds, self._at = 0.0, 0.0
        self._used = time.thread_time()

    @property
    def seconds(self) -> float:
        """The rest that is due: zero after a check with a result, or some time without a check."""
        quiet = time.monotonic() - self._at >= self._timing.rest_within
        return 0.0 if quiet else self._seconds

    def after(self, *, vain: bool) -> None:
        """Note a check; ``vain`` says that it brought no result."""
        used = time.thread_time()
        longest = self._timing.poll_every
        longer = min(2 * self.seconds, _TIMES * (used - self._used), longest)
        self._seconds = max(longer, self._timing.shortest_rest) if vain else 0.0
        self._at, self._used = time.monotonic(), used


class Agenda:
    """The duties that are due soon. Any thread may post one; a housekeeper, if there is one, reads them."""

    def __init__(self) -> None:
        #: True if a housekeeper reads this.
        self.attended = False
        #: True if new free tasks may be stored: a fetch is due, however many tasks the buffer has.
        self.look_for_more = True
        #: True if the last fetch left free tasks that come after all that it took.
        self.rest_is_stored = False
        #: True if the time is known at which the next delayed task is due.
        self.due_known = False
        #: The names of schedules that were changed in this process.
        self.schedules: deque[str] = deque()
        self._bell = Signal()
        self._asleep_long = False
        self._told = False  # True if frequent rounds were asked for since the last round began

    @property
    def more_stored(self) -> bool:
        """True if the repository may hold free tasks that would fit into the buffer."""
        return self.look_for_more or self.rest_is_stored

    def wake(self) -> None:
        """Start the next round now."""
        self._bell.set()

    def wake_from_long_sleep(self) -> None:
        """End a long sleep, and run a round every few milliseconds while something waits for it."""
        self._told = True
        if self._asleep_long:
            self._asleep_long = False
            self.wake()

    def check_due_soon(self) -> None:
        """Find the time at which the next delayed task is due, and wake then: a delayed task was stored."""
        self.check_due()
        self.wake()

    def fetch_soon(self) -> None:
        """Fetch free tasks from the repository: some may start now that could not start before."""
        self.expect_more()
        self.wake_from_long_sleep()

    def check_schedule_soon(self, name: str) -> None:
        """Find the time of the next tick of a schedule that was changed, and wake then."""
        if self.attended:
            self.schedules.append(name)
            self.wake()

    # --- for those who fetch

    def expect_more(self) -> None:
        """Look for free tasks at the next fetch, however many tasks the buffer has."""
        self.look_for_more = True

    def begin_fetch(self) -> None:
        """Note that a fetch begins: what is stored from now on is for the next one."""
        self.look_for_more = self.rest_is_stored = False

    def leave_rest(self, *, some: bool) -> None:
        """Note if a fetch has left free tasks that come after all that it took."""
        self.rest_is_stored = some

    # --- for the housekeeper

    def attend(self) -> None:
        """Note that a housekeeper reads this from now on."""
        self.due_known = False  # a housekeeper whose start failed may have set it
        self.attended = True

    def leave(self) -> None:
        """Note that no housekeeper reads this any more, and end the sleep of the last one."""
        self.attended = False
        self.wake()

    def check_due(self) -> None:
        """Find the time at which the next delayed task is due, in the next round."""
        self.due_known = False

    def claim_due(self) -> bool:
        """Return True if that time must be read; from now on it counts as known."""
        if self.due_known:
            return False  # and nothing is set: another thread may just be taking it back
        self.due_known = True
        return True

    def begin_round(self) -> None:
        """Begin a round: duties that are posted from now on are for the next round."""
        self._told = False

    def sleep(self, timeout: float) -> bool:
        """Wait until :meth:`wake`, at most ``timeout`` seconds; return True if it was called."""
        woken = self._bell.wait(timeout)
        self._asleep_long = False
        return woken

    def sleep_long(self, longest: Callable[[], float], often: float) -> bool:
        """Sleep ``longest()`` seconds, or only ``often`` seconds if something asked for frequent rounds.

        Return True if something asked for a round.
        """
        self._asleep_long = True  # before longest() is called: a duty posted from now on wakes
        timeout = longest()
        if timeout <= often:
            self._asleep_long = False
        woken = self.sleep(min(timeout, often) if self._told else timeout)
        return woken or self._told


def _bounded(timeout: float) -> float:
    """Return the time-out within the limits that a lock accepts."""
    return min(max(timeout, 0.0), threading.TIMEOUT_MAX)
