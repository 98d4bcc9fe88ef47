"""The kept files of all schema versions, each made by the code of its time, and what is in a file.

Some of their tasks were running, started ahead, parked or in line when their processes were killed.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from helpers import PATIENCE, eventually

from taskx import Queue, Task
from taskx.stores.base import Repository

FOLDER = Path(__file__).parent / "versions"


def kept(version: int) -> Path:
    """Return the kept file of a schema version."""
    return FOLDER / f"version-{version}.sqlite"


def ask(path: Path, sql: str) -> list[Any]:
    """Return the rows of a query."""
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(sql).fetchall()


def schema_of(path: Path) -> list[tuple[str, str, str]]:
    """Return the schema of a file."""
    return ask(path, "SELECT type, name, sql FROM sqlite_master ORDER BY type, name")


def contents(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Return every column of every row of every table."""
    tables = [name for kind, name, _ in schema_of(path) if kind == "table"]
    with closing(sqlite3.connect(path)) as connection:
        connection.row_factory = sqlite3.Row
        return {
            table: sorted(map(dict, connection.execute(f"SELECT * FROM {table}")), key=_order)
            for table in tables
        }


def _order(row: dict[str, Any]) -> list[str]:
    return [repr(value) for value in row.values()]


def version_of(path: Path) -> int:
    """Return the schema version of a file."""
    ((version,),) = ask(path, "PRAGMA user_version")
    return version


def run_all(repository: Repository) -> int:
    """Run the tasks of a copy, and check how each ends. Return how many tasks the schedules have made."""
    queue = Queue(repository)
    for kind in ("add", "hang", "deaf", "patient", "later", "paused"):
        queue.executor(kind)(lambda ctx, **params: ctx.task.id)

    def tasks() -> dict[str, Task]:
        return {task.id: task for task in queue.iter_tasks()}

    before = tasks()
    with queue:
        queue.resume("paused")
        queue.wake("delayed")
        assert queue.drain(PATIENCE)
        after = tasks()
        # A dead node without tasks may be found a moment after those with some.
        eventually(lambda: len(repository.liveness.nodes()) == 1)
    ended = {"completed", "failed", "cancelled"}
    for task_id, task in before.items():
        expected = task.status if task.status in ended else "completed"
        if task_id == "asked to stop":
            expected = "cancelled"
        if task_id == "stuck" and after[task_id].status == "failed":
            # Its 50 ms may be over before its executor is called, on a busy machine.
            assert after[task_id].error.startswith("timed out after 0.05 s")
            continue
        assert after[task_id].status == expected, task_id
    assert queue.schedules().keys() == {"ticks", "rests"}
    assert repository.liveness.nodes() == []
    queue.close()
    return len(after.keys() - before.keys())
