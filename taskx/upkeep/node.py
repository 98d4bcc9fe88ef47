"""A node: one started queue in one process, from its start to its end."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial

from taskx.common import permission
from taskx.common.config import Config
from taskx.core.errors import CancelReason, QueueStopped, RepositoryError, SchemaMismatch
from taskx.core.ids import new_id
from taskx.core.model import TaskFilter, TaskStatus
from taskx.executing.runner import inside_executor
from taskx.liveness.base import Node
from taskx.moving import Services
from taskx.running.pool import WorkerPool
from taskx.schedules.ticker import Ticker
from taskx.storage import queries
from taskx.storage.base import Repository
from taskx.upkeep.housekeeper import PATIENCE, Housekeeper
from taskx.upkeep.recovery import Recovery
from taskx.upkeep.retention import Retention

# Looks for quiet this often even if nothing tells of it, in seconds.
_LOOK_EVERY = 0.1
#: Seconds that a stop may take beyond its time-out, where the repository or a hook hangs.
EXTRA = 1.0
#: Time-out, in seconds, of the stop of a node whose file another process has migrated.
RETIRE_TIMEOUT = 30.0


class LocalNode:
    """Workers, housekeeper and buffer of a started queue, and their place in the repository.

    Args:
        services: what it works with.
        config: how many workers, how large a buffer.
        ended: called when it has left the repository.
    """

    def __init__(self, services: Services, config: Config, ended: Callable[[], object]) -> None:
        self._services = services
        self._ended = ended
        from socket import gethostname  # not needed by a program that only submits

        node_id = new_id()
        self.record = Node(
            id=node_id,
            name=f"{gethostname()}:{os.getpid()}:{node_id[-6:]}",
            types=services.registry.types,
        )
        self.engine = WorkerPool(services, self.record, config, self._retire)
        self._retiring, self._stopping = threading.Lock(), threading.Lock()  # held for good
        self._ending = threading.Lock()
        self._on_record = False  # or perhaps, while it joins
        self._left = threading.Event()
        self._recovery = Recovery(self.engine)
        retention = Retention(services, config.retention)
        ticker = Ticker(services)
        self._housekeeper = Housekeeper(self.engine, self._recovery, retention, ticker)

    # --- starting

    def join(self) -> None:
        """Join the repository and take up what dead processes left; after an error, :meth:`withdraw`.

        Raises:
            ConfigurationError: a child process of an executor imports the program.
            RepositoryError: the repository cannot be used.
        """
        permission.refuse_if_forbidden()
        services = self._services
        if services.repository.shortcoming:
            services.log.warning(
                "%s only: this queue takes itself for the only process on it, and tasks found running "
                "for left behind by a dead one",
                services.repository.shortcoming,
            )
        self._on_record = True  # before it is: an interrupt may strike at once
        try:
            services.repository.prepare()
            services.repository.liveness.join(self.record)
        except RepositoryError:
            self._on_record = False
            raise
        liveness = services.repository.liveness
        self.engine.began = liveness.began(self.record.id)
        liveness.watch(self.record.id, self.engine.lose_lease)
        self._recovery.recover(PATIENCE)
        services.pauses.look()
        self.engine.refill()

    def begin(self) -> None:
        """Start the threads; the workers wait until they may :meth:`go`.

        Raises:
            RuntimeError: the system has no more threads.
        """
        for thread in list(self.engine.threads):  # one that ends at once leaves the list
            thread.start()
        self._housekeeper.start()

    def withdraw(self) -> None:
        """Undo :meth:`join` and what has been begun: no task was run."""
        self.engine.begin_stop()
        self._housekeeper.stop()
        if not self._on_record:
            return
        with suppress(RepositoryError):  # what it still owns is taken from a node that has left
            self.engine.release_pending()
        with suppress(RepositoryError):  # it is for the error that was raised before to be told
            self._services.repository.liveness.leave(self.record.id)

    def go(self) -> None:
        """Let the workers run tasks."""
        services = self._services
        self.engine.begun.set()
        services.log.info(
            "node %s started: %d workers, types %s",
            self.record.name,
            self.engine.ahead.workers,
            ", ".join(self.record.types) or "none",
        )

    # --- running

    def drain(self, timeout: float | None) -> bool:
        """Wait until nothing is left to run; False if ``timeout`` seconds passed before.

        Raises:
            QueueStopped: the queue is being stopped.
            SchemaMismatch: another process has migrated the file.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        services = self._services
        while True:
            if self._nothing_left():
                return True
            if self.engine.outdated is not None:
                raise SchemaMismatch(*self.engine.outdated.args)
            if self.engine.stopping:
                raise QueueStopped("the queue was stopped before all was done")
            left = _LOOK_EVERY if deadline is None else deadline - time.monotonic()
            if left <= 0:
                return False
            if services.hooks.quiet:
                self.engine.wait_quiet(min(left, _LOOK_EVERY))
            else:
                services.hooks.wait(min(left, _LOOK_EVERY))

    def _nothing_left(self) -> bool:
        """Whether nothing is left to run, nor to tell a hook, which may submit more."""
        services = self._services
        told = services.hooks.told
        return (
            self.engine.holds_nothing()
            and not self._stored_left()
            and services.hooks.quiet
            and services.hooks.told == told
        )

    def _stored_left(self) -> bool:
        """Whether the repository has something to run, also where one task is to follow another."""
        repository, types = self._services.repository, set(self.engine.types())
        return (
            self._housekeeper.behind()
            or unfinished(repository, types)
            or self._services.dependents.overdue()
            or self._services.turns.overdue()
            or self._housekeeper.behind()  # its turn came between the looks, and its time had come
            or unfinished(repository, types)  # it was let start between the looks
        )

    def still_running(self) -> list[str]:
        """The ids of the tasks whose executor, or whose outcome, is still under way."""
        stuck = (run.task.id for run in list(self.engine.stuck.runs))
        return list(dict.fromkeys([*self.engine.runs, *stuck]))

    # --- stopping

    def stop(self, timeout: float, *, cancel: bool) -> list[str]:
        """Take nothing more, wait for the workers, leave; returns the ids that still run.

        A second call waits for the end of the first.
        """
        if not self._stopping.acquire(blocking=False):
            return self._wait_for_end(timeout, cancel=cancel)
        try:
            return self._stop(timeout, cancel=cancel)
        except BaseException:  # an interrupt: the next call begins anew
            self._stopping.release()
            raise

    def _stop(self, timeout: float, *, cancel: bool) -> list[str]:
        pool, log = self.engine, self._services.log
        deadline = time.monotonic() + timeout
        self._by(deadline, self._begin_stop)
        if not cancel:
            self._wait_for_workers(deadline - timeout / 5)
        pool.fire_all(CancelReason.STOP)
        self._wait_for_workers(deadline)
        self._by(deadline, self._write_outcomes)
        self._tell_left_pending()
        still = self.still_running()
        if still:
            log.warning(
                "stopped with %d task(s) still running, handed back when they end: %s",
                len(still),
                ", ".join(still[:10]),
            )
        if still or pool.workers_left:  # a worker that is starting a task hands it back
            with suppress(RuntimeError):  # the interpreter is shutting down: the process ends first
                threading.Thread(target=self._end_later, name="taskx-stop", daemon=True).start()
        else:
            self._by(deadline, self._end)
        return still

    def _by(self, deadline: float, step: Callable[[], None]) -> None:
        """Do a step in which the repository may hang, on a thread that is left behind if it does.

        All steps together are given :data:`EXTRA` seconds beyond the deadline.
        """
        thread = threading.Thread(target=step, name="taskx-stop", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the interpreter is shutting down
            step()
        else:
            thread.join(max(0.0, deadline + EXTRA - time.monotonic()))

    def _wait_for_end(self, timeout: float, *, cancel: bool) -> list[str]:
        if cancel:
            self.engine.fire_all(CancelReason.STOP)
        deadline = time.monotonic() + timeout
        self._wait_for_workers(deadline)
        still = self.still_running()
        if not (still or inside_executor()):
            self._left.wait(max(0.0, deadline - time.monotonic()))
        return still

    def _retire(self, why: SchemaMismatch) -> None:
        """End the node, as its TaskX is too old for what is in the repository now."""
        if not self._retiring.acquire(blocking=False):
            return
        self.engine.outdated = why
        self._services.log.error(
            "node %s takes no more tasks and hands back what it has: %s", self.record.name, why
        )
        stop = partial(self.stop, RETIRE_TIMEOUT, cancel=False)
        with suppress(RuntimeError):  # the interpreter is shutting down, and stops it
            threading.Thread(target=stop, name="taskx-stop", daemon=True).start()

    def _begin_stop(self) -> None:
        try:
            self.engine.begin_stop()
            self._services.repository.liveness.mark_stopping(self.record.id)
            self.engine.release_pending()
        except RepositoryError as error:
            self._services.log.warning("the stop could not be recorded: %s", error)

    def _tell_left_pending(self) -> None:
        with suppress(RepositoryError):  # it was told above, and will be
            pending = self._services.repository.count(TaskFilter(status=TaskStatus.PENDING))
            if pending:
                self._services.log.warning("stopped with %d task(s) left pending", pending)

    def _wait_for_workers(self, deadline: float) -> None:
        # A stop that an executor asks for cannot wait for that executor.
        pool = self.engine
        here = 1 if threading.current_thread() in pool.threads else 0
        while (left := deadline - time.monotonic()) > 0:
            # Callers may run tasks, too.
            others = pool.runs or pool.stuck.runs
            if pool.workers_left <= here and (inside_executor() or not others):
                return
            pool.wait_quiet(min(left, _LOOK_EVERY))

    def _write_outcomes(self) -> None:
        try:
            self._services.ledger.flush()
        except RepositoryError as error:
            self._services.log.warning("outcomes could not be written yet: %s", error)

    def _end_later(self) -> None:
        while self.engine.workers_left or self.engine.runs or self.engine.stuck.runs:
            self.engine.wait_quiet(_LOOK_EVERY)
        self._end()

    def _end(self) -> None:
        """The last executor has returned: write what waits, and leave."""
        with self._ending:  # after an interrupted stop, another one may be at it
            if not self._left.is_set():
                self._leave()

    def _leave(self) -> None:
        self._housekeeper.stop()
        services = self._services
        self._write_outcomes()
        try:
            with suppress(RepositoryError):  # whoever runs next looks at all that wait
                services.dependents.look()
                services.turns.look()
                self.engine.stuck.lift()
            with suppress(RepositoryError):  # what nodes share is taken from one that has left
                self.engine.admission.end()
            with suppress(RepositoryError):  # what it still owns is taken from a node that has left
                self.engine.release_pending()
            services.repository.liveness.leave(self.record.id)
        except RepositoryError as error:
            services.log.warning("the end could not be recorded: %s", error)
        self.engine.began = None  # closes its file now, whenever the pool is collected
        services.log.info("node %s stopped", self.record.name)
        self._left.set()
        self._ended()


def unfinished(repository: Repository, types: Collection[str]) -> bool:
    """Whether a task of these types runs on a node, or is pending and not held back."""
    # It may move from the one to the other between two looks.
    return _ready(repository, types) or _running(repository, types) or _ready(repository, types)


def _ready(repository: Repository, types: Collection[str]) -> bool:
    free = repository.ready(types, 1)
    return bool(free) or any(kind in types for kind in queries.every(repository, "ready_type"))


def _running(repository: Repository, types: Collection[str]) -> bool:
    nodes = [*queries.every(repository, "running_on")]
    return any(kind in types for (kind,) in repository.find("running_on", nodes, ("type",)))
