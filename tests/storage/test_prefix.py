"""Tables in the file of an application."""

import sqlite3
import threading
from contextlib import closing

import pytest
from helpers import PATIENCE

from taskx import (
    Config,
    ConfigurationError,
    DuplicateTask,
    Queue,
    RepositoryError,
    RepositoryUnavailable,
    SchemaMismatch,
    SQLiteRepository,
    Task,
    TaskFilter,
    open_repository,
)
from taskx.stores.sqlite import schema

PRAGMAS = ("application_id", "user_version", "journal_mode", "auto_vacuum", "page_size")


@pytest.fixture
def application(tmp_path):
    """An application's connection to its file, which has a table and a mark of its own."""
    with closing(sqlite3.connect(tmp_path / "app.db", isolation_level=None)) as connection:
        connection.execute("PRAGMA application_id = 7")
        connection.execute("PRAGMA user_version = 3")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE tasks (id INTEGER PRIMARY KEY, notes TEXT)")
        connection.execute("INSERT INTO tasks VALUES (1, 'ours')")
        yield connection


@pytest.fixture
def repository(tmp_path, application):
    with SQLiteRepository(tmp_path / "app.db", prefix="taskx_") as made:
        yield made


def names(connection):
    return {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}


def test_the_applications_settings_and_tables_stay_as_they_are(application, repository):
    def state():
        pragmas = [application.execute(f"PRAGMA {name}").fetchone() for name in PRAGMAS]
        return pragmas, application.execute("SELECT * FROM tasks").fetchall()

    before = state()
    repository.create(Task(id="a", type="t"))
    repository.delete("a")
    repository.house.shrink()
    repository.close()
    assert state() == before
    new = names(application) - {"tasks"}
    assert all(name.startswith(("taskx_", "sqlite_autoindex_taskx_")) for name in new), new
    assert application.execute("SELECT version FROM taskx_schema").fetchall() == [(schema.VERSION,)]


def test_a_queue_runs_on_tables_with_a_prefix(application, repository):
    queue = Queue(repository, Config(worker_num=2))
    queue.executor("double")(lambda n: n * 2)
    with queue:
        handles = queue.submit_many([Task(type="double", params={"n": n}) for n in range(20)])
        assert [handle.result(PATIENCE) for handle in handles] == [n * 2 for n in range(20)]
    assert application.execute("SELECT count(*) FROM taskx_tasks").fetchone() == (20,)


def test_an_application_that_writes_without_pause_does_not_keep_tasks_waiting(
    tmp_path, application, repository
):
    """With SQLite's own busy handler, the tasks below take minutes."""
    queue = Queue(repository, Config(worker_num=2, overflow="block"))
    done, written = threading.Event(), []
    queue.executor("t")(lambda: None)

    def write():
        with closing(sqlite3.connect(tmp_path / "app.db", timeout=PATIENCE)) as own:
            while not done.is_set():
                own.execute("INSERT INTO tasks (notes) VALUES ('x')")
                own.commit()
                written.append(1)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        with queue:
            handles = [queue.submit("t") for _ in range(300)]
            for handle in handles:
                handle.result(PATIENCE)
    finally:
        done.set()
        thread.join()
    assert len(written) > 10


def test_a_file_that_stays_locked_is_an_error_after_the_time_out(tmp_path, application):
    with SQLiteRepository(tmp_path / "app.db", prefix="taskx_", busy_timeout=0.2) as repository:
        repository.count(TaskFilter())
        application.execute("BEGIN IMMEDIATE")
        with pytest.raises(RepositoryUnavailable, match=r"locked for 0\.2 s"):
            repository.create(Task(id="a", type="t"))
        application.execute("ROLLBACK")
        repository.create(Task(id="a", type="t"))


def test_tables_with_different_prefixes_share_a_file(tmp_path, application, repository):
    with SQLiteRepository(tmp_path / "app.db", prefix="other_") as other:
        repository.create(Task(id="a", type="t"))
        other.create(Task(id="a", type="u"))
        assert [each.get_by_id("a").type for each in (repository, other)] == ["t", "u"]
        assert other.file.folder != repository.file.folder


def test_without_a_prefix_the_file_is_refused(tmp_path, application):
    with pytest.raises(SchemaMismatch, match=r"another program .*prefix"):
        SQLiteRepository(tmp_path / "app.db").count(TaskFilter())
    assert names(application) == {"tasks"}


def test_a_prefix_of_the_applications_own_tables_is_refused(tmp_path, application):
    application.execute("CREATE TABLE app_tasks (id INTEGER)")
    with pytest.raises(SchemaMismatch, match="app_tasks that is not TaskX's"):
        SQLiteRepository(tmp_path / "app.db", prefix="app_").count(TaskFilter())
    assert names(application) == {"tasks", "app_tasks"}


def test_a_file_that_is_not_in_wal_mode_is_refused(tmp_path, application):
    application.execute("PRAGMA journal_mode = DELETE")
    with pytest.raises(RepositoryError, match=r"journal_mode=delete.*requires WAL"):
        SQLiteRepository(tmp_path / "app.db", prefix="taskx_").count(TaskFilter())
    assert application.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    assert names(application) == {"tasks"}


def test_a_missing_file_is_not_created(tmp_path):
    with pytest.raises(RepositoryUnavailable, match="the application creates its file"):
        SQLiteRepository(tmp_path / "none.db", prefix="taskx_").count(TaskFilter())
    assert not (tmp_path / "none.db").exists()


def test_with_create_false_no_tables_are_created(tmp_path, application):
    with pytest.raises(RepositoryUnavailable, match=r"has no tables taskx_\*"):
        SQLiteRepository(tmp_path / "app.db", prefix="taskx_", create=False).count(TaskFilter())
    assert names(application) == {"tasks"}


def test_newer_tables_are_refused(application, repository):
    repository.count(TaskFilter())
    repository.close()
    application.execute("UPDATE taskx_schema SET version = version + 1")
    with pytest.raises(SchemaMismatch, match="Upgrade taskx-queue"):
        repository.count(TaskFilter())


def test_tables_that_are_migrated_while_they_are_in_use_are_noticed(application, repository):
    repository.create(Task(id="a", type="t"))
    application.execute("UPDATE taskx_schema SET version = version + 1")
    application.execute("ALTER TABLE taskx_tasks ADD COLUMN newer TEXT")
    with pytest.raises(SchemaMismatch, match="nothing was stored"):
        repository.create(Task(id="b", type="t"))


def test_tables_of_the_version_before_are_migrated(application, repository, monkeypatch):
    before = schema.VERSION
    repository.create(Task(id="a", type="t"))
    repository.close()
    next_one = ("ALTER TABLE tasks ADD COLUMN mood TEXT NOT NULL DEFAULT 'fine'",)
    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, next_one))
    monkeypatch.setattr(schema, "VERSION", before + 1)
    assert [task.id for task in repository.list(TaskFilter())] == ["a"]
    assert application.execute("SELECT mood FROM taskx_tasks").fetchall() == [("fine",)]
    assert application.execute("SELECT version FROM taskx_schema").fetchall() == [(before + 1,)]


def test_the_examination_knows_the_prefix(tmp_path, application, repository):
    repository.count(TaskFilter())
    levels = {check.name: check.level for check in repository.house.examine()}
    assert levels["schema"] == levels["integrity"] == levels["write lock"] == "ok"


# The last ones begin like the names of tables.
PREFIXES = [
    "t",
    "TaskX_",
    "tasks_",
    "notes_",
    "nodes_",
    "parents_",
    "tagged_",
    "migrated_",
    "schema",
    "schema_",
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_each_name_gets_the_prefix_once(tmp_path, application, prefix):
    with SQLiteRepository(tmp_path / "own.db") as own:
        own.count(TaskFilter())
    with closing(sqlite3.connect(tmp_path / "own.db")) as connection:
        plain = names(connection)
    before = names(application)
    with SQLiteRepository(tmp_path / "app.db", prefix=prefix) as made:
        made.count(TaskFilter())
    found = names(application) - before
    automatic = "sqlite_autoindex_"
    assert found == {
        f"{automatic}{prefix}{name.removeprefix(automatic)}"
        if name.startswith(automatic)
        else f"{prefix}{name}"
        for name in {*plain, "schema"}
    }


@pytest.mark.parametrize("prefix", PREFIXES)
def test_all_features_work_with_any_prefix(tmp_path, application, prefix):
    with SQLiteRepository(tmp_path / "app.db", prefix=prefix) as repository:
        queue = Queue(repository, Config(worker_num=2))

        @queue.executor("steps", tags=["all"])
        def steps(ctx, n):
            with ctx.transaction() as own:
                own.connection.execute("INSERT INTO tasks (notes) VALUES ('theirs')")
            return n

        parent = queue.submit("steps", {"n": 1}, unique_key="one", concurrency_key="turns")
        child = queue.submit("steps", {"n": 2}, depends_on=[parent], concurrency_key="turns")
        gone = queue.submit("steps", {"n": 3}, depends_on=[child], tags=["gone"])
        with pytest.raises(DuplicateTask):
            queue.submit("steps", {"n": 4}, unique_key="one")
        queue.pause("other")
        queue.schedule("yearly", "0 0 1 1 *", "steps", {"n": 5})
        application.execute("BEGIN IMMEDIATE")
        application.execute("INSERT INTO tasks (notes) VALUES ('ours')")
        joined = queue.submit("steps", {"n": 6}, connection=application)
        application.execute("COMMIT")
        queue.cancel_task(gone.id)
        with queue:
            assert [each.result(PATIENCE) for each in (parent, child, joined)] == [1, 2, 6]
        assert queue.count_tasks(tag="all") == 4
        queue.delete(gone.id)
        assert queue.count_tasks(tag="gone") == 0
        assert [*queue.schedules()] == ["yearly"]
        levels = {check.name: check.level for check in repository.house.examine()}
        assert levels["schema"] == levels["integrity"] == "ok"
    with SQLiteRepository(tmp_path / "app.db", prefix=prefix) as again:
        assert again.count(TaskFilter()) == 3
    assert application.execute("SELECT count(*) FROM tasks").fetchone() == (5,)


def test_a_prefix_that_differs_only_in_its_case_is_refused(tmp_path, application, repository):
    repository.create(Task(id="a", type="t"))
    before = application.execute("SELECT * FROM sqlite_master").fetchall()
    for prefix in ("TaskX_", "TASKX_"):
        with (
            SQLiteRepository(tmp_path / "app.db", prefix=prefix) as other,
            pytest.raises(SchemaMismatch, match=r"prefix 'taskx_', .* Use prefix='taskx_', or one"),
        ):
            other.count(TaskFilter())
    assert application.execute("SELECT * FROM sqlite_master").fetchall() == before
    assert [path.name for path in tmp_path.glob("*nodes")] == ["app.db-taskx_nodes"]


def test_a_table_of_the_application_whose_name_differs_only_in_its_case_is_refused(
    tmp_path, application
):
    application.execute("CREATE TABLE App_Tasks (id INTEGER)")
    with pytest.raises(SchemaMismatch, match="App_Tasks that is not TaskX's"):
        SQLiteRepository(tmp_path / "app.db", prefix="app_").count(TaskFilter())
    assert names(application) == {"tasks", "App_Tasks"}


@pytest.mark.parametrize("prefix", ["1a", "a-b", "sqlite_x", "a" * 41, "ä_", None, 5, "a;b"])
def test_a_prefix_that_cannot_begin_a_name_is_refused(tmp_path, prefix):
    with pytest.raises(ConfigurationError, match="prefix must be"):
        SQLiteRepository(tmp_path / "app.db", prefix=prefix)


def test_a_url_names_the_prefix(tmp_path, application):
    with open_repository(f"sqlite:///{tmp_path / 'app.db'}?prefix=mine_") as made:
        made.create(Task(id="a", type="t"))
    assert "mine_tasks" in names(application)
