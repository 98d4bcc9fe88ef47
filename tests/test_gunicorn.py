"""The Flask example under a real gunicorn: two worker processes, each a node on the same file."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from taskx import SQLiteRepository

EXAMPLES = Path(__file__).parent.parent / "examples"
PATIENCE = 30.0


def eventually(look: Callable[[], Any]) -> Any:
    """What ``look()`` gives once that is true; it fails when that takes too long."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(0.02)  # blocks on purpose
    raise AssertionError("it did not come about")


class Site:
    """A served example."""

    def __init__(self, folder: Path, *options: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.address = f"127.0.0.1:{server.getsockname()[1]}"
        self.log = folder / "gunicorn.log"
        self.repository = SQLiteRepository(folder / "tasks.db")
        self.master = subprocess.Popen(
            [
                *(sys.executable, "-m", "gunicorn", "--bind", self.address, "--workers", "2"),
                *("--pythonpath", str(EXAMPLES), "--config", str(EXAMPLES / "flask_app.py")),
                *("--log-file", str(self.log), *options, "flask_app:create_app()"),
            ],
            cwd=folder,
        )

    def ask(self, path: str, **params: Any) -> Any:
        """The JSON answer to a GET, or to a POST of params."""
        request = urllib.request.Request(f"http://{self.address}{path}")
        if params:
            request.data = json.dumps(params).encode()
            request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return json.load(answer)

    def nodes(self) -> list[str]:
        """The names of the nodes that live: host, process and start."""
        return [node.name for node in self.repository.nodes() if node.alive]

    def stop(self) -> int:
        """End the server as its operator would; returns its exit code."""
        self.master.terminate()
        return self.master.wait(PATIENCE)


@pytest.fixture(params=["each worker loads the app", "preload"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    """The Flask example with two workers, with and without ``--preload``."""
    served = Site(tmp_path, *(["--preload"] if request.param == "preload" else []))
    try:
        with served.repository:
            eventually(lambda: served.log.exists() and len(served.nodes()) == 2)
            yield served
    finally:
        served.master.kill()
        served.master.wait(PATIENCE)


def completed(site: Site, ids: list[str]) -> bool:
    """Whether all of these are done."""
    return all(site.ask(f"/tasks/{task_id}")["status"] == "completed" for task_id in ids)


def test_two_workers_share_the_tasks(site: Site) -> None:
    """Every task runs once, whichever worker took the request; the server ends as it should."""
    pids = {name.split(":")[1] for name in site.nodes()}
    assert len(pids) == 2
    assert str(site.master.pid) not in pids

    ids = [site.ask("/tasks", title=f"report {n}", pages=1)["id"] for n in range(12)]

    eventually(lambda: completed(site, ids))
    tasks = site.repository.get_many(ids).values()
    assert {task.starts for task in tasks} == {1}
    assert site.stop() == 0
    assert site.nodes() == []


def test_killed_worker_loses_nothing(site: Site) -> None:
    """What a worker process ran when it was killed runs again, and gunicorn's new worker joins."""
    task_id = site.ask("/tasks", title="long", pages=8)["id"]

    def runs() -> str:
        task = site.repository.get_by_id(task_id)
        return task.owner if task.status == "running" else ""

    owner = eventually(runs)
    [name] = [node.name for node in site.repository.nodes() if node.id == owner]
    os.kill(int(name.split(":")[1]), signal.SIGKILL)

    eventually(lambda: completed(site, [task_id]))
    task = site.repository.get_by_id(task_id)
    assert (task.crashes, task.errors) == (1, 0)
    eventually(lambda: len(site.nodes()) == 2 and name not in site.nodes())
    assert not re.search("Traceback", site.log.read_text())
