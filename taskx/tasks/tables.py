"""Lines and tables: records in a console and in a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from enum import Enum
from typing import Any

from taskx.tasks.redact import show

# Most characters of a value.
_MOST = 80


def in_short(value: Any) -> str:
    """Return a value as a text of one line, for people. Values of secret keys are hidden."""
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, datetime):
        return value.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    if isinstance(value, (dict, list)):
        return show(value, limit=_MOST)
    text = repr(value)
    return text if len(text) <= _MOST else f"{text[: _MOST - 1]}…"


def line(name: str, fields: Mapping[str, Any]) -> str:
    """Return a record as one line: ``Task(id='a', type='email')``."""
    return f"{name}({', '.join(f'{key}={in_short(value)}' for key, value in fields.items())})"


def html_table(heads: Sequence[str], rows: Iterable[Sequence[Any]], caption: str = "") -> str:
    """Return a table for a notebook. Texts stand in it without quotes; None is empty."""
    from html import escape  # loads all names of characters, and most programs show no table

    body = "".join(
        f"<tr>{''.join(f'<td>{escape(_cell(value))}</td>' for value in row)}</tr>" for row in rows
    )
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str) and not isinstance(value, Enum):
        return value if len(value) <= _MOST else f"{value[: _MOST - 1]}…"
    return in_short(value).strip("'")
