"""A backend for tests of sites: it runs tasks at once, or when the transaction of the test commits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from copy import copy
from datetime import datetime, timezone
from functools import partial
from typing import Any

import attrs
from django.db import connections, transaction

from taskx.contrib.django.backend import TaskxBackend
from taskx.contrib.django.blocks import open_blocks
from taskx.contrib.django.compat import task_enqueued
from taskx.contrib.django.places import forget
from taskx.contrib.django.results import TaskxResult
from taskx.testing import InlineQueue


@attrs.frozen(eq=False)
class _Waiting:
    result: TaskxResult
    using: str
    callback: Callable[[], object]

    @property
    def alive(self) -> bool:
        """True if the block, with all its savepoints, was not rolled back."""
        return any(entry[1] is self.callback for entry in connections[self.using].run_on_commit)


class _Uncommitted(threading.local):
    """The tasks that run at the commit of an ``atomic()`` block of this thread."""

    def __init__(self) -> None:
        self._waiting: dict[str, _Waiting] = {}

    def add(self, result: TaskxResult, using: str, run: Callable[[], object]) -> None:
        """Run a task when the open block on a database commits."""
        self._waiting = {id: one for id, one in self._waiting.items() if one.alive}

        def callback() -> None:
            self._waiting.pop(result.id, None)
            run()

        self._waiting[result.id] = _Waiting(result, using, callback)
        transaction.on_commit(callback, using=using)

    def get(self, result_id: str) -> TaskxResult | None:
        """Return the result of a task that waits; None if none does, or if it was rolled back."""
        found = self._waiting.get(result_id)
        return None if found is None or not found.alive else copy(found.result)


_uncommitted = _Uncommitted()


class InlineBackend(TaskxBackend):
    """The backend for tests: ``"BACKEND": "taskx.contrib.django.InlineBackend"``.

    ``enqueue`` runs the task on the calling thread, with its retries, and returns its result. Inside
    ``atomic()`` of any database the task runs at the commit; in a ``TestCase`` that is the end of
    ``with self.captureOnCommitCallbacks(execute=True):``. Tasks are in memory. A task with ``run_after``
    stays READY.
    """

    inline = True

    def _enqueue(self, result: TaskxResult, now: int) -> TaskxResult:
        blocks: list[Any] = open_blocks()
        if blocks:
            _uncommitted.add(copy(result), blocks[-1].alias, partial(self._submit, result, now))
        task_enqueued.send(sender=type(self), task_result=result)
        return result if blocks else self.get_result(self._submit(result, now))

    def _submit(self, result: TaskxResult, now: int) -> str:
        queue = self.queue
        assert isinstance(queue, InlineQueue)
        queue.clock.set_wall(datetime.now(timezone.utc))  # retries have moved it
        return super()._submit(result, now)

    def _read(self, result_id: str) -> TaskxResult:
        return _uncommitted.get(result_id) or super()._read(result_id)

    def clear(self) -> None:
        """Forget all tasks."""
        forget(self.alias)
