"""Deaths of processes and of the server at each step of a transaction: once, never twice, never missing."""

from __future__ import annotations

import threading

import pymongo
import pytest
from helpers import eventually, run_in_thread
from mongo_server import Server

from taskx import MongoRepository, Queue, TaskStatus

LONG = 60

pytestmark = pytest.mark.process


@pytest.fixture
def url(mongo_server):
    """The URL of a replica set: other servers have no transactions."""
    return mongo_server("set")


#: What each program needs: children that die at their n-th step in transactions. Each command is a step
#: before it is sent, and each commit is one more after its answer.
DIES = """
import os, signal, sys
import pymongo
from taskx import Config, MongoRepository, Queue

url, name, folder = sys.argv[1:]

class Killer(pymongo.monitoring.CommandListener):
    def __init__(self, fatal):
        self.left = fatal

    def started(self, event):
        self.committing = event.command_name == "commitTransaction"
        if "txnNumber" in event.command and "autocommit" in event.command:
            self.step()

    def step(self):
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)

    def succeeded(self, event):
        if event.command_name == "commitTransaction":
            self.step()

    def failed(self, event):
        pass

def until_one_lives(child, steps):
    for killed, fatal in enumerate(steps):
        pid = os.fork()
        if not pid:
            try:
                client = pymongo.MongoClient(url, event_listeners=[Killer(fatal)])
                child(client[name], fatal)
            except BaseException as error:
                print(str(error).replace("\\n", " "), flush=True)
                os._exit(1)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        if not os.WIFSIGNALED(status):
            print(killed, status, flush=True)
            break
"""

COMPLETES = """
def child(database, fatal):
    # The server would keep the transaction of a dead process for a minute, with its locks.
    database.client.admin.command("killAllSessions", [])
    repository = MongoRepository(database, run_folder=folder)
    queue = Queue(repository, Config(worker_num=1))

    @queue.executor("t", max_crashes=100)
    def work(ctx):
        for n in range(ctx.cursor or 0, 2):
            with ctx.transaction() as tx:
                database.rows.insert_one({"n": n}, session=tx.connection)
                ctx.cursor = n + 1
                if n == 1:
                    tx.complete("done")

    with queue:
        queue.handle("t").result(timeout=60)

# The second transaction has one more write, for the completion.
until_one_lives(child, [1, 2, 3, 4, 1, 2, 3, 4, 5, 1000])
"""

SUBMITS = """
def child(database, fatal):
    queue = Queue(MongoRepository(database, run_folder=folder))
    queue.declare("t")
    with database.client.start_session() as session, session.start_transaction():
        database.orders.insert_one({"_id": str(fatal)}, session=session)
        queue.submit("t", id=str(fatal), connection=session)
        queue.submit("t", id=f"{fatal} again", connection=session)

until_one_lives(child, range(1, 1000))
"""


@pytest.fixture
def server(tmp_path):
    """A server of its own: other tests may not be disturbed."""
    made = Server("set", tmp_path).start()
    yield made
    made.kill()


def test_a_process_that_dies_at_any_step_has_written_each_row_once(spawn, server, make, tmp_path):
    with pymongo.MongoClient(server.url) as client:
        check_rows(spawn, server, client.app, make(client.app), tmp_path)


def check_rows(spawn, server, database, repository, tmp_path):
    queue = Queue(repository)
    queue.declare("t")
    queue.submit("t", id="t")
    repository.init_indexes()
    database.create_collection("rows")
    child = spawn(DIES + COMPLETES, server.url, database.name, tmp_path / "run")
    said = child.read()
    assert said[0].isdigit(), said
    killed, status = map(int, said.split())
    assert status == 0
    assert killed == 9
    assert [row["n"] for row in database.rows.find().sort("n")] == [0, 1]
    task = repository.get_by_id("t")
    assert (task.status, task.result) == (TaskStatus.COMPLETED, "done")


def test_a_process_that_dies_at_any_step_has_stored_data_and_tasks_or_neither(
    spawn, url, database, repository, tmp_path
):
    repository.init_indexes()
    database.create_collection("orders")
    child = spawn(DIES + SUBMITS, url, database.name, tmp_path / "run")
    said = child.read()
    assert said[0].isdigit(), said
    killed, status = map(int, said.split())
    assert status == 0
    assert killed > 4
    orders = {order["_id"] for order in database.orders.find()}
    assert orders == {str(killed), str(killed + 1)}  # one died after its commit, one lives
    assert {task["_id"] for task in database.tasks.find()} == {
        *orders,
        *(f"{order} again" for order in orders),
    }


class Killing(pymongo.monitoring.CommandListener):
    """Kills the server before or after the first commit."""

    def __init__(self, moment, server):
        self._moment = moment
        self._server = server
        self.killed = threading.Event()

    def _at(self, moment, event):
        first = not self.killed.is_set()
        if event.command_name == "commitTransaction" and moment == self._moment and first:
            self.killed.set()
            self._server.kill()

    def started(self, event):
        self._at("before", event)

    def succeeded(self, event):
        self._at("after", event)

    def failed(self, event):
        pass


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_server_that_dies_at_the_commit_has_each_row_once(server, tmp_path, make_queue, moment):
    killing = Killing(moment, server)
    client = pymongo.MongoClient(server.url, event_listeners=[killing], heartbeatFrequencyMS=500)
    try:
        rows = client.app.rows
        client.app.create_collection("rows")
        repository = MongoRepository(client.app, run_folder=tmp_path / "run")
        queue = make_queue(repository, worker_num=1)

        @queue.executor("t", max_attempts=5)
        def work(ctx):
            with ctx.transaction() as tx:
                rows.insert_one({"n": 1}, session=tx.connection)
                tx.complete("done")

        def start_again():
            assert killing.killed.wait(LONG)
            eventually(lambda: server.process is None)
            server.start()

        with queue:
            queue.submit("t", id="t")
            run_in_thread(start_again)()
            assert queue.handle("t").result(timeout=LONG) == "done"
        assert rows.count_documents({}) == 1
        assert repository.get_by_id("t").errors <= 1
        repository.close()
    finally:
        client.close()
