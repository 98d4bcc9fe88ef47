"""What the housekeeper of a started queue is to look at; posted by whoever knows first."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from taskx.common.bell import Signal


class Agenda:
    """What is to be looked at soon. Anybody posts, in any thread; the housekeeper reads, if one does."""

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

    def look_for_due(self) -> None:
        """A task must not start before its time: look when that is, and wake then."""
        self.due_known = False
        self.wake()

    def look_for_more(self) -> None:
        """Free tasks in the repository may start that could not before."""
        self.more_stored = True
        self.wake_from_long_sleep()

    def look_for_schedule(self, name: str) -> None:
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
