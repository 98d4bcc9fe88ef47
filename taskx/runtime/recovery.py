"""After a crash: what dead nodes held is taken back, and what this node lost track of, too."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from taskx.core import lifecycle
from taskx.core.lifecycle import PENDING, RUNNING
from taskx.core.model import Task
from taskx.core.token import CancelReason
from taskx.core.writes import Update
from taskx.runtime.engine import Engine
from taskx.storage.base import Node


class Recovery:
    """Looks for dead nodes, and audits the tasks of its own."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._services = engine.services
        self._suspicious: set[tuple[str, str, int]] = set()
        self._unknown: set[str] = set()

    # --- other nodes

    def recover(self) -> int:
        """Take back what dead nodes held; returns how many tasks.

        Raises:
            RepositoryError: the repository failed; what is left is taken back next time.
        """
        repository = self._services.repository
        # Owners first: a node that joins after this is in the list of nodes below, if it owns any.
        owners = repository.owners()
        nodes = {node.id: node for node in repository.nodes()}
        self._engine.alone = not any(
            node.alive is not False and node.id != self._engine.node.id for node in nodes.values()
        )
        recovered = 0
        for owner in owners:
            node = nodes.get(owner, Node(id=owner, name=owner, alive=False))
            if node.alive is False:
                recovered += self._take_back(node)
        for node in nodes.values():
            if node.alive is False:
                self._services.dependents.ended_elsewhere()
                self._services.lines.look_soon()
                repository.leave(node.id)
            elif node.alive is None and node.id not in self._unknown:
                self._unknown.add(node.id)
                self._services.log.warning(
                    "whether node %s lives cannot be told, as its lock file is gone; "
                    "its tasks are left alone",
                    node.name,
                )
        return recovered

    def _take_back(self, node: Node) -> int:
        stubs = self._services.repository.owned(node.id)
        barred = self._services.repository.stuck_on(node.id)
        pending = [stub.id for stub in stubs if stub.status == PENDING]
        running = [stub.id for stub in stubs if stub.status == RUNNING]
        rescues: list[list[Update]] = []
        tasks = list(self._services.repository.get_many(running).values()) if running else []
        if not self._services.repository.is_dead(node.id):
            return 0  # it came back, and may run what was read
        if tasks:
            now = self._services.clock.now_ms()
            isolated = self._services.registry.isolated
            rescues = lifecycle.rescue(tasks, now, stopping=node.stopping, isolated=isolated)
            for alternatives in rescues:
                self._log_rescue(node, alternatives)
        # One transaction: half a rescue would count the other half's neighbours wrongly.
        writes = [write for alternatives in rescues for write in alternatives]
        given_up = [lifecycle.give_up(task_id, node.id) for task_id in pending]
        results = self._services.ledger.commit([*writes, *given_up])
        self._tell_rescued({task.id: task for task in tasks}, writes, results)
        for task_id in running:
            self._services.watcher.look_if_watched(task_id)
        if running:
            self._services.dependents.ended_elsewhere()
            self._services.lines.look_soon()
        return len(stubs) + self._engine.stuck.lift_bars((stub.id for stub in barred), node.id)

    def _tell_rescued(
        self, tasks: Mapping[str, Task], writes: Sequence[Update], results: Sequence[bool]
    ) -> None:
        hooks = self._services.hooks
        if hooks.rescued or hooks.finished:
            for write, held in zip(writes, results, strict=False):
                if held:
                    hooks.tell_rescued(tasks[write.id], write.changes)

    def _log_rescue(self, node: Node, alternatives: Sequence[Update]) -> None:
        first = alternatives[0]
        failed = first.changes["status"] == lifecycle.FAILED
        self._services.log.log(
            logging.ERROR if failed else logging.WARNING,
            "task %s was running on %s, which died: %s",
            first.id,
            node.name,
            "failed for good" if failed else "it runs again",
        )

    # --- this node

    def audit(self) -> None:
        """Find what an interrupt at the wrong moment left behind, seen at two audits in a row.

        Pending tasks that this node is said to hold are buffered if they are not; running ones that
        nobody executes are handed back.
        """
        engine = self._engine
        stubs = {
            (stub.id, stub.status, stub.starts): stub
            for stub in self._services.repository.owned(engine.node.id)
        }
        buffered, runs = engine.buffered(), engine.runs
        lost = {
            key
            for key, stub in stubs.items()
            if stub.id not in runs and (stub.status == RUNNING or stub.id not in buffered)
        }
        for key in lost & self._suspicious:
            stub = stubs[key]
            if stub.status == PENDING:
                engine.buffer.add_fetched(stub)
            else:
                self._hand_back(stub.id)
        self._suspicious = lost - self._suspicious

    def _hand_back(self, task_id: str) -> None:
        task = self._services.repository.get_many([task_id]).get(task_id)
        if task is not None and task_id not in self._engine.runs:
            ending = lifecycle.Ending(returned=False, reason=CancelReason.STOP, worker=task.worker)
            now = self._services.clock.now_ms()
            writes = lifecycle.conclude(task, ending, now)
            for write, held in zip(writes, self._services.ledger.commit(writes), strict=True):
                if held:
                    self._services.hooks.tell_concluded(task, ending, write.changes)
                    self._services.dependents.ended_elsewhere()
                    self._services.lines.left(task, write.changes)
            self._engine.more_stored = True
