"""The way to the server: client, collections, time-outs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, TypeVar

import pymongo
from bson.codec_options import CodecOptions, DatetimeConversion
from bson.errors import BSONError
from pymongo.collection import Collection
from pymongo.database import Database
from pymongo.errors import PyMongoError
from pymongo.read_preferences import ReadPreference
from pymongo.write_concern import WriteConcern

from taskx.core.errors import ConfigurationError, RepositoryUnavailable, SchemaMismatch
from taskx.storage.mongo.documents import Document, moment_ms
from taskx.storage.mongo.failures import may_have_been_sent, translated

T = TypeVar("T")

#: What the driver raises, and what encoding a document can.
FAILURES = (PyMongoError, BSONError, OverflowError, RecursionError, UnicodeEncodeError)

# Whatever the caller's database is set to: plain documents, and no date that cannot be read.
# Other programs may have stored what is no date of Python's, or no UTF-8: it must not hide the rest.
_CODEC: CodecOptions[Document] = CodecOptions(
    datetime_conversion=DatetimeConversion.DATETIME_AUTO,
    unicode_decode_error_handler="surrogateescape",
)
_SAFE = WriteConcern(w="majority", j=True)
_mock_turns = threading.RLock()


class Url(NamedTuple):
    """A URL for the driver."""

    text: str


class Connection:
    """The collections of one database.

    Args:
        name: the collection of the tasks; the others are called after it.
        where: the database; or the URL to connect to at first use, by a client of one's own.
        timeout: seconds that an operation may take, all retries included.
        write_concern: None for majority with journal, or as the URL says.

    Attributes:
        is_real: whether the driver is pymongo; a mock of it lacks this and that.
        turns: entered to use the collections: a mock trips over itself in several threads.
    """

    def __init__(
        self,
        name: str,
        where: Database[Document] | Url,
        *,
        timeout: float,
        write_concern: WriteConcern | None,
    ) -> None:
        if write_concern is not None and not write_concern.acknowledged:
            raise ConfigurationError("write_concern must be acknowledged: w=0 tells no outcome")
        self.name = name
        self.timeout = timeout
        self._where = where
        self._write_concern = write_concern
        self._database: Database[Document] | None = None
        self._collections: dict[str, Collection[Document]] = {}
        self._lock = threading.Lock()
        self.is_real = isinstance(where, (Database, Url))
        self.turns: AbstractContextManager[object] = nullcontext() if self.is_real else _mock_turns

    @property
    def tasks(self) -> Collection[Document]:
        """The tasks."""
        return self._collection("")

    @property
    def batches(self) -> Collection[Document]:
        """Which batches of tasks were committed, or abandoned."""
        return self._collection(".batches")

    @property
    def notes(self) -> Collection[Document]:
        """Short texts kept under names."""
        return self._collection(".notes")

    def run(self, work: Callable[[], T], timeout: float | None = None) -> T:
        """Do something with the collections, within the time-out.

        Raises:
            TaskxError: in place of what the driver raised.
        """
        try:
            with pymongo.timeout(self.timeout if timeout is None else timeout), self.turns:
                return work()
        except FAILURES as error:
            raise translated(error, self.name) from error

    def write(self, work: Callable[[], T]) -> T:
        """As :meth:`run`; the error of what may have been written all the same is in doubt."""
        try:
            return self.run(work)
        except RepositoryUnavailable as error:
            error.in_doubt = isinstance(error.__cause__, Exception) and may_have_been_sent(
                error.__cause__
            )
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
                self._connect(self._where) if isinstance(self._where, Url) else self._where
            )
        if not self.is_real:
            return self._database[name]  # a mock knows no options
        return self._database.get_collection(
            name,
            codec_options=_CODEC,
            read_preference=ReadPreference.PRIMARY,
            write_concern=self._write_concern or _SAFE,
        )

    def _connect(self, url: Url) -> Database[Document]:
        try:
            client: pymongo.MongoClient[Document] = pymongo.MongoClient(url.text, connect=False)
        except (PyMongoError, ValueError) as error:
            raise ConfigurationError(f"MongoDB URL: {error}") from error
        if self._write_concern is None and client.write_concern.document:
            self._write_concern = client.write_concern
        return client.get_default_database()

    def refuse_earlier_nodes(self) -> None:
        """Make sure that no earlier TaskX is at work, which has its nodes in a collection of their own.

        Raises:
            SchemaMismatch: there may be one.
        """
        earlier = self._collection(".nodes")
        if self.run(lambda: earlier.find_one({})) is not None:
            raise SchemaMismatch(
                f"{earlier.name} has nodes of an earlier TaskX, which would take those of this one for "
                f"dead: stop all its processes, drop the collection {earlier.name}, and start again"
            )

    def server_ms(self, timeout: float) -> int | None:
        """The server's clock, in milliseconds; None where it does not tell.

        Raises:
            RepositoryError: it could not be asked.
        """
        if not self.is_real:
            return None
        admin = self.tasks.database.client.admin
        told = self.run(lambda: admin.command("hello", codec_options=_CODEC), timeout)
        return moment_ms(told.get("localTime"))

    def close(self) -> None:
        """Close the client if it is one of its own; the next operation opens another."""
        with self._lock:
            database, self._database = self._database, None
            self._collections = {}
        if database is not None and isinstance(self._where, Url):
            with pymongo.timeout(1.0):  # it says goodbye to a server that may be away
                database.client.close()

    def renew_after_fork(self) -> None:
        """In a forked child: a client of its own, as sockets must not be shared."""
        self._lock = threading.Lock()
        self._collections = {}
        self._database = None
        if isinstance(self._where, Database):
            duplicate = getattr(self._where.client, "_duplicate", None)  # which is not public
            if duplicate is not None:
                self._where = duplicate(connect=False).get_database(self._where.name)
