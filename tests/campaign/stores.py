"""What differs between the repositories that the processes of a campaign may share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from taskx import SQLiteRepository
from taskx.storage.base import Repository

from . import hooks
from .sidelog import SideLog

if TYPE_CHECKING:
    from .worker import Options


class Store:
    """A SQLite file, and what stands here for any other.

    Attributes:
        repository: the class whose ``apply`` commits.
        points: where a process may kill itself.
        outages: what is raised, and borne, while the store is away.
        pile: how many tasks a process submits together that submits nothing else.
        broken: parts that only it has, broken.
    """

    repository: type[Repository] = SQLiteRepository
    points = hooks.KILL_POINTS
    outages: tuple[Any, ...] = ()
    pile = 100
    broken: hooks.Parts = {}  # noqa: RUF012  (constant)

    def open(self, options: Options) -> Repository:
        return SQLiteRepository(options.database, options.durability)

    def prepare(self, log: SideLog) -> None:
        """Have the side log told what the proof must know."""


def store_of(database: str) -> Store:
    if database.startswith("mongodb://"):
        from .on_mongo import OnMongo  # the driver takes its time

        return OnMongo()
    return Store()
