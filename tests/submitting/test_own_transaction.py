"""A store that knows the open transaction of a thread: the methods of a queue take part in it."""

from __future__ import annotations

import sqlite3
import threading
from concurrent.futures import wait
from contextlib import closing

import pytest

from taskx import (
    ConfigurationError,
    MemoryRepository,
    SQLiteRepository,
    Task,
    TaskFilter,
    TaskNotFound,
    TaskStatus,
    chain,
)
from taskx.stores.sqlite.joining import FileTransactions

LONG = 60


class Knowing(FileTransactions):
    """Knows the connection that each thread uses, and the tasks that the tests name as uncommitted."""

    def __init__(self, repository):
        super().__init__(repository, repository._file_links, None)
        self.known = True
        self.used = threading.local()
        self.named = set()
        self.asked = []

    def current(self, *, submits=False):
        self.asked.append(submits)
        connection = getattr(self.used, "connection", None)
        return connection if connection is not None and connection.in_transaction else None

    def changed(self, task_id):
        return self.current() is not None and task_id in self.named

    def postpone(self, task_id, key, call):
        return self.changed(task_id)


@pytest.fixture
def repository(tmp_path):
    with closing(sqlite3.connect(tmp_path / "app.db")) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
    with SQLiteRepository(tmp_path / "app.db", prefix="taskx_", busy_timeout=20) as made:
        made.transactions = Knowing(made)
        made.count(TaskFilter())
        yield made


@pytest.fixture
def queue(make_queue):
    made = make_queue(worker_num=2)
    made.executor("echo")(lambda n=0: n)
    made.declare("elsewhere")
    return made


@pytest.fixture
def connection(repository, tmp_path):
    """The connection of this thread, in a transaction."""
    with closing(sqlite3.connect(tmp_path / "app.db", isolation_level=None)) as made:
        repository.transactions.used.connection = made
        yield made


def test_submits_take_part_in_it(queue, connection):
    connection.execute("BEGIN IMMEDIATE")
    queue.submit("elsewhere")
    queue.submit_many([Task(type="elsewhere"), Task(type="elsewhere")])
    queue.submit_flow(chain(Task(type="elsewhere"), Task(type="elsewhere")))
    assert queue.count_tasks() == 5
    connection.execute("ROLLBACK")
    assert queue.count_tasks() == 0


def test_only_submits_ask_for_the_transaction_of_another_database(queue, repository):
    handle = queue.submit("elsewhere")
    assert repository.transactions.asked == [True]
    handle.cancel()
    queue.count_tasks()
    assert not any(repository.transactions.asked[1:])


def test_changes_take_part_in_it(queue, connection):
    failed, kept, gone = (queue.submit("elsewhere").id for _ in range(3))
    queue.cancel_task(failed)
    connection.execute("BEGIN IMMEDIATE")
    queue.requeue(failed)
    assert queue.cancel_task(kept)
    queue.delete(gone)
    assert queue.requeue_many([kept]) == 1
    assert queue.cancel_many([kept]) == 1
    assert queue.requeue_all(status="cancelled").changed == 1
    assert queue.cancel_all(type="elsewhere").changed == 2
    assert queue.delete_all(everything=True).changed == 2
    connection.execute("ROLLBACK")
    states = {task.id: task.status for task in queue.iter_tasks()}
    pending = TaskStatus.PENDING
    assert states == {failed: TaskStatus.CANCELLED, kept: pending, gone: pending}


def test_reads_see_what_the_thread_has_written(queue, connection):
    connection.execute("BEGIN IMMEDIATE")
    handle = queue.submit("elsewhere")
    assert handle.task().status is TaskStatus.PENDING
    assert [task.id for task in queue.list_tasks()[0]] == [handle.id]
    found = []

    def read():
        with pytest.raises(TaskNotFound):
            queue.get_task_status(handle.id)
        found.append(int(queue.count_tasks()))

    thread = threading.Thread(target=read)
    thread.start()
    thread.join(LONG)
    assert found == [0]
    connection.execute("COMMIT")
    assert queue.count_tasks() == 1


def test_the_tasks_start_after_the_commit(queue, connection):
    with queue:
        connection.execute("BEGIN IMMEDIATE")
        handle = queue.submit("echo", {"n": 3})
        connection.execute("COMMIT")
        assert handle.result(timeout=LONG) == 3


def test_a_wait_that_cannot_end_raises_at_once(queue, repository, connection):
    with queue:
        connection.execute("BEGIN IMMEDIATE")
        handle = queue.submit("echo", {"n": 3})
        repository.transactions.named.add(handle.id)
        assert not handle.done()
        for call in (handle.result, handle.exception, handle.follow, lambda: wait([handle])):
            with pytest.raises(ConfigurationError, match="wait for it after that"):
                call()
        connection.execute("COMMIT")
        assert handle.result(timeout=LONG) == 3


def test_a_cancel_that_is_rolled_back_leaves_the_handle_open(queue, repository, connection):
    handle = queue.submit("echo", {"n": 3})
    connection.execute("BEGIN IMMEDIATE")
    repository.transactions.named.add(handle.id)
    assert handle.cancel()
    assert not handle.cancelled()
    connection.execute("ROLLBACK")
    with queue:
        assert handle.result(timeout=LONG) == 3


def test_other_stores_know_no_such_transaction():
    transactions = MemoryRepository().transactions
    assert not transactions.known
    assert transactions.current() is None
    assert transactions.current(submits=True) is None
    assert not transactions.changed("any")
