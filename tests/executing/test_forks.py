"""Forks in executors and hooks: a child that returns from the forking code ends."""

from __future__ import annotations

import pytest
from helpers import PATIENCE

from taskx import SQLiteRepository, TaskFilter, TaskStatus

from . import isolated

PROGRAM = """
import os, signal, sys, threading, warnings
from taskx import Config, Hook, Queue, SQLiteRepository

warnings.simplefilter("ignore")  # Python 3.12 warns of forks beside threads
path = sys.argv[1]

def fork():
    "Fork; return the exit status of the child, or None in the child, which an alarm kills if it hangs."
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    signal.alarm(100)
    return None

def come_back(how):
    if how == "raise":
        raise ValueError("in the child")
    if how.startswith("exit"):
        sys.exit(*map(int, how.split()[1:]))
    return "of the child"
"""


@pytest.fixture
def run(spawn, database):
    """Return a function that starts the program with more lines, and the database as its first argument."""
    return lambda more, *args: spawn(PROGRAM + more, database, *args)


@pytest.mark.parametrize(
    ("how", "status", "shown"),
    [
        ("return", 0, ""),
        ("exit", 0, ""),
        ("exit 7", 7, ""),
        ("raise", 1, "ValueError: in the child"),
    ],
)
@pytest.mark.parametrize("capture", [False, True])
def test_a_forked_child_that_returns_from_an_executor_ends(
    run, database, how, status, shown, capture
):
    """The attempt belongs to the parent. The child stores no outcome and starts no task."""
    child = run(
        """
queue = Queue(SQLiteRepository(path), Config(worker_num=1))

@queue.executor("forks", capture_log=sys.argv[3] == "True")
def forks():
    if (status := fork()) is None:
        return come_back(sys.argv[2])
    return status

queue.executor("next")(lambda: os.getpid())

forks = queue.submit("forks", priority=1)
rest = [queue.submit("next") for _ in range(3)]
with queue:
    print(forks.result(60), {handle.result(60) for handle in rest} == {os.getpid()})
""",
        how,
        capture,
    )
    out, error = child.ends()
    assert out == f"{status} True\n"
    assert error == "" if not shown else error.endswith(f"{shown}\n")
    with SQLiteRepository(database) as repository:
        tasks = repository.list(TaskFilter())
    assert {(task.status, task.starts, task.errors) for task in tasks} == {
        (TaskStatus.COMPLETED, 1, 0)
    }


def test_a_forked_child_never_returns_from_the_submit_that_runs_its_task(run):
    child = run(
        """
queue = Queue(SQLiteRepository(path), Config(worker_num=1, buffer_size=1, overflow="caller_runs"))
busy, go_on = threading.Event(), threading.Event()

@queue.executor("hold")
def hold():
    busy.set()
    go_on.wait(60)

@queue.executor("forks")
def forks():
    return come_back("return") if (status := fork()) is None else status

with queue:
    queue.submit("hold")
    busy.wait(60)
    queue.submit("forks")  # fills the buffer
    handle = queue.submit("forks")
    print(os.getpid() == int(os.environ.setdefault("SUBMITTER", str(os.getpid()))), flush=True)
    print(handle.result(60), flush=True)
    go_on.set()
    queue.drain(60)
"""
    )
    out, err = child.ends()
    assert (out, err) == ("True\n0\n", "")


def test_a_forked_child_that_returns_from_a_hook_ends(run):
    child = run(
        """
class Forks(Hook):
    def finished(self, task):
        print(task.params, fork(), flush=True)

class Counts(Hook):
    def finished(self, task):
        print("counted", flush=True)

queue = Queue(SQLiteRepository(path), Config(worker_num=1), hooks=[Forks(), Counts()])
queue.executor("fine")(lambda n: n)
with queue:
    for n in range(2):
        queue.submit("fine", {"n": n}).result(60)
"""
    )
    out, err = child.ends()
    told = "{'n': 0} None\n{'n': 0} 0\ncounted\n{'n': 1} None\n{'n': 1} 0\ncounted\n"
    assert (out, err) == (told, "")


def test_a_forked_child_cannot_store_checkpoints_of_its_parents_task(run, database):
    child = run(
        """
queue = Queue(SQLiteRepository(path), Config(worker_num=1))

@queue.executor("forks")
def forks(ctx):
    ctx.step("before", lambda: 1)
    status = ctx.step("forks", fork)
    if status is None:
        ctx.cursor = "of the child"
    return status

with queue:
    print(queue.submit("forks", id="forks").result(60))
"""
    )
    out, err = child.ends()
    assert out == "1\n"
    assert "a forked child process cannot store checkpoints" in err
    with SQLiteRepository(database) as repository:
        assert repository.get_by_id("forks").checkpoints == {"steps": {"before": 1, "forks": 1}}


def test_the_output_of_a_forked_child_is_shown(run):
    child = run(
        """
queue = Queue(SQLiteRepository(path), Config(worker_num=1))

@queue.executor("forks")
def forks():
    if (status := fork()) is None:
        sys.stdout = os.fdopen(1, "w", 1000, closefd=False)
        print("of the child")
    return status

with queue:
    queue.submit("forks").result(60)
"""
    )
    assert child.ends() == ("of the child\n", "")


@pytest.mark.process
def test_a_forked_child_of_an_isolated_executor_ends_too(make_queue, capfd):
    """Else it would send its result over its parent's socket to the queue."""
    queue = make_queue(worker_num=1)
    queue.register_executor(isolated.fork)
    with queue:
        assert queue.submit("fork", {"how": "return"}).result(PATIENCE) == 0
        assert queue.submit("fork", {"how": "raise"}).result(PATIENCE) == 1
    assert "ValueError: in the child" in capfd.readouterr().err
