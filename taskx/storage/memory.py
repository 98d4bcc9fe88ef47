"""Tasks in this process's memory: for tests, and for work that may be lost with the process."""

from __future__ import annotations

import bisect
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from heapq import nsmallest
from itertools import chain, islice
from typing import Any

import attrs

from taskx.core.clock import SYSTEM_CLOCK, Clock, to_ms
from taskx.core.codec import Codec
from taskx.core.lifecycle import FINISHED
from taskx.core.model import TASK_FIELDS, Task, TaskFilter
from taskx.core.record import (
    COLUMNS,
    DEFAULTS,
    FOR_PARENTS,
    FOR_TURN,
    FREE,
    UNIQUE,
    UNTIL_DUE,
    Stub,
    ids_from_text,
    stub_from_row,
    task_from_row,
)
from taskx.core.writes import Delete, Insert, Update, Write, matches, shows
from taskx.storage.base import OLDEST, Node, Note, Repository, new_version

Row = dict[str, Any]


class MemoryRepository(Repository):
    """Keeps tasks in dicts. Everything holds that TaskX promises, but for outliving the process.

    Several queues of one process may share it.

    Args:
        clock: what the eight methods stamp records with.
        codec: what params, results and checkpoints are stored with; of several, the first one writes.
    """

    def __init__(
        self, clock: Clock = SYSTEM_CLOCK, codec: Codec | Iterable[Codec] | None = None
    ) -> None:
        super().__init__(clock, codec)
        self._lock = threading.RLock()
        self._rows: dict[str, Row] = {}
        self._sequence = 0
        # Unfinished rows apart, so that the runtime's questions do not cost more as history grows.
        self._ready: dict[tuple[str, str], list[tuple[int, int, str]]] = {}
        self._held: list[tuple[int, str]] = []
        self._owned: dict[str, dict[str, Row]] = {}
        self._active: dict[str, int] = {}
        self._waiting: dict[str, set[str]] = {}
        self._parents: dict[str, int] = {}
        self._lines: dict[str, list[tuple[int, str]]] = {}
        # Which row has what no two may have; finished ones, too.
        self._unique: dict[tuple[str, str], str] = {}
        self._stuck: dict[str, dict[str, Row]] = {}
        self._notes: dict[str, Note] = {}
        self._nodes: dict[str, Node] = {}

    # --- writing

    def apply(self, writes: Sequence[Write], *, all_or_nothing: bool = False) -> Sequence[bool]:
        """Apply guarded writes at one moment; says for each whether its guard held."""
        writes = self.codecs.coded(writes)
        with self._lock:
            if all_or_nothing:
                return self._apply_whole(writes)
            return [self._apply_one(write) for write in writes]

    def _apply_whole(self, writes: Sequence[Write]) -> Sequence[bool]:
        before = {write.id: dict(self._rows.get(write.id, ())) for write in writes}
        results = [self._apply_one(write) for write in writes]
        if not all(results):
            for task_id, row in before.items():
                self._restore(task_id, row)
        return results

    def _restore(self, task_id: str, row: Row) -> None:
        if task_id in self._rows:
            self._unindex(self._rows.pop(task_id))
        if row:
            self._rows[task_id] = row
            self._index(row)

    def settle(self, writes: Sequence[Write]) -> Sequence[bool]:
        """Say for each write whether it took place."""
        with self._lock:
            return [self._took_place(write) for write in writes]

    def _holds(self, write: Write) -> bool:
        row = self._rows.get(write.id)
        if isinstance(write, Insert):
            return row is None and self._unique_free(write.id, write.row)
        if row is None or not matches(row, write.guard):
            return False
        return isinstance(write, Delete) or self._unique_free(write.id, write.changes)

    def _unique_free(self, task_id: str, columns: Mapping[str, Any]) -> bool:
        return all(
            self._unique.get((name, columns[name]), task_id) == task_id
            for name in UNIQUE
            if columns.get(name) is not None
        )

    def _apply_one(self, write: Write) -> bool:
        if not self._holds(write):
            return False
        if isinstance(write, Insert):
            self._sequence += 1
            given = {**DEFAULTS, **write.row}
            row = {name: given[name] for name in COLUMNS}
            row["sequence"] = self._sequence
            self._rows[write.id] = row
            self._index(row)
        elif isinstance(write, Update):
            row = self._rows[write.id]
            self._unindex(row)
            row.update(write.changes)
            self._index(row)
        else:
            self._unindex(self._rows.pop(write.id))
        return True

    def _took_place(self, write: Write) -> bool:
        row = self._rows.get(write.id)
        if isinstance(write, Delete):
            return row is None
        return row is not None and shows(row, write, self.codecs.same)

    def _index(self, row: Row) -> None:
        for name in UNIQUE:
            if row[name] is not None:
                self._unique[name, row[name]] = row["id"]
        if row["stuck_on"]:
            self._stuck.setdefault(row["stuck_on"], {})[row["id"]] = row
        if row["status"] in FINISHED:
            return
        if row["depends_on"] is not None:
            self._count_parents(row, 1)
        if row["status"] == "running":
            if row["owner"]:
                self._owned.setdefault(row["owner"], {})[row["id"]] = row
                self._count_active(row, 1)
        elif row["held"] == FREE:
            if row["owner"]:
                self._owned.setdefault(row["owner"], {})[row["id"]] = row
            self._count_active(row, 1)
            bisect.insort(self._ready.setdefault((row["owner"], row["type"]), []), _rank(row))
        elif row["held"] == UNTIL_DUE:
            bisect.insort(self._held, (row["run_at"], row["id"]))
        elif row["held"] == FOR_PARENTS:
            self._waiting.setdefault(row["waiting_on"], set()).add(row["id"])
        elif row["held"] == FOR_TURN:
            line = self._lines.setdefault(row["concurrency_key"], [])
            bisect.insort(line, (row["sequence"], row["id"]))

    def _unindex(self, row: Row) -> None:
        for name in UNIQUE:
            if row[name] is not None:
                del self._unique[name, row[name]]
        if row["stuck_on"]:
            _take_out(self._stuck, row["stuck_on"], row)
        if row["status"] in FINISHED:
            return
        if row["depends_on"] is not None:
            self._count_parents(row, -1)
        if row["status"] == "running":
            if row["owner"]:
                _take_out(self._owned, row["owner"], row)
                self._count_active(row, -1)
        elif row["held"] == FREE:
            if row["owner"]:
                _take_out(self._owned, row["owner"], row)
            self._count_active(row, -1)
            _remove_sorted(self._ready[row["owner"], row["type"]], _rank(row))
        elif row["held"] == UNTIL_DUE:
            _remove_sorted(self._held, (row["run_at"], row["id"]))
        elif row["held"] == FOR_PARENTS:
            self._waiting[row["waiting_on"]].remove(row["id"])
            if not self._waiting[row["waiting_on"]]:
                del self._waiting[row["waiting_on"]]
        elif row["held"] == FOR_TURN:
            _remove_sorted(self._lines[row["concurrency_key"]], (row["sequence"], row["id"]))
            if not self._lines[row["concurrency_key"]]:
                del self._lines[row["concurrency_key"]]

    def _count_active(self, row: Row, change: int) -> None:
        self._active[row["type"]] = self._active.get(row["type"], 0) + change

    def _count_parents(self, row: Row, change: int) -> None:
        for parent in ids_from_text(row["depends_on"]):
            self._parents[parent] = self._parents.get(parent, 0) + change
            if not self._parents[parent]:
                del self._parents[parent]

    # --- reading

    def _task(self, row: Row) -> Task:
        return task_from_row([row[name] for name in TASK_FIELDS], self.codecs)

    def get_many(self, task_ids: Sequence[str]) -> dict[str, Task]:
        """The tasks with these ids that exist, by id."""
        with self._lock:
            rows = [self._rows[task_id] for task_id in task_ids if task_id in self._rows]
            return {row["id"]: self._task(row) for row in rows}

    def list(self, filter: TaskFilter) -> Sequence[Task]:
        """The tasks that meet the filter, newest first."""
        with self._lock:
            found = sorted(
                (row for row in self._rows.values() if _meets(row, filter)),
                key=lambda row: (row["created_at"], row["sequence"]),
                reverse=True,
            )
            return [
                self._task(row)
                for row in islice(found, filter.offset, filter.offset + filter.limit)
            ]

    def count(self, filter: TaskFilter) -> int:
        """How many tasks meet the filter."""
        with self._lock:
            return sum(_meets(row, filter) for row in self._rows.values())

    def page(self, filter: TaskFilter) -> tuple[Sequence[Task], int]:
        """The tasks that meet the filter, and how many do in all."""
        with self._lock:
            return self.list(filter), self.count(filter)

    def ready(
        self, types: Iterable[str], limit: int, owner: str = "", ageing: int = 0
    ) -> Sequence[Stub]:
        """Pending tasks of these types and this owner that may start now, best first."""
        with self._lock:
            ready = [self._ready.get((owner, kind), []) for kind in types]
            if ageing:
                ready = [level for some in ready for level in _levels(some)]
            ranks = sorted(rank for some in ready for rank in some[:limit])
            if not ageing:
                return [stub_from_row(self._rows[rank[2]]) for rank in ranks[:limit]]
            ranks.sort(key=_age)
            found = [stub_from_row(self._rows[rank[2]]) for rank in ranks]
            return sorted(found, key=lambda stub: stub.rank(ageing))[:limit]

    def due(self, now: int, limit: int) -> Sequence[str]:
        """Ids of held back pending tasks whose time has come."""
        with self._lock:
            end = bisect.bisect_left(self._held, (now + 1, ""))
            return [task_id for _, task_id in self._held[: min(end, limit)]]

    def next_due(self) -> int | None:
        """The earliest ``run_at`` of the held back pending tasks."""
        with self._lock:
            return self._held[0][0] if self._held else None

    def oldest_ready(self) -> int | None:
        """Since when the pending task has waited, of those that may start now, that waits longest."""
        with self._lock:
            ranks = nsmallest(OLDEST, chain.from_iterable(self._ready.values()), key=_age)
            rows = [self._rows[task_id] for *_, task_id in ranks]
            return min((max(row["created_at"], row["run_at"] or 0) for row in rows), default=None)

    def owned(self, node: str) -> Sequence[Stub]:
        """The pending and running tasks that a node holds."""
        with self._lock:
            return [stub_from_row(row) for row in self._owned.get(node, {}).values()]

    def owners(self) -> Sequence[str]:
        """The ids of all nodes that hold tasks."""
        with self._lock:
            return list({*self._owned, *self._stuck})

    def unfinished(self, types: Iterable[str]) -> bool:
        """Whether a task of these types is running, or pending and not held back."""
        with self._lock:
            return any(self._active.get(kind, 0) for kind in types)

    def ended(self, status: str, before: int, limit: int) -> Sequence[Stub]:
        """Tasks of a finished status that ended before a moment."""
        with self._lock:
            found = (
                row
                for row in self._rows.values()
                if row["status"] == status
                and row["completed_at"] < before
                and row["id"] not in self._parents
            )
            return [stub_from_row(row) for row in islice(found, limit)]

    def statuses(self, task_ids: Sequence[str]) -> dict[str, str]:
        """The status of each of these tasks that exists, by id."""
        with self._lock:
            return {i: self._rows[i]["status"] for i in task_ids if i in self._rows}

    def unique_holders(self, keys: Sequence[str]) -> dict[str, str]:
        """Which task holds each of these unique keys, by key."""
        with self._lock:
            holders = {key: self._unique.get(("unique_lock", key)) for key in keys}
            return {key: task_id for key, task_id in holders.items() if task_id is not None}

    def awaited(self, after: str, limit: int) -> Sequence[str]:
        """The ids that waiting tasks wait on, in order, from the one after ``after``."""
        with self._lock:
            return sorted(parent for parent in self._waiting if parent > after)[:limit]

    def waiting_for(self, task_ids: Sequence[str]) -> Sequence[str]:
        """The tasks that wait on one of these."""
        with self._lock:
            return [child for parent in task_ids for child in self._waiting.get(parent, ())]

    def next_in_line(self, key: str) -> str | None:
        """The first task of a concurrency key that waits for its turn."""
        with self._lock:
            line = self._lines.get(key)
            return line[0][1] if line else None

    def lines(self, limit: int) -> Sequence[str]:
        """Concurrency keys with tasks that wait for their turn, and none that has it."""
        with self._lock:
            return [key for key in self._lines if ("turn", key) not in self._unique][:limit]

    def stuck_on(self, node: str) -> Sequence[Stub]:
        """The tasks that a thread of an ended attempt still runs on a node."""
        with self._lock:
            return [stub_from_row(row) for row in self._stuck.get(node, {}).values()]

    # --- notes

    def notes(self, prefix: str) -> dict[str, Note]:
        """All notes whose name begins so, by name."""
        with self._lock:
            return {name: note for name, note in self._notes.items() if name.startswith(prefix)}

    def put_note(self, name: str, text: str | None, version: int) -> bool:
        """Store a note, or remove it, if its version is still that one."""
        with self._lock:
            stored = self._notes.get(name)
            if version != (0 if stored is None else stored.version):
                return False
            if text is None:
                self._notes.pop(name, None)
            else:
                self._notes[name] = Note(text, version + 1 if version else new_version())
            return True

    def changed(self) -> bool:
        """Always true: another queue of this process may have changed something."""
        return True

    def renew_after_fork(self) -> None:
        """The child has its own copy of the tasks; another thread may have held the lock."""
        self._lock = threading.RLock()

    # --- nodes: they share this process, so that none of them can be dead

    def join(self, node: Node) -> None:
        """Record a node."""
        with self._lock:
            self._nodes[node.id] = attrs.evolve(node, alive=True)

    def mark_stopping(self, node: str) -> None:
        """A node of this process cannot leave anything behind, so nothing to record."""

    def leave(self, node: str) -> None:
        """Forget a node."""
        with self._lock:
            self._nodes.pop(node, None)

    def nodes(self) -> Sequence[Node]:
        """All recorded nodes."""
        with self._lock:
            return list(self._nodes.values())


def _rank(row: Row) -> tuple[int, int, str]:
    return -row["priority"], row["sequence"], row["id"]


def _levels(ranks: list[tuple[int, int, str]]) -> Iterator[list[tuple[int, int, str]]]:
    """Those of each priority, in order."""
    start = 0
    while start < len(ranks):
        end = bisect.bisect_left(ranks, (ranks[start][0] + 1, 0, ""))
        yield ranks[start:end]
        start = end


def _age(rank: tuple[int, int, str]) -> int:
    return rank[1]


def _take_out(rows: dict[str, dict[str, Row]], key: str, row: Row) -> None:
    del rows[key][row["id"]]
    if not rows[key]:
        del rows[key]


def _remove_sorted(items: list[Any], item: Any) -> None:
    del items[bisect.bisect_left(items, item)]


def _meets(row: Row, filter: TaskFilter) -> bool:
    return (
        (filter.type is None or row["type"] == filter.type)
        and (filter.status is None or row["status"] == filter.status.value)
        and (filter.created_by is None or row["created_by"] == filter.created_by)
        and (filter.start_date is None or row["created_at"] >= to_ms(filter.start_date))
        and (filter.end_date is None or row["created_at"] <= to_ms(filter.end_date))
    )
