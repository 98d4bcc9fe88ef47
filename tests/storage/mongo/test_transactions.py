"""Transactions of executors on a replica set."""

from __future__ import annotations

import mongomock
import pymongo
import pytest
from helpers import eventually, run_once
from mongo_server import new_database
from pymongo.errors import AutoReconnect, OperationFailure
from units import ExecutorsTransactions

from taskx import ConfigurationError, RepositoryUnavailable, TaskStatus
from taskx.tasks import lifecycle
from taskx.tasks.errors import TaskCancelled

LONG = 60


@pytest.fixture
def url(mongo_server):
    """The URL of a replica set: other servers have no transactions."""
    return mongo_server("set")


@pytest.fixture
def rows(database):
    """Return the rows that the executors have written."""
    database.create_collection("rows")
    return lambda: sorted(row["n"] for row in database.rows.find())


@pytest.fixture
def run(make_queue, repository, rows):
    """Run a function as an executor, and return the task's record after it."""

    def run(function, queue=None, **options):
        return run_once(queue or make_queue(repository, worker_num=1), function, **options)

    return run


@pytest.fixture
def add(database):
    """Add a row in a transaction, as an application does that knows the name of its database."""

    def add(tx, n):
        tx.connection.client[database.name].rows.insert_one({"n": n}, session=tx.connection)

    return add


class TestContract(ExecutorsTransactions):
    pass


class TestCompletion:
    def test_tasks_are_submitted_in_it(self, make_queue, repository, rows, add):
        queue = make_queue(repository, worker_num=2)
        queue.executor("child")(lambda n: n)

        @queue.executor("t")
        def work(ctx):
            with ctx.transaction() as tx:
                add(tx, 1)
                tx.complete(queue.submit("child", {"n": 7}, connection=tx.connection).id)

        with queue:
            child = queue.submit("t").result(timeout=LONG)
            assert queue.handle(child).result(timeout=LONG) == 7
        assert rows() == [1]

    @pytest.mark.parametrize("method", ["commit_transaction", "abort_transaction", "end_session"])
    def test_only_the_end_of_the_block_commits(self, run, rows, add, method):
        def work(ctx):
            with ctx.transaction() as tx:
                add(tx, 1)
                with pytest.raises(ConfigurationError, match="the end of the block"):
                    getattr(tx.connection, method)()
                assert tx.connection.in_transaction
                assert rows() == []
                tx.complete("whole")
            assert tx.connection.has_ended

        assert run(work).result == "whole"
        assert rows() == [1]


class TestConflicts:
    @pytest.mark.parametrize("completes", [False, True])
    def test_a_run_that_has_lost_its_task_stores_nothing_and_ends(
        self, run, rows, add, database, completes
    ):
        """It was lost before the block, or while it was open."""
        ended = []

        def work(ctx):
            if ctx.task.starts > 2:
                return "by another run"
            try:
                with ctx.transaction() as tx:
                    add(tx, 1)
                    database.tasks.update_one({}, {"$inc": {"taskx.starts": 1}})
                    if completes:
                        tx.complete("lost")
            except TaskCancelled as error:
                ended.append(error)
                back = {"status": "pending", "taskx.owner": "", "taskx.held": 0, "taskx.starts": 2}
                database.tasks.update_one({}, {"$set": back})
                raise

        assert run(work).result == "by another run"
        assert len(ended) == 1
        assert rows() == []

    def test_progress_does_not_disturb_it(self, run, rows, add, repository, monkeypatch):
        """A change of the record between the first statement and the end would be a conflict."""
        stored = []
        progress = lifecycle.progress

        def told(*args):
            stored.append(args)
            return progress(*args)

        monkeypatch.setattr(lifecycle, "progress", told)

        def work(ctx):
            for n in range(30):
                ctx.progress(n)
                with ctx.transaction() as tx:
                    add(tx, n)
                    ctx.progress(n + 1, "inside")
                    ctx.sleep(0.02)
                    ctx.cursor = n
                if n == 0:
                    eventually(lambda: stored)
            eventually(lambda: repository.get_by_id(ctx.task.id).progress == 30)

        assert run(work, max_attempts=1).status is TaskStatus.COMPLETED
        assert rows() == [*range(30)]
        assert len(stored) > 1

    def test_a_request_to_cancel_in_the_meantime_rolls_back(self, run, rows, add, repository):
        raised = []

        def work(ctx):
            try:
                with ctx.transaction() as tx:
                    add(tx, 1)
                    # As another process does it: this one would also fire the token.
                    repository.apply(lifecycle.cancel(ctx.task.id, 1))
                    tx.complete()
            except RepositoryUnavailable as error:
                raised.append(error)
                raise

        task = run(work, max_attempts=3)
        assert task.status is TaskStatus.CANCELLED
        assert raised[0].has_error_label("TransientTransactionError")
        assert rows() == []

    def test_a_conflict_with_data_is_an_error_that_the_retry_policy_handles(
        self, run, rows, add, database
    ):
        database.rows.insert_one({"_id": "sum", "n": 0})

        def work(ctx):
            with ctx.transaction() as tx:
                add(tx, ctx.task.attempt)
                if ctx.task.attempt == 1:
                    database.rows.update_one({"_id": "sum"}, {"$inc": {"n": 100}})
                database.rows.update_one({"_id": "sum"}, {"$inc": {"n": 50}}, session=tx.connection)
                tx.complete("second")

        task = run(work, max_attempts=2)
        assert (task.result, task.errors) == ("second", 1)
        assert "OperationFailure" in task.earlier_attempts[0].error_type
        assert rows() == [2, 150]


class TestCommit:
    """A commit whose result is unknown is sent again, and then read back."""

    @pytest.fixture
    def commits(self, monkeypatch):
        """Let commits fail as a list of functions says; each gets the real commit."""
        planned = []
        real = pymongo.client_session.ClientSession.commit_transaction

        def commit(session):
            return planned.pop(0)(lambda: real(session)) if planned else real(session)

        monkeypatch.setattr(pymongo.client_session.ClientSession, "commit_transaction", commit)
        return planned

    @staticmethod
    def work(add, raised):
        def work(ctx):
            try:
                with ctx.transaction() as tx:
                    add(tx, ctx.task.attempt)
                    tx.complete("done")
            except RepositoryUnavailable as error:
                raised.append(error.in_doubt)
                raise

        return work

    def test_a_lost_answer_is_asked_for_again(self, run, rows, add, commits):
        commits += [_answer_lost, _not_sent]
        raised = []
        task = run(self.work(add, raised))
        assert (task.status, task.result) == (TaskStatus.COMPLETED, "done")
        assert rows() == [1]
        assert raised == commits == []

    @pytest.mark.parametrize("committed", [True, False])
    def test_a_server_that_has_forgotten_the_transaction_is_not_believed(
        self, run, rows, add, commits, committed
    ):
        commits += [_answer_lost if committed else _not_sent, _forgotten]
        raised = []
        task = run(self.work(add, raised), max_attempts=2)
        assert (task.status, task.result) == (TaskStatus.COMPLETED, "done")
        assert rows() == ([1] if committed else [2])
        assert raised == ([] if committed else [True])

    def test_a_refused_commit_is_not_in_doubt(self, run, rows, add, commits):
        commits += [_forgotten]
        raised = []
        assert run(self.work(add, raised), max_attempts=2).result == "done"
        assert rows() == [2]
        assert raised == [False]


def _labelled(error, label):
    error._add_error_label(label)
    return error


def _not_sent(commit):
    raise _labelled(AutoReconnect("no answer"), "UnknownTransactionCommitResult")


def _answer_lost(commit):
    commit()
    _not_sent(commit)


def _forgotten(commit):
    gone = OperationFailure("Given transaction number does not match", 251)
    raise _labelled(gone, "TransientTransactionError")


class TestRefused:
    def refused(self, run, queue):
        def work(ctx):
            with pytest.raises(ConfigurationError) as caught, ctx.transaction():
                pytest.fail("it must not begin")
            return str(caught.value)

        return run(work, queue).result

    def test_on_a_standalone_server(self, run, mongo_server, make, make_queue):
        database = new_database(mongo_server("standalone"))
        assert "use a replica set" in self.refused(run, make_queue(make(database)))
        database.client.drop_database(database.name)

    def test_on_a_mock(self, run, make, make_queue):
        queue = make_queue(make(mongomock.MongoClient().db))
        assert "a mock of pymongo" in self.refused(run, queue)
