"""Checks of option values: numbers and functions."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import attrs

from taskx.tasks.errors import ConfigurationError

#: A length of time: a number of seconds, a ``timedelta``, or a text such as ``"90s"`` or ``"1h30m"``.
Duration = float | timedelta | str

_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_TEXT = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|[smhdw]))+")
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)(ms|[smhdw])")


def duration_of(text: str) -> float:
    """Return the seconds of a duration such as ``90s``, ``15m``, ``1h30m``, ``2d`` or ``45``.

    Raises:
        ConfigurationError: the text is not a duration.
    """
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    if not _TEXT.fullmatch(text):
        shown = repr(text if len(text) <= 80 else f"{text[:79]}…")
        raise ConfigurationError(
            f"{shown} is not a duration: write a number and a unit, such as 90s, 15m, 2h, 1d or 1w"
        )
    return sum(float(number) * _UNITS[unit] for number, unit in _AMOUNT.findall(text))


def in_seconds(value: Duration) -> float:
    """Return a ``timedelta`` or a text as seconds, and any other value unchanged.

    Raises ConfigurationError if a text is not a number with a unit.
    """
    if isinstance(value, str):
        if value[-1:].isdigit():
            raise ConfigurationError(
                f"{value!r} has no unit: write the number, or a text such as '90s'"
            )
        return duration_of(value)
    return value.total_seconds() if isinstance(value, timedelta) else value


def optional_seconds(value: Duration | None) -> float | None:
    """Return the same as :func:`in_seconds`; None for None.

    Raises ConfigurationError as that does, and for a value that is not a number.
    """
    seconds = None if value is None else in_seconds(value)
    if isinstance(seconds, float) and math.isnan(seconds):
        raise ConfigurationError(f"{value!r} is not a number of seconds")
    return seconds


def as_seconds(value: Duration | None) -> Any:
    """Return the same as :func:`in_seconds`; None, and a text that is refused later, unchanged.

    It converts a field whose validator calls :func:`check_number`, which names the field.
    """
    try:
        return optional_seconds(value)
    except ConfigurationError:
        return value


def check_number(value: Any, what: str, minimum: float = 0.0) -> float:
    """Return seconds, given as a :data:`Duration`, as a float.

    Raises ConfigurationError if the value is none, is not finite, or is below ``minimum``.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        if not isinstance(value, (timedelta, str)):
            raise ConfigurationError(
                f"{what} must be a number of seconds, a timedelta or a text such as '90s', not {value!r}"
            )
        try:
            value = in_seconds(value)
        except ConfigurationError as error:
            raise ConfigurationError(f"{what}: {error}") from None
    try:
        number = float(value)
    except OverflowError:
        raise ConfigurationError(
            f"{what} must be a finite number of at least {minimum:g}; this one is too large for a float"
        ) from None
    if not math.isfinite(number) or number < minimum:
        raise ConfigurationError(
            f"{what} must be a finite number of at least {minimum:g}, not {value!r}"
        )
    return number


def check_int(value: Any, what: str, minimum: int, maximum: int = 2**31 - 1) -> int:
    """Return the value: a whole number within both limits. Raises ConfigurationError if it is not."""
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
        raise ConfigurationError(
            f"{what} must be a whole number from {minimum} to {maximum}, not {value!r}"
        )
    return int(value)


def by(check: Callable[..., object], *limits: float) -> Any:
    """Return an attrs validator that calls ``check`` with the value, the field's name and the limits."""

    def validate(_: Any, field: attrs.Attribute[Any], value: Any) -> None:
        check(value, field.name, *limits)

    return validate


def is_async(function: Any) -> bool:
    """Return True if calling an object makes a coroutine."""
    return any(map(inspect.iscoroutinefunction, _calls(function)))


def is_async_generator(function: Any) -> bool:
    """Return True if calling an object makes an asynchronous generator."""
    return any(map(inspect.isasyncgenfunction, _calls(function)))


def _calls(function: Any) -> tuple[Any, Any]:
    return function, getattr(function, "__call__", None)  # noqa: B004  (an object's __call__ may be async)


def check_plain(function: Any, what: str, *, or_async: bool = False) -> None:
    """Raise ConfigurationError if calling the function would not run its body: async or a generator.

    ``or_async`` takes coroutine functions and asynchronous generator functions, too.
    """
    if not or_async and is_async(function):
        raise ConfigurationError(f"{what} is async; it must be a plain function")
    if not or_async and is_async_generator(function):
        raise ConfigurationError(
            f"{what} is an asynchronous generator; it must be a plain function"
        )
    calls = _calls(function)
    if any(map(inspect.isgeneratorfunction, calls)):
        raise ConfigurationError(
            f"{what} is a generator, so its body would not run; it must be a plain function"
        )
