"""Unique keys: at most one task at a time holds a key, for as long as its scope says.

The key is held by the column ``unique_lock``, in which no two records have the same.
"""

from __future__ import annotations

from typing import Any, Literal

from taskx.core.checks import check_number
from taskx.core.clock import to_ms
from taskx.core.errors import ConfigurationError
from taskx.core.model import Task, TaskStatus
from taskx.core.record import (
    BY_THREAD,
    FOR_PARENTS,
    FOR_TURN,
    FREE,
    UNTIL_DUE,
    created_task,
)
from taskx.core.writes import Insert, Update

#: Until it first starts; until it has ended; as long as its record is kept; so many seconds from its
#: creation, whatever becomes of it.
UniqueScope = Literal["pending", "unfinished", "ever"] | float
#: What a submit does whose key is held: raise ``DuplicateTask``; give the handle of the task that holds it;
#: have that one, if it is pending, take over params and options of the new one.
OnConflict = Literal["reject", "return", "replace"]
PENDING, UNFINISHED, EVER = "pending", "unfinished", "ever"
_NAMED = (PENDING, UNFINISHED, EVER)
_REPLACED = (
    *("params", "created_by", "priority", "run_at"),
    *("timeout", "max_attempts", "max_crashes", "retry", "unique_scope"),
)


def scope_to_text(scope: object) -> str:
    """A scope as records keep it.

    Raises:
        ConfigurationError: it is none.
    """
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
    return Update(holder.id, {"unique_lock": holder.unique_key}, {"unique_lock": None})


def held_until(lock: str | None, scope: str | None, created_at: int) -> float:
    """Return the time, in milliseconds, until which an ended task holds its unique key.

    0 if it holds no key, or if the scope is a name: then the key does not keep the record.
    """
    if lock is None or scope is None or scope in _NAMED:
        return 0
    try:
        return created_at + float(scope) * 1000
    except ValueError:
        return 0


def replace(holder: Task, new: Insert) -> list[Update]:
    """Have the pending task that holds the key of a new one take over its params and options.

    It is as old as it was, and what it waits for beside its time, it goes on waiting for. Nothing if it
    is not pending, or differs in what cannot be taken over: type, parents, concurrency key.
    """
    if holder.status is not TaskStatus.PENDING or _fixed(holder) != _fixed(created_task(new.row)):
        return []
    # Steps that an earlier attempt did, it did with other params. Who has read the record to start it has
    # read old params, and finds that ``starts`` has moved on.
    changes = {name: new.row[name] for name in _REPLACED}
    changes.update(checkpoints=None, starts=holder.starts + 1)
    due = {**changes, "held": FREE, "owner": ""}  # fetched anew, to its place by its priority
    if changes["run_at"] is not None and changes["run_at"] > new.row["created_at"]:
        due["held"] = UNTIL_DUE
    guard = {
        "status": holder.status.value,
        "unique_lock": holder.unique_key,
        "starts": holder.starts,
    }
    return [
        Update(holder.id, {**guard, "held": which}, change, durable=True)
        for which, change in (
            ((FREE, UNTIL_DUE), due),
            ((FOR_PARENTS, BY_THREAD, FOR_TURN), changes),
        )
    ]


def _fixed(task: Task) -> tuple[object, ...]:
    policy = task.on_parent_failure or "cancel"
    return task.type, task.depends_on, policy, task.concurrency_key
