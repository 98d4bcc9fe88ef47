"""The repository on one MongoDB collection."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, cast

import pymongo
from pymongo.client_session import ClientSession
from pymongo.database import Database
from pymongo.write_concern import WriteConcern

from taskx.stores.base import Repository
from taskx.stores.mongo.batches import Batches
from taskx.stores.mongo.changes import Changes
from taskx.stores.mongo.connection import Connection, Sequencer, Url
from taskx.stores.mongo.documents import Document
from taskx.stores.mongo.filters import make_indexes
from taskx.stores.mongo.joining import (
    InSession,
    SenderInSession,
    own_transaction,
    session_of,
    undone,
)
from taskx.stores.mongo.sender import Sender
from taskx.stores.mongo.tasks import Tasks
from taskx.stores.options import seconds_of, split, truth_of
from taskx.stores.parts import Forks, House, at_forks
from taskx.stores.transactions import Stored, Then, Transactions, Unit
from taskx.tasks.checks import Duration, check_number
from taskx.tasks.clock import SYSTEM_CLOCK, Clock
from taskx.tasks.codec import Codec
from taskx.tasks.errors import ConfigurationError, TaskxError
from taskx.tasks.findings import Check
from taskx.tasks.record import UNIQUE
from taskx.tasks.timing import DEFAULT_TIMING, Timing
from taskx.tasks.writes import Delete, Insert, Write

_SHORTEST_LEASE = 0.5


class MongoRepository(Tasks, Forks):
    """Keeps tasks in a MongoDB collection, which processes on several hosts may share.

    The documents have the format of the original TaskX, so that a Go service and a Python one can share
    the collection. A standalone server is enough. The only connection pool is that of the given database.

    Args:
        database: a pymongo ``Database``.
        collection: the name of the tasks' collection. The repository also uses ``{collection}.batches``
            and ``{collection}.notes``.
        lease_timeout: seconds without a heartbeat after which a node is dead and other nodes run its
            tasks. All processes on the collection must use the same value.
        timeout: seconds that an operation may take before it raises ``RepositoryUnavailable``.
        poll_interval: seconds between two checks for changes if the server has no change streams.
        adopt_foreign: True to run pending tasks that the original stored. Use it only if no process of
            the original is running, because that process might run them, too.
        write_concern: a pymongo ``WriteConcern``; the default is majority with journal.
        run_folder: the folder for the lock files of this host's nodes; the default is a temporary folder.
        clock: the clock that stamps the records of the eight methods and measures the leases.
        codec: the codec for stored params, results and checkpoints. With several, the first one writes.

    Raises:
        ConfigurationError: an argument is not valid, or pymongo is not installed.
    """

    def __init__(
        self,
        database: Database[Any],
        collection: str = "tasks",
        *,
        lease_timeout: Duration = 30.0,
        timeout: Duration = 10.0,
        poll_interval: Duration = 1.0,
        adopt_foreign: bool = False,
        write_concern: WriteConcern | None = None,
        run_folder: str | os.PathLike[str] | None = None,
        clock: Clock = SYSTEM_CLOCK,
        codec: Codec | Iterable[Codec] | None = None,
        timing: Timing = DEFAULT_TIMING,
    ) -> None:
        # An asynchronous database has the same methods, but nothing would wait until they are done.
        waits = not type(database).__module__.startswith(("pymongo.asynchronous", "motor."))
        named = isinstance(database, Url) or hasattr(database, "list_collection_names")
        if not (waits and named):
            raise ConfigurationError(
                f"`database` must be a pymongo Database, not {type(database).__name__}; "
                "for a URL use open_repository"
            )
        if not isinstance(collection, str) or not collection:
            raise ConfigurationError(f"`collection` must be a name, not {collection!r}")
        lease_timeout = check_number(lease_timeout, "lease_timeout", minimum=_SHORTEST_LEASE)
        timeout = check_number(timeout, "timeout", minimum=0.01)
        poll_interval = check_number(poll_interval, "poll_interval")
        connection = Connection(
            collection, database, timeout=timeout, write_concern=write_concern, timing=timing
        )
        monotonic = clock.monotonic
        batches = Batches(connection, max(lease_timeout, 2 * timeout), monotonic)
        super().__init__(
            connection, batches, clock, codec, timing, adopt_foreign=bool(adopt_foreign)
        )
        self._sequencer = Sequencer(connection, clock)
        self._sender = Sender(connection, self._sequencer, batches, self.codecs)
        self._changes = Changes(connection, poll_interval, self._own, monotonic)
        self.lease_timeout = lease_timeout
        self.run_folder = None if run_folder is None else os.fspath(run_folder)
        self._indexed = False
        self.transactions = SessionTransactions(self)
        self.house = ServerHouse(self, connection)
        self.forks = at_forks(self)

    @classmethod
    def from_url(
        cls,
        url: str,
        clock: Clock = SYSTEM_CLOCK,
        codec: Codec | Iterable[Codec] | None = None,
    ) -> MongoRepository:
        """Return the repository for a ``mongodb://`` or ``mongodb+srv://`` URL.

        The query may have the driver's options, and ``collection``, ``lease_timeout``, ``timeout``,
        ``poll_interval`` and ``adopt_foreign=true``.

        Raises:
            ConfigurationError: the URL names no database, or an option is not valid.
        """
        rest, options = split(url, _OPTIONS)
        return cls(cast("Any", Url(rest)), clock=clock, codec=codec, **options)

    def __repr__(self) -> str:
        return f"MongoRepository({self._connection.name!r})"

    def init_indexes(self) -> None:
        """Make the indexes that are missing.

        The first node that joins also calls this, and so does the first write of a unique key or a turn.

        Raises:
            RepositoryError: the server cannot be reached, or refuses.
        """
        make_indexes(self._connection)
        self._indexed = True

    def ensure_indexes(self) -> None:
        """Make the indexes, unless this object has made them before."""
        if not self._indexed:
            self.init_indexes()

    # --- writing

    def apply(self, writes: Sequence[Write], *, all_or_nothing: bool = False) -> Sequence[bool]:
        """Apply guarded writes, each one atomic; ``all_or_nothing`` supports new tasks only."""
        if not self._indexed and any(map(_needs_index, writes)):
            self.init_indexes()
        if all_or_nothing and len(writes) > 1:
            if self._sender.insert_together(writes):
                return [True] * len(writes)
            return self._batches.insert(writes, self._sender.apply)
        return self._sender.apply(writes)

    # --- changes by others

    def _own(self) -> range | None:
        """Return the marks of this object's writes; None if it has several queues, which must all hear."""
        return self._sender.own if len(self.queues) < 2 else None

    def version(self) -> object:
        return self._changes.version()

    # --- opening and closing

    def close(self) -> None:
        """Close the connections that this object opened; a later operation opens them again."""
        self.transactions.close()  # its thread would open the connections again
        self._changes.close()
        self._connection.close()

    def renew_after_fork(self) -> None:
        self._connection.renew_after_fork()
        for part in (self._sequencer, self._sender, self._batches, self._changes):
            part.renew()
        self.transactions.renew()  # there may be no queue yet that does so


class ServerHouse(House):
    """Looks after the collections on a server."""

    def __init__(self, repository: MongoRepository, connection: Connection) -> None:
        self._repository = repository
        self._connection = connection

    def prepare(self) -> None:
        """Make the indexes; raise if an earlier TaskX may be running, whose nodes are not notes."""
        self._connection.refuse_earlier_nodes()
        self._repository.ensure_indexes()

    def examine(self) -> Iterator[Check]:
        if not self._connection.is_real:
            return iter(())
        from taskx.stores.mongo.examination import examine  # not needed to run tasks

        return examine(self._connection, self._repository.clock)

    def within(self, seconds: float) -> AbstractContextManager[object]:
        return pymongo.timeout(seconds)


class SessionTransactions(Transactions):
    """The transactions of callers and executors, in sessions of pymongo."""

    def __init__(self, outer: MongoRepository) -> None:
        super().__init__("MongoRepository", outer.timing)
        self._outer = outer

    @contextmanager
    def join(self, connection: object, then: Then | None) -> Iterator[Repository]:
        outer = self._outer
        session = session_of(connection, outer._connection)
        outer.ensure_indexes()  # in the transaction it is not possible
        connection = InSession(outer._connection, session)
        sender = SenderInSession(connection, outer._sender)
        with undone(connection):
            yield _Inside(outer, connection, sender)
        if (applied := sender.applied) and then is not None:
            seen = weakref.ref(session)
            unit = Unit(lambda: (still := seen()) is not None and still.in_transaction)
            unit.ids.update(write.id for write, _ in applied)
            look_up = partial(self._committed, applied)
            self.watch(unit, Stored(look_up, then, self.timing))

    def begin(self) -> AbstractContextManager[ClientSession]:
        return own_transaction(self._outer._connection)

    def _committed(self, applied: Sequence[tuple[Write, int]]) -> Sequence[Write]:
        """Return those of the writes that left their marks.

        The record alone would not do: a transaction that is repeated makes the same writes again.
        """
        try:
            return self._outer._sender.marked(applied)
        except TaskxError:  # polling finds the tasks
            return ()


class _Inside(Tasks):
    """The repository over the session of a caller, inside its transaction."""

    def __init__(
        self, outer: MongoRepository, connection: InSession, sender: SenderInSession
    ) -> None:
        batches = outer._batches
        super().__init__(connection, batches, outer.clock, outer.codecs, outer.timing)
        self._sender = sender
        self._outer = outer

    def apply(self, writes: Sequence[Write], *, all_or_nothing: bool = False) -> Sequence[bool]:
        return self._sender.insert_whole(writes) if all_or_nothing else self._sender.apply(writes)

    def _revealed(self, found: list[Document], fields: Sequence[str]) -> list[Document]:
        # Outside the transaction: other callers may reveal the same tasks.
        return self._outer._revealed(found, fields)

    def version(self) -> object:
        """Return a new value: nothing waits for others inside a transaction."""
        return object()


_OPTIONS: dict[str, Callable[[str], Any]] = {
    "collection": str,
    "lease_timeout": seconds_of,
    "timeout": seconds_of,
    "poll_interval": seconds_of,
    "adopt_foreign": truth_of,
}


def _needs_index(write: Write) -> bool:
    """Return True if a write sets a value that must be unique among the documents."""
    if isinstance(write, Delete):
        return False
    columns = write.row if isinstance(write, Insert) else write.changes
    return any(columns.get(name) is not None for name in UNIQUE)
