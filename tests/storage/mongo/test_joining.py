"""Submits and cancels in a transaction of the application, on a replica set."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import mongomock
import pymongo
import pytest
from helpers import eventually
from mongo_server import new_database
from pymongo.errors import OperationFailure, PyMongoError
from units import CallersTransactions

from taskx import (
    ConfigurationError,
    Hook,
    InvalidTransition,
    Middleware,
    Queue,
    RepositoryUnavailable,
    SQLiteRepository,
    Task,
)

LONG = 60


@pytest.fixture
def url(mongo_server):
    """The URL of a replica set: other servers have no transactions."""
    return mongo_server("set")


@pytest.fixture
def orders(database):
    database.orders.insert_one({"_id": "first"})
    return database.orders


@pytest.fixture
def queue(repository, make_queue):
    repository.init_indexes()
    made = make_queue(repository, worker_num=2)
    made.executor("echo")(lambda n=0: n)
    made.declare("elsewhere")
    return made


@pytest.fixture
def session(database, orders, queue):
    with database.client.start_session() as made:
        yield made


def count(queue):
    return int(queue.count_tasks())


class TestContract(CallersTransactions):
    @pytest.fixture
    def begin(self, session):
        @contextmanager
        def begin(undo=False):
            session.start_transaction()
            yield {"connection": session}
            session.abort_transaction() if undo else session.commit_transaction()

        return begin

    @pytest.fixture
    def add(self, orders):
        return lambda within: orders.insert_one({}, session=within["connection"])

    @pytest.fixture
    def rows(self, orders):
        return lambda: orders.count_documents({}) - 1  # without the first one


class TestSubmit:
    def test_a_parent_whose_batch_is_not_revealed_yet_is_found(
        self, queue, session, repository, monkeypatch
    ):
        with monkeypatch.context() as patch:
            patch.setattr(repository._sender, "insert_together", lambda writes: False)
            patch.setattr(repository._batches, "_reveal", lambda batch: None)
            [parent, _] = queue.submit_many([Task(type="elsewhere"), Task(type="elsewhere")])
        with session.start_transaction():
            child = queue.submit("echo", depends_on=[parent], connection=session)
        assert child.task().depends_on == [parent.id]

    def test_hooks_are_told_once_after_the_commit(self, queue, session, make_queue, repository):
        told, ended = [], threading.Event()

        class Recorder(Hook):
            def submitted(self, task):
                told.append(task.id)
                if task.id == "last":
                    ended.set()

        queue = make_queue(repository, hooks=[Recorder()])
        queue.declare("t")
        tries = []

        def store(session):
            tries.append(queue.submit("t", id="kept", connection=session))
            if len(tries) < 3:
                raise transient()

        session.start_transaction()
        queue.submit("t", id="gone", connection=session)
        session.abort_transaction()
        session.with_transaction(store)
        with session.start_transaction():
            queue.submit("t", id="last", connection=session)
        assert ended.wait(LONG)
        eventually(lambda: sorted(told) == ["kept", "last"])  # in any order
        eventually(lambda: not repository.transactions.units)
        assert sorted(told) == ["kept", "last"]

    def test_the_watching_thread_ends(self, queue, session, repository):
        with session.start_transaction():
            queue.submit("echo", connection=session)
            thread = repository.transactions._thread
            assert thread.name == "taskx-commits"
        thread.join(LONG)
        assert not thread.is_alive()

    def test_a_closed_repository_watches_no_longer(self, queue, session, repository):
        session.start_transaction()
        queue.submit("echo", connection=session)
        thread = repository.transactions._thread
        repository.close()
        thread.join(LONG)
        assert not thread.is_alive()
        session.abort_transaction()


def transient():
    error = PyMongoError("a network that failed")
    error._add_error_label("TransientTransactionError")
    return error


class TestErrors:
    """MongoDB has no savepoints: an error comes before the first write, or aborts the transaction."""

    def test_an_error_after_a_write_aborts_the_whole_transaction(
        self, make_queue, repository, session, orders
    ):
        class Failing(Middleware):
            def submit(self, tasks, store):
                store(tasks)
                raise OverflowError("mine")

        queue = make_queue(repository, middleware=[Failing()])
        queue.declare("t")
        session.start_transaction()
        orders.insert_one({"_id": 1}, session=session)
        with pytest.raises(OverflowError, match="mine"):
            queue.submit("t", connection=session)
        # A caller that goes on must not write without a transaction.
        with pytest.raises(OperationFailure):
            orders.insert_one({"_id": 2}, session=session)
        with pytest.raises(OperationFailure):
            session.commit_transaction()
        assert count(queue) == 0
        assert orders.count_documents({}) == 1

    @pytest.mark.parametrize("option", [{"id": "a"}, {"unique_key": "k"}])
    def test_a_task_of_another_transaction_in_the_meantime_aborts(
        self, queue, session, orders, option
    ):
        session.start_transaction()
        orders.find_one({}, session=session)  # the snapshot is of this moment
        queue.submit("elsewhere", **option)
        with pytest.raises(RepositoryUnavailable, match="Repeat the whole transaction") as caught:
            queue.submit("echo", **option, connection=session)
        assert isinstance(caught.value, PyMongoError)
        assert caught.value.has_error_label("TransientTransactionError")
        assert not caught.value.in_doubt
        with pytest.raises(OperationFailure):
            session.commit_transaction()
        assert [task.type for task in queue.list_tasks()[0]] == ["elsewhere"]

    def test_with_transaction_repeats_until_it_holds_and_the_task_counts_once(
        self, queue, session, orders
    ):
        tries = []

        def store(session):
            tries.append(orders.find_one({}, session=session))
            if len(tries) == 1:
                queue.submit("elsewhere", unique_key="k")
            orders.insert_one({"_id": "second"}, session=session)
            return queue.submit(
                "echo", {"n": 1}, unique_key="k", on_conflict="return", connection=session
            )

        handle = session.with_transaction(store)
        assert len(tries) == 2
        assert [(task.id, task.type) for task in queue.list_tasks()[0]] == [
            (handle.id, "elsewhere")
        ]
        assert orders.count_documents({}) == 2

    def test_indexes_that_are_missing_are_made_outside(self, make, database, orders, make_queue):
        queue = make_queue(make(database, collection="new"))
        queue.declare("t")

        def store(session):
            orders.insert_one({"_id": 1}, session=session)
            queue.submit("t", unique_key="k", connection=session)

        with database.client.start_session() as session:
            session.with_transaction(store)
        assert "taskx_unique_lock" in database.new.index_information()
        assert count(queue) == 1


class TestCancel:
    def test_a_finished_task_is_refused_and_the_transaction_goes_on(self, queue, session, orders):
        task = queue.submit("elsewhere")
        queue.cancel_task(task.id)
        with session.start_transaction():
            with pytest.raises(InvalidTransition):
                queue.cancel_task(task.id, connection=session)
            orders.insert_one({"_id": 1}, session=session)
        assert orders.count_documents({}) == 2


class TestWrongConnections:
    def refused(self, queue, connection, reason):
        with pytest.raises(ConfigurationError, match=reason) as caught:
            queue.submit("echo", connection=connection)
        assert "nothing was stored" in str(caught.value)
        assert count(queue) == 0

    def test_of_another_client(self, queue, url):
        with pymongo.MongoClient(url) as other, other.start_session() as session:
            session.start_transaction()
            self.refused(queue, session, "another MongoClient")

    def test_that_has_ended(self, queue, database):
        session = database.client.start_session()
        session.end_session()
        self.refused(queue, session, "has ended")

    def test_without_a_transaction(self, queue, session):
        self.refused(queue, session, r"use it inside `with session\.start_transaction\(\):`")

    @pytest.mark.parametrize("thing", [5, "mongodb://localhost", object()])
    def test_something_else(self, queue, thing):
        self.refused(queue, thing, "must be a ClientSession of pymongo")

    def test_of_a_standalone_server(self, mongo_server, make, make_queue):
        database = new_database(mongo_server("standalone"))
        queue = make_queue(make(database))
        queue.declare("echo")
        with database.client.start_session() as session:
            session.start_transaction()
            self.refused(queue, session, "use a replica set")

    def test_of_a_mock(self, make, make_queue, session):
        queue = make_queue(make(mongomock.MongoClient().db))
        queue.declare("echo")
        self.refused(queue, session, "a mock of pymongo")

    def test_for_tasks_in_another_store(self, tmp_path, session):
        with SQLiteRepository(tmp_path / "tasks.db") as repository:
            queue = Queue(repository)
            queue.declare("echo")
            with pytest.raises(ConfigurationError, match=r"must be an sqlite3\.Connection"):
                queue.submit("echo", connection=session)


def test_callers_do_not_conflict_with_each_other_or_with_workers(queue, database, orders):
    """Each transaction is tried once only: a conflict would be an error."""
    failed = []

    def work(thread):
        with database.client.start_session() as session:
            for n in range(20):
                try:
                    with session.start_transaction():
                        orders.insert_one({"_id": (name := f"{thread}-{n}")}, session=session)
                        queue.submit("echo", {"n": n}, id=name, connection=session)
                except PyMongoError as error:
                    failed.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    with queue:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG)
        assert queue.drain(LONG)
    assert failed == []
    assert int(queue.count_tasks(status="completed")) == 160


def test_another_process_is_told_of_the_commit_by_the_server(make, database, queue, session):
    """The version changes for the submitting object, too: its own commit is news to its queue."""
    other = make(database, poll_interval=3600)
    queue.repository._changes._poll_interval = 3600
    for repository in (other, queue.repository):
        repository.version()
        eventually(lambda r=repository: r.version()[1] is None)  # the stream is open
    with session.start_transaction():
        before = [repository.version() for repository in (other, queue.repository)]
        queue.submit("elsewhere", connection=session)
    for repository, version in zip((other, queue.repository), before, strict=True):
        eventually(lambda r=repository, v=version: r.version()[0] != v[0])
