"""The surroundings of a task in Django: fresh connections, and the language and time zone of the site."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from django.conf import settings
from django.db import close_old_connections, connections
from django.utils import timezone, translation

from taskx import Context, Middleware, Task

# The names of TaskX's threads begin with it. Other threads may be in the middle of a request or a test.
_OURS = "taskx-"


@contextmanager
def surroundings() -> Iterator[None]:
    """Use the language and the time zone of the settings in a block, whatever was active before.

    On a thread of TaskX, connections that are broken or too old are closed before and after the block.
    """
    ours = threading.current_thread().name.startswith(_OURS)
    if ours:
        close_old_connections()
    try:
        with translation.override(settings.LANGUAGE_CODE), timezone.override(None):
            yield
    finally:
        if ours:
            close_old_connections()


class Surroundings(Middleware):
    """Runs each task in :func:`surroundings`, and closes the connections of a worker that ends."""

    def __call__(self, ctx: Context, task: Task, call_next: Callable[[], Any]) -> Any:
        """Run the task."""
        with surroundings():
            return call_next()

    def worker_ended(self) -> None:
        """Close the connections of the calling thread."""
        connections.close_all()
