"""The worker pool: a node's threads, which take tasks from the buffer and run them to their outcome."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Protocol, TypedDict

import attrs

from taskx.attempt.checkpoints import Keeper
from taskx.attempt.context import Shared
from taskx.attempt.registry import Middleware, Registry
from taskx.attempt.runner import Call, Run, Runner, broken, lesser, runs_of, set_apart
from taskx.node.admission import Admission
from taskx.node.ahead import Ahead
from taskx.node.buffer import Batches, Buffer, Item, Slots
from taskx.node.fetcher import Fetcher
from taskx.node.hooks import Hooks
from taskx.node.moving import Moves, Outcome
from taskx.node.place import Place
from taskx.node.progress import store_progress
from taskx.node.starter import Runs, Seat, Starter
from taskx.node.stuck import Stuck
from taskx.node.tuning import Tuning
from taskx.node.watcher import Watcher
from taskx.stores import queries
from taskx.stores.controls import Controls, Hold
from taskx.stores.liveness.base import Node
from taskx.stores.liveness.began import Began
from taskx.tasks import lifecycle
from taskx.tasks.bell import Agenda, Bell, Signal
from taskx.tasks.clock import Clock
from taskx.tasks.config import Config
from taskx.tasks.errors import (
    CancelReason,
    ConfigurationError,
    RepositoryError,
    RepositoryUnavailable,
    SchemaMismatch,
    is_interrupt,
)
from taskx.tasks.lifecycle import Ending
from taskx.tasks.log import Complaint, GuardedLogger, Once
from taskx.tasks.model import MAX_NAME, Task
from taskx.tasks.payload import clean_text
from taskx.tasks.record import CUT, Stub, changed_task
from taskx.tasks.timing import Timing
from taskx.tasks.writes import Insert, Update, Write, maker


def _fetch_size(workers: int, batches: Batches) -> int:
    return max(256, 4 * workers, *(2 * most for most, _ in batches.values()))


_make_outcome = maker(Outcome)


class PoolParts(TypedDict):
    """The parts of a queue with which its pool is made: see :class:`WorkerPool`."""

    moves: Moves
    controls: Controls
    agenda: Agenda
    registry: Registry
    runner: Runner
    keeper: Keeper
    watcher: Watcher
    hooks: Hooks
    clock: Clock
    log: GuardedLogger
    timing: Timing


class Ends(Protocol):
    """Is told why a node must end."""

    def retired(self) -> None:
        """The TaskX of the node is too old for the repository."""

    def asked_to_stop(self) -> None:
        """Another process asks the node to stop."""


class WorkerPool:
    """Runs tasks: threads that take ids from the buffer, start, execute and conclude them.

    Args:
        node: the node's record in the repository.
        config: the number of threads, the size of the buffer, and more.
        ends: is told why the node must end.
        fetcher: makes what fetches tasks, of the pool's parts.
        moves: the door to the repository.
        controls: the pauses, overrides, holds and requests of all nodes.
        agenda: what the housekeeper does soon.
        registry: the executors and their limits.
        runner: calls executors.
        keeper: stores their checkpoints.
        watcher: tells those who wait for tasks.
        hooks: tells hooks.
        clock: tells the time.
        log: the logger of the queue.
        timing: the intervals of its work.
    """

    #: True if a call for many tasks waits for more of them.
    waits_for_more = True

    def __init__(
        self,
        node: Node,
        config: Config,
        ends: Ends,
        fetcher: Callable[..., Fetcher] = Fetcher,
        *,
        moves: Moves,
        controls: Controls,
        agenda: Agenda,
        registry: Registry,
        runner: Runner,
        keeper: Keeper,
        watcher: Watcher,
        hooks: Hooks,
        clock: Clock,
        log: GuardedLogger,
        timing: Timing,
    ) -> None:
        self.moves = moves
        self.controls = controls
        self.agenda = agenda
        self.registry = registry
        self.runner = runner
        self.watcher = watcher
        self.hooks = hooks
        self.clock = clock
        self.log = log
        self.timing = timing
        self.node = node
        #: Every task in flight: see :class:`Runs`.
        self.runs = Runs()
        workers = config.worker_num
        self.ahead = Ahead(workers, timing)
        ageing = round((config.ageing or 0) * 1000)
        fetch_size = _fetch_size(workers, registry.batches)
        self.buffer = Buffer(
            config.buffer_size,
            fetch_size,
            self.ahead.wake,
            ageing=ageing,
            room_every=timing.signals_every,
            batches=registry.batches,
            waits=self.waits_for_more,
        )
        self.stopping = False
        #: The notes of the tasks that each thread began last, if the repository keeps them.
        self.began: Began | None = None
        #: Set when the workers may run tasks, or must end. Each worker passes it on to the next one.
        self.begun = Signal()
        self._goes = False
        self.admission = Admission(
            registry.limits,
            registry.limited,
            moves.repository,
            node.id,
            clock,
            freed=agenda.fetch_soon,
            scheduled=agenda.wake_from_long_sleep,
            log=log,
            limit_of_key=registry.limit_of_key,
            held=controls.held_until,
        )
        shared = Shared(
            runner.alarms,
            log.logger,
            keeper,
            moves.repository.get_many,
            store_progress=self._store_progress_of,
            loop=runner.own_loop,
            cut=Once(partial(log.warning, CUT)),
        )
        self.starter = Starter(
            node,
            self.buffer,
            self.runs,
            self.admission,
            at_work=self.ahead.at_work,
            moves=moves,
            controls=controls,
            agenda=agenda,
            registry=registry,
            runner=runner,
            shared=shared,
            log=log,
            timing=timing,
        )
        self.fetcher = fetcher(
            node.id,
            self.buffer,
            self.runs,
            self.admission,
            ahead=self.ahead,
            starter=self.starter,
            moves=moves,
            controls=controls,
            agenda=agenda,
            registry=registry,
        )
        self.discard = self.buffer.discard
        self.strike = self.starter.strike
        #: The node as it was recorded last.
        self.recorded = node
        #: Makes the pool follow pauses and overrides.
        self.tuning = Tuning(self, workers)
        # A repository of eight methods stores every new task as pending first.
        self._stores_in_steps = bool(moves.repository.shortcoming)
        #: The error that ends this node, if its TaskX is too old for the repository.
        self.outdated: SchemaMismatch | None = None
        self._retiring = threading.Lock()  # held for good
        self.ends = ends
        self._complaint = Complaint(log, "the workers can use the repository again")
        self._max_hold = config.max_hold
        self._counting = threading.Lock()
        #: Rung when nothing is left to run.
        self.quiet = Bell()
        self.stuck = Stuck(
            node.id,
            config.max_stuck,
            moves,
            log,
            do_without=self._do_without,
            conclude=self._abandon,
            abandon=runner.abandon,
            kill_within=timing.kill_within,
        )
        #: The number of worker threads that have not ended.
        self.workers_left = 0
        self._at_work = self._named = 0
        self._threaded = 0  # the number of workers that have threads; 0 until they are started
        self.threads: list[threading.Thread] = []

    # --- the node

    def join(self) -> None:
        """Join the repository as a node."""
        self.recorded = self.described()
        # In a worker process of a broker the housekeeper sends the heartbeats, which saves a thread.
        self.moves.repository.liveness.join(self.recorded, tended=self.node.serves_broker)

    def joined(self) -> None:
        """Note what the node began from now on, and stop its tasks if it loses its lease."""
        liveness = self.moves.repository.liveness
        self.began = liveness.began(self.node.id)
        liveness.watch(self.node.id, self.lose_lease)

    def go(self) -> None:
        """Let the workers run tasks; a second call does nothing."""
        self.begun.set()  # again, if an interrupt has struck the last call
        if not self._goes:
            self._goes = True
            self.log.info(
                "node %s started: %d workers, types %s",
                self.node.name,
                self.recorded.workers,
                ", ".join(self.recorded.types) or "none",
            )

    def retire(self, why: SchemaMismatch) -> None:
        """End the node, because its TaskX is too old for the repository's new schema."""
        if self._retiring.acquire(blocking=False):
            self.outdated = why
            self.log.error(
                "node %s takes no more tasks and hands back what it has: %s", self.node.name, why
            )
            self.ends.retired()

    def forget_began(self) -> None:
        """Close the notes of what the node began, however late this object is collected."""
        self.began = None

    def _store_progress_of(self, task_id: str) -> None:
        """Store the progress of a run, if it has reported some."""
        if (run := self.runs.get(task_id)) is not None:
            store_progress([run], self.moves, self.hooks, self.clock)

    # --- the threads

    def start_workers(self) -> None:
        """Start the worker threads; they wait until :attr:`begun` is set.

        Raises:
            RuntimeError: the system cannot start a thread.
        """
        with self._counting:
            self._threaded = self.ahead.workers
            threads = self._enlist(self._threaded)
        self._start(threads)

    def _enlist(self, count: int) -> list[threading.Thread]:
        """Return new worker threads to start, which count from now on. The caller holds the lock."""
        first = self._named + 1
        self._named += count
        threads = [self._worker(number) for number in range(first, first + count)]
        self.threads += threads
        self.workers_left += len(threads)
        self._at_work += len(threads)
        return threads

    def _worker(self, number: int) -> threading.Thread:
        name = f"taskx-worker-{number}"
        worker = self.worker_name(name)
        return threading.Thread(target=self._live, args=(worker,), name=name, daemon=True)

    def _start(self, threads: list[threading.Thread]) -> None:
        try:
            for thread in threads:
                thread.start()
        except RuntimeError:
            with self._counting:
                for thread in threads:
                    if thread.ident is None:
                        self.threads.remove(thread)
                        self.workers_left -= 1
                        self._at_work -= 1
            raise

    def worker_name(self, thread: str) -> str:
        """Return the name in records of a thread of this node: the node's name, then the thread's."""
        return f"{self.node.name} {clean_text(thread, MAX_NAME)}"

    def described(self) -> Node:
        """Return the node with the types, limits and workers that it has now."""
        registry = self.registry
        return attrs.evolve(
            self.node,
            types=registry.types,
            limits={**registry.limits},
            limited={**registry.limited},
            own_limits=registry.own_limits,
            declared={**registry.declared_limits},
            workers=self.ahead.workers,
        )

    @property
    def workers(self) -> int:
        """The number of workers that it shall have."""
        return self.ahead.workers

    def may_start(self, type: str, key: str) -> bool:
        """Return True if a task of this type and key might start here now."""
        held = self.controls.held_until(key) > self.clock.now_ms()
        return not held and self.registry.runs(type) and self.fetcher.has_room(type)

    @property
    def taker(self) -> str:
        """The node that takes tasks as they get their turns; empty if they must be fetched."""
        return self.node.id

    def holds(self, task_id: str) -> bool:
        """Return True if a pending task is in the buffer of this node."""
        return self.buffer.holds(task_id)

    def take_in(self, stub: Stub) -> None:
        """Put a task that this node took with its turn into the buffer, unless it is there or has begun."""
        if stub.id not in self.runs and not self.buffer.holds(stub.id):
            self.buffer.add_fetched([stub])

    def record(self) -> None:
        """Record the types, limits and workers of this node, if they have changed since the last record."""
        described = self.described()
        if described != self.recorded:
            self.moves.repository.liveness.record(described)
            self.recorded = described

    def set_workers(self, number: int) -> None:
        """Set the number of workers: surplus ones end after their task, :meth:`add_workers` adds others."""
        if number == self.ahead.workers:
            return
        with self._counting:
            self.ahead.set_workers(number)
            self._threaded = min(self._threaded, number)
        self.buffer.set_fetch_size(_fetch_size(number, self.registry.batches))
        self.ahead.wake_all()
        self.log.info("node %s: %d workers from now on", self.node.name, number)

    def add_workers(self) -> None:
        """Start the threads that are missing since the number of workers was raised.

        The housekeeper calls it, because no signal handler interrupts its thread.
        """
        if not 0 < self._threaded < self.ahead.workers:
            return
        try:
            with self._counting:
                number, before = self.ahead.workers, self._threaded
                self._threaded = number
                # Some stuck threads may not have been replaced, and some surplus ones may still work.
                missing = 0 if self.stopping else min(number - before, number - self._at_work)
                threads = self._enlist(max(0, missing))
            self._start(threads)
        except RuntimeError as error:
            self.log.error("cannot start more worker threads: %s", error)

    # --- the workers

    def _live(self, worker: str) -> None:
        """Work until the stop: any error costs some time, and never the thread."""
        self.begun.wait()
        self.begun.set()
        first, longest = self.timing.worker_pause, self.timing.longest_pause
        pause, going = first, True
        while going:
            began = time.monotonic()
            try:
                self._work(worker)
                going = False
            except SchemaMismatch as error:
                self.retire(error)
                self._pause(longest)
            except RepositoryError as error:
                self._complaint.make("the repository fails, and the workers try again: %s", error)
                if time.monotonic() - began > longest:  # it worked in the meantime
                    pause = first
                self._pause(pause)
                pause = min(2 * pause, longest)
            except BaseException:  # a defect of ours
                self.log.exception("unexpected error in a worker thread; it continues")
                self._pause(first)
        try:
            self.moves.flush(wait=False)
        except RepositoryError as error:
            self._complaint.make("outcomes could not be written yet: %s", error)
        finally:  # in any case: a stop must not wait for a worker that is gone
            self._tell_worker_ended()
            with self._counting:
                self.workers_left -= 1
                self.threads.remove(threading.current_thread())  # its ident may be used again soon
            self.quiet.ring_all()

    def _tell_worker_ended(self) -> None:
        for layer in self.registry.middleware:
            if isinstance(layer, Middleware):
                try:
                    layer.worker_ended()
                except BaseException:  # user code
                    self.log.exception("middleware failed at the end of a worker")

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self.stopping and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))

    def _work(self, worker: str) -> None:
        """Take, start and execute one task after another, until the stop."""
        buffer, ahead = self.buffer, self.ahead
        while not self.stopping:
            if self.hooks.waiting:
                self.hooks.let_catch_up()
            if ahead.short and not ahead.runs and not self.watcher.watching:
                ahead.let_gather(len(buffer), ahead.portion(alone=self.fetcher.alone))
            run: Run | Call | None = ahead.take() if ahead.runs else None
            if run is None:
                if items := buffer.take(ahead.portion(alone=self.fetcher.alone)):
                    run = self.start(items, worker)
                    self._complaint.over()
                    # Not if nothing was started: it might fetch the same tasks at once.
                    if self.fetcher.alone and (run is not None or ahead.runs):
                        with suppress(RepositoryError):  # the housekeeper tries again, and says so
                            self.fetcher.refill_if_low()
                else:
                    self._finish()
                    run = ahead.wait(self._has_next, buffer.until_lot() if buffer.lots else None)
                    if run is not None and self.stopping:
                        self.starter.hand_back([run])
                        return
            if buffer.lots and run is not None and buffer.until_lot() is not None:
                ahead.wake()  # another worker watches the lots
            if isinstance(run, Call):
                self.execute_call(run, worker)
            elif run is not None:
                self.execute(run, worker)
            del run  # a waiting worker must not keep the last task's values alive
            if self._at_work > ahead.workers and self._is_superfluous():
                return

    def _finish(self) -> None:
        """Do what is left to do before this worker waits."""
        if self.buffer.ready:  # another worker starts tasks, and writes the outcomes with them
            self.agenda.wake_from_long_sleep()
        else:
            if not self.moves.flush(wait=False):
                # Another thread is committing, perhaps without the last outcomes.
                self.agenda.wake_from_long_sleep()
            if self.moves.dependents.told:  # this worker may run a child next
                self.moves.dependents.process_some()
            if self.agenda.more_stored and not self.fetcher.refill():
                self.agenda.wake_from_long_sleep()  # as the housekeeper does
            self.tell_quiet()

    def _has_next(self) -> bool:
        """Return True if there is a task for a worker, or a worker must end."""
        return bool(self.ahead.runs) or self._at_work > self.ahead.workers or self.buffer.has_next()

    def start(self, items: list[Item], worker: str) -> Run | Call | None:
        """Start tasks in one transaction, and lay out all but the first, which this worker gets.

        Tasks that are to share a call are one :class:`Call`, which it gets.

        It gets none if it is of more use here: more tasks wait, and so do more workers than it has tasks
        for. To call one of them only to start tasks, too, would cost a switch of threads.
        """
        own = 1
        try:
            self.ahead.begin(len(items))
            # Before the start: a fetch may have to wait, and started tasks must not wait with it.
            self.fetcher.refill_if_low()
            runs = self.starter.start(items, worker)
            if self.stopping:  # the stop could not see these runs yet, and did not tell them
                self.starter.hand_back(runs)
                return None
            if len(runs) > 1 and runs[0].executor.together is not None and items[0].entered:
                return Call(runs, self.runner)
            if self.buffer.ready and len(self.ahead.waiting) >= len(runs) and not self.ahead.short:
                own = 0
            if len(runs) > own and not self.ahead.lay_out(runs[own:]):
                self.agenda.wake_from_long_sleep()
        except BaseException:  # an interrupt, too: no other thread holds these tasks
            self.buffer.put_back(item for item in items if item.id not in self.runs)
            raise
        finally:
            self.buffer.started()
            if own and self.buffer.ready and not self.ahead.wake():
                self.agenda.wake_from_long_sleep()
        return runs[0] if own and runs else None

    @property
    def idles(self) -> bool:
        """True if a worker waits, and no other task might have to start first."""
        return (
            self.ahead.idles
            and not self.agenda.more_stored
            and not self._stores_in_steps
            and self._nothing_waits()
        )

    def _nothing_waits(self) -> bool:
        buffer, suspects = self.buffer, self.starter.suspects
        return not (self.stopping or buffer.starting or buffer.ready or suspects.item)

    def buffers(self, type: str) -> bool:
        """Return True if a new task may go to a worker or into the buffer: no limit, no pause."""
        registry, paused = self.registry, self.controls.paused
        return (
            type in registry.registered
            and type not in registry.limited
            and not (paused.everything or type in paused.types)
        )

    def reserve(self, write: Insert, tried: list[Place], *, fresh: bool) -> bool:
        """Reserve the best place that is free for a new task: a worker that waits, or else a slot.

        Args:
            write: the write that stores the task.
            tried: gets the places; the last one is reserved. After an error, which may come at any moment,
                all of them must be released.
            fresh: True if no other task can have the id.

        Returns:
            False if there is no room.
        """
        if fresh and self.ahead.waiting and self.idles:
            tried.append(seat := Seat(self.starter, write, self._nothing_waits, self.ahead.serve))
            if seat.reserve():
                return True
        tried.append(slots := self.slots([write]))
        return slots.reserve()

    def slots(self, writes: Sequence[Insert]) -> Slots:
        """Return slots in the buffer for new tasks, which must be reserved; see :class:`Slots`."""
        short = self.agenda.wake_from_long_sleep
        return Slots(self.buffer, self.node.id, writes, short)

    def execute(
        self, run: Run, worker: str, conclude: Callable[[Run, Ending], None] | None = None
    ) -> Ending:
        """Run the executor, and pass its outcome to ``conclude``, or else leave it to the next commit.

        Any error that escapes, even one from a defect of TaskX, fails only this attempt.
        """
        try:
            run.state, self.ahead.at_work[run] = "executing", time.monotonic()
            if self.runs.get(run.task.id) is not run:  # the audit believed that it was lost
                run.state = "starting"  # no thread executes it, if the audit has put it back
                self.ahead.at_work.pop(run, None)
                return Ending(returned=False)
            began, cell = self.began, 0
            try:
                if self.hooks.started or self.moves.is_told:
                    self._tell_begins(run)
                if run.task.timeout is not None or run.pulse is not None:
                    run.overdue = self.stuck.watch(run, worker)
                if began is not None:
                    cell = began.begin(run.task.id, run.task.starts)
                ending = self.runner.run(run, worker)
            except BaseException as error:  # noqa: BLE001  (see above)
                ending = broken(error, worker)
            finally:
                if began is not None and cell:
                    began.end(cell)
            if run.decided is not None and not run.decided.acquire(False):
                if run.coroutine is None:  # else that tells when it comes back
                    self._come_back(run)
                return ending
            run.state = "concluding"  # first: from now on no audit believes that it is lost
            self.ahead.ended(run, ending.duration)
            if ending.hold is not None:
                self._hold([run], [ending])
            if conclude is not None:
                conclude(run, ending)
            elif run.context._completed or run.task.concurrency_key is not None:
                self._defer(run, ending)
            else:
                self.moves.later(*self._outcome(run, ending))
        except BaseException:  # an interrupt: no thread executes it, as the audit then sees
            run.state = "starting"
            self.ahead.at_work.pop(run, None)
            self.starter.strike(run, ran=True)
            raise
        return ending

    def execute_call(
        self, call: Call, worker: str, conclude: Callable[[Run, Ending], None] | None = None
    ) -> list[Ending]:
        """Run the executor for many runs at once: see :meth:`execute`."""
        conclude, left = conclude or self._defer, [*call.runs]
        try:
            # Those that were cancelled before a worker was free, or are damaged, are no part of the call.
            alone = [run for run in left if run.task.damage or run.token.cancelled]
            if len(left) - len(alone) == 1:
                alone = left
            left = [run for run in left if run not in alone]
            endings = [self.execute(run, worker, conclude) for run in alone]
            left = [run for run in left if self._begins(run)]
            if not left:
                return endings
            call = Call(left, self.runner)
            mine = self._call(call, worker)
            if not call.decided.acquire(False):
                left = []
                self._come_back(call)
                return endings + mine
            for run in call.runs:
                run.state = "concluding"  # first: as above
            self._hold(call.runs, mine)
            for run, ending in zip(call.runs, mine, strict=True):
                self.ahead.ended(run, ending.duration)
                conclude(run, ending)
                left = left[1:]
        except BaseException:  # an interrupt: no thread executes them, as the audit then sees
            for run in left:
                run.state = "starting"
                self.ahead.at_work.pop(run, None)
                self.starter.strike(run, ran=True)
            raise
        return endings + mine

    def _begins(self, run: Run) -> bool:
        """Note that a thread executes a run of a call; return False if the run was forgotten."""
        run.state, self.ahead.at_work[run] = "executing", time.monotonic()
        if self.runs.get(run.task.id) is run:
            return True
        run.state = "starting"
        self.ahead.at_work.pop(run, None)
        return False

    def _call(self, call: Call, worker: str) -> list[Ending]:
        began, cells = self.began, list[int]()
        try:
            for run in call.runs:
                self._tell_begins(run)
                if began is not None:
                    cells.append(began.begin(run.task.id, run.task.starts))
            timed = all(run.task.timeout is not None for run in call.runs)
            overdue = self.stuck.watch_call(call, worker) if timed else None
            return self.runner.run_call(call, worker, overdue)
        except BaseException as error:  # noqa: BLE001  (as for a single run)
            others = len(call.runs) - 1
            if is_interrupt(error) or not others:
                return [broken(error, worker) for _ in call.runs]
            return [set_apart(error, None, others).changed(worker=worker) for _ in call.runs]
        finally:
            for cell in cells:
                if began is not None and cell:
                    began.end(cell)

    def _tell_begins(self, run: Run) -> None:
        task, log = run.task, self.log
        if self.moves.is_told:
            what = "goes on with" if run.resumes else "begins,"
            log.debug("task %s (%s) %s attempt %d", task.id, task.type, what, task.attempt)
        if (listeners := self.hooks.started) and not run.resumes:
            self.hooks.tell(listeners, partial(changed_task, task, {}))

    def _defer(self, run: Run, ending: Ending) -> None:
        if run.context._completed:
            self._conclude_again(run, ending)
            return
        writes, outcome = self._outcome(run, ending)
        self.moves.later(writes, outcome)
        if len(writes) > 1:  # so a worker starts the next task of the key in the same commit
            self.moves.turns.take_in(writes)

    def conclude(self, run: Run, ending: Ending) -> None:
        """Commit an outcome now, and do what follows from it, on a thread that may be interrupted."""
        if run.context._completed:
            self._conclude_again(run, ending)
            return
        writes, outcome = self._outcome(run, ending)
        try:
            self.moves.conclude(writes, outcome)
        except RepositoryUnavailable as error:
            self._defer(run, outcome.ending)
            self.log.warning(
                "task %s: its outcome could not be written yet (trying again): %s",
                run.task.id,
                error,
            )

    def _conclude_again(self, run: Run, ending: Ending) -> None:
        """Do what follows from an outcome that a transaction of the run has stored."""
        assert run.context._completed
        stored, writes = run.context._completed[0]
        if not ending.returned or ending.result is not None:
            self.log.warning(
                "task %s (%s) was completed by tx.complete(); %s is ignored",
                run.task.id,
                run.task.type,
                "the result that it returned"
                if ending.returned
                else f"what followed ({ending.error})",
            )
        outcome = Outcome(run, stored, self)
        self.moves.follow(writes, {run.task.id: run.task}, outcome)
        self.concluded(run, writes, None)

    def _outcome(self, run: Run, ending: Ending) -> tuple[list[Update], Outcome]:
        """Return the writes of an ending, those that pass its turn on among them, and the outcome."""
        now = self.clock.now_ms()
        try:
            writes = lifecycle.conclude(run.task, ending, now, run.seq)
        except Exception as error:  # noqa: BLE001  (a defect of ours: it fails this attempt alone)
            ending = broken(error, ending.worker)
            writes = lifecycle.conclude(run.task, ending, now)
        if (key := run.task.concurrency_key) is not None:
            writes = [*writes, *self.moves.turns.next_turn(key, run.task.id)]
        return writes, _make_outcome((run, ending, self))

    def _hold(self, runs: Sequence[Run], endings: Sequence[Ending]) -> None:
        """Hold the limits that the tasks of a call were refused by; they run again later in any case."""
        registry, log, now = self.registry, self.log, self.clock.now_ms()
        wanted: dict[str, tuple[float, Task]] = {}
        for run, ending in zip(runs, endings, strict=True):
            if ending.hold is None or run.context._completed:
                continue
            seconds, asked = ending.hold
            for name in registry.names_to_hold(run.task, asked):
                if name not in wanted or wanted[name][0] < seconds:
                    wanted[name] = seconds, run.task
        holds = {}
        for name, (seconds, task) in wanted.items():
            until = now + math.ceil(1000 * min(seconds, self._max_hold))
            fill = registry.fill_of(name) or 0.0
            holds[name] = Hold(until, until + math.ceil(1000 * fill), task.id)
        if not holds:
            return
        try:
            self.moves.repository.require("holds of limits")
            held = self.controls.hold(holds, now)
            if held:
                self.tuning.refresh()
        except (RepositoryError, ConfigurationError) as error:
            log.warning("task %s (%s): nothing is held: %s", task.id, task.type, error)
            return
        for name in held:
            seconds, task = wanted[name]
            capped = seconds > self._max_hold
            log.log(
                logging.WARNING if capped else logging.INFO,
                "limit %s is held for %g s by task %s (%s)%s",
                name,
                min(seconds, self._max_hold),
                task.id,
                task.type,
                f", which asked for {seconds:g} s" if capped else "",
            )

    def rebuffer(self, task: Task) -> None:
        """Put a task that became pending again, and that this node still owns, into the buffer."""
        self.starter.rebuffer(task)

    # --- threads that are stuck

    def _do_without(self, runs: Sequence[Run], ident: int) -> None:
        """Replace the thread of stuck runs, if it is a worker. That of a coroutine goes on itself."""
        for run in runs:
            self.ahead.at_work.pop(run, None)
        coroutine = runs[0].coroutine
        if coroutine is not None and coroutine.leave(partial(self._come_back, runs[0])):
            return
        try:
            with self._counting:
                if not any(thread.ident == ident for thread in self.threads):
                    return  # the thread of a submitter, which ran the task itself
                self._at_work -= 1
                if self.stopping or not self.stuck.healthy:
                    return
                threads = self._enlist(1)
            self._start(threads)
        except RuntimeError as error:
            self.log.error("cannot start a replacement worker thread: %s", error)

    def _abandon(self, run: Run, ending: Ending) -> None:
        """Write the outcome of an attempt whose thread runs on."""
        self._defer(run, ending)
        self.agenda.wake_from_long_sleep()

    def _come_back(self, call: Run | Call) -> None:
        """Note that this thread, which was stuck, is free again."""
        if threading.current_thread() in self.threads:
            with self._counting:
                self._at_work += 1
        for run in runs_of(call):
            self.admission.over(
                run.task.id, ran=True
            )  # first: from then on its retry may be admitted
            self.stuck.thread_ended(run)
        self.agenda.wake_from_long_sleep()

    def _is_superfluous(self) -> bool:
        """Return True if this worker must end: one that was stuck came back, or fewer are wanted."""
        with self._counting:
            if self._at_work <= self.ahead.workers:
                return False
            self._at_work -= 1
            return True

    # --- outcomes

    def refused(self, run: Run, ending: Ending, error: BaseException) -> bool:
        """Store a lesser outcome in place of one that was refused; return False if none is left."""
        if (left := lesser(ending, error)) is None:
            return False
        self._defer(run, left)
        self.agenda.wake_from_long_sleep()
        return True

    def concluded(self, run: Run, held: Sequence[Write], error: BaseException | None) -> None:
        """Note that a run is over, and which moves of its outcome took place."""
        if not (held and held[0].id == run.task.id):
            self._not_concluded(run.task, error)
        if self.quiet.listening:
            self.tell_quiet()

    def _not_concluded(self, task: Task, error: BaseException | None) -> None:
        if error is None:
            self.log.warning(
                "task %s (%s): its late outcome was dropped, because another run had taken over, or "
                "because it was stored before and the repository's answer was lost",
                task.id,
                task.type,
            )
        else:
            self.log.error(
                "task %s (%s): its outcome could not be stored, so it runs again: %s",
                task.id,
                task.type,
                error,
            )

    # --- for the housekeeper

    def hand_on(self) -> None:
        """Wake a worker if tasks wait; hand back started tasks for which no worker is free."""
        self.starter.suspects.call_next()
        if not self.ahead.nudge(self.buffer.ready):
            # No worker takes what one of them laid out just after the stop had cleared the line.
            after = 0.0 if self.stopping else self.timing.hand_back_after
            self.starter.drop(self.ahead.clear(after))
        self.starter.undo()

    @property
    def needs_care(self) -> bool:
        """True if a task may soon have to be handed on."""
        return self.ahead.needs_care(self.buffer.ready) or bool(self.starter.unexecuted)

    # --- quiet, and the end

    def tell_quiet(self) -> None:
        """Wake the threads that wait until nothing is left to run, if that is so."""
        if self.quiet.listening and not self.runs and not len(self.buffer):
            self.quiet.ring_all()

    def holds_nothing(self) -> bool:
        """Return True if no task is in the buffer or with a worker, and no outcome waits."""
        return not (
            self.runs
            or len(self.buffer)
            or self.ahead.runs
            or self.starter.suspects.waiting
            or self.agenda.more_stored
            or self.moves.unsettled
            or self.moves.dependents.waiting
        )

    def wait_quiet(self, timeout: float) -> None:
        """Wait until a task ends or a worker leaves, at most ``timeout`` seconds."""
        self.quiet.wait(self.quiet.listen(), timeout)

    def lose_lease(self) -> None:
        """Stop the running tasks, because other nodes may believe that this node is dead.

        They may have taken over its tasks, and its part of the shared limits.
        """
        self.fire_all(CancelReason.LEASE_LOST)
        self.admission.forget()
        if listeners := self.hooks.lease_lost:
            self.hooks.tell(listeners, lambda: self.node.id)

    def fire_all(self, reason: CancelReason) -> None:
        """Fire the token of every run."""
        for run in list(self.runs.values()):
            run.token.fire(reason)

    def fire(self, task_id: str) -> bool:
        """Fire the token of a task that was asked to cancel, if it runs here; return True if it fires."""
        run = self.runs.get(task_id)
        return run is not None and run.token.fire(CancelReason.CANCEL)

    def fire_cancelled(self) -> bool:
        """Fire the tokens of the runs that were asked to cancel, perhaps by another process.

        Return True if one fires.
        """
        asked = queries.asked_to_cancel(self.moves.repository, self.runs.ids)
        fired = [self.fire(task_id) for task_id in asked]
        return any(fired)

    def tell_to_stop(self) -> None:
        """Take no more tasks, and tell the running ones to stop, without waiting."""
        self.stopping = True
        self.buffer.close()
        self.fire_all(CancelReason.STOP)

    def begin_stop(self) -> None:
        """Take no more tasks, and hand back those that were started ahead."""
        self.stopping = True
        self.begun.set()
        ahead = self.ahead.clear()
        self.buffer.close()
        self.ahead.wake_all()
        self.starter.suspects.close()
        self.starter.hand_back(ahead)

    def release_pending(self) -> None:
        """Free the pending tasks that this node holds, so that any node can run them."""
        found = self.moves.repository.find("buffered_on", [self.node.id], ("id",))
        self.starter.free([task_id for (task_id,) in found])


class State(Protocol):
    """Tells how far a queue is: a part of the interface of its node."""

    @property
    def pool(self) -> WorkerPool | None:
        """The worker pool; None until the queue is started."""

    @property
    def stopped(self) -> bool:
        """True if the queue was stopped."""

    @property
    def closed(self) -> bool:
        """True if the calling thread must not submit any more."""
