"""The repository on one MongoDB collection."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from taskx.core.checks import check_number
from taskx.core.clock import SYSTEM_CLOCK, Clock
from taskx.core.codec import Codec, Codecs
from taskx.core.errors import ConfigurationError
from taskx.core.model import Task, TaskFilter
from taskx.core.record import UNIQUE, Ended, Stub
from taskx.core.writes import Delete, Insert, Update, Write, shows
from taskx.storage.base import Node, Note, NoteChange, Repository
from taskx.storage.began import Began

if TYPE_CHECKING:
    from pymongo.database import Database
    from pymongo.write_concern import WriteConcern

_SHORTEST_LEASE = 0.5


class MongoRepository(Repository):
    """Keeps tasks in a MongoDB collection, which processes on several hosts may share.

    The documents are those of the original TaskX, so that a Go service and a Python one can share the
    collection. A standalone server will do; there is one connection pool, that of the database given.

    Args:
        database: a pymongo ``Database``.
        collection: the collection of the tasks; ``{collection}.nodes``, ``{collection}.batches`` and
            ``{collection}.notes`` are used beside it.
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
        _require_pymongo()
        if isinstance(database, str) or not hasattr(database, "list_collection_names"):
            raise ConfigurationError(
                f"MongoRepository needs a pymongo Database, not {type(database).__name__}; "
                "for a URL there is open_repository"
            )
        self._set_up(
            collection,
            {"database": database, "write_concern": write_concern},
            lease_timeout=lease_timeout,
            timeout=timeout,
            poll_interval=poll_interval,
            adopt_foreign=adopt_foreign,
            run_folder=None if run_folder is None else os.fspath(run_folder),
        )

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
        _require_pymongo()
        rest, options = _split(url)
        made = cls.__new__(cls)
        Repository.__init__(made, clock, codec)
        collection = options.pop("collection", "tasks")
        made._set_up(collection, {"url": rest, "write_concern": None}, **options)
        return made

    def _set_up(
        self,
        collection: str,
        server: dict[str, Any],
        *,
        lease_timeout: float = 30.0,
        timeout: float = 10.0,
        poll_interval: float = 1.0,
        adopt_foreign: bool = False,
        run_folder: str | None = None,
    ) -> None:
        from taskx.storage.mongo.batches import Batches
        from taskx.storage.mongo.changes import Changes
        from taskx.storage.mongo.connection import Connection
        from taskx.storage.mongo.hosts import HostLocks
        from taskx.storage.mongo.leases import Leases
        from taskx.storage.mongo.notes import Notes
        from taskx.storage.mongo.order import Order
        from taskx.storage.mongo.sender import Sender
        from taskx.storage.mongo.tasks import Tasks

        if not isinstance(collection, str) or not collection:
            raise ConfigurationError(f"collection must be a name, not {collection!r}")
        check_number(lease_timeout, "lease_timeout", minimum=_SHORTEST_LEASE)
        check_number(timeout, "timeout", minimum=0.01)
        check_number(poll_interval, "poll_interval")
        self._connection = Connection(collection, timeout=timeout, **server)
        self._order = Order(self._connection, self.clock)
        self._sender = Sender(self._connection, self._order, self.codecs)
        monotonic = self.clock.monotonic
        patience = max(lease_timeout, 2 * timeout)
        self._batches = Batches(self._connection, self._sender, patience, monotonic)
        self._sender.make_way = self._batches.make_way
        self._tasks = Tasks(self._connection, self._batches, bool(adopt_foreign), self.codecs)
        self._notes = Notes(self._connection)
        locks = HostLocks(run_folder)
        self._leases = Leases(self._connection, lease_timeout, locks, monotonic)
        self._changes = Changes(self._connection, poll_interval, self._is_own, monotonic)
        self._housekeeping = _Every(lease_timeout / 6, monotonic)
        self._indexed = False
        _repositories.add(self)

    def __repr__(self) -> str:
        return f"MongoRepository({self._connection.name!r})"

    def init_indexes(self) -> None:
        """Make the indexes that are not there.

        The first :meth:`join` does so, too, and the first write of a unique key or of a turn.

        Raises:
            RepositoryError: the server cannot be reached, or refuses.
        """
        from taskx.storage.mongo.indexes import make_indexes

        make_indexes(self._connection)
        self._indexed = True

    # --- writing

    def apply(self, writes: Sequence[Write], *, all_or_nothing: bool = False) -> Sequence[bool]:
        """Apply guarded writes, each at one moment; says for each whether its guard held.

        Sent again after it failed, a write that took place is known again, and not done twice.

        Raises:
            ConfigurationError: ``all_or_nothing`` of anything but new tasks.
            PayloadError: a task is larger than MongoDB can keep.
            RepositoryUnavailable: nothing was applied, unless its ``in_doubt`` is True.
        """
        if not self._indexed and any(map(_needs_index, writes)):
            self.init_indexes()
        if all_or_nothing and len(writes) > 1:
            return self._batches.insert(writes)
        refused = [self._needs_lost_lease(write) for write in writes]
        if not any(refused):
            return self._sender.apply(writes)
        allowed = [write for write, no in zip(writes, refused, strict=True) if not no]
        held = iter(self._sender.apply(allowed))
        return [False if no else next(held) for no in refused]

    def _needs_lost_lease(self, write: Write) -> bool:
        """Whether a node that may be taken for dead would take a task, or start one."""
        if not isinstance(write, Update):
            return False
        owner = write.changes.get("owner")
        if not owner or write.guard.get("status") != "pending":
            return False
        return self._leases.lost(owner)

    def settle(self, writes: Sequence[Write]) -> Sequence[bool]:
        """Say for each write whether it took place."""
        from taskx.storage.mongo.documents import row_from_document

        told = self._sender.took_place(writes)
        ids = [write.id for write, known in zip(writes, told, strict=True) if known is None]
        rows = {
            document["_id"]: row_from_document(document) for document in self._tasks.documents(ids)
        }
        return [
            _took_place(write, rows.get(write.id), self.codecs) if known is None else known
            for write, known in zip(writes, told, strict=True)
        ]

    # --- reading

    def get_many(self, task_ids: Sequence[str]) -> dict[str, Task]:
        """The tasks with these ids that exist, by id."""
        return self._tasks.get_many(task_ids) if task_ids else {}

    def list(self, filter: TaskFilter) -> Sequence[Task]:
        """The tasks that meet the filter, newest first."""
        return self._tasks.list(filter)

    def count(self, filter: TaskFilter) -> int:
        """How many tasks meet the filter."""
        return self._tasks.count(filter)

    def page(self, filter: TaskFilter) -> tuple[Sequence[Task], int]:
        """The tasks that meet the filter, and how many do in all.

        A page that is not full says itself where the list ends; the server gives no second answer of
        the same moment.
        """
        tasks = self.list(filter)
        end = filter.offset + len(tasks)
        if len(tasks) < filter.limit and (tasks or not filter.offset):
            return tasks, end
        count = self.count(filter)
        return tasks, max(count, end) if tasks else count

    def ready(
        self, types: Iterable[str], limit: int, owner: str = "", ageing: int = 0
    ) -> Sequence[Stub]:
        """Pending tasks of these types and this owner that may start now, best first."""
        return self._tasks.ready(types, limit, owner, ageing)

    def due(self, now: int, limit: int) -> Sequence[str]:
        """Ids of held back pending tasks whose time has come."""
        return self._tasks.due(now, limit)

    def next_due(self) -> int | None:
        """The earliest ``run_at`` of the held back pending tasks."""
        return self._tasks.next_due()

    def oldest_ready(self) -> int | None:
        """Since when the pending task has waited, of those that may start now, that waits longest."""
        return self._tasks.oldest_ready()

    def owned(self, node: str, limit: int | None = None) -> Sequence[Stub]:
        """The running tasks that a node holds, and then the pending ones; at most ``limit``."""
        return self._tasks.owned(node, limit)

    def owners(self) -> Sequence[str]:
        """The ids of all nodes that hold tasks."""
        return self._tasks.owners()

    def unfinished(self, types: Iterable[str]) -> bool:
        """Whether a task of these types runs on a node, or is pending and not held back."""
        return self._tasks.unfinished(types)

    def ended(self, status: str, before: int, limit: int, after: Any = None) -> Sequence[Ended]:
        """Tasks of a finished status that ended before a moment, newest first."""
        return self._tasks.ended(status, before, limit, after)

    def needed(self, task_ids: Sequence[str]) -> set[str]:
        """Return the ids of these on which a stored task depends that is not one of these."""
        return self._tasks.needed(task_ids)

    def children(self, task_ids: Sequence[str]) -> Sequence[str]:
        """The tasks that depend on one of these, each once."""
        return self._tasks.children(task_ids)

    def statuses(self, task_ids: Sequence[str]) -> dict[str, str]:
        """The status of each of these tasks that exists, by id."""
        return self._tasks.statuses(task_ids)

    def asked_to_cancel(self, task_ids: Sequence[str]) -> Collection[str]:
        """Return the ids of these tasks whose cancel was requested."""
        return self._tasks.asked_to_cancel(task_ids)

    def unique_holders(self, keys: Sequence[str]) -> dict[str, str]:
        """Which task holds each of these unique keys, by key."""
        return self._tasks.unique_holders(keys)

    def awaited(self, after: str, limit: int) -> Sequence[str]:
        """The ids that waiting tasks wait on, in order, from the one after ``after``."""
        return self._tasks.awaited(after, limit)

    def waiting_for(self, task_ids: Sequence[str]) -> Sequence[str]:
        """The tasks that wait on one of these."""
        return self._tasks.waiting_for(task_ids)

    def next_in_line(self, key: str) -> str | None:
        """The first task of a concurrency key that waits for its turn."""
        return self._tasks.next_in_line(key)

    def lines(self, after: str, limit: int) -> dict[str, bool]:
        """Concurrency keys of tasks that wait for their turn, and whether each stands still."""
        return self._tasks.lines(after, limit)

    def stuck_on(self, node: str) -> Sequence[Stub]:
        """The tasks that a thread of an ended attempt still runs on a node."""
        return self._tasks.stuck_on(node)

    def notes(self, prefix: str) -> dict[str, Note]:
        """All notes whose name begins so, by name."""
        return self._notes.notes(prefix)

    def put_notes(self, changes: Sequence[NoteChange]) -> Sequence[bool]:
        """Store notes, or remove them, each if its version is still that one."""
        return self._notes.put(changes)

    def _is_own(self, mark: int) -> bool:
        """Return whether the only queue here left a mark; of several, each must hear of the others."""
        return len(self.queues) < 2 and self._sender.is_own(mark)

    def version(self) -> object:
        """Return another value after others may have changed something; sends no request."""
        return self._changes.version()

    # --- nodes

    def join(self, node: Node) -> None:
        """Record a node, and prove it alive until :meth:`leave` or process death."""
        if not self._indexed:
            self.init_indexes()
        self._leases.join(node)

    def watch_lease(self, node: str, lost: Callable[[], object]) -> None:
        """Have ``lost()`` called when this process may no longer run what the node runs."""
        self._leases.watch(node, lost)

    def began(self, node: str) -> Began | None:
        """Return the tasks that a node's threads began last; None for a node on another host."""
        return self._leases.began(node)

    def record_types(self, node: str, types: Sequence[str]) -> None:
        """Record the types that a node runs now."""
        self._leases.record_types(node, types)

    def mark_stopping(self, node: str) -> None:
        """Record that a node is stopping."""
        self._leases.mark_stopping(node)

    def leave(self, node: str) -> None:
        """Forget a node that holds nothing any more."""
        self._leases.leave(node)

    def nodes(self) -> Sequence[Node]:
        """All recorded nodes."""
        if self._housekeeping.is_time():
            self._batches.look_after()
        return self._leases.nodes()

    def is_dead(self, node: str) -> bool:
        """Whether a node that was seen to be dead is still not back."""
        return self._leases.is_dead(node)

    # --- opening and closing

    def close(self) -> None:
        """Close what it opened itself; a later operation opens it again."""
        self._changes.close()
        self._connection.close()

    def renew_after_fork(self) -> None:
        """In a forked child: connections of its own, and no nodes."""
        self._connection.renew_after_fork()
        for part in (self._order, self._sender, self._batches, self._leases, self._changes):
            part.renew()


class _Every:
    """Says now and then that it is time."""

    def __init__(self, seconds: float, monotonic: Callable[[], float]) -> None:
        self._seconds = seconds
        self._monotonic = monotonic
        self._next = float("-inf")

    def is_time(self) -> bool:
        now = self._monotonic()
        if now < self._next:
            return False
        self._next = now + self._seconds
        return True


def _require_pymongo() -> None:
    try:
        import pymongo  # noqa: F401  (only to see whether it is there)
    except ImportError:
        raise ConfigurationError(
            "MongoRepository needs pymongo: pip install 'taskx-queue[mongo]'"
        ) from None


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
    columns = {} if isinstance(write, Delete) else _columns(write)
    return any(columns.get(name) is not None for name in UNIQUE)


def _columns(write: Insert | Update) -> Mapping[str, Any]:
    return write.row if isinstance(write, Insert) else write.changes


def _took_place(write: Write, row: dict[str, Any] | None, codecs: Codecs) -> bool:
    if isinstance(write, Delete):
        return row is None
    return row is not None and shows(row, write, codecs.same)


_repositories: weakref.WeakSet[MongoRepository] = weakref.WeakSet()


def _renew_all_after_fork() -> None:
    for repository in list(_repositories):
        repository.renew_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all_after_fork)
