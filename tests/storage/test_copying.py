"""The copy of the tasks of a file, mostly of an earlier schema version, into tables of the present one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
from contextlib import closing
from pathlib import Path

import pytest
from helpers import PATIENCE

from taskx import (
    Config,
    ConfigurationError,
    Queue,
    RepositoryCorrupt,
    RepositoryUnavailable,
    SchemaMismatch,
    SQLiteRepository,
    TaskFilter,
    TaskStatus,
)
from taskx.stores.liveness.locks import NodeLocks
from taskx.stores.sqlite import copying, schema
from taskx.stores.sqlite.copying import Copied, copy_tasks
from taskx.tasks.ids import new_id

from .kept import FOLDER, ask, contents, kept, schema_of, version_of

ROOT = FOLDER.parent.parent.parent

each_version = pytest.mark.parametrize("version", range(1, schema.VERSION + 1))
each_early_version = pytest.mark.parametrize("version", range(1, schema.FIRST))


@pytest.fixture
def version():
    return schema.FIRST - 1


@pytest.fixture
def old(tmp_path, version):
    """A file of a version."""
    path = tmp_path / "old.db"
    shutil.copyfile(kept(version), path)
    return path


@pytest.fixture
def new(tmp_path):
    return tmp_path / "new.db"


@pytest.fixture(autouse=True)
def no_patience(monkeypatch):
    monkeypatch.setattr(copying, "PATIENCE", 0.05)


def change(path, *statements):
    """Execute statements on a file."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(*([statement] if isinstance(statement, str) else statement))


def files(folder):
    """Return the bytes of all files of a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def new_schema(tmp_path):
    """Return the schema of a new file."""
    with SQLiteRepository(tmp_path / "fresh.db") as repository:
        repository.count(TaskFilter())
    return schema_of(tmp_path / "fresh.db")


def ids(path, prefix=""):
    """Return the ids of all tasks, in the order of a list."""
    with SQLiteRepository(path, prefix=prefix) as repository:
        return [task.id for task in repository.list(TaskFilter(limit=1000))]


# What arrives


@each_version
def test_every_column_of_every_row_arrives(old, new, version):
    before = contents(old)
    assert copy_tasks(str(old), str(new)) == Copied(len(before["tasks"]), version)
    assert contents(old) == before
    after = contents(new)
    assert version_of(new) == schema.VERSION
    keys = {row["id"]: row["seq"] for row in after["tasks"]}
    numbers = {row["seq"]: row["id"] for row in before["tasks"]}
    rows = {row["id"]: row for row in after["tasks"]}
    assert len(rows) == len(before["tasks"])
    for row in before["tasks"]:
        there = rows[row["id"]]
        assert {name: there[name] for name in row if name != "seq"} == {
            name: row[name] for name in row if name != "seq"
        }
        assert there["seq"] & 1 or version >= schema.FIRST
    assert sorted((row["parent"], row["child"]) for row in after["parents"]) == sorted(
        (row["parent"], keys[numbers.get(row["child"], row["child"])]) for row in before["parents"]
    )
    assert sorted((row["tag"], row["task"]) for row in after["tagged"]) == sorted(
        (tag, row["seq"]) for row in after["tasks"] for tag in json.loads(row["tags"] or "[]")
    )
    assert after["notes"] == [
        note for note in before["notes"] if not note["name"].startswith("node/")
    ]


@each_version
def test_the_copy_has_the_schema_of_a_new_file_and_the_old_one_is_not_changed(
    old, new, version, tmp_path
):
    copy_tasks(str(old), str(new))
    assert files(tmp_path).keys() == {"old.db", "new.db"}
    assert old.read_bytes() == kept(version).read_bytes()
    assert schema_of(new) == new_schema(tmp_path)
    for pragma in ("page_size", "auto_vacuum", "application_id"):
        assert ask(new, f"PRAGMA {pragma}") == ask(tmp_path / "fresh.db", f"PRAGMA {pragma}")


def test_keys_of_this_version_are_kept(tmp_path, new):
    old = tmp_path / "old.db"
    shutil.copyfile(kept(schema.VERSION), old)
    copy_tasks(str(old), str(new))
    assert ask(new, "SELECT seq, id FROM tasks") == ask(old, "SELECT seq, id FROM tasks")
    with SQLiteRepository(new) as repository:
        for (task_id,) in ask(new, "SELECT id FROM tasks"):
            assert repository.get_by_id(task_id).id == task_id


@each_version
def test_copied_tasks_run_also_those_that_killed_processes_left_running(old, new, version):
    # Some time-outs are very short.
    change(old, ("UPDATE tasks SET timeout = ?", (PATIENCE,)))
    before = {task["id"]: task for task in contents(old)["tasks"]}
    copy_tasks(str(old), str(new))
    queue = Queue(SQLiteRepository(new), Config(worker_num=2))
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
    assert (before["running"]["status"], tasks["running"].crashes) == ("running", 1)
    assert tasks["paused"].status is TaskStatus.PENDING
    assert tasks["asked to stop"].status is TaskStatus.CANCELLED
    assert schedules == {"rests": True, "ticks": False}
    assert set(paused) == {"paused"}


@each_version
def test_copied_records_are_read(old, new, version):
    copy_tasks(str(old), str(new))
    with SQLiteRepository(new) as repository:
        tasks = {task.id: task for task in repository.list(TaskFilter())}
    assert not [task.damage for task in tasks.values() if task.damage]
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


@each_version
def test_copied_tasks_are_found_by_tag_and_changed_and_deleted(old, new, version):
    copy_tasks(str(old), str(new))
    queue = Queue(SQLiteRepository(new))
    queue.declare("later")
    added = queue.submit("later", tags=["new", "red"])
    assert queue.count_tasks(tag="red") == (2 if version > 1 else 1)
    task = queue.get_task_status("pending")
    task.tags = ["later"]
    queue.repository.update(task)
    assert [task.id for task in queue.iter_tasks(tag="later")] == ["pending"]
    queue.delete(added.id)
    queue.cancel_task("child")
    queue.delete("child")
    queue.close()
    assert ask(new, "SELECT * FROM parents") == []


def test_tasks_keep_their_order(old, new):
    """They are sorted by their time, and those of the same time by the order in which they were stored."""
    moments = [5, 7, 7, 7, 6, 7, 1 << 44, -3, 7]
    stored = [(new_id(), moment) for moment in moments]  # the ids look as those with keys do
    insert = "INSERT INTO tasks (id, type, created_at) VALUES (?, 't', ?)"
    change(old, "DELETE FROM tasks", "DELETE FROM notes", *((insert, row) for row in stored))
    copy_tasks(str(old), str(new))
    order = [task_id for task_id, _ in sorted(stored, key=lambda row: row[1])]
    assert [id for (id,) in ask(new, "SELECT id FROM tasks ORDER BY seq")] == order
    queue = Queue(SQLiteRepository(new), Config(worker_num=1))
    ran = []
    queue.executor("t")(lambda ctx: ran.append(ctx.task.id))
    with queue:
        assert queue.drain(PATIENCE)
    queue.close()
    assert ran == order
    assert ids(new) == order[::-1]


def test_damaged_values_are_copied_as_they_are(old, new):
    damage = {
        "created_at": ["'yesterday'", "1.5", "9e999", "CAST(x'ff' AS TEXT)", "x'00ff'"],
        "priority": ["'high'", "x'ff'"],
        "params": ["CAST(x'7bff7d' AS TEXT)", "x'7b7d'", "'{'"],
        "tags": ["'[1, \"red\"'", "CAST(x'5bff5d' AS TEXT)", "x'ff'", "'[null, 7, \"blue\"]'"],
        "error": ["CAST(x'c3' AS TEXT)", "'nul ' || char(0) || ' and more'"],
        "result": ["7", "x''"],
    }
    number = 0
    change(old, "DELETE FROM tasks")
    for column, values in damage.items():
        for value in values:
            number += 1
            insert = "INSERT INTO tasks (id, type, created_at) VALUES"
            change(
                old,
                f"{insert} ('{number}', 't', {number})",
                f"UPDATE tasks SET {column} = {value} WHERE id = '{number}'",
            )
    copy_tasks(str(old), str(new))
    query = "SELECT id, {} FROM tasks ORDER BY id".format(
        ", ".join(f"typeof({name}), hex({name})" for name in damage)
    )
    assert ask(new, query) == ask(old, query)
    assert len(ask(new, query)) == number
    assert ask(new, "SELECT tag FROM tagged") == [("7",), ("blue",)]
    keys = [key for (key,) in ask(new, "SELECT seq FROM tasks")]
    assert all(0 < key < 1 << 63 and key & 1 for key in keys)


def test_the_log_that_a_killed_process_left_is_part_of_the_file(old, new, tmp_path):
    with closing(sqlite3.connect(old, isolation_level=None)) as connection:
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        connection.execute("INSERT INTO tasks (id, type, created_at) VALUES ('last', 't', 1)")
        for end in ("", "-wal"):
            shutil.copyfile(f"{old}{end}", tmp_path / f"killed.db{end}")
    copy_tasks(str(tmp_path / "killed.db"), str(new))
    assert "last" in ids(new)


def test_the_numbers_are_told_between_batches(old, new, monkeypatch):
    monkeypatch.setattr(copying, "BATCH", 10)
    total = len(contents(old)["tasks"])
    told = []
    copy_tasks(str(old), str(new), progress=lambda *numbers: told.append(numbers))
    assert told == [(10, total), (20, total), (total, total)]


# What is refused


def test_a_file_that_a_program_has_open_is_refused(old, new, tmp_path):
    """Also if it only submits: it could store a task right after the copy."""
    with closing(sqlite3.connect(old)) as program:
        program.execute("SELECT count(*) FROM tasks").fetchall()
        with pytest.raises(RepositoryUnavailable, match=r"another program uses .*old\.db or .*new"):
            copy_tasks(str(old), str(new))
    assert files(tmp_path) == {"old.db": old.read_bytes()}
    assert copy_tasks(str(old), str(new)).tasks


def test_nobody_can_open_the_files_during_the_copy(old, new):
    seen = []

    def look(done, total):
        for path in (old, new):
            with closing(sqlite3.connect(path, timeout=0)) as program:
                with pytest.raises(sqlite3.OperationalError, match="locked"):
                    program.execute("SELECT count(*) FROM sqlite_master").fetchall()
                seen.append(path)

    copy_tasks(str(old), str(new), progress=look)
    assert seen == [old, new]


@pytest.mark.parametrize("which", ["old.db", "new.db"])
def test_a_file_with_a_live_node_is_refused(old, new, tmp_path, which):
    """Even if the node has closed the file for a moment, as before a fork."""
    locks = NodeLocks(f"{tmp_path / which}-nodes")
    locks.hold("node")
    with pytest.raises(RepositoryUnavailable, match="another program uses"):
        copy_tasks(str(old), str(new))
    assert not new.exists()
    locks.let_go("node")  # as the death of the process does
    assert copy_tasks(str(old), str(new)).tasks


def test_a_file_on_which_a_queue_runs_is_refused(tmp_path, new, make_queue):
    old = tmp_path / "present.db"
    queue = make_queue(SQLiteRepository(old), worker_num=1)
    queue.executor("t")(lambda: None)
    queue.start()
    with pytest.raises(RepositoryUnavailable, match="another program uses"):
        copy_tasks(str(old), str(new))
    assert not new.exists()


def test_a_copy_with_tasks_is_not_filled_again(old, new, tmp_path):
    copy_tasks(str(old), str(new))
    before = files(tmp_path)
    with pytest.raises(ConfigurationError, match=r"new\.db has tasks already; nothing was copied"):
        copy_tasks(str(old), str(new))
    assert files(tmp_path) == before


def test_a_file_without_tasks_is_filled(old, new):
    queue = Queue(SQLiteRepository(new))
    queue.pause()
    queue.close()
    copy_tasks(str(old), str(new))
    assert len(ids(new)) == len(contents(old)["tasks"])
    assert {name for (name,) in ask(new, "SELECT name FROM notes")} > {
        note["name"] for note in contents(old)["notes"] if not note["name"].startswith("node/")
    }


def test_the_file_of_another_program_is_not_touched(old, new, tmp_path):
    change(new, "PRAGMA journal_mode = WAL", "CREATE TABLE others (x)")
    before = files(tmp_path)
    for paths in ((old, new), (new, old)):
        with pytest.raises(SchemaMismatch, match=r"new\.db is the database of another program"):
            copy_tasks(*map(str, paths))
    assert files(tmp_path) == before


def test_a_file_of_a_newer_version_is_refused(old, new):
    change(old, f"PRAGMA user_version = {schema.VERSION + 1}")
    with pytest.raises(SchemaMismatch, match="Upgrade taskx-queue"):
        copy_tasks(str(old), str(new))
    assert not new.exists()


def test_a_copy_over_a_file_of_an_earlier_version_is_refused(old, new):
    shutil.copyfile(kept(1), new)
    with pytest.raises(SchemaMismatch, match=r"new\.db has schema version 1"):
        copy_tasks(str(old), str(new))
    assert new.read_bytes() == kept(1).read_bytes()


def test_a_wrong_path_is_told_and_creates_nothing(tmp_path, new):
    (tmp_path / "empty.db").touch()
    (tmp_path / "text.db").write_text("this is no database, but it is long enough to look at" * 20)
    (tmp_path / "folder").mkdir()
    before = files(tmp_path)
    for name, error, words in (
        ("missing.db", RepositoryUnavailable, "there is no file .*missing.db"),
        ("empty.db", ConfigurationError, "empty.db has no tables of TaskX: check the path"),
        ("text.db", RepositoryCorrupt, "text.db is not an SQLite database"),
        ("folder", RepositoryUnavailable, "folder cannot be opened: it is a folder"),
    ):
        with pytest.raises(error, match=words):
            copy_tasks(str(tmp_path / name), str(new))
    assert files(tmp_path) == before


def test_a_missing_folder_is_told(old, tmp_path):
    with pytest.raises(RepositoryUnavailable, match=r"there is no folder .*missing"):
        copy_tasks(str(old), str(tmp_path / "missing" / "new.db"))


def test_a_file_that_cannot_be_locked_is_refused(old, new, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(
        RepositoryUnavailable, match=r"old\.db is read-only, so it cannot be locked"
    ):
        copy_tasks(str(old), str(new))
    assert not new.exists()


def test_damage_is_told_of_the_old_file(old, new):
    pages = bytearray(old.read_bytes())
    pages[2048:] = os.urandom(len(pages) - 2048)
    old.write_bytes(pages)
    with pytest.raises(RepositoryCorrupt, match=r"old\.db is damaged"):
        copy_tasks(str(old), str(new))
    assert not new.exists()


# Interrupted copies


@pytest.mark.parametrize("same", [False, True])
def test_an_interrupted_copy_is_undone(old, new, same, tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    before, target = contents(old), str(old if same else new)
    with pytest.raises(KeyboardInterrupt):
        copy_tasks(str(old), target, progress=interrupt)
    assert files(tmp_path).keys() == {"old.db"}
    assert contents(old) == before
    assert schema_of(old) == schema_of(kept(4))
    assert copy_tasks(str(old), target).tasks == len(before["tasks"])


KILLED = """
    import os, signal, sqlite3, sys
    from taskx.stores.sqlite import copying

    old, new, last = sys.argv[1:]
    number = 0

    class Connection(sqlite3.Connection):
        def execute(self, sql, *values):
            global number
            number += 1
            if number == int(last):
                os.kill(os.getpid(), signal.SIGKILL)
            return super().execute(sql, *values)

    def connect(path, mode, patience):
        return sqlite3.connect(
            copying.address(path, mode), uri=True, isolation_level=None, factory=Connection
        )

    copying.connect, copying.BATCH = connect, 5
    copying.copy_tasks(old, new)
    print(number)
"""


def killed_copy(old: Path, new: Path, last: int) -> subprocess.Popen[str]:
    """Start a process that copies tasks, and is killed before a statement."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(old), str(new), str(last)],
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": str(ROOT)},
    )


@pytest.mark.process
@pytest.mark.parametrize("same", [False, True])
def test_a_killed_copy_is_undone(old, new, same, tmp_path):
    """The process is killed before some of the statements; the last one is the commit."""
    with killed_copy(old, tmp_path / "old.db" if same else new, 0) as whole:
        statements = int(whole.communicate()[0])
    for last in (9, statements // 2, *range(statements - 3, statements + 1)):
        shutil.copyfile(kept(4), old)
        new.unlink(missing_ok=True)
        before, target = contents(old), old if same else new
        with killed_copy(old, target, last) as child:
            child.communicate()
        assert child.returncode == -signal.SIGKILL
        if same:
            assert schema_of(old) == schema_of(kept(4))
        elif new.exists():
            assert ask(new, "SELECT count(*) FROM sqlite_master") == [(0,)]
        assert contents(old) == before
        assert copy_tasks(str(old), str(target)).tasks == len(before["tasks"])
        assert len(ids(target)) == len(before["tasks"])


@pytest.mark.process
def test_a_queue_makes_a_new_file_of_what_a_killed_copy_left(old, new):
    with killed_copy(old, new, 30) as child:
        child.communicate()
    assert new.exists()
    assert ids(new) == []


# Tables with a prefix


@pytest.fixture
def application(tmp_path, version):
    """The file of an application with tables of a version, a table of its own, and a view."""
    path = tmp_path / "app.db"
    tables = schema.PrefixedSchema("taskx_")
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA application_id = 7")
        connection.execute("PRAGMA user_version = 3")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE tasks (id INTEGER PRIMARY KEY, notes TEXT)")
        connection.execute("INSERT INTO tasks VALUES (1, 'ours')")
        connection.execute("ATTACH ? AS kept", (str(kept(version)),))
        parts = connection.execute(
            "SELECT type, name, sql FROM kept.sqlite_master WHERE sql IS NOT NULL "
            "ORDER BY type <> 'table'"
        ).fetchall()
        for kind, name, sql in parts:
            connection.execute(tables.named(sql))
            if kind == "table":
                connection.execute(f"INSERT INTO taskx_{name} SELECT * FROM kept.{name}")
        connection.execute("CREATE TABLE taskx_schema (version INTEGER NOT NULL)")
        connection.execute(f"INSERT INTO taskx_schema VALUES ({version})")
        connection.execute(
            "CREATE VIEW waiting AS SELECT id FROM taskx_tasks WHERE status = 'pending'"
        )
    return path


def pragmas(path):
    names = ("application_id", "user_version", "journal_mode", "auto_vacuum", "page_size")
    return [ask(path, f"PRAGMA {name}") for name in names]


@each_early_version
def test_tables_with_a_prefix_are_refused_and_the_command_is_named(application, version):
    before = application.read_bytes()
    with (
        SQLiteRepository(application, prefix="taskx_") as repository,
        pytest.raises(SchemaMismatch) as told,
    ):
        repository.count(TaskFilter())
    assert f"has schema version {version}, and this TaskX needs {schema.VERSION}" in str(told.value)
    command = f"run `taskx migrate {application} {application} --prefix taskx_`"
    assert str(told.value).endswith(command)
    assert application.read_bytes() == before


@each_early_version
def test_new_tables_replace_the_old_ones_in_the_same_file(application, version, tmp_path):
    before, waiting, settings = (
        contents(application),
        ask(application, "SELECT * FROM waiting"),
        pragmas(application),
    )
    path = str(application)
    assert copy_tasks(path, path, "taskx_") == Copied(len(before["taskx_tasks"]), version)
    after = contents(application)
    assert after["tasks"] == before["tasks"]
    assert sorted(ask(application, "SELECT * FROM waiting")) == sorted(waiting)
    assert pragmas(application) == settings
    assert len(after["taskx_tasks"]) == len(before["taskx_tasks"])
    found = {name for _, name, _ in schema_of(application)} - {"tasks", "waiting"}
    assert found == {
        f"taskx_{name}".replace("taskx_sqlite_autoindex_", "sqlite_autoindex_taskx_")
        for name in {"schema", *(name for _, name, _ in new_schema(tmp_path))}
    }
    queue = Queue(SQLiteRepository(application, prefix="taskx_"))
    queue.declare("later")
    queue.submit("later", id="one more")
    assert queue.count_tasks() == len(before["taskx_tasks"]) + 1
    assert [*queue.schedules()] == ["rests", "ticks"]
    assert not [check for check in queue.diagnose().checks if check.level == "fail"]
    queue.close()


def test_tables_with_a_prefix_are_copied_into_the_file_of_another_application(
    application, tmp_path
):
    other = tmp_path / "other.db"
    with pytest.raises(RepositoryUnavailable, match="the application creates its file"):
        copy_tasks(str(application), str(other), "taskx_")
    assert not other.exists()
    change(other, "PRAGMA journal_mode = WAL", "CREATE TABLE own (x)")
    settings, before = pragmas(other), application.read_bytes()
    copy_tasks(str(application), str(other), "taskx_")
    assert application.read_bytes() == before
    assert pragmas(other) == settings
    assert len(ids(other, "taskx_")) == len(contents(application)["taskx_tasks"])


def test_a_file_is_migrated_into_itself(old, version, tmp_path):
    tasks = len(contents(old)["tasks"])
    assert copy_tasks(str(old), str(old)) == Copied(tasks, version)
    assert schema_of(old) == new_schema(tmp_path)
    assert len(ids(old)) == tasks
    with pytest.raises(ConfigurationError, match=r"which need not be migrated"):
        copy_tasks(str(old), str(old))


def test_a_file_without_tables_of_the_prefix_is_told(application, tmp_path):
    with pytest.raises(ConfigurationError, match="has no tables of TaskX with the prefix other_"):
        copy_tasks(str(application), str(application), "other_")
    with pytest.raises(ConfigurationError, match="prefix must be"):
        copy_tasks(str(application), str(application), "1")


def test_notes_are_those_of_the_old_file(old, new):
    """A pause of the same type that was set in the new file before is replaced."""
    change(old, "UPDATE notes SET version = 7")
    [(name,)] = ask(old, "SELECT name FROM notes WHERE name LIKE 'pause%'")
    queue = Queue(SQLiteRepository(new))
    queue.declare("paused")
    queue.pause("paused")
    queue.close()
    copy_tasks(str(old), str(new))
    assert ask(new, f"SELECT version FROM notes WHERE name = '{name}'") == [(7,)]
