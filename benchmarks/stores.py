"""The stores on which cells run."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from taskx import SQLiteRepository

if TYPE_CHECKING:
    from benchmarks.loops import Loop
    from taskx.stores.base import Repository


class Store(ABC):
    """A kind of repository. Each folder has a repository of its own.

    Attributes:
        durability: the failures that a stored task survives, in the table's words.
    """

    durability: str

    @abstractmethod
    def repository(self, folder: str) -> AbstractContextManager[Repository]:
        """Return the folder's repository."""

    @abstractmethod
    def loop(self, folder: str, count: int) -> Loop:
        """Return the floor for ``count`` tasks."""

    @abstractmethod
    def name(self) -> str:
        """Return a name from which :func:`named` makes the same store in another process."""


class OnSQLite(Store):
    """A store in a SQLite file in the folder."""

    def __init__(self, durability: str) -> None:
        self.durability = durability

    @contextmanager
    def repository(self, folder: str) -> Iterator[Repository]:
        yield SQLiteRepository(os.path.join(folder, "tasks.db"), self.durability)  # type: ignore[arg-type]

    def loop(self, folder: str, count: int) -> Loop:
        from benchmarks.sqlite_loop import SQLiteLoop  # an earlier TaskX may lack what it imports

        return SQLiteLoop(folder, self.durability, count)

    def name(self) -> str:
        return self.durability


class LeanOnSQLite(OnSQLite):
    """The same store with a floor that stores as little as possible."""

    def loop(self, folder: str, count: int) -> Loop:
        from benchmarks.sqlite_loop import LeanLoop

        return LeanLoop(folder, self.durability, count)


def named(name: str) -> Store:
    """Return the store with this name."""
    if "://" not in name:
        return OnSQLite(name)
    if name.startswith("postgres"):
        from benchmarks.postgres_store import OnPostgres

        return OnPostgres(name)
    from benchmarks.mongo.store import OnMongo

    return OnMongo(name)
