"""The repository's own connections to a Django database, apart from those of threads.

A thread may be in a transaction of its own on ``connections[alias]``. What a queue does must neither wait
for that transaction nor be part of it.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import lru_cache
from typing import Any, TypeVar

from django.core.exceptions import ImproperlyConfigured
from django.db import connections, utils
from django.db.utils import load_backend

from taskx.attempt.current import awaited
from taskx.contrib.django.link import Link, code
from taskx.stores.sql import Dialect, MySQL, Postgres, SQLite, Statements, pool, postgres
from taskx.stores.sql.pool import LOCK_TIMEOUT
from taskx.stores.sqlite.file import DatabaseFile
from taskx.tasks.checks import Duration
from taskx.tasks.errors import (
    ConfigurationError,
    RepositoryCorrupt,
    RepositoryUnavailable,
    TaskxError,
)
from taskx.tasks.timing import DEFAULT_TIMING, Timing

#: The prefix of TaskX's tables, and of the folder of its lock files next to an SQLite file.
PREFIX = "taskx_"

T = TypeVar("T")

_NO_TABLE = frozenset({postgres.NO_TABLE, "1146"})


def _limits_of_mysql(timeout: float) -> dict[str, int]:
    """Return what ``postgres.limits`` does for MySQL's drivers, which would wait without end."""
    seconds = max(2, round(timeout))
    # The server itself ends a statement that takes too long, and says so, before the answer is late.
    return {"connect_timeout": seconds, "read_timeout": seconds + 1, "write_timeout": seconds}


_DIALECTS = {"sqlite": SQLite, "postgresql": Postgres, "mysql": MySQL}
_LIMITS = {"postgresql": postgres.limits, "mysql": _limits_of_mysql}


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


class Connections(pool.Connections[Link]):
    """The repository's own connections to a database of Django.

    Args:
        alias: the alias of the database in ``DATABASES``.
        timeout: seconds that a statement, or the wait for a lock, may take.
        timing: the intervals of its own work.

    Attributes:
        vendor: the kind of database, as Django names it.
        file: the file of a database in SQLite; None if it is another one, or in memory.
    """

    errors = utils

    def __init__(self, alias: str, timeout: Duration, timing: Timing = DEFAULT_TIMING) -> None:
        super().__init__(f"database {alias!r}", timeout, timing)
        self.alias = alias
        self.vendor = str(load_backend(self.settings["ENGINE"]).DatabaseWrapper.vendor)
        self.file = file_of(self.settings) if self.vendor == "sqlite" else None

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

    @_on_loop()
    def read(self, work: Callable[[Link], T]) -> T:
        return super().read(work)

    @contextmanager
    def _opened_writer(self) -> Iterator[Link]:
        with _on_loop(), super()._opened_writer() as link:
            yield link

    def _set_timeout(self, link: Link, seconds: float) -> None:
        if link.pooled:
            return
        milliseconds = max(1, round(seconds * 1000))
        if link.vendor == "postgresql":
            postgres.set_timeouts(link, seconds, link.lock_timeout)
        elif link.vendor == "sqlite":
            link.rows(f"PRAGMA busy_timeout = {milliseconds}")
        elif link.vendor == "mysql":
            wait = round(min(milliseconds, link.lock_timeout) / 1000)
            limits = [f"innodb_lock_wait_timeout = {wait}"]
            if link.django.mysql_is_mariadb:
                limits.append(f"max_statement_time = {milliseconds / 1000}")
                limits.append(f"idle_transaction_timeout = {max(1, round(seconds))}")
            link.execute(f"SET SESSION {', '.join(limits)}")

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

    # --- errors

    def code(self, error: BaseException) -> str:
        return code(error)

    def _advised(self, error: BaseException, text: str) -> TaskxError | None:
        if code(error) in _NO_TABLE or "no such table" in str(error):
            return self.no_tables()
        broken = "malformed" in str(error) or "not a database" in str(error)
        return RepositoryCorrupt(text) if broken else None

    def no_tables(self) -> RepositoryUnavailable:
        """Return the error for a database without TaskX's tables."""
        return RepositoryUnavailable(
            f"the database {self.alias!r} has no tables of TaskX, or those of an older version: add "
            f'"taskx.contrib.django" to INSTALLED_APPS and run manage.py migrate --database {self.alias}'
        )
