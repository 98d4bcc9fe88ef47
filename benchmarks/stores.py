"""Where a cell keeps its tasks."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from benchmarks.loops import Loop
from benchmarks.sqlite_loop import LeanLoop, SQLiteLoop
from taskx import SQLiteRepository
from taskx.storage.base import Repository


class Store(ABC):
    """A kind of repository; each folder has one of its own.

    Attributes:
        durability: what a stored task survives, in the table's words.
    """

    durability: str

    @abstractmethod
    def repository(self, folder: str) -> AbstractContextManager[Repository]:
        """The folder's repository."""

    @abstractmethod
    def loop(self, folder: str, count: int) -> Loop:
        """The floor for so many tasks."""

    @abstractmethod
    def name(self) -> str:
        """What :func:`named` makes the same one from, in another process."""


class OnSQLite(Store):
    """A file in the folder."""

    def __init__(self, durability: str) -> None:
        self.durability = durability

    @contextmanager
    def repository(self, folder: str) -> Iterator[Repository]:
        yield SQLiteRepository(os.path.join(folder, "tasks.db"), self.durability)  # type: ignore[arg-type]

    def loop(self, folder: str, count: int) -> Loop:
        return SQLiteLoop(folder, self.durability, count)

    def name(self) -> str:
        return self.durability


class LeanOnSQLite(OnSQLite):
    """The same with a floor that stores as little as a task queue can."""

    def loop(self, folder: str, count: int) -> Loop:
        return LeanLoop(folder, self.durability, count)


def named(name: str) -> Store:
    """The store that another process calls so."""
    if "://" not in name:
        return OnSQLite(name)
    from benchmarks.mongo.store import OnMongo

    return OnMongo(name)
