"""The campaign on a MongoDB server: two hosts, connections that are cut, a server that is killed."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pymongo
from mongo_proxy import Proxy
from mongo_server import Server

from taskx import MongoRepository
from taskx.stores.base import Repository

from . import on_mongo
from .campaign import LONGEST, Campaign, Child, until

NAME = "campaign"
#: The ways to disturb a connection.
DISTURBANCES = ("reset", "cut", "delay", "swallow asks", "swallow answers")
#: A short lease. A process may stand still for almost three seconds: it still sends a heartbeat in time, or
#: ends its tasks in time.
LEASE: dict[str, Any] = {"lease": 6.0, "margin": 0.5}
#: The query for the notes of nodes.
NODES = {"_id": {"$regex": "^node/[^/]*$"}}
_never = threading.Event()


class MongoCampaign(Campaign):
    """Processes on one collection, each with its own proxy to the server.

    Processes with the same folder of lock files are on the same host. About half of them are on each of
    two hosts. Only leases show a process whether nodes on the other host live.

    Args:
        url: the URL of the server.
        name: the name of the database; it must not exist.
        server: the server, if it may be killed and started again.
    """

    points = on_mongo.KILL_POINTS
    pause = 0.5  # importing the driver takes a while

    def __init__(
        self, folder: Path, url: str, seed: int = 0, name: str = NAME, server: Server | None = None
    ) -> None:
        super().__init__(folder, seed)
        self.server = server
        self._client: Any = pymongo.MongoClient(url, heartbeatFrequencyMS=500)
        self._name = name
        self._notes = self._client[name]["tasks.notes"]
        self._seen: dict[str, int] = {}
        self._beats = 0
        self._port: int = pymongo.uri_parser.parse_uri(url)["nodelist"][0][1]
        self.proxies: dict[str, Proxy] = {}
        if server is not None:
            self._make_tables()

    def _make_tables(self) -> None:
        """Write to each collection: a server that is killed during its first write cannot start again."""
        for collection in ("tasks", "tasks.batches", "tasks.notes"):
            self._client[self._name][collection].insert_one({"_id": "first"})
            self._client[self._name][collection].delete_one({"_id": "first"})

    def spawn(self, **options: Any) -> Child:
        """Start a process; without ``retries`` its driver does not repeat commands by itself."""
        proxy = Proxy(self._port)
        host = self.folder / options.pop("host", "here")
        retries = "true" if options.pop("retries", True) else "false"
        query = f"directConnection=true&retryWrites={retries}"
        url = f"mongodb://127.0.0.1:{proxy.port}/{self._name}?{query}"
        child = super().spawn(**{"database": url, "host": str(host), **LEASE, **options})
        self.proxies[child.who] = proxy
        return child

    def beats(self) -> int:
        """Return the number of heartbeats that were seen so far; a new note begins with any version."""
        before, self._seen = self._seen, {n["_id"]: n["version"] for n in self._notes.find(NODES)}
        risen = (version - before.get(name, version) for name, version in self._seen.items())
        self._beats += sum(count for count in risen if 0 < count < 1000)
        return self._beats

    def open(self) -> Repository:
        return MongoRepository(self._client[self._name], run_folder=self.folder / "nowhere")

    def _random_options(self) -> dict[str, Any]:
        options = super()._random_options()
        options["host"] = self.rng.choice(("here", "there"))
        options["retries"] = self.rng.random() < 0.5
        if "point" in options:  # each point is passed less often in the same time
            together = "batch" in options["point"] or "transaction" in options["point"]
            most = 3 if together else 15
            options["passings"] = min(options["passings"], self.rng.randint(1, most))
        # They would also interrupt the driver, which is not tested here.
        if options.pop("interrupts", 0):
            options["overflow"] = "block"
        return options

    # --- disturbances

    def _strike(self, child: Child) -> None:
        chance = self.rng.random()
        if chance < 0.6 or child.ended():
            super()._strike(child)
        elif chance < 0.65 and self.server is not None:
            self.restart_server()
        else:
            how = self.rng.choice(DISTURBANCES)
            seconds = self.rng.uniform(0.05, 0.8)  # shorter than a lease
            self.disturb(self.proxies[child.who], how, seconds)

    def disturb(self, proxy: Proxy, how: str, seconds: float) -> None:
        """Cut a connection, slow it down or drop its messages for some seconds, and repair it."""
        self.log.tell("disturbed", note=f"{how} {seconds:.2f}")
        if how in ("reset", "cut"):
            proxy.cut(refuse=how == "cut")
        elif how == "delay":
            proxy.judge = lambda direction, piece: not _never.wait(0.02)
        else:
            swallowed = how.split()[1][:-1]
            proxy.judge = lambda direction, piece: direction != swallowed
        _never.wait(seconds)
        proxy.heal()

    def restart_server(self) -> None:
        """Kill the server, as a power cut would, and start it again."""
        assert self.server is not None
        self.log.tell("server", note="killed")
        self.server.kill()
        _never.wait(self.rng.uniform(0.0, 0.5))
        self.server.start()
        self.log.tell("server", note="back")

    # --- the end

    def drain(self, seconds: float = LONGEST, processes: int = 2, **options: Any) -> None:
        super().drain(seconds, processes, **options)
        self.let_nodes_be_forgotten()

    def let_nodes_be_forgotten(self) -> None:
        """Wait until a living node has forgotten the dead ones, after their leases expired."""
        if not self._notes.count_documents(NODES):
            return
        last = self.spawn(role="serve")
        self.wait_for("started", who=last.who)
        until(lambda: self._notes.count_documents(NODES) <= 1, "dead nodes are forgotten")
        last.finish()

    def end(self) -> None:
        super().end()
        for proxy in self.proxies.values():
            proxy.close()
        self.proxies.clear()

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
