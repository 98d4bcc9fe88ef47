"""The audit: find tasks that the node lost track of when an exception struck at the wrong moment."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from taskx.attempt.runner import Run
from taskx.node.pool import WorkerPool
from taskx.tasks import lifecycle
from taskx.tasks.errors import CancelReason
from taskx.tasks.lifecycle import PENDING, RUNNING
from taskx.tasks.model import TaskStatus
from taskx.tasks.record import STUB, Stub, stub_from_values


class Audit:
    """Compares a node's memory with the repository."""

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool
        self._suspicious: set[tuple[str, str, int]] = set()
        self._strays: set[Run] = set()
        self._reserved: set[int] = set()

    def check(self) -> None:
        """Repair what an interrupt at the wrong moment left behind, if two audits in a row see it.

        - A pending task that the repository says this node holds is buffered if it is not.
        - A running task without a run here is interrupted.
        - A run that no thread executes is handed back.
        - A run in memory that is over according to the repository is forgotten.
        - A reserved slot of the buffer that no task took is released.

        Of a large buffer, only the tasks that come next are compared.
        """
        pool = self._pool
        find, mine = self._pool.moves.repository.find, [pool.node.id]
        found = [
            *find("running_on", mine, STUB),
            *find("buffered_on", mine, STUB, self._pool.timing.most_audited),
        ]
        stubs = {(stub.id, stub.status, stub.starts): stub for stub in map(stub_from_values, found)}
        lost = self._lost(stubs.values())
        for key in sorted(lost & self._suspicious):
            stub = stubs[key]
            if stub.status == PENDING:
                pool.buffer.add_fetched([stub])
            else:
                self._interrupt(stub.id)
        self._suspicious = lost - self._suspicious
        self._audit_runs(stubs)
        reserved = pool.buffer.reserved
        stale, self._reserved = self._reserved & reserved, set(reserved)
        pool.buffer.release(stale)

    def _lost(self, stubs: Iterable[Stub]) -> set[tuple[str, str, int]]:
        """Return the keys of this node's tasks that are in the repository and not in memory."""
        buffer, unmarked, runs = self._pool.buffer, self._pool.fetcher.unmarked(), self._pool.runs
        unexecuted = {run.task.id for run in list(self._pool.starter.unexecuted)}
        return {
            (stub.id, stub.status, stub.starts)
            for stub in stubs
            if not (stub.id in runs or stub.id in unexecuted)
            and (stub.status == RUNNING or not (stub.id in buffer or stub.id in unmarked))
        }

    def _audit_runs(self, stubs: Collection[tuple[str, str, int]]) -> None:
        """Forget runs in memory that are over, and hand back runs that no thread executes."""
        pool = self._pool
        strays = [run for run in list(pool.runs.values()) if self._is_stray(run, stubs)]
        for run in strays:
            if run not in self._strays:
                continue
            if _key(run) in stubs:
                pool.starter.drop([run])
            else:
                # The thread that stored its outcome may only be slow to tell: the run has used its tokens.
                pool.starter.strike(run, ran=run.state == "concluding")
        self._strays = {*strays} - self._strays
        pool.starter.undo()

    def _is_stray(self, run: Run, stubs: Collection[tuple[str, str, int]]) -> bool:
        if run.task.status is not TaskStatus.RUNNING:
            return False  # it is being started
        if run.state in ("executing", "stuck"):
            return False
        if _key(run) not in stubs:
            return True
        # If the thread that laid it out, or took it, was interrupted, the run is in no structure.
        return run.state != "concluding" and run not in self._pool.ahead.runs

    def _interrupt(self, task_id: str) -> None:
        task = self._pool.moves.repository.get_many([task_id]).get(task_id)
        if task is None or task_id in self._pool.runs:
            return
        ending = lifecycle.Ending(returned=False, reason=CancelReason.STOP, worker=task.worker)
        writes = lifecycle.conclude(task, ending, self._pool.clock.now_ms())
        self._pool.moves.commit(writes, {task_id: task})


def _key(run: Run) -> tuple[str, str, int]:
    return (run.task.id, RUNNING, run.task.starts)
