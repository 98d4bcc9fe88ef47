"""Exceptions of signal handlers at each point of a transaction: no hang, nothing half, nothing twice."""

from __future__ import annotations

import functools
import itertools
import sqlite3
from collections import Counter
from contextlib import closing

import pytest
from helpers import PATIENCE, Waiting, eventually, parts_of, run_in_thread
from strikes import strike_at

from taskx import Hook, RepositoryError, SQLiteRepository, TaskFilter, TaskStatus
from taskx.stores import queries

pytestmark = [
    pytest.mark.slow,
    # An exception between the return of connect() and the assignment drops the connection, which closes it.
    pytest.mark.filterwarnings("ignore:unclosed database in <sqlite3.Connection:ResourceWarning"),
]


@pytest.fixture
def path(tmp_path):
    with closing(sqlite3.connect(tmp_path / "app.db")) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE rows (n INTEGER, attempt INTEGER)")
        connection.commit()
    return tmp_path / "app.db"


@pytest.fixture
def repository(path):
    with SQLiteRepository(path, prefix="taskx_", durability="process") as made:
        made.count(TaskFilter())
        yield made


@pytest.fixture
def rows(path):
    def rows():
        with closing(sqlite3.connect(path)) as connection:
            return connection.execute("SELECT n, attempt FROM rows ORDER BY n").fetchall()

    return rows


def add(tx, n, attempt=0):
    tx.connection.execute("INSERT INTO rows VALUES (?, ?)", (n, attempt))


def struck_at(point, call):
    """Strike a call. An exception in a callback of SQLite is lost, and the statement fails."""

    def guarded():
        try:
            call()
        except (sqlite3.Error, RepositoryError) as error:
            if not any(words in str(error) for words in ("not authorized", "is prohibited")):
                raise

    return strike_at(point, guarded)


def test_a_loop_that_catches_the_exceptions_writes_each_row_once(make_queue, rows):
    """The cursor in memory says if the block was committed, also if the exception came after COMMIT."""
    queue = make_queue(worker_num=1)

    @queue.executor("t")
    def work(ctx):
        def block(n):
            with ctx.transaction() as tx:
                add(tx, n)
                ctx.cursor = n + 1

        for n in itertools.count():
            struck = struck_at(3 * n, lambda: block(n))  # noqa: B023  (called at once)
            if ctx.cursor != n + 1:
                block(n)
            if struck is None:
                break
        return n

    with queue:
        last = queue.submit("t").result(timeout=4 * PATIENCE)
    assert last > 100
    assert Counter(n for n, _ in rows()) == Counter(range(last + 1))


def test_a_completion_takes_place_once(make_queue, rows):
    """If the run does not know that it has completed its task, it was rolled back."""
    queue = make_queue(worker_num=1)
    again = []

    @queue.executor("t")
    def work(ctx, point):
        def block():
            with ctx.transaction() as tx:
                add(tx, point)
                tx.complete(point)

        struck.append(struck_at(point, block))
        if not ctx._completed:
            again.append(point)
            block()  # it would raise TaskCancelled if the first one was committed
            repeated.append(point)

    struck, repeated = [], []
    with queue:
        for point in itertools.count(0, 3):
            assert queue.submit("t", {"point": point}).result(timeout=PATIENCE) == point
            if struck[-1] is None:
                break
    assert Counter(n for n, _ in rows()) == Counter(range(0, point + 1, 3))
    assert again == repeated
    assert 50 < len(again) < point / 3


def test_an_interrupted_submit_in_a_transaction_of_the_caller_is_whole_or_undone(
    make_queue, repository, path, rows
):
    queue = make_queue()
    queue.declare("t")
    parent = queue.submit("t")
    with closing(sqlite3.connect(path, timeout=PATIENCE)) as connection:
        for point in itertools.count(0, 3):
            connection.execute("INSERT INTO rows VALUES (?, 0)", (point,))
            submit = functools.partial(
                queue.submit,
                *("t", {}),
                id=f"x{point}",
                tags=["a", "b"],
                depends_on=[parent],
                connection=connection,
            )
            struck = struck_at(point, submit)
            connection.commit()
            if struck is None:
                break
    assert point > 300
    assert Counter(n for n, _ in rows()) == Counter(range(0, point + 1, 3))
    stored = {task.id for task in queue.iter_tasks(type="t")} - {parent.id}
    assert f"x{point}" in stored
    assert len(stored) < point / 3
    for tag in ("a", "b"):
        assert {task.id for task in queue.iter_tasks(tag=tag)} == stored
    assert {child for _, child in queries.families(repository, [parent.id])} == stored
    run_in_thread(lambda: queue.submit("t"))()


@pytest.mark.timing(audit_every=0.02)
def test_a_struck_task_that_its_submitter_runs_takes_place_once(make_queue, gate, rows):
    """Its rows are of the attempt that is on the record, and no hook hears of a failure after them."""
    told = []

    class Recorder(Hook):
        def finished(self, task):
            told.append((task.id, task.status))

    queue = make_queue(worker_num=1, buffer_size=1, overflow="caller_runs", hooks=[Recorder()])

    @queue.executor("t", max_attempts=50, max_crashes=50)
    def work(ctx, n):
        with ctx.transaction() as tx:
            add(tx, n, ctx.task.starts)
            tx.complete(n)

    queue.start()
    Waiting(queue, gate).fill(1)
    queue.submit("t", {"n": -1})
    struck = 0
    for point in itertools.count(0, 53):
        submit = functools.partial(queue.submit, "t", {"n": point}, id=f"x{point}")
        # It has fewer points if another thread commits its row, so one that is not struck ends nothing.
        if struck_at(point, submit) is not None:
            struck += 1
        elif point > 53 * 20:
            break
        eventually(lambda: not parts_of(queue).moves.unsettled)
    gate.open()
    assert queue.drain(PATIENCE)
    tasks = [task for task in queue.iter_tasks(type="t") if task.id.startswith("x")]
    assert {task.status for task in tasks} == {TaskStatus.COMPLETED}
    written = [pair for pair in rows() if pair[0] >= 0]
    assert written == sorted((task.result, task.starts) for task in tasks)
    assert struck > 15
    eventually(lambda: {status for _, status in told} == {TaskStatus.COMPLETED})
    assert len(told) == len(set(told))
