"""The body of a request for two readers: a check of the program, and then the dashboard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

from werkzeug.exceptions import RequestEntityTooLarge

from taskx.queue.queue import Queue

_INPUT = "wsgi.input"


def largest_body(queue: Queue) -> int:
    """Return the most bytes of a request: in a form, a byte of params can take three."""
    return 4 * queue.config.max_payload_size + (1 << 20)


@contextmanager
def kept_body(environ: dict[str, Any], most: int) -> Iterator[None]:
    """Let somebody read the body of a request; what was read can be read again afterwards.

    A body that nobody reads stays unread.

    Args:
        environ: the WSGI environment; its ``wsgi.input`` is replaced.
        most: the most bytes that may be read; more of them raise RequestEntityTooLarge.
    """
    environ[_INPUT] = body = _Body(environ[_INPUT], most)
    try:
        yield
    finally:
        body.rewind()


class _Body:
    """A stream that keeps what it has read. It never reads more of its source than it is asked for."""

    def __init__(self, source: Any, most: int) -> None:
        self._source = source
        self._all = most + 1
        self._left = most
        self._kept = BytesIO()

    def rewind(self) -> None:
        """Begin again with the first byte."""
        self._kept.seek(0)

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0:
            size = self._all
        found = self._kept.read(size)
        return found + self._keep(self._source.read(size - len(found)))

    def readline(self, size: int | None = -1) -> bytes:
        if size is None or size < 0:
            size = self._all
        found = self._kept.readline(size)
        if found.endswith(b"\n"):
            return found
        return found + self._keep(self._source.readline(size - len(found)))

    def readlines(self, hint: int | None = -1) -> list[bytes]:
        return [*self]

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.readline, b"")

    def _keep(self, data: bytes) -> bytes:
        self._left -= len(data)
        if self._left < 0:
            raise RequestEntityTooLarge
        self._kept.write(data)
        return data
