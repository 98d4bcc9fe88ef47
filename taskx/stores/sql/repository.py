"""A repository in SQL: the reads and the guarded writes, over any connections."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import compress
from typing import Any

import attrs

from taskx.stores.base import Fields, Listed, Lookup, Reads, Repository, Rows, Timed, check_place
from taskx.stores.liveness.base import PREFIX as NODES
from taskx.stores.liveness.base import Liveness
from taskx.stores.sql.dialects import LAST
from taskx.stores.sql.groups import GroupWriter
from taskx.stores.sql.link import Apart, Links
from taskx.stores.sql.statements import ANYWHERE, FEW, By, Statements
from taskx.stores.sql.writing import Refused, Writer
from taskx.tasks.clock import SYSTEM_CLOCK, Clock
from taskx.tasks.codec import Codec, Codecs
from taskx.tasks.model import TASK_FIELDS, Task, TaskFilter, TaskStatus
from taskx.tasks.record import STUB, Ended, Stub, parents_from_text, task_from_row
from taskx.tasks.streams import STREAM
from taskx.tasks.tags import FLOW
from taskx.tasks.timing import DEFAULT_TIMING, Timing
from taskx.tasks.writes import Note, NoteChange, Write, maker

_MOST_VALUES = 500  # in one query
_CREATED_AT = TASK_FIELDS.index("created_at")
# SQLite sorts a damaged time, a text, above all numbers: it is never due.
_ANY_NUMBER = 2**63 - 1


class SQLReads(Reads):
    """The reads with statements of their own."""

    def __init__(self, repository: Repository, statements: Statements, links: Links) -> None:
        super().__init__(repository)
        self.statements = statements
        self._rows = links.rows

    def list_after(self, filter: TaskFilter, after: Any = None) -> tuple[Sequence[Task], Any]:
        self._repository.refuse_unknown_conditions(filter)
        sql, by = self.statements, self._rarest(filter)
        waits = filter.status is TaskStatus.PENDING and by is ANYWHERE
        in_order = waits and self._many_wait(filter.type)
        if after is None:
            rows = self._rows(*sql.list_tasks(filter, by=by, in_order=in_order))
        else:
            after = check_place(after, sql.dialect.dates, int)
            rows, rest = [], filter
            for condition, place in sql.dialect.following:
                values = after[place]
                rows += self._rows(*sql.list_tasks(rest, condition, values, by, in_order=in_order))
                if (left := filter.limit - len(rows)) <= 0:
                    break
                rest = attrs.evolve(filter, limit=left)
        tasks = [task_from_row(row, self._repository.codecs) for *row, _ in rows]
        return tasks, (rows[-1][_CREATED_AT], rows[-1][-1]) if rows else after

    def count_to(self, filter: TaskFilter, most: int | None) -> int:
        self._repository.refuse_unknown_conditions(filter)
        query = self.statements.count_tasks(filter, most, self._rarest(filter))
        ((count,),) = self._rows(*query)
        return int(count)

    def count_by_status(self, filter: TaskFilter, most: int) -> dict[str, int]:
        self._repository.refuse_unknown_conditions(filter)
        query = self.statements.count_by_status(filter, most, self._rarest(filter))
        return {status: int(count) for status, count in self._rows(*query)}

    def _many_wait(self, type: str | None) -> bool:
        """Return True if there are so many pending tasks, of a type, that sorting them takes long."""
        if not self.statements.dialect.has_spans:
            return False
        pending = TaskFilter(status=TaskStatus.PENDING, type=type)
        return self.count_to(pending, FEW) == FEW

    def _rarest(self, filter: TaskFilter) -> By:
        """Return the condition of the filter that the fewest tasks meet; ANYWHERE: use another index."""
        if filter.id_prefix or filter.parent is not None:
            return ANYWHERE
        some = self.statements.indexed(filter)
        if not some:
            return self._few_of_type(filter)
        counted = filter.status is not None and self.statements.dialect.has_spans
        if len(some) == 1 and not counted:
            return some[0]
        [counts] = self._rows(*self.statements.fewest(filter, some))
        rarest: int = counts.index(min(counts))
        return (*some, ANYWHERE)[rarest]

    def _few_of_type(self, filter: TaskFilter) -> By:
        """Return the type of a filter if its tasks need not be looked for among many others."""
        sql = self.statements
        if filter.type is None or filter.status is not None or not sql.dialect.has_spans:
            return ANYWHERE
        [counts] = self._rows(*sql.of_type(filter.type))
        return ("type", filter.type) if max(counts) < FEW else ANYWHERE

    def flows(self, before: str, limit: int) -> Sequence[str]:
        found = self.walk(self.statements.last_flow, (), FLOW + (before or LAST), limit)
        return [label[len(FLOW) :] for label in found]

    def walk(self, step: str, values: Sequence[Any], start: Any, limit: int) -> list[Any]:
        """Return the values to which a query leads, step by step in an index."""
        if self.statements.dialect.recursive:
            walk = self.statements.walk(step)
            return [value for (value,) in self._rows(walk, (*values, start, *values, limit))]
        # MySQL's recursion would read all rows for each step, and ends after a thousand.
        found: list[Any] = []
        while len(found) < limit:
            ((value,),) = self._rows(f"{step}?", (*values, start))
            if value is None:
                break
            found.append(value)
            start = value
        return found

    def count_ready(self, type: str, owner: str, at_most: int) -> int:
        ((count,),) = self._rows(self.statements.count_ready, (owner, type, at_most))
        return int(count)

    def newest(self, status: str, limit: int, fields: Fields) -> Rows:
        return self._rows(self.statements.newest(status, fields), (limit,))

    def notes_named(self, names: Sequence[str]) -> dict[str, Note]:
        found: dict[str, Note] = {}
        for start in range(0, len(names), _MOST_VALUES):
            some = names[start : start + _MOST_VALUES]
            found.update(_notes(self._rows(self.statements.notes_named(len(some)), some)))
        return found

    def notes_after(self, prefix: str, after: str, limit: int) -> dict[str, Note]:
        return _notes(self._rows(self.statements.notes_after, (after, prefix + LAST, limit)))


class SQLRepository(Repository):
    """A repository in tables.

    Args:
        statements: the statements in the dialect of the database.
        links: gives the connections.
    """

    def __init__(
        self,
        statements: Statements,
        links: Links,
        clock: Clock = SYSTEM_CLOCK,
        codec: Codec | Iterable[Codec] | Codecs | None = None,
        timing: Timing = DEFAULT_TIMING,
        liveness: Liveness[Any] | None = None,
        writer: type[Writer] = Writer,
    ) -> None:
        super().__init__(clock, codec, timing, liveness)
        self.conditions = statements.dialect.conditions
        self.statements = statements
        self._links = links
        self._rows = links.rows
        self.reads = self._reads = SQLReads(self, statements, links)
        self._walk = self._reads.walk
        self._writer = (GroupWriter if statements.dialect.has_arrays else writer)(statements)

    def over(self, links: Links) -> SQLRepository:
        """Return the repository over other links: as a transaction of a caller sees it."""
        shared = self.clock, self.codecs, self.timing, self.liveness, self._writer.for_callers
        return SQLRepository(self.statements, links, *shared)

    @property
    def entered(self) -> bool:
        return self._links.entered

    def version(self) -> object:
        """Return a new value: nothing waits for others inside a transaction."""
        return object()

    def _durable(self, writes: Sequence[Write]) -> bool:
        """Return True if one of the writes must survive a power cut, or the death of the server."""
        return True in [write.durable for write in writes]

    def _coded(self, writes: Sequence[Write]) -> Sequence[Write]:
        """Return the writes as they are stored."""
        return self.codecs.coded(writes) if self.codecs.given else writes

    # --- writing

    def apply(self, writes: Sequence[Write], *, all_or_nothing: bool = False) -> Sequence[bool]:
        """Apply guarded writes in one transaction. After an error, nothing was applied."""
        coded = self._coded(writes)
        sent, durable, writer = (writes, coded), self._durable(writes), self._writer
        single = writer.single(coded[0]) if len(coded) == 1 else None
        try:
            try:
                work = single or partial(writer.together, coded, all_or_nothing)
                results = self._links.transaction(work, durable, sent, single is not None)
            except Apart:
                work = partial(writer.each, coded, all_or_nothing)
                results = self._links.transaction(work, durable, sent)
        except Refused as refused:
            return refused.results
        self._links.tell_others(writes if False not in results else [*compress(writes, results)])
        return results

    def put_notes(self, changes: Sequence[NoteChange]) -> Sequence[bool]:
        # Notes about nodes need no sync: after a power cut all nodes are dead. Nor do those with what tasks
        # emit: the next durable write syncs them, too. A node whose schema is outdated may still change its
        # own note, to say that it stops and leaves, and store what its tasks emit before they end.
        unsynced = all(change.name.startswith((NODES, STREAM)) for change in changes)
        to_end = unsynced and all(n.version or n.name.startswith(STREAM) for n in changes)
        return self._links.transaction(
            lambda link: [self._writer.put_note(link, change) for change in changes],
            not unsynced,
            ((), ()) if to_end else None,
            single=len(changes) == 1,
        )

    # --- reading

    def find(
        self, column: Lookup, values: Sequence[str], fields: Fields, limit: int | None = None
    ) -> Rows:
        found: list[Any] = []
        for start in range(0, len(values), _MOST_VALUES):
            some = values[start : start + _MOST_VALUES]
            sql, keys = self.statements.find(column, some, fields, limit is not None)
            keys = keys if limit is None else [*keys, limit - len(found)]
            rows = self._links.few_rows(column, sql, keys)
            if column == "id" and len(rows) < len(some):
                rows += self._elsewhere(some, fields)
            found += rows
        return found[:limit]

    def _elsewhere(self, task_ids: Sequence[str], fields: Fields) -> list[Any]:
        query = self.statements.find_elsewhere(task_ids, fields)
        return [] if query is None else self._links.few_rows("id", *query)

    def distinct(self, column: Listed, after: str, limit: int) -> Sequence[str]:
        if column != "ready_type":
            return self._walk(self.statements.steps[column], (), after, limit)
        if self.statements.dialect.recursive:
            return [kind for (kind,) in self._rows(self.statements.ready_types, (after, limit))]
        steps = self.statements.steps
        owners = ["", *self._walk(steps["buffered_on"], (), "", _ANY_NUMBER)]
        kinds = {kind for one in owners for kind in self._walk(steps[column], (one,), after, limit)}
        return sorted(kinds)[:limit]

    def list(self, filter: TaskFilter) -> Sequence[Task]:
        return self.reads.list_after(filter)[0]

    def count(self, filter: TaskFilter) -> int:
        return self._reads.count_to(filter, None)

    def ready(
        self, types: Iterable[str], limit: int, owner: str = "", ageing: int = 0
    ) -> Sequence[Stub]:
        kinds = [*types]
        if ageing:
            return self._ready_by_age(kinds, limit, owner, ageing)
        rows = self._ready_rows(kinds, limit, owner)
        if len(kinds) > 1:
            rows = sorted(rows, key=lambda row: (-row[3], row[-1]))
        return [_plain_stub(row, owner) for row in rows[:limit]]

    def _ready_rows(
        self, kinds: Sequence[str], limit: int, owner: str, since: int | None = None
    ) -> Rows:
        """Return the rows of ready tasks, at most ``limit`` of each type; only those from a number on."""
        rows: list[Any] = []
        place = () if since is None else (since,)
        for start in range(0, len(kinds), most := self.statements.dialect.most_types):
            some = kinds[start : start + most]
            values = [value for kind in some for value in (owner, kind, *place, limit)]
            rows += self._rows(self.statements.ready(len(some), since is not None), values)
        return rows

    def _ready_by_age(
        self, kinds: Sequence[str], limit: int, owner: str, ageing: int
    ) -> Sequence[Stub]:
        sql = self.statements
        levels = [
            (owner, kind, priority, limit)
            for kind in kinds
            for priority in self._walk(
                sql.lower_priority, (owner, kind), sql.dialect.after_all, _ANY_NUMBER
            )
        ]
        rows = [row for level in levels for row in self._rows(sql.ready_at, level)]
        rows.sort(key=lambda row: (_stub(row).rank(ageing), row[-1]))
        return [_plain_stub(row, owner) for row in rows[:limit]]

    def due(
        self, before: int | None, limit: int, column: Timed = "run_at"
    ) -> Sequence[tuple[str, int]]:
        latest = _ANY_NUMBER if before is None else before
        return self._rows(self.statements.due[column], (latest, limit))

    def ended(self, status: str, before: int, limit: int, after: Any = None) -> Sequence[Ended]:
        place = after or self.statements.dialect.place_at(before)
        _, needed = self.statements.dialect.all_following
        values = (place[0], *place)[needed]
        rows = self._rows(self.statements.ended(status), (*values, before, limit))
        return [
            Ended(_stub(row), parents_from_text(parents), lock, scope, (created_at, seq))
            for *row, parents, lock, scope, created_at, seq in rows
        ]

    def notes(self, prefix: str) -> dict[str, Note]:
        return _notes(self._rows(self.statements.notes, (prefix, prefix + LAST)))


def _notes(rows: Iterable[Sequence[Any]]) -> dict[str, Note]:
    return {name: Note(text, int(version)) for name, text, version in rows}


def _stub(row: Sequence[Any]) -> Stub:
    task_id, status, starts, priority, created_at, asked_at, kind, run_at = row[:8]
    return Stub(task_id, status, starts, priority, created_at, asked_at is not None, kind, run_at)


def _plain_stub(columns: Sequence[Any], owner: str) -> Stub:
    if len(columns) == len(STUB) + 1:
        return _stub(columns)
    (
        task_id, status, starts, priority, created_at, asked_at, kind, run_at,
        params, created_by, timeout, max_attempts, max_crashes, seq,
    ) = columns  # fmt: skip
    row = {
        "id": task_id,
        "type": kind,
        "params": params,
        "created_by": created_by,
        "created_at": created_at,
        "priority": priority,
        "run_at": run_at,
        "timeout": timeout,
        "max_attempts": max_attempts,
        "max_crashes": max_crashes,
        "owner": owner,
        "seq": seq,
    }
    stub = task_id, status, starts, priority, created_at, asked_at is not None, kind, run_at
    return _make_stub((*stub, row if params else None))


_make_stub = maker(Stub)
