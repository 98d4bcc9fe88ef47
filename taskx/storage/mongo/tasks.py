"""What is read of the tasks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from bson.int64 import Int64
from pymongo.errors import WriteError

from taskx.core.clock import to_datetime
from taskx.core.codec import Codecs
from taskx.core.model import Task, TaskFilter
from taskx.core.record import FOR_PARENTS, FOR_TURN, UNTIL_DUE, Ended, Stub
from taskx.storage.base import OLDEST
from taskx.storage.mongo.batches import Batches
from taskx.storage.mongo.connection import Connection
from taskx.storage.mongo.documents import (
    STUB_FIELDS,
    Document,
    batch_of,
    known_status,
    moment_ms,
    ours_of,
    stub_from_document,
    task_from_document,
)
from taskx.storage.mongo.filters import (
    BEST_FIRST,
    FOREIGN,
    HIDDEN,
    NEWEST_FIRST,
    OLDEST_FIRST,
    OWNED,
    VISIBLE,
    held,
    matching,
    startable,
    text,
    texts,
)
from taskx.storage.mongo.order import PER_MS

_MOST_IDS = 1000
_MOST_DOCUMENTS = 2**31 - 1
_ENDED_FIELDS = {
    **STUB_FIELDS,
    "taskx.depends_on": 1,
    "taskx.unique_lock": 1,
    "taskx.unique_scope": 1,
}


class Tasks:
    """Questions about the tasks.

    Args:
        connection: the way to the server.
        batches: who knows which tasks are hidden.
        adopt_foreign: whether pending tasks that the original stored are there to run.
        codecs: how values are stored.
    """

    def __init__(
        self, connection: Connection, batches: Batches, adopt_foreign: bool, codecs: Codecs
    ) -> None:
        self._codecs = codecs
        self._connection = connection
        self._batches = batches
        self._adopt_foreign = adopt_foreign

    # --- tasks

    def documents(self, task_ids: Sequence[str]) -> list[Document]:
        """The documents with these ids that exist and are not hidden."""
        return self._with_hidden("_id", task_ids)

    def _with_hidden(
        self, path: str, values: Sequence[str], fields: Mapping[str, int] | None = None
    ) -> list[Document]:
        """The documents with one of these values, with those of a batch that only looks hidden.

        It was committed, and whoever did so has not come to reveal all of it yet.
        """
        known = texts(values, path)
        shown = None if fields is None else {**fields, "taskx.batch": 1}
        found: list[Document] = []
        for start in range(0, len(known), _MOST_IDS):
            found += self._found({path: {"$in": known[start : start + _MOST_IDS]}}, shown)
        hidden = [document for document in found if batch_of(document)]
        if not hidden:
            return found
        return [d for d in found if not batch_of(d)] + self._connection.run(
            lambda: self._revealed(hidden, shown)
        )

    def _revealed(
        self, hidden: Sequence[Document], fields: Mapping[str, int] | None
    ) -> list[Document]:
        """Of documents that were hidden, those that are not, or should not be."""
        known = self._batches.reveal_committed([*{batch_of(document) for document in hidden}])
        # Somebody may have revealed the others since: of that their batch tells no more.
        others = [document["_id"] for document in hidden if batch_of(document) not in known]
        wanted = {"_id": {"$in": others}, **VISIBLE}
        again = self._connection.tasks.find(wanted, fields) if others else ()
        return [*(d for d in hidden if batch_of(d) in known), *again]

    def get_many(self, task_ids: Sequence[str]) -> dict[str, Task]:
        """The tasks with these ids that exist, by id."""
        return {
            document["_id"]: task_from_document(document, self._codecs)
            for document in self.documents(task_ids)
        }

    def list(self, filter: TaskFilter) -> Sequence[Task]:
        """The tasks that meet the filter, newest first."""
        if not filter.limit or filter.offset > _MOST_DOCUMENTS:
            return []

        def read() -> list[Document]:
            tasks = self._connection.tasks
            if tasks.find_one(HIDDEN, {"_id": 1}) is not None:
                self._batches.reveal_committed(self._batches.hidden())
            cursor = tasks.find({**matching(filter), **VISIBLE}).sort(NEWEST_FIRST)
            return list(cursor.skip(filter.offset).limit(min(filter.limit, _MOST_DOCUMENTS)))

        documents = self._connection.run(read)
        return [task_from_document(document, self._codecs) for document in documents]

    def count(self, filter: TaskFilter) -> int:
        """How many tasks meet the filter."""

        def read() -> int:
            # Not by one filter that says "not hidden": that would read every document.
            tasks, wanted = self._connection.tasks, matching(filter)
            hidden = tasks.count_documents({**wanted, **HIDDEN})
            if hidden and self._batches.reveal_committed(self._batches.hidden()):
                hidden = tasks.count_documents({**wanted, **HIDDEN})
            return max(0, tasks.count_documents(wanted) - hidden)

        return self._connection.run(read)

    # --- what the runtime asks

    def ready(
        self, types: Iterable[str], limit: int, owner: str = "", ageing: int = 0
    ) -> Sequence[Stub]:
        """Pending tasks of these types and this owner, best first."""
        kinds = texts(types, "type")
        if not kinds or limit <= 0:
            return []
        if self._adopt_foreign and not owner:
            self._adopt(kinds, limit)

        wanted = startable(kinds, text(owner, "owner"))
        if ageing:
            return self._by_age(wanted, limit, ageing)

        def read() -> list[Document]:
            cursor = self._connection.tasks.find(wanted, STUB_FIELDS)
            return list(cursor.sort(BEST_FIRST).limit(limit))

        return [stub_from_document(document) for document in self._connection.run(read)]

    def _by_age(self, wanted: Document, limit: int, ageing: int) -> Sequence[Stub]:
        """The first ones of each priority, sorted anew."""
        fields = {**STUB_FIELDS, "taskx.seq": 1}

        def read() -> list[Document]:
            tasks = self._connection.tasks
            found: list[Document] = []
            for priority in tasks.distinct("taskx.priority", wanted):
                level = tasks.find({**wanted, "taskx.priority": priority}, fields)
                found += level.sort(BEST_FIRST).limit(limit)
            return found

        found = [
            (stub_from_document(d), d["taskx"].get("seq", 0)) for d in self._connection.run(read)
        ]
        found.sort(key=lambda pair: (pair[0].rank(ageing), pair[1]))
        return [stub for stub, _ in found[:limit]]

    def _adopt(self, kinds: Sequence[str], limit: int) -> None:
        """Make pending tasks of the original's ours, each once: from then on they are guarded."""

        def adopt() -> None:
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
                with suppress(WriteError):  # one that has no room for more, say: the others have
                    tasks.update_one({**FOREIGN, "_id": document["_id"]}, {"$set": adopted})

        self._connection.run(adopt)

    def due(self, now: int, limit: int) -> Sequence[str]:
        """Ids of held back pending tasks whose time has come, earliest first."""
        if limit <= 0:
            return []

        def read() -> list[Document]:
            cursor = self._connection.tasks.find(
                held(UNTIL_DUE, run_at={"$lte": to_datetime(now)}), {"_id": 1}
            )
            return list(cursor.sort([("taskx.run_at", 1), ("_id", 1)]).limit(limit))

        return [document["_id"] for document in self._connection.run(read)]

    def next_due(self) -> int | None:
        """The earliest ``run_at`` of the held back pending tasks."""

        def read() -> list[Document]:
            cursor = self._connection.tasks.find(
                held(UNTIL_DUE, run_at={"$type": "date"}), {"taskx.run_at": 1}
            )
            return list(cursor.sort([("taskx.run_at", 1), ("_id", 1)]).limit(1))

        found = self._connection.run(read)
        return moment_ms(found[0]["taskx"]["run_at"]) if found else None

    def oldest_ready(self) -> int | None:
        """Since when the pending task has waited, of those that may start now, that waits longest."""

        def read() -> list[Document]:
            wanted = {"status": "pending", "taskx.held": 0, **VISIBLE}
            cursor = self._connection.tasks.find(wanted, {"created_at": 1, "taskx.run_at": 1})
            return list(cursor.sort(OLDEST_FIRST).limit(OLDEST))

        since = (
            max(created, moment_ms(document["taskx"].get("run_at")) or 0)
            for document in self._connection.run(read)
            if (created := moment_ms(document.get("created_at"))) is not None
        )
        return min(since, default=None)

    def owned(self, node: str, limit: int | None = None) -> Sequence[Stub]:
        """The running tasks that a node holds, and then the pending ones; at most ``limit``."""
        wanted = {"taskx.owner": text(node, "node"), **VISIBLE}
        if not node:
            return []

        def read() -> list[Document]:
            find = self._connection.tasks.find
            found = list(find({**wanted, "status": "running"}, STUB_FIELDS).limit(limit or 0))
            if limit is None or (left := limit - len(found)) > 0:
                rest = {**wanted, "status": {"$ne": "running"}}
                found += find(rest, STUB_FIELDS).limit(0 if limit is None else left)
            return found

        return [stub_from_document(document) for document in self._connection.run(read)]

    def owners(self) -> Sequence[str]:
        """The ids of all nodes that hold tasks, or on which one is stuck."""

        def read() -> list[str]:
            tasks = self._connection.tasks
            stuck = {"taskx.stuck_on": {"$gt": ""}, **VISIBLE}
            return [
                *{*tasks.distinct("taskx.owner", OWNED), *tasks.distinct("taskx.stuck_on", stuck)}
            ]

        return self._connection.run(read)

    def stuck_on(self, node: str) -> Sequence[Stub]:
        """The tasks that a thread of an ended attempt still runs on a node."""
        wanted = {"taskx.stuck_on": text(node, "node"), **VISIBLE}
        found = self._found(wanted, STUB_FIELDS) if node else []
        return [stub_from_document(document) for document in found]

    def _found(self, wanted: Document, fields: Mapping[str, int] | None) -> Sequence[Document]:
        return self._connection.run(lambda: list(self._connection.tasks.find(wanted, fields)))

    def _found_by(
        self, path: str, values: Sequence[str], fields: Mapping[str, int]
    ) -> Iterator[Document]:
        known = texts(values, path)
        for start in range(0, len(known), _MOST_IDS):
            some = known[start : start + _MOST_IDS]
            yield from self._found({path: {"$in": some}, **VISIBLE}, fields)

    # --- parents, keys and lines

    def statuses(self, task_ids: Sequence[str]) -> dict[str, str]:
        """The status of each of these tasks that exists, by id."""
        found = self._with_hidden("_id", task_ids, {"status": 1})
        return {document["_id"]: known_status(document["status"]) for document in found}

    def asked_to_cancel(self, task_ids: Sequence[str]) -> Sequence[str]:
        """Return the ids of these tasks whose cancel was requested."""
        found = self._with_hidden("_id", task_ids, {"taskx.cancel_requested_at": 1})
        return [
            document["_id"]
            for document in found
            if (document.get("taskx") or {}).get("cancel_requested_at") is not None
        ]

    def unique_holders(self, keys: Sequence[str]) -> dict[str, str]:
        """Which task holds each of these unique keys, by key."""
        path = "taskx.unique_lock"
        found = self._with_hidden(path, keys, {path: 1})
        return {document["taskx"]["unique_lock"]: document["_id"] for document in found}

    def awaited(self, after: str, limit: int) -> Sequence[str]:
        """The ids that waiting tasks wait on, in order, from the one after ``after``."""
        wanted = held(FOR_PARENTS, waiting_on={"$gt": text(after, "after")})
        return self._different("waiting_on", wanted, limit)

    def _different(self, name: str, wanted: Document, limit: int) -> Sequence[str]:
        """The values that the next ``limit`` documents have of a field of ours, in order.

        Not by ``distinct``, whose answer must fit into one document.
        """
        path = f"taskx.{name}"

        def read() -> list[Document]:
            return list(self._connection.tasks.find(wanted, {path: 1}).sort(path, 1).limit(limit))

        return list(dict.fromkeys(d["taskx"][name] for d in self._connection.run(read)))

    def waiting_for(self, task_ids: Sequence[str]) -> Sequence[str]:
        """The tasks that wait on one of these."""
        found = self._found_by("taskx.waiting_on", task_ids, {"_id": 1})
        return [document["_id"] for document in found]

    def next_in_line(self, key: str) -> str | None:
        """The first task of a concurrency key that waits for its turn."""
        wanted = held(FOR_TURN, concurrency_key=text(key, "concurrency_key"))

        def read() -> list[Document]:
            cursor = self._connection.tasks.find(wanted, {"_id": 1})
            return list(cursor.sort([("taskx.seq", 1), ("_id", 1)]).limit(1))

        found = self._connection.run(read)
        return found[0]["_id"] if found else None

    def lines(self, after: str, limit: int) -> dict[str, bool]:
        """Concurrency keys of tasks that wait for their turn, and whether each stands still."""
        wanted = held(FOR_TURN, concurrency_key={"$gt": text(after, "after")})
        keys = self._different("concurrency_key", wanted, limit)
        moving = {
            document["taskx"]["turn"]
            for document in self._found_by("taskx.turn", keys, {"taskx.turn": 1})
        }
        return {key: key not in moving for key in keys}

    def ended(self, status: str, before: int, limit: int, after: Any = None) -> Sequence[Ended]:
        """Tasks of a finished status that ended before a moment, newest first."""
        moment = {"$lt": to_datetime(before)}
        # The index is by status and creation, and a task was created before it ended.
        wanted: Document = {"status": text(status, "status")}
        wanted.update({"created_at": moment, "completed_at": moment})
        wanted["taskx.stuck_on"] = {"$in": ["", None]}
        if after is not None:
            created_at, task_id = to_datetime(after[0]), after[1]
            wanted["created_at"] = {"$lte": created_at}
            wanted["$or"] = [{"created_at": {"$lt": created_at}}, {"_id": {"$lt": task_id}}]
        wanted["_id"] = {"$type": "string"}  # what has none is no task

        def read() -> list[Document]:
            cursor = self._connection.tasks.find({**wanted, **VISIBLE}, _ENDED_FIELDS)
            return list(cursor.sort(NEWEST_FIRST).limit(limit))

        return [_ended(document) for document in self._connection.run(read)]

    def needed(self, task_ids: Sequence[str]) -> set[str]:
        """Return the ids of these on which a stored task depends that is not one of these."""
        ids, path = texts(task_ids, "id"), "taskx.depends_on"
        # Hidden ones, too: they may be there the next moment.
        others = {"_id": {"$nin": ids}}

        def read() -> set[str]:
            find = self._connection.tasks.find_one
            if find({path: {"$in": ids}, **others}, {"_id": 1}) is None:
                return set()
            # One by one: of one that many depend on, one is enough.
            return {i for i in ids if find({path: i, **others}, {"_id": 1}) is not None}

        return self._connection.run(read)

    def children(self, task_ids: Sequence[str]) -> Sequence[str]:
        """The tasks that depend on one of these, each once."""
        found = self._found_by("taskx.depends_on", task_ids, {"_id": 1})
        return list(dict.fromkeys(document["_id"] for document in found))

    def unfinished(self, types: Iterable[str]) -> bool:
        """Whether a task of these types runs on a node, or is pending and not held back."""
        common = {"type": {"$in": texts(types, "type")}, "taskx.held": 0}
        free: dict[str, Any] = {**common, "status": "pending", "taskx.owner": "", **VISIBLE}
        # Three looks, as a task may move from the one to the other between two of them.
        wanted = [free, {**OWNED, **common}, free]
        if self._adopt_foreign:
            wanted.append({**FOREIGN, "type": common["type"]})
        tasks = self._connection.tasks
        return self._connection.run(
            lambda: any(tasks.find_one(some, {"_id": 1}) is not None for some in wanted)
        )


def _ended(document: Document) -> Ended:
    stub, ours = stub_from_document(document), document.get("taskx") or {}
    parents = ours.get("depends_on")
    return Ended(
        stub,
        parents if isinstance(parents, list) else (),
        ours.get("unique_lock"),
        ours.get("unique_scope"),
        (stub.created_at, stub.id),
    )
