"""Notes: short texts kept under names, in a collection of their own."""

from __future__ import annotations

from bson.int64 import Int64
from pymongo.errors import DuplicateKeyError

from taskx.storage.base import Note, new_version
from taskx.storage.mongo.connection import Connection
from taskx.storage.mongo.filters import Document, text


class Notes:
    """Reads and writes notes.

    Args:
        connection: the way to the server.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def notes(self, prefix: str) -> dict[str, Note]:
        """All notes whose name begins so, by name."""
        wanted = {"_id": {"$gte": text(prefix, "prefix"), "$lt": prefix + "\U0010ffff"}}
        found = self._connection.run(lambda: list(self._connection.notes.find(wanted)))
        return {note["_id"]: Note(note["text"], int(note["version"])) for note in found}

    def put(self, name: str, value: str | None, version: int) -> bool:
        """Store a note, or with None remove it, if its version is still that one.

        Raises:
            RepositoryUnavailable: nothing was stored, unless its ``in_doubt`` is True.
        """
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
