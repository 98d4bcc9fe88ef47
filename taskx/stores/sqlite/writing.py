"""Guarded writes on rows that are found by their keys: see ``dialect``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from itertools import chain, count
from typing import Any

from taskx.stores.sql.dialects import among
from taskx.stores.sql.link import Apart, Link
from taskx.stores.sql.statements import Query, Statements
from taskx.stores.sql.writing import Writer, items
from taskx.tasks.ids import key_of, new_key
from taskx.tasks.writes import CREATED, Delete, Insert, Update, Write

_ORDINARY = ("seq", *CREATED)
_NUMBERED = "seq = ?"


class KeyedWriter(Writer):
    """Applies guarded writes to rows whose number is the key in the id."""

    def __init__(self, statements: Statements) -> None:
        super().__init__(statements)
        d = self.dialect
        self._has_key = f"SELECT 1 FROM {d.tasks} WHERE seq = ?"
        self._new_parent = f"INSERT INTO {d.parents} (parent, child) VALUES (?, ?){d.unless_taken}"
        self._new_tag = f"INSERT INTO {d.tags} (tag, task) VALUES (?, ?){d.unless_taken}"

    @staticmethod
    def _in_order(writes: Sequence[Write]) -> Sequence[Write]:
        """Return writes that belong together so that the keys of new tasks rise.

        The key for a chosen id is drawn when it is stored. The keys of the tasks after it must be drawn
        then, too: those in their ids were drawn before.
        """
        chosen = False
        found: list[Write] = []
        for write in writes:
            if isinstance(write, Insert):
                chosen = chosen or not write.key
                if chosen:
                    write = write._replace(key=0)
            found.append(write)
        return found

    @staticmethod
    def _ordinary(write: Write) -> bool:
        return (
            isinstance(write, Insert)
            and len(write.row) - ("seq" in write.row) == len(CREATED)
            and (write.key > 0 or key_of(write.row["id"]) is None)
        )

    def _all(self, link: Link, alike: Sequence[Any]) -> int:
        first = alike[0]
        if isinstance(first, Insert):
            keys = [write.key or _drawn(write.row) for write in alike]
            for write in alike:  # it was noted if they were sent before
                write.row.pop("seq", None)
            rows = [(key, *write.row.values()) for key, write in zip(keys, alike, strict=True)]
            held = self._for_each(link, self.statements.insert(_ORDINARY), rows)
            for key, write in zip(keys, alike, strict=True):
                write.row["seq"] = key
        elif first.seq:
            return self._change(link, alike)
        else:
            held = super()._all(link, alike)
        if held == 0:
            raise Apart  # a key may be taken, or their rows may have other keys
        return held

    def _change(self, link: Link, alike: Sequence[Update]) -> int:
        """Apply updates that are alike and name their rows by number."""
        first, second, *_ = alike
        if first[1:-1] == second[1:-1]:
            which = among("seq", len(alike)), [write.seq for write in alike]
            query = self._sql_of((), first.guard, first.changes, place=which)
            return link.execute(*query).rowcount
        rows = [(*changes.values(), seq, *guard.values()) for _, guard, changes, *_, seq in alike]
        sql, _ = self._sql_of((), first.guard, first.changes, place=(_NUMBERED, ()))
        return self._for_each(link, sql, rows)

    def single(self, write: Write) -> Callable[[Link], list[bool]] | None:
        if not isinstance(write, Insert):
            if "depends_on" in write.changes:
                return None
            return partial(self._change_alone, write)  # triggers do the rest
        row = write.row
        row.pop("seq", None)
        key = write.key or _drawn(row)
        if not key or "depends_on" in row or "tags" in row:
            return None
        query = self.statements.insert(("seq", *row)), (key, *row.values())
        return partial(_put_alone, query, key, row)

    def _change_alone(self, write: Update | Delete, link: Link) -> list[bool]:
        if link.execute(*self._query(write)).rowcount > 0:
            return [True]
        if isinstance(write, Update) and write.seq:
            return [False]
        raise Apart  # there may be another row to look at

    def _query(self, write: Update | Delete, place: Query | None = None) -> Query:
        if isinstance(write, Update):
            if write.seq:
                place = _NUMBERED, (write.seq,)
            return self._sql_of((write.id,), write.guard, write.changes, place=place)
        return self.statements.delete(write.id, write.guard, place)

    def one(self, link: Link, write: Write) -> bool:
        if isinstance(write, Insert):
            return self._insert(link, write)
        held = link.execute(*self._query(write)).rowcount > 0
        # Else the guard does not hold, or the row has another key.
        known = isinstance(write, Update) and write.seq > 0
        if not (held or known) and (place := self.dialect.elsewhere((write.id,))) is not None:
            held = link.execute(*self._query(write, place)).rowcount > 0
        if held and "depends_on" in write.changes:
            self._add_parents(link, write)
        return held

    def _add_parents(self, link: Link, write: Update | Delete) -> None:
        """Store the pairs of a task whose parents have become more."""
        d, ids = self.dialect, (write.id,)
        for place, keys in filter(None, (d.named(ids), d.elsewhere(ids))):
            pair = f"SELECT ?, seq FROM {d.tasks} WHERE {place}"
            sql = f"INSERT INTO {d.parents} (parent, child) {pair}{d.unless_taken}"
            link.executemany(sql, [(p, *keys) for p in items(write.changes["depends_on"])])

    # --- new rows

    def _insert(self, link: Link, write: Insert) -> bool:
        row = write.row
        row.pop("seq", None)
        key: int | None = write.key
        if not key or not self._put(link, key, row):
            key = self._put_elsewhere(link, row)
        if key is None:
            return False
        if "depends_on" in row:
            pairs = [(parent, key) for parent in items(row["depends_on"])]
            link.executemany(self._new_parent, pairs)
        if "tags" in row:
            link.executemany(self._new_tag, [(tag, key) for tag in items(row["tags"])])
        row["seq"] = key
        return True

    def _put(self, link: Link, key: int, row: Mapping[str, Any]) -> bool:
        sql = self.statements.insert(("seq", *row))
        return link.execute(sql, (key, *row.values())).rowcount > 0

    def _put_elsewhere(self, link: Link, row: Mapping[str, Any]) -> int | None:
        """Store a row whose key is not in its id. Return the key; None if a unique value is taken."""
        # The index of ids has those of rows with odd keys only.
        if key_of(row["id"]) is not None:
            query = self.statements.find("id", (row["id"],), ("id",), False)
            if link.rows(*query):
                return None
        for later in count():  # also if the keys of a millisecond are all taken
            key = new_key(row["created_at"] + later)
            if self._put(link, key, row):
                return key
            if not link.rows(self._has_key, (key,)):
                break
        return None


class OwnWriter(KeyedWriter):
    """Does so with as few statements as can be: the driver offers its lock to other threads at each.

    SQLite keeps the values of a statement for several rows in a temporary file, or in memory if the
    connection says so. One of a caller does not, and a temporary file may be impossible to make.
    """

    @property
    def for_callers(self) -> type[Writer]:
        return KeyedWriter

    def _for_each(self, link: Link, sql: str, rows: list[tuple[Any, ...]]) -> int:
        held = 0
        while rows:
            size = 1 << len(rows).bit_length() - 1  # so that few texts are compiled
            values = [*chain.from_iterable(rows[:size])]
            held += link.execute(of_several(sql, size), values).rowcount
            rows = rows[size:]
        return held


def _put_alone(query: Query, key: int, row: dict[str, Any], link: Link) -> list[bool]:
    if link.execute(*query).rowcount > 0:
        row["seq"] = key
        return [True]
    raise Apart  # the key may be taken


def _drawn(row: Mapping[str, Any]) -> int:
    """Return a new key for a row with a chosen id, if the index of such ids tells whether that is taken.

    Return 0 if the id seems to have a key in it: a row with that key may have the id, too.
    """
    return new_key(row["created_at"]) if key_of(row["id"]) is None else 0


@lru_cache(maxsize=256)
def of_several(sql: str, size: int) -> str:
    """Return a statement that does at once what a given one does with each of several rows of values.

    It is an ``INSERT`` of one row, or an ``UPDATE`` of one.
    """
    if size == 1:
        return sql
    given = f"({', '.join('?' * sql.count('?'))})"
    rows = ", ".join([given] * size)
    if sql.startswith("INSERT"):
        return sql.replace(given, rows)
    numbers = count(1)
    change, _, which = re.sub(r"\?", lambda _: f"v.column{next(numbers)}", sql).partition(" WHERE ")
    return f"{change} FROM (VALUES {rows}) AS v WHERE {which}"
