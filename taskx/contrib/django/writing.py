"""Guarded writes as SQL.

Each write is one statement, whose guard is in its condition: the database changes a row only if it is as
the guard wants it. :func:`apply_each` sends them one by one. :func:`apply_groups` sends writes of the same
form together, for servers at the other end of a network.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import attrs
from django.db.utils import IntegrityError

from taskx.contrib.django.connections import Link
from taskx.contrib.django.models import TaskRow
from taskx.core.record import COLUMNS, DEFAULTS, UNIQUE
from taskx.core.writes import PRESENT, Delete, Insert, NoteChange, Update, Write
from taskx.storage.base import new_version

#: The most writes in one statement.
MOST_TOGETHER = 500

TASK, PARENT, TAG, NOTE = "taskx_task", "taskx_parent", "taskx_tag", "taskx_note"
# The types of the columns in PostgreSQL.
_TYPES = {
    field.column: {"BigIntegerField": "bigint", "FloatField": "float8"}.get(
        field.get_internal_type(), "text"
    )
    for field in TaskRow._meta.fields
}
_HAS_ON_CONFLICT = ("postgresql", "sqlite")
# The columns of a task for whose items other tables have rows.
_LISTS = ("depends_on", "tags")


def _literal(value: Any) -> str:
    return "NULL" if value is None else repr(value)  # defaults are numbers and short texts


# --- one by one


def apply_each(link: Link, writes: Iterable[Write]) -> list[bool]:
    """Apply writes in order, inside a transaction. Return for each True if its guard held."""
    return [apply_one(link, write) for write in writes]


def apply_one(link: Link, write: Write) -> bool:
    """Apply one write, inside a transaction. Return True if its guard held."""
    if isinstance(write, Insert):
        return _insert(link, write)
    if isinstance(write, Delete):
        return _delete(link, write)
    held = _unless_taken(link, write, lambda: link.count(*update(link, write)) > 0)
    if held and "tags" in write.changes:
        _retag(link, write)
    return held


def is_single(write: Write) -> bool:
    """Return True if a write is a single statement, and no savepoint is needed for it."""
    if isinstance(write, Insert):
        return not any(write.row.get(name) for name in _LISTS)
    return (
        isinstance(write, Update) and "tags" not in write.changes and not _takes_unique_value(write)
    )


def _unless_taken(link: Link, write: Update, change: Callable[[], bool]) -> bool:
    """Return what ``change`` returns; False if another row has the same value in a unique column."""
    if not _takes_unique_value(write):
        return change()
    # PostgreSQL refuses everything after an error, up to the last savepoint.
    guarded = link.savepoint() if link.vendor == "postgresql" else nullcontext()
    try:
        with guarded:
            return change()
    except IntegrityError:
        return False


def _takes_unique_value(write: Update) -> bool:
    return any(write.changes.get(name) is not None for name in UNIQUE)


def _insert(link: Link, write: Insert) -> bool:
    sql = _insert_sql(tuple(write.row), link.vendor in _HAS_ON_CONFLICT)
    try:
        held = link.count(sql, tuple(write.row.values())) > 0
    except IntegrityError:  # of a database without ON CONFLICT
        return False
    if held and any(write.row.get(name) for name in _LISTS):
        _add_lists(link, [write.row], dict(link.rows(_SEQ, (write.id,))))
    return held


@lru_cache(maxsize=64)
def _insert_sql(given: tuple[str, ...], on_conflict: bool) -> str:
    values = ("%s" if name in given else _literal(DEFAULTS[name]) for name in _in_order(given))
    suffix = " ON CONFLICT DO NOTHING" if on_conflict else ""
    columns = ", ".join(_in_order(given))
    return f"INSERT INTO {TASK} ({columns}) VALUES ({', '.join(values)}){suffix}"


def _in_order(given: Sequence[str]) -> list[str]:
    """Return all columns: the given ones first, in their order."""
    return [*given, *(name for name in COLUMNS if name not in given)]


_SEQ = f"SELECT id, seq FROM {TASK} WHERE id = %s"


def _delete(link: Link, write: Delete) -> bool:
    where, values = conditions(write.guard)
    what = f"FROM {TASK} WHERE id = %s{where}"
    if link.returning:
        gone = link.rows(f"DELETE {what} RETURNING seq, id, depends_on, tags", (write.id, *values))
    else:
        gone = link.rows(f"SELECT seq, id, depends_on, tags {what} FOR UPDATE", (write.id, *values))
        if gone:
            link.count(f"DELETE {what}", (write.id, *values))
    _remove_lists(link, gone)
    return bool(gone)


def update(link: Link, write: Update) -> tuple[str, list[Any]]:
    """Return the ``UPDATE`` of a write, and its values."""
    where, values = conditions(write.guard)
    settings = ", ".join(f"{name} = %s" for name in write.changes)
    if skips_locked(link, write):
        found = f"SELECT seq FROM {TASK} WHERE id = %s{where} FOR NO KEY UPDATE SKIP LOCKED"
        sql = f"UPDATE {TASK} SET {settings} WHERE seq = ({found}){where}"
        return sql, [*write.changes.values(), write.id, *values, *values]
    sql = f"UPDATE {TASK} SET {settings} WHERE id = %s{where}"
    return sql, [*write.changes.values(), write.id, *values]


def skips_locked(link: Link, write: Update) -> bool:
    """Return True if a write may pass over a row that another transaction is changing.

    It gives the task to a node. The other one will decide about the task, and the node finds it again if
    it is still free then.
    """
    return link.vendor == "postgresql" and bool(write.changes.get("owner"))


def conditions(guard: Mapping[str, Any]) -> tuple[str, list[Any]]:
    """Return the conditions of a guard as SQL that follows another condition, and their values."""
    text, values = "", []
    for name, wanted in guard.items():
        if wanted is PRESENT:
            text += f" AND {name} IS NOT NULL"
        elif isinstance(wanted, tuple):
            some = [value for value in wanted if value is not None]
            parts = [f"{name} IN ({', '.join(['%s'] * len(some))})"] if some else []
            parts += [f"{name} IS NULL"] if len(some) < len(wanted) else []
            text += f" AND ({' OR '.join(parts) or '1 = 0'})"
            values += some
        elif wanted is None:
            text += f" AND {name} IS NULL"
        else:
            text += f" AND {name} = %s"
            values.append(wanted)
    return text, values


# --- the tables of parents and tags


def _items(text: Any) -> list[str]:
    """Return the different items of a list in a column; none of one that is empty or damaged."""
    try:
        found = json.loads(text) if text else []
    except (ValueError, TypeError):
        return []
    items = found if isinstance(found, list) else []
    return list(dict.fromkeys(item for item in items if isinstance(item, str)))


def _add_lists(link: Link, rows: Iterable[Mapping[str, Any]], seqs: Mapping[str, int]) -> None:
    """Store the pairs of parents and the tags of new tasks, whose numbers are in ``seqs``."""
    pairs, tags = [], []
    for row in rows:
        pairs += [(parent, row["id"]) for parent in _items(row.get("depends_on"))]
        tags += [(tag, row["created_at"], seqs[row["id"]]) for tag in _items(row.get("tags"))]
    _insert_rows(link, f"INSERT INTO {PARENT} (parent, child)", pairs)
    _insert_rows(link, f"INSERT INTO {TAG} (tag, at, task)", tags)


def _insert_rows(link: Link, into: str, rows: Sequence[tuple[Any, ...]]) -> None:
    for start in range(0, len(rows), MOST_TOGETHER // 2):
        some = rows[start : start + MOST_TOGETHER // 2]
        places = ", ".join([f"({', '.join(['%s'] * len(some[0]))})"] * len(some))
        link.count(f"{into} VALUES {places}", [value for row in some for value in row])


def _remove_lists(link: Link, gone: Iterable[tuple[Any, ...]]) -> None:
    """Remove the pairs and the tags of removed tasks: rows of number, id, parents and tags."""
    gone = list(gone)
    parted = [task_id for _, task_id, parents, _ in gone if parents is not None]
    untagged = [seq for seq, _, _, tags in gone if tags is not None]
    for table, column, values in (PARENT, "child", parted), (TAG, "task", untagged):
        for start in range(0, len(values), MOST_TOGETHER):
            some: list[Any] = values[start : start + MOST_TOGETHER]
            link.count(f"DELETE FROM {table} WHERE {column} IN ({places(some)})", some)


def _retag(link: Link, write: Update) -> None:
    ((seq, at),) = link.rows(f"SELECT seq, created_at FROM {TASK} WHERE id = %s", (write.id,))
    link.count(f"DELETE FROM {TAG} WHERE task = %s", (seq,))
    rows = [(tag, at, seq) for tag in _items(write.changes["tags"])]
    _insert_rows(link, f"INSERT INTO {TAG} (tag, at, task)", rows)


def places(values: Sequence[object]) -> str:
    """Return the places of values in SQL."""
    return ", ".join(["%s"] * len(values))


# --- in groups


@attrs.define
class Group:
    """Writes of the same form, of different tasks, that one statement makes."""

    form: tuple[Any, ...]
    writes: list[Write]
    places: list[int]  #: the place of each write in the batch


def grouped(writes: Sequence[Write]) -> list[Group]:
    """Return groups that may be sent in order, instead of the writes in order.

    A write may join an earlier group if none in between is about its task. Writes that set or free a unique
    value keep their order.
    """
    groups: list[Group] = []
    newest: dict[tuple[Any, ...], int] = {}  # the newest group of each form
    last_of: dict[str, int] = {}  # the last group with each task
    last_unique = -1
    for place, write in enumerate(writes):
        form, unique = _form(write), _touches_unique(write)
        number = newest.get(form, -1)
        fits = number > last_of.get(write.id, -1) and not (unique and number < last_unique)
        if not fits or len(groups[number].writes) >= MOST_TOGETHER:
            number = newest[form] = len(groups)
            groups.append(Group(form, [], []))
        groups[number].writes.append(write)
        groups[number].places.append(place)
        last_of[write.id] = number
        if unique:
            last_unique = max(last_unique, number)
    return groups


def _form(write: Write) -> tuple[Any, ...]:
    """Return what writes in one statement have in common."""
    if isinstance(write, Insert):
        return (Insert, *write.row)
    # The values of these conditions are in the text of a statement.
    special = tuple(
        (name, value if value is PRESENT or isinstance(value, tuple) else None)
        for name, value in write.guard.items()
    )
    if isinstance(write, Delete):
        return (Delete, *special)
    return (Update, *write.changes, None, *special, bool(write.changes.get("owner")))


def _touches_unique(write: Write) -> bool:
    if isinstance(write, Insert):
        return any(write.row.get(name) is not None for name in UNIQUE)
    return isinstance(write, Delete) or any(name in write.changes for name in UNIQUE)


def apply_groups(link: Link, writes: Sequence[Write]) -> list[bool]:
    """Apply writes on PostgreSQL, inside a transaction. Return for each True if its guard held.

    Raises ``IntegrityError`` if a change takes a unique value that another row has: apply them one by one.
    """
    results = [False] * len(writes)
    for group in grouped(writes):
        if len(group.writes) == 1:
            (write,) = group.writes
            held = {write.id} if apply_one(link, write) else set()
        else:
            held = _apply_group(link, group.writes)
        for write, place in zip(group.writes, group.places, strict=True):
            results[place] = write.id in held
    return results


def _apply_group(link: Link, writes: Sequence[Any]) -> set[str]:
    """Apply writes of the same form in one statement. Return the ids of those whose guards held."""
    first = writes[0]
    if isinstance(first, Insert):
        return _insert_group(link, writes)
    source = _Source()
    where = _guards(source, writes)
    if isinstance(first, Delete):
        return _delete_group(link, source, where)
    return _update_group(link, writes, source, where)


def _guards(source: _Source, writes: Sequence[Any]) -> str:
    """Add the ids and the guards of writes to a source; return the condition that compares them."""
    source.array("id", [write.id for write in writes])
    where = "t.id = v.id"
    for name, wanted in writes[0].guard.items():
        if wanted is PRESENT or isinstance(wanted, tuple):
            text, values = conditions({f"t.{name}": wanted})
            where += text
            source.where_values += values
            continue
        wants = [write.guard[name] for write in writes]
        same = "IS NOT DISTINCT FROM" if None in wants else "="
        # A column, also if all values are the same: with a constant, the planner might read a whole partial
        # index instead of these rows, as long as the table has no statistics.
        where += f" AND t.{name} {same} {source.array(f'g_{name}', wants, name)}"
    return where


def _delete_group(link: Link, source: _Source, where: str) -> set[str]:
    sql = (
        f"DELETE FROM {TASK} t USING {source.text} WHERE {where} "
        "RETURNING t.seq, t.id, t.depends_on, t.tags"
    )
    gone = link.rows(sql, source.values)
    _remove_lists(link, gone)
    return {task_id for _, task_id, _, _ in gone}


def _update_group(link: Link, writes: Sequence[Update], source: _Source, where: str) -> set[str]:
    settings = ", ".join(
        f"{name} = {source.value(name, [write.changes[name] for write in writes])}"
        for name in writes[0].changes
    )
    values = source.values
    free = ""
    if skips_locked(link, writes[0]):
        # A table of its own: the planner might repeat a query inside the condition for each row.
        free = (
            f"WITH free AS MATERIALIZED (SELECT seq FROM {TASK} WHERE id = ANY(%s::text[]) "
            "FOR NO KEY UPDATE SKIP LOCKED) "
        )
        where += " AND t.seq IN (SELECT seq FROM free)"
        values.insert(0, [write.id for write in writes])
    sql = f"{free}UPDATE {TASK} t SET {settings} FROM {source.text} WHERE {where} RETURNING t.id"
    held = {task_id for (task_id,) in link.rows(sql, values)}
    for write in writes:
        if "tags" in write.changes and write.id in held:
            _retag(link, write)
    return held


def _insert_group(link: Link, writes: Sequence[Insert]) -> set[str]:
    given = tuple(writes[0].row)
    arrays = [_array(name, [write.row[name] for write in writes]) for name in given]
    sql = _insert_group_sql(given)
    seqs: dict[str, int] = dict(link.rows(sql, arrays))
    _add_lists(link, [write.row for write in writes if write.id in seqs], seqs)
    return set(seqs)


@lru_cache(maxsize=64)
def _insert_group_sql(given: tuple[str, ...]) -> str:
    arrays = ", ".join(f"%s::{_TYPES[name]}[]" for name in given)
    names = [
        f"v.{name}" if name in given else _literal(DEFAULTS[name]) for name in _in_order(given)
    ]
    return (
        f"INSERT INTO {TASK} ({', '.join(_in_order(given))}) SELECT {', '.join(names)} "
        f"FROM unnest({arrays}) WITH ORDINALITY AS v({', '.join(given)}, place) ORDER BY v.place "
        "ON CONFLICT DO NOTHING RETURNING id, seq"
    )


def _array(name: str, values: Sequence[Any]) -> list[Any]:
    if _TYPES[name] != "float8":
        return list(values)
    return [None if value is None else float(value) for value in values]  # no list of mixed types


class _Source:
    """The values of several writes, as a table ``v`` in SQL.

    New values that are all the same are no column of it.
    """

    def __init__(self) -> None:
        self._columns: list[str] = []
        self._arrays: list[str] = []
        self._array_values: list[Any] = []
        self._set_values: list[Any] = []
        self.where_values: list[Any] = []

    def array(self, name: str, values: Sequence[Any], column: str = "id") -> str:
        """Add a column with the values."""
        self._columns.append(name)
        self._arrays.append(f"%s::{_TYPES[column]}[]")
        self._array_values.append(_array(column, values))
        return f"v.{name}"

    def value(self, name: str, values: Sequence[Any]) -> str:
        """Return the expression for the new values of a column."""
        if any(value != values[0] for value in values):
            return self.array(f"c_{name}", values, name)
        self._set_values.append(values[0])
        return f"%s::{_TYPES[name]}"

    @property
    def text(self) -> str:
        return f"unnest({', '.join(self._arrays)}) AS v({', '.join(self._columns)})"

    @property
    def values(self) -> list[Any]:
        """The values of the whole statement, in the order of their places."""
        return [*self._set_values, *self._array_values, *self.where_values]


# --- notes


def put_note(link: Link, change: NoteChange) -> bool:
    """Store or remove a note, inside a transaction. Return True if the stored one had the version."""
    name, text, version = change
    if text is None and not version:
        return not link.rows(f"SELECT 1 FROM {NOTE} WHERE name = %s", (name,))
    if text is None:
        sql = f"DELETE FROM {NOTE} WHERE name = %s AND version = %s"
        return link.count(sql, (name, version)) == 1
    if version:
        sql = f"UPDATE {NOTE} SET text = %s, version = version + 1 WHERE name = %s AND version = %s"
        return link.count(sql, (text, name, version)) == 1
    suffix = " ON CONFLICT DO NOTHING" if link.vendor in _HAS_ON_CONFLICT else ""
    sql = f"INSERT INTO {NOTE} (name, text, version) VALUES (%s, %s, %s){suffix}"
    try:
        return link.count(sql, (name, text, new_version())) == 1
    except IntegrityError:
        return False
