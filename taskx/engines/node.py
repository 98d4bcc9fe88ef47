"""The node of a queue with a broker: it sends tickets and, in a worker process, runs tasks for them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

import attrs

from taskx.common.config import Config
from taskx.core.errors import RepositoryError, SchemaMismatch
from taskx.core.log import Complaint
from taskx.engines.claims import Claims
from taskx.engines.dispatch import Dispatcher, Sender
from taskx.engines.pool import TicketPool
from taskx.engines.tickets import Ticket
from taskx.liveness.base import About
from taskx.moving import Services
from taskx.upkeep.node import LocalNode


class _Engine(Sender, Protocol):
    """The parts of an engine that its node uses."""

    workers: int


class TicketNode(LocalNode):
    """A node that has no worker threads. The threads of the broker's worker process call :meth:`run`."""

    pool_class = TicketPool
    pool: TicketPool

    def __init__(
        self, services: Services, config: Config, ended: Callable[[], object], engine: _Engine
    ) -> None:
        self._name, self._workers = engine.name, engine.workers
        self.tends = engine.workers > 0
        #: Called when the node may run tasks.
        self.begun: Callable[[], object] = lambda: None
        super().__init__(services, attrs.evolve(config, worker_num=max(1, engine.workers)), ended)
        self._claims = Claims(self.pool)
        self._complaint = Complaint(services.log)
        self._dispatcher = Dispatcher(self.pool, engine)

    def about(self, config: Config) -> About:
        """Return the facts about this node."""
        about = super().about(config)
        return attrs.evolve(about, engine=self._name, worker_num=self._workers, buffer_size=0)

    def begin(self) -> None:
        """Start the threads."""
        super().begin()
        self._dispatcher.start()

    def go(self) -> None:
        """Take tickets from now on."""
        super().go()
        self.begun()

    def run(self, ticket: Ticket) -> bool:
        """Run the best task of the ticket's type to its outcome, in this thread.

        Return False if this node could not look for one, and others should get the ticket.

        Raises:
            KeyboardInterrupt: the executor was interrupted, or another exception that is for the program.
        """
        pool = self.pool
        worker = pool.worker_name(threading.current_thread().name)
        if pool.stopping:
            return False
        try:
            run = self._claims.claim(ticket, worker)
        except SchemaMismatch as error:
            pool.retire(error)
            return False
        except RepositoryError as error:
            self._complaint.make(
                "the repository fails, tickets are sent back to the broker: %s", error
            )
            return False
        self._complaint.over()
        if run is None:
            return not pool.stopping
        ending = pool.execute(run, worker, conclude=pool.conclude)
        if ending.interrupt is not None:
            raise ending.interrupt
        return True

    def withdraw(self) -> None:
        """Undo :meth:`join` and :meth:`begin`; no task was run."""
        self._dispatcher.stop()
        super().withdraw()

    def _begin_stop(self) -> None:
        self._dispatcher.stop()
        super()._begin_stop()
