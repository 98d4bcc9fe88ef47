"""Time, as something that can be handed in."""

from __future__ import annotations

import time
from datetime import datetime, timedelta, timezone
from functools import lru_cache
from typing import Any, Protocol, cast

from taskx.core.errors import ConfigurationError

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_MILLISECOND = timedelta(milliseconds=1)


class Clock(Protocol):
    """Where TaskX reads time from; hand your own to ``Queue`` or a repository in tests."""

    def now_ms(self) -> int:
        """Milliseconds since 1970-01-01 UTC: what records are stamped with."""
        ...

    def monotonic(self) -> float:
        """Seconds on a clock that never jumps: what durations and deadlines are measured by."""
        ...


class SystemClock:
    """The machine's own clocks."""

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def monotonic(self) -> float:
        return time.monotonic()


SYSTEM_CLOCK = SystemClock()


def check_clock(clock: Any) -> Clock:
    """What time can be read from; ConfigurationError says what is wrong with it."""
    parts = (getattr(clock, name, None) for name in ("now_ms", "monotonic"))
    if isinstance(clock, type) or not all(map(callable, parts)):
        raise ConfigurationError(
            f"clock must have now_ms() and monotonic(), as SystemClock() does, not be {clock!r}"
        )
    return cast("Clock", clock)


@lru_cache(maxsize=1024)  # tasks that come or start together share their moments
def to_datetime(ms: int) -> datetime:
    """The aware UTC datetime of a millisecond count."""
    return _EPOCH + timedelta(milliseconds=ms)


def to_ms(moment: datetime, what: str = "datetime") -> int:
    """The millisecond count of a datetime, finer parts cut off; ``ValueError`` if it has no time zone."""
    if moment.tzinfo is None or moment.utcoffset() is None:
        raise ValueError(
            f"{what} must be an aware datetime, such as datetime.now(timezone.utc); "
            f"{moment!r} has no time zone"
        )
    return (moment - _EPOCH) // _MILLISECOND


#: The first and the last moment of the calendar; those of time zones may lie beyond.
FIRST = to_ms(datetime.min.replace(tzinfo=timezone.utc))
LAST = to_ms(datetime.max.replace(tzinfo=timezone.utc))


def within_calendar(ms: int) -> int:
    """The moment, or the end of the calendar that it lies beyond."""
    return max(FIRST, min(ms, LAST))
