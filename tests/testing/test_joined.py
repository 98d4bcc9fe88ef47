"""A queue for tests and the transactions of its test: nothing is stored before the commit."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator

import pytest

from taskx import ConfigurationError, Queue, SQLiteRepository, TaskNotFound
from taskx.testing import InlineQueue, ManualQueue, inline


@pytest.fixture
def connection() -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE orders (book TEXT)")
    connection.commit()
    yield connection
    connection.close()


@pytest.fixture
def queue(connection) -> InlineQueue:
    queue = InlineQueue()

    @queue.executor("confirm")
    def confirm() -> int:
        ((count,),) = connection.execute("SELECT count(*) FROM orders").fetchall()
        return int(count)

    return queue


def order(connection: sqlite3.Connection, book: str = "Emma") -> None:
    connection.execute("INSERT INTO orders VALUES (?)", (book,))


def test_a_task_runs_after_the_commit(queue, connection):
    order(connection)
    task_id = queue.submit("confirm", connection=connection).id
    with pytest.raises(TaskNotFound):
        queue.get_task_status(task_id)
    connection.commit()
    assert queue.get_task_status(task_id).result == 1


def test_a_task_never_existed_after_a_rollback(queue, connection):
    handle = queue.submit("confirm", connection=connection)
    connection.rollback()
    assert queue.list_tasks().total == 0
    order(connection)
    connection.commit()
    assert queue.list_tasks().total == 0
    with pytest.raises(TaskNotFound):
        handle.result()


def test_a_result_is_there_after_the_commit_only(queue, connection):
    handle = queue.submit("confirm", connection=connection)
    with pytest.raises(ConfigurationError, match="commit"):
        handle.result()
    connection.commit()
    assert handle.result() == 0


def test_a_closed_connection_has_rolled_back_unless_it_has_committed(queue, tmp_path):
    for end, total in (("commit", 1), ("rollback", 1), ("close", 1)):
        file = sqlite3.connect(tmp_path / "shop.db")
        queue.submit("confirm", connection=file)
        getattr(file, end)()
        file.close()
        assert queue.list_tasks().total == total


def test_the_next_transaction_of_a_connection_is_another_one(queue, connection):
    order(connection)
    first = queue.submit("confirm", connection=connection)
    connection.commit()
    order(connection, "Lost")
    second = queue.submit("confirm", connection=connection)
    connection.rollback()
    assert [task.id for task in queue.list_tasks().tasks] == [first.id]
    assert second.id != first.id


def test_a_transaction_that_began_before_anybody_asked_is_another_one(queue, connection):
    handle = queue.submit("confirm", connection=connection)
    connection.commit()
    order(connection, "Lost")
    connection.rollback()
    assert handle.result() == 0


def test_a_task_goes_with_its_savepoint(queue, connection):
    order(connection)
    kept = queue.submit("confirm", connection=connection)
    connection.execute("SAVEPOINT try")
    queue.submit("confirm", connection=connection)
    connection.execute("ROLLBACK TO SAVEPOINT try")
    connection.execute("RELEASE SAVEPOINT try")
    connection.commit()
    assert [task.id for task in queue.list_tasks().tasks] == [kept.id]


def test_a_transaction_sees_its_own_tasks(queue, connection):
    queue.submit("confirm", connection=connection, unique_key="once")
    again = queue.submit("confirm", connection=connection, unique_key="once", on_conflict="return")
    connection.commit()
    assert [task.id for task in queue.list_tasks().tasks] == [again.id]


def test_an_error_of_a_submit_undoes_what_it_began(queue, connection):
    with pytest.raises(TaskNotFound):
        queue.submit("confirm", connection=connection, depends_on=["nobody"])
    assert not connection.in_transaction


def test_a_connection_that_commits_each_statement_is_refused(queue):
    automatic = sqlite3.connect(":memory:", isolation_level=None)
    with pytest.raises(ConfigurationError, match="BEGIN IMMEDIATE"):
        queue.submit("confirm", connection=automatic)
    automatic.close()


def test_a_submit_that_forgets_the_connection_is_refused_as_in_production(queue, connection):
    queue.submit("confirm", connection=connection)
    with pytest.raises(ConfigurationError, match="Pass connection="):
        queue.submit("confirm")
    connection.commit()
    assert queue.submit("confirm").result() == 0


def test_the_end_of_the_block_runs_what_was_committed(connection, tmp_path):
    ran: list[str] = []
    app = Queue(SQLiteRepository(tmp_path / "tasks.db"))
    app.executor("note")(lambda: ran.append("note"))
    with inline(app):
        app.submit("note", connection=connection)
        connection.commit()
    assert ran == ["note"]
    assert not (tmp_path / "tasks.db").exists()


def test_step_by_step_a_committed_task_waits_for_the_test(connection):
    queue, ran = ManualQueue(), []
    queue.executor("note")(lambda: ran.append("note"))
    queue.submit("note", connection=connection)
    assert queue.run_all() == []
    connection.commit()
    assert (queue.list_tasks().total, ran) == (1, [])
    assert len(queue.run_all()) == 1


def test_a_session_of_sqlalchemy_leads_to_its_connection(queue, tmp_path):
    orm = pytest.importorskip("sqlalchemy.orm")
    import sqlalchemy

    engine = sqlalchemy.create_engine(f"sqlite:///{tmp_path / 'shop.db'}")
    with orm.Session(engine) as session:
        handle = queue.submit("confirm", connection=session)
        session.commit()
        assert handle.result() == 0
        queue.submit("confirm", connection=session)
    assert queue.list_tasks().total == 1
    engine.dispose()
