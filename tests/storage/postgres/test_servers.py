"""Servers that fail while a queue runs: a clear error, what is lost is known, and the work goes on."""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import suppress
from functools import partial

import psycopg
import pytest
from helpers import PATIENCE, eventually, run_in_thread
from kinds import NO_SMALL_DISK
from mongo_proxy import Proxy
from postgres_server import no_small_disk, private

from taskx import DuplicateTask, PostgresRepository, RepositoryUnavailable, TaskNotFound, TaskStatus
from taskx.tasks import lifecycle
from taskx.tasks.clock import SYSTEM_CLOCK

from ..repositories import insert

pytestmark = [pytest.mark.postgres, pytest.mark.process]
LONG = PATIENCE
#: Bytes: room for the tables, and for some more tasks.
SMALL = 8_000_000


class Held:
    """A queue, and a task ``hold`` that runs until it is let go."""

    def __init__(self, queue):
        self.queue = queue
        self.begun, self.go = threading.Semaphore(0), threading.Event()
        self.runs = Counter()
        queue.executor("echo")(lambda n=0: n)
        queue.executor("hold")(self._hold)

    def _hold(self, ctx):
        self.runs[ctx.task.id] += 1
        self.begun.release()
        assert self.go.wait(LONG)
        return "held"

    def hold(self):
        """Submit a task that is held; return its handle when it runs."""
        handle = self.queue.submit("hold")
        assert self.begun.acquire(timeout=LONG)
        return handle

    def refused(self, words):
        """Submit a task. Return True if it is refused with an error that has these words."""
        try:
            self.queue.submit("echo")
        except RepositoryUnavailable as error:
            return words in str(error)
        return False

    def submitted(self, task_id, n):
        """Submit a task again and again, until it is stored; return its handle."""

        def stored():
            with suppress(RepositoryUnavailable):
                with suppress(DuplicateTask):
                    self.queue.submit("echo", {"n": n}, id=task_id)
                return True
            return False

        eventually(stored)
        return self.queue.handle(task_id)


@pytest.fixture
def held(make_queue, tmp_path):
    """Return a function that makes a queue with executors on a database, and starts it."""
    opened = []

    def held(url):
        repository = PostgresRepository(url, run_folder=tmp_path / "run", timeout=2)
        opened.append(repository)
        made = Held(make_queue(repository, worker_num=3))
        made.queue.start()
        return made

    yield held
    for repository in opened:
        repository.close()


# --- a server that refuses

READ_ONLY = (
    "ALTER DATABASE {} SET default_transaction_read_only = on",
    "ALTER DATABASE {} RESET default_transaction_read_only",
    "takes no writes",
)
TOO_MANY = (
    "ALTER ROLE {} CONNECTION LIMIT 0",
    "ALTER ROLE {} CONNECTION LIMIT -1",
    "too many connections",
)


@pytest.mark.parametrize(
    ("refuse", "accept", "words"), [READ_ONLY, TOO_MANY], ids=["read-only", "full"]
)
def test_a_server_that_refuses_for_a_while_loses_nothing(server, held, refuse, accept, words):
    name = server.new_database()  # and a role of this name, as no limit counts for a superuser
    with server.connect() as admin:
        admin.execute(f"CREATE ROLE {name} LOGIN")
        admin.execute(f"ALTER DATABASE {name} OWNER TO {name}")
        try:
            made = held(f"host=127.0.0.1 port={server.port} user={name} dbname={name}")
            running = made.hold()
            admin.execute(refuse.format(name))
            server.break_connections(name)
            eventually(
                lambda: made.refused(words)
            )  # the first one may tell that its connection broke
            made.go.set()
            admin.execute(accept.format(name))
            assert made.submitted("x", 7).result(LONG) == 7
            assert running.result(LONG) == "held"
            assert made.runs[running.id] == 1
            assert made.queue.stop(LONG) == []
        finally:
            made.queue.repository.close()
            server.drop_database(name)
            admin.execute(f"DROP ROLE {name}")


@pytest.mark.skipif(bool(no_small_disk()), reason=f"{NO_SMALL_DISK}: {no_small_disk()}")
def test_a_full_disk_loses_nothing(held):
    with private(small=SMALL) as server:
        with server.connect() as admin:
            admin.execute(f"CREATE TABLESPACE small LOCATION '{server.small}'")
            admin.execute("CREATE DATABASE tasks TABLESPACE pg_default")
        with server.connect("tasks") as admin:
            admin.execute("ALTER DATABASE tasks SET default_tablespace = small")
            made = held(server.url("tasks"))
            running = made.hold()
            waiting = [made.queue.submit("echo", {"n": n}, delay=0.1) for n in range(5)]
            admin.execute("CREATE TABLE filler (text text) TABLESPACE small")
            for size, rows in (5000, 100), (100, 10):  # the rest of the pages, too
                fill = (
                    f"INSERT INTO filler SELECT repeat('x', {size}) FROM generate_series(1, {rows})"
                )
                with pytest.raises(psycopg.errors.DiskFull):
                    repeat(partial(admin.execute, fill))
            # The table has pages with room for some.
            eventually(lambda: made.refused("No space left"))
            made.go.set()
            admin.execute("DROP TABLE filler")
            assert made.submitted("x", 7).result(LONG) == 7
            assert [handle.result(LONG) for handle in waiting] == [*range(5)]
            assert running.result(LONG) == "held"
            assert made.runs[running.id] == 1
            assert made.queue.stop(LONG) == []
            made.queue.repository.close()


def repeat(call):
    """Call a function until it raises."""
    while True:
        call()


def test_the_death_of_a_server_undoes_no_submit(tmp_path):
    """A heartbeat is a commit that need not wait for the disk. The submits after it wait."""
    with private() as server:
        url = server.url(server.new_database())
        with PostgresRepository(url, run_folder=tmp_path) as repository:
            assert repository.put_note("node/x", "beat", 0)
            assert all(repository.apply([insert(name, SYSTEM_CLOCK) for name in "ab"]))
            server.kill()
            server.start()
            assert len(repository.statuses(["a", "b"])) == 2


# --- replicas


def test_a_commit_that_waits_for_a_replica_counts_once(tmp_path):
    """The client gives up before the server does: the commit takes place later, and is recognised."""
    with private() as server, server.connect() as admin:
        url = server.url(server.new_database())
        with PostgresRepository(url, "full", run_folder=tmp_path, timeout=1) as repository:
            repository.apply([insert("a", SYSTEM_CLOCK)])
            repository.apply([insert("b", SYSTEM_CLOCK)])
            admin.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
            admin.execute("SELECT pg_reload_conf()")
            # A submit, and a take, which passes over the locks of others.
            for write in insert("c", SYSTEM_CLOCK), lifecycle.take("a", "here"):
                eventually(lambda write=write: in_doubt(repository, write))
            # It waits for the first copy, which the server may keep for longer than the time-out.
            again = run_in_thread(lambda: eventually(lambda: applied(repository, write)))
            admin.execute("ALTER SYSTEM RESET synchronous_standby_names")
            admin.execute("SELECT pg_reload_conf()")
            assert again() == [True]
            assert repository.statuses([*"abc"]) == dict.fromkeys("abc", "pending")


def in_doubt(repository, write):
    try:
        repository.apply([write])
    except RepositoryUnavailable as error:
        return error.in_doubt
    return False


def applied(repository, write):
    """Return what ``apply`` says of a write, and None of one that is refused."""
    try:
        return list(repository.apply([write]))
    except RepositoryUnavailable:
        return None


def test_a_failover_loses_the_commits_that_the_replica_did_not_get(held):
    """A submit among them is gone. A task whose outcome was among them runs again."""
    with private() as primary:
        proxy = Proxy(primary.port)
        name = primary.new_database()
        with private(source=proxy.port) as replica:
            ports = f"{primary.port},{replica.port}"
            made = held(f"host=127.0.0.1,127.0.0.1 port={ports} user=postgres dbname={name}")
            kept, running = made.submitted("kept", 1), made.hold()
            assert kept.result(LONG) == 1
            eventually(lambda: has_all(replica, primary))
            proxy.cut(refuse=True)
            lost = made.submitted("lost", 2)
            made.go.set()
            assert (lost.result(LONG), running.result(LONG)) == (2, "held")
            primary.kill()
            with pytest.raises(RepositoryUnavailable):
                made.queue.submit("echo")
            with replica.connect() as admin:
                admin.execute("SELECT pg_promote()")
            assert made.submitted("new", 3).result(LONG) == 3
            with pytest.raises(TaskNotFound):
                made.queue.get_task_status("lost")
            assert kept.task().status is TaskStatus.COMPLETED
            again = made.queue.handle(running.id)
            eventually(lambda: again.task().status is TaskStatus.COMPLETED)
            assert made.runs[running.id] == 2
            assert made.queue.stop(LONG) == []
            made.queue.repository.close()
        proxy.close()


def has_all(replica, primary):
    """Return True if a replica shows all commits."""
    with primary.connect() as there, replica.connect() as here:
        [end] = there.execute("SELECT pg_current_wal_insert_lsn()").fetchone()
        return here.execute("SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn", [end]).fetchone() == (
            True,
        )
