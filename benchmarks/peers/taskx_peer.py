"""TaskX measured like the peers with a worker process: one process submits, and another one works."""

from __future__ import annotations

import os
import signal
import sys
import time

from benchmarks.harness import WORKERS
from benchmarks.peers.base import Apart, nap, noop, tell_time
from benchmarks.peers.services import Services
from taskx import Config, Queue, SQLiteRepository, TaskFilter, TaskStatus

_TASKS = {"noop": noop, "nap": nap, "clock": tell_time}
_READY = "the worker is ready"


def queue_in(folder: str, workers: int) -> Queue:
    """Return a queue with the tasks; it is not started."""
    repository = SQLiteRepository(os.path.join(folder, "tasks.db"), "process")
    queue = Queue(repository, Config(worker_num=workers))
    for name, run in _TASKS.items():
        queue.executor(name)(run)
    return queue


class TaskxApart(Apart):
    """TaskX with a queue that only submits: another process runs the tasks."""

    poll_interval = 0.02  # each check of the file delays the workers

    def __init__(self, folder: str, workers: int = WORKERS) -> None:
        self._arguments = [folder, str(workers)]
        self._services = Services(folder)
        self._queue = queue_in(folder, workers)

    def submit(self, task: str = "noop") -> object:
        return self._queue.submit(task)

    def work(self) -> None:
        self._services.python(["-m", __name__, *self._arguments], _READY)
        self._services.wait_until_ready()

    def finished(self) -> int:
        return self._queue.repository.count(TaskFilter(status=TaskStatus.COMPLETED))

    def clock(self) -> tuple[float, float | None]:
        return self._queue.submit("clock").result(timeout=60), time.perf_counter()

    def close(self) -> None:
        self._queue.close()
        self._services.close()


def main(folder: str, workers: int) -> None:
    """Run tasks until the benchmark kills this process."""
    with queue_in(folder, workers):
        print(_READY, flush=True)
        signal.pause()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
