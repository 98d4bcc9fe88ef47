"""Starting: make pending tasks running, hand back those without a free worker, and keep the runs."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import compress
from operator import not_

from taskx.attempt.context import Shared
from taskx.attempt.executors import apply_defaults
from taskx.attempt.registry import Registry
from taskx.attempt.runner import Run, Runner
from taskx.node.admission import Admission, Asking, Names
from taskx.node.buffer import Buffer, Item
from taskx.node.moving import Moves
from taskx.node.place import Place
from taskx.stores.base import Locked
from taskx.stores.controls import Controls
from taskx.stores.liveness.base import Node
from taskx.tasks import lifecycle, unique
from taskx.tasks.bell import Agenda, Bell
from taskx.tasks.clock import to_ms
from taskx.tasks.errors import RepositoryError, TaskxError
from taskx.tasks.log import GuardedLogger
from taskx.tasks.model import Task, TaskStatus
from taskx.tasks.rate import NOTHING, is_key
from taskx.tasks.record import (
    UNTIL_DUE,
    created_task,
    is_plain,
    optional_ms,
    plain_tasks,
)
from taskx.tasks.timing import Timing
from taskx.tasks.writes import Insert, Update


class Runs(dict[str, Run]):
    """Every run, by the id of its task, from before its start until its outcome is committed.

    The ``state`` of a run says how far it is; the audit goes by that. Other structures hold:

    - the pending tasks: the buffer has a line, and slots, which are known by name so that their number is
      right wherever a submit is interrupted;
    - the order of the runs that were started ahead;
    - abandoned attempts, after their outcome: their task may be in flight again, elsewhere.
    """

    @property
    def ids(self) -> list[str]:
        """The ids of their tasks."""
        return list(self.keys())  # in one step, as ``list(self)`` of a subclass is not

    @property
    def executing(self) -> list[Run]:
        """The runs whose executors are being called."""
        return [run for run in list(self.values()) if run.state == "executing"]

    def running(self, task_id: str) -> bool:
        """Return True if the start of a task is committed, and its outcome is not."""
        run = self.get(task_id)
        return run is not None and run.task.status is TaskStatus.RUNNING

    def forget(self, run: Run) -> bool:
        """Forget a run; return False if it was forgotten before."""
        return self.get(run.task.id) is run and self.pop(run.task.id, None) is not None

    def claim(self, run: Run) -> bool:
        """Forget a run that no thread executes; return False if a thread has just begun to.

        A thread that begins sets the state first, and then checks whether the run was forgotten. It may
        have executed the run by the time at which the state is read here.
        """
        if not self.forget(run):
            return False
        if run.state not in ("starting", "ahead"):
            self[run.task.id] = run
            return False
        return True


class Suspects:
    """Suspects: the tasks on their last chance that run in this process. One runs at a time, and alone.

    Neither it nor the others wait for more than ``alone_within`` seconds: they run beside each other when
    the one that began first has run for so long. Only one thread of a node at a time starts stored tasks,
    so only one at a time calls :meth:`admit`.

    Args:
        runs: the runs of the node.
        at_work: the time at which each executing run began.
        put_back: gets the suspects whose turn has come.
        alone_within: the longest wait, in seconds.
    """

    def __init__(
        self,
        runs: Mapping[str, Run],
        at_work: Mapping[Run, float],
        put_back: Callable[[Sequence[Item]], None],
        alone_within: float,
    ) -> None:
        self._runs = runs
        self._alone_within = alone_within
        self._at_work = at_work
        self._put_back = put_back
        #: The suspect that runs, or is about to.
        self.item: Item | None = None
        #: The suspects that wait until that one has ended.
        self.waiting: list[Item] = []
        self._alone_until = -math.inf
        #: Rung when a run has ended.
        self.changed = Bell()
        self._closed = False

    def admit(self, item: Item) -> bool:
        """Return True if this suspect may start now; otherwise it waits."""
        if self.item is not None:
            self.waiting.append(item)
            return False
        self.item = item
        return True

    def go_alone(self) -> None:
        """Wait for the other runs, and hold up further ones, before the admitted suspect starts."""
        now = time.monotonic()

        def until() -> float:
            runs = list(self._runs.values())
            began = (min(self._at_work.get(run, now), now) for run in runs)
            return self._alone_within + max(began, default=-math.inf)

        self._wait(until)
        self._alone_until = time.monotonic() + self._alone_within

    def stand_aside(self) -> None:
        """Wait while a suspect is to run alone, before any task starts."""
        if self.item is not None:
            self._wait(lambda: self._alone_until)

    def ended(self, task_id: str) -> None:
        """Note that a run is over or never began. If it was the suspect's, the next one has its turn."""
        if (item := self.item) is not None and item.id == task_id:
            self._alone_until = -math.inf
            self.item = None
            self.call_next()
        if self.changed.listening:
            self._tell()

    def call_next(self) -> None:
        """Give the turn to a suspect that waits although none runs."""
        if self.waiting and self.item is None:
            with suppress(IndexError):  # another thread called the last one in the meantime
                self._put_back([self.waiting.pop(0)])

    def close(self) -> None:
        """Let no task wait any more, because the node stops."""
        self._closed = True
        self.waiting.clear()
        self._tell()

    def _tell(self) -> None:
        """Wake the threads that wait."""
        self.changed.ring_all()

    def _wait(self, until: Callable[[], float]) -> None:
        """Wait until a time, which comes nearer when runs end."""
        while True:
            ear = self.changed.listen()
            left = until() - time.monotonic()
            if self._closed or left <= 0:
                self.changed.leave(ear)
                return
            self.changed.wait(ear, left)


class Seat(Place):
    """The place of a new task at a worker that waits: it is stored as started, and given to the worker.

    Args:
        starter: the starter of the node.
        write: the write that stores the task as pending.
        still_free: returns False if another task must start first.
        serve: gives the run to a worker; returns False if each may have one already.
    """

    def __init__(
        self,
        starter: Starter,
        write: Insert,
        still_free: Callable[[], bool],
        serve: Callable[[Run], bool],
    ) -> None:
        self.writes: Sequence[Insert] = (write,)
        self._starter, self._still_free, self._serve = starter, still_free, serve
        self._run: Run | None = None

    def reserve(self) -> bool:
        """Make the run of the task; return False if this node must not start it now."""
        starter, registry = self._starter, self._starter._registry
        (write,) = self.writes
        row = write.row
        found = plain_tasks([row]) if is_plain(row) else {}
        task = found.get(row["id"]) or created_task(row)
        apply_defaults([task], registry.registered)
        self._start = lifecycle.start(task, row["created_at"], starter._node, starter._name)
        # The thread that runs a task starts it, if the task must not crash twice.
        if self._start is None or task.max_crashes == 1 or task.type in registry.batches:
            return False
        self.writes = (lifecycle.created_started(write, self._start),)
        self._run = run = starter._make_run(task)
        starter.runs[task.id] = run
        # A task that must run alone waits for all visible runs. So this run is made visible before the
        # check for such a task.
        if not self._still_free():
            self.release(None)
            return False
        return True

    def fill(self) -> None:
        """Give the run to a worker: the task is stored now."""
        assert self._run is not None
        assert self._start is not None
        lifecycle.mark_started([self._run.task], [self._start])
        self._starter._moves.started([self._run], self.writes[0].row["created_at"])
        if not self._serve(self._run):
            self._starter._agenda.wake_from_long_sleep()

    def release(self, error: BaseException | None) -> None:
        """Forget the run: the task was not stored, or ``error`` tells how that ended."""
        if self._run is None:
            return
        if error is None:
            self._starter.strike(self._run)
            self._run = None
        else:
            self._starter.give_up([self._run], error)


class Starter:
    """Starts the tasks of a node, and keeps its runs.

    Args:
        node: the node.
        buffer: receives the tasks that cannot start now.
        runs: the runs of the node.
        admission: decides how many tasks of each limited type may start.
        at_work: the time at which each executing run began.
        moves, controls, agenda, registry, runner, log, timing: as for :class:`WorkerPool`.
        shared: the tools of contexts.
    """

    def __init__(
        self,
        node: Node,
        buffer: Buffer,
        runs: Runs,
        admission: Admission,
        *,
        at_work: Mapping[Run, float],
        moves: Moves,
        controls: Controls,
        agenda: Agenda,
        registry: Registry,
        runner: Runner,
        shared: Shared,
        log: GuardedLogger,
        timing: Timing,
    ) -> None:
        self._moves = moves
        self._controls = controls
        self._agenda = agenda
        self._registry = registry
        self._runner = runner
        self._log = log
        self._free_batch, self._most_unexecuted = timing.free_batch, timing.most_unexecuted
        self._node = node.id
        self._name = node.name
        self._buffer = buffer
        self._admission = admission
        self.runs = runs
        self.suspects = Suspects(runs, at_work, buffer.put_back, timing.alone_within)
        #: Runs that may be stored and that no thread will execute: :meth:`undo` undoes their starts.
        self.unexecuted: list[Run] = []
        self._shared = shared

    def start(self, items: Sequence[Item], worker: str) -> list[Run]:
        """Start as many of these tasks as possible, and return their runs.

        The others must wait, were started by another node, are gone, or have expired and are cancelled.
        ``worker`` is the thread that will run the first one. It is named in the record only of a single
        task: alike starts share a statement.
        """
        by = worker if len(items) == 1 else self._name
        moves, runs, runner = self._moves, self.runs, self._runner
        registry, controls = self._registry, self._controls
        registered = registry.registered
        starting: list[Run] = []
        writes: list[Update] = []
        expired: list[Task] = []
        admitted: Collection[str] = ()
        try:
            self.suspects.stand_aside()
            rows = [item.row for item in items if item.row is not None]
            found = plain_tasks(rows)
            numbers = {row["id"]: row["seq"] for row in rows if "seq" in row}
            if len(found) < len(items):
                unread = [item.id for item in items if item.id not in found]
                found.update(moves.repository.get_many(unread))
            if paused := controls.paused:
                self._turn_away(found, [task for task in found.values() if task.type in paused])
            if registry.limited or registry.rates_keys or controls.holds:
                admitted = self._admit(items, found)
            tasks = self._startable(items, found)
            now = self._moves.now_ms()
            updates = lifecycle.start_all(tasks, now, self._node, by, numbers)
            for task, update in zip(tasks, updates, strict=True):
                if update is not None and task.id not in runs:
                    token = runner.make_token(None, runner.clock)
                    run = Run(task, registered[task.type], token, self._shared, update.seq)
                    starting.append(run)
                    writes.append(update)
                    # Before the start is committed: a cancel after that finds the token.
                    runs[task.id] = run
                elif lifecycle.has_expired(task, now):
                    expired.append(task)
            if expired:
                self._expire(expired, now)
            results = moves.commit(writes) if writes else ()
            started, missed = starting, list[Run]()
            if False in results:
                started = [*compress(starting, results)]
                missed = [*compress(starting, map(not_, results))]
                writes = [*compress(writes, results)]
            lifecycle.mark_started([run.task for run in started], writes)
            for run in missed:
                self.strike(run)
            moves.started(started, now)
            if missed:
                lost = {run.task.id: run.task for run in missed}
                # Records that have changed since their rows were made are read then.
                self._buffer.put_back([item for item in items if item.row and item.id in lost])
                if not all(task.damage for task in lost.values()):  # a damaged one never starts
                    self._agenda.expect_more()  # another node may have started them: there are others
        except BaseException as error:  # an interrupt, too: no other thread knows of these runs
            self.give_up(starting, error)
            raise
        finally:
            suspect = self.suspects.item
            if suspect is not None and suspect in items and suspect.id not in runs:
                self.suspects.ended(suspect.id)
            for task_id in sorted(admitted):  # in an order that a simulation can repeat
                if task_id not in runs:
                    self._admission.over(task_id, ran=False)
        if admitted and missed:
            self._hasten([run.task for run in starting if run.task.id not in runs])
        return started

    def _expire(self, tasks: Sequence[Task], now: int) -> None:
        """Cancel tasks instead of starting them."""
        writes = [write for task in tasks for write in lifecycle.expire(task, now)]
        try:
            self._moves.commit(writes, {task.id: task for task in tasks})
        except RepositoryError as error:  # the others must not wait for these
            self._log.warning("expired tasks are cancelled later: %s", error)

    def _admit(self, items: Sequence[Item], found: dict[str, Task]) -> set[str]:
        """Free the tasks with limits that must not start now; return the ids of the admitted ones."""
        waiting: dict[Names, list[Asking]] = {}
        rated: list[Task] = []
        for item in items:
            task = found.get(item.id)
            if task is None:
                continue
            if task.id in self.runs:  # if that run ends meanwhile, it would start without a token
                del found[task.id]
                continue
            names = self._registry.limited.get(task.type, ())
            if self._may_refuse(task.concurrency_key):
                names = (*names, str(task.concurrency_key))
                rated.append(task)
            if names:
                asking = Asking(task.id, task.cost or NOTHING, lifecycle.is_parked(task))
                waiting.setdefault(names, []).append(asking)
        if not waiting:
            return set()
        admitted = self._admission.admit(waiting)
        ids = [asking.id for some in waiting.values() for asking in some]
        try:
            self._put_off([task for task in rated if task.id not in admitted])
            self._turn_away(found, [found[i] for i in ids if i not in admitted])
        except BaseException:
            for task_id in admitted:
                self._admission.over(task_id, ran=False)
            raise
        return admitted

    def _may_refuse(self, key: str | None) -> bool:
        """Return True if a key has a limit with a rate, or is held."""
        registry, held = self._registry, self._controls.held_until
        if key is None or not is_key(key):
            return False
        limit = registry.limit_of_key(key) if registry.rates_keys else None
        return (limit is not None and bool(limit.rates)) or held(key) > 0

    def _put_off(self, tasks: Sequence[Task]) -> None:
        """Let tasks wait for the rates or holds of their keys: they are fetched no more before that."""
        now, before = self._moves.now_ms(), Counter[str]()
        writes: list[Update] = []
        for task in tasks:
            before[key := str(task.concurrency_key)] += 1
            wait = self._admission.until_rate(key, task.cost or NOTHING, before[key])
            if wait > 0:  # else another limit has refused it
                writes.append(lifecycle.put_off(task, now + math.ceil(1000 * wait)))
        if writes:
            self._moves.commit(writes)

    def _hasten(self, tasks: Sequence[Task]) -> None:
        """Let tasks start soon that another node has put off because this one had taken their tokens.

        Both had such a task: the other one is put off, and this one's start fails.
        """
        rated = {task.id: task for task in tasks if self._may_refuse(task.concurrency_key)}
        with suppress(RepositoryError):  # they start later
            fields = ("id", "held", "run_at")
            found = self._moves.repository.find("id", [*rated], fields) if rated else ()
            writes = []
            for task_id, held, run_at in found:
                key, cost = str(rated[task_id].concurrency_key), rated[task_id].cost or NOTHING
                wait = self._admission.until_rate(key, cost, 1)
                due = self._moves.now_ms() + math.ceil(1000 * wait)
                if held == UNTIL_DUE and run_at > due:
                    writes.append(lifecycle.hasten(rated[task_id], run_at, due))
            if writes:
                self._moves.commit(writes)

    def _startable(self, items: Sequence[Item], found: dict[str, Task]) -> list[Task]:
        """Return the tasks to start now, in order, and put the rest back into the buffer.

        A suspect, a task that must not crash twice, and one whose start frees its unique key are each
        started in a transaction of their own, so not ahead.
        """
        chosen: list[Task] = []
        # A process that only declared a type left some options to the executor.
        apply_defaults(found.values(), self._registry.registered)
        alone = {  # those of a lot run at once in any case
            item.id
            for item in items
            if (task := found.get(item.id)) is not None
            and (
                task.max_crashes == 1 or (task.unique_scope == unique.PENDING and not item.entered)
            )
        }
        for position, item in enumerate(items):
            task = found.get(item.id)
            if task is None:
                continue
            if item.entered and lifecycle.runs_apart(task):
                self._buffer.put_back([item._replace(entered=0.0, apart=True)])
                continue
            suspect = task.crashes > 0 and self._is_suspect(task)
            if not suspect and item.id not in alone:
                chosen.append(task)
            elif chosen:
                self._buffer.put_back([item])
            elif not suspect or self.suspects.admit(item):  # else it waits for its turn
                self._buffer.put_back(
                    one._replace(apart=True) if one.id in alone and not one.entered else one
                    for one in items[position + 1 :]
                )
                return self._alone(task) if suspect else [task]
        return chosen

    def _turn_away(self, found: dict[str, Task], tasks: Sequence[Task]) -> None:
        """Remove tasks that must not start now, and free them."""
        for task in tasks:
            del found[task.id]
        self.free([task.id for task in tasks if task.owner == self._node])

    def free(self, task_ids: Sequence[str]) -> None:
        """Take this node's name off pending tasks, so that any node can fetch them."""
        for start in range(0, len(task_ids), self._free_batch):
            some = task_ids[start : start + self._free_batch]
            self._moves.commit([lifecycle.free(i, self._node) for i in some])

    def _is_suspect(self, task: Task) -> bool:
        """Return True if a task is on its last chance and could crash this process: no child runs it."""
        registered = self._registry.registered
        return lifecycle.last_chance(task) and registered[task.type].options.isolation is None

    def _alone(self, task: Task) -> list[Task]:
        """Wait until nothing else runs, and return a task on its last chance, read again.

        A death that counts must be caused by the task itself. Empty if the task is gone.
        """
        self._log.warning(
            "task %s (%s) runs alone, because its process died %d time(s) while it ran",
            task.id,
            task.type,
            task.crashes,
        )
        self._moves.flush()  # a run is not over until its outcome is written
        self.suspects.go_alone()
        found = self._moves.repository.get_many([task.id])
        apply_defaults(found.values(), self._registry.registered)
        return list(found.values())

    def _make_run(self, task: Task) -> Run:
        runner, executor = self._runner, self._registry.registered[task.type]
        return Run(task, executor, runner.make_token(None, runner.clock), self._shared)

    def strike(self, run: Run, ran: bool = False) -> None:
        """Forget a run that was not executed, or is over; a second call does nothing."""
        runs, task_id = self.runs, run.task.id
        if runs.get(task_id) is not run or runs.pop(task_id, None) is None:  # as Runs.forget
            return
        suspects = self.suspects
        if self._admission.admitted or suspects.item is not None or suspects.changed.listening:
            self._struck(run, ran=ran)

    def claim(self, run: Run) -> bool:
        """Forget a run that no thread executes; return False if a thread has just begun to."""
        if claimed := self.runs.claim(run):
            self._struck(run, ran=False)
        return claimed

    def _struck(self, run: Run, *, ran: bool) -> None:
        # A stuck run counts as long as its thread runs.
        if self._admission.admitted and run.state != "stuck":
            self._admission.over(run.task.id, ran=ran, spent=run.context._spent_in_truth())
        self.suspects.ended(run.task.id)

    def give_up(self, runs: Sequence[Run], error: BaseException) -> None:
        """Forget runs after an error during their start, which may have been stored all the same."""
        if isinstance(error, TaskxError) and not getattr(error, "in_doubt", False):
            for run in runs:
                self.strike(run)
        else:
            self.drop(runs)

    def drop(self, runs: Iterable[Run]) -> None:
        """Forget runs that no thread executes; the housekeeper undoes their starts."""
        for run in runs:
            self.unexecuted.append(run)  # first: an interrupt may come in between
            self.claim(run)
        del self.unexecuted[: -self._most_unexecuted]

    def hand_back(self, runs: Iterable[Run]) -> None:
        """Undo the start of tasks that no thread executes; after an error the housekeeper does so."""
        self.drop(runs)
        self.undo()

    def undo(self) -> None:
        """Undo the starts of unexecuted tasks: a task that was never executed was not interrupted.

        A task whose start was not stored, or that a thread has begun to execute, is left alone.
        """
        if not self.unexecuted:
            return
        moves, runs = self._moves, list[Run]()
        try:
            with suppress(IndexError):
                while True:
                    runs.append(self.unexecuted.pop(0))
            with suppress(Locked):
                moves.flush()  # a start that was interrupted may be stored only now
            ids = [run.task.id for run in reversed(runs) if self._is_forgotten(run)]
            found = moves.repository.get_many(ids)
            # The last one comes first, because each goes into the buffer before those put back.
            tasks = {i: found[i] for i in ids if i in found and self._is_lost(found[i])}
            now = self._moves.now_ms()
            resumed = {run.task.id: run.resumes for run in runs}
            writes = [
                write
                for task in tasks.values()
                for write in lifecycle.hand_back(task, now, resumed=resumed[task.id])
            ]
            moves.commit(writes, tasks)
        except BaseException:
            self.unexecuted.extend(runs)
            raise

    def _is_forgotten(self, run: Run) -> bool:
        """Return True if a run is forgotten, or now was, because no thread has begun to execute it."""
        return self.claim(run) or self.runs.get(run.task.id) is not run

    def _is_lost(self, task: Task) -> bool:
        """Return True if a task that was just read runs on this node, and has no run here.

        A run is here from before its start until its outcome is stored.
        """
        runs_here = task.status is TaskStatus.RUNNING and task.owner == self._node
        return runs_here and task.id not in self.runs

    def rebuffer(self, task: Task) -> None:
        """Put a task that became pending again back into the buffer."""
        assert task.created_at is not None  # it comes from the repository
        run_at = optional_ms(task.run_at, "run_at")
        created_at, slot = to_ms(task.created_at), self._buffer.slot_before()
        self._buffer.add(task.id, task.type, task.priority, created_at, run_at, slot)
