"""RQ: it has no threads, so it gets four worker processes, of the kind that does not fork per task."""

from __future__ import annotations

import time

from redis import Redis as Client
from rq import Queue

from benchmarks.children import ChildFailed
from benchmarks.harness import WORKERS
from benchmarks.peers.base import Apart, nap, noop, tell_time
from benchmarks.peers.services import Redis

_TASKS = {"noop": noop, "nap": nap}
_WAIT = 60


class Rq(Apart):
    """RQ with tasks and results in Redis."""

    def __init__(self, folder: str, workers: int = WORKERS) -> None:
        self._workers = workers
        self._redis = Redis(folder)
        self._client = Client(unix_socket_path=self._redis.socket)
        self._queue = Queue(connection=self._client)
        self._finished = self._queue.finished_job_registry.key

    def submit(self, task: str = "noop") -> object:
        return self._queue.enqueue(_TASKS[task])

    def work(self) -> None:
        args = ["-m", "rq.cli", "worker", "--worker-class", "rq.SimpleWorker"]
        for _ in range(self._workers):
            self._redis.python([*args, "--url", f"unix://{self._redis.socket}"], "Listening on")
        self._redis.wait_until_ready()

    def finished(self) -> int:
        return int(self._client.zcard(self._finished))

    def clock(self) -> tuple[float, float | None]:
        result = self._queue.enqueue(tell_time).latest_result(timeout=_WAIT)
        seen = time.perf_counter()
        if result is None:
            raise ChildFailed(f"no result within {_WAIT} s")
        return float(result.return_value), seen

    def close(self) -> None:
        self._client.close()
        self._redis.close()
