"""The audit: a node finds what it lost track of, as an exception struck at the wrong moment."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from taskx.core import lifecycle
from taskx.core.errors import CancelReason
from taskx.core.lifecycle import PENDING, RUNNING
from taskx.core.model import TaskStatus
from taskx.core.record import STUB, Stub, stub_from_values
from taskx.executing.runner import Run
from taskx.running.pool import WorkerPool

#: Tasks, those that run and those next in line, that are audited at once.
AUDITED = 5000


class Audit:
    """Compares what a node has in memory with what the repository says."""

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool
        self._services = pool.services
        self._suspicious: set[tuple[str, str, int]] = set()
        self._strays: set[Run] = set()
        self._reserved: set[int] = set()

    def look(self) -> None:
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
        buffer, unmarked, runs = self._pool.buffer, self._pool.fetcher.unmarked(), self._pool.runs
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
        if task is None or task_id in self._pool.runs:
            return
        if task_id in self._pool.starter.unexecuted:
            self._pool.starter.undo([task], rebuffer=True)
        else:
            ending = lifecycle.Ending(returned=False, reason=CancelReason.STOP, worker=task.worker)
            writes = lifecycle.conclude(task, ending, self._services.clock.now_ms())
            self._services.consequences.commit(writes, {task_id: task})


def _key(run: Run) -> tuple[str, str, int]:
    return (run.task.id, RUNNING, run.task.starts)
