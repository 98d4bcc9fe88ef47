"""The floor on MongoDB: TaskX's own documents and indexes, written with its write concern."""

from __future__ import annotations

from typing import Any

from bson.int64 import Int64

from benchmarks.loops import Loop, created, started_and_finished
from taskx.core.ids import new_id
from taskx.core.writes import Update
from taskx.storage.mongo.connection import Connection
from taskx.storage.mongo.documents import MARKS, fields, new_document
from taskx.storage.mongo.filters import guarded
from taskx.storage.mongo.indexes import make_indexes

Document = dict[str, Any]
_TIMEOUT = 10.0


class MongoLoop(Loop):
    """One round trip each: ``insert_one``, ``find_one_and_update`` to start, ``update_one`` to finish."""

    def __init__(self, url: str, count: int) -> None:
        self.count = count
        self._connection = Connection("tasks", url=url, timeout=_TIMEOUT, write_concern=None)
        make_indexes(self._connection)
        self._tasks = self._connection.tasks
        self._ids = [new_id() for _ in range(count)]
        self._documents = [
            new_document(created(id_).row, number, number) for number, id_ in enumerate(self._ids)
        ]
        start, finish = started_and_finished()
        self._start, self._finish = _as_sent(start, 2 * count), _as_sent(finish, 3 * count)

    def close(self) -> None:
        """Close the client."""
        self._connection.close()

    def store(self, index: int) -> None:
        self._tasks.insert_one(self._documents[index])

    def insert_many(self) -> None:
        self._tasks.insert_many(self._documents)

    def start(self, index: int) -> None:
        found, changed = self._start
        started = self._tasks.find_one_and_update({**found, "_id": self._ids[index]}, changed)
        assert started is not None

    def finish(self, index: int) -> None:
        found, changed = self._finish
        done = self._tasks.update_one({**found, "_id": self._ids[index]}, changed)
        assert done.matched_count == 1


def _as_sent(update: Update, mark: int) -> tuple[Document, Document]:
    """An update as TaskX sends it: it leaves a mark, by which it is known again."""
    found = {**guarded(update.id, update.guard), "taskx.w": {"$nin": [Int64(mark)]}}
    push = {"taskx.w": {"$each": [Int64(mark)], "$slice": -MARKS}}
    return found, {"$push": push, "$set": fields(update.changes)}
