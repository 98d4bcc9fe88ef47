"""The kinds of values in options: durations, times, sizes, JSON and numbers of a type."""

from __future__ import annotations

import json
import re
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from taskx.insight.query import moment_of
from taskx.tasks.checks import duration_of
from taskx.tasks.errors import ConfigurationError
from taskx.tasks.rate import rate_of

if TYPE_CHECKING:
    ParamType = click.ParamType[Any]
else:
    ParamType = click.ParamType  # not generic before click 8.3

#: The word that turns a threshold off.
OFF = "off"
_SIZES = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


class Duration(ParamType):
    """A duration such as ``90s``, ``15m`` or ``1d``, as seconds."""

    name = "duration"

    def __init__(self, *, positive: bool = False) -> None:
        self._positive = positive

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the seconds."""
        try:
            seconds = value if isinstance(value, float) else duration_of(value)
        except ConfigurationError as error:
            self.fail(str(error), param, ctx)
        if self._positive and not seconds:
            self.fail("it must be more than 0 seconds", param, ctx)
        return seconds


class Rate(ParamType):
    """A rate such as ``100/m``, as text.

    Args:
        words: other values that are allowed.
    """

    name = "rate"

    def __init__(self, *words: str) -> None:
        self._words = words

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the text."""
        try:
            if value not in self._words:
                rate_of(value, None)
        except ConfigurationError:
            words = "".join(f" or `{word}`" for word in self._words)
            self.fail(
                f"{value!r} is not a rate: write it as 100/m or '900 tokens/m' (s, m, h or d){words}",
                param,
                ctx,
            )
        return str(value)


class Moment(ParamType):
    """A time: ISO text in UTC, or a duration before now."""

    name = "time"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> datetime:
        """Return the aware datetime."""
        try:
            return value if isinstance(value, datetime) else moment_of(value)
        except ConfigurationError as error:
            self.fail(str(error), param, ctx)


class Size(ParamType):
    """A number of bytes such as ``500M`` or ``2G``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the bytes."""
        found = re.fullmatch(r"(\d+)([kmgt]?)(?:i?b)?", str(value).lower())
        if found is None:
            self.fail(f"{value!r} is not a size: write it as 500M or 2G", param, ctx)
        return int(found[1]) * _SIZES[found[2]]


class OrOff(ParamType):
    """A value of another kind, or ``off`` as None."""

    def __init__(self, kind: ParamType) -> None:
        self._kind = kind
        self.name = f"{kind.name}|off"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the value, or the word ``off``: click takes None for a missing value."""
        return OFF if value == OFF else self._kind.convert(value, param, ctx)


def unless_off(value: Any) -> Any:
    """Return None for ``off``, and any other value unchanged."""
    return None if value == OFF else value


def json_value(text: str, what: str) -> Any:
    """Return a JSON value.

    Raises:
        ConfigurationError: the text is not JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(
            f"{what} is not JSON ({error}): write a text as '\"yes\"'"
        ) from None


def json_object(text: str, what: str) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        ConfigurationError: the text is not one.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(
            f'{what} is not JSON ({error}): write it as \'{{"to": "ann"}}\''
        ) from None
    if not isinstance(value, dict):
        raise ConfigurationError(
            f'{what} must be a JSON object such as \'{{"to": "ann"}}\', not {text:.100}'
        )
    return value
