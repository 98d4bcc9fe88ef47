"""The nodes of one engine: those that run tasks for tickets, and those that only send them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from taskx.stores.liveness.base import Node


class Crew:
    """The nodes of one engine: those that run tasks for tickets, and those that only send them."""

    def __init__(self, nodes: Sequence[Node], engine: str, me: str) -> None:
        mine = [node for node in nodes if node.about.engine == engine]
        self.ids = [*dict.fromkeys([*(node.id for node in mine), me])]
        alive = [node for node in mine if node.alive is not False and not node.stopping]
        self.workers = [node for node in alive if node.workers]
        senders = [node.id for node in alive if not node.workers]
        workers = sorted(node.id for node in self.workers)
        #: True if this node sends tickets at once. The others leave that to it for a moment.
        self.first = me in senders or (not senders and me in workers[:1])

    @property
    def types(self) -> list[str]:
        """The types that some worker runs."""
        return [*dict.fromkeys(type for node in self.workers for type in node.types)]

    def capacity(self, type: str) -> int:
        """Return the number of tasks of a type that all workers together run at a time."""
        total, most = 0.0, math.inf
        for node in self.workers:
            if type not in node.types:
                continue
            here: float = node.workers
            for limit in node.limits_of(type).values():
                slots = math.inf if limit.max_concurrency is None else limit.max_concurrency
                if limit.scope == "global":
                    most = min(most, slots)
                else:
                    here = min(here, slots)
            total += here
        return int(min(total, most))

    def limited(self, type: str) -> bool:
        """Return True if a worker may run fewer tasks of a type than it has threads."""
        limits = (limit for node in self.workers for limit in node.limits_of(type).values())
        return any(limit.max_concurrency is not None for limit in limits)
