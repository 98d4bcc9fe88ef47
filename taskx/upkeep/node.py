"""A started queue: a node from its start to its end, even if the program never stops it."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Collection
from contextlib import suppress
from datetime import timedelta
from functools import partial
from importlib import import_module
from typing import Any

from taskx.common import permission
from taskx.common.config import Config
from taskx.core.checks import check_number
from taskx.core.errors import (
    CancelReason,
    ConfigurationError,
    QueueStopped,
    RepositoryError,
    SchemaMismatch,
)
from taskx.core.ids import new_id
from taskx.core.log import GuardedLogger
from taskx.core.model import TaskFilter, TaskStatus
from taskx.core.timing import Timing
from taskx.executing.runner import inside_executor
from taskx.liveness.base import About, Node
from taskx.moving import Services
from taskx.running.pool import State, WorkerPool
from taskx.upkeep.housekeeper import Housekeeper

# Half of the longest wait that the system allows: deadlines and extra time are added to it.
_LONGEST_STOP = threading.TIMEOUT_MAX / 2


class LocalNode:
    """The workers, the housekeeper and the buffer of a started queue, and its record in the repository.

    ``ended`` is called when the node has left the repository.
    """

    pool_class: type[WorkerPool] = WorkerPool
    #: True if the housekeeper sends the heartbeats, which saves a thread.
    tends = False

    def __init__(self, services: Services, config: Config, ended: Callable[[], object]) -> None:
        self._services = services
        self._ended = ended
        about = self.about(config)
        node_id = new_id()
        name = f"{about.host}:{about.pid}:{node_id[-6:]}"
        self.record = Node(id=node_id, name=name, about=about)
        self.pool = self.pool_class(services, self.record, config, self._retire)
        self._retiring, self._stopping = threading.Lock(), threading.Lock()  # held for good
        self._ending = threading.Lock()
        self._on_record = False  # True also while it joins, when it may not be recorded yet
        self._left = threading.Event()
        self._housekeeper = Housekeeper(self.pool, config.retention)

    def about(self, config: Config) -> About:
        """Return the facts about this node that do not change."""
        from socket import gethostname  # not needed by a program that only submits

        return About(
            host=gethostname(),
            pid=os.getpid(),
            python="{}.{}.{}".format(*sys.version_info),
            version=import_module("taskx").__version__,  # it imports this module
            started_at=self._services.clock.now_ms(),
            buffer_size=config.buffer_size,
            worker_num=config.worker_num,
        )

    # --- starting

    def join(self) -> None:
        """Join the repository and take back tasks of dead nodes; after an error, call :meth:`withdraw`."""
        permission.refuse_start()
        services = self._services
        if services.repository.shortcoming:
            services.log.warning(
                "%s: this queue assumes that it is the only process on the repository, and that a "
                "dead process left the tasks that it finds running",
                services.repository.shortcoming,
            )
        self._on_record = True  # before the join: an interrupt may strike right after it
        try:
            services.repository.house.prepare()
            self.pool.tuning.refresh()  # first: the record tells the limits and workers
            self.record = self.pool.recorded = self.pool.described()
            services.repository.liveness.join(self.record, tended=self.tends)
        except RepositoryError:
            self._on_record = False
            raise
        liveness = services.repository.liveness
        self.pool.began = liveness.began(self.record.id)
        liveness.watch(self.record.id, self.pool.lose_lease)
        self._housekeeper.recovery.recover(services.timing.round_within)
        self.pool.fetcher.refill()

    def begin(self) -> None:
        """Start the threads; the workers wait for :meth:`go`."""
        self.pool.start_workers()
        self._housekeeper.start()

    def withdraw(self) -> None:
        """Undo :meth:`join` and :meth:`begin`; no task was run."""
        self.pool.begin_stop()
        self._housekeeper.stop()
        if not self._on_record:
            return
        with suppress(RepositoryError):  # other nodes take back the tasks of a node that has left
            self.pool.release_pending()
        with suppress(RepositoryError):  # the caller gets the first error
            self._services.repository.liveness.leave(self.record.id)

    def go(self) -> None:
        """Let the workers run tasks."""
        services = self._services
        self.pool.begun.set()
        services.log.info(
            "node %s started: %d workers, types %s",
            self.record.name,
            self.record.workers,
            ", ".join(self.record.types) or "none",
        )

    # --- running

    def drain(self, timeout: float | None) -> bool:
        """Do the work of :meth:`Queue.drain`.

        Raises:
            SchemaMismatch: another process has migrated the file.
            QueueStopped: the queue was stopped in the meantime.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        services = self._services
        while True:
            if self._nothing_left():
                return True
            if self.pool.outdated is not None:
                raise SchemaMismatch(*self.pool.outdated.args)
            if self.pool.stopping:
                raise QueueStopped("the queue was stopped before all tasks had ended")
            left = (
                self._services.timing.quiet_every
                if deadline is None
                else deadline - time.monotonic()
            )
            if left <= 0:
                return False
            if services.hooks.quiet:
                self.pool.wait_quiet(min(left, self._services.timing.quiet_every))
            else:
                services.hooks.wait(min(left, self._services.timing.quiet_every))

    def _nothing_left(self) -> bool:
        """Return True if nothing is left to run, and nothing to tell a hook, which may submit more."""
        services = self._services
        told = services.hooks.told
        return (
            self.pool.holds_nothing()
            and not self._housekeeper.stored_left()
            and self.pool.holds_nothing()  # a task that was found between the checks may just be ending
            and services.hooks.quiet
            and services.hooks.told == told
        )

    def problems(self) -> list[str]:
        """Return a sentence for all that keeps tasks from running; nothing is read."""
        return self._housekeeper.problems()

    def still_running(self) -> list[str]:
        """Return the ids of the tasks that still run, or whose outcome is not written yet."""
        pool = self.pool
        others = [*list(pool.starter.unexecuted), *list(pool.stuck.runs)]
        return list(dict.fromkeys([*pool.runs, *(run.task.id for run in others)]))

    # --- stopping

    def stop(self, timeout: float, *, cancel: bool) -> list[str]:
        """Take no more tasks, wait for the workers, and leave; return the ids of tasks that still run.

        A second call waits for the end of the first.
        """
        if not self._stopping.acquire(blocking=False):
            return self._wait_for_end(timeout, cancel=cancel)
        try:
            with self._services.repository.transactions.blocking():
                return self._stop(timeout, cancel=cancel)
        except BaseException:  # an interrupt: the next call starts again
            self._stopping.release()
            raise

    def _stop(self, timeout: float, *, cancel: bool) -> list[str]:
        pool, log = self.pool, self._services.log
        deadline = time.monotonic() + timeout
        self._by(deadline, self._begin_stop)
        if not cancel:
            self._wait_for_workers(deadline - timeout / 5)
        pool.fire_all(CancelReason.STOP)
        self._wait_for_workers(deadline)
        self._by(deadline, self._write_outcomes)
        if not self.pool.others_go_on:
            self._tell_left_pending()
        still = self.still_running()
        if still:
            log.warning(
                "stopped with %d task(s) still running; they are handed back when they end: %s",
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
        """Do a step on a thread of its own, which is left behind if the repository hangs.

        All steps together get ``Timing.stop_extra`` seconds beyond the deadline.
        """
        thread = threading.Thread(target=step, name="taskx-stop", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the interpreter is shutting down
            step()
        else:
            thread.join(max(0.0, deadline + self._services.timing.stop_extra - time.monotonic()))

    def _wait_for_end(self, timeout: float, *, cancel: bool) -> list[str]:
        if cancel:
            self.pool.fire_all(CancelReason.STOP)
        deadline = time.monotonic() + timeout
        self._wait_for_workers(deadline)
        still = self.still_running()
        if not (still or inside_executor()):
            self._left.wait(max(0.0, deadline - time.monotonic()))
        return still

    def _retire(self, why: SchemaMismatch) -> None:
        """End the node, because its TaskX is too old for the repository's new schema."""
        if not self._retiring.acquire(blocking=False):
            return
        self.pool.outdated = why
        self._services.log.error(
            "node %s takes no more tasks and hands back what it has: %s", self.record.name, why
        )
        stop = partial(self.stop, self._services.timing.retire_within, cancel=False)
        with suppress(RuntimeError):  # the interpreter is shutting down, which stops the node
            threading.Thread(target=stop, name="taskx-stop", daemon=True).start()

    def _begin_stop(self) -> None:
        try:
            self.pool.begin_stop()
            self._services.repository.liveness.mark_stopping(self.record.id)
            self.pool.release_pending()
        except RepositoryError as error:
            self._services.log.warning("the stop could not be recorded: %s", error)

    def _tell_left_pending(self) -> None:
        with suppress(RepositoryError):  # other steps log it
            pending = self._services.repository.count(TaskFilter(status=TaskStatus.PENDING))
            if pending:
                self._services.log.warning("stopped with %d task(s) left pending", pending)

    def _wait_for_workers(self, deadline: float) -> None:
        # A stop that an executor asks for cannot wait for that executor.
        pool = self.pool
        here = 1 if threading.current_thread() in pool.threads else 0
        while (left := deadline - time.monotonic()) > 0:
            # A submitter's thread may run a task, too.
            others = pool.runs or pool.stuck.runs
            if pool.workers_left <= here and (inside_executor() or not others):
                return
            pool.wait_quiet(min(left, self._services.timing.quiet_every))

    def _write_outcomes(self) -> None:
        try:
            self._services.moves.flush(patient=True)
            self.pool.starter.undo()
        except RepositoryError as error:
            self._services.log.warning("outcomes could not be written yet: %s", error)

    def _end_later(self) -> None:
        while self.pool.workers_left or self.still_running():
            self.pool.wait_quiet(self._services.timing.quiet_every)
        self._end()

    def _end(self) -> None:
        """Write the last outcomes, and leave the repository, after the last executor has returned."""
        services = self._services
        with self._ending:  # after an interrupted stop, another thread may be doing the same
            if self._left.is_set():
                return
            self._housekeeper.stop()
            self._write_outcomes()
            try:
                with suppress(RepositoryError):  # the next queue to start checks all waiting tasks
                    services.dependents.process()
                    services.turns.process()
                    self.pool.stuck.lift()
                with suppress(RepositoryError):  # other nodes free the slots of dead nodes
                    self.pool.admission.end()
                with suppress(RepositoryError):  # and take back their tasks
                    self.pool.release_pending()
                services.repository.liveness.leave(self.record.id)
            except RepositoryError as error:
                services.log.warning("the end could not be recorded: %s", error)
            self.pool.began = None  # closes its file now, however late the pool is collected
            services.moves.retries.tell(after=0)
            services.log.info("node %s stopped", self.record.name)
            self._left.set()
            self._ended()


#: Make a node of the services and settings of a queue; the last argument is called when it has left.
MakeNode = Callable[[Services, Config, Callable[[], object]], LocalNode]


class Lifetime:
    """Starts and stops a queue, and tells the hooks; ``state`` shows the queue's parts how far it is."""

    def __init__(
        self,
        services: Services,
        config: Config,
        state: State,
        queue: Any,
        make_node: MakeNode = LocalNode,
    ) -> None:
        self._services = services
        self._make_node = make_node
        #: The settings; they may change until the queue is started.
        self.config = config
        self._state = state
        self._queue = queue
        self._changing, self._starting = threading.Lock(), threading.Lock()
        #: The node; None until the queue is started.
        self.node: LocalNode | None = None
        #: Called in place of a stop when another process asks for one: a program only runs this queue.
        self.on_stop_request: Callable[[], object] | None = None
        _lives.add(self)

    def forget(self) -> None:
        """Do not stop this queue at the exit of a forked child: it belongs to the parent."""
        _lives.discard(self)

    @property
    def name(self) -> str:
        """The state of the queue, in a word or two."""
        return "stopped" if self._state.stopped else "started" if self.node else "not started"

    @property
    def timing(self) -> Timing:
        """The queue's timing."""
        return self._services.timing

    @property
    def log(self) -> GuardedLogger:
        """The queue's logger."""
        return self._services.log

    @property
    def ended(self) -> bool:
        """True if the queue was stopped, or has begun to stop by itself."""
        return self._state.stopped or (self.node is not None and self.node.pool.stopping)

    @property
    def outdated(self) -> bool:
        """True if the queue has stopped by itself, because a newer TaskX has migrated its file."""
        return self.node is not None and self.node.pool.outdated is not None

    def start(self) -> None:
        """Start the workers, as :meth:`Queue.start` describes; a second call does nothing."""
        with self._starting:
            if self._state.stopped:
                raise QueueStopped("a stopped queue cannot be started again: create a new queue")
            if self.node is not None:
                self.node.pool.begun.set()  # an interrupt may have stopped start() before this step
                return
            node = self._make_node(self._services, self.config, self._ended)
            node.pool.asked_to_stop = self._asked_to_stop
            try:
                node.join()
                # First: this node makes no tick by the options that an earlier program has stored.
                stored = self._queue._schedules.store_declared()
                node.begin()
                # The workers wait until the node is visible, so that executors can submit and cancel.
                if not self._publish(node):
                    raise QueueStopped("the queue was stopped while it started; no task was run")
                self._queue._schedules.store_declared(stored)  # others were declared meanwhile
            except BaseException:  # an interrupt, too: it can be started again
                self.node = self._state.pool = None
                node.withdraw()
                raise
            if (hooks := self._services.hooks).queue_started:
                hooks.tell(hooks.queue_started, lambda: self._queue)
            node.go()

    def _publish(self, node: LocalNode) -> bool:
        """Make a node that has begun visible to other threads; return False if the queue was stopped."""
        with self._changing:
            if not self._state.stopped:
                self.node, self._state.pool = node, node.pool
            return not self._state.stopped

    def _ended(self) -> None:
        """Note that the last executor has returned, and its outcome is written; tell the hooks."""
        self._state.ended = True
        if (hooks := self._services.hooks).queue_stopped:
            hooks.tell(hooks.queue_stopped, lambda: self._queue)

    def drain(self, timeout: float | timedelta | None) -> bool:
        """Do the work of :meth:`Queue.drain`."""
        if inside_executor() or self._services.hooks.inside:
            raise ConfigurationError(
                "drain() inside an executor or a hook would wait for itself: call it elsewhere"
            )
        if self._state.stopped:
            raise QueueStopped("the queue was stopped and runs no more tasks: create a new queue")
        if self.node is None:
            raise ConfigurationError("drain() requires a started queue: call start() first")
        return self.node.drain(None if timeout is None else check_number(timeout, "timeout"))

    def stop(self, timeout: float | timedelta, *, cancel: bool) -> list[str]:
        """Take no more tasks, wait for workers and hooks; return the ids of tasks that still run."""
        seconds = min(check_number(timeout, "timeout"), _LONGEST_STOP)
        deadline = time.monotonic() + seconds
        # This lock is held for moments only, and not while a start waits for the repository.
        with self._changing:
            self._state.stopped = True
            self._state.ended = self._state.ended or self.node is None
        still = [] if self.node is None else self.node.stop(seconds, cancel=cancel)
        self.wait_for_hooks(
            max(0.0, deadline + self._services.timing.stop_extra - time.monotonic())
        )
        return still

    def tell_to_stop(self) -> None:
        """Take no more tasks, and tell the running ones to stop, without waiting."""
        self._state.stopped = True
        if self.node is not None:
            self.node.pool.stopping = True
            self.node.pool.buffer.close()
            self.node.pool.fire_all(CancelReason.STOP)

    def _asked_to_stop(self) -> None:
        """Do what another process has asked for: stop the queue, or the program that only runs queues."""
        self.log.info("another process asks this queue to stop")
        if self.on_stop_request is not None:
            self.on_stop_request()
            return
        stop = partial(self.stop, self._services.timing.retire_within, cancel=False)
        with suppress(RuntimeError):  # the interpreter is shutting down, which stops the node
            threading.Thread(target=stop, name="taskx-stop", daemon=True).start()

    def wait_for_hooks(self, timeout: float) -> None:
        """Wait until hooks have been told everything; log a warning if they were not in time."""
        hooks = self._services.hooks
        if not (hooks.quiet or hooks.inside or hooks.wait(timeout)):
            self._services.log.warning(
                "stopped with %d event(s) not told to hooks yet", len(hooks.waiting)
            )


_lives: weakref.WeakSet[Lifetime] = weakref.WeakSet()


def stop_all(lives: Collection[Lifetime], timeout: float) -> None:
    """Stop queues at once, all of them within ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    for life in lives:  # first tell all of them, so that they end at the same time
        life.tell_to_stop()
    for life in lives:
        life.stop(max(0.0, deadline - time.monotonic()), cancel=True)


def stop_forgotten() -> None:
    """Stop the queues that were not stopped, when the interpreter exits."""
    timeout = max((life.timing.exit_within for life in list(_lives)), default=0.0)
    deadline = time.monotonic() + timeout
    running = {life for life in list(_lives) if life.name == "started"}
    stop_all(running, timeout)
    for life in {*_lives} - running:
        life.wait_for_hooks(max(0.0, deadline - time.monotonic()))


atexit.register(stop_forgotten)
