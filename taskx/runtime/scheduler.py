"""The one thread that looks after time, other processes, and what nobody else has a hand free for."""

from __future__ import annotations

import math
import threading
import time

from taskx.core import lifecycle
from taskx.core.errors import RepositoryError, SchemaMismatch
from taskx.core.token import CancelReason
from taskx.runtime.bell import Signal
from taskx.runtime.engine import AHEAD_PATIENCE, Engine
from taskx.runtime.recovery import Recovery
from taskx.runtime.retention import Retention
from taskx.runtime.ticker import Ticker
from taskx.storage.base import Changes

#: Seconds between looks for what other processes changed, and between writes of progress.
POLL = 0.06
PROGRESS_EVERY = 0.1
#: Seconds between looks for dead nodes, and between audits of one's own tasks.
RECOVER_EVERY = 0.5
AUDIT_EVERY = 2.0
#: Most seconds that a round spends on any one duty. The rest is left to the next round, which follows at
#: once; so no duty keeps the others waiting for longer than a round.
PATIENCE = 0.1
#: Tasks that are released in one transaction.
MOST_DUE = 1000
_LONGEST_BACKOFF = 2.0
# Seconds that it sleeps at least.
_SHORTEST = 0.001


class Scheduler:
    """Calls :meth:`tick` again and again; all that it does can be done twice without harm.

    Args:
        engine: what it keeps going.
        recovery: what it lets look for dead nodes.
        retention: what it lets remove old tasks.
        ticker: what it lets make the tasks of schedules.
    """

    def __init__(
        self, engine: Engine, recovery: Recovery, retention: Retention, ticker: Ticker
    ) -> None:
        self._engine = engine
        self._services = engine.services
        self._recovery = recovery
        self._retention = retention
        self._ticker = ticker
        self._wake_up = Signal()
        self._asleep_long = False
        self._told = False  # to wake from a long sleep, since the last round began
        self._stopped = False
        self._changed = Changes(engine.services.repository)
        self._next_due: int | None = None
        self._due_known = False
        self._last = dict.fromkeys(("poll", "progress", "recover", "audit"), -math.inf)
        self._thread = threading.Thread(target=self._run, name="taskx-scheduler", daemon=True)
        engine.wake_scheduler = self.wake_from_long_sleep
        engine.look_for_due = self.look_for_due
        engine.services.dependents.wake = self.wake_from_long_sleep
        engine.services.dependents.released = self._tasks_released
        engine.services.lines.moved = self._tasks_released
        engine.look_for_schedules = self.look_for_schedules

    def start(self) -> None:
        """Start the thread."""
        # A signal strikes the main thread alone: what it commits for others is told by this one.
        self._services.ledger.leave_to_others = self.wake_from_long_sleep
        self._thread.start()

    def stop(self) -> None:
        """End the thread; returns when it has ended, or at once if called on it."""
        self._stopped = True
        self._services.ledger.leave_to_others = None
        self.wake()
        if self._thread is not threading.current_thread() and self._thread.is_alive():
            self._thread.join(5.0)

    def wake(self) -> None:
        """Have the next tick now."""
        self._wake_up.set()

    def wake_from_long_sleep(self) -> None:
        """Have it tick every few milliseconds from now on, as long as something waits for it."""
        self._told = True
        if self._asleep_long:
            self._asleep_long = False
            self.wake()

    def look_for_due(self) -> None:
        """A delayed task was stored: look when it is due, and wake in time."""
        self._due_known = False
        self.wake()

    def _tasks_released(self) -> None:
        """Tasks that waited for others may start, or may be due some time."""
        self._engine.more_stored = True
        self.look_for_due()

    def look_for_schedules(self, name: str | None = None) -> None:
        """A schedule, of this name if it is known, was changed: look when it ticks, and wake in time."""
        self._ticker.look(name)
        self.wake()

    def behind(self) -> bool:
        """Whether the time of a task, or of a schedule, has come, and it has not looked after that yet.

        Raises:
            RepositoryError: the repository failed.
        """
        now = self._services.clock.now_ms()
        due = self._services.repository.next_due()
        return (due is not None and due <= now) or self._ticker.behind(now)

    def _run(self) -> None:
        failures = 0
        while not self._stopped:
            try:
                self.tick()
                failures = 0
            except SchemaMismatch as error:
                self._engine.retire(error)
            except RepositoryError as error:
                failures += 1
                if failures & (failures - 1) == 0:  # the 1st, 2nd, 4th, 8th …
                    self._services.log.warning("the repository fails the scheduler: %s", error)
            except BaseException:  # a defect of ours: without this thread, nothing would be in time
                failures += 1
                self._services.log.exception("the scheduler stumbled; it goes on")
            self._sleep(failures)

    def _sleep(self, failures: int) -> None:
        if failures:
            timeout = min(POLL * 2.0 ** min(failures, 10), _LONGEST_BACKOFF)
        elif self._more_to_do():
            timeout = _SHORTEST
        elif self._services.ledger or self._engine.buffer.needs_care():
            timeout = AHEAD_PATIENCE
        else:
            self._asleep_long = True
            timeout = AHEAD_PATIENCE if self._told else POLL
            next_tick = None if self._engine.stopping else self._ticker.next
            for due in (self._next_due, next_tick):
                if due is not None:
                    until_due = (due - self._services.clock.now_ms()) / 1000
                    timeout = min(timeout, max(_SHORTEST, until_due))
            if (next_token := self._engine.admission.next_look()) is not None:
                until_token = next_token - self._services.clock.monotonic()
                timeout = min(timeout, max(_SHORTEST, until_token))
        self._wake_up.wait(timeout)
        self._asleep_long = False

    def _more_to_do(self) -> bool:
        """Return whether a duty was cut short for the sake of the others."""
        services = self._services
        return services.dependents.waiting or services.lines.waiting or self._recovery.waiting

    def tick(self) -> None:
        """One round of everything that is due, a while of each.

        Raises:
            RepositoryError: the repository failed; what was not done is done in a later round.
        """
        self._told = False
        try:
            self._services.repository.ensure_there()
        except SchemaMismatch as error:  # what ends meanwhile is written all the same
            self._engine.retire(error)
        self._services.ledger.flush()
        self._services.watcher.tell()
        if self._engine.stuck.ended:
            self._engine.stuck.lift()
        if not self._engine.buffer.nudge():
            self._engine.starter.hand_back(
                self._engine.buffer.clear_ahead(AHEAD_PATIENCE), rebuffer=True
            )
        if self._is_time("progress", PROGRESS_EVERY):
            self._write_progress()
        self._services.dependents.look(PATIENCE)
        self._services.lines.look(PATIENCE)
        self._release_due(PATIENCE)
        if self._recovery.waiting and self._recovery.go_on(PATIENCE):
            self._engine.more_stored = True
        if self._is_time("recover", RECOVER_EVERY):
            if self._recovery.recover(PATIENCE):
                self._engine.more_stored = True
            self._engine.record_types()
            self._engine.look_for_pauses()
            self._engine.admission.tend()
            self._look_around()
        elif self._is_time("poll", POLL) and self._changed():
            self._due_known = False
            self._ticker.look_soon()
            self._look_around()
            self._services.watcher.look()
        if self._engine.admission.is_time() or self._engine.more_stored:
            self._engine.more_stored = True
            self._engine.refill()
        if not self._engine.stopping and self._ticker.tick(PATIENCE):
            self._engine.more_stored = True
            self._engine.refill()
        if self._is_time("audit", AUDIT_EVERY):
            self._audit()
        self._retention.tick()

    def _audit(self) -> None:
        """Look for what no event told of."""
        self._recovery.audit()
        self._services.alarms.go_on()
        self._engine.stuck.audit()
        self._services.dependents.look_slowly(PATIENCE)
        self._services.lines.look_slowly()
        self._ticker.look_soon()
        self._services.watcher.look()

    def _is_time(self, what: str, interval: float) -> bool:
        now = time.monotonic()
        if now - self._last[what] < interval * 0.9:
            return False
        self._last[what] = now
        return True

    def _look_around(self) -> None:
        """See what others on the repository did: new work, and requests to cancel."""
        self._engine.more_stored = True
        self._engine.admission.forget()
        self._services.dependents.look_around()
        runs = self._engine.runs
        for task_id in self._services.repository.asked_to_cancel(list(runs)) if runs else ():
            if (run := runs.get(task_id)) is not None:
                run.token.fire(CancelReason.CANCEL)

    def _release_due(self, patience: float) -> None:
        services = self._services
        until = time.monotonic() + patience
        now = services.clock.now_ms()
        if not self._due_known:
            self._due_known = True  # before looking: a task stored from now on clears it again
            self._next_due = services.repository.next_due()
        while self._next_due is not None and self._next_due <= now:
            ids = services.repository.due(now, MOST_DUE)
            if ids:
                services.ledger.commit([lifecycle.release(task_id) for task_id in ids])
                self._engine.more_stored = True
            self._next_due = services.repository.next_due()
            if time.monotonic() >= until:
                break

    def _write_progress(self) -> None:
        told = []
        writes = []
        for run in list(self._engine.runs.values()):
            if (new := run.context.new_progress()) is not None:
                told.append((run, *new))
                writes.append(lifecycle.progress(run.task.id, run.task.starts, *new))
        if not writes:
            return
        try:
            results = self._services.ledger.commit(writes)
        except BaseException:
            for run, *_ in told:
                run.context.progress_unwritten()
            raise
        hooks = self._services.hooks
        if hooks.progressed:
            for (run, *facts), write, held in zip(told, writes, results, strict=True):
                if held:
                    changes = run.context.shown(write.changes)
                    hooks.tell_changed(hooks.progressed, run.task, changes, *facts)
