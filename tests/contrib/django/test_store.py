"""The repository in a Django database: its tables, its statements and its errors."""

from __future__ import annotations

import asyncio
import re
import shutil
import sqlite3
import threading
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import django_project
import mariadb_server
import postgres_server
import pymysql
import pytest
from django.core.management import call_command
from django.db import connections, transaction
from django.db.utils import OperationalError
from helpers import PATIENCE, eventually, run_in_thread
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taskx import (
    ConfigurationError,
    DuplicateTask,
    MemoryRepository,
    PayloadError,
    Queue,
    RepositoryCorrupt,
    RepositoryUnavailable,
    TaskFilter,
)
from taskx.contrib.django import DjangoRepository
from taskx.contrib.django.link import Link
from taskx.contrib.django.models import NoteRow, ParentRow, TagRow, TaskRow
from taskx.tasks.record import COLUMNS, DEFAULTS, FREE
from taskx.tasks.writes import CREATED, Delete, Insert, NoteChange, Update


@pytest.fixture(params=django_project.MAKERS)
def repository(request, tmp_path):
    with django_project.MAKERS[request.param](tmp_path) as made:
        yield made


on_servers = pytest.mark.parametrize("repository", ["postgres", "mariadb"], indirect=True)
on_postgres = pytest.mark.parametrize("repository", ["postgres"], indirect=True)
on_mariadb = pytest.mark.parametrize("repository", ["mariadb"], indirect=True)
on_sqlite = pytest.mark.parametrize("repository", ["sqlite"], indirect=True)


@pytest.fixture
def server(repository):
    """The server of the repository's database."""
    shared = {"postgresql": postgres_server.shared, "mysql": mariadb_server.shared}
    return shared[repository.vendor]()


def insert(task_id, **columns):
    row = {name: DEFAULTS.get(name) for name in CREATED}
    row |= {"id": task_id, "type": "t", "created_at": 1_700_000_000_000, "held": FREE}
    return Insert({**row, **columns})


def add(repository, *ids, **columns):
    assert all(repository.apply([insert(task_id, **columns) for task_id in ids]))


def start(task_id, node="n", starts=0):
    guard = {"status": "pending", "starts": starts, "held": FREE}
    changes = {"status": "running", "starts": starts + 1, "owner": node}
    return Update(task_id, guard, changes, move="start", skips=True)


def statuses(repository):
    return dict(repository.find("id", [*"abcdefgh"], ("id", "status")))


@pytest.fixture
def sent(monkeypatch):
    """The statements that were sent, in order."""
    found = []

    def noting(call):
        def note(link, sql, *values):
            found.append(sql)
            return call(link, sql, *values)

        return note

    for name in ("rows", "execute"):
        monkeypatch.setattr(Link, name, noting(getattr(Link, name)))
    return found


# --- the tables


def test_the_model_has_the_columns_of_a_task():
    columns = [field.column for field in TaskRow._meta.fields]
    assert columns == ["seq", *COLUMNS]


def test_the_migrations_make_the_models():
    call_command("makemigrations", "taskx", check=True, dry_run=True, verbosity=0)


def test_the_checks_of_django_find_nothing(repository, capsys):
    call_command("check", databases=[repository.using], fail_level="WARNING")
    assert "no issues" in capsys.readouterr().out


@on_postgres
def test_postgresql_gets_settings_for_vacuum(repository):
    sql = "SELECT reloptions FROM pg_class WHERE relname = 'taskx_task'"
    ((options,),) = repository._connections.read(lambda link: link.rows(sql))
    assert {"fillfactor=85", "autovacuum_vacuum_scale_factor=0.02"} <= {*options}


@on_mariadb
def test_mariadb_gets_indexes_that_begin_with_the_conditions_of_partial_ones(repository):
    sql = "SELECT seq_in_index, column_name FROM information_schema.statistics "
    sql += "WHERE table_schema = database() AND index_name = 'taskx_ready' ORDER BY 1"
    rows = repository._connections.read(lambda link: link.rows(sql))
    columns = [name for _, name in rows]
    assert columns == ["status", "held", "owner", "type", "priority", "seq"]


def test_models_show_the_stored_rows(repository):
    queue = Queue(repository)
    queue.declare("mail")
    parent = queue.submit("mail", tags=["red"])
    child = queue.submit("mail", depends_on=[parent])
    using = repository.using
    assert TaskRow.objects.using(using).get(task_id=child.id).waiting_on == parent.id
    assert ParentRow.objects.using(using).get().child == child.id
    assert TagRow.objects.using(using).get().tag == "red"
    assert str(TaskRow.objects.using(using).get(task_id=parent.id)) == f"mail {parent.id}"
    repository.put_note("a", "text", 0)
    assert NoteRow.objects.using(using).get().text == "text"
    connections[using].close()


@on_sqlite
def test_a_database_without_tables_says_what_to_run(repository, tmp_path):
    path = tmp_path / "empty.db"
    with closing(sqlite3.connect(path)) as made:
        made.execute("CREATE TABLE other (id)")
    django_project.add_database("empty", NAME=str(path))
    with DjangoRepository("empty") as empty:
        queue = Queue(empty)
        with pytest.raises(RepositoryUnavailable, match=r"run manage\.py migrate --database empty"):
            queue.start()
        [check] = [check for check in empty.house.examine() if check.level == "fail"]
        assert "migrate" in str(check)


@on_servers
def test_a_server_without_tables_says_what_to_run(repository, server):
    name = server.new_database()
    django_project.add_database("bare", **{**connections.settings[repository.using], "NAME": name})
    with DjangoRepository("bare") as bare:
        with pytest.raises(RepositoryUnavailable, match=r"run manage\.py migrate --database bare"):
            bare.apply([insert("a")])
        with pytest.raises(RepositoryUnavailable, match=r"run manage\.py migrate"):
            bare.house.prepare()
    server.drop_database(name)


def test_an_alias_must_be_in_the_settings():
    with pytest.raises(ConfigurationError, match="DATABASES has no 'nowhere'"):
        DjangoRepository("nowhere")


def test_a_missing_sqlite_file_is_not_created_and_the_error_says_what_to_run(tmp_path):
    path = tmp_path / "missing.db"
    django_project.add_database("missing", NAME=str(path))
    with DjangoRepository("missing") as missing, pytest.raises(RepositoryUnavailable) as caught:
        missing.count(TaskFilter())
    assert f"the database 'missing' has no file {path}" in str(caught.value)
    assert "run manage.py migrate --database missing" in str(caught.value)
    assert not path.exists()


def test_an_error_of_the_server_is_one_line():
    pytest.importorskip("psycopg")
    django_project.add_database(
        "away", ENGINE="django.db.backends.postgresql", HOST="127.0.0.1", PORT="1", OPTIONS={}
    )
    with DjangoRepository("away") as away, pytest.raises(RepositoryUnavailable) as caught:
        away.count(TaskFilter())
    assert "Connection refused; Is the server running" in str(caught.value)


# --- statements


@on_postgres
def test_a_single_write_is_one_statement(repository, sent):
    add(repository, "a")
    repository.apply([start("a")])
    repository.apply([Update("a", {"status": "running", "starts": 1}, {"status": "completed"})])
    sent.clear()
    add(repository, "b")  # durable, after a write that is not
    assert [sql.split()[0] for sql in sent] == ["SET", "INSERT"]
    sent.clear()
    add(repository, "c")
    assert [sql.split()[0] for sql in sent] == ["INSERT"]


@on_postgres
def test_writes_of_the_same_form_are_one_statement(repository, sent):
    """Also if those of several forms alternate, as the outcomes and starts of a busy queue do."""
    ids = [f"{n:03}" for n in range(100)]
    add(repository, *ids)
    repository.apply([start(task_id) for task_id in ids[:50]])
    ended = [
        Update(i, {"status": "running", "starts": 1}, {"status": "completed", "result": f"{n}"})
        for n, i in enumerate(ids[:50])
    ]
    started = [start(task_id) for task_id in ids[50:]]
    mixed = [write for pair in zip(ended, started, strict=True) for write in pair]
    sent.clear()
    assert list(repository.apply(mixed)) == [True] * 100
    assert [sql.split()[0].strip(";") for sql in sent] == ["BEGIN", "UPDATE", "WITH", "COMMIT"]
    assert repository.count(TaskFilter(status="completed")) == 50
    assert repository.get_by_id("007").result == 7


@on_postgres
def test_new_tasks_in_one_statement_keep_their_order(repository):
    ids = [f"{(n * 7919) % 1000:03}" for n in range(400)]
    add(repository, *ids)
    assert [stub.id for stub in repository.ready(["t"], 400)] == ids


KEYS = st.sampled_from([None, None, "k", "l"])
NAMES = st.sampled_from("abcd")
WRITES = st.lists(
    st.one_of(
        st.builds(lambda i, k: insert(i, unique_lock=k), NAMES, KEYS),
        st.builds(lambda i, g, m: Update(i, {"message": g}, {"message": m}), NAMES, *[KEYS] * 2),
        st.builds(lambda i, k: Update(i, {}, {"turn": k}), NAMES, KEYS),
        st.builds(lambda i, k: Update(i, {"turn": k}, {"unique_lock": k}), NAMES, KEYS),
        st.builds(lambda i, n: start(i, starts=n), NAMES, st.integers(0, 1)),
        st.builds(lambda i, k: Delete(i, {"turn": k}), NAMES, KEYS),
    ),
    max_size=12,
)


@on_servers
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches=st.lists(WRITES, max_size=3))
def test_groups_have_the_results_of_the_writes_in_order(repository, batches):
    """The model is a repository that applies them one by one."""
    django_project.empty(repository)
    model = MemoryRepository()
    for batch in batches:
        # None is no text, but the columns of messages are never None.
        batch = [
            write._replace(changes={"message": write.changes["message"] or ""}, guard={})
            if isinstance(write, Update) and "message" in write.changes
            else write
            for write in batch
        ]
        assert list(repository.apply(batch)) == list(model.apply(batch)), batch
    fields = ("id", "status", "starts", "turn", "unique_lock", "message")
    found, expected = (store.find("id", [*"abcd"], fields) for store in (repository, model))
    assert sorted(found) == sorted(expected)


@on_servers
def test_the_queries_of_a_busy_queue_use_indexes(repository, sent):
    """With 20,000 tasks of each status, none of them reads the whole table."""
    row = {**DEFAULTS, "type": "t", "created_at": 1}
    columns = ", ".join(COLUMNS)
    numbers = {
        "postgresql": "generate_series(1, 20000) n",
        "mysql": "(SELECT seq AS n FROM seq_1_to_20000) AS numbers",
    }
    for status in ("completed", "pending", "failed"):
        values = ", ".join(
            f"concat('{status}', n)"
            if name == "id"
            else f"'{status}'"
            if name == "status"
            else "NULL"
            if row[name] is None
            else repr(row[name])
            for name in COLUMNS
        )
        with repository._connections.writing() as link:
            link.execute(
                f"INSERT INTO taskx_task ({columns}) SELECT {values} FROM {numbers[repository.vendor]}"
            )
    with repository._connections.writing() as link:
        link.execute(f"ANALYZE {'TABLE' if link.vendor == 'mysql' else ''} taskx_task")
        sent.clear()
    plans = {}
    explained = Link.rows

    def explain(link, sql, values=()):
        if sql.startswith(("SELECT", "WITH", "UPDATE")):
            lines = explained(link, f"EXPLAIN {sql}", values)
            plans[sql] = "\n".join(" ".join(map(str, line)) for line in lines)
        return explained(link, sql, values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Link, "rows", explain)
        repository.ready(["t", "u"], 50)
        repository.ready(["t"], 50, ageing=1000)
        repository.reads.count_ready("t", "", 100)
        repository.due(None, 10)
        repository.due(None, 10, "expires_at")
        for column in ("id", "unique_lock", "turn", "waiting_on", "line", "running_on", "stuck_on"):
            repository.find(column, ["x"], ("id",))
        for column in ("waiting_on", "line", "running_on", "buffered_on", "stuck_on", "ready_type"):
            repository.distinct(column, "", 10)
        repository.ended("completed", 2**60, 100)
        repository.list(TaskFilter(status="failed", limit=10))
        ids = [f"pending{n}" for n in range(1, 51)]
        assert all(repository.apply([start(task_id) for task_id in ids]))
        ended = {"status": "completed", "completed_at": 2}
        assert all(repository.apply([Update(i, {"starts": 1}, ended) for i in ids]))
    with repository._connections.writing() as link:
        link.execute("TRUNCATE taskx_task")
    assert len(plans) >= 18
    # In MySQL's plans the way of access follows the name of the table.
    whole = re.compile("Seq Scan on taskx_task|taskx_task (ALL|index) ")
    assert not [sql for sql, plan in plans.items() if whole.search(plan)]


def test_a_write_whose_connection_cannot_be_opened_says_that_the_database_is_away(
    repository, monkeypatch
):
    def refuse(**options):
        raise OperationalError("no route to the server")

    repository._connections.close()
    monkeypatch.setattr(repository._connections, "_open", refuse)
    with pytest.raises(RepositoryUnavailable, match="no route to the server") as raised:
        add(repository, "a")
    assert not raised.value.in_doubt
    monkeypatch.undo()
    add(repository, "a")


def test_tags_that_several_tasks_get_at_once_are_those_of_each(repository):
    add(repository, "a", "b")
    tagged = [Update(task_id, {}, {"tags": '["x", "y"]'}) for task_id in "ab"]
    assert list(repository.apply(tagged)) == [True, True]
    for wanted in ("x", ["x", "y"]):
        assert {task.id for task in repository.list(TaskFilter(tag=wanted))} == {"a", "b"}
    assert list(repository.apply([Update("a", {}, {"tags": None}), Delete("b", {})])) == [
        True,
        True,
    ]
    assert repository.list(TaskFilter(tag="x")) == []


# --- transactions of others


def test_a_thread_inside_atomic_is_no_part_of_what_the_repository_does(repository):
    """The write is committed at once, and stays if the thread's transaction is rolled back."""
    if repository.vendor == "sqlite":
        connections[repository.using].ensure_connection()  # without a lock, as BEGIN is deferred
    with transaction.atomic(repository.using):
        add(repository, "a")
        transaction.set_rollback(True, repository.using)
    connections[repository.using].close()
    assert statuses(repository) == {"a": "pending"}


def lock(repository, task_id):
    """Lock a task in the open block of this thread."""
    rows = TaskRow.objects.using(repository.using).filter(task_id=task_id)
    assert rows.update(message="mine") == 1


@on_servers
def test_a_start_passes_over_a_row_that_another_transaction_changes(repository, sent):
    """The others are started, and nothing waits. Any other write waits for that transaction."""
    add(repository, "a", "b")
    with transaction.atomic(repository.using):
        lock(repository, "a")
        assert list(repository.apply([start("a")])) == [False]
        assert list(repository.apply([start("a"), start("b")])) == [False, True]
        sent.clear()
        waits = run_in_thread(lambda: repository.apply([Update("a", {}, {"progress": 5})]))
        eventually(lambda: "ROLLBACK" in sent)  # the lock has refused it once
    assert list(waits()) == [True]
    assert list(repository.apply([start("a")])) == [True]
    connections[repository.using].close()


@on_servers
def test_a_write_that_waits_too_long_for_a_lock_fails_and_changes_nothing(repository):
    add(repository, "a")
    with DjangoRepository(timeout=0.5, using=repository.using) as r:
        with transaction.atomic(repository.using):
            lock(repository, "a")
            with pytest.raises(RepositoryUnavailable) as caught:
                r.apply([Update("a", {}, {"progress": 5})])
            assert not caught.value.in_doubt
        assert list(r.apply([Update("a", {"progress": 0}, {"progress": 7})])) == [True]
    connections[repository.using].close()


@on_servers
def test_two_processes_that_lock_each_others_rows_both_succeed(repository):
    """One of two transactions that wait for each other is ended, and sent again."""
    ids = [f"{n:03}" for n in range(60)]
    add(repository, *ids)
    gate = threading.Barrier(2)

    def change(order, column):
        with DjangoRepository(repository.using) as other:
            gate.wait(PATIENCE)
            # Different forms, so that each write is a statement of its own.
            writes = [
                Update(i, {}, {column: n, "progress" if n % 2 else "errors": n})
                for n, i in enumerate(order)
            ]
            return list(other.apply(writes))

    there = run_in_thread(lambda: change(ids, "snoozes"))
    assert change(ids[::-1], "crashes") == [True] * 60
    assert there() == [True] * 60


@on_servers
def test_a_transaction_that_a_deadlock_ends_is_sent_again(repository, monkeypatch):
    add(repository, "a")
    fails = iter([True])
    execute = Link.execute

    def fail(link, sql, values=()):
        if sql.startswith("UPDATE") and next(fails, False):
            error = OperationalError("deadlock detected")
            error.__cause__ = type("Cause", (Exception,), {"sqlstate": "40P01"})()
            if link.vendor == "mysql":
                error.__cause__ = pymysql.OperationalError(1213, "Deadlock found")
            raise error
        return execute(link, sql, values)

    monkeypatch.setattr(Link, "execute", fail)
    assert list(repository.apply([Update("a", {"errors": 0}, {"errors": 1})])) == [True]


# --- values and errors


@on_postgres
def test_texts_with_nul_characters_are_stored(repository):
    """PostgreSQL has no NUL in texts, so another character takes its place."""
    add(repository, "a")
    assert list(repository.apply([Update("a", {}, {"error": "a\0b"})])) == [True]
    assert repository.get_by_id("a").error == "a\N{REPLACEMENT CHARACTER}b"


@on_mariadb
def test_a_connection_that_loses_characters_is_refused(repository):
    settings = connections.settings[repository.using]
    django_project.add_database("short", **{**settings, "OPTIONS": {"charset": "utf8mb3"}})
    with DjangoRepository("short") as short, pytest.raises(ConfigurationError, match="'utf8mb4'"):
        short.count(TaskFilter())


@on_mariadb
def test_a_text_that_is_larger_than_a_packet_is_refused(repository):
    """The server would close the connection, and the write would be sent again and again."""
    add(repository, "a")
    with pytest.raises(PayloadError, match="max_allowed_packet"):
        repository.apply([Update("a", {}, {"result": "x" * (17 << 20)})])
    assert list(repository.apply([Update("a", {}, {"progress": 5})])) == [True]


@on_sqlite
def test_a_damaged_text_hides_no_other_task(repository, tmp_path):
    add(repository, "a", "b")
    with closing(sqlite3.connect(tmp_path / "site.db")) as direct, direct:
        direct.execute("UPDATE taskx_task SET message = CAST(x'ff41' AS TEXT) WHERE id = 'a'")
    assert {task.id for task in repository.list(TaskFilter())} == {"a", "b"}
    assert repository.get_by_id("a").damage
    assert not repository.get_by_id("b").damage


def test_an_unknown_status_is_shown_as_damage(repository):
    add(repository, "a")
    TaskRow.objects.using(repository.using).update(status="lost")
    connections[repository.using].close()
    assert "'lost' as status" in repository.get_by_id("a").damage


@on_sqlite
def test_a_file_that_is_no_database_is_corrupt(tmp_path, repository):
    path = tmp_path / "text.db"
    path.write_text("this is a text and no database" * 100)
    django_project.add_database("text", NAME=str(path))
    with DjangoRepository("text") as text, pytest.raises(RepositoryCorrupt):
        text.count(TaskFilter())


@on_sqlite
def test_a_file_that_was_replaced_is_noticed(repository, tmp_path):
    add(repository, "a")
    (tmp_path / "site.db").rename(tmp_path / "moved.db")
    with pytest.raises(RepositoryUnavailable, match="moved or deleted"):
        repository.house.ensure_there()
    with pytest.raises(RepositoryUnavailable, match="moved or deleted"):
        add(repository, "b")
    (tmp_path / "moved.db").rename(tmp_path / "site.db")
    add(repository, "b")


def test_a_connection_in_use_when_the_repository_is_closed_is_closed_after_its_use(repository):
    used = []

    def close_meanwhile(link):
        used.append(link)
        repository.close()
        return link.rows("SELECT 1")

    repository._connections.read(close_meanwhile)
    assert used[0].django.connection is None
    for _ in range(2):  # a later operation opens one, which is kept
        repository._connections.read(used.append)
    assert used[1] is used[2]


@on_servers
def test_a_statement_ends_with_the_time_limit(repository):
    def sleep(link):
        return link.rows(f"SELECT {'pg_sleep' if link.vendor == 'postgresql' else 'sleep'}(60)")

    with repository.house.within(0.1), pytest.raises(RepositoryUnavailable, match="time"):
        repository._connections.read(sleep)
    assert repository.count(TaskFilter()) == 0


@on_servers
def test_broken_connections_are_replaced(repository, server):
    """A connection that broke while nothing used it is not noticed by callers."""
    add(repository, "a")
    repository.count(TaskFilter())
    for link in [repository._connections._writer, *repository._connections._idle]:
        link.used -= 60
    server.break_connections(connections.settings[repository.using]["NAME"])
    assert repository.count(TaskFilter()) == 1
    add(repository, "b")
    assert repository.put_note("n", "text", 0)


@on_servers
def test_a_key_that_is_taken_in_the_meantime_refuses_only_its_own_write(repository):
    """One of two tasks takes the key in the same batch as other changes; the others are made."""
    add(repository, "a", turn="k")
    add(repository, "b", "c", "d")
    takes = [Update(i, {}, {"turn": key}) for i, key in (("b", "k"), ("c", "l"), ("d", "l"))]
    assert list(repository.apply(takes)) == [False, True, False]


def test_a_unique_key_is_refused_by_name(repository):
    queue = Queue(repository)
    queue.declare("mail")
    first = queue.submit("mail", unique_key="k")
    with pytest.raises(DuplicateTask) as caught:
        queue.submit("mail", unique_key="k")
    assert caught.value.task_id == first.id


def test_unique_keys_differ_by_case_accents_and_spaces_at_the_end(repository):
    queue = Queue(repository)
    queue.declare("mail")
    keys = ["key", "Key", "kéy", "key ", " key"]
    handles = [queue.submit("mail", unique_key=key) for key in keys]
    assert [handle.task().unique_key for handle in handles] == keys
    with pytest.raises(DuplicateTask):
        queue.submit("mail", unique_key="key ")


# --- what others learn


def test_only_files_have_locks_for_liveness(repository):
    name = type(repository.liveness).__name__
    assert name == ("KernelLocks" if repository.vendor == "sqlite" else "Leases")


def test_the_examination_finds_a_sound_database_sound(repository):
    found = {check.name: check for check in repository.house.examine()}
    # The PostgreSQL server of the tests is not safe from power cuts, and ends no idle transaction.
    warned = {name for name, check in found.items() if check.level != "ok"}
    assert warned <= {"durability", "idle transactions", "disk"}
    assert {"database", "tables"} < found.keys()


@on_sqlite
def test_a_full_disk_is_a_problem(repository, monkeypatch):
    add(repository, "a")
    assert [*repository.house.problems()] == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    [problem] = repository.house.problems()
    [check] = [check for check in repository.house.examine() if check.level == "fail"]
    assert (problem.kind, str(problem)) == (check.name, str(check))


@on_sqlite
def test_the_examination_warns_of_a_file_without_a_log(repository, tmp_path):
    with closing(sqlite3.connect(tmp_path / "site.db")) as direct:
        direct.execute("PRAGMA journal_mode = DELETE")
    warned = [check for check in repository.house.examine() if check.level == "warn"]
    [check] = [check for check in warned if check.name != "disk"]
    assert "journal_mode=delete" in check.sentence


@on_sqlite
@pytest.mark.parametrize(
    ("mode", "levels"), [("WAL", ["FULL", "NORMAL"]), ("DELETE", ["EXTRA", "FULL"])]
)
def test_a_power_cut_undoes_nothing_that_a_caller_was_told(
    repository, tmp_path, sent, mode, levels
):
    """Without a write-ahead log a commit removes a file, and only EXTRA syncs that."""
    with closing(sqlite3.connect(tmp_path / "site.db")) as connection:
        connection.execute(f"PRAGMA journal_mode = {mode}")
    add(repository, "a")
    repository.apply([start("a")])
    assert [sql.split(" = ")[1] for sql in sent if "synchronous" in sql] == levels


def test_notes_of_nodes_and_others_are_stored_together(repository):
    changes = [NoteChange("node/a", "x", 0), NoteChange("schedule/b", "y", 0)]
    assert list(repository.put_notes(changes)) == [True, True]
    assert repository.notes("").keys() == {"node/a", "schedule/b"}  # in any order


def test_the_sizes_of_an_sqlite_file_are_told(repository):
    add(repository, "a")
    sizes = repository.house.file_sizes()
    if repository.vendor == "sqlite":
        assert {Path(path).name for path in sizes} >= {"site.db"}
    else:
        assert sizes == {}


def test_async_code_can_await_a_handle(repository):
    """Django refuses reads on a thread that runs an event loop, so another thread reads."""
    queue = Queue(repository)
    queue.executor("question")(lambda: 42)

    async def awaited():
        handle = await asyncio.to_thread(queue.submit, "question")
        return await asyncio.wait_for(handle, PATIENCE)

    with queue:
        assert asyncio.run(awaited()) == 42


@pytest.mark.parametrize("repository", ["sqlite"], indirect=True)
def test_a_coroutine_uses_the_tools_of_its_run(repository):
    """Django refuses reads and writes on a thread with an event loop, but not those of TaskX there."""
    queue = Queue(repository)

    @queue.executor()
    async def one(n: int) -> int:
        return n

    @queue.executor()
    async def work(ctx):
        ctx.cursor = 5
        first = ctx.step("first", lambda: 1)
        ctx.sleep(0.01, step="nap")
        with pytest.raises(TimeoutError):
            ctx.ask("boss", timeout=0.01)
        return [ctx.cursor, first, ctx.run_all("some", [one.task(2)]), await one.submit(3)]

    with queue:
        assert queue.submit("work").result(PATIENCE) == [5, 1, [2], 3]
