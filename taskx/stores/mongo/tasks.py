"""The queries for tasks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from bson.int64 import Int64
from pymongo import InsertOne, UpdateOne
from pymongo.errors import DuplicateKeyError, WriteError

from taskx.stores.base import Fields, Listed, Lookup, Reads, Repository, Rows, Timed, new_version
from taskx.stores.mongo.batches import Batches
from taskx.stores.mongo.connection import PER_MS, Connection, bulk_write
from taskx.stores.mongo.documents import (
    Document,
    batch_of,
    moment_ms,
    ours_of,
    row_from_document,
    shown,
    task_from_document,
)
from taskx.stores.mongo.filters import (
    BEST_FIRST,
    EXPIRES,
    FOREIGN,
    HIDDEN,
    NEWEST_FIRST,
    OLDEST_FIRST,
    VISIBLE,
    following,
    held,
    matching,
    place_of,
    text,
    texts,
)
from taskx.tasks.clock import Clock, to_datetime
from taskx.tasks.codec import Codec, Codecs
from taskx.tasks.model import CONDITIONS, Task, TaskFilter
from taskx.tasks.record import (
    FOR_PARENTS,
    FOR_TURN,
    FREE,
    STUB,
    UNTIL_DUE,
    Ended,
    Stub,
    parents_from_text,
    stub_from_values,
)
from taskx.tasks.timing import Timing
from taskx.tasks.writes import Note, NoteChange

_MOST_VALUES = 1000
_MOST_DOCUMENTS = 2**31 - 1
_FOR_ENDED = (*STUB, "depends_on", "unique_lock", "unique_scope")


class _LookupField(NamedTuple):
    """The field of a lookup column, in some of the documents.

    Attributes:
        path: the path of the field.
        among: the query for the documents.
        reveals: True to find also a hidden task whose batch was committed. The process that committed it
            has not revealed all of its tasks yet.
    """

    path: str
    among: Document
    reveals: bool = False


#: All lookup columns.
LOOKUPS = {
    "id": _LookupField("_id", {}, reveals=True),
    "unique_lock": _LookupField("taskx.unique_lock", {}, reveals=True),
    "turn": _LookupField("taskx.turn", VISIBLE),
    "waiting_on": _LookupField("taskx.waiting_on", held(FOR_PARENTS)),
    "parent": _LookupField("taskx.depends_on", {}),  # hidden tasks, too: they may soon be visible
    "line": _LookupField("taskx.concurrency_key", held(FOR_TURN)),
    "running_on": _LookupField("taskx.owner", {"status": "running", **VISIBLE}),
    "buffered_on": _LookupField("taskx.owner", held(FREE)),
    "stuck_on": _LookupField("taskx.stuck_on", VISIBLE),
    "ready_type": _LookupField("type", held(FREE)),
}


class Tasks(Repository):
    """Reads tasks, and reads and writes notes, in the collections of a connection.

    Args:
        connection: the collections, perhaps as a transaction sees them.
        batches: reveals hidden tasks.
        adopt_foreign: True to run pending tasks that the original stored.
    """

    conditions = CONDITIONS

    def __init__(
        self,
        connection: Connection,
        batches: Batches,
        clock: Clock,
        codec: Codec | Iterable[Codec] | Codecs | None,
        timing: Timing,
        *,
        adopt_foreign: bool = False,
    ) -> None:
        super().__init__(clock, codec, timing)
        self._connection = connection
        self._batches = batches
        self._adopt_foreign = adopt_foreign
        self.reads = self._reads = DocumentReads(self, connection, batches)

    def read(
        self,
        wanted: Document,
        fields: Sequence[str],
        limit: int,
        order: Sequence[tuple[str, int]] = (),
    ) -> list[Document]:
        """Return the documents that a query finds, with the fields that hold these columns."""
        if limit <= 0:
            return []  # for the driver, 0 means no limit

        def find() -> list[Document]:
            cursor = self._connection.tasks.find(wanted, shown(fields))
            return list((cursor.sort(order) if order else cursor).limit(limit))

        return self._connection.run(find)

    # --- by a column

    def find(
        self, column: Lookup, values: Sequence[str], fields: Fields, limit: int | None = None
    ) -> Rows:
        known = [value for value in texts(values, column) if value]
        most = _MOST_DOCUMENTS if limit is None else limit
        rows: list[tuple[Any, ...]] = []
        for start in range(0, len(known), _MOST_VALUES):
            some = known[start : start + _MOST_VALUES]
            rows += self._rows(column, some, fields, most - len(rows))
        return rows[:most]

    def _rows(
        self, column: Lookup, values: Sequence[str], fields: Fields, limit: int
    ) -> list[tuple[Any, ...]]:
        where = LOOKUPS[column]
        wanted = {**where.among, where.path: {"$in": values}}
        if column == "parent":
            return _pairs(self.read(wanted, ("depends_on",), limit), {*values}, fields)
        order = [("taskx.seq", 1)] if column == "line" else ()
        found = self.read(wanted, fields, _MOST_DOCUMENTS if where.reveals else limit, order)
        if where.reveals:
            found = self._revealed(found, fields)
        return [tuple(row_from_document(document, fields).values()) for document in found]

    def _revealed(self, found: list[Document], fields: Sequence[str]) -> list[Document]:
        """Return the documents without those that are rightly hidden."""
        hidden = [document for document in found if batch_of(document)]
        if not hidden:
            return found
        batches = [*{batch_of(document) for document in hidden}]
        committed = self._connection.run(lambda: self._batches.reveal_committed(batches))
        # The others may have been revealed in the meantime: their batch's decision is deleted then.
        others = [d["_id"] for d in hidden if batch_of(d) not in committed]
        again = {"_id": {"$in": others}, **VISIBLE}
        return [
            *(d for d in found if not batch_of(d) or batch_of(d) in committed),
            *self.read(again, fields, len(others)),
        ]

    def distinct(self, column: Listed, after: str, limit: int) -> Sequence[str]:
        """Return the next values of a column, in order.

        This does not use the server's ``distinct``, whose answer must fit into one document.
        """
        path, among, _ = LOOKUPS[column]
        name = path.removeprefix("taskx.")
        values: dict[str, None] = {}
        after = text(after, "after")
        while (most := limit - len(values)) > 0:
            found = self.read({**among, path: {"$gt": after}}, (name,), most, [(path, 1)])
            values.update(dict.fromkeys(row_from_document(d, (name,))[name] for d in found))
            if len(found) < most:
                break
            after = next(reversed(values))  # many documents may have the same value
        return [*values]

    # --- by a filter

    def list(self, filter: TaskFilter) -> Sequence[Task]:
        return self.reads.list_after(filter)[0]

    def count(self, filter: TaskFilter) -> int:
        return self._reads.count_to(filter, None)

    # --- by the next step

    def ready(
        self, types: Iterable[str], limit: int, owner: str = "", ageing: int = 0
    ) -> Sequence[Stub]:
        kinds = texts(types, "type")
        if not kinds or limit <= 0:
            return []
        if not owner:
            self._prepare(kinds, limit)
        wanted = {**held(FREE, owner=text(owner, "owner")), "type": {"$in": kinds}}
        if ageing:
            return self._ready_by_age(wanted, limit, ageing)
        found = self.read(wanted, STUB, limit, BEST_FIRST)
        return [_stub(document) for document in found]

    def _ready_by_age(self, wanted: Document, limit: int, ageing: int) -> Sequence[Stub]:
        """Return the first tasks of each priority, sorted by priority and age together."""
        tasks = self._connection.tasks
        found: list[Document] = []
        for priority in self._connection.run(lambda: tasks.distinct("taskx.priority", wanted)):
            level = {**wanted, "taskx.priority": priority}
            found += self.read(level, (*STUB, "seq"), limit, BEST_FIRST)
        ranked = [(_stub(d), ours_of(d).get("seq", 0)) for d in found]
        ranked.sort(key=lambda pair: (pair[0].rank(ageing), pair[1]))
        return [stub for stub, _ in ranked[:limit]]

    def _prepare(self, kinds: Sequence[str], limit: int) -> None:
        """Recover incomplete batches and adopt tasks of the original, so that their tasks are found."""
        self._batches.recover_if_due()
        if self._adopt_foreign:
            self._connection.run(lambda: self._adopt(kinds, limit))

    def _adopt(self, kinds: Sequence[str], limit: int) -> None:
        """Adopt pending tasks of the original, each one once; guards apply to them from then on."""
        tasks = self._connection.tasks
        wanted = {**FOREIGN, "type": {"$in": [*kinds]}}
        seen = {"created_at": 1, "taskx.held": 1}
        for document in list(tasks.find(wanted, seen).sort(OLDEST_FIRST).limit(limit)):
            created = moment_ms(document.get("created_at")) or 0
            adopted = {
                "taskx.owner": "",
                "taskx.held": ours_of(document).get("held", 0),
                "taskx.seq": Int64(max(created, 0) * PER_MS),
            }
            with suppress(WriteError):  # for example a full document; the others are adopted
                tasks.update_one({**FOREIGN, "_id": document["_id"]}, {"$set": adopted})

    def due(
        self, before: int | None, limit: int, column: Timed = "run_at"
    ) -> Sequence[tuple[str, int]]:
        path = f"taskx.{column}"
        moment: Document = {"$type": "date"} if before is None else {"$lte": to_datetime(before)}
        if column == "run_at":
            wanted = held(UNTIL_DUE, run_at=moment)
        else:
            wanted = {"status": "pending", path: {**EXPIRES, **moment}, **VISIBLE}
        found = self.read(wanted, (column,), limit, [(path, 1), ("_id", 1)])
        rows = [row_from_document(document, ("id", column)) for document in found]
        return [(row["id"], row[column]) for row in rows]

    def ended(self, status: str, before: int, limit: int, after: Any = None) -> Sequence[Ended]:
        moment = {"$lt": to_datetime(before)}
        wanted: Document = {
            "status": text(status, "status"),
            # The index has status and creation time, and a task is created before it ends.
            "created_at": moment,
            "completed_at": moment,
            "taskx.stuck_on": {"$in": ["", None]},
            "_id": {"$type": "string"},  # a document with another id is not a task
            **VISIBLE,
        }
        if after is not None:
            created_at, task_id = to_datetime(after[0]), after[1]
            wanted["created_at"] = {"$lte": created_at}
            wanted["$or"] = [{"created_at": {"$lt": created_at}}, {"_id": {"$lt": task_id}}]
        return [_ended(d) for d in self.read(wanted, _FOR_ENDED, limit, NEWEST_FIRST)]

    # --- notes

    def notes(self, prefix: str) -> dict[str, Note]:
        wanted = {"_id": {"$gte": text(prefix, "prefix"), "$lt": prefix + "\U0010ffff"}}
        return self.find_notes(wanted)

    def find_notes(self, wanted: Document, limit: int = 0) -> dict[str, Note]:
        """Return the first ``limit`` notes that a query finds, by name; all of them if it is 0."""
        notes = self._connection.notes
        query = lambda: list(notes.find(wanted).sort("_id", 1).limit(limit))  # noqa: E731
        found = self._connection.run(query)
        return {note["_id"]: Note(note["text"], int(note["version"])) for note in found}

    def put_notes(self, changes: Sequence[NoteChange]) -> Sequence[bool]:
        together = len(changes) > 1 and all(value is not None for _, value, _ in changes)
        if together and self._connection.is_real:  # a mock does not support it
            return self._put_all(changes)
        return [self._put(*change) for change in changes]

    def _put_all(self, changes: Sequence[NoteChange]) -> Sequence[bool]:
        """Store notes in one request, or in two if only some of them are new.

        The server answers which of the new ones it refused, but only how many of the others it changed.
        """
        requests = [
            UpdateOne(
                {"_id": text(name, "name"), "version": Int64(version)},
                {"$set": {"text": value}, "$inc": {"version": Int64(1)}},
            )
            if version
            else InsertOne(_new_note(name, value))
            for name, value, version in changes
        ]
        notes = self._connection.notes
        told = self._connection.write(lambda: bulk_write(notes, requests))
        refused = {failure["index"] for failure in told["writeErrors"]}
        held = [index not in refused for index in range(len(changes))]
        if told["nMatched"] < sum(bool(change.version) for change in changes):
            wanted = {"_id": {"$in": [change.name for change in changes if change.version]}}
            found = self._connection.run(lambda: list(notes.find(wanted)))
            now = {note["_id"]: (note["text"], int(note["version"])) for note in found}
            for index, (name, value, version) in enumerate(changes):
                if version:
                    held[index] = now.get(name) == (value, version + 1)
        return held

    def _put(self, name: str, value: str | None, version: int) -> bool:
        notes = self._connection.notes
        if not version and value is None:
            return name not in self.notes(name)
        known = {"_id": text(name, "name"), "version": Int64(version)}
        if not version:
            return self._connection.write(lambda: self._insert(_new_note(name, value)))
        if value is None:
            return self._connection.write(lambda: notes.delete_one(known).deleted_count == 1)
        change = {"$set": {"text": value}, "$inc": {"version": Int64(1)}}
        return self._connection.write(lambda: notes.update_one(known, change).matched_count == 1)

    def _insert(self, document: Document) -> bool:
        try:
            self._connection.notes.insert_one(document)
        except DuplicateKeyError:
            return False
        return True


def _new_note(name: str, value: str | None) -> Document:
    return {"_id": text(name, "name"), "text": value, "version": Int64(new_version())}


class DocumentReads(Reads):
    """The reads as queries.

    Args:
        store: the repository to read.
        connection: its collections.
        batches: reveals hidden tasks.
    """

    def __init__(self, store: Tasks, connection: Connection, batches: Batches) -> None:
        super().__init__(store)
        self._connection = connection
        self._batches = batches
        self._read, self._find_notes = store.read, store.find_notes

    def list_after(self, filter: TaskFilter, after: Any = None) -> tuple[Sequence[Task], Any]:
        self._repository.refuse_unknown_conditions(filter)
        if not filter.limit or filter.offset > _MOST_DOCUMENTS:
            return [], after
        limit = min(filter.limit, _MOST_DOCUMENTS)

        def read() -> list[Document]:
            tasks = self._connection.tasks
            if tasks.find_one(HIDDEN, {"_id": 1}) is not None:
                self._batches.reveal_committed(self._batches.hidden())
            found: list[Document] = []
            for wanted in following(matching(filter), after):
                if len(found) < limit:
                    cursor = tasks.find({**wanted, **VISIBLE}).sort(NEWEST_FIRST)
                    found += cursor.skip(filter.offset).limit(limit - len(found))
            return found

        documents = self._connection.run(read)
        tasks = [task_from_document(document, self._repository.codecs) for document in documents]
        return tasks, place_of(documents[-1]) if documents else after

    def count_to(self, filter: TaskFilter, most: int | None) -> int:
        self._repository.refuse_unknown_conditions(filter)

        def read() -> int:
            # Not one query with the condition "not hidden", which would read every document.
            tasks, wanted = self._connection.tasks, matching(filter)
            hidden = tasks.count_documents({**wanted, **HIDDEN})
            if hidden and self._batches.reveal_committed(self._batches.hidden()):
                hidden = tasks.count_documents({**wanted, **HIDDEN})
            if most is None:
                return max(0, tasks.count_documents(wanted) - hidden)
            if not most:
                return 0
            found = tasks.count_documents(wanted, limit=min(most + hidden, _MOST_DOCUMENTS))
            return max(0, min(found - hidden, most))

        return self._connection.run(read)

    def count_by_status(self, filter: TaskFilter, most: int) -> dict[str, int]:
        self._repository.refuse_unknown_conditions(filter)
        steps: list[Document] = [
            {"$match": {**matching(filter), **VISIBLE}},
            {"$limit": min(most, _MOST_DOCUMENTS)},
            {"$group": {"_id": "$status", "count": {"$sum": 1}}},
        ]
        tasks = self._connection.tasks
        found = self._connection.run(lambda: [*tasks.aggregate(steps)])
        return {d["_id"]: d["count"] for d in found if isinstance(d["_id"], str)}

    def flows(self, before: str, limit: int) -> Sequence[str]:
        found: list[str] = []
        earlier: Document = {"$lt": text(before, "before")} if before else {}
        while len(found) < limit:
            wanted = {"taskx.flow": {"$gt": "", **earlier}, **VISIBLE}
            last = self._read(wanted, ("flow",), 1, [("taskx.flow", -1)])
            if not last:
                break
            found.append(ours_of(last[0])["flow"])
            earlier = {"$lt": found[-1]}
        return found

    def count_ready(self, type: str, owner: str, at_most: int) -> int:
        wanted = {**held(FREE, owner=text(owner, "owner")), "type": text(type, "type")}
        tasks = self._connection.tasks
        return self._connection.run(lambda: tasks.count_documents(wanted, limit=at_most))

    def newest(self, status: str, limit: int, fields: Fields) -> Rows:
        # As in ``ended``: the index has the status, and a document with another id is not a task.
        wanted = {"status": text(status, "status"), "_id": {"$type": "string"}, **VISIBLE}
        found = self._read(wanted, fields, limit, NEWEST_FIRST)
        return [tuple(row_from_document(document, fields).values()) for document in found]

    def notes_named(self, names: Sequence[str]) -> dict[str, Note]:
        return self._find_notes({"_id": {"$in": [text(name, "name") for name in names]}})

    def notes_after(self, prefix: str, after: str, limit: int) -> dict[str, Note]:
        wanted = {"_id": {"$gt": text(after, "after"), "$lt": prefix + "\U0010ffff"}}
        return self._find_notes(wanted, limit)


def _pairs(
    found: Sequence[Document], parents: set[str], fields: Sequence[str]
) -> list[tuple[Any, ...]]:
    """Return a row for each pair of a document and one of these parents."""
    pairs = [
        {"parent": parent, "id": document["_id"]}
        for document in found
        for parent in dict.fromkeys(_texts_in(ours_of(document).get("depends_on")))
        if parent in parents
    ]
    return [tuple(pair[name] for name in fields) for pair in pairs]


def _texts_in(values: Any) -> list[str]:
    return [value for value in values if isinstance(value, str)] if isinstance(values, list) else []


def _stub(document: Document) -> Stub:
    return stub_from_values([*row_from_document(document, STUB).values()])


def _ended(document: Document) -> Ended:
    *stub, parents, lock, scope = row_from_document(document, _FOR_ENDED).values()
    made = stub_from_values(stub)
    return Ended(made, parents_from_text(parents), lock, scope, (made.created_at, made.id))
