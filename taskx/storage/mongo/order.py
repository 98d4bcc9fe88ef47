"""Where new tasks stand: by the server's clock, and never before one of this process."""

from __future__ import annotations

import threading
import time

from taskx.core.clock import Clock
from taskx.core.errors import RepositoryError
from taskx.storage.mongo.connection import Connection

#: Room for so many tasks within a millisecond.
PER_MS = 1 << 20
_ASK_EVERY, _PATIENCE = 600.0, 1.0


class Order:
    """Hands out numbers that rise with time, alike on every host whatever its clock says.

    Args:
        connection: the way to the server.
        clock: what goes instead where the server does not tell.
    """

    def __init__(self, connection: Connection, clock: Clock) -> None:
        self._connection = connection
        self._clock = clock
        self.renew()

    def renew(self) -> None:
        """Begin anew, in a forked child."""
        self._lock = threading.Lock()
        self._last = 0
        self._offset = 0.0
        self._asked: float | None = None

    def next(self) -> int:
        """A number above all that this process was given before."""
        self._ask_sometimes()
        now = time.monotonic() * 1000 + self._offset
        with self._lock:
            self._last = max(self._last + 1, int(now) * PER_MS)
            return self._last

    def _ask_sometimes(self) -> None:
        asked, now = self._asked, time.monotonic()
        if asked is not None and now - asked < _ASK_EVERY:
            return
        self._asked = now
        before = time.monotonic()
        try:
            told = self._connection.server_ms(_PATIENCE)
        except RepositoryError:
            told = None  # what is being stored will fail, too; the next one asks again
            self._asked = asked
        if told is not None:
            self._offset = told - before * 1000
        elif not self._offset:
            self._offset = self._clock.now_ms() - before * 1000
