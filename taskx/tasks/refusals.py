"""Refusals by an API: how long it asks its callers to wait."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any

from taskx.tasks.checks import Duration, check_number
from taskx.tasks.errors import ConfigurationError

_AFTER, _RESET, _REMAINING = "retry-after", "x-ratelimit-reset", "x-ratelimit-remaining"
# A larger number is no period but a moment: seconds, or milliseconds, since 1970.
_MOMENT, _IN_MILLISECONDS = 1e9, 1e11
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_PERIOD = re.compile(r"(?:(\d+(?:\.\d+)?)(ms|s|m|h|d))+")
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")


def retry_after(response: Any, default: Duration = 5.0, *, now: datetime | None = None) -> float:
    """Return for how many seconds an API asks its callers to wait, by the headers of its answer.

    The header ``Retry-After`` counts, in seconds or as a date. Without it, ``x-ratelimit-reset`` and those
    that begin so count: seconds, a period such as ``"6m0s"``, or a date. Of several, that of which nothing
    remains counts.

    Args:
        response: the response, an error that has it, or its headers. Any object with ``headers`` will do,
            such as those of ``requests``, ``httpx``, ``aiohttp`` and ``urllib``.
        default: the seconds if no header says it.
        now: the time from which a date counts; by default that of the header ``Date``, or else this host's.

    Raises:
        ConfigurationError: ``response`` has no headers, or ``default`` is no number of seconds.
    """
    headers = _headers_of(response)
    otherwise = check_number(default, "default")
    if now is None:
        now = _date_of(headers.get("date", "")) or datetime.now(timezone.utc)
    found = _seconds_of(headers.get(_AFTER, ""), now)
    if found is None:
        found = _until_reset(headers, now)
    return otherwise if found is None else max(0.0, found)


def _headers_of(response: Any) -> Mapping[str, str]:
    """Return headers by their names in small letters."""
    inner = getattr(response, "response", None)  # of an error
    for one in (response, inner):
        headers = getattr(one, "headers", one)
        if callable(items := getattr(headers, "items", None)):
            return {str(name).lower(): str(value).strip() for name, value in items()}
    raise ConfigurationError(
        f"retry_after() requires a response, an error with one, or headers, not {response!r:.80}"
    )


def _until_reset(headers: Mapping[str, str], now: datetime) -> float | None:
    used_up: list[float] = []
    others: list[float] = []
    for name, seconds in _resets(headers, now):
        left = headers.get(name.replace(_RESET, _REMAINING))
        (used_up if left == "0" else others).append(seconds)
    return max(used_up) if used_up else min(others, default=None)


def _resets(headers: Mapping[str, str], now: datetime) -> Iterator[tuple[str, float]]:
    for name, value in headers.items():
        if name.startswith(_RESET) and (seconds := _seconds_of(value, now)) is not None:
            yield name, seconds


def _seconds_of(value: str, now: datetime) -> float | None:
    """Return the seconds from now that a header names; None if it names none."""
    with suppress(ValueError):
        number = float(value)
        if not math.isfinite(number):
            return None
        if number < _MOMENT:
            return number
        number /= 1000 if number > _IN_MILLISECONDS else 1
        return number - now.timestamp()
    if _PERIOD.fullmatch(value):
        return sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(value))
    moment = _date_of(value)
    return None if moment is None else (moment - now).total_seconds()


def _date_of(value: str) -> datetime | None:
    for parse in (parsedate_to_datetime, _from_iso):
        with suppress(ValueError, TypeError, IndexError):
            moment = parse(value)
            return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
    return None


def _from_iso(value: str) -> datetime:
    return datetime.fromisoformat(value.replace("Z", "+00:00"))
