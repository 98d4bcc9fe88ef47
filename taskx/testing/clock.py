"""A clock that a test moves by hand."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable
from datetime import datetime, timezone
from itertools import count

from taskx.tasks.checks import Duration, check_number, in_seconds
from taskx.tasks.clock import to_datetime, to_ms

_SECOND, _MILLISECOND = 1_000_000_000, 1_000_000


class ManualClock:
    """A clock that stands still until a test moves it.

    Give it to ``Queue`` or to a repository. :meth:`advance` moves both clocks: the wall clock, which stamps
    records, and the monotonic clock, which measures durations and deadlines. :meth:`set_wall` moves the
    wall clock alone, as an administrator or NTP would.

    .. code-block:: python

        clock = ManualClock()
        repository = MemoryRepository(clock=clock)
        clock.advance(60)
        clock.set_wall(clock.now() - timedelta(days=1))

    Args:
        start: the first time of the wall clock, an aware datetime; 2024-01-01 UTC by default.
    """

    def __init__(self, start: datetime = datetime(2024, 1, 1, tzinfo=timezone.utc)) -> None:
        self._lock = threading.Lock()
        # In nanoseconds: sums of seconds as float would miss a millisecond now and then.
        self._monotonic = 1000 * _SECOND
        self._offset = to_ms(start, "start") * _MILLISECOND - self._monotonic
        # The calls to come: when, a number that keeps equal ones in order, and what to call.
        self._calls: list[tuple[int, int, Callable[[], object]]] = []
        self._number = count()

    def now_ms(self) -> int:
        """Return the wall clock, in milliseconds since 1970-01-01 UTC."""
        return (self._monotonic + self._offset) // _MILLISECOND

    def now(self) -> datetime:
        """Return the wall clock as an aware datetime."""
        return to_datetime(self.now_ms())

    def monotonic(self) -> float:
        """Return the monotonic clock, in seconds."""
        return self._monotonic / _SECOND

    def advance(self, seconds: Duration) -> None:
        """Move both clocks forward, and make the calls of :meth:`call_later` that come due, in order.

        Raises:
            ValueError: ``seconds`` is negative; use :meth:`set_wall` to set the wall clock back.
        """
        seconds = in_seconds(seconds)
        if seconds < 0:
            raise ValueError(f"time cannot pass backwards ({seconds:g} s); use set_wall")
        with self._lock:
            end = self._monotonic + round(seconds * _SECOND)
        while True:
            with self._lock:
                due = heapq.heappop(self._calls) if self._has_call(end) else None
                # A call may have moved the clock, too.
                self._monotonic = max(self._monotonic, end if due is None else due[0])
            if due is None:
                return
            due[2]()

    def call_later(self, seconds: Duration, call: Callable[[], object]) -> Callable[[], None]:
        """Have ``call()`` called by the :meth:`advance` that brings the clock ``seconds`` further.

        For what happens while an executor runs: ``clock.call_later(5, handle.cancel)``.

        Returns:
            a function that takes the call back.
        """
        with self._lock:
            moment = self._monotonic + round(check_number(seconds, "seconds") * _SECOND)
            entry = (moment, next(self._number), call)
            heapq.heappush(self._calls, entry)

        def remove() -> None:
            with self._lock:
                if entry in self._calls:
                    self._calls.remove(entry)
                    heapq.heapify(self._calls)

        return remove

    def until_next_call(self) -> float | None:
        """Return the seconds until the next call of :meth:`call_later`; None if there is none."""
        with self._lock:
            return (self._calls[0][0] - self._monotonic) / _SECOND if self._calls else None

    def set_wall(self, moment: datetime) -> None:
        """Set the wall clock, forward or back; the monotonic clock does not change."""
        with self._lock:
            self._offset = to_ms(moment, "moment") * _MILLISECOND - self._monotonic

    def _has_call(self, end: int) -> bool:
        return bool(self._calls) and self._calls[0][0] <= end
