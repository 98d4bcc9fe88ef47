"""The rows of the tables, over one connection or many: guarded writes, and reads."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from django.db.utils import IntegrityError

from taskx.contrib.django import groups, statements, writing
from taskx.contrib.django.connections import Link, Rows
from taskx.core.model import CONDITIONS, TASK_FIELDS, Task, TaskFilter
from taskx.core.record import STUB, Ended, Stub, parents_from_text, stub_from_values, task_from_row
from taskx.core.tags import FLOW
from taskx.core.writes import Note, NoteChange, Write
from taskx.liveness.base import PREFIX as NODES
from taskx.storage.base import Fields, Listed, Lookup, Repository, Timed, check_place

T = TypeVar("T")
#: Writes by identity, each as it was given and as it is stored.
Pairs = dict[int, tuple[Write, Write]]

_MOST_VALUES = 500
_MOST_TYPES = 50  # in one query
_CREATED_AT = TASK_FIELDS.index("created_at")
_ANY_NUMBER = 2**63 - 1


class Records(Repository):
    """A repository on the tables, but for its connections and transactions, which subclasses choose.

    Attributes:
        vendor: the kind of database, as Django names it.
    """

    conditions = CONDITIONS - {"params"}
    vendor: str

    @abstractmethod
    def _rows(self, sql: str, values: Sequence[Any] = ()) -> Rows:
        """Return the rows of a query."""

    @abstractmethod
    def tell_others(self, writes: Sequence[Write]) -> None:
        """Tell other processes of writes, now or after the commit."""

    @abstractmethod
    def _transact(
        self,
        work: Callable[[Link], T],
        durable: bool,
        sent: Pairs | None = None,
        *,
        single: bool = False,
    ) -> T:
        """Do work in one transaction, and return its result; undo it if it raises.

        ``sent`` are the writes that the work applies. ``single`` is True if the work is one statement.
        Raises ``IntegrityError`` if a unique value is taken, and else the errors of TaskX.
        """

    def _is_durable(self, write: Write) -> bool:
        """Return True if a write must survive a power cut, or the death of the server."""
        return write.durable

    def _took_place(self, writes: Sequence[Write]) -> set[int]:
        """Return the places of the writes that were sent before, and took place."""
        return set()

    # --- writing

    def apply(self, writes: Sequence[Write], *, all_or_nothing: bool = False) -> Sequence[bool]:
        """Apply guarded writes in one transaction."""
        coded = self.codecs.coded(writes)
        durable = any(map(self._is_durable, writes))
        known = self._took_place(writes)
        new = [number for number in range(len(writes)) if number not in known]
        if not new:
            return [True] * len(writes)
        sent = [coded[number] for number in new]
        pairs = {id(writes[n]): (writes[n], coded[n]) for n in new}
        if all_or_nothing:
            told = self._apply_whole(sent, durable, pairs)
        else:
            told = self._apply_singly(sent, durable, pairs)
        results = [True] * len(writes)
        for number, held in zip(new, told, strict=True):
            results[number] = held
        self.tell_others([write for write, held in zip(writes, results, strict=True) if held])
        return results

    def _apply_singly(self, writes: Sequence[Write], durable: bool, sent: Pairs) -> Sequence[bool]:
        together = self.vendor == "postgresql"
        single = together and len(writes) == 1 and writing.is_single(writes[0])
        apply = groups.apply_groups if together else writing.apply_each
        try:
            return self._transact(lambda link: apply(link, writes), durable, sent, single=single)
        except IntegrityError:
            return self._transact(lambda link: writing.apply_each(link, writes), durable, sent)

    def _apply_whole(self, writes: Sequence[Write], durable: bool, sent: Pairs) -> Sequence[bool]:
        apply = groups.apply_groups if self.vendor == "postgresql" else writing.apply_each

        def work(link: Link) -> Sequence[bool]:
            results = apply(link, writes)
            if not all(results):
                raise _Refused(results)
            return results

        try:
            return self._transact(work, durable, sent)
        except _Refused as refused:
            return refused.results

    def put_notes(self, changes: Sequence[NoteChange]) -> Sequence[bool]:
        # After a power cut all nodes are dead, so their notes need no sync.
        durable = not all(change.name.startswith(NODES) for change in changes)
        return self._transact(
            lambda link: [writing.put_note(link, change) for change in changes],
            durable,
            single=self.vendor == "postgresql" and len(changes) == 1,
        )

    # --- reading

    def find(
        self, column: Lookup, values: Sequence[str], fields: Fields, limit: int | None = None
    ) -> Rows:
        found: Rows = []
        for start in range(0, len(values), _MOST_VALUES):
            some = values[start : start + _MOST_VALUES]
            sql = statements.find(column, len(some), fields, limit is not None)
            found += self._rows(sql, some if limit is None else [*some, limit - len(found)])
        return found

    def distinct(self, column: Listed, after: str, limit: int) -> Sequence[str]:
        if self.vendor != "mysql":
            return [value for (value,) in self._rows(statements.DISTINCT[column], (after, limit))]
        step = statements.STEPS[column]
        if column != "ready_type":
            return self._walk(step, (), after, limit)
        owners = ["", *self._walk(statements.STEPS["buffered_on"], (), "", _ANY_NUMBER)]
        kinds = {kind for owner in owners for kind in self._walk(step, (owner,), after, limit)}
        return sorted(kinds)[:limit]

    def _walk(self, step: str, values: Sequence[Any], start: Any, limit: int) -> list[Any]:
        """Return the values to which a query leads, step by step.

        MySQL's recursion would read all rows for each step, and ends after a thousand.
        """
        found: list[Any] = []
        while len(found) < limit:
            ((value,),) = self._rows(f"{step}%s", (*values, start))
            if value is None:
                break
            found.append(value)
            start = value
        return found

    def list(self, filter: TaskFilter) -> Sequence[Task]:
        return self.list_after(filter)[0]

    def list_after(self, filter: TaskFilter, after: Any = None) -> tuple[Sequence[Task], Any]:
        self.refuse_unknown_conditions(filter)
        place = () if after is None else check_place(after, int, int)
        query = statements.list_tasks(filter, self.vendor, place, self._rarest(filter))
        rows = self._rows(*query)
        tasks = [task_from_row(row, self.codecs) for *row, _ in rows]
        return tasks, (rows[-1][_CREATED_AT], rows[-1][-1]) if rows else after

    def count(self, filter: TaskFilter) -> int:
        return self._count(filter, None)

    def count_to(self, filter: TaskFilter, most: int) -> int:
        return self._count(filter, most)

    def _count(self, filter: TaskFilter, most: int | None) -> int:
        self.refuse_unknown_conditions(filter)
        query = statements.count_tasks(filter, self.vendor, most, self._rarest(filter))
        ((count,),) = self._rows(*query)
        return int(count)

    def count_by_status(self, filter: TaskFilter, most: int) -> dict[str, int]:
        self.refuse_unknown_conditions(filter)
        query = statements.count_by_status(filter, self.vendor, most, self._rarest(filter))
        return {status: int(count) for status, count in self._rows(*query)}

    def _rarest(self, filter: TaskFilter) -> str:
        """Return the label of the filter that the fewest tasks have; empty if another index is better."""
        labels = filter.labels
        if not labels or filter.id_prefix or filter.parent is not None:
            return ""
        if len(labels) == 1:
            return labels[0]
        [counts] = self._rows(*statements.fewest(labels))
        return labels[counts.index(min(counts))]

    def flows(self, before: str, limit: int) -> Sequence[str]:
        start = FLOW + (before or statements.LAST)
        if self.vendor == "mysql":
            found = self._walk(statements.LAST_FLOW, (), start, limit)
        else:
            found = [label for (label,) in self._rows(statements.FLOWS, (start, limit))]
        return [label[len(FLOW) :] for label in found]

    def ready(
        self, types: Iterable[str], limit: int, owner: str = "", ageing: int = 0
    ) -> Sequence[Stub]:
        kinds = list(types)
        if ageing:
            rows = self._ready_by_age(kinds, limit, owner)
            rows.sort(key=lambda row: (_stub(row).rank(ageing), row[-1]))
        else:
            rows = []
            for start in range(0, len(kinds), _MOST_TYPES):
                some = kinds[start : start + _MOST_TYPES]
                values = [value for kind in some for value in (owner, kind, limit)]
                rows += self._rows(statements.ready(len(some)), values)
            if len(kinds) > 1:
                rows.sort(key=lambda row: (-_stub(row).priority, row[-1]))
        return [_stub(row) for row in rows[:limit]]

    def _ready_by_age(self, kinds: Sequence[str], limit: int, owner: str) -> Rows:
        rows: Rows = []
        for kind in kinds:
            for priority in self._priorities(owner, kind):
                rows += self._rows(statements.READY_AT, (owner, kind, priority, limit))
        return rows

    def _priorities(self, owner: str, kind: str) -> Sequence[int]:
        if self.vendor == "mysql":
            step = statements.LOWER_PRIORITY
            return self._walk(step, (owner, kind), _ANY_NUMBER, _ANY_NUMBER)
        return [value for (value,) in self._rows(statements.PRIORITIES, (owner, kind) * 2)]

    def count_ready(self, type: str, owner: str, at_most: int) -> int:
        ((count,),) = self._rows(statements.COUNT_READY, (owner, type, at_most))
        return int(count)

    def due(
        self, before: int | None, limit: int, column: Timed = "run_at"
    ) -> Sequence[tuple[str, int]]:
        latest = _ANY_NUMBER if before is None else before
        return [(i, at) for i, at in self._rows(statements.DUE[column], (latest, limit))]

    def ended(self, status: str, before: int, limit: int, after: Any = None) -> Sequence[Ended]:
        place = after or (before, 0)
        rows = self._rows(statements.ENDED.format(status), (*place[:1], *place, before, limit))
        return [
            Ended(_stub(row), parents_from_text(parents), lock, scope, (created_at, seq))
            for *row, parents, lock, scope, created_at, seq in rows
        ]

    def newest(self, status: str, limit: int, fields: Fields) -> Rows:
        return self._rows(statements.NEWEST.format(", ".join(fields), status), (limit,))

    def notes(self, prefix: str) -> dict[str, Note]:
        return _notes(self._rows(statements.NOTES, (prefix, prefix + statements.LAST)))

    def notes_named(self, names: Sequence[str]) -> dict[str, Note]:
        found: dict[str, Note] = {}
        for start in range(0, len(names), _MOST_VALUES):
            some = names[start : start + _MOST_VALUES]
            found.update(_notes(self._rows(statements.notes_named(len(some)), some)))
        return found

    def notes_after(self, prefix: str, after: str, limit: int) -> dict[str, Note]:
        values = (after, prefix + statements.LAST, limit)
        return _notes(self._rows(statements.NOTES_AFTER, values))


class _Refused(Exception):
    def __init__(self, results: Sequence[bool]) -> None:
        super().__init__(results)
        self.results = results


def _notes(rows: Iterable[Sequence[Any]]) -> dict[str, Note]:
    return {name: Note(text, int(version)) for name, text, version in rows}


def _stub(row: Sequence[Any]) -> Stub:
    return stub_from_values(row[: len(STUB)])
