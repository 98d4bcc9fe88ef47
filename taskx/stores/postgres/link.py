"""Connections of psycopg as TaskX's statements need them, and the errors that they raise."""

from __future__ import annotations

import math
import select
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any

import psycopg
from psycopg import conninfo
from psycopg.adapt import AdaptersMap
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row
from psycopg.types.numeric import Int8Dumper

from taskx.stores.sql import Taken, pool, postgres
from taskx.stores.sql.pool import LOCK_TIMEOUT, numbers
from taskx.tasks.checks import Duration
from taskx.tasks.errors import ConfigurationError, RepositoryUnavailable, TaskxError
from taskx.tasks.timing import Timing

#: The time-outs of the server need a moment to be heard: an answer may be later by this factor.
_LATER = 1.25
_NUL = "NUL"
# What a role may not do, what it has no place for, and how a server says that it is full.
_REFUSED, _NO_COLUMN, _FULL = "42501", "42703", "53300"
# A prepared statement is planned for the types of its values: all whole numbers have the same.
_ADAPTERS = AdaptersMap(psycopg.adapters)
_ADAPTERS.register_dumper(int, Int8Dumper)


class _Driver(psycopg.Connection[Any]):
    """A connection that breaks if the server, or what is between, leaves a statement without an answer."""

    patience = math.inf

    def wait(self, gen: Any, *args: Any, **options: Any) -> Any:
        until = time.monotonic() + self.patience
        return super().wait(_within(gen, until), *args, **options)


def _within(gen: Generator[Any, Any, Any], until: float) -> Generator[Any, Any, Any]:
    """Go on with a generator of psycopg until its end, or until a time without news."""
    try:
        wanted = next(gen)
        while True:
            ready = yield wanted
            if not ready and time.monotonic() > until:
                raise psycopg.OperationalError("the server has not answered in time")
            wanted = gen.send(ready)
    except StopIteration as end:
        return end.value


class _Cursor(psycopg.Cursor[Any]):
    """A cursor with our own ways to read and write values, whatever those of its connection are."""

    @property
    def adapters(self) -> AdaptersMap:
        return _ADAPTERS


class Link:
    """A connection of psycopg that executes TaskX's statements.

    Attributes:
        driver: the connection of psycopg.
        number: a number that no other connection of this process has.
        pooled: True if a pooler may give each transaction another connection of its own.
        durable: True if a commit survives a power cut by this session's setting; None if it is unknown.
    """

    def __init__(self, driver: psycopg.Connection[Any], *, pooled: bool = False) -> None:
        self.driver = driver
        self.pooled = pooled
        self.number = next(numbers)
        self.used = 0.0
        self.durable: bool | None = None
        self.lock_timeout: float = math.inf
        self._cursor = _Cursor(driver, row_factory=tuple_row)

    def rows(self, sql: str, values: Sequence[Any] = (), /) -> list[Any]:
        return self.execute(sql, values).fetchall()

    def execute(self, sql: str, values: Sequence[Any] = (), /) -> psycopg.Cursor[Any]:
        if values:
            self._storable(self._cursor.execute, sql, values)
        else:  # perhaps several statements, which cannot be prepared
            self._storable(partial(self._cursor.execute, prepare=False), sql, None)
        return self._cursor

    def executemany(self, sql: str, rows: Sequence[Sequence[Any]], /) -> psycopg.Cursor[Any]:
        self._storable(self._cursor.executemany, sql, rows)
        return self._cursor

    def passing(self, sql: str, /) -> str:
        """Return a ``SELECT … FOR UPDATE`` that passes over rows which other transactions have locked."""
        return f"{sql} SKIP LOCKED"

    @staticmethod
    def _storable(execute: Callable[..., object], sql: str, values: Any) -> None:
        try:
            execute(_marked(sql), values)
            return
        except psycopg.IntegrityError as error:
            raise Taken(str(error)) from error
        except psycopg.DataError as error:
            if error.sqlstate or _NUL not in str(
                error
            ):  # psycopg refuses them before it sends anything
                raise
        execute(_marked(sql), postgres.without_nul(values))

    @property
    def usable(self) -> bool:
        """True if the connection is open, and the server has not ended it."""
        if self.driver.closed:
            return False
        poll = select.poll()
        poll.register(self.driver.fileno(), select.POLLIN)
        return not poll.poll(0)

    def close(self) -> None:
        """Close the connection, whatever state it is in."""
        with suppress(Exception):  # it may be broken, or closed
            self.driver.close()


@lru_cache(maxsize=512)
def _marked(sql: str) -> str:
    """Return a statement with psycopg's marks for values."""
    return sql.replace("?", "%s")


class Connections(pool.Connections[Link]):
    """The repository's own connections to its database.

    Args:
        url: a URL or a connection string of libpq.
        pooled: True if a pooler is in between, which gives each transaction another connection.
        timeout: seconds that a statement may take.
        ready: is called with each new connection until it returns; it makes the tables.
        timing: the intervals of its own work.
    """

    errors = psycopg

    def __init__(
        self,
        url: str,
        timeout: Duration,
        timing: Timing,
        *,
        pooled: bool,
        ready: Callable[[Link], object],
    ) -> None:
        try:
            self._given = conninfo.conninfo_to_dict(url)
        except psycopg.Error:  # its text may have the password
            raise ConfigurationError(
                "the URL of the database is not valid: write postgresql://user@host/database"
            ) from None
        host = self._given.get("host") or self._given.get("hostaddr")
        database = self._given.get("dbname") or self._given.get("user") or ""
        #: What names the database in messages: without user and password.
        self.name = f"{database}@{host}" if host else f"{database}"
        super().__init__(f"PostgreSQL database {self.name!r}", timeout, timing)
        self._pooled = pooled
        self._ready = ready
        self._is_ready = False

    # --- opening

    def _open(self, *, writes: bool = False) -> Link:
        link = Link(self.connect(), pooled=self._pooled)
        if writes:
            link.lock_timeout = LOCK_TIMEOUT
        try:
            self._set_timeout(link, self.timeout)
            if not self._is_ready:
                self._ready(link)
                self._is_ready = True
        except BaseException:
            link.close()
            raise
        link.used = time.monotonic()
        return link

    def connect(self, patience: float | None = None) -> _Driver:
        """Return a new connection in autocommit mode, each statement of which is answered in time."""
        options: dict[str, Any] = {**postgres.limits(self.timeout), "application_name": "taskx"}
        if "," in str(self._given.get("host", "")):
            options["target_session_attrs"] = (
                "read-write"  # of several hosts, the one that takes writes
            )
        options.update(self._given, client_encoding="UTF8")  # with SQL_ASCII, texts would be bytes
        if self._pooled:
            options["prepare_threshold"] = None
        driver = _Driver.connect(**options, autocommit=True)
        driver.patience = _LATER * self.timeout if patience is None else patience
        return driver

    def _set_timeout(self, link: Link, seconds: float) -> None:
        if isinstance(link.driver, _Driver):
            link.driver.patience = _LATER * seconds
        if not link.pooled:
            postgres.set_timeouts(link, seconds, link.lock_timeout)

    def _has_broken(self, link: Link) -> bool:
        return not link.usable

    def close(self) -> None:
        super().close()
        self._is_ready = False

    # --- errors

    def code(self, error: BaseException) -> str:
        return getattr(error, "sqlstate", None) or ""

    def _advised(self, error: BaseException, text: str) -> TaskxError | None:
        advice = _ADVICE.get(self.code(error))
        return RepositoryUnavailable(f"{text}. {advice}") if advice else None


_ADVICE = {
    postgres.NO_TABLE: "The tables were removed: close the repository, or restart the program",
    _NO_COLUMN: "The tables are those of an older version: run manage.py migrate",
    _REFUSED: "Grant the role what it may not do, or let another role make the tables",
    _FULL: "A process of TaskX has up to seven connections: raise max_connections, or use a pooler",
    postgres.READ_ONLY: (
        "The server takes no writes: it is a replica, or default_transaction_read_only is on"
    ),
}

#: The states of a connection in which a transaction is open.
OPEN = frozenset((TransactionStatus.ACTIVE, TransactionStatus.INTRANS, TransactionStatus.INERROR))
