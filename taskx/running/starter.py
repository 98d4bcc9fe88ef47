"""From pending to running, and back where no worker had a hand free."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from taskx.core import lifecycle
from taskx.core.clock import to_ms
from taskx.core.model import Task
from taskx.core.record import optional_ms
from taskx.core.writes import Update
from taskx.executing.context import Shared
from taskx.executing.runner import Run
from taskx.limiting.admission import Admission
from taskx.liveness.base import Node
from taskx.moving import Services
from taskx.running.buffer import Buffer, Item
from taskx.running.runs import Runs
from taskx.running.suspects import Suspects

#: Pending tasks that are given up in one transaction.
BATCH = 1000


class Starter:
    """Starts the tasks of a node, and knows which of them run.

    Args:
        services: what it works with.
        node: the node.
        buffer: where it puts back what cannot start now.
        runs: those of the node.
        admission: how many may start of the types that have limits.
    """

    def __init__(
        self,
        services: Services,
        node: Node,
        buffer: Buffer,
        runs: Runs,
        admission: Admission,
    ) -> None:
        self._services = services
        self._node = node.id
        self._name = node.name
        self._buffer = buffer
        self._admission = admission
        self.runs = runs
        self.suspects = Suspects(self.runs)
        self._shared = Shared(
            services.alarms, services.log.logger, services.keeper, services.repository.get_many
        )

    def start(self, items: Sequence[Item]) -> list[Run]:
        """Start the tasks among these that can be; the others are somebody else's, or no more."""
        services, runs = self._services, self.runs
        starting: list[tuple[Run, Update]] = []
        admitted: Collection[str] = ()
        try:
            self.suspects.stand_aside()
            found = services.repository.get_many([item.id for item in items])
            if paused := services.pauses.known:
                self._turn_away(found, [task for task in found.values() if task.type in paused])
            if services.registry.limits:
                admitted = self._admit(items, found)
            tasks = self._startable(items, found)
            now = services.clock.now_ms()
            for task in tasks:
                update = lifecycle.start(task, now, self._node, self._name)
                if update is not None and task.id not in runs:
                    run = self._make_run(task)
                    starting.append((run, update))
                    # Before the start is committed: who then asks to cancel it finds its token.
                    runs[task.id] = run
                elif self._is_suspect(task):
                    self._suspect_done()
            writes = [update for _, update in starting]
            results = services.ledger.commit(writes) if writes else ()
            for (run, update), started in zip(starting, results, strict=True):
                if started:
                    lifecycle.mark_started(run.task, update)
                else:
                    self.strike(run)
        except BaseException:  # an interrupt, too: nobody else knows of these
            for run, _ in starting:
                self.strike(run)
            raise
        finally:
            if self.suspects.waiting and (next_one := self.suspects.called()):
                self._buffer.put_back([next_one])
            for task_id in admitted:
                if task_id not in runs:
                    self._admission.over(task_id, ran=False)
        return [run for (run, _), started in zip(starting, results, strict=True) if started]

    def _admit(self, items: Sequence[Item], found: dict[str, Task]) -> set[str]:
        """Of tasks with limits, turn away those that must not start now; returns the others."""
        limits = self._services.registry.limits
        waiting: dict[str, list[str]] = {}
        for item in items:
            task = found.get(item.id)
            if task is not None and task.type in limits and task.id not in self.runs:
                waiting.setdefault(task.type, []).append(task.id)
        if not waiting:
            return set()
        admitted = self._admission.admit(waiting)
        ids = {task_id for some in waiting.values() for task_id in some}
        try:
            self._turn_away(found, [found[task_id] for task_id in ids - admitted])
        except BaseException:
            for task_id in admitted:
                self._admission.over(task_id, ran=False)
            raise
        return admitted

    def _startable(self, items: Sequence[Item], found: dict[str, Task]) -> list[Task]:
        """The tasks to start now, in order; the rest goes back into the buffer.

        Tasks that have crashed or must not crash twice are started alone; suspects run one at a time.
        """
        chosen: list[Task] = []
        for position, item in enumerate(items):
            task = found.get(item.id)
            if task is None:
                continue
            # What a process that only declared the type left to the executor.
            self._services.registry.registered[task.type].settle(task)
            if not task.crashes and task.max_crashes != 1:
                chosen.append(task)
                continue
            if chosen:
                self._buffer.put_back([item])
                continue
            suspect = self._is_suspect(task)
            if suspect and not self.suspects.admit(item):
                continue  # it waits for its turn
            self._buffer.put_back(items[position + 1 :])
            return self._alone(task) if suspect and lifecycle.last_chance(task) else [task]
        return chosen

    def _turn_away(self, found: dict[str, Task], tasks: Sequence[Task]) -> None:
        """Take out tasks that must not start now, and leave them to the repository."""
        for task in tasks:
            del found[task.id]
        self.give_up([task.id for task in tasks if task.owner == self._node])

    def give_up(self, task_ids: Sequence[str]) -> None:
        """Leave pending tasks to the repository that this node was to run."""
        for start in range(0, len(task_ids), BATCH):
            some = task_ids[start : start + BATCH]
            self._services.ledger.commit([lifecycle.give_up(i, self._node) for i in some])

    def _is_suspect(self, task: Task) -> bool:
        """Whether it has crashed, and would take this process with it: no child process runs it."""
        executor = self._services.registry.registered[task.type]
        return task.crashes > 0 and executor.options.isolation is None

    def _alone(self, task: Task) -> list[Task]:
        """A task on its last chance, when nothing else runs: a death that counts must be its own."""
        services = self._services
        try:
            services.log.warning(
                "task %s (%s) runs with nothing beside it, as its process died %d time(s) while it ran",
                *(task.id, task.type, task.crashes),
            )
            services.ledger.flush()  # a run is over when its outcome is written
            self.suspects.go_alone()
            found = services.repository.get_many([task.id])
        except BaseException:
            self._suspect_done()
            raise
        if task.id not in found:
            self._suspect_done()
        for again in found.values():
            services.registry.registered[again.type].settle(again)
        return list(found.values())

    def _make_run(self, task: Task) -> Run:
        services = self._services
        return Run(task, services.registry.registered[task.type], services.clock, self._shared)

    def strike(self, run: Run, ran: bool = False) -> None:
        """Forget a run that was not executed, or is over; a second call does nothing."""
        if self.runs.forget(run):
            self._struck(run, ran=ran)

    def claim(self, run: Run) -> bool:
        """Forget a run that no thread is at; False if one has just begun to execute it."""
        if claimed := self.runs.claim(run):
            self._struck(run, ran=False)
        return claimed

    def _struck(self, run: Run, *, ran: bool) -> None:
        # One that is stuck counts as long as its thread runs.
        if self._admission.admitted and run.state != "stuck":
            self._admission.over(run.task.id, ran=ran)
        if run.task.crashes and self._is_suspect(run.task):
            self._suspect_done()
        elif not self.runs:
            self.suspects.tell()

    def hand_back(self, runs: Sequence[Run], *, rebuffer: bool) -> None:
        """Undo the start of tasks that no worker had a hand free for."""
        if not runs:
            return
        now = self._services.clock.now_ms()
        for run in runs:
            self.strike(run)  # first: should the commit fail, the audit finds them
        writes = [write for run in runs for write in lifecycle.hand_back(run.task, now)]
        results = self._services.consequences.commit(
            writes, {run.task.id: run.task for run in runs}
        )
        if rebuffer:
            pending = [
                run.task for run, handed_back in zip(runs, results[::2], strict=True) if handed_back
            ]
            for task in reversed(pending):  # the first one last: it goes before those put back
                self.rebuffer(task)

    def rebuffer(self, task: Task) -> None:
        """Put a task that is pending again back into the buffer."""
        assert task.created_at is not None  # it comes from the repository
        run_at = optional_ms(task.run_at, "run_at")
        created_at, turn = to_ms(task.created_at), self._buffer.turn_before()
        self._buffer.add(task.id, task.type, task.priority, created_at, run_at, turn)

    def _suspect_done(self) -> None:
        if next_one := self.suspects.leave():
            self._buffer.put_back([next_one])
