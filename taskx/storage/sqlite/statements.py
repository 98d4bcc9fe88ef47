"""The SQL, built once for each shape of a write or filter."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from taskx.core.clock import to_ms
from taskx.core.lifecycle import FINISHED, PENDING, RUNNING
from taskx.core.model import TaskFilter
from taskx.core.record import COLUMNS
from taskx.core.writes import CREATED, PRESENT

_STUB = "id, status, starts, priority, created_at, cancel_requested_at IS NOT NULL"

_PLAIN_INSERT = f"INSERT INTO tasks ({', '.join(CREATED)}) VALUES ({', '.join('?' * len(CREATED))})"
INSERT = f"{_PLAIN_INSERT} ON CONFLICT (id) DO NOTHING"
INSERT_OR_FAIL = _PLAIN_INSERT
SELECT = f"SELECT {', '.join(COLUMNS)} FROM tasks"
READY = (
    f"SELECT {_STUB}, seq FROM tasks "
    "WHERE status = 'pending' AND held = 0 AND type = ? AND owner = '' "
    "ORDER BY priority DESC, seq LIMIT ?"
)
DUE = (
    "SELECT id FROM tasks WHERE status = 'pending' AND held = 1 AND run_at <= ? "
    "ORDER BY run_at LIMIT ?"
)
NEXT_DUE = "SELECT min(run_at) FROM tasks WHERE status = 'pending' AND held = 1"
OWNED = f"SELECT {_STUB} FROM tasks WHERE owner = ? AND owner <> ''"
OWNERS = "SELECT DISTINCT owner FROM tasks WHERE owner <> ''"
UNFINISHED_READY = "SELECT 1 FROM tasks WHERE status = 'pending' AND held = 0 AND type = ? LIMIT 1"
UNFINISHED_RUNNING = "SELECT DISTINCT type FROM tasks WHERE owner <> '' AND status = 'running'"


@lru_cache(maxsize=64)
def select_many(count: int) -> str:
    """Select tasks by ``count`` ids."""
    return f"{SELECT} WHERE id IN ({', '.join('?' * count)})"


_shapes: dict[tuple[Any, ...], str] = {}


def update(task_id: str, guard: Mapping[str, Any], changes: Mapping[str, Any]) -> tuple[str, Any]:
    """An ``UPDATE`` and its values."""
    values = [*changes.values(), task_id, *guard.values()]
    key = (*changes, None, *guard)
    special = _has_special(guard)
    sql = None if special else _shapes.get(key)
    if sql is None:
        where, values[len(changes) + 1 :] = _conditions(guard)
        sql = f"UPDATE tasks SET {', '.join(f'{name} = ?' for name in changes)} WHERE id = ?{where}"
        if not special:
            _shapes[key] = sql
    return sql, values


def delete(task_id: str, guard: Mapping[str, Any]) -> tuple[str, Any]:
    """A ``DELETE`` and its values."""
    where, values = _conditions(guard)
    return f"DELETE FROM tasks WHERE id = ?{where}", [task_id, *values]


def _has_special(guard: Mapping[str, Any]) -> bool:
    for value in guard.values():  # noqa: SIM110  (any() of a generator costs four times as much)
        if value is PRESENT or value.__class__ is tuple:
            return True
    return False


def _conditions(guard: Mapping[str, Any]) -> tuple[str, list[Any]]:
    text = ""
    values: list[Any] = []
    for name, wanted in guard.items():
        if wanted is PRESENT:
            text += f" AND {name} IS NOT NULL"
        elif isinstance(wanted, tuple):
            text += f" AND {name} IN ({', '.join('?' * len(wanted))})"
            values += wanted
        else:
            text += f" AND {name} IS ?"
            values.append(wanted)
    return text, values


# Where the tasks of one status are found through the partial indexes, so that listing or counting the
# few that are unfinished costs nothing for the many that are finished.
_SOURCES: dict[str | None, str] = {
    None: "tasks",
    PENDING: (
        "(SELECT * FROM tasks INDEXED BY tasks_ready WHERE status = 'pending' AND held = 0 UNION ALL "
        "SELECT * FROM tasks INDEXED BY tasks_due WHERE status = 'pending' AND held = 1)"
    ),
    RUNNING: "(SELECT * FROM tasks INDEXED BY tasks_owned WHERE status = 'running')",
    **{
        status: f"(SELECT * FROM tasks WHERE status = '{status}' AND completed_at IS NOT NULL)"
        for status in FINISHED
    },
}


def list_tasks(filter: TaskFilter) -> tuple[str, list[Any]]:
    """The query for the tasks that meet a filter, and its values."""
    source, values = _meeting(filter)
    sql = f"SELECT {', '.join(COLUMNS)} FROM {source} ORDER BY created_at DESC, seq DESC LIMIT ? OFFSET ?"
    return sql, [*values, filter.limit, filter.offset]


def count_tasks(filter: TaskFilter) -> tuple[str, list[Any]]:
    """The query for how many tasks meet a filter, and its values."""
    source, values = _meeting(filter)
    return f"SELECT count(*) FROM {source}", values


def _meeting(filter: TaskFilter) -> tuple[str, list[Any]]:
    conditions: list[str] = []
    values: list[Any] = []
    for name in ("type", "created_by"):
        if getattr(filter, name) is not None:
            conditions.append(f"{name} = ?")
            values.append(getattr(filter, name))
    if filter.start_date is not None:
        conditions.append("created_at >= ?")
        values.append(to_ms(filter.start_date))
    if filter.end_date is not None:
        conditions.append("created_at <= ?")
        values.append(to_ms(filter.end_date))
    source = _SOURCES[None if filter.status is None else filter.status.value]
    return source + (f" WHERE {' AND '.join(conditions)}" if conditions else ""), values
