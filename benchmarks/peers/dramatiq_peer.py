"""Dramatiq: one worker process with four threads; by default it keeps no results."""

from __future__ import annotations

import os
import time
from typing import Any

import dramatiq
from dramatiq.brokers.redis import RedisBroker

from benchmarks.children import ChildFailed
from benchmarks.harness import WORKERS
from benchmarks.peers.base import Apart
from benchmarks.peers.base import noop as do_nothing
from benchmarks.peers.services import Redis

_SOCKET = "TASKX_BENCH_SOCKET"
_BEGAN = "bench:began"
_WAIT = 60


def actors(socket: str) -> tuple[RedisBroker, Any, Any]:
    """A broker, and the two actors on it."""
    broker = RedisBroker(url=f"unix://{socket}")

    def tell_time() -> None:
        began = time.perf_counter()
        broker.client.rpush(_BEGAN, began)

    noop = dramatiq.actor(actor_name="noop", broker=broker)(do_nothing)
    clock = dramatiq.actor(actor_name="clock", broker=broker)(tell_time)
    return broker, noop, clock


def set_up() -> None:
    """What the worker process calls."""
    broker, _, _ = actors(os.environ[_SOCKET])
    dramatiq.set_broker(broker)


class Dramatiq(Apart):
    """A message stays in Redis until it was acknowledged."""

    def __init__(self, folder: str) -> None:
        self._redis = Redis(folder)
        self._broker, self._noop, self._clock = actors(self._redis.socket)
        self._submitted = 0

    def submit(self) -> object:
        self._submitted += 1
        return self._noop.send()

    def work(self) -> None:
        args = ["-m", "dramatiq", "--processes", "1", "--threads", str(WORKERS)]
        self._redis.python(
            [*args, f"{__name__}:{set_up.__name__}"],
            "Worker process is ready",
            **{_SOCKET: self._redis.socket},
        )
        self._redis.wait_until_ready()

    def finished(self) -> int:
        return self._submitted - int(self._broker.client.hlen("dramatiq:default.msgs"))

    def clock(self) -> tuple[float, float | None]:
        self._clock.send()
        told: Any = self._broker.client.blpop(_BEGAN, timeout=_WAIT)
        if told is None:
            raise ChildFailed(f"a task did not begin within {_WAIT} s")
        return float(told[1]), None

    def close(self) -> None:
        self._broker.close()
        self._redis.close()
