"""The transactions of callers and of executors: what TaskX reads and writes in a ``ClientSession``.

MongoDB has no savepoints, and any error of the server aborts a whole transaction. So everything that can
refuse a write is read before the first write of a call.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NoReturn, TypeVar, cast

import pymongo
from pymongo.client_session import ClientSession
from pymongo.collection import Collection
from pymongo.errors import PyMongoError
from pymongo.read_concern import ReadConcern

from taskx.stores.mongo.connection import FAILURES, Connection, translated
from taskx.stores.mongo.documents import Document, ours_of
from taskx.stores.mongo.sender import Op, Sender
from taskx.tasks.errors import ConfigurationError, RepositoryUnavailable, TaskxError
from taskx.tasks.record import UNIQUE
from taskx.tasks.writes import Delete, Insert, Write

T = TypeVar("T")

_TRANSIENT, _UNKNOWN = "TransientTransactionError", "UnknownTransactionCommitResult"
#: The methods of a collection that are used in a transaction.
_METHODS = frozenset(
    ("aggregate", "bulk_write", "count_documents", "delete_many", "find", "find_one")
)
#: The methods of a session that an executor must not call.
_ENDINGS = ("commit_transaction", "abort_transaction", "end_session")


class TransactionAborted(RepositoryUnavailable, PyMongoError):
    """The server has aborted the caller's transaction; the same transaction may succeed if it is repeated.

    It is an error of pymongo, too, so that ``session.with_transaction`` repeats the transaction.
    """

    def has_error_label(self, label: str) -> bool:
        """Return True for the label by which pymongo knows that a transaction may be repeated."""
        return label == _TRANSIENT


def _aborted(name: str, error: object) -> TransactionAborted:
    reason = str(error).partition(", full error")[0][:300]
    return TransactionAborted(
        f"{name}: the server has aborted your transaction: {reason}; nothing was stored. Repeat "
        "the whole transaction, for example with session.with_transaction(function)"
    )


# --- a caller's transaction


def session_of(given: object, connection: Connection) -> ClientSession:
    """Return a session that a caller has given, in a transaction on the cluster of a connection.

    Raises:
        ConfigurationError: it is not one.
        RepositoryUnavailable: the server does not answer.
    """
    if not isinstance(given, ClientSession):
        raise _refused(f"connection must be a ClientSession of pymongo, not {given!r:.80}")
    refuse_without_transactions(connection)
    if given.has_ended:
        raise _refused("connection is a session that has ended")
    ours = connection.tasks.database.client, getattr(connection.where, "client", None)
    if not any(given.client is client for client in ours):  # two clients of one server are equal
        raise _refused(
            "connection is a session of another MongoClient. Make the repository from the same client: "
            "MongoRepository(client[...])"
        )
    if not given.in_transaction:
        raise _refused(
            "connection is a session without a transaction: use it inside `with "
            "session.start_transaction():`, or in a function for session.with_transaction(function)"
        )
    return given


def _refused(reason: str) -> ConfigurationError:
    return ConfigurationError(f"{reason}; nothing was stored")


def refuse_without_transactions(connection: Connection) -> None:
    """Raise ``ConfigurationError`` if the server has no transactions."""
    if not connection.is_real:
        raise _refused("this is a mock of pymongo, which has no transactions")
    if connection.transacts:
        return
    admin = connection.tasks.database.client.admin
    connection.run(lambda: admin.command("hello"))  # it may not have been asked yet
    if not connection.transacts:
        raise _refused("a standalone MongoDB server has no transactions: use a replica set")


class InSession(Connection):
    """The collections of another connection, as a transaction sees them.

    Attributes:
        session: the session of the transaction.
        wrote: True if a write may have taken effect.
    """

    def __init__(self, outer: Connection, session: ClientSession) -> None:
        where = session.client[outer.tasks.database.name]  # not ours, in a forked child
        super().__init__(
            outer.name, where, timeout=outer.timeout, write_concern=None, timing=outer.timing
        )
        self.session = session
        self.wrote = False

    def _collection(self, suffix: str) -> Collection[Document]:
        return cast("Collection[Document]", _Bound(super()._collection(suffix), self.session))

    def run(self, work: Callable[[], T], timeout: float | None = None) -> T:
        """Call ``work`` within the time-out; an error that aborted the transaction says so."""
        try:
            with pymongo.timeout(self.timeout if timeout is None else timeout):
                return work()
        except FAILURES as error:
            if isinstance(error, PyMongoError) and error.has_error_label(_TRANSIENT):
                raise _aborted(self.name, error) from error
            raise translated(error, self.name) from error

    def abort(self) -> None:
        """Abort the transaction on the server only: each later statement of the caller fails.

        After ``session.abort_transaction()``, later statements would take effect without a transaction.
        """
        admin = self.session.client.admin
        with suppress(*FAILURES), pymongo.timeout(self.timing.abort_within):
            admin.command("abortTransaction", session=self.session)


class _Bound:
    """A collection whose methods are part of a transaction."""

    def __init__(self, collection: Collection[Document], session: ClientSession) -> None:
        self._collection = collection
        self._session = session

    def __getattr__(self, name: str) -> Any:
        if name not in _METHODS:
            raise AttributeError(f"{name} is not for transactions")
        return partial(getattr(self._collection, name), session=self._session)


@contextmanager
def undone(connection: InSession) -> Iterator[None]:
    """Abort the transaction if the block raises after it may have written something."""
    try:
        yield
    except BaseException:
        if connection.wrote:
            connection.abort()
        raise


class SenderInSession(Sender):
    """Sends writes as a part of a transaction: once, and no write that is known to be refused.

    Attributes:
        connection: the connection to the transaction.
        applied: the writes so far whose guards held, each with its mark.
    """

    def __init__(self, connection: InSession, outer: Sender) -> None:
        super().__init__(connection, outer._sequencer, outer._batches, outer._codecs)
        self.connection = connection
        self.applied: list[tuple[Write, int]] = []

    def insert_whole(self, writes: Sequence[Write]) -> list[bool]:
        """Store new tasks, all or none; return for each if it can be stored.

        Raises:
            ConfigurationError: other writes are among them.
        """
        if not all(isinstance(write, Insert) for write in writes):
            raise ConfigurationError(
                "MongoRepository supports `all_or_nothing` for new tasks only; "
                "apply other writes without it"
            )
        results = self.connection.run(lambda: self._possible(writes))
        return self.apply(writes) if all(results) else results

    def _send(self, ops: Sequence[Op]) -> list[bool]:
        return self.connection.run(lambda: self._send_in_session(ops))

    def _send_in_session(self, ops: Sequence[Op]) -> list[bool]:
        possible = self._possible([op.write for op in ops])
        due = [op for op, can in zip(ops, possible, strict=True) if can]
        before, self.connection.wrote = self.connection.wrote, True
        for op in due:
            if isinstance(op.write, Delete):
                op.held = self._delete(op)
        requests = [op for op in due if not isinstance(op.write, Delete)]
        if requests and (refused := self._write(requests)):
            raise _aborted(
                self.connection.name,
                f"task {refused[0].write.id} was stored by another in the meantime",
            )
        done = [(op.write, op.mark) for op in due if op.held]
        self.connection.wrote = before or bool(done)
        self.applied += done
        return [op.held for op in ops]

    def _possible(self, writes: Sequence[Write]) -> list[bool]:
        """Return for each write False if another task has its new id, or one of its unique values."""
        wanted = [_unique(write) for write in writes]
        conditions = [{path: {"$in": [*values]}} for path, values in _by_path(wanted).items()]
        taken: dict[tuple[str, Any], str] = {}
        if conditions:
            shown = ["_id", *(f"taskx.{name}" for name in UNIQUE)]
            for document in self.connection.tasks.find({"$or": conditions}, shown):
                taken[("_id", document["_id"])] = ""
                ours = ours_of(document)
                for name in UNIQUE:
                    if ours.get(name) is not None:
                        taken[(f"taskx.{name}", ours[name])] = document["_id"]
        results = []
        for write, values in zip(writes, wanted, strict=True):
            results.append(all(taken.get(value, write.id) == write.id for value in values))
            if results[-1]:
                taken.update(dict.fromkeys(values, write.id))
        return results


def _unique(write: Write) -> list[tuple[str, Any]]:
    """Return the values of a write that no other task may have, each with its path."""
    found: list[tuple[str, Any]] = [("_id", write.id)] if isinstance(write, Insert) else []
    changes: Mapping[str, Any] = write.changes
    found += [(f"taskx.{n}", changes[n]) for n in UNIQUE if changes.get(n) is not None]
    return found


def _by_path(wanted: Sequence[Sequence[tuple[str, Any]]]) -> dict[str, set[Any]]:
    found: dict[str, set[Any]] = {}
    for values in wanted:
        for path, value in values:
            found.setdefault(path, set()).add(value)
    return found


# --- an executor's transaction


@contextmanager
def own_transaction(connection: Connection) -> Iterator[ClientSession]:
    """Do what :meth:`Transactions.begin` describes."""
    refuse_without_transactions(connection)
    tasks = connection.tasks
    session = connection.run(tasks.database.client.start_session)
    try:
        # These options override the client's.
        session.start_transaction(
            ReadConcern("snapshot"), tasks.write_concern, tasks.read_preference
        )
        for name in _ENDINGS:
            setattr(session, name, _not_here)
        yield session
        _let_end(session)
        _commit(connection, session)
    finally:
        _let_end(session)
        with suppress(*FAILURES), pymongo.timeout(connection.timing.abort_within):
            session.end_session()  # which aborts what was not committed


def _not_here(*_: object) -> NoReturn:
    raise ConfigurationError(
        "the end of the block `with ctx.transaction()` ends its transaction: call nothing that does"
    )


def _let_end(session: ClientSession) -> None:
    for name in _ENDINGS:
        vars(session).pop(name, None)


def _commit(connection: Connection, session: ClientSession) -> None:
    """Commit. A commit whose result is unknown is sent again."""
    deadline = time.monotonic() + connection.timeout
    in_doubt, every = False, connection.timing.send_every
    while True:
        try:
            with pymongo.timeout(max(0.001, deadline - time.monotonic())):
                session.commit_transaction()
            return
        except FAILURES as error:
            unknown = isinstance(error, PyMongoError) and error.has_error_label(_UNKNOWN)
            # Once a result was unknown, a server that has forgotten the transaction proves nothing.
            in_doubt = in_doubt or unknown
            if not unknown or time.monotonic() + every >= deadline:
                raise _failed(error, connection.name, in_doubt=in_doubt) from error
        time.sleep(every)


def _failed(error: Exception, name: str, *, in_doubt: bool) -> TaskxError:
    if in_doubt:
        unknown = RepositoryUnavailable(
            f"{name}: {str(error)[:300]}; the transaction may have been committed"
        )
        unknown.in_doubt = True
        return unknown
    if isinstance(error, PyMongoError) and error.has_error_label(_TRANSIENT):
        return _aborted(name, error)
    return translated(error, name)
