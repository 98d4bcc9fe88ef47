"""Tasks in this process's memory: for tests, and for work that may be lost with the process."""

from __future__ import annotations

import bisect
import threading
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import attrs

from taskx.core.clock import SYSTEM_CLOCK, Clock, to_ms
from taskx.core.lifecycle import FINISHED
from taskx.core.model import Task, TaskFilter
from taskx.core.record import COLUMNS, DEFAULTS, Stub, stub_from_row, task_from_row
from taskx.core.writes import Delete, Insert, Update, Write, matches, traces
from taskx.storage.base import Node, Repository

Row = dict[str, Any]


class MemoryRepository(Repository):
    """Keeps tasks in dicts. Everything holds that TaskX promises, but for outliving the process.

    Several queues of one process may share it.
    """

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        super().__init__(clock)
        self._lock = threading.RLock()
        self._rows: dict[str, Row] = {}
        self._sequence = 0
        # Unfinished rows apart, so that the runtime's questions do not cost more as history grows.
        self._ready: dict[tuple[str, str], list[tuple[int, int, str]]] = {}
        self._held: list[tuple[int, str]] = []
        self._owned: dict[str, dict[str, Row]] = {}
        self._active: dict[str, int] = {}
        self._nodes: dict[str, Node] = {}

    # --- writing

    def apply(self, writes: Sequence[Write], *, all_or_nothing: bool = False) -> Sequence[bool]:
        """Apply guarded writes at one moment; says for each whether its guard held."""
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
            return row is None
        return row is not None and matches(row, write.guard)

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
        return row is not None and all(row[name] == value for name, value in traces(write).items())

    def _index(self, row: Row) -> None:
        if row["status"] in FINISHED:
            return
        if row["owner"]:
            self._owned.setdefault(row["owner"], {})[row["id"]] = row
        if row["status"] == "running":
            if row["owner"]:
                self._active[row["type"]] = self._active.get(row["type"], 0) + 1
        elif row["held"]:
            bisect.insort(self._held, (row["run_at"], row["id"]))
        else:
            self._active[row["type"]] = self._active.get(row["type"], 0) + 1
            bisect.insort(self._ready.setdefault((row["owner"], row["type"]), []), _rank(row))

    def _unindex(self, row: Row) -> None:
        if row["status"] in FINISHED:
            return
        if row["owner"]:
            self._owned[row["owner"]].pop(row["id"])
            if not self._owned[row["owner"]]:
                del self._owned[row["owner"]]
        if row["status"] == "running":
            if row["owner"]:
                self._active[row["type"]] -= 1
        elif row["held"]:
            _remove_sorted(self._held, (row["run_at"], row["id"]))
        else:
            self._active[row["type"]] -= 1
            _remove_sorted(self._ready[row["owner"], row["type"]], _rank(row))

    # --- reading

    def get_many(self, task_ids: Sequence[str]) -> dict[str, Task]:
        """The tasks with these ids that exist, by id."""
        with self._lock:
            rows = [self._rows[task_id] for task_id in task_ids if task_id in self._rows]
            return {row["id"]: _task(row) for row in rows}

    def list(self, filter: TaskFilter) -> Sequence[Task]:
        """The tasks that meet the filter, newest first."""
        with self._lock:
            found = sorted(
                (row for row in self._rows.values() if _meets(row, filter)),
                key=lambda row: (row["created_at"], row["sequence"]),
                reverse=True,
            )
            return [
                _task(row) for row in islice(found, filter.offset, filter.offset + filter.limit)
            ]

    def count(self, filter: TaskFilter) -> int:
        """How many tasks meet the filter."""
        with self._lock:
            return sum(_meets(row, filter) for row in self._rows.values())

    def page(self, filter: TaskFilter) -> tuple[Sequence[Task], int]:
        """The tasks that meet the filter, and how many do in all."""
        with self._lock:
            return self.list(filter), self.count(filter)

    def ready(self, types: Iterable[str], limit: int, owner: str = "") -> Sequence[Stub]:
        """Pending tasks of these types and this owner that may start now, best first."""
        with self._lock:
            found = [self._ready.get((owner, kind), [])[:limit] for kind in types]
            ranks = sorted(rank for some in found for rank in some)
            return [stub_from_row(self._rows[rank[2]]) for rank in ranks[:limit]]

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
        """Since when the oldest pending task that may start now has waited."""
        with self._lock:
            ranks = [min(some, key=_age) for some in self._ready.values() if some]
            if not ranks:
                return None
            row = self._rows[min(ranks, key=_age)[2]]
            since: int = max(row["created_at"], row["run_at"] or 0)
            return since

    def owned(self, node: str) -> Sequence[Stub]:
        """The pending and running tasks that a node holds."""
        with self._lock:
            return [stub_from_row(row) for row in self._owned.get(node, {}).values()]

    def owners(self) -> Sequence[str]:
        """The ids of all nodes that hold tasks."""
        with self._lock:
            return list(self._owned)

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
                if row["status"] == status and row["completed_at"] < before
            )
            return [stub_from_row(row) for row in islice(found, limit)]

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


def _task(row: Row) -> Task:
    return task_from_row([row[name] for name in COLUMNS])


def _rank(row: Row) -> tuple[int, int, str]:
    return -row["priority"], row["sequence"], row["id"]


def _age(rank: tuple[int, int, str]) -> int:
    return rank[1]


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
