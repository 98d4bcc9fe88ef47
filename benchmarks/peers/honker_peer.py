"""honker on an SQLite file: its tasks, and its plain queue, whose jobs are claimed in batches."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from contextlib import suppress
from typing import Any

import honker

from benchmarks.harness import WORKERS
from benchmarks.peers.base import Apart, nap, noop, tell_time
from benchmarks.peers.services import Services
from benchmarks.peers.threads import Bare

_FOLDER = "TASKX_BENCH_FOLDER"
#: Number of jobs claimed at once, and seconds between two polls without a wake-up: honker's own defaults.
_AT_ONCE, _IDLE = 50, 5.0


def database_in(folder: str) -> Any:
    return honker.open(os.path.join(folder, "honker.db"))


def tasks_on(database: Any) -> dict[str, Any]:
    """Return the tasks. Their results are stored, which is the default."""
    queue = database.queue("default")
    tasks = {"noop": noop, "nap": nap, "clock": tell_time}
    return {name: queue.task(name=name)(run) for name, run in tasks.items()}


class Honker(Apart):
    """honker's tasks with results. Its worker process runs each on a thread."""

    poll_interval = 0.02  # each check of the file delays the workers

    def __init__(self, folder: str, workers: int = WORKERS) -> None:
        self._folder, self._workers = folder, workers
        self._services = Services(folder)
        self._database = database_in(folder)
        self._tasks = tasks_on(self._database)

    def submit(self, task: str = "noop") -> object:
        return self._tasks[task]()

    def work(self) -> None:
        args = ["-m", "honker", "worker", f"{__name__}:database"]
        self._services.python(
            [*args, "--concurrency", str(self._workers)], "", **{_FOLDER: self._folder}
        )
        self._services.wait_until_ready()

    def finished(self) -> int:
        [row] = self._database.query("SELECT count(*) AS n FROM _honker_results")
        return int(row["n"])

    def clock(self) -> tuple[float, float | None]:
        return self._tasks["clock"]().get(timeout=60), time.perf_counter()

    def close(self) -> None:
        self._database.close()
        self._services.close()


class HonkerInBatches(Bare):
    """honker's queue without records. Threads of the benchmark claim and acknowledge fifty jobs at once."""

    def __init__(self, folder: str, workers: int = WORKERS) -> None:
        super().__init__(folder, workers)
        self._database = database_in(folder)
        self._queue = self._database.queue("bench")
        # With sleeping tasks, one thread must not claim many while other threads have none.
        self._at_once = _AT_ONCE if workers == WORKERS else 1
        self._stopped = False

    def put(self, message: str) -> object:
        return self._queue.enqueue(message)

    def take(self) -> None:
        asyncio.run(self._take(f"thread-{threading.get_ident()}"))

    async def _take(self, worker: str) -> None:
        updates = self._database.update_events()
        while not self._stopped:
            jobs = self._queue.claim_batch(worker, self._at_once)
            if not jobs:
                with suppress(TimeoutError):
                    await asyncio.wait_for(updates.__anext__(), _IDLE)
                continue
            for job in jobs:
                self.run(job.payload)
            self._queue.ack_batch([job.id for job in jobs], worker)
            self._done.extend([1] * len(jobs))

    def close(self) -> None:
        self._stopped = True
        self._queue.enqueue("noop")  # wakes the threads
        self.join()
        self._database.close()


if _FOLDER in os.environ:  # in the worker process
    database = database_in(os.environ[_FOLDER])
    tasks_on(database)
