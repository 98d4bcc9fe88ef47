"""The repository of the backend for tests: tasks in memory, and data in the test's database."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from taskx.contrib.django.blocks import BesideBlocks, wait_for_commit
from taskx.contrib.django.connections import Connections
from taskx.contrib.django.joining import executor_block, own_connection
from taskx.core.clock import Clock
from taskx.storage.base import Repository, Then
from taskx.storage.memory import MemoryRepository, Row

_TIMEOUT = 10.0


class InlineRepository(BesideBlocks, MemoryRepository):
    """Tasks in memory, whose executors may write on the calling thread's connection to a database.

    ``ctx.transaction()`` is an ``atomic()`` block there: in a ``TestCase`` a savepoint of the test's own
    transaction. If its commit fails, the records are again what they were.

    Args:
        using: the alias of the database in ``DATABASES``.
        clock: the clock of the queue.
    """

    def __init__(self, using: str, clock: Clock) -> None:
        super().__init__(clock)
        self.using = using
        self._connections = Connections(using, _TIMEOUT)
        self._last = threading.local()  # the rows that this thread's block has changed

    def own_transaction(self, *, submits: bool = False) -> None:
        """Return None: the backend itself waits for the commits of blocks."""

    def joined(self, connection: object, then: Then | None) -> AbstractContextManager[Repository]:
        own = own_connection(self._connections.alias, connection)
        return self._completing() if then is None else wait_for_commit(self, own, then)

    @contextmanager
    def _completing(self) -> Iterator[Repository]:
        """Note what the end of an executor's block changes."""
        before = dict(self._rows)
        yield self
        after = dict(self._rows)
        self._last.changes = [
            (task_id, after[task_id], before.get(task_id))
            for task_id in after
            if after[task_id] is not before.get(task_id)
        ]

    @contextmanager
    def transaction(self) -> Iterator[Any]:
        self._last.changes = []
        try:
            with executor_block(self._connections, lambda _, enter: enter()) as own:
                yield own
        except BaseException:
            self._put_back(self._last.changes)
            raise

    def _put_back(self, changes: list[tuple[str, Row, Row | None]]) -> None:
        with self._lock:
            for task_id, after, before in changes:
                self._switch(task_id, after, before)
