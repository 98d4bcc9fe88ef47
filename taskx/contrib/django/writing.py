"""Guarded writes as SQL.

Each write is one statement, whose guard is in its condition: the database changes a row only if it is as
the guard wants it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

from django.db.utils import IntegrityError

from taskx.contrib.django.connections import Link
from taskx.core.record import COLUMNS, DEFAULTS, UNIQUE
from taskx.core.writes import PRESENT, Delete, Insert, NoteChange, Update, Write
from taskx.storage.base import new_version

#: The most writes in one statement.
MOST_TOGETHER = 500

TASK, PARENT, TAG, NOTE = "taskx_task", "taskx_parent", "taskx_tag", "taskx_note"
_HAS_ON_CONFLICT = ("postgresql", "sqlite")
# The columns of a task for whose items other tables have rows.
_LISTS = ("depends_on", "tags")


def literal(value: Any) -> str:
    """Return the default of a column as SQL."""
    return "NULL" if value is None else repr(value)  # defaults are numbers and short texts


# --- one by one


def apply_each(link: Link, writes: Iterable[Write]) -> list[bool]:
    """Apply writes in order, inside a transaction. Return for each True if its guard held."""
    return [apply_one(link, write) for write in writes]


def apply_one(link: Link, write: Write) -> bool:
    """Apply one write, inside a transaction. Return True if its guard held."""
    if isinstance(write, Insert):
        return _insert(link, write)
    if write.skips and link.vendor == "mysql" and not _lock(link, write):
        return False
    if isinstance(write, Delete):
        return _delete(link, write)
    held = _unless_taken(link, write, lambda: link.count(*update(link, write)) > 0)
    if held and "tags" in write.changes:
        retag(link, write)
    return held


def _lock(link: Link, write: Update | Delete) -> bool:
    """Lock the row of a write on MySQL. Return False if another transaction has locked it."""
    if not link.django.features.has_select_for_update_skip_locked:
        return True
    # MariaDB fails to pass over a lock in a session that waits for no locks.
    patience = "SET STATEMENT innodb_lock_wait_timeout = 1 FOR "
    sql = f"SELECT seq FROM {TASK} WHERE id = %s FOR UPDATE SKIP LOCKED"
    return bool(link.rows(f"{patience if link.django.mysql_is_mariadb else ''}{sql}", (write.id,)))


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
        add_lists(link, [write.row], dict(link.rows(_SEQ, (write.id,))))
    return held


@lru_cache(maxsize=64)
def _insert_sql(given: tuple[str, ...], on_conflict: bool) -> str:
    values = ("%s" if name in given else literal(DEFAULTS[name]) for name in in_order(given))
    suffix = " ON CONFLICT DO NOTHING" if on_conflict else ""
    columns = ", ".join(in_order(given))
    return f"INSERT INTO {TASK} ({columns}) VALUES ({', '.join(values)}){suffix}"


def in_order(given: Sequence[str]) -> list[str]:
    """Return all columns: the given ones first, in their order."""
    return [*given, *(name for name in COLUMNS if name not in given)]


_SEQ = f"SELECT id, seq FROM {TASK} WHERE id = %s"


def _delete(link: Link, write: Delete) -> bool:
    where, values = conditions(write.guard)
    what = f"FROM {TASK} WHERE id = %s{where}"
    if skips_locked(link, write):
        what = f"FROM {TASK} WHERE seq = (SELECT seq {what} FOR UPDATE SKIP LOCKED)"
    if link.returning:
        gone = link.rows(f"DELETE {what} RETURNING seq, id, depends_on, tags", (write.id, *values))
    else:
        gone = link.rows(f"SELECT seq, id, depends_on, tags {what} FOR UPDATE", (write.id, *values))
        if gone:
            link.count(f"DELETE {what}", (write.id, *values))
    remove_lists(link, gone)
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


def skips_locked(link: Link, write: Update | Delete) -> bool:
    """Return True if a write passes over a row that another transaction is changing."""
    return link.vendor == "postgresql" and write.skips


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


def add_lists(link: Link, rows: Iterable[Mapping[str, Any]], seqs: Mapping[str, int]) -> None:
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


def remove_lists(link: Link, gone: Iterable[tuple[Any, ...]]) -> None:
    """Remove the pairs and the tags of removed tasks: rows of number, id, parents and tags."""
    gone = list(gone)
    parted = [task_id for _, task_id, parents, _ in gone if parents is not None]
    untagged = [seq for seq, _, _, tags in gone if tags is not None]
    for table, column, values in (PARENT, "child", parted), (TAG, "task", untagged):
        for start in range(0, len(values), MOST_TOGETHER):
            some: list[Any] = values[start : start + MOST_TOGETHER]
            link.count(f"DELETE FROM {table} WHERE {column} IN ({places(some)})", some)


def retag(link: Link, write: Update) -> None:
    """Replace the tags of a task by those of a write, which has changed its row."""
    ((seq, at),) = link.rows(f"SELECT seq, created_at FROM {TASK} WHERE id = %s", (write.id,))
    link.count(f"DELETE FROM {TAG} WHERE task = %s", (seq,))
    rows = [(tag, at, seq) for tag in _items(write.changes["tags"])]
    _insert_rows(link, f"INSERT INTO {TAG} (tag, at, task)", rows)


def places(values: Sequence[object]) -> str:
    """Return the places of values in SQL."""
    return ", ".join(["%s"] * len(values))


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
