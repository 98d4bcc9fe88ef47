"""The node of a queue: its workers, its housekeeper and its record, from the start to the end."""

from __future__ import annotations

import atexit
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from importlib import import_module
from typing import Protocol

import attrs

from taskx.attempt.current import awaited
from taskx.attempt.runner import inside_executor
from taskx.node.engine import Engine
from taskx.node.hooks import Hooks
from taskx.node.housekeeper import Housekeeper
from taskx.node.moving import Moves
from taskx.node.pool import Ends, WorkerPool
from taskx.node.schedules import Entry
from taskx.stores.liveness.base import About, Node
from taskx.tasks import permission
from taskx.tasks.checks import Duration, check_number
from taskx.tasks.config import Config
from taskx.tasks.errors import (
    CancelReason,
    ConfigurationError,
    QueueStopped,
    RepositoryError,
    SchemaMismatch,
)
from taskx.tasks.ids import new_id
from taskx.tasks.in_use import InUse
from taskx.tasks.lifecycle import NO_WORK
from taskx.tasks.log import GuardedLogger
from taskx.tasks.model import TaskFilter, TaskStatus
from taskx.tasks.timing import Timing

# Half of the longest wait that the system allows: deadlines and extra time are added to it.
_LONGEST_STOP = threading.TIMEOUT_MAX / 2


class _Schedules(Protocol):
    """The method of a queue's schedules that its node calls."""

    def store_declared(self, stored: Mapping[str, Entry] | None = None) -> dict[str, Entry]: ...


class _Queue(Protocol):
    """The attributes of a queue that its node reads."""

    config: Config

    @property
    def _schedules(self) -> _Schedules: ...


class LocalNode:
    """The node that a queue is once it is started. It is made with the queue, and lives like this:

    1. *Not started*: :attr:`pool` is None, and nothing but this object exists.
    2. :meth:`start` makes a pool and a housekeeper for a new id, joins the repository, takes back the tasks
       of dead nodes, stores the declared schedules, and starts the threads. Then :attr:`pool` is set, so
       that submits and cancels reach it, and last the workers begin. If anything fails before, all is
       undone, the state is *not started* again, and the next call begins anew.
    3. *Started*: it runs tasks until :meth:`stop`, until another process asks for a stop, or until it
       retires because a newer TaskX has migrated the repository.
    4. *Stopped*: it takes no more tasks. It waits for its workers, writes their outcomes and hands the
       rest back. If a task still runs then, a thread does the last step later.
    5. *Ended*: the last executor has returned, and the node has left the repository.

    Args:
        queue: the queue. Its ``config`` may change until the start.
        engine: the engine of the queue.
        make_pool: makes a pool for a node, of the parts of the queue.
        moves: the door to the repository.
        hooks: tells hooks.
        log: the logger of the queue.
        timing: the intervals of its work.
    """

    def __init__(
        self,
        queue: _Queue,
        engine: Engine,
        make_pool: Callable[[Node, Config, Ends], WorkerPool],
        moves: Moves,
        hooks: Hooks,
        log: GuardedLogger,
        timing: Timing,
    ) -> None:
        self._queue = queue
        self._engine = engine
        self._make_pool = make_pool
        self._moves = moves
        self._hooks = hooks
        #: The queue's logger, and its timing.
        self.log, self.timing = log, timing
        #: The worker pool; None until the queue is started.
        self.pool: WorkerPool | None = None
        #: True from the stop on.
        self.stopped = False
        # True if no executor of this queue runs any more, and none will.
        self._ended = False
        # The parts that run tasks, from the moment at which the start has made them.
        self._pool: WorkerPool
        self._housekeeper: Housekeeper
        self._changing, self._starting = threading.Lock(), threading.Lock()
        # Called in place of a stop when another process asks for one: a program only runs this queue.
        self._on_stop_request: Callable[[], object] | None = None
        _nodes.add(self)

    def forget(self) -> None:
        """Do not stop this node at the exit: it belongs to the parent of a forked child, or to a test."""
        _nodes.discard(self)

    # --- how far it is

    @property
    def name(self) -> str:
        """The state of the queue, in a word or two."""
        return "stopped" if self.stopped else "started" if self.pool else "not started"

    @property
    def closed(self) -> bool:
        """True if the calling thread must not submit: the queue was stopped.

        Executors may submit until the end, so that a stop makes none of them fail.
        """
        return self.stopped and (self._ended or not inside_executor())

    @property
    def stops(self) -> bool:
        """True if the queue was stopped, or has begun to stop by itself."""
        pool = self.pool  # read once: a start that fails takes it away
        return self.stopped or (pool is not None and pool.stopping)

    @property
    def outdated(self) -> bool:
        """True if the queue has stopped by itself, because a newer TaskX has migrated its file."""
        pool = self.pool
        return pool is not None and pool.outdated is not None

    @property
    def record(self) -> Node:
        """The node as it was recorded last."""
        return self._pool.recorded

    # --- starting

    def start(self, on_stop_request: Callable[[], object] | None = None) -> None:
        """Start the workers, as :meth:`Queue.start` describes; a second call does nothing.

        ``on_stop_request`` is called in place of a stop when another process asks for one.
        """
        self._on_stop_request = on_stop_request or self._on_stop_request
        with self._starting:
            if self.stopped:
                new = f"queue = Queue({self._moves.repository!r})"
                raise QueueStopped(
                    f"a stopped queue cannot be started again: write {new}, and register its executors "
                    "with that. To go on with one queue, write queue.start() in place of with queue"
                )
            if self.pool is not None:
                self.pool.go()  # an interrupt may have stopped start() before this step
                return
            self._prepare()
            try:
                self._join()
                # First: this node makes no tick by the options that an earlier program has stored.
                stored = self._queue._schedules.store_declared()
                self._begin()
                # The workers wait until the node is visible, so that executors can submit and cancel.
                if not self._publish():
                    raise QueueStopped("the queue was stopped while it started; no task was run")
                self._queue._schedules.store_declared(stored)  # others were declared meanwhile
            except BaseException:  # an interrupt, too: it can be started again
                self.withdraw()
                raise
            if (hooks := self._hooks).queue_started:
                hooks.tell(hooks.queue_started, lambda: self._queue)
            self._pool.go()

    def _prepare(self) -> None:
        """Make the parts that run tasks, for a new id; nobody sees them yet."""
        self._stopping = threading.Lock()  # held for good from the stop on
        self._ending = threading.RLock()
        self._left = threading.Event()
        self._on_record = False  # True also while it joins, when it may not be recorded yet
        config, about = self._queue.config, self._about()
        node_id = new_id()
        record = Node(id=node_id, name=f"{about.host}:{about.pid}:{node_id[-6:]}", about=about)
        self._pool = self._make_pool(record, config, self)
        self._housekeeper = self._engine.make_housekeeper(self._pool, config.retention)

    def _about(self) -> About:
        """Return the facts about this node that do not change."""
        from socket import gethostname  # not needed by a program that only submits

        config = self._queue.config
        about = About(
            host=gethostname(),
            pid=os.getpid(),
            python="{}.{}.{}".format(*sys.version_info),
            version=import_module("taskx").__version__,  # it imports this module
            started_at=self._moves.now_ms(),
            buffer_size=config.buffer_size,
            worker_num=config.worker_num,
        )
        return self._engine.describe(about)

    def _join(self) -> None:
        """Join the repository, and take back tasks of dead nodes."""
        permission.refuse_start()
        pool, repository = self._pool, self._moves.repository
        if repository.shortcoming:
            self.log.warning(
                "%s: this queue assumes that it is the only process on the repository, and that a "
                "dead process left the tasks that it finds running",
                repository.shortcoming,
            )
        self._on_record = True  # before the join: an interrupt may strike right after it
        try:
            repository.house.prepare()
            pool.tuning.refresh()  # first: the record tells the limits and workers
            pool.tuning.declare()
            pool.join()
        except RepositoryError:
            self._on_record = False
            raise
        pool.joined()
        self._housekeeper.recovery.recover(time.monotonic() + self.timing.round_within)
        pool.fetcher.refill()

    def _begin(self) -> None:
        """Start the threads; the workers wait."""
        self._pool.start_workers()
        self._housekeeper.start()

    def _publish(self) -> bool:
        """Make the pool visible to other threads; return False if the queue was stopped."""
        with self._changing:
            if not self.stopped:
                self._moves.serve(self._pool)
                self.pool = self._pool
            return not self.stopped

    def withdraw(self) -> None:
        """Undo the start; no task was run."""
        self.pool = None
        self._moves.serve(None)
        self._pool.begin_stop()
        self._housekeeper.stop()
        if not self._on_record:
            return
        with suppress(RepositoryError):  # other nodes take back the tasks of a node that has left
            self._pool.release_pending()
        with suppress(RepositoryError):  # the caller gets the first error
            self._moves.repository.liveness.leave(self._pool.node.id)

    # --- running

    def drain(self, timeout: Duration | None) -> bool:
        """Wait until nothing is left to run here: see :meth:`Queue.drain`.

        Raises:
            ConfigurationError: called inside an executor or a hook, or the queue is not started.
            SchemaMismatch: another process has migrated the file.
            QueueStopped: the queue was stopped, perhaps in the meantime.
        """
        hooks = self._hooks
        if inside_executor() or hooks.inside:
            raise ConfigurationError(
                "drain() inside an executor or a hook would wait for itself: call it elsewhere"
            )
        if self.stopped:
            raise QueueStopped("the queue was stopped and runs no more tasks: create a new queue")
        if (pool := self.pool) is None:
            raise ConfigurationError("drain() requires a started queue: call start() first")
        seconds = math.inf if timeout is None else check_number(timeout, "timeout")
        deadline = time.monotonic() + seconds
        while not self._nothing_left():
            if pool.outdated is not None:
                raise SchemaMismatch(*pool.outdated.args)
            if pool.stopping:
                raise QueueStopped("the queue was stopped before all tasks had ended")
            left = min(self.timing.quiet_every, deadline - time.monotonic())
            if left <= 0:
                return False
            if hooks.quiet:
                pool.wait_quiet(left)
            else:
                hooks.wait(left)
        return True

    def _nothing_left(self) -> bool:
        """Return True if nothing is left to run, and nothing to tell a hook, which may submit more."""
        hooks, pool = self._hooks, self._pool
        told = hooks.told
        return (
            pool.holds_nothing()
            and not self._housekeeper.stored_left()
            and pool.holds_nothing()  # a task that was found between the checks may just be ending
            and hooks.quiet
            and hooks.told == told
        )

    def problems(self) -> list[str]:
        """Return a sentence for all that keeps tasks from running; nothing is read."""
        return self._housekeeper.problems()

    def still_running(self) -> list[str]:
        """Return the ids of the tasks that still run, or whose outcome is not written yet."""
        pool = self._pool
        others = [*pool.starter.unexecuted, *pool.stuck.runs]
        return list(dict.fromkeys([*pool.runs.ids, *(run.task.id for run in others)]))

    # --- stopping

    def stop(self, timeout: Duration, *, cancel: bool) -> list[str]:
        """Take no more tasks, wait for workers and hooks; return the ids of tasks that still run."""
        seconds = min(check_number(timeout, "timeout"), _LONGEST_STOP)
        deadline = time.monotonic() + seconds
        # This lock is held for moments only, and not while a start waits for the repository.
        with self._changing:
            self.stopped = True
            self._ended = self._ended or self.pool is None
        still = [] if self.pool is None else self._stop(seconds, cancel=cancel)
        self.wait_for_hooks(max(0.0, deadline + self.timing.stop_extra - time.monotonic()))
        return still

    def tell_to_stop(self) -> None:
        """Take no more tasks, and tell the running ones to stop, without waiting."""
        self.stopped = True
        if self.pool is not None:
            self.pool.tell_to_stop()

    def wait_for_hooks(self, timeout: float) -> None:
        """Wait until hooks have been told everything; log a warning if they were not in time."""
        hooks = self._hooks
        if not (hooks.quiet or hooks.inside or hooks.wait(timeout)):
            self.log.warning("stopped with %d event(s) not told to hooks yet", len(hooks.waiting))

    def asked_to_stop(self) -> None:
        """Do what another process has asked for: stop the queue, or the program that only runs queues."""
        self.log.info("another process asks this queue to stop")
        if self._on_stop_request is not None:
            self._on_stop_request()
        else:
            self._soon(self.stop)

    def retired(self) -> None:
        """Stop the node by itself: the queue was not stopped, and tells those who use it why."""
        self._soon(self._stop)

    def _soon(self, stop: Callable[..., object]) -> None:
        within = self.timing.retire_within
        _in_thread(lambda: stop(within, cancel=False))

    def _stop(self, timeout: float, *, cancel: bool) -> list[str]:
        """Take no more tasks, wait for the workers, and leave; return the ids of tasks that still run.

        A second call waits for the end of the first.
        """
        if not self._stopping.acquire(blocking=False):
            return self._wait_for_end(timeout, cancel=cancel)
        try:
            with self._moves.repository.transactions.blocking():
                return self._stop_now(timeout, cancel=cancel)
        except BaseException:  # an interrupt: the next call starts again
            self._stopping.release()
            raise

    def _stop_now(self, timeout: float, *, cancel: bool) -> list[str]:
        pool = self._pool
        deadline = time.monotonic() + timeout
        self._by(deadline, self._begin_stop)
        if not cancel:
            self._wait_for_workers(deadline - timeout / 5)
        pool.fire_all(CancelReason.STOP)
        self._wait_for_workers(deadline)
        self._by(deadline, self._write_outcomes)
        if not pool.node.about.engine:  # else others run them, as a matter of course
            self._by(deadline, self._tell_left_pending)
        still = self.still_running()
        stuck = {run.task.id for run in [*pool.stuck.runs]}
        for ids, words in (
            ([i for i in still if i not in stuck], "running; they are handed back when they end"),
            (
                [i for i in still if i in stuck],
                "in a thread that is stuck; what that returns is dropped",
            ),
        ):
            if ids:
                self.log.warning(
                    "stopped with %d task(s) still %s: %s", len(ids), words, ", ".join(ids[:10])
                )
        if still or pool.workers_left:  # a worker that is starting a task hands it back
            _in_thread(self._end_later)
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
            thread.join(max(0.0, deadline + self.timing.stop_extra - time.monotonic()))

    def _wait_for_end(self, timeout: float, *, cancel: bool) -> list[str]:
        if cancel:
            self._pool.fire_all(CancelReason.STOP)
        deadline = time.monotonic() + timeout
        self._wait_for_workers(deadline)
        still = self.still_running()
        # A hook that is told of the end may ask for it; in a driven queue it is told within the end.
        if not (still or inside_executor() or self._ending._is_owned()):  # type: ignore[attr-defined]
            self._left.wait(max(0.0, deadline - time.monotonic()))
        return still

    def _begin_stop(self) -> None:
        try:
            self._pool.begin_stop()
            self._moves.repository.liveness.mark_stopping(self._pool.node.id)
            self._pool.release_pending()
        except RepositoryError as error:
            self.log.warning("the stop could not be recorded: %s", error)

    def _tell_left_pending(self) -> None:
        with suppress(RepositoryError):  # other steps log it
            count, filter = self._moves.repository.count, TaskFilter(status=TaskStatus.PENDING)
            pending = count(filter)
            if pending:  # people give answers whether a queue runs or not
                pending -= sum(count(attrs.evolve(filter, type=type)) for type in NO_WORK)
            if pending:
                self.log.warning("stopped with %d task(s) left pending", pending)

    def _wait_for_workers(self, deadline: float) -> None:
        # A stop that an executor asks for cannot wait for that executor.
        pool = self._pool
        here = threading.current_thread() in pool.threads or awaited.get() is not None
        while (left := deadline - time.monotonic()) > 0:
            # A submitter's thread may run a task, too.
            others = pool.runs or pool.stuck.runs
            if pool.workers_left <= here and (inside_executor() or not others):
                return
            pool.wait_quiet(min(left, self.timing.quiet_every))

    def _write_outcomes(self) -> None:
        try:
            self._moves.flush(patient=True)
            self._pool.starter.undo()
        except RepositoryError as error:
            self.log.warning("outcomes could not be written yet: %s", error)

    def _end_later(self) -> None:
        while self._pool.workers_left or self.still_running():
            self._pool.wait_quiet(self.timing.quiet_every)
        self._end()

    def _end(self) -> None:
        """Write the last outcomes, and leave the repository, after the last executor has returned."""
        pool, moves = self._pool, self._moves
        with self._ending:  # after an interrupted stop, another thread may be doing the same
            if self._left.is_set():
                return
            self._housekeeper.stop()
            if (loop := pool.runner.loop) is not None:
                loop.close()
            self._write_outcomes()
            try:
                with suppress(RepositoryError):  # the next queue to start checks all waiting tasks
                    moves.dependents.process()
                    moves.turns.process()
                    pool.stuck.lift()
                with suppress(RepositoryError):  # the counts of the last seconds are lost
                    moves.counts.store()
                with suppress(RepositoryError):  # other nodes free the slots of dead nodes
                    pool.admission.end()
                with suppress(RepositoryError):  # and take back their tasks
                    pool.release_pending()
                moves.repository.liveness.leave(pool.node.id)
            except RepositoryError as error:
                self.log.warning("the end could not be recorded: %s", error)
            pool.forget_began()
            moves.retries.tell(after=0)
            self.log.info("node %s stopped", pool.node.name)
            self._ended = True
            try:
                if (hooks := self._hooks).queue_stopped:
                    hooks.tell(hooks.queue_stopped, lambda: self._queue)
            finally:  # after it was told: a second call of stop() waits for this, and then for the hooks
                self._left.set()


def _in_thread(call: Callable[[], object]) -> None:
    with suppress(RuntimeError):  # the interpreter is shutting down: the process ends first
        threading.Thread(target=call, name="taskx-stop", daemon=True).start()


_nodes = InUse[LocalNode]()


def stop_all(nodes: Collection[LocalNode], timeout: float) -> None:
    """Stop queues at once, all of them within ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    for node in nodes:  # first tell all of them, so that they end at the same time
        node.tell_to_stop()
    for node in nodes:
        node.stop(max(0.0, deadline - time.monotonic()), cancel=True)


def stop_forgotten() -> None:
    """Stop the queues that were not stopped, when the interpreter exits."""
    timeout = max((node.timing.exit_within for node in _nodes), default=0.0)
    deadline = time.monotonic() + timeout
    running = {node for node in _nodes if node.name == "started"}
    stop_all(running, timeout)
    for node in {*_nodes} - running:
        node.wait_for_hooks(max(0.0, deadline - time.monotonic()))


atexit.register(stop_forgotten)
