"""Tickets, and what a node knows about them."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import attrs

from taskx.tasks.timing import Timing


class Ticket(NamedTuple):
    """A message to the workers: start the best task of this type. The task with this id is one of them."""

    id: str
    type: str


@attrs.define
class Sent:
    """A ticket that was sent: when, by the monotonic clock, and how long to wait before the next one.

    ``starts`` is that of the task. If it is another one now, the ticket was used, and the task came back.
    """

    type: str
    starts: int
    at: float
    wait: float

    def again(self, now: float, longest: float) -> None:
        """Note that it is sent again now; the next time, it waits twice as long."""
        self.at, self.wait = now, min(2 * self.wait, longest)


class Unused(NamedTuple):
    """A ticket that a worker could not use, its sender, and the time at which other workers may get it."""

    ticket: Ticket
    owner: str
    at: float
    wait: float = 0.0


class Tickets:
    """The tickets of a node: those that it has sent, and those that it has got and could not use."""

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        #: The tickets that this node has sent and that no worker has used yet, by its knowledge.
        self.sent: dict[str, Sent] = {}
        self._lock = threading.Lock()
        self._unused: dict[str, Unused] = {}
        # The last one of each type that only others can use.
        self._elsewhere: dict[str, Unused] = {}

    def keep(self, ticket: Ticket, owner: str) -> None:
        """Keep a ticket that no task of its type can use on this node now."""
        with self._lock:
            self._unused[ticket.id] = Unused(ticket, owner, math.inf)

    def keep_for_others(self, ticket: Ticket, owner: str) -> None:
        """Keep a ticket for a moment that other nodes may use, and this one cannot."""
        now = time.monotonic()
        with self._lock:
            last = self._elsewhere.get(ticket.type)
            wait, longest = self._timing.elsewhere_after, self._timing.longest_elsewhere_after
            if last is not None and now - last.at < 2 * longest:
                wait = min(2 * last.wait, longest)
            one = Unused(ticket, owner, now + wait, wait)
            self._unused[ticket.id] = self._elsewhere[ticket.type] = one

    @property
    def kept(self) -> set[str]:
        """The ids of the tasks of the tickets that were kept."""
        with self._lock:
            return set(self._unused)

    def usable(self, has_room: Callable[[str], bool], runs: Callable[[str], bool]) -> list[Unused]:
        """Return the tickets that may be of use now, here or elsewhere."""
        if not self._unused:
            return []
        now = time.monotonic()
        with self._lock:
            kept = list(self._unused.values())
        return [
            one
            for one in kept
            if now >= one.at or (runs(one.ticket.type) and has_room(one.ticket.type))
        ]

    def remove(self, found: Sequence[Unused]) -> None:
        """Forget tickets whose tasks are free."""
        with self._lock:
            for one in found:
                if self._unused.get(one.ticket.id) is one:
                    del self._unused[one.ticket.id]
