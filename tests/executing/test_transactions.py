"""Transactions of executors: writes, checkpoints and completion are committed together."""

from __future__ import annotations

import sqlite3
import sys
import threading
from contextlib import closing, suppress
from functools import partial

import pytest
from helpers import run_once
from units import ExecutorsTransactions

from taskx import (
    Config,
    ConfigurationError,
    Context,
    Hook,
    MemoryRepository,
    PayloadError,
    Queue,
    RepositoryError,
    SQLiteRepository,
    TaskFilter,
    TaskStatus,
)
from taskx.stores.sqlite import joining

LONG = 60


@pytest.fixture
def path(tmp_path):
    with closing(sqlite3.connect(tmp_path / "app.db")) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE rows (n INTEGER)")
        connection.commit()
    return tmp_path / "app.db"


@pytest.fixture
def repository(path):
    with SQLiteRepository(path, prefix="taskx_") as made:
        made.count(TaskFilter())
        yield made


@pytest.fixture
def run(make_queue):
    """Run a function as an executor, and return the task's record after it."""

    def run(function, queue=None, **options):
        return run_once(queue or make_queue(worker_num=1), function, **options)

    return run


@pytest.fixture
def rows(path):
    def rows():
        with closing(sqlite3.connect(path)) as connection:
            return [n for (n,) in connection.execute("SELECT n FROM rows ORDER BY n")]

    return rows


def add(tx, n):
    tx.connection.execute("INSERT INTO rows VALUES (?)", (n,))


class TestContract(ExecutorsTransactions):
    @pytest.fixture
    def add(self):
        return add


class TestCompletion:
    def test_the_handle_is_resolved_with_the_result(self, make_queue):
        queue = make_queue(worker_num=1)

        @queue.executor()
        def work(ctx: Context) -> None:
            with ctx.transaction() as tx:
                tx.complete()

        with queue:
            assert queue.submit(work).result(timeout=LONG) is None

    def test_hooks_and_dependents_follow(self, make_queue):
        finished = []

        class Recorder(Hook):
            def finished(self, task):
                finished.append((task.id, task.status, task.result))

        queue = make_queue(worker_num=1, hooks=[Recorder()])
        queue.executor("child")(lambda ctx: ctx.parents[0].result)

        @queue.executor("t")
        def work(ctx):
            with ctx.transaction() as tx:
                tx.complete(5)

        with queue:
            parent = queue.submit("t")
            child = queue.submit("child", depends_on=[parent])
            assert child.result(timeout=LONG) == 5
        assert finished == [(each.id, TaskStatus.COMPLETED, 5) for each in (parent, child)]

    @pytest.mark.parametrize(
        "late",
        [
            lambda ctx: setattr(ctx, "cursor", 5),
            lambda ctx: ctx.step("late", lambda: pytest.fail("it was called")),
        ],
        ids=["cursor", "step"],
    )
    def test_a_checkpoint_after_it_is_refused_with_the_reason(self, run, late):
        refused = []

        def work(ctx):
            with ctx.transaction() as tx:
                ctx.cursor = 4
                tx.complete()
            with pytest.raises(ConfigurationError, match="has completed the task: call") as error:
                late(ctx)
            refused.append(error.value)

        assert run(work).status is TaskStatus.COMPLETED
        assert len(refused) == 1

    @pytest.mark.parametrize("later", ["a result", ValueError("too late")])
    def test_what_comes_after_it_is_logged_and_ignored(self, run, later, caplog):
        def work(ctx):
            with ctx.transaction() as tx:
                tx.complete("kept")
            if isinstance(later, Exception):
                raise later
            return later

        task = run(work, max_attempts=3)
        assert (task.status, task.result, task.errors) == (TaskStatus.COMPLETED, "kept", 0)
        assert "was completed by tx.complete()" in caplog.text

    def test_a_result_that_is_no_json_is_refused_at_once(self, run, rows):
        def work(ctx):
            with ctx.transaction() as tx:
                add(tx, 1)
                with pytest.raises(PayloadError):
                    tx.complete(object())
                tx.complete("good")
                with pytest.raises(ConfigurationError, match="already called"):
                    tx.complete("again")

        assert run(work).result == "good"
        assert rows() == [1]

    def test_a_completion_after_the_block_is_refused(self, run, rows):
        """It would be lost without a word."""

        def work(ctx):
            with ctx.transaction() as tx:
                add(tx, 1)
            with pytest.raises(
                ConfigurationError, match="which has ended: return the result instead"
            ):
                tx.complete("late")
            return "returned"

        assert run(work).result == "returned"
        assert rows() == [1]

    def test_the_next_task_of_a_key_gets_its_turn(self, make_queue):
        queue = make_queue(worker_num=2)

        @queue.executor("t")
        def work(ctx):
            with ctx.transaction() as tx:
                tx.complete(ctx.task.id)

        with queue:
            handles = [queue.submit("t", concurrency_key="k") for _ in range(3)]
            assert [h.result(timeout=LONG) for h in handles] == [h.id for h in handles]


class TestRollback:
    def test_a_cursor_that_is_still_in_use_keeps_nothing_locked(self, run, rows):
        def work(ctx):
            with suppress(ZeroDivisionError), ctx.transaction() as tx:
                add(tx, 1)
                add(tx, 2)
                used = tx.connection.execute("SELECT n FROM rows")
                assert used.fetchone() == (1,)
                raise ZeroDivisionError
            ctx.step("one", int)  # it would wait for the lock
            del used

        assert run(work).status is TaskStatus.COMPLETED
        assert rows() == []

    @pytest.mark.parametrize("completes", [False, True])
    def test_a_run_that_has_lost_its_task_stores_nothing_and_ends(self, run, rows, path, completes):
        ended = []

        def work(ctx):
            if ctx.task.starts > 1:
                return "by another run"
            with closing(sqlite3.connect(path, timeout=LONG)) as other:
                other.execute("UPDATE taskx_tasks SET starts = starts + 1")
                other.commit()
            try:
                with ctx.transaction() as tx:
                    add(tx, 1)
                    if completes:
                        tx.complete("lost")
            except BaseException as error:
                ended.append(type(error).__name__)
                with closing(sqlite3.connect(path, timeout=LONG)) as other:
                    other.execute("UPDATE taskx_tasks SET status = 'pending', owner = '', held = 0")
                    other.commit()
                raise

        assert run(work).result == "by another run"
        assert ended == ["TaskCancelled"]
        assert rows() == []


class TestCheckpoints:
    def test_writes_without_a_checkpoint_are_committed(self, run, rows):
        def work(ctx):
            with ctx.transaction() as tx:
                add(tx, 1)
            return rows()

        assert run(work).result == [1]

    def test_tasks_are_submitted_in_it(self, make_queue, rows):
        queue = make_queue(worker_num=2)
        queue.executor("child")(lambda n: n)

        @queue.executor("t")
        def work(ctx):
            with ctx.transaction() as tx:
                add(tx, 1)
                with pytest.raises(ConfigurationError, match="it would wait for itself"):
                    queue.submit("child", {"n": 0})
                child = queue.submit("child", {"n": 7}, connection=tx.connection)
                tx.complete(child.id)

        with queue:
            child = queue.submit("t").result(timeout=LONG)
            assert queue.handle(child).result(timeout=LONG) == 7
        assert queue.list_tasks(type="child").total == 1

    def test_another_thread_of_the_run_cannot_store_in_it(self, run):
        said = []

        def work(ctx):
            def other():
                try:
                    ctx.step("two", int)
                except ConfigurationError as error:
                    said.append(str(error))

            with ctx.transaction():
                thread = threading.Thread(target=other)
                thread.start()
                thread.join()
            return ctx.step("two", int)

        assert run(work).result == 0
        assert "another thread of this run" in said[0]


class TestCommit:
    """A COMMIT whose outcome is unknown is read back."""

    @pytest.mark.parametrize("end", ["COMMIT", "ROLLBACK"])
    def test_in_doubt(self, run, rows, monkeypatch, end):
        doubtful = iter([end])

        def commit(connection):
            connection.execute(last := next(doubtful, "COMMIT"))
            if last == end:
                raise joining._InDoubt("disk I/O error")

        monkeypatch.setattr(joining, "_commit", commit)
        raised = []

        def work(ctx):
            try:
                with ctx.transaction() as tx:
                    add(tx, ctx.task.attempt)
                    tx.complete("done")
            except RepositoryError as error:
                raised.append(error)
                monkeypatch.undo()
                raise

        task = run(work, max_attempts=2)
        assert (task.status, task.result) == (TaskStatus.COMPLETED, "done")
        assert rows() == ([1] if end == "COMMIT" else [2])
        assert len(raised) == (end == "ROLLBACK")

    @pytest.mark.parametrize("end", ["COMMIT", "ROLLBACK"])
    def test_an_error_of_sqlite_after_which_no_transaction_is_open(self, run, rows, path, end):
        """The connection itself fails, as with a broken disk."""
        failing = [end]

        class Failing(sqlite3.Connection):
            def execute(self, sql, *values):
                if sql == "COMMIT" and failing:
                    super().execute(failing.pop())
                    raise sqlite3.OperationalError("disk I/O error")
                return super().execute(sql, *values)

        def connect():
            return sqlite3.connect(path, timeout=LONG, isolation_level=None, factory=Failing)

        def work(ctx):
            with ctx.transaction() as tx:
                add(tx, ctx.task.attempt)
                tx.complete("done")

        with SQLiteRepository(path, prefix="taskx_", connect=connect) as repository:
            task = run(work, Queue(repository, Config(worker_num=1)), max_attempts=2)
        assert (task.status, task.result) == (TaskStatus.COMPLETED, "done")
        assert rows() == ([1] if end == "COMMIT" else [2])
        assert task.errors == (end == "ROLLBACK")

    @pytest.mark.parametrize("end", ["COMMIT", "ROLLBACK"])
    def test_checkpoints_as_before_do_not_prove_a_commit(self, run, rows, monkeypatch, end):
        """The writes beside them may be lost, so the attempt fails."""

        def commit(connection):
            connection.execute(end)
            raise joining._InDoubt("disk I/O error")

        def work(ctx):
            if ctx.task.attempt == 1:
                ctx.cursor = 5
                with monkeypatch.context() as patch, ctx.transaction() as tx:
                    patch.setattr(joining, "_commit", commit)
                    add(tx, 1)
                    ctx.cursor = 5
            return "again"

        assert run(work, max_attempts=2).errors == 1
        assert rows() == ([1] if end == "COMMIT" else [])

    @pytest.mark.parametrize(
        "end",
        [
            lambda connection: connection.commit(),
            lambda connection: connection.rollback(),
            lambda connection: connection.execute("COMMIT"),
            lambda connection: connection.executescript("SELECT 1"),
            lambda connection: connection.execute("BEGIN"),
        ],
    )
    def test_only_the_end_of_the_block_commits(self, run, rows, end):
        def work(ctx):
            with ctx.transaction() as tx:
                add(tx, 1)
                with suppress(sqlite3.Error):
                    end(tx.connection)
                assert tx.connection.in_transaction
                assert rows() == []
                tx.complete("whole")

        assert run(work).result == "whole"
        assert rows() == [1]


class TestRolledBackBySQLite:
    """SQLite itself rolls back on a full disk or ``OR ROLLBACK``, and the executor catches that error."""

    #: The ways in which TaskX or the application opens the connection.
    KINDS = ({"timeout": LONG}, {"isolation_level": None}, {"autocommit": True})

    @pytest.fixture(params=[None, *KINDS[: 3 if sys.version_info >= (3, 12) else 2]], ids=str)
    def made(self, request, path):
        connect = request.param and partial(sqlite3.connect, path, **request.param)
        with SQLiteRepository(path, prefix="taskx_", connect=connect) as repository:
            yield repository

    @pytest.mark.parametrize(
        "later",
        [
            lambda connection: None,
            lambda connection: connection.execute("INSERT INTO rows VALUES (2)"),
            lambda connection: connection.execute(
                "WITH one AS (SELECT 2) INSERT INTO rows SELECT * FROM one"
            ),
            lambda connection: connection.execute("ALTER TABLE rows ADD COLUMN more"),
            lambda connection: connection.execute("SAVEPOINT one"),
        ],
        ids=["nothing", "change", "hidden change", "table", "savepoint"],
    )
    @pytest.mark.parametrize("completes", [True, False])
    def test_nothing_is_stored(self, run, path, rows, made, later, completes):
        def work(ctx):
            with ctx.transaction() as tx:
                tx.connection.execute("SAVEPOINT one")
                tx.connection.execute(
                    "INSERT INTO rows VALUES (2)"
                )  # the driver keeps the statement
                tx.connection.execute("RELEASE one")
                with pytest.raises(sqlite3.IntegrityError):
                    tx.connection.execute("INSERT OR ROLLBACK INTO rows (rowid, n) VALUES (1, 1)")
                with suppress(sqlite3.Error):
                    later(tx.connection)
                ctx.cursor = 1
                if completes:
                    tx.complete()

        task = run(work, Queue(made, Config(worker_num=1)))
        assert (task.status, task.checkpoints) == (TaskStatus.FAILED, None)
        assert task.error_type == "taskx.tasks.errors.RepositoryError"
        assert rows() == []
        with closing(sqlite3.connect(path)) as connection:
            assert len(connection.execute("PRAGMA table_info (rows)").fetchall()) == 1

    def test_the_error_says_so_also_to_a_submit_of_the_block(self, make_queue, run):
        queue = make_queue(worker_num=1)
        queue.declare("other")
        said = []

        def work(ctx):
            with ctx.transaction() as tx:
                add(tx, 1)
                with suppress(sqlite3.IntegrityError):
                    tx.connection.execute("INSERT OR ROLLBACK INTO rows (rowid, n) VALUES (1, 1)")
                try:
                    queue.submit("other", connection=tx.connection)
                except RepositoryError as error:
                    said.append(str(error))
                tx.complete()

        said.append(run(work, queue).error)
        assert len(said) == 2
        assert all(
            "SQLite itself has rolled back the transaction of this block" in one for one in said
        )
        assert queue.list_tasks(type="other").total == 0


class TestTwoQueues:
    """Two queues have their tables in one file."""

    def test_a_task_of_the_other_queue_is_stored_with_the_completion(self, run, path, rows):
        with SQLiteRepository(path, prefix="other_") as repository:
            other = Queue(repository, Config(worker_num=1))
            other.executor("child")(lambda n: n)

            def work(ctx):
                with ctx.transaction() as tx:
                    add(tx, ctx.task.attempt)
                    other.submit("child", {"n": ctx.task.attempt}, connection=tx.connection)
                    if ctx.task.attempt == 1:
                        raise OSError
                    tx.complete()

            with other:
                assert run(work, max_attempts=2).status is TaskStatus.COMPLETED
                assert other.drain(LONG)
            assert [task.result for task in other.iter_tasks()] == [2]
        assert rows() == [2]


class TestConnect:
    """The application may open the connections itself."""

    def on(self, path, connect):
        return SQLiteRepository(path, prefix="taskx_", connect=connect)

    def test_its_settings_hold_in_the_transaction(self, run, path):
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("CREATE TABLE parents (n INTEGER PRIMARY KEY)")
            connection.execute("CREATE TABLE children (n INTEGER REFERENCES parents)")

        def connect():
            opened.append(sqlite3.connect(path, timeout=LONG))
            opened[-1].execute("PRAGMA foreign_keys = ON")
            opened[-1].row_factory = sqlite3.Row
            return opened[-1]

        def work(ctx):
            with pytest.raises(sqlite3.IntegrityError), ctx.transaction() as tx:
                tx.connection.execute("INSERT INTO children VALUES (1)")
            with ctx.transaction() as tx:
                tx.connection.execute("INSERT INTO parents VALUES (1)")
                tx.connection.execute("INSERT INTO children VALUES (1)")
                row = tx.connection.execute("SELECT n FROM children").fetchone()
                tx.complete(row["n"])

        opened = []
        with self.on(path, connect) as repository:
            assert run(work, Queue(repository, Config(worker_num=1))).result == 1
        assert len(opened) == 2
        for connection in opened:
            with pytest.raises(sqlite3.ProgrammingError):
                connection.execute("SELECT 1")

    @pytest.mark.parametrize(("durability", "level"), [("accepted", 2), ("process", 1)])
    def test_its_commits_are_synced_as_the_repository_says(self, run, path, durability, level):
        def connect():
            connection = sqlite3.connect(path, timeout=LONG)
            connection.execute("PRAGMA synchronous = OFF")
            return connection

        def work(ctx):
            with ctx.transaction() as tx:
                tx.complete(tx.connection.execute("PRAGMA synchronous").fetchone()[0])

        with SQLiteRepository(path, durability, prefix="taskx_", connect=connect) as repository:
            assert run(work, Queue(repository, Config(worker_num=1))).result == level

    @pytest.mark.parametrize(
        ("connect", "problem"),
        [
            (lambda path: 5, "must return an sqlite3.Connection"),
            (lambda path: sqlite3.connect(":memory:"), "a database in memory"),
            (lambda path: begun(path), "in no transaction"),
        ],
    )
    def test_a_wrong_connection_is_refused(self, run, path, connect, problem):
        def work(ctx):
            with pytest.raises(ConfigurationError) as caught, ctx.transaction():
                pytest.fail("it must not begin")
            return str(caught.value)

        with self.on(path, lambda: connect(path)) as repository:
            assert problem in run(work, Queue(repository, Config(worker_num=1))).result

    @pytest.mark.parametrize("options", [{"prefix": "a_", "connect": 5}, {"connect": print}])
    def test_a_wrong_argument_is_refused(self, path, options):
        with pytest.raises(ConfigurationError, match="connect must be a function"):
            SQLiteRepository(path, **options)


def begun(path):
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute("BEGIN")
    return connection


class TestRefused:
    def refused(self, run, queue=None, **options):
        def work(ctx):
            with pytest.raises(ConfigurationError) as caught, ctx.transaction():
                pytest.fail("it must not begin")
            return str(caught.value)

        return run(work, queue, **options).result

    def test_in_a_file_of_taskx(self, run, tmp_path):
        with SQLiteRepository(tmp_path / "tasks.db") as repository:
            said = self.refused(run, Queue(repository, Config(worker_num=1)))
        assert "TaskX's own file" in said

    def test_in_memory(self, run):
        assert "shares no database" in self.refused(run, Queue(MemoryRepository()))

    def test_inside_another_transaction(self, run):
        def work(ctx):
            with ctx.transaction() as tx:
                with (
                    pytest.raises(ConfigurationError, match=r"inside ctx\.transaction"),
                    ctx.transaction(),
                ):
                    pytest.fail("it must not begin")
                tx.complete("outer")
            with (
                pytest.raises(ConfigurationError, match="has completed its task"),
                ctx.transaction(),
            ):
                pytest.fail("it must not begin")

        assert run(work).result == "outer"

    def test_inside_a_transaction_of_the_thread(self, make_queue, run, path):
        queue = make_queue(worker_num=1)
        queue.declare("other")

        def work(ctx):
            with closing(sqlite3.connect(path, timeout=LONG)) as own:
                queue.submit("other", connection=own)
                with (
                    pytest.raises(ConfigurationError, match="it would wait for itself"),
                    ctx.transaction(),
                ):
                    pytest.fail("it must not begin")
                own.rollback()
            return "refused"

        assert run(work, queue).result == "refused"


def in_a_child(ctx):
    try:
        with ctx.transaction():
            return "begun"
    except ConfigurationError as error:
        return str(error)


@pytest.mark.process
def test_a_child_process_has_no_transaction(run):
    assert "isolation='process'" in run(in_a_child, isolation="process").result


# Each child dies at its own statement of the transaction, or right after its commit.
KILLED = """
import os, signal, sqlite3, sys
from taskx import Config, Queue, SQLiteRepository

path, completes = sys.argv[1], sys.argv[2] == "True"

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def child(fatal):
    left = [fatal]

    def count(statement):
        left[0] -= 1
        if not left[0]:
            die()

    queue = Queue(SQLiteRepository(path, prefix="taskx_"), Config(worker_num=1))

    @queue.executor("t", max_crashes=100)
    def work(ctx):
        for n in range(ctx.cursor or 0, 3):
            with ctx.transaction() as tx:
                tx.connection.set_trace_callback(count)
                tx.connection.execute("INSERT INTO rows VALUES (?)", (n,))
                ctx.cursor = n + 1
                if completes and n == 2:
                    tx.complete("done")
        if not fatal:
            die()
        return None if completes else "done"

    with queue:
        if fatal == 1:
            queue.submit("t", id="t")
        queue.handle("t").result(timeout=60)

for fatal in [*range(1, 1000)]:
    pid = os.fork()
    if not pid:
        try:
            child(fatal)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    if not os.WIFSIGNALED(status):
        print(fatal, status, flush=True)
        break
"""


@pytest.mark.parametrize("completes", [True, False])
def test_a_process_that_dies_at_any_statement_has_written_each_row_once(
    spawn, path, repository, rows, completes
):
    child = spawn(KILLED, path, completes)
    killed, status = map(int, child.read().split())
    assert status == 0
    assert killed > 5
    assert rows() == [0, 1, 2]
    task = repository.get_by_id("t")
    assert (task.status, task.result) == (TaskStatus.COMPLETED, "done")
    assert task.crashes == killed - 1


# The log cannot grow at the first COMMIT, as on a full disk.
FULL = """
import os, resource, sqlite3, sys
from taskx import Config, Queue, RepositoryError, SQLiteRepository

path = sys.argv[1]
queue = Queue(SQLiteRepository(path, prefix="taskx_"), Config(worker_num=1))

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

@queue.executor("t", max_attempts=3)
def work(ctx):
    try:
        with ctx.transaction() as tx:
            tx.connection.execute("INSERT INTO rows VALUES (?)", (ctx.task.attempt,))
            tx.complete("done")
            if ctx.task.attempt == 1:
                limit(os.path.getsize(path + "-wal"))
    except RepositoryError as error:
        print("raised", type(error).__name__, flush=True)
        raise
    finally:
        limit(resource.RLIM_INFINITY)

with queue:
    print(queue.submit("t").result(timeout=60), flush=True)
"""


@pytest.mark.process
def test_a_disk_that_is_full_at_the_commit_rolls_back(spawn, path, repository, rows):
    repository.close()
    child = spawn(FULL, path)
    assert child.read() == "raised RepositoryUnavailable"
    assert child.read() == "done"
    assert rows() == [2]
