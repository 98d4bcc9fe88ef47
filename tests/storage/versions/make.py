"""Make a file of the present schema version, with data in every column: ``python make.py FILE``.

This program made ``version-1.sqlite`` and the later files, each with the code of its time. They must not
change. If you add a column, store something in it here, too, and make the file of the new version.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta

import taskx
from taskx import Config, Permanent, Queue, RetryPolicy, Snooze, SQLiteRepository, every

socket.gethostname = lambda: "host"  # in the names of nodes


# --- the executors


def add(ctx, a, b=0):
    ctx.progress(50, "half way")
    ctx.logger.info("adds %d and %d", a, b)
    return ctx.step("sum", lambda: a + b)


def fail(ctx):
    raise ValueError(f"attempt {ctx.task.attempt}")


def give_up():
    raise Permanent("never")


def second(ctx):
    if not ctx.task.snoozes:
        raise Snooze(0)
    if not ctx.task.errors:
        raise KeyError("first")
    return {"text": "naïve ☃", "list": [1, None, 2.5]}


def patient(ctx):
    ctx.sleep(60)


def hang(ctx):
    ctx.progress(30, "hangs")
    threading.Event().wait()


def queue_on(path: str, *types: str) -> Queue:
    """Return a queue that runs these types and knows the others."""
    queue = Queue(SQLiteRepository(path), Config(worker_num=3, max_stuck=0))
    executors = {
        "add": (add, {"capture_log": True}),
        "fail": (fail, {"max_attempts": 2}),
        "give_up": (give_up, {}),
        "second": (second, {"max_attempts": 2}),
        "patient": (patient, {}),
        "limited": (
            lambda: None,
            {"rate": "1000/s", "max_concurrency": 5, "limit_scope": "global"},
        ),
        "hang": (hang, {}),
        "deaf": (hang, {"timeout": 0.05, "grace": 0.01, "max_attempts": 2}),
    }
    for name, (function, options) in executors.items():
        if name in types:
            queue.executor(name, **options)(function)
    queue.declare(*(set(executors) - set(types)), "later", "paused")
    return queue


# --- the stored tasks


def tasks_that_end(path: str) -> None:
    """Run some tasks to their end, and interrupt one."""
    queue = queue_on(path, "add", "fail", "give_up", "second", "patient", "limited")
    with queue:
        queue.submit(
            "add", {"a": 1, "b": 2}, id="completed", created_by="user", priority=3, tags=["red"]
        )
        queue.submit("fail", id="failed", retry=RetryPolicy(2, base=0.001, jitter=0))
        queue.submit("give_up", id="given up")
        queue.submit("second", id="second", unique_key="once", unique_scope="ever")
        queue.submit("limited", id="limited")
        queue.submit("later", id="cancelled")
        queue.cancel_task("cancelled")
        queue.submit("patient", id="interrupted")
        wait_until(path, "SELECT count(*) = 7 FROM tasks WHERE status <> 'pending'")
        wait_until(path, "SELECT count(*) = 1 FROM tasks WHERE status = 'running'")
        queue.stop(5, cancel=True)


def tasks_that_wait(path: str) -> None:
    """Store some tasks that no node runs yet."""
    queue = queue_on(path)
    queue.submit("hang", id="crashed")
    options = {"timeout": 5.0, "max_attempts": 4, "max_crashes": 2, "priority": -1}
    queue.submit("later", {"n": 1}, id="pending", created_by="user", **options)
    queue.submit("later", {"n": 2})  # its id is made here
    queue.submit("later", id="delayed", delay=60, expires=timedelta(days=36_500))
    queue.submit("later", id="unique", unique_key="key", unique_scope="unfinished")
    queue.submit("later", id="turn", concurrency_key="line")
    queue.submit("later", id="in line", concurrency_key="line")
    queue.submit("paused", id="paused")
    queue.pause("paused")
    queue.schedule("ticks", every(3600), "later", {"tick": True}).resume()  # stores it
    queue.schedule("rests", every(60), "later").pause()


def die(path: str, role: str) -> None:
    """Work as a process that will be killed in the middle of its tasks."""
    queue = queue_on(path, *(("hang", "deaf") if role == "running" else ("hang",)))
    if role == "running":
        for name in ("running", "asked to stop"):
            queue.submit("hang", id=name)
        queue.submit("deaf", id="stuck", priority=1)
        for number in range(2):
            queue.submit("hang", id=f"buffered {number}", priority=-1)
        queue.submit(
            "later", id="child", depends_on=["running", "pending"], on_parent_failure="run"
        )
    queue.start()
    if role == "stopping":
        queue.submit("hang", id="stopped")
        wait_until(path, "SELECT progress = 30 FROM tasks WHERE id = 'stopped'")
        queue.stop(60)
    threading.Event().wait()


def crash(path: str) -> None:
    """Kill processes while they run tasks."""
    first = begin(path, "crash")
    wait_until(path, "SELECT progress = 30 FROM tasks WHERE id = 'crashed'")
    end(first)
    stopping = begin(path, "stopping")
    stops = "name LIKE 'node/%' AND text LIKE '%\"stopping\": true%'"
    wait_until(path, f"SELECT count(*) = 1 FROM notes WHERE {stops}")
    running = begin(path, "running")
    wait_until(path, "SELECT count(*) = 4 FROM tasks WHERE progress = 30")
    wait_until(path, "SELECT count(*) = 1 FROM tasks WHERE stuck_on <> ''")
    wait_until(path, "SELECT count(*) = 2 FROM tasks WHERE status = 'pending' AND owner <> ''")
    wait_until(path, "SELECT count(*) = 1 FROM tasks WHERE turn IS NOT NULL")
    queue_on(path).cancel_task("asked to stop")
    end(stopping, running)


def begin(path: str, role: str) -> subprocess.Popen[bytes]:
    """Start a process that will be killed."""
    return subprocess.Popen([sys.executable, __file__, path, role])


def end(*processes: subprocess.Popen[bytes]) -> None:
    """Kill processes at the same moment, so that none of them sees another one dead."""
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    for process in processes:
        process.kill()
        process.wait()


def wait_until(path: str, condition: str) -> None:
    """Wait until a query returns 1."""
    deadline = time.monotonic() + 20
    with closing(sqlite3.connect(path, timeout=20)) as connection:
        while connection.execute(condition).fetchone() != (1,):
            assert time.monotonic() < deadline, condition
            time.sleep(0.01)  # blocks on purpose


def reserved(path: str) -> None:
    """Store something in the columns that nothing writes yet."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("UPDATE tasks SET cost = '{}', version = '1' WHERE id = 'completed'")


# --- removing traces of the machine


def neutral(path: str) -> None:
    """Remove all traces of the machine from a file, and move its log into it."""
    files = (__file__, taskx.__file__, threading.__file__)
    folders = [os.path.dirname(os.path.abspath(file)) for file in files]
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:

        def shortened(text: str) -> str:
            for folder in folders:
                text = text.replace(folder, os.path.basename(folder))
            return text

        connection.execute("PRAGMA secure_delete = ON")  # so that free pages hold no traces, either
        connection.create_function("neutral", 1, shortened)
        connection.execute(
            "UPDATE tasks SET traceback = neutral(traceback), "
            "earlier_attempts = neutral(earlier_attempts)"
        )
        connection.execute(  # a copy has another inode than the original
            "UPDATE notes SET text = json_set(text, '$.file', 1) WHERE name LIKE 'node/%'"
        )
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def make(path: str) -> None:
    """Make a file of the present schema version."""
    steps: tuple[Callable[[str], None], ...] = (
        tasks_that_wait,
        tasks_that_end,
        crash,
        reserved,
        neutral,
    )
    with tempfile.TemporaryDirectory() as folder:
        work = os.path.join(folder, "tasks.db")
        for step in steps:
            step(work)
        shutil.copyfile(work, path)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        die(*sys.argv[1:])
    else:
        make(sys.argv[1])
