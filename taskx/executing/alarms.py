"""Fires tokens at their deadlines, and tells when somebody does not heed one, from a thread that touches
nothing but memory.

Apart from the housekeeper, whose calls to the repository may block for seconds.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from math import inf

from taskx.core.clock import Clock
from taskx.core.errors import CancelReason
from taskx.core.log import is_for_the_program, log
from taskx.core.token import CancelToken

# Deadlines are on the injected clock, which a test may move: look at it this often, in seconds.
_LONGEST_WAIT = 0.05
#: What is called when a token has not been taken away so many seconds after its deadline.
Overdue = tuple[float, Callable[[], object]]


class Alarms:
    """The deadlines of the tokens that are in use; its thread lives as long as there are any."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        #: What is to be done for each token, and when, the earliest first.
        self._steps: dict[CancelToken, list[tuple[float, Callable[[], object]]]] = {}
        self._running = False

    def add(self, token: CancelToken, overdue: Overdue | None = None) -> None:
        """Fire ``token`` when its deadline passes; if it is there still some time later, call something."""
        deadline = -inf if token.deadline is None else token.deadline
        steps: list[tuple[float, Callable[[], object]]]
        steps = [(deadline, partial(token.fire, CancelReason.TIMEOUT))]
        if overdue is not None:
            seconds, call = overdue
            steps.append((deadline + seconds, call))
        with self._lock:
            self._steps[token] = steps
        self.go_on()

    def go_on(self) -> None:
        """Start the thread if there is something to do and it does not run.

        Where the system has no thread to give, the next call tries again; until then a token fires when
        somebody asks it.
        """
        try:
            with self._lock:
                if self._running or not self._steps:
                    return
                self._running = True
            threading.Thread(target=self._run, name="taskx-alarms", daemon=True).start()
        except BaseException as error:
            self._running = False  # if it runs after all, a second one does no harm
            if is_for_the_program(error):
                raise
            log.error("cannot start the thread that fires time-outs (trying again): %s", error)

    def remove(self, token: CancelToken) -> None:
        """Forget a token."""
        with self._lock:
            self._steps.pop(token, None)

    def ring(self) -> float | None:
        """Do what is due; seconds until the next moment, None if there is none."""
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
                # Kept for a second, so that short tasks with a deadline do not start a thread each.
                if not self._steps and time.monotonic() - quiet_since > 1.0:
                    self._running = False
                    return
            time.sleep(_LONGEST_WAIT if nearest is None else min(nearest, _LONGEST_WAIT))


def _do(step: Callable[[], object]) -> None:
    try:
        step()
    except BaseException:  # noqa: BLE001  (the next token must be fired in any case)
        log.exception("a time-out could not be told")
