"""Tickets, and what a node knows about them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

#: Seconds after which a ticket goes back that only other workers can use.
ELSEWHERE = 0.5


class Ticket(NamedTuple):
    """A message to the workers: start the best task of this type. The task with this id is one of them."""

    id: str
    type: str


class Unused(NamedTuple):
    """A ticket that a worker could not use, with the node that sent it, and the time at which it came."""

    ticket: Ticket
    owner: str
    at: float


class Tickets:
    """The tickets of a node: those that it has sent, and those that it has got and could not use."""

    def __init__(self) -> None:
        #: Has tickets sent soon.
        self.ring: Callable[[], object] = lambda: None
        #: The ids of the tasks whose tickets this node has sent, and that have not started.
        self.sent: Collection[str] = ()
        #: The ids of the nodes that send tickets.
        self.senders: Sequence[str] = ()
        self._lock = threading.Lock()
        self._unused: dict[str, Unused] = {}

    def keep(self, ticket: Ticket, owner: str) -> None:
        """Keep a ticket that no task of its type can use on this node now."""
        with self._lock:
            self._unused[ticket.id] = Unused(ticket, owner, time.monotonic())

    @property
    def kept(self) -> set[str]:
        """The ids of the tasks of the tickets that were kept."""
        with self._lock:
            return set(self._unused)

    def usable(self, has_room: Callable[[str], bool], runs: Callable[[str], bool]) -> list[Unused]:
        """Remove and return the tickets that may be of use now, here or elsewhere."""
        now = time.monotonic()
        with self._lock:
            kept = list(self._unused.values())
        found = [
            one
            for one in kept
            if (has_room(one.ticket.type) if runs(one.ticket.type) else now - one.at >= ELSEWHERE)
        ]
        with self._lock:
            for one in found:
                self._unused.pop(one.ticket.id, None)
        return found
