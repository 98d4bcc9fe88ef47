"""Tasks in this process's memory: for tests, and for work that may be lost with the process."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from heapq import nlargest, nsmallest
from itertools import islice, takewhile
from operator import itemgetter
from typing import Any

from taskx.stores.base import (
    Fields,
    Listed,
    Lookup,
    Reads,
    Repository,
    Rows,
    Timed,
    check_place,
    new_version,
)
from taskx.stores.ordered import SortedItems
from taskx.stores.parts import Forks
from taskx.tasks import payload
from taskx.tasks.clock import SYSTEM_CLOCK, Clock, to_ms
from taskx.tasks.codec import Codec
from taskx.tasks.conditions import contains, meets
from taskx.tasks.lifecycle import FINISHED
from taskx.tasks.model import CONDITIONS, TASK_FIELDS, Task, TaskFilter
from taskx.tasks.record import (
    DEFAULTS,
    FOR_PARENTS,
    FOR_TURN,
    FREE,
    UNIQUE,
    UNTIL_DUE,
    Ended,
    Stub,
    ids_from_text,
    parents_from_text,
    stub_from_row,
    task_from_row,
)
from taskx.tasks.tags import FLOW, labels_of
from taskx.tasks.timing import DEFAULT_TIMING, Timing
from taskx.tasks.writes import Delete, Insert, Note, NoteChange, Update, Write, matches

#: The columns of a task, its ``sequence`` (a number that grows with each submission), and its ``places``:
#: the index items that lead to it.
Row = dict[str, Any]

# Interrupts that undoing one transaction survives.
_MOST_INTERRUPTS = 100


class MemoryRepository(Repository, Forks):
    """A repository in this process's memory: all promises hold, except that tasks end with the process.

    Several queues of one process may share it.

    Args:
        clock: the clock for the timestamps that the eight methods write.
        codec: the codec or codecs of params, results and checkpoints. The first one writes, all of them
            read.
    """

    shared = False
    conditions = CONDITIONS

    def __init__(
        self,
        clock: Clock = SYSTEM_CLOCK,
        codec: Codec | Iterable[Codec] | None = None,
        timing: Timing = DEFAULT_TIMING,
    ) -> None:
        super().__init__(clock, codec, timing)
        self._lock = threading.RLock()
        self._rows: dict[str, Row] = {}
        self._sequence = 0
        # The index items that lead to rows, by kind and key: see _places.
        self._indexes: defaultdict[str, dict[Any, SortedItems]] = defaultdict(dict)
        # The changes of the current transaction, so that they can be undone.
        self._changed: list[tuple[str, Row | None, Row | None]] = []
        self._notes: dict[str, Note] = {}
        self.reads = self._reads = MemoryReads(self)
        self.forks = self

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    # --- writing

    @property
    def entered(self) -> bool:
        return self._lock._is_owned()  # type: ignore[attr-defined, no-any-return]

    def apply(self, writes: Sequence[Write], *, all_or_nothing: bool = False) -> Sequence[bool]:
        writes = self.codecs.coded(writes)
        with self._lock:
            start = len(self._changed)  # more than 0 if a finalizer writes inside another write
            try:
                # No comprehension: in Python 3.13 an interrupt inside one can escape the handler below.
                results = list(map(self._apply_one, writes))
                if all_or_nothing and not all(results):
                    self._undo(start)
                del self._changed[start:]
            except BaseException:  # also an interrupt, wherever it strikes
                self._undo(start)
                raise
        return results

    def _undo(self, start: int) -> None:
        """Undo the changes from index ``start`` on. Further interrupts do not stop it."""
        for _ in range(_MOST_INTERRUPTS):
            try:
                while len(self._changed) > start:
                    task_id, before, after = self._changed[-1]
                    self._switch(task_id, after, before)
                    self._changed.pop()
                return
            except BaseException:  # noqa: BLE001
                continue

    def _holds(self, write: Write) -> bool:
        row = self._rows.get(write.id)
        if isinstance(write, Insert):
            return row is None and self._unique_free(write.id, write.row)
        if row is None or not matches(row, write.guard):
            return False
        return isinstance(write, Delete) or self._unique_free(write.id, write.changes)

    def _unique_free(self, task_id: str, columns: Mapping[str, Any]) -> bool:
        for name in UNIQUE:
            value = columns.get(name)
            if value is not None and next(self._found(name, value), task_id) != task_id:
                return False
        return True

    def _apply_one(self, write: Write) -> bool:
        if not self._holds(write):
            return False
        if isinstance(write, Insert):
            self._sequence += 1
            self._put(write.id, {**DEFAULTS, **write.row, "sequence": self._sequence})
        elif isinstance(write, Update):
            self._put(write.id, {**self._rows[write.id], **write.changes})
        else:
            self._put(write.id, None)
        return True

    def _put(self, task_id: str, row: Row | None) -> None:
        """Replace the row with this id. None removes it."""
        before = self._rows.get(task_id)
        if row is not None:
            row["places"] = _places(row)
        self._changed.append((task_id, before, row))
        self._switch(task_id, before, row)

    def _switch(self, task_id: str, old: Row | None, new: Row | None) -> None:
        """Replace a row by another one, even if this change, or its reverse, was made in part before."""
        before = () if old is None else old["places"]
        after = () if new is None else new["places"]
        kept = {*before} & {*after}  # a set, because a task may have ten thousand parents
        for place in before:
            if place not in kept:
                kind, key, item = place
                items = self._indexes[kind].get(key)
                if items is not None:
                    items.discard(item)
                    if not items:
                        del self._indexes[kind][key]
        if new is None:
            self._rows.pop(task_id, None)
        else:
            self._rows[task_id] = new
        for place in after:
            if place not in kept:
                kind, key, item = place
                index = self._indexes[kind]
                if key not in index:
                    index[key] = SortedItems()
                index[key].add(item)

    def _found(self, kind: str, key: Any) -> Iterator[str]:
        """Iterate over the ids that an index has under a key, in order."""
        return (item[-1] for item in self._indexes[kind].get(key, ()))

    # --- reading

    def find(
        self, column: Lookup, values: Sequence[str], fields: Fields, limit: int | None = None
    ) -> Rows:
        with self._lock:
            if column == "id":
                rows: Iterable[Row] = [self._rows[i] for i in values if i in self._rows]
            elif column == "parent":
                rows = ({"id": i, column: v} for v in values for i in self._found(column, v))
            else:
                rows = (self._rows[i] for v in values for i in self._having(column, v))
            pick = _task_fields if fields is TASK_FIELDS else _picker(fields)
            return list(map(pick, rows if limit is None else islice(rows, limit)))

    def _having(self, column: Lookup, value: str) -> Iterator[str]:
        """Iterate over the ids of the rows that have a value in a lookup column."""
        if column != "buffered_on":
            return self._found(column, value)
        ready = (key for key in self._indexes["ready"] if key[0] == value != "")
        return (task_id for key in ready for task_id in self._found("ready", key))

    def distinct(self, column: Listed, after: str, limit: int) -> Sequence[str]:
        with self._lock:
            if column == "buffered_on":
                values: Iterable[str] = {owner for owner, _ in self._indexes["ready"]}
            elif column == "ready_type":
                values = {kind for _, kind in self._indexes["ready"]}
            else:
                values = self._indexes[column]
            return nsmallest(limit, (value for value in values if value > after))

    def list(self, filter: TaskFilter) -> Sequence[Task]:
        return self.reads.list_after(filter)[0]

    def _listed(self, filter: TaskFilter) -> SortedItems:
        """Return the places in a list, in order, among which are those of the tasks that match."""
        indexes = [("created", None), *(("tag", label) for label in filter.labels)]
        found = [self._indexes[kind].get(key, SortedItems()) for kind, key in indexes]
        return min(found, key=len)

    def count(self, filter: TaskFilter) -> int:
        return self._reads.count_to(filter, None)

    def _candidates(self, filter: TaskFilter) -> Iterable[Row]:
        if not filter.labels:
            return self._rows.values()
        return (self._rows[place[-1]] for place in self._listed(filter))

    def ready(
        self, types: Iterable[str], limit: int, owner: str = "", ageing: int = 0
    ) -> Sequence[Stub]:
        with self._lock:
            found: list[Any] = []
            for kind in types:
                ranks = self._indexes["ready"].get((owner, kind))
                if ranks:
                    found += _oldest_of_each(ranks, limit) if ageing else islice(ranks, limit)
            if not ageing:
                return [self._stub(rank) for rank in sorted(found)[:limit]]
            # Tasks of equal rank stay in the order of submission.
            found.sort(key=itemgetter(1))
            stubs = [self._stub(rank) for rank in found]
            return sorted(stubs, key=lambda stub: stub.rank(ageing))[:limit]

    def _stub(self, item: tuple[Any, ...]) -> Stub:
        return stub_from_row(self._rows[item[-1]])

    def due(
        self, before: int | None, limit: int, column: Timed = "run_at"
    ) -> Sequence[tuple[str, int]]:
        with self._lock:
            waiting = self._indexes[column].get(None, ())
            due = takewhile(lambda item: before is None or item[0] <= before, waiting)
            return [(task_id, moment) for moment, task_id in islice(due, limit)]

    def ended(self, status: str, before: int, limit: int, after: Any = None) -> Sequence[Ended]:
        with self._lock:
            created = self._indexes["created"].get(None)
            places = () if created is None else created.before(after or (before,))
            found = (
                (self._rows[place[-1]], place)
                for place in places
                if self._rows[place[-1]]["status"] == status
            )
            over = (
                _ended(row, place)
                for row, place in found
                if row["completed_at"] < before and not row["stuck_on"]
            )
            return list(islice(over, limit))

    # --- notes

    def notes(self, prefix: str) -> dict[str, Note]:
        with self._lock:
            return {name: note for name, note in self._notes.items() if name.startswith(prefix)}

    def put_notes(self, changes: Sequence[NoteChange]) -> Sequence[bool]:
        return [self._put_note(*change) for change in changes]

    def _put_note(self, name: str, text: str | None, version: int) -> bool:
        with self._lock:
            stored = self._notes.get(name)
            if version != (0 if stored is None else stored.version):
                return False
            if text is None:
                self._notes.pop(name, None)
            else:
                self._notes[name] = Note(text, version + 1 if version else new_version())
            return True

    def version(self) -> object:
        """Return a new value at each call, as another queue of this process may have changed something."""
        return object()

    def renew_after_fork(self) -> None:
        """Make a new lock: another thread may have held it. The child keeps its own copy of the tasks."""
        self._lock = threading.RLock()


class MemoryReads(Reads):
    """The reads, each from an index."""

    def __init__(self, store: MemoryRepository) -> None:
        super().__init__(store)
        self._store = store

    def list_after(self, filter: TaskFilter, after: Any = None) -> tuple[Sequence[Task], Any]:
        self._store.refuse_unknown_conditions(filter)
        if after is not None:
            after = check_place(after, int, int, str)
        with self._store._lock:
            created = self._store._listed(filter)
            newest = reversed(created) if after is None else created.before(after)
            found = (place for place in newest if _meets(self._store._rows[place[-1]], filter))
            page = [*islice(found, filter.offset, filter.offset + filter.limit)]
            rows = (_task_fields(self._store._rows[place[-1]]) for place in page)
            return [task_from_row(row, self._store.codecs) for row in rows], page[
                -1
            ] if page else after

    def count_to(self, filter: TaskFilter, most: int | None) -> int:
        self._store.refuse_unknown_conditions(filter)
        with self._store._lock:
            found = (row for row in self._store._candidates(filter) if _meets(row, filter))
            return sum(1 for _ in islice(found, most))

    def count_by_status(self, filter: TaskFilter, most: int) -> dict[str, int]:
        self._store.refuse_unknown_conditions(filter)
        with self._store._lock:
            found = (
                row["status"] for row in self._store._candidates(filter) if _meets(row, filter)
            )
            return Counter(islice(found, most))

    def flows(self, before: str, limit: int) -> Sequence[str]:
        with self._store._lock:
            ids = (tag[len(FLOW) :] for tag in self._store._indexes["tag"] if tag.startswith(FLOW))
            return nlargest(limit, (flow for flow in ids if not before or flow < before))

    def count_ready(self, type: str, owner: str, at_most: int) -> int:
        with self._store._lock:
            ranks = self._store._indexes["ready"].get((owner, type), SortedItems())
            return min(len(ranks), at_most)

    def newest(self, status: str, limit: int, fields: Fields) -> Rows:
        with self._store._lock:
            # In the order of storing: the index by ``created_at`` would take several times as long.
            found = (row for row in reversed(self._store._rows.values()) if row["status"] == status)
            return [*map(_picker(fields), islice(found, limit))]

    def notes_named(self, names: Sequence[str]) -> dict[str, Note]:
        with self._store._lock:
            return {name: self._store._notes[name] for name in names if name in self._store._notes}

    def notes_after(self, prefix: str, after: str, limit: int) -> dict[str, Note]:
        with self._store._lock:
            later = (
                name for name in self._store._notes if name > after and name.startswith(prefix)
            )
            return {name: self._store._notes[name] for name in nsmallest(limit, later)}


_task_fields = itemgetter(*TASK_FIELDS)


@lru_cache(maxsize=64)
def _picker(fields: tuple[str, ...]) -> Callable[[Row], tuple[Any, ...]]:
    """Return a function that returns the values of these fields of a row."""
    if len(fields) > 1:
        return itemgetter(*fields)
    (name,) = fields
    return lambda row: (row[name],)


#: The kind of an index, a key in it, and an item under that key. The item's last part is a row's id.
Place = tuple[str, Any, tuple[Any, ...]]


def _places(row: Row) -> list[Place]:
    """Return the places of a row in the indexes."""
    task_id, sequence = row["id"], row["sequence"]
    places: list[Place] = [("created", None, (row["created_at"], sequence, task_id))]
    places += [(name, row[name], (task_id,)) for name in UNIQUE if row[name] is not None]
    if row["stuck_on"]:
        places.append(("stuck_on", row["stuck_on"], (task_id,)))
    if row["depends_on"] is not None:
        places += (("parent", parent, (task_id,)) for parent in ids_from_text(row["depends_on"]))
    if row["tags"] is not None:
        place = (row["created_at"], sequence, task_id)
        places += (("tag", label, place) for label in labels_of(row["tags"]))
    if row["status"] in FINISHED:
        return places
    if row["status"] == "running":
        if row["owner"]:
            places.append(("running_on", row["owner"], (task_id,)))
        return places
    if row["expires_at"] is not None:
        places.append(("expires_at", None, (row["expires_at"], task_id)))
    if row["held"] == FREE:
        places.append(("ready", (row["owner"], row["type"]), (-row["priority"], sequence, task_id)))
    elif row["held"] == UNTIL_DUE:
        places.append(("run_at", None, (row["run_at"], task_id)))
    elif row["held"] == FOR_PARENTS:
        places.append(("waiting_on", row["waiting_on"], (task_id,)))
    elif row["held"] == FOR_TURN:
        places.append(("line", row["concurrency_key"], (sequence, task_id)))
    return places


def _oldest_of_each(ranks: SortedItems, limit: int) -> Iterator[tuple[int, int, str]]:
    """Yield the first ``limit`` ranks of each priority."""
    first = next(iter(ranks), None)
    while first is not None:
        for rank in islice(ranks.start_at(first), limit):
            if rank[0] != first[0]:
                break
            yield rank
        first = next(ranks.start_at((first[0] + 1,)), None)


def _ended(row: Row, place: tuple[Any, ...]) -> Ended:
    parents = parents_from_text(row["depends_on"])
    return Ended(stub_from_row(row), parents, row["unique_lock"], row["unique_scope"], place)


def _meets(row: Row, filter: TaskFilter) -> bool:
    return (
        (filter.type is None or row["type"] == filter.type)
        and (filter.status is None or row["status"] == filter.status.value)
        and (filter.created_by is None or row["created_by"] == filter.created_by)
        and (filter.start_date is None or row["created_at"] >= to_ms(filter.start_date))
        and (filter.end_date is None or row["created_at"] <= to_ms(filter.end_date))
        and (filter.error is None or contains(row["error"], filter.error))
        and (filter.error_type is None or row["error_type"] == filter.error_type)
        and (filter.id_prefix is None or row["id"].startswith(filter.id_prefix))
        and (filter.params is None or meets(payload.loads(row["params"]), filter.params))
        and (filter.parent is None or filter.parent in parents_from_text(row["depends_on"]))
        and (
            (filter.tag is None and filter.flow is None)
            or {*filter.labels} <= {*labels_of(row["tags"])}
        )
    )
