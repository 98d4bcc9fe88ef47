"""The lifespan of ASGI programs."""

from __future__ import annotations

import asyncio
import threading

import pytest

from taskx import ConfigurationError, MemoryRepository, Queue, QueueStopped, TaskStatus
from taskx.contrib.asgi import lifespan


def test_a_lifespan_starts_the_queue_and_stops_it():
    queue = Queue(MemoryRepository())
    queue.executor("one")(lambda: 1)

    async def live() -> None:
        async with lifespan(queue)(None) as state:
            assert state == {"taskx": queue}
            handle = queue.submit("one")
            assert await asyncio.to_thread(handle.result, 60) == 1

    asyncio.run(live())
    with pytest.raises(QueueStopped):
        queue.submit("one")


def test_the_event_loop_goes_on_while_the_queue_stops():
    """The running task ends only because the loop does something in the meantime."""
    queue = Queue(MemoryRepository())
    running, go = threading.Event(), threading.Event()

    @queue.executor("wait")
    def wait() -> bool:
        running.set()
        return go.wait(60)

    async def live() -> None:
        async with lifespan(queue, timeout=120)(None):
            handle = queue.submit("wait")
            assert await asyncio.to_thread(running.wait, 60)
            asyncio.get_running_loop().call_later(0.05, go.set)
        assert handle.task().status is TaskStatus.COMPLETED

    asyncio.run(live())


def test_a_lifespan_requires_a_queue():
    with pytest.raises(ConfigurationError, match="requires a Queue, not str"):
        lifespan("tasks.db")  # type: ignore[arg-type]
