"""The door for moves, with the consequences of each one.

A move is a write that ``lifecycle`` makes. All code above the storage commits moves through :class:`Moves`,
which does what ``MOVES`` says. So no move can be forgotten by the parts that must hear of it. Notes are not
moves: those about nodes, schedules, pauses and the like are stored by the code that they belong to.

All consequences can be repeated without harm, and an interrupt may cut them short. The slow scans of the
housekeeper find what was missed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import compress
from typing import Any, NamedTuple, Protocol

from taskx.attempt.failures import error_type
from taskx.attempt.runner import Run
from taskx.node.counts import Counts, counted_as
from taskx.node.hooks import Hooks
from taskx.node.ledger import Ledger
from taskx.node.ordering import Dependents, Turns
from taskx.node.shares import Crew, Shares
from taskx.node.watcher import Watcher
from taskx.stores.base import Repository
from taskx.tasks import lifecycle
from taskx.tasks.bell import Agenda, Bell
from taskx.tasks.clock import Clock
from taskx.tasks.errors import RepositoryError
from taskx.tasks.lifecycle import Ending
from taskx.tasks.log import Digest, GuardedLogger
from taskx.tasks.model import Task
from taskx.tasks.moves import MOVES, PARAMS, RETRIED, TRACEBACK, Move
from taskx.tasks.rate import Limit
from taskx.tasks.record import FOR_TURN, FREE, UNTIL_DUE, changed_task, created_task
from taskx.tasks.redact import show
from taskx.tasks.retry import Permanent
from taskx.tasks.timing import Timing
from taskx.tasks.writes import Insert, Write


class _Pool(Crew, Protocol):
    """The parts of a pool that moves of tasks, and the outcomes of its attempts, need."""

    quiet: Bell

    def discard(self, task_ids: Iterable[str]) -> None: ...
    def fire(self, task_id: str) -> bool: ...
    def rebuffer(self, task: Task) -> None: ...

    def refused(self, run: Run, ending: Ending, error: BaseException) -> bool:
        """Store something else in place of an outcome that was refused; return False if nothing is left."""

    def strike(self, run: Run, ran: bool) -> object:
        """Forget a run that is over."""

    def tell_quiet(self) -> None:
        """Wake the threads that wait until nothing is left to run, if that is so."""

    def concluded(self, run: Run, held: Sequence[Write], error: BaseException | None) -> None:
        """Note that a run is over, and which moves of its outcome took place."""


class Outcome(NamedTuple):
    """The end of an attempt of this process.

    Attributes:
        run: the run that made the attempt.
        ending: its end.
        pool: the pool of the run.
    """

    run: Run
    ending: Ending
    pool: _Pool


_RETRIES = "%(type)s: %(count)d retries in the last minute, the last one: "
# The rows of the moves from which something follows, and None for the others, by name and new status.
_ROWS: Mapping[tuple[str, str | None], Move | None] = {
    (move.name, move.target): move if move.has_consequences else None for move in MOVES
}


def _submitted_task(insert: Insert) -> Task:
    return created_task(lifecycle.as_submitted(insert))


class Moves(Ledger[Outcome]):
    """The door: all moves of a queue go to the repository through it.

    - :meth:`commit` commits moves, also those that create tasks.
    - :meth:`later` and :meth:`conclude` commit the outcomes of attempts, and :meth:`flush` those that wait.
    - :meth:`follow` is for moves that a transaction of the program has committed.

    The attributes are those of every :class:`Door`.
    """

    inside = False

    def __init__(
        self,
        repository: Repository,
        agenda: Agenda,
        hooks: Hooks,
        watcher: Watcher,
        clock: Clock,
        log: GuardedLogger,
        timing: Timing,
        redact: tuple[str, ...],
        limit_of: Callable[[str], Limit | None],
        shares: Callable[[], Mapping[str, Limit]],
    ) -> None:
        super().__init__(repository, log, agenda, timing)
        self.repository = repository
        self.now_ms = clock.now_ms
        self._hooks = hooks
        self._watcher = watcher
        self._redact = redact
        self._pool: _Pool | None = None
        #: True if the log showed every task when the last ones were started.
        self.is_told = False
        #: Logs the retries.
        self.retries = Digest(log, RETRIED, _RETRIES, clock.monotonic)
        #: Counts what tasks do.
        self.counts = Counts(repository, clock, limit_of)
        shared = Shares(repository, shares, limit_of, lambda: self._pool, clock)
        self.turns = Turns(self, limit_of, shared, clock, log, timing.batch)
        self.dependents = Dependents(self, agenda, log, timing.batch, timing.scan_batch)

    def after(self, call: Callable[[], object]) -> None:
        """Call a function after the commit, which was a transaction of its own."""
        call()

    def serve(self, pool: _Pool | None) -> None:
        """Tell the pool of a started node of moves of its tasks, from now on; None: tell nobody."""
        self._pool = pool

    def started(self, runs: Iterable[Run], now: int) -> None:
        """Count the starts of attempts, at a time in milliseconds."""
        self.is_told = self._log.isEnabledFor(logging.DEBUG)
        self.counts.started(runs, now)

    def follow(
        self,
        writes: Iterable[Write],
        tasks: Mapping[str, Task] | None,
        outcome: Outcome | None = None,
    ) -> None:
        """Do what follows from writes that are committed.

        Args:
            writes: the writes that took place.
            tasks: the tasks of moves that were read, by id; None if they were not read.
            outcome: the outcome that the moves store; None if they store none. Its run is forgotten after
                hooks, dependents and turns were told: they must know before anyone sees that nothing runs,
                and before the next attempt begins. It is forgotten before the task may start again.
        """
        submitted = self._hooks.submitted
        created: list[Insert] = []
        moved: list[Write] = []
        for write in writes:
            if isinstance(write, Insert):
                if submitted or write.row["held"]:
                    created.append(write)
            elif _ROWS[write.move, write.changes.get("status")] is not None:
                moved.append(write)
        if created:
            self._created(created)
        if moved or outcome is not None:
            self._moved(moved, tasks, outcome)

    def _concluded(
        self,
        outcome: Outcome,
        writes: Sequence[Write],
        results: Sequence[bool],
        error: BaseException | None,
    ) -> None:
        """Do what follows from an outcome that was committed, refused, or dropped (the fence was lost)."""
        run, ending, pool = outcome
        if error is not None and pool.refused(run, ending, error):
            return
        held = [*compress(writes, results)]
        if (
            len(held) == 1
            and held[0].move == "complete"
            and "turn" not in held[0].changes
            and not (self._hooks.moves or self.dependents.any or self.is_told)
            and self._agenda.attended
        ):  # most outcomes: nobody but those who wait for the task must hear of it
            task, counts = run.task, self.counts
            times = counts.run_times.get(task.type)
            if (
                times is None
                or held[0].changes["completed_at"] >= counts.until
                or task.cost
                or run.context._spent
            ):
                counts.completed(run, ending)
            else:
                times.append(ending.duration)
            pool.strike(run, True)
            if pool.quiet.listening and not pool.runs:
                pool.tell_quiet()
            if run.task.id in self._watcher.watched:
                self._watcher.complete(run.task, held[0].changes["result"])
            return
        self._moved(held, {run.task.id: run.task}, outcome)
        pool.concluded(run, held, error)

    def _to_be_told(self, moved: Sequence[tuple[Write, Move]]) -> Mapping[str, Task]:
        """Read tasks known only by their ids, if hooks must be told that they have finished."""
        ids = [write.id for write, row in moved if row.ends]
        if not (ids and self._hooks.finished):
            return {}
        try:
            return self._repository.get_many(ids)
        except RepositoryError as error:
            some = ", ".join(ids[:10])
            self._log.warning("cannot tell hooks that tasks have finished: %s: %s", some, error)
            return {}

    def _created(self, inserts: Sequence[Insert]) -> None:
        if listeners := self._hooks.submitted:
            for insert in inserts:
                if insert.row["type"] in lifecycle.NO_WORK:  # no work was submitted
                    continue
                self._hooks.tell(listeners, partial(_submitted_task, insert))
        if held := [insert for insert in inserts if insert.row["held"]]:
            self._may_start(held, {})
            if self.dependents.told:
                self.process_if_unattended()

    def _moved(
        self,
        writes: Sequence[Write],
        tasks: Mapping[str, Task] | None,
        outcome: Outcome | None,
    ) -> None:
        rows = [_ROWS[write.move, write.changes.get("status")] for write in writes]
        moved = [(write, row) for write, row in zip(writes, rows, strict=True) if row is not None]
        if tasks is None:
            tasks = self._to_be_told(moved)
        turns = False
        try:
            self._count(moved, tasks, outcome)
            for write, row in moved:
                if self._hooks.moves and write.id in tasks:
                    self._tell_hooks(row, tasks[write.id], write.changes, outcome)
                # Another process may have stored the task that waits for an answer.
                told = self.dependents.any or not self._agenda.attended or write.move == "finish"
                if row.ends and told:
                    self.dependents.parent_ended(write.id)
                if "turn" in write.changes or write.move == "delete":
                    turns = True
            if turns:
                self._leave_turns(writes, tasks)
        finally:
            if outcome is not None:
                outcome.pool.strike(outcome.run, True)
        log, watched = self._log, self._watcher.watched
        for write, row in moved:
            if row.words and log.isEnabledFor(row.level) and write.id in tasks:
                self._log_move(row, tasks[write.id], write.changes, outcome)
            if row.ends and write.id in watched:
                if write.move == "complete" and write.id in tasks:
                    self._watcher.complete(tasks[write.id], write.changes["result"])
                else:
                    self._watcher.resolve(write.id)
            if row.leaves and (pool := self._pool) is not None:
                pool.discard([write.id])
            if row.fires and (pool := self._pool) is not None:
                pool.fire(write.id)
        if freed := [write for write, row in moved if row.may_start]:
            self._may_start(freed, tasks)

    def _count(
        self,
        moved: Sequence[tuple[Write, Move]],
        tasks: Mapping[str, Task],
        outcome: Outcome | None,
    ) -> None:
        """Count what tasks did."""
        own, counts, unread = outcome and outcome.run.task.id, self.counts, dict[str, str]()
        for write, row in moved:
            what = counted_as(row.name, row.target)
            if (task := tasks.get(write.id)) is None:
                if what is not None:
                    unread[write.id] = what
            elif outcome is not None and write.id == own:
                counts.ended(what, task.type, task.concurrency_key, outcome.run, outcome.ending)
            elif what is not None:
                counts.ended(what, task.type, task.concurrency_key)
            elif row.name == "hand back":
                counts.handed_back(task)
        if unread:
            try:
                counts.ended_unread(unread)
            except RepositoryError as error:
                self._log.warning("%d ended task(s) are not counted: %s", len(unread), error)

    def _log_move(
        self, row: Move, task: Task, changes: Mapping[str, Any], outcome: Outcome | None
    ) -> None:
        facts, words, level = _facts(task, changes, outcome), row.words, row.level
        if PARAMS in words:
            facts["params"] = show(task.params, self._redact)
        if row.name == "fail" and any(task.id in some for some in self._watcher.reported):
            words, level = words.removesuffix(TRACEBACK), logging.INFO
        elif outcome is not None and outcome.ending.error_type == _PERMANENT:  # it was decided
            words = words.removesuffix(TRACEBACK)
        if row.digest:
            self.retries.add(task.type, facts)
        else:
            self._log.log(level, words, facts)

    def _tell_hooks(
        self, row: Move, task: Task, changes: Mapping[str, Any], outcome: Outcome | None
    ) -> None:
        hooks = self._hooks
        shown = changes if outcome is None else outcome.run.context._shown(changes)
        make = partial(changed_task, task, shown)
        if outcome is not None and outcome.ending.stuck and hooks.stuck:
            hooks.tell(hooks.stuck, make)
        if row.event and (listeners := getattr(hooks, row.event)):
            facts = _facts(task, changes, outcome) if row.facts else {}
            hooks.tell(listeners, make, *(facts[name] for name in row.facts))
        if row.ends and hooks.finished:
            hooks.tell(hooks.finished, make)

    def _leave_turns(self, writes: Sequence[Write], tasks: Mapping[str, Task]) -> None:
        """Give each free turn to the next task of its key, unless these moves already do so."""
        keys, given = [], set()
        for write in writes:
            turn = write.changes.get("turn", _UNCHANGED)
            if turn is None and (task := tasks.get(write.id)) is not None:
                keys.append(task.concurrency_key)
            elif turn is None or write.move == "delete":
                self.turns.scan_all_soon()  # only the id of the task is known
                self._agenda.wake_from_long_sleep()
            else:
                given.add(turn)
        self.turns.advance(
            key for key in keys if key is not None and (key not in given or self.turns.several(key))
        )

    def _may_start(self, writes: Sequence[Write], tasks: Mapping[str, Task]) -> None:
        """Arrange that pending tasks start as soon as the reason for holding them has passed."""
        waiting: dict[str, str] = {}
        keys: list[str] = []
        for write in writes:
            changes = write.changes
            held = changes.get("held", FREE)
            if (parent := changes.get("waiting_on")) is not None:
                waiting[write.id] = parent
            elif held == FOR_TURN:
                known = tasks.get(write.id)
                key = changes.get("concurrency_key") if known is None else known.concurrency_key
                keys.append(str(key))
            elif held == UNTIL_DUE:
                self._agenda.check_due_soon()
            elif held == FREE and changes.get("owner") and (pool := self._pool) is not None:
                if write.id in tasks:
                    pool.rebuffer(tasks[write.id])
                else:
                    self.turns.take_in([write])
            elif held == FREE:
                self._agenda.fetch_soon()
        if waiting:
            self.dependents.waits(waiting)
        if keys:
            self.turns.advance(keys)

    def process_if_unattended(self, *, counts: bool = True) -> None:
        """Process dependents and turns now if no housekeeper is running that would do it soon.

        ``counts`` says that what was counted is stored, too.
        """
        if counts and self._pool is None and self.counts.some:
            with suppress(RepositoryError):  # the next call does
                self.counts.store()
        if self._agenda.attended:
            return
        try:
            self.dependents.process()
            self.turns.process()
        except RepositoryError as error:
            self._log.warning("tasks that wait for other tasks are checked later: %s", error)


_UNCHANGED = object()
_PERMANENT = error_type(Permanent(""))


def _facts(task: Task, changes: Mapping[str, Any], outcome: Outcome | None) -> dict[str, Any]:
    """Return the values that log messages and hooks get for a move."""
    node = task.worker.partition(" ")[0] or task.owner  # without the thread
    facts = {"id": task.id, "type": task.type, "attempt": task.attempt, "node": node}
    if outcome is not None:
        ending = outcome.ending
        told = ("error", "traceback", "delay", "snooze")
        facts.update((name, getattr(ending, name)) for name in told)
        facts["when"] = f"in {ending.delay:g} s"
        if ending.stuck:
            later = f", {facts['when']} at the earliest," if ending.delay else ""
            facts["when"] = f"when its stuck thread ends{later}"
    changed = ("status", "error", "traceback", "progress", "message")
    return {**facts, **{name: changes[name] for name in changed if name in changes}}
