"""Claims: the task that a ticket starts.

A ticket *counts* while its task is pending and has an owner, the node that has sent it. There shall be one
message for each task that has an owner, and no more. So a ticket that counts and starts another task frees
its own task, which then gets a new ticket. A ticket that does not count is one too many: another one has
started its task, or the message came twice. It may start the best task that is due only if that has no
ticket. So the number of messages falls by one.
"""

from __future__ import annotations

import threading

from taskx.attempt.runner import Run
from taskx.node.broker.dispatch import Dispatcher
from taskx.node.broker.tickets import Ticket, Tickets
from taskx.node.buffer import Item
from taskx.node.pool import WorkerPool
from taskx.tasks import lifecycle
from taskx.tasks.lifecycle import PENDING
from taskx.tasks.rate import OF_TYPE
from taskx.tasks.record import FREE, STUB, Stub, stub_from_values

#: Most tasks of each sender that a claim reads at a time, and most times that it reads them. If other
#: workers have started all of them in the meantime, a task is left to the next ticket.
FEW, TRIES = 8, 5


class Claims:
    """Starts a task for each ticket, through the same code as worker threads do."""

    def __init__(self, pool: WorkerPool, tickets: Tickets, dispatcher: Dispatcher) -> None:
        self._pool = pool
        self._tickets = tickets
        self._dispatcher = dispatcher
        # As in a pool with threads, one thread at a time starts tasks.
        self._starting = threading.Lock()

    def claim(self, ticket: Ticket, worker: str) -> Run | None:
        """Start the best task of the ticket's type that is due; of equal ones, the one that it names.

        Return its run. None if no task of this type may start here now.

        Raises:
            RepositoryError: the repository failed.
        """
        pool, fetcher = self._pool, self._pool.fetcher
        if not (self._pool.registry.runs(ticket.type) and fetcher.has_room(ticket.type)):
            self._keep(ticket)
            return None
        with self._starting:
            for _ in range(TRIES):
                if pool.stopping:
                    return None
                named = self._named(ticket)
                counts = named is not None and bool(named[1])
                found = self._candidates(ticket, named)
                for stub, owner in found:
                    if owner and not counts:
                        return None
                    run = self._start(stub, worker)
                    if run is not None:
                        if counts and stub.id != ticket.id:
                            self._free(ticket)
                        return run
                if len(found) < FEW or not fetcher.has_room(ticket.type):
                    break
        self._keep(ticket)
        return None

    def _start(self, stub: Stub, worker: str) -> Run | None:
        pool = self._pool
        place, since = stub.rank(pool.buffer.ageing), stub.created_at
        item = Item(place, since, 0, stub.id, stub.type, True)
        for run in pool.starter.start([item], worker):
            if not pool.stopping:
                return run
            pool.starter.hand_back([run])  # the stop could not see it yet
        return None

    def _candidates(self, ticket: Ticket, named: tuple[Stub, str] | None) -> list[tuple[Stub, str]]:
        """Return the best tasks of a type with their owners, in the order in which to try them."""
        repository, ageing = self._pool.moves.repository, self._pool.buffer.ageing
        senders = dict.fromkeys(["", *self._dispatcher.crew.ids, *([named[1]] if named else [])])
        found = {
            stub.id: (stub, owner)
            for owner in senders
            for stub in repository.ready([ticket.type], FEW, owner, ageing)
        }
        if named is not None:
            found[ticket.id] = named

        def place(pair: tuple[Stub, str]) -> tuple[int, bool, int, str]:
            stub = pair[0]
            return stub.rank(ageing), stub.id != ticket.id, stub.created_at, stub.id

        return sorted(found.values(), key=place)

    def _named(self, ticket: Ticket) -> tuple[Stub, str] | None:
        """Return the task that a ticket names, with its owner, if it may start."""
        fields = (*STUB, "owner", "held")
        for *row, owner, held in self._pool.moves.repository.find("id", [ticket.id], fields):
            stub = stub_from_values(row)
            if stub.status == PENDING and (held or FREE) == FREE and stub.type == ticket.type:
                return stub, owner or ""
        return None

    def _keep(self, ticket: Ticket) -> None:
        """Keep the ticket of a task that waits, until there is room for one."""
        if (named := self._named(ticket)) is None or not named[1]:
            return
        registry = self._pool.registry
        limit = registry.limits.get(OF_TYPE + ticket.type)
        # Another node may have room under its limit. Tickets that a rate holds up are too many for this.
        own = limit is not None and limit.scope == "node" and limit.max_concurrency is not None
        if registry.runs(ticket.type) and not own:
            self._tickets.keep(ticket, named[1])
        else:
            self._tickets.keep_for_others(ticket, named[1])

    def _free(self, ticket: Ticket) -> None:
        """Free the ticket's task: its ticket has started another one."""
        if (named := self._named(ticket)) is not None and named[1]:
            self._pool.moves.commit([lifecycle.free(ticket.id, named[1])])
