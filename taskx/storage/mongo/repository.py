"""The repository on one MongoDB collection."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast
from urllib.parse import parse_qsl, urlencode, urlsplit

import pymongo
from bson.int64 import Int64
from pymongo import UpdateOne
from pymongo.database import Database
from pymongo.errors import DuplicateKeyError
from pymongo.write_concern import WriteConcern

from taskx.core.checks import check_number
from taskx.core.clock import SYSTEM_CLOCK, Clock
from taskx.core.codec import Codec
from taskx.core.errors import ConfigurationError
from taskx.core.record import UNIQUE
from taskx.core.writes import Delete, Insert, Note, NoteChange, Write
from taskx.storage.base import new_version, tell_of_forks
from taskx.storage.mongo.batches import Batches
from taskx.storage.mongo.changes import Changes
from taskx.storage.mongo.connection import Connection, Order, Url
from taskx.storage.mongo.documents import Document
from taskx.storage.mongo.filters import make_indexes, text
from taskx.storage.mongo.sender import Sender
from taskx.storage.mongo.tasks import Tasks

_SHORTEST_LEASE = 0.5


class MongoRepository(Tasks):
    """Keeps tasks in a MongoDB collection, which processes on several hosts may share.

    The documents are those of the original TaskX, so that a Go service and a Python one can share the
    collection. A standalone server will do; there is one connection pool, that of the database given.

    Args:
        database: a pymongo ``Database``.
        collection: the collection of the tasks; ``{collection}.batches`` and ``{collection}.notes``
            are used beside it.
        lease_timeout: seconds after which a node that shows no life is dead, and its tasks are run
            elsewhere. The same for all processes on the collection.
        timeout: seconds that an operation may take before it raises ``RepositoryUnavailable``.
        poll_interval: seconds between looks for changes where the server has no change streams.
        adopt_foreign: whether to run pending tasks that the original stored. Only where no process of
            the original's is alive that might run them, too.
        write_concern: a pymongo ``WriteConcern``; majority with journal unless given.
        run_folder: where the lock files of this host's nodes are; a temporary folder unless given.
        clock: what the eight methods stamp records with, and leases are measured by.
        codec: what params, results and checkpoints are stored with; of several, the first one writes.

    Raises:
        ConfigurationError: an argument is not valid, or pymongo is not installed.
    """

    def __init__(
        self,
        database: Database[Any],
        collection: str = "tasks",
        *,
        lease_timeout: float = 30.0,
        timeout: float = 10.0,
        poll_interval: float = 1.0,
        adopt_foreign: bool = False,
        write_concern: WriteConcern | None = None,
        run_folder: str | os.PathLike[str] | None = None,
        clock: Clock = SYSTEM_CLOCK,
        codec: Codec | Iterable[Codec] | None = None,
    ) -> None:
        super().__init__(clock, codec)
        if not (isinstance(database, Url) or hasattr(database, "list_collection_names")):
            raise ConfigurationError(
                f"MongoRepository needs a pymongo Database, not {type(database).__name__}; "
                "for a URL there is open_repository"
            )
        if not isinstance(collection, str) or not collection:
            raise ConfigurationError(f"collection must be a name, not {collection!r}")
        check_number(lease_timeout, "lease_timeout", minimum=_SHORTEST_LEASE)
        check_number(timeout, "timeout", minimum=0.01)
        check_number(poll_interval, "poll_interval")
        connection = self._connection = Connection(
            collection, database, timeout=timeout, write_concern=write_concern
        )
        monotonic = clock.monotonic
        self._order = Order(connection, clock)
        self._batches = Batches(connection, max(lease_timeout, 2 * timeout), monotonic)
        self._sender = Sender(connection, self._order, self._batches, self.codecs)
        self._adopt_foreign = bool(adopt_foreign)
        self._changes = Changes(connection, poll_interval, self._own, monotonic)
        self.lease_timeout = lease_timeout
        self.run_folder = None if run_folder is None else os.fspath(run_folder)
        self._indexed = False
        tell_of_forks(self)

    @classmethod
    def from_url(
        cls,
        url: str,
        clock: Clock = SYSTEM_CLOCK,
        codec: Codec | Iterable[Codec] | None = None,
    ) -> MongoRepository:
        """The repository that a ``mongodb://`` or ``mongodb+srv://`` URL names.

        Besides the driver's options the query may have ``collection``, ``lease_timeout``, ``timeout``,
        ``poll_interval`` and ``adopt_foreign=true``.

        Raises:
            ConfigurationError: it names no database, or an option is not valid.
        """
        rest, options = _split(url)
        return cls(cast("Any", Url(rest)), clock=clock, codec=codec, **options)

    def __repr__(self) -> str:
        return f"MongoRepository({self._connection.name!r})"

    def init_indexes(self) -> None:
        """Make the indexes that are not there.

        The first node to join does so, too, and the first write of a unique key or of a turn.

        Raises:
            RepositoryError: the server cannot be reached, or refuses.
        """
        make_indexes(self._connection)
        self._indexed = True

    # --- writing

    def apply(self, writes: Sequence[Write], *, all_or_nothing: bool = False) -> Sequence[bool]:
        """Apply guarded writes, each at one moment; ``all_or_nothing`` takes new tasks only."""
        if not self._indexed and any(map(_needs_index, writes)):
            self.init_indexes()
        if all_or_nothing and len(writes) > 1:
            if self._sender.insert_together(writes):
                return [True] * len(writes)
            return self._batches.insert(writes, self._sender.apply)
        return self._sender.apply(writes)

    # --- notes

    def notes(self, prefix: str) -> dict[str, Note]:
        wanted = {"_id": {"$gte": text(prefix, "prefix"), "$lt": prefix + "\U0010ffff"}}
        return self._find_notes(wanted)

    def notes_named(self, names: Sequence[str]) -> dict[str, Note]:
        return self._find_notes({"_id": {"$in": [text(name, "name") for name in names]}})

    def notes_after(self, prefix: str, after: str, limit: int) -> dict[str, Note]:
        wanted = {"_id": {"$gt": text(after, "after"), "$lt": prefix + "\U0010ffff"}}
        return self._find_notes(wanted, limit)

    def _find_notes(self, wanted: Document, limit: int = 0) -> dict[str, Note]:
        """Return the notes that a query finds; at most ``limit``, the first ones, unless that is 0."""
        notes = self._connection.notes
        query = lambda: list(notes.find(wanted).sort("_id", 1).limit(limit))  # noqa: E731
        found = self._connection.run(query)
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

    # --- what others do

    def _own(self) -> range | None:
        """Return the marks of the only queue here; None if several are to hear of each other."""
        return self._sender.own if len(self.queues) < 2 else None

    def version(self) -> object:
        return self._changes.version()

    # --- opening and closing

    def within(self, seconds: float) -> AbstractContextManager[object]:
        return pymongo.timeout(seconds)

    def prepare(self) -> None:
        """Make the indexes; raise where there may be nodes of an earlier TaskX, which are no notes."""
        self._connection.refuse_earlier_nodes()
        if not self._indexed:
            self.init_indexes()

    def close(self) -> None:
        """Close what it opened itself; a later operation opens it again."""
        self._changes.close()
        self._connection.close()

    def renew_after_fork(self) -> None:
        self._connection.renew_after_fork()
        for part in (self._order, self._sender, self._batches, self._changes):
            part.renew()


def _split(url: str) -> tuple[str, dict[str, Any]]:
    """A URL for the driver, and the options that are ours."""
    parts = urlsplit(url)
    if len(parts.path) < 2:
        raise ConfigurationError(f"{parts.scheme} URL names no database: write …/database?…")
    kept, ours = [], {}
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name in _OPTIONS:
            ours[name] = _OPTIONS[name](value)
        else:
            kept.append((name, value))
    return parts._replace(query=urlencode(kept)).geturl(), ours


def _seconds(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ConfigurationError(f"{value!r} is no number of seconds") from None


def _truth(value: str) -> bool:
    if value not in ("true", "false"):
        raise ConfigurationError(f"{value!r} is neither true nor false")
    return value == "true"


_OPTIONS: dict[str, Callable[[str], Any]] = {
    "collection": str,
    "lease_timeout": _seconds,
    "timeout": _seconds,
    "poll_interval": _seconds,
    "adopt_foreign": _truth,
}


def _needs_index(write: Write) -> bool:
    """Whether a write relies on a value that no two documents may have."""
    if isinstance(write, Delete):
        return False
    columns = write.row if isinstance(write, Insert) else write.changes
    return any(columns.get(name) is not None for name in UNIQUE)
