"""Checks of option values: numbers and functions."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import attrs

from taskx.tasks.errors import ConfigurationError


def in_seconds(value: float | timedelta) -> float:
    """Return a ``timedelta`` as seconds, and any other value unchanged."""
    return value.total_seconds() if isinstance(value, timedelta) else value


def optional_seconds(value: float | timedelta | None) -> float | None:
    """Return the same as :func:`in_seconds`; None for None."""
    return None if value is None else in_seconds(value)


def check_number(value: Any, what: str, minimum: float = 0.0) -> float:
    """Return seconds, given as a number or a ``timedelta``, as a float.

    Raises ConfigurationError if the value is neither, is not finite, or is below ``minimum``.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        if not isinstance(value, timedelta):
            raise ConfigurationError(
                f"{what} must be a number of seconds or a timedelta, not {value!r}"
            )
        value = value.total_seconds()
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


def check_plain(function: Any, what: str) -> None:
    """Raise ConfigurationError if calling the function would not run its body: async or a generator."""
    calls = (function, getattr(function, "__call__", None))  # noqa: B004  (an object's __call__ may be async)
    if any(inspect.iscoroutinefunction(c) or inspect.isasyncgenfunction(c) for c in calls):
        raise ConfigurationError(f"{what} is async; it must be a plain function")
    if any(map(inspect.isgeneratorfunction, calls)):
        raise ConfigurationError(
            f"{what} is a generator, so its body would not run; it must be a plain function"
        )
