"""The campaign on a MongoDB server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pymongo
from mongo_server import Server

from taskx import MongoRepository
from taskx.stores.base import Repository

from . import on_mongo
from .server_campaign import DISTURBANCES, ServerCampaign

__all__ = ["DISTURBANCES", "MongoCampaign", "on_own_server"]

NAME = "campaign"
#: The query for the notes of nodes.
NODES = {"_id": {"$regex": "^node/[^/]*$"}}


class MongoCampaign(ServerCampaign):
    """Processes on one collection.

    Args:
        url: the URL of the server.
        name: the name of the database; it must not exist.
        server: the server, if it may be killed and started again.
    """

    points = on_mongo.KILL_POINTS

    def __init__(
        self, folder: Path, url: str, seed: int = 0, name: str = NAME, server: Server | None = None
    ) -> None:
        port: int = pymongo.uri_parser.parse_uri(url)["nodelist"][0][1]
        super().__init__(folder, port, seed, server)
        self._client: Any = pymongo.MongoClient(url, heartbeatFrequencyMS=500)
        self._name = name
        if server is not None:
            self._make_tables()

    def _make_tables(self) -> None:
        """Write to each collection: a server that is killed during its first write cannot start again."""
        for collection in ("tasks", "tasks.batches", "tasks.notes"):
            self._client[self._name][collection].insert_one({"_id": "first"})
            self._client[self._name][collection].delete_one({"_id": "first"})

    def url(self, port: int, *, retries: bool) -> str:
        query = f"directConnection=true&retryWrites={'true' if retries else 'false'}"
        return f"mongodb://127.0.0.1:{port}/{self._name}?{query}"

    def versions(self) -> dict[str, int]:
        notes = self._client[self._name]["tasks.notes"]
        return {note["_id"]: note["version"] for note in notes.find(NODES)}

    def open(self) -> Repository:
        return MongoRepository(self._client[self._name], run_folder=self.folder / "nowhere")

    def close(self) -> None:
        """End all processes, and leave nothing on the server."""
        self.end()
        if self.server is None:
            self._client.drop_database(self._name)
        self._client.close()
        if self.server is not None:
            self.server.kill()


def on_own_server(folder: Path, seed: int) -> MongoCampaign:
    """Return a campaign with its own server: a replica set for an even seed, else a standalone one."""
    data = folder / "server"
    data.mkdir()
    server = Server("standalone" if seed % 2 else "set", data).start()
    return MongoCampaign(folder, server.url, seed, server=server)
