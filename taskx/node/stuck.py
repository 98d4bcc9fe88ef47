"""Stuck runs: attempts that are abandoned because they do not end after their time-out.

A thread cannot be killed. An exception raised into it from outside does not reach blocking IO, and may
leave the code that it does reach in disorder. So the attempt is ended without its thread: anything that
the thread returns later is dropped, and the task starts nowhere until the thread, or the process, has
ended.
"""

from __future__ import annotations

import _thread
import threading
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import FrameType
from typing import Any

from taskx.attempt import runner
from taskx.attempt.alarms import Overdue
from taskx.attempt.runner import Call, Run, runs_of
from taskx.node.moving import Moves
from taskx.stores import queries
from taskx.stores.base import Repository
from taskx.stores.controls import Paused
from taskx.stores.liveness.base import Node
from taskx.tasks import lifecycle
from taskx.tasks.errors import CancelReason
from taskx.tasks.findings import Problem, counted, listed
from taskx.tasks.lifecycle import PENDING, Ending
from taskx.tasks.log import GuardedLogger
from taskx.tasks.rate import OF_TYPE
from taskx.tasks.record import BY_THREAD
from taskx.tasks.stacks import top_frames

#: Most tasks with stuck threads, and most running ones, that are read.
MOST = 10_000
# Most tasks of a stuck type that are counted as waiting for a slot, on each node and outside of nodes.
_MOST_READY = 1000


class Stuck:
    """Looks after the abandoned attempts of a node.

    Args:
        node: the id of the node.
        most: the number of stuck threads that are replaced.
        moves: the door to the repository.
        log: the logger of the queue.
        do_without: called with the runs of a call and the ident of its thread, to go on without it.
        conclude: writes the outcome of an attempt.
        abandon: returns the ending of an attempt whose thread runs on.
        kill_within: seconds for which a child process that was killed may live on.
    """

    def __init__(
        self,
        node: str,
        most: int,
        moves: Moves,
        log: GuardedLogger,
        *,
        do_without: Callable[[Sequence[Run], int], None],
        conclude: Callable[[Run, Ending], None],
        abandon: Callable[[Run, str, str, int], Ending],
        kill_within: float,
    ) -> None:
        self._moves = moves
        self._log = log
        self._kill_within = kill_within
        self._ending_of = abandon
        self._node = node
        self._most = most
        # Held for moments only, so that a thread which comes back finds its run in ``runs``.
        self._abandoning = threading.Lock()
        #: The runs whose threads run on. The event is set when the outcome was handed on to be written.
        self.runs: dict[Run, threading.Event] = {}
        #: The runs whose threads have ended since the last :meth:`lift`.
        self.ended: list[Run] = []
        self._any = False
        self._do_without = do_without
        self._conclude = conclude

    @property
    def healthy(self) -> bool:
        """True if at most ``most`` threads are stuck, so that all of them were replaced."""
        return self._threads() <= self._most

    def _threads(self) -> int:
        """Return the number of stuck threads: a coroutine has none, and the runs of a call share theirs."""
        runs = self.runs.copy().items()
        return len({event for run, event in runs if run.coroutine is None})

    # --- in the thread of a run

    def watch(self, run: Run, worker: str) -> Overdue:
        """Prepare for a run that does not end after its deadline; call this in the thread of the run.

        Return the grace period in seconds, and the function to call after it.
        """
        run.decided = _thread.allocate_lock()
        return self.watch_call(run, worker)

    def watch_call(self, call: Run | Call, worker: str) -> Overdue:
        """Do the same for a call for many runs, which has its lock."""
        options = call.executor.options
        grace = options.patience + (self._kill_within if options.isolation else 0.0)
        return grace, partial(self._overdue, call, worker, threading.get_ident())

    def thread_ended(self, run: Run) -> None:
        """Note that the thread of an abandoned run has come back from its executor."""
        with self._abandoning:
            abandoned = self.runs[run]
        abandoned.wait()  # after the next line the task may start again
        self.ended.append(run)
        del self.runs[run]
        self._log.warning(
            "task %s (%s) was stuck, and its %s has ended now; its late outcome is dropped",
            run.task.id,
            run.task.type,
            run.what_goes_on,
        )

    # --- in threads of its own

    def _overdue(self, call: Run | Call, worker: str, ident: int) -> None:
        abandon = partial(self._abandon, call, worker, ident)
        try:  # it calls the user's retry policy, and the alarms must not wait for that
            threading.Thread(target=abandon, name="taskx-stuck", daemon=True).start()
        except RuntimeError:  # no thread can be started
            abandon()

    def _abandon(self, call: Run | Call, worker: str, ident: int) -> None:
        log = self._log
        if call.token.reason is not CancelReason.TIMEOUT:
            return
        runs = runs_of(call)
        coroutine = runs[0].coroutine
        stack = stack_of(ident) if coroutine is None else coroutine.stack()
        with self._abandoning:
            if not (call.decided and call.decided.acquire(False)):
                return  # it has ended in the meantime
            self._any, abandoned = True, threading.Event()
            for run in runs:
                run.state, self.runs[run] = "stuck", abandoned
            self._do_without(runs, ident)
        try:  # outside the lock: it calls the user's retry policy, which may take some time
            for run in runs:
                self._conclude(run, self._ending_of(run, worker, stack, len(runs) - 1))
        finally:
            abandoned.set()
        for run in runs:
            log.error(
                "task %s (%s) is stuck: it timed out, and its %s still runs",
                run.task.id,
                run.task.type,
                run.what_goes_on,
            )
        if not self.healthy:
            log.error(
                "%d threads are stuck, more than max_stuck=%d; this thread is not replaced",
                self._threads(),
                self._most,
            )

    # --- for the housekeeper

    def lift(self) -> None:
        """Let tasks start again whose threads have ended; after a ``RepositoryError``, call it again."""
        if not (ended := list(self.ended)):
            return
        self._moves.flush()  # their outcomes; if one cannot be written yet, the audit retries
        self.lift_bars((run.task.id for run in ended), self._node)
        for run in ended:
            self.ended.remove(run)

    def audit(self) -> None:
        """Let tasks start again whose threads are no longer known, because :meth:`lift` was interrupted."""
        if self._any:
            found = self._moves.repository.find("stuck_on", [self._node], ("id",))
            self.lift_bars((task_id for (task_id,) in found), self._node)

    def lift_bars(self, task_ids: Iterable[str], node: str) -> int:
        """Let tasks start again that were stuck on a node; return how many."""
        running = {run.task.id for run in list(self.runs)}
        wanted = [task_id for task_id in dict.fromkeys(task_ids) if task_id not in running]
        found = self._moves.repository.get_many(wanted) if wanted else {}
        tasks = {i: task for i, task in found.items() if task.stuck_on == node}
        if tasks:
            now = self._moves.now_ms()
            writes = [w for task in tasks.values() for w in lifecycle.lift_bar(task, now)]
            self._moves.commit(writes, tasks)
        return len(tasks)


def stuck_types(repository: Repository, nodes: Sequence[Node], paused: Paused) -> Iterator[Problem]:
    """Yield a problem for each type of which nothing runs, and all waiting tasks wait for stuck threads.

    A task waits for the thread of an earlier attempt of its own or, if its type has a limit of
    concurrency, for the slot that such a thread keeps.

    Args:
        repository: the repository to read.
        nodes: its nodes, without the dead ones.
        paused: the pauses; the tasks of a paused type may wait.
    """
    names = {node.id: node.name for node in nodes}
    fields = ("type", "stuck_on", "status", "held", "id")
    found = repository.find("stuck_on", [*names], fields, MOST) if names else ()
    if not found:
        return
    running = {kind for (kind,) in repository.find("running_on", [*names], ("type",), MOST)}
    ready = {*queries.every(repository, "ready_type")}
    rows: defaultdict[str, list[Any]] = defaultdict(list)
    for kind, *row in found:
        rows[kind].append(row)
    for type in sorted(rows.keys() - running):
        threads = Counter(node for node, *_ in rows[type])
        if type in paused or (type in ready and not _slots_taken(type, threads, nodes)):
            continue
        barred = [i for _, status, held, i in rows[type] if (status, held) == (PENDING, BY_THREAD)]
        waiting = len(barred)
        if type in ready:
            owners = ("", *queries.every(repository, "buffered_on"))
            waiting += sum(repository.reads.count_ready(type, one, _MOST_READY) for one in owners)
        if waiting:
            stuck = threads.total()
            words = (
                f"{counted(waiting, 'task')} of type {type!r} cannot start, and none runs: all wait for "
                f"{counted(stuck, 'stuck thread')} on {listed([names[node] for node in threads])}."
            )
            facts = {"type": type, "waiting": waiting, "threads": stuck}
            facts["nodes"] = {node: names[node] for node in threads}
            yield Problem("stuck_type", words, {**facts, "task_id": min(barred, default=None)})


def _slots_taken(type: str, threads: Mapping[str, int], nodes: Sequence[Node]) -> bool:
    """Return True if stuck threads keep all slots of a type, on each node that runs it."""
    able = [node for node in nodes if node.lives and not node.stopping and type in node.types]
    total = sum(threads.values())
    for node in able:
        limit = node.limits.get(OF_TYPE + type)
        if limit is None or limit.max_concurrency is None:
            return False
        taken = total if limit.scope == "global" else threads.get(node.id, 0)
        if taken < limit.max_concurrency:
            return False
    return bool(able)


def stack_of(ident: int) -> str:
    """Return the stack of a thread as text, from the executor on; empty if the thread has ended."""
    frame = top_frames().get(ident)
    if frame is None:
        return ""
    stack: list[Any] = traceback.extract_stack(frame)
    ours = [n for n, entry in enumerate(stack) if entry.filename == runner.__file__]
    return _shown(stack[ours[-1] + 1 if ours else 0 :])


def stack_of_task(task_id: str, node: str) -> str:
    """Return the stack of the thread that executes a task for a node; empty if none of this process does.

    The thread is found by the frame that calls the executor, so that tasks need not note their threads.
    """
    for top in top_frames().values():
        for run, frames in executed(top):
            if (run.task.id, run.task.owner) == (task_id, node):
                return _shown(traceback.StackSummary.extract(reversed(frames)))
    return ""


def executed(top: FrameType) -> Iterator[tuple[Run, list[tuple[FrameType, int]]]]:
    """Yield the runs that a thread executes, one inside the other, the innermost first.

    Each comes with the frames of the thread from its executor on, the innermost first.
    """
    names = {runner.Runner.run.__code__: "run", runner.Runner._ask.__code__: "call"}
    inner: list[tuple[FrameType, int]] = []
    for frame, line in traceback.walk_stack(top):
        name = names.get(frame.f_code)
        call = None if name is None else frame.f_locals.get(name)
        for run in runs_of(call) if isinstance(call, Run | Call) else ():
            yield run, [*inner]
        inner.append((frame, line))


def _shown(stack: list[Any]) -> str:
    return "The thread is here (most recent call last):\n" + "".join(traceback.format_list(stack))
