"""The queries, written so that a partial index finds the rows of each one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from taskx.contrib.django.writing import NOTE, PARENT, TAG, TASK, places
from taskx.core.clock import to_ms
from taskx.core.lifecycle import PENDING, RUNNING
from taskx.core.model import TASK_FIELDS, TaskFilter
from taskx.core.record import FOR_PARENTS, FOR_TURN, FREE, STUB, UNTIL_DUE
from taskx.core.tags import FLOW
from taskx.storage.base import Listed, Lookup, Timed

Query = tuple[str, list[Any]]

#: Text that begins with a prefix comes before the prefix and this.
LAST = "\U0010ffff"

# SQLite uses a partial index only if the index's own conditions are repeated.
_READY = f"status = '{PENDING}' AND held = {FREE}"
_HELD = f"status = '{PENDING}' AND held > {FREE}"
_RUNNING = f"status = '{RUNNING}'"
_WAITING = f"waiting_on IS NOT NULL AND status = '{PENDING}' AND held = {FOR_PARENTS}"
_IN_LINE = f"status = '{PENDING}' AND held = {FOR_TURN}"
_STUCK = "stuck_on > ''"
_STUB = ", ".join(STUB)
_TASK = ", ".join(TASK_FIELDS)

#: For each lookup column: the conditions of its rows, its own name, and the order.
_FIND: dict[Lookup, tuple[str, str, str]] = {
    "id": ("", "id", ""),
    "unique_lock": ("unique_lock IS NOT NULL AND ", "unique_lock", ""),
    "turn": ("turn IS NOT NULL AND ", "turn", ""),
    "waiting_on": (f"{_WAITING} AND ", "waiting_on", ""),
    "parent": ("", "parent", ""),
    "line": (f"{_IN_LINE} AND ", "concurrency_key", " ORDER BY seq"),
    "running_on": (f"{_RUNNING} AND owner <> '' AND ", "owner", ""),
    "buffered_on": (f"{_READY} AND owner <> '' AND ", "owner", ""),
    "stuck_on": (f"{_STUCK} AND ", "stuck_on", ""),
}


@lru_cache(maxsize=256)
def find(column: Lookup, count: int, fields: tuple[str, ...], limited: bool) -> str:
    """Select fields of the rows that have one of ``count`` values in a lookup column."""
    which, key, order = _FIND[column]
    table = f"(SELECT parent, child AS id FROM {PARENT}) AS pairs" if column == "parent" else TASK
    values = "= %s" if count == 1 else f"IN ({places(range(count))})"
    sql = f"SELECT {', '.join(fields)} FROM {table} WHERE {which}{key} {values}{order}"
    return f"{sql} LIMIT %s" if limited else sql


# --- one step in an index for each value


def _steps(first: str, next_: str) -> str:
    """Select values that each follow from the one before, until there are no more."""
    return (
        f"steps (value) AS ({first} UNION ALL SELECT ({next_}) FROM steps "
        "WHERE steps.value IS NOT NULL) SELECT value FROM steps WHERE value IS NOT NULL"
    )


def _walk(step: str) -> str:
    """Take a step after a given value, and further ones, up to a limit."""
    return f"WITH RECURSIVE {_steps(f'{step}%s', f'{step}steps.value')} LIMIT %s"


def _least(name: str, which: str) -> str:
    return f"SELECT min({name}) FROM {TASK} WHERE {which} AND {name} > "


#: For each column, the query for the value that comes after a given one, without that.
STEPS: dict[Listed, str] = {
    "waiting_on": _least("waiting_on", _WAITING),
    "line": _least("concurrency_key", _IN_LINE),
    "running_on": _least("owner", _RUNNING),
    "buffered_on": _least("owner", _READY),
    "stuck_on": _least("stuck_on", _STUCK),
    "ready_type": _least("type", f"{_READY} AND owner = %s"),
}

# The first column of the index is the owner, so this takes a step for each type of each owner.
_OWNERS = (
    f"WITH RECURSIVE owners (owner) AS (SELECT min(owner) FROM {TASK} WHERE {_READY} UNION ALL "
    f"SELECT (SELECT min(owner) FROM {TASK} WHERE {_READY} AND owner > owners.owner) FROM owners "
    "WHERE owners.owner IS NOT NULL), "
)
_LEAST_TYPE = (
    f"SELECT min(kind) FROM (SELECT (SELECT min(type) FROM {TASK} WHERE {_READY} "
    f"AND {TASK}.owner = owners.owner AND type > {{}}) AS kind FROM owners) AS kinds"
)

#: The queries for the values of a column that come after a given one.
DISTINCT: dict[Listed, str] = {
    **{column: _walk(step) for column, step in STEPS.items()},
    "ready_type": (
        f"{_OWNERS}{_steps(_LEAST_TYPE.format('%s'), _LEAST_TYPE.format('steps.value'))} LIMIT %s"
    ),
}
#: The query for the last label of a flow before a given one, without that.
LAST_FLOW = f"SELECT max(tag) FROM {TAG} WHERE tag > '{FLOW}' AND tag < "
FLOWS = _walk(LAST_FLOW)
_PRIORITY = f"SELECT max(priority) FROM {TASK} WHERE {_READY} AND owner = %s AND type = %s"
#: The query for the greatest priority below a given one of ready tasks of an owner and a type.
LOWER_PRIORITY = f"{_PRIORITY} AND priority < "
#: The priorities of ready tasks of an owner and a type.
PRIORITIES = f"WITH RECURSIVE {_steps(_PRIORITY, f'{LOWER_PRIORITY}steps.value')}"

# --- what may start, and what has ended

_READY_OF_TYPE = (
    f"SELECT {_STUB}, seq FROM {TASK} WHERE {_READY} AND owner = %s AND type = %s{{}} "
    "ORDER BY {}seq LIMIT %s"
)
READY_AT = _READY_OF_TYPE.format(" AND priority = %s", "")


@lru_cache(maxsize=64)
def ready(types: int) -> str:
    """Select the best tasks of each of several types, in one query."""
    # The order names all columns after the type, so that the index is read in its order.
    one = _READY_OF_TYPE.format("", "priority DESC, ")
    if types == 1:
        return one
    return " UNION ALL ".join(f"SELECT * FROM ({one}) AS of_type_{n}" for n in range(types))


COUNT_READY = (
    f"SELECT count(*) FROM (SELECT 1 FROM {TASK} WHERE {_READY} AND owner = %s AND type = %s "
    "ORDER BY priority DESC, seq LIMIT %s) AS found"  # the order of the index, so that it is used
)
DUE: dict[Timed, str] = {
    "run_at": (
        f"SELECT id, run_at FROM {TASK} WHERE {_HELD} AND held = {UNTIL_DUE} AND run_at <= %s "
        "ORDER BY run_at LIMIT %s"
    ),
    "expires_at": (
        f"SELECT id, expires_at FROM {TASK} WHERE expires_at IS NOT NULL AND status = '{PENDING}' "
        "AND expires_at <= %s ORDER BY expires_at LIMIT %s"
    ),
}


def _before(at: str, number: str) -> str:
    """Compare rows with a place in a list. Its values are the time, and again the time with the number.

    MySQL uses an index only for the first of the comparisons.
    """
    return f"{at} <= %s AND ({at}, {number}) < (%s, %s)"


# The index of a status is by ``created_at``: a task was created before it ended.
ENDED = (
    f"SELECT {_STUB}, depends_on, unique_lock, unique_scope, created_at, seq FROM {TASK} "
    f"WHERE status = '{{}}' AND {_before('created_at', 'seq')} AND completed_at < %s "
    "AND stuck_on = '' ORDER BY created_at DESC, seq DESC LIMIT %s"
)
NEWEST = (
    f"SELECT {{}} FROM {TASK} WHERE status = '{{}}' ORDER BY created_at DESC, seq DESC LIMIT %s"
)

# --- notes

_NOTES = f"SELECT name, text, version FROM {NOTE} WHERE name"
NOTES = f"{_NOTES} >= %s AND name < %s"
NOTES_AFTER = f"{_NOTES} > %s AND name < %s ORDER BY name LIMIT %s"


def notes_named(count: int) -> str:
    """Select notes by their names."""
    return f"{_NOTES} IN ({places(range(count))})"


# --- lists and counts


def list_tasks(filter: TaskFilter, vendor: str, place: Sequence[Any] = (), by: str = "") -> Query:
    """Return the query for the tasks that match a filter, each with its ``seq``, and its values.

    ``place`` is a ``created_at`` and a ``seq``: only tasks that follow it are listed. ``by`` is the label
    whose tasks are read; it is empty to use another index.
    """
    source, values = _meeting(filter, vendor, place, by)
    at, number = ("g.at", "g.task") if by else ("t.created_at", "t.seq")
    task = ", ".join(f"t.{name}" for name in TASK_FIELDS)
    sql = f"SELECT {task}, t.seq FROM {source} ORDER BY {at} DESC, {number} DESC LIMIT %s OFFSET %s"
    limit = int(filter.limit)  # MySQL's drivers write numbers of another class as texts
    return sql, [*values, limit, filter.offset]


def count_tasks(filter: TaskFilter, vendor: str, most: int | None = None, by: str = "") -> Query:
    """Return the query for the number of tasks that match a filter, at most ``most``."""
    source, values = _meeting(filter, vendor, (), by)
    if most is None:
        return f"SELECT count(*) FROM {source}", values
    # With an order the index of the status is used. Otherwise the planner may read the table from its
    # beginning, where the oldest tasks are, which have ended.
    order = "" if filter.status is None or by else " ORDER BY t.created_at DESC, t.seq DESC"
    return f"SELECT count(*) FROM (SELECT 1 FROM {source}{order} LIMIT %s) AS found", [
        *values,
        most,
    ]


def count_by_status(filter: TaskFilter, vendor: str, most: int, by: str = "") -> Query:
    """Return the query for the number of tasks of each status among ``most`` that match a filter."""
    source, values = _meeting(filter, vendor, (), by)
    some = f"SELECT t.status AS status FROM {source} LIMIT %s"
    return f"SELECT status, count(*) FROM ({some}) AS found GROUP BY status", [*values, most]


def fewest(labels: Sequence[str]) -> Query:
    """Return the query for how many tasks each label has, up to a bound."""
    one = f"(SELECT count(*) FROM (SELECT 1 FROM {TAG} WHERE tag = %s LIMIT 20000) AS found)"
    return f"SELECT {', '.join([one] * len(labels))}", [*labels]


_HAS_TAG = f"t.seq IN (SELECT task FROM {TAG} WHERE tag = %s)"
_CONTAINS = {"postgresql": "strpos(lower(t.error), %s) > 0"}
_STATUS = {
    # The indexes of what may start and of what waits hold all pending tasks between them.
    PENDING: f"t.status = '{PENDING}' AND (t.held = {FREE} OR t.held > {FREE})",
}


def _meeting(filter: TaskFilter, vendor: str, place: Sequence[Any], by: str) -> Query:
    source, conditions, values = f"{TASK} t", [], list[Any]()
    if by:
        source = f"{TAG} g JOIN {TASK} t ON t.seq = g.task"
        conditions.append("g.tag = %s")
        values.append(by)
    if place:
        conditions.append(_before("g.at", "g.task") if by else _before("t.created_at", "t.seq"))
        values += [place[0], *place]
    if filter.status is not None:
        status = filter.status.value
        conditions.append(_STATUS.get(status, f"t.status = '{status}'"))
    if filter.id_prefix:
        conditions.append("t.id >= %s AND t.id < %s")
        values += [filter.id_prefix, filter.id_prefix + LAST]
    if filter.parent is not None:
        conditions.append(f"t.id IN (SELECT child FROM {PARENT} WHERE parent = %s)")
        values.append(filter.parent)
    for label in filter.labels:
        if label != by:
            conditions.append(_HAS_TAG)
            values.append(label)
    for name in ("type", "created_by", "error_type"):
        if (wanted := getattr(filter, name)) is not None:
            conditions.append(f"t.{name} = %s")
            values.append(wanted)
    for sign, moment in (">=", filter.start_date), ("<=", filter.end_date):
        if moment is not None:
            conditions.append(f"{'g.at' if by else 't.created_at'} {sign} %s")
            values.append(to_ms(moment))
    if filter.error is not None:
        conditions.append(_CONTAINS.get(vendor, "instr(lower(t.error), %s) > 0"))
        values.append(filter.error.encode().lower().decode())  # of A to Z only
    return source + (f" WHERE {' AND '.join(conditions)}" if conditions else ""), values
