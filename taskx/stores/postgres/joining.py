"""The transactions of callers and executors on connections of psycopg."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import compress
from typing import Any

import attrs
import psycopg
from psycopg.pq import PipelineStatus, TransactionStatus

from taskx.stores import queries
from taskx.stores.postgres.link import OPEN, Connections, Link
from taskx.stores.postgres.links import PostgresLinks
from taskx.stores.sql import SQLRepository, postgres
from taskx.stores.sql.callers import CallersLinks, driver_connection
from taskx.stores.transactions import Active, Stored, Then, Transactions, Unit
from taskx.tasks.errors import ConfigurationError, TaskxError
from taskx.tasks.writes import Write

_NUMBER = "SELECT txid_current()"
_STATUS = "SELECT txid_status(?)"
# Not the port, which a socket of Unix does not have. The time as a number: its text depends on settings.
_PLACE = (
    "SELECT current_database(), (extract(epoch FROM pg_postmaster_start_time()) * 1000000)::bigint, "
    "to_regclass(?)::oid::bigint"
)


@attrs.define(eq=False, repr=False)
class _Given(Unit):
    """A transaction on a connection of psycopg, with its number on the server."""

    number: int = 0


class DriverTransactions(Transactions):
    """The transactions of callers and executors. The server tells by their numbers how they have ended."""

    def __init__(self, repository: SQLRepository, outer: PostgresLinks) -> None:
        super().__init__("PostgresRepository", outer.timing)
        self._repository = repository
        self._outer = outer

    @contextmanager
    def join(self, connection: object, then: Then | None) -> Iterator[SQLRepository]:
        driver, active = driver_connection(connection, psycopg.Connection, "a psycopg.Connection")
        self._refuse_unfit(driver)
        links = CallersLinks(Link(driver), partial(_translated, self._outer.connections))
        self._refuse_elsewhere(links)
        with links.savepoint():
            yield self._repository.over(links)
            ((number,),) = links.rows(_NUMBER) if links.wrote else ((0,),)
        if links.applied and then is not None:
            self._add(driver, active, number, links.applied, then)

    @staticmethod
    def _refuse_unfit(driver: psycopg.Connection[Any]) -> None:
        """Raise ``ConfigurationError`` if nothing can be part of a transaction of a connection."""
        status = driver.pgconn.transaction_status
        if driver.closed or status == TransactionStatus.UNKNOWN:
            raise ConfigurationError("connection is closed, or has broken; nothing was stored")
        if status == TransactionStatus.INERROR:
            raise _broken()
        if driver.pgconn.pipeline_status != PipelineStatus.OFF:
            raise ConfigurationError(
                "connection is in pipeline mode, where a statement has no answer at once: call outside of "
                "`with connection.pipeline():`; nothing was stored"
            )
        if driver.info.encoding != "utf-8":
            raise ConfigurationError(
                f"connection has the encoding {driver.info.encoding}: connect with client_encoding=utf8; "
                "nothing was stored"
            )
        if driver.autocommit and status == TransactionStatus.IDLE:
            raise ConfigurationError(
                "connection is in autocommit mode and in no transaction: call inside "
                "`with connection.transaction():`; nothing was stored"
            )

    def _refuse_elsewhere(self, links: CallersLinks) -> None:
        """Raise ``ConfigurationError`` if a connection leads to another database, or other tables."""
        table = self._repository.statements.dialect.tasks
        ours = self._outer.place(_PLACE, table)  # makes the tables
        here = links.rows(_PLACE, (table,))
        if here != ours and here != (ours := self._outer.place(_PLACE, table, anew=True)):
            raise ConfigurationError(
                f"connection leads to the table {table} of {here[0][0]!r} ({here[0][2]}), but the tasks "
                f"are in that of {ours[0][0]!r} ({ours[0][2]}): another server, database or search_path; "
                "nothing was stored"
            )

    def _add(
        self,
        driver: psycopg.Connection[Any],
        active: Active,
        number: int,
        writes: Sequence[Write],
        then: Then,
    ) -> None:
        """Call ``then`` with those of the writes that are stored, when their transaction has ended."""
        given = [unit for unit in list(self.units) if isinstance(unit, _Given)]
        unit = next((one for one in given if one.number == number), None)
        if unit is None:
            seen = weakref.ref(driver)
            unit = _Given(active or (lambda: _is_open(seen())), number=number)
        unit.ids.update(write.id for write in writes)
        look_up = partial(self._committed, number, writes)
        self.watch(unit, Stored(look_up, partial(self._tell, then), self.timing, writes))

    @contextmanager
    def begin(self) -> Iterator[psycopg.Connection[Any]]:
        connections = self._outer.connections
        with ExitStack() as stack:
            try:
                connections.read(lambda link: None)  # makes the tables
                driver = stack.enter_context(connections.connect(float("inf")))
                block = ExitStack()
                block.enter_context(driver.transaction())
            except psycopg.Error as error:
                raise connections.translated(error) from error
            with block:
                yield driver
                driver.patience = connections.timeout
                commit = block.pop_all()
            try:
                commit.close()
            except (psycopg.OperationalError, psycopg.InterfaceError) as error:
                raise connections.translated(error, in_doubt=True) from error

    def is_open(self, unit: Unit) -> bool:
        """Return True if a transaction is open; its connection may be in a later one already."""
        if not super().is_open(unit):
            return False
        return not isinstance(unit, _Given) or self._status(unit.number) == "in progress"

    def _status(self, number: int) -> str:
        ((status,),) = self._outer.rows(_STATUS, (number,))
        return str(status)

    def tell_others(self, writes: Sequence[Write]) -> None:
        self._outer.tell_others(writes)

    def _tell(self, then: Then, done: Sequence[Write]) -> None:
        self._outer.tell_others(done)
        then(done)

    def _committed(self, number: int, writes: Sequence[Write]) -> Sequence[Write]:
        """Return those of the writes of a transaction that are stored."""
        try:
            if self._status(number) != "committed":
                return ()
            # Not all of its writes: it may have undone some at a savepoint.
            return [*compress(writes, queries.shown(self._repository, writes))]
        except TaskxError:  # polling finds the tasks
            return ()


def _is_open(driver: psycopg.Connection[Any] | None) -> bool:
    return driver is not None and driver.pgconn.transaction_status in OPEN


def _translated(connections: Connections, error: Exception) -> TaskxError | None:
    if connections.code(error) == postgres.ABORTED:
        return _broken()
    return connections.translated(error) if connections.is_failure(error) else None


def _broken() -> ConfigurationError:
    return ConfigurationError(
        "an error has broken the transaction of this connection, so it will be rolled back; nothing was "
        "stored. Put the statements that may fail into a `with connection.transaction():` of their own"
    )
