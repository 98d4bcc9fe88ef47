"""A connection of Django as TaskX's statements need it, and the errors that it raises."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from django.db.utils import DataError, IntegrityError, OperationalError

from taskx.stores import sql as storage
from taskx.stores.sql import Taken, postgres
from taskx.stores.sql.pool import numbers
from taskx.stores.sqlite.links import text_or_bytes

Rows = list[tuple[Any, ...]]

_SMALL = 100_000  # characters of texts that need no look at the longest statement of MySQL's server


def code(error: BaseException | None) -> str:
    """Return the code that the database gave for an error; empty if it gave none."""
    cause = getattr(error, "__cause__", None)
    if cause is not None and cause.args and isinstance(cause.args[0], int):
        return str(cause.args[0])  # MySQL's drivers
    return str(getattr(cause, "sqlstate", None) or getattr(cause, "pgcode", None) or "")


class _Done(NamedTuple):
    rowcount: int


class Link(storage.Link):
    """A connection of Django that executes TaskX's statements, in no log of queries, also with ``DEBUG``.

    Attributes:
        django: Django's connection.
        vendor: the kind of database, as Django names it.
        number: a number that no other connection of this process has.
        pooled: True if a pooler may give each transaction another connection of its own: no setting of
            the session is changed then. ``DISABLE_SERVER_SIDE_CURSORS`` says so.
        keeps_log: True if it is an SQLite file with a write-ahead log.
        durable: True if a commit survives a power cut by this session's setting; None if it is unknown.
        lock_timeout: the most milliseconds that a statement waits for a lock on a server.
    """

    lock_timeout: float = math.inf

    def __init__(self, django: Any) -> None:
        self.django = django
        self.vendor: str = django.vendor
        self.pooled = bool(django.settings_dict.get("DISABLE_SERVER_SIDE_CURSORS"))
        self.keeps_log = False
        self.durable: bool | None = None
        self.used = 0.0
        self.number = next(numbers)

    def rows(self, sql: str, values: Sequence[Any] = ()) -> Rows:
        try:
            return self._fetch(sql, values)
        except OperationalError as error:
            if self.vendor != "sqlite" or "decode" not in str(error):
                raise
        # Invalid UTF-8 as bytes: one damaged record must not hide the others.
        driver = self.django.connection
        before, driver.text_factory = driver.text_factory, text_or_bytes
        try:
            return self._fetch(sql, values)
        finally:
            driver.text_factory = before

    def _fetch(self, sql: str, values: Sequence[Any]) -> Rows:
        with self._executed(sql, values) as cursor:
            return [*cursor.fetchall()]

    def execute(self, sql: str, values: Sequence[Any] = ()) -> _Done:
        with self._executed(sql, values) as cursor:
            return _Done(cursor.rowcount)

    def executemany(self, sql: str, rows: Sequence[Sequence[Any]]) -> _Done:
        with self._cursor() as cursor:
            cursor.executemany(_marked(sql), [self._storable(values) for values in rows])
            return _Done(cursor.rowcount)

    def passing(self, sql: str) -> str:
        if not self.django.features.has_select_for_update_skip_locked:
            return sql
        # MariaDB fails to pass over a lock in a session that waits for no locks.
        maria = self.vendor == "mysql" and self.django.mysql_is_mariadb
        patience = "SET STATEMENT innodb_lock_wait_timeout = 1 FOR " if maria else ""
        return patience + super().passing(sql)

    @contextmanager
    def _executed(self, sql: str, values: Sequence[Any]) -> Iterator[Any]:
        """Give the cursor that has executed a statement."""
        with self._cursor() as cursor:
            cursor.execute(_marked(sql), self._storable(values) if values else None)
            yield cursor

    @contextmanager
    def _cursor(self) -> Iterator[Any]:
        django = self.django
        django.ensure_connection()
        with django.wrap_database_errors:
            made = django.make_cursor(django.create_cursor())
        with made as cursor:
            try:
                yield cursor
            except IntegrityError as error:
                raise Taken(str(error)) from error

    def _storable(self, values: Sequence[Any]) -> Sequence[Any]:
        if self.vendor == "mysql":
            self._refuse_if_too_large(values)
        if self.vendor != "postgresql":
            return values
        return [postgres.without_nul(value) for value in values]

    def _refuse_if_too_large(self, values: Sequence[Any]) -> None:
        """Refuse a statement that is too long for MySQL's server, which would only close the connection."""
        texts = [value for value in values if isinstance(value, str)]
        if sum(map(len, texts)) < _SMALL:
            return
        ((most,),) = self.rows("SELECT @@max_allowed_packet")
        if (size := sum(map(_sent_bytes, texts))) > most - _SMALL:
            raise DataError(f"{size:,} bytes, but max_allowed_packet of the server is {most:,}")

    @property
    def usable(self) -> bool:
        """True if the connection still works."""
        return self.django.connection is not None and bool(self.django.is_usable())

    def close(self) -> None:
        """Close the connection, whatever state it is in."""
        with suppress(Exception):  # it may be broken, or closed
            self.django.close()


def _marked(sql: str) -> str:
    """Return a statement with Django's marks for values."""
    return sql.replace("?", "%s")


def _sent_bytes(text: str) -> int:
    """Return the bytes of a text in a statement of MySQL."""
    return len(text.encode(errors="replace")) + sum(map(text.count, "\0\n\r\x1a\"'\\"))
