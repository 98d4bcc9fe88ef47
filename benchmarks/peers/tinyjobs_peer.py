"""tinyjobs on an SQLite file: one worker process with threads."""

from __future__ import annotations

import os
import time
from typing import Any

from tinyjobs import TinyJobs

from benchmarks.harness import WORKERS
from benchmarks.peers.base import Apart, nap, noop, tell_time
from benchmarks.peers.services import Services

_FOLDER = "TASKX_BENCH_FOLDER"


def app_in(folder: str) -> tuple[TinyJobs, dict[str, Any]]:
    """Return an app and its tasks, whose results are stored."""
    app = TinyJobs(f"sqlite:///{os.path.join(folder, 'tinyjobs.db')}")
    tasks = {"noop": noop, "nap": nap, "clock": tell_time}
    return app, {name: app.task(name=name, store_result=True)(run) for name, run in tasks.items()}


class Tinyjobs(Apart):
    """tinyjobs with a worker that polls every 5 ms, also when it is idle."""

    poll_interval = 0.02  # each check of the file delays the workers

    def __init__(self, folder: str, workers: int = WORKERS) -> None:
        self._folder, self._workers = folder, workers
        self._services = Services(folder)
        self._app, self._tasks = app_in(folder)

    def submit(self, task: str = "noop") -> object:
        return self._tasks[task].enqueue()

    def work(self) -> None:
        args = ["-m", "tinyjobs", "worker", "--app", f"{__name__}:app", "--log-level", "WARNING"]
        polls = ["--poll-min", "0.005", "--poll-max", "0.005"]
        self._services.python(
            [*args, "--concurrency", str(self._workers), *polls], "", **{_FOLDER: self._folder}
        )
        self._services.wait_until_ready()

    def finished(self) -> int:
        return sum(queue.counts.get("success", 0) for queue in self._app.stats().queues)

    def clock(self) -> tuple[float, float | None]:
        job = self._tasks["clock"].enqueue().wait(timeout=60)
        return job.result(), time.perf_counter()

    def close(self) -> None:
        self._app.close()
        self._services.close()


if _FOLDER in os.environ:  # in the worker process
    app, _ = app_in(os.environ[_FOLDER])
