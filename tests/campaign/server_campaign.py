"""A campaign on a database server: two hosts, connections that are cut, a server that is killed."""

from __future__ import annotations

import json
import threading
from abc import abstractmethod
from pathlib import Path
from typing import Any

from mongo_proxy import Proxy

from .campaign import LONGEST, Campaign, Child, until

#: The ways to disturb a connection.
DISTURBANCES = ("reset", "cut", "delay", "swallow asks", "swallow answers")
#: A short lease. A process may stand still for almost three seconds: it still sends a heartbeat in time, or
#: ends its tasks in time.
LEASE: dict[str, Any] = {"lease": 6.0, "margin": 0.5}
_never = threading.Event()


class ServerCampaign(Campaign):
    """Processes on one database, each with its own proxy to the server.

    Processes with the same folder of lock files are on the same host. About half of them are on each of
    two hosts. Only leases show a process whether nodes on the other host live.

    Args:
        port: the port of the server.
        server: the server, if it may be killed and started again.
    """

    pause = 0.5  # importing the driver takes a while
    disturbances: tuple[str, ...] = DISTURBANCES

    def __init__(self, folder: Path, port: int, seed: int = 0, server: Any = None) -> None:
        super().__init__(folder, seed)
        self.server = server
        self._seen: dict[str, int] = {}
        self._beats = 0
        self._port = port
        self._read_to, self._begun = 0, set[str]()
        self.proxies: dict[str, Proxy] = {}

    @abstractmethod
    def url(self, port: int, *, retries: bool) -> str:
        """Return the URL of the database through a port of this machine."""

    @abstractmethod
    def versions(self) -> dict[str, int]:
        """Return the versions of the notes of nodes, by name."""

    def spawn(self, **options: Any) -> Child:
        """Start a process; without ``retries`` its driver does not repeat commands by itself."""
        proxy = Proxy(self._port)
        host = self.folder / options.pop("host", "here")
        url = self.url(proxy.port, retries=options.pop("retries", True))
        child = super().spawn(**{"database": url, "host": str(host), **LEASE, **options})
        self.proxies[child.who] = proxy
        return child

    def beats(self) -> int:
        """Return the number of heartbeats that were seen so far; a new note begins with any version."""
        before, self._seen = self._seen, self.versions()
        risen = (version - before.get(name, version) for name, version in self._seen.items())
        self._beats += sum(count for count in risen if 0 < count < 1000)
        return self._beats

    def _random_options(self) -> dict[str, Any]:
        options = super()._random_options()
        options["host"] = self.rng.choice(("here", "there"))
        options["retries"] = self.rng.random() < 0.5
        options["seconds"] *= 4  # they start slowly
        if "point" in options:  # each point is passed less often in the same time
            together = "batch" in options["point"] or "transaction" in options["point"]
            most = 3 if together else 15
            options["passings"] = min(options["passings"], self.rng.randint(1, most))
        # They would also interrupt the driver, which is not tested here.
        if options.pop("interrupts", 0):
            options["overflow"] = "block"
        return options

    # --- disturbances

    def _at_work(self) -> set[str]:
        """Return the names of the processes that have begun to submit or to run tasks."""
        with open(self.side_log, "rb") as log:
            log.seek(self._read_to)
            for line in log:
                if not line.endswith(b"\n"):
                    break
                self._read_to += len(line)
                _, who, what, *_ = json.loads(line)
                if what == "started":
                    self._begun.add(who)
        return self._begun

    def _strike(self, child: Child) -> None:
        if child.who not in self._at_work() and self.rng.random() < 0.9:
            return  # on a loaded machine, most would be killed before they do anything
        chance = self.rng.random()
        if chance < 0.6 or child.ended():
            super()._strike(child)
        elif chance < 0.65 and self.server is not None:
            self.restart_server()
        else:
            how = self.rng.choice(self.disturbances)
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
        if not self.versions():
            return
        last = self.spawn(role="serve")
        self.wait_for("started", who=last.who)
        until(lambda: len(self.versions()) <= 1, "dead nodes are forgotten")
        last.finish()

    def end(self) -> None:
        super().end()
        for proxy in self.proxies.values():
            proxy.close()
        self.proxies.clear()
