"""The housekeeper: a thread that does all work that is due, and reacts to other processes."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import partial

from taskx.node import requests
from taskx.node.audit import Audit
from taskx.node.due import Release, expire
from taskx.node.listening import Listening
from taskx.node.pool import WorkerPool
from taskx.node.progress import store_emitted, store_progress
from taskx.node.recovery import Recovery
from taskx.node.retention import Retention
from taskx.node.stuck import stuck_types
from taskx.node.ticker import Ticker
from taskx.stores import queries
from taskx.stores.base import Locked, Repository
from taskx.stores.queries import Changes
from taskx.tasks.errors import RepositoryError, SchemaMismatch
from taskx.tasks.findings import Problem, duration
from taskx.tasks.log import Complaint
from taskx.tasks.model import TaskStatus


class Duty:
    """A part of what a housekeeper does in its rounds.

    Args:
        name: a word for it.
        step: does some of it, if possible until a time on the monotonic clock; returns True if more is
            left, which the next round does soon.
        every: seconds from one step to the next; 0 for a step in every round.
        due: returns the seconds until a step is needed; None if the regular rounds are soon enough.
    """

    def __init__(
        self,
        name: str,
        step: Callable[[float], object],
        every: float = 0.0,
        due: Callable[[], float] | None = None,
    ) -> None:
        self.name, self.step, self.due = name, step, due
        self.every = every * 0.9  # a round comes seldom at the very moment
        #: The time of the last step, and True if that has left something.
        self.last, self.more = -math.inf, False

    def take(self, now: float, until: float) -> None:
        """Take a step."""
        # First: after an error, other duties come before the next try.
        self.last, self.more = now, False
        if self.step(until):
            self.more = True


class Housekeeper:
    """Does the duties of a node, in rounds. Everything it does can be done twice without harm.

    Args:
        pool: the worker pool that it serves.
        retention: seconds for which tasks that ended in a status are kept; for ever if a status is missing.
        chance: draws the order of schedules that tick at the same time: a number from 0 to 1.
    """

    def __init__(
        self,
        pool: WorkerPool,
        retention: Mapping[TaskStatus, float],
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._pool = pool
        moves, agenda, clock, timing = pool.moves, pool.agenda, pool.clock, pool.timing
        #: Finds dead nodes.
        self.recovery = Recovery(pool)
        self._audit = Audit(pool)
        self._release = Release(moves, agenda, timing)
        self._retention = Retention(moves, clock, pool.log, timing, retention)
        self._ticker = Ticker(moves, agenda, pool.hooks, clock, pool.log, timing, chance)
        self._changed = Changes(moves.repository)
        self._listening = Listening(pool)
        self.duties = self._duties()
        self._dues = [duty.due for duty in self.duties if duty.due is not None]
        self._complaint = Complaint(pool.log, "the housekeeper can use the repository again")
        self._store_at = clock.monotonic() + timing.count_every
        # What the last rounds have found, and since when the present round goes on, on the monotonic clock.
        self._failure = ""
        self._problems: list[Problem] = []
        self._began: float | None = None
        # The time of the last round on the monotonic clock; that of the next duty on the pool's, which a
        # test may move. What comes up in the meantime wakes the thread.
        self._round_at = self._due_at = -math.inf
        # True if the next round must not be left out; True if others have changed something before it.
        self._wanted, self._news = True, False
        # True if other nodes may have come since the last look for them.
        self._may_have_come = True
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="taskx-housekeeper", daemon=True)

    def _duties(self) -> list[Duty]:
        """Return the duties in the order of a round. The comments say where the order matters."""
        pool, moves, timing = self._pool, self._pool.moves, self._pool.timing
        dependents, turns, recovery = moves.dependents, moves.turns, self.recovery
        soon = timing.hand_back_after
        return [
            # First: a late heartbeat costs all tasks.
            Duty("lease", lambda until: moves.repository.liveness.tend(pool.node.id)),
            # Before the first write; but outcomes are written in any case.
            Duty("schema", self._check_schema),
            # Before all that reads the tasks of this node.
            Duty(
                "outcomes",
                # Those of short tasks are left to the next start, which comes soon.
                _unless_locked(lambda: moves.flush(late=pool.ahead.short)),
                due=_when(lambda: moves.unsettled, soon),
            ),
            Duty("handles", lambda until: pool.watcher.tell()),
            # After the outcomes of these tasks.
            Duty("stuck threads", _unless_locked(pool.stuck.lift)),
            # Before the fetch: a task that waits comes first.
            Duty("starts", _unless_locked(pool.hand_on), due=_when(lambda: pool.needs_care, soon)),
            Duty("coroutines", self._look_at_loop, due=_when(self._has_coroutines, 0.5)),
            Duty("workers", lambda until: pool.add_workers()),
            Duty("progress", self._write_progress, timing.progress_every),
            # All that lets tasks start comes before the fetch.
            Duty("parents", dependents.process, due=_when(lambda: dependents.waiting)),
            # After the parents: a task may wait for its turn next.
            Duty("turns", turns.process, due=_when(lambda: turns.waiting)),
            Duty("due tasks", self._release.step, due=self._release.due),
            Duty("buffers of dead nodes", self._free, due=_when(lambda: recovery.waiting)),
            Duty("dead nodes", self._recover, timing.recover_every),
            Duty("record", lambda until: pool.record(), timing.recover_every),
            Duty("types", lambda until: self._listening.follow()),
            Duty("limits", lambda until: pool.tuning.tend(), timing.recover_every),
            # Before the fetch: a task that was stored after a pause must not start.
            Duty("changes", self._take_in, timing.recover_every),
            Duty("news", self._take_in_news, timing.poll_every),
            Duty("fetch", self._fetch, due=self._until_token),
            Duty("ticks", self._tick, due=self._until_tick),
            Duty("counts", _unless_locked(self._store_counts), timing.gather_every),
            # What no event has reported; it may wait for all that an event did report.
            Duty("audit", self._run_audits, timing.audit_every),
            Duty("retention", lambda until: self._retention.tick()),
            Duty("expiry", partial(expire, moves, timing.batch), timing.recover_every),
        ]

    def start(self) -> None:
        """Start the thread."""
        # Signals interrupt only the main thread. If it commits for others, this thread calls the callbacks.
        self._pool.agenda.attend()
        self._thread.start()
        if not self._pool.node.serves_broker:  # else it hears of changes twice a second
            self._listening.start()

    def stop(self) -> None:
        """End the thread; return when it has ended, or at once if called on it."""
        self._stopped = True
        self._listening.stop()
        self._pool.agenda.leave()
        if self._thread is not threading.current_thread() and self._thread.is_alive():
            self._thread.join(self._pool.timing.join_thread_within)
        self._pool.watcher.ensure_polling()

    def problems(self) -> list[str]:
        """Return a sentence for all that keeps tasks from running, as far as the last rounds have found it.

        Nothing is read, so the answer comes at once, whatever the repository does.
        """
        began, failure = self._began, self._failure
        if (
            began is not None
            and (seconds := time.monotonic() - began) > self._pool.timing.answer_within
        ):
            failure = failure or f"it has not answered for {duration(round(seconds))}"
        if failure:
            return [f"The repository cannot be used: {failure}."]
        return [str(problem) for problem in self._problems]

    def _behind(self) -> bool:
        """Return True if a task or a schedule is due that was not dealt with yet."""
        now = self._pool.clock.now_ms()
        return bool(self._pool.moves.repository.due(now, 1)) or self._ticker.behind(now)

    def stored_left(self) -> bool:
        """Return True if the repository has something to run, including tasks that follow others."""
        self._pool.tuning.refresh()  # another node may have resumed a type
        repository, types = self._pool.moves.repository, set(self._pool.fetcher.types())
        return (
            self._behind()
            or unfinished(repository, types)
            or self._pool.moves.dependents.overdue()
            or self._pool.moves.turns.overdue()
            or self._behind()  # a task got its turn between the checks, and was due
            or unfinished(repository, types)  # a task was freed between the checks
        )

    def _run(self) -> None:
        failures = 0
        while not self._stopped:
            self._began = time.monotonic()
            try:
                if self._is_needed():
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
                self._pool.log.exception("unexpected error in the housekeeper; it continues")
            self._began = None
            try:
                self._sleep(failures)
            except BaseException:  # a defect of ours: as above
                self._pool.log.exception("unexpected error in the housekeeper; it continues")
                time.sleep(self._pool.timing.poll_every)

    def _is_needed(self) -> bool:
        """Return True if the next round may find something: an idle node leaves out most of its rounds."""
        timing = self._pool.timing
        if (
            self._wanted
            or self._pool.runs
            or time.monotonic() - self._round_at >= timing.recover_every
            or self._pool.clock.monotonic() >= self._due_at - timing.hand_back_after
        ):
            return True
        self._news = self._polls and self._changed()
        return self._news

    def _sleep(self, failures: int) -> None:
        agenda, timing = self._pool.agenda, self._pool.timing
        self._wanted = True
        if failures:
            pause = min(timing.poll_every * 2.0 ** min(failures, 10), timing.longest_pause)
            agenda.sleep(min(pause, self._pool.moves.repository.liveness.interval))
        else:
            self._wanted = agenda.sleep_long(self._until_next, timing.hand_back_after)

    def _until_next(self) -> float:
        """Return the seconds until the next round: as long as none is needed, it polls."""
        timing, now = self._pool.timing, self._pool.clock.monotonic()
        if self._due_at == -math.inf:  # nobody has looked ahead since the last round
            more = any(duty.more for duty in self.duties)
            self._due_at = now + (0.0 if more else min([due() for due in self._dues]))
        # Rounded: a billionth of a second more than a short sleep would be a long one, which others end.
        return max(timing.shortest_sleep, min(timing.poll_every, round(self._due_at - now, 6)))

    def tick(self) -> None:
        """Do one round: take a step of each duty that is due, and more steps until time is up.

        Whatever a ``RepositoryError`` prevents is done in a later round.
        """
        now = self._round_at = time.monotonic()
        until = now + self._pool.timing.round_within
        self._pool.agenda.begin_round()
        self._due_at = -math.inf
        for duty in self.duties:
            if duty.more or now - duty.last >= duty.every:
                duty.take(now, until)

    # --- the duties

    def _check_schema(self, until: float) -> None:
        try:
            self._pool.moves.repository.house.ensure_there()
        except SchemaMismatch as error:  # go on: outcomes must be written in any case
            self._pool.retire(error)

    def _store_counts(self) -> None:
        counts, timing = self._pool.moves.counts, self._pool.timing
        now = self._pool.clock.monotonic()
        counts.gather()
        if now >= self._store_at or counts.fresh >= timing.most_uncounted:
            self._store_at = now + timing.count_every
            counts.store()

    def _write_progress(self, until: float) -> None:
        runs = list(self._pool.runs.values())
        store_progress(runs, self._pool.moves, self._pool.hooks, self._pool.clock)
        store_emitted(runs, self._pool.moves.repository)

    def _free(self, until: float) -> None:
        if self.recovery.go_on(until):
            self._pool.agenda.expect_more()

    def _recover(self, until: float) -> None:
        # A node that comes stores its record, which is news.
        if self._may_have_come or not self.recovery.alone:
            self._may_have_come = not self._polls
            self.recovery.recover(until)

    def _take_in(self, until: float) -> None:
        """Take in what other nodes have changed, whether or not anything is known to have changed."""
        if not self._polls:
            self._pool.agenda.check_due()
            self._ticker.refresh_soon()
        self._process_changes()

    def _take_in_news(self, until: float) -> None:
        """Take in what other nodes have changed, if anything has changed since the last look."""
        news, self._news = self._news, False
        # What changes after a look that has found news, the next round finds.
        if self._polls and (news or self._changed()):
            self._may_have_come = True
            self._pool.agenda.check_due()
            self._ticker.refresh_soon()
            self._process_changes()
            self._pool.watcher.check_all()

    @property
    def _polls(self) -> bool:
        """True if a change by another process must be noticed before the next check for dead nodes."""
        return not self._pool.node.serves_broker or self._pool.watcher.watching

    def _process_changes(self) -> None:
        """Take in the changes of other nodes: controls, new tasks, and requests to cancel."""
        self._pool.tuning.refresh()  # first: a task stored after a pause must not start
        requests.obey(self._pool)
        self._pool.agenda.expect_more()
        self._pool.admission.forget()
        self._pool.moves.dependents.refresh()
        self._pool.fire_cancelled()

    def _fetch(self, until: float) -> None:
        if self._pool.admission.is_time() or self._pool.agenda.look_for_more:
            self._pool.agenda.expect_more()
            if not self._pool.fetcher.refill():
                # The fetch of another thread may have read before a task came.
                self._pool.agenda.wake_from_long_sleep()
        else:
            self._pool.fetcher.refill_if_low()

    def _until_token(self) -> float:
        """Return the seconds until a limit lets another task start."""
        moment = self._pool.admission.next_fetch()
        return math.inf if moment is None else moment - self._pool.clock.monotonic()

    def _tick(self, until: float) -> bool:
        if self._pool.stopping:
            return False
        if self._ticker.tick(until):
            self._pool.agenda.expect_more()
            self._pool.fetcher.refill()
        return self._ticker.waiting

    def _until_tick(self) -> float:
        """Return the seconds until the next tick of a schedule, or until schedules are read again."""
        ticker = self._ticker
        if self._pool.stopping:
            return math.inf
        if ticker.waiting:
            return 0.0
        tick = ticker.next
        until = math.inf if tick is None else (tick - self._pool.clock.now_ms()) / 1000
        return min(until, ticker.until_refresh())

    def _run_audits(self, until: float) -> None:
        """Check for everything that an event should have reported and did not."""
        self._audit.check()
        self._pool.runner.alarms.go_on()
        self._pool.moves.retries.tell()
        self._pool.stuck.audit()
        self._problems = [*self._pool.moves.repository.house.problems(), *self._stuck_types()]
        self._may_have_come = True
        self._pool.moves.dependents.scan_some()
        self._pool.moves.turns.scan_some()
        self._pool.agenda.check_due()
        self._ticker.refresh_soon()
        self._pool.watcher.check_all()

    def _has_coroutines(self) -> bool:
        loop = self._pool.runner.loop
        return loop is not None and bool(loop.running)

    def _look_at_loop(self, until: float) -> None:
        if (loop := self._pool.runner.loop) is not None:
            loop.look()

    def _stuck_types(self) -> list[Problem]:
        repository = self._pool.moves.repository
        if not self._pool.stuck.runs:  # nothing to say that a node with stuck threads does not say
            return []
        nodes = [node for node in repository.nodes() if node.alive is not False]
        return [*stuck_types(repository, nodes, self._pool.controls.read_paused())]


def _unless_locked(do: Callable[[], object]) -> Callable[[float], None]:
    """Return the step of a duty that leaves what another transaction has locked to a later round."""

    def step(until: float) -> None:
        with suppress(Locked):  # the other duties go on
            do()

    return step


def _when(holds: Callable[[], object], seconds: float = 0.0) -> Callable[[], float]:
    return lambda: seconds if holds() else math.inf


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
