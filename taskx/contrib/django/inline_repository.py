"""The repository of the backend for tests: tasks in memory, and data in the test's database."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from taskx.contrib.django.blocks import BesideBlocks, wait_for_commit
from taskx.contrib.django.connections import Connections
from taskx.contrib.django.joining import executor_block, own_connection
from taskx.stores.base import Repository
from taskx.stores.memory import MemoryRepository, Row
from taskx.stores.transactions import Then, Transactions
from taskx.tasks.clock import Clock

_TIMEOUT = 10.0


class InlineRepository(MemoryRepository):
    """Tasks in memory, whose executors may write on the calling thread's connection to a database.

    ``ctx.transaction()`` is an ``atomic()`` block there: in a ``TestCase`` a savepoint of the test's own
    transaction. If its commit fails, the records are again what they were.

    Args:
        using: the alias of the database in ``DATABASES``.
        clock: the clock of the queue.
    """

    def __init__(self, using: str, clock: Clock) -> None:
        super().__init__(clock)
        self._last = threading.local()  # the rows that this thread's block has changed
        self.transactions = _InlineTransactions(self, using)

    @contextmanager
    def completing(self) -> Iterator[Repository]:
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
    def put_back_after_error(self) -> Iterator[None]:
        """Undo what :meth:`completing` has noted if the block raises."""
        self._last.changes = []
        try:
            yield
        except BaseException:
            self._put_back(self._last.changes)
            raise

    def _put_back(self, changes: list[tuple[str, Row, Row | None]]) -> None:
        with self._lock:
            for task_id, after, before in changes:
                self._switch(task_id, after, before)


class _InlineTransactions(BesideBlocks):
    def __init__(self, outer: InlineRepository, using: str) -> None:
        super().__init__(outer, Transactions("InlineRepository", outer.timing), "wait", using)
        self._outer = outer
        self._links = Connections(using, _TIMEOUT)

    def current(self, *, submits: bool = False) -> None:
        """Return None: the backend itself waits for the commits of blocks."""

    def join(self, connection: object, then: Then | None) -> AbstractContextManager[Repository]:
        own = own_connection(self._links.alias, connection)
        if then is None:
            return self._outer.completing()
        return wait_for_commit(self._outer, own, then, self.using)

    @contextmanager
    def begin(self) -> Iterator[Any]:
        with (
            self._outer.put_back_after_error(),
            executor_block(self._links, lambda _, enter: enter()) as own,
        ):
            yield own
