"""``SQLiteRepository(prefix=…)`` on the SQLite file of a Django site, without the app of TaskX."""

from __future__ import annotations

import asyncio
import threading
from datetime import datetime, timezone
from pathlib import Path

import pytest
from django.contrib.auth.models import Group
from django.db import connections, transaction

from contrib.django.atomic.blocks import rolled_back
from taskx import ConfigurationError, SQLiteRepository, TaskFilter

LONG = 60


@pytest.fixture
def path(tmp_path):
    """The file of the database ``site``, in WAL mode and with one table of Django."""
    name = tmp_path / "site.sqlite3"
    connections.settings["site"] = {
        **connections.settings["other"],
        "NAME": str(name),
        "OPTIONS": {"timeout": 20},
    }
    with connections["site"].cursor() as cursor:
        cursor.execute("PRAGMA journal_mode = WAL")
    with connections["site"].schema_editor() as editor:
        editor.create_model(Group)
    yield name
    connections["site"].close()
    del connections["site"], connections.settings["site"]


@pytest.fixture
def repository(path: Path):
    with SQLiteRepository(path, prefix="taskx_", busy_timeout=20) as made:
        made.count(TaskFilter())
        yield made


@pytest.fixture
def queue(make_queue):
    made = make_queue(worker_num=2)
    made.executor("echo")(lambda n=0: n)
    return made


def add(name):
    Group.objects.using("site").create(name=name)


def names():
    return sorted(Group.objects.using("site").values_list("name", flat=True))


def test_the_task_and_the_data_are_stored_together(queue):
    with queue:
        with transaction.atomic(using="site"):
            add("readers")
            handle = queue.submit("echo", {"n": 3}, connection=connections["site"])
            assert queue.count_tasks() == 0
        assert handle.result(timeout=LONG) == 3
    assert names() == ["readers"]


def test_the_connection_is_opened_if_it_was_not(queue):
    connections["site"].close()
    with pytest.raises(
        ConfigurationError, match="BEGIN IMMEDIATE first, or call inside transaction"
    ):
        queue.submit("echo", connection=connections["site"])
    assert queue.count_tasks() == 0


def test_a_rollback_takes_both_back(queue):
    with rolled_back("site"):
        add("readers")
        queue.submit("echo", connection=connections["site"])
    assert queue.count_tasks() == 0
    assert names() == []


def test_a_nested_block_takes_its_task_back(queue):
    with transaction.atomic(using="site"):
        kept = queue.submit("echo", connection=connections["site"])
        with rolled_back("site"):
            queue.submit("echo", connection=connections["site"])
    assert [task.id for task in queue.list_tasks()[0]] == [kept.id]


def test_a_connection_of_another_thread_is_refused(queue):
    mine, told = connections["site"], []
    mine.ensure_connection()

    def submit():
        with pytest.raises(ConfigurationError, match="thread"):
            queue.submit("echo", connection=mine)
        told.append(True)

    thread = threading.Thread(target=submit)
    thread.start()
    thread.join(LONG)
    assert told == [True]


async def awaited(handle):
    return await handle


@pytest.mark.parametrize(
    "call",
    [
        lambda queue: queue.pause("echo"),
        lambda queue: queue.resume("echo"),
        lambda queue: queue.tune("echo", max_concurrency=1),
        lambda queue: queue.requeue("old"),
        lambda queue: queue.requeue_all(),
        lambda queue: queue.cancel_all(everything=True),
        lambda queue: queue.delete("old"),
        lambda queue: queue.prune(datetime.now(timezone.utc)),
        lambda queue: queue.schedule("nightly", "0 3 * * *", "echo").store(),
        lambda queue: queue.schedules()["hourly"].pause(),
        lambda queue: queue.schedules()["hourly"].trigger(),
        lambda queue: queue.schedules()["hourly"].remove(),
        lambda queue: queue.note_change("ann", "pause", "echo"),
        lambda queue: queue.handle("waiting").result(),
        lambda queue: asyncio.run(awaited(queue.handle("waiting"))),
        lambda queue: queue.start(),
    ],
)
def test_all_that_would_wait_for_the_same_transaction_raises_at_once(queue, call):
    queue.submit("echo", id="old")
    queue.cancel_task("old")
    queue.submit("echo", id="waiting")
    queue.schedule("hourly", "0 * * * *", "echo").store()
    with rolled_back("site"):
        queue.submit("echo", connection=connections["site"])
        with pytest.raises(ConfigurationError, match="would wait for itself"):
            call(queue)
    assert not queue.paused
    assert {*queue.repository.notes("schedule/")} == {"schedule/hourly"}
    assert not queue.schedules()["hourly"].paused
    assert queue.count_tasks() == 2


def test_reads_beside_the_same_transaction_see_what_is_committed(queue):
    queue.submit("echo", id="old")
    with rolled_back("site"):
        queue.submit("echo", connection=connections["site"])
        assert [task.id for task in queue.iter_tasks()] == ["old"]
        assert queue.stats().types["echo"].waiting == 1
        assert queue.why("old")
        assert not queue.paused


def test_an_ordinary_submit_in_the_same_transaction_raises_at_once(queue):
    with transaction.atomic(using="site"):
        queue.submit("echo", connection=connections["site"])
        with pytest.raises(ConfigurationError, match="would wait for itself"):
            queue.submit("echo")
    assert queue.count_tasks() == 1
