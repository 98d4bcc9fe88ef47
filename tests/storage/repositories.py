"""The repositories that the storage tests run on."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mongomock
from mongo_server import new_database, shared

from taskx import (
    Clock,
    Codec,
    DuplicateTask,
    MemoryRepository,
    MongoRepository,
    SQLiteRepository,
    Task,
    TaskFilter,
    TaskNotFound,
    TaskRepository,
    TaskStatus,
)
from taskx.core.clock import SYSTEM_CLOCK
from taskx.storage.adapter import ORIGINAL_FIELDS, EightMethodAdapter
from taskx.storage.base import Repository


class TinyRepository(TaskRepository):
    """What a user might write: eight methods on a dict of JSON texts."""

    def __init__(self, fields: tuple[str, ...] | None = None) -> None:
        self._texts: dict[str, str] = {}
        self._lock = threading.Lock()
        self._fields = fields

    def _put(self, task: Task) -> None:
        data = task.to_dict()
        self._texts[task.id] = json.dumps({k: data[k] for k in self._fields or data})

    def create(self, task: Task) -> None:
        with self._lock:
            if task.id in self._texts:
                raise DuplicateTask(task.id)
            self._put(task)

    def get_by_id(self, task_id: str) -> Task:
        try:
            return Task.from_dict(json.loads(self._texts[task_id]))
        except KeyError:
            raise TaskNotFound(task_id) from None

    def update(self, task: Task) -> None:
        self.get_by_id(task.id)
        self._put(task)

    def update_status(self, task_id: str, status: TaskStatus, message: str = "") -> None:
        task = self.get_by_id(task_id)
        task.status, task.message = status, message
        self._put(task)

    def update_progress(self, task_id: str, progress: int, message: str = "") -> None:
        task = self.get_by_id(task_id)
        task.progress, task.message = progress, message
        self._put(task)

    def list(self, filter: TaskFilter) -> list[Task]:
        newest_first = sorted(self._meeting(filter), key=lambda t: t.created_at, reverse=True)
        return newest_first[filter.offset : filter.offset + filter.limit]

    def count(self, filter: TaskFilter) -> int:
        return len(self._meeting(filter))

    def delete(self, task_id: str) -> None:
        if self._texts.pop(task_id, None) is None:
            raise TaskNotFound(task_id)

    def _meeting(self, filter: TaskFilter) -> list[Task]:
        return [
            task
            for task in map(self.get_by_id, list(self._texts))
            if filter.type in (None, task.type)
            and filter.status in (None, task.status)
            and filter.created_by in (None, task.created_by)
            and (filter.start_date is None or task.created_at >= filter.start_date)
            and (filter.end_date is None or task.created_at <= filter.end_date)
        ]


def thirteen_fields_only() -> TinyRepository:
    """One that knows only the task of the original."""
    return TinyRepository(ORIGINAL_FIELDS)


class OnMongo(MongoRepository):
    """One with a database of its own, which is dropped when it is closed."""

    def __init__(
        self, database: Any, folder: Path, clock: Clock = SYSTEM_CLOCK, codec: Any = None
    ) -> None:
        super().__init__(database, run_folder=folder / "run", clock=clock, codec=codec)
        self.database = database

    def close(self) -> None:
        super().close()
        self.database.client.drop_database(self.database.name)


class Scramble(Codec):
    """Writes the same text differently each time, as encryption does."""

    def __init__(self, name: str = "scramble") -> None:
        self.name = name

    def encode(self, data: bytes) -> bytes:
        key = os.urandom(1)
        return key + bytes(byte ^ key[0] for byte in data)

    def decode(self, data: bytes) -> bytes:
        return bytes(byte ^ data[0] for byte in data[1:])


def coded(kind: str, folder: Path, clock: Clock, codec: Any) -> Repository:
    """A repository of a kind with a codec; another one of the same folder sees the same tasks."""
    if kind == "sqlite":
        return SQLiteRepository(folder / "tasks.db", clock=clock, codec=codec)
    if kind == "memory":
        return MemoryRepository(clock, codec)
    return OnMongo(mongomock.MongoClient().db, folder, clock, codec)


def on_server(kind: str) -> Callable[[Path, Clock], Repository]:
    """Makes repositories on a server that speaks MongoDB's protocol."""
    return lambda folder, clock: OnMongo(new_database(shared(kind)), folder, clock)


#: Every kind of repository that the runtime can drive, made in a folder with a clock.
MAKERS = {
    "memory": lambda folder, clock: MemoryRepository(clock),
    "sqlite": lambda folder, clock: SQLiteRepository(folder / "tasks.db", clock=clock),
    "mongomock": lambda folder, clock: OnMongo(mongomock.MongoClient().db, folder, clock),
    "mongo": on_server("standalone"),
    "mongo-set": on_server("set"),
    "sqlite-coded": lambda folder, clock: coded("sqlite", folder, clock, Scramble()),
    "adapter": lambda folder, clock: EightMethodAdapter(TinyRepository(), clock),
    "adapter-13": lambda folder, clock: EightMethodAdapter(thirteen_fields_only(), clock),
}
