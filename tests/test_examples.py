"""The examples, run as readers run them."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import pty
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode

import pytest
from helpers import PATIENCE, eventually
from kinds import NO_BROWSER
from mongo_server import free_port

from taskx import Queue, SQLiteRepository, Task, TaskFilter, TaskStatus, testing

pytestmark = pytest.mark.process

EXAMPLES = Path(__file__).parent.parent / "examples"
STRICT = (sys.executable, "-W", "error")


@contextmanager
def program(*command: str | Path, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Run a program in a process group of its own, which is killed at the end of the block."""
    with subprocess.Popen(command, text=True, start_new_session=True, **options) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def run_example(
    folder: Path, name: str, *args: str, timeout: float = PATIENCE
) -> subprocess.CompletedProcess[str]:
    """Run an example in a folder. It must end without an error."""
    command = [*STRICT, EXAMPLES / name, *args]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=timeout)
    assert ran.returncode == 0, ran.stderr
    return ran


# checksum.py


def checksum_command(*args: str | Path) -> list[str | Path]:
    return [*STRICT, EXAMPLES / "checksum.py", *args]


def run_checksum(*args: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the program until it ends."""
    return subprocess.run(checksum_command(*args), capture_output=True, text=True, **options)


def stored(database: Path) -> dict[str, Task]:
    """Return the tasks in a database, by the name of their file."""
    with SQLiteRepository(database) as repository:
        tasks = repository.list(TaskFilter(limit=10_000))
    by_name = {Path(task.params["path"]).name: task for task in tasks}
    assert len(by_name) == len(tasks), "a file has two tasks"
    return by_name


def assert_all_hashed(tree: Path, database: Path) -> None:
    """Check that every file of a flat folder has one completed task with the right checksum."""
    found = {name: task.result for name, task in stored(database).items()}
    assert found == {
        path.name: {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "bytes": path.stat().st_size,
        }
        for path in tree.iterdir()
    }


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "sums.db"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder of twenty files."""
    folder = tmp_path / "tree"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number:02}").write_bytes(os.urandom(1000 * number))
    return folder


def test_checksum_hashes_each_file_once_and_all_anew_with_fresh(tree, database):
    first = run_checksum(tree, "--db", database)
    assert (first.returncode, first.stderr) == (0, "")
    assert f"Hashing 20 files of {tree}." in first.stdout
    assert "100%  20 of 20 files" in first.stdout
    assert f"20 files, 0.2 MB, 0 failed; the checksums are in {database}" in first.stdout
    assert "files/s" in first.stdout
    assert_all_hashed(tree, database)

    before = stored(database)
    second = run_checksum(tree, "--db", database)
    assert (second.returncode, second.stderr) == (0, "")
    assert f"All 20 files of {tree} are already done. Use --fresh to start again." in second.stdout
    assert "20 files, 0.2 MB, 0 failed" in second.stdout
    assert stored(database) == before

    (tree / "added").write_bytes(b"more")
    third = run_checksum(tree, "--db", database)
    assert f"20 of 21 files of {tree} are already done." in third.stdout
    assert_all_hashed(tree, database)

    (tree / "07").write_bytes(b"changed")
    fresh = run_checksum(tree, "--db", database, "--fresh")
    assert fresh.returncode == 0
    assert f"Hashing 21 files of {tree}." in fresh.stdout
    assert_all_hashed(tree, database)


def test_checksum_removes_only_its_own_database(tree, database):
    database.write_text("a letter, not a database")
    refused = run_checksum(tree, "--db", database, "--fresh")
    assert refused.returncode == 1
    assert refused.stderr.startswith("checksum: ")
    assert len(refused.stderr.splitlines()) == 1
    assert database.read_text() == "a letter, not a database"


def test_checksum_hashes_the_standard_library(database):
    """The demo itself, on the real files of this machine."""
    ran = run_checksum("--db", database)
    assert ran.returncode == 0
    with SQLiteRepository(database) as repository:
        tasks = repository.list(TaskFilter(status=TaskStatus.COMPLETED, limit=100_000))
    results = {task.params["path"]: task.result for task in tasks}
    assert len(results) > 1000
    assert not [path for path in results if "-packages" in path]
    for path in Path(json.__file__).resolve().parent.glob("*.py"):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert results[str(path)] == {"sha256": digest, "bytes": path.stat().st_size}


def test_checksum_counts_unreadable_files_as_failed(tree, database):
    (tree / "dangling").symlink_to(tree / "nothing")
    os.mkfifo(tree / "pipe")  # opening it would block for ever
    with open(os.fsencode(tree) + b"/no\xfftext", "wb"):
        pass
    ran = run_checksum(tree, "--db", database)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "21 files, 0.2 MB, 1 failed" in ran.stdout
    assert f"failed: {tree}/dangling: FileNotFoundError" in ran.stdout
    assert "no\\udcfftext" in ran.stdout
    tasks = stored(database)
    assert tasks["dangling"].status is TaskStatus.FAILED
    assert "pipe" not in tasks


def test_checksum_does_not_hash_its_own_database(tree):
    """A file that is opened elsewhere in the process would lose its locks."""
    for _ in range(2):
        ran = run_checksum(".", "--db", "sums.db", cwd=tree)
        assert "20 files, 0.2 MB, 0 failed" in ran.stdout


def test_two_checksum_programs_can_run_at_once(tree, database):
    for number in range(300):
        (tree / f"more-{number}").write_bytes(os.urandom(100))
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = checksum_command(tree, "--db", database)
    with program(*command, **options) as one, program(*command, **options) as other:
        for process in (one, other):
            out, err = process.communicate(timeout=PATIENCE)
            assert (process.returncode, err) == (0, ""), out
    assert_all_hashed(tree, database)
    assert {len(task.attempts) for task in stored(database).values()} == {1}


@contextmanager
def caught_in_the_middle(tree: Path, database: Path) -> Iterator[subprocess.Popen[str]]:
    """Run the program until it has hashed some files, usually twenty, and is busy with a huge one."""
    with open(tree / "huge", "wb") as huge:
        huge.truncate(1 << 38)  # a sparse file: minutes to read, but no disk space
    for number in range(20):
        (tree / f"last-{number}").write_bytes(b"last")
    command = checksum_command(tree, "--db", database, "--workers", "1")
    with program(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        eventually(database.exists)
        with SQLiteRepository(database) as repository:

            def in_the_middle() -> bool:
                assert process.poll() is None, process.communicate()
                running = repository.list(TaskFilter(status=TaskStatus.RUNNING))
                told = [Path(task.params["path"]).name for task in running if task.message]
                return told == ["huge"] and len(running) == 1

            eventually(in_the_middle)
        yield process


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_checksum_goes_on_after_a_signal(tree, database, signum, code):
    with caught_in_the_middle(tree, database) as process:
        before = stored(database)
        done = [name for name, task in before.items() if task.status is TaskStatus.COMPLETED]
        left = 41 - len(done)
        process.send_signal(signum)
        out, _err = process.communicate(timeout=PATIENCE)
        assert process.returncode == code
    if signum == signal.SIGKILL:
        assert stored(database)["huge"].status is TaskStatus.RUNNING
    else:
        assert f"Stopped with {left} files left. Run it again to go on." in out
        assert f"{len(done)} files, 0.2 MB, 0 failed" in out
        handed_back = stored(database)["huge"]
        assert handed_back.status is TaskStatus.PENDING
        assert (handed_back.interruptions, handed_back.crashes, handed_back.errors) == (1, 0, 0)
        with SQLiteRepository(database) as repository:
            assert not repository.liveness.nodes()

    (tree / "huge").write_bytes(b"not so huge")
    again = run_checksum(tree, "--db", database)
    assert again.returncode == 0
    assert f"{len(done)} of 41 files of {tree} are already done." in again.stdout
    assert f"Going on with the other {left}. Use --fresh to start again." in again.stdout
    assert "41 files, 0.2 MB, 0 failed" in again.stdout
    assert f"This run: {left} files" in again.stdout
    assert_all_hashed(tree, database)
    after = stored(database)
    assert all(after[name] == before[name] for name in done), "finished files are not hashed again"
    assert after["huge"].crashes == (signum == signal.SIGKILL)


def test_checksum_removes_no_database_in_use(tree, database):
    with caught_in_the_middle(tree, database) as process:
        refused = run_checksum(tree, "--db", database, "--fresh")
        assert refused.returncode == 1
        assert "in use by another process; nothing was removed" in refused.stderr
        assert process.poll() is None
    assert len(stored(database)) == 41


def test_checksum_shows_a_bar_on_a_terminal(tree, database):
    ours, its = pty.openpty()
    with program(*checksum_command(tree, "--db", database), stdout=its) as process:
        os.close(its)
        shown = b""
        with suppress(OSError):  # reading fails when the other end of the terminal is closed
            while part := os.read(ours, 4096):
                shown += part
        assert process.wait(timeout=PATIENCE) == 0
    os.close(ours)
    assert b"\r[" in shown
    assert b"#] 100%  20 of 20 files" in shown


# fetch.py


class Site(ThreadingHTTPServer):
    """A web site whose pages contain their path. ``asked`` counts the requests for each path.

    A page whose path begins with /busy answers 503 to the first request, and one with /gone always 404. One
    with /held sets ``held``, and answers when ``open`` is set. Until then it sends header after header, so
    that no client gives up.
    """

    daemon_threads = True
    request_queue_size = 100

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Page)
        self.asked: Counter[str] = Counter()
        self.held, self.open = threading.Event(), threading.Event()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"


class _Page(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        site, path = self.server, self.path
        site.asked[path] += 1
        busy = path.startswith("/busy") and site.asked[path] == 1
        self.send_response(404 if path.startswith("/gone") else 503 if busy else 200)
        with suppress(OSError):  # the program that asked was killed
            if path.startswith("/held"):
                self._hold()
            self.end_headers()
            self.wfile.write(path.encode())

    def _hold(self) -> None:
        self.server.held.set()
        for _ in range(60):  # a client takes at most 100 headers
            self.send_header("Still-Held", "yes")
            self.flush_headers()
            if self.server.open.wait(1):
                return

    def log_message(self, *args: object) -> None:
        """Print nothing."""


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as site:
        thread = threading.Thread(target=site.serve_forever)
        thread.start()
        yield site
        site.open.set()
        site.shutdown()
        thread.join()


def fetch_command(folder: Path, *urls: str) -> list[str | Path]:
    listed = folder / "urls.txt"
    listed.write_text("\n".join(urls))
    return [*STRICT, EXAMPLES / "fetch.py", listed, "--workers", "4"]


def fetched(site: Site, path: str) -> str:
    """Return the line that the program prints for a page."""
    digest = hashlib.sha256(path.encode()).hexdigest()
    return f"{digest[:12]} {len(path):>9} {site.url(path)}"


@pytest.mark.parametrize(
    "wrong", [["urls.txt", "--workers", "0"], ["urls.txt", "--db", "urls.txt"], ["no.txt"]]
)
def test_fetch_says_what_is_wrong_with_a_call(tmp_path, wrong):
    (tmp_path / "urls.txt").write_text("http://localhost/a-page-of-this-machine\n" * 9)
    (tmp_path / "no.txt").write_bytes(b"\xff\xfe")
    said = subprocess.run(
        [*STRICT, EXAMPLES / "fetch.py", *wrong], cwd=tmp_path, capture_output=True, text=True
    )
    assert said.returncode == 2
    assert said.stderr.splitlines()[-1].startswith("fetch.py: error: ")


def test_fetch_continues_after_a_kill(site, tmp_path):
    """A busy page is tried again, and a page that is gone is not. No page is fetched twice."""
    paths = ["/1", "/busy", "/gone", "/2", "/held", "/3"]
    command = fetch_command(tmp_path, *map(site.url, paths))
    with program(*command, cwd=tmp_path, stdout=subprocess.DEVNULL) as process:
        assert site.held.wait(PATIENCE)
        with SQLiteRepository(tmp_path / "fetch.db") as repository:
            unheld = len(paths) - 1
            eventually(lambda: Queue(repository).list_tasks(TaskFilter()).total == len(paths))
            ended = {TaskStatus.COMPLETED, TaskStatus.FAILED}
            eventually(
                lambda: sum(t.status in ended for t in Queue(repository).iter_tasks()) == unheld
            )
        process.kill()
        assert process.wait(timeout=PATIENCE) == -signal.SIGKILL
    before = site.asked.copy()
    assert (before["/busy"], before["/gone"]) == (2, 1)

    site.open.set()
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert ran.returncode == 1
    pages = [fetched(site, path) for path in paths if path != "/gone"]
    assert ran.stdout.splitlines() == [*pages, "6 URLs, 1 failed"]
    *earlier, last, error = ran.stderr.splitlines()
    # The page that was held runs again at once, and may end before the map looks at it.
    assert last in [f"fetch: 6 of 6 (100%), {stored} stored, 1 failed" for stored in (4, 5)]
    assert error == f"{site.url('/gone')}: Permanent: 404 Not Found"
    # A line is written every five seconds: on a slow machine there are some before the last one.
    assert all(
        re.fullmatch(r"fetch: [0-5] of 6 \(\d+%\)(, \d stored)?(, 1 failed)?", line)
        for line in earlier
    )
    assert site.asked - before == {"/held": 1}

    command.append("--again")
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=PATIENCE)
    assert again.returncode == 1
    assert site.asked["/gone"] == 2


def test_fetch_can_be_interrupted(site, tmp_path):
    command = fetch_command(tmp_path, site.url("/1"), site.url("/held"))
    with program(*command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert site.held.wait(PATIENCE)
        process.send_signal(signal.SIGINT)
        site.open.set()
        _out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert "Stopped. Run it again to go on." in err.splitlines()
    assert "KeyboardInterrupt" not in err


# sync_assets.py


def test_sync_assets_runs(tmp_path):
    # The time-out is shorter than the call that a cancel must end, which takes an hour.
    ran = run_example(tmp_path, "sync_assets.py")
    assert ran.stderr == ""
    assert "100%  staging/ap-south is done" in ran.stdout  # a slow machine may miss earlier ones
    assert "'regions': 9, 'errors': ['staging/eu-west: eu-west is under maintenance']" in ran.stdout
    assert "failed: ProviderError: the account is closed" in ran.stdout
    assert "cancelled at 50%" in ran.stdout


# workflow.py


def test_workflow_runs_each_night_once(tmp_path):
    night = [
        "sent monday: berlin 42, lima 7, oslo 15",
        "report: berlin 42, lima 7, oslo 15",
        "chart: ######## # ### | drawing 3 bars",
        "6 tasks, 100 % of them ended, completed",
    ]
    for begins in (night, ["not again: night monday"]):
        ran = run_example(tmp_path, "workflow.py", "shop.db")
        assert ran.stdout.splitlines() == [
            *begins,
            "not again: night monday",
            "failed: Permanent: no branch 'rome'",
            "statuses: failed cancelled",
            "dead letters discarded: 1",
            "mapped: [12, 30] [7] [5, 5, 5]",
            "paused: pending",
            "resumed: [5, 5, 5]",
        ]


# wrong calls


@pytest.mark.parametrize(
    "call", [("fetch.py", "no-such-file"), ("hosts.py",), ("hosts.py", "work")]
)
def test_a_wrong_call_is_answered_in_words(tmp_path, call):
    command = [*STRICT, EXAMPLES / call[0], *call[1:]]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=PATIENCE)
    assert ran.returncode in (1, 2)
    assert call[0] in ran.stderr  # how to call it
    assert "Traceback" not in ran.stderr


# own_repository.py


def test_own_repository_keeps_its_tasks(tmp_path):
    for total in (10, 20):  # the tasks of the first run are still there
        ran = run_example(tmp_path, "own_repository.py")
        assert ran.stdout.splitlines() == [
            "0 2 4 6 8 10 12 14 16 18",
            f"{total} completed tasks in own-repository.json",
        ]
        assert "assumes that it is the only process" in ran.stderr


# orders.py


def test_orders_and_mails_are_as_many(tmp_path):
    lines = run_example(tmp_path, "orders.py").stdout.splitlines()
    assert sorted(lines[:-1]) == [
        "Ann bought it",
        "Bob cannot pay",
        "Cid bought it",
        "to Ann: thank you for ordering Emma",
        "to Cid: thank you for ordering Emma",
    ]
    assert lines[-1] == "2 orders, 2 mails"


# schedule.py


def test_schedule_runs(tmp_path):
    ran = run_example(tmp_path, "schedule.py")
    lines = ran.stdout.splitlines()
    assert lines.pop(3).startswith("nightly comes next at ")
    assert lines == [
        "<Schedule 'beat' (every 0.2 s): 'ping', not stored yet>",
        "<Schedule 'gauge' (every 0.1 s): 'measure', not stored yet>",
        "<Schedule 'nightly' (30 2 * * *): 'report', not stored yet>",
        "beat and gauge have ticked, and run at the same time",
        "gauge is paused: True",
        "by hand: sales",
        "back-filled: sales until 2024-03-29",
        "back-filled: sales until 2024-03-30",
        "back-filled: sales until 2024-03-31",
        "back-filled: sales until 2024-04-01",
        "tasks of nightly: 4",
        "beat has a task for every tick: True",
        "gauge is still paused: True",
        "left: 0",
    ]


# flask_app.py and flask_factory


@pytest.fixture
def flask_app() -> ModuleType:
    pytest.importorskip("flask")
    spec = importlib.util.spec_from_file_location("flask_app", EXAMPLES / "flask_app.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def app(flask_app, tmp_path) -> Iterator[Any]:
    """The app, whose first request starts its queue."""
    app = flask_app.create_app(
        TASKX_REPOSITORY=f"sqlite:///{tmp_path}/tasks.db",
        UPLOADS=str(tmp_path / "uploads"),
        SECONDS_PER_PAGE=0.05,
    )
    queue = app.extensions["taskx"].queue
    yield app
    queue.stop(cancel=True)
    queue.close()


@pytest.fixture
def client(app) -> Any:
    return app.test_client()


def shown(client: Any, task_id: str) -> dict[str, Any]:
    """Return the app's answer about a task."""
    response = client.get(f"/tasks/{task_id}")
    assert response.status_code == 200
    told: dict[str, Any] = response.get_json()
    return told


def upload(client: Any, text: str, name: str = "a.txt", **form: str) -> Any:
    """Upload a text as a program does."""
    data = {"file": (io.BytesIO(text.encode()), name), **form}
    return client.post("/tasks", data=data, headers={"Accept": "application/json"})


def submit(client: Any, text: str, **form: str) -> str:
    response = upload(client, text, **form)
    assert response.status_code == 202
    task_id: str = response.get_json()["id"]
    assert response.headers["Location"] == f"/tasks/{task_id}"
    return task_id


def wait_for_status(client: Any, task_id: str, status: str) -> dict[str, Any]:
    eventually(lambda: shown(client, task_id)["status"] == status)
    return shown(client, task_id)


LONG = "word\n" * 100_000


def test_flask_counts_the_words_of_an_upload(client):
    task_id = submit(client, "to be or not to be\n" * 21)
    told = wait_for_status(client, task_id, "completed")
    assert told["result"] == {
        "words": 126,
        "pages": 2,
        "most": [["to", 42], ["be", 42], ["or", 21]],
    }
    assert (told["progress"], told["message"]) == (100, "page 2 of 2")


def test_flask_shows_progress(client):
    task_id = submit(client, LONG)
    told = eventually(lambda: (t := shown(client, task_id))["progress"] and t)
    assert told["status"] == "running"
    assert told["message"].startswith("page ")


def test_flask_accepts_forms_of_browsers_and_lists_tasks(client):
    data = {"file": (io.BytesIO(b"one"), "form.txt"), "id": "mine"}
    response = client.post("/tasks", data=data, headers={"Accept": "text/html,*/*;q=0.8"})
    assert (response.status_code, response.headers["Location"]) == (303, "/")
    wait_for_status(client, "mine", "completed")
    listed = client.get("/tasks?status=completed").get_json()
    assert listed["total"] == 1
    assert listed["tasks"][0]["params"]["title"] == "form.txt"
    assert client.get("/tasks?status=failed").get_json() == {"tasks": [], "total": 0}
    assert '<form method="post" action="/tasks" enctype' in client.get("/").text


def test_flask_cancels_tasks(app, client):
    """A running task stops, and a pending task never starts."""
    queue = app.extensions["taskx"].queue
    running = [submit(client, LONG) for _ in range(queue.config.worker_num)]
    for task_id in running:
        wait_for_status(client, task_id, "running")
    pending = submit(client, "waits")
    assert client.post(f"/tasks/{pending}/cancel").get_json() == {"cancelled": True}
    assert shown(client, pending)["status"] == "cancelled"
    assert client.post(f"/tasks/{running[0]}/cancel").get_json() == {"cancelled": False}
    wait_for_status(client, running[0], "cancelled")
    assert shown(client, running[1])["status"] == "running"
    assert queue.get_task_status(pending).starts == 0


def test_flask_tasks_can_be_tested_without_threads(flask_app, tmp_path):
    app = flask_app.create_app(TESTING=True, UPLOADS=str(tmp_path))
    with testing.manual(app.extensions["taskx"].queue) as queue:
        client = app.test_client()
        task_id = submit(client, "one two\n" * 100)
        assert shown(client, task_id)["status"] == "pending"
        queue.run_all()  # ctx.sleep() moves the clock of the test
        assert shown(client, task_id)["result"]["words"] == 200
        gone = submit(client, "three")
        for file in tmp_path.iterdir():
            file.unlink()
        queue.run_all(check=False)
        assert "a.txt is no longer there" in shown(client, gone)["error"]


def test_flask_answers_errors_with_status_codes(app, client):
    assert client.get("/tasks/nobody").status_code == 404
    assert client.post("/tasks/nobody/cancel").status_code == 404
    assert client.get("/tasks?status=lost").status_code == 400
    assert client.get("/tasks?limit=-1").status_code == 400
    assert client.post("/tasks").get_json() == {"error": "file: is missing"}
    submit(client, "text", id="once")
    assert upload(client, "text", id="once").status_code == 409
    too_long = upload(client, "text", id="y" * 300)
    assert (too_long.status_code, "300 characters" in too_long.text) == (400, True)
    assert len([*Path(app.config["UPLOADS"]).iterdir()]) == 1, "refused uploads are removed"
    wait_for_status(client, "once", "completed")
    assert client.post("/tasks/once/cancel").status_code == 409


def test_flask_answers_503_when_full_or_stopped(app, client):
    queue = app.extensions["taskx"].queue
    most = queue.config.buffer_size + queue.config.worker_num
    codes = [upload(client, LONG).status_code for _ in range(most + 1)]
    assert set(codes) == {202, 503}
    assert client.get("/tasks").get_json()["total"] == codes.count(202)
    queue.stop(cancel=True)
    response = upload(client, "late")
    assert response.status_code == 503
    assert "stopped" in response.get_json()["error"]


def test_flask_shows_the_dashboard_only_to_the_admin(client, monkeypatch):
    assert client.get("/taskx/").status_code == 403
    monkeypatch.setenv("ADMIN_PASSWORD", "secret")
    asked = client.get("/taskx/")
    assert (asked.status_code, asked.headers["WWW-Authenticate"]) == (401, 'Basic realm="tasks"')
    for wrong in ("wrong", "wröng"):
        assert client.get("/taskx/", auth=("ann", wrong)).status_code == 401
    submit(client, "text", id="mine")
    assert "mine" in client.get("/taskx/tasks", auth=("ann", "secret")).text


def test_flask_starts_in_a_gunicorn_worker(flask_app, tmp_path):
    """The hook starts the queue before the first request."""
    app = flask_app.create_app(TASKX_REPOSITORY=f"sqlite:///{tmp_path}/tasks.db")
    queue = app.extensions["taskx"].queue
    with queue.repository:
        assert not queue.repository.liveness.nodes()
        flask_app.post_worker_init(SimpleNamespace(wsgi=app))
        assert len(queue.repository.liveness.nodes()) == 1
        queue.stop()


def answers(url: str, body: bytes | None = None) -> str | None:
    """Return a server's answer, to a POST if there is a body; None if it does not answer."""
    asked = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(asked, timeout=PATIENCE) as response:
            text: str = response.read().decode()
            return text
    except OSError:
        return None


@contextmanager
def submitter(database: Path, type: str) -> Iterator[Queue]:
    """Return a queue that only submits, for another process that runs on the same file."""
    with SQLiteRepository(database) as repository:
        queue = Queue(repository)
        queue.declare(type)
        yield queue


# agent.py


def test_an_agent_is_killed_twice_and_goes_on(tmp_path):
    """Nothing is lost, what is done is not done again, and the wait of days goes on."""
    api = runpy.run_path(str(EXAMPLES / "agent_api.py"))
    server = api["Server"](("127.0.0.1", 0), api["Api"])
    url = f"http://127.0.0.1:{server.server_address[1]}"
    environment = {**os.environ, "AGENT_URL": url, "AGENT_DAYS": "0.5s"}

    def agent() -> Any:
        command = [*STRICT, EXAMPLES / "agent.py"]
        return program(*command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE)

    with server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with agent() as first:
            eventually(lambda: len(api["prompts"]) > 2)
            first.kill()
        with agent() as second, SQLiteRepository(tmp_path / "agent.db") as repository:
            queue = Queue(repository)

            def asked() -> list[Task]:
                return queue.list_tasks(type="answer", status="pending").tasks

            eventually(lambda: len(asked()) == 6)
            second.kill()
            second.wait()
            thought = Counter(api["prompts"])
            assert set(thought) == {
                task.params["prompt"] for task in queue.iter_tasks(type="think")
            }
            for task in asked():
                letter = task.params["question"]
                queue.finish(task.id, "no" if letter == "bolt's offer is fine" else "yes", by="ann")
            with agent() as last:
                out, _ = last.communicate(timeout=PATIENCE)
            assert last.returncode == 0
            names = ["acme's lease", "acme's offer", "bolt's lease", "cord's lease", "cord's offer"]
            letters = [f"{name} is fine" for name in names]
            assert out.splitlines() == [*letters[:3], "refused", *letters[3:]]
            assert sorted(api["mails"].values()) == sorted(
                [*letters, *(f"Again: {x}" for x in letters)]
            )
            assert Counter(api["prompts"]) == thought  # no answer of the model was asked for again
            assert {task.errors for task in queue.iter_tasks()} == {0}
            speaks = queue.handle(f"{task.id.removesuffix('/approval')}/letter/0")
            assert [chunk.value for chunk in speaks.stream()] == letter.split()
        server.shutdown()


# approval.py


@pytest.fixture
def refunds(tmp_path) -> Iterator[Any]:
    """The app of the example, and its queue, with time that a test moves."""
    pytest.importorskip("flask")
    spec = importlib.util.spec_from_file_location("approval", EXAMPLES / "approval.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    app = module.create_app(TESTING=True, TASKX_REPOSITORY=f"sqlite:///{tmp_path}/refunds.db")
    with testing.manual(app.extensions["taskx"].queue) as queue:
        yield SimpleNamespace(client=app.test_client(), queue=queue)


def ask_for_a_refund(refunds: Any, order: int = 7) -> str:
    """Send the form; return the id of the task, which waits."""
    sent = refunds.client.post("/refunds", data={"order": order, "euros": 90})
    assert (sent.status_code, sent.location) == (303, "/")
    refunds.queue.run_all()
    task_id: str = refunds.queue.list_tasks(type="refund").tasks[0].id
    return task_id


def say(refunds: Any, task_id: str, answer: str) -> str:
    """Press a button; return the page that shows what became of it."""
    sent = refunds.client.post(f"/refunds/{task_id}", data={"answer": answer})
    assert (sent.status_code, sent.location) == (303, "/")
    refunds.queue.run_all()
    text: str = refunds.client.get("/").text
    return text


def test_a_refund_waits_for_a_yes_and_is_paid_once(refunds, caplog):
    caplog.set_level("INFO", "bank")
    task_id = ask_for_a_refund(refunds)
    assert ask_for_a_refund(refunds) == task_id  # the same order once more
    assert "We are sorry about order 7, and pay 90 euros back." in refunds.client.get("/").text
    assert "paid 90 euros" in say(refunds, task_id, "yes")
    assert "paid 90 euros" in say(refunds, task_id, "no")  # too late
    assert len([r for r in caplog.records if r.name == "bank"]) == 1


def test_a_refund_is_refused_by_a_no(refunds):
    assert "refused" in say(refunds, ask_for_a_refund(refunds), "no")


def test_a_refund_that_nobody_answers_ends_after_three_days(refunds):
    ask_for_a_refund(refunds)
    refunds.queue.advance(3 * 86400 + 1)
    assert "nobody has answered in three days" in refunds.client.get("/").text


def test_forms_of_other_sites_and_wrong_numbers_are_refused(refunds):
    foreign = {"Sec-Fetch-Site": "cross-site"}
    form = {"order": 7, "euros": 90}
    assert refunds.client.post("/refunds", data=form, headers=foreign).status_code == 403
    assert refunds.client.post("/refunds", data={"order": "x"}).status_code == 400
    assert refunds.client.post("/refunds/nobody", data={"answer": "yes"}).status_code == 404
    huge = {"order": 10**20, "euros": 1}
    assert refunds.client.post("/refunds", data=huge).status_code == 400
    assert refunds.client.post(f"/refunds/{'x' * 300}", data={"answer": "yes"}).status_code == 400


def test_a_refund_still_waits_after_its_server_was_killed(tmp_path):
    pytest.importorskip("flask")
    repository = f"sqlite:///{tmp_path}/refunds.db"
    environment = {**os.environ, "FLASK_TASKX_REPOSITORY": repository}
    command = [sys.executable, "-m", "flask", "--app", str(EXAMPLES / "approval.py"), "run"]

    def serve(port: int) -> Any:
        return program(*command, "--port", str(port), env=environment, stderr=subprocess.DEVNULL)

    def fetch(port: int, path: str, **form: Any) -> str:
        data = urlencode(form).encode() if form else None
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", data, PATIENCE) as answer:
            text: str = answer.read().decode()
        return text

    def page(port: int) -> str:
        with suppress(OSError):
            return fetch(port, "/")
        return ""

    first = free_port()
    with serve(first):
        eventually(lambda: page(first))
        fetch(first, "/refunds", order=7, euros=90)
        eventually(lambda: "We are sorry about order 7" in page(first))
    second = free_port()
    with serve(second):
        eventually(lambda: "We are sorry about order 7" in page(second))
        (task_id,) = re.findall(r'action="/refunds/([^"]+)"', page(second))
        fetch(second, f"/refunds/{task_id}", answer="yes")
        eventually(lambda: "paid 90 euros" in page(second))


def flask_command(*args: str, **variables: str) -> tuple[list[str], dict[str, str]]:
    """Return a command of ``flask`` in the folder of the example with a factory, and its environment."""
    path = os.pathsep.join(
        [str(EXAMPLES.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    )
    return [sys.executable, "-m", "flask", "--app", "reports:create_app()", *args], {
        **os.environ,
        "PYTHONPATH": path,
        **variables,
    }


@pytest.fixture
def factory(tmp_path: Path) -> Path:
    """Return a copy of the example with a factory, in which its database may be created."""
    pytest.importorskip("flask")
    ignored = shutil.ignore_patterns("__pycache__", "*.db*")
    return Path(shutil.copytree(EXAMPLES / "flask_factory", tmp_path / "site", ignore=ignored))


def test_the_flask_factory_passes_its_own_tests(factory):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    env = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    ran = subprocess.run(command, cwd=factory, env=env, capture_output=True, text=True)
    assert "3 passed" in ran.stdout


def test_flask_commands_do_not_start_the_queue(factory):
    told = []
    look = "import threading; print(threading.active_count(), app.extensions['taskx'].queue)"
    for args, given in ((["routes"], ""), (["shell"], look)):
        command, env = flask_command(*args)
        ran = subprocess.run(
            command, cwd=factory, env=env, input=given, capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stderr
        told.append(ran.stdout)
    assert "views.submit" in told[0]
    assert re.search("1 <Queue on .*, not started>", told[1])
    assert not (factory / "reports.db").exists()


def test_flask_runs_tasks_in_the_serving_process(factory):
    """The first request starts the queue. With a reloader it is in the child: see the next test."""
    port = free_port()
    command, env = flask_command("run", "--port", str(port), "--no-reload")
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with program(*command, env=env, cwd=factory, **options) as process:
        body = eventually(lambda: answers(f"http://127.0.0.1:{port}/reports/2024-05", b"[1, 2]"))
        with submitter(factory / "reports.db", "report") as queue:
            [node] = queue.repository.liveness.nodes()
            assert node.alive
            assert f":{process.pid}:" in node.name
            handle = queue.handle(json.loads(body)["id"])
            assert handle.result(timeout=PATIENCE) == "2024-05: 3.00 EUR"
            assert [*queue.schedules()] == ["nightly"]
            assert queue.repository.liveness.nodes() == [node]


def test_a_reload_hands_the_tasks_of_a_flask_site_to_the_next_child(factory):
    """The old child's queue has left before the new one starts: there are never two."""
    port = free_port()
    tasks = factory / "reports" / "tasks.py"
    code = tasks.read_text()
    assert "    total = 0.0\n" in code
    tasks.write_text(code.replace("    total = 0.0\n", "    total = 0.0\n    ctx.sleep(600)\n"))
    command, env = flask_command("run", "--port", str(port), "--debug")
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with program(*command, env=env, cwd=factory, **options) as process:
        body = eventually(lambda: answers(f"http://127.0.0.1:{port}/reports/2024-05", b"[1, 2]"))
        with submitter(factory / "reports.db", "report") as queue:
            handle = queue.handle(json.loads(body)["id"])
            eventually(lambda: handle.task().status is TaskStatus.RUNNING)
            [old] = queue.repository.liveness.nodes()
            assert f":{process.pid}:" not in old.name, "the parent only watches"
            tasks.write_text(code)
            eventually(lambda: old not in queue.repository.liveness.nodes())
            eventually(lambda: answers(f"http://127.0.0.1:{port}/reports/{handle.id}"))
            assert handle.result(PATIENCE) == "2024-05: 3.00 EUR"
            assert (handle.task().interruptions, handle.task().crashes) == (1, 0)
            assert len(queue.repository.liveness.nodes()) == 1


def test_flask_taskx_worker_runs_the_tasks_of_a_site_that_only_submits(factory):
    port = free_port()
    site, env = flask_command("run", "--port", str(port), FLASK_TASKX_EMBEDDED="false")
    worker, _ = flask_command("taskx", "worker", "--threads", "2")
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with program(*site, env=env, cwd=factory, **options):
        body = eventually(lambda: answers(f"http://127.0.0.1:{port}/reports/2024-05", b"[1, 2]"))
        with submitter(factory / "reports.db", "report") as queue:
            assert queue.repository.liveness.nodes() == []
            with program(*worker, env=env, cwd=factory, **options) as process:
                handle = queue.handle(json.loads(body)["id"])
                assert handle.result(PATIENCE) == "2024-05: 3.00 EUR"
                [node] = queue.nodes()
                assert node.workers == 2
                assert node.types == ("report", "clean_up")
                process.terminate()
                assert process.wait(PATIENCE) == 0
            listed, _ = flask_command("taskx", "list", "--json")
            ran = subprocess.run(
                listed, cwd=factory, env=env, capture_output=True, text=True, check=True
            )
            assert json.loads(ran.stdout.splitlines()[0])["id"] == handle.id


# fastapi_app.py


def test_fastapi_runs_and_cancels_tasks(tmp_path):
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    # The test listens, so that no other program takes the port. Requests wait until the server has started.
    listener = socket.create_server(("127.0.0.1", 0))
    site = f"http://127.0.0.1:{listener.getsockname()[1]}/reports"
    path = os.pathsep.join(
        [str(EXAMPLES.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    )
    command = [sys.executable, "-m", "uvicorn", "fastapi_app:app", "--fd", str(listener.fileno())]
    with (
        listener,
        program(
            *command,
            "--app-dir",
            EXAMPLES,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path},
            pass_fds=[listener.fileno()],
        ) as process,
    ):

        def order(pages: int) -> str:
            asked = json.dumps({"title": "Sales", "pages": pages}).encode()
            return f"{site}/{json.loads(answers(site, asked) or '')['id']}"

        def shown(url: str) -> dict[str, Any]:
            told: dict[str, Any] = json.loads(answers(url) or "")
            return told

        short, long = order(1), order(10_000)
        eventually(lambda: shown(short)["status"] == "completed")
        assert shown(short)["result"] == {"title": "Sales", "pages": 1}
        eventually(lambda: shown(long)["status"] == "running")
        assert json.loads(answers(f"{long}/cancel", b"") or "") == {"cancelled": False}
        eventually(lambda: shown(long)["status"] == "cancelled")
        assert answers(f"{site}/unknown") is None
        for url, code in ((long, 409), (f"{site}/unknown", 404)):
            with pytest.raises(HTTPError) as refused:
                urllib.request.urlopen(f"{url}/cancel", b"", PATIENCE)
            with refused.value:
                assert refused.value.code == code
        with SQLiteRepository(tmp_path / "tasks.db") as repository:
            assert len(repository.liveness.nodes()) == 1
            process.terminate()
            process.wait(timeout=PATIENCE)
            assert repository.liveness.nodes() == []


# django_project


MIGRATE = """
import django
from django.core.management import call_command
django.setup()
call_command("migrate", verbosity=0)
from django.contrib.auth.models import User
User.objects.create_superuser("boss", password="secret")
"""


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the project whose database has its tables, and the superuser boss."""
    pytest.importorskip("django")
    ignored = shutil.ignore_patterns("__pycache__", "*.db*")
    folder = tmp_path_factory.mktemp("project") / "site"
    shutil.copytree(EXAMPLES / "django_project", folder, ignore=ignored)
    env = {**os.environ, "DJANGO_SETTINGS_MODULE": "project.settings"}
    subprocess.run([*STRICT, "-c", MIGRATE], cwd=folder, env=env, check=True)
    return folder


@pytest.fixture
def project(migrated: Path, tmp_path: Path) -> Path:
    """Return a copy of the project for one test."""
    return Path(shutil.copytree(migrated, tmp_path / "site"))


def manage(project: Path, *args: str) -> str:
    """Run a command of the project."""
    command = [*STRICT, "manage.py", *args]
    ran = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout + ran.stderr


def test_django_passes_its_own_tests(project):
    assert "Ran 4 tests" in manage(project, "test", "--noinput")


def test_django_commands_do_not_start_the_queue(project):
    manage(project, "makemigrations", "--check", "--dry-run")
    look = "import threading; from taskx.contrib.django import get_queue; from reports import tasks"
    show = "print(get_queue(), get_queue().schedules(), threading.active_count())"
    assert "not started> {} 1" in manage(project, "shell", "-c", f"{look}; {show}")


@contextmanager
def django_site(project: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Serve the project with its reloader; return its address and the process that watches."""
    address = f"127.0.0.1:{free_port()}"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    command = (sys.executable, "manage.py", "runserver", address)
    with program(*command, cwd=project, **quiet) as process:
        eventually(lambda: answers(f"http://{address}/"))
        yield f"http://{address}", process


def send_form(url: str, form: dict[str, str], page: str = "/") -> None:
    """Send a form as a browser does: with the token of its page, and the cookie."""
    browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
    text = browser.open(url.partition("/reports")[0] + page).read().decode()
    [token, *_] = re.findall(r'name="csrfmiddlewaretoken" value="(\w+)"', text)
    body = urlencode({**form, "csrfmiddlewaretoken": token}).encode()
    browser.open(url, body).read()


def test_django_runserver_runs_the_tasks_of_its_site(project):
    """The queue is in the child that serves, not in the parent that watches; it stores the schedule."""
    with django_site(project) as (site, process):
        send_form(f"{site}/reports/", {"title": "Sales", "rows": "3"})

        def sent() -> dict[str, Any] | None:
            told = json.loads(answers(f"{site}/reports/1/") or "{}")
            return told if told.get("sent") else None

        told = eventually(sent)
        assert (told["total"], told["status"], told["message"]) == (6, "completed", "row 3 of 3")
        look = (
            "import json; from taskx.contrib.django import get_queue; q = get_queue(); "
            "sent = [*q.iter_tasks(type='reports.tasks.send@mails')]; "
            "mails = [q.handle(t.id).exception(60) or q.get_task_status(t.id).to_dict() for t in sent]; "
            "print(json.dumps([[n.pid for n in q.nodes()], [*q.schedules()], mails]))"
        )
        pids, schedules, [mail] = json.loads(
            manage(project, "shell", "-v", "0", "-c", look).splitlines()[-1]
        )
        assert len(pids) == 1
        assert process.pid not in pids
        assert schedules == ["remove old reports"]
        assert (mail["status"], mail["errors"]) == ("completed", 1)


def test_django_in_production_runs_tasks_in_a_worker(project):
    """The settings of a server: the site only stores tasks."""
    environment = {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "project.production",
        "SECRET_KEY": "a secret of the test",
        "ALLOWED_HOSTS": "localhost",
    }

    def run(*args: str) -> str:
        command = [*STRICT, "manage.py", *args]
        ran = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    assert "no issues" in run("check")
    submit = (
        "from reports.models import Report; from reports.tasks import build; "
        "print(build.enqueue(Report.objects.create(title='Sales', rows=1).pk).id)"
    )
    task_id = run("shell", "-v", "0", "-c", submit).split()[-1]
    command = (sys.executable, "manage.py", "taskx", "worker")
    quiet = {"stderr": subprocess.DEVNULL}
    with program(*command, cwd=project, env=environment, **quiet) as process:
        assert json.loads(run("taskx", "wait", task_id, "--timeout", "120s", "--json"))[
            "result"
        ] == {
            "report": 1,
            "total": 1,
        }
        process.terminate()
        assert process.wait(PATIENCE) == 0


@pytest.mark.browser
def test_django_shows_its_tasks_in_the_admin_and_in_the_dashboard(project):
    """A person logs in, looks at a task, runs it again with other params, and opens the dashboard."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if chromium is None:
        pytest.skip(f"{NO_BROWSER}: install Debian's package chromium")
    from playwright.sync_api import expect, sync_playwright

    with django_site(project) as (site, _), sync_playwright() as playwright:
        send_form(f"{site}/reports/", {"title": "Sales", "rows": "100000"})
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"], timeout=60_000
        )
        page = browser.new_page()
        page.set_default_timeout(60_000)
        expect.set_options(timeout=60_000)
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))

        page.goto(f"{site}/tasks/")  # leads to the login, and back
        page.fill("[name=username]", "boss")
        page.fill("[name=password]", "secret")
        page.click("[type=submit]")
        expect(page).to_have_title(re.compile("TaskX"))

        page.goto(f"{site}/admin/taskx/task/")
        page.click(".field-task_id a")
        expect(page.locator(".field-task_type .readonly")).to_have_text("reports.tasks.build")
        page.click("text=Cancel")
        page.click("input[type=submit]")
        expect(page.locator(".messagelist")).to_contain_text("asked to stop")
        status = page.locator(".field-task_status .readonly")
        eventually(lambda: page.reload() and status.inner_text() == "cancelled")

        page.click("text=Run again")
        page.fill("[name=params]", '{"args": [1], "kwargs": {"rows": 1}}')
        page.click("input[type=submit]")
        expect(page.locator("body")).to_contain_text("unexpected keyword argument 'rows'")
        page.fill("[name=params]", '{"args": [999], "kwargs": {}}')
        page.click("input[type=submit]")
        eventually(lambda: page.reload() and status.inner_text() == "failed")
        expect(page.locator(".field-task_traceback .readonly")).to_contain_text("DoesNotExist")

        page.goto(f"{site}/admin/taskx/schedule/")
        page.click("text=remove old reports")
        expect(page.locator("[name=spec]")).to_have_value("30 3 * * *")
        page.fill("[name=spec]", "30 3 * *")
        page.click("[name=_save]")
        expect(page.locator(".field-spec .errorlist")).to_contain_text("4 fields")
        page.fill("[name=spec]", "45 3 * * *")
        page.click("[name=_save]")
        expect(page.locator(".field-spec")).to_have_text("45 3 * * *")
        browser.close()
    assert problems == []
