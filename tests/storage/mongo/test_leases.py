"""Who lives: leases that observers judge, and locks where nodes share a host."""

from __future__ import annotations

import logging
import random
import signal
import subprocess
import sys
import threading

import pytest

from taskx import RepositoryUnavailable
from taskx.core import lifecycle
from taskx.storage.base import Node
from taskx.storage.mongo.hosts import HostLocks
from taskx.storage.mongo.leases import Leases
from taskx.testing import ManualClock

from .conftest import insert

LEASE = 30.0


class Broken:
    """A connection that can be cut."""

    def __init__(self, connection):
        self._connection = connection
        self.down = False

    @property
    def nodes(self):
        return self._connection.nodes

    def run(self, work, timeout=None):
        if self.down:
            raise RepositoryUnavailable("cut off")
        return work()


class Host:
    """A host of its own: its clock, its folder for locks, its connection."""

    def __init__(self, connection, folder):
        self.clock = ManualClock()
        self.connection = Broken(connection)
        self.folder = folder
        self.restart()

    def restart(self):
        locks = HostLocks(str(self.folder))
        self.leases = Leases(self.connection, LEASE, locks, self.clock.monotonic)

    def alive(self, node):
        return {seen.id: seen.alive for seen in self.leases.nodes()}.get(node)


@pytest.fixture
def connection(make, mock):
    return make(mock)._connection


@pytest.fixture
def host(connection, tmp_path):
    made = []

    def host():
        made.append(Host(connection, tmp_path / f"host{len(made)}"))
        return made[-1]

    return host


@pytest.fixture
def silent(connection):
    """The record of a node on a host that is not seen from here, and how to have it beat."""
    record = {
        "_id": "n",
        "name": "there",
        "types": [],
        "stopping": False,
        "host": "there",
        "lock": 7,
        "beat": 5,
        "still": 0,
        "dead": 0,
    }
    connection.nodes.insert_one(record)

    def beat():
        changed = {"$inc": {"beat": 1}, "$set": {"still": 0}}
        return connection.nodes.update_one({"_id": "n", "dead": 0}, changed).matched_count == 1

    return beat


def watch(host, seconds, every=0.5):
    """Look for so long, as a scheduler does; returns what was seen last."""
    for _ in range(round(seconds / every)):
        host.clock.advance(every)
        seen = host.alive("n")
    return seen


class TestJudging:
    def test_dead_after_a_whole_lease_without_a_beat(self, host, silent, connection):
        observer = host()
        assert observer.alive("n") is True
        assert watch(observer, LEASE - 0.5) is True
        assert watch(observer, 0.5) is False
        assert connection.nodes.find_one({"_id": "n"})["dead"] == 1
        assert not silent(), "no beat revives it"

    def test_a_node_that_beats_is_never_dead(self, host, silent):
        observer = host()
        for _ in range(20):
            assert watch(observer, LEASE - 1) is True
            assert silent()

    def test_a_server_that_was_away_ages_nobody(self, host, silent):
        """Looks that failed, and gaps between looks, are not counted."""
        observer = host()
        watch(observer, 10)
        observer.connection.down = True
        for _ in range(100):
            observer.clock.advance(0.5)
            with pytest.raises(RepositoryUnavailable):
                observer.alive("n")
        observer.connection.down = False
        assert watch(observer, LEASE - 11) is True
        observer.clock.advance(1000)  # it slept
        assert observer.alive("n") is True
        assert watch(observer, 2) is False

    def test_a_server_that_comes_and_goes_ages_nobody(self, host, silent):
        """However close together: between two looks there was one that failed."""
        observer = host()
        for number in range(200):
            observer.clock.advance(0.5)
            observer.connection.down = number % 2 == 1
            if observer.connection.down:
                with pytest.raises(RepositoryUnavailable):
                    observer.alive("n")
            else:
                assert observer.alive("n") is True

    def test_observers_that_restart_often_get_there(self, host, silent):
        """What was counted stands on the node's record."""
        observer, spent = host(), 0.0
        while watch(observer, 4) is True:
            observer.restart()
            spent += 4
            assert spent < 3 * LEASE
        assert spent >= LEASE - 4

    def test_many_observers_do_not_count_twice(self, host, silent):
        observers = [host() for _ in range(5)]
        for _ in range(round((LEASE - 1) / 0.5)):
            for observer in observers:
                observer.clock.advance(0.5)
                assert observer.alive("n") is True
        assert any(watch(observer, 5) is False for observer in observers)

    def test_a_beat_at_the_last_moment_is_a_life(self, host, silent, monkeypatch):
        """Between the look and the mark: the mark is a compare-and-set."""
        observer = host()
        observer.alive("n")
        watch(observer, LEASE - 0.5)
        observer.clock.advance(0.5)
        mark = observer.leases._mark_dead
        monkeypatch.setattr(
            observer.leases, "_mark_dead", lambda unchanged: silent() and mark(unchanged)
        )
        assert observer.alive("n") is True

    @pytest.mark.parametrize("hours", [-1, 1])
    def test_wall_clocks_mean_nothing(self, host, silent, hours):
        observer = host()
        observer.alive("n")
        observer.clock._wall += hours * 3_600_000
        assert watch(observer, LEASE - 0.5) is True
        assert watch(observer, 0.5) is False

    def test_one_that_is_dead_can_be_forgotten_and_no_other(self, host, silent, connection):
        observer = host()
        observer.leases.leave("n")
        assert connection.nodes.find_one({"_id": "n"}) is not None
        assert not observer.leases.is_dead("n")
        watch(observer, LEASE + 0.5)
        assert observer.leases.is_dead("n")
        observer.leases.leave("n")
        assert connection.nodes.find_one({"_id": "n"}) is None
        assert observer.leases.is_dead("n")


@pytest.fixture
def ours(host, monkeypatch):
    """A host with a node that beats when it is told to."""
    monkeypatch.setattr(Leases, "_run", lambda self: None)
    made = host()
    made.leases.join(Node(id="n", name="ours"))
    made.told = []
    made.leases.watch("n", lambda: made.told.append(made.clock.monotonic()))
    yield made
    made.connection.down = False
    made.leases.leave("n")


class TestBeingJudged:
    def test_it_is_told_before_others_may_take_over(self, ours):
        joined = ours.clock.monotonic()
        ours.connection.down = True
        for _ in range(round(LEASE)):
            ours.clock.advance(1)
            ours.leases.beat("n")
        assert ours.told[0] - joined == pytest.approx(LEASE * 0.8, abs=1)
        assert ours.leases.lost("n")

    def test_an_acknowledged_beat_counts_from_when_it_was_sent(self, ours, monkeypatch):
        nodes = ours.connection.nodes

        class Slow:
            def update_one(self, *args):
                done = nodes.update_one(*args)
                ours.clock.advance(10)
                return done

        monkeypatch.setattr(Broken, "nodes", Slow())
        ours.leases.beat("n")
        monkeypatch.undo()
        ours.clock.advance(LEASE * 0.8 - 10.5)
        assert not ours.leases.lost("n")
        ours.clock.advance(1)
        assert ours.leases.lost("n")

    def test_it_is_told_though_that_cannot_be_logged(self, ours, monkeypatch):
        """The thread that beats goes on, too: it is the only one."""
        monkeypatch.setattr(logging, "raiseExceptions", False)
        logger = logging.getLogger("taskx")
        monkeypatch.setattr(logger, "filters", [lambda record: 1 / 0])
        ours.connection.down = True
        ours.clock.advance(LEASE * 0.8)
        ours.leases.beat("n")
        assert ours.told

    def test_back_in_time_it_goes_on(self, ours):
        ours.connection.down = True
        ours.clock.advance(LEASE * 0.8)
        ours.leases.beat("n")
        assert ours.told
        ours.connection.down = False
        ours.leases.beat("n")
        assert not ours.leases.lost("n")

    def test_taken_for_dead_it_waits_until_it_is_forgotten(
        self, ours, host, connection, monkeypatch
    ):
        """Or what it starts anew would be taken from it, too."""
        other = host()
        watch(other, LEASE + 1)
        connection.nodes.update_one({"_id": "n"}, {"$set": {"dead": 1}})
        ours.leases.beat("n")
        assert ours.leases.lost("n")
        ours.clock.advance(1000)
        ours.leases.beat("n")
        assert ours.leases.lost("n")
        other.leases.leave("n")
        ours.leases.beat("n")
        assert not ours.leases.lost("n")
        assert other.alive("n") is True

    def test_it_joins_though_its_record_is_sent_twice(self, connection, host, monkeypatch):
        """As the driver does when the first answer was lost."""
        monkeypatch.setattr(Leases, "_run", lambda self: None)
        nodes = connection.nodes

        class Twice:
            def __getattr__(self, name):
                return getattr(nodes, name)

            def insert_one(self, record):
                nodes.insert_one(dict(record))
                nodes.insert_one(record)

        monkeypatch.setattr(Broken, "nodes", Twice())
        ours = host()
        ours.leases.join(Node(id="n", name="ours"))
        nodes.delete_one({"_id": "n"})
        ours.clock.advance(LEASE)
        for _ in range(2):  # the second one meets what the first one left
            ours.leases.beat("n")
        assert not ours.leases.lost("n")
        ours.leases.leave("n")
        assert nodes.count_documents({}) == 0

    def test_whatever_the_network_does_it_is_told_first(self, connection, tmp_path, monkeypatch):
        """Random outages, random looks: the mark never comes before the word."""
        monkeypatch.setattr(Leases, "_run", lambda self: None)
        for seed in range(30):
            chance = random.Random(seed)
            clock = ManualClock()
            here, there = (Host(connection, tmp_path / name) for name in ("here", "there"))
            for one in (here, there):
                one.clock = clock
                one.restart()
            node, told = f"n{seed}", []
            here.leases.join(Node(id=node, name="n"))
            here.leases.watch(node, lambda told=told: told.append(True))
            marked = 0
            for _ in range(400):
                clock.advance(0.5)
                here.connection.down = chance.random() < 0.97
                there.connection.down = chance.random() < 0.1
                told.clear()
                here.leases.beat(node)
                if not there.connection.down and there.alive(node) is False:
                    assert told, f"seed {seed}: taken for dead without a word"
                    marked += 1
                    there.leases.leave(node)
            here.connection.down = False
            here.leases.leave(node)
            connection.nodes.delete_many({})
            if seed == 0:
                assert marked


class TestStarting:
    def test_without_a_lease_nothing_is_started_or_taken(self, make, mock, monkeypatch):
        """The rest of the batch is written."""
        monkeypatch.setattr(Leases, "_run", lambda self: None)
        clock = ManualClock()
        repository = make(mock, clock=clock)
        repository.join(Node(id="n", name="ours"))
        repository.apply([insert("a"), insert("b")])
        start = lifecycle.start(repository.get_by_id("a"), 1, "n")
        clock.advance(LEASE)
        writes = [start, insert("c"), lifecycle.take("b", "n"), lifecycle.take("b", "other")]
        assert repository.apply(writes) == [False, True, False, True]
        repository._leases.beat("n")
        assert repository.apply([start]) == [True]
        repository.leave("n")


class TestBeating:
    def test_a_node_does_not_join_without_a_heartbeat_thread(self, host, connection, monkeypatch):
        """The next one to join has one started."""
        left, start = [1], threading.Thread.start

        def refuse_first(thread):
            if left:
                left.clear()
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", refuse_first)
        made = host()
        with pytest.raises(RuntimeError):
            made.leases.join(Node(id="first", name="ours"))
        assert made.leases.nodes() == []
        beaten = threading.Event()
        monkeypatch.setattr(Leases, "beat", lambda *args: beaten.set())
        made.leases.join(Node(id="second", name="ours"))
        assert beaten.wait(20)
        made.leases.leave("second")

    def test_a_heartbeat_goes_on_after_an_error(self, host, monkeypatch, caplog):
        made, beaten, left = host(), threading.Event(), [SystemExit("a defect")]

        def beat(self, node, own):
            made.clock.advance(LEASE)  # the next one is due
            if left:
                raise left.pop()
            beaten.set()

        monkeypatch.setattr(Leases, "beat", beat)
        made.leases.join(Node(id="n", name="ours"))
        assert beaten.wait(20)
        made.leases.leave("n")
        assert "node n stumbled at its beat; it goes on" in caplog.text


NODE = """
import sys, mongomock, pymongo
from taskx.storage.mongo.hosts import HostLocks
print(*HostLocks(sys.argv[1]).hold("n"), flush=True)
sys.stdin.readline()
"""


@pytest.mark.process
class TestOnOneHost:
    """The kernel tells, at once."""

    @pytest.fixture
    def process(self, tmp_path):
        child = subprocess.Popen(
            [sys.executable, "-c", NODE, str(tmp_path / "run")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        *host, inode = child.stdout.readline().split()
        yield child, " ".join(host), int(inode)
        child.kill()
        child.communicate()

    def test_alive_until_its_process_dies(self, process, tmp_path):
        child, host, inode = process
        locks = HostLocks(str(tmp_path / "run"))
        assert locks.alive("n", host, inode) is True
        child.send_signal(signal.SIGSTOP)
        assert locks.alive("n", host, inode) is True
        child.kill()
        child.wait(20)
        assert locks.alive("n", host, inode) is False

    @pytest.mark.parametrize("what", ["folder", "machine", "file", "nothing", "no lock"])
    def test_where_it_cannot_be_seen_nothing_is_said(self, process, tmp_path, what):
        """Another container with the same host name, another machine, a file that was cleared away."""
        child, host, inode = process
        child.kill()
        child.wait(20)
        folder = tmp_path / ("elsewhere" if what == "folder" else "run")
        if what == "machine":
            host = "another-boot " + " ".join(host.split()[1:])
        elif what == "file":
            inode += 1
        elif what == "nothing":
            (tmp_path / "run" / "mongo-nodes" / "n.lock").unlink()
        elif what == "no lock":
            host, inode = "", 0
        assert HostLocks(str(folder)).alive("n", host, inode) is None

    def test_dead_at_once_for_who_shares_the_host(self, process, connection, tmp_path):
        child, host, inode = process
        record = {
            "_id": "n",
            "name": "n",
            "types": [],
            "stopping": True,
            "host": host,
            "lock": inode,
            "beat": 0,
            "still": 0,
            "dead": 0,
        }
        connection.nodes.insert_one(record)
        near = Leases(connection, LEASE, HostLocks(str(tmp_path / "run")), ManualClock().monotonic)
        far = Leases(connection, LEASE, HostLocks(str(tmp_path / "far")), ManualClock().monotonic)
        assert [node.alive for node in (*near.nodes(), *far.nodes())] == [True, True]
        child.kill()
        child.wait(20)
        assert [node.alive for node in far.nodes()] == [True]
        assert [(node.alive, node.stopping) for node in near.nodes()] == [(False, True)]
        assert [node.alive for node in far.nodes()] == [False]

    def test_a_folder_of_another_user_is_not_trusted(self, monkeypatch, tmp_path):
        monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
        locks = HostLocks(None)
        assert locks.hold("n")[1] != 0
        locks.release("n")
        [folder] = tmp_path.iterdir()
        folder.chmod(0o777)
        assert HostLocks(None).hold("n") == ("", 0)
