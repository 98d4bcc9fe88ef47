"""The connection to the server: client, collections, time-outs, clock and the meaning of its errors."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import pymongo
from bson.codec_options import CodecOptions, DatetimeConversion
from bson.errors import BSONError
from pymongo import InsertOne, UpdateMany, UpdateOne, errors
from pymongo.collection import Collection
from pymongo.database import Database
from pymongo.errors import PyMongoError
from pymongo.read_preferences import ReadPreference
from pymongo.write_concern import WriteConcern

from taskx.stores.mongo.documents import Document, moment_ms
from taskx.tasks.clock import Clock
from taskx.tasks.errors import (
    ConfigurationError,
    PayloadError,
    RepositoryError,
    RepositoryUnavailable,
    SchemaMismatch,
    TaskxError,
)
from taskx.tasks.timing import Timing

T = TypeVar("T")
_Request = InsertOne[Document] | UpdateOne | UpdateMany

#: The errors of the driver, and those of encoding a document.
FAILURES = (PyMongoError, BSONError, OverflowError, RecursionError, UnicodeEncodeError)

# These options override the caller's: documents are plain dicts, and every date can be read. Other
# programs may have stored dates outside Python's range, or text that is not UTF-8. They must not hide
# the other fields.
_CODEC: CodecOptions[Document] = CodecOptions(
    datetime_conversion=DatetimeConversion.DATETIME_AUTO,
    unicode_decode_error_handler="surrogateescape",
)
_SAFE = WriteConcern(w="majority", j=True)
_mock_turns = threading.RLock()

DUPLICATE_KEY = 11000
_TOO_LARGE = frozenset((10334, 17280, 17419, 17420))
_TOO_DEEP = 15
#: No longer primary, shutting down, interrupted, timed out, disk full: the operation may work later.
_PASSING = frozenset(
    (
        *(6, 7, 24, 46, 50, 64, 79, 89, 91, 112, 134, 189, 262, 317, 358),
        *(9001, 10107, 11600, 11602, 13388, 13435, 13436, 14031),
    )
)
_TRANSACTING = frozenset(("RSPrimary", "Mongos", "LoadBalancer"))
_NEVER_SENT = (errors.ServerSelectionTimeoutError, errors.WaitQueueTimeoutError)

#: The most sequence numbers within a millisecond.
PER_MS = 1 << 20


class Url(str):
    """A URL for the driver."""


class Connection:
    """The collections of one database, or of a URL to which its own client connects at the first use.

    ``timeout`` is the time that an operation may take, in seconds, with all retries. ``is_real`` is False
    with a mock of the driver. A mock lacks some features, and fails in several threads at a time: enter
    ``turns`` around each operation.
    """

    def __init__(
        self,
        name: str,
        where: Database[Document] | Url,
        *,
        timeout: float,
        write_concern: WriteConcern | None,
        timing: Timing,
    ) -> None:
        if write_concern is not None:
            _refuse_unacknowledged(write_concern)
        self.name = name
        self.timeout = timeout
        self.timing = timing
        self.where = where
        self._write_concern = write_concern
        self._database: Database[Document] | None = None
        self._collections: dict[str, Collection[Document]] = {}
        self._lock = threading.Lock()
        self.is_real = isinstance(where, (Database, Url))
        self.turns: AbstractContextManager[object] = nullcontext() if self.is_real else _mock_turns

    @property
    def tasks(self) -> Collection[Document]:
        """The collection of the tasks."""
        return self._collection("")

    @property
    def batches(self) -> Collection[Document]:
        """The collection of decisions: each says that a batch of tasks was committed, or abandoned."""
        return self._collection(".batches")

    @property
    def notes(self) -> Collection[Document]:
        """The collection of notes: short texts with names."""
        return self._collection(".notes")

    @property
    def transacts(self) -> bool:
        """True if the server has answered and supports transactions: it is not a standalone one."""
        if not self.is_real:
            return False
        servers = self.tasks.database.client.topology_description.server_descriptions()
        return any(server.server_type_name in _TRANSACTING for server in servers.values())

    def run(self, work: Callable[[], T], timeout: float | None = None) -> T:
        """Call ``work`` within the time-out, and raise the driver's errors as errors of TaskX."""
        try:
            with pymongo.timeout(self.timeout if timeout is None else timeout), self.turns:
                return work()
        except FAILURES as error:
            raise translated(error, self.name) from error

    def write(self, work: Callable[[], T]) -> T:
        """Call ``work`` as :meth:`run` does; an error is ``in_doubt`` if the write may have happened."""
        try:
            return self.run(work)
        except RepositoryUnavailable as error:
            error.in_doubt = may_have_been_sent(error.__cause__)
            raise

    def _collection(self, suffix: str) -> Collection[Document]:
        found = self._collections.get(suffix)
        if found is None:
            with self._lock:
                found = self._collections[suffix] = self._open(self.name + suffix)
        return found

    def _open(self, name: str) -> Collection[Document]:
        if self._database is None:
            self._database = (
                self._connect(self.where) if isinstance(self.where, Url) else self.where
            )
        if not self.is_real:
            return self._database[name]  # a mock does not support options
        return self._database.get_collection(
            name,
            codec_options=_CODEC,
            read_preference=ReadPreference.PRIMARY,
            write_concern=self._write_concern or _SAFE,
        )

    def _connect(self, url: Url) -> Database[Document]:
        try:
            client: pymongo.MongoClient[Document] = pymongo.MongoClient(url, connect=False)
        except (PyMongoError, ValueError) as error:
            raise ConfigurationError(f"the MongoDB URL is not valid: {error}") from error
        if self._write_concern is None and (given := client.write_concern.document):
            _refuse_unacknowledged(client.write_concern)
            # A URL that sets a time-out only, for example, asks for no weaker one.
            self._write_concern = WriteConcern(
                **(given if "w" in given else _SAFE.document | given)
            )
        return client.get_default_database()

    def refuse_earlier_nodes(self) -> None:
        """Raise if an earlier TaskX may be running: it keeps its nodes in a separate collection."""
        earlier = self._collection(".nodes")
        if self.run(lambda: earlier.find_one({})) is not None:
            raise SchemaMismatch(
                f"{earlier.name} has nodes of an earlier TaskX version, which would treat the nodes of "
                f"this version as dead. Stop all processes of the earlier version, drop the collection "
                f"{earlier.name}, and start again"
            )

    def close(self) -> None:
        """Close the client if this object opened it; the next operation opens another."""
        with self._lock:
            database, self._collections = self._database, {}
            if not isinstance(self.where, Url):
                return
            self._database = None
        if database is not None:
            with pymongo.timeout(1.0):  # closing sends a message to the server, which may be down
                database.client.close()

    def renew_after_fork(self) -> None:
        """In a forked child: use a new client, because processes must not share sockets.

        The given one stays the program's: sessions of it are joined in a child, too.
        """
        self._lock = threading.Lock()
        self._collections = {}
        self._database = None
        if isinstance(self.where, Database):
            duplicate = getattr(self.where.client, "_duplicate", None)  # a private method
            if duplicate is not None:
                self._database = duplicate(connect=False).get_database(self.where.name)


def _refuse_unacknowledged(concern: WriteConcern) -> None:
    """Raise ``ConfigurationError`` if the server would not tell if a write took place."""
    if not concern.acknowledged:
        raise ConfigurationError(
            "`write_concern` must be acknowledged: with w=0 the server reports no outcome"
        )


class Sequencer:
    """Gives new tasks their sequence numbers, which rise with time in the same way on every host.

    The time is the server's, because the clocks of the hosts may differ. ``clock`` is used if the server
    does not tell its time.
    """

    def __init__(self, connection: Connection, clock: Clock) -> None:
        self._connection = connection
        self._clock = clock
        self._timing = connection.timing
        self.renew()

    def renew(self) -> None:
        """Start again from zero, in a forked child."""
        self._lock = threading.Lock()
        self._last = 0
        self._offset = 0.0
        self._refreshed: float | None = None

    def next(self) -> int:
        """Return a number that is larger than all earlier ones in this process."""
        self._refresh_if_due()
        now = time.monotonic() * 1000 + self._offset
        with self._lock:
            self._last = max(self._last + 1, int(now) * PER_MS)
            return self._last

    def _refresh_if_due(self) -> None:
        """Read the server's clock again if the last reading is too old."""
        refreshed, now = self._refreshed, time.monotonic()
        if refreshed is not None and now - refreshed < self._timing.server_clock_every:
            return
        self._refreshed = now
        before = time.monotonic()
        try:
            told = self._server_ms(self._timing.server_clock_within)
        except RepositoryError:
            told = None  # the insert will fail, too, and the next one reads the clock again
            self._refreshed = refreshed
        if told is not None:
            self._offset = told - before * 1000
        elif not self._offset:
            self._offset = self._clock.now_ms() - before * 1000

    def _server_ms(self, timeout: float) -> int | None:
        """Return the server's time in milliseconds; None if the server does not tell it."""
        if not self._connection.is_real:
            return None
        admin = self._connection.tasks.database.client.admin
        told = self._connection.run(lambda: admin.command("hello", codec_options=_CODEC), timeout)
        return moment_ms(told.get("localTime"))


def bulk_write(collection: Collection[Document], requests: Sequence[_Request]) -> Mapping[str, Any]:
    """Send requests in any order, and return what the server tells; an id that is taken is no error."""
    try:
        return collection.bulk_write(requests, ordered=False).bulk_api_result
    except errors.BulkWriteError as error:
        told = error.details or {}
        others = any(failure["code"] != DUPLICATE_KEY for failure in told["writeErrors"])
        if others or told.get("writeConcernErrors"):
            raise
        return told


def is_passing(error: Exception) -> bool:
    """Return True if the same operation may succeed later."""
    if isinstance(error, errors.BulkWriteError):
        details = error.details or {}
        codes = {failure.get("code") for failure in details.get("writeErrors", ())}
        codes.discard(DUPLICATE_KEY)
        return codes <= _PASSING if codes else bool(details.get("writeConcernErrors"))
    if isinstance(error, errors.OperationFailure):
        return isinstance(error, errors.WriteConcernError) or error.code in _PASSING
    return isinstance(
        error, (errors.ConnectionFailure, errors.ExecutionTimeout, errors.InvalidOperation)
    )


def may_have_been_sent(error: BaseException | None) -> bool:
    """Return True if the server may have carried out the operation in spite of this error."""
    return not isinstance(error, (*_NEVER_SENT, errors.InvalidOperation))


def translated(error: Exception, where: str, *, in_doubt: bool = False) -> TaskxError:
    """Return the TaskX error for an error of the driver."""
    text = f"{where}: {words_of(error)}"
    if isinstance(error, errors.ServerSelectionTimeoutError):
        text = (
            f"the MongoDB server of the collection {where!r} does not answer: {words_of(error)}. Check the "
            "URL, the network and the server"
        )
    if is_passing(error):
        doubt = "; the write may have happened" if in_doubt else ""
        unavailable = RepositoryUnavailable(text + doubt)
        unavailable.in_doubt = in_doubt
        return unavailable
    code = _first_code(error)
    if isinstance(error, errors.DocumentTooLarge) or code in _TOO_LARGE:
        return PayloadError(
            "document", "too large for MongoDB, which stores at most 16 MiB for a task"
        )
    if code == _TOO_DEEP:
        return PayloadError("document", "nested too deep for MongoDB")
    if isinstance(error, (BSONError, OverflowError, RecursionError, UnicodeEncodeError)):
        return PayloadError("document", f"MongoDB cannot store it: {error}")
    if isinstance(error, errors.ConfigurationError):
        return ConfigurationError(text)
    return RepositoryError(text)


def words_of(error: Exception) -> str:
    """Return what an error of the driver says, without its settings and its facts about the servers."""
    words = re.sub(r" \(configured timeouts: [^)]*\)", "", str(error))
    return re.split(r", Timeout: [\d.]+s, |, full error: ", words)[0][:500]


def _first_code(error: Exception) -> int | None:
    if isinstance(error, errors.BulkWriteError):
        failures = (error.details or {}).get("writeErrors", ())
        return next((f["code"] for f in failures if f.get("code") != DUPLICATE_KEY), None)
    return error.code if isinstance(error, errors.OperationFailure) else None
