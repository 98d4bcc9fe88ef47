"""Starting ahead: how many tasks to start at a time, and which worker gets each of them."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue

from taskx.attempt.runner import Run
from taskx.tasks.timing import Timing

# Whether tasks are short, a running mean of their durations tells. The last one has this weight in it, and
# counts for at most so many times ``Timing.short_task``: one slow task changes nothing.
_WEIGHT, _MOST_COUNTED = 1 / 16, 20
# Tasks count as long from this mean on, again in times ``Timing.short_task``.
_LONG = 2
# Tasks with a lower mean than this may only look long, because workers wait for the interpreter. One worker
# runs them alone as a trial: after 64 tasks, and after ever more if they were long in it.
_DOUBTFUL, _FIRST_TRIAL, _LONGEST_TRIAL = 10, 64, 8192
# If so many tasks started together, a worker lets others gather for the whole time; if fewer, for as much
# less. So they hardly wait, and gather only if several thousand come in a second.
_FULL_GATHER = 16
# If tasks are not short, a start also starts some for workers that are free soon, for at most this part of
# all workers. Each would else start its own, and they would wait for each other.
_SOON_FREE = 1 / 4
# A task counts for at most so many seconds in the mean that tells how soon workers are free.
_LONGEST_COUNTED = 1.0
_MICROSECOND = 1e-6
# Longer than any short task, so that the mean is a number.
_HOUR = 3600.0

_put = SimpleQueue.put


class Ahead:
    """The waiting workers, the number of tasks to start for them at once, and the started tasks."""

    def __init__(self, workers: int, timing: Timing) -> None:
        self.workers = workers
        # Read here, as each task uses them.
        self._short_task = min(timing.short_task, _HOUR)
        self._tied_up_after = timing.tied_up_after
        self._most, self._most_served = timing.most_ahead, timing.most_served
        self._gather, self._hand_back_after = timing.gather, timing.hand_back_after
        #: Started runs that any free worker may take, in order; each is in the state ``ahead``.
        self.runs: deque[Run] = deque()
        #: The time at which each executing run began. Kept apart from the states of all runs, because
        #: each submit counts them.
        self.at_work: dict[Run, float] = {}
        # The time at which a run was last laid out or taken; True if one was taken since the last nudge.
        self._since, self._taken = 0.0, False
        #: The hands of the workers that wait. The one that came last is called first, so few threads stay
        #: warm. Whoever calls it puts something into its hand: a started run, or None to have it look.
        self.waiting: deque[SimpleQueue[Run | None]] = deque()
        #: True if tasks have lately been so short that waking a thread costs more than a task.
        self.short = False
        self._mean = _LONG * self._short_task  # the first tasks count as long
        self._mean_of_all = _LONGEST_COUNTED
        # The number of attempts from which a trial is due, and that between the next two.
        self._try_at = self._patience = _FIRST_TRIAL
        self._last_batch = 0
        self._lingering = threading.Lock()
        #: The number of attempts that have ended.
        self.attempts = 0
        self._counter = itertools.count(1)

    def set_workers(self, number: int) -> None:
        """Set the number of workers."""
        self.workers = number

    # --- how many to start

    def ended(self, run: Run, duration: float) -> None:
        """Note that a worker is free again after a task of ``duration`` seconds."""
        self.at_work.pop(run, None)
        self.attempts = attempts = next(self._counter)
        short = self._short_task
        self._mean_of_all += (min(duration, _LONGEST_COUNTED) - self._mean_of_all) * _WEIGHT
        self._mean += (min(duration, _MOST_COUNTED * short) - self._mean) * _WEIGHT
        if not self.short:
            doubtful = attempts >= self._try_at and self._mean < _DOUBTFUL * short
            if doubtful or self._mean < short:
                self.short, self._mean = True, short
        elif self._mean > _LONG * short:
            self.short, self._try_at = False, attempts + self._patience
            self._patience = min(2 * self._patience, _LONGEST_TRIAL)
        elif attempts > self._try_at + 2 * self._patience:  # they have been short for long
            self._patience = _FIRST_TRIAL

    def portion(self, *, alone: bool) -> int:
        """Return the number of tasks to start at once: one for each of some waiting workers; many if short.

        If the node is not alone, it is half as many of the short ones: other nodes wait for the file.
        Of others, some more start for the workers that are free before such a task would be handed back.
        """
        if self.short:
            return self._most if alone else self._most // 2
        # Many workers, one after another, wait longer for a start than for each other.
        served = max(self._most_served, self.workers // 8)
        part = self._hand_back_after / max(self._mean_of_all, _MICROSECOND)
        soon = int(self.workers * min(part, _SOON_FREE))
        return min(1 + min(len(self.waiting), served) + soon, self._most)

    def let_gather(self, waiting: int, most: int) -> None:
        """Let a few short tasks gather while they arrive in quick succession.

        One transaction then starts more of them, and fewer transactions hold up the submitter.
        ``waiting`` is the number of tasks in the buffer, of which ``most`` would start.
        """
        if self._last_batch > 1 and waiting < most and self._lingering.acquire(blocking=False):
            try:
                time.sleep(self._gather * min(1.0, self._last_batch / _FULL_GATHER))
            finally:
                self._lingering.release()

    def begin(self, count: int) -> None:
        """Note that a worker begins to start ``count`` tasks."""
        self._last_batch, self._taken = count, True

    # --- started tasks

    def lay_out(self, runs: Sequence[Run]) -> bool:
        """Give each started task to a worker that waits, or else offer it to any that becomes free.

        Return False if some are only offered.
        """
        if self.short:
            self._offer(runs)
            return not self.runs
        for run in runs:
            self.serve(run)
        if self.runs:
            self.serve()  # a worker may have begun to wait before the last one was there
        return not self.runs

    def _offer(self, runs: Sequence[Run]) -> None:
        self._since = time.monotonic()
        for run in runs:
            run.state = "ahead"
            self.runs.append(run)

    @property
    def idles(self) -> bool:
        """True if a waiting worker has nothing to take yet, and waking it pays."""
        more = len(self.waiting) > len(self.runs)
        return more and not (self.short and self._leaves_to_others())

    def serve(self, run: Run | None = None) -> bool:
        """Wake the worker that began to wait last, and give it a started task, or have it look for one.

        Return False if none waits: the task is only offered. The worker leaves the line and gets the task
        in one step, because an interrupt that came in between would lose it.
        """
        try:
            next(map(_put, iter(self.waiting.pop, None), (run,)))
        except IndexError:
            if run is not None:
                self._offer((run,))
            return False
        return True

    def take(self) -> Run | None:
        """Take the next task that was started ahead; return None if none is left."""
        try:
            run = self.runs.popleft()
        except IndexError:
            return None
        run.state = "starting"
        self._taken, self._since = True, time.monotonic()
        if self.runs and self.waiting and not self.short:  # short ones are left to this worker
            self.serve()
        return run

    def clear(self, older_than: float = 0.0) -> list[Run]:
        """Remove and return all tasks started ahead, if none was taken for ``older_than`` seconds."""
        runs: list[Run] = []
        if self.runs and time.monotonic() - self._since >= older_than:
            with suppress(IndexError):
                while True:
                    runs.append(self.runs.popleft())
        return runs

    # --- workers that wait

    def wait(self, ready: Callable[[], object], timeout: float | None = None) -> Run | None:
        """Wait until this worker is called, unless ``ready`` returns a true value.

        Return the task that it was given; None if it must look for one, or ``timeout`` seconds have passed.
        """
        hand: SimpleQueue[Run | None] = SimpleQueue()
        self.waiting.append(hand)  # before the check: for a task that arrives later it is called
        if ready():
            with suppress(ValueError):  # it was just called
                self.waiting.remove(hand)
                return None
        elif timeout is not None:
            with suppress(Empty):
                return hand.get(timeout=max(0.0, timeout))
            with suppress(ValueError):
                self.waiting.remove(hand)
                return None
        return hand.get()

    def wake(self) -> bool:
        """Wake a waiting worker, unless tasks are short and another worker is busy with them.

        Waking a thread, so that two compete for the interpreter lock, costs more than a short task.
        Return False if workers wait and none was woken.
        """
        if not self.waiting:
            return True
        if self._leaves_to_others():
            return False
        self.serve()
        return True

    def _leaves_to_others(self) -> bool:
        """Return True if tasks are short and another worker is busy with them."""
        busy = self.workers - len(self.waiting)
        # Usually one of them has just taken its task, so there is no need to look at the times.
        if not self.short or busy > len(self.at_work):
            return self.short
        # The others have a task that is not short after all.
        limit = time.monotonic() - self._tied_up_after
        return busy > len([began for began in list(self.at_work.values()) if began < limit])

    def wake_all(self) -> None:
        """Wake every worker that waits by now."""
        with suppress(IndexError):
            for _ in range(len(self.waiting)):
                # The one that has waited longest: those that come meanwhile look for themselves.
                next(map(_put, iter(self.waiting.popleft, None), (None,)))

    def nudge(self, waiting: int) -> bool:
        """Wake workers if no task was taken since the last call.

        ``waiting`` is the number of tasks in the buffer: the worker that takes some calls the next one.
        Return False if no worker waits.
        """
        if not self._taken:
            for _ in range(len(self.runs) + bool(waiting)):
                self.serve()
        self._taken = False
        return bool(self.waiting)

    def needs_care(self, waiting: int) -> bool:
        """Return True if a task here, or in the buffer, may soon have to be handed on."""
        return bool(self.runs or (waiting and self.waiting))
