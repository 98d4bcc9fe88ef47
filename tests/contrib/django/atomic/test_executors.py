"""Executors whose writes are committed together with their checkpoints and their completion."""

from __future__ import annotations

import threading
from contextlib import suppress

import pytest
from django.db import IntegrityError, OperationalError, connections, transaction
from django.db.utils import InterfaceError
from helpers import run_once
from units import ExecutorsTransactions

from contrib.django.atomic.blocks import LONG, elsewhere
from taskx import ConfigurationError, TaskCancelled, TaskFailed, TaskStatus

FAILURE = {
    "sqlite": OperationalError("disk I/O error"),
    "postgresql": InterfaceError("closed"),
    "mysql": OperationalError(2013, "Lost connection to server during query"),
}


@pytest.fixture
def run(queue):
    """Run a function as an executor, and return the task's record after it."""

    def run(function, **options):
        return run_once(queue, function, **options)

    return run


class TestContract(ExecutorsTransactions):
    @pytest.fixture
    def add(self, add):
        return lambda tx, number: add(str(number))

    @pytest.fixture
    def rows(self, names):
        return lambda: [int(name) for name in elsewhere(names)]


def test_its_connection_is_that_of_the_thread(run, using):
    def work(ctx):
        with ctx.transaction() as tx:
            assert tx.connection is connections[using]
            assert tx.connection.in_atomic_block
        assert not connections[using].in_atomic_block

    assert run(work).status is TaskStatus.COMPLETED


def test_tasks_that_are_submitted_in_it_belong_to_it(run, queue):
    def work(ctx):
        with ctx.transaction() as tx:
            queue.submit("elsewhere", id=f"of attempt {ctx.task.attempt}")
            if ctx.task.attempt == 1:
                raise ValueError("undo it")
            tx.complete()

    assert run(work, max_attempts=2).status is TaskStatus.COMPLETED
    found = {task.id for task in queue.list_tasks(type="elsewhere")[0]}
    assert found == {"of attempt 2"}


@pytest.mark.timing(audit_every=float("inf"))  # an audit would interrupt the run that is not here
@pytest.mark.parametrize("completes", [True, False])
def test_a_run_that_has_lost_its_task_stores_nothing(queue, using, add, names, completes):
    ended, outcomes = threading.Event(), []

    def take():
        """Give the task to another run, as a rescue does."""
        with connections[using].cursor() as cursor:
            cursor.execute("UPDATE taskx_task SET starts = starts + 1 WHERE type = 't'")

    def work(ctx):
        try:
            if connections[using].vendor == "sqlite":  # SQLite lets nobody write during the block
                elsewhere(take)
            with ctx.transaction() as tx:
                add("readers")
                if completes:
                    tx.complete()
                if connections[using].vendor != "sqlite":
                    elsewhere(take)
        except BaseException as error:
            outcomes.append(type(error))
            raise
        finally:
            ended.set()

    queue.executor("t")(work)
    queue.start()
    queue.submit("t")
    assert ended.wait(LONG)
    assert queue.stop() == []
    assert outcomes == [TaskCancelled]
    assert names() == []
    [task] = queue.list_tasks(type="t")[0]
    assert task.status is TaskStatus.RUNNING


@pytest.mark.parametrize("commits", [True, False])
def test_a_commit_in_doubt_is_read_back(run, queue, using, add, names, commits, monkeypatch):
    vendor = connections[using].vendor

    def work(ctx):
        commit = connections[using].commit

        def fail():
            monkeypatch.undo()
            if commits:
                commit()
            else:
                connections[using].rollback()
            raise FAILURE[vendor]

        with ctx.transaction() as tx:
            add(f"attempt {ctx.task.attempt}")
            if ctx.task.attempt == 1:
                monkeypatch.setattr(connections[using], "commit", fail)
            tx.complete(ctx.task.attempt)

    task = run(work, max_attempts=2)
    assert task.result == (1 if commits else 2)
    assert names() == [f"attempt {task.result}"]


def test_a_constraint_that_is_checked_at_the_commit_rolls_back(run, using, add, names):
    def work(ctx):
        with ctx.transaction() as tx:
            add("readers")
            with (
                tx.connection.cursor() as cursor
            ):  # Django's foreign keys are checked at the commit
                cursor.execute(
                    "INSERT INTO auth_group_permissions (group_id, permission_id) VALUES (7, 7)"
                )
            tx.complete()

    task = run(work)
    assert task.status is TaskStatus.FAILED
    assert task.error_type.endswith("IntegrityError")
    assert names() == []


def test_only_the_end_of_the_block_commits(run, using, add, names):
    def work(ctx):
        with ctx.transaction():
            add("readers")
            for end in (transaction.commit, transaction.rollback):
                with pytest.raises(transaction.TransactionManagementError):
                    end(using=using)

    assert run(work).status is TaskStatus.COMPLETED
    assert names() == ["readers"]


def test_a_statement_that_broke_the_block_is_no_silent_rollback(run, add, names):
    def work(ctx):
        add("readers")
        with ctx.transaction() as tx:
            add("writers")
            try:
                add("readers")
            except IntegrityError:
                tx.complete("as if nothing had happened")

    task = run(work)
    assert task.status is TaskStatus.FAILED
    assert "an error has broken the transaction" in task.error
    assert names() == ["readers"]


@pytest.mark.parametrize(
    ("repository", "ends"),
    [
        ("sqlite", "INSERT OR ROLLBACK INTO auth_group (name) VALUES ('readers')"),
        ("mariadb", "ROLLBACK"),  # as the server does itself at a deadlock
        ("postgres", "ROLLBACK"),
    ],
    indirect=["repository"],
)
@pytest.mark.parametrize("completes", [True, False])
def test_a_transaction_that_the_database_ends_completes_nothing(
    run, using, add, names, ends, completes
):
    add("readers")

    def work(ctx):
        with ctx.transaction() as tx:
            add("writers")
            with suppress(IntegrityError), tx.connection.cursor() as cursor:
                cursor.execute(ends)
            ctx.cursor = 1
            if completes:
                tx.complete("as if nothing had happened")

    task = run(work)
    assert (task.status, task.checkpoints) == (TaskStatus.FAILED, None)
    assert "has ended the transaction of this block" in task.error
    assert names() == ["readers"]


def test_inside_another_block_it_is_refused(run, using):
    def work(ctx):
        with transaction.atomic(using=using), ctx.transaction():
            pytest.fail("the block must not begin")

    task = run(work)
    assert task.status is TaskStatus.FAILED
    assert "leave that block before" in task.error or "instead of the block" in task.error


def break_connection(using):
    """Break this thread's connection, as a restart of the server does."""
    own = connections[using]
    if own.vendor == "postgresql":
        own.connection.close()
    elif own.vendor == "mysql":
        number = own.connection.thread_id()
        elsewhere(lambda: connections[using].cursor().execute(f"KILL {number}"))
    else:
        own.close()


def test_a_connection_that_has_broken_is_opened_again(run, using, add, names):
    def work(ctx):
        add("readers")
        break_connection(using)
        with ctx.transaction() as tx:
            add("writers")
            tx.complete()

    assert run(work).status is TaskStatus.COMPLETED
    assert names() == ["readers", "writers"]


@pytest.mark.parametrize("repository", ["postgres", "mariadb"], indirect=True)
def test_a_connection_that_broke_while_it_was_opened_is_opened_again(run, using, add, names):
    def work(ctx):
        own = connections[using]
        own.close()
        for known in ("mysql_server_data", "mysql_version", "mysql_is_mariadb"):
            own.__dict__.pop(known, None)  # as in a thread's first task
        set_autocommit = own._set_autocommit

        def dying(wanted):
            del own._set_autocommit
            break_connection(using)
            set_autocommit(wanted)

        own._set_autocommit = dying
        with ctx.transaction() as tx:
            add("writers")
            tx.complete()
        assert own.get_autocommit()

    assert run(work).status is TaskStatus.COMPLETED
    assert names() == ["writers"]


def test_without_autocommit_it_commits_and_checkpoints_are_stored(
    run, using, add, names, monkeypatch
):
    monkeypatch.setitem(connections.settings[using], "AUTOCOMMIT", False)

    def work(ctx):
        assert ctx.step("one", lambda: 1) == 1
        add("writers")
        with pytest.raises(ConfigurationError, match="inside"), ctx.transaction():
            pytest.fail("a transaction is open")
        connections[using].rollback()
        with ctx.transaction():
            add("readers")
        assert not connections[using].get_autocommit()

    assert run(work).status is TaskStatus.COMPLETED
    connections[using].close()
    assert names() == ["readers"]


def test_a_failure_without_a_completion_is_told(queue, using, add, names, monkeypatch):
    @queue.executor()
    def work(ctx):
        def fail():
            monkeypatch.undo()
            connections[using].rollback()
            raise FAILURE[connections[using].vendor]

        with ctx.transaction():
            add("readers")
            monkeypatch.setattr(connections[using], "commit", fail)

    with queue, pytest.raises(TaskFailed, match="may have happened"):
        queue.submit("work").result(timeout=LONG)
    assert names() == []
