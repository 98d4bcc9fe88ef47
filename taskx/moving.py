"""The consequences of moves, in one table, and the services that the parts of a queue share.

Code that makes a move commits it with :meth:`Consequences.commit`. Code that commits a move in another way
calls :meth:`~Consequences.created` or :meth:`~Consequences.follow` after the commit.

All consequences can be repeated without harm, and an interrupt may cut them short. The slow scans of the
housekeeper find what was missed.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Any, NamedTuple, Protocol

from taskx.common.bell import Agenda
from taskx.common.controls import Controls
from taskx.common.hooks import Hook, Hooks
from taskx.common.ledger import Ledger
from taskx.common.watcher import Watcher
from taskx.core import lifecycle
from taskx.core.clock import Clock
from taskx.core.errors import RepositoryError, TaskxError
from taskx.core.lifecycle import CANCELLED, COMPLETED, FAILED, PENDING, RUNNING, Ending
from taskx.core.log import Digest, GuardedLogger
from taskx.core.model import Task
from taskx.core.record import FOR_TURN, FREE, UNTIL_DUE, changed_task, created_task
from taskx.core.redact import SECRETS, show
from taskx.core.timing import Timing
from taskx.core.writes import Delete, Insert, Update, Write
from taskx.executing.alarms import Alarms
from taskx.executing.checkpoints import Keeper
from taskx.executing.registry import Registry
from taskx.executing.runner import Run, Runner
from taskx.ordering import Dependents, Turns
from taskx.storage.base import Repository


class _Node(Protocol):
    """The methods of a started node that moves of tasks need."""

    def discard(self, task_ids: Iterable[str]) -> None: ...
    def fire(self, task_id: str) -> None: ...
    def rebuffer(self, task: Task) -> None: ...


class Follows(NamedTuple):
    """The consequences of a move.

    Attributes:
        event: the hook method that is called, besides ``finished``; empty for none.
        facts: names of the further arguments of that method, from :func:`_facts`.
        ends: True if the task has ended or was deleted. Then these are told: the hooks (``finished``), the
            threads that wait for it, its dependents, and the next task of its concurrency key.
        may_start: True if the task may start, now or when the reason for holding it has passed.
        leaves: True if the task leaves the buffer of this process.
        fires: True if the task's token fires, if it runs in this process.
        level: the level of the log message.
        words: the log message, with placeholders for :func:`_facts`.
        digest: True if only the number of these moves is logged at that level, once a minute for each type
            of tasks, and the others at INFO.
    """

    event: str = ""
    facts: tuple[str, ...] = ()
    ends: bool = False
    may_start: bool = False
    leaves: bool = False
    fires: bool = False
    level: int = logging.DEBUG
    words: str = ""
    digest: bool = False


NOTHING = Follows()
_PARAMS = " (params=%(params)s)"
_ENDED = Follows(ends=True, words="task %(id)s (%(type)s) %(status)s")
_FAILED = Follows(
    ends=True,
    level=logging.ERROR,
    words=f"task %(id)s (%(type)s) failed: %(error)s{_PARAMS}\n%(traceback)s",
)
_ORPHANED = Follows(
    ends=True, level=logging.WARNING, words="task %(id)s (%(type)s) is %(status)s: %(error)s"
)
_DIED = "task %(id)s was running on %(node)s, which died: "
_RESCUED, _LOST = f"{_DIED}it runs again", f"{_DIED}it has failed and is a dead letter{_PARAMS}"
_RETRIED = (
    "task %(id)s (%(type)s) is retried %(when)s after attempt %(attempt)d: %(error)s" + _PARAMS
)
_RETRIES = "%(type)s: %(count)d retries in the last minute, the last one: "
_CANCELLED = f"{_DIED}it is cancelled, as requested"

#: The consequences of each move, by its name and its new status (None if the status does not change).
#: The code that forgets a run tells the limits that it is over: see :meth:`Consequences.follow`.
FOLLOWS: Mapping[tuple[str, str | None], Follows] = {
    # The code that stores a task that is not held puts it into the buffer, or calls ``fetch_soon``.
    ("create", None): Follows("submitted", may_start=True),
    # The task is ready for a worker that waits.
    ("create", RUNNING): Follows("submitted"),
    # Hooks are told when a thread begins to execute the task: see Consequences.begun.
    ("start", RUNNING): NOTHING,
    ("progress", None): Follows("progressed", ("progress", "message")),
    ("checkpoint", None): NOTHING,
    ("complete", COMPLETED): _ENDED,
    ("fail", FAILED): _FAILED,
    ("retry", PENDING): Follows(
        "retried",
        ("error", "delay"),
        may_start=True,
        level=logging.WARNING,
        words=_RETRIED,
        digest=True,
    ),
    ("snooze", PENDING): Follows(
        "snoozed",
        ("snooze",),
        may_start=True,
        level=logging.INFO,
        words="task %(id)s (%(type)s) asked to run again in %(snooze)g s",
    ),
    ("interrupt", PENDING): Follows(
        "interrupted",
        may_start=True,
        level=logging.INFO,
        words="task %(id)s (%(type)s) was interrupted and is pending again",
    ),
    ("hand back", PENDING): Follows(may_start=True),
    ("cancelled", CANCELLED): _ENDED,
    ("crash", PENDING): Follows(
        "rescued",
        may_start=True,
        level=logging.WARNING,
        words=f"task %(id)s (%(type)s) crashed, it runs again: %(error)s{_PARAMS}",
    ),
    ("crash", FAILED): _FAILED._replace(event="rescued"),
    ("crash", CANCELLED): _ENDED._replace(event="rescued"),
    ("rescue", PENDING): Follows("rescued", may_start=True, level=logging.WARNING, words=_RESCUED),
    ("rescue", FAILED): Follows("rescued", ends=True, level=logging.ERROR, words=_LOST),
    ("rescue", CANCELLED): Follows("rescued", ends=True, level=logging.WARNING, words=_CANCELLED),
    ("cancel", CANCELLED): Follows(ends=True, leaves=True),
    ("request cancel", None): Follows(fires=True),
    ("expire", CANCELLED): Follows(
        ends=True,
        leaves=True,
        level=logging.INFO,
        words="task %(id)s (%(type)s) is %(status)s: %(error)s",
    ),
    ("orphan", CANCELLED): _ORPHANED,
    ("orphan", FAILED): _ORPHANED,
    ("parents moved", None): Follows(may_start=True),
    ("give turn", None): Follows(may_start=True),
    ("release", None): Follows(may_start=True),
    ("lift bar", None): Follows(may_start=True),
    ("requeue", PENDING): Follows("requeued", may_start=True),
    # The task is fetched again, because its new priority gives it another place in the buffer.
    ("replace", None): Follows(may_start=True, leaves=True),
    # A node takes tasks that it can start, and frees the others.
    ("take", None): NOTHING,
    ("free", None): NOTHING,
    ("release key", None): NOTHING,
    ("delete", None): Follows(ends=True, leaves=True),
    # These tasks had ended, and no other task needs them.
    ("prune", None): NOTHING,
    ("discard", None): NOTHING,
}


def _submitted_task(insert: Insert) -> Task:
    return created_task(lifecycle.as_submitted(insert))


def _row(write: Write) -> Follows:
    return FOLLOWS[write.move, write.changes.get("status")]


class _State(Protocol):
    @property
    def pool(self) -> _Node | None: ...


class Consequences:
    """Commits moves and applies their consequences; ``state`` has the started node."""

    def __init__(self, services: Services, state: _State) -> None:
        self._repository = services.repository
        self._ledger = services.ledger
        self._hooks = services.hooks
        self._watcher = services.watcher
        self._agenda = services.agenda
        self._log = services.log
        self._redact = services.redact
        self._state = state
        #: Logs the retries.
        self.retries = Digest(self._log, _RETRIED, _RETRIES, services.clock.monotonic)
        self.turns = Turns(self._repository, self.commit, self._log, services.timing.batch)
        self.dependents = Dependents(
            self._repository,
            self.commit,
            self._agenda,
            services.clock,
            self._log,
            services.timing,
        )

    def commit(
        self, writes: Sequence[Update | Delete], tasks: Mapping[str, Task] | None = None
    ) -> Sequence[bool]:
        """Commit moves, and apply the consequences of those that took place.

        Args:
            writes: the moves.
            tasks: the tasks as they were read, by id; None if they were not read.

        Returns:
            for each move, True if it took place.

        Raises:
            RepositoryError: no move was applied.
        """
        results = self._ledger.commit(writes)
        if done := [write for write, held in zip(writes, results, strict=True) if held]:
            known = self._to_be_told(done) if tasks is None else tasks
            self.follow(done, known)
        return results

    def _to_be_told(self, writes: Sequence[Update | Delete]) -> Mapping[str, Task]:
        """Read tasks known only by their ids, if hooks must be told that they have finished."""
        ids = [write.id for write in writes if _row(write).ends]
        if not (ids and self._hooks.finished):
            return {}
        try:
            return self._repository.get_many(ids)
        except RepositoryError as error:
            some = ", ".join(ids[:10])
            self._log.warning("cannot tell hooks that tasks have finished: %s: %s", some, error)
            return {}

    def created(self, inserts: Sequence[Insert]) -> None:
        """Apply the consequences of storing new tasks."""
        if listeners := self._hooks.submitted:
            for insert in inserts:
                self._hooks.tell(listeners, partial(_submitted_task, insert))
        if held := [insert for insert in inserts if insert.row["held"]]:
            self._may_start(held, {})
            if self.dependents.told:
                self.process_if_unattended()

    def refused(self, insert: Insert, error: TaskxError) -> None:
        """Tell hooks that a new task was not stored."""
        if listeners := self._hooks.refused:
            self._hooks.tell(listeners, partial(_submitted_task, insert), error)

    def lease_lost(self, node: str) -> None:
        """Tell hooks that this node has lost its lease."""
        if listeners := self._hooks.lease_lost:
            self._hooks.tell(listeners, lambda: node)

    def ticks_missed(self, schedule: str, since: datetime) -> None:
        """Tell hooks that no queue ran at ticks of a schedule."""
        if listeners := self._hooks.ticks_missed:
            self._hooks.tell(listeners, lambda: schedule, since)

    def begun(self, task: Task) -> None:
        """Tell hooks that a thread begins to execute a task."""
        if listeners := self._hooks.started:
            self._hooks.tell(listeners, partial(changed_task, task, {}))

    def follow(
        self,
        writes: Sequence[Update | Delete],
        tasks: Mapping[str, Task],
        ending: Ending | None = None,
        run: Run | None = None,
        over: Callable[[Run, bool], object] | None = None,
    ) -> None:
        """Apply the consequences of moves that took place.

        Args:
            writes: the moves.
            tasks: the tasks that were read, by id.
            ending: how the attempt ended; None if no attempt ended.
            run: the run that the moves belong to; None if it is not a run of this process.
            over: forgets the run. It is called after hooks, dependents and turns were told: they must know
                before anyone sees that nothing runs, and before the next attempt begins. It is called
                before the task may start again.
        """
        try:
            turns, rows = False, [(write, _row(write)) for write in writes]
            for write, follows in rows:
                if self._hooks.moves and write.id in tasks:
                    self._tell_hooks(follows, tasks[write.id], write.changes, ending, run)
                if follows.ends and (self.dependents.any or not self._agenda.attended):
                    self.dependents.parent_ended(write.id)
                if "turn" in write.changes or write.move == "delete":
                    turns = True
            if turns:
                self._leave_turns(writes, tasks)
        finally:
            if over is not None and run is not None:
                over(run, True)
        log, watched, may_start = self._log, self._watcher.watched, False
        for write, follows in rows:
            if follows.words and log.isEnabledFor(follows.level) and write.id in tasks:
                self._log_move(follows, tasks[write.id], write.changes, ending)
            if follows.ends and write.id in watched:
                self._watcher.resolve(write.id)
            if follows.leaves and (node := self._state.pool) is not None:
                node.discard([write.id])
            if follows.fires and (node := self._state.pool) is not None:
                node.fire(write.id)
            may_start = may_start or follows.may_start
        if may_start:
            self._may_start(writes, tasks)

    def _log_move(
        self, follows: Follows, task: Task, changes: Mapping[str, Any], ending: Ending | None
    ) -> None:
        facts = _facts(task, changes, ending)
        if _PARAMS in follows.words:
            facts["params"] = show(task.params, self._redact)
        if follows.digest:
            self.retries.add(task.type, facts)
        else:
            self._log.log(follows.level, follows.words, facts)

    def _tell_hooks(
        self,
        follows: Follows,
        task: Task,
        changes: Mapping[str, Any],
        ending: Ending | None,
        run: Run | None,
    ) -> None:
        hooks = self._hooks
        shown = changes if run is None else run.context.shown(changes)
        make = partial(changed_task, task, shown)
        if ending is not None and ending.stuck and hooks.stuck:
            hooks.tell(hooks.stuck, make)
        if follows.event and (listeners := getattr(hooks, follows.event)):
            facts = _facts(task, changes, ending) if follows.facts else {}
            hooks.tell(listeners, make, *(facts[name] for name in follows.facts))
        if follows.ends and hooks.finished:
            hooks.tell(hooks.finished, make)

    def _leave_turns(self, writes: Sequence[Update | Delete], tasks: Mapping[str, Task]) -> None:
        """Give each free turn to the next task of its key, unless these moves already do so."""
        keys, given = [], set()
        for write in writes:
            turn = write.changes.get("turn", _UNCHANGED)
            if turn is None and (task := tasks.get(write.id)) is not None:
                keys.append(task.concurrency_key)
            elif turn is None or write.move == "delete":
                self.turns.scan_all_soon()  # only the id of the task is known
            else:
                given.add(turn)
        self.turns.advance(key for key in keys if key is not None and key not in given)

    def _may_start(self, writes: Sequence[Write], tasks: Mapping[str, Task]) -> None:
        """Arrange that pending tasks start as soon as the reason for holding them has passed."""
        waiting: dict[str, str] = {}
        keys: list[str] = []
        for write in writes:
            changes = write.changes
            held = changes.get("held", FREE)
            if not _row(write).may_start:
                continue
            if (parent := changes.get("waiting_on")) is not None:
                waiting[write.id] = parent
            elif held == FOR_TURN:
                known = tasks.get(write.id)
                key = changes.get("concurrency_key") if known is None else known.concurrency_key
                keys.append(str(key))
            elif held == UNTIL_DUE:
                self._agenda.check_due_soon()
            elif held == FREE and changes.get("owner") and self._state.pool is not None:
                self._state.pool.rebuffer(tasks[write.id])
            elif held == FREE:
                self._agenda.fetch_soon()
        if waiting:
            self.dependents.waits(waiting)
        if keys:
            self.turns.advance(keys)

    def process_if_unattended(self) -> None:
        """Process dependents and turns now if no housekeeper is running that would do it soon."""
        if self._agenda.attended:
            return
        try:
            self.dependents.process()
            self.turns.process()
        except RepositoryError as error:
            self._log.warning("tasks that wait for other tasks are checked later: %s", error)


_UNCHANGED = object()


def _facts(task: Task, changes: Mapping[str, Any], ending: Ending | None) -> dict[str, Any]:
    """Return the values that log messages and hooks get for a move."""
    node = task.worker.partition(" ")[0] or task.owner  # without the thread
    facts = {"id": task.id, "type": task.type, "attempt": task.attempt, "node": node}
    if ending is not None:
        told = ("error", "traceback", "delay", "snooze")
        facts.update((name, getattr(ending, name)) for name in told)
        facts["when"] = f"in {ending.delay:g} s"
        if ending.stuck:
            later = f", {facts['when']} at the earliest," if ending.delay else ""
            facts["when"] = f"when its stuck thread ends{later}"
    changed = ("status", "error", "traceback", "progress", "message")
    return {**facts, **{name: changes[name] for name in changed if name in changes}}


class Services:
    """The parts that the other parts of a queue share.

    Its class attributes name the classes of the parts that depend on threads and on time. A queue that is
    driven by its caller has classes of its own.
    """

    alarms_class: type[Alarms] = Alarms
    hooks_class: type[Hooks] = Hooks
    run_class: type[Run] = Run
    runner_class: type[Runner] = Runner
    watcher_class: type[Watcher] = Watcher
    #: Draws the order of what is due at the same time: a number from 0 to 1.
    chance: Callable[[], float] = staticmethod(random.random)

    def __init__(
        self,
        repository: Repository,
        registry: Registry,
        hooks: Iterable[Hook],
        state: _State,
        clock: Clock,
        log: GuardedLogger,
        timing: Timing,
        redact: tuple[str, ...] = SECRETS,
    ) -> None:
        self.repository = repository
        self.timing = timing
        self.redact = redact
        self.registry = registry
        self.clock = clock
        self.log = log
        self.agenda = Agenda()
        self.alarms = self.alarms_class(clock, timing)
        self.hooks = self.hooks_class(hooks, log, timing)
        self.ledger = Ledger(repository, log, self.agenda, timing)
        self.watcher = self.watcher_class(repository, log, self.agenda, timing)
        self.controls = Controls(repository)
        self.runner = self.runner_class(clock, self.alarms, registry.max_payload_size)
        self.keeper = Keeper(
            repository, self.ledger, registry.max_payload_size, registry.values, clock, timing
        )
        self.consequences = Consequences(self, state)
        self.turns, self.dependents = self.consequences.turns, self.consequences.dependents
