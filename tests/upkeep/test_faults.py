"""Faults of one host: a locked file, a full disk, damaged records, a wrong clock, too many threads."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from contextlib import closing
from datetime import timedelta

import mongomock
import pytest
from helpers import (
    PATIENCE,
    SOON,
    SpySQLite,
    eventually,
    is_intact,
    parts_of,
    pool_of,
    run_in_thread,
    whole_round,
)

from taskx import (
    Hook,
    MongoRepository,
    QueueFull,
    RepositoryUnavailable,
    SQLiteRepository,
    Task,
    TaskFilter,
    TaskStatus,
)
from taskx.node.housekeeper import Housekeeper
from taskx.node.node import LocalNode
from taskx.node.pool import WorkerPool
from taskx.stores.sqlite.turnstile import NAMES
from taskx.testing import ManualClock


@pytest.fixture
def repository(database):
    """An SQLite file, as these faults happen to files."""
    with SpySQLite(database) as made:
        yield made


def all_workers_live(queue):
    """Check that as many tasks as there are workers run at the same time."""
    barrier = threading.Barrier(queue.config.worker_num)
    queue.executor("meet")(lambda: barrier.wait(PATIENCE) * 0)
    for handle in [queue.submit("meet") for _ in range(queue.config.worker_num)]:
        assert handle.result(PATIENCE) == 0


# The file is locked by another process

LOCKER = """
    import sqlite3, sys
    connection = sqlite3.connect(sys.argv[1], isolation_level=None)
    for line in sys.stdin:
        connection.execute("BEGIN IMMEDIATE")
        print("locked", flush=True)
        sys.stdin.readline()
        connection.execute("COMMIT")
        print("open", flush=True)
"""


class Locker:
    """Another process that locks the file until it is told to open it."""

    def __init__(self, child):
        self._child = child

    def lock(self):
        self._child.tell()
        assert self._child.read() == "locked"

    def open(self):
        self._child.tell()
        assert self._child.read() == "open"


@pytest.fixture
def locker(spawn, database):
    return Locker(spawn(LOCKER, database))


@pytest.fixture
def impatient(database):
    """A repository that waits only a moment for a lock; request it before ``make_queue``."""
    with SQLiteRepository(database, busy_timeout=0.2) as made:
        yield made


@pytest.fixture
def patient(database):
    """A repository that waits longer for a lock than any test lasts."""
    with SQLiteRepository(database, busy_timeout=600) as made:
        yield made


@pytest.mark.usefixtures("calm")  # they count the starts of tasks
class TestLocked:
    @pytest.mark.slow
    def test_tasks_wait_while_the_file_is_locked(self, patient, make_queue, locker, gate):
        """No submit is refused, and running tasks end normally."""
        queue = make_queue(patient, worker_num=2)
        queue.executor("hold")(lambda n: (gate(), n)[1])
        queue.start()
        running = [queue.submit("hold", {"n": n}) for n in range(2)]
        gate.wait_for(2)
        locker.lock()
        submits = [run_in_thread(lambda n=n: queue.submit("hold", {"n": n})) for n in (2, 3)]
        eventually(lambda: parts_of(queue).moves._waiting)
        gate.open()
        threading.Event().wait(1)  # blocks on purpose
        assert [handle.done() for handle in running] == [False, False]
        locker.open()
        handles = [*running, *(submit() for submit in submits)]
        assert [handle.result(PATIENCE) for handle in handles] == [0, 1, 2, 3]
        assert {handle.task().starts for handle in handles} == {1}
        all_workers_live(queue)

    @pytest.mark.slow
    def test_submits_are_refused_while_the_file_is_locked_too_long(
        self, impatient, make_queue, clock, locker, gate
    ):
        """Refused submits store nothing; outcomes, time-outs and workers survive the lock."""
        queue = make_queue(impatient, worker_num=2, clock=clock)
        begun, timed_out = threading.Event(), threading.Event()

        @queue.executor("slow", timeout=60)
        def slow(ctx):
            begun.set()
            ctx.token.wait(PATIENCE)
            timed_out.set()
            ctx.token.raise_if_cancelled()

        queue.executor("hold")(lambda n: (gate(), n)[1])
        queue.start()
        held, late = queue.submit("hold", {"n": 7}), queue.submit("slow")
        gate.wait_for(1)
        assert begun.wait(PATIENCE)
        waiting = queue.submit("hold", {"n": 8})
        locker.lock()
        for _ in range(2):
            with pytest.raises(RepositoryUnavailable, match=r"locked for 0\.2 s"):
                queue.submit("hold", {"n": 0}, id="refused")
        clock.advance(60)
        assert timed_out.wait(PATIENCE)
        gate.open()
        eventually(lambda: len(parts_of(queue).moves._waiting) >= 2)
        threading.Event().wait(1)  # blocks on purpose: several times the busy timeout
        assert {task.status for task in queue.list_tasks()[0]} == {"running", "pending"}
        locker.open()
        assert [held.result(PATIENCE), waiting.result(PATIENCE)] == [7, 8]
        assert "timed out" in late.exception(PATIENCE).error
        assert {handle.task().starts for handle in (held, late, waiting)} == {1}
        assert queue.repository.get_many(["refused"]) == {}
        all_workers_live(queue)

    @pytest.mark.slow
    def test_stop_ends_by_its_timeout_while_the_file_is_locked(
        self, patient, make_queue, locker, gate
    ):
        """Outcomes that it could not write then are written when the file is unlocked."""
        queue = make_queue(patient, worker_num=1)
        queue.executor("hold")(lambda: (gate(), "done")[1])
        queue.start()
        running, waiting = queue.submit("hold"), queue.submit("hold")
        gate.wait_for(1)
        locker.lock()
        gate.open()
        began = time.monotonic()
        still = queue.stop(timeout=0.5)
        assert time.monotonic() - began < SOON  # although a write waits 600 s
        assert running.id in still
        locker.open()
        assert running.result(PATIENCE) == "done"
        eventually(lambda: not queue.repository.liveness.nodes())
        task = waiting.task()
        assert (task.status, task.owner, task.errors) == (TaskStatus.PENDING, "", 0)

    @pytest.mark.slow
    @pytest.mark.timing(audit_every=3600.0)  # an audit would find the task, and run it
    def test_another_queue_takes_the_tasks_that_a_stop_could_not_hand_back(
        self, impatient, make_queue, locker, gate
    ):
        """A stopped queue is a dead node, even if it could not record that and its process lives."""
        queue = make_queue(impatient, worker_num=1)
        queue.executor("hold")(lambda: gate())
        queue.start()
        first = queue.submit("hold")
        gate.wait_for(1)
        gate.open()
        first.result(PATIENCE)
        eventually(pool_of(queue).holds_nothing)
        left = queue.submit("hold", delay=3600)
        node = pool_of(queue).node.id
        with closing(sqlite3.connect(impatient.path, isolation_level=None)) as other:
            # As if it lay in the buffer.
            other.execute("UPDATE tasks SET owner = ?, held = 0 WHERE id = ?", (node, left.id))
        locker.lock()
        assert queue.stop(timeout=0.1) == []
        eventually(lambda: [node.alive for node in impatient.liveness.nodes()] == [False])
        locker.open()
        again = make_queue(impatient)
        again.executor("hold")(lambda: "by another")
        again.start()
        assert left.result(PATIENCE) == "by another"


# The disk is full

FULL = """
    import os, resource, sys, threading
    from taskx import Config, Queue, RepositoryUnavailable, SQLiteRepository
    from taskx.testing import ManualClock

    path = sys.argv[1]
    repository = SQLiteRepository(path, busy_timeout=1)
    queue = Queue(repository, Config(worker_num=2, buffer_size=10))
    begun, go_on = threading.Semaphore(0), threading.Event()

    @queue.executor()
    def hold(n):
        begun.release()
        go_on.wait(60)
        return "y" * n

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    queue.start()
    running = [queue.submit("hold", {"n": 50_000}) for _ in range(2)]
    begun.acquire(), begun.acquire()
    waiting = [queue.submit("hold", {"n": 10}) for _ in range(3)]
    limit(os.path.getsize(path + "-wal"))
    for n in range(3):
        try:
            queue.submit("hold", {"n": 1}, id="refused")
        except RepositoryUnavailable as error:
            print("refused:", "no room" in str(error) or "disk I/O" in str(error))
    go_on.set()
    print("full", flush=True)
    sys.stdin.readline()
    print(sorted({task.status.value for task in queue.list_tasks()[0]}), queue.list_tasks()[1])
    limit(resource.RLIM_INFINITY)
    print([len(handle.result(60)) for handle in running + waiting])
    print({(len(h.task().attempts), h.task().errors) for h in running + waiting})
    print(len(queue.submit("hold", {"n": 3}, id="refused").result(60)))
    print(queue.stop(), repository.count(__import__("taskx").TaskFilter()), repository.liveness.nodes())
"""


def test_a_full_disk_loses_no_accepted_task(spawn, database):
    """The operating system refuses writes at submit, start and finish. The queue recovers by itself."""
    child = spawn(FULL, database)
    assert [child.read() for _ in range(4)] == ["refused: True"] * 3 + ["full"]
    threading.Event().wait(1)  # blocks on purpose: workers and housekeeper try, and fail
    child.tell()
    assert child.read() == "['pending', 'running'] 5"
    assert child.read() == "[50000, 50000, 10, 10, 10]"
    assert child.read() == "{(1, 0)}"
    assert child.read() == "3"
    assert child.read() == "[] 6 []"
    child.ends()
    assert child.process.returncode == 0
    assert is_intact(database)


# A record is damaged

DAMAGE = [
    ("params", "{not JSON"),
    ("params", "[]"),
    ("params", b'{"n": "\xff"}'),
    ("result", "NaN,"),
    ("earlier_attempts", "[[1]]"),
    ("priority", "high"),
    ("created_at", "2024-01-01"),
    ("created_at", 10**18),
    ("run_at", "2024-01-01"),
    ("started_at", "noon"),
    ("timeout", "soon"),
    ("max_attempts", "many"),
    ("errors", "none"),
    ("crashes", "few"),
    ("message", b"\xff"),
    ("worker", b"\xff\xfe"),
]


@pytest.fixture
def damaged(database):
    """Return a function that makes a file of five tasks, one with a value that TaskX did not write."""
    made = SQLiteRepository(database)

    def make(column, value, more=""):
        for name in "abcde":
            # Tagged, so that they are read as a whole before they start.
            made.create(Task(id=name, type="n", params={"n": name}, tags=["x"]))
        cast = "CAST(? AS TEXT)" if isinstance(value, bytes) else "?"
        with closing(sqlite3.connect(database, isolation_level=None)) as other:
            other.execute(f"UPDATE tasks SET {column} = {cast}{more} WHERE id = 'b'", (value,))
        return made

    with made:
        yield make


@pytest.mark.parametrize(("column", "value"), DAMAGE, ids=repr)
def test_a_damaged_record_fails_and_the_others_run(damaged, make_queue, column, value):
    """A value may be cut short, changed by hand, or not text: the other tasks are listed, and run."""
    queue = make_queue(damaged(column, value), worker_num=1)
    ran = []
    queue.executor("n")(lambda n: ran.append(n))
    assert len(queue.list_tasks()[0]) == 5
    queue.start()
    assert queue.drain(PATIENCE)
    assert sorted(ran) == list("acde")
    task = queue.get_task_status("b")
    assert (task.status, task.errors) == (TaskStatus.FAILED, 1)
    assert task.error.startswith("RepositoryCorrupt: the stored record is damaged")
    all_workers_live(queue)


@pytest.mark.parametrize(
    ("column", "value", "more"),
    [("starts", "twice", ""), ("run_at", "2024-01-01", ", held = 1"), ("type", b"\xff", "")],
)
def test_a_damaged_record_that_cannot_start_holds_up_no_other(
    damaged, make_queue, monkeypatch, column, value, more
):
    """It is not fetched again and again either."""
    repository = damaged(column, value, more)
    fetches, ready = [], repository.ready
    monkeypatch.setattr(repository, "ready", lambda *a: fetches.append(1) or ready(*a))
    queue = make_queue(repository, worker_num=1)
    ran = []
    queue.executor("n")(lambda n: ran.append(n))
    queue.start()
    eventually(lambda: len(ran) == 4)
    assert queue.submit("n", {"n": "f"}, delay=0.05).result(PATIENCE) is None
    assert ran == list("acdef")
    assert len(fetches) < 100
    assert "damaged" in queue.repository.list(TaskFilter(status="pending"))[0].damage


def test_a_damaged_record_of_a_dead_node_is_rescued_with_the_others(damaged, make_queue):
    repository = damaged("errors", "none", ", status = 'running', owner = 'gone', starts = 1")
    with closing(sqlite3.connect(repository.path, isolation_level=None)) as other:
        other.execute("UPDATE tasks SET status = 'running', owner = 'gone' WHERE id = 'c'")
    queue = make_queue(repository, worker_num=1)
    ran = []
    queue.executor("n")(lambda n: ran.append(n))
    queue.start()
    assert queue.drain(PATIENCE)
    assert sorted(ran) == list("acde")
    tasks = {name: queue.get_task_status(name) for name in "bc"}
    assert {name: task.crashes for name, task in tasks.items()} == {"b": 1, "c": 1}
    assert tasks["b"].status is TaskStatus.FAILED


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("params", [1]),
        ("progress", "half"),
        ("created_at", "yesterday"),
        ("duration", "long"),
        ("taskx.priority", "high"),
        ("taskx.errors", "none"),
        ("taskx.run_at", "soon"),
        ("taskx.timeout", "soon"),
        ("taskx.max_attempts", "many"),
        ("taskx.earlier_attempts", "[[1]]"),
    ],
)
def test_a_damaged_document_fails_and_the_others_run(make_queue, tmp_path, field, value):
    """A damaged document of MongoDB behaves like a damaged record of a file."""
    repository = MongoRepository(mongomock.MongoClient().db, run_folder=tmp_path)
    for name in "abcde":
        repository.create(Task(id=name, type="n", params={"n": name}))
    repository._connection.tasks.update_one({"_id": "b"}, {"$set": {field: value}})
    queue = make_queue(repository, worker_num=1)
    ran = []
    queue.executor("n")(lambda n: ran.append(n))
    queue.start()
    later = queue.submit("n", {"n": "f"}, delay=0.05)
    assert queue.drain(PATIENCE)
    assert later.result(PATIENCE) is None
    assert sorted(ran) == list("acdef")
    task = queue.get_task_status("b")
    assert (task.status, task.errors) == (TaskStatus.FAILED, 1)
    assert task.error.startswith("RepositoryCorrupt: the stored record is damaged")
    all_workers_live(queue)
    queue.stop()
    repository.close()


# The clock is wrong


@pytest.mark.parametrize("hours", [1, -1])
def test_a_clock_that_is_set_during_a_run_makes_no_task_run_twice(make_queue, database, hours):
    """No duration is wrong, and a due task stays due."""
    clock = ManualClock()
    queue = make_queue(SpySQLite(database), clock=clock, worker_num=2, buffer_size=200)
    ran = []

    @queue.executor("n", max_attempts=2)
    def n(ctx, n):
        ran.append(n)
        if n == 10:
            clock.set_wall(clock.now() + timedelta(hours=hours))
        if n % 5 == 0 and ctx.task.attempt == 1:
            raise ValueError

    queue.start()
    handles = [queue.submit("n", {"n": number}) for number in range(100)]
    for handle in handles:
        handle.result(PATIENCE)
    later = queue.submit("n", {"n": 101}, delay=0.001)
    clock.advance(0.001)
    later.result(PATIENCE)
    retried = list(range(0, 100, 5))
    assert sorted(ran) == sorted([*range(100), *retried, 101])
    tasks = [handle.task() for handle in (*handles, later)]
    assert {task.duration for task in tasks} == {0}
    assert {(task.crashes, task.interruptions) for task in tasks} == {(0, 0)}
    queue.stop()
    queue.repository.close()


@pytest.mark.timing(recover_every=0.0)
@pytest.mark.usefixtures("calm")
def test_two_nodes_whose_clocks_differ_by_two_hours_work_together(make_queue, database, gate):
    """Neither node believes that the other is dead, or that its tasks must run again."""
    # Each round checks for dead nodes.
    here, there = ManualClock(), ManualClock()
    there.set_wall(here.now() + timedelta(hours=2))
    queues = [make_queue(SpySQLite(database), clock=clock, worker_num=2) for clock in (here, there)]
    ran = []
    for queue in queues:
        queue.executor("n")(lambda n: ran.append(n))
        queue.executor("hold")(lambda: gate())
        queue.start()
    held = [queue.submit("hold") for queue in queues]
    gate.wait_for(2)
    handles = [queues[number % 2].submit("n", {"n": number}) for number in range(50)]
    for handle in handles:
        handle.result(PATIENCE)
    for _ in range(3):
        for clock in (here, there):
            clock.advance(3600)
        for queue in queues:
            whole_round(queue)
    gate.open()
    for handle in held:
        handle.result(PATIENCE)
        assert (handle.task().starts, handle.task().crashes) == (1, 0)
    assert sorted(ran) == list(range(50))
    for queue in queues:
        queue.stop()
        queue.repository.close()


# Threads


def test_a_thousand_threads_can_submit_at_once(make_queue, database):
    """Each submit is accepted or refused with a reason. Exactly the accepted tasks are stored and run."""
    queue = make_queue(SQLiteRepository(database), worker_num=4, buffer_size=200)
    ran, accepted, rejected, other = [], [], [], []
    queue.executor("n")(lambda n: ran.append(n))
    queue.start()
    barrier = threading.Barrier(1000)

    def submit(n):
        barrier.wait(3 * PATIENCE)
        try:
            accepted.append(queue.submit("n", {"n": n}, id=f"t{n}").id)
        except QueueFull:
            rejected.append(n)
        except BaseException as error:  # noqa: BLE001  (none is expected)
            other.append(error)

    before = threading.stack_size(256 * 1024)
    try:
        threads = [threading.Thread(target=submit, args=(n,)) for n in range(1000)]
        for thread in threads:
            thread.start()
    finally:
        threading.stack_size(before)
    for thread in threads:
        thread.join(3 * PATIENCE)
    assert other == []
    assert len(accepted) + len(rejected) == 1000
    assert len(accepted) >= 200
    assert queue.drain(3 * PATIENCE)
    assert sorted(f"t{n}" for n in ran) == sorted(accepted)
    assert {task.id for task in queue.repository.list(TaskFilter(limit=2000))} == set(accepted)
    queue.stop()
    queue.repository.close()


# A start that fails


class Started(Hook):
    """Counts the starts of queues."""

    times = 0

    def queue_started(self, queue):
        self.times += 1


def own_threads():
    return [t for t in threading.enumerate() if t.name.startswith(("taskx-work", "taskx-house"))]


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), KeyboardInterrupt()])
@pytest.mark.parametrize("number", [1, 3, 4], ids=["worker", "last worker", "housekeeper"])
def test_a_start_that_cannot_start_its_threads_leaves_nothing_started(
    make_queue, monkeypatch, number, error
):
    """No task has run, although one waits. The queue can be started again."""
    ran, hook = [], Started()
    queue = make_queue(worker_num=3, hooks=[hook])
    queue.executor("note")(lambda: ran.append(1))
    waiting = queue.submit("note")
    start, starts = threading.Thread.start, []

    def fail(thread):
        if thread.name.startswith(("taskx-work", "taskx-house")):
            starts.append(thread)
            if len(starts) == number:
                raise error
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(type(error)):
            queue.start()
    eventually(lambda: own_threads() == [])
    assert (ran, hook.times, queue.repository.liveness.nodes()) == ([], 0, [])
    assert waiting.task().status is TaskStatus.PENDING
    queue.start()
    assert waiting.result(PATIENCE) is None
    assert queue.submit("note").result(PATIENCE) is None
    assert queue.drain(PATIENCE)
    assert (len(ran), hook.times) == (2, 1)
    assert queue.stop(PATIENCE) == []


def test_a_task_submitted_during_a_failed_start_runs_after_the_next_start(make_queue, monkeypatch):
    queue, handles = make_queue(worker_num=1), []
    queue.executor("fine")(lambda: "fine")

    def fail(housekeeper):
        handles.append(queue.submit("fine"))
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(Housekeeper, "start", fail)
        with pytest.raises(RuntimeError):
            queue.start()
    queue.start()
    assert handles[0].result(PATIENCE) == "fine"


def test_a_second_start_completes_one_that_was_interrupted_at_its_end(make_queue, monkeypatch):
    queue = make_queue(worker_num=1)
    queue.executor("fine")(lambda: "fine")

    def strike(pool):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(WorkerPool, "go", strike)
        with pytest.raises(KeyboardInterrupt):
            queue.start()
    queue.start()
    assert queue.submit("fine").result(PATIENCE) == "fine"


def test_a_delayed_task_runs_after_an_interrupted_start_and_a_second_one(
    make_queue, clock, monkeypatch
):
    """The second housekeeper does not know what the first one has read."""
    queue = make_queue(worker_num=1, clock=clock)
    queue.executor("fine")(lambda: "fine")
    waiting = queue.submit("fine", delay=60)

    def strike(node):
        eventually(lambda: node._housekeeper._release.next)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LocalNode, "_publish", strike)
        with pytest.raises(KeyboardInterrupt):
            queue.start()
    queue.start()
    clock.advance(61)
    assert waiting.result(PATIENCE) == "fine"


def test_due_tasks_are_read_again_after_the_repository_failed(make_queue, monkeypatch):
    """In a process that is alone, no event would report them."""
    queue = make_queue(worker_num=1)
    queue.executor("fine")(lambda: "fine")
    queue.start()
    whole_round(queue)
    due, failed = queue.repository.due, []

    def fail(now, limit, *column):
        if now is None and not column and not failed:
            failed.append(1)
            raise RepositoryUnavailable("down for a moment")
        return due(now, limit, *column)

    monkeypatch.setattr(queue.repository, "due", fail)
    assert queue.submit("fine", delay=0.05).result(PATIENCE) == "fine"
    assert failed


@pytest.mark.parametrize("step", ["prepare", "join", "watch", "nodes", "notes", "ready"])
def test_a_start_whose_repository_fails_can_be_tried_again(make_queue, monkeypatch, step):
    def fail(*args, **options):
        raise RepositoryUnavailable("down for a while")

    queue = make_queue(worker_num=1)
    queue.executor("fine")(lambda: "fine")
    waiting = queue.submit("fine")
    with monkeypatch.context() as patch:
        repository = queue.repository
        owners = (repository.liveness, repository, repository.house)
        patch.setattr(next(one for one in owners if hasattr(one, step)), step, fail)
        with pytest.raises(RepositoryUnavailable):
            queue.start()
    assert queue.repository.liveness.nodes() == []
    queue.start()
    assert waiting.result(PATIENCE) == "fine"


LEAKS = """
    import os, sys, threading, time
    from taskx import Config, Queue, SQLiteRepository

    def cycle():
        with SQLiteRepository(sys.argv[1]) as repository:
            queue = Queue(repository, Config(worker_num=3))
            queue.executor("fine")(lambda ctx: ctx.progress(5))
            with queue:
                queue.submit("fine", timeout=60).result(60)
                queue.submit("fine", delay=0.001).result(60)
                queue.submit("fine", delay=3600, id="later").cancel()
                queue.delete("later")
            assert queue.stop() == []

    def left():
        deadline = time.monotonic() + 60
        while threading.active_count() > 1 and time.monotonic() < deadline:
            time.sleep(0.01)  # until idle threads have ended  # blocks on purpose
        return threading.active_count(), len(os.listdir("/dev/fd"))

    cycle()
    print(left())
    for _ in range(20):
        cycle()
    print(left())
"""


@pytest.mark.slow
def test_starting_and_stopping_again_and_again_leaks_nothing(database, spawn):
    """A process that does nothing else has no more threads or open files than after the first cycle."""
    child = spawn(LEAKS, database)
    first = child.read()
    assert first.startswith("(1, ")
    assert child.read() == first
    assert child.ends() == ("", "")
    assert sorted(os.listdir(f"{database}-nodes")) == sorted(f"{name}.lock" for name in NAMES)
