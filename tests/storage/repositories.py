"""The repositories that the storage tests run on."""

from __future__ import annotations

import functools
import json
import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any

import django_project
import mongomock
import postgres_server
import pytest
from helpers import SOON
from mongo_server import new_database, shared

from taskx import (
    Clock,
    Codec,
    DuplicateTask,
    MemoryRepository,
    MongoRepository,
    PostgresRepository,
    RepositoryUnavailable,
    SQLiteRepository,
    Task,
    TaskFilter,
    TaskNotFound,
    TaskRepository,
    TaskStatus,
)
from taskx.repository.example import ExampleRepository
from taskx.stores.adapter import ORIGINAL_FIELDS, EightMethodAdapter
from taskx.stores.base import Repository
from taskx.tasks import lifecycle
from taskx.tasks.clock import SYSTEM_CLOCK
from taskx.tasks.timing import DEFAULT_TIMING, Timing
from taskx.tasks.writes import Insert


class TinyRepository(TaskRepository):
    """A user's repository: the eight methods on a dict of JSON texts."""

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
    """Return a repository that keeps only the fields of the original's task."""
    return TinyRepository(ORIGINAL_FIELDS)


class OnMongo(MongoRepository):
    """A repository with a database of its own, which is dropped when it is closed."""

    def __init__(
        self,
        database: Any,
        folder: Path,
        clock: Clock = SYSTEM_CLOCK,
        codec: Any = None,
        timing: Timing = DEFAULT_TIMING,
    ) -> None:
        super().__init__(
            database,
            timeout=SOON,  # the server of the tests scans, which takes seconds on a busy machine
            run_folder=folder / "run",
            clock=clock,
            codec=codec,
            timing=timing,
        )
        self.database, self.folder = database, folder

    def close(self) -> None:
        super().close()
        self.database.client.drop_database(self.database.name)


class OnExample(ExampleRepository):
    """The example with a timing, which the class of an author does not need."""

    def __init__(self, path: Path, clock: Clock, timing: Timing) -> None:
        super().__init__(path, clock)
        self.timing = timing


class Scramble(Codec):
    """A codec that writes the same text differently each time, as encryption does."""

    def __init__(self, name: str = "scramble") -> None:
        self.name = name

    def encode(self, data: bytes) -> bytes:
        key = os.urandom(1)
        return key + bytes(byte ^ key[0] for byte in data)

    def decode(self, data: bytes) -> bytes:
        return bytes(byte ^ data[0] for byte in data[1:])


def coded(
    kind: str, folder: Path, clock: Clock, codec: Any, timing: Timing = DEFAULT_TIMING
) -> Repository:
    """Return a repository of a kind with a codec. Repositories in the same folder share their tasks."""
    if kind == "sqlite":
        return SQLiteRepository(folder / "tasks.db", clock=clock, codec=codec, timing=timing)
    if kind == "memory":
        return MemoryRepository(clock, codec)
    if kind == "example":
        return ExampleRepository(folder / "example.db", clock, codec)
    return OnMongo(mongomock.MongoClient().db, folder, clock, codec)


def on_server(kind: str) -> Callable[..., Repository]:
    """Return a maker of repositories on a server that speaks MongoDB's protocol."""
    return lambda folder, clock, timing=DEFAULT_TIMING: OnMongo(
        new_database(shared(kind)), folder, clock, timing=timing
    )


@functools.cache
def postgres_url() -> str:
    """Return the URL of the PostgreSQL database of this process."""
    server = postgres_server.shared()
    return server.url(server.new_database())


def on_postgres(folder: Path, **options: Any) -> PostgresRepository:
    """Return an empty repository in the PostgreSQL database of this process."""
    postgres_server.shared()  # says that this test uses it
    made = PostgresRepository(postgres_url(), run_folder=folder / "run", **options)
    empty = "TRUNCATE taskx_task, taskx_parent, taskx_tag, taskx_note"
    made._server.transaction(lambda link: link.execute(empty), durable=False)
    return made


def prefixed(folder: Path, clock: Clock, timing: Timing) -> SQLiteRepository:
    """Return a repository in the file of an application, beside a table of that."""
    with closing(sqlite3.connect(folder / "app.db")) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE IF NOT EXISTS tasks (id TEXT PRIMARY KEY, owner TEXT)")
    return SQLiteRepository(folder / "app.db", prefix="taskx_", clock=clock, timing=timing)


#: Make every kind of repository that the runtime can use.
_MAKERS: dict[str, Callable[[Path, Clock, Timing], Repository]] = {
    "memory": lambda folder, clock, timing: MemoryRepository(clock, timing=timing),
    "sqlite": lambda folder, clock, timing: SQLiteRepository(
        folder / "tasks.db", clock=clock, timing=timing
    ),
    "mongomock": lambda folder, clock, timing: OnMongo(
        mongomock.MongoClient().db, folder, clock, timing=timing
    ),
    "mongo": on_server("standalone"),
    "mongo-set": on_server("set"),
    "sqlite-prefixed": prefixed,
    "sqlite-coded": lambda folder, clock, timing: coded(
        "sqlite", folder, clock, Scramble(), timing
    ),
    "example": lambda folder, clock, timing: OnExample(folder / "example.db", clock, timing),
    "django-sqlite": lambda folder, clock, timing: django_project.on_sqlite(
        folder, clock=clock, timing=timing
    ),
    "django-postgres": lambda folder, clock, timing: django_project.on_postgres(
        folder, clock=clock, timing=timing
    ),
    "django-mariadb": lambda folder, clock, timing: django_project.on_mariadb(
        folder, clock=clock, timing=timing
    ),
    "postgres": lambda folder, clock, timing: on_postgres(folder, clock=clock, timing=timing),
    "adapter": lambda folder, clock, timing: EightMethodAdapter(TinyRepository(), clock, timing),
    "adapter-13": lambda folder, clock, timing: EightMethodAdapter(
        thirteen_fields_only(), clock, timing
    ),
}


def _maker(kind: str) -> Callable[..., Any]:
    return lambda folder, clock, timing=DEFAULT_TIMING: _MAKERS[kind](folder, clock, timing)


#: The makers of every kind; each takes a folder, a clock and, if it matters, a timing.
MAKERS = {kind: _maker(kind) for kind in _MAKERS}

MONGO = ["mongomock", "mongo", "mongo-set"]


#: The kinds of repository for tests of what is built from the primitives: moves and queries. For all kinds,
#: the contract holds that the primitives work.
KINDS = ["memory", "sqlite", "mongomock", "adapter"]

#: A mark for tests of stores that store batches and relations of tasks.
between_tasks = pytest.mark.parametrize("store", KINDS[:-1], indirect=True)


def again(repository: Repository) -> Repository | None:
    """Return another repository object on the same data, as another process has one."""
    made: Repository
    if isinstance(repository, SQLiteRepository):
        made = SQLiteRepository(repository.path, prefix=repository.prefix, clock=repository.clock)
    elif isinstance(repository, ExampleRepository):
        made = ExampleRepository(repository.path, repository.clock)
    elif isinstance(repository, OnMongo):
        run, clock = repository.folder / "run", repository.clock
        made = MongoRepository(repository.database, timeout=SOON, run_folder=run, clock=clock)
    elif isinstance(repository, PostgresRepository):
        url, run, clock = postgres_url(), repository.run_folder, repository.clock
        made = PostgresRepository(url, run_folder=run, clock=clock)
    elif type(repository).__name__ == "DjangoRepository":  # importing it needs Django's settings
        made = type(repository)(
            repository.using, run_folder=repository.run_folder, clock=repository.clock
        )
    else:
        return None
    made.codecs = repository.codecs
    return made


def losing_answers(repository: Repository) -> AbstractContextManager[object] | None:
    """Make writes take place and then fail. Return None if the repository's errors are never in doubt."""
    if isinstance(repository, MongoRepository):
        return _lost_by_the_network(repository)
    if isinstance(repository, EightMethodAdapter):
        return _lost_by_methods(repository.inner)
    if isinstance(repository, PostgresRepository):
        return _lost_by_postgresql()
    if getattr(repository, "vendor", "sqlite") != "sqlite":
        return _lost_by_a_server()
    return None


@contextmanager
def _lost_by_postgresql() -> Iterator[None]:
    """Cut the connection when the server has carried out a commit, or a statement that is one."""
    import psycopg

    from taskx.stores.postgres.link import Link

    execute = Link.execute

    def lose(link: Link, sql: str, values: Sequence[Any] = ()) -> Any:
        done = execute(link, sql, values)
        idle = link.driver.pgconn.transaction_status == psycopg.pq.TransactionStatus.IDLE
        if sql == "COMMIT" or (idle and sql.startswith(("INSERT", "UPDATE", "DELETE"))):
            link.driver.close()
            raise psycopg.OperationalError("the answer was lost")
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Link, "execute", lose)
        yield


@contextmanager
def _lost_by_a_server() -> Iterator[None]:
    """Cut the connection when the server has carried out a commit, or a statement that is one."""
    from django.db.utils import OperationalError

    from taskx.contrib.django.link import Link

    execute = Link.execute

    def lose(link: Link, sql: str, values: Sequence[Any] = ()) -> int:
        changed = execute(link, sql, values)
        writes = sql.startswith(("INSERT", "UPDATE", "DELETE"))
        idle = writes and link.vendor == "postgresql" and not _in_transaction(link)
        if sql == "COMMIT" or idle:
            link.django.connection.close()
            raise OperationalError("the answer was lost")
        return changed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Link, "execute", lose)
        yield


def _in_transaction(link: Any) -> bool:
    return bool(link.django.connection.info.transaction_status)


@contextmanager
def _lost_by_the_network(repository: MongoRepository) -> Iterator[None]:
    sender = repository._sender
    send = sender._send

    def lose(operations: Sequence[Any]) -> Any:
        send(operations)
        error = RepositoryUnavailable("the answer was lost")
        error.in_doubt = True
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sender, "_send", lose)
        yield


@contextmanager
def _lost_by_methods(inner: TaskRepository) -> Iterator[None]:
    def lost(method: Callable[..., object]) -> Callable[..., object]:
        def lose(*args: object) -> None:
            method(*args)
            patch.setattr(inner, "get_by_id", fail)
            raise OSError("the answer was lost")

        return lose

    def fail(task_id: str) -> None:
        raise OSError("not now")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("create", "update", "delete"):
            patch.setattr(inner, name, lost(getattr(inner, name)))
        yield


def insert(task_id: str, clock: Clock, *, owner: str = "", **options: Any) -> Insert:
    """Return the write of a new task."""
    given = {"type": "t", "params": "{}", "created_by": "", "now": clock.now_ms(), **options}
    write = lifecycle.create(task_id=task_id, **given)
    write.row["owner"] = owner
    return write


def ids(stubs: Iterable[Any]) -> list[str]:
    return [stub.id for stub in stubs]
