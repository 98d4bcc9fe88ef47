"""Celery: one worker process with a pool of four threads. Results and messages are in the same store."""

from __future__ import annotations

import sys
import time

from celery import Celery as App
from celery.signals import worker_ready
from redis import Redis as Client

from benchmarks.harness import WORKERS
from benchmarks.peers.base import Apart, nap, noop, tell_time
from benchmarks.peers.services import Redis, Services

_WAIT = 60
_READY = "the worker is ready"


def app_on(broker: str, backend: str) -> App:
    """Return an app with the tasks."""
    app = App("bench", broker=broker, backend=backend)
    for name, run in {"noop": noop, "nap": nap, "clock": tell_time}.items():
        app.task(run, name=name)
    return app


class OnCelery(Apart):
    """Celery with its default: a message leaves the broker before its task starts."""

    def __init__(self, services: Services, broker: str, backend: str, workers: int) -> None:
        self._services = services
        self._arguments = [broker, backend, str(workers)]
        self._app = app_on(broker, backend)
        self._tasks = self._app.tasks

    def submit(self, task: str = "noop") -> object:
        return self._tasks[task].delay()

    def work(self) -> None:
        self._services.python(["-m", OnCelery.__module__, *self._arguments], _READY)
        self._services.wait_until_ready()

    def clock(self) -> tuple[float, float | None]:
        return self._tasks["clock"].delay().get(timeout=_WAIT), time.perf_counter()

    def close(self) -> None:
        self._app.close()
        self._services.close()


class Celery(OnCelery):
    """Celery on Redis. Database 1 contains only its results."""

    def __init__(self, folder: str, workers: int = WORKERS) -> None:
        redis = Redis(folder)
        self._results = Client(unix_socket_path=redis.socket, db=1)
        url = f"redis+socket://{redis.socket}"
        super().__init__(redis, url, f"{url}?virtual_host=1", workers)

    def finished(self) -> int:
        return int(self._results.dbsize())

    def close(self) -> None:
        self._results.close()
        super().close()


def _tell_ready(**_: object) -> None:
    print(_READY, flush=True)


if __name__ == "__main__":
    worker_ready.connect(_tell_ready)
    app_on(sys.argv[1], sys.argv[2]).worker_main(
        ["worker", "--pool", "threads", "--concurrency", sys.argv[3]]
    )
