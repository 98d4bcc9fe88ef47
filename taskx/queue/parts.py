"""The parts of a queue that its methods use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from taskx.attempt.registry import Registry
from taskx.node.hooks import Hooks
from taskx.node.moving import Moves
from taskx.node.node import LocalNode
from taskx.node.pool import WorkerPool
from taskx.node.watcher import Watcher
from taskx.queue.joining import Joining
from taskx.queue.operations import Operations
from taskx.stores import queries
from taskx.stores.base import Repository
from taskx.stores.controls import Controls
from taskx.stores.door import Door
from taskx.tasks.bell import Agenda
from taskx.tasks.clock import Clock
from taskx.tasks.config import Config
from taskx.tasks.errors import RepositoryError
from taskx.tasks.log import GuardedLogger
from taskx.tasks.timing import Timing


class Parts:
    """The attributes of a queue, which ``Queue`` sets.

    Attributes:
        config: the settings of the queue.
        repository: stores the tasks.
        clock: tells the time.
    """

    config: Config
    repository: Repository
    clock: Clock
    _log: GuardedLogger
    _timing: Timing
    _registry: Registry
    _moves: Moves
    _controls: Controls
    _agenda: Agenda
    _watcher: Watcher
    _hooks: Hooks
    _operations: Operations
    _joining: Joining
    _node: LocalNode

    @property
    def _pool(self) -> WorkerPool | None:
        return self._node.pool

    @contextmanager
    def _changing(self, connection: object = None) -> Iterator[Operations]:
        """Return the operations for a connection, or this thread, which may be in a transaction."""
        with self._joining.changing(connection) as door:
            yield self._operations if door is self._moves else self._make_operations(door)

    def _make_operations(self, moves: Door) -> Operations:
        return Operations(moves, self._node, self._registry, self._log, self._timing)

    def _reading(self) -> AbstractContextManager[Repository]:
        """Return the repository for a read of this thread: it may be in a transaction of its own."""
        return self._joining.reading()

    def _uncommitted(self, task_id: str) -> bool:
        """Return True if a task cannot go on before this thread has committed its own transaction."""
        return self.repository.transactions.changed(task_id)

    def _refuse_wait(self) -> None:
        """Raise ``ConfigurationError`` if no task goes on as long as this thread waits."""
        self.repository.transactions.refuse_wait()

    def _check(self, task_id: str) -> None:
        """Resolve the handles of a task if it has ended."""
        self._watcher.check([task_id])

    def _nobody_runs(self, type: str) -> bool:
        """Return True if it is known that no running queue has an executor for the type."""
        if self.repository.shortcoming:  # the queues of other processes are not known
            return False
        try:
            return not queries.runs_somewhere(self.repository, type)
        except RepositoryError:
            return False
