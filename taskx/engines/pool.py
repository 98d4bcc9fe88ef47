"""The pool of a node with tickets: no threads and no buffer; the thread that gets a ticket runs a task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs

from taskx.common.config import Config
from taskx.core import lifecycle
from taskx.core.errors import SchemaMismatch
from taskx.core.model import Task
from taskx.engines.tickets import Ticket, Tickets, Unused
from taskx.liveness.base import Node
from taskx.moving import Services
from taskx.running.fetcher import Fetcher
from taskx.running.pool import WorkerPool


class TicketFetcher(Fetcher):
    """Has tickets sent for free tasks, in place of fetching them."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.tickets = Tickets(self._services.timing)

    def serves(self, type: str) -> bool:
        """Return True: tickets are also sent for types that only other processes run."""
        return True

    def unmarked(self) -> set[str]:
        """Return the ids of the pending tasks of this node, which the audit then leaves alone."""
        return {*super().unmarked(), *list(self.tickets.sent), *self.tickets.kept}

    def refill(self) -> bool:
        """Have tickets sent soon."""
        self._agenda.more_stored = False
        try:
            self._free_unused()
            self.tickets.ring()
        except BaseException:
            self._agenda.more_stored = True
            raise
        return True

    def refill_if_low(self) -> None:
        """Have tickets sent soon, if there may be more tasks than before."""
        if self._agenda.more_stored or self._usable():
            self.refill()

    def _usable(self) -> list[Unused]:
        return self.tickets.usable(self.has_room, self._services.registry.runs)

    def _free_unused(self) -> None:
        """Free the tasks of tickets that may be of use now, so that their tickets are sent again."""
        if found := self._usable():
            writes = [lifecycle.free(one.ticket.id, one.owner) for one in found]
            self._services.moves.commit(writes)
            self.tickets.remove(found)


class TicketPool(WorkerPool):
    """A pool without threads of its own."""

    fetcher_class = TicketFetcher
    fetcher: TicketFetcher

    def __init__(
        self,
        services: Services,
        node: Node,
        config: Config,
        retire: Callable[[SchemaMismatch], None],
    ) -> None:
        super().__init__(services, node, config, retire)
        self.tickets = self.fetcher.tickets
        self.rebuffer = self._keep
        self.hears = node.only_sends
        self.others_go_on = True
        #: The last error of the broker, if it could not be used when it was tried last.
        self.broker_error = ""

    def start_workers(self) -> None:
        """Start no thread."""

    def buffers(self, type: str) -> bool:
        """Return False: every new task is stored as a free one."""
        return False

    def set_workers(self, number: int) -> None:
        """Do nothing: the worker process decides how many tasks it runs at a time."""

    def described(self) -> Node:
        """Return the node with what it runs: nothing, if it only sends tickets."""
        described = attrs.evolve(super().described(), broker_error=self.broker_error)
        if not self.node.only_sends:
            return described
        return attrs.evolve(described, types=(), limits={}, own_limits={}, workers=0)

    def _keep(self, task: Task) -> None:
        """Have a task freed that became pending again, and that this node still owns."""
        self.tickets.keep(Ticket(task.id, task.type), self.node.id)
        self.agenda.fetch_soon()
