"""Tests of leases, which observers judge, and of locks for nodes on the same host."""

from __future__ import annotations

import json
import logging
import random
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta

import attrs
import pytest
from helpers import PATIENCE
from storage.mongo.conftest import insert
from storage.repositories import MAKERS

from taskx import RepositoryUnavailable
from taskx.stores.liveness.base import PREFIX, Node
from taskx.stores.liveness.leases import Leases
from taskx.stores.liveness.locks import HostLocks
from taskx.stores.parts import House
from taskx.tasks import lifecycle
from taskx.tasks.clock import SYSTEM_CLOCK
from taskx.tasks.timing import DEFAULT_TIMING
from taskx.tasks.writes import NoteChange
from taskx.testing import ManualClock

LEASE = 30.0


class Broken:
    """A connection to the notes that a test can cut."""

    def __init__(self, store):
        self._store = store
        self.down = False

    def _up(self):
        if self.down:
            raise RepositoryUnavailable("cut off")
        return self._store

    def apply(self, writes):
        return self._up().apply(writes)

    def notes(self, prefix):
        return self._up().notes(prefix)

    def put_notes(self, changes):
        return self._up().put_notes(changes)

    @property
    def house(self):
        return House()


class Host:
    """A host with its own clock, folder for locks and connection."""

    def __init__(self, store, folder):
        self.clock = ManualClock()
        self.connection = Broken(store)
        self.folder = folder
        self.restart()

    def restart(self, *now_ms):
        locks = HostLocks(str(self.folder))
        self.leases = Leases(self.connection, LEASE, locks, self.clock.monotonic, *now_ms)

    def alive(self, node):
        return {seen.id: seen.alive for seen in self.leases.nodes()}.get(node)


@pytest.fixture(params=["memory", "mongo"])
def store(request, tmp_path, clock):
    """A repository whose notes several hosts could share: by the contract, notes are alike on all."""
    with MAKERS[request.param](tmp_path, clock) as repository:
        yield repository


@pytest.fixture
def host(store, tmp_path):
    made = []

    def host():
        made.append(Host(store, tmp_path / f"host{len(made)}"))
        return made[-1]

    return host


def note_of(store, node="n"):
    return store.notes(PREFIX).get(PREFIX + node)


def put(store, text, version, node="n"):
    return store.put_notes([NoteChange(PREFIX + node, text, version)])[0]


@pytest.fixture
def silent(store):
    """Record a node on a host that cannot be seen from here; return a function that sends its heartbeat."""
    facts = {"name": "there", "types": [], "stopping": False, "host": "there", "lock": 7}
    put(store, json.dumps(facts), 0)
    at = note_of(store)

    def beat():
        nonlocal at
        if not put(store, at.text, at.version):
            return False
        at = note_of(store)
        return True

    return beat


def watch(host, seconds, every=0.5):
    """Poll for some seconds, as a housekeeper does; return the last result."""
    for _ in range(round(seconds / every)):
        host.clock.advance(every)
        seen = host.alive("n")
    return seen


class TestJudging:
    def test_a_node_is_dead_after_a_whole_lease_without_a_heartbeat(self, host, silent, store):
        observer = host()
        assert observer.alive("n") is True
        assert watch(observer, LEASE - 0.5) is True
        assert watch(observer, 0.5) is False
        assert json.loads(note_of(store).text)["dead"] is True
        assert not silent(), "no heartbeat revives it"

    def test_a_live_node_whose_heartbeat_stands_still_is_late(self, host, silent):
        observer = host()

        def is_late():
            [node] = observer.leases.nodes()
            assert node.alive
            return node.late

        watch(observer, DEFAULT_TIMING.lease_late * LEASE / DEFAULT_TIMING.lease_beats - 0.5)
        assert not is_late()
        watch(observer, 1.5)
        assert is_late()
        silent()
        assert not is_late()

    def test_a_node_that_sends_heartbeats_is_never_dead(self, host, silent):
        observer = host()
        for _ in range(20):
            assert watch(observer, LEASE - 1) is True
            assert silent()

    def test_an_outage_of_the_server_makes_no_node_dead(self, host, silent):
        """Failed polls, and gaps between polls, are not counted."""
        observer = host()
        watch(observer, 10)
        observer.connection.down = True
        for _ in range(100):
            observer.clock.advance(0.5)
            with pytest.raises(RepositoryUnavailable):
                observer.alive("n")
        observer.connection.down = False
        assert watch(observer, LEASE - 11) is True
        observer.clock.advance(1000)  # the observer slept
        assert observer.alive("n") is True
        assert watch(observer, 2) is False

    def test_many_short_outages_make_no_node_dead(self, host, silent):
        """Between every two polls one failed, so the time between them is not counted."""
        observer = host()
        for number in range(200):
            observer.clock.advance(0.5)
            observer.connection.down = number % 2 == 1
            if observer.connection.down:
                with pytest.raises(RepositoryUnavailable):
                    observer.alive("n")
            else:
                assert observer.alive("n") is True

    def test_observers_that_restart_often_still_find_a_dead_node(self, host, silent):
        """The count is stored in a note of the node."""
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

    def test_a_heartbeat_at_the_last_moment_keeps_a_node_alive(self, host, silent, monkeypatch):
        """It comes between the poll and the mark, which is a compare-and-set."""
        observer = host()
        observer.alive("n")
        watch(observer, LEASE - 0.5)
        observer.clock.advance(0.5)
        mark = observer.leases._mark_dead
        monkeypatch.setattr(
            observer.leases, "_mark_dead", lambda *unchanged: silent() and mark(*unchanged)
        )
        assert observer.alive("n") is True

    @pytest.mark.parametrize("hours", [-1, 1])
    def test_wall_clocks_do_not_matter(self, host, silent, hours):
        observer = host()
        observer.alive("n")
        observer.clock.set_wall(observer.clock.now() + timedelta(hours=hours))
        assert watch(observer, LEASE - 0.5) is True
        assert watch(observer, 0.5) is False

    def test_only_a_dead_node_can_be_forgotten(self, host, silent, store):
        observer = host()
        observer.leases.leave("n")
        assert note_of(store) is not None
        assert not observer.leases.is_dead("n")
        watch(observer, LEASE + 0.5)
        assert observer.leases.is_dead("n")
        observer.leases.leave("n")
        assert store.notes(PREFIX) == {}, "its count is removed, too"
        assert observer.leases.is_dead("n")

    def test_a_count_of_a_node_that_has_left_is_removed(self, host, silent, store):
        """Its writer read the heartbeat before the node left."""
        observer = host()
        watch(observer, 5)
        assert put(store, None, note_of(store).version)
        assert set(store.notes(PREFIX)) == {f"{PREFIX}n/still"}
        assert observer.alive("n") is None
        assert store.notes(PREFIX) == {}

    def test_a_heartbeat_is_one_write_for_any_number_of_observers(self, host, monkeypatch, store):
        """No other process writes the note of a living node."""
        monkeypatch.setattr(Leases, "_run", lambda self: None)
        ours, observers, puts = host(), [host() for _ in range(3)], []
        ours.leases.join(Node(id="n", name="ours"))
        ours.leases.beat("n")
        sent = ours.connection.put_notes
        monkeypatch.setattr(
            ours.connection, "put_notes", lambda changes: puts.append(changes) or sent(changes)
        )
        for beats in range(1, 10):
            for observer in observers:
                assert watch(observer, 3) is True
            ours.leases.beat("n")
            assert len(puts) == beats
        ours.leases.leave("n")


class TestLookingRarely:
    """A process that looks once, or seldom, cannot count a lease."""

    @pytest.fixture
    def there(self):
        """The clock of the node's host."""
        return ManualClock()

    @pytest.fixture
    def beat(self, store, there):
        """Send the heartbeat of a node on a host that cannot be seen from here; return the function."""
        facts = {"name": "there", "types": [], "stopping": False, "host": "there", "lock": 7}

        def beat():
            text = json.dumps({**facts, "beat_at": there.now_ms()})
            known = note_of(store)
            assert put(store, text, 0 if known is None else known.version)

        beat()
        return beat

    @pytest.fixture
    def looks(self, host, beat):
        """Return a function that looks at the node after some seconds, each time as a new process."""
        observer = host()

        def looks(seconds=0.0):
            observer.clock.advance(seconds)
            observer.restart(observer.clock.now_ms)
            [node] = observer.leases.nodes()
            assert (node.silent, node.lives) == (node.alive is None, node.alive is not None)
            return node.alive

        return looks

    def test_a_heartbeat_that_is_older_than_two_leases_leaves_open_if_its_node_lives(
        self, looks, store
    ):
        before = note_of(store)
        assert looks() is True
        assert looks(DEFAULT_TIMING.lease_silent * LEASE) is True
        assert looks(0.001) is None
        assert [looks(3600) for _ in range(20)] == [None] * 20
        assert note_of(store) == before, "no time of a clock makes it dead"

    def test_so_does_a_heartbeat_from_the_future(self, looks, there, beat):
        there.set_wall(there.now() + timedelta(seconds=DEFAULT_TIMING.lease_silent * LEASE))
        beat()
        assert looks() is True
        there.set_wall(there.now() + timedelta(seconds=1))
        beat()
        assert looks() is None

    @pytest.mark.parametrize("hours", [-1, 1])
    def test_a_heartbeat_that_was_seen_to_change_shows_life_whatever_the_clocks_say(
        self, host, there, beat, hours
    ):
        observer = host()
        observer.restart(observer.clock.now_ms)
        there.set_wall(there.now() + timedelta(hours=hours))
        beat()
        assert observer.alive("n") is None
        observer.clock.advance(DEFAULT_TIMING.lease_silent * LEASE)
        beat()
        assert observer.alive("n") is True
        observer.clock.advance(0.001)
        assert observer.alive("n") is None, "it may have died at once after the look before"
        observer.clock.advance(DEFAULT_TIMING.lease_silent * LEASE + 1)
        beat()
        assert observer.alive("n") is None, "nobody knows when it changed"

    def test_a_silent_node_is_dead_only_after_a_whole_lease_that_somebody_has_watched(
        self, host, there, beat
    ):
        observer = host()
        observer.restart(observer.clock.now_ms)
        there.set_wall(there.now() - timedelta(hours=1))
        beat()
        assert observer.alive("n") is None
        assert watch(observer, LEASE - 0.5) is None
        assert watch(observer, 0.5) is False


@pytest.fixture
def ours(host, monkeypatch):
    """A host with a node that sends a heartbeat only when the test calls ``beat``."""
    monkeypatch.setattr(Leases, "_run", lambda self: None)
    made = host()
    made.leases.join(Node(id="n", name="ours"))
    made.told = []
    made.leases.watch("n", lambda: made.told.append(made.clock.monotonic()))
    yield made
    made.connection.down = False
    made.leases.leave("n")


class TestBeingJudged:
    def test_a_node_hears_of_its_lost_lease_before_others_take_over(self, ours):
        joined = ours.clock.monotonic()
        ours.connection.down = True
        for _ in range(round(LEASE)):
            ours.clock.advance(1)
            ours.leases.beat("n")
        assert ours.told[0] - joined == pytest.approx(LEASE * 0.8, abs=1)
        assert ours.leases.lost("n")

    def test_an_acknowledged_heartbeat_counts_from_the_time_it_was_sent(self, ours, monkeypatch):
        sent = ours.connection.put_notes

        def slow(changes):
            done = sent(changes)
            ours.clock.advance(10)
            return done

        ours.leases.beat("n")
        monkeypatch.setattr(ours.connection, "put_notes", slow)
        ours.leases.beat("n")
        ours.clock.advance(LEASE * 0.8 - 10.5)
        assert not ours.leases.lost("n")
        ours.clock.advance(1)
        assert ours.leases.lost("n")
        monkeypatch.undo()

    def test_a_node_hears_of_its_lost_lease_even_if_logging_fails(self, ours, monkeypatch):
        """The heartbeat thread continues, too: it is the only one."""
        monkeypatch.setattr(logging, "raiseExceptions", False)
        logger = logging.getLogger("taskx")
        monkeypatch.setattr(logger, "filters", [lambda record: 1 / 0])
        ours.connection.down = True
        ours.clock.advance(LEASE * 0.8)
        ours.leases.beat("n")
        assert ours.told

    def test_a_node_whose_server_returns_in_time_has_its_lease_again(self, ours):
        ours.connection.down = True
        ours.clock.advance(LEASE * 0.8)
        ours.leases.beat("n")
        assert ours.told
        ours.connection.down = False
        ours.leases.beat("n")
        assert not ours.leases.lost("n")

    def test_a_node_marked_dead_waits_until_it_is_forgotten(self, ours, host, store, monkeypatch):
        """Otherwise the tasks that it starts would be taken over, too."""
        other = host()
        watch(other, LEASE + 1)
        assert other.leases._mark_dead(f"{PREFIX}n", note_of(store))
        ours.leases.beat("n")
        assert ours.leases.lost("n")
        ours.clock.advance(1000)
        ours.leases.beat("n")
        assert ours.leases.lost("n")
        other.leases.leave("n")
        ours.leases.beat("n")
        assert not ours.leases.lost("n")
        assert other.alive("n") is True

    @pytest.mark.parametrize("answer", [RepositoryUnavailable("reset"), False])
    def test_a_heartbeat_whose_answer_was_lost_is_recognized(self, ours, monkeypatch, answer):
        """For example, the driver sends it twice, and the second one is refused."""
        sent, lost = ours.connection.put_notes, [True]

        def put_notes(changes):
            done = sent(changes)
            if not lost:
                return done
            lost.clear()
            if answer:
                raise answer
            return [answer]

        monkeypatch.setattr(ours.connection, "put_notes", put_notes)
        for _ in range(2):
            ours.clock.advance(LEASE * 0.7)
            ours.leases.beat("n")
            ours.leases.beat("n")
            assert not ours.leases.lost("n")

    def test_a_node_joins_even_if_its_note_is_sent_twice(self, host, monkeypatch, store):
        monkeypatch.setattr(Leases, "_run", lambda self: None)
        ours = host()
        sent, twice = ours.connection.put_notes, [True]

        def put_notes(changes):
            if twice and twice.pop():
                sent(changes)
            return sent(changes)

        monkeypatch.setattr(ours.connection, "put_notes", put_notes)
        ours.leases.join(Node(id="n", name="ours"))
        assert not ours.leases.lost("n")
        ours.leases.leave("n")
        assert store.notes(PREFIX) == {}

    def test_the_facts_of_a_node_are_recorded_again_if_its_note_is_gone(self, ours, host, store):
        ours.leases.record(Node(id="n", name="ours", types=("t",)))
        assert put(store, None, note_of(store).version)
        ours.leases.mark_stopping("n")
        [node] = host().leases.nodes()
        assert (node.types, node.stopping) == (("t",), True)

    def test_a_late_heartbeat_does_not_record_a_node_that_has_left(self, ours, store):
        own = ours.leases._own["n"]
        ours.leases.leave("n")
        ours.leases.beat("n", own)
        assert store.notes(PREFIX) == {}

    @pytest.mark.parametrize("store", ["memory"], indirect=True)
    def test_in_random_outages_a_node_hears_of_its_lost_lease_first(
        self, store, tmp_path, monkeypatch
    ):
        """With random polls, too, the mark never comes before ``lost()`` is called."""
        monkeypatch.setattr(Leases, "_run", lambda self: None)
        for seed in range(30):
            chance = random.Random(seed)
            clock = ManualClock()
            here, there = (Host(store, tmp_path / name) for name in ("here", "there"))
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
                    assert told, f"seed {seed}: marked dead before it heard of its lost lease"
                    marked += 1
                    there.leases.leave(node)
            here.connection.down = False
            here.leases.leave(node)
            for name, note in store.notes(PREFIX).items():
                store.put_notes([NoteChange(name, None, note.version)])
            if seed == 0:
                assert marked


class TestStarting:
    def test_a_node_with_a_lost_lease_starts_and_takes_nothing(self, ours, store):
        """The other writes of the batch are applied."""
        apply = ours.leases.apply
        apply([insert("a"), insert("b")])
        start = lifecycle.start(store.get_by_id("a"), 1, "n")
        ours.clock.advance(LEASE)
        writes = [start, insert("c"), lifecycle.take("b", "n"), lifecycle.take("b", "other")]
        assert apply(writes) == [False, True, False, True]
        ours.leases.beat("n")
        assert apply([start]) == [True]


class TestBeating:
    def test_a_node_does_not_join_without_a_heartbeat_thread(self, host, monkeypatch):
        """The next node that joins starts the thread."""
        left, start = [1], threading.Thread.start

        def refuse_first(thread):
            if left and thread.name == "taskx-beat":  # others, such as the driver's, may start
                left.clear()
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", refuse_first)
        made = host()
        with pytest.raises(RuntimeError):
            made.leases.join(Node(id="first", name="ours"))
        assert made.leases.nodes() == []
        beaten = threading.Event()
        monkeypatch.setattr(made.leases, "beat", lambda *args: beaten.set())
        made.leases.join(Node(id="second", name="ours"))
        assert beaten.wait(PATIENCE)
        made.leases.leave("second")

    def test_a_node_hears_of_its_lost_lease_while_a_heartbeat_hangs(self, store, tmp_path, clock):
        """A network that loses all packets can hold it longer than its time-out."""
        connection, told, mended = Broken(store), threading.Event(), threading.Event()
        hangs = threading.Event()

        def put_notes(changes):
            hangs.set()
            return mended.wait(PATIENCE) and store.put_notes(changes)

        leases = Leases(connection, 0.5, HostLocks(str(tmp_path)), clock.monotonic)
        leases.join(Node(id="n", name="ours"))
        leases.watch("n", told.set)
        connection.put_notes = put_notes
        assert hangs.wait(PATIENCE)
        clock.advance(0.5)
        assert told.wait(PATIENCE)
        assert leases.lost("n")
        mended.set()
        del connection.put_notes
        leases.leave("n")

    def test_a_node_leaves_after_its_last_heartbeat(self, store, tmp_path, clock):
        """The repository may be closed then: a heartbeat would open it again."""
        connection, ended, hangs = Broken(store), [], threading.Event()
        patient = attrs.evolve(DEFAULT_TIMING, close_within=PATIENCE)
        locks, now = HostLocks(str(tmp_path)), SYSTEM_CLOCK.now_ms
        leases = Leases(connection, LEASE, locks, clock.monotonic, now, patient)

        def put_notes(changes):
            done = store.put_notes(changes)
            if threading.current_thread().name == "taskx-beat":
                hangs.set()
                time.sleep(0.1)  # blocks on purpose
                ended.append(changes)
            return done

        connection.put_notes = put_notes
        leases.join(Node(id="n", name="ours"))
        assert hangs.wait(PATIENCE)
        leases.leave("n")
        assert ended
        assert leases.nodes() == []

    def test_heartbeats_continue_after_an_error(self, host, monkeypatch, caplog):
        made, beaten, left = host(), threading.Event(), [SystemExit("a defect")]

        def beat(node, own):
            made.clock.advance(LEASE)  # the next heartbeat is due
            if left:
                raise left.pop()
            beaten.set()

        monkeypatch.setattr(made.leases, "beat", beat)
        made.leases.join(Node(id="n", name="ours"))
        assert beaten.wait(PATIENCE)
        made.leases.leave("n")
        assert "the heartbeat of node n failed; its thread continues" in caplog.text


NODE = """
import sys
from taskx.stores.liveness.locks import HostLocks
print(*HostLocks(sys.argv[1]).hold("n"), flush=True)
sys.stdin.readline()
"""


@pytest.mark.process
class TestOnOneHost:
    """On one host a kernel lock shows a death at once."""

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

    def test_a_node_is_alive_until_its_process_dies(self, process, tmp_path):
        child, host, inode = process
        locks = HostLocks(str(tmp_path / "run"))
        assert locks.alive("n", host, inode) is True
        child.send_signal(signal.SIGSTOP)
        assert locks.alive("n", host, inode) is True
        child.kill()
        child.wait(PATIENCE)
        assert locks.alive("n", host, inode) is False

    def test_a_node_on_another_host_or_without_its_file_is_unknown(self, process, tmp_path):
        """Also in another container with the same host name."""
        child, host, inode = process
        child.kill()
        child.wait(PATIENCE)
        locks = HostLocks(str(tmp_path / "run"))
        another_boot = "another-boot " + " ".join(host.split()[1:])
        assert locks.alive("n", host, inode) is False
        assert HostLocks(str(tmp_path / "elsewhere")).alive("n", host, inode) is None
        assert locks.alive("n", another_boot, inode) is None
        assert locks.alive("n", host, inode + 1) is None
        assert locks.alive("n", "", 0) is None
        (tmp_path / "run" / "nodes" / "n.lock").unlink()
        assert locks.alive("n", host, inode) is None

    def test_observers_on_the_same_host_see_a_death_at_once(self, process, store, tmp_path):
        child, host, inode = process
        facts = {"name": "n", "types": [], "stopping": True, "host": host, "lock": inode}
        put(store, json.dumps(facts), 0)
        near, far = (
            Leases(store, LEASE, HostLocks(str(tmp_path / name)), ManualClock().monotonic)
            for name in ("run", "far")
        )
        assert [node.alive for node in (*near.nodes(), *far.nodes())] == [True, True]
        child.kill()
        child.wait(PATIENCE)
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
