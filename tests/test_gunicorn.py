"""The web examples under a real gunicorn with two worker processes, each a node on the same file."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from helpers import PATIENCE, eventually
from mongo_server import free_port

from taskx import SQLiteRepository, TaskFilter

pytestmark = pytest.mark.process

EXAMPLES = Path(__file__).parent.parent / "examples"


class Site:
    """A served example.

    Attributes:
        repository: the file that its processes share.
        log: the log file of gunicorn.
        step: the duration of one step of a report, in seconds.
        master: gunicorn's first process, which does not serve requests itself.
    """

    step: float

    def __init__(self, folder: Path, *options: str) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self.log = folder / "gunicorn.log"
        self.repository = SQLiteRepository(folder / "tasks.db")
        self.master = subprocess.Popen(
            [
                *(sys.executable, "-m", "gunicorn", "--bind", self.address, "--workers", "2"),
                *("--log-file", str(self.log), "--timeout", "120", *options),
            ],
            cwd=folder,
        )

    def submit(self, title: str, steps: int) -> str:
        """Submit a report with this number of steps. Return its id."""
        raise NotImplementedError

    def status(self, task_id: str) -> str:
        """Return a task's status as the site shows it."""
        raise NotImplementedError

    def request(self, method: str, path: str, **more: Any) -> tuple[http.client.HTTPResponse, str]:
        """Send a request without following redirections. Return the answer and its body."""
        connection = http.client.HTTPConnection(self.address, timeout=PATIENCE)
        try:
            connection.request(method, path, **more)
            answer = connection.getresponse()
            body = answer.read().decode()
        finally:
            connection.close()
        assert answer.status < 400, body
        return answer, body

    def nodes(self) -> list[str]:
        """Return the names of the live nodes: host, process and start."""
        return [node.name for node in self.repository.liveness.nodes() if node.alive]

    def wake(self) -> None:
        """Visit two worker processes, if the server runs: a request starts the queue of its process."""
        if self.master.poll() is None:
            with contextlib.suppress(OSError, http.client.HTTPException):  # a process that ends
                self.visit_two_processes()

    def visit_two_processes(self) -> None:
        """Send half of a request, which keeps one process busy; another one answers the next request."""
        host, port = self.address.split(":")
        with socket.create_connection((host, int(port)), PATIENCE) as held:
            held.sendall(b"GET / HTTP/1.0\r\nHost: localhost\r\n")
            self.request("GET", "/")
            held.sendall(b"\r\n")
            while held.recv(4096):
                pass

    def stop(self) -> int:
        """End the server with SIGTERM. Return its exit code."""
        self.master.terminate()
        return self.master.wait(PATIENCE)


class FlaskSite(Site):
    """``examples/flask_app.py``: the first request to each worker process starts its queue."""

    step = 0.25

    def __init__(self, folder: Path, *options: str) -> None:
        super().__init__(folder, "--pythonpath", str(EXAMPLES), *options, "flask_app:create_app()")

    def nodes(self) -> list[str]:
        """Visit two worker processes at once, and return the live nodes."""
        self.wake()
        return super().nodes()

    def submit(self, title: str, steps: int) -> str:
        text = "a line\n" * 20 * steps
        body = (
            f'--part\r\nContent-Disposition: form-data; name="file"; filename="{title}"\r\n\r\n{text}\r\n'
            "--part--\r\n"
        )
        headers = {"Content-Type": "multipart/form-data; boundary=part", "Accept": "text/json"}
        _, told = self.request("POST", "/tasks", body=body, headers=headers)
        task_id: str = json.loads(told)["id"]
        return task_id

    def status(self, task_id: str) -> str:
        _, text = self.request("GET", f"/tasks/{task_id}")
        status: str = json.loads(text)["status"]
        return status


class DjangoSite(Site):
    """``examples/django_project`` with its tasks in a file: the first request starts a process's queue."""

    step = 0.1

    def __init__(self, folder: Path, *options: str) -> None:
        ignored = shutil.ignore_patterns("__pycache__", "*.db*")
        project = EXAMPLES / "django_project"
        shutil.copytree(project, folder, ignore=ignored, dirs_exist_ok=True)
        with (folder / "project" / "settings.py").open("a") as settings:
            settings.write(
                'TASKS["default"]["OPTIONS"]["repository"] = f"sqlite:///{BASE_DIR}/tasks.db"\n'
            )
        subprocess.run([sys.executable, "manage.py", "migrate"], cwd=folder, check=True)
        super().__init__(folder, *options, "project.wsgi")

    def nodes(self) -> list[str]:
        """Visit two worker processes at once, and return the live nodes."""
        self.wake()
        return super().nodes()

    def submit(self, title: str, steps: int) -> str:
        page, text = self.request("GET", "/")
        [token] = re.findall(r'name="csrfmiddlewaretoken" value="(\w+)"', text)[:1]
        form = {"title": title, "rows": steps, "csrfmiddlewaretoken": token}
        headers = {
            "Content-Type": "application/x-www-form-urlencoded",
            "Cookie": page.headers["Set-Cookie"].partition(";")[0],
        }
        self.request("POST", "/reports/", body=urlencode(form), headers=headers)
        [newest] = self.repository.list(TaskFilter(type="reports.tasks.build", limit=1))
        return newest.id

    def status(self, task_id: str) -> str:
        return self.repository.get_by_id(task_id).status.value


@pytest.fixture(params=[(), ("--preload",)], ids=["each worker loads the app", "preload"])
def options(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """Return the options with which gunicorn is started."""
    chosen: tuple[str, ...] = request.param
    return chosen


@pytest.fixture(params=[FlaskSite, DjangoSite], ids=["flask", "django"])
def site(
    request: pytest.FixtureRequest, tmp_path: Path, options: tuple[str, ...]
) -> Iterator[Site]:
    """Return each example, served by two workers with and without ``--preload``.

    Two worker processes run tasks. The server is killed at the end.
    """
    pytest.importorskip("flask" if request.param is FlaskSite else "django")
    site = request.param(tmp_path, *options)
    try:
        with site.repository:
            eventually(lambda: site.log.exists() and len(site.nodes()) == 2)
            yield site
    finally:
        site.master.kill()
        site.master.wait(PATIENCE)


def completed(site: Site, ids: list[str]) -> bool:
    """Return True if all these tasks are completed."""
    return all(site.status(task_id) == "completed" for task_id in ids)


def test_two_workers_share_the_tasks_and_lose_none(site: Site) -> None:
    """Check it at a kill, a reload and a stop, each on the server of the step before."""
    the_tasks_run_once_in_either_worker(site)
    the_tasks_of_a_killed_worker_run_again(site)
    a_kill_and_a_reload_lose_no_task(site)
    a_stopped_server_hands_its_tasks_back(site)
    assert not re.search("Traceback", site.log.read_text())


def the_tasks_run_once_in_either_worker(site: Site) -> None:
    """Check that no task runs twice, and that the master runs none."""
    pids = {name.split(":")[1] for name in site.nodes()}
    assert len(pids) == 2
    assert str(site.master.pid) not in pids

    ids = [site.submit(f"report {n}", 1) for n in range(12)]

    eventually(lambda: completed(site, ids))
    tasks = site.repository.get_many(ids).values()
    assert {len(task.attempts) for task in tasks} == {1}


def the_tasks_of_a_killed_worker_run_again(site: Site) -> None:
    """Check that another worker runs them, and that gunicorn's new worker joins."""
    task_id = site.submit("long", round(4 / site.step))  # time to find and kill it
    name = kill_the_worker_of(site, task_id)
    eventually(lambda: completed(site, [task_id]))
    task = site.repository.get_by_id(task_id)
    assert (task.crashes, task.errors) == (1, 0)
    eventually(lambda: len(now := site.nodes()) == 2 and name not in now)


def kill_the_worker_of(site: Site, task_id: str) -> str:
    """Kill the process that runs a task. Return the name of its node."""

    def runs() -> str:
        task = site.repository.get_by_id(task_id)
        return task.owner if task.status == "running" and task.message else ""

    owner = eventually(runs)
    [name] = [node.name for node in site.repository.liveness.nodes() if node.id == owner]
    os.kill(int(name.split(":")[1]), signal.SIGKILL)
    return name


def a_kill_and_a_reload_lose_no_task(site: Site) -> None:
    """Check that all tasks complete, and that other worker processes serve then."""
    before = site.nodes()
    ids = [site.submit(f"report {n}", round(1 / site.step)) for n in range(23)]
    ids.append(site.submit("long", round(4 / site.step)))  # time to find and kill it
    kill_the_worker_of(site, ids[-1])
    site.master.send_signal(signal.SIGHUP)
    eventually(lambda: len(now := site.nodes()) == 2 and not {*now} & {*before})

    eventually(lambda: completed(site, ids))
    tasks = site.repository.get_many(ids)
    assert {task.errors for task in tasks.values()} == {0}
    assert tasks[ids[-1]].crashes == 1


def a_stopped_server_hands_its_tasks_back(site: Site) -> None:
    """Check that the next server can go on with them, and that this one ends with exit code 0."""
    task_id = site.submit("long", 1000)
    eventually(lambda: site.repository.get_by_id(task_id).message)
    assert site.stop() == 0
    task = site.repository.get_by_id(task_id)
    assert (task.status, task.crashes) == ("pending", 0)
    assert task.interruptions in {1, 2}  # the other worker may start it before it stops itself
    assert site.repository.liveness.nodes() == []
