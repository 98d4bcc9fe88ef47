"""Files of every schema version, and the migration of earlier ones."""

from __future__ import annotations

import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from helpers import PATIENCE

from taskx import (
    Config,
    Queue,
    RepositoryError,
    SchemaMismatch,
    SQLiteRepository,
    TaskFilter,
    TaskStatus,
)
from taskx.stores.sqlite import schema
from taskx.tasks.record import DEFAULTS

FOLDER = Path(__file__).parent / "versions"
ROOT = FOLDER.parent.parent.parent
EARLIER = range(1, schema.VERSION)

each_earlier_version = pytest.mark.parametrize("version", EARLIER)


def kept(version: int) -> Path:
    return FOLDER / f"version-{version}.sqlite"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tasks.db"


@pytest.fixture
def old(path, version):
    """A file of an earlier version."""
    shutil.copyfile(kept(version), path)
    return path


def ask(path: Path, sql: str) -> list[tuple]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(sql).fetchall()


def schema_of(path: Path) -> list[tuple]:
    """Return the schema of a file, with the same text for both forms of the check of the status."""
    found = ask(path, "SELECT type, name, sql FROM sqlite_master ORDER BY type, name")
    return [
        (*names, sql and sql.replace(schema.QUICK_CHECK, schema.CHECK)) for *names, sql in found
    ]


def contents(path: Path) -> dict[str, list[dict]]:
    """Return every column of every row of every table."""
    tables = [name for kind, name, _ in schema_of(path) if kind == "table"]
    with closing(sqlite3.connect(path)) as connection:
        connection.row_factory = sqlite3.Row
        return {
            table: [dict(row) for row in connection.execute(f"SELECT * FROM {table} ORDER BY 1, 2")]
            for table in tables
        }


def take_nodes(notes: list[dict]) -> dict[str, dict]:
    """Remove the notes about nodes from a list, and return their contents by node."""
    found = [note for note in notes if note["name"].startswith("node/")]
    notes[:] = [note for note in notes if note not in found]
    return {note["name"].removeprefix("node/"): json.loads(note["text"]) for note in found}


def version_of(path: Path) -> int:
    ((version,),) = ask(path, "PRAGMA user_version")
    return version


# The stored files


@pytest.mark.parametrize("version", range(1, schema.VERSION + 1))
def test_a_schema_does_not_change_without_a_new_version(version, path):
    """The migrations make the same schema as the stored file, which the version's own code made."""
    how = "python tests/storage/versions/make.py"
    assert kept(version).exists(), f"a new version needs a file: {how} {kept(version)}"
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statements in schema.MIGRATIONS[:version]:
            for statement in statements:
                connection.execute(statement)
    assert version_of(kept(version)) == version
    assert schema_of(path) == schema_of(kept(version)), (
        f"version {version} of the schema was changed. If it was released, add a version instead; "
        f"if it was not, make its file again: {how} {kept(version)}"
    )


@pytest.mark.parametrize("version", range(1, schema.VERSION + 1))
def test_every_column_of_a_kept_file_holds_something(version):
    defaults = {**DEFAULTS, "stopping": 0}
    for table, rows in contents(kept(version)).items():
        assert rows
        for column in rows[0]:
            values = {row[column] for row in rows}
            assert values - {defaults.get(column)}, f"{table}.{column}"


# The migration of earlier versions


@each_earlier_version
def test_a_migrated_file_keeps_all_its_data(old, version):
    before = contents(old)
    with SQLiteRepository(old) as repository:
        tasks = repository.list(TaskFilter())
    assert version_of(old) == schema.VERSION
    after = contents(old)
    nodes = {
        node.pop("id"): {
            **node,
            "types": json.loads(node["types"]),
            "stopping": bool(node["stopping"]),
        }
        for node in before.pop("nodes", [])
    }
    nodes |= take_nodes(before["notes"])
    assert take_nodes(after["notes"]) == nodes
    assert after.keys() == before.keys() | {"tagged"}
    for table in before:
        assert len(after[table]) == len(before[table])
        for old_row, new_row in zip(before[table], after[table], strict=True):
            if version == 1 and old_row.get("status") == "running":
                old_row["worker"] = nodes[old_row["owner"]]["name"]
            assert {name: new_row[name] for name in old_row} == old_row
    assert not [task.damage for task in tasks if task.damage]


@each_earlier_version
def test_a_migrated_file_has_the_schema_of_a_new_one(old, tmp_path):
    for path in (old, tmp_path / "new.db"):
        with SQLiteRepository(path) as repository:
            repository.count(TaskFilter())
    assert schema_of(old) == schema_of(tmp_path / "new.db")


@pytest.mark.parametrize("status", [*TaskStatus, "other"])
def test_both_forms_of_the_check_allow_the_same_statuses(status):
    """For one form SQLite builds a small tree at each write, so new files have the other one."""

    def passes(check):
        with closing(sqlite3.connect(":memory:")) as connection:
            connection.execute(f"CREATE TABLE t (status TEXT {check})")
            connection.execute("INSERT OR IGNORE INTO t VALUES (?)", (str(status),))
            return bool(connection.execute("SELECT * FROM t").fetchall())

    assert passes(schema.CHECK) == passes(schema.QUICK_CHECK) == (status in [*TaskStatus])


def test_a_new_file_has_the_quick_form_of_the_check(path):
    with SQLiteRepository(path) as repository:
        repository.count(TaskFilter())
    [(sql,)] = ask(path, "SELECT sql FROM sqlite_master WHERE name = 'tasks'")
    assert schema.QUICK_CHECK in sql
    assert schema.CHECK not in sql


@each_earlier_version
def test_tasks_of_an_earlier_version_run(old):
    with closing(sqlite3.connect(old)) as connection, connection:
        # Some time-outs are very short.
        connection.execute("UPDATE tasks SET timeout = ?", (PATIENCE,))
    before = {task["id"]: task for task in contents(old)["tasks"]}
    queue = Queue(SQLiteRepository(old), Config(worker_num=2))
    ran = []
    for kind in {task["type"] for task in before.values()} - {"later"}:
        queue.executor(kind)(lambda ctx, a=0, b=0: ran.append(ctx.task.id))
    queue.executor("later")(lambda ctx, n=0, tick=False: ran.append(ctx.task.id))
    with queue:
        assert queue.drain(PATIENCE)
        tasks = {task.id: task for task in queue.list_tasks()[0]}
        schedules = {name: schedule.paused for name, schedule in queue.schedules().items()}
        paused = queue.paused.types
    queue.close()
    for task_id, row in before.items():
        task = tasks[task_id]
        assert not task.damage
        if row["status"] in ("pending", "running") and task_id not in ("paused", "asked to stop"):
            assert (task.status, ran.count(task_id)) == (TaskStatus.COMPLETED, 1), task_id
        else:
            assert task_id not in ran
    assert tasks["paused"].status is TaskStatus.PENDING
    assert tasks["asked to stop"].status is TaskStatus.CANCELLED
    assert schedules == {"rests": True, "ticks": False}
    assert set(paused) == {"paused"}


@each_earlier_version
def test_records_of_an_earlier_version_are_read(old):
    with SQLiteRepository(old) as repository:
        tasks = {task.id: task for task in repository.list(TaskFilter())}
    assert tasks["completed"].result == 3
    assert tasks["completed"].checkpoints == {"steps": {"sum": 3}}
    assert "adds 1 and 2" in tasks["completed"].log
    assert tasks["second"].result == {"text": "naïve ☃", "list": [1, None, 2.5]}
    assert [a.outcome for a in tasks["second"].attempts] == ["snoozed", "retried", "completed"]
    assert [a.error for a in tasks["failed"].attempts] == [
        "ValueError: attempt 1",
        "ValueError: attempt 2",
    ]
    assert tasks["failed"].retry.max_attempts == 2
    assert "raise ValueError" in tasks["failed"].traceback
    assert tasks["child"].depends_on == ["running", "pending"]
    assert (tasks["crashed"].crashes, tasks["interrupted"].interruptions) == (1, 1)
    assert tasks["running"].worker.startswith("host:")


@pytest.mark.parametrize("version", range(1, schema.VERSION + 1))
def test_tasks_of_any_version_are_tagged_and_found_by_tag(old, version):
    queue = Queue(SQLiteRepository(old))
    queue.declare("later")
    new = queue.submit("later", tags=["new", "red"])
    assert [task.id for task in queue.iter_tasks(tag="new")] == [new.id]
    assert queue.count_tasks(tag="red") == (2 if version >= 4 else 1)
    queue.delete(new.id)
    task = queue.get_task_status("pending")
    task.tags = ["later"]
    queue.repository.update(task)
    assert [task.id for task in queue.iter_tasks(tag="later")] == ["pending"]
    assert queue.count_tasks(tag="new") == 0
    queue.close()


# Interrupted and simultaneous migrations


def old_program(program: str, path: Path, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), str(path), *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": str(ROOT)},
    )


STEPS = [
    (version, done) for version in EARLIER for done in range(len(schema.MIGRATIONS[version]) + 1)
]


@pytest.mark.process
@pytest.mark.parametrize(("version", "done"), STEPS)
def test_a_killed_migration_is_undone(old, done):
    """The process is killed after each of the statements in turn."""
    program = """
        import os, signal, sys
        from taskx import SQLiteRepository, TaskFilter
        from taskx.stores.sqlite import schema

        class Fatal(tuple):
            def __iter__(self):
                yield from self[: int(sys.argv[3])]
                os.kill(os.getpid(), signal.SIGKILL)

        version = int(sys.argv[2])
        steps = list(schema.MIGRATIONS)
        steps[version] = Fatal(steps[version])
        schema.MIGRATIONS = tuple(steps)
        SQLiteRepository(sys.argv[1]).count(TaskFilter())
    """
    version, before = version_of(old), contents(old)
    with old_program(program, old, version, done) as child:
        child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert version_of(old) == version
    assert schema_of(old) == schema_of(kept(version))
    assert contents(old) == before
    with SQLiteRepository(old) as repository:
        assert repository.count(TaskFilter()) == len(before["tasks"])
    assert version_of(old) == schema.VERSION


@pytest.mark.parametrize(("version", "done"), STEPS)
def test_a_failed_migration_is_undone(old, version, done, monkeypatch):
    """Each of the statements fails in turn."""
    before = contents(old)
    steps = list(schema.MIGRATIONS)
    steps[version] = (*steps[version][:done], "CREATE NONSENSE", *steps[version][done:])
    monkeypatch.setattr(schema, "MIGRATIONS", tuple(steps))
    with SQLiteRepository(old) as repository, pytest.raises(RepositoryError, match="syntax error"):
        repository.count(TaskFilter())
    assert version_of(old) == version
    assert schema_of(old) == schema_of(kept(version))
    assert contents(old) == before


@pytest.mark.process
@each_earlier_version
def test_only_one_of_several_processes_migrates_a_file(old, version):
    program = """
        import sys
        from taskx import SQLiteRepository, TaskFilter
        from taskx.stores.sqlite import schema

        class Told(tuple):
            def __iter__(self):
                print("migrates", flush=True)
                return super().__iter__()

        version = int(sys.argv[2])
        steps = list(schema.MIGRATIONS)
        steps[version] = Told(steps[version])
        schema.MIGRATIONS = tuple(steps)
        print("ready", flush=True)
        sys.stdin.readline()
        print(SQLiteRepository(sys.argv[1]).count(TaskFilter()), flush=True)
    """
    with ExitStack() as stack:
        children = [stack.enter_context(old_program(program, old, version)) for _ in range(4)]
        for child in children:
            assert child.stdout.readline() == "ready\n"
        for child in children:
            child.stdin.write("\n")
            child.stdin.flush()
        told = [child.communicate(timeout=PATIENCE)[0].split() for child in children]
    count = str(len(contents(old)["tasks"]))
    assert sorted(map(len, told)) == [1, 1, 1, 2]
    assert all(words[-1] == count for words in told)
    assert version_of(old) == schema.VERSION


@each_earlier_version
def test_a_repository_that_must_not_migrate_refuses_an_earlier_file(old, version):
    before = old.read_bytes()
    with SQLiteRepository(old) as repository:
        repository.house.only_existing()
        with pytest.raises(
            SchemaMismatch, match=rf"has schema version {version}, and this TaskX needs"
        ):
            repository.count(TaskFilter())
    assert old.read_bytes() == before
    assert [path.name for path in old.parent.iterdir()] == [old.name]


def test_a_repository_that_must_not_migrate_uses_a_file_of_this_version(path):
    shutil.copyfile(kept(schema.VERSION), path)
    with SQLiteRepository(path) as repository:
        repository.house.only_existing()
        assert repository.count(TaskFilter()) > 0
