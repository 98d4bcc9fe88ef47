"""The servers that a benchmark starts on this machine, and ends. They are those of the tests."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

_TESTS = Path(__file__).parent.parent / "tests"
#: Each server: its URL and the id of its process.
Running = tuple[str, int]


def _module(name: str) -> Any:
    for folder in (_TESTS, _TESTS / "engines"):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    return import_module(name)


@contextmanager
def redis(folder: Path) -> Iterator[Running]:
    """Run a server with the protocol of Redis (Valkey), which keeps nothing on disk."""
    yield from _until_end(_module("servers").Broker(_made(folder / "redis")))


@contextmanager
def rabbitmq(folder: Path) -> Iterator[Running]:
    """Run a RabbitMQ server from the system's packages."""
    yield from _until_end(_module("servers").Rabbit(_made(folder / "rabbitmq")))


def has_rabbitmq() -> bool:
    """Return True if RabbitMQ is installed."""
    return bool(_module("servers").RABBITMQ.exists())


@contextmanager
def mongo(folder: Path) -> Iterator[Running]:
    """Run SecantusDB, a small server with the protocol of MongoDB, with a sync for each write."""
    for url, pid in _until_end(_module("mongo_server").Server("set", _made(folder / "mongo"))):
        yield f"{url}/?directConnection=true", pid


@contextmanager
def postgres(folder: Path) -> Iterator[Running]:
    """Run PostgreSQL with ``fsync`` on, in a folder of its own."""
    server = _module("postgres_server")
    server._OPTIONS.update(fsync="on", full_page_writes="on", shared_buffers="256MB")
    with server.private() as running:
        pid = int((running.data / "postmaster.pid").read_text().split()[0])
        yield f"postgresql://postgres@127.0.0.1:{running.port}", pid


def proxy(port: int, judge: Callable[[str, bytes], bool]) -> Any:
    """Return a proxy for a port of this machine. ``judge`` gets each piece of traffic."""
    made = _module("mongo_proxy").Proxy(port)
    made.judge = judge
    return made


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _until_end(server: Any) -> Iterator[Running]:
    try:
        server.start()
        yield server.url, (getattr(server, "process", None) or server._process).pid
    finally:
        server.kill()
