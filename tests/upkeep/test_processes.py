"""Many processes on one file: sharing tasks, ending in many ways, and forks."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter

import pytest
from helpers import PATIENCE, SOON, eventually, held_on, is_intact, suspend

from taskx import Queue, SQLiteRepository, TaskFilter, TaskStatus
from taskx.tasks.timing import DEFAULT_TIMING

# Started with the path of the file, plus a script. Each run of ``work`` and ``listen`` is a line in a log
# file next to the database.
PROGRAM = """
import os, signal, sys, threading, time, warnings
from taskx import Config, Queue, SQLiteRepository, executor
from taskx.tasks.timing import Timing

timing = Timing(exit_within=1.0)  # the longest wait for executors that hang
warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 warns of a fork with threads
path = sys.argv[1]
queue = Queue(
    SQLiteRepository(path),
    Config(worker_num=2, buffer_size=5, overflow="spill"),
    timing=timing,
)

def say(word):
    sys.stdout.write(word + "\\n")  # in one piece, as several threads print
    sys.stdout.flush()

def note(*words):
    with open(path + ".log", "a") as log:
        log.write(" ".join(map(str, words)) + "\\n")

@queue.executor()
def work(ctx, n):
    note("work", n)

@queue.executor(priority=5)
def listen(ctx, n=0):
    note("listen", n)
    say("listening")
    ctx.sleep(120)

@queue.executor(priority=5)
def hang(ctx, n=0):
    note("hang", n)
    say("hanging")
    threading.Event().wait()

def fill():
    for n in range(2):
        queue.submit("listen", {"n": n}, id=f"listen{n}")
    queue.start()
    for n in range(40):
        queue.submit("work", {"n": n}, id=f"work{n}")

def wait_for_ever():
    while True:  # a signal that comes just before would not end one long wait
        time.sleep(0.05)  # blocks on purpose
"""


@pytest.fixture
def run(spawn, database):
    """Return a function that starts the program with more lines; its argument is the database's path."""
    return lambda more: spawn(PROGRAM + more, database)


@pytest.fixture
def repository(database):
    """The file, as the only repository of these tests."""
    with SQLiteRepository(database) as made:
        yield made


@pytest.fixture
def make_survivor(make_queue):
    """Return a function that makes a queue in this process, with the same types and quick executors."""

    def make(**options):
        queue = make_queue(worker_num=2, **options)
        queue.ran = []
        for name in ("work", "listen", "hang"):
            queue.executor(name)(lambda n=0, name=name: queue.ran.append(f"{name} {n}"))
        return queue

    return make


@pytest.fixture
def survivor(make_survivor):
    return make_survivor()


def logged(database):
    return Counter((database.parent / (database.name + ".log")).read_text().splitlines())


WORK = [f"work {n}" for n in range(40)]


# Dead, and not dead


def test_tasks_of_a_dead_process_are_found_by_its_lock(run, make_survivor, clock, database):
    """Running, buffered and spilled tasks run soon after the kill, although the clock stands still."""
    child = run("fill(); say('filled'); wait_for_ever()")
    assert sorted(child.read() for _ in range(3)) == ["filled", "listening", "listening"]
    survivor = make_survivor(clock=clock)
    assert survivor.repository.count(TaskFilter()) == 42
    suspend(child, database)  # it must take no more: the survivor gets the spilled tasks
    survivor.start()
    eventually(lambda: len(survivor.ran) >= 30)
    threading.Event().wait(1.2)  # blocks on purpose: two checks for dead nodes
    assert not [line for line in survivor.ran if line.startswith("listen")]
    assert all(survivor.get_task_status(f"listen{n}").crashes == 0 for n in range(2))
    child.kill()
    began = time.monotonic()
    for n in range(2):
        survivor.handle(f"listen{n}").result(PATIENCE)
    assert time.monotonic() - began < SOON
    assert survivor.drain(PATIENCE)
    assert sorted(survivor.ran) == sorted([*WORK, "listen 0", "listen 1"])
    assert [survivor.get_task_status(f"listen{n}").crashes for n in range(2)] == [1, 1]


def test_one_check_takes_back_all_tasks_of_a_dead_process(run, survivor):
    """The process need not be seen dead twice, or be dead for some time."""
    child = run("fill(); say('filled'); wait_for_ever()")
    assert sorted(child.read() for _ in range(3)) == ["filled", "listening", "listening"]
    [node] = survivor.repository.liveness.nodes()
    assert len(held_on(survivor.repository, node.id)) >= 2
    child.kill()
    survivor.start()  # its first check is over when this returns
    assert held_on(survivor.repository, node.id) == []
    assert node.id not in [node.id for node in survivor.repository.liveness.nodes()]


def test_polling_intervals_are_as_short_as_the_documentation_promises():
    """Tasks of other processes start within 100 ms; a cancel arrives, and a rescue is done, within 1 s."""
    assert DEFAULT_TIMING.poll_every <= 0.09
    assert DEFAULT_TIMING.recover_every <= 0.5


def test_a_suspended_process_never_counts_as_dead(run, make_survivor, clock, database):
    """This holds even if years pass on the survivor's clock. The process goes on when it wakes."""
    child = run(
        """
@queue.executor("finish")
def finish(ctx):
    note("finish", 0)
    say("running")
    sys.stdin.readline()
    return "by the one that slept"

queue.start()
queue.submit("finish", id="x")
wait_for_ever()
"""
    )
    survivor = make_survivor(clock=clock)
    survivor.executor("finish")(lambda: "by another")
    assert child.read() == "running"
    suspend(child, database)
    survivor.start()
    for _ in range(3):
        clock.advance(365 * 24 * 3600)
        threading.Event().wait(0.6)  # blocks on purpose: a check for dead nodes
    task = survivor.get_task_status("x")
    assert (task.status, task.starts, task.crashes) == (TaskStatus.RUNNING, 1, 0)
    child.signal(signal.SIGCONT)
    child.tell()
    assert survivor.handle("x").result(PATIENCE) == "by the one that slept"
    assert survivor.get_task_status("x").starts == 1
    assert logged(database) == {"finish 0": 1}


def test_a_process_with_room_takes_spilled_tasks_of_a_busy_one(run, survivor, database):
    """The process that accepted them is busy, and alive."""
    child = run("fill(); say('filled'); wait_for_ever()")
    assert sorted(child.read() for _ in range(3)) == ["filled", "listening", "listening"]
    spilled = survivor.repository.ready(["work"], 100)
    assert len(spilled) >= 30
    survivor.start()
    eventually(lambda: len(survivor.ran) >= 30)
    assert child.process.poll() is None
    assert set(survivor.ran) <= set(WORK)
    for n in range(2):
        survivor.cancel_task(f"listen{n}")
    assert survivor.drain(PATIENCE)
    ran = logged(database) + Counter(survivor.ran)
    assert {line: ran[line] for line in WORK} == dict.fromkeys(WORK, 1)


def test_a_restarted_process_runs_the_tasks_that_it_left(run, repository, database):
    """After a kill, the same program runs the rest; only the tasks that were running start twice."""
    child = run("fill(); say('filled'); wait_for_ever()")
    assert sorted(child.read() for _ in range(3)) == ["filled", "listening", "listening"]
    child.kill()
    child = run(
        """
queue.start()
while queue.repository.get_by_id("listen0").status != "running":
    threading.Event().wait(0.01)
queue.cancel_task("listen0"), queue.cancel_task("listen1")
print(queue.drain(60), queue.stop(), flush=True)
"""
    )
    while (line := child.read()) == "listening":  # if it began before it was cancelled
        pass
    assert line == "True []"
    assert child.ends()[1].count("Traceback") == 0
    ran = logged(database)
    assert {line: ran[line] for line in WORK} == dict.fromkeys(WORK, 1)
    tasks = {task.id: task for task in repository.list(TaskFilter(limit=100))}
    assert {tasks[f"listen{n}"].status for n in range(2)} == {TaskStatus.CANCELLED}
    assert {tasks[f"work{n}"].crashes for n in range(40)} == {0}


# How a process ends

# test_recovery has a test of its own for the end of the main module.
ENDS = {
    "sys.exit": ("sys.exit(3)", 3),
    "unhandled exception": ("raise KeyError('unhandled')", 1),
    "os._exit": ("os._exit(4)", 4),
    "SIGTERM": ("os.kill(os.getpid(), signal.SIGTERM); wait_for_ever()", -signal.SIGTERM),
    "Ctrl-C": (
        "threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start(); wait_for_ever()",
        -signal.SIGINT,
    ),
    "in a forked child": (
        """
pid = os.fork()
if pid:
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    os._exit(6)
queue.start()
work.submit(n=100).result(60)
sys.exit(5)
""",
        6,
    ),
}


@pytest.mark.parametrize("kind", ["listen", "hang"])
@pytest.mark.parametrize("way", ENDS)
def test_a_process_that_ends_in_any_way_loses_no_task(run, survivor, database, way, kind):
    """It ends soon, whether its executors heed their token or not, and another queue runs every task."""
    code, expected = ENDS[way]
    child = run(
        f"""
queue.start()
for n in range(2):
    queue.submit({kind!r}, {{"n": n}}, id=f"{kind}{{n}}")
for n in range(40):
    queue.submit("work", {{"n": n}}, id=f"work{{n}}")
queue.submit("work", {{"n": 40}}, id="later", delay=0.5)
sys.stdin.readline()
{code}
"""
    )
    assert [child.read(), child.read()] == [{"listen": "listening", "hang": "hanging"}[kind]] * 2
    child.tell()
    began = time.monotonic()
    child.process.wait(2 * PATIENCE)
    assert time.monotonic() - began < SOON
    assert child.process.returncode == expected
    out, err = child.ends()
    if way == "in a forked child":
        assert out.split()[-1] == "5", err
    assert "Fatal" not in err
    assert err.count("Traceback") == (way in ("unhandled exception", "Ctrl-C"))
    survivor.start()
    assert survivor.drain(PATIENCE)
    survivor.handle("later").result(PATIENCE)
    ran = logged(database) + Counter(survivor.ran)
    assert {line: ran[line] for line in [*WORK, "work 40"]} == dict.fromkeys([*WORK, "work 40"], 1)
    for n in range(2):
        task = survivor.get_task_status(f"{kind}{n}")
        assert (task.status, task.errors) == (TaskStatus.COMPLETED, 0)
        assert task.crashes + task.interruptions == 1


def test_a_process_ends_although_the_file_is_locked(run, spawn, database):
    """Another process holds the lock for longer than any wait. No task is lost."""
    child = run(
        """
queue.submit("listen", id="x")
queue.start()
sys.stdin.readline()
"""
    )
    assert child.read() == "listening"
    locker = spawn(
        """
        import sqlite3, sys
        connection = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=60)
        connection.execute("BEGIN IMMEDIATE")
        print("locked", flush=True)
        sys.stdin.readline()
        """,
        database,
    )
    assert locker.read() == "locked"
    child.tell()
    assert child.process.wait(PATIENCE) == 0
    locker.kill()
    with SQLiteRepository(database) as repository:
        queue = Queue(repository)
        queue.executor("listen")(lambda: "elsewhere")
        with queue:
            assert queue.handle("x").result(PATIENCE) == "elsewhere"


# A handler of a program's own, which raises an exception.
HANDLER = """
def terminate(signum, frame):
    signal.signal(signum, signal.SIG_DFL)
    raise SystemExit

signal.signal(signal.SIGTERM, terminate)
queue.start()
queue.submit({kind!r}, id="x")
for n in range(40):
    queue.submit("work", {{"n": n}}, delay=600)
try:
    say("ready")
    wait_for_ever()
finally:
    queue.stop({stop})
"""


def test_sigterm_hands_back_and_exits_with_zero(run, repository):
    child = run(HANDLER.format(kind="listen", stop="60, cancel=True"))
    assert {child.read(), child.read()} == {"listening", "ready"}
    child.signal(signal.SIGTERM)
    _, err = child.ends()
    assert (child.process.returncode, err.count("Traceback")) == (0, 0)
    task = repository.get_by_id("x")
    assert (task.status, task.interruptions, task.errors) == (TaskStatus.PENDING, 1, 0)
    assert repository.count(TaskFilter(status="pending")) == 41
    assert repository.liveness.nodes() == []


def test_a_second_sigterm_ends_a_stop_that_waits(run, repository):
    """It ends at once. The task counts as interrupted, because its node was stopping."""
    child = run(HANDLER.format(kind="hang", stop="60"))
    assert {child.read(), child.read()} == {"hanging", "ready"}
    child.signal(signal.SIGTERM)
    eventually(lambda: [node.stopping for node in repository.liveness.nodes()] == [True])
    assert child.process.poll() is None
    child.signal(signal.SIGTERM)
    began = time.monotonic()
    child.process.wait(PATIENCE)
    assert time.monotonic() - began < SOON  # the stop would have gone on for 60 s
    assert child.process.returncode == -signal.SIGTERM
    assert repository.get_by_id("x").status is TaskStatus.RUNNING
    queue = Queue(repository)
    queue.executor("hang")(lambda: "elsewhere")
    with queue:
        assert queue.handle("x").result(PATIENCE) == "elsewhere"
    task = repository.get_by_id("x")
    assert (task.crashes, task.interruptions) == (0, 1)


# Forks


def test_forks_under_load_leave_child_and_parent_working(run, database):
    """A fork may come while other threads do anything: the child can submit, and neither hangs."""
    child = run(
        """
stop = threading.Event()

def submit_all_the_time(start):
    n = start
    while not stop.is_set():
        handle = work.submit(n=n)
        n += 1
        if n % 50 == 0:
            handle.result(100)  # so that the child's task never waits behind thousands
    note("submitted", n - start)

queue.start()
threads = [threading.Thread(target=submit_all_the_time, args=(s,)) for s in (10**6, 10**7)]
for thread in threads:
    thread.start()
failed = []
for number in range(25):
    pid = os.fork()
    if pid == 0:
        signal.alarm(110)  # kills a child that hangs, so that the test finds it
        status = 1
        try:
            handle = work.submit(n=number)
            handle.result(100)
            status = 0
        finally:
            os._exit(status)
    if code := os.waitpid(pid, 0)[1]:
        failed.append((number, code))
stop.set()
for thread in threads:
    thread.join()
print(failed, queue.drain(60), queue.stop(), flush=True)
"""
    )
    out, err = child.ends(3 * PATIENCE)
    assert out == "[] True []\n", err
    ran = logged(database)
    submitted = sum(int(line.split()[1]) * times for line, times in ran.items() if "sub" in line)
    lines = {line: times for line, times in ran.items() if line.startswith("work")}
    assert set(lines.values()) == {1}
    assert {f"work {n}" for n in range(25)} <= set(lines)
    assert len(lines) == submitted + 25, err
    assert is_intact(database)


def test_an_executor_can_fork(run, database):
    """It can use os.fork and multiprocessing; the children die or exit, and own no tasks."""
    child = run(
        """
import multiprocessing

def in_child(n):
    work.submit(n=n)  # the parent runs it
    sys.exit(7)

def exit_code(process):
    process.join(100)
    while process.exitcode is None:  # a start in another thread may have got the answer
        threading.Event().wait(0.001)
    return process.exitcode

@queue.executor("forks")
def forks(ctx):
    pid = os.fork()
    if pid == 0:
        os._exit(9)
    process = multiprocessing.get_context("fork").Process(target=in_child, args=(1,))
    process.start()
    code = exit_code(process)
    killed = os.fork()
    if killed == 0:
        wait_for_ever()
    os.kill(killed, signal.SIGKILL)
    return [os.waitpid(pid, 0)[1] >> 8, code, os.waitpid(killed, 0)[1]]

with queue:
    handles = [queue.submit("forks") for _ in range(3)]
    print([handle.result(60) for handle in handles], flush=True)
    print({(h.task().starts, h.task().crashes) for h in handles}, queue.drain(60), flush=True)
"""
    )
    assert child.read() == str([[9, 7, 9]] * 3)
    assert child.read() == "{(1, 0)} True"
    assert child.ends()[1] == ""
    assert logged(database) == {"work 1": 3}


# Starting at the same time


def test_many_processes_can_start_on_a_new_file_at_once(spawn, tmp_path, database):
    """Twelve processes create the file, join, run one task each and leave, without an error."""
    children = [
        spawn(
            """
import sys
from taskx import Config, Queue, SQLiteRepository

repository = SQLiteRepository(sys.argv[1], "process", busy_timeout=60)
queue = Queue(repository, Config(worker_num=1))
queue.executor("mine-" + sys.argv[2])(lambda: sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
with queue:
    print(queue.submit("mine-" + sys.argv[2]).result(60), flush=True)
""",
            database,
            number,
        )
        for number in range(12)
    ]
    for child in children:
        assert child.read() == "ready"
    for child in children:
        child.tell()
    assert [child.read() for child in children] == [str(number) for number in range(12)]
    for child in children:
        out, err = child.ends()
        assert (child.process.returncode, out) == (0, "")
        # It prints at most a warning about tasks that were left pending.
        assert all(line.startswith("stopped with ") for line in err.splitlines()), err
    with SQLiteRepository(database) as repository:
        tasks = repository.list(TaskFilter())
        assert {(task.status, task.starts) for task in tasks} == {(TaskStatus.COMPLETED, 1)}
        assert len(tasks) == 12
        assert repository.liveness.nodes() == []
