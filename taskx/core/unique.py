"""Unique keys: at most one task at a time holds a key, for as long as its scope says.

The key is held by the column ``unique_lock``, in which no two records have the same.
"""

from __future__ import annotations

from typing import Any

from taskx.core.checks import check_number
from taskx.core.clock import to_ms
from taskx.core.errors import ConfigurationError
from taskx.core.model import Task
from taskx.core.writes import Update

PENDING, UNFINISHED, EVER = "pending", "unfinished", "ever"
_NAMED = (PENDING, UNFINISHED, EVER)


def scope_to_text(scope: object) -> str:
    """A scope as records keep it; ConfigurationError if it is none."""
    if scope in _NAMED:
        return str(scope)
    if isinstance(scope, str):
        try:
            scope = float(scope)
        except ValueError:
            known = ", ".join(map(repr, _NAMED))
            raise ConfigurationError(
                f"unique_scope must be {known} or a number of seconds, not {scope!r}"
            ) from None
    return repr(check_number(scope, "unique_scope"))


def freed_by_start(task: Task) -> dict[str, Any]:
    """What the start of a task changes."""
    return {"unique_lock": None} if task.unique_scope == PENDING else {}


def freed_by_end(task: Task) -> dict[str, Any]:
    """What the end of a task changes."""
    return {"unique_lock": None} if task.unique_scope in (PENDING, UNFINISHED) else {}


def taken_again(task: Task) -> dict[str, Any]:
    """What the requeue of a task changes; it does not hold where another has the key meanwhile."""
    return {"unique_lock": task.unique_key} if task.unique_scope in _NAMED else {}


def give_up(holder: Task, now: int) -> Update | None:
    """Free the key of a task whose seconds have passed; None where it holds it by right."""
    if holder.unique_scope is None or holder.unique_scope in _NAMED or holder.created_at is None:
        return None
    if now < to_ms(holder.created_at) + float(holder.unique_scope) * 1000:
        return None
    guard = {"unique_lock": holder.unique_key}
    return Update(holder.id, guard, {"unique_lock": None}, move="free key")


def held_until(lock: str | None, scope: str | None, created_at: int) -> float:
    """Return until which millisecond a unique key keeps the record of an ended task; 0 if it does not."""
    if lock is None or scope is None or scope in _NAMED:
        return 0
    try:
        return created_at + float(scope) * 1000
    except ValueError:
        return 0
