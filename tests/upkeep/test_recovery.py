"""Recovery: real processes on one SQLite file that die, fork, or forget to stop."""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
from collections import Counter

import pytest
from helpers import PATIENCE, SOON, eventually, is_intact, run_in_thread

from taskx import Config, Queue, SQLiteRepository, Task, TaskFilter, TaskStatus

# Started with the path of the file, plus a script. Every run of a task is a line in a log file next to the
# database, so that the tests can count the runs.
PROGRAM = """
import itertools, json, os, signal, sys, threading, time
from taskx import Config, Queue, SQLiteRepository, Task
from taskx.tasks.timing import Timing

# The longest wait for executors that hang; the second argument has further fields.
timing = Timing(**{'exit_within': 1.0, **json.loads(sys.argv[2])})
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
    note("ran", n)

runs = itertools.count(1)

@queue.executor()
def falter(ctx, n):
    note("ran", n)
    if next(runs) == 300:  # whatever this process has begun, ended or buffered by then
        os.kill(os.getpid(), signal.SIGKILL)

@queue.executor()
def hang(ctx, n=0):
    note("begun", n)
    say("hanging")
    threading.Event().wait()

@queue.executor()
def listen(ctx, n=0):
    note("begun", n)
    say("listening")
    ctx.sleep(60)

@queue.executor()
def die(ctx, times=10**9):
    note("dying")
    if ctx.task.crashes < times:
        say("dying")
        sys.stdin.readline()
        os.kill(os.getpid(), signal.SIGKILL)
    return ctx.task.crashes

def wait_until_it_runs(task_id):
    while queue.get_task_status(task_id).status != "running":
        time.sleep(0.01)  # blocks on purpose

def wait_for_ever():
    while True:  # a signal that comes just before would not end one long wait
        time.sleep(0.05)  # blocks on purpose
"""


@pytest.fixture
def run(spawn, database):
    """Return a function that starts the program with more lines, and fields of its timing."""
    return lambda more, **timing: spawn(PROGRAM + more, database, json.dumps(timing))


@pytest.fixture
def repository(database):
    """The file, as the only repository of these tests."""
    with SQLiteRepository(database) as made:
        yield made


@pytest.fixture
def runner(make_queue):
    """A queue in this process with the same types, whose executors do not hang."""
    queue = make_queue(worker_num=2)
    queue.ran = []
    for name in ("work", "falter"):
        queue.executor(name)(lambda n: queue.ran.append(n))
    for name in ("hang", "listen"):
        queue.executor(name)(lambda n=0: queue.ran.append(n))
    queue.executor("die")(lambda times=0: "here it lives")
    return queue


def logged(database):
    return Counter((database.parent / (database.name + ".log")).read_text().splitlines())


def test_a_killed_process_loses_no_running_buffered_or_spilled_task(run, runner, database):
    child = run(
        """
for n in range(2):
    queue.submit("hang", {"n": n}, id=f"hang{n}")
queue.start()
for n in range(300):
    queue.submit("work", {"n": n}, id=f"work{n}")
say("submitted")
wait_for_ever()
"""
    )
    assert sorted([child.read(), child.read(), child.read()]) == ["hanging", "hanging", "submitted"]
    child.kill()
    runner.start()
    assert runner.drain(PATIENCE)
    tasks, total = runner.list_tasks()
    assert total == 302
    assert sorted(runner.ran) == sorted([*range(300), 0, 1])
    for n in range(2):
        task = runner.get_task_status(f"hang{n}")
        assert (task.status, task.crashes, task.errors) == (TaskStatus.COMPLETED, 1, 0)
        assert (task.interruptions, task.starts, task.attempt) == (0, 2, 1)
        assert [a.outcome for a in task.attempts] == ["crashed", "completed"]
        assert "died" in task.attempts[0].error
        assert f":{child.process.pid}:" in task.attempts[0].worker
    for task in tasks:
        assert task.status is TaskStatus.COMPLETED
        if task.type == "work":
            assert (task.crashes, task.errors, len(task.attempts)) == (0, 0, 1)
    assert logged(database)["begun 0"] == 1


def test_a_task_that_was_started_but_not_executed_has_not_crashed(run, runner, database):
    child = run(
        """
@queue.executor()
def fall(ctx, n):
    note("ran", n)
    if queue._node.pool.ahead.runs:  # others were started with it
        os.kill(os.getpid(), signal.SIGKILL)

queue.submit_many([Task(type="fall", params={"n": n}) for n in range(500)])
queue.start()
wait_for_ever()
""",
        short_task=60.0,  # every task is short, however slow the machine is
    )
    assert child.process.wait(PATIENCE) == -signal.SIGKILL
    runner.executor("fall")(lambda n: runner.ran.append(n))
    executed = logged(database)
    runner.start()
    assert runner.drain(PATIENCE)
    tasks = runner.repository.list(TaskFilter(limit=1000))
    assert {task.status for task in tasks} == {TaskStatus.COMPLETED}
    crashed = [task for task in tasks if task.crashes]
    assert 1 <= len(crashed) <= 2  # there are two workers
    assert any(executed[f"ran {task.params['n']}"] for task in crashed)
    waited = [t for t in tasks if t.interruptions and not executed[f"ran {t.params['n']}"]]
    assert waited
    for task in waited:
        assert [a.outcome for a in task.attempts] == ["interrupted", "completed"]


def test_no_task_is_lost_if_processes_are_killed_again_and_again(run, runner, database):
    submitter = Queue(runner.repository)
    submitter.declare("falter")
    submitter.submit_many(  # one of them may run at each of three kills
        Task(type="falter", params={"n": n}, max_crashes=4) for n in range(1200)
    )
    for _ in range(3):
        child = run("queue.start(); wait_for_ever()")
        assert child.process.wait(PATIENCE) == -signal.SIGKILL
    runner.start()
    assert runner.drain(PATIENCE)
    ran = logged(database)
    assert sum(ran.values()) >= 3 * 300
    for n in runner.ran:
        ran[f"ran {n}"] += 1
    assert len(ran) == 1200
    assert sum(ran.values()) <= 1200 + 3 * 100  # tasks that ran at a kill, or had just ended
    assert is_intact(database)


def test_a_task_with_max_crashes_1_never_runs_again_after_a_crash(run, runner, caplog):
    child = run(
        "queue.start(); queue.submit('hang', {'n': 7}, id='x', max_crashes=1); wait_for_ever()"
    )
    assert child.read() == "hanging"
    child.kill()
    runner.start()
    assert runner.drain(PATIENCE)
    task = runner.get_task_status("x")
    assert (task.status, task.crashes, task.errors, task.starts) == (TaskStatus.FAILED, 1, 0, 1)
    assert task.dead_letter
    assert "died" in task.error
    assert "max_crashes=1" in task.error
    assert [a.outcome for a in task.attempts] == ["crashed"]
    assert runner.ran == []
    [error] = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert error.startswith("task x was running on ")
    assert error.endswith(", which died: it has failed and is a dead letter (params={'n': 7})")


def test_tasks_next_to_a_crashing_one_are_spared(run, runner):
    """Both run together until they are on their last chance; from then on, each runs alone."""
    submitter = Queue(runner.repository)
    submitter.declare("die", "listen")
    killer = submitter.submit("die", id="killer")
    innocent = submitter.submit("listen", id="innocent")
    for _ in range(2):
        child = run("queue.start(); wait_for_ever()")
        assert {child.read(), child.read()} == {"dying", "listening"}
        child.tell()
        child.process.wait(PATIENCE)
    child = run("queue.start(); wait_for_ever()")
    assert child.read() == "dying"  # the killer is the older task
    assert (killer.task().crashes, innocent.task().crashes) == (2, 2)
    assert innocent.task().status is TaskStatus.PENDING
    child.tell()
    child.process.wait(PATIENCE)
    child = run("queue.start(); wait_for_ever()")
    assert child.read() == "listening"
    assert (killer.task().status, killer.task().crashes) == (TaskStatus.FAILED, 3)
    assert (innocent.task().status, innocent.task().crashes) == (TaskStatus.RUNNING, 2)
    innocent.cancel()
    assert eventually(innocent.cancelled)


def test_a_task_that_runs_next_to_one_on_its_last_chance_is_interrupted(run, runner):
    """The other one runs alone for a minute; after that, tasks may start beside it."""
    submitter = Queue(runner.repository)
    submitter.declare("die", "listen")
    submitter.submit("die", id="killer", max_crashes=2)
    child = run("queue.start(); wait_for_ever()")
    assert child.read() == "dying"
    child.tell()
    child.process.wait(PATIENCE)
    last = submitter.submit("listen")
    child = run("queue.start(); wait_for_ever()", alone_within=0.0)
    assert {child.read(), child.read()} == {"dying", "listening"}
    child.tell()
    child.process.wait(PATIENCE)
    runner.start()
    assert runner.drain(PATIENCE)
    task = last.task()
    assert (task.status, task.crashes, task.interruptions) == (TaskStatus.COMPLETED, 0, 1)
    killer = submitter.get_task_status("killer")
    assert (killer.status, killer.crashes) == (TaskStatus.FAILED, 2)


@pytest.mark.parametrize(("deaths", "together"), [(1, 2), (2, 1)])
def test_tasks_run_one_at_a_time_only_on_their_last_chance(
    run, make_queue, caplog, deaths, together
):
    submit = 'queue.submit("hang", {"n": 0}); queue.submit("hang", {"n": 1})\n'
    for number in range(deaths):
        child = run(("" if number else submit) + "queue.start(); wait_for_ever()")
        assert [child.read(), child.read()] == ["hanging"] * 2
        child.kill()
    queue = make_queue(worker_num=4)
    running, most, all_run = set(), [], threading.Event()

    @queue.executor("hang")
    def hang(n):
        running.add(n)
        most.append(len(running))
        if len(running) == together:
            all_run.set()
        assert all_run.wait(PATIENCE)
        running.discard(n)

    queue.start()
    assert queue.drain(PATIENCE)
    assert max(most) == together
    assert {(t.status, t.crashes) for t in queue.list_tasks()[0]} == {("completed", deaths)}
    told = [r.getMessage() for r in caplog.records if " runs alone, because " in r.getMessage()]
    assert len(told) == (2 if together == 1 else 0)


def test_a_process_that_ends_while_it_stops_interrupts_its_task(run, runner):
    child = run(
        """
queue.start()
queue.submit("hang", id="x")
sys.stdin.readline()
print(queue.stop(timeout=0.1), flush=True)
while not all(node.stopping for node in queue.repository.liveness.nodes()):  # this may be recorded late
    time.sleep(0.01)  # blocks on purpose
os._exit(0)
"""
    )
    assert child.read() == "hanging"
    child.tell()
    assert child.read() == "['x']"
    child.process.wait(PATIENCE)
    runner.start()
    runner.handle("x").result(PATIENCE)
    task = runner.get_task_status("x")
    assert (task.crashes, task.interruptions, task.errors) == (0, 1, 0)
    assert [a.outcome for a in task.attempts] == ["interrupted", "completed"]


def test_a_cancel_requested_before_the_crash_holds_after_it(run, runner):
    child = run("queue.start(); queue.submit('hang', id='x'); wait_for_ever()")
    assert child.read() == "hanging"
    canceller = Queue(runner.repository)
    assert canceller.cancel_task("x") is False
    child.kill()
    runner.start()
    assert runner.drain(PATIENCE)
    assert runner.get_task_status("x").status is TaskStatus.CANCELLED
    assert runner.ran == []


@pytest.mark.parametrize("task", ["listen", "hang"])
def test_a_script_that_forgets_to_stop_exits_and_hands_its_tasks_back(run, runner, task):
    child = run(
        f"""
queue.start()
handles = [queue.submit({task!r}, {{"n": n}}) for n in range(2)]
queue.submit_many(queue_task for queue_task in [work.task(n) for n in range(20)])
sys.stdin.readline()
""",
        # One of the two ends by itself, as soon as the machine lets it.
        exit_within=60.0 if task == "listen" else 3.0,
    )
    word = {"listen": "listening", "hang": "hanging"}[task]
    assert [child.read(), child.read()] == [word] * 2
    child.tell()
    began = time.monotonic()
    out, err = child.ends()
    assert time.monotonic() - began < SOON
    assert out == ""
    # It prints only the warnings of stop: about executors that did not end, and tasks left pending.
    lines = err.splitlines()
    assert all(line.startswith("stopped with ") for line in lines), err
    assert 1 <= len(lines) <= (2 if task == "hang" else 1)
    assert child.process.returncode == 0
    runner.start()
    assert runner.drain(PATIENCE)
    assert sorted(runner.ran) == sorted([*range(20), 0, 1])
    tasks = runner.list_tasks()[0]
    assert {(t.crashes, t.errors) for t in tasks} == {(0, 0)}
    assert {t.interruptions for t in tasks if t.type == task} == {1}


def test_a_script_that_forgets_to_stop_an_idle_queue_prints_nothing(run):
    child = run("queue.start(); queue.submit('work', {'n': 1}).result(60)")
    began = time.monotonic()
    assert child.ends() == ("", "")
    assert time.monotonic() - began < SOON


def test_ctrl_c_in_a_with_block_interrupts_the_running_task(run, runner):
    child = run(
        """
try:
    with queue:
        queue.submit("listen", id="x")
        wait_for_ever()
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
    )
    assert child.read() == "listening"
    child.signal(signal.SIGINT)
    began = time.monotonic()
    assert child.read() == "interrupted"
    # The running task does not get four fifths of the time-out of a stop.
    assert time.monotonic() - began < SOON
    assert child.ends()[1].count("Traceback") == 0
    task = runner.get_task_status("x")
    assert (task.status, task.interruptions) == (TaskStatus.PENDING, 1)


def test_an_exit_in_a_with_block_lets_the_running_task_end(run, runner):
    """As any other exception does, and as the end of the block."""
    child = run(
        """
begun = threading.Event()

@queue.executor()
def hold():
    begun.set()
    sys.stdin.readline()
    return "held"

with queue:
    queue.submit("hold", id="x")
    begun.wait()
    sys.exit(3)
"""
    )
    eventually(lambda: [n.stopping for n in runner.repository.liveness.nodes()] == [True])
    child.tell()
    child.ends()
    assert child.process.returncode == 3
    assert runner.get_task_status("x").result == "held"


FORK = """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 warns of a fork with threads

queue.start()
queue.submit("listen", id="parents")
wait_until_it_runs("parents")
work.submit(0).result(60)
pid = os.fork()
if pid == 0:
    status = 1
    try:
        handle = work.submit(1)                      # stored, for any node
        assert handle.result(60) is None             # by the parent, as this queue is not started
        assert "not started" in repr(queue)
        assert queue.get_task_status("parents").status == "running"
        queue.start()                                # and a node of its own
        with queue:
            work.submit(2).result(60)
        status = 0
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        os._exit(status)
assert os.waitpid(pid, 0)[1] == 0
work.submit(3).result(60)
task = queue.get_task_status("parents")
assert (task.status, task.crashes, task.starts) == ("running", 0, 1), task
queue.cancel_task("parents")
queue.drain(60)
queue.stop()
print(queue.get_task_status("parents").status, flush=True)
"""


def test_a_process_can_fork_after_the_start(run, database):
    child = run(FORK)
    assert child.read() == "listening"
    assert child.ends() == ("cancelled\n", "")
    ran = logged(database)
    assert {n: ran[f"ran {n}"] for n in range(4)} == dict.fromkeys(range(4), 1)
    assert is_intact(database)


def test_a_forked_child_that_exits_does_not_stop_the_parents_queue(run):
    child = run(
        """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)
queue.start()
queue.submit("listen", id="x")
wait_until_it_runs("x")

for _ in range(3):
    pid = os.fork()
    if pid == 0:
        sys.exit(0)  # with its exit handlers
    assert os.waitpid(pid, 0)[1] == 0
    work.submit(1).result(60)
task = queue.get_task_status("x")
say(f"{task.status} {task.interruptions}")
queue.cancel_task("x")
queue.stop()
"""
    )
    words = {child.read(), child.read()}
    assert words == {"listening", "running 0"}
    assert child.ends()[1] == ""


def test_two_processes_share_the_work_and_each_task_runs_once(run, runner, database):
    children = [
        run(
            """
print("ready", flush=True)
sys.stdin.readline()
with queue:
    queue.drain(60)
"""
        )
        for _ in range(2)
    ]
    for child in children:
        assert child.read() == "ready"
    submitter = Queue(runner.repository, Config())
    submitter.declare("work")
    submitter.submit_many(Task(type="work", params={"n": n}) for n in range(1000))
    for child in children:
        child.tell()
    for child in children:
        assert child.ends() == ("", "")
    assert logged(database) == Counter(f"ran {n}" for n in range(1000))
    assert {(len(t.attempts), t.crashes) for t in runner.list_tasks()[0]} == {(1, 0)}


def test_a_second_queue_in_the_process_leaves_the_tasks_of_the_first_alone(
    make_queue, gate, repository
):
    first, second = make_queue(worker_num=1), make_queue(worker_num=1)
    for queue in (first, second):
        queue.executor("hold")(lambda: gate())
    first.start()
    handle = first.submit("hold")
    gate.wait_for(1)
    second.start()
    threading.Event().wait(0.7)  # a check for dead nodes comes in this time
    assert (handle.task().starts, handle.task().status) == (1, TaskStatus.RUNNING)
    second.stop()
    stopping = run_in_thread(lambda: first.stop(PATIENCE))
    gate.open()
    stopping()
    assert handle.task().status is TaskStatus.COMPLETED
