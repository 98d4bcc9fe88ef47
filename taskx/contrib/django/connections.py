"""The repository's own connections to a Django database, apart from those of threads.

A thread may be in a transaction of its own on ``connections[alias]``. What a queue does must neither wait
for that transaction nor be part of it.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from functools import lru_cache
from typing import Any, TypeVar

from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.db.utils import (
    DatabaseError,
    DataError,
    Error,
    InterfaceError,
    InternalError,
    OperationalError,
    load_backend,
)

from taskx.attempt.current import awaited
from taskx.contrib.django.link import Link, code, is_failure, is_locked, numbers
from taskx.stores.base import Locked, Reentered
from taskx.stores.sql import Dialect, MySQL, Postgres, SQLite, Statements
from taskx.stores.sqlite.file import DatabaseFile
from taskx.tasks.errors import (
    ConfigurationError,
    PayloadError,
    RepositoryCorrupt,
    RepositoryError,
    RepositoryUnavailable,
    TaskxError,
)
from taskx.tasks.timing import DEFAULT_TIMING, Timing

#: The prefix of TaskX's tables, and of the folder of its lock files next to an SQLite file.
PREFIX = "taskx_"

T = TypeVar("T")

_KEPT = 4  # idle connections for reads that stay open
#: Milliseconds for which a write of PostgreSQL waits for a lock: other writes wait for its connection.
#: MariaDB and MySQL count whole seconds: a write of MariaDB does not wait, one of MySQL waits for a second.
LOCK_TIMEOUT = 100
_NO_TABLE = frozenset({"42P01", "1146"})


def _limits_of_postgres(timeout: float) -> dict[str, int]:
    """Return options by which a connection fails if its network loses all packets for ``timeout`` seconds.

    The time-outs of statements are the server's. Without these options the driver would wait for 15 minutes
    or more.
    """
    seconds = max(2, round(timeout))
    return {
        "connect_timeout": seconds,
        "tcp_user_timeout": round(1000 * timeout),
        "keepalives_idle": seconds,
        "keepalives_interval": max(1, seconds // 3),
        "keepalives_count": 3,
    }


def _limits_of_mysql(timeout: float) -> dict[str, int]:
    """Return the same for MySQL's drivers, which would wait for an answer without end."""
    seconds = max(2, round(timeout))
    # The server itself ends a statement that takes too long, and says so, before the answer is late.
    return {"connect_timeout": seconds, "read_timeout": seconds + 1, "write_timeout": seconds}


_DIALECTS = {"sqlite": SQLite, "postgresql": Postgres, "mysql": MySQL}
_LIMITS = {"postgresql": _limits_of_postgres, "mysql": _limits_of_mysql}


@lru_cache
def statements_of(vendor: str) -> Statements:
    """Return the statements for a kind of database, as Django names it."""
    made = _DIALECTS.get(vendor, Dialect)
    return Statements(made(*(f"{PREFIX}{name}" for name in ("task", "parent", "tag", "note"))))


def file_of(settings: dict[str, Any]) -> DatabaseFile | None:
    """Return the file of a database in SQLite; None if it is in memory."""
    name = os.fspath(settings["NAME"])
    if ":memory:" in name or "mode=memory" in name:
        return None
    return DatabaseFile(name.removeprefix("file:").partition("?")[0], create=False, prefix=PREFIX)


@contextmanager
def _on_loop() -> Iterator[None]:
    """Let coroutines of executors use a connection.

    Django refuses that on the thread of a loop, because other coroutines could use the connection in the
    middle. Here none can: there is no ``await`` in the block.
    """
    loop = None if awaited.get() is None else asyncio._get_running_loop()
    if loop is None:
        yield
        return
    asyncio._set_running_loop(None)
    try:
        yield
    finally:
        asyncio._set_running_loop(loop)


class Connections:
    """One connection that writes, and others that read, each used by one thread at a time.

    Args:
        alias: the alias of the database in ``DATABASES``.
        timeout: seconds that a statement, or the wait for a lock, may take.
        timing: the intervals of its own work.

    Attributes:
        vendor: the kind of database, as Django names it.
        file: the file of a database in SQLite; None if it is another one, or in memory.
    """

    def __init__(self, alias: str, timeout: float, timing: Timing = DEFAULT_TIMING) -> None:
        self.alias = alias
        self._timing = timing
        self.timeout = timeout
        self.vendor = str(load_backend(self.settings["ENGINE"]).DatabaseWrapper.vendor)
        self.file = file_of(self.settings) if self.vendor == "sqlite" else None
        self.lock = threading.RLock()
        self._limit = threading.local()
        self._writer: Link | None = None
        self._idle: list[Link] = []
        self._closed = 0  # the number of the last close: older connections are not kept
        self._inherited: list[object] = []  # the parent's, which a forked child never closes

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the database. Tests may change them."""
        try:
            return connections.settings[self.alias]  # type: ignore[no-any-return]
        except KeyError:
            known = ", ".join(map(repr, connections.settings))
            raise ConfigurationError(
                f"DATABASES has no {self.alias!r}: use one of {known}"
            ) from None
        except ImproperlyConfigured as error:
            raise ConfigurationError(str(error)) from error

    @property
    def entered(self) -> bool:
        """True if the calling thread is in the middle of a write."""
        return self.lock._is_owned()  # type: ignore[attr-defined, no-any-return]

    # --- using

    @_on_loop()
    def read(self, work: Callable[[Link], T]) -> T:
        """Call ``work`` with a connection for reading, and raise its errors as TaskX's.

        If a connection broke while it was idle, ``work`` is called again with another one.
        """
        link = self._take()
        idle = link is not None
        try:
            link = link or self._open()
            with self._within(link):
                found = work(link)
            self._put_back(link)
            return found
        except BaseException as error:
            lost = isinstance(error, (OperationalError, InterfaceError))
            broke = idle and lost and link is not None and not link.usable
            if link is not None:
                link.close()
            if is_failure(error) and not broke:
                raise self.translated(error) from error
            if not broke:
                raise
        self.close_idle()  # the others broke, too, if the server was started again
        return self.read(work)

    def _take(self) -> Link | None:
        """Return an idle connection that works; None if there is none."""
        try:
            link = self._idle.pop()
        except IndexError:
            return None
        return self._checked(link)

    def _put_back(self, link: Link) -> None:
        link.used = time.monotonic()
        if len(self._idle) < _KEPT and link.number > self._closed:
            self._idle.append(link)
        else:
            link.close()

    def _checked(self, link: Link) -> Link | None:
        """Return a connection that works; None if it broke while it was idle."""
        if time.monotonic() - link.used > self._timing.check_connection_after and not link.usable:
            link.close()
            return None
        return link

    @contextmanager
    def writing(self) -> Iterator[Link]:
        """Give the connection for writing to this thread, which must not have it already."""
        if self.entered:
            raise Reentered
        with self.lock, _on_loop(), self._opened_writer() as link:
            yield link

    @contextmanager
    def _opened_writer(self) -> Iterator[Link]:
        if self._writer is not None:
            self._writer = self._checked(self._writer)
        if self._writer is None:
            self._writer = self._open(writes=True)
        link = self._writer
        try:
            with self._within(link):
                yield link
            link.used = time.monotonic()
        except BaseException:
            if getattr(self._limit, "seconds", None) is not None:
                self.drop_writer()
            raise

    def drop_writer(self) -> None:
        """Close the connection for writing. The next write opens another one."""
        link, self._writer = self._writer, None
        if link is not None:
            link.close()

    # --- the time limit

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Limit the statements of this thread to ``seconds``."""
        before = getattr(self._limit, "seconds", None)
        self._limit.seconds = seconds if before is None else min(before, seconds)
        try:
            yield
        finally:
            self._limit.seconds = before

    @contextmanager
    def _within(self, link: Link) -> Iterator[None]:
        """Apply the thread's limit. After an error the connection keeps it, and must be closed."""
        seconds = getattr(self._limit, "seconds", None)
        if seconds is None:
            yield
            return
        self._set_timeout(link, seconds)
        yield
        self._set_timeout(link, self.timeout)

    def _set_timeout(self, link: Link, seconds: float) -> None:
        if link.pooled:
            return
        milliseconds = max(1, round(seconds * 1000))
        if link.vendor == "postgresql":
            # The second one releases the locks of a connection that was cut amid a transaction.
            names = ("statement_timeout", "idle_in_transaction_session_timeout")
            limits = [f"SET {name} = {milliseconds}" for name in names]
            limits.append(f"SET lock_timeout = {min(milliseconds, link.lock_timeout)}")
            link.execute("; ".join(limits))
        elif link.vendor == "sqlite":
            link.rows(f"PRAGMA busy_timeout = {milliseconds}")
        elif link.vendor == "mysql":
            wait = round(min(milliseconds, link.lock_timeout) / 1000)
            limits = [f"innodb_lock_wait_timeout = {wait}"]
            if link.django.mysql_is_mariadb:
                limits.append(f"max_statement_time = {milliseconds / 1000}")
                limits.append(f"idle_transaction_timeout = {max(1, round(seconds))}")
            link.execute(f"SET SESSION {', '.join(limits)}")

    def try_writing(self, patience: float, work: Callable[[Link], T]) -> T | None:
        """Call ``work`` with the connection for writing; None if another thread keeps it too long."""
        if self.entered or not self.lock.acquire(timeout=patience):
            return None
        try:
            with _on_loop(), self._opened_writer() as link:
                return work(link)
        finally:
            self.lock.release()

    # --- opening and closing

    def _open(self, *, writes: bool = False) -> Link:
        settings = deepcopy({**self.settings, "TEST": {}})
        settings.update(AUTOCOMMIT=True, ATOMIC_REQUESTS=False, CONN_MAX_AGE=None)
        options = settings["OPTIONS"]
        options.pop("pool", None)  # these stay open, and would take the places of requests
        options.pop("isolation_level", None)
        django = load_backend(settings["ENGINE"]).DatabaseWrapper(settings, self.alias)
        if limits := _LIMITS.get(django.vendor):
            for name, value in limits(self.timeout).items():
                options.setdefault(name, value)
        if django.features.interprets_empty_strings_as_nulls:
            raise ConfigurationError(
                f"the database {self.alias!r} keeps empty texts as NULL, and TaskX needs both: use "
                "PostgreSQL, MySQL, MariaDB or SQLite"
            )
        if django.vendor == "mysql" and django.get_connection_params()["charset"] != "utf8mb4":
            raise ConfigurationError(
                f"the database {self.alias!r} gets texts without some characters, such as emojis: set "
                "'charset': 'utf8mb4' in the OPTIONS of DATABASES, as Django does from 5.2 on"
            )
        django.inc_thread_sharing()
        if self.file is not None:
            if not (self.file.known or os.path.exists(self.file.path)):
                raise RepositoryUnavailable(
                    f"the database {self.alias!r} has no file {self.file.path}: check DATABASES, and run "
                    f"manage.py migrate --database {self.alias}; nothing was created"
                )
            self.file.find()
        link = Link(django)
        if writes:
            link.lock_timeout = LOCK_TIMEOUT
        try:
            self._set_timeout(link, self.timeout)
            if self.file is not None:
                self.file.opened()
                link.keeps_log = link.rows("PRAGMA journal_mode") == [("wal",)]
        except BaseException:
            link.close()
            raise
        link.used = time.monotonic()
        return link

    def close(self) -> None:
        """Close all connections, those in use after their use. A later operation opens others."""
        self._closed = next(numbers)
        with self.lock:
            self.drop_writer()
            self.close_idle()

    def close_idle(self) -> None:
        """Close the connections for reading that no thread uses."""
        with suppress(IndexError):
            while True:
                self._idle.pop().close()

    def renew_after_fork(self) -> None:
        """Start over, in a forked child: the parent's connections are neither used nor closed."""
        self._inherited += [self._writer, self._idle]
        self._writer, self._idle = None, []
        self.lock = threading.RLock()
        self._limit = threading.local()

    # --- errors

    def translated(self, error: BaseException, *, in_doubt: bool = False) -> TaskxError:
        """Return TaskX's error for an error of Django, of the driver, or of a value."""
        where = f"database {self.alias!r}"
        said = " ".join(str(error).split())[:500]  # in one line
        text = f"{where}: {said or type(error).__name__}"
        if code(error) in _NO_TABLE or "no such table" in str(error):
            return self.no_tables()
        if "malformed" in str(error) or "not a database" in str(error):
            return RepositoryCorrupt(text)
        if is_locked(error):
            return Locked(f"{where}: another transaction keeps a lock: {said}", self.timeout)
        if isinstance(error, (OperationalError, InterfaceError, InternalError)):
            doubt = "; the write may have happened" if in_doubt else ""
            unavailable = RepositoryUnavailable(text + doubt)
            unavailable.in_doubt = in_doubt
            return unavailable
        if isinstance(error, DataError) or not isinstance(error, (DatabaseError, Error)):
            return PayloadError("record", f"{where} cannot store it: {said}")
        return RepositoryError(text)

    def no_tables(self) -> RepositoryUnavailable:
        """Return the error for a database without TaskX's tables."""
        return RepositoryUnavailable(
            f"the database {self.alias!r} has no tables of TaskX, or those of an older version: add "
            f'"taskx.contrib.django" to INSTALLED_APPS and run manage.py migrate --database {self.alias}'
        )
