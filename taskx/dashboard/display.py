"""Values as people read them: the filters of the templates."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

from markupsafe import Markup


def moment(at: datetime | None) -> Markup:
    """Return a time in UTC, to the second, as a ``<time>`` element."""
    if at is None:
        return Markup("")
    return Markup('<time datetime="{}">{}</time>').format(at.isoformat(), f"{at:%Y-%m-%d %H:%M:%S}")


def seconds(value: float | None) -> str:
    """Return a duration as text."""
    return "–" if value is None else f"{value:.3g} s"


def number(value: int) -> str:
    """Return a number with separators between thousands."""
    return f"{value:,}"


FILTERS: dict[str, Callable[..., Any]] = {"moment": moment, "seconds": seconds, "number": number}
