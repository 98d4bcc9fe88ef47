"""Submits and cancels inside a transaction of the application."""

from __future__ import annotations

import gc
import os
import sqlite3
import threading
import warnings
from contextlib import closing, contextmanager
from functools import partial

import pytest
import sqlalchemy as sa
from helpers import eventually, run_in_thread
from sqlalchemy.orm import Session
from units import CallersTransactions

from taskx import (
    ConfigurationError,
    DuplicateTask,
    MemoryRepository,
    Middleware,
    Queue,
    QueueStopped,
    RepositoryError,
    RepositoryUnavailable,
    SQLiteRepository,
    Task,
    TaskFilter,
    TaskNotFound,
    TaskStatus,
    chain,
)
from taskx.stores.sqlite import joining

LONG = 60


@pytest.fixture
def path(tmp_path):
    with closing(sqlite3.connect(tmp_path / "app.db")) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE orders (id INTEGER PRIMARY KEY, text TEXT)")
    return tmp_path / "app.db"


@pytest.fixture
def repository(path):
    with SQLiteRepository(path, prefix="taskx_", busy_timeout=20) as made:
        made.count(TaskFilter())
        yield made


@pytest.fixture
def queue(make_queue):
    made = make_queue(worker_num=2)
    made.executor("echo")(lambda n=0: n)
    made.declare("elsewhere")
    return made


@pytest.fixture
def connection(path):
    with closing(sqlite3.connect(path, timeout=20)) as made:
        yield made


def count(queue, **condition):
    return int(queue.count_tasks(**condition))


def order(connection, text="book"):
    connection.execute("INSERT INTO orders (text) VALUES (?)", (text,))


def collect():
    """Collect what nobody refers to. A warning of an open connection would keep it alive."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def refuse(value):
    raise AssertionError(f"{value!r} was converted")


PRAGMAS = [
    "count_changes",
    "reverse_unordered_selects",
    "case_sensitive_like",
    "recursive_triggers",
]
PRAGMAS += ["foreign_keys", "full_column_names", "empty_result_callbacks"]
DETECT = {
    "declared types": sqlite3.PARSE_DECLTYPES,
    "names of columns": sqlite3.PARSE_COLNAMES,
    "both": sqlite3.PARSE_DECLTYPES | sqlite3.PARSE_COLNAMES,
}


class TestSettingsOfTheConnection:
    @pytest.fixture(autouse=True)
    def converters(self, monkeypatch):
        """Converters of the application for all types that our columns have."""
        for kind in ("TEXT", "INTEGER", "REAL"):
            monkeypatch.setitem(sqlite3.converters, kind, refuse)

    def all_calls(self, queue, connection):
        """Make each call over the connection, and check what it returns, stores and raises."""
        queue.submit("echo", id="waiting", unique_key="old", concurrency_key="turn", tags=["old"])
        submit = partial(queue.submit, connection=connection)
        submit("echo", {"n": 1}, id="plain")
        options = {"tags": ["a", "b"], "concurrency_key": "turn", "timeout": 4.5, "priority": 3}
        submit("echo", {"n": 2}, id="child", depends_on=["plain", "waiting"], **options)
        for taken in ({"id": "plain"}, {"unique_key": "old"}):
            with pytest.raises(DuplicateTask):
                submit("echo", **taken)
        replaced = {"unique_key": "old", "on_conflict": "replace", "tags": ["new"]}
        assert submit("echo", {"n": 3}, concurrency_key="turn", **replaced).id == "waiting"
        assert submit("echo", unique_key="old", on_conflict="return").id == "waiting"
        many = [Task(id=i, type="echo", depends_on=["plain"], tags=["many"]) for i in "xyz"]
        assert [handle.id for handle in queue.submit_many(many, connection=connection)] == [*"xyz"]
        with pytest.raises(DuplicateTask):
            queue.submit_many([Task(id="new", type="echo"), many[0]], connection=connection)
        queue.submit_flow(chain(Task(type="echo"), Task(type="echo")), connection=connection)
        with pytest.raises(TaskNotFound):
            submit("echo", depends_on=["gone"])
        assert queue.cancel_task("z", connection=connection)
        with pytest.raises(TaskNotFound):
            queue.cancel_task("gone", connection=connection)
        assert not queue.handle("plain").done()
        connection.commit()
        assert count(queue) == 8
        assert {task.id: task.params for task in queue.list_tasks(tag="new")[0]} == {
            "waiting": {"n": 3}
        }
        child = queue.get_task_status("child")
        assert (child.depends_on, child.tags) == (["plain", "waiting"], ("a", "b"))
        assert (child.timeout, child.priority, child.concurrency_key) == (4.5, 3, "turn")
        assert queue.get_task_status("z").status is TaskStatus.CANCELLED
        assert (count(queue, tag="many"), count(queue, tag="old")) == (3, 0)

    @pytest.mark.parametrize("detect", DETECT.values(), ids=DETECT)
    def test_converters_change_nothing(self, queue, path, detect):
        with closing(sqlite3.connect(path, detect_types=detect)) as connection:
            self.all_calls(queue, connection)

    @pytest.mark.parametrize("name", PRAGMAS)
    def test_pragmas_change_nothing_and_stay(self, queue, connection, name):
        connection.execute(f"PRAGMA {name} = 1")
        before = connection.execute(f"PRAGMA {name}").fetchall()
        self.all_calls(queue, connection)
        assert connection.execute(f"PRAGMA {name}").fetchall() == before

    def test_a_select_of_the_application_goes_on(self, queue, connection):
        connection.execute("PRAGMA count_changes = 1")
        connection.execute("PRAGMA count_changes").fetchall()
        for text in "abc":
            connection.execute("INSERT INTO orders (text) VALUES (?)", (text,)).fetchall()
        rows = connection.execute("SELECT text FROM orders")
        assert next(rows) == ("a",)
        queue.submit("echo", connection=connection)
        assert [*rows] == [("b",), ("c",)]
        connection.commit()
        assert count(queue) == 1


class TestContract(CallersTransactions):
    @pytest.fixture
    def begin(self, connection):
        @contextmanager
        def begin(undo=False):
            yield {"connection": connection}
            connection.rollback() if undo else connection.commit()

        return begin

    @pytest.fixture
    def add(self):
        return lambda within: order(**within)

    @pytest.fixture
    def rows(self, connection):
        return lambda: connection.execute("SELECT count(*) FROM orders").fetchone()[0]


class TestSubmit:
    def test_taskx_begins_a_transaction_if_none_is_open(self, queue, connection):
        queue.submit("echo", connection=connection)
        assert connection.in_transaction
        assert count(queue) == 0
        connection.commit()
        assert count(queue) == 1

    def test_a_connection_in_autocommit_mode_must_begin(self, queue, path):
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            with pytest.raises(ConfigurationError, match="BEGIN IMMEDIATE first"):
                queue.submit("echo", connection=connection)
            connection.execute("BEGIN IMMEDIATE")
            queue.submit("echo", connection=connection)
            connection.execute("COMMIT")
        assert count(queue) == 1

    def test_a_failed_call_ends_the_transaction_that_it_began(self, queue, connection):
        queue.submit("echo", id="a")
        with pytest.raises(DuplicateTask):
            queue.submit("echo", id="a", connection=connection)
        assert not connection.in_transaction
        queue.submit("echo")

    def test_an_error_of_middleware_is_raised_as_it_is(self, make_queue, connection):
        class Failing(Middleware):
            def submit(self, tasks, store):
                store(tasks)
                raise OverflowError("mine")

        queue = make_queue(middleware=[Failing()])
        queue.declare("t")
        with pytest.raises(OverflowError, match="mine"):
            queue.submit("t", connection=connection)
        assert not connection.in_transaction
        assert count(queue) == 0

    def test_a_savepoint_of_the_caller_takes_its_tasks_back(self, queue, connection):
        queue.submit("echo", id="kept", connection=connection)
        connection.execute("SAVEPOINT mine")
        queue.submit("echo", id="gone", connection=connection)
        connection.execute("ROLLBACK TO mine")
        connection.commit()
        assert [task.id for task in queue.list_tasks()[0]] == ["kept"]

    def test_on_a_full_disk_the_error_says_that_sqlite_has_rolled_back_everything(
        self, queue, connection
    ):
        order(connection)
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages + 3}")
        with pytest.raises(RepositoryUnavailable, match="has rolled back the whole transaction"):
            queue.submit("elsewhere", {"text": "x" * 100_000}, connection=connection)
        assert not connection.in_transaction
        assert connection.execute("SELECT count(*) FROM orders").fetchone() == (0,)

    def test_a_stopped_queue_refuses(self, queue, connection):
        with queue:
            pass
        with pytest.raises(QueueStopped):
            queue.submit("echo", connection=connection)
        assert not connection.in_transaction

    def test_an_executor_submits_while_its_queue_stops(self, queue, path, gate):
        @queue.executor()
        def hold():
            gate()
            with closing(sqlite3.connect(path, timeout=LONG)) as connection:
                queue.submit("elsewhere", id="next", connection=connection)
                connection.commit()

        queue.start()
        handle = queue.submit("hold")
        gate.wait_for(1)
        stop = run_in_thread(lambda: queue.stop(LONG))
        eventually(lambda: queue.stopped)
        gate.open()
        assert stop() == []
        assert handle.task().status is TaskStatus.COMPLETED
        assert queue.get_task_status("next").status is TaskStatus.PENDING

    def test_the_rows_and_texts_of_the_connection_may_have_any_form(self, queue, connection):
        connection.row_factory = lambda cursor, row: {"row": row}
        connection.text_factory = bytes
        parent = queue.submit("echo", unique_key="k", connection=connection)
        queue.submit("echo", depends_on=[parent], connection=connection)
        same = queue.submit("echo", unique_key="k", on_conflict="return", connection=connection)
        assert same.id == parent.id
        assert connection.execute("SELECT 'a'").fetchone() == {"row": (b"a",)}
        connection.commit()


class TestCancel:
    def test_an_unknown_task_is_an_error(self, queue, connection):
        with pytest.raises(TaskNotFound):
            queue.cancel_task("none", connection=connection)
        assert not connection.in_transaction


class TestWrongConnections:
    def test_of_another_file(self, queue, tmp_path):
        with closing(sqlite3.connect(tmp_path / "other.db")) as other:
            with pytest.raises(ConfigurationError, match=r"other\.db, but the tasks are in"):
                queue.submit("echo", connection=other)
            assert not other.in_transaction

    def test_in_memory(self, queue):
        with (
            closing(sqlite3.connect(":memory:")) as other,
            pytest.raises(ConfigurationError, match="a database in memory"),
        ):
            queue.submit("echo", connection=other)

    def test_closed(self, queue, connection):
        connection.close()
        with pytest.raises(ConfigurationError, match="closed database"):
            queue.submit("echo", connection=connection)

    def test_of_another_thread(self, queue, connection):
        raised = []

        def submit():
            try:
                queue.submit("echo", connection=connection)
            except ConfigurationError as error:
                raised.append(str(error))

        thread = threading.Thread(target=submit)
        thread.start()
        thread.join()
        assert "same thread" in raised[0]
        assert count(queue) == 0

    @pytest.mark.parametrize("thing", [5, "app.db", object()])
    def test_something_else(self, queue, thing):
        with pytest.raises(ConfigurationError, match=r"must be an sqlite3\.Connection"):
            queue.submit("echo", connection=thing)

    def test_of_a_store_that_shares_no_database(self, connection):
        queue = Queue(MemoryRepository())
        queue.declare("t")
        with pytest.raises(ConfigurationError, match="MemoryRepository cannot take part in") as e:
            queue.submit("t", connection=connection)
        assert "in a transaction of a Connection: use" in str(e.value)
        assert str(e.value).endswith("; in a test, use taskx.testing.inline(queue)")

    def test_a_read_only_transaction_of_the_past_is_refused(self, queue, path):
        with closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as old:
            old.execute("BEGIN")
            old.execute("SELECT count(*) FROM orders").fetchall()
            queue.submit("echo")
            with pytest.raises(RepositoryUnavailable, match="BEGIN IMMEDIATE"):
                queue.submit("echo", connection=old)
        assert count(queue) == 1

    def test_tables_are_not_made_in_a_transaction_of_the_caller(self, path, connection):
        with SQLiteRepository(path, prefix="new_") as repository:
            queue = Queue(repository)
            queue.declare("t")
            order(connection)
            with pytest.raises(RepositoryError, match="do not exist yet"):
                queue.submit("t", connection=connection)
            connection.commit()
            queue.submit("t", connection=connection)
            connection.commit()
            assert count(queue) == 1


class TestOwnTransaction:
    """A thread in a transaction of its own would wait for itself."""

    def test_ordinary_calls_raise_at_once(self, queue, connection):
        task = queue.submit("elsewhere")
        queue.submit("echo", connection=connection)
        for call in (
            lambda: queue.submit("echo"),
            lambda: queue.submit_many([Task(type="echo")]),
            lambda: queue.cancel_task(task.id),
            lambda: queue.delete(task.id),
        ):
            with pytest.raises(ConfigurationError, match="it would wait for itself"):
                call()
        connection.commit()
        queue.submit("echo")
        assert queue.cancel_task(task.id)

    def test_a_task_that_has_ended_needs_no_wait(self, queue, connection):
        with queue:
            ended = queue.submit("echo", {"n": 3})
            assert ended.result(timeout=LONG) == 3
            queue.submit("echo", connection=connection)
            assert queue.handle(ended.id).result() == 3
            connection.rollback()

    def test_the_handle_of_a_task_that_was_rolled_back_says_that_it_does_not_exist(
        self, queue, connection
    ):
        handle = queue.submit("echo", connection=connection)
        assert not handle.done()
        connection.rollback()
        with pytest.raises(TaskNotFound):
            handle.result()

    def test_a_later_transaction_of_the_connection_is_known(self, queue, connection):
        queue.submit("echo", connection=connection)
        connection.commit()
        order(connection)
        with pytest.raises(ConfigurationError, match="it would wait for itself"):
            queue.submit("echo")
        connection.close()
        queue.submit("echo")

    def test_a_connection_that_was_dropped_rolls_back(self, queue, path):
        """Its owner raised, for example. TaskX must not keep it open."""
        queue.submit("echo", connection=sqlite3.connect(path, timeout=20))
        queue.submit("echo", id="kept")
        assert [task.id for task in queue.list_tasks()[0]] == ["kept"]

    @pytest.mark.filterwarnings("ignore::ResourceWarning")  # a recorded warning would keep it
    def test_a_connection_dropped_by_another_thread_rolls_back(self, queue, path):
        def careless():
            queue.submit("echo", connection=sqlite3.connect(path, timeout=20))

        thread = threading.Thread(target=careless)
        thread.start()
        thread.join()
        queue.submit("echo", id="kept")
        assert [task.id for task in queue.list_tasks()[0]] == ["kept"]

    def test_other_threads_wait(self, queue, connection):
        queue.submit("echo", connection=connection)
        thread = threading.Thread(target=queue.submit, args=("echo",))
        thread.start()
        connection.commit()
        thread.join(LONG)
        assert count(queue) == 2

    def test_steps_and_cursors_raise_at_once(self, queue, path):
        @queue.executor("careless", max_attempts=1)
        def careless(ctx):
            with closing(sqlite3.connect(path, timeout=20)) as own:
                queue.submit("echo", connection=own)
                said = []
                for call in (lambda: ctx.step("one", int), lambda: setattr(ctx, "cursor", 1)):
                    try:
                        call()
                    except ConfigurationError as error:
                        said.append("wait for itself" in str(error))
                own.commit()
            return [*said, ctx.step("one", int), ctx.cursor]

        with queue:
            assert queue.submit("careless").result(timeout=LONG) == [True, True, 0, None]


class TestSQLAlchemy:
    @pytest.fixture
    def engine(self, path):
        made = sa.create_engine(f"sqlite:///{path}", connect_args={"timeout": 20})
        yield made
        made.dispose()

    def test_a_session_stores_data_and_task_together(self, queue, engine):
        with Session(engine) as session:
            session.execute(sa.text("INSERT INTO orders (text) VALUES ('a')"))
            queue.submit("echo", connection=session)
            session.rollback()
            assert count(queue) == 0
            queue.submit("echo", id="first", connection=session)
            session.execute(sa.text("INSERT INTO orders (text) VALUES ('b')"))
            session.commit()
            assert session.execute(sa.text("SELECT text FROM orders")).all() == [("b",)]
        assert [task.id for task in queue.list_tasks()[0]] == ["first"]

    def test_a_connection_commits_even_if_the_task_came_first(self, queue, engine):
        with engine.connect() as connection:
            queue.submit("echo", id="a", connection=connection)
            connection.commit()
            queue.submit("echo", id="b", connection=connection)
            connection.rollback()
        with engine.begin() as connection:
            queue.submit("echo", id="c", connection=connection)
        assert {task.id for task in queue.list_tasks()[0]} == {"a", "c"}

    def test_a_driver_connection_of_another_database_is_refused(self, queue):
        engine = sa.create_engine("sqlite://")
        with (
            engine.connect() as connection,
            pytest.raises(ConfigurationError, match="a database in memory"),
        ):
            queue.submit("echo", connection=connection)
        engine.dispose()

    def test_one_that_cannot_be_used_is_refused_with_its_reason(self, queue, engine):
        connection = engine.connect()
        connection.close()
        unbound = Session()
        for given, reason in (
            (connection, "This Connection is closed"),
            (unbound, "is not bound to"),
        ):
            with pytest.raises(ConfigurationError, match=reason) as caught:
                queue.submit("echo", connection=given)
            assert "nothing was stored" in str(caught.value)
        assert count(queue) == 0

    def test_a_database_that_cannot_be_opened_may_be_there_later(self, queue, tmp_path):
        engine = sa.create_engine(f"sqlite:///{tmp_path / 'absent' / 'file.db'}")
        with (
            Session(engine) as session,
            pytest.raises(RepositoryUnavailable, match="unable to open"),
        ):
            queue.submit("echo", connection=session)

    def test_an_asynchronous_one_is_refused(self, queue, engine):
        pytest.importorskip("greenlet")  # which SQLAlchemy needs for it
        from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession

        engine.dialect.is_async = True
        for given in (AsyncSession(), AsyncConnection(AsyncEngine(engine))):
            with pytest.raises(ConfigurationError, match=r"must be an sqlite3\.Connection"):
                queue.submit("echo", connection=given)


class TestWakeUps:
    @pytest.mark.timing(poll_every=10 * LONG, recover_every=10 * LONG, audit_every=10 * LONG)
    def test_a_commit_wakes_the_workers(self, queue, connection):
        """They do not wait for a poll: the next one would come when this test has failed long ago."""
        with queue:
            queue.submit("echo").result(timeout=LONG)
            for n in range(10):
                handle = queue.submit("echo", {"n": n}, connection=connection)
                connection.commit()
                assert handle.result(timeout=LONG) == n

    def test_the_watching_thread_ends_with_the_connections(self, queue, repository, path):
        connections = [sqlite3.connect(path, timeout=20) for _ in range(3)]
        for connection in connections:
            queue.submit("echo", connection=connection)
            connection.commit()
        thread = repository.transactions._thread
        del connection
        connections.pop().close()
        connections.clear()
        thread.join(LONG)
        collect()
        assert not thread.is_alive()

    def test_a_commit_is_noticed_while_the_next_transaction_is_open(
        self, queue, repository, connection, monkeypatch
    ):
        told = threading.Event()
        monkeypatch.setattr(repository._file_links, "tell_others", lambda writes: told.set())
        monkeypatch.setattr(joining, "in_transaction", lambda connection: True)
        order(connection)
        queue.submit("echo", connection=connection)
        connection.commit()
        assert told.wait(LONG)


@pytest.mark.slow
def test_twenty_threads_write_their_tables_while_four_workers_run(make_queue, path):
    """Each order has its task, and each task its order, whatever was rolled back."""
    queue, done = make_queue(worker_num=4), []
    queue.executor("ship")(lambda order: done.append(order))

    def sell(number):
        with closing(sqlite3.connect(path, timeout=60)) as connection:
            for n in range(10):
                connection.execute("BEGIN IMMEDIATE")
                row = connection.execute("INSERT INTO orders (text) VALUES ('x')").lastrowid
                queue.submit("ship", {"order": row}, connection=connection)
                if (number + n) % 3:
                    connection.commit()
                else:
                    connection.rollback()

    with queue:
        for result in [run_in_thread(partial(sell, number)) for number in range(20)]:
            result()
        assert queue.drain(timeout=2 * LONG)
    with closing(sqlite3.connect(path)) as connection:
        orders = {row for (row,) in connection.execute("SELECT id FROM orders")}
    shipped = {
        task.params["order"] for task in queue.iter_tasks(type="ship", status=TaskStatus.COMPLETED)
    }
    assert shipped == orders
    assert len(orders) > 100


def test_rows_that_become_visible_out_of_the_order_of_their_numbers_are_found(queue, path):
    """A rollback gives a number back; a later commit uses it again."""
    with queue, closing(sqlite3.connect(path, timeout=20)) as connection:
        for n in range(5):
            queue.submit("echo", {"n": n}, connection=connection)
            connection.rollback()
            queue.submit("echo", {"n": n})
        handle = queue.submit("echo", {"n": 9}, connection=connection)
        connection.commit()
        assert handle.result(timeout=LONG) == 9
        assert queue.drain(timeout=LONG)
        assert count(queue, status=TaskStatus.COMPLETED) == 6


# Each child dies at its own statement of the transaction; the last one comes to the end.
KILLED = """
import os, signal, sqlite3, sys
from taskx import Queue, SQLiteRepository, Task

path = sys.argv[1]

def sell(fatal):
    left = [fatal]

    def count(statement):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    queue = Queue(SQLiteRepository(path, prefix="taskx_"))
    queue.declare("ship")
    connection = sqlite3.connect(path, timeout=20)
    connection.set_trace_callback(count)
    row = connection.execute("INSERT INTO orders (text) VALUES ('x')").lastrowid
    tasks = [Task(type="ship", params={"order": row}, tags=["t"]) for _ in range(2)]
    queue.submit_many(tasks, connection=connection)
    queue.submit("ship", {"order": row}, connection=connection)
    connection.commit()
    connection.set_trace_callback(None)

for fatal in range(1, 1000):
    child = os.fork()
    if not child:
        try:
            sell(fatal)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status):
        print(fatal, status, flush=True)
        break
"""


def test_a_process_that_dies_at_any_statement_leaves_order_and_tasks_or_neither(
    spawn, path, repository, queue, connection
):
    child = spawn(KILLED, path)
    statements, status = map(int, child.read().split())
    assert status == 0
    assert statements > 10
    assert connection.execute("SELECT count(*) FROM orders").fetchone() == (1,)
    assert [task.params for task in queue.iter_tasks()] == [{"order": 1}] * 3


@pytest.mark.process
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_knows_no_transaction_of_its_parent_also_if_no_queue_was_there(
    repository, connection
):
    """Its queue, which it makes later, would wait for a lock and a thread of the parent."""
    transactions = repository.transactions
    connection.execute("BEGIN IMMEDIATE")
    with transactions.join(connection, lambda writes: None) as inside:
        inside.create(Task(id="a", type="ship"))
    assert transactions.units
    with transactions._lock:  # as its watching thread may hold it at any moment
        child = os.fork()
    if not child:
        free = transactions._lock.acquire(blocking=False)
        os._exit(0 if free and not transactions.units and transactions._thread is None else 1)
    assert os.waitpid(child, 0)[1] == 0
    connection.rollback()


FORKS = """
import os, sqlite3, sys, threading, time
from taskx import Queue, RepositoryUnavailable, SQLiteRepository

queue = Queue(SQLiteRepository(sys.argv[1], prefix="taskx_", busy_timeout=0.5))
queue.declare("elsewhere")
blocks, ended = threading.Event(), threading.Event()

def block():
    connection = sqlite3.connect(sys.argv[1])
    connection.execute("BEGIN IMMEDIATE")
    queue.submit("elsewhere", connection=connection)
    with queue.repository.transactions.blocking():  # as during a stop
        blocks.set()
        ended.wait()

threading.Thread(target=block, daemon=True).start()
blocks.wait()
if child := os.fork():
    os.waitpid(child, 0)
    ended.set()
else:
    began = time.monotonic()
    try:
        queue.submit("elsewhere")
    except RepositoryUnavailable:
        print(time.monotonic() - began, flush=True)
    os._exit(0)
"""


def test_a_forked_child_waits_for_a_lock_although_its_parent_made_others_hurry(
    spawn, path, repository
):
    assert float(spawn(FORKS, path).read()) >= 0.5


# It does not poll: the next poll would come when the test has failed long ago.
WORKER = """
import sys, threading
from taskx import Config, Queue, SQLiteRepository
from taskx.tasks.timing import Timing

timing = Timing(poll_every=3600.0, recover_every=3600.0, audit_every=3600.0)
queue = Queue(SQLiteRepository(sys.argv[1], prefix="taskx_"), Config(worker_num=1), timing=timing)
queue.executor("remote")(lambda: None)
queue.start()
while not queue._node._housekeeper._listening._listener:
    threading.Event().wait(0.001)
print("started", flush=True)
sys.stdin.readline()
queue.stop()
"""


def test_a_commit_wakes_the_workers_of_another_process(spawn, path, queue, connection):
    child = spawn(WORKER, path)
    assert child.read() == "started"
    queue.declare("remote")
    for _ in range(10):
        handle = queue.submit("remote", connection=connection)
        connection.commit()
        assert handle.result(timeout=LONG) is None
