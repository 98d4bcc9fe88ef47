"""Sites: a queue on an engine, its broker, and worker programs."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers import eventually
from mongo_server import new_database, shared

from engines.program import Site
from engines.servers import Broker, Crew, Rabbit
from taskx import TaskHandle


class Ground:
    """A queue of this process whose tasks the worker programs run."""

    def __init__(self, engine: str, folder: Path, broker: Broker | Rabbit, store: str = "") -> None:
        self.engine, self.folder, self.broker = engine, folder, broker
        self.store = store or str(folder / "tasks.db")
        self.crew = Crew(engine, self.store, broker.url, folder)
        self.log = str(folder / "side.log")
        self._edges: list[Site] = []

    def edge(self, **options: Any) -> Site:
        """Return a queue of this process: a started one sends tickets, with threads it only submits."""
        site = Site(self.engine, self.store, self.broker.url, **options)
        self._edges.append(site)
        if site.app is not None:
            site.queue.start()
        return site

    @property
    def queue(self) -> Any:
        return (self._edges[0] if self._edges else self.edge()).queue

    def renew(self) -> None:
        """Stop the queue of this process, and make another one."""
        for site in self._edges:
            site.close()
        self._edges.clear()
        self.edge()

    @property
    def engine_of_edge(self) -> Any:
        """The engine of the queue of this process."""
        return self._edges[0].engine

    def workers(self, count: int) -> None:
        """Wait until this number of tasks can run at a time."""
        eventually(lambda: sum(n.workers for n in self.queue.nodes() if n.alive) == count)

    def note(self, word: str, seconds: float = 0.0, **options: Any) -> TaskHandle[Any]:
        params = {"log": self.log, "word": word, "seconds": seconds}
        return self.queue.submit("note", params, **options)

    def hold(self, word: str, **options: Any) -> tuple[TaskHandle[Any], Callable[[], None]]:
        """Submit a task that runs until the returned function is called."""
        gate = self.folder / f"gate-{uuid.uuid4().hex}"
        params = {"log": self.log, "word": word, "gate": str(gate)}
        return self.queue.submit("hold", params, **options), gate.touch

    def begun(self, word: str) -> int:
        """Wait until a held task runs, and return the id of its process."""
        line = eventually(lambda: [w for w in self.lines() if w[:2] == ["begin", word]])
        return int(line[-1][2])

    def lines(self) -> list[list[str]]:
        path = Path(self.log)
        text = path.read_text("utf-8") if path.exists() else ""
        return [line.split() for line in text.splitlines()]

    def began(self, prefix: str) -> list[str]:
        """Return the words with this prefix, in the order in which their tasks began."""
        return [w[1] for w in self.lines() if w[0] == "begin" and w[1].startswith(prefix)]

    def close(self) -> None:
        for site in self._edges:
            site.queue.stop(timeout=5)
        self.crew.end()
        for site in self._edges:
            site.close()


@contextmanager
def with_workers(
    engine: str, folder: Path, server: Callable[[Path], Broker | Rabbit] = Broker
) -> Iterator[Ground]:
    """A ground with a broker and two workers of its own."""
    with ExitStack() as stack:
        broker = server(folder).start()
        stack.callback(broker.kill)
        ground = Ground(engine, folder, broker)
        stack.callback(ground.close)
        ground.crew.start()
        ground.workers(2)
        yield ground


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    """A broker that the test may kill."""
    made = Broker(tmp_path).start()
    yield made
    made.kill()


@pytest.fixture
def ground(tmp_path: Path, broker: Broker) -> Iterator[Callable[..., Ground]]:
    """Return a function that makes a ground for an engine, without workers."""
    with ExitStack() as stack:

        def make(engine: str, store: str = "") -> Ground:
            made = Ground(engine, tmp_path, broker, store)
            stack.callback(made.close)
            return made

        yield make


@pytest.fixture
def mongo_store() -> Iterator[str]:
    """The URL of an empty MongoDB database."""
    url = shared("standalone")
    database = new_database(url)
    yield f"{url}/{database.name}"
    database.client.drop_database(database.name)
