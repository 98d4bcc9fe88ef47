"""The kept files of every schema version, the refusal of early ones, and migrations in place."""

from __future__ import annotations

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

from taskx import Queue, RepositoryError, SchemaMismatch, SQLiteRepository, TaskFilter
from taskx.stores.sqlite import schema
from taskx.tasks.record import DEFAULTS

from .kept import FOLDER, contents, kept, run_all, schema_of, version_of

ROOT = FOLDER.parent.parent.parent
ALL = range(1, schema.VERSION + 1)

#: A migration as a later TaskX may have one. The file of the present version is migrated with it.
NEXT = (
    "ALTER TABLE tasks ADD COLUMN mood TEXT NOT NULL DEFAULT ''",
    "CREATE INDEX tasks_mood ON tasks (mood) WHERE mood <> ''",
)
#: A TaskX that has that migration, in another process. ``statements`` is what it iterates over.
LATER = f"""
    import os, signal, sys
    from taskx import SQLiteRepository, TaskFilter
    from taskx.stores.sqlite import schema

    NEXT = {NEXT!r}

    def use(statements):
        schema.MIGRATIONS += (statements,)
        schema.VERSION += 1
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tasks.db"


@pytest.fixture
def present(path):
    """A file of the present version."""
    shutil.copyfile(kept(schema.VERSION), path)
    return path


@pytest.fixture
def later(monkeypatch):
    """Return a function that makes this a TaskX with one more migration."""

    def later(statements=NEXT):
        monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, statements))
        monkeypatch.setattr(schema, "VERSION", schema.VERSION + 1)

    return later


# The kept files


@pytest.mark.parametrize("version", ALL[schema.FIRST - 1 :])
def test_a_schema_does_not_change_without_a_new_version(version, path):
    """The migrations make the same schema as the stored file, which the version's own code made."""
    how = "python tests/storage/versions/make.py"
    assert kept(version).exists(), f"a new version needs a file: {how} {kept(version)}"
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statements in schema.MIGRATIONS[: version - schema.FIRST + 1]:
            for statement in statements:
                connection.execute(statement)
    assert version_of(kept(version)) == version
    assert schema_of(path) == schema_of(kept(version)), (
        f"version {version} of the schema was changed. If it was released, add a version instead; "
        f"if it was not, make its file again: {how} {kept(version)}"
    )


@pytest.mark.parametrize("version", ALL)
def test_every_column_of_a_kept_file_holds_something(version):
    defaults = {**DEFAULTS, "stopping": 0}
    for table, rows in contents(kept(version)).items():
        assert rows
        for column in rows[0]:
            values = {row[column] for row in rows}
            assert values - {defaults.get(column)}, f"{table}.{column}"


def test_a_file_of_the_present_version_is_used(present):
    with SQLiteRepository(present) as repository, repository.house.only_existing():
        tasks = repository.list(TaskFilter())
    assert tasks
    assert not [task.damage for task in tasks if task.damage]
    queue = Queue(SQLiteRepository(present))
    queue.declare("later")
    new = queue.submit("later", tags=["new", "red"])
    assert [task.id for task in queue.iter_tasks(tag="new")] == [new.id]
    assert queue.count_tasks(tag="red") == 2
    queue.close()


def test_the_tasks_of_a_file_of_the_present_version_run_to_their_ends(present):
    assert run_all(SQLiteRepository(present)) > 0, "the schedules go on"


# Early versions


@pytest.mark.parametrize("version", ALL[: schema.FIRST - 1])
def test_a_file_of_an_early_version_is_refused_and_the_command_is_named(version, tmp_path):
    path = tmp_path / "my tasks.db"
    shutil.copyfile(kept(version), path)
    with SQLiteRepository(path) as repository, pytest.raises(SchemaMismatch) as told:
        repository.count(TaskFilter())
    assert f"has schema version {version}, and this TaskX needs {schema.VERSION}" in str(told.value)
    assert str(told.value).endswith(f"run `taskx migrate '{path}' NEW`")
    assert path.read_bytes() == kept(version).read_bytes()
    assert [*tmp_path.iterdir()] == [path]


# Migrations in place


def test_a_migrated_file_keeps_all_its_data(present, later):
    before = contents(present)
    later()
    with SQLiteRepository(present) as repository:
        assert repository.count(TaskFilter()) == len(before["tasks"])
    assert version_of(present) == schema.VERSION
    after = contents(present)
    assert {row.pop("mood") for row in after["tasks"]} == {""}
    assert after == before


def test_a_migrated_file_has_the_schema_of_a_new_one(present, later, tmp_path):
    later()
    for path in (present, tmp_path / "new.db"):
        with SQLiteRepository(path) as repository:
            repository.count(TaskFilter())
    assert schema_of(present) == schema_of(tmp_path / "new.db")


def later_program(program: str, path: Path, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            textwrap.dedent(LATER) + textwrap.dedent(program),
            str(path),
            *map(str, args),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": str(ROOT)},
    )


@pytest.mark.process
@pytest.mark.parametrize("done", range(len(NEXT) + 1))
def test_a_killed_migration_is_undone(present, done, later):
    """The process is killed after each of the statements in turn."""
    program = """
        class Fatal(tuple):
            def __iter__(self):
                yield from self[: int(sys.argv[2])]
                os.kill(os.getpid(), signal.SIGKILL)

        use(Fatal(NEXT))
        SQLiteRepository(sys.argv[1]).count(TaskFilter())
    """
    version, before = version_of(present), contents(present)
    with later_program(program, present, done) as child:
        child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert version_of(present) == version
    assert schema_of(present) == schema_of(kept(version))
    assert contents(present) == before
    later()
    with SQLiteRepository(present) as repository:
        assert repository.count(TaskFilter()) == len(before["tasks"])
    assert version_of(present) == version + 1


@pytest.mark.parametrize("done", range(len(NEXT) + 1))
def test_a_failed_migration_is_undone(present, done, later):
    """Each of the statements fails in turn."""
    version, before = version_of(present), contents(present)
    later((*NEXT[:done], "CREATE NONSENSE", *NEXT[done:]))
    with (
        SQLiteRepository(present) as repository,
        pytest.raises(RepositoryError, match="syntax error"),
    ):
        repository.count(TaskFilter())
    assert version_of(present) == version
    assert schema_of(present) == schema_of(kept(version))
    assert contents(present) == before


@pytest.mark.process
def test_only_one_of_several_processes_migrates_a_file(present):
    program = """
        class Told(tuple):
            def __iter__(self):
                print("migrates", flush=True)
                return super().__iter__()

        use(Told(NEXT))
        print("ready", flush=True)
        sys.stdin.readline()
        print(SQLiteRepository(sys.argv[1]).count(TaskFilter()), flush=True)
    """
    with ExitStack() as stack:
        children = [stack.enter_context(later_program(program, present)) for _ in range(4)]
        for child in children:
            assert child.stdout.readline() == "ready\n"
        for child in children:
            child.stdin.write("\n")
            child.stdin.flush()
        told = [child.communicate(timeout=PATIENCE)[0].split() for child in children]
    count = str(len(contents(present)["tasks"]))
    assert sorted(map(len, told)) == [1, 1, 1, 2]
    assert all(words[-1] == count for words in told)
    assert version_of(present) == schema.VERSION + 1


def test_a_repository_that_must_not_migrate_refuses_a_file_of_the_version_before(present, later):
    before = present.read_bytes()
    later()
    with (
        SQLiteRepository(present) as repository,
        repository.house.only_existing(),
        pytest.raises(SchemaMismatch, match=r"Start a queue .* which migrates it"),
    ):
        repository.count(TaskFilter())
    assert present.read_bytes() == before
    assert [*present.parent.iterdir()] == [present]
