"""The examination of a SQLite file: what is wrong with it and with what is around it."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections import namedtuple
from contextlib import closing

import pytest

from taskx import Queue, SQLiteRepository
from taskx.stores.sqlite import examination, schema
from taskx.stores.sqlite.examination import file_system_of
from taskx.tasks.timing import Timing

WRONG = ("warn", "fail")


@pytest.fixture
def file(database):
    """The path of a file with a task; it is closed."""
    with SQLiteRepository(database) as repository:
        queue = Queue(repository)
        queue.declare("mail")
        queue.submit("mail")
    return database


def examined(path, **options):
    """Return the checks by their names."""
    return {check.name: check for check in SQLiteRepository(path, **options).house.examine()}


def wrong(path, **options):
    """Return the levels of what is wrong, by name."""
    return {n: check.level for n, check in examined(path, **options).items() if check.level != "ok"}


def listing(path):
    return {
        name: (path.parent / name).read_bytes() if (path.parent / name).is_file() else None
        for name in os.listdir(path.parent)
    }


@pytest.fixture(autouse=True)
def local_disk(monkeypatch):
    """The machine of the tests may have its temporary files in memory, or a full disk."""
    monkeypatch.setattr(examination, "file_system_of", lambda path: "ext4")
    usage = namedtuple("usage", "total used free")(1 << 40, 0, 1 << 40)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


def test_nothing_is_wrong_with_a_good_file_and_nothing_is_changed(file):
    before = listing(file)
    checks = examined(file)
    assert wrong(file) == {}
    assert {"sqlite", "disk", "file", "schema", "integrity", "write lock", "locks"} <= {*checks}
    assert all(check.sentence.endswith(".") and not check.advice for check in checks.values())
    assert listing(file) == before


def test_a_missing_file_is_not_created(database):
    assert wrong(database) == {"file": "fail"}
    assert list(database.parent.iterdir()) == []


def test_a_missing_folder_is_named(tmp_path):
    checks = examined(tmp_path / "missing" / "tasks.db")
    assert (checks["folder"].level, checks["file"].level) == ("fail", "fail")
    assert f"no folder {tmp_path}/missing" in checks["folder"].sentence


def test_the_file_of_another_program_fails_and_is_not_changed(database):
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("CREATE TABLE others (x)")
    before = listing(database)
    assert wrong(database) == {"schema": "fail"}
    assert "another program" in examined(database)["schema"].sentence
    assert listing(database) == before


def test_a_file_of_an_application_must_have_a_write_ahead_log(database):
    """TaskX stores nothing there before the application has made it one."""
    for statement in ("SELECT 1", "CREATE TABLE others (x)"):
        with closing(sqlite3.connect(database)) as connection:
            connection.execute(statement)
        before = listing(database)
        assert wrong(database, prefix="p_")["schema"] == "fail"
        assert "TaskX requires WAL" in examined(database, prefix="p_")["schema"].sentence
        assert listing(database) == before
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
    before = listing(database)
    assert wrong(database, prefix="p_") == {"schema": "warn"}
    assert "no tables of TaskX yet" in examined(database, prefix="p_")["schema"].sentence
    assert listing(database) == before


def test_a_text_file_fails(database):
    database.write_text("no database, but long enough to have a header of its own" * 10)
    assert wrong(database) == {"file": "fail"}


@pytest.mark.parametrize(
    ("version", "words"),
    [(schema.FIRST - 1, "run `taskx migrate "), (schema.VERSION + 1, "Upgrade taskx-queue")],
)
def test_a_schema_version_that_cannot_be_used_fails(file, version, words):
    with closing(sqlite3.connect(file)) as connection:
        connection.execute(f"PRAGMA user_version = {version}")
    assert wrong(file) == {"schema": "fail"}
    sentence = examined(file)["schema"].sentence
    assert f"has schema version {version}" in sentence
    assert words in sentence


def test_a_schema_version_that_is_migrated_in_place_is_a_warning(file, monkeypatch):
    monkeypatch.setattr(schema, "VERSION", schema.VERSION + 1)
    assert wrong(file) == {"schema": "warn"}
    assert f"and this TaskX uses {schema.VERSION}" in examined(file)["schema"].sentence


def test_a_damaged_file_fails(file):
    pages = bytearray(file.read_bytes())
    pages[3 * 2048 : 4 * 2048] = os.urandom(2048)
    file.write_bytes(pages)
    assert "fail" in wrong(file).values()


def test_a_file_that_another_process_has_locked_is_a_warning(file):
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        soon = Timing(examine_within=0.01)
        assert wrong(file, timing=soon) == {"write lock": "warn"}
        connection.execute("ROLLBACK")
    assert wrong(file) == {}


def test_a_large_log_is_a_warning(file, monkeypatch):
    monkeypatch.setattr(examination, "LARGE_LOG", 1)
    with SQLiteRepository(file) as repository:
        queue = Queue(repository)
        queue.declare("mail")
        queue.submit("mail")
        assert wrong(file) == {"log": "warn"}


@pytest.mark.parametrize(("free", "level"), [(1 << 20, "fail"), (1 << 29, "warn")])
def test_a_disk_that_is_nearly_full_is_told(file, monkeypatch, free, level):
    usage = namedtuple("usage", "total used free")(1 << 40, 0, free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert wrong(file) == {"disk": level}


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "tmpfs", "overlay"])
def test_a_file_system_that_can_lose_tasks_is_a_warning(file, monkeypatch, kind):
    monkeypatch.setattr(examination, "file_system_of", lambda path: kind)
    assert wrong(file) == {"file system": "warn"}
    assert kind in examined(file)["file system"].sentence


def test_locks_that_two_processes_get_at_once_fail(file, monkeypatch):
    monkeypatch.setattr(examination, "_locked", lambda fd: True)
    assert wrong(file) == {"locks": "fail"}


def test_a_file_that_this_user_cannot_write_fails(file, monkeypatch):
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    assert wrong(file) == {"permissions": "fail"}


def test_the_file_system_of_a_path_is_that_of_its_nearest_mount(tmp_path):
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "/dev/sda1 / ext4 rw 0 0\n"
        "host:/home /srv/a\\040folder nfs4 rw 0 0\n"
        "tmpfs /srv tmpfs rw 0 0\n"
        "overlay / overlay rw 0 0\n"
    )
    where = str(mounts)
    assert file_system_of("/srv/a folder/tasks.db", where) == "nfs4"
    assert file_system_of("/srv/tasks.db", where) == "tmpfs"
    assert file_system_of("/srvtasks.db", where) == "overlay"
    assert file_system_of("/tasks.db", str(tmp_path / "missing")) is None
