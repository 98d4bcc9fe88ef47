"""A running queue whose file a newer TaskX, in another process, has migrated."""

from __future__ import annotations

import logging
import sqlite3
from contextlib import closing

import pytest
from helpers import PATIENCE, SpySQLite, connections_of, eventually, node_of

from taskx import Queue, SchemaMismatch, Task, TaskFilter, TaskStatus
from taskx.stores.sqlite import schema

#: A TaskX whose schema is one version newer; its arguments are the path of the file and the migration.
NEWER = """
import sys
from taskx import Queue, SQLiteRepository
from taskx.stores.sqlite import schema

schema.MIGRATIONS += ((sys.argv[2],),)
schema.VERSION += 1
queue = Queue(SQLiteRepository(sys.argv[1]))
queue.declare("fine")
"""

NEW_COLUMN = "ALTER TABLE tasks ADD COLUMN mood TEXT NOT NULL DEFAULT ''"

#: A process that runs one task until it is told to end it, and prints what happens.
OLDER = """
import logging, sys, threading
from taskx import Config, Queue, SchemaMismatch, SQLiteRepository

def say(word):
    sys.stdout.write(word + "\\n")
    sys.stdout.flush()

class Tell(logging.Handler):
    def emit(self, record):
        if record.levelno >= logging.WARNING:
            say(record.getMessage())

logging.getLogger("taskx").addHandler(Tell())
queue = Queue(SQLiteRepository(sys.argv[1]), Config(worker_num=1, buffer_size=10))
go_on = threading.Event()

@queue.executor("hold", max_attempts=2)
def hold():
    say("holds")
    go_on.wait()
    return "held"

queue.declare("fine")
queue.start()
for name in ("first", "second", "third"):
    queue.submit("hold", id=name)
say("submitted")
sys.stdin.readline()
try:
    queue.submit("hold", id="late")
except SchemaMismatch as error:
    say(f"refused: {error}")
say(f"healthy: {queue.healthy}")
go_on.set()
queue.handle("first").result(100)
say("ended")
queue.close()
"""


@pytest.fixture
def repository(database):
    with SpySQLite(database) as made:
        yield made


@pytest.fixture
def migrate(database):
    """Return a function that migrates the file to a newer schema, as another process would, or back."""

    def migrate(*statements, version=schema.VERSION + 1):
        with closing(sqlite3.connect(database, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            for statement in (*statements, "CREATE TABLE migrated (x)", "DROP TABLE migrated"):
                other.execute(statement)
            other.execute(f"PRAGMA user_version = {version}")
            other.execute("COMMIT")

    return migrate


def new_task(task_id):
    return Task(id=task_id, type="fine")


def rows(database, sql):
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute(sql).fetchall()


def test_a_process_ends_in_order_when_another_one_migrates_its_file(spawn, database):
    """Running tasks end, waiting tasks are free for other nodes, and no new task is taken."""
    older = spawn(OLDER, database)
    assert {older.read(), older.read()} == {"holds", "submitted"}
    newer = spawn(NEWER + "print(queue.submit('fine', id='new').id)", database, NEW_COLUMN)
    assert newer.read() == "new"
    told = older.read()
    assert "takes no more tasks and hands back what it has" in told
    assert f"to schema version {schema.VERSION + 1}" in told
    assert "Restart this program" in told
    pending = "SELECT id, owner FROM tasks WHERE status = 'pending' ORDER BY id"
    freed = [("new", ""), ("second", ""), ("third", "")]
    eventually(lambda: rows(database, pending) == freed)
    older.tell()
    assert older.read().startswith("refused: another process migrated ")
    assert older.read() == "healthy: False"
    assert "ended" in [older.read() for _ in range(2)]  # besides a warning
    assert older.process.wait(PATIENCE) == 0
    assert rows(database, "SELECT status, result FROM tasks WHERE id = 'first'") == [
        ("completed", '"held"')
    ]
    assert rows(database, "SELECT count(*) FROM notes WHERE name LIKE 'node/%'") == [(0,)]
    assert rows(database, pending) == freed


def test_a_migration_is_logged_once(make_queue, migrate, caplog):
    queue = make_queue(worker_num=2)
    queue.executor("fine")(lambda: "fine")
    with caplog.at_level(logging.WARNING, logger="taskx"):
        queue.start()
        queue.submit("fine").result(PATIENCE)
        migrate()
        assert eventually(lambda: node_of(queue)._left.is_set())
        queue.stop()
    told = [record.levelname for record in caplog.records if "schema" in record.getMessage()]
    assert told == ["ERROR"]


def test_no_call_writes_into_a_file_that_was_just_migrated(repository, migrate):
    """This includes the first call, before which the queue did not know of the migration."""
    queue = Queue(repository)
    queue.declare("fine")
    kept = queue.submit("fine", id="kept")
    for begin in (
        lambda: queue.submit("fine", id="a"),
        lambda: queue.submit_many([Task(type="fine"), Task(type="fine")]),
        lambda: repository.update_status("kept", TaskStatus.RUNNING, ""),
        lambda: queue.delete("kept"),
        lambda: queue.pause("fine"),
        lambda: queue.start(),
    ):
        migrate()
        with pytest.raises(SchemaMismatch, match="nothing was stored"):
            begin()
        assert not queue.healthy
        migrate(version=schema.VERSION)
        repository.version()  # it sees that the schema is its own again
    assert [task.id for task in repository.list(TaskFilter())] == ["kept"]
    assert kept.task().status is TaskStatus.PENDING
    assert queue.healthy


def test_a_task_is_not_started_in_a_migrated_file(make_queue, migrate, repository):
    """The start is the first write after the migration: it is refused, and the node ends."""
    queue = make_queue(worker_num=1)
    ran = []
    queue.executor("fine")(lambda n: ran.append(n))
    queue.start()

    def before(writes):
        if any(getattr(write, "changes", {}).get("status") == "running" for write in writes):
            repository.before = lambda writes: None
            migrate()

    repository.before = before
    queue.submit("fine", {"n": 1}, id="a")
    assert eventually(lambda: node_of(queue)._left.is_set())
    assert not ran
    task = repository.get_by_id("a")
    assert (task.status, task.owner, task.starts) == (TaskStatus.PENDING, "", 0)


def test_drain_raises_schema_mismatch_after_a_migration(make_queue, migrate, gate):
    queue = make_queue(worker_num=1)
    handle = queue.executor("hold")(lambda: gate()).submit()
    queue.start()
    gate.wait_for()
    migrate()
    with pytest.raises(SchemaMismatch):
        queue.drain(PATIENCE)
    gate.open()
    assert handle.result(PATIENCE) is None


@pytest.mark.timing(retire_within=0.2)
def test_a_task_that_does_not_end_in_time_after_a_migration_is_interrupted(make_queue, migrate):
    queue = make_queue(worker_num=1)
    handle = queue.executor("wait")(lambda ctx: ctx.sleep(60)).submit()
    queue.start()
    eventually(lambda: handle.task().status is TaskStatus.RUNNING)
    migrate()
    assert eventually(lambda: node_of(queue)._left.is_set())
    task = handle.task()
    assert (task.status, task.interruptions, task.owner) == (TaskStatus.PENDING, 1, "")


def test_a_process_that_only_submits_is_refused_and_can_still_read(repository, migrate):
    queue = Queue(repository)
    queue.declare("fine")
    handle = queue.submit("fine")
    migrate("ALTER TABLE tasks ADD COLUMN mood TEXT")
    with pytest.raises(SchemaMismatch):
        queue.submit("fine")
    assert handle.task().status is TaskStatus.PENDING
    assert queue.list_tasks()[1] == 1


@pytest.mark.parametrize("change", [NEW_COLUMN, "UPDATE notes SET text = text"])
def test_every_kind_of_migration_is_noticed(spawn, repository, database, change):
    """A migration that only changes rows is noticed, too."""
    queue = Queue(repository)
    queue.declare("fine")
    for _ in range(3):  # until all statements are compiled
        queue.submit("fine")
    newer = spawn(NEWER + "print(queue.list_tasks()[1])", database, change)
    assert newer.read() == "3"
    with pytest.raises(SchemaMismatch):
        queue.submit("fine")
    assert queue.list_tasks()[1] == 3


def test_an_index_of_the_users_own_or_a_vacuum_is_no_migration(repository, database):
    """They change SQLite's own schema version, but not that of TaskX."""
    queue = Queue(repository)
    queue.declare("fine")
    queue.submit("fine")
    with closing(sqlite3.connect(database, isolation_level=None)) as other:
        other.execute("CREATE INDEX mine ON tasks (message)")
        other.execute("VACUUM")
    queue.submit("fine")
    assert queue.healthy


def test_the_version_is_not_read_while_the_schema_is_unchanged(repository):
    repository.create(new_task("first"))
    seen = []
    writer = connections_of(repository).writer()
    repository.create(new_task("second"))
    writer.set_trace_callback(seen.append)
    repository.create(new_task("third"))
    assert not [sql for sql in seen if "version" in sql]
    assert any("INSERT" in sql for sql in seen)
