"""The floor on MongoDB: TaskX's own documents and indexes, written with its write concern."""

from __future__ import annotations

from typing import Any

from bson.int64 import Int64

from benchmarks.loops import Loop, created, started_and_finished
from taskx.stores.mongo.connection import Connection, Url
from taskx.stores.mongo.documents import MARKS, fields, new_document
from taskx.stores.mongo.filters import guarded, make_indexes
from taskx.tasks.ids import new_id
from taskx.tasks.timing import DEFAULT_TIMING
from taskx.tasks.writes import Update

Document = dict[str, Any]
_TIMEOUT = 10.0


class MongoLoop(Loop):
    """The floor: ``insert_one``; ``find_one`` and ``update_one`` for a start, as in TaskX; ``update_one``.

    Args:
        url: the database.
        count: the number of tasks.
        at_once: start with one ``find_one_and_update``. It depends on the server which way is faster.
    """

    def __init__(self, url: str, count: int, *, at_once: bool = False) -> None:
        self.count = count
        self._at_once = at_once
        self._connection = Connection(
            "tasks", Url(url), timeout=_TIMEOUT, write_concern=None, timing=DEFAULT_TIMING
        )
        make_indexes(self._connection)
        self._tasks = self._connection.tasks
        self._ids = [new_id() for _ in range(count)]
        self._documents = [
            new_document(created(id_).row, number, number) for number, id_ in enumerate(self._ids)
        ]
        start, finish = started_and_finished("?")
        self._start, self._finish = _as_sent(start, 2 * count), _as_sent(finish, 3 * count)

    def close(self) -> None:
        """Close the client."""
        self._connection.close()

    def store(self, index: int) -> None:
        self._tasks.insert_one(self._documents[index])

    def insert_many(self) -> None:
        self._tasks.insert_many(self._documents)

    def start(self, index: int) -> None:
        own, (found, changed) = {"_id": self._ids[index]}, self._start
        if self._at_once:
            assert self._tasks.find_one_and_update({**found, **own}, changed) is not None
        else:
            assert self._tasks.find_one(own) is not None
            self._update(own, found, changed)

    def finish(self, index: int) -> None:
        self._update({"_id": self._ids[index]}, *self._finish)

    def _update(self, own: Document, found: Document, changed: Document) -> None:
        assert self._tasks.update_one({**found, **own}, changed).matched_count == 1


def _as_sent(update: Update, mark: int) -> tuple[Document, Document]:
    """Return an update as TaskX sends it, with a mark by which it is recognised later."""
    found = {**guarded(update.id, update.guard), "taskx.w": {"$nin": [Int64(mark)]}}
    push = {"taskx.w": {"$each": [Int64(mark)], "$slice": -MARKS}}
    return found, {"$push": push, "$set": fields(update.changes)}
