"""Fixtures for the tests of the PostgreSQL repository."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import postgres_server
import psycopg
import pytest
from helpers import PATIENCE
from mongo_proxy import Proxy

from taskx import PostgresRepository

from ..repositories import on_postgres, postgres_url


@pytest.fixture
def server() -> postgres_server.Server:
    """The server that all tests of this process share."""
    return postgres_server.shared()


@pytest.fixture
def url() -> str:
    """The URL of the database of this process."""
    postgres_server.shared()  # says that this test uses it
    return postgres_url()


@pytest.fixture
def repository(tmp_path: Any) -> Iterator[PostgresRepository]:
    """An empty repository."""
    with on_postgres(tmp_path) as made:
        yield made


@pytest.fixture
def connection(url: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection of the application, which has a table of its own."""
    with psycopg.connect(url) as made:
        made.execute("CREATE TABLE IF NOT EXISTS numbers (n bigint)")
        made.execute("TRUNCATE numbers")
        made.commit()
        yield made
        if not made.closed:
            made.rollback()


@pytest.fixture
def rows(url: str, connection: Any) -> Callable[[], list[int]]:
    """Return a function that reads the committed rows of the application."""

    def rows() -> list[int]:
        with psycopg.connect(url, autocommit=True) as reader:
            return [n for (n,) in reader.execute("SELECT n FROM numbers ORDER BY n")]

    return rows


@pytest.fixture
def proxy(server: postgres_server.Server) -> Iterator[Proxy]:
    """A proxy between a repository and the server."""
    made = Proxy(server.port)
    yield made
    made.close()


@pytest.fixture
def through(
    request: Any, proxy: Proxy, url: str, repository: Any, tmp_path: Any
) -> Iterator[PostgresRepository]:
    """A repository whose connections go through the proxy. A test may give the seconds that it waits."""
    name = urlsplit(url).path
    with PostgresRepository(
        f"postgresql://postgres@127.0.0.1:{proxy.port}{name}",
        run_folder=tmp_path / "run",
        timeout=getattr(request, "param", PATIENCE),
    ) as made:
        yield made
