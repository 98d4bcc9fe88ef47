"""The transactions of callers, on connections of psycopg and SQLAlchemy, and those of executors."""

from __future__ import annotations

from contextlib import contextmanager

import psycopg
import pytest
import sqlalchemy as sa
from helpers import eventually, run_once
from sqlalchemy.orm import Session
from units import LONG, CallersTransactions, ExecutorsTransactions

from taskx import (
    ConfigurationError,
    PostgresRepository,
    RepositoryUnavailable,
    SchemaMismatch,
    TaskStatus,
)
from taskx.stores.postgres.link import Link

pytestmark = pytest.mark.postgres


@pytest.fixture
def queue(repository, make_queue):
    made = make_queue(repository, worker_num=2)
    made.executor("echo")(lambda n=0: n)
    made.declare("elsewhere")
    return made


def count(queue):
    return int(queue.count_tasks())


@pytest.fixture(params=["taskx", "django"])
def pool(request, repository, tmp_path):
    """The connections of a repository, by psycopg and by Django."""
    if request.param == "taskx":
        yield repository._server
        return
    import django_project

    with django_project.on_postgres(tmp_path) as site:
        yield site._django_pool


SINGLES = [(durable, single) for durable in (True, False) for single in (True, False)]


@pytest.mark.parametrize("before", SINGLES)
@pytest.mark.parametrize("after", SINGLES)
def test_a_commit_waits_for_the_disk_whatever_the_one_before_did(pool, before, after):
    def waits(durable, single):
        [[value]] = pool.transaction(
            lambda link: link.rows("SHOW synchronous_commit"), durable, single=single
        )
        return value == "on"

    assert (waits(*before), waits(*after)) == (before[0], after[0])


class TestCallers(CallersTransactions):
    @pytest.fixture
    def begin(self, connection):
        @contextmanager
        def begin(undo=False):
            with connection.transaction(force_rollback=undo):
                yield {"connection": connection}

        return begin

    @pytest.fixture
    def add(self):
        return lambda within: within["connection"].execute("INSERT INTO numbers VALUES (1)")

    @pytest.fixture
    def rows(self, rows):
        return lambda: len(rows())


class TestExecutors(ExecutorsTransactions):
    @pytest.fixture
    def run(self, make_queue, repository, connection):
        queue = make_queue(repository, worker_num=1)
        return lambda function, **options: run_once(queue, function, **options)

    @pytest.fixture
    def add(self):
        return lambda tx, n: tx.connection.execute("INSERT INTO numbers VALUES (%s)", (n,))

    def test_an_executor_cannot_commit_itself(self, run, add, rows):
        refused = []

        def work(ctx):
            with ctx.transaction() as tx:
                add(tx, 1)
                for end in (tx.connection.commit, tx.connection.rollback):
                    with pytest.raises(psycopg.ProgrammingError):
                        refused.append(end())

        assert run(work).status is TaskStatus.COMPLETED
        assert (refused, rows()) == ([], [1])

    def test_a_commit_whose_answer_is_lost_is_read_back(self, run, add, rows, monkeypatch):
        """The transaction took place, so the executor is not called again."""
        ended = psycopg.Transaction.__exit__
        calls = []

        def lose(transaction, *info):
            ended(transaction, *info)
            if transaction.connection.info.application_name == "taskx" and info[0] is None:
                transaction.connection.close()
                raise psycopg.OperationalError("the answer was lost")

        def work(ctx):
            calls.append(1)
            with monkeypatch.context() as patch, ctx.transaction() as tx:
                patch.setattr(psycopg.Transaction, "__exit__", lose)
                add(tx, 1)
                tx.complete("done")

        task = run(work, max_attempts=3)
        assert (task.status, task.result) == (TaskStatus.COMPLETED, "done")
        assert (calls, rows()) == ([1], [1])


def test_a_session_of_sqlalchemy_stores_tasks_with_its_data(queue, connection, rows, url):
    engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    try:
        with queue:
            with Session(engine) as session:
                session.execute(sa.text("INSERT INTO numbers VALUES (1)"))
                queue.submit("echo", connection=session)
                session.rollback()
                session.execute(sa.text("INSERT INTO numbers VALUES (2)"))
                handle = queue.submit("echo", {"n": 2}, connection=session)
                session.commit()
            assert handle.result(timeout=LONG) == 2
            with engine.begin() as begun:
                last = queue.submit("echo", {"n": 3}, connection=begun)
            assert last.result(timeout=LONG) == 3
    finally:
        engine.dispose()
    assert (count(queue), rows()) == (2, [2])


def test_what_a_caller_undoes_at_a_savepoint_is_not_stored(queue, connection):
    """The transaction is committed, and tells of the other task only."""
    with queue:
        with connection.transaction():
            with connection.transaction(force_rollback=True):
                queue.submit("echo", id="gone", connection=connection)
            kept = queue.submit("echo", {"n": 1}, id="kept", connection=connection)
        assert kept.result(timeout=LONG) == 1
    eventually(lambda: not queue.repository.transactions.units)
    assert [task.id for task in queue.list_tasks()[0]] == ["kept"]


def test_a_connection_may_be_in_its_next_transaction(queue, connection):
    """The task of the one before has started: this thread may wait for it."""
    with queue:
        handle = queue.submit("echo", {"n": 1}, connection=connection)
        connection.commit()
        connection.execute("SELECT 1")
        assert handle.result(timeout=LONG) == 1


def test_rows_of_any_kind_and_own_numbers_change_nothing(queue, connection):
    from psycopg.rows import dict_row
    from psycopg.types.numeric import FloatDumper

    connection.row_factory = dict_row
    connection.adapters.register_dumper(int, FloatDumper)
    with connection.transaction():
        queue.submit("elsewhere", {"n": 1}, id="a", priority=7, connection=connection)
    assert queue.handle("a").task().priority == 7
    assert connection.execute("SELECT 1 AS one").fetchone() == {"one": 1}


class TestSameTables:
    """Connections to the tables of the tasks are accepted, however they reach them."""

    def test_a_first_call_makes_the_tables(self, server, make_queue, tmp_path):
        name = server.new_database()
        try:
            with (
                PostgresRepository(server.url(name), run_folder=tmp_path / "run") as new,
                psycopg.connect(server.url(name)) as first,
            ):
                queue = make_queue(new)
                queue.declare("echo")
                queue.submit("echo", connection=first)
                first.commit()
                assert count(queue) == 1
        finally:
            server.drop_database(name)

    def test_a_socket_leads_there_as_the_network_does(self, queue, server, url):
        name = queue.repository._server.connections._given["dbname"]
        socket = {"host": f"{server.folder}", "port": server.port, "user": "postgres"}
        with psycopg.connect(**socket, dbname=name, options="-c TimeZone=Asia/Tokyo") as other:
            queue.submit("elsewhere", connection=other)
        assert count(queue) == 1

    def test_tables_that_are_made_again_are_the_same(self, server, make_queue, tmp_path):
        """By this repository after it was closed, or by another program."""
        name = server.new_database()

        def prepare():
            with PostgresRepository(server.url(name)) as another:
                another.house.prepare()

        try:
            with (
                PostgresRepository(server.url(name), run_folder=tmp_path / "run") as made,
                psycopg.connect(server.url(name)) as other,
            ):
                queue = make_queue(made)
                queue.declare("echo")
                queue.submit("echo", connection=other)
                for make_again in (made.close, prepare):
                    other.execute("DROP TABLE taskx_task, taskx_note, taskx_parent, taskx_tag")
                    other.commit()
                    make_again()
                    queue.submit("echo", connection=other)
                    other.commit()
                    assert count(queue) == 1
        finally:
            server.drop_database(name)


class TestWrongConnections:
    def refused(self, queue, connection, reason):
        with pytest.raises(ConfigurationError, match=reason) as caught:
            queue.submit("echo", connection=connection)
        assert "nothing was stored" in str(caught.value)
        assert count(queue) == 0

    def test_in_autocommit_mode(self, queue, connection):
        connection.autocommit = True
        self.refused(queue, connection, "autocommit mode and in no transaction")

    def test_in_pipeline_mode(self, queue, connection):
        """A statement in it seems to have changed nothing, as if another task had the id."""
        with connection.pipeline():
            self.refused(queue, connection, "in pipeline mode")

    def test_after_an_error(self, queue, connection):
        with pytest.raises(psycopg.Error):
            connection.execute("SELECT nothing")
        self.refused(queue, connection, "an error has broken the transaction")

    def test_that_was_closed(self, queue, connection):
        connection.close()
        self.refused(queue, connection, "closed, or has broken")

    @pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
    def test_with_another_encoding(self, queue, connection, encoding):
        connection.execute(f"SET client_encoding TO {encoding}")
        self.refused(queue, connection, "connect with client_encoding=utf8")

    def test_to_another_database(self, queue, server):
        with server.connect() as other, other.transaction():
            self.refused(queue, other, "another server, database or search_path")

    @pytest.mark.parametrize("thing", [5, "postgresql://localhost/x"])
    def test_something_else(self, queue, thing):
        self.refused(queue, thing, r"must be a psycopg\.Connection")


def test_a_site_of_django_and_the_repository_share_the_tasks(server, tmp_path, make_queue):
    """Django has made the tables, and the repository only checks them."""
    import django_project

    alias = django_project.postgres_alias()
    site = django_project.on_postgres(tmp_path)
    from django.db import connections

    url = server.url(connections.settings[alias]["NAME"])
    with PostgresRepository(url, run_folder=tmp_path / "run") as own, site:
        worker = make_queue(own, worker_num=1)
        worker.executor("echo")(lambda n=0: n)
        client = make_queue(site)
        client.declare("echo")
        with worker:
            assert client.submit("echo", {"n": 5}).result(timeout=LONG) == 5
        assert any("Django" in str(check) for check in own.house.examine())
    with server.connect(connections.settings[alias]["NAME"]) as admin:
        admin.execute("ALTER TABLE taskx_task RENAME COLUMN cost TO spent")
        try:
            older = PostgresRepository(url)
            with older, pytest.raises(SchemaMismatch, match=r"no cost.*manage\.py migrate"):
                older.statuses(["a"])
        finally:
            admin.execute("ALTER TABLE taskx_task RENAME COLUMN spent TO cost")


def test_a_pooler_of_transactions_needs_no_session(url, repository, tmp_path, make_queue):
    """Nothing is prepared, listened for or set for longer than a transaction."""
    sent = []

    with PostgresRepository(url, listen=False, run_folder=tmp_path / "run") as pooled:
        execute = Link.execute
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Link, "execute", lambda *a: (sent.append(a[1]), execute(*a))[1])
            queue = make_queue(pooled, worker_num=2)
            queue.executor("echo")(lambda n=0: n)
            with queue:
                assert [queue.submit("echo", {"n": n}).result(LONG) for n in range(12)] == [
                    *range(12)
                ]
        writer = pooled._server.connections._writer
        assert writer.driver.prepare_threshold is None
    assert not [sql for sql in sent if sql.startswith(("SET ", "LISTEN"))]


def test_a_read_only_server_says_so(url, repository, server):
    name = repository._server.connections._given["dbname"]
    with server.connect() as admin:
        admin.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        try:
            with PostgresRepository(url) as replica:
                with pytest.raises(RepositoryUnavailable, match="takes no writes"):
                    replica.put_note("a", "text", 0)
                admin.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = off")
                assert replica.put_note("a", "text", 0)  # over a new connection
        finally:
            admin.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
