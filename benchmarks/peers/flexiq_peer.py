"""flexiq on an SQLite file: one worker process with threads."""

from __future__ import annotations

import os
import time
from typing import Any

from flexiq import Queue

from benchmarks.harness import WORKERS
from benchmarks.peers.base import Apart, nap, noop, tell_time
from benchmarks.peers.services import Services

_FOLDER, _WORKERS = "TASKX_BENCH_FOLDER", "TASKX_BENCH_WORKERS"


def queue_in(folder: str, workers: int) -> tuple[Queue, dict[str, Any]]:
    """Return a queue and its tasks. By default it would take one task per poll, every 50 ms."""
    queue = Queue(
        os.path.join(folder, "flexiq.db"),
        workers=workers,
        scheduler_batch_size=64,
        scheduler_poll_interval_ms=5,
    )
    tasks = {"noop": noop, "nap": nap, "clock": tell_time}
    return queue, {name: queue.task(name=name)(run) for name, run in tasks.items()}


class Flexiq(Apart):
    """flexiq with results in the file. A waiting caller polls for its result every 50 ms or more."""

    poll_interval = 0.005

    def __init__(self, folder: str, workers: int = WORKERS) -> None:
        self._env = {_FOLDER: folder, _WORKERS: str(workers), "FLEXIQ_LOG_LEVEL": "WARNING"}
        self._services = Services(folder)
        self._queue, self._tasks = queue_in(folder, workers)

    def submit(self, task: str = "noop") -> object:
        return self._tasks[task].delay()

    def work(self) -> None:
        self._services.python(
            ["-m", "flexiq.cli", "worker", "--app", f"{__name__}:queue"], "[tasks]", **self._env
        )
        self._services.wait_until_ready()

    def finished(self) -> int:
        return int(self._queue.stats()["completed"])

    def clock(self) -> tuple[float, float | None]:
        return self._tasks["clock"].delay().result(), time.perf_counter()

    def close(self) -> None:
        self._services.close()


if _WORKERS in os.environ:  # in the worker process
    queue, _ = queue_in(os.environ[_FOLDER], int(os.environ[_WORKERS]))
