"""Notes: short texts kept under names, in a collection of their own."""

from __future__ import annotations

from collections.abc import Sequence

from bson.int64 import Int64
from pymongo import UpdateOne
from pymongo.errors import DuplicateKeyError

from taskx.core.writes import Note, NoteChange
from taskx.storage.base import Repository, new_version
from taskx.storage.mongo.connection import Connection
from taskx.storage.mongo.documents import Document
from taskx.storage.mongo.filters import text


class Notes(Repository):
    """Reads and writes notes."""

    _connection: Connection

    def notes(self, prefix: str) -> dict[str, Note]:
        wanted = {"_id": {"$gte": text(prefix, "prefix"), "$lt": prefix + "\U0010ffff"}}
        found = self._connection.run(lambda: list(self._connection.notes.find(wanted)))
        return {note["_id"]: Note(note["text"], int(note["version"])) for note in found}

    def put_notes(self, changes: Sequence[NoteChange]) -> Sequence[bool]:
        together = len(changes) > 1 and all(value and version for _, value, version in changes)
        if together and self._connection.is_real:  # a mock cannot
            return self._change_all(changes)
        return [self._put(*change) for change in changes]

    def _change_all(self, changes: Sequence[NoteChange]) -> Sequence[bool]:
        """Change notes in one message to the server, which tells only how many it changed."""
        orders = [
            UpdateOne(
                {"_id": text(name, "name"), "version": Int64(version)},
                {"$set": {"text": value}, "$inc": {"version": Int64(1)}},
            )
            for name, value, version in changes
        ]
        notes = self._connection.notes
        done = self._connection.write(lambda: notes.bulk_write(orders, ordered=False))
        if done.matched_count == len(changes):
            return [True] * len(changes)
        wanted = {"_id": {"$in": [change.name for change in changes]}}
        found = self._connection.run(lambda: list(notes.find(wanted)))
        now = {note["_id"]: (note["text"], int(note["version"])) for note in found}
        return [now.get(name) == (value, version + 1) for name, value, version in changes]

    def _put(self, name: str, value: str | None, version: int) -> bool:
        notes = self._connection.notes
        if not version and value is None:
            return name not in self.notes(name)
        known = {"_id": text(name, "name"), "version": Int64(version)}
        if not version:
            new = {"_id": name, "text": value, "version": Int64(new_version())}
            return self._connection.write(lambda: self._insert(new))
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
