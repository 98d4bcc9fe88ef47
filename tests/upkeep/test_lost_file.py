"""An SQLite file that is moved, deleted or replaced under a queue: it reports that and stores nothing."""

from __future__ import annotations

import logging
import os
import sqlite3
from contextlib import closing

import pytest
from helpers import PATIENCE, eventually, housekeeper_of, ids, node_of, pool_of

from taskx import Queue, RepositoryUnavailable, SQLiteRepository, Task, TaskNotFound, every

# Tests count the starts of tasks, so a slow machine must hand no started task back.
pytestmark = pytest.mark.usefixtures("calm")


@pytest.fixture
def repository(database):
    """The default repository of ``make_queue``: a file."""
    with SQLiteRepository(database) as repository:
        yield repository


def delete(database):
    database.unlink()


def move(database):
    database.rename(database.with_name("elsewhere.db"))
    return lambda: database.with_name("elsewhere.db").rename(database)


def replace(database):
    """Replace the file while the queue runs, as a restore does."""
    kept, copy = database.with_name("kept.db"), database.with_name("copy.db")
    os.link(database, kept)
    with closing(sqlite3.connect(database)) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)
    os.replace(copy, database)
    return lambda: os.replace(kept, database)


LOSSES = {"moved or deleted": delete, "was moved or deleted": move, "was replaced": replace}


@pytest.fixture(params=LOSSES)
def loss(request):
    return LOSSES[request.param], request.param


def refused(queue, words):
    """Check that every call that stores something fails, and says why and that nothing was stored."""
    ways = {
        "submit": lambda: queue.submit("fine", id="refused"),
        "delayed": lambda: queue.submit("fine", id="refused", delay=0.01),
        "unique": lambda: queue.submit("fine", id="refused", unique_key="k"),
        "many": lambda: queue.submit_many([Task(type="fine", id="refused"), Task(type="fine")]),
        "map": lambda: next(queue.map("fine", [{}], key=lambda item: "refused")),
        "schedule": lambda: queue.schedule("refused", every(3600), "fine"),
        "cancel": lambda: queue.cancel_task("held"),
    }
    for way, submit in ways.items():
        with pytest.raises(RepositoryUnavailable, match=words) as caught:
            submit()
        assert "nothing was stored" in str(caught.value), way
        assert not caught.value.in_doubt, way


@pytest.fixture
def held(make_queue, database, gate):
    """A started queue that runs a task named ``held``, which waits at the gate."""
    queue = make_queue(worker_num=2)
    queue.executor("fine")(lambda: "fine")
    queue.executor("hold")(lambda: (gate(), "held")[1])
    queue.start()
    queue.submit("hold", id="held")
    gate.wait_for(1)
    the_file = database.with_name("the-file")
    os.link(database, the_file)
    yield queue
    os.replace(the_file, database)  # otherwise the queue would wait for its file when it stops


def test_a_queue_whose_file_is_gone_is_not_healthy_and_refuses_every_call(held, database, loss):
    assert held.healthy
    lose, words = loss
    lose(database)
    assert not held.healthy
    refused(held, words)
    for read in (held.list_tasks, lambda: held.get_task_status("held"), lambda: held.paused):
        with pytest.raises(RepositoryUnavailable, match=words):
            read()


@pytest.mark.parametrize("lose", [move, replace])
def test_a_running_task_ends_well_when_the_file_is_back(held, database, gate, lose):
    put_back = lose(database)
    refused(held, "nothing was stored")
    gate.open()
    eventually(lambda: not pool_of(held).runs.executing)
    put_back()
    assert held.healthy
    assert held.handle("held").result(PATIENCE) == "held"
    task = held.get_task_status("held")
    assert (task.starts, task.crashes, task.interruptions) == (1, 0, 0)
    with pytest.raises(TaskNotFound):
        held.get_task_status("refused")
    assert held.submit("fine").result(PATIENCE) == "fine"


def test_a_running_task_does_not_start_again_from_a_copy_of_the_file(
    held, database, make_queue, gate
):
    """Another queue opens the copy while the process of the task lives."""
    replace(database)
    restored = make_queue(SQLiteRepository(database), worker_num=1)
    restored.executor("fine")(lambda: "fine")
    restored.executor("hold")(lambda: "again")
    restored.start()
    assert restored.submit("fine").result(PATIENCE) == "fine"
    housekeeper_of(restored).recovery.recover()
    task = restored.get_task_status("held")
    assert (task.status, task.starts, task.crashes) == ("running", 1, 0)
    gate.open()
    held.stop(timeout=0)
    eventually(lambda: not pool_of(held).workers_left)
    # As the end of its process would.
    held.repository.liveness._locks.let_go(node_of(held).record.id)
    assert restored.handle("held").result(PATIENCE) == "again"


@pytest.mark.timing(longest_pause=0.001)
def test_a_lost_file_is_logged_less_and_less_often_without_traceback(
    held, database, loss, caplog, monkeypatch
):
    lose, words = loss
    failed = []
    tick = housekeeper_of(held).tick

    def counted():
        try:
            tick()
        except RepositoryUnavailable:
            failed.append(1)
            raise

    monkeypatch.setattr(housekeeper_of(held), "tick", counted)
    with caplog.at_level(logging.INFO, "taskx"):
        lose(database)
        eventually(lambda: len(failed) > 100)
    told = [r for r in caplog.records if "the housekeeper tries again" in r.message]
    assert 1 <= len(told) <= len(failed).bit_length() + 1  # the 1st, 2nd, 4th …
    assert all(words in record.message for record in told)
    assert all(record.exc_info is None for record in caplog.records)
    assert {record.levelname for record in told} == {"WARNING"}


def test_stop_ends_and_names_tasks_whose_outcome_could_not_be_written(held, database, gate, caplog):
    delete(database)
    gate.open()
    eventually(lambda: not pool_of(held).runs.executing)
    assert held.stop(timeout=0.1) == ["held"]
    eventually(lambda: "outcomes could not be written yet" in caplog.text)  # from another thread
    assert not database.exists()


class TestNotStarted:
    def test_a_queue_is_healthy_before_its_file_is_opened(self, repository, database):
        queue = Queue(repository)
        assert queue.healthy
        assert not database.exists()

    def test_a_queue_is_healthy_as_long_as_its_file_is_there(self, repository, database):
        queue = Queue(repository)
        queue.declare("fine")
        queue.submit("fine", id="first")
        assert queue.healthy
        put_back = move(database)
        assert not queue.healthy
        with pytest.raises(RepositoryUnavailable, match="nothing was stored"):
            queue.submit("fine", id="refused")
        with pytest.raises(RepositoryUnavailable, match="moved or deleted"):
            queue.start()
        put_back()
        assert queue.healthy
        assert ids(queue) == {"first"}

    def test_listing_creates_the_file_unless_create_is_false(self, database):
        with SQLiteRepository(database, create=False) as careful:
            queue = Queue(careful)
            with pytest.raises(RepositoryUnavailable, match=r"there is no file .*tasks\.db"):
                queue.list_tasks()
            with pytest.raises(RepositoryUnavailable, match=r"there is no file .*tasks\.db"):
                queue.start()
            assert list(database.parent.iterdir()) == []
        with SQLiteRepository(database) as repository:
            assert Queue(repository).list_tasks() == ([], 0)
        assert database.exists()
