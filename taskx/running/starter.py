"""Starting: make pending tasks running, hand back those without a free worker, and keep the runs."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial

from taskx.common.bell import Bell
from taskx.core import lifecycle
from taskx.core.clock import to_ms
from taskx.core.errors import RepositoryError
from taskx.core.log import Once
from taskx.core.model import Task
from taskx.core.record import CUT, created_task, optional_ms
from taskx.core.writes import Insert, Update
from taskx.executing.context import Shared
from taskx.executing.runner import Run
from taskx.limiting.admission import Admission
from taskx.liveness.base import Node
from taskx.moving import Services
from taskx.running.buffer import Buffer, Item
from taskx.running.progress import store_progress

#: Most pending tasks that are freed in one transaction.
BATCH = 1000
#: Most seconds that a task on its last chance waits for the others to end, and that others wait for it.
ALONE = 60.0


class Runs(dict[str, Run]):
    """Every run, by the id of its task, from before its start until its outcome is committed.

    The ``state`` of a run says how far it is; the audit goes by that. Other structures hold:

    - the pending tasks: the buffer has a heap, and slots, which are known by name so that their number is
      right wherever a submit is interrupted;
    - the order of the runs that were started ahead;
    - abandoned attempts, after their outcome: their task may be in flight again, elsewhere.
    """

    @property
    def executing(self) -> list[Run]:
        """The runs whose executors are being called."""
        return [run for run in list(self.values()) if run.state == "executing"]

    def forget(self, run: Run) -> bool:
        """Forget a run; return False if it was forgotten before."""
        return self.get(run.task.id) is run and self.pop(run.task.id, None) is not None

    def claim(self, run: Run) -> bool:
        """Forget a run that no thread executes; return False if a thread has just begun to.

        A thread that begins sets the state first, and then checks whether the run was forgotten.
        """
        if not self.forget(run):
            return False
        if run.state == "executing":
            self[run.task.id] = run
            return False
        return True


class Suspects:
    """Suspects: tasks that have crashed. One runs at a time; on its last chance, it runs alone."""

    def __init__(self, runs: Mapping[str, Run]) -> None:
        self._runs = runs
        self._turn = threading.Lock()
        #: The suspects that wait for the running one.
        self.waiting: list[Item] = []
        self._changed = Bell()
        self._alone_until: float | None = None
        self._closed = False

    def admit(self, item: Item) -> bool:
        """Return True if this suspect may start now; otherwise it waits."""
        if self._turn.acquire(blocking=False):
            return True
        self.waiting.append(item)
        return False

    def called(self) -> Item | None:
        """Return a suspect that waits although none runs: the next one did not come, or has just left."""
        if self._turn.locked():
            return None
        with suppress(IndexError):  # another thread called the last one in the meantime
            return self.waiting.pop(0)
        return None

    def leave(self) -> Item | None:
        """End the turn of a suspect, whose run is over or never began; return the next one."""
        self._alone_until = None
        self.tell()
        self._turn.release()
        return self.waiting.pop(0) if self.waiting else None

    def go_alone(self) -> None:
        """Wait for all other runs, and hold up further ones, before a task on its last chance starts."""
        self._wait(lambda: not self._runs, time.monotonic() + ALONE)
        self._alone_until = time.monotonic() + ALONE

    @property
    def alone(self) -> bool:
        """True while a task is to run alone."""
        return self._alone_until is not None

    def stand_aside(self) -> None:
        """Wait while another task is to run alone, before any task starts."""
        if (until := self._alone_until) is not None:
            self._wait(lambda: self._alone_until is None, until)

    def tell(self) -> None:
        """Wake the threads that wait for a run to end."""
        if self._changed.listening:
            self._changed.ring_all()

    def close(self) -> None:
        """Let no task wait any more, because the node stops."""
        self._closed = True
        self.waiting.clear()
        self.tell()

    def _wait(self, condition: Callable[[], bool], until: float) -> None:
        while (left := until - time.monotonic()) > 0:
            ear = self._changed.listen()
            if self._closed or condition():
                self._changed.leave(ear)
                return
            self._changed.wait(ear, left)


class Starter:
    """Starts the tasks of a node, and keeps its runs.

    Args:
        services: the parts of the queue.
        node: the node.
        buffer: receives the tasks that cannot start now.
        runs: the runs of the node.
        admission: decides how many tasks of each limited type may start.
    """

    def __init__(
        self,
        services: Services,
        node: Node,
        buffer: Buffer,
        runs: Runs,
        admission: Admission,
    ) -> None:
        self._services = services
        self._node = node.id
        self._name = node.name
        self._buffer = buffer
        self._admission = admission
        self.runs = runs
        self.suspects = Suspects(self.runs)
        #: The ids of tasks that may be stored as started, and were not executed: an interrupt struck their
        #: submit.
        self.unexecuted: deque[str] = deque(maxlen=1000)
        self._shared = Shared(
            services.alarms,
            services.log.logger,
            services.keeper,
            services.repository.get_many,
            self._store_progress,
            Once(partial(services.log.warning, CUT)),
        )

    def _store_progress(self, task_id: str) -> None:
        """Store the progress of a run of this node, if it has reported some."""
        if (run := self.runs.get(task_id)) is not None:
            store_progress(self._services, [run])

    def start(self, items: Sequence[Item], worker: str) -> list[Run]:
        """Start as many of these tasks as possible, and return their runs.

        The others must wait, were started by another node, are gone, or have expired and are cancelled.
        ``worker`` is the thread that will run the first one. It is named in the record only of a single
        task: alike starts share a statement.
        """
        by = worker if len(items) == 1 else self._name
        services, runs = self._services, self.runs
        starting: list[tuple[Run, Update]] = []
        expired: list[Task] = []
        admitted: Collection[str] = ()
        try:
            self.suspects.stand_aside()
            found = services.repository.get_many([item.id for item in items])
            if paused := services.controls.paused:
                self._turn_away(found, [task for task in found.values() if task.type in paused])
            if services.registry.limits:
                admitted = self._admit(items, found)
            tasks = self._startable(items, found)
            now = services.clock.now_ms()
            for task in tasks:
                update = lifecycle.start(task, now, self._node, by)
                if update is not None and task.id not in runs:
                    run = self._make_run(task)
                    starting.append((run, update))
                    # Before the start is committed: a cancel after that finds the token.
                    runs[task.id] = run
                else:
                    if self._is_suspect(task):
                        self._suspect_done()
                    if lifecycle.has_expired(task, now):
                        expired.append(task)
            if expired:
                self._expire(expired, now)
            writes = [update for _, update in starting]
            results = services.ledger.commit(writes) if writes else ()
            for (run, update), started in zip(starting, results, strict=True):
                if started:
                    lifecycle.mark_started(run.task, update)
                else:
                    self.strike(run)
        except BaseException:  # an interrupt, too: no other thread knows of these runs
            for run, _ in starting:
                self.strike(run)
            raise
        finally:
            if self.suspects.waiting and (next_one := self.suspects.called()):
                self._buffer.put_back([next_one])
            for task_id in admitted:
                if task_id not in runs:
                    self._admission.over(task_id, ran=False)
        return [run for (run, _), started in zip(starting, results, strict=True) if started]

    def start_new(self, insert: Insert, still_free: Callable[[], bool]) -> Run | None:
        """Store a new task as started, in one transaction.

        Returns:
            The run. None, with nothing stored, if the id is taken, if this node must not start the task
            now, or if ``still_free`` returns False once the run is visible.
        """
        services, task = self._services, created_task(insert.row)
        services.registry.registered[task.type].apply_defaults(task)
        start = lifecycle.start(task, services.clock.now_ms(), self._node, self._name)
        # The thread that runs a task starts it, if the task must not crash twice.
        if start is None or task.max_crashes == 1:
            return None
        stored, run = lifecycle.created_started(insert, start), self._make_run(task)
        try:
            self.runs[task.id] = run
            # A task that must run alone waits for all visible runs. So this run is made visible before the
            # check for such a task.
            if not (still_free() and services.ledger.commit([stored])[0]):
                self.strike(run)
                return None
            lifecycle.mark_started(task, start)
            services.consequences.created((stored,))
        except BaseException as error:  # an interrupt, too
            if not isinstance(error, Exception) or getattr(error, "in_doubt", False):
                self.unexecuted.append(task.id)
            self.strike(run)
            raise
        return run

    def _expire(self, tasks: Sequence[Task], now: int) -> None:
        """Cancel tasks instead of starting them."""
        writes = [write for task in tasks for write in lifecycle.expire(task, now)]
        try:
            self._services.consequences.commit(writes, {task.id: task for task in tasks})
        except RepositoryError as error:  # the others must not wait for these
            self._services.log.warning("expired tasks are cancelled later: %s", error)

    def _admit(self, items: Sequence[Item], found: dict[str, Task]) -> set[str]:
        """Free the tasks with limits that must not start now; return the ids of the admitted ones."""
        limits = self._services.registry.limits
        waiting: dict[str, list[str]] = {}
        for item in items:
            task = found.get(item.id)
            if task is not None and task.type in limits and task.id not in self.runs:
                waiting.setdefault(task.type, []).append(task.id)
        if not waiting:
            return set()
        admitted = self._admission.admit(waiting)
        ids = {task_id for some in waiting.values() for task_id in some}
        try:
            self._turn_away(found, [found[task_id] for task_id in ids - admitted])
        except BaseException:
            for task_id in admitted:
                self._admission.over(task_id, ran=False)
            raise
        return admitted

    def _startable(self, items: Sequence[Item], found: dict[str, Task]) -> list[Task]:
        """Return the tasks to start now, in order, and put the rest back into the buffer.

        A task that has crashed, or must not crash twice, is started in a transaction of its own. Suspects
        run one at a time.
        """
        chosen: list[Task] = []
        for position, item in enumerate(items):
            task = found.get(item.id)
            if task is None:
                continue
            # A process that only declared the type left some options to the executor.
            self._services.registry.registered[task.type].apply_defaults(task)
            if not task.crashes and task.max_crashes != 1:
                chosen.append(task)
                continue
            if chosen:
                self._buffer.put_back([item])
                continue
            suspect = self._is_suspect(task)
            if suspect and not self.suspects.admit(item):
                continue  # it waits for its turn
            self._buffer.put_back(items[position + 1 :])
            return self._alone(task) if suspect and lifecycle.last_chance(task) else [task]
        return chosen

    def _turn_away(self, found: dict[str, Task], tasks: Sequence[Task]) -> None:
        """Remove tasks that must not start now, and free them."""
        for task in tasks:
            del found[task.id]
        self.free([task.id for task in tasks if task.owner == self._node])

    def free(self, task_ids: Sequence[str]) -> None:
        """Take this node's name off pending tasks, so that any node can fetch them."""
        for start in range(0, len(task_ids), BATCH):
            some = task_ids[start : start + BATCH]
            self._services.ledger.commit([lifecycle.free(i, self._node) for i in some])

    def _is_suspect(self, task: Task) -> bool:
        """Return True if a task has crashed and could crash this process: no child process runs it."""
        executor = self._services.registry.registered[task.type]
        return task.crashes > 0 and executor.options.isolation is None

    def _alone(self, task: Task) -> list[Task]:
        """Wait until nothing else runs, and return a task on its last chance, read again.

        A death that counts must be caused by the task itself. Empty if the task is gone.
        """
        services = self._services
        try:
            services.log.warning(
                "task %s (%s) runs alone, because its process died %d time(s) while it ran",
                *(task.id, task.type, task.crashes),
            )
            services.ledger.flush()  # a run is not over until its outcome is written
            self.suspects.go_alone()
            found = services.repository.get_many([task.id])
        except BaseException:
            self._suspect_done()
            raise
        if task.id not in found:
            self._suspect_done()
        for again in found.values():
            services.registry.registered[again.type].apply_defaults(again)
        return list(found.values())

    def _make_run(self, task: Task) -> Run:
        services = self._services
        executor = services.registry.registered[task.type]
        return services.run_class(task, executor, services.clock, self._shared)

    def strike(self, run: Run, ran: bool = False) -> None:
        """Forget a run that was not executed, or is over; a second call does nothing."""
        if self.runs.forget(run):
            self._struck(run, ran=ran)

    def claim(self, run: Run) -> bool:
        """Forget a run that no thread executes; return False if a thread has just begun to."""
        if claimed := self.runs.claim(run):
            self._struck(run, ran=False)
        return claimed

    def _struck(self, run: Run, *, ran: bool) -> None:
        # A stuck run counts as long as its thread runs.
        if self._admission.admitted and run.state != "stuck":
            self._admission.over(run.task.id, ran=ran)
        if run.task.crashes and self._is_suspect(run.task):
            self._suspect_done()
        elif not self.runs:
            self.suspects.tell()

    def hand_back(self, runs: Sequence[Run], *, rebuffer: bool) -> None:
        """Undo the start of tasks for which no worker was free."""
        if not runs:
            return
        for run in runs:
            self.strike(run)  # first: if the commit fails, the audit finds the task
        self.undo([run.task for run in runs], rebuffer=rebuffer)

    def undo(self, tasks: Sequence[Task], *, rebuffer: bool) -> None:
        """Undo the start of tasks that were not executed and have no run any more."""
        now = self._services.clock.now_ms()
        writes = [write for task in tasks for write in lifecycle.hand_back(task, now)]
        results = self._services.consequences.commit(writes, {task.id: task for task in tasks})
        if rebuffer:
            pending = [task for task, undone in zip(tasks, results[::2], strict=True) if undone]
            for task in reversed(pending):  # the first one last: it goes before those put back
                self.rebuffer(task)

    def rebuffer(self, task: Task) -> None:
        """Put a task that became pending again back into the buffer."""
        assert task.created_at is not None  # it comes from the repository
        run_at = optional_ms(task.run_at, "run_at")
        created_at, slot = to_ms(task.created_at), self._buffer.slot_before()
        self._buffer.add(task.id, task.type, task.priority, created_at, run_at, slot)

    def _suspect_done(self) -> None:
        if next_one := self.suspects.leave():
            self._buffer.put_back([next_one])
