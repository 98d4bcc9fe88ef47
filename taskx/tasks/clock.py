"""Clocks, which tests can replace, and conversions between datetimes and milliseconds."""

from __future__ import annotations

import time
from datetime import datetime, timedelta, timezone
from functools import lru_cache
from typing import Any, Protocol, cast

from taskx.tasks.errors import ConfigurationError

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_MILLISECOND = timedelta(milliseconds=1)


class Clock(Protocol):
    """A source of time. In tests, give your own to ``Queue`` or to a repository."""

    def now_ms(self) -> int:
        """Return milliseconds since 1970-01-01 UTC, for the times in records."""
        ...

    def monotonic(self) -> float:
        """Return seconds on a clock that never jumps, for durations and deadlines."""
        ...


class SystemClock:
    """The machine's own clocks."""

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000

    # Not a function of our own: each run calls it twice.
    monotonic = staticmethod(time.monotonic)


SYSTEM_CLOCK = SystemClock()


def check_clock(clock: Any) -> Clock:
    """Return the clock. Raises ConfigurationError if it lacks a method or is a class."""
    parts = (getattr(clock, name, None) for name in ("now_ms", "monotonic"))
    if isinstance(clock, type) or not all(map(callable, parts)):
        raise ConfigurationError(
            f"clock must have now_ms() and monotonic(), like SystemClock(); got {clock!r}"
        )
    return cast("Clock", clock)


@lru_cache(maxsize=1024)  # tasks that are stored or started together have the same times
def to_datetime(ms: int) -> datetime:
    """Return the aware UTC datetime of milliseconds since 1970."""
    return _EPOCH + timedelta(milliseconds=ms)


def to_ms(moment: datetime, what: str = "datetime") -> int:
    """Return a datetime as whole milliseconds since 1970. Raises ``ValueError`` if it has no time zone."""
    if moment.tzinfo is None or moment.utcoffset() is None:
        raise ValueError(
            f"{what} must be an aware datetime, such as datetime.now(timezone.utc); "
            f"{moment!r} has no time zone"
        )
    return (moment - _EPOCH) // _MILLISECOND


def to_text(ms: int) -> str:
    """Return milliseconds since 1970 as an ISO time in UTC, such as ``2026-05-03T09:30:00Z``."""
    moment = to_datetime(ms).replace(tzinfo=None)
    return f"{moment.isoformat(timespec='milliseconds' if ms % 1000 else 'seconds')}Z"


#: The first and the last moment of the calendar, in UTC milliseconds. A local time can be outside of it.
FIRST = to_ms(datetime.min.replace(tzinfo=timezone.utc))
LAST = to_ms(datetime.max.replace(tzinfo=timezone.utc))


def within_calendar(ms: int) -> int:
    """Return the moment in milliseconds, limited to the calendar (:data:`FIRST` to :data:`LAST`)."""
    return max(FIRST, min(ms, LAST))
