"""The differences between the stores that the processes of a campaign can share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from taskx import SQLiteRepository
from taskx.stores.base import Repository

from . import hooks
from .sidelog import SideLog

if TYPE_CHECKING:
    from .worker import Options


class Store:
    """A SQLite file, and the base class for other stores.

    Attributes:
        repository: the class whose ``apply`` commits.
        points: the points at which a process can kill itself.
        outages: the errors that a process expects while the store is unavailable.
        pile: the number of tasks that a process with ``burst`` submits together.
        broken: the broken parts that only this store has.
    """

    repository: type[Repository] = SQLiteRepository
    points = hooks.KILL_POINTS
    outages: tuple[Any, ...] = ()
    pile = 100
    broken: hooks.Parts = {}  # noqa: RUF012  (constant)

    def open(self, options: Options) -> Repository:
        return SQLiteRepository(options.database, options.durability)

    def prepare(self, log: SideLog) -> None:
        """Make the process write events to the side log that the proof needs for this store."""


def store_of(database: str) -> Store:
    if database.startswith("mongodb://"):
        from .on_mongo import OnMongo  # importing the driver takes a while

        return OnMongo()
    if database.startswith("postgresql://"):
        from .on_postgres import OnPostgres

        return OnPostgres()
    return Store()
