"""The first hour of new users: a script, a notebook, Flask, Django, an operator, a move from Celery.

Each test is about something that got in the way once. The programs are small, and run in processes of their
own, as users run them.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import textwrap
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from helpers import PATIENCE, Child, eventually
from mongo_server import free_port

from taskx import (
    Queue,
    RepositoryUnavailable,
    SQLiteRepository,
    TaskFailed,
    TaskStatus,
    UnknownTaskType,
)

pytestmark = pytest.mark.process

ROOT = Path(__file__).parent.parent
Spawn = Callable[..., Child]


# A script

SCRIPT = """
import sys
from taskx import Queue, SQLiteRepository, TaskFailed

queue = Queue(SQLiteRepository(sys.argv[1]))

@queue.executor("fetch", max_attempts=2)
def fetch(url: str) -> int:
    if "busy" in url:
        raise ConnectionError("no answer")
    return len(url)

urls = [f"/page/{n}" for n in range(250)] + [f"/busy/{n}" for n in range(30)]
"""

MANY = """
with queue:
    results = list(queue.map(fetch, urls, return_exceptions=True, progress=True))
failed = [result for result in results if isinstance(result, TaskFailed)]
print(len(results), len(failed), len(repr(failed[0]).splitlines()), len(repr(failed[0])) < 200)
page = queue.list_tasks(status="completed")
print(len(page.tasks), page.total, page.more, sum(1 for _ in queue.iter_tasks(type="fetch")))
"""


def test_a_script_with_more_items_than_the_buffer_runs(spawn: Spawn, database: Path) -> None:
    """Errors take one line, a list says what it leaves out, and retries do not flood the terminal."""
    child = spawn(SCRIPT + MANY, database)
    assert child.read() == "280 30 1 True"
    assert child.read() == "100 250 150 280"
    _out, err = child.ends()
    assert child.process.returncode == 0
    lines = err.splitlines()
    assert "fetch: 280 of 280 (100%), 30 failed" in lines
    retried = [line for line in lines if "is retried" in line]
    assert len(retried) <= 3, "the first one, and one for each minute"
    assert re.search(r"params=\{'url': '/busy/\d+'\}", retried[0])


LOOP = """
import sys, threading
from taskx import Queue, QueueFull, SQLiteRepository

queue, gate = Queue(SQLiteRepository(sys.argv[1])), threading.Event()

@queue.executor()
def wait():
    gate.wait()

with queue:
    try:
        while True:
            wait.submit()
    except QueueFull as error:
        print(error, flush=True)
    gate.set()
"""


def test_a_loop_of_submits_that_is_refused_is_told_all_ways_out(
    spawn: Spawn, database: Path
) -> None:
    child = spawn(LOOP, database)
    error = child.read()
    assert error.startswith("the buffer holds 100 of buffer_size=100 tasks")
    for way in ("raise buffer_size", "'block'", "'spill'", "'caller_runs'"):
        assert way in error
    child.ends()
    assert child.process.returncode == 0


# A notebook

NOTEBOOK = """
import sys, traceback

def run(cell):
    try:
        exec(compile(cell, "cell", "exec"), namespace)
    except KeyboardInterrupt:
        print("interrupted", flush=True)

namespace = {"path": sys.argv[1]}
for cell in sys.argv[2:]:
    run(cell)
print("end", flush=True)
"""

QUEUE_CELL = """
from taskx import Queue, SQLiteRepository
if "queue" in globals():
    queue.close()
queue = Queue(SQLiteRepository(path))
queue.start()
"""

WORK_CELL = """
@queue.executor("work", replace=True)
def work(n: int) -> str:
    return "{0}"
print(work.submit(n=1).result(timeout=60), flush=True)
print(*queue.map(work, range(2), name="{0}"), flush=True)
"""


def test_notebook_cells_run_again_with_changed_code(spawn: Spawn, database: Path) -> None:
    """Also the cell that makes the queue. It leaves no second node with the old code behind."""
    old, new = WORK_CELL.format("old"), WORK_CELL.format("new")
    nodes = "print(len(queue.repository.liveness.nodes()), flush=True)"
    child = spawn(NOTEBOOK, database, QUEUE_CELL, old, new, QUEUE_CELL, new, nodes)
    told = [child.read() for _ in range(8)]
    assert told == ["old", "old old", "new", "new new", "new", "new new", "1", "end"]
    _out, err = child.ends()
    assert err == ""


def test_an_interrupted_cell_leaves_a_queue_that_goes_on(spawn: Spawn, database: Path) -> None:
    slow = """
import os, threading
gate = threading.Event()
@queue.executor("slow")
def slow(n: int) -> int:
    os.write(1, b"slow\\n")  # in one piece; print is not when several threads use it
    gate.wait(60)
    return n
for result in queue.map(slow, range(3), name="three", progress=True):
    print("never")
"""
    again = """
gate.set()
print(*queue.map(slow, range(3), name="three"), queue.healthy, flush=True)
"""
    child = spawn(NOTEBOOK, database, QUEUE_CELL, slow, again)
    for _ in range(3):
        assert child.read() == "slow"
    child.signal(signal.SIGINT)
    assert child.read() == "interrupted"
    assert child.read() == "0 1 2 True", "the tasks that ran have gone on, and ran once"
    assert child.read() == "end"


# Flask


def answer(url: str, data: object = None) -> Any:
    """Return a server's answer, None if it does not answer."""
    body = None if data is None else json.dumps(data).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            return json.load(response)
    except OSError:
        return None


@contextmanager
def server(folder: Path, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server in a folder, and stop it and its children."""
    with subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def documented(page: str, begins: str) -> str:
    """Return the code block of a page that has such a line."""
    text = (ROOT / "docs" / page).read_text()
    for block in re.findall(r"\.\. code-block:: python\n\n((?:    .*\n|\n)+)", text):
        source = textwrap.dedent(block)
        if begins in source:
            return source
    raise AssertionError(f"{page} has no block with {begins!r}")


@pytest.fixture
def flask_folder(tmp_path: Path) -> Path:
    """A folder with the module of the page on Flask."""
    pytest.importorskip("flask")
    (tmp_path / "shop.py").write_text(documented("flask.rst", "def create_app"))
    return tmp_path


def flask(folder: Path, *args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flask", "--app", "shop:create_app()", *args],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        **options,
    )


def test_flask_commands_start_no_workers(flask_folder: Path) -> None:
    ran = flask(flask_folder, "routes")
    assert ran.returncode == 0, ran.stderr
    assert "/reports/<task_id>" in ran.stdout
    ran = flask(flask_folder, "shell", input="import threading; threading.active_count()\n")
    assert ran.returncode == 0, ran.stderr
    assert ">>> 1" in ran.stdout + ran.stderr
    assert not (flask_folder / "tasks.db").exists()


@pytest.mark.parametrize(
    ("options", "reloads"), [([], False), (["--debug"], True), (["--debug", "--no-reload"], False)]
)
def test_flask_run_runs_tasks_in_the_process_that_serves(
    flask_folder: Path, options: list[str], reloads: bool
) -> None:
    port = str(free_port())
    url = f"http://127.0.0.1:{port}/reports"
    command = ["-m", "flask", "--app", "shop:create_app()", "run", "--port", port, *options]
    with server(flask_folder, *command) as process:
        eventually(lambda: answer(f"{url}/2024-05", {}))
        made = answer(f"{url}/2024-06", {})
        eventually(lambda: answer(f"{url}/{made['id']}")["status"] == "completed")
        with SQLiteRepository(flask_folder / "tasks.db", create=False) as repository:
            [node] = repository.liveness.nodes()
            assert (f":{process.pid}:" in node.name) == (not reloads)


# An operator at night

WORKER = """
import os, sys, taskx, pathlib
from taskx import Config, Queue, SQLiteRepository

queue = Queue(SQLiteRepository(sys.argv[1]), Config(worker_num=2))
bank = pathlib.Path(sys.argv[1]).with_name("bank")

@queue.executor("pay", max_attempts=2)
def pay(order: int, api_key: str) -> int:
    if not bank.exists():
        raise ConnectionError("the bank is down")
    return order

@queue.executor("long")
def long() -> str:
    os.write(1, b"begun\\n")
    sys.stdin.readline()
    return "done"

if __name__ == "__main__":
    sys.exit(taskx.run(queue, timeout=60))
"""


@pytest.fixture
def operator(database: Path) -> Iterator[Queue]:
    """The queue of a person who looks at the file from another process."""
    with SQLiteRepository(database) as repository:
        queue = Queue(repository)
        queue.declare("pay", "long")
        yield queue


def test_an_operator_finds_what_failed_and_runs_it_again(
    spawn: Spawn, operator: Queue, database: Path
) -> None:
    child = spawn(WORKER, database)
    handles = [
        operator.submit("pay", {"order": number, "api_key": "s3cret"}) for number in range(3)
    ]
    for handle in handles:
        with pytest.raises(TaskFailed) as caught:
            handle.result(timeout=PATIENCE)
        assert "failed in attempt 2: ConnectionError: the bank is down" in str(caught.value)
    failed = list(operator.iter_tasks(status="failed"))
    assert Counter(task.error_type for task in failed) == {"ConnectionError": 3}
    for task in failed:
        assert f":{child.process.pid}:" in task.worker
        assert [attempt.error_type for attempt in task.attempts] == ["ConnectionError"] * 2

    database.with_name("bank").touch()
    assert operator.requeue_dead_letters(type="pay") == 3
    again = [operator.handle(handle.id) for handle in handles]
    assert [handle.result(timeout=PATIENCE) for handle in again] == [0, 1, 2]
    child.signal(signal.SIGTERM)
    _out, err = child.ends()
    assert child.process.returncode == 0
    assert "'order': 1" in err
    assert "s3cret" not in err


def test_a_worker_program_ends_its_task_after_sigterm(
    spawn: Spawn, operator: Queue, database: Path
) -> None:
    child = spawn(WORKER, database)
    handle = operator.submit("long")
    assert child.read() == "begun"
    task = handle.task()
    assert task.status is TaskStatus.RUNNING
    assert f":{child.process.pid}:" in task.worker
    child.signal(signal.SIGTERM)
    child.tell()
    assert handle.result(timeout=PATIENCE) == "done"
    child.ends()
    assert child.process.returncode == 0
    assert handle.task().interruptions == 0


def test_a_moved_file_is_noticed_and_may_come_back(
    spawn: Spawn, operator: Queue, database: Path
) -> None:
    child = spawn(WORKER, database)
    database.with_name("bank").touch()
    params = {"order": 1, "api_key": "x"}
    assert operator.submit("pay", params).result(timeout=PATIENCE) == 1
    away = database.rename(database.with_name("moved.db"))
    assert not operator.healthy
    with pytest.raises(RepositoryUnavailable, match=r"tasks\.db was moved or deleted"):
        operator.submit("pay", params)
    away.rename(database)
    eventually(lambda: operator.healthy)
    assert operator.submit("pay", params).result(timeout=PATIENCE) == 1
    child.signal(signal.SIGTERM)
    _out, err = child.ends()
    assert child.process.returncode == 0
    assert "Traceback" not in err


def test_typing_errors_of_an_operator_are_named(
    operator: Queue, database: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(RepositoryUnavailable, match=r"there is no file .*taks\.db"):
        Queue(SQLiteRepository(database.with_name("taks.db"), create=False)).list_tasks()
    assert not list(database.parent.glob("taks*"))
    with pytest.raises(UnknownTaskType, match="known: long, pay"):
        operator.submit("pya")
    operator.pause("pya")
    assert "is it misspelt? This queue knows: long, pay" in caplog.text


def test_a_backup_of_a_file_in_use_has_the_tasks(
    spawn: Spawn, operator: Queue, database: Path
) -> None:
    child = spawn(WORKER, database)
    handle = operator.submit("long")
    assert child.read() == "begun"
    copy = database.with_name("backup.db")
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("VACUUM INTO ?", (str(copy),))
    with SQLiteRepository(copy, create=False) as repository:
        assert Queue(repository).get_task_status(handle.id).type == "long"
    child.tell()
    assert handle.result(timeout=PATIENCE) == "done"


# A move from Celery


def test_a_task_of_a_killed_worker_runs_again_as_with_late_acks(
    spawn: Spawn, operator: Queue, database: Path
) -> None:
    first = spawn(WORKER, database)
    handle = operator.submit("long")
    at_most_once = operator.submit("long", max_crashes=1)
    assert [first.read(), first.read()] == ["begun", "begun"]
    first.kill()
    second = spawn(WORKER, database)
    assert second.read() == "begun"
    second.tell()
    assert handle.result(timeout=PATIENCE) == "done"
    assert handle.task().crashes == 1
    with pytest.raises(TaskFailed):
        at_most_once.result(timeout=PATIENCE)
    assert at_most_once.task().starts == 1


CELERY = """
import sys, threading
from datetime import datetime, timedelta, timezone
from taskx import Queue, RetryPolicy, SQLiteRepository, chain, every, group

queue = Queue(SQLiteRepository(sys.argv[1]))

@queue.executor(retry=RetryPolicy(3, base=0.01, retry_on=ConnectionError))
def mail(ctx, to: str) -> str:
    if ctx.task.errors == 0:
        raise ConnectionError("no server")
    return f"to {to}"

@queue.executor(rate="1000/s")
def add(a: int, b: int) -> int:
    return a + b

@queue.executor()
def total(ctx) -> int:
    return sum(parent.result for parent in ctx.parents)

def refused(call):
    try:
        call()
    except Exception as error:
        print(type(error).__name__, error, sep=": ", flush=True)

@queue.executor()
def tick(name: str) -> None:
    ticked.set()

ticked = threading.Event()
queue.schedule("beat", every(timedelta(seconds=0.1)), tick, {"name": "beat"})
refused(lambda: mail.submit(to="ann", delay=60))
refused(lambda: mail.using(countdown=60))
refused(lambda: mail.submit(whom="ann"))
with queue:
    soon = datetime.now(timezone.utc) + timedelta(seconds=0.01)
    print(mail.submit("ann").result(timeout=60), flush=True)
    print(mail.using(delay=0.01, expires=timedelta(hours=1)).submit(to="bob").result(timeout=60))
    print(mail.using(run_at=soon, priority=9).submit(to="cid").result(timeout=60))
    pairs = [add.task(n, n) for n in range(3)]
    print(queue.submit_flow(chain(add.task(1, 2), total)).result(timeout=60))
    print(queue.submit_flow(group(*pairs).then(total)).result(timeout=60), flush=True)
    print(ticked.wait(60), flush=True)
print(add(1, 2), flush=True)
"""


def test_what_celery_users_try_first_works_or_says_what_to_do(spawn: Spawn, database: Path) -> None:
    child = spawn(CELERY, database)
    child.process.wait(PATIENCE)
    out, err = child.ends()
    assert child.process.returncode == 0, err
    place = "options are given as using(delay=…).submit(…)"
    assert out.splitlines() == [
        f"PayloadError: params: 'mail' does not take 'delay'; it takes to; {place}",
        (
            "TypeError: using() has no option countdown (for countdown write delay=…); params are given to "
            "submit"
        ),
        "PayloadError: params: 'mail' requires to and does not take 'whom'; it takes to",
        "to ann",
        "to bob",
        "to cid",
        "3",
        "6",
        "True",
        "3",
    ]
