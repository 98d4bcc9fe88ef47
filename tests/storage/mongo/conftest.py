"""Fixtures for the tests of the MongoDB repository."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mongomock
import pymongo
import pytest
from mongo_proxy import Proxy, swallowing
from mongo_server import PATIENCE, new_database

from taskx import MongoRepository, RepositoryUnavailable
from taskx.stores.queries import Changes
from taskx.tasks import lifecycle


@pytest.fixture
def url(mongo_server: Callable[[str], str]) -> str:
    """The URL of a server: a standalone one, which has the fewest features, or that of the environment."""
    return mongo_server("standalone")


@pytest.fixture
def database(url: str) -> Iterator[Any]:
    made = new_database(url)
    yield made
    made.client.drop_database(made.name)


@pytest.fixture
def mock() -> Any:
    """A mock of a database, which is quick."""
    return mongomock.MongoClient().db


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., MongoRepository]]:
    """Return a function that makes repositories; they are closed at the end."""
    made: list[MongoRepository] = []

    def make(database: Any, **options: Any) -> MongoRepository:
        given = {"run_folder": tmp_path / "run", "timeout": PATIENCE, **options}
        made.append(MongoRepository(database, **given))
        made[-1].changed = Changes(made[-1])  # for tests
        return made[-1]

    yield make
    for repository in made:
        repository.close()


@pytest.fixture
def repository(make: Any, database: Any) -> MongoRepository:
    return make(database)


@pytest.fixture
def proxy(url: str) -> Iterator[Proxy]:
    """A proxy between a client and the server."""
    made = Proxy(pymongo.uri_parser.parse_uri(url)["nodelist"][0][1])
    yield made
    made.close()


@pytest.fixture
def through(proxy: Proxy, database: Any, make: Any) -> Iterator[Callable[..., MongoRepository]]:
    """Return a function that makes a repository whose connections go through the proxy."""
    clients = []

    def through(**options: Any) -> MongoRepository:
        client: Any = pymongo.MongoClient(
            f"mongodb://127.0.0.1:{proxy.port}/?directConnection=true", heartbeatFrequencyMS=500
        )
        clients.append(client)
        repository: MongoRepository = make(client[database.name], **options)
        return repository

    yield through
    for client in clients:
        client.close()


def sent_in_vain(
    proxy: Proxy, direction: str, words: Sequence[bytes], write: Callable[[], object]
) -> RepositoryUnavailable:
    """Swallow a direction from a request with one of these words on; return the error of that write.

    On a slow machine the time-out may pass before it is sent, and then the error is not in doubt.
    """
    proxy.judge = swallowing(direction, words, sent := threading.Event())
    while True:
        with pytest.raises(RepositoryUnavailable) as caught:
            write()
        if sent.is_set():
            return caught.value


class CommandCount(pymongo.monitoring.CommandListener):
    """The commands that a client sent."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def started(self, event: Any) -> None:
        self.names.append(event.command_name)

    def succeeded(self, event: Any) -> None:
        pass

    def failed(self, event: Any) -> None:
        pass


def insert(task_id: str, now: int = 1_700_000_000_000, **options: Any) -> Any:
    given: dict[str, Any] = {"type": "t", "params": "{}", "created_by": "", **options}
    owner = given.pop("owner", "")
    write = lifecycle.create(task_id=task_id, now=now, **given)
    write.row["owner"] = owner
    return write


def run(repository: MongoRepository, task_id: str, **options: Any) -> Any:
    """Store a task and start it."""
    assert list(repository.apply([insert(task_id, **options)])) == [True]
    start = lifecycle.start(repository.get_by_id(task_id), 1_700_000_000_001, "node")
    assert list(repository.apply([start])) == [True]  # type: ignore[list-item]
    return repository.get_by_id(task_id)
