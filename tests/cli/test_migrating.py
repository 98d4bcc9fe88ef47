"""``taskx migrate``."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from types import SimpleNamespace

import pytest
from storage.kept import contents, kept

from cli.conftest import call
from taskx import Queue, SQLiteRepository
from taskx.programs.cli import migrating


@pytest.fixture
def old(tmp_path):
    """A file of schema version 3."""
    path = tmp_path / "tasks.db"
    shutil.copyfile(kept(3), path)
    return path


@pytest.fixture
def tasks(old):
    """The number of tasks in the file."""
    return len(contents(old)["tasks"])


def test_tasks_are_copied_into_a_new_file(old, tasks, tmp_path):
    new = tmp_path / "new.db"
    said = call("migrate", str(old), str(new))
    assert (said.code, said.err) == (0, "")
    assert said.out == (
        f"copied {tasks} tasks of schema version 3 from {old} to {new}; "
        f"start your programs with {new}\n"
    )
    assert len(call("list", "--json", "--repository", str(new)).rows) == tasks
    assert old.read_bytes() == kept(3).read_bytes()


def test_the_same_file_may_be_named_twice(old, tasks):
    said = call("migrate", str(old), str(old))
    assert said.out == (
        f"copied {tasks} tasks of schema version 3 in {old}; start your programs with {old}\n"
    )


def test_json_is_one_object(old, tasks, tmp_path):
    said = call("migrate", str(old), str(tmp_path / "new.db"), "--json")
    assert said.rows == [{"tasks": tasks, "version": 3}]


def test_a_prefix_is_that_of_both_files(tmp_path):
    paths = tmp_path / "one.db", tmp_path / "two.db"
    for path in paths:
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
    queue = Queue(SQLiteRepository(paths[0], prefix="taskx_"))
    queue.declare("email")
    queue.submit("email", id="one")
    queue.close()
    said = call("migrate", *map(str, paths), "--prefix", "taskx_")
    assert said.out.startswith("copied 1 task of schema version 5 ")
    url = f"sqlite:///{paths[1]}?prefix=taskx_"
    assert [row["id"] for row in call("list", "--json", "--repository", url).rows] == ["one"]


def test_the_numbers_are_shown_on_a_terminal(old, tasks, tmp_path, monkeypatch):
    terminal = SimpleNamespace(stderr=SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(migrating, "sys", terminal)
    said = call("migrate", str(old), str(tmp_path / "new.db"))
    assert said.err == f"\r{tasks} of {tasks} tasks \n"


def test_a_file_in_use_is_exit_code_five(old, tmp_path):
    with closing(sqlite3.connect(old)) as program:
        program.execute("SELECT count(*) FROM tasks").fetchall()
        said = call("migrate", str(old), str(tmp_path / "new.db"))
    assert said.code == 5
    assert "another program uses" in said.err
    assert [*tmp_path.iterdir()] == [old]


def test_a_copy_over_tasks_is_exit_code_two(old, tmp_path):
    new = str(tmp_path / "new.db")
    assert call("migrate", str(old), new).code == 0
    said = call("migrate", str(old), new)
    assert (said.code, f"{new} has tasks already" in said.err) == (2, True)


def test_an_interrupt_is_exit_code_130_and_leaves_no_file(old, tmp_path, monkeypatch):
    def interrupt(old, new, prefix, progress):
        raise KeyboardInterrupt

    monkeypatch.setattr(migrating, "copy_tasks", interrupt)
    assert call("migrate", str(old), str(tmp_path / "new.db")).code == 130
