"""The parts of a queue that its methods use."""

from __future__ import annotations

from taskx.common.config import Config
from taskx.core.clock import Clock
from taskx.core.errors import RepositoryError
from taskx.core.log import GuardedLogger
from taskx.executing.registry import Registry
from taskx.moving import Services
from taskx.running.pool import WorkerPool
from taskx.storage import queries
from taskx.storage.base import Repository
from taskx.submitting.joining import Joining
from taskx.submitting.operations import Operations
from taskx.submitting.requeuing import Requeues
from taskx.upkeep.node import Lifetime, LocalNode


class Parts:
    """The attributes of a queue, which ``Queue`` sets.

    Attributes:
        config: the settings of the queue.
        repository: stores the tasks.
    """

    config: Config
    repository: Repository
    _clock: Clock
    _log: GuardedLogger
    _registry: Registry
    _services: Services
    _operations: Operations
    _requeues: Requeues
    _joining: Joining
    _life: Lifetime

    @property
    def _node(self) -> LocalNode | None:
        return self._life.node

    @property
    def _engine(self) -> WorkerPool | None:
        return None if self._node is None else self._node.engine

    def _nobody_runs(self, type: str) -> bool:
        """Return True if it is known that no running queue has an executor for the type."""
        if self.repository.shortcoming:  # the queues of other processes are not known
            return False
        try:
            return not queries.runs_somewhere(self.repository, type)
        except RepositoryError:
            return False
