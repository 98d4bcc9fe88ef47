"""The values of a task, as the read-only fields of its page."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

from django.contrib import admin
from django.utils.html import format_html, format_html_join
from django.utils.timezone import localtime

from taskx.tasks.model import Attempt, Task

# Lines of the log that a page shows: the last ones.
_LINES = 500
#: The text in the place of a value that a task does not have.
NOTHING = "-"
_HEADS = ("outcome", "started at", "ended at", "worker", "error")


def value(name: str, label: str, show: Callable[[Task], Any]) -> Any:
    """Return a method for a read-only field: a value of the task that ``get_object`` has read."""

    def shown(self: Any, row: Any) -> Any:
        return _as_shown(show(row.read))

    shown.__name__ = name
    return admin.display(description=label)(shown)


def _as_shown(value: Any) -> Any:
    """Return a value as the page shows it. Django itself would show ``None``, and times without a zone."""
    if isinstance(value, datetime):
        return _moment(value)
    return NOTHING if value is None or value == "" else value


def as_json(value: Any) -> Any:
    """Return a JSON value as indented text."""
    return as_text(json.dumps(value, indent=2, ensure_ascii=False))


def as_text(text: str) -> Any:
    """Return a text with its line breaks."""
    if not text:
        return NOTHING
    return format_html('<pre style="white-space: pre-wrap; margin: 0">{}</pre>', text)


def last_lines(log: str) -> Any:
    """Return the last lines of a log."""
    lines = log.splitlines()
    return as_text("\n".join(["…", *lines[-_LINES:]] if len(lines) > _LINES else lines))


def as_table(attempts: Iterable[Attempt]) -> Any:
    """Return attempts as a table."""
    rows = format_html_join(
        "",
        "<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
        (
            (
                one.outcome or "running",
                _moment(one.started_at),
                _moment(one.ended_at),
                one.worker,
                as_text(one.traceback or one.error),
            )
            for one in attempts
        ),
    )
    heads = format_html_join("", "<th>{}</th>", ((head,) for head in _HEADS))
    return format_html("<table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>", heads, rows)


def _moment(moment: datetime | None) -> Any:
    """Return a time to the millisecond in the current time zone: many tasks take less than a second."""
    if moment is None:
        return NOTHING
    local = localtime(moment)
    return f"{local:%Y-%m-%d %H:%M:%S}.{local.microsecond // 1000:03d} {local:%Z}"
