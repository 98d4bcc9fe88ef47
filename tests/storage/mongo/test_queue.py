"""Tests of queues on MongoDB: processes that share a collection, hosts that are cut off, outages.

The other tests of queues run on a mock of the driver; these need a connection, or processes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter

import pymongo
import pytest
from helpers import PATIENCE, SOON, eventually, pool_of
from mongo_server import Server, new_database

from taskx import (
    CancelReason,
    MemoryRepository,
    MongoRepository,
    RepositoryUnavailable,
    Task,
    TaskFilter,
    TaskStatus,
)
from taskx.tasks.timing import Timing

#: Seconds of a lease that a test waits for; on a busy machine a process may stand still for half of it.
LEASE = 6.0

PROGRAM = """
import sys, threading, time
from taskx import Config, MongoRepository, Queue
import pymongo

url, name, folder, lease = sys.argv[1:5]
database = pymongo.MongoClient(url)[name]
repository = MongoRepository(database, run_folder=folder, lease_timeout=float(lease))
queue = Queue(repository, Config(worker_num=2, buffer_size=5, overflow="spill"))

def say(word):
    sys.stdout.write(word + "\\n")
    sys.stdout.flush()

@queue.executor()
def work(ctx, n):
    pass

@queue.executor()
def hang(ctx, n=0):
    say("hanging")
    threading.Event().wait()

@queue.executor()
def listen(ctx, n=0):
    say("listening")
    ctx.sleep(60)

def wait_for_ever():
    while True:  # a signal just before one long wait would not end it
        time.sleep(0.05)  # blocks on purpose
"""


@pytest.fixture
def repository():
    """The default repository for queues; every test here gives its own."""
    return MemoryRepository()


@pytest.fixture
def url(request, mongo_server):
    """A server with change streams, unless the test or the environment names another one."""
    return mongo_server(getattr(request, "param", "set"))


# A server without change streams is polled once a second.
without_streams = pytest.mark.parametrize("url", ["standalone"], indirect=True)


@pytest.fixture
def name(url):
    database = new_database(url)
    yield database.name
    database.client.drop_database(database.name)


@pytest.fixture
def on_mongo(url, name, tmp_path, make_queue, proxy):
    """Return a function that makes queues on the collection, each with its own client."""
    clients = []

    def on_mongo(at=None, folder="here", lease=30.0, timeout=PATIENCE, **config):
        client = pymongo.MongoClient(at or url, directConnection=True, heartbeatFrequencyMS=500)
        clients.append(client)
        repository = MongoRepository(
            client[name],
            run_folder=tmp_path / folder,
            lease_timeout=lease,
            timeout=timeout,
            timing=Timing(lease_margin=0.5),
        )
        queue = make_queue(repository, **{"worker_num": 2, **config})
        queue.ran = []
        for kind in ("work", "hang", "listen"):
            queue.executor(kind)(lambda n=0: queue.ran.append(n))
        return queue

    yield on_mongo
    proxy.heal()  # a client sends a message to the server when it closes
    for client in clients:
        client.close()


@pytest.fixture
def run(spawn, url, name, tmp_path):
    """Return a function that starts the program with more lines, on this host or on another one."""

    def run(more, folder="here", lease=30.0):
        return spawn(PROGRAM + more, url, name, tmp_path / folder, lease)

    return run


class TestOneProcess:
    def test_a_queue_submits_spills_runs_drains_and_stops(self, on_mongo):
        queue = on_mongo(buffer_size=5, overflow="spill")
        handles = [queue.submit("work", {"n": n}) for n in range(5)]
        queue.start()
        handles += queue.submit_many([Task(type="work", params={"n": n}) for n in range(5, 25)])
        assert queue.drain(PATIENCE)
        assert sorted(queue.ran) == list(range(25))
        assert [handle.result(PATIENCE) for handle in handles] == [None] * 25
        assert queue.list_tasks(TaskFilter(status="completed"))[1] == 25
        assert queue.stop(PATIENCE) == []
        assert list(queue.repository.liveness.nodes()) == []

    @pytest.mark.timing(recover_every=3600, audit_every=3600, schedules_every=3600)  # each reads
    def test_under_load_tasks_share_round_trips(self, url, name, make_queue):
        """The start and the end of a task share their commands with other tasks."""
        sent = Counter()

        class Listener(pymongo.monitoring.CommandListener):
            def started(self, event):
                sent[event.command_name] += 1

            def succeeded(self, event):
                pass

            def failed(self, event):
                pass

        with pymongo.MongoClient(url, event_listeners=[Listener()]) as client:
            queue = make_queue(MongoRepository(client[name]), worker_num=4, buffer_size=150)
            queue.executor("work")(lambda: None)
            for _ in range(150):
                queue.submit("work")
            assert sent["insert"] == 150
            queue.start()
            assert queue.drain(3 * PATIENCE)
            queue.stop(PATIENCE)
        assert sent["update"] + sent["find"] <= 1.5 * 150


class TestTwoProcesses:
    def test_two_processes_share_the_work(self, run, on_mongo):
        child = run("queue.start(); say('started'); wait_for_ever()")
        assert child.read() == "started"
        queue = on_mongo(buffer_size=200)
        for n in range(60):
            queue.submit("work", {"n": n})
        queue.start()
        assert queue.drain(PATIENCE)
        tasks, total = queue.list_tasks()
        assert total == 60
        found = {(task.status, len(task.attempts)) for task in tasks}
        assert found == {(TaskStatus.COMPLETED, 1)}

    @without_streams
    def test_two_processes_share_the_work_without_streams(self, run, on_mongo):
        self.test_two_processes_share_the_work(run, on_mongo)

    @without_streams
    def test_cancel_reaches_a_running_task_without_streams(self, run, on_mongo):
        self.test_cancel_reaches_a_task_that_runs_in_another_process(run, on_mongo)

    def test_cancel_reaches_a_task_that_runs_in_another_process(self, run, on_mongo):
        child = run("queue.start(); queue.submit('listen', id='x'); wait_for_ever()")
        assert child.read() == "listening"
        queue = on_mongo()
        assert queue.cancel_task("x") is False
        assert eventually(lambda: queue.get_task_status("x").status.finished)
        assert queue.get_task_status("x").status is TaskStatus.CANCELLED

    def test_a_task_that_waits_in_another_process_can_be_cancelled(self, run, on_mongo):
        child = run(
            "queue.start(); queue.submit('hang'); queue.submit('hang');"
            "queue.submit('work', {'n': 1}, id='x'); say('sent'); wait_for_ever()"
        )
        assert sorted(child.read() for _ in range(3)) == ["hanging", "hanging", "sent"]
        queue = on_mongo()
        assert queue.cancel_task("x") is True
        assert queue.get_task_status("x").starts == 0

    def test_another_process_sees_new_work_at_once(self, run, on_mongo):
        child = run("queue.start(); say('started'); wait_for_ever()")
        assert child.read() == "started"
        queue = on_mongo()
        queue.submit("work", {"n": 1}).result(PATIENCE)

    def test_a_task_of_a_killed_process_is_rescued_at_once_on_its_host(self, run, on_mongo):
        """The lease would take ten minutes to expire."""
        child = run("queue.start(); queue.submit('hang', id='x'); wait_for_ever()", lease=600)
        assert child.read() == "hanging"
        queue = on_mongo(lease=600)
        queue.start()
        child.kill()
        assert queue.handle("x").result(PATIENCE) is None
        task = queue.get_task_status("x")
        assert (task.crashes, task.starts, task.errors) == (1, 2, 0)
        assert [attempt.outcome for attempt in task.attempts] == ["crashed", "completed"]

    def test_a_task_of_a_killed_process_elsewhere_is_rescued_after_the_lease(self, run, on_mongo):
        child = run(
            "queue.start(); queue.submit('hang', id='x');"
            "[queue.submit('work', {'n': n}) for n in range(5)]; wait_for_ever()",
            folder="there",
            lease=LEASE,
        )
        assert child.read() == "hanging"
        queue = on_mongo(lease=LEASE)
        queue.start()
        assert not queue.handle("x").done()
        child.kill()
        assert queue.handle("x").result(PATIENCE) is None
        assert queue.drain(PATIENCE)
        assert queue.get_task_status("x").crashes == 1
        eventually(lambda: len(queue.repository.liveness.nodes()) == 1)

    def test_a_stopped_process_on_the_same_host_counts_as_alive(self, run, on_mongo):
        """Its lock shows that it lives, even if its heartbeat stands still for longer than the lease."""
        child = run("queue.start(); queue.submit('hang', id='x'); wait_for_ever()", lease=1)
        assert child.read() == "hanging"
        child.signal(19)
        queue = on_mongo(lease=1)
        seen = []
        deadline = time.monotonic() + 2.5
        eventually(
            lambda: (
                seen.append([n.alive for n in queue.repository.liveness.nodes()])
                or time.monotonic() > deadline
            )
        )
        assert all(alive == [True] for alive in seen)
        child.signal(18)

    def test_stop_hands_back_a_running_task(self, run, on_mongo):
        child = run(
            "queue.start(); queue.submit('listen', id='x'); sys.stdin.readline();"
            "queue.stop(20, cancel=True); say('stopped')"
        )
        assert child.read() == "listening"
        child.tell()
        assert child.read() == "stopped"
        queue = on_mongo()
        task = queue.get_task_status("x")
        assert (task.status, task.interruptions, task.crashes) == (TaskStatus.PENDING, 1, 0)
        queue.start()
        assert queue.handle("x").result(PATIENCE) is None

    def test_a_killed_submitter_leaves_no_batch_in_part(self, run, on_mongo, url, name):
        child = run(
            """
from taskx import Task
number = 0
print("submitting", flush=True)
while True:
    queue.submit_many(
        [Task(id=f"{number}-{i}", type="work", params={"n": 0}) for i in range(4)]
    )
    number += 1
"""
        )
        assert child.read() == "submitting"
        queue = on_mongo()
        eventually(lambda: queue.list_tasks()[1] >= 8)
        child.kill()
        tasks, total = queue.list_tasks(TaskFilter(limit=10_000))
        batches = Counter(task.id.split("-")[0] for task in tasks)
        assert total == len(tasks)
        assert set(batches.values()) == {4}


@pytest.fixture
def cut_off(on_mongo, proxy):
    """A queue on a host that can be cut off, with a task that can be cancelled; and its proxy."""
    queue = on_mongo(f"mongodb://127.0.0.1:{proxy.port}", "there", lease=LEASE)
    queue.heard, queue.begun, queue.go_on = [], threading.Event(), threading.Event()

    @queue.executor("heed")
    def heed(ctx):
        queue.begun.set()
        ctx.token.wait(PATIENCE)
        queue.heard.append(ctx.token.reason)
        ctx.raise_if_cancelled()

    @queue.executor("ignore")
    def ignore():
        queue.begun.set()
        assert queue.go_on.wait(PATIENCE)
        return "late"

    yield queue, proxy
    queue.go_on.set()
    proxy.heal()
    queue.stop(PATIENCE, cancel=True)


class TestAHostThatIsCutOff:
    @pytest.fixture
    def other(self, on_mongo):
        """A queue on a host that stays connected."""
        made = on_mongo(lease=LEASE)
        made.seen = []
        return made

    def begin(self, queue, other, kind):
        """Start a task on the queue that will be cut off, and start the other queue."""
        queue.start()
        queue.submit(kind, id="x")
        assert queue.begun.wait(PATIENCE)
        other.executor(kind)(lambda: other.seen.append(list(queue.heard)) or "mine")
        other.start()
        queue.repository._connection.timeout = 1.0

    def test_a_task_on_a_cut_off_host_is_told_before_others_take_over(self, cut_off, other):
        queue, proxy = cut_off
        self.begin(queue, other, "heed")
        proxy.cut(refuse=True)
        assert other.handle("x").result(PATIENCE) == "mine"
        assert other.seen == [[CancelReason.LEASE_LOST]]
        assert other.get_task_status("x").starts == 2

    def test_a_host_that_comes_back_works_again(self, cut_off, other, caplog):
        """The outcome of a task that was taken over is dropped, and the log says so."""
        queue, proxy = cut_off
        self.begin(queue, other, "ignore")
        with caplog.at_level(logging.WARNING, "taskx"):
            proxy.cut(refuse=True)
            assert other.handle("x").result(PATIENCE) == "mine"
            other.stop(PATIENCE)
            queue.go_on.set()
            proxy.heal()
            queue.repository._connection.timeout = PATIENCE
            eventually(lambda: "its late outcome was dropped" in caplog.text)
        assert not pool_of(queue).runs
        assert "lost its lease" in caplog.text
        assert other.get_task_status("x").result == "mine"
        handle = eventually(lambda: submitted(queue, "work"))
        assert handle.result(PATIENCE) is None
        assert [node.alive for node in other.repository.liveness.nodes()] == [True]


def submitted(queue, kind):
    """Submit a task and return its handle; return None during an outage."""
    try:
        return queue.submit(kind)
    except RepositoryUnavailable:
        return None


def outcome(handle):
    """Return the result of a task as text; return None during an outage."""
    try:
        return str(handle.result(PATIENCE)).lower()
    except RepositoryUnavailable:
        return None


class TestAnOutage:
    """Outages that are shorter than the lease, or of the server: no task is lost or runs twice."""

    TIMEOUT = 3.0

    @pytest.fixture
    def gated(self, on_mongo, gate):
        def gated(at):
            queue = on_mongo(at, timeout=self.TIMEOUT)
            queue.times = []

            @queue.executor("gated")
            def gated():
                queue.times.append(1)
                gate()
                return "done"

            queue.start()
            handle = queue.submit("gated", id="x")
            gate.wait_for(1)
            return queue, handle

        return gated

    @pytest.fixture
    def outlive(self, gate, caplog):
        """Check that submits fail in time, and that the outcome of the running task is stored later."""

        def outlive(queue, handle, back):
            spent, since = time.process_time(), time.monotonic()
            with caplog.at_level(logging.INFO, "taskx"):
                self.fail_in_time(lambda: queue.submit("work", {"n": 1}))
                self.fail_in_time(lambda: queue.submit_many([Task(type="work")] * 2))
                gate.open()
                eventually(lambda: not pool_of(queue).runs.executing)
                back()
                queue.repository._connection.timeout = PATIENCE
                again = eventually(lambda: submitted(queue, "work"))
                assert eventually(lambda: outcome(handle)) == "done"
                assert eventually(lambda: outcome(again)) == "none"
            busy = (time.process_time() - spent) / (time.monotonic() - since)
            assert busy < 0.5, "no busy loop"
            assert len(caplog.records) < 40, "no flood of messages"
            assert queue.times == [1]
            assert queue.get_task_status("x").starts == 1

        return outlive

    def fail_in_time(self, submit):
        """Check that a submit fails within two time-outs: it may wait for another write first."""
        began = time.monotonic()
        with pytest.raises(RepositoryUnavailable):
            submit()
        assert time.monotonic() - began < 2 * self.TIMEOUT + SOON

    def test_a_queue_survives_an_outage_of_the_network(self, proxy, gated, outlive):
        queue, handle = gated(f"mongodb://127.0.0.1:{proxy.port}")
        proxy.cut(refuse=True)
        outlive(queue, handle, proxy.heal)
        queue.stop(PATIENCE)

    def test_a_queue_survives_a_network_that_drops_everything(self, proxy, gated, outlive):
        queue, handle = gated(f"mongodb://127.0.0.1:{proxy.port}")
        proxy.judge = lambda direction, piece: False
        outlive(queue, handle, proxy.heal)
        queue.stop(PATIENCE)

    @pytest.fixture
    def server(self, kind, tmp_path):
        folder = tmp_path / "server"
        folder.mkdir()
        made = Server(kind, folder)
        try:
            yield made.start()
        finally:
            made.kill()

    @pytest.fixture
    def on_server(self, server, tmp_path, make_queue, gate):
        """A queue on a server that the test may kill; it is started again before the queue stops."""
        client = pymongo.MongoClient(server.url, directConnection=True, heartbeatFrequencyMS=500)
        run = tmp_path / "run"
        repository = MongoRepository(client.tasks, run_folder=run, timeout=self.TIMEOUT)
        queue = make_queue(repository, worker_num=2)
        yield queue
        gate.open()
        if server.process is None:
            server.start()
        queue.stop(PATIENCE, cancel=True)
        client.close()

    @pytest.mark.parametrize("kind", ["standalone", "set"])
    def test_a_queue_survives_a_killed_server(self, server, on_server, gate, outlive):
        queue = on_server
        queue.times = []
        queue.executor("work")(lambda n=0: None)

        @queue.executor("gated")
        def gated():
            queue.times.append(1)
            gate()
            return "done"

        queue.start()
        handle = queue.submit("gated", id="x")
        gate.wait_for(1)
        delayed = [queue.submit("work", {"n": n}, delay=0.1) for n in range(20)]
        server.kill()
        outlive(queue, handle, server.start)
        assert [each.result(PATIENCE) for each in delayed] == [None] * 20
        queue.stop(PATIENCE)


class TestTheOriginals:
    def test_tasks_of_the_original_run_if_they_are_adopted(self, url, name, tmp_path, make_queue):
        database = pymongo.MongoClient(url)[name]
        go = {"type": "work", "status": "pending", "params": {"n": 7}}
        database.tasks.insert_one({"_id": "go", **go})
        ran = []
        for adopt in (False, True):
            repository = MongoRepository(database, run_folder=tmp_path, adopt_foreign=adopt)
            queue = make_queue(repository, worker_num=2)
            queue.executor("work")(lambda n: ran.append(n))
            queue.start()
            assert queue.drain(PATIENCE)
            queue.stop(PATIENCE)
            assert ran == ([7] if adopt else [])
        assert database.tasks.find_one({"_id": "go"})["status"] == "completed"
        database.client.close()

    def test_a_running_task_of_a_dead_original_can_be_failed_and_requeued(
        self, url, name, tmp_path, make_queue
    ):
        database = pymongo.MongoClient(url)[name]
        go = {"type": "work", "status": "running", "params": {"n": 7}}
        database.tasks.insert_one({"_id": "go", **go})
        queue = make_queue(MongoRepository(database, run_folder=tmp_path))
        queue.executor("work")(lambda n: n)
        queue.start()
        assert queue.cancel_task("go") is False
        queue.repository.update_status("go", TaskStatus.FAILED, "its process died")
        queue.requeue("go")
        assert queue.handle("go").result(PATIENCE) == 7
        queue.stop(PATIENCE)
        database.client.close()
