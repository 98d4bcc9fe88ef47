"""The application of a soak: its orders and payments, in the database that has the tasks, too."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from taskx import PostgresRepository, SQLiteRepository
from taskx.stores.base import Repository

#: What the names of TaskX's tables begin with.
PREFIX = "taskx_"
_TIMEOUT = 60.0


class Shop:
    """An application with a SQLite file.

    Args:
        place: the path of the file.

    Attributes:
        place: what makes the same shop in another process: see :func:`shop_of`.
    """

    #: Stands for a value in a statement.
    mark = "?"
    #: Begins a transaction beside which nobody pays.
    alone = "BEGIN IMMEDIATE"
    before: tuple[str, ...] = ("PRAGMA journal_mode = WAL",)

    def __init__(self, place: str) -> None:
        self.place = place

    def make(self) -> None:
        """Make the tables."""
        with closing(self.connect()) as connection:
            for statement in self.before:
                connection.execute(statement)
            for table in ("orders", "payments"):
                connection.execute(f"CREATE TABLE IF NOT EXISTS {table} (task TEXT NOT NULL)")
            connection.commit()

    def repository(self) -> Repository:
        return SQLiteRepository(self.place, prefix=PREFIX, busy_timeout=_TIMEOUT)

    def connect(self) -> Any:
        """Return a connection of the application's own."""
        return sqlite3.connect(self.place, timeout=_TIMEOUT)

    def size(self) -> int:
        """Return the bytes of the database on the disk."""
        file = Path(self.place)
        files = file.parent.glob(f"{file.name}*")
        return sum(path.stat().st_size for path in files if path.is_file())

    def add(self, connection: Any, table: str, task_id: str) -> None:
        """Store an order or a payment."""
        connection.execute(f"INSERT INTO {table} (task) VALUES ({self.mark})", (task_id,))

    def settle(self) -> tuple[list[str], list[str]]:
        """Remove the orders that are paid once. Return their tasks, and those of all other payments."""
        pairs = (
            "SELECT task FROM orders JOIN (SELECT task, count(*) AS n FROM payments GROUP BY task) "
            "AS paid USING (task) WHERE n = 1"
        )
        with closing(self.connect()) as connection:
            connection.execute(self.alone)
            paid = [task for (task,) in connection.execute(pairs).fetchall()]
            for table in ("payments", "orders"):
                connection.cursor().executemany(
                    f"DELETE FROM {table} WHERE task = {self.mark}", [(task,) for task in paid]
                )
            wrong = connection.execute("SELECT DISTINCT task FROM payments").fetchall()
            connection.commit()
        return paid, [task for (task,) in wrong]

    def unpaid(self) -> list[str]:
        """Return the tasks of the orders that are not settled."""
        with closing(self.connect()) as connection:
            return [task for (task,) in connection.execute("SELECT task FROM orders").fetchall()]


class PostgresShop(Shop):
    """An application with a PostgreSQL database; ``place`` is its URL."""

    mark = "%s"
    alone = "LOCK TABLE payments IN SHARE ROW EXCLUSIVE MODE"
    before = ()

    def repository(self) -> Repository:
        return PostgresRepository(self.place, prefix=PREFIX, timeout=_TIMEOUT)

    def connect(self) -> Any:
        import psycopg  # not every Python has a wheel of it

        return psycopg.connect(self.place)

    def size(self) -> int:
        with closing(self.connect()) as connection:
            ((size,),) = connection.execute(
                "SELECT pg_database_size(current_database())"
            ).fetchall()
            return int(size)


def shop_of(place: str) -> Shop:
    """Return the shop at a place: the path of a file, or the URL of a PostgreSQL database."""
    return (PostgresShop if place.startswith("postgresql:") else Shop)(place)
