"""The campaign on a PostgreSQL server, which also ends connections by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mongo_proxy import Proxy
from postgres_server import Server, private

from taskx import PostgresRepository
from taskx.stores.base import Repository

from . import on_postgres
from .server_campaign import DISTURBANCES, ServerCampaign


class PostgresCampaign(ServerCampaign):
    """Processes on one database of a server.

    Args:
        server: the server.
        name: the name of the database, which exists.
        kills: True if the server may be killed and started again.
    """

    points = on_postgres.KILL_POINTS
    disturbances = (*DISTURBANCES, "end")

    def __init__(
        self, folder: Path, server: Server, name: str, seed: int = 0, *, kills: bool = True
    ) -> None:
        super().__init__(folder, server.port, seed, server if kills else None)
        self._running = server
        self._name = name
        with self.open() as made:
            made.notes("")  # makes the tables

    def url(self, port: int, *, retries: bool) -> str:
        listen = "" if retries else "?listen=false"
        return f"postgresql://postgres@127.0.0.1:{port}/{self._name}{listen}"

    def versions(self) -> dict[str, int]:
        with self.open() as made:
            notes = made.notes("node/")
        return {name: note.version for name, note in notes.items() if name.count("/") == 1}

    def open(self) -> Repository:
        return PostgresRepository(
            self.url(self._running.port, retries=False).partition("?")[0],
            run_folder=self.folder / "nowhere",
        )

    def disturb(self, proxy: Proxy, how: str, seconds: float) -> None:
        if how != "end":
            super().disturb(proxy, how, seconds)
            return
        self.log.tell("disturbed", note="the server ends all connections")
        self._running.break_connections(self._name)


@contextmanager
def on_own_server(folder: Path, seed: int) -> Iterator[PostgresCampaign]:
    """Give a campaign with its own server."""
    with private() as server:
        made = PostgresCampaign(folder, server, server.new_database(), seed)
        try:
            yield made
        finally:
            made.close()
