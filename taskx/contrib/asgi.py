"""TaskX in FastAPI, Starlette and other ASGI programs: :func:`lifespan`. It needs no package."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import timedelta
from typing import Any

from taskx import ConfigurationError, Queue


def lifespan(
    queue: Queue, timeout: float | timedelta | str = 30.0
) -> Callable[[Any], AbstractAsyncContextManager[dict[str, Queue]]]:
    """Return the ``lifespan`` of an app: it starts the queue at the beginning, and stops it at the end.

    It does both on another thread, so that the event loop goes on. Endpoints find the queue in
    ``request.state.taskx``, too.

    Args:
        queue: the queue; nothing else may start it.
        timeout: seconds, or a timedelta, that running tasks have at the end, as in ``Queue.stop``.

    Raises:
        ConfigurationError: the first argument is not a queue.
    """
    if not isinstance(queue, Queue):
        raise ConfigurationError(f"lifespan() requires a Queue, not {type(queue).__name__}")

    @asynccontextmanager
    async def started(app: Any) -> AsyncIterator[dict[str, Queue]]:
        await asyncio.to_thread(queue.start)
        try:
            yield {"taskx": queue}
        finally:
            await asyncio.to_thread(queue.stop, timeout)

    return started
