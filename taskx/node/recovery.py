"""Recovery after a crash: take back the tasks of dead nodes."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import compress

import attrs

from taskx.node.pool import WorkerPool
from taskx.stores import queries
from taskx.stores.liveness.base import Node
from taskx.tasks import lifecycle
from taskx.tasks.errors import RepositoryUnavailable
from taskx.tasks.findings import counted, listed
from taskx.tasks.model import Task
from taskx.tasks.writes import Update


class Recovery:
    """Finds dead nodes and takes back their tasks; after an error, the next call does the rest."""

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool
        #: True if the last look has found no trace of another node.
        self.alone = False
        self._unknown: set[str] = set()
        self._held: set[str] = set()  # the dead nodes whose tasks could not be taken back at first
        # The dead nodes whose buffers are being freed, and the number of tasks of each that cannot be.
        self._left: dict[str, int] = {}

    @property
    def waiting(self) -> bool:
        """True if :meth:`go_on` has something to do."""
        return bool(self._left)

    def recover(self, until: float = math.inf) -> int:
        """Take back the tasks of dead nodes; return how many.

        Args:
            until: the time, on the monotonic clock, from which the rest of their buffered tasks is left to
                :meth:`go_on`.
        """
        self.alone = False
        repository = self._pool.moves.repository
        # Owners first: a node that joins after this and owns a task is in the list of nodes below.
        owners = queries.owners(repository)
        nodes = {node.id: node for node in repository.nodes()}
        alive = {node.id for node in nodes.values() if node.alive is not False}
        own = self._pool.node.id
        others = alive - {own}
        self._pool.fetcher.found_nodes(others=bool(others))
        if own in nodes and not others and repository.liveness.seems_dead(own):
            # The node that recorded this may have died before it took back the tasks.
            nodes[own] = attrs.evolve(nodes[own], alive=False)
        recovered = 0
        known = dict.fromkeys((*owners, *nodes))
        self._held.intersection_update(known)
        self._unknown.intersection_update(known)
        for owner in known:
            if owner in self._left:
                continue
            node = nodes.get(owner, Node(id=owner, name=owner, alive=False))
            if node.alive is False:
                recovered += self._take_back(node)
            elif node.alive is None and not node.silent and node.id not in self._unknown:
                self._unknown.add(node.id)
                self._pool.log.warning(
                    "cannot tell if node %s is alive, because its lock file is missing or unreadable; "
                    "its tasks are left alone",
                    node.name,
                )
        self.alone = [*known] == [own] and own in nodes and nodes[own].alive is True
        return recovered + self.go_on(until)

    def go_on(self, until: float = math.inf) -> int:
        """Free the tasks in the buffers of dead nodes, a batch at a time; return how many."""
        freed = 0
        for node in list(self._left):
            while writes := self._pending(node):
                results = self._pool.moves.commit(writes)
                freed += sum(results)
                self._left[node] += len(results) - sum(results)
                if len(writes) == self._pool.timing.free_batch and time.monotonic() >= until:
                    return freed
            self._pool.moves.dependents.ended_elsewhere()
            self._pool.moves.turns.scan_all_soon()
            if (
                node == self._pool.node.id
            ):  # it makes another record, if its own is gone or says dead
                self._pool.moves.repository.liveness.come_back(node)
            else:
                self._pool.moves.repository.liveness.leave(node)
            del self._left[node]
        return freed

    def _pending(self, node: str) -> list[Update]:
        """Return the writes that free the next tasks in the buffer of a dead node."""
        passed, batch = self._left[node], self._pool.timing.free_batch
        found = self._pool.moves.repository.find("buffered_on", [node], ("id",), passed + batch)
        return [lifecycle.free(task_id, node) for (task_id,) in found[passed:]]

    def _take_back(self, node: Node) -> int:
        """Rescue the running tasks of a dead node; its buffered ones are freed later."""
        find = self._pool.moves.repository.find
        running = [task_id for (task_id,) in find("running_on", [node.id], ("id",))]
        barred = [task_id for (task_id,) in find("stuck_on", [node.id], ("id",))]
        found = self._pool.moves.repository.get_many(running).values()
        # Another node may have rescued some since, and a third one may run them.
        tasks = [task for task in found if task.owner == node.id]
        if not self._pool.moves.repository.liveness.is_dead(node.id):
            return 0  # it came back, and may be running the tasks that were read
        try:
            if tasks:
                self._rescue(node, tasks)
        except RepositoryUnavailable as error:
            # A transaction of the dead process may still hold a record, on MongoDB for a minute.
            if node.id not in self._held:
                self._held.add(node.id)
                self._pool.log.warning(
                    "the tasks of node %s, which died, cannot be taken back yet: %s",
                    node.name,
                    error,
                )
            return 0
        self._left[node.id] = 0
        return len(running) + self._pool.stuck.lift_bars(barred, node.id)

    def _rescue(self, node: Node, tasks: Sequence[Task]) -> None:
        now = self._pool.clock.now_ms()
        isolated = self._pool.registry.isolated
        began = self._pool.moves.repository.liveness.began(node.id)
        executing = {task.id for task in tasks if began is None or (task.id, task.starts) in began}
        rescues = lifecycle.rescue(
            list(tasks), now, stopping=node.stopping, isolated=isolated, executing=executing
        )
        # One transaction: after half a rescue, the other tasks would be told a wrong number of neighbours.
        writes = [write for alternatives in rescues for write in alternatives]
        known = {task.id: task for task in tasks}
        results = self._pool.moves.commit(writes, known)
        again = [
            w.id for w in compress(writes, results) if w.changes["status"] == lifecycle.PENDING
        ]
        if again:
            self._pool.log.warning(
                "node %s died while it ran %s, which %s again: %s",
                node.name,
                counted(len(again), "task"),
                "runs" if len(again) == 1 else "run",
                listed(again),
            )
