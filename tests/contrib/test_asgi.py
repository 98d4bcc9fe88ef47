"""The lifespan of ASGI programs."""

from __future__ import annotations

import asyncio
import threading

import pytest
from fastapi import FastAPI
from helpers import eventually
from httpx import ASGITransport, AsyncClient

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


def test_coroutines_of_fastapi_await_coroutines_of_the_queue():
    """Each has a loop of its own. What still runs at the end of the app is put back."""
    queue = Queue(MemoryRepository())
    app = FastAPI(lifespan=lifespan(queue, timeout=0))
    begun = threading.Event()

    @queue.executor()
    async def double(n: int) -> int:
        await asyncio.sleep(0)
        assert threading.current_thread() is not threading.main_thread()
        return 2 * n

    @queue.executor()
    async def hang() -> None:
        begun.set()
        await asyncio.sleep(3600)

    @app.get("/double/{n}")
    async def show(n: int) -> int:
        handle = await asyncio.to_thread(double.submit, n)
        return await handle  # type: ignore[no-any-return]

    async def live() -> str:
        client = AsyncClient(transport=ASGITransport(app), base_url="http://test")
        async with app.router.lifespan_context(app), client:
            answers = await asyncio.gather(*(client.get(f"/double/{n}") for n in range(5)))
            assert [answer.json() for answer in answers] == [0, 2, 4, 6, 8]
            left = hang.submit()
            assert await asyncio.to_thread(begun.wait, 60)
        return left.id

    task_id = asyncio.run(live())
    eventually(lambda: queue.get_task_status(task_id).status is TaskStatus.PENDING)


def test_a_lifespan_requires_a_queue():
    with pytest.raises(ConfigurationError, match="requires a Queue, not str"):
        lifespan("tasks.db")  # type: ignore[arg-type]
