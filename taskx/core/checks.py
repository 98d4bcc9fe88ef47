"""Checks of options: numbers, and functions that are to be called."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import attrs

from taskx.core.errors import ConfigurationError


def check_number(value: Any, what: str, minimum: float = 0.0) -> float:
    """A finite number from ``minimum``; ConfigurationError says what is wrong with it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigurationError(f"{what} must be a number of seconds, not {value!r}")
    try:
        number = float(value)
    except OverflowError:
        raise ConfigurationError(
            f"{what} must be a finite number from {minimum:g}; this one is beyond what a float holds"
        ) from None
    if not math.isfinite(number) or number < minimum:
        raise ConfigurationError(f"{what} must be a finite number from {minimum:g}, not {value!r}")
    return number


def check_int(value: Any, what: str, minimum: int, maximum: int = 2**31 - 1) -> int:
    """A whole number within bounds; ConfigurationError says what is wrong with it."""
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
        raise ConfigurationError(
            f"{what} must be a whole number from {minimum} to {maximum}, not {value!r}"
        )
    return int(value)


def by(check: Callable[..., object], *limits: float) -> Any:
    """A validator of attrs that gives a check the value, the name of the field, and the limits."""

    def validate(_: Any, field: attrs.Attribute[Any], value: Any) -> None:
        check(value, field.name, *limits)

    return validate


def check_plain(function: Any, what: str) -> None:
    """A function whose body runs when it is called; ConfigurationError says why it would not."""
    calls = (function, getattr(function, "__call__", None))  # noqa: B004  (an object may have an async one)
    if any(inspect.iscoroutinefunction(c) or inspect.isasyncgenfunction(c) for c in calls):
        raise ConfigurationError(f"{what} is async; TaskX runs plain functions")
    if any(map(inspect.isgeneratorfunction, calls)):
        raise ConfigurationError(f"{what} is a generator; its body would never run")
