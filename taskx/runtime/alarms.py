"""Fires tokens at their deadlines, from a thread that touches nothing but memory.

Apart from the scheduler, whose calls to the repository may block for seconds.
"""

from __future__ import annotations

import threading
import time

from taskx.core.clock import Clock
from taskx.core.token import CancelReason, CancelToken

# Deadlines are on the injected clock, which a test may move: look at it this often, in seconds.
_LONGEST_WAIT = 0.05


class Alarms:
    """The deadlines of the tokens that are in use; its thread lives as long as there are any."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._tokens: set[CancelToken] = set()
        self._running = False

    def add(self, token: CancelToken) -> None:
        """Fire ``token`` when its deadline passes."""
        with self._lock:
            self._tokens.add(token)
            start, self._running = not self._running, True
        if start:
            threading.Thread(target=self._run, name="taskx-alarms", daemon=True).start()

    def remove(self, token: CancelToken) -> None:
        """Forget a token."""
        with self._lock:
            self._tokens.discard(token)

    def ring(self) -> float | None:
        """Fire what is due; seconds until the next deadline, None if there is none."""
        with self._lock:
            tokens = list(self._tokens)
        now = self._clock.monotonic()
        nearest: float | None = None
        for token in tokens:
            if token.deadline is None or token.deadline <= now:
                token.fire(CancelReason.TIMEOUT)
                self.remove(token)
            elif nearest is None or token.deadline - now < nearest:
                nearest = token.deadline - now
        return nearest

    def _run(self) -> None:
        quiet_since = time.monotonic()
        while True:
            nearest = self.ring()
            if nearest is not None:
                quiet_since = time.monotonic()
            with self._lock:
                # Kept for a second, so that short tasks with a deadline do not start a thread each.
                if not self._tokens and time.monotonic() - quiet_since > 1.0:
                    self._running = False
                    return
            time.sleep(_LONGEST_WAIT if nearest is None else min(nearest, _LONGEST_WAIT))
