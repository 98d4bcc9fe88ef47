"""The housekeeper: a thread that does all work that is due, and reacts to other processes."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Collection, Mapping
from contextlib import suppress

from taskx.core import lifecycle
from taskx.core.errors import RepositoryError, SchemaMismatch
from taskx.core.findings import Problem, duration
from taskx.core.log import Complaint
from taskx.core.model import TaskStatus
from taskx.running.audit import Audit
from taskx.running.pool import WorkerPool
from taskx.running.progress import store_progress
from taskx.running.stuck import stuck_types
from taskx.schedules.ticker import Ticker
from taskx.storage import queries
from taskx.storage.base import Locked, Repository
from taskx.storage.queries import Changes
from taskx.upkeep.expiry import Expiry
from taskx.upkeep.listening import Listening
from taskx.upkeep.recovery import Recovery
from taskx.upkeep.requests import Requests
from taskx.upkeep.retention import Retention


class Housekeeper:
    """Calls :meth:`tick` again and again. Everything it does can be done twice without harm.

    Args:
        pool: the worker pool that it serves.
        retention: seconds for which tasks that ended in a status are kept; for ever if a status is missing.
    """

    def __init__(self, pool: WorkerPool, retention: Mapping[TaskStatus, float]) -> None:
        self._pool = pool
        self._services = pool.services
        self._timing = pool.services.timing
        #: Finds dead nodes.
        self.recovery = Recovery(pool)
        self._requests = Requests(pool)
        self._audit = Audit(pool)
        self._expiry = Expiry(pool.services)
        self._retention = Retention(pool.services, retention)
        self._ticker = Ticker(pool.services)
        self._agenda = pool.services.agenda
        self._complaint = Complaint(pool.services.log)
        # What the last rounds have found, and since when the present round goes on, on the monotonic clock.
        self._failure = ""
        self._stuck_types: list[Problem] = []
        self._began: float | None = None
        self._stopped = False
        self._changed = Changes(pool.services.repository)
        self._listening = Listening(pool)
        self._next_due: int | None = None
        # The time, on the monotonic clock, until which due tasks are left to other nodes.
        self._release_at = -math.inf
        self._last = dict.fromkeys(("poll", "progress", "recover", "audit"), -math.inf)
        self._thread = threading.Thread(target=self._run, name="taskx-housekeeper", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        # A housekeeper whose start failed may have set it.
        self._agenda.due_known = False
        # Signals interrupt only the main thread. If it commits for others, this thread calls the callbacks.
        self._agenda.attended = True
        self._thread.start()
        if self._pool.hears:
            self._listening.start()

    def stop(self) -> None:
        """End the thread; return when it has ended, or at once if called on it."""
        self._stopped = True
        self._listening.stop()
        self._agenda.attended = False
        self._agenda.wake()
        if self._thread is not threading.current_thread() and self._thread.is_alive():
            self._thread.join(self._timing.join_thread_within)
        self._services.watcher.ensure_polling()

    def problems(self) -> list[str]:
        """Return a sentence for all that keeps tasks from running, as far as the last rounds have found it.

        Nothing is read, so the answer comes at once, whatever the repository does.
        """
        began, failure = self._began, self._failure
        if began is not None and (seconds := time.monotonic() - began) > self._timing.answer_within:
            failure = failure or f"it has not answered for {duration(round(seconds))}"
        if failure:
            return [f"The repository cannot be used: {failure}."]
        return [str(problem) for problem in self._stuck_types]

    def _behind(self) -> bool:
        """Return True if a task or a schedule is due that was not dealt with yet."""
        now = self._services.clock.now_ms()
        return bool(self._services.repository.due(now, 1)) or self._ticker.behind(now)

    def stored_left(self) -> bool:
        """Return True if the repository has something to run, including tasks that follow others."""
        repository, types = self._services.repository, set(self._pool.fetcher.types())
        return (
            self._behind()
            or unfinished(repository, types)
            or self._services.dependents.overdue()
            or self._services.turns.overdue()
            or self._behind()  # a task got its turn between the checks, and was due
            or unfinished(repository, types)  # a task was freed between the checks
        )

    def _run(self) -> None:
        failures = 0
        while not self._stopped:
            self._began = time.monotonic()
            try:
                self.tick()
                failures, self._failure = 0, ""
                self._complaint.over()
            except SchemaMismatch as error:
                self._pool.retire(error)
            except RepositoryError as error:
                failures += 1
                self._failure = "" if isinstance(error, Locked) else str(error)
                self._complaint.make(
                    "the repository fails, and the housekeeper tries again: %s", error
                )
            except BaseException:  # a defect of ours: without this thread, nothing is done in time
                failures += 1
                self._services.log.exception("unexpected error in the housekeeper; it continues")
            self._began = None
            self._sleep(failures)

    def _sleep(self, failures: int) -> None:
        if failures:
            pause = self._timing.poll_every * 2.0 ** min(failures, 10)
            pause = min(pause, self._timing.longest_pause)
            self._agenda.sleep(min(pause, self._services.repository.liveness.interval))
        elif self._more_to_do():
            self._agenda.sleep(self._timing.shortest_sleep)
        elif self._services.moves.unsettled or self._pool.needs_care:
            self._agenda.sleep(self._timing.hand_back_after)
        else:
            self._agenda.sleep_long(self._until_next, self._timing.hand_back_after)

    def _until_next(self) -> float:
        """Return the seconds until the next duty is due."""
        timeout, clock = self._timing.poll_every, self._services.clock
        next_tick = None if self._pool.stopping else self._ticker.next
        next_due = None if self._others_release else self._next_due
        for due in (next_due, next_tick):
            if due is not None:
                timeout = min(timeout, (due - clock.now_ms()) / 1000)
        if (next_fetch := self._pool.admission.next_fetch()) is not None:
            timeout = min(timeout, next_fetch - clock.monotonic())
        return max(self._timing.shortest_sleep, timeout)

    def _more_to_do(self) -> bool:
        """Return True if a duty stopped early for the sake of the others."""
        services = self._services
        return (
            services.dependents.waiting
            or services.turns.waiting
            or self.recovery.waiting
            or self._expiry.waiting
            or (not self._pool.stopping and self._ticker.waiting)
        )

    def tick(self) -> None:
        """Do one round: take a step of each duty that is due, and more steps until time is up.

        Whatever a ``RepositoryError`` prevents is done in a later round.
        """
        until = time.monotonic() + self._timing.round_within
        self._agenda.begin_round()
        self._services.repository.liveness.tend(self._pool.node.id)
        try:
            self._services.repository.house.ensure_there()
        except SchemaMismatch as error:  # go on: outcomes must be written in any case
            self._pool.retire(error)
        with suppress(Locked):  # some outcomes are put off, and the other duties go on
            self._services.moves.flush()
        self._services.watcher.tell()
        if self._pool.stuck.ended:
            with suppress(Locked):
                self._pool.stuck.lift()
        with suppress(Locked):
            self._pool.hand_on()
        self._pool.add_workers()
        if self._is_time("progress", self._timing.progress_every):
            self._write_progress()
        self._services.dependents.process(until - time.monotonic())
        self._services.turns.process(until - time.monotonic())
        self._release_due(until)
        if self.recovery.waiting and self.recovery.go_on(until - time.monotonic()):
            self._agenda.more_stored = True
        if self._is_time("recover", self._timing.recover_every):
            self._expiry.waiting = True
            self.recovery.recover(until - time.monotonic())
            self._pool.record()
            self._pool.tuning.tend()
            if not self._polls:
                self._agenda.due_known = False
                self._ticker.refresh_soon()
            self._process_changes()
        elif self._polls and self._is_time("poll", self._timing.poll_every) and self._changed():
            self._agenda.due_known = False
            self._ticker.refresh_soon()
            self._process_changes()
            self._services.watcher.check_all()
        if self._pool.admission.is_time() or self._agenda.look_for_more:
            self._agenda.more_stored = True
            self._pool.fetcher.refill()
        else:
            self._pool.fetcher.refill_if_low()
        if not self._pool.stopping and self._ticker.tick(until - time.monotonic()):
            self._agenda.more_stored = True
            self._pool.fetcher.refill()
        if self._is_time("audit", self._timing.audit_every):
            self._run_audits()
        self._retention.tick()
        if self._expiry.waiting:
            self._expiry.go_on(until - time.monotonic())

    @property
    def _polls(self) -> bool:
        """True if a change by another process must be noticed before the next check for dead nodes."""
        return self._pool.hears or self._services.watcher.watching

    def _run_audits(self) -> None:
        """Check for everything that an event should have reported and did not."""
        self._audit.check()
        self._services.alarms.go_on()
        self._services.moves.retries.tell()
        self._pool.stuck.audit()
        self._stuck_types = self._find_stuck_types()
        self._services.dependents.scan_some()
        self._services.turns.scan_some()
        self._ticker.refresh_soon()
        self._services.watcher.check_all()

    def _find_stuck_types(self) -> list[Problem]:
        services = self._services
        if not self._pool.stuck.runs:  # nothing to say that a node with stuck threads does not say
            return []
        nodes = [node for node in services.repository.nodes() if node.alive is not False]
        return [*stuck_types(services.repository, nodes, services.controls.read_paused())]

    def _is_time(self, what: str, interval: float) -> bool:
        now = time.monotonic()
        if now - self._last[what] < interval * 0.9:
            return False
        self._last[what] = now
        return True

    def _process_changes(self) -> None:
        """Take in the changes of other nodes: controls, new tasks, and requests to cancel."""
        self._pool.tuning.refresh()  # first: a task stored after a pause must not start
        self._requests.process()
        self._agenda.more_stored = True
        self._pool.admission.forget()
        self._services.dependents.refresh()
        self._pool.fire_cancelled()

    def _release_due(self, until: float) -> None:
        services = self._services
        now = services.clock.now_ms()
        if not self._agenda.due_known:
            self._agenda.due_known = True  # first: a task stored from now on clears it again
            try:
                self._next_due = self._earliest_due()
            except BaseException:
                self._agenda.due_known = False
                raise
        while self._next_due is not None and self._next_due <= now and not self._others_release:
            self._release_some(now)
            self._next_due = self._earliest_due()
            if time.monotonic() >= until:
                break

    def _release_some(self, now: int) -> None:
        """Release the next tasks that are due, unless another node has just done so.

        If very many are due, all nodes try the same ones at the same time. The node that releases them goes
        on. The others find them released, and come back a little later, as they do if another transaction
        has locked all of them.
        """
        batch = self._timing.due_batch
        ids = [task_id for task_id, _ in self._services.repository.due(now, batch)]
        if ids:
            writes = [lifecycle.release(task_id) for task_id in ids]
            released = sum(self._services.moves.commit(writes))
            if not released or (len(ids) == batch and 2 * released < batch):
                self._release_at = time.monotonic() + self._timing.poll_every

    @property
    def _others_release(self) -> bool:
        """True if another node was releasing the due tasks a moment ago."""
        return time.monotonic() < self._release_at

    def _earliest_due(self) -> int | None:
        return next((run_at for _, run_at in self._services.repository.due(None, 1)), None)

    def _write_progress(self) -> None:
        store_progress(self._services, list(self._pool.runs.values()))


def unfinished(repository: Repository, types: Collection[str]) -> bool:
    """Return True if a task of these types runs on a node, or is pending and not held back."""
    # A task may move from one state to the other between two reads.
    return _ready(repository, types) or _running(repository, types) or _ready(repository, types)


def _ready(repository: Repository, types: Collection[str]) -> bool:
    free = repository.ready(types, 1)
    return bool(free) or any(kind in types for kind in queries.every(repository, "ready_type"))


def _running(repository: Repository, types: Collection[str]) -> bool:
    nodes = [*queries.every(repository, "running_on")]
    return any(kind in types for (kind,) in repository.find("running_on", nodes, ("type",)))
