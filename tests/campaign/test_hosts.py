"""Several hosts on one server: one is cut off and comes back, one is slow, and their clocks differ."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import postgres_server
import pymongo
import pytest
from helpers import PATIENCE, eventually
from kinds import NO_NAMESPACES, NO_NETEM
from mongo_server import new_database, shared

from taskx import MongoRepository, PostgresRepository, TaskFilter, TaskStatus
from taskx.stores.base import Repository

from . import hosts
from .campaign import Campaign, Child, until
from .hosts import DELAY, Host, Loopback, Namespaces, Network
from .sidelog import Event

#: A short lease. A host may stand still for three seconds: it still sends a heartbeat in time, or ends its
#: tasks in time.
LEASE: dict[str, Any] = {"lease": 8.0, "margin": 0.4}
_never = threading.Event()
needs_namespaces = pytest.mark.skipif(
    bool(hosts.missing()), reason=f"{NO_NAMESPACES}: {hosts.missing()}"
)


class Stored(NamedTuple):
    """A store on a server of this machine.

    Attributes:
        port: the port of the server.
        url: the URL of the store, with ``{}`` for the address and port of the server.
        open: opens the store for this process.
    """

    port: int
    url: str
    open: Callable[[], Repository]


@contextmanager
def on_mongo(folder: Path) -> Iterator[Stored]:
    database = new_database(shared("set"))
    port = pymongo.uri_parser.parse_uri(shared("set"))["nodelist"][0][1]
    url = f"mongodb://{{}}/{database.name}?directConnection=true"
    yield Stored(port, url, lambda: MongoRepository(database, run_folder=folder / "nowhere"))
    database.client.drop_database(database.name)


@contextmanager
def in_postgres(folder: Path) -> Iterator[Stored]:
    server = postgres_server.shared()
    name = server.new_database()
    run = folder / "nowhere"
    yield Stored(
        server.port,
        f"postgresql://postgres@{{}}/{name}",
        lambda: PostgresRepository(server.url(name), run_folder=run),
    )
    server.drop_database(name)


class Hosts(Campaign):
    """Processes on one store, each on a host of its own.

    Args:
        network: the network of the hosts.
        store: the store.
    """

    def __init__(self, folder: Path, network: Network, store: Stored) -> None:
        super().__init__(folder)
        self._network, self.store = network, store

    def open(self) -> Repository:
        return self.store.open()

    def events(self) -> list[Event]:
        """Return all events after a pause, because the traffic of the hosts passes this process, too."""
        _never.wait(0.05)
        return super().events()

    def serve(self, *, slow: bool = False, **options: Any) -> tuple[Child, Host]:
        """Start a process on a new host. It submits the ``tasks``, and runs tasks until it is finished."""
        host = self._network.add(self.store.port)
        if slow:
            print(f"the link of host {len(self._network.hosts)} is slow by", host.slow())
        own = {"host": str(self.folder / f"host{len(self._network.hosts)}"), **LEASE}
        url = self.store.url.format(host.address)
        return self.spawn(host.command, database=url, role="serve", **own, **options), host

    def wait_for_all_outcomes(self) -> None:
        """Wait until all tasks have ended."""

        def ended() -> bool:
            # The ended ones first: a retry goes from running to pending between two counts of these.
            counts = [repository.count(TaskFilter(status=s)) for s in TaskStatus if s.finished]
            return sum(counts) == repository.count(TaskFilter())

        with self.open() as repository:
            until(ended, "all tasks end")

    def close(self) -> None:
        super().close()
        self._network.close()


@pytest.fixture
def network() -> Network:
    """Network namespaces; loopback addresses where there are none, which the end of the run tells."""
    return Loopback() if hosts.missing() else Namespaces()


@pytest.fixture
def campaign(store: str, tmp_path: Path, network: Network) -> Iterator[Hosts]:
    with {"mongo": on_mongo, "postgres": in_postgres}[store](tmp_path) as stored:
        made = Hosts(tmp_path, network, stored)
        yield made
        made.close()


def answered(campaign: Hosts, task_id: str) -> bool:
    """Return True if the process that submitted a task knows if it is stored."""
    answers = ("accepted", "rejected")
    return any(event.what in answers and event.id == task_id for event in campaign.events())


def ask_for_one(campaign: Hosts, child: Child) -> str:
    """Make a process submit a task. Return its id when it is stored."""
    known = {event.id for event in campaign.events() if event.what == "accepted"}

    def new() -> set[str]:
        accepted = (e for e in campaign.events() if e.what == "accepted" and e.who == child.who)
        return {event.id for event in accepted} - known

    child.tell()
    return until(new, "a task is stored").pop()


def ran_after(campaign: Hosts, ns: int, child: Child) -> bool:
    return any(e.what == "begin" and e.who == child.who and e.ns > ns for e in campaign.events())


def one_is_cut_off(campaign: Hosts, **broken: str) -> tuple[Child, Host]:
    """Cut a host off while it runs a task, until another host runs it; return the host and its process."""
    mixed = [{"kind": kind, "count": 6} for kind in ("brief", "raiser", "patient", "parent")]
    waiting = {"kind": "waiting", "params": campaign.hold()}
    ahead, host = campaign.serve(ahead=5.0, tasks=[waiting], **broken)
    campaign.wait_for("begin", kind="waiting", who=ahead.who)  # before others can take the task
    campaign.serve(ahead=-7.0, tasks=mixed)
    campaign.serve(slow=True, tasks=mixed)
    for child in campaign.children:
        campaign.wait_for("started", who=child.who)
    host.cut()
    ahead.tell()  # it submits a task, which has to wait
    campaign.wait_for("begin", kind="waiting", starts=2)
    campaign.let_go()
    return ahead, host


@pytest.mark.parametrize("store", ["mongo", "postgres"])
def test_a_host_that_is_cut_off_and_comes_back_breaks_no_promise(campaign):
    """Another host takes over its task after it has ended there, and what it submitted is stored later."""
    ahead, host = one_is_cut_off(campaign)
    host.mend()
    back = campaign.events()[-1].ns
    until(lambda: answered(campaign, "p1-2"), "the submit while it was cut off is answered")
    while not ran_after(campaign, back, ahead):  # its node comes back
        task = ask_for_one(campaign, ahead)
        campaign.wait_for("end", id=task)
    for child in campaign.children:
        campaign.wait_for("ready", who=child.who)  # it has submitted all of its tasks
    campaign.wait_for_all_outcomes()
    assert [child.finish() for child in campaign.children] == [0, 0, 0]
    outcome = campaign.verdict()
    assert not outcome.violations
    began = [task.started_at for task in outcome.records.values()]
    assert max(began) - min(began) > timedelta(hours=11), "the clocks were not apart"


@pytest.mark.parametrize("store", ["postgres"])
def test_a_host_that_does_not_heed_its_lease_is_found(campaign):
    one_is_cut_off(campaign, broken="lost lease ignored")
    assert any("was under way" in violation for violation in campaign.verdict().violations)


# The example

EXAMPLE = Path(__file__).parents[2] / "examples" / "hosts.py"
#: Runs a program as on a host whose clock is an hour off.
AHEAD = """
import runpy, sys
from taskx.tasks.clock import SystemClock
now = SystemClock.now_ms
SystemClock.now_ms = lambda self: now(self) + 3_600_000
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("store", ["postgres"])
def test_the_example_runs_each_task_on_one_of_three_hosts(campaign, network, tmp_path):
    """One is behind a slow line, and one has a clock that is an hour off. The third one is killed."""
    stored, running = campaign.store, []

    def on_a_host(*command: str, clock: tuple[str, ...] = ()) -> tuple[Host, subprocess.Popen[str]]:
        host = network.add(stored.port)
        folder = tmp_path / f"lock files {len(network.hosts)}"
        folder.mkdir()
        url = f"{stored.url.format(host.address)}?lease_timeout=8"
        process = subprocess.Popen(
            [*host.command, sys.executable, *clock, str(EXAMPLE), *command, url],
            env={**os.environ, "TMPDIR": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        return host, process

    try:
        slow, first = on_a_host("work", "slow")
        assert first.stdout.readline()
        slow.slow()
        _, submits = on_a_host("submit", "500")
        with campaign.open() as repository:
            done = TaskFilter(status=TaskStatus.COMPLETED, limit=1000)
            has_run = lambda name: name in {task.result for task in repository.list(done)}  # noqa: E731
            eventually(lambda: has_run("slow"))  # before faster hosts take the rest
            on_a_host("work", "ahead", clock=("-c", AHEAD))
            _, third = on_a_host("work", "killed")
            eventually(lambda: has_run("killed"))
            third.kill()
            said, _ = submits.communicate(timeout=4 * PATIENCE)
            tasks = repository.list(TaskFilter(limit=1000))
        ran = {name: int(count) for name, count in re.findall(r"(\w+): (\d+)", said)}
        assert sum(ran.values()) == 500
        assert ran.keys() == {"slow", "ahead", "killed"}
        assert {task.status for task in tasks} == {TaskStatus.COMPLETED}
    finally:
        for process in running:
            process.kill()
            process.communicate()


# The networks

ASK = """
import socket, sys, time
host, port, seconds = sys.argv[1:]
began = time.monotonic()
try:
    with socket.create_connection((host, int(port)), float(seconds)) as link:
        link.sendall(b"?")
        assert link.recv(1) == b"!"
except OSError:
    print("nothing")
else:
    print(time.monotonic() - began)
"""
NETWORK = """
from campaign.hosts import Namespaces
network = Namespaces()
network.add(1)
print(*network.holders, flush=True)
input()
"""


@pytest.fixture(params=["namespaces", "loopback"])
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    """A host whose server answers one byte for one byte."""
    if request.param == "namespaces" and hosts.missing():
        pytest.skip(f"{NO_NAMESPACES}: {hosts.missing()}")
    made = Namespaces() if request.param == "namespaces" else Loopback()
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=answer, args=(server,), daemon=True).start()
        yield made.add(server.getsockname()[1])
        made.close()
        server.shutdown(socket.SHUT_RDWR)


def answer(server: socket.socket) -> None:
    with suppress(OSError):
        while True:
            with server.accept()[0] as link:
                if link.recv(1):
                    link.sendall(b"!")


def seconds_for_an_answer(host: Host, seconds: float) -> float | None:
    """Return how long a program on the host waits for the server; None if it hears nothing."""
    command = [*host.command, sys.executable, "-I", "-S", "-c", ASK]
    asked = [*command, *host.address.split(":"), str(seconds)]
    said = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
    return None if said == "nothing" else float(said)


def test_a_host_that_is_cut_off_hears_nothing_until_the_link_is_mended(host):
    assert seconds_for_an_answer(host, PATIENCE) is not None
    host.cut()
    assert seconds_for_an_answer(host, 0.5) is None
    host.mend()
    assert seconds_for_an_answer(host, PATIENCE) is not None


def test_a_slow_link_delays_both_directions(host):
    host.slow()
    assert seconds_for_an_answer(host, PATIENCE) > 2 * DELAY


@pytest.mark.skipif(bool(hosts.no_netem()), reason=f"{NO_NETEM}: {hosts.no_netem()}")
def test_the_kernel_makes_a_link_slow(network):
    assert network.add(1).slow() == "netem"
    network.close()


@needs_namespaces
def test_a_network_is_gone_when_its_process_was_killed():
    owner = subprocess.Popen(
        [sys.executable, "-c", NETWORK],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    holders = owner.stdout.readline().split()
    assert len(holders) == 2
    owner.kill()
    owner.communicate()
    eventually(lambda: not any(Path(f"/proc/{int(pid)}/ns/net").exists() for pid in holders))
