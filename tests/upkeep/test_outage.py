"""Outages: a MongoDB server, or another host, that is away for longer than its clients wait."""

from __future__ import annotations

import signal
import time

import pymongo
import pytest
from helpers import PATIENCE, SOON, eventually, parts_of, pool_of
from mongo_proxy import Proxy
from mongo_server import new_database

from taskx import MongoRepository, RepositoryUnavailable
from taskx.tasks.timing import Timing

#: The fate of requests during the outage.
OUTAGES = {
    "refused": lambda proxy: proxy.cut(refuse=True),
    "swallowed": lambda proxy: setattr(proxy, "judge", lambda direction, piece: False),
    "carried out, and not answered": lambda proxy: setattr(
        proxy, "judge", lambda direction, piece: direction == "ask"
    ),
}


class Failing(MongoRepository):
    """Counts the failed attempts to write outcomes."""

    failed = 0

    def apply(self, writes, **options):
        try:
            return super().apply(writes, **options)
        except RepositoryUnavailable:
            self.failed += any("completed_at" in getattr(write, "changes", ()) for write in writes)
            raise


@pytest.fixture
def database(mongo_server):
    made = new_database(mongo_server("standalone"))
    yield made
    made.client.drop_database(made.name)


@pytest.fixture
def proxy(database):
    made = Proxy(database.client.address[1])
    yield made
    made.close()


@pytest.fixture
def on_mongo(database, proxy, tmp_path, make_queue):
    """A queue on the collection, whose requests go through the proxy."""
    client = pymongo.MongoClient(
        f"mongodb://127.0.0.1:{proxy.port}/?directConnection=true", heartbeatFrequencyMS=500
    )
    queue = make_queue(Failing(client[database.name], run_folder=tmp_path), worker_num=3)
    yield queue
    proxy.heal()
    queue.stop(PATIENCE, cancel=True)
    client.close()


@pytest.mark.parametrize("how", OUTAGES)
def test_outcomes_wait_until_they_are_written(on_mongo, proxy, gate, how):
    """This holds for each status, and even if several attempts to write them fail."""
    ran = []

    @on_mongo.executor("end")
    def end(ctx, how):
        ran.append(how)
        gate()
        if how == "failed":
            raise ValueError("as it was")
        ctx.token.raise_if_cancelled()
        return how

    on_mongo.start()
    handles = [on_mongo.submit("end", {"how": how}) for how in ("completed", "failed", "cancelled")]
    gate.wait_for(3)
    on_mongo.cancel_task(handles[2].id)
    connection = on_mongo.repository._connection
    patience, connection.timeout = connection.timeout, 0.3  # only during the outage
    OUTAGES[how](proxy)
    began = time.monotonic()
    with pytest.raises(RepositoryUnavailable):
        on_mongo.submit("end", {"how": "never"}, id="refused")
    assert time.monotonic() - began < SOON
    gate.open()
    eventually(lambda: not pool_of(on_mongo).runs.executing)
    eventually(lambda: on_mongo.repository.failed >= 2)
    proxy.heal()
    connection.timeout = patience
    eventually(lambda: not parts_of(on_mongo).moves.unsettled)
    assert handles[0].result(PATIENCE) == "completed"
    assert handles[1].exception(PATIENCE).error == "ValueError: as it was"
    assert eventually(handles[2].cancelled)
    tasks = [handle.task() for handle in handles]
    assert [task.status for task in tasks] == ["completed", "failed", "cancelled"]
    assert {(task.starts, task.crashes, task.interruptions) for task in tasks} == {(1, 0, 0)}
    # The refused task may be stored if requests were carried out, so its runs are not counted.
    assert [ran.count(task.status) for task in tasks] == [1, 1, 1]
    on_mongo.executor("fine")(lambda: "fine")
    assert on_mongo.submit("fine").result(PATIENCE) == "fine"


# A process as on another host: it has another folder for locks, so only its lease shows that it lives.
ELSEWHERE = """
    import sys, threading
    import pymongo
    from taskx import Config, MongoRepository, Queue
    from taskx.tasks.timing import Timing

    client = pymongo.MongoClient(sys.argv[1])
    lease = float(sys.argv[4])
    queue = Queue(
        MongoRepository(
            client[sys.argv[2]],
            run_folder=sys.argv[3],
            lease_timeout=lease,
            timing=Timing(lease_beats=lease / 0.3),
        ),
        Config(worker_num=1),
    )

    ended = threading.Event()

    @queue.executor("long")
    def long():
        print("running", flush=True)
        sys.stdin.readline()
        ended.set()
        return "there"

    queue.start()
    queue.submit("long", id="x")
    while queue._node.pool.runs or not ended.is_set():
        queue._node.pool.wait_quiet(0.05)
    print("over", flush=True)
    sys.stdin.readline()
    queue.stop()
"""


@pytest.fixture
def lease(request):
    """The length of a lease. A process that a busy machine stops for some seconds does not lose it."""
    return getattr(request, "param", 8.0)


@pytest.fixture
def leased(lease):
    """The options of a repository whose nodes send heartbeats as often as if the lease was 3 s."""
    return {"lease_timeout": lease, "timing": Timing(lease_beats=lease / 0.3)}


@pytest.fixture
def elsewhere(spawn, mongo_server, database, tmp_path, lease):
    server, folder = mongo_server("standalone"), tmp_path / "there"
    child = spawn(ELSEWHERE, server, database.name, folder, lease)
    assert child.read() == "running"
    return child


@pytest.fixture
def here(database, tmp_path, make_queue, gate, leased):
    """A queue on this host, which can take over the task."""
    repository = MongoRepository(database, run_folder=tmp_path / "here", **leased)
    queue = make_queue(repository, worker_num=1)
    queue.executor("long")(lambda: (gate(), "here")[1])
    queue.start()
    return queue


@pytest.fixture
def observer(database, tmp_path, leased, clock):
    """A third host, whose clock the test moves."""
    made = MongoRepository(database, run_folder=tmp_path / "observer", **leased)
    made.liveness._monotonic = clock.monotonic
    yield made
    made.close()


@pytest.mark.parametrize("lease", [30.0], indirect=True)
def test_a_task_can_run_for_many_lease_periods(elsewhere, here, observer, clock, lease):
    """Its node sends heartbeats, so no other node runs it."""

    def beats():
        notes = observer.notes("node/")
        return {name: note.version for name, note in notes.items() if "/still" not in name}

    # A heartbeat that comes in the middle of a round may be the last one until the end of the next round.
    for _ in range(11):
        before = beats()
        assert len(before) == 2
        for _ in range(int(0.3 * lease)):  # the polls of an observer are not far apart
            assert [node.alive for node in observer.liveness.nodes()] == [True, True]
            clock.advance(1)
        eventually(lambda before=before: all(beats()[name] > before[name] for name in before))
    assert here.get_task_status("x").starts == 1
    elsewhere.tell()
    assert here.handle("x").result(PATIENCE) == "there"
    task = here.get_task_status("x")
    assert (task.starts, task.crashes, task.interruptions) == (1, 0, 0)
    elsewhere.tell()
    elsewhere.ends()


def test_a_process_that_slept_through_its_lease_changes_nothing_later(elsewhere, here, gate):
    """This holds even while the task that was taken from it runs again."""
    elsewhere.signal(signal.SIGSTOP)
    gate.wait_for(1)
    before = here.get_task_status("x")
    assert (before.status, before.starts, before.crashes) == ("running", 2, 1)
    elsewhere.signal(signal.SIGCONT)
    elsewhere.tell()
    assert elsewhere.read() == "over"  # its run has ended, and its outcome was dropped
    assert here.get_task_status("x") == before
    gate.open()
    assert here.handle("x").result(PATIENCE) == "here"
    elsewhere.tell()
    _, errors = elsewhere.ends()
    assert "its late outcome was dropped" in errors
