"""What a task emits as server-sent events, for browsers: in Flask, Django, FastAPI and others."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from typing import NamedTuple, Protocol

from taskx import ConfigurationError, Queue, QueueFull, TaskNotFound


class Body(Protocol):
    """The bytes of a response, as they come: for a server with threads, and for one with coroutines."""

    def __iter__(self) -> Iterator[bytes]: ...
    def __aiter__(self) -> AsyncIterator[bytes]: ...


class Events(NamedTuple):
    """A response: ``Response(*events(…))`` in Flask, ``StreamingResponse(*events(…))`` in Starlette."""

    body: Body | list[bytes]
    status: int
    headers: dict[str, str]


def events(queue: Queue, task_id: str, last_event_id: str | None = None) -> Events:
    """Return what a task emits as a response of server-sent events.

    Check before that the user may see the task. The response ends with the task, and after 30 seconds at
    the latest, so that it takes a thread of the server for no longer. A browser then goes on where it was.
    A process sends at most 16 at a time; the status of any other is 503, and that of an unknown task 404.

    Args:
        queue: a queue, which need not be started.
        task_id: the id of the task.
        last_event_id: the header ``Last-Event-ID`` of the request.

    Raises:
        ConfigurationError: the first argument is not a queue.
        RepositoryError: the repository cannot be read.
    """
    if not isinstance(queue, Queue):
        raise ConfigurationError(f"events() requires a Queue, not {type(queue).__name__}")
    try:
        body = queue.handle(task_id).stream(last_event_id or None).events()
    except TaskNotFound as error:
        return _refused(404, error)
    except ConfigurationError as error:  # no id, or no position
        return _refused(400, error)
    except QueueFull as error:
        return _refused(503, error, {"Retry-After": "5"})
    return Events(body, 200, {**body.headers})


def _refused(status: int, error: Exception, headers: Mapping[str, str] = {}) -> Events:
    text = {"Content-Type": "text/plain; charset=utf-8", **headers}
    return Events([f"{error}\n".encode()], status, text)
