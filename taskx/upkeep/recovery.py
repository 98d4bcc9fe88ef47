"""After a crash: what dead nodes held is taken back, and what this node lost track of, too."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Sequence

from taskx.core import lifecycle
from taskx.core.errors import CancelReason
from taskx.core.lifecycle import PENDING, RUNNING
from taskx.core.model import Task, TaskStatus
from taskx.core.record import STUB, Stub, stub_from_values
from taskx.core.writes import Update
from taskx.executing.runner import Run
from taskx.liveness.base import Node
from taskx.running.pool import WorkerPool
from taskx.storage import queries

#: Tasks of a dead node's buffer that are given up in one transaction.
BATCH = 1000
#: Tasks of its own, those that run and those next in line, that a node audits at once.
AUDITED = 5000


class Recovery:
    """Looks for dead nodes, and audits the tasks of its own."""

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool
        self._services = pool.services
        self._suspicious: set[tuple[str, str, int]] = set()
        self._strays: set[Run] = set()
        self._reserved: set[int] = set()
        self._unknown: set[str] = set()
        # Dead nodes whose buffers are being given up; and how many tasks of each cannot be.
        self._left: dict[str, int] = {}

    # --- other nodes

    @property
    def waiting(self) -> bool:
        """True if :meth:`go_on` has something to do."""
        return bool(self._left)

    def recover(self, patience: float = math.inf) -> int:
        """Take back what dead nodes held; returns how many tasks.

        Args:
            patience: seconds after which the rest of what waited in their buffers is left to :meth:`go_on`.

        Raises:
            RepositoryError: the repository failed; what is left is taken back next time.
        """
        until = time.monotonic() + patience
        repository = self._services.repository
        # Owners first: a node that joins after this is in the list of nodes below, if it owns any.
        owners = queries.owners(repository)
        nodes = {node.id: node for node in repository.nodes()}
        self._pool.alone = not any(
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
        return recovered + self._go_on(until)

    def go_on(self, patience: float = math.inf) -> int:
        """Give up what waited in the buffers of dead nodes, a batch at a time; returns how many tasks.

        Raises:
            RepositoryError: the repository failed; what is left is given up next time.
        """
        return self._go_on(time.monotonic() + patience)

    def _go_on(self, until: float) -> int:
        given_up = 0
        for node in list(self._left):
            while writes := self._pending(node):
                results = self._services.ledger.commit(writes)
                given_up += sum(results)
                self._left[node] += len(results) - sum(results)
                if len(writes) == BATCH and time.monotonic() >= until:
                    return given_up
            self._services.dependents.ended_elsewhere()
            self._services.turns.look_soon()
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

    # --- this node

    def audit(self) -> None:
        """Find what an interrupt at the wrong moment left behind, seen at two audits in a row.

        Pending tasks that this node is said to hold are buffered if they are not; running ones that
        no thread executes are handed back. In memory, runs that are over by what the repository says
        are forgotten, and so are slots of the buffer that nothing was put into.

        Of a large buffer, that is done with the tasks that are next in line.
        """
        pool = self._pool
        find, mine = self._services.repository.find, [pool.node.id]
        found = [*find("running_on", mine, STUB), *find("buffered_on", mine, STUB, AUDITED)]
        stubs = {(stub.id, stub.status, stub.starts): stub for stub in map(stub_from_values, found)}
        lost = self._lost(stubs.values())
        for key in lost & self._suspicious:
            stub = stubs[key]
            if stub.status == PENDING:
                pool.buffer.add_fetched(stub)
            else:
                self._hand_back(stub.id)
        self._suspicious = lost - self._suspicious
        self._audit_runs(stubs)
        reserved = pool.buffer.reserved
        stale, self._reserved = self._reserved & reserved, set(reserved)
        pool.buffer.release(stale)

    def _lost(self, stubs: Iterable[Stub]) -> set[tuple[str, str, int]]:
        """Return the tasks of this node that are in the repository and not in memory."""
        buffer, unmarked, runs = self._pool.buffer, self._pool.unmarked(), self._pool.runs
        return {
            (stub.id, stub.status, stub.starts)
            for stub in stubs
            if stub.id not in runs
            and (stub.status == RUNNING or not (stub.id in buffer or stub.id in unmarked))
        }

    def _audit_runs(self, stubs: Collection[tuple[str, str, int]]) -> None:
        """Forget runs in memory that are over, and hand back runs that no thread executes."""
        pool = self._pool
        strays = {run for run in list(pool.runs.values()) if self._is_stray(run, stubs)}
        for run in strays & self._strays:
            if _key(run) not in stubs:
                pool.starter.strike(run)
            elif pool.starter.claim(run):
                self._hand_back(run.task.id)
        self._strays = strays - self._strays

    def _is_stray(self, run: Run, stubs: Collection[tuple[str, str, int]]) -> bool:
        if run.task.status is not TaskStatus.RUNNING:
            return False  # it is being started
        if run.state in ("executing", "stuck"):
            return False
        if _key(run) not in stubs:
            return True
        # Where a thread was cut short that laid it out, or took it, it lies nowhere.
        return run.state != "concluding" and run not in list(self._pool.ahead.runs)

    def _hand_back(self, task_id: str) -> None:
        task = self._services.repository.get_many([task_id]).get(task_id)
        if task is not None and task_id not in self._pool.runs:
            ending = lifecycle.Ending(returned=False, reason=CancelReason.STOP, worker=task.worker)
            writes = lifecycle.conclude(task, ending, self._services.clock.now_ms())
            self._services.consequences.commit(writes, {task_id: task})


def _key(run: Run) -> tuple[str, str, int]:
    return (run.task.id, RUNNING, run.task.starts)
