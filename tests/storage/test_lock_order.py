"""The order of the locks on the way of a write: whoever holds a later one waits for no earlier one.

Each test holds a lock, lets a thread come to it, and looks at what that thread holds.
"""

from __future__ import annotations

import sqlite3
import threading
from contextlib import AbstractContextManager, closing, contextmanager

import django_project
import pytest
from helpers import PATIENCE, connections_of, eventually, ids, pool_of, run_in_thread, run_once

from taskx import ConfigurationError, SQLiteRepository, TaskFilter, TaskStatus
from taskx.stores.sqlite.turnstile import Turnstile
from taskx.tasks.ids import new_id
from taskx.tasks.timing import DEFAULT_TIMING

# Seconds that a repository waits for a lock. A test that waits so long has failed before.
NEVER = 4 * PATIENCE


class Watched:
    """A lock that says when a thread wants it."""

    def __init__(self, lock) -> None:
        self._lock = lock
        self.wanted = threading.Event()

    def __enter__(self):
        self.wanted.set()
        return self._lock.__enter__()

    def __exit__(self, *error):
        return self._lock.__exit__(*error)

    def __getattr__(self, name):
        return getattr(self._lock, name)


class OnSQLite:
    """``SQLiteRepository`` in an application's file.

    Attributes:
        lock: our lock on the connection that writes.
        turnstile: the turns of this process among others.
    """

    def __init__(self, folder) -> None:
        self.path = folder / "app.db"
        with self.connected(0) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("CREATE TABLE rows (n)")
        self.repository = SQLiteRepository(self.path, prefix="taskx_", busy_timeout=NEVER)
        self.repository.count(TaskFilter())
        links = self.repository._file_links
        self.lock = links.write_lock = Watched(links.write_lock)
        self.turnstile, self.file = links.turnstile, self.repository.file

    def connected(self, patience: float) -> AbstractContextManager[sqlite3.Connection]:
        return closing(sqlite3.connect(self.path, timeout=patience, isolation_level=None))

    def file_is_free(self) -> bool:
        """Return True if nobody holds the file's write lock."""
        with self.connected(0) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                return False
            return True

    @contextmanager
    def block(self):
        """A transaction of the caller that holds the file's write lock; options for a submit in it."""
        with self.connected(NEVER) as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield {"connection": connection}
            connection.execute("COMMIT")

    def executors_block(self) -> None:
        try:
            with self.repository.transactions.begin():
                pass
        finally:
            self.let_go()

    def let_go(self) -> None:
        """Close the connections of this thread."""


class OnDjango(OnSQLite):
    """``DjangoRepository`` in an SQLite file."""

    def options(self) -> dict[str, object]:
        return {"timeout": NEVER}

    def __init__(self, folder) -> None:
        self.path = folder / "site.db"
        self.repository = django_project.on_sqlite(folder, timeout=NEVER)
        django_project.add_database(self.repository.using, OPTIONS=self.options())
        self.repository.house.prepare()
        connections = self.repository._connections
        self.lock = connections.lock = Watched(connections.lock)
        self.turnstile = self.repository._pool.turns._turnstile
        self.file = self.repository._file

    @contextmanager
    def block(self):
        from django.contrib.auth.models import Group
        from django.db import transaction

        with transaction.atomic(using=self.repository.using):
            Group.objects.using(self.repository.using).create(name=new_id())
            yield {}

    def let_go(self) -> None:
        from django.db import connections

        connections.close_all()


class OnDjangoImmediate(OnDjango):
    """The same with the transactions that our documentation recommends."""

    def options(self) -> dict[str, object]:
        return {**super().options(), "transaction_mode": "IMMEDIATE"}


def _knows_modes() -> bool:
    django = pytest.importorskip("django")
    return django.VERSION >= (5, 1)


@pytest.fixture(params=[OnSQLite, OnDjango, OnDjangoImmediate])
def store(request, tmp_path):
    if request.param is OnDjangoImmediate and not _knows_modes():
        pytest.skip("this Django has no transaction_mode")
    made = request.param(tmp_path)
    with made.repository:
        yield made
    made.let_go()


@pytest.fixture
def repository(store):
    return store.repository


@pytest.fixture
def entered(store):
    """An event: a thread has the turn, and so our lock on the connection, too."""
    made, enter = threading.Event(), store.turnstile.enter

    def watched(timeout):
        left = enter(timeout)
        made.set()
        return left

    store.turnstile.enter = watched
    return made


@pytest.fixture
def queue(store, make_queue):
    made = make_queue(store.repository, worker_num=4)
    made.executor("echo", rate="1000/s")(lambda n=0: n)
    return made


# --- the file's write lock, and our lock on the connection


def test_an_executors_transaction_waits_for_the_connection_without_the_files_lock(store):
    with store.lock:
        store.lock.wanted.clear()
        block = run_in_thread(store.executors_block)
        assert store.lock.wanted.wait(PATIENCE)
        assert store.file_is_free()
    block()


def test_a_block_goes_on_while_a_write_waits_for_its_commit(store, queue, entered):
    """The write holds our lock on the connection and the turn."""
    old, other = queue.submit("echo"), queue.submit("echo")
    with store.block() as given:
        entered.clear()
        write = run_in_thread(lambda: queue.submit("echo", id="beside"))
        assert entered.wait(PATIENCE)
        new = queue.submit("echo", **given)
        assert queue.cancel_task(old.id, **given)
        assert queue.get_task_status(other.id).status is TaskStatus.PENDING
        assert queue.why(other.id)
        assert not queue.nodes()
    write()
    assert ids(queue) == {old.id, other.id, new.id, "beside"}


def test_an_executors_transaction_goes_on_while_a_write_waits_for_it(store, queue, entered):
    queue.submit("echo", id="old")
    repository = store.repository
    with repository.transactions.begin() as connection:
        entered.clear()
        write = run_in_thread(lambda: queue.submit("echo", id="new"))
        assert entered.wait(PATIENCE)
        with repository.transactions.join(connection, None) as inside:
            assert inside.get_by_id("old").status is TaskStatus.PENDING
            inside.delete("old")
        assert repository.get_by_id("old").status is TaskStatus.PENDING
    assert write().id == "new"
    assert repository.count(TaskFilter()) == 1


# --- the file's write lock, and the turn between processes


def test_an_executors_transaction_waits_for_its_turn_without_the_files_lock(store, monkeypatch):
    wanted, enter = threading.Event(), store.turnstile.enter
    other = Turnstile(store.file, DEFAULT_TIMING)  # of another process: the locks are of open files
    other.enter(NEVER)

    def watched(timeout):
        wanted.set()
        return enter(timeout)

    monkeypatch.setattr(store.turnstile, "enter", watched)
    try:
        block = run_in_thread(store.executors_block)
        assert wanted.wait(PATIENCE)
        assert store.file_is_free()
    finally:
        other.leave()
    block()
    other.close()


def test_a_block_needs_no_turn(store, queue):
    other = Turnstile(store.file, DEFAULT_TIMING)
    queue.submit("echo", id="old")
    other.enter(NEVER)
    try:
        with store.block() as given:
            queue.submit("echo", id="new", **given)
            assert queue.cancel_task("old", **given)
    finally:
        other.leave()
    assert ids(queue) == {"old", "new"}
    other.close()


# --- the file's write lock, and the lock of a run


@contextmanager
def storing(ctx):
    """Have another thread of a run store a step: it keeps the run's lock until the event is set."""
    keeper, begun, over = ctx._kept()._keeper, threading.Event(), threading.Event()
    store = keeper.store

    def slowly(*given, **options):
        begun.set()
        assert over.wait(PATIENCE)
        return store(*given, **options)

    keeper.store = slowly
    step = run_in_thread(lambda: ctx.step("beside", int))
    try:
        assert begun.wait(PATIENCE)
        yield over
    finally:
        over.set()
        keeper.store = store
    assert step() == 0


def test_an_executors_transaction_waits_for_a_step_without_the_files_lock(store, queue):
    def work(ctx):
        kept = ctx._kept()
        lock = kept._lock = Watched(kept._lock)
        with storing(ctx) as over:
            lock.wanted.clear()

            def look():
                assert lock.wanted.wait(PATIENCE)
                try:
                    return eventually(store.file_is_free)
                finally:
                    over.set()

            looked = run_in_thread(look)
            with ctx.transaction() as tx:
                tx.complete("done")
            assert looked()
        store.let_go()

    assert run_once(queue, work).result == "done"


@pytest.mark.parametrize(
    "call",
    [
        lambda ctx: ctx.step("one", int),
        lambda ctx: setattr(ctx, "cursor", 1),
        lambda ctx: ctx.transaction().__enter__(),
    ],
)
def test_a_block_refuses_at_once_what_would_wait_for_a_step(store, queue, call):
    def work(ctx):
        with storing(ctx), store.block() as given:
            queue.submit("echo", **given)
            with pytest.raises(ConfigurationError):
                call(ctx)
        store.let_go()
        return "refused"

    assert run_once(queue, work).result == "refused"


def test_a_block_refuses_a_transaction_at_once_while_progress_waits_for_it(store, queue):
    def work(ctx):
        with store.block() as given:
            queue.submit("echo", **given)
            ctx.progress(50)
            eventually(lambda: ctx._storing)
            with pytest.raises(ConfigurationError):
                ctx.transaction().__enter__()
        store.let_go()
        return "refused"

    assert run_once(queue, work).result == "refused"


# --- the file's write lock, and locks of a node


def test_a_block_reads_why_a_task_waits_while_a_node_stores_its_limits(store, queue):
    queue.start()
    queue.pause("echo")
    waiting = queue.submit("echo")
    with pool_of(queue).admission._lock:  # as while the node changes a note, for which it waits
        assert run_in_thread(lambda: queue.why(waiting.id))()


def test_a_read_waits_for_no_write(tmp_path):
    """Also if the connection that writes was closed, as before a fork."""
    with SQLiteRepository(tmp_path / "tasks.db") as repository:
        repository.count(TaskFilter())
        connections_of(repository).discard_writer()
        with repository._file_links.write_lock:
            assert run_in_thread(lambda: repository.count(TaskFilter()))() == 0


class Asked(Watched):
    """A lock that also says when a thread asks for it with a time-out."""

    def acquire(self, *how):
        self.wanted.set()
        return self._lock.acquire(*how)


def test_the_first_read_waits_only_until_the_file_is_open(tmp_path):
    """The first write, in another thread, has opened it then. It may wait for the file for long."""
    with SQLiteRepository(tmp_path / "tasks.db") as repository:
        links = repository._file_links
        links.write_lock = lock = Asked(links.write_lock)
        with lock:
            lock.wanted.clear()
            count = run_in_thread(lambda: repository.count(TaskFilter()))
            assert lock.wanted.wait(PATIENCE)
            connections_of(repository).writer()
            assert count() == 0


def test_a_read_goes_on_after_an_interrupted_close_has_left_the_file_open(tmp_path):
    with SQLiteRepository(tmp_path / "tasks.db") as repository:
        repository.count(TaskFilter())
        connections_of(repository).opened = False  # as its first step does
        assert run_in_thread(lambda: repository.count(TaskFilter()))() == 0


# --- all of them


def test_executors_with_transactions_and_blocks_with_submits_pass_one_another(store, queue):
    def work(ctx, n):
        try:
            with ctx.transaction() as tx:
                tx.complete(n)
        finally:
            store.let_go()

    queue.executor("work")(work)
    with queue:
        made = []
        for n in range(20):
            with store.block() as given:
                made.append(queue.submit("work", {"n": n}, **given))
        eventually(lambda: queue.count_tasks(status="completed") == 20)
    assert [queue.get_task_status(one.id).result for one in made] == [*range(20)]
