"""The SQL statements, built once for each shape of a write or filter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from taskx.core.clock import to_ms
from taskx.core.conditions import Scalar
from taskx.core.lifecycle import FINISHED, PENDING, RUNNING
from taskx.core.model import TASK_FIELDS, TaskFilter
from taskx.core.record import FOR_PARENTS, FOR_TURN, UNIQUE, UNTIL_DUE
from taskx.core.tags import FLOW
from taskx.core.writes import PRESENT
from taskx.storage.base import Listed, Lookup, Timed


def plain(names: Iterable[str]) -> str:
    """Return the columns as expressions, to select them.

    A connection of a caller may have ``PARSE_DECLTYPES``, and converters for the types of our columns. An
    expression has no declared type.
    """
    return ", ".join(f"+{name}" for name in names)


# Casts, as one damaged record must not prevent the others from being sorted.
_STUB = (
    "+id, +status, CAST(starts AS INTEGER), CAST(priority AS INTEGER), CAST(created_at AS INTEGER), "
    "cancel_requested_at IS NOT NULL, CAST(type AS TEXT), CAST(run_at AS INTEGER)"
)

_ROW = plain((*TASK_FIELDS, "seq"))
_READY, _RUNNING = "status = 'pending' AND held = 0", "status = 'running'"
READY = (
    f"SELECT {_STUB}, +seq FROM tasks WHERE {_READY} AND owner = ? AND type = ? "
    "ORDER BY priority DESC, seq LIMIT ?"
)
COUNT_READY = (
    f"SELECT count(*) FROM (SELECT 1 FROM tasks WHERE {_READY} AND owner = ? AND type = ? LIMIT ?)"
)
# One step in the index for each priority, however many tasks have it.
PRIORITIES = (
    f"WITH RECURSIVE steps (priority) AS (SELECT max(priority) FROM tasks WHERE {_READY} "
    "AND owner = ? AND type = ? UNION ALL SELECT (SELECT max(priority) FROM tasks "
    f"WHERE {_READY} AND owner = ? AND type = ? AND priority < steps.priority) FROM steps "
    "WHERE steps.priority IS NOT NULL) SELECT priority FROM steps WHERE priority IS NOT NULL"
)
READY_AT = (
    f"SELECT {_STUB}, +seq FROM tasks WHERE {_READY} AND owner = ? AND type = ? AND priority = ? "
    "ORDER BY seq LIMIT ?"
)
# SQLite uses the partial index only if the condition is written like this.
_HELD = "status = 'pending' AND held > 0 AND held = {}"
DUE: dict[Timed, str] = {
    "run_at": (
        f"SELECT +id, +run_at FROM tasks WHERE {_HELD.format(UNTIL_DUE)} AND run_at <= ? "
        "ORDER BY run_at LIMIT ?"
    ),
    "expires_at": (
        "SELECT +id, +expires_at FROM tasks WHERE expires_at IS NOT NULL AND status = 'pending' "
        "AND expires_at <= ? ORDER BY expires_at LIMIT ?"
    ),
}
_WAITING = f"waiting_on IS NOT NULL AND status = 'pending' AND held = {FOR_PARENTS}"
_WAITING_FOR_TURN = f"status = 'pending' AND held = {FOR_TURN}"


def _steps(name: str, which: str, tasks: str = "tasks") -> str:
    """Select the values of an indexed column, in one step for each, however many tasks have it."""
    least = f"SELECT min({name}) FROM {tasks} WHERE {which} AND {name} > {{}}"
    return f"WITH RECURSIVE {_each(least)}"


def _each(least: str) -> str:
    return (
        f"steps (value) AS ({least.format('?')} UNION ALL SELECT ({least.format('steps.value')}) "
        "FROM steps WHERE steps.value IS NOT NULL) "
        "SELECT value FROM steps WHERE value IS NOT NULL LIMIT ?"
    )


# The first column of the index is the owner, so this takes a step for each type of each owner.
_READY_TYPES = (
    f"WITH RECURSIVE owners (owner) AS (SELECT min(owner) FROM tasks WHERE {_READY} UNION ALL SELECT "
    f"(SELECT min(owner) FROM tasks WHERE {_READY} AND owner > owners.owner) FROM owners "
    "WHERE owners.owner IS NOT NULL), "
) + _each(
    "SELECT min(kind) FROM (SELECT (SELECT min(type) FROM tasks "
    f"WHERE {_READY} AND tasks.owner = owners.owner AND type > {{}}) AS kind FROM owners)"
)


#: The queries for the values of a column that come after a given one.
DISTINCT: dict[Listed, str] = {
    "waiting_on": _steps("waiting_on", _WAITING, "tasks INDEXED BY tasks_waiting"),
    "line": _steps("concurrency_key", _WAITING_FOR_TURN),
    "running_on": _steps("owner", _RUNNING),
    "buffered_on": _steps("owner", _READY),
    "stuck_on": _steps("stuck_on", "stuck_on <> ''"),
    "ready_type": _READY_TYPES,
}
#: The parts of the query that finds rows by a column: the table, the conditions, the expression that is
#: compared with the values, and the sort order.
_FIND: dict[Lookup, tuple[str, str, str, str]] = {
    "id": ("tasks", "", "id", ""),
    "unique_lock": ("tasks", "", "unique_lock", ""),
    "turn": ("tasks", "", "turn", ""),
    "waiting_on": ("tasks", "", "waiting_on", ""),
    "parent": ("(SELECT parent, child AS id FROM parents)", "", "parent", ""),
    "line": ("tasks", f"{_WAITING_FOR_TURN} AND ", "concurrency_key", " ORDER BY seq"),
    "running_on": ("tasks", f"{_RUNNING} AND owner <> '' AND ", "owner", ""),
    "buffered_on": ("tasks", f"{_READY} AND owner <> '' AND ", "owner", ""),
    "stuck_on": ("tasks", "stuck_on <> '' AND ", "stuck_on", ""),
}
NEW_PARENT = "INSERT OR IGNORE INTO parents (parent, child) VALUES (?, ?)"
NEW_TAG = "INSERT OR IGNORE INTO tagged SELECT ?, created_at, seq FROM tasks WHERE id = ?"
# One step in the table of tags for each flow, the last one first.
_FLOWS = f"SELECT max(tag) FROM tagged WHERE tag > '{FLOW}' AND tag < {{}}"
FLOWS = (
    f"WITH RECURSIVE steps (value) AS ({_FLOWS.format('?')} UNION ALL "
    f"SELECT ({_FLOWS.format('steps.value')}) FROM steps WHERE steps.value IS NOT NULL) "
    "SELECT value FROM steps WHERE value IS NOT NULL LIMIT ?"
)
NOTES = "SELECT +name, +text, +version FROM notes WHERE name >= ? AND name < ?"
NOTES_NAMED = "SELECT +name, +text, +version FROM notes WHERE name IN ({})"
NOTES_AFTER = (
    "SELECT +name, +text, +version FROM notes WHERE name > ? AND name < ? ORDER BY name LIMIT ?"
)
NEW_NOTE = "INSERT INTO notes (name, text, version) VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
CHANGED_NOTE = "UPDATE notes SET text = ?, version = version + 1 WHERE name = ? AND version = ?"
GONE_NOTE = "DELETE FROM notes WHERE name = ? AND version = ?"
# This uses the index of the status, which is by ``created_at``: a task was created before it ended.
ENDED = (
    f"SELECT {_STUB}, +depends_on, +unique_lock, +unique_scope, +created_at, +seq FROM tasks "
    "INDEXED BY tasks_{0} WHERE status = '{0}' AND (created_at, seq) < (?, ?) AND completed_at < ? "
    "AND stuck_on = '' ORDER BY created_at DESC, seq DESC LIMIT ?"
)
NEWEST = (
    "SELECT {1} FROM tasks INDEXED BY tasks_{0} WHERE status = '{0}' "
    "ORDER BY created_at DESC, seq DESC LIMIT ?"
)
FREE_PAGES = (
    "SELECT (SELECT freelist_count FROM pragma_freelist_count), "
    "(SELECT page_count FROM pragma_page_count)"
)


@lru_cache(maxsize=256)
def find(column: Lookup, count: int, fields: tuple[str, ...], limited: bool) -> str:
    """Select fields of the rows that have one of ``count`` values in a lookup column."""
    table, conditions, key, order = _FIND[column]
    values = "= ?" if count == 1 else f"IN ({', '.join('?' * count)})"
    sql = f"SELECT {plain(fields)} FROM {table} WHERE {conditions}{key} {values}{order}"
    return f"{sql} LIMIT ?" if limited else sql


@lru_cache(maxsize=64)
def insert_if_new(columns: tuple[str, ...]) -> str:
    """Return an ``INSERT`` of these columns that does nothing if a unique value is taken."""
    places = ", ".join("?" * len(columns))
    return f"INSERT INTO tasks ({', '.join(columns)}) VALUES ({places}) ON CONFLICT DO NOTHING"


_shapes: dict[tuple[Any, ...], str] = {}


def update(
    task_ids: Sequence[str], guard: Mapping[str, Any], changes: Mapping[str, Any]
) -> tuple[str, Any]:
    """Return an ``UPDATE`` of one or several tasks, and its values."""
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
    """Return a ``DELETE`` and its values."""
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


# The tables of the tasks of one status, read through the partial indexes: listing or counting the few
# unfinished tasks costs nothing for the many finished ones.
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

_NEWEST_FIRST = "ORDER BY created_at DESC, seq DESC"


#: The conditions for the tasks that follow a place, which is a ``created_at`` and a ``seq``: first those of
#: the same moment, then the earlier ones. They are two, as an index finds the tasks of each one at once.
SAME, EARLIER = "created_at = ? AND seq < ?", "created_at < ?"


def list_tasks(
    filter: TaskFilter, after: str = "", place: Sequence[Any] = (), by: str = ""
) -> tuple[str, list[Any]]:
    """Return the query for the tasks that match a filter, each with its ``seq``, and its values.

    ``after`` is a further condition, and ``place`` has its values. ``by`` is the label whose tasks are
    read; it is empty to use another index.
    """
    source, values = _meeting(filter, after, place, by)
    page = f"{source} {_NEWEST_FIRST} LIMIT ? OFFSET ?"
    sorts = filter.status == PENDING and (not after or bool(filter.labels))
    if not by and (_by_id(filter) or sorts):
        # No index has these in order. Sorting many of them without the other columns takes half the time.
        page = f"tasks WHERE seq IN (SELECT seq FROM {page}) {_NEWEST_FIRST}"
    return f"SELECT {_ROW} FROM {page}", [*values, filter.limit, filter.offset]


def count_tasks(filter: TaskFilter, by: str = "") -> tuple[str, list[Any]]:
    """Return the query for the number of tasks that match a filter, and its values."""
    source, values = _meeting(filter, by=by, counts=True)
    return f"SELECT count(*) FROM {source}", values


def count_tasks_to(filter: TaskFilter, most: int, by: str = "") -> tuple[str, list[Any]]:
    """Return the query for the number of tasks that match a filter, at most ``most``, and its values."""
    source, values = _meeting(filter, by=by, counts=True)
    return f"SELECT count(*) FROM (SELECT 1 FROM {source} LIMIT ?)", [*values, most]


def count_by_status(filter: TaskFilter, most: int, by: str = "") -> tuple[str, list[Any]]:
    """Return the query for the number of tasks of each status among ``most`` that match a filter."""
    source, values = _meeting(filter, by=by)
    sql = f"SELECT +status, count(*) FROM (SELECT status FROM {source} LIMIT ?) GROUP BY status"
    return sql, [*values, most]


def fewest(filter: TaskFilter) -> tuple[str, list[Any]]:
    """Return the query for how many tasks each label of a filter has, and its status, up to a bound."""
    sources = ["tagged WHERE tag = ?"] * len(filter.labels)
    if filter.status is not None:
        sources.append(_SOURCES[filter.status.value])
    counts = (f"(SELECT count(*) FROM (SELECT 1 FROM {source} LIMIT 20000))" for source in sources)
    return f"SELECT {', '.join(counts)}", [*filter.labels]


# SQLite's lower() changes ASCII letters only.
_ERROR_CONTAINS = "instr(lower(error), lower(?)) > 0"
# SQLite's own index of the unique ids.
_IDS = "tasks INDEXED BY sqlite_autoindex_tasks_1"
# The tasks of a tag, in the order of the table of tags; and what that table knows of them.
_TAGGED = (
    f"(SELECT {', '.join(name for name in TASK_FIELDS if name != 'created_at')}, tag, "
    "at AS created_at, task AS seq FROM tagged CROSS JOIN tasks ON tasks.seq = task)"
)
_TAGS = "(SELECT tag, at AS created_at, task AS seq FROM tagged)"
# The conditions that the table of tags decides.
_OF_TAGS = frozenset({"tag", "flow", "start_date", "end_date"})
_HAS_TAG = "EXISTS (SELECT 1 FROM tagged WHERE tag = ? AND at = created_at AND task = seq)"


def _has(value: Scalar, path: Sequence[str]) -> tuple[str, list[Any]]:
    """Return the condition that params have a value at a path, and its values."""
    place = "$" + "".join(f'."{key}"' for key in path)
    if value is None or isinstance(value, bool):
        name = {None: "null", True: "true", False: "false"}[value]
        condition = f"json_type(params, ?) = '{name}'"
        values: list[Any] = [place]
    else:
        kinds = "'text'" if isinstance(value, str) else "'integer', 'real'"
        condition = f"json_extract(params, ?) = ? AND json_type(params, ?) IN ({kinds})"
        values = [place, value, place]
    # Damaged params match nothing; without the check, they would be an error.
    return f"CASE WHEN json_valid(params) THEN {condition} END", values


def _by_id(filter: TaskFilter) -> bool:
    """Return True if the index of ids finds the tasks."""
    return bool(filter.id_prefix) or filter.parent is not None


def _meeting(
    filter: TaskFilter,
    after: str = "",
    place: Sequence[Any] = (),
    by: str = "",
    *,
    counts: bool = False,
) -> tuple[str, list[Any]]:
    conditions = [after] if after else []
    values = [*place]
    status = None if filter.status is None else filter.status.value
    if by:
        source = _TAGS if counts and filter.given <= _OF_TAGS else _TAGGED
        conditions.append("tag = ?")
        values.append(by)
    elif _by_id(filter):
        source = _IDS
    elif after and status == PENDING and not filter.labels:
        # More than one page of them: better read all tasks in order once than sort these for each page.
        source = "tasks INDEXED BY tasks_created"
    else:
        source, status = _SOURCES[status], None
    if status is not None:
        conditions.append(f"status = '{status}'")
    if filter.id_prefix:
        conditions.append("id >= ? AND id < ?")
        values += [filter.id_prefix, f"{filter.id_prefix}\U0010ffff"]
    if filter.parent is not None:
        conditions.append("id IN (SELECT child FROM parents WHERE parent = ?)")
        values.append(filter.parent)
    for label in filter.labels:
        if label != by:
            conditions.append(_HAS_TAG)
            values.append(label)
    for name in ("type", "created_by", "error_type"):
        if getattr(filter, name) is not None:
            conditions.append(f"{name} = ?")
            values.append(getattr(filter, name))
    if filter.start_date is not None:
        conditions.append("created_at >= ?")
        values.append(to_ms(filter.start_date))
    if filter.end_date is not None:
        conditions.append("created_at <= ?")
        values.append(to_ms(filter.end_date))
    if filter.error is not None:
        conditions.append(_ERROR_CONTAINS)
        values.append(filter.error)
    for path, value in filter.params or ():
        condition, more = _has(value, path)
        conditions.append(condition)
        values += more
    return source + (f" WHERE {' AND '.join(conditions)}" if conditions else ""), values
