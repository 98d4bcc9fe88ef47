"""The SQL, built once for each shape of a write or filter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from taskx.core.clock import to_ms
from taskx.core.lifecycle import FINISHED, PENDING, RUNNING
from taskx.core.model import TASK_FIELDS, TaskFilter
from taskx.core.record import FOR_PARENTS, FOR_TURN, UNIQUE, UNTIL_DUE
from taskx.core.writes import PRESENT

# Cast, as one damaged record must not keep the others from being sorted.
_STUB = (
    "id, status, CAST(starts AS INTEGER), CAST(priority AS INTEGER), CAST(created_at AS INTEGER), "
    "cancel_requested_at IS NOT NULL, CAST(type AS TEXT), CAST(run_at AS INTEGER)"
)

TASK = ", ".join(TASK_FIELDS)
READY = (
    f"SELECT {_STUB}, seq FROM tasks "
    "WHERE status = 'pending' AND held = 0 AND owner = ? AND type = ? "
    "ORDER BY priority DESC, seq LIMIT ?"
)
# A step in the index for each priority, however many tasks have it.
PRIORITIES = (
    "WITH RECURSIVE steps (priority) AS (SELECT max(priority) FROM tasks WHERE status = 'pending' "
    "AND held = 0 AND owner = ? AND type = ? UNION ALL SELECT (SELECT max(priority) FROM tasks "
    "WHERE status = 'pending' AND held = 0 AND owner = ? AND type = ? "
    "AND priority < steps.priority) FROM steps WHERE steps.priority IS NOT NULL) "
    "SELECT priority FROM steps WHERE priority IS NOT NULL"
)
READY_AT = (
    f"SELECT {_STUB}, seq FROM tasks "
    "WHERE status = 'pending' AND held = 0 AND owner = ? AND type = ? AND priority = ? "
    "ORDER BY seq LIMIT ?"
)
# In these words, as the partial index is asked for by them.
_HELD = "status = 'pending' AND held > 0 AND held = {}"
DUE = (
    f"SELECT id FROM tasks WHERE {_HELD.format(UNTIL_DUE)} AND run_at <= ? ORDER BY run_at LIMIT ?"
)
# What is no number is above all numbers, and never due.
NEXT_DUE = f"SELECT min(run_at) FROM tasks WHERE {_HELD.format(UNTIL_DUE)} AND run_at < 1e18"
# The index alone says which were stored first: its entries end in seq. What is no number is above all
# numbers.
OLDEST_READY = (
    "SELECT CAST(min(max(created_at, coalesce(run_at, 0))) AS INTEGER) FROM tasks "
    "WHERE seq IN (SELECT seq FROM tasks INDEXED BY tasks_ready "
    "WHERE status = 'pending' AND held = 0 ORDER BY seq LIMIT ?)"
)
# SQLite goes through the parts of a UNION ALL one after the other, and stops at the limit.
OWNED = (
    f"SELECT {_STUB} FROM tasks WHERE status = 'running' AND owner = ? AND owner <> '' UNION ALL "
    f"SELECT {_STUB} FROM tasks WHERE status = 'pending' AND held = 0 AND owner = ? AND owner <> '' "
    "LIMIT ?"
)
# A step in the index for each owner, however many tasks each has.
_OWNERS_OF = (
    "WITH RECURSIVE owners (owner) AS (SELECT min(owner) FROM tasks WHERE {0} UNION ALL "
    "SELECT (SELECT min(owner) FROM tasks WHERE {0} AND owner > owners.owner) FROM owners "
    "WHERE owners.owner IS NOT NULL) "
)
_READY, _RUNNING = "status = 'pending' AND held = 0", "status = 'running'"
OWNERS_OF_READY, OWNERS_OF_RUNNING = (
    f"{_OWNERS_OF.format(which)} SELECT owner FROM owners WHERE owner <> ''"
    for which in (_READY, _RUNNING)
)
OWNERS_OF_STUCK = "SELECT DISTINCT stuck_on FROM tasks WHERE stuck_on <> ''"
STUCK = f"SELECT {_STUB} FROM tasks WHERE stuck_on = ? AND stuck_on <> ''"
AWAITED = (
    "SELECT DISTINCT waiting_on FROM tasks INDEXED BY tasks_waiting WHERE waiting_on > ? "
    f"AND waiting_on IS NOT NULL AND status = 'pending' AND held = {FOR_PARENTS} "
    "ORDER BY waiting_on LIMIT ?"
)
_IN_LINE = f"status = 'pending' AND held = {FOR_TURN}"
NEXT_IN_LINE = f"SELECT id FROM tasks WHERE {_IN_LINE} AND concurrency_key = ? ORDER BY seq LIMIT 1"
# A step in the index for each key, however many tasks wait for it.
LINES = (
    f"WITH RECURSIVE keys (key) AS (SELECT min(concurrency_key) FROM tasks WHERE {_IN_LINE} "
    "AND concurrency_key > ? UNION ALL "
    f"SELECT (SELECT min(concurrency_key) FROM tasks WHERE {_IN_LINE} AND concurrency_key > keys.key) "
    "FROM keys WHERE keys.key IS NOT NULL) SELECT key, NOT EXISTS "
    "(SELECT 1 FROM tasks WHERE turn = keys.key) FROM keys WHERE key IS NOT NULL LIMIT ?"
)
NEW_PARENT = "INSERT OR IGNORE INTO parents (parent, child) VALUES (?, ?)"
NOTES = "SELECT name, text, version FROM notes WHERE name >= ? AND name < ?"
NEW_NOTE = "INSERT INTO notes (name, text, version) VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
CHANGED_NOTE = "UPDATE notes SET text = ?, version = version + 1 WHERE name = ? AND version = ?"
GONE_NOTE = "DELETE FROM notes WHERE name = ? AND version = ?"
UNFINISHED_READY = (
    f"{_OWNERS_OF.format(_READY)} SELECT 1 FROM owners CROSS JOIN tasks ON tasks.owner = owners.owner "
    f"AND {_READY} AND type = ? LIMIT 1"
)
# By the index of that status: a task was created before it ended.
ENDED = (
    f"SELECT {_STUB}, depends_on, unique_lock, unique_scope, created_at, seq FROM tasks "
    "INDEXED BY tasks_{0} WHERE status = '{0}' AND (created_at, seq) < (?, ?) AND completed_at < ? "
    "AND stuck_on = '' ORDER BY created_at DESC, seq DESC LIMIT ?"
)
FREE_PAGES = (
    "SELECT (SELECT freelist_count FROM pragma_freelist_count), "
    "(SELECT page_count FROM pragma_page_count)"
)
UNFINISHED_RUNNING = "SELECT DISTINCT type FROM tasks WHERE status = 'running' AND owner <> ''"


@lru_cache(maxsize=64)
def select_many(count: int, columns: str = TASK, key: str = "id") -> str:
    """Select columns of tasks by ``count`` ids, or values of another indexed column."""
    return f"SELECT {columns} FROM tasks WHERE {key} IN ({', '.join('?' * count)})"


@lru_cache(maxsize=64)
def needed(count: int) -> str:
    """Select those of ``count`` ids that tasks with other ids depend on."""
    # Not "?1": to Python 3.12 that is a name, and names are deprecated where values have none.
    ids = ", ".join(["(?)"] * count)
    return (
        f"WITH given (id) AS (VALUES {ids}) SELECT DISTINCT parent FROM parents "
        "WHERE parent IN given AND child NOT IN given"
    )


@lru_cache(maxsize=64)
def children(count: int) -> str:
    """Select the tasks that depend on one of ``count`` ids."""
    return f"SELECT DISTINCT child FROM parents WHERE parent IN ({', '.join('?' * count)})"


@lru_cache(maxsize=64)
def insert(columns: tuple[str, ...]) -> str:
    """An ``INSERT`` of these columns."""
    return f"INSERT INTO tasks ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"


@lru_cache(maxsize=64)
def insert_if_new(columns: tuple[str, ...]) -> str:
    """An ``INSERT`` of these columns that does nothing where what must be unique is taken."""
    return f"{insert(columns)} ON CONFLICT DO NOTHING"


_shapes: dict[tuple[Any, ...], str] = {}


def update(
    task_ids: Sequence[str], guard: Mapping[str, Any], changes: Mapping[str, Any]
) -> tuple[str, Any]:
    """An ``UPDATE`` of one task or of several, and its values."""
    values = [*changes.values(), *task_ids, *guard.values()]
    key = (len(task_ids), *changes, None, *guard)
    special = _has_special(guard)
    sql = None if special else _shapes.get(key)
    if sql is None:
        where, values[len(changes) + len(task_ids) :] = _conditions(guard)
        settings = ", ".join(f"{name} = ?" for name in changes)
        which = "id = ?" if len(task_ids) == 1 else f"id IN ({', '.join('?' * len(task_ids))})"
        verb = "UPDATE OR IGNORE" if any(name in changes for name in UNIQUE) else "UPDATE"
        sql = f"{verb} tasks SET {settings} WHERE {which}{where}"
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
        "SELECT * FROM tasks INDEXED BY tasks_held WHERE status = 'pending' AND held > 0)"
    ),
    RUNNING: "(SELECT * FROM tasks INDEXED BY tasks_running WHERE status = 'running')",
    **{
        status: f"(SELECT * FROM tasks INDEXED BY tasks_{status} WHERE status = '{status}')"
        for status in FINISHED
    },
}


def list_tasks(filter: TaskFilter) -> tuple[str, list[Any]]:
    """The query for the tasks that meet a filter, and its values."""
    source, values = _meeting(filter)
    sql = f"SELECT {TASK} FROM {source} ORDER BY created_at DESC, seq DESC LIMIT ? OFFSET ?"
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
