"""The read of tasks that are about to start: it returns what a read of whole records returns."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from datetime import datetime, timezone

import pytest

from taskx import RetryPolicy, SQLiteRepository, Task, TaskStatus
from taskx.tasks import ids

LATER = datetime(2090, 1, 1, tzinfo=timezone.utc)

#: Fields of tasks; most of them are not in the record of a plain task.
FIELDS = {
    "plain": {},
    "params": {"params": {"a": [1, None, "ü"], "b": {}}},
    "options": {"priority": 7, "timeout": 1.5, "max_attempts": 3, "max_crashes": 1},
    "delayed": {"run_at": datetime(2020, 1, 1, tzinfo=timezone.utc)},
    "who": {"created_by": "us"},
    "retry": {"retry": RetryPolicy(max_attempts=2)},
    "tags": {"tags": ["x"]},
    "expires": {"expires_at": LATER},
    "key": {"unique_key": "k"},
    "turn": {"concurrency_key": "c"},
    "parents": {"depends_on": ["p"]},
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tasks.db"


@pytest.fixture
def repository(path):
    with SQLiteRepository(path) as repository:
        yield repository


def stored(repository, **fields) -> str:
    task_id = ids.new_id()
    repository.create(Task(id=task_id, type="t", **fields))
    return task_id


@pytest.mark.parametrize("name", FIELDS)
def test_it_is_the_whole_task(repository, name):
    task_id = stored(repository, **FIELDS[name])
    assert repository.reads.to_start([task_id]) == repository.get_many([task_id])


def test_a_task_that_was_changed_is_read_whole(repository):
    task_id = stored(repository)
    repository.update_status(task_id, TaskStatus.RUNNING)
    repository.update_progress(task_id, 50, "half")
    repository.update_status(task_id, TaskStatus.PENDING, "again")
    found = repository.reads.to_start([task_id])
    assert found == repository.get_many([task_id])
    assert found[task_id].message == "again"


@pytest.mark.parametrize(
    ("column", "value"),
    [
        *(("params", text) for text in ("", "{", "[1]", "5", "{} x", "{}}", ' {"a":1}', b"\xff{}")),
        ("params", '{"taskx:codec":"other","data":"x"}'),
        *(("created_at", value) for value in ("yesterday", 2**62, 1.5)),
        *(("priority", value) for value in ("high", 1.5)),
        *(("run_at", value) for value in ("soon", b"1", 2**62)),
        *(("timeout", value) for value in ("long", b"1")),
        *(("max_attempts", value) for value in ("many", b"1")),
        *(("type", value) for value in (b"t", 5)),
        *(("created_by", value) for value in (b"us", 5)),
    ],
)
def test_damage_is_told_as_by_the_read_of_the_whole_task(repository, path, column, value):
    task_ids = [stored(repository, params={"a": 1}) for _ in range(3)]
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(f"UPDATE tasks SET {column} = ? WHERE id = ?", (value, task_ids[1]))
    assert repository.reads.to_start(task_ids) == repository.get_many(task_ids)


def test_missing_tasks_are_left_out(repository):
    there = stored(repository)
    assert list(repository.reads.to_start([ids.new_id(), there, "x"])) == [there]
