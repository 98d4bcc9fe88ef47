"""The SQLite file: opening, sharing, filling and damaging it."""

import collections
import contextlib
import ctypes
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import threading
from datetime import datetime, timedelta, timezone
from functools import partial
from itertools import product
from operator import methodcaller
from pathlib import Path

import pytest
from helpers import PATIENCE, connections_of, open_readers, reading, run_in_thread

from taskx import (
    ConfigurationError,
    Queue,
    RepositoryCorrupt,
    RepositoryError,
    RepositoryUnavailable,
    SchemaMismatch,
    SQLiteRepository,
    Task,
    TaskFilter,
    TaskStatus,
    open_repository,
)
from taskx.stores.liveness.base import Node
from taskx.stores.queries import Changes, pages, shown
from taskx.stores.sql.statements import ANYWHERE
from taskx.stores.sqlite import connections, schema
from taskx.stores.sqlite.dialect import statements as statements_of
from taskx.stores.sqlite.writing import of_several
from taskx.tasks import lifecycle
from taskx.tasks.ids import new_id
from taskx.tasks.lifecycle import FINISHED
from taskx.tasks.record import STUB
from taskx.tasks.timing import DEFAULT_TIMING
from taskx.tasks.writes import PRESENT, Update

statements = statements_of()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tasks.db"


@pytest.fixture
def repository(path, timing):
    with SQLiteRepository(path, busy_timeout=0.2, timing=timing) as repository:
        yield repository


@pytest.fixture
def connect(path):
    """Open connections to the file as other programs do."""
    with contextlib.ExitStack() as stack:

        def connect(**options):
            connection = sqlite3.connect(path, isolation_level=None, **options)
            return stack.enter_context(contextlib.closing(connection))

        yield connect


def task(task_id, type="t", **fields):
    return Task(id=task_id, type=type, **fields)


def insert(task_id, params="{}"):
    return lifecycle.create(task_id=task_id, type="t", params=params, created_by="", now=0)


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def ids(repository):
    return sorted(task.id for task in repository.list(TaskFilter()))


class TestOpening:
    def test_the_constructor_does_no_io(self, repository, path):
        assert not path.exists()
        assert str(path) in repr(repository)
        assert repository.count(TaskFilter()) == 0
        assert path.exists()

    def test_the_file_opens_while_another_process_removes_its_log(
        self, repository, path, monkeypatch
    ):
        """The last connection to close removes the log."""
        repository.count(TaskFilter())
        size = os.path.getsize

        def gone(name):
            if str(name).endswith("-wal"):
                raise FileNotFoundError(name)
            return size(name)

        monkeypatch.setattr(os.path, "getsize", gone)
        with SQLiteRepository(path) as another:
            assert another.count(TaskFilter()) == 0

    def test_a_new_file_is_marked_as_taskx_and_in_wal_mode(self, repository, connect):
        repository.create(task("a"))
        other = connect()
        pragmas = {
            name: other.execute(f"PRAGMA {name}").fetchone()[0]
            for name in (
                "journal_mode",
                "application_id",
                "user_version",
                "auto_vacuum",
                "page_size",
            )
        }
        assert pragmas == {
            "journal_mode": "wal",
            "application_id": 0x54736B58,
            "user_version": schema.VERSION,
            "auto_vacuum": 2,
            "page_size": connections.PAGE_SIZE,
        }

    def test_stored_tasks_are_there_after_reopening(self, repository):
        repository.create(task("a"))
        repository.close()
        repository.close()
        assert ids(repository) == ["a"]
        repository.create(task("b"))
        assert ids(repository) == ["a", "b"]

    def test_an_empty_file_is_accepted(self, repository, path):
        """``tempfile`` creates such files."""
        path.touch()
        repository.create(task("a"))
        assert ids(repository) == ["a"]

    def test_special_characters_in_a_path_have_no_meaning(self, tmp_path):
        for name in ("a?mode=memory", "b#c", "d%41", "e f", "é☃", "file:x"):
            with SQLiteRepository(tmp_path / name) as repository:
                repository.create(task("a"))
            assert (tmp_path / name).exists()

    @pytest.mark.parametrize("path", ["", ":memory:", "nul\0byte", b"bytes", None, 5])
    def test_an_invalid_path_is_refused(self, path):
        with pytest.raises(ConfigurationError, match="must be the path of a file, not "):
            SQLiteRepository(path)

    @pytest.mark.parametrize("url", [5, None, b"sqlite:///tasks.db", Path("tasks.db")])
    def test_a_url_that_is_no_text_is_refused(self, url):
        with pytest.raises(ConfigurationError, match="url must be a str"):
            open_repository(url)

    @pytest.mark.parametrize("options", [{"durability": "none"}, {"busy_timeout": -1}])
    def test_options_are_checked(self, path, options):
        with pytest.raises(ConfigurationError, match=next(iter(options))):
            SQLiteRepository(path, **options)

    def test_a_url_can_name_the_file_and_its_options(self, path):
        with open_repository(f"sqlite:///{path}?durability=full") as repository:
            repository.create(task("a"))
            assert (repository.durability, ids(repository)) == ("full", ["a"])

    @pytest.mark.process
    def test_twelve_processes_can_create_the_file_at_once(self, tmp_path):
        """Each one creates the same file, switches it to WAL and writes. None fails."""
        program = """
            import sys
            from taskx import SQLiteRepository, Task
            for line in sys.stdin:
                path, name = line.rstrip().split("|")
                with SQLiteRepository(path, "process", busy_timeout=60) as repository:
                    repository.create(Task(id=name, type="t"))
                print("stored", flush=True)
        """
        children = [start_program(program) for _ in range(12)]
        for round_ in range(6):
            path = tmp_path / f"{round_}.db"
            for number, child in enumerate(children):
                child.stdin.write(f"{path}|{number}\n")
                child.stdin.flush()
            assert [child.stdout.readline() for child in children] == ["stored\n"] * 12
            with SQLiteRepository(path) as repository:
                assert ids(repository) == sorted(map(str, range(12)))
        for child in children:
            finish(child)


def start_program(program, *args):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(child):
    with child:
        output, _ = child.communicate(timeout=PATIENCE)
    assert child.returncode == 0
    return output


class TestRefusedFiles:
    """Files of others are refused with one clear sentence, and not changed."""

    def refused(self, repository, error, match):
        for operation in (
            lambda: repository.create(task("a")),
            lambda: repository.get_by_id("a"),
            lambda: repository.liveness.join(Node(id="n", name="n")),
        ):
            with pytest.raises(error, match=match) as caught:
                operation()
            assert str(repository.path) in str(caught.value)

    def test_a_file_that_is_no_database_is_refused(self, repository, path):
        path.write_bytes(b"To whom it may concern\n" * 1000)
        before = files(path.parent)
        self.refused(repository, RepositoryCorrupt, "is not an SQLite database")
        assert files(path.parent) == before

    def test_a_folder_is_refused(self, repository, path):
        path.mkdir()
        self.refused(repository, RepositoryUnavailable, "it is a folder")

    def test_a_file_in_a_missing_folder_is_refused(self, tmp_path):
        with SQLiteRepository(tmp_path / "no" / "tasks.db") as repository:
            self.refused(repository, RepositoryUnavailable, f"there is no folder {tmp_path}/no")

    @pytest.mark.process
    @pytest.mark.parametrize("log", ["none", "closed", "left behind"])
    def test_another_programs_database_is_refused(self, repository, path, log):
        """It may or may not have a write-ahead log, which a reader might write back into the file."""
        program = """
            import os, sqlite3, sys
            connection = sqlite3.connect(sys.argv[1], isolation_level=None)
            if sys.argv[2] != "none":
                connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("CREATE TABLE notes (text)")
            connection.execute("INSERT INTO notes VALUES ('keep me')")
            if sys.argv[2] == "left behind":
                os._exit(0)
            connection.close()
        """
        finish(start_program(program, path, log))
        before = files(path.parent)
        assert ("tasks.db-wal" in before) == (log == "left behind")
        self.refused(repository, SchemaMismatch, "database of another program")
        after = files(path.parent)
        before.pop("tasks.db-shm", None)  # an index of the log, which every reader may create again
        after.pop("tasks.db-shm", None)
        assert after == before

    def test_an_empty_file_marked_by_another_program_is_refused(self, repository, path, connect):
        connect().execute("PRAGMA application_id = 7")
        self.refused(repository, SchemaMismatch, "application_id 0x7")

    def test_a_file_of_a_newer_version_is_refused(self, repository, path, connect):
        repository.create(task("a"))
        other = connect()
        other.execute(f"PRAGMA user_version = {schema.VERSION + 1}")
        repository.close()
        other.close()
        before = files(path.parent)
        self.refused(repository, SchemaMismatch, "Upgrade taskx-queue")
        assert files(path.parent) == before

    def test_a_damaged_file_is_reported(self, repository, path):
        for number in range(200):
            repository.create(task(str(number), params={"x": "y" * 1000}))
        repository.close()
        size = path.stat().st_size
        with open(path, "r+b") as file:
            file.seek(4096)
            file.write(b"\xff" * (size - 4096))
        with pytest.raises(RepositoryCorrupt, match="is damaged"):
            repository.list(TaskFilter())

    @pytest.mark.process
    @pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no other user without fork")
    @pytest.mark.parametrize("folder_mode", [0o555, 0o755])
    def test_a_read_only_file_is_reported(self, folder_mode):
        """If this user is root, whom permissions do not stop, the test runs as another user."""
        folder = Path(tempfile.mkdtemp())
        try:
            folder.chmod(0o755)
            with SQLiteRepository(folder / "tasks.db") as repository:
                repository.create(task("a"))
            (folder / "tasks.db").chmod(0o444)
            folder.chmod(folder_mode)
            outcome = as_unprivileged(create_in, folder / "tasks.db")
        finally:
            folder.chmod(0o755)
            shutil.rmtree(folder)
        assert outcome.startswith("RepositoryUnavailable: ")
        assert "read-only" in outcome or "no permission" in outcome


def test_a_read_only_file_system_is_named(repository, monkeypatch):
    repository.create(task("a"))
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    connections = connections_of(repository)
    error = connections.translated(sqlite3.OperationalError("unable to open database file"))
    assert isinstance(error, RepositoryUnavailable)
    folder = os.path.dirname(connections.file.path)
    assert str(error).endswith(f"also to read, and this user cannot write to {folder}")


def create_in(path):
    with SQLiteRepository(path) as repository:
        repository.create(task("b"))


def as_unprivileged(function, *args):
    """Return the error that a call raised in a forked child that is not root, as text."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        outcome = "nothing was raised"
        try:
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            function(*args)
        except BaseException as error:  # noqa: BLE001  (the error is the outcome)
            outcome = f"{type(error).__name__}: {error}"
        os.write(write, outcome.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        outcome = pipe.read()
    os.waitpid(child, 0)
    return outcome


MADE = "018cc251-f400-7851-a960-fbefa5d418a5"  # as ``new_id`` makes them
MOMENT = datetime(2024, 1, 1, tzinfo=timezone.utc)


class TestStatements:
    """The frequent statements find their rows through an index, however many finished tasks there are."""

    @pytest.fixture
    def plan(self, repository, connect):
        repository.count(TaskFilter())
        connection = connect()

        def plan(sql, values):
            return [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}", values)]

        return plan

    def test_the_tasks_to_start_next_are_read_in_the_order_of_an_index(self, plan):
        for query in (
            (statements.ready(1), ("", "t", 5)),
            (statements.ready_at, ("", "t", 0, 5)),
        ):
            [step] = plan(*query)
            assert step.startswith("SEARCH tasks USING INDEX tasks_ready")

    def test_ready_tasks_are_counted_in_an_index(self, plan):
        steps = plan(statements.count_ready, ("", "t", 5))
        [search] = [step for step in steps if "tasks" in step]
        assert search == "SEARCH tasks USING COVERING INDEX tasks_ready (owner=? AND type=?)"

    @pytest.mark.parametrize("status", FINISHED)
    def test_the_newest_ended_tasks_are_read_in_the_order_of_an_index(self, plan, status):
        [step] = plan(statements.newest(status, ("type", "traceback")), (5,))
        assert step == f"SCAN tasks USING INDEX tasks_{status}"

    @pytest.mark.parametrize(
        ("column", "index"), [("run_at", "tasks_held"), ("expires_at", "tasks_expiring")]
    )
    def test_each_time_that_comes_has_an_index(self, plan, column, index):
        [step] = plan(statements.due[column], (0, 5))
        assert step.startswith("SEARCH tasks USING")
        assert f"INDEX {index}" in step

    @pytest.mark.parametrize("count", [1, 2])
    @pytest.mark.parametrize(
        ("column", "index"),
        [
            ("unique_lock", "tasks_unique (unique_lock=?)"),
            ("turn", "tasks_turn (turn=?)"),
            ("waiting_on", "tasks_waiting (waiting_on=?)"),
            ("line", "tasks_in_line (concurrency_key=?)"),
            ("running_on", "tasks_running (owner=?)"),
            ("buffered_on", "tasks_ready (owner=?)"),
            ("stuck_on", "tasks_stuck (stuck_on=?)"),
        ],
    )
    def test_each_lookup_column_has_an_index(self, plan, column, index, count):
        for limited in (False, True):
            sql, values = statements.find(column, ["x"] * count, STUB, limited)
            search, *rest = plan(sql, [*values, *[9] * limited])
            assert search == f"SEARCH tasks USING INDEX {index}"
            assert not rest or (column, count) == ("line", 2)

    @pytest.mark.parametrize("count", [1, 3])
    def test_tasks_are_found_by_the_keys_in_their_ids(self, plan, count):
        made = [new_id() for _ in range(count)]
        first, *lists = plan(*statements.find("id", made, STUB, False))
        assert first == "SEARCH tasks USING INTEGER PRIMARY KEY (rowid=?)"
        assert not [step for step in lists if "tasks" in step]

    @pytest.mark.parametrize("count", [1, 3])
    def test_tasks_with_chosen_ids_are_found_in_a_small_index(self, plan, count):
        named = "SEARCH tasks USING INDEX tasks_named (id=?)"
        assert plan(*statements.find("id", ["x"] * count, STUB, False)) == [named]
        assert plan(*statements.find_elsewhere([new_id()] * count, STUB)) == [named]
        mixed = plan(*statements.find("id", ["x", *[new_id()] * count], STUB, False))
        assert {step for step in mixed if "tasks" in step} == {
            named,
            "SEARCH tasks USING INTEGER PRIMARY KEY (rowid=?)",
        }

    @pytest.mark.parametrize(
        ("made", "step"),
        [(True, "INTEGER PRIMARY KEY (rowid=?)"), (False, "INDEX tasks_named (id=?)")],
    )
    def test_tasks_that_get_their_values_at_once_are_each_found_through_an_index(
        self, plan, made, step
    ):
        task_id = new_id() if made else "x"
        guard = {"status": "running", "starts": 1}
        sql, values = statements.update((task_id,), guard, {"status": "completed", "result": ""})
        steps = plan(of_several(sql, 64), [*values] * 64)
        assert [one for one in steps if " tasks " in one] == [f"SEARCH tasks USING {step}"]

    @pytest.mark.parametrize("count", [1, 2])
    def test_children_are_found_through_an_index(self, plan, count):
        query = statements.find("parent", ["x"] * count, ("parent", "id"), False)
        assert plan(*query) == [
            "SEARCH parents USING PRIMARY KEY (parent=?)",
            "SEARCH tasks USING INTEGER PRIMARY KEY (rowid=?)",
        ]

    @pytest.mark.parametrize(
        ("column", "index"),
        [
            ("waiting_on", "tasks_waiting"),
            ("line", "tasks_in_line"),
            ("running_on", "tasks_running"),
            ("buffered_on", "tasks_ready"),
            ("stuck_on", "tasks_stuck"),
            ("ready_type", "tasks_ready"),
        ],
    )
    def test_the_values_of_a_column_are_read_from_its_index(self, plan, column, index):
        """It takes one step for each value, however many rows have it."""
        whole = (
            plan(statements.ready_types, ("", 1))
            if column == "ready_type"
            else plan(statements.walk(statements.steps[column]), ("", 1))
        )
        assert "RECURSIVE STEP" in whole
        steps = [step for step in whole if " tasks " in step]
        assert steps
        assert all(step.startswith("SEARCH tasks USING") for step in steps)
        assert all(f" INDEX {index} " in f"{step} " for step in steps), steps

    def test_priorities_are_read_from_an_index_one_step_each(self, plan):
        steps = plan(statements.walk(statements.lower_priority), ("", "t", 9, "", "t", 9))
        assert all("INDEX tasks_ready (" in step for step in steps if " tasks " in step)

    def test_ended_tasks_are_found_in_the_index_of_their_status(self, plan):
        [step] = plan(statements.ended("failed"), (1, 1, 1))
        assert "INDEX tasks_failed (" in step

    @pytest.mark.parametrize("status", [None, *TaskStatus])
    @pytest.mark.parametrize("prefix", ["0", "01a2b3c4-d", "x"])
    def test_tasks_are_found_by_the_beginning_of_their_id_among_keys_and_chosen_ids(
        self, plan, status, prefix
    ):
        wanted = TaskFilter(id_prefix=prefix, status=status)
        index = "SEARCH tasks USING INDEX tasks_named (id>? AND id<?)"
        keys = "SEARCH tasks USING INTEGER PRIMARY KEY (rowid>? AND rowid<?)"
        for query in (
            statements.list_tasks(wanted),
            statements.list_tasks(wanted, "seq < ?", (1,)),
            statements.count_tasks(wanted),
            statements.count_tasks(wanted, 5),
        ):
            steps = {s.replace("COVERING ", "") for s in plan(*query) if " tasks" in s}
            assert index in steps
            assert (keys in steps) is (prefix != "x")
            each = {f"SEARCH tasks USING INDEX tasks_{status} (seq=? AND rowid=?)"}
            each.add("SEARCH tasks USING INTEGER PRIMARY KEY (rowid=?)")
            assert steps <= {index, keys} | each

    @pytest.mark.parametrize(
        "condition", [{"error": "x"}, {"params": {"a": 1}}, {"error_type": "x"}]
    )
    def test_a_search_follows_the_index_of_a_status_or_of_the_dates(self, plan, condition):
        """It reads newest first, so a page ends when it is full, and no other status is read."""
        for status in ("completed", "failed", "cancelled"):
            for wanted in (
                TaskFilter(status=status, **condition),
                TaskFilter(status=status, start_date=MOMENT, **condition),
            ):
                for query in (statements.list_tasks(wanted), statements.count_tasks(wanted, 5)):
                    steps = [step for step in plan(*query) if " tasks" in step]
                    assert all(f"USING INDEX tasks_{status}" in step for step in steps), steps
                    assert "USE TEMP B-TREE FOR ORDER BY" not in plan(*query)
        assert plan(*statements.list_tasks(TaskFilter(**condition))) == ["SCAN tasks"]
        [step] = plan(*statements.list_tasks(TaskFilter(start_date=MOMENT, **condition)))
        assert step == "SEARCH tasks USING INTEGER PRIMARY KEY (rowid>?)"

    def test_damaged_params_match_nothing_and_hide_nothing(self, repository, connect):
        for task_id in "abc":
            repository.create(task(task_id, params={"n": task_id}))
        for damaged in ("{", "", "[1]", "5", "{'n': 'b'}", "null"):
            connect().execute("UPDATE tasks SET params = ? WHERE id = 'b'", (damaged,))
            for value, found in (("c", ["c"]), ("b", []), (None, [])):
                wanted = TaskFilter(params={"n": value})
                assert [t.id for t in repository.list(wanted)] == found, damaged

    def test_notes_are_found_by_their_prefix_through_the_key(self, plan):
        [step] = plan(statements.notes, ("limit/", "limit0"))
        assert step == "SEARCH notes USING PRIMARY KEY (name>? AND name<?)"
        [step] = plan(statements.notes_after, ("schedule/s", "schedule0", 10))
        assert step == "SEARCH notes USING PRIMARY KEY (name>? AND name<?)"

    def test_named_notes_are_found_through_the_key(self, plan):
        [step] = plan(statements.notes_named(2), ("schedule/a", "schedule/b"))
        assert step == "SEARCH notes USING PRIMARY KEY (name=?)"

    @pytest.mark.parametrize(
        ("task_id", "index"),
        [("a", "INDEX tasks_named (id=?)"), (MADE, "INTEGER PRIMARY KEY (rowid=?)")],
    )
    def test_a_write_finds_its_task_by_its_key_or_its_chosen_id(self, plan, task_id, index):
        writes = [
            statements.update((task_id,), {"status": "pending"}, {"message": ""}),
            statements.update(
                (task_id,), {"status": ("pending", "x"), "run_at": PRESENT}, {"message": ""}
            ),
            statements.delete(task_id, {"status": ("pending",)}),
        ]
        for sql, values in writes:
            [step] = plan(sql, values)
            assert step == f"SEARCH tasks USING {index}"

    @pytest.mark.parametrize("status", list(TaskStatus))
    @pytest.mark.parametrize("build", ["list_tasks", "count_tasks"])
    def test_listing_one_status_reads_only_tasks_of_that_status(self, plan, status, build):
        steps = plan(*getattr(statements, build)(TaskFilter(status=status)))
        uses = [step for step in steps if " tasks " in f"{step} "]
        assert uses
        allowed = {
            TaskStatus.PENDING: ("INDEX tasks_ready", "INDEX tasks_held"),
            TaskStatus.RUNNING: ("INDEX tasks_running",),
        }.get(status, (f"INDEX tasks_{status}",))
        if (status, build) == (TaskStatus.PENDING, "list_tasks"):
            # This step reads the rows of the page by their numbers, which were found and sorted before.
            uses.remove("SEARCH tasks USING INTEGER PRIMARY KEY (rowid=?)")
        for step in uses:
            assert any(index in step for index in allowed), step

    def test_a_list_of_all_tasks_needs_no_sorting(self, plan):
        steps = plan(*statements.list_tasks(TaskFilter()))
        assert steps == ["SCAN tasks"]

    @pytest.mark.parametrize(
        "status", [None, *(status for status in TaskStatus if status != "running")]
    )
    def test_every_later_page_of_a_list_begins_at_its_place(self, plan, status):
        [(after, needed)] = statements.dialect.following
        place = (5, 7)[needed]
        filter = TaskFilter(status=status)
        steps = plan(*statements.list_tasks(filter, after, place, in_order=True))
        if status is not None and status.finished:
            assert steps == [f"SEARCH tasks USING INDEX tasks_{status} (seq<?)"]
        else:
            assert steps == ["SEARCH tasks USING INTEGER PRIMARY KEY (rowid<?)"]

    @pytest.mark.parametrize("fields", [{}, {"status": "failed"}, {"type": "t", "flow": "f"}])
    def test_every_page_of_a_tag_begins_at_its_place(self, plan, fields):
        filter = TaskFilter(tag="a", **fields)
        for after, place, found in [("", (), ""), ("seq < ?", (7,), " AND task<?")]:
            steps = plan(*statements.list_tasks(filter, after, place, by=("tag", "a")))
            assert steps[0] == f"SEARCH tagged USING PRIMARY KEY (tag=?{found})"
            assert steps[-1] == "SEARCH tasks USING INTEGER PRIMARY KEY (rowid=?)"
            assert not [step for step in steps if "TEMP" in step]

    def test_the_tasks_of_a_tag_are_counted_in_the_table_of_tags(self, plan):
        filter = TaskFilter(tag=["a", "b"])
        for sql, values in (
            statements.count_tasks(filter, by=("tag", "a")),
            statements.count_tasks(filter, 5, ("tag", "a")),
        ):
            steps = plan(sql, values)
            assert "SEARCH tagged USING PRIMARY KEY (tag=?)" in steps
            assert not [step for step in steps if "SEARCH tasks" in step or "SCAN tasks" in step]

    def test_each_flow_is_one_step_in_the_table_of_tags(self, plan):
        steps = [
            step
            for step in plan(statements.walk(statements.last_flow), ("x", 5))
            if "tagged" in step
        ]
        assert set(steps) == {"SEARCH tagged USING PRIMARY KEY (tag>? AND tag<?)"}

    def test_the_label_or_the_status_with_the_fewest_tasks_is_read(self, repository):
        for n in range(9):
            repository.create(task(str(n), tags=["a"] if n < 6 else ["a", "b"]))
        repository.update_status("1", TaskStatus.CANCELLED)
        repository.update_status("8", TaskStatus.CANCELLED)
        for fields, label in [
            ({"tag": "a"}, "a"),
            ({"tag": ["a", "b"]}, "b"),
            ({"tag": ["a", "none"]}, "none"),
            ({"tag": "a", "status": "pending"}, ""),
            ({"tag": ["a", "b"], "status": "pending"}, "b"),
            ({"tag": ["a", "b"], "status": "cancelled"}, ""),
            ({"tag": "a", "id_prefix": "8"}, ""),
            ({"tag": "a", "parent": "8"}, ""),
        ]:
            by = ("tag", label) if label else ANYWHERE
            assert repository.reads._rarest(TaskFilter(**fields)) == by, fields

    def test_the_creator_the_label_or_the_status_with_the_fewest_tasks_is_read(self, repository):
        for n in range(6):
            repository.create(task(str(n), created_by="ann" if n < 4 else "bob", tags=["a"]))
        repository.update_status("0", TaskStatus.CANCELLED)
        for fields, by in [
            ({"created_by": "ann"}, ("created_by", "ann")),
            ({"created_by": "ann", "tag": "a"}, ("created_by", "ann")),
            ({"created_by": "ann", "tag": "none"}, ("tag", "none")),
            ({"created_by": "ann", "status": "pending"}, ("created_by", "ann")),
            ({"created_by": "ann", "status": "cancelled"}, ANYWHERE),
            ({"created_by": "ann", "status": "pending", "type": "none"}, ANYWHERE),
            ({"created_by": ""}, ANYWHERE),
            ({"created_by": "ann", "id_prefix": "8"}, ANYWHERE),
        ]:
            assert repository.reads._rarest(TaskFilter(**fields)) == by, fields

    @pytest.mark.parametrize("fields", [{}, {"status": "pending"}, {"type": "t", "error": "x"}])
    def test_every_page_of_a_creator_begins_at_its_place(self, plan, fields):
        filter = TaskFilter(created_by="ann", **fields)
        for after, place, found in [("", (), ""), ("seq < ?", (7,), " AND rowid<?")]:
            steps = plan(*statements.list_tasks(filter, after, place, ("created_by", "ann")))
            assert steps == [f"SEARCH tasks USING INDEX tasks_created_by (created_by=?{found})"]

    def test_the_tasks_of_a_creator_are_counted_in_their_index(self, plan):
        query = statements.count_tasks(TaskFilter(created_by="ann"), by=("created_by", "ann"))
        [step] = plan(*query)
        assert step == "SEARCH tasks USING COVERING INDEX tasks_created_by (created_by=?)"

    @pytest.mark.parametrize("after", [("", ()), ("seq < ?", (7,))])
    def test_pending_tasks_of_a_type_are_found_at_once(self, plan, after):
        """So a type that few tasks have, or none, costs nothing for the others that wait."""
        wanted = TaskFilter(status="pending", type="t")
        for query in (
            statements.list_tasks(wanted, *after),
            statements.count_tasks(wanted),
            statements.count_tasks(wanted, 5),
        ):
            steps = [step for step in plan(*query) if "tasks_ready" in step]
            assert any("tasks_ready (owner=? AND type=?" in step for step in steps), steps
            assert not [step for step in steps if step.startswith("SCAN")]

    def test_the_tasks_of_a_type_are_found_at_once_if_few_are_not_pending(self, plan):
        for query in (
            statements.list_tasks(TaskFilter(type="t"), by=("type", "t")),
            statements.count_tasks(TaskFilter(type="t"), by=("type", "t")),
        ):
            steps = plan(*query)
            assert any("tasks_ready (owner=? AND type=?" in step for step in steps), steps
            assert "SCAN tasks" not in steps

    @pytest.mark.parametrize("most", [1, 3, 100])
    def test_every_way_to_a_list_leads_to_the_same_tasks(self, repository, monkeypatch, most):
        """Which index is read depends on how many tasks it has."""
        monkeypatch.setattr("taskx.stores.sql.repository.FEW", most)
        monkeypatch.setattr("taskx.stores.sql.statements.FEW", most)
        monkeypatch.setattr("taskx.stores.sql.statements._MANY", most)
        chance, later = random.Random(1), datetime(9000, 1, 1, tzinfo=timezone.utc)
        some = lambda *values: chance.choice(values)  # noqa: E731
        for n in range(60):
            fields = {"created_by": some("", "ann", "bob"), "tags": some([], ["a"], ["a", "b"])}
            repository.create(task(str(n), type=some("t", "u"), run_at=some(None, later), **fields))
            for status in some("", "", ("cancelled",), ("running",), ("running", "completed")):
                repository.update_status(str(n), TaskStatus(status))
        every = repository.list(TaskFilter(limit=100))
        for type_, creator, tag, status in product(
            (None, "t", "none"),
            (None, "", "ann", "none"),
            (None, "a", ["a", "b"]),
            (None, "pending", "running", "completed", "failed"),
        ):
            given = {"type": type_, "created_by": creator, "tag": tag, "status": status}
            wanted = TaskFilter(limit=4, **{k: v for k, v in given.items() if v is not None})
            expected = [one.id for one in every if wanted.matches(one)]
            assert [one.id for page in pages(repository, wanted) for one in page] == expected, given
            assert repository.count(wanted) == len(expected), given
            assert repository.reads.count_to(wanted, 3) == min(3, len(expected)), given

    def test_the_table_of_tags_has_the_tags_of_all_tasks_and_no_others(self, repository, connect):
        """Whatever happens to the tasks: a random, but always the same history."""
        chance = random.Random(1)
        some = lambda: chance.sample("abc", chance.randrange(4))  # noqa: E731
        tagged = {}
        for n in range(300):
            task_id = str(chance.randrange(20))
            if task_id not in tagged:
                tagged[task_id] = some()
                flow = "f" if n % 5 == 0 else ""
                repository.create(task(task_id, tags=tagged[task_id], flow=flow))
            elif n % 3:
                found = repository.get_by_id(task_id)
                found.tags = tagged[task_id] = some()
                repository.update(found)
            else:
                repository.delete(task_id)
                del tagged[task_id]
        for tag in "abc":
            expected = {task_id for task_id, tags in tagged.items() if tag in tags}
            assert {t.id for t in repository.list(TaskFilter(tag=tag))} == expected
        stored = connect().execute(
            "SELECT value, seq FROM tasks, json_each(tasks.tags) WHERE tags IS NOT NULL"
        )
        table = connect().execute("SELECT * FROM tagged")
        assert sorted(table.fetchall()) == sorted(stored.fetchall())

    @pytest.mark.parametrize("damaged", ["", "[", '"a"', "7", "[1]", "{}", "[[1]]"])
    def test_damaged_tags_prevent_neither_a_change_nor_a_delete(self, repository, connect, damaged):
        for task_id in ("a", "b"):
            repository.create(task(task_id, tags=["x"]))
        connect().execute("UPDATE tasks SET tags = ? WHERE id = 'a'", (damaged,))
        assert repository.count(TaskFilter(tag="x")) <= 2
        found = repository.get_by_id("a")
        assert found.damage or found.tags == ()
        found.tags, found.damage = ["y"], ""
        repository.update(found)
        assert [task.id for task in repository.list(TaskFilter(tag="y"))] == ["a"]
        connect().execute("UPDATE tasks SET tags = ? WHERE id = 'a'", (damaged,))
        repository.delete("a")
        assert [task.id for task in repository.list(TaskFilter(tag="x"))] == ["b"]

    def test_pages_of_pending_tasks_are_newest_first(self, repository):
        """Delayed tasks are in another index. Of tasks of the same moment, the last one stored is first."""
        moment = datetime(2026, 1, 1, tzinfo=timezone.utc)
        later = datetime(9000, 1, 1, tzinfo=timezone.utc)
        for number, second in enumerate([5, 1, 3, 1, 3, 5, 2]):
            created_at = moment + timedelta(seconds=second)
            run_at = later if number % 2 else None
            repository.create(task(str(number), created_at=created_at, run_at=run_at))
        pages = [
            [found.id for found in repository.list(TaskFilter(status="pending", offset=n, limit=3))]
            for n in (0, 3, 6, 9)
        ]
        assert pages == [["5", "0", "4"], ["2", "6", "3"], ["1"], []]

    def test_indexes_of_unfinished_tasks_hold_no_finished_ones(self, repository, connect):
        for number in range(50):
            repository.create(task(str(number)))
            repository.update_status(str(number), TaskStatus.RUNNING)
            repository.update_status(str(number), TaskStatus.COMPLETED)
        repository.close()
        for index, condition in [
            ("tasks_ready", "status = 'pending' AND held = 0"),
            ("tasks_held", "status = 'pending' AND held > 0"),
            ("tasks_in_line", "status = 'pending' AND held = 4"),
            ("tasks_running", "status = 'running'"),
        ]:
            sql = f"SELECT count(*) FROM tasks INDEXED BY {index} WHERE {condition}"
            assert connect().execute(sql).fetchone() == (0,)


class TestLocks:
    def test_readers_do_not_wait_for_a_writer(self, repository, connect):
        repository.create(task("a"))
        writer = connect()
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("UPDATE tasks SET message = 'unseen'")
        assert repository.get_by_id("a").message == ""
        assert ids(repository) == ["a"]
        assert repository.count(TaskFilter()) == 1
        assert [stub.id for stub in repository.ready(["t"], 1)] == ["a"]

    def test_readers_do_not_wait_for_a_writer_of_the_same_process(self, repository):
        """The first reader does not wait, either."""
        repository.create(task("a"))
        changed = Changes(repository)
        changed()
        with repository._file_links.write_lock:
            assert ids(repository) == ["a"]
            assert changed() is False

    def test_a_write_fails_if_the_file_stays_locked(self, repository, connect):
        """It fails after ``busy_timeout`` and stores nothing. The next write works."""
        repository.create(task("a"))
        other = connect()
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(
            RepositoryUnavailable, match=r"locked for 0\.2 s.*: connection="
        ) as caught:
            repository.create(task("b"))
        assert isinstance(caught.value.__cause__, sqlite3.OperationalError)
        other.execute("ROLLBACK")
        repository.create(task("c"))
        assert ids(repository) == ["a", "c"]

    def test_opening_fails_while_the_file_is_locked(self, repository, path, connect):
        other = connect()
        other.execute("PRAGMA journal_mode = WAL")
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(RepositoryUnavailable, match="locked"):
            repository.create(task("a"))
        other.execute("ROLLBACK")
        repository.create(task("a"))
        assert ids(repository) == ["a"]

    def test_a_write_waits_for_a_lock_that_is_released_in_time(self, path, connect):
        with SQLiteRepository(path, busy_timeout=PATIENCE) as repository:
            repository.create(task("a"))
            other = connect(check_same_thread=False)
            other.execute("BEGIN IMMEDIATE")
            threading.Timer(0.05, other.execute, ["COMMIT"]).start()
            repository.create(task("b"))
            assert ids(repository) == ["a", "b"]

    def test_only_others_commits_count_as_changes(self, repository, path, connect):
        """Commits of the same repository do not count."""
        changed = Changes(repository)
        repository.create(task("a"))
        assert changed()
        repository.create(task("b"))
        assert not changed()
        connect().execute("UPDATE tasks SET message = 'other'")
        assert changed()
        assert not changed()
        with SQLiteRepository(path) as sibling:
            sibling.create(task("c"))
            assert changed()

    def test_each_observer_is_told_of_every_change_once(self, repository, connect):
        first, second = Changes(repository), Changes(repository)
        assert first()
        assert second()
        repository.create(task("a"))
        connect().execute("UPDATE tasks SET message = 'other'")
        assert first()
        assert second()
        assert not first()
        assert not second()

    def test_two_queues_on_one_repository_see_each_others_changes(self, repository):
        queue, changed = Queue(repository), Changes(repository)
        changed()
        repository.create(task("a"))
        assert not changed()
        other = Queue(repository)
        changed()
        repository.create(task("b"))
        assert changed()
        assert not changed()
        assert queue.repository is other.repository

    def test_a_new_writing_connection_counts_as_a_change(self, repository):
        changed = Changes(repository)
        repository.create(task("a"))
        changed()
        repository.close()
        assert changed()
        assert not changed()

    def test_a_driver_error_while_checking_for_changes_is_translated(self, repository):
        class Failing:
            def execute(self, sql):
                raise sqlite3.OperationalError("disk I/O error")

        changed = Changes(repository)
        changed()
        connections_of(repository).writer = Failing
        with pytest.raises(RepositoryUnavailable, match="disk I/O"):
            changed()
        del connections_of(repository).writer
        assert not changed()


two_readers = pytest.mark.timing(most_readers=2)


class TestReaders:
    """The reading connections are few, and closed when they are not used."""

    @pytest.fixture
    def repository(self, repository):
        repository.create(task("a"))
        return repository

    @two_readers
    def test_a_thread_waits_if_all_readers_are_in_use(self, repository, monkeypatch):
        ours, refused = connections_of(repository), threading.Event()
        ours.busy_timeout = PATIENCE
        open_reader = ours._open_reader

        def noting():
            if (opened := open_reader()) is None:
                refused.set()
            return opened

        monkeypatch.setattr(ours, "_open_reader", noting)
        with reading(repository), reading(repository) as second:
            result = run_in_thread(lambda: ids(repository))
            assert refused.wait(PATIENCE)
            assert not second.closed
        assert result() == ["a"]
        assert len(open_readers(repository)) == 2

    @two_readers
    def test_a_thread_waits_for_a_reader_at_most_busy_timeout(self, repository):
        with (
            reading(repository),
            reading(repository),
            pytest.raises(RepositoryUnavailable, match="2 threads were reading"),
        ):
            ids(repository)
        assert ids(repository) == ["a"]

    @two_readers
    def test_a_connection_with_an_error_is_closed(self, repository):
        for _ in range(3):
            with pytest.raises(RepositoryError):
                connections_of(repository).read(methodcaller("execute", "SELECT nonsense"))
        with reading(repository), reading(repository):
            assert len(open_readers(repository)) == 2

    @two_readers
    def test_many_threads_share_a_few_connections(self, repository):
        connections_of(repository).busy_timeout = PATIENCE
        found = []
        threads = [
            threading.Thread(target=lambda: found.append(ids(repository))) for _ in range(30)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert found == [["a"]] * 30
        assert len(open_readers(repository)) <= 2

    def test_a_finalizer_can_read_while_a_connection_is_opened(self, repository, monkeypatch):
        connect, found = connections_of(repository)._connect, []

        def collect_and_connect(mode):
            monkeypatch.setattr(connections_of(repository), "_connect", connect)
            found.append(ids(repository))
            return connect(mode)

        monkeypatch.setattr(connections_of(repository), "_connect", collect_and_connect)
        thread = threading.Thread(target=lambda: found.append(ids(repository)), daemon=True)
        thread.start()
        thread.join(PATIENCE)
        assert found == [["a"], ["a"]]

    def test_a_file_that_cannot_be_opened_again_is_not_read_either(self, repository, path):
        with contextlib.closing(sqlite3.connect(path)) as newer:
            newer.execute(f"PRAGMA user_version = {schema.VERSION + 1}")
        connections_of(repository).discard_writer()
        for use in (lambda: repository.create(task("b")), lambda: ids(repository)):
            with pytest.raises(SchemaMismatch):
                use()

    def test_unused_connections_are_closed(self, repository):
        with reading(repository), reading(repository), reading(repository):
            pass
        assert len(open_readers(repository)) == 3
        for connection in connections_of(repository)._idle:
            connection.used -= DEFAULT_TIMING.close_reader_after
        for _ in range(3):
            ids(repository)
        assert len(open_readers(repository)) == 1
        assert ids(repository) == ["a"]


class TestDurability:
    """The commits that are synced before the call returns."""

    DURABLE, FLEETING = (
        Update("a", {}, {"message": "told"}, durable=True),
        Update("a", {}, {"message": "not told"}),
    )

    @pytest.mark.parametrize(
        ("durability", "durable", "fleeting"),
        [("accepted", "FULL", "NORMAL"), ("full", "FULL", "FULL"), ("process", "NORMAL", "NORMAL")],
    )
    def test_each_commit_is_synced_as_its_durability_requires(
        self, path, durability, durable, fleeting
    ):
        with SQLiteRepository(path, durability) as repository:
            repository.create(task("a"))
            for writes, expected in [
                ([self.FLEETING], fleeting),
                ([self.DURABLE], durable),
                ([self.FLEETING, self.DURABLE], durable),
                ([self.FLEETING], fleeting),
                ([insert("b")], durable),
                ([lifecycle.delete("b")], durable),
            ]:
                assert self.level_at_commit(repository, writes) == expected
            repository.close()
            assert self.level_at_commit(repository, [self.DURABLE]) == durable, "after reopening"

    def level_at_commit(self, repository, writes):
        """Return ``synchronous`` of the writing connection at the moment of the commit."""
        connection = connections_of(repository).writer()
        said = []
        connection.set_trace_callback(said.append)
        repository.apply(writes)
        connection.set_trace_callback(None)
        settings = [n for n, sql in enumerate(said) if "synchronous" in sql]
        ends = (
            "COMMIT",
            "INSERT",
            "UPDATE",
        )  # the last one: a statement alone is its own transaction
        commits = [n for n, sql in enumerate(said) if sql.startswith(ends)]
        assert max(settings, default=-1) < max(commits, default=0)
        (level,) = connection.execute("PRAGMA synchronous").fetchone()
        return {1: "NORMAL", 2: "FULL"}[level]

    @pytest.mark.process
    @pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace to see syncs")
    def test_the_disk_is_really_synced(self, path):
        program = """
            import sys
            from taskx import SQLiteRepository, Task
            with SQLiteRepository(sys.argv[1], sys.argv[2]) as repository:
                repository.create(Task(id="first", type="t"))
                print("begin", file=sys.stderr, flush=True)
                for number in range(5):
                    repository.create(Task(id=str(number), type="t"))
                print("end", file=sys.stderr, flush=True)
        """
        syncs = {}
        for durability in ("accepted", "process"):
            traced = subprocess.run(
                [
                    *("strace", "-f", "-e", "trace=fdatasync,fsync,write", sys.executable, "-c"),
                    *(textwrap.dedent(program), f"{path}-{durability}", durability),
                ],
                capture_output=True,
                text=True,
                check=True,
            ).stderr
            between = traced.split('"begin')[1].split('"end')[0]
            syncs[durability] = between.count("sync(")
        assert syncs == {"accepted": 5, "process": 0}

    def test_an_interrupt_while_synchronous_is_set_loses_no_sync(self, repository):
        """The level is raised again, even if the interrupt came before the lower level was recorded."""
        repository.create(task("a"))
        real = connections_of(repository).writer()
        interrupting = Interrupting(real, "after", "PRAGMA synchronous")
        connections_of(repository).current = interrupting
        with pytest.raises(KeyboardInterrupt):
            repository.apply([self.FLEETING])
        connections_of(repository).current = real
        assert self.level_at_commit(repository, [self.DURABLE]) == "FULL"


class Interrupting:
    """A connection that is interrupted before or after a statement, as if by Ctrl-C."""

    def __init__(self, connection, when, statement):
        vars(self).update(_connection=connection, _when=when, _statement=statement)

    def __getattr__(self, name):
        return getattr(self._connection, name)

    def __setattr__(self, name, value):
        setattr(self._connection, name, value)

    def execute(self, sql, *values):
        return self.cursor().execute(sql, *values)

    def cursor(self, factory=sqlite3.Cursor):
        return InterruptingCursor(self._connection.cursor(factory), self._when, self._statement)


class InterruptingCursor:
    def __init__(self, cursor, when, statement):
        self._cursor, self._when, self._statement = cursor, when, statement

    def __getattr__(self, name):
        return getattr(self._cursor, name)

    def execute(self, sql, *values):
        struck = sql.startswith(self._statement)
        if struck and self._when == "before":
            raise KeyboardInterrupt
        result = self._cursor.execute(sql, *values)
        if struck:
            raise KeyboardInterrupt
        return result


class TestInterrupts:
    """An interrupt in the middle of ``apply``: the record shows if the writes took place."""

    @pytest.mark.parametrize(
        ("when", "statement", "stored"),
        [
            ("before", "BEGIN", False),
            ("after", "BEGIN", False),
            ("after", "INSERT", False),
            ("after", "UPDATE", False),
            ("before", "COMMIT", False),
            ("after", "COMMIT", True),
        ],
    )
    def test_the_record_shows_if_an_interrupted_write_took_place(
        self, repository, when, statement, stored
    ):
        repository.create(task("a"))
        writes = [insert("b"), lifecycle.start(repository.get_by_id("a"), 5, "node")]
        real = connections_of(repository).writer()
        connections_of(repository).current = Interrupting(real, when, statement)
        with pytest.raises(KeyboardInterrupt):
            repository.apply(writes)
        connections_of(repository).current = real
        assert list(shown(repository, writes)) == [stored, stored]
        assert ids(repository) == (["a", "b"] if stored else ["a"])
        assert list(repository.apply(writes)) == [not stored, not stored]

    def test_an_interrupted_transaction_is_not_read(self, repository):
        """The next write undoes it."""
        repository.create(task("a"))
        writer = connections_of(repository).writer()
        writer.execute("BEGIN")
        writer.execute("UPDATE tasks SET status = 'running'")
        assert repository.statuses(["a"]) == {"a": "pending"}
        repository.create(task("b"))
        assert repository.statuses(["a", "b"]) == {"a": "pending", "b": "pending"}

    def test_an_interrupt_while_a_statement_is_compiled_is_not_lost(self, repository):
        """SQLite calls back then, and would take an exception as a refusal."""
        repository.create(task("a"))
        execute = connections_of(repository).writer().execute
        # One step in C: the signal is recorded, and is only handled after the statement was compiled.
        steps = [partial(ctypes.PyDLL(None)["raise"], signal.SIGINT), partial(execute, "SELECT 77")]
        done = collections.deque[object](maxlen=2)
        with pytest.raises(KeyboardInterrupt):
            done.extend(map(methodcaller("__call__"), steps))
        assert [cursor.fetchall() for cursor in list(done)[1:]] == [[(77,)]]

    def test_an_interrupt_while_reading_loses_no_connection(self, repository):
        repository.create(task("a"))
        with pytest.raises(KeyboardInterrupt):
            connections_of(repository).read(lambda connection: signal.raise_signal(signal.SIGINT))
        assert ids(repository) == ["a"]


class TestDiskFull:
    """A write on a full disk fails cleanly, and works again when there is space."""

    def test_a_full_disk_leaves_no_batch_half_stored(self, repository):
        repository.create(task("a"))
        writer = connections_of(repository).writer()
        (pages,) = writer.execute("PRAGMA page_count").fetchone()
        writer.execute(f"PRAGMA max_page_count = {pages + 2}")
        batch = [insert("small"), insert("big", params='{"x":"%s"}' % ("y" * 50_000))]
        for _ in range(3):
            with pytest.raises(RepositoryUnavailable, match="the disk is full"):
                repository.apply(batch)
            assert ids(repository) == ["a"]
            assert list(shown(repository, batch)) == [False, False]
        repository.update_status("a", TaskStatus.RUNNING, "small writes go on")
        writer.execute("PRAGMA max_page_count = 1000000")
        assert list(repository.apply(batch)) == [True, True]
        assert ids(repository) == ["a", "big", "small"]

    @pytest.mark.process
    def test_writes_work_again_after_the_file_could_not_grow(self, path):
        """The operating system really refuses to grow it, by a limit on file sizes."""
        program = """
            import os, resource, sys
            from taskx import RepositoryUnavailable, SQLiteRepository, Task, TaskFilter
            repository = SQLiteRepository(sys.argv[1])
            big = {"x": "y" * 200_000}
            with repository:
                repository.create(Task(id="a", type="t"))
                unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
                size = os.path.getsize(sys.argv[1] + "-wal")
                resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20_000, unlimited[1]))
                for _ in range(3):
                    try:
                        repository.create(Task(id="b", type="t", params=big))
                    except RepositoryUnavailable as error:
                        print(type(error.__cause__).__name__)
                    print(repository.count(TaskFilter()))
                resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
                repository.create(Task(id="b", type="t", params=big))
                print(repository.get_by_id("b").params == big)
        """
        output = finish(start_program(program, path)).split()
        assert output == ["OperationalError", "1"] * 3 + ["True"]


class TestDamage:
    """A damaged record does not affect the others."""

    @pytest.mark.parametrize(
        ("column", "value"),
        [
            ("params", "{not JSON"),
            ("params", "[]"),
            ("result", "NaN,"),
            ("earlier_attempts", "[[1]]"),
        ],
    )
    def test_damage_is_reported_on_the_task(self, repository, connect, column, value):
        repository.create(task("a"))
        repository.create(task("b", params={"x": 1}))
        connect().execute(f"UPDATE tasks SET {column} = ? WHERE id = 'a'", (value,))
        found = {task.id: task for task in repository.list(TaskFilter())}
        assert "damaged" in found["a"].damage
        assert (found["b"].damage, found["b"].params) == ("", {"x": 1})
        repository.delete("a")
        assert ids(repository) == ["b"]

    def test_a_write_that_sqlite_refuses_raises_a_repository_error(self, repository):
        """The other writes of the transaction are not stored."""
        repository.create(task("a"))
        for changes in ({"status": "sleeping"}, {"message": None}, {"priority": 2**70}):
            with pytest.raises(RepositoryError) as caught:
                repository.apply([insert("b"), Update("a", {}, changes)])
            assert caught.value.__cause__ is not None
        assert ids(repository) == ["a"]

    def test_a_refused_write_is_not_mistaken_for_a_duplicate(self, repository):
        bad = insert("b")
        bad.row["type"] = None
        with pytest.raises(RepositoryError, match="NOT NULL"):
            repository.apply([insert("a"), bad], all_or_nothing=True)
        assert ids(repository) == []


@pytest.mark.process
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_connections_of_its_own(repository):
    """The parent's connections still work after the child has written and ended."""
    repository.create(task("a"))
    assert ids(repository) == ["a"]
    if (child := os.fork()) == 0:
        status = 1
        with contextlib.suppress(BaseException):
            repository.create(task("b"))
            status = 0 if ids(repository) == ["a", "b"] else 2
            repository.close()
        os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    repository.create(task("c"))
    assert ids(repository) == ["a", "b", "c"]


@pytest.mark.process
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_childs_commits_survive_the_parents_close(repository, path):
    """The last process to close a file removes its log. SQLite's locks tell which one is the last, and a
    child does not inherit them.
    """
    repository.create(task("a"))
    assert ids(repository) == ["a"]
    told, tell = os.pipe()
    go_on, let_go_on = os.pipe()
    if (child := os.fork()) == 0:
        status = 1
        with contextlib.suppress(BaseException):
            repository.create(task("b"))
            os.write(tell, b".")
            os.read(go_on, 1)
            repository.create(task("c"))
            status = 0 if ids(repository) == ["a", "b", "c"] else 2
        os._exit(status)  # without closing, as if it was killed
    os.read(told, 1)
    repository.close()
    os.write(let_go_on, b".")
    assert os.waitpid(child, 0)[1] == 0
    for end in (told, tell, go_on, let_go_on):
        os.close(end)
    assert ids(repository) == ["a", "b", "c"]


@pytest.mark.process
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.timing(fork_within=PATIENCE)
def test_a_fork_waits_for_writers_and_readers(repository):
    """If a child was forked in the middle of either, it would find the file locked for ever."""
    repository.create(task("a"))
    begun, read, go_on = threading.Event(), threading.Event(), threading.Event()

    def read_long(connection):
        rows = connection.execute("SELECT id FROM tasks")
        begun.set()
        go_on.wait(PATIENCE)
        assert rows.fetchall() == [("a",)]
        read.set()

    reader = threading.Thread(target=connections_of(repository).read, args=(read_long,))
    reader.start()
    assert begun.wait(PATIENCE)
    threading.Timer(0.05, go_on.set).start()
    if (child := os.fork()) == 0:
        status = 1
        with contextlib.suppress(BaseException):
            repository.create(task("b"))
            status = 0 if read.is_set() and not connections_of(repository)._abandoned else 2
        os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    reader.join(PATIENCE)
    repository.create(task("c"))
    assert ids(repository) == ["a", "b", "c"]
