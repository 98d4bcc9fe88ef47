"""Make a file of the present schema version, with data in every column: ``python make.py FILE [KIND]``.

    python make.py version-6.sqlite
    python make.py postgres-2.sql postgres      # or mongomock, or django

This program made the files in this folder, each with the code of its time. They must not change. If you add
a column, store something in it here, too, and make the files of the new version.
"""

from __future__ import annotations

import atexit
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
from collections.abc import Callable, Mapping
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import taskx
from taskx import Config, Permanent, Queue, RetryPolicy, Snooze, SQLiteRepository, every

sys.path.append(str(Path(__file__).parents[2]))
from storage import kept
from storage.kept_stores import KEPT

Rows = list[dict[str, Any]]

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


def queue_on(place: str, *types: str) -> Queue:
    """Return a queue that runs these types and knows the others."""
    queue = Queue(open_at(place), Config(worker_num=3, max_stuck=0))
    executors = {
        "add": (add, {"capture_log": True}),
        "fail": (fail, {"max_attempts": 2}),
        "give_up": (give_up, {}),
        "second": (second, {"max_attempts": 2}),
        "patient": (patient, {}),
        "limited": (
            lambda: None,
            {
                "rate": "1000 calls/s",
                "max_concurrency": 5,
                "limit_scope": "global",
                "version": 2,
            },
        ),
        "hang": (hang, {}),
        "deaf": (hang, {"timeout": 1.0, "grace": 0.01, "max_attempts": 2}),
    }
    for name, (function, options) in executors.items():
        if name in types:
            queue.executor(name, **options)(function)
    queue.declare(*(set(executors) - set(types)), "later", "paused")
    return queue


# --- the place: a path, or "kind=URL of a database"


def open_at(place: str) -> Any:
    kind, _, where = place.rpartition("=")
    return KEPT[kind].open(where, Path(os.environ["FOLDER"])) if kind else SQLiteRepository(where)


def read(place: str) -> Mapping[str, Rows]:
    """Return the rows of the tasks and the notes."""
    kind, _, where = place.rpartition("=")
    found = KEPT[kind].contents(where) if kind else kept.contents(Path(where))
    tables = {name.rstrip("s"): rows for name, rows in found.items()}
    return {"tasks": tables["task"], "notes": tables["note"]}


def wait_until(place: str, what: str, holds: Callable[[Rows, Rows], bool]) -> None:
    """Wait until something is true of the tasks and the notes."""
    deadline = time.monotonic() + 120
    while not holds(**read(place)):
        assert time.monotonic() < deadline, what
        time.sleep(0.02)  # blocks on purpose


def count(rows: Rows, **columns: Any) -> int:
    """Return the number of rows with such values."""
    return sum(all(row.get(name) == value for name, value in columns.items()) for row in rows)


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
        queue.submit("limited", id="limited", cost={"calls": 2})
        queue.submit("later", id="cancelled")
        queue.cancel_task("cancelled")
        queue.submit("patient", id="interrupted")
        wait_until(
            path,
            "all but one have ended",
            lambda tasks, notes: (
                sum(row["status"] != "pending" for row in tasks) == 7
                and count(tasks, status="running") == 1
            ),
        )
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
        hangs = lambda tasks, notes: count(tasks, id="stopped", progress=30) == 1  # noqa: E731
        wait_until(path, "a task hangs", hangs)
        queue.stop(600)
    threading.Event().wait()


def crash(path: str) -> None:
    """Kill processes while they run tasks."""

    def stops(tasks: Rows, notes: Rows) -> bool:
        return any(
            (row.get("name") or row["id"]).startswith("node/") and '"stopping": true' in row["text"]
            for row in notes
        )

    first = begin(path, "crash")
    hangs = lambda tasks, notes: count(tasks, id="crashed", progress=30) == 1  # noqa: E731
    wait_until(path, "a task hangs", hangs)
    end(first)
    stopping = begin(path, "stopping")
    wait_until(path, "a node stops", stops)
    running = begin(path, "running")
    for what, holds in {
        "four hang": lambda tasks, notes: count(tasks, progress=30) == 4,
        "one is stuck": lambda tasks, notes: sum(bool(row.get("stuck_on")) for row in tasks) == 1,
        "two are started ahead": lambda tasks, notes: (
            sum(row["status"] == "pending" and bool(row.get("owner")) for row in tasks) == 2
        ),
        "one has its turn": lambda tasks, notes: (
            sum(row.get("turn") is not None for row in tasks) == 1
        ),
    }.items():
        wait_until(path, what, holds)
    queue_on(path).cancel_task("asked to stop")
    end(stopping, running)


def begin(path: str, role: str) -> subprocess.Popen[bytes]:
    """Start a process that will be killed."""
    process = subprocess.Popen([sys.executable, __file__, path, role])
    atexit.register(process.kill)
    return process


def end(*processes: subprocess.Popen[bytes]) -> None:
    """Kill processes at the same moment, so that none of them sees another one dead."""
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    for process in processes:
        process.kill()
        process.wait()


# --- removing traces of the machine


def without_traces(text: str) -> str:
    """Remove the machine's folders from a text."""
    for file in (__file__, taskx.__file__, threading.__file__):
        folder = os.path.dirname(os.path.abspath(file))
        text = text.replace(folder, os.path.basename(folder))
    return text


def neutral(path: str, task: str, note: str) -> None:
    """Remove all traces of the machine from a SQLite file with such tables, and move its log into it."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA secure_delete = ON")  # so that free pages hold no traces, either
        connection.create_function("neutral", 1, without_traces)
        connection.execute(
            f"UPDATE {task} SET traceback = neutral(traceback), "
            "earlier_attempts = neutral(earlier_attempts)"
        )
        connection.execute(  # a copy has another inode than the original
            f"UPDATE {note} SET text = json_set(text, '$.file', 1) WHERE name LIKE 'node/%'"
        )
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def make(path: str, kind: str = "") -> None:
    """Make a file of the present schema version, or the kept form of another kind of database."""
    steps: tuple[Callable[[str], None], ...] = (tasks_that_wait, tasks_that_end, crash)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FOLDER"] = folder
        work = str(KEPT[kind].new(Path(folder))) if kind else os.path.join(folder, "tasks.db")
        for step in steps:
            step(f"{kind}={work}" if kind else work)
        if kind == "django":
            neutral(work, "taskx_task", "taskx_note")
        if not kind:
            neutral(work, "tasks", "notes")
            shutil.copyfile(work, path)
            return
        KEPT[kind].save(work, Path(path))
        if kind != "django":  # a text
            Path(path).write_text(without_traces(Path(path).read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[2] not in KEPT:
        die(*sys.argv[1:])
    else:
        make(*sys.argv[1:])
