"""Dramatiq: one worker process with four threads. By default it stores no results."""

from __future__ import annotations

import os
from typing import Any

import dramatiq
from dramatiq.brokers.redis import RedisBroker

from benchmarks.children import ChildFailed
from benchmarks.harness import WORKERS
from benchmarks.peers.base import Apart, nap, noop, tell_time
from benchmarks.peers.services import Redis

_SOCKET = "TASKX_BENCH_SOCKET"
_BEGAN = "bench:began"
_WAIT = 60


def actors(socket: str) -> tuple[RedisBroker, dict[str, Any]]:
    """Return a broker and its actors."""
    broker = RedisBroker(url=f"unix://{socket}")

    def clock() -> None:
        broker.client.rpush(_BEGAN, tell_time())

    made = {
        run.__name__: dramatiq.actor(actor_name=run.__name__, broker=broker)(run)
        for run in (noop, nap, clock)
    }
    return broker, made


def set_up() -> None:
    """Set the broker, in the worker process."""
    broker, _ = actors(os.environ[_SOCKET])
    dramatiq.set_broker(broker)


class Dramatiq(Apart):
    """Dramatiq on Redis. A message stays in Redis until it is acknowledged."""

    def __init__(self, folder: str, workers: int = WORKERS) -> None:
        self._workers = workers
        self._redis = Redis(folder)
        self._broker, self._actors = actors(self._redis.socket)
        self._submitted = 0

    def submit(self, task: str = "noop") -> object:
        self._submitted += 1
        return self._actors[task].send()

    def work(self) -> None:
        args = ["-m", "dramatiq", "--processes", "1", "--threads", str(self._workers)]
        self._redis.python(
            [*args, f"{__name__}:{set_up.__name__}"],
            "Worker process is ready",
            **{_SOCKET: self._redis.socket},
        )
        self._redis.wait_until_ready()

    def finished(self) -> int:
        return self._submitted - int(self._broker.client.hlen("dramatiq:default.msgs"))

    def clock(self) -> tuple[float, float | None]:
        self._actors["clock"].send()
        told: Any = self._broker.client.blpop(_BEGAN, timeout=_WAIT)
        if told is None:
            raise ChildFailed(f"a task did not begin within {_WAIT} s")
        return float(told[1]), None

    def close(self) -> None:
        self._broker.close()
        self._redis.close()
