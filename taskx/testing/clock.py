"""A clock that a test moves by hand."""

from __future__ import annotations

import threading
from datetime import datetime, timezone

from taskx.core.clock import to_datetime, to_ms


class ManualClock:
    """A clock that stands still until a test moves it.

    Hand it to ``Queue`` or to a repository. The wall clock, which records are stamped with, and the
    monotonic one, which durations and deadlines are measured by, go forward together with
    :meth:`advance`; :meth:`set_wall` moves the wall clock alone, as an administrator or NTP would.

    .. code-block:: python

        clock = ManualClock()
        repository = MemoryRepository(clock=clock)
        clock.advance(60)
        clock.set_wall(clock.now() - timedelta(days=1))

    Args:
        start: where the wall clock begins, an aware datetime; 2024-01-01 UTC unless given.
    """

    def __init__(self, start: datetime = datetime(2024, 1, 1, tzinfo=timezone.utc)) -> None:
        self._lock = threading.Lock()
        self._wall = float(to_ms(start, "start"))
        self._monotonic = 1000.0

    def now_ms(self) -> int:
        """Milliseconds since 1970-01-01 UTC."""
        return int(self._wall)

    def now(self) -> datetime:
        """The wall clock as an aware datetime."""
        return to_datetime(self.now_ms())

    def monotonic(self) -> float:
        """Seconds on the clock that never goes back."""
        return self._monotonic

    def advance(self, seconds: float) -> None:
        """Let time pass, on both clocks.

        Raises:
            ValueError: ``seconds`` is negative; to set the wall clock back there is :meth:`set_wall`.
        """
        if seconds < 0:
            raise ValueError(f"time cannot pass backwards ({seconds:g} s); use set_wall")
        with self._lock:
            self._wall += seconds * 1000
            self._monotonic += seconds

    def set_wall(self, moment: datetime) -> None:
        """Set the wall clock, forward or back; the monotonic one does not notice."""
        with self._lock:
            self._wall = float(to_ms(moment, "moment"))
