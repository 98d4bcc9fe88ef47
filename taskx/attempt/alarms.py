"""Deadlines: a thread fires each token at its deadline, and reports the tasks that do not heed it.

The thread uses memory only. It is not the housekeeper's thread, because the housekeeper's calls to
the repository may block for seconds.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from math import inf
from operator import itemgetter

from taskx.tasks.clock import Clock
from taskx.tasks.errors import CancelReason
from taskx.tasks.log import is_for_the_program, log
from taskx.tasks.timing import Timing
from taskx.tasks.token import CancelToken

#: The seconds after a token's deadline, and the function to call if the token is still in use then.
Overdue = tuple[float, Callable[[], object]]
#: What is to be done for a token, and when, the earliest first.
Steps = list[tuple[float, Callable[[], object]]]


class Pulse:
    """The signs of life of a run that times out after ``stall`` seconds without one.

    A sign only notes the time. The alarm looks at it when the run would time out, and moves on.
    """

    __slots__ = ("_last", "_now", "silent", "stall")

    def __init__(self, stall: float, clock: Clock) -> None:
        self.stall = stall
        self._now = clock.monotonic
        self._last = -inf
        #: True if the token has fired for want of a sign.
        self.silent = False

    def beat(self) -> None:
        """Note a sign of life."""
        self._last = self._now()

    @property
    def due(self) -> float:
        """The time at which the run times out without a further sign."""
        return self._last + self.stall


class Alarms:
    """The deadlines of the tokens in use. The thread lives as long as there are any."""

    def __init__(self, clock: Clock, timing: Timing) -> None:
        self._clock = clock
        self._every = timing.alarms_every
        self._lock = threading.Lock()
        #: The time and the action of each step that a token still needs, the earliest first.
        self._steps: dict[CancelToken, Steps] = {}
        self._running = False

    def add(
        self, token: CancelToken, overdue: Overdue | None = None, pulse: Pulse | None = None
    ) -> None:
        """Fire ``token`` at its deadline; call ``overdue`` if the token is still in use some time later.

        With a ``pulse`` it fires, too, when there was no sign of life, even without a deadline.
        """
        deadline = -inf if token.deadline is None else token.deadline
        steps: Steps = []
        if token.deadline is not None or pulse is None:
            steps = [(deadline, partial(token.fire, CancelReason.TIMEOUT))]
            if overdue is not None:
                seconds, call = overdue
                steps.append((deadline + seconds, call))
        if pulse is not None:  # first: the thread forgets a token without steps
            self._expect(steps, token, pulse, overdue)
        with self._lock:
            self._steps[token] = steps
        self.go_on()

    def _expect(
        self,
        steps: Steps,
        token: CancelToken,
        pulse: Pulse,
        overdue: Overdue | None,
    ) -> None:
        """Look at a pulse when the token would fire without a further sign of life."""
        steps.append((pulse.due, partial(self._listen, steps, token, pulse, overdue)))
        steps.sort(key=itemgetter(0))

    def _listen(
        self,
        steps: Steps,
        token: CancelToken,
        pulse: Pulse,
        overdue: Overdue | None,
    ) -> None:
        """Fire the token if there was no sign of life, and from then on wait only for ``overdue``."""
        now = self._clock.monotonic()
        if token.reason is not None:
            return
        if pulse.due > now:
            self._expect(steps, token, pulse, overdue)
            return
        pulse.silent = True  # first: the thread of the run goes on at once
        pulse.silent = token.fire(CancelReason.TIMEOUT)
        if pulse.silent:
            steps[:] = [] if overdue is None else [(now + overdue[0], overdue[1])]

    def go_on(self) -> None:
        """Start the thread if there is something to do and the thread does not run.

        If the system cannot start a thread, the next call tries again. Until then a token fires when its
        state is read.
        """
        try:
            with self._lock:
                if self._running or not self._steps:
                    return
                self._running = True
            threading.Thread(target=self._run, name="taskx-alarms", daemon=True).start()
        except BaseException as error:
            self._running = False  # if the thread runs after all, a second one does no harm
            if is_for_the_program(error):
                raise
            log.error("cannot start the thread for time-outs, trying again: %s", error)

    def remove(self, token: CancelToken) -> None:
        """Forget a token."""
        with self._lock:
            self._steps.pop(token, None)

    def ring(self) -> float | None:
        """Do the steps that are due. Return the seconds until the next step, None if there is none."""
        with self._lock:
            tokens = list(self._steps.items())
        now = self._clock.monotonic()
        nearest: float | None = None
        for token, steps in tokens:
            while steps and steps[0][0] <= now:
                _do(steps.pop(0)[1])
            if not steps:
                self.remove(token)
            elif nearest is None or steps[0][0] - now < nearest:
                nearest = steps[0][0] - now
        return nearest

    def _run(self) -> None:
        quiet_since = time.monotonic()
        while True:
            nearest = self.ring()
            if nearest is not None:
                quiet_since = time.monotonic()
            with self._lock:
                # Keep the thread for a second, so that short tasks with a deadline share one thread.
                if not self._steps and time.monotonic() - quiet_since > 1.0:
                    self._running = False
                    return
            time.sleep(self._every if nearest is None else min(nearest, self._every))


def _do(step: Callable[[], object]) -> None:
    try:
        step()
    except BaseException:  # noqa: BLE001  (the next token must fire in any case)
        log.exception("cannot report a time-out")
