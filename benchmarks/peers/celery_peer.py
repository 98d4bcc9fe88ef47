"""Celery: one worker process with a pool of four threads; results in Redis, too."""

from __future__ import annotations

import sys
import time

from celery import Celery as App
from celery.signals import worker_ready
from redis import Redis as Client

from benchmarks.harness import WORKERS
from benchmarks.peers.base import Apart
from benchmarks.peers.base import noop as do_nothing
from benchmarks.peers.services import Redis

_WAIT = 60
_READY = "the worker is ready"


def tell_time() -> float:
    return time.perf_counter()


def app_on(socket: str) -> App:
    """An app with the two tasks; its results are all there is in database 1."""
    url = f"redis+socket://{socket}"
    app = App("bench", broker=url, backend=f"{url}?virtual_host=1")
    app.task(do_nothing, name="noop")
    app.task(tell_time, name="clock")
    return app


class Celery(Apart):
    """A message leaves the broker before its task starts, as is the default."""

    def __init__(self, folder: str) -> None:
        self._redis = Redis(folder)
        self._results = Client(unix_socket_path=self._redis.socket, db=1)
        self._app = app_on(self._redis.socket)
        self._noop, self._clock = self._app.tasks["noop"], self._app.tasks["clock"]

    def submit(self) -> object:
        return self._noop.delay()

    def work(self) -> None:
        self._redis.python(["-m", __name__, self._redis.socket], _READY)
        self._redis.wait_until_ready()

    def finished(self) -> int:
        return int(self._results.dbsize())

    def clock(self) -> tuple[float, float | None]:
        return self._clock.delay().get(timeout=_WAIT), time.perf_counter()

    def close(self) -> None:
        self._app.close()
        self._results.close()
        self._redis.close()


def _tell_ready(**_: object) -> None:
    print(_READY, flush=True)


if __name__ == "__main__":
    worker_ready.connect(_tell_ready)
    app_on(sys.argv[1]).worker_main(["worker", "--pool", "threads", "--concurrency", str(WORKERS)])
