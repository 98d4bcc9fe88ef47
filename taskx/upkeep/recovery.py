"""After a crash: what dead nodes held is taken back."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from taskx.core import lifecycle
from taskx.core.model import Task
from taskx.core.writes import Update
from taskx.liveness.base import Node
from taskx.running.pool import WorkerPool
from taskx.storage import queries

#: Tasks of a dead node's buffer that are given up in one transaction.
BATCH = 1000


class Recovery:
    """Looks for dead nodes, and takes back what they held; after an error, the rest next time."""

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool
        self._services = pool.services
        self._unknown: set[str] = set()
        # Dead nodes whose buffers are being given up; and how many tasks of each cannot be.
        self._left: dict[str, int] = {}

    @property
    def waiting(self) -> bool:
        """True if :meth:`go_on` has something to do."""
        return bool(self._left)

    def recover(self, patience: float = math.inf) -> int:
        """Take back what dead nodes held; returns how many tasks.

        Args:
            patience: seconds after which the rest of what waited in their buffers is left to :meth:`go_on`.
        """
        until = time.monotonic() + patience
        repository = self._services.repository
        # Owners first: a node that joins after this is in the list of nodes below, if it owns any.
        owners = queries.owners(repository)
        nodes = {node.id: node for node in repository.nodes()}
        self._pool.fetcher.alone = not any(
            node.alive is not False and node.id != self._pool.node.id for node in nodes.values()
        )
        recovered = 0
        for owner in dict.fromkeys((*owners, *nodes)):
            if owner in self._left:
                continue
            node = nodes.get(owner, Node(id=owner, name=owner, alive=False))
            if node.alive is False:
                recovered += self._take_back(node)
            elif node.alive is None and node.id not in self._unknown:
                self._unknown.add(node.id)
                self._services.log.warning(
                    "whether node %s lives cannot be told, as its lock file is gone or unreadable; "
                    "its tasks are left alone",
                    node.name,
                )
        return recovered + self.go_on(until - time.monotonic())

    def go_on(self, patience: float = math.inf) -> int:
        """Give up what waited in the buffers of dead nodes, a batch at a time; returns how many tasks."""
        until = time.monotonic() + patience
        given_up = 0
        for node in list(self._left):
            while writes := self._pending(node):
                results = self._services.ledger.commit(writes)
                given_up += sum(results)
                self._left[node] += len(results) - sum(results)
                if len(writes) == BATCH and time.monotonic() >= until:
                    return given_up
            self._services.dependents.ended_elsewhere()
            self._services.turns.scan_all_soon()
            if node != self._pool.node.id:  # else its record is gone, and it makes another one
                self._services.repository.liveness.leave(node)
            del self._left[node]
        return given_up

    def _pending(self, node: str) -> list[Update]:
        """Return the writes that give up the next tasks in the buffer of a dead node."""
        passed = self._left[node]
        found = self._services.repository.find("buffered_on", [node], ("id",), passed + BATCH)
        return [lifecycle.give_up(task_id, node) for (task_id,) in found[passed:]]

    def _take_back(self, node: Node) -> int:
        """Rescue what a dead node was running; what waited in its buffer is given up later."""
        find = self._services.repository.find
        running = [task_id for (task_id,) in find("running_on", [node.id], ("id",))]
        barred = [task_id for (task_id,) in find("stuck_on", [node.id], ("id",))]
        tasks = list(self._services.repository.get_many(running).values())
        if not self._services.repository.liveness.is_dead(node.id):
            return 0  # it came back, and may run what was read
        if tasks:
            self._rescue(node, tasks)
        self._left[node.id] = 0
        return len(running) + self._pool.stuck.lift_bars(barred, node.id)

    def _rescue(self, node: Node, tasks: Sequence[Task]) -> None:
        now = self._services.clock.now_ms()
        isolated = self._services.registry.isolated
        began = self._services.repository.liveness.began(node.id)
        executing = {task.id for task in tasks if began is None or (task.id, task.starts) in began}
        rescues = lifecycle.rescue(
            list(tasks), now, stopping=node.stopping, isolated=isolated, executing=executing
        )
        # One transaction: half a rescue would count the other half's neighbours wrongly.
        writes = [write for alternatives in rescues for write in alternatives]
        self._services.consequences.commit(writes, {task.id: task for task in tasks})
