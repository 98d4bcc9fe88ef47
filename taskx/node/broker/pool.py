"""The pool of a node with a broker: it sends tickets and, in a worker process, runs tasks for them.

It has no threads and no buffer: the thread of the broker's worker process that gets a ticket runs a task.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs

from taskx.node.broker.claims import Claims
from taskx.node.broker.dispatch import Dispatcher, Sender
from taskx.node.broker.tickets import Ticket, Tickets, Unused
from taskx.node.fetcher import Fetcher
from taskx.node.pool import Ends, PoolParts, WorkerPool
from taskx.stores.liveness.base import Node
from taskx.tasks import lifecycle
from taskx.tasks.config import Config
from taskx.tasks.errors import RepositoryError, SchemaMismatch
from taskx.tasks.log import Complaint
from taskx.tasks.model import Task

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing from 3.11 on


class TicketFetcher(Fetcher):
    """Has tickets sent for free tasks, in place of fetching them."""

    def __init__(
        self, tickets: Tickets, ring: Callable[[], object], *given: Any, **parts: Any
    ) -> None:
        super().__init__(*given, **parts)
        self._tickets = tickets
        self._ring = ring

    def serves(self, type: str) -> bool:
        """Return True: tickets are also sent for types that only other processes run."""
        return True

    def unmarked(self) -> set[str]:
        """Return the ids of the pending tasks of this node, which the audit then leaves alone."""
        return {*super().unmarked(), *list(self._tickets.sent), *self._tickets.kept}

    def refill(self) -> bool:
        """Have tickets sent soon."""
        self._moves.turns.share_out()
        self._agenda.begin_fetch()
        try:
            self._free_unused()
            self._ring()
        except BaseException:
            self._agenda.expect_more()
            raise
        return True

    def refill_if_low(self) -> None:
        """Have tickets sent soon, if there may be more tasks than before."""
        if self._agenda.more_stored or self._usable():
            self.refill()

    def _usable(self) -> list[Unused]:
        return self._tickets.usable(self.has_room, self._registry.runs)

    def _free_unused(self) -> None:
        """Free the tasks of tickets that may be of use now, so that their tickets are sent again."""
        if found := self._usable():
            writes = [lifecycle.free(one.ticket.id, one.owner) for one in found]
            self._moves.commit(writes)
            self._tickets.remove(found)


class TicketPool(WorkerPool):
    """A pool without threads of its own. The threads of the broker's worker process call :meth:`run`.

    Args:
        node, config, ends, parts: as for :class:`WorkerPool`.
        engine: sends the tickets.
        begun: called with the pool when it may run tasks.
    """

    dispatcher: Dispatcher

    def __init__(
        self,
        node: Node,
        config: Config,
        ends: Ends,
        engine: Sender,
        begun: Callable[[TicketPool], object],
        **parts: Unpack[PoolParts],
    ) -> None:
        self.tickets = Tickets(parts["timing"])
        fetcher = partial(TicketFetcher, self.tickets, lambda: self.dispatcher.ring())
        super().__init__(node, config, ends, fetcher, **parts)
        self.dispatcher = Dispatcher(self, self.tickets, engine)
        self._claims = Claims(self, self.tickets, self.dispatcher)
        self._has_begun = begun
        self._away = Complaint(self.log, "tickets are taken again")

    def start_workers(self) -> None:
        """Start no workers, only the thread that sends tickets."""
        self.dispatcher.start()

    def go(self) -> None:
        """Take tickets from now on."""
        super().go()
        self._has_begun(self)

    def run(self, ticket: Ticket) -> bool:
        """Run the best task of the ticket's type to its outcome, in this thread.

        Return False if this node could not look for one, and others should get the ticket.

        Raises:
            KeyboardInterrupt: the executor was interrupted, or another exception that is for the program.
        """
        worker = self.worker_name(threading.current_thread().name)
        if self.stopping:
            return False
        try:
            run = self._claims.claim(ticket, worker)
        except SchemaMismatch as error:
            self.retire(error)
            return False
        except RepositoryError as error:
            self._away.make("the repository fails, tickets are sent back to the broker: %s", error)
            return False
        self._away.over()
        if run is None:
            return not self.stopping
        ending = self.execute(run, worker, conclude=self.conclude)
        if ending.interrupt is not None:
            raise ending.interrupt
        return True

    def begin_stop(self) -> None:
        """Send and take no more tickets."""
        self.dispatcher.stop()
        super().begin_stop()

    @property
    def taker(self) -> str:
        """No node: a ticket is sent for each task that got its turn."""
        return ""

    def buffers(self, type: str) -> bool:
        """Return False: every new task is stored as a free one."""
        return False

    def set_workers(self, number: int) -> None:
        """Do nothing: the worker process decides how many tasks it runs at a time."""

    def described(self) -> Node:
        """Return the node with what it runs: nothing, if it only sends tickets."""
        described = attrs.evolve(super().described(), broker_error=self.dispatcher.error)
        if not self.node.only_sends:
            return described
        return attrs.evolve(described, types=(), limits={}, limited={}, own_limits={}, workers=0)

    def rebuffer(self, task: Task) -> None:
        """Have a task freed that became pending again, and that this node still owns."""
        self.tickets.keep(Ticket(task.id, task.type), self.node.id)
        self.agenda.fetch_soon()
