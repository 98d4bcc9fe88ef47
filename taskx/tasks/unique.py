"""Unique keys: at most one task at a time holds a key; the task's scope says how long.

The column ``unique_lock`` contains the key while the task holds it. No two records have the same value
in this column.
"""

from __future__ import annotations

from typing import Any

from taskx.tasks.checks import check_number, duration_of
from taskx.tasks.clock import to_ms
from taskx.tasks.errors import ConfigurationError
from taskx.tasks.model import Task
from taskx.tasks.writes import Update

PENDING, UNFINISHED, EVER = "pending", "unfinished", "ever"
_NAMED = (PENDING, UNFINISHED, EVER)


def scope_to_text(scope: object) -> str:
    """Return a scope as text for the record. Raises ConfigurationError if it is not a valid scope."""
    if scope in _NAMED:
        return str(scope)
    if isinstance(scope, str):
        try:
            scope = float(scope) if scope[-1:].isdigit() else duration_of(scope)
        except (ValueError, ConfigurationError):
            known = ", ".join(map(repr, _NAMED))
            raise ConfigurationError(
                f"unique_scope must be {known}, a number of seconds or a text such as '1d', not {scope!r}"
            ) from None
    return repr(check_number(scope, "unique_scope"))


def freed_by_start(task: Task) -> dict[str, Any]:
    """Return the columns that a task's start changes."""
    return {"unique_lock": None} if task.unique_scope == PENDING else {}


def freed_by_end(task: Task) -> dict[str, Any]:
    """Return the columns that a task's end changes."""
    return {"unique_lock": None} if task.unique_scope in (PENDING, UNFINISHED) else {}


def taken_again(task: Task, now: int) -> dict[str, Any]:
    """Return the columns that a task's requeue changes. The write fails if another task holds the key.

    A key that is held for a number of seconds is taken again only if they have not passed.
    """
    created_at = 0 if task.created_at is None else to_ms(task.created_at)
    until = held_until(task.unique_key, task.unique_scope, created_at)
    taken = task.unique_scope in _NAMED or until > now
    return {"unique_lock": task.unique_key} if taken else {}


def release_key(holder: Task, now: int) -> Update | None:
    """Release the unique key of a task if its seconds have passed; return None if it may keep the key."""
    if holder.unique_scope is None or holder.unique_scope in _NAMED or holder.created_at is None:
        return None
    if now < to_ms(holder.created_at) + float(holder.unique_scope) * 1000:
        return None
    guard = {"unique_lock": holder.unique_key}
    return Update(holder.id, guard, {"unique_lock": None}, move="release key")


def held_until(lock: str | None, scope: str | None, created_at: int) -> float:
    """Return the time (ms) until which a unique key keeps an ended task's record; 0 if it does not."""
    if lock is None or scope is None or scope in _NAMED:
        return 0
    try:
        return created_at + float(scope) * 1000
    except ValueError:
        return 0
