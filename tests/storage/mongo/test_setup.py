"""Tests of making a repository: arguments, URLs, indexes, write concern, forks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from datetime import timedelta

import pymongo
import pytest
from helpers import PATIENCE, eventually
from mongo_server import free_port, new_database
from pymongo.write_concern import WriteConcern

import taskx
from taskx import (
    ConfigurationError,
    MongoRepository,
    Queue,
    RepositoryError,
    RepositoryUnavailable,
    SchemaMismatch,
    Task,
    TaskFilter,
    open_repository,
)
from taskx.stores.liveness.base import Node
from taskx.stores.mongo.connection import words_of
from taskx.stores.mongo.tasks import LOOKUPS
from taskx.testing import ManualClock

from .conftest import CommandCount, insert


class TestArguments:
    @pytest.mark.parametrize(
        ("options", "problem"),
        [
            ({"lease_timeout": 0}, "lease_timeout"),
            ({"lease_timeout": "long"}, "lease_timeout"),
            ({"timeout": -1}, "timeout"),
            ({"poll_interval": float("inf")}, "poll_interval"),
            ({"write_concern": WriteConcern(w=0)}, "acknowledged"),
            ({"collection": ""}, "collection"),
            ({"collection": {"$ne": ""}}, "collection"),
        ],
    )
    def test_an_argument_that_is_not_valid_is_refused(self, mock, options, problem):
        with pytest.raises(ConfigurationError, match=problem):
            MongoRepository(mock, **options)

    @pytest.mark.parametrize("database", ["mongodb://host/db", None, 5])
    def test_a_repository_requires_a_database(self, database):
        with pytest.raises(ConfigurationError, match="Database"):
            MongoRepository(database)

    def test_an_asynchronous_database_is_refused(self):
        """Its methods only begin when they are awaited: nothing would be stored, and no error raised."""
        asynchronous = pytest.importorskip("pymongo.asynchronous.mongo_client")  # since 4.9
        client = asynchronous.AsyncMongoClient("mongodb://127.0.0.1:1", connect=False)
        with pytest.raises(
            ConfigurationError, match="must be a pymongo Database, not AsyncDatabase"
        ):
            MongoRepository(client["app"])

    def test_making_a_repository_does_no_io(self):
        repository = open_repository("mongodb://192.0.2.1:1/db?serverSelectionTimeoutMS=50")
        assert repr(repository) == "MongoRepository('tasks')"
        repository.close()


class TestUrls:
    def test_a_url_names_server_database_and_collection(self, url, database):
        with open_repository(
            f"{url}/{database.name}?collection=jobs&lease_timeout=5"
        ) as repository:
            repository.apply([insert("a")])
            assert database.jobs.count_documents({}) == 1
            assert repository.lease_timeout == 5.0

    def test_a_closed_repository_opens_again(self, url, database):
        repository = open_repository(f"{url}/{database.name}")
        repository.apply([insert("a")])
        repository.close()
        assert repository.count(TaskFilter()) == 1
        repository.close()

    @pytest.mark.parametrize(
        ("url", "problem"),
        [
            ("mongodb://host", "names no database"),
            ("mongodb://host/", "names no database"),
            ("mongodb+srv://host", "names no database"),
            ("mongodb://host/db?lease_timeout=long", "must be a number of seconds"),
            ("mongodb://host/db?adopt_foreign=yes", "must be true or false"),
            ("mongodb://host/db?collection=", "collection"),
        ],
    )
    def test_a_url_that_is_not_valid_is_refused(self, url, problem):
        with pytest.raises(ConfigurationError, match=problem):
            open_repository(url)

    def test_a_url_that_the_driver_refuses_fails_at_first_use(self):
        with pytest.raises(ConfigurationError):
            open_repository("mongodb://host:port/db").count(TaskFilter())

    def test_a_url_without_acknowledged_writes_fails_at_first_use(self, url, database):
        with (
            open_repository(f"{url}/{database.name}?w=0") as repository,
            pytest.raises(ConfigurationError, match="must be acknowledged"),
        ):
            repository.apply([insert("a")])

    @pytest.mark.parametrize(
        ("query", "expected"),
        [
            ("", {"w": "majority", "j": True}),
            ("?w=1&journal=false", {"w": 1, "j": False}),
            ("?wtimeoutMS=5000", {"w": "majority", "j": True, "wtimeout": 5000}),
            ("?journal=false", {"w": "majority", "j": False}),
        ],
    )
    def test_the_url_may_set_a_weaker_write_concern(self, url, database, query, expected):
        with open_repository(f"{url}/{database.name}{query}") as repository:
            repository.apply([insert("a")])
            assert repository._connection.tasks.write_concern.document == expected


class TestWriteConcern:
    def test_the_default_is_majority_with_journal(self, url, database, make):
        """The write concern of the database does not matter."""
        weak = database.client.get_database(database.name, write_concern=WriteConcern(w=1))
        repository = make(weak)
        for collection in ("tasks", "notes", "batches"):
            concern = getattr(repository._connection, collection).write_concern
            assert concern.document == {"w": "majority", "j": True}

    def test_an_argument_may_set_another_write_concern(self, database, make):
        repository = make(database, write_concern=WriteConcern(w=1))
        assert repository._connection.tasks.write_concern.document == {"w": 1}

    def test_every_sent_write_has_the_write_concern(self, url, database, make):
        sent = []

        class Listener(CommandCount):
            def started(self, event):
                if event.command_name in ("insert", "update", "delete"):
                    sent.append(event.command["writeConcern"])

        with pymongo.MongoClient(url, event_listeners=[Listener()]) as client:
            repository = make(client[database.name])
            repository.apply([insert("a")])
            repository.delete("a")
            repository.liveness.join(Node(id="n", name="n"))
            repository.liveness.leave("n")
        assert len(sent) >= 4
        assert all(concern == {"w": "majority", "j": True} for concern in sent)


class TestIndexes:
    def test_making_the_indexes_again_changes_nothing(self, repository, database):
        repository.init_indexes()
        before = database.tasks.index_information()
        repository.init_indexes()
        assert database.tasks.index_information() == before
        assert "taskx_ready" in before
        assert before["taskx_ready"]["partialFilterExpression"] == {"status": "pending"}

    def test_every_list_has_an_index_in_its_order(self, repository, database):
        """No list by status, type or creator reads or sorts the whole history."""
        repository.init_indexes()
        made = database.tasks.index_information()
        newest_first = [("created_at", -1), ("_id", -1)]
        assert made["taskx_newest"]["key"] == newest_first
        for name in ("status", "type", "created_by"):
            assert made[f"taskx_{name}"]["key"] == [(name, 1), *newest_first]

    @pytest.mark.parametrize("column", LOOKUPS)
    def test_every_lookup_column_has_a_usable_index(self, repository, database, column):
        """The index begins with the column, and holds all documents that the lookup can find."""
        if column == "id":
            return
        repository.init_indexes()
        where = LOOKUPS[column]
        asked = {**where.among, where.path: {"$gt": ""}}
        made = [dict(index, key=list(index["key"])) for index in database.tasks.list_indexes()]
        assert any(
            index["key"][0] == where.path
            and index.get("partialFilterExpression", {}).items() <= asked.items()
            for index in made
        )

    def test_the_first_node_makes_the_indexes(self, repository, database):
        repository.house.prepare()
        assert "taskx_due" in database.tasks.index_information()

    def test_making_all_indexes_has_a_time_out_for_each(self, make, database, url):
        given = []

        class Listener(CommandCount):
            def started(self, event):
                if event.command_name == "createIndexes":
                    given.append((event.command["maxTimeMS"], len(event.command["indexes"])))

        with pymongo.MongoClient(url, event_listeners=[Listener()]) as client:
            make(client[database.name], timeout=100.0).init_indexes()
        [(patience, count)] = given
        assert count > 1
        assert (count - 1) * 100_000 < patience <= count * 100_000

    def test_indexes_of_the_original_stay(self, repository, database):
        database.tasks.create_index("status")
        database.tasks.create_index([("created_at", -1), ("_id", -1)], name="theirs")
        repository.init_indexes()
        assert {"status_1", "theirs"} <= set(database.tasks.index_information())


FORK = """
import os, sys, threading, warnings
warnings.simplefilter("error")
import pymongo
from taskx import MongoRepository, Task, TaskFilter
from taskx.stores.liveness.base import Node
client = pymongo.MongoClient(sys.argv[1])
repository = MongoRepository(client[sys.argv[2]], run_folder=sys.argv[3])
repository.liveness.join(Node(id="n", name="parent"))
repository.create(Task(id="parent", type="t"))
repository.version()
repository.transactions._lock.acquire()  # as a thread that watches transactions may hold it
child = os.fork()
if child == 0:
    assert not repository.transactions._lock.locked()
    repository.create(Task(id="child", type="t"))
    assert repository.count(TaskFilter()) == 2
    assert [node.alive for node in repository.liveness.nodes()] == [True]
    assert not repository.liveness._own and repository.liveness._thread is None
    repository.liveness.join(Node(id="c", name="child"))
    repository.liveness.leave("c")
    repository.close()
    os._exit(0)
repository.transactions._lock.release()
assert os.waitpid(child, 0)[1] == 0
repository.create(Task(id="after", type="t"))
assert repository.count(TaskFilter()) == 3
assert [node.name for node in repository.liveness.nodes()] == ["parent"]
repository.liveness.leave("n")
repository.close()
client.close()
print("fine")
"""


def run_program(program, *args):
    return subprocess.run(
        [sys.executable, "-c", program, *args],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_a_forked_child_has_its_own_connections(url, database, tmp_path):
    ran = run_program(FORK, url, database.name, str(tmp_path / "run"))
    assert (ran.stdout, ran.returncode) == ("fine\n", 0), ran.stderr


FORK_WITH_SESSIONS = """
import os, sys
import pymongo
from taskx import MongoRepository, Queue
client = pymongo.MongoClient(sys.argv[1])
database = client[sys.argv[2]]
queue = Queue(MongoRepository(database, run_folder=sys.argv[3]))
queue.declare("t")

def store(name):
    def both(session):
        database.orders.insert_one({"_id": name}, session=session)
        queue.submit("t", id=name, connection=session)
    with client.start_session() as session:
        session.with_transaction(both)

queue.repository.init_indexes()
database.orders.insert_one({"_id": "first"})
store("parent")
child = os.fork()
if child == 0:
    store("child")
    queue.repository.close()
    store("child after a close")
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
store("after")
assert queue.count_tasks() == 4 and database.orders.count_documents({}) == 5
queue.close()
client.close()
print("fine")
"""


def test_a_forked_child_joins_transactions_of_the_programs_client(mongo_server, tmp_path):
    database = new_database(url := mongo_server("set"))
    ran = run_program(FORK_WITH_SESSIONS, url, database.name, str(tmp_path / "run"))
    database.client.drop_database(database.name)
    assert (ran.stdout, ran.returncode) == ("fine\n", 0), ran.stderr


class TestWithoutPymongo:
    @pytest.mark.process
    @pytest.mark.parametrize(
        "call", ["taskx.MongoRepository(object())", "taskx.open_repository('mongodb://h/db')"]
    )
    def test_the_error_names_the_extra(self, call):
        program = f"""
import sys
sys.modules["pymongo"] = None
import taskx
try:
    {call}
except taskx.ConfigurationError as error:
    print(error)
"""
        ran = run_program(program)
        assert "pip install 'taskx-queue[mongo]'" in ran.stdout, ran.stderr

    @pytest.mark.process
    def test_the_name_is_public_even_without_pymongo(self):
        assert "MongoRepository" in dir(taskx)
        ran = run_program("import sys; sys.modules['pymongo'] = None; from taskx import *")
        assert ran.returncode == 0, ran.stderr


def test_errors_of_the_driver_become_errors_of_taskx(repository, database, monkeypatch):
    def broken(*args, **options):
        raise pymongo.errors.OperationFailure("not allowed", 13)

    monkeypatch.setattr(pymongo.collection.Collection, "find", broken)
    with pytest.raises(RepositoryError, match="not allowed") as caught:
        repository.get_many(["a"])
    assert isinstance(caught.value.__cause__, pymongo.errors.OperationFailure)


def test_a_server_that_is_away_is_one_sentence_that_helps():
    away = f"127.0.0.1:{free_port()}"
    repository = open_repository(f"mongodb://ann:s3cret@{away}/db?timeout=0.2")

    def error():
        with pytest.raises(RepositoryUnavailable) as caught:
            repository.get_by_id("x")
        return str(caught.value)

    # A slow machine may need more than the time-out until it has tried the port at all.
    eventually(lambda: "No servers found yet" not in error())
    assert re.fullmatch(
        rf"the MongoDB server of the collection 'tasks' does not answer: {away}: .*refused\. "
        "Check the URL, the network and the server",
        error(),
    )
    [check] = [check for check in Queue(repository).diagnose().checks if check.name == "server"]
    assert re.fullmatch(rf"The server does not answer: {away}: .*refused\.", check.sentence)
    repository.close()


def test_an_error_has_the_text_of_the_server_without_its_details():
    error = pymongo.errors.OperationFailure(
        "Authentication failed., full error: {'ok': 0.0, 'errmsg': 'Authentication failed.'}", 18
    )
    assert words_of(error) == "Authentication failed."


def test_a_queue_does_not_start_beside_an_earlier_taskx(mock, make):
    """Each version would treat the nodes of the other as dead."""
    mock["tasks.nodes"].insert_one({"_id": "n", "name": "earlier", "dead": 0})
    queue = Queue(make(mock))
    with pytest.raises(SchemaMismatch, match="drop the collection"):
        queue.start()
    assert list(queue.repository.liveness.nodes()) == []
    mock.drop_collection("tasks.nodes")
    queue.start()
    assert queue.stop() == []


def test_two_collections_of_one_database_are_independent(make, database):
    one, two = make(database), make(database, collection="others")
    one.apply([insert("a")])
    one.liveness.join(Node(id="n", name="n"))
    assert two.count(TaskFilter()) == 0
    assert list(two.liveness.nodes()) == []
    one.liveness.leave("n")


def test_hosts_with_wrong_clocks_agree_on_the_order(mock, make, monkeypatch):
    """The server's clock decides the order of new tasks."""
    for name, hours, server_ms in (("first", 1, 0), ("second", -1, 60_000), ("third", 0, 120_000)):
        clock = ManualClock()
        clock.set_wall(clock.now() + timedelta(hours=hours))
        repository = make(mock, clock=clock)
        told = lambda timeout, ms=server_ms: 1_700_000_000_000 + ms  # noqa: E731
        monkeypatch.setattr(repository._sequencer, "_server_ms", told)
        repository.create(Task(id=name, type="t"))
    assert [stub.id for stub in make(mock).ready(["t"], 5)] == ["first", "second", "third"]


def test_the_server_tells_its_time(repository):
    told = repository._sequencer._server_ms(PATIENCE)
    assert abs(told - time.time() * 1000) < 600_000
