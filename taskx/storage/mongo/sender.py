"""Guarded writes in batches, each carried out once however often it is sent.

Every write leaves a mark on its document (``taskx.w``). By it is known which guards of a batch held
where the server's counts do not add up, and whether a write took place whose answer was lost: sent
again, it passes over documents that bear its mark.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

import bson
import pymongo
import pymongo.collection
from bson.int64 import Int64
from pymongo import InsertOne, UpdateOne
from pymongo.errors import BulkWriteError, DuplicateKeyError

from taskx.core.codec import Codecs
from taskx.core.errors import PayloadError
from taskx.core.record import DEFAULTS, UNIQUE
from taskx.core.writes import PRESENT, Delete, Insert, Update, Write, matches
from taskx.storage.mongo.connection import FAILURES, Connection
from taskx.storage.mongo.documents import MARKS, PATHS, Document, fields, new_document
from taskx.storage.mongo.failures import (
    DUPLICATE_KEY,
    is_passing,
    may_have_been_sent,
    translated,
)
from taskx.storage.mongo.filters import guarded, text
from taskx.storage.mongo.order import Order

#: The largest document.
MOST_BYTES = 16 * 1024 * 1024
_PAUSE = 0.05
#: Seconds that a batch under way is given to be committed before it is abandoned for another task.
_MOMENT = 1.0
#: Most writes of unknown outcome that are remembered, to be known again when they are sent again.
_MOST_REMEMBERED = 4096


class Sender:
    """Sends writes to the tasks.

    Args:
        connection: the way to the server.
        order: where new tasks stand.
        codecs: how values are stored.
    """

    def __init__(self, connection: Connection, order: Order, codecs: Codecs) -> None:
        self._connection = connection
        self._order = order
        self._codecs = codecs
        #: Of ids that new tasks cannot have, says which are worth another try; with True, see to it.
        self.make_way: Callable[[Sequence[str], bool], Collection[str]] = lambda task_ids, force: ()
        self.renew()

    def renew(self) -> None:
        """Begin anew, in a forked child: with marks of its own."""
        self._lock = threading.Lock()
        self._prefix = int.from_bytes(os.urandom(4), "big") >> 1
        self._count = 0
        # By identity, and with the write, so that it stays the only one of that identity.
        self._unknown: dict[int, tuple[Write, int]] = {}

    def is_own(self, mark: int) -> bool:
        """Whether this object left that mark."""
        return mark >> 32 == self._prefix

    def new_mark(self) -> int:
        """A mark that nobody has used."""
        with self._lock:
            self._count = (self._count + 1) & 0xFFFFFFFF
            return self._prefix << 32 | self._count

    # --- rounds: in each, one write per document

    def apply(self, writes: Sequence[Write], batch: str = "") -> list[bool]:
        """Apply guarded writes; says for each whether its guard held.

        Args:
            writes: what to apply, in order where they are of one task.
            batch: what new tasks are hidden in, if they are.

        Raises:
            RepositoryUnavailable: the server cannot be reached, or its answer was lost.
            PayloadError: a document is too large.
            RepositoryError: the server refused a write.
        """
        results = [False] * len(writes)
        waiting: dict[str, list[int]] = {}
        for index, write in enumerate(writes):
            waiting.setdefault(text(write.id, "id"), []).append(index)
        marks = self._marks(writes, waiting.values())
        known: dict[str, Mapping[str, Any] | None] = {}
        try:
            while due := _next_round(writes, waiting, known):
                ops = [self._op(writes[index], marks[index], batch) for index in due]
                for index, held in zip(due, self._send(ops), strict=True):
                    results[index] = held
                    known[writes[index].id] = _known_after(writes[index], held)
        except BaseException:
            # An interrupt, too: what is sent again bears the mark of the first time.
            self._remember(writes, marks)
            raise
        self._forget(writes)
        return results

    def _marks(self, writes: Sequence[Write], by_task: Collection[Sequence[int]]) -> list[int]:
        """A mark for each write: two of one task never have the same, or one would pass for the other."""
        marks = [0] * len(writes)
        for position in range(max(map(len, by_task), default=0)):
            mark = self.new_mark()
            for indexes in by_task:
                if position < len(indexes):
                    marks[indexes[position]] = mark
        return marks

    def _op(self, write: Write, mark: int, batch: str) -> _Op:
        remembered = self.mark_of(write)
        op = _Op(write, mark if remembered is None else remembered, again=remembered is not None)
        if isinstance(write, Insert):
            row = self._codecs.columns(write.row)
            op.document = new_document(row, self._order.next(), op.mark, batch)
            _refuse_if_too_large(op.document, len(row["params"]))
        elif isinstance(write, Update):
            op.changes = self._codecs.columns(write.changes)
        return op

    def _remember(self, writes: Sequence[Write], marks: Sequence[int]) -> None:
        with self._lock:
            for write, mark in zip(writes, marks, strict=True):
                self._unknown.setdefault(id(write), (write, mark))
            while len(self._unknown) > _MOST_REMEMBERED:
                del self._unknown[next(iter(self._unknown))]

    def _forget(self, writes: Sequence[Write]) -> None:
        if self._unknown:
            with self._lock:
                for write in writes:
                    self._unknown.pop(id(write), None)

    def mark_of(self, write: Write) -> int | None:
        """The mark of a write of unknown outcome."""
        remembered = self._unknown.get(id(write))
        return None if remembered is None else remembered[1]

    # --- one round

    def _send(self, ops: Sequence[_Op]) -> list[bool]:
        """Send until the outcome is known, at most for the connection's time-out."""
        began = time.monotonic()
        deadline = began + self._connection.timeout
        patience = began + min(_MOMENT, self._connection.timeout / 4)
        sent = any(op.again for op in ops)
        due = ops
        while due:
            try:
                left = max(0.001, deadline - time.monotonic())
                with pymongo.timeout(left), self._connection.turns:
                    due = self._send_once(due, force=time.monotonic() >= patience)
            except FAILURES as error:
                sent = sent or may_have_been_sent(error)
                if not is_passing(error) or time.monotonic() + _PAUSE >= deadline:
                    raise translated(error, self._connection.name, in_doubt=sent) from error
                for op in due:
                    op.again = sent
            if due:
                time.sleep(_PAUSE)
        return [bool(op.held) for op in ops]

    def _send_once(self, ops: Sequence[_Op], *, force: bool) -> list[_Op]:
        """Send all; returns what a batch that may come to nothing was in the way of."""
        for op in ops:
            if isinstance(op.write, Delete) and not op.held:
                op.held = self._delete(op)
        requests = [op for op in ops if not isinstance(op.write, Delete)]
        refused = self._write(requests) if requests else []
        refused = [op for op in refused if not self._lacks_what_is_unique(op)]
        again = self.make_way([op.write.id for op in refused], force) if refused else ()
        return [op for op in refused if op.write.id in again]

    def _lacks_what_is_unique(self, op: _Op) -> bool:
        """Whether another task has what no two may have, beside the id."""
        document = op.document or {}
        taken = [
            {f"taskx.{name}": document["taskx"][name]}
            for name in UNIQUE
            if name in document["taskx"]
        ]
        if not taken:
            return False
        wanted = {"$or": taken, "_id": {"$ne": document["_id"]}}
        return self._connection.tasks.find_one(wanted, {"_id": 1}) is not None

    def _delete(self, op: _Op) -> bool:
        tasks = self._connection.tasks
        assert isinstance(op.write, Delete)
        # Not delete_one, which the driver sends again on its own: then its count may be a lie.
        deleted = tasks.delete_many(guarded(op.write.id, op.write.guard)).deleted_count == 1
        # One that was sent before, and whose task is gone, took place.
        return deleted or (op.again and tasks.find_one({"_id": op.write.id}, {"_id": 1}) is None)

    def _write(self, ops: Sequence[_Op]) -> list[_Op]:
        """Send inserts and updates; returns the inserts whose id was taken."""
        inserts = [op for op in ops if op.document is not None]
        updates = [op for op in ops if op.document is None]
        matched, refused = self._bulk_write(inserts, updates)
        for index, op in enumerate(inserts):
            op.held = index not in refused
        for op in updates:
            op.held = matched == len(updates)
        # Or they held when it was sent before, perhaps by the driver.
        unclear = [op for op in ops if not op.held]
        if unclear:
            self._look_for_marks(unclear)
        return [op for op in inserts if not op.held]

    def _bulk_write(
        self, inserts: Sequence[_Op], updates: Sequence[_Op]
    ) -> tuple[int, Collection[int]]:
        """How many updates found their document, and which inserts met one of their id."""
        tasks = self._connection.tasks
        documents = [op.document for op in inserts if op.document is not None]
        changes = [_update(op) for op in updates]
        if not isinstance(tasks, pymongo.collection.Collection):
            return _write_one_by_one(tasks, documents, changes)
        requests: list[InsertOne[Document] | UpdateOne] = [
            *map(InsertOne, documents),
            *(UpdateOne(*change) for change in changes),
        ]
        try:
            return tasks.bulk_write(requests, ordered=False).matched_count, ()
        except BulkWriteError as error:
            details = error.details or {}
            failures = details["writeErrors"]
            others = any(failure["code"] != DUPLICATE_KEY for failure in failures)
            if others or details.get("writeConcernErrors"):
                raise
            return details["nMatched"], {failure["index"] for failure in failures}

    def _look_for_marks(self, ops: Sequence[_Op]) -> None:
        marks = sorted({op.mark for op in ops})
        wanted = {
            "_id": {"$in": [op.write.id for op in ops]},
            "taskx.w": {"$in": [Int64(mark) for mark in marks]},
        }
        found = {
            document["_id"]: document["taskx"]["w"]
            for document in self._connection.tasks.find(wanted, {"taskx.w": 1})
        }
        for op in ops:
            op.held = op.mark in found.get(op.write.id, ())

    # --- looking back

    def took_place(self, writes: Sequence[Write]) -> list[bool | None]:
        """Of writes of unknown outcome, whether they took place; None of others, and of deletes."""
        marks = [None if isinstance(w, Delete) else self.mark_of(w) for w in writes]
        ops = [_Op(w, m, again=True) for w, m in zip(writes, marks, strict=True) if m is not None]
        if ops:
            self._connection.run(lambda: self._look_for_marks(ops))
        told = {id(op.write): op.held for op in ops}
        return [told.get(id(write)) for write in writes]


class _Op:
    """A write on its way."""

    __slots__ = ("again", "changes", "document", "held", "mark", "write")

    def __init__(self, write: Write, mark: int, *, again: bool) -> None:
        self.write = write
        self.mark = mark
        self.again = again
        self.document: Document | None = None
        self.changes: Mapping[str, Any] = {}
        self.held: bool | None = None


# --- what needs no server


def _next_round(
    writes: Sequence[Write],
    waiting: Mapping[str, list[int]],
    known: Mapping[str, Mapping[str, Any] | None],
) -> list[int]:
    """The next write of each task, passing over those that cannot hold after the ones before."""
    due = []
    for task_id, indexes in waiting.items():
        while indexes and _cannot_hold(writes[indexes[0]], task_id, known):
            indexes.pop(0)
        if indexes:
            due.append(indexes.pop(0))
    return due


def _cannot_hold(write: Write, task_id: str, known: Mapping[str, Mapping[str, Any] | None]) -> bool:
    if task_id not in known:
        return False
    state = known[task_id]
    if isinstance(write, Insert):
        return state is not None
    if state is None:
        return True
    guard = {name: wanted for name, wanted in write.guard.items() if name in state}
    return not matches(state, guard)


def _known_after(write: Write, held: bool) -> Mapping[str, Any] | None:
    """What is known of a task just after that write: some of its columns; None: it is not there.

    After a write whose guard failed that is nothing, as an update does not hold on what is not there.
    """
    if isinstance(write, Insert):
        return {**DEFAULTS, **write.row} if held else {}
    if not held:
        return {}
    if isinstance(write, Delete):
        return None
    sure = {
        name: wanted
        for name, wanted in write.guard.items()
        if wanted is not PRESENT and not isinstance(wanted, tuple)
    }
    return {**sure, **write.changes}


def _refuse_if_too_large(document: Document, about: int) -> None:
    """Before anything is sent, so that it fails alone."""
    if about > MOST_BYTES // 2 and (size := len(bson.encode(document))) > MOST_BYTES:
        raise PayloadError("params", f"{size:,} bytes as BSON, more than MongoDB's {MOST_BYTES:,}")


def _update(op: _Op) -> tuple[Document, Document]:
    """The filter and the changes of an update."""
    write = op.write
    assert isinstance(write, Update)  # inserts have a document, deletes go alone
    # Whoever sends it again, this object or the driver: it passes over what bears its mark.
    found = {**guarded(write.id, write.guard), "taskx.w": {"$nin": [Int64(op.mark)]}}
    changed: Document = {"$push": {"taskx.w": {"$each": [Int64(op.mark)], "$slice": -MARKS}}}
    # In an index of what must be unique a null would stand, too: what is given up is taken off.
    gone = [name for name in UNIQUE if name in op.changes and op.changes[name] is None]
    kept = {name: value for name, value in op.changes.items() if name not in gone}
    if kept:
        changed["$set"] = fields(kept)
    if gone:
        changed["$unset"] = {PATHS[name]: "" for name in gone}
    return found, changed


def _write_one_by_one(
    tasks: Any, documents: Sequence[Document], changes: Sequence[tuple[Document, Document]]
) -> tuple[int, Collection[int]]:
    """What ``bulk_write`` does, for a mock of the driver, which lacks it."""
    matched, refused = 0, set()
    for index, document in enumerate(documents):
        try:
            tasks.insert_one(document)
        except DuplicateKeyError:
            refused.add(index)
    for found, changed in changes:
        with suppress(DuplicateKeyError):
            matched += tasks.update_one(found, changed).matched_count
    return matched, refused
