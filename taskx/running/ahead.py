"""Starting ahead: short tasks are started several at a time, and laid out for whichever worker is free."""

from __future__ import annotations

import _thread
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

from taskx.common.bell import Bell
from taskx.executing.runner import Run

#: Most tasks started in one transaction, when tasks have lately been short.
MAX_AHEAD = 32
#: Tasks are short below this many seconds.
SHORT = 0.0002
#: Seconds that a worker lets short tasks gather when they come one upon the other.
LINGER = 0.002
#: Seconds that a task started ahead waits for a free worker before it is handed back.
PATIENCE = 0.005
#: Seconds after which a worker's task counts as not short, whatever the others were.
TIED_UP = 0.002
#: Waiting workers that one start serves at most. What starts together ends together and then waits
#: together, again and again: in small portions, the workers drift apart and find their way clear.
MOST_WAITING = 5
# Tasks are short while at most so many of the last sixteen were not.
_ALL_LONG, _MOST_LONG = 0xFFFF, 2


class Ahead:
    """The workers that wait, how many tasks to start for them at once, and what was started."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        #: What was started and no worker has taken yet, in order; each is in the state ``ahead``.
        self.runs: deque[Run] = deque()
        #: Since when each worker has been at its run. They are counted at each submit, so it is apart
        #: from the states of all runs.
        self.at_work: dict[Run, float] = {}
        # The time when a run was laid out or taken last; whether any was taken since the last nudge.
        self._since, self._taken = 0.0, False
        self._waiting: set[_thread.LockType] = set()
        self._work = Bell()
        #: Whether tasks have lately been so short that to wake a thread costs more.
        self.short = False
        self._lately = _ALL_LONG  # the first tasks count as long
        self._last_batch = 0
        self._lingering = threading.Lock()

    # --- how many to start

    def ended(self, run: Run, duration: float) -> None:
        """Note that a worker is free again, and how long its task took."""
        self.at_work.pop(run, None)
        # One bit for each of the last tasks, so that a single hiccup changes nothing.
        self._lately = (self._lately << 1 | (duration >= SHORT)) & _ALL_LONG
        self.short = self._lately.bit_count() <= _MOST_LONG

    @property
    def portion(self) -> int:
        """The number of tasks to start at once: one for each of a few waiting workers, or many if short."""
        return MAX_AHEAD if self.short else 1 + min(len(self._waiting), MOST_WAITING)

    def let_gather(self, waiting: int) -> None:
        """While short tasks come one upon the other, let a few gather.

        One transaction then starts more of them, and the submitter is not held up by so many. ``waiting``
        says how many are in the buffer.
        """
        if self._last_batch > 1 and waiting < MAX_AHEAD and self._lingering.acquire(blocking=False):
            try:
                time.sleep(LINGER)
            finally:
                self._lingering.release()

    def begin(self, count: int) -> None:
        """Note that a worker begins to start so many tasks."""
        self._last_batch, self._taken = count, True

    # --- what was started

    def lay_out(self, runs: Sequence[Run]) -> None:
        """Offer tasks that were started to whichever worker is free."""
        self._since = time.monotonic()
        for run in runs:
            run.state = "ahead"
            self.runs.append(run)
        if not self.short:
            self._work.ring(len(runs))

    @property
    def idles(self) -> bool:
        """True if a worker waits for which there is nothing yet, and which is worth waking."""
        return len(self._waiting) > len(self.runs) and not self._leaves_to_others()

    def serve(self, run: Run) -> bool:
        """Give a worker that waits a task that was started; False if each may have one already."""
        run.state = "ahead"
        self._since = time.monotonic()
        self.runs.append(run)
        self._work.ring()
        return len(self.runs) <= len(self._waiting)

    def take(self) -> Run | None:
        """Take the next task that was started ahead; None if there is none."""
        try:
            run = self.runs.popleft()
        except IndexError:
            return None
        run.state = "starting"
        self._taken, self._since = True, time.monotonic()
        if self.runs and self._waiting:
            self.wake()
        return run

    def clear(self, older_than: float = 0.0) -> list[Run]:
        """Take away all tasks that were started ahead, if none was taken for ``older_than`` seconds."""
        runs: list[Run] = []
        if self.runs and time.monotonic() - self._since >= older_than:
            with suppress(IndexError):
                while True:
                    runs.append(self.runs.popleft())
        return runs

    # --- workers that wait

    def wait(self, ready: Callable[[], object]) -> None:
        """Wait until ``ready`` says that there is something for this worker."""
        while True:
            ear = self._work.listen()
            self._waiting.add(ear)  # first: who brings something from now on wakes it
            try:
                if ready():
                    self._work.leave(ear)
                    return
                self._work.wait(ear)
            finally:
                self._waiting.discard(ear)

    def wake(self) -> bool:
        """Wake a waiting worker, unless tasks are short and another worker is at it.

        To wake a thread, and to have two of them want the interpreter, costs more than a short task.
        False if no worker was woken, though some wait.
        """
        if not self._waiting:
            return True
        if self._leaves_to_others():
            return False
        self._work.ring()
        return True

    def _leaves_to_others(self) -> bool:
        """Return whether tasks are short and another worker is at it."""
        return self.short and self.workers - len(self._waiting) > self._tied_up()

    def _tied_up(self) -> int:
        """Return how many workers are at a task that is not short after all."""
        limit = time.monotonic() - TIED_UP
        return sum(began < limit for began in list(self.at_work.values()))

    def wake_all(self) -> None:
        """Wake every worker that waits."""
        self._work.ring_all()

    def nudge(self, waiting: int) -> bool:
        """Wake workers if nothing was taken since the last call of what there is for them.

        ``waiting`` says how many tasks are in the buffer. False if no worker waits.
        """
        if self._waiting and not self._taken:
            self._work.ring(waiting + len(self.runs))
        self._taken = False
        return bool(self._waiting)

    def needs_care(self, waiting: int) -> bool:
        """Return whether something lies here, or in the buffer, that may have to be handed on soon."""
        return bool(self.runs or (waiting and self._waiting))
