"""Guarded writes in groups: those of the same form are one statement of PostgreSQL.

It is for servers at the other end of a network.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import attrs

from taskx.stores.sql.link import Link
from taskx.stores.sql.statements import literal
from taskx.stores.sql.writing import Refused, Writer
from taskx.tasks.model import Task
from taskx.tasks.record import COLUMNS, DEFAULTS, UNIQUE
from taskx.tasks.writes import PRESENT, Delete, Insert, Update, Write

#: The most writes in one statement.
MOST_TOGETHER = 500

_KINDS = {field.name: str(field.type).split(" | ")[0] for field in attrs.fields(Task)}
_NAMES = {"int": "bigint", "bool": "bigint", "datetime": "bigint", "float": "float8"}
#: The type of each column in PostgreSQL.
TYPES = {name: _NAMES.get(_KINDS.get(name, ""), "text") for name in COLUMNS} | {"held": "bigint"}


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
        return (Insert,)  # all in one, so that they keep their order
    # The values of these conditions are in the text of a statement.
    special = tuple(
        (name, value if value is PRESENT or isinstance(value, tuple) else None)
        for name, value in write.guard.items()
    )
    if isinstance(write, Delete):
        return (Delete, *special, write.skips)
    return (Update, *write.changes, None, *special, write.skips)


def _touches_unique(write: Write) -> bool:
    if isinstance(write, Insert):
        return any(write.row.get(name) is not None for name in UNIQUE)
    return isinstance(write, Delete) or any(name in write.changes for name in UNIQUE)


class GroupWriter(Writer):
    """Applies guarded writes on PostgreSQL: those of the same form are one statement with arrays."""

    def together(self, writes: Sequence[Write], whole: bool, link: Link) -> list[bool]:
        results = [False] * len(writes)
        for group in grouped(writes):
            if len(group.writes) == 1:
                (write,) = group.writes
                held = {write.id} if self.one(link, write) else set()
            else:
                held = self._apply_group(link, group.writes)
            for write, place in zip(group.writes, group.places, strict=True):
                results[place] = write.id in held
        if whole and False in results:
            raise Refused(results)
        return results

    def _apply_group(self, link: Link, writes: Sequence[Any]) -> set[str]:
        """Apply writes of the same form in one statement. Return the ids of those whose guards held."""
        first = writes[0]
        if isinstance(first, Insert):
            return self._insert_group(link, writes)
        source = _Source()
        where = self._guards(source, writes)
        if isinstance(first, Delete):
            return self._delete_group(link, writes, source, where)
        return self._update_group(link, writes, source, where)

    def _guards(self, source: _Source, writes: Sequence[Any]) -> str:
        """Add the ids and the guards of writes to a source; return the condition that compares them."""
        source.array("id", [write.id for write in writes])
        where = "t.id = v.id"
        for name, wanted in writes[0].guard.items():
            if wanted is PRESENT or isinstance(wanted, tuple):
                text, values = self.statements.conditions({f"t.{name}": wanted})
                where += text
                source.where_values += values
                continue
            wants = [write.guard[name] for write in writes]
            same = "IS NOT DISTINCT FROM" if None in wants else "="
            # A column, also if all values are the same: with a constant, the planner might read a whole
            # partial index instead of these rows, as long as the table has no statistics.
            where += f" AND t.{name} {same} {source.array(f'g_{name}', wants, name)}"
        return where

    def _delete_group(
        self, link: Link, writes: Sequence[Delete], source: _Source, where: str
    ) -> set[str]:
        free, ids, where = self._unlocked(writes, where, "UPDATE")
        sql = (
            f"{free}DELETE FROM {self.dialect.tasks} t USING {source.text} WHERE {where} "
            "RETURNING t.seq, t.id, t.depends_on, t.tags"
        )
        gone = link.rows(sql, [*ids, *source.values])
        self.remove_lists(link, gone)
        return {task_id for _, task_id, _, _ in gone}

    def _update_group(
        self, link: Link, writes: Sequence[Update], source: _Source, where: str
    ) -> set[str]:
        settings = ", ".join(
            f"{name} = {source.value(name, [write.changes[name] for write in writes])}"
            for name in writes[0].changes
        )
        free, ids, where = self._unlocked(writes, where, "NO KEY UPDATE")
        sql = (
            f"{free}UPDATE {self.dialect.tasks} t SET {settings} FROM {source.text} WHERE {where} "
            "RETURNING t.id"
        )
        held = {task_id for (task_id,) in link.rows(sql, [*ids, *source.values])}
        for write in writes:
            if write.id in held:
                self.relist(link, write)
        return held

    def _unlocked(
        self, writes: Sequence[Update] | Sequence[Delete], where: str, lock: str
    ) -> tuple[str, list[Any], str]:
        """Return a beginning, its values, and the condition of a statement that passes over locked rows.

        They change nothing if the writes wait for locks.
        """
        if not writes[0].skips:
            return "", [], where
        # A table of its own: the planner might repeat a query inside the condition for each row.
        free = (
            f"WITH free AS MATERIALIZED (SELECT seq FROM {self.dialect.tasks} "
            f"WHERE id = ANY(?::text[]) FOR {lock} SKIP LOCKED) "
        )
        return (
            free,
            [[write.id for write in writes]],
            f"{where} AND t.seq IN (SELECT seq FROM free)",
        )

    def _insert_group(self, link: Link, writes: Sequence[Insert]) -> set[str]:
        given = tuple(dict.fromkeys(name for write in writes for name in write.row))
        arrays = [
            _array(name, [write.row.get(name, DEFAULTS.get(name)) for write in writes])
            for name in given
        ]
        stored = link.rows(_insert_group_sql(self.dialect.tasks, given), arrays)
        held = {task_id for (task_id,) in stored}
        self.add_lists(link, [write.row for write in writes if write.id in held])
        return held


@lru_cache(maxsize=64)
def _insert_group_sql(tasks: str, given: tuple[str, ...]) -> str:
    arrays = ", ".join(f"?::{TYPES[name]}[]" for name in given)
    rest = [name for name in COLUMNS if name not in given]
    values = [*(f"v.{name}" for name in given), *(literal(DEFAULTS[name]) for name in rest)]
    return (
        f"INSERT INTO {tasks} ({', '.join((*given, *rest))}) SELECT {', '.join(values)} "
        f"FROM unnest({arrays}) WITH ORDINALITY AS v({', '.join(given)}, place) ORDER BY v.place "
        "ON CONFLICT DO NOTHING RETURNING id"
    )


def _array(name: str, values: Sequence[Any]) -> list[Any]:
    if TYPES[name] != "float8":
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
        self._arrays.append(f"?::{TYPES[column]}[]")
        self._array_values.append(_array(column, values))
        return f"v.{name}"

    def value(self, name: str, values: Sequence[Any]) -> str:
        """Return the expression for the new values of a column."""
        if any(value != values[0] for value in values):
            return self.array(f"c_{name}", values, name)
        self._set_values.append(values[0])
        return f"?::{TYPES[name]}"

    @property
    def text(self) -> str:
        return f"unnest({', '.join(self._arrays)}) AS v({', '.join(self._columns)})"

    @property
    def values(self) -> list[Any]:
        """The values of the whole statement, in the order of their places."""
        return [*self._set_values, *self._array_values, *self.where_values]
