"""Send guarded writes in batches; each is applied once, even if it is sent several times.

Every write leaves a mark on its document (``taskx.w``). The marks answer two questions:

- Which guards of a batch held, if the server's counts do not say?
- Was a write applied whose answer was lost? When it is sent again, it skips documents with its mark.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from itertools import count
from typing import Any

import attrs
import bson
import pymongo
from bson.int64 import Int64
from pymongo import InsertOne, UpdateMany, UpdateOne
from pymongo.errors import DuplicateKeyError, PyMongoError
from pymongo.read_concern import ReadConcern

from taskx.stores.mongo.batches import Batches
from taskx.stores.mongo.connection import (
    FAILURES,
    Connection,
    Sequencer,
    bulk_write,
    is_passing,
    may_have_been_sent,
    translated,
)
from taskx.stores.mongo.documents import (
    MARKS,
    PATHS,
    Document,
    fields,
    new_document,
    ours_of,
)
from taskx.stores.mongo.filters import guarded, text
from taskx.tasks.codec import CODED, Codecs
from taskx.tasks.errors import PayloadError
from taskx.tasks.record import DEFAULTS, UNIQUE
from taskx.tasks.writes import PRESENT, Delete, Insert, Update, Write, matches

#: The most bytes in a document.
MOST_BYTES = 16 * 1024 * 1024
#: The most characters of params that are sent as an upsert, which is larger than an insert.
_SMALL = 2**20
#: Columns that are set for one task at a time. If one task cannot have a unique value, the server would
#: skip the tasks after it. And a codec may encode the same value differently each time.
_ALONE = frozenset((*UNIQUE, *CODED))
#: The index that finds tasks by their ids, whatever their other conditions are.
_BY_ID = [("_id", 1)]
#: The most writes of unknown outcome that are remembered, so that a repeated one keeps its mark.
_MOST_REMEMBERED = 4096


class Sender:
    """Sends writes to the tasks' collection.

    It needs ``batches`` because a hidden task can have the id of a new one, and its batch may be abandoned.
    """

    def __init__(
        self, connection: Connection, sequencer: Sequencer, batches: Batches, codecs: Codecs
    ) -> None:
        self._connection = connection
        self._timing = connection.timing
        self._sequencer = sequencer
        self._batches = batches
        self._codecs = codecs
        self.renew()

    def renew(self) -> None:
        self._lock = threading.Lock()
        self._prefix = int.from_bytes(os.urandom(4), "big") >> 1
        self._marks = count(self._prefix << 32)
        # By identity. The write itself is kept, so that no other object gets the same identity.
        self._unknown: dict[int, tuple[Write, int]] = {}

    @property
    def own(self) -> range:
        """The range of this object's marks."""
        return range(self._prefix << 32, (self._prefix + 1) << 32)

    # --- rounds: in each, one write per document

    def apply(self, writes: Sequence[Write], batch: str = "") -> list[bool]:
        """Apply guarded writes, in order for each task; return for each whether its guard held.

        If ``batch`` is given, new tasks are hidden in it.

        Raises:
            RepositoryUnavailable: the server cannot be reached, or its answer was lost.
        """
        results = [False] * len(writes)
        waiting: dict[str, list[int]] = {}
        for index, write in enumerate(writes):
            waiting.setdefault(text(write.id, "id"), []).append(index)
        marks = self._new_marks(writes)
        known: dict[str, Mapping[str, Any] | None] = {}
        try:
            while due := _next_round(writes, waiting, known):
                ops = [self._op(writes[index], marks[index], batch) for index in due]
                for index, held in zip(due, self._send(ops), strict=True):
                    results[index] = held
                    known[writes[index].id] = _known_after(writes[index], held)
        except BaseException:
            # Also after an interrupt: a write that is sent again must have the same mark.
            self._remember(writes, marks)
            raise
        self._forget(writes)
        return results

    def _new_marks(self, writes: Sequence[Write]) -> list[int]:
        """Return a mark for each write; equal changes of several tasks share one.

        Two writes of the same task never share a mark, because one would be mistaken for the other.
        """
        if len(writes) == 1:
            return [next(self._marks)]
        shared: dict[Any, int] = {}
        before: Counter[str] = Counter()
        marks = []
        for write in writes:
            mark = next(self._marks)
            if isinstance(write, Update) and _ALONE.isdisjoint(write.changes):
                alike = (*write.guard.items(), None, *write.changes.items(), before[write.id])
                with suppress(TypeError):  # not a valid value: it is refused later
                    mark = shared.setdefault(alike, mark)
            before[write.id] += 1
            marks.append(mark)
        return marks

    def _op(self, write: Write, mark: int, batch: str) -> Op:
        known = self._unknown.get(id(write))
        op = Op(write, mark if known is None else known[1], again=known is not None)
        if isinstance(write, Insert):
            row = self._codecs.columns(write.row)
            op.document = new_document(row, self._sequencer.next(), op.mark, batch)
            _refuse_if_too_large(op.document, len(row["params"]))
        elif isinstance(write, Update):
            op.update = _update(write, self._codecs.columns(write.changes), op.mark)
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

    # --- all or nothing

    def insert_together(self, writes: Sequence[Write]) -> bool:
        """Store new tasks in one transaction.

        Return False if the server does not support transactions or refuses one of the tasks. Nothing was
        stored then.
        """
        if not all(isinstance(write, Insert) for write in writes):
            return False
        ops = [self._op(write, next(self._marks), "") for write in writes]
        if any(op.again for op in ops) or not self._connection.transacts:
            return False
        deadline = time.monotonic() + self._connection.timeout
        documents = [op.document for op in ops if op.document is not None]
        sent = [False]
        try:
            while True:
                try:
                    with pymongo.timeout(max(0.001, deadline - time.monotonic())):
                        self._transact(documents, sent)
                    return True
                except FAILURES as error:
                    if sent[0] and not _was_rolled_back(error):
                        raise translated(error, self._connection.name, in_doubt=True) from error
                    if not is_passing(error):
                        return False
                    if time.monotonic() + self._timing.send_every >= deadline:
                        raise translated(error, self._connection.name) from error
                sent[0] = False
                time.sleep(self._timing.send_every)
        except BaseException:
            if sent[0]:
                self._remember(writes, [op.mark for op in ops])
            raise

    def _transact(self, documents: Sequence[Document], sent: list[bool]) -> None:
        """Insert documents and commit; set ``sent[0]`` just before the commit is sent."""
        tasks = self._connection.tasks
        # The end of the session rolls back an open transaction.
        with tasks.database.client.start_session() as session:
            # These options override the client's.
            session.start_transaction(
                ReadConcern("local"), tasks.write_concern, tasks.read_preference
            )
            tasks.insert_many(documents, session=session)
            sent[0] = True
            session.commit_transaction()

    def marked(self, writes: Sequence[tuple[Write, int]]) -> list[Write]:
        """Return those writes whose marks are on their documents, and deletes whose documents are gone."""
        wanted = {"_id": {"$in": [*{write.id for write, _ in writes}]}}
        tasks = self._connection.tasks
        found = self._connection.run(lambda: list(tasks.find(wanted, {"taskx.w": 1})))
        marks = {document["_id"]: ours_of(document).get("w", ()) for document in found}
        return [
            write
            for write, mark in writes
            if (mark in marks.get(write.id, ()))
            or (isinstance(write, Delete) and write.id not in marks)
        ]

    # --- one round

    def _send(self, ops: Sequence[Op]) -> list[bool]:
        """Send writes until their outcome is known, at most for the connection's time-out."""
        began = time.monotonic()
        deadline = began + self._connection.timeout
        patience = began + min(self._timing.abandon_after, self._connection.timeout / 4)
        sent = any(op.again for op in ops)
        due = ops
        while due:
            try:
                left = max(0.001, deadline - time.monotonic())
                with pymongo.timeout(left), self._connection.turns:
                    due = self._send_once(due, force=time.monotonic() >= patience)
            except FAILURES as error:
                sent = sent or may_have_been_sent(error)
                if not is_passing(error) or time.monotonic() + self._timing.send_every >= deadline:
                    raise translated(error, self._connection.name, in_doubt=sent) from error
                for op in due:
                    op.again = sent
            if due:
                time.sleep(self._timing.send_every)
        return [op.held for op in ops]

    def _send_once(self, ops: Sequence[Op], *, force: bool) -> list[Op]:
        """Send all writes; return the inserts to retry: a batch that may be abandoned holds their id."""
        for op in ops:
            if isinstance(op.write, Delete) and not op.held:
                op.held = self._delete(op)
        requests = [op for op in ops if not isinstance(op.write, Delete)]
        refused = self._write(requests) if requests else []
        refused = [op for op in refused if not self._lacks_what_is_unique(op)]
        ids = [op.write.id for op in refused]
        again = self._batches.make_way(ids, force) if ids else ()
        return [op for op in refused if op.write.id in again]

    def _lacks_what_is_unique(self, op: Op) -> bool:
        """Return True if a task with another id has one of the unique values of this new task."""
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

    def _delete(self, op: Op) -> bool:
        tasks = self._connection.tasks
        assert isinstance(op.write, Delete)
        # Not delete_one: the driver repeats it after an error, and its count may be wrong then.
        deleted = tasks.delete_many(guarded(op.write.id, op.write.guard)).deleted_count == 1
        # If it was sent before and the task is gone, it was applied.
        return deleted or (op.again and tasks.find_one({"_id": op.write.id}, {"_id": 1}) is None)

    def _write(self, ops: Sequence[Op]) -> list[Op]:
        """Send inserts and updates; return the inserts whose id was taken."""
        inserts = [op for op in ops if op.document is not None]
        updates = [op for op in ops if op.update is not None]
        matched, refused = self._bulk_write(inserts, updates)
        for index, op in enumerate(inserts):
            op.held = index not in refused
        for op in updates:
            op.held = matched == len(updates)
        # Their guards may have held when they were sent before, perhaps by the driver.
        if unclear := [op for op in ops if not op.held]:
            self._confirm_by_marks(unclear)
        return [op for op in inserts if not op.held]

    def _bulk_write(
        self, inserts: Sequence[Op], updates: Sequence[Op]
    ) -> tuple[int, Collection[int]]:
        """Return the number of updates that found their document, and the inserts whose id was taken."""
        tasks = self._connection.tasks
        documents = [op.document for op in inserts if op.document is not None]
        if not self._connection.is_real:
            changes = [op.update for op in updates if op.update is not None]
            return _write_one_by_one(tasks, documents, changes)
        # Inserts and updates need two commands; upserts and updates need only one.
        as_updates = bool(documents and updates) and all(map(_is_small, inserts))
        requests: list[InsertOne[Document] | UpdateOne | UpdateMany] = [
            *(map(_upsert, inserts) if as_updates else map(InsertOne, documents)),
            *_statements(updates),
        ]
        told = bulk_write(tasks, requests)
        refused = {failure["index"] for failure in told["writeErrors"]}
        matched: int = told["nMatched"]
        if as_updates:
            # A new document that was sent before is matched instead of inserted.
            inserted = {upsert["index"] for upsert in told["upserted"]}
            matched -= len({*range(len(inserts))} - inserted - refused)
        return matched, refused

    def _confirm_by_marks(self, ops: Sequence[Op]) -> None:
        """Mark those writes as held whose mark is on their document."""
        wanted = {
            "_id": {"$in": [op.write.id for op in ops]},
            "taskx.w": {"$in": [Int64(op.mark) for op in ops]},
        }
        found = {
            document["_id"]: document["taskx"]["w"]
            for document in self._connection.tasks.find(wanted, {"taskx.w": 1})
        }
        for op in ops:
            op.held = op.mark in found.get(op.write.id, ())


@attrs.define(eq=False)
class Op:
    """A write that is being sent."""

    write: Write
    mark: int
    again: bool
    document: Document | None = None
    update: tuple[Document, Document] | None = None
    held: bool = False


# --- what needs no server


def _next_round(
    writes: Sequence[Write],
    waiting: Mapping[str, list[int]],
    known: Mapping[str, Mapping[str, Any] | None],
) -> list[int]:
    """Return the next write of each task; skip writes that cannot hold after the ones before them."""
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
        return bool(state)  # {} after a write that did not hold: the task may not exist
    if state is None:
        return True
    guard = {name: wanted for name, wanted in write.guard.items() if name in state}
    return not matches(state, guard)


def _known_after(write: Write, held: bool) -> Mapping[str, Any] | None:
    """Return the columns of a task that are known after a write; None if the task does not exist.

    Nothing is known after a write whose guard failed, because the task may not exist.
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


def _statements(updates: Sequence[Op]) -> list[UpdateOne | UpdateMany]:
    """Return the requests for updates; updates that share a mark become one request."""
    alike: dict[int, list[Op]] = {}
    for op in updates:
        alike.setdefault(op.mark, []).append(op)
    return [_statement(ops) for ops in alike.values()]


def _statement(ops: Sequence[Op]) -> UpdateOne | UpdateMany:
    assert ops[0].update is not None
    found, changed = ops[0].update
    if len(ops) == 1:
        return UpdateOne(found, changed)
    ids = {"$in": [op.write.id for op in ops]}
    return UpdateMany({**found, "_id": ids}, changed, hint=_BY_ID)


def _is_small(op: Op) -> bool:
    """Return True if a new document is small enough to be sent as an upsert."""
    return isinstance(op.write, Insert) and len(op.write.row["params"]) <= _SMALL


def _upsert(op: Op) -> UpdateOne:
    """Return a new document as an upsert, so that it shares a command with the updates.

    It matches only a document with its own mark. If another task has its id, it is refused, as an insert
    would be.
    """
    assert op.document is not None
    found = {"_id": op.document["_id"], "taskx.w": {"$elemMatch": {"$eq": Int64(op.mark)}}}
    document = {name: value for name, value in op.document.items() if name != "_id"}
    return UpdateOne(found, {"$setOnInsert": document}, upsert=True)


def _was_rolled_back(error: Exception) -> bool:
    """Return True if a transaction whose commit failed certainly changed nothing."""
    return (
        isinstance(error, PyMongoError)
        and error.has_error_label("TransientTransactionError")
        and not error.has_error_label("UnknownTransactionCommitResult")
    )


def _refuse_if_too_large(document: Document, about: int) -> None:
    """Raise ``PayloadError`` for a document that is too large, before others are sent with it."""
    if about > MOST_BYTES // 2 and (size := len(bson.encode(document))) > MOST_BYTES:
        raise PayloadError("params", f"{size:,} bytes as BSON, but MongoDB allows {MOST_BYTES:,}")


def _update(write: Update, changes: Mapping[str, Any], mark: int) -> tuple[Document, Document]:
    """Return the filter and the changes of an update."""
    # If this object or the driver sends it again, it skips a document that has its mark.
    found = {**guarded(write.id, write.guard), "taskx.w": {"$nin": [Int64(mark)]}}
    changed: Document = {"$push": {"taskx.w": {"$each": [Int64(mark)], "$slice": -MARKS}}}
    # A unique index would also contain nulls, so a released value is removed instead of set to null.
    gone = [name for name in UNIQUE if name in changes and changes[name] is None]
    kept = {name: value for name, value in changes.items() if name not in gone}
    if kept:
        changed["$set"] = fields(kept)
    if gone:
        changed["$unset"] = {PATHS[name]: "" for name in gone}
    return found, changed


def _write_one_by_one(
    tasks: Any, documents: Sequence[Document], changes: Sequence[tuple[Document, Document]]
) -> tuple[int, Collection[int]]:
    """Insert and update documents by a mock of the driver, which does not have ``bulk_write``."""
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
