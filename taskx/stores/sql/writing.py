"""Guarded writes inside a transaction.

Each write is one statement, whose guard is in its condition: the database changes a row only if it is as
the guard wants it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

from taskx.stores.base import new_version
from taskx.stores.sql.link import Apart, Link, Taken
from taskx.stores.sql.statements import Statements, has_special
from taskx.tasks.record import UNIQUE
from taskx.tasks.writes import CREATED, Delete, Insert, NoteChange, Update, Write

# Lists, whose items are in tables of their own.
_LISTS = frozenset(("tags", "depends_on"))
# Changes of these columns may need more than a statement.
_OTHER_STEPS = _LISTS.union(UNIQUE)


class Refused(Exception):
    """Some guards did not hold, and all writes belong together. ``results`` tells which held."""

    def __init__(self, results: Sequence[bool]) -> None:
        super().__init__(results)
        self.results = results


class Writer:
    """Applies guarded writes in one dialect."""

    def __init__(self, statements: Statements) -> None:
        self.statements = statements
        self.dialect = statements.dialect
        self._sql_of = statements.update
        d = self.dialect
        # An update is always one statement: triggers do the rest, and a conflict undoes nothing else.
        self._plain = d.has_triggers and not (d.needs_savepoints or d.locks_first or d.has_arrays)

    @property
    def for_callers(self) -> type[Writer]:
        """The class that writes in transactions of callers."""
        return type(self)

    # --- several writes

    def each(self, writes: Sequence[Write], whole: bool, link: Link) -> list[bool]:
        """Apply writes one by one. Return for each True if its guard held.

        Raises:
            Refused: ``whole`` is True, and a guard did not hold.
        """
        if whole:
            writes = self._in_order(writes)
        results = [self.one(link, write) for write in writes]
        if whole and False in results:
            raise Refused(results)
        return results

    def together(self, writes: Sequence[Write], whole: bool, link: Link) -> list[bool]:
        """Do what :meth:`each` does. Neighbours that are alike are one call of the database.

        Raises:
            Apart: call :meth:`each` in another transaction.
        """
        most = self.dialect.most_together
        if most == 1:
            return self.each(writes, whole, link)
        if whole:
            writes = self._in_order(writes)
        results: list[bool] = []
        while (first := len(results)) < len(writes):
            alike = self._alike(writes, first, most)
            if len(alike) == 1:
                results.append(self.one(link, alike[0]))
                continue
            held = self._all(link, alike)
            if 0 < held < len(alike):
                raise Apart
            results += [held > 0] * len(alike)
        if whole and False in results:
            raise Refused(results)
        return results

    @staticmethod
    def _in_order(writes: Sequence[Write]) -> Sequence[Write]:
        """Return writes that belong together as they must be stored, in the same order."""
        return writes

    def _all(self, link: Link, alike: Sequence[Any]) -> int:
        """Apply writes that are alike in one call. Return how many held."""
        first, second, *_ = alike
        if isinstance(first, Insert):
            rows = [tuple(write.row.values()) for write in alike]
            return self._for_each(link, self.statements.insert(CREATED), rows)
        if first[1:-1] == second[1:-1]:
            ids = [write.id for write in alike]
            return link.execute(*self.statements.update(ids, first.guard, first.changes)).rowcount
        # In SQLite, made and chosen ids are found in two places.
        lots: dict[str, list[tuple[Any, ...]]] = {}
        named = self.dialect.named
        for id, guard, changes, *_ in alike:
            which, keys = named((id,))
            row = *changes.values(), *keys, *guard.values()
            lots.setdefault(which, []).append(row)
        held = 0
        for which, rows in lots.items():
            sql, _ = self.statements.update((), first.guard, first.changes, place=(which, ()))
            held += self._for_each(link, sql, rows)
        return held

    def _for_each(self, link: Link, sql: str, rows: list[tuple[Any, ...]]) -> int:
        """Execute a statement for each of some rows of values. Return how many rows it has changed."""
        return link.executemany(sql, rows).rowcount

    @staticmethod
    def _ordinary(write: Write) -> bool:
        """Return True if a write is an insert with the columns only that every creation sets, in order."""
        return isinstance(write, Insert) and len(write.row) == len(CREATED)

    def _alike(self, writes: Sequence[Write], first: int, most: int) -> Sequence[Write]:
        """Return a write and the next ones, at most ``most`` in all, that one call applies.

        These are ordinary inserts, equal changes (starts), or changes of the same columns (outcomes).
        """
        head, end, last = writes[first], first + 1, min(first + most, len(writes))
        if isinstance(head, Insert):
            if self._ordinary(head):
                while end < last and self._ordinary(writes[end]):
                    end += 1
        elif isinstance(head, Update) and _LISTS.isdisjoint(head.changes) and end < last:
            same, known = head[1:-1], head.seq > 0
            if writes[end][1:-1] == same:
                for write in writes[end:last]:
                    if write[1:-1] != same or (write[-1] > 0) != known:
                        break
                    end += 1
            elif not has_special(head.guard):
                names, shape = [*head.changes], _shape(head.guard)
                for write in writes[end:last]:
                    if not isinstance(write, Update) or (write.seq > 0) != known:
                        break
                    guard = write.guard  # that of most outcomes is the same object
                    if guard is not head.guard and _shape(guard) != shape:
                        break
                    if [*write.changes] != names:
                        break
                    end += 1
        return writes[first:end]

    # --- one write

    def one(self, link: Link, write: Write) -> bool:
        """Apply one write. Return True if its guard held."""
        if isinstance(write, Update):
            if not (self._plain or (_OTHER_STEPS.isdisjoint(write.changes) and not write.skips)):
                return self._update(link, write)
            return link.execute(*self._sql_of((write.id,), write.guard, write.changes)).rowcount > 0
        if isinstance(write, Delete):
            return self._delete(link, write)
        row = write.row
        try:
            held = link.execute(self.statements.insert(tuple(row)), (*row.values(),)).rowcount > 0
        except Taken:
            return False
        if held and ("depends_on" in row or "tags" in row):
            self.add_lists(link, [row])
        return held

    def single(self, write: Write) -> Callable[[Link], list[bool]] | None:
        """Return what applies a write in one statement, without a transaction; None if it needs more.

        It does what :meth:`each` does for the only write, or raises ``Apart``: call that in a transaction.
        """
        if not self.dialect.has_arrays or isinstance(write, Delete):
            return None
        if isinstance(write, Insert):
            if write.row.get("depends_on") or write.row.get("tags"):
                return None
        elif _takes(write.changes) or not _LISTS.isdisjoint(write.changes):
            return None
        return lambda link: [self.one(link, write)]

    def _update(self, link: Link, write: Update) -> bool:
        d, changes = self.dialect, write.changes
        if write.skips and d.locks_first and not self._lock(link, write):
            return False
        passes = write.skips and d.has_arrays
        query = self.statements.update((write.id,), write.guard, changes, passes=passes)
        execute = self._unless_taken if _takes(changes) else _execute
        held = execute(link, *query)
        if held and not d.has_triggers:
            self.relist(link, write)
        return held

    def _unless_taken(self, link: Link, sql: str, values: Sequence[Any]) -> bool:
        try:
            with _savepoint(link) if self.dialect.needs_savepoints else nullcontext():
                return link.execute(sql, values).rowcount > 0
        except Taken:
            return False

    def _lock(self, link: Link, write: Update | Delete) -> Sequence[Any]:
        """Lock the row of a write whose guard holds. Return nothing if it is locked and skipped."""
        sql, values = self.statements.lock(write.id, write.guard)
        return link.rows(link.passing(sql) if write.skips and self.dialect.locks else sql, values)

    def _delete(self, link: Link, write: Delete) -> bool:
        if self.dialect.has_triggers:
            return link.execute(*self.statements.delete(write.id, write.guard)).rowcount > 0
        gone = self._lock(link, write)
        for seq, *_ in gone:
            link.execute(self.statements.gone_task, (seq,))
        self.remove_lists(link, gone)
        return bool(gone)

    # --- the tables of parents and tags

    def add_lists(self, link: Link, rows: Iterable[Mapping[str, Any]]) -> None:
        """Store the pairs of parents and the tags of tasks."""
        pairs, tags = [], []
        for row in rows:
            pairs += [(parent, row["id"]) for parent in items(row.get("depends_on"))]
            tags += [(tag, row["id"]) for tag in items(row.get("tags"))]
        if pairs:
            link.executemany(self.statements.new_parent, pairs)
        if tags:
            link.executemany(*self.statements.tags(tags))

    def relist(self, link: Link, write: Update) -> None:
        """Replace the tags and parents of a task by those of a write, which has changed its row."""
        if "tags" in write.changes:
            link.execute(*self.statements.untag(write.id))
        if "depends_on" in write.changes:
            link.execute(self.statements.gone_parents, (write.id,))
        lists = {name: write.changes[name] for name in _LISTS if name in write.changes}
        if lists:
            self.add_lists(link, [{"id": write.id, **lists}])

    def remove_lists(self, link: Link, gone: Iterable[tuple[Any, ...]]) -> None:
        """Remove the pairs and the tags of removed tasks: rows of number, id, parents and tags."""
        gone = list(gone)
        parted = [(task_id,) for _, task_id, parents, _ in gone if parents is not None]
        untagged = [(seq,) for seq, _, _, tags in gone if tags is not None]
        if parted:
            link.executemany(self.statements.gone_parents, parted)
        if untagged:
            link.executemany(self.statements.gone_tags, untagged)

    # --- notes

    def put_note(self, link: Link, change: NoteChange) -> bool:
        """Store or remove a note. Return True if the stored one had the version."""
        name, text, version = change
        sql = self.statements
        if text is None and not version:
            return not link.rows(sql.has_note, (name,))
        if text is None:
            return link.execute(sql.gone_note, (name, version)).rowcount == 1
        if version:
            return link.execute(sql.changed_note, (text, name, version)).rowcount == 1
        try:
            return link.execute(sql.new_note, (name, text, new_version())).rowcount == 1
        except Taken:
            return False


def _execute(link: Link, sql: str, values: Sequence[Any]) -> bool:
    return link.execute(sql, values).rowcount > 0


def _shape(guard: Mapping[str, Any]) -> list[Any]:
    """Return the names and types in a guard: guards with the same ones are special, or none of them is."""
    return [*guard, *map(type, guard.values())]


def _takes(changes: Mapping[str, Any]) -> bool:
    """Return True if changes set a unique value."""
    return any(changes.get(name) is not None for name in UNIQUE)


@contextmanager
def _savepoint(link: Link) -> Iterator[None]:
    """Undo what is done inside, and nothing else, if it raises."""
    link.execute("SAVEPOINT taskx")
    try:
        yield
    except BaseException:
        with suppress(Exception):  # the transaction is gone
            link.execute("ROLLBACK TO SAVEPOINT taskx")
            link.execute("RELEASE SAVEPOINT taskx")
        raise
    link.execute("RELEASE SAVEPOINT taskx")


def items(text: Any) -> list[str]:
    """Return the different items of a list in a column; none of one that is empty or damaged."""
    try:
        found = json.loads(text) if text else []
    except (ValueError, TypeError):
        return []
    items = found if isinstance(found, list) else []
    return list(dict.fromkeys(item for item in items if isinstance(item, str)))
