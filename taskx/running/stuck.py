"""Attempts that are given up, as they do not end after their time-out, while their threads run on.

No thread can be killed, and an exception raised into one from outside neither reaches blocking IO nor
leaves what it does reach in order. So the attempt is ended without it: what its thread does later is
dropped, and its task starts nowhere until that thread has ended, or the process.
"""

from __future__ import annotations

import _thread
import threading
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from taskx.core import lifecycle
from taskx.core.errors import CancelReason
from taskx.core.lifecycle import Ending
from taskx.core.stacks import top_frames
from taskx.executing import runner
from taskx.executing.alarms import Overdue
from taskx.executing.runner import Run
from taskx.moving import Services

# Seconds that one in a child process has beyond its grace: then that is killed, and the thread is free.
_TO_KILL = 10.0


class Stuck:
    """Looks after the attempts of a node that were given up.

    Args:
        services: what it works with.
        node: the id of the node.
        most: how many are replaced by other threads.
        do_without: goes on without the thread of a run, which has that ident.
        conclude: writes how an attempt ended.
    """

    def __init__(
        self,
        services: Services,
        node: str,
        most: int,
        do_without: Callable[[Run, int], None],
        conclude: Callable[[Run, Ending], None],
    ) -> None:
        self._services = services
        self._node = node
        self._most = most
        # Held for moments only, so that a thread which comes back finds its run below.
        self._giving_up = threading.Lock()
        #: Those whose threads run on, each with an event: its end is on its way.
        self.runs: dict[Run, threading.Event] = {}
        #: Those whose threads have ended since the last look.
        self.ended: list[Run] = []
        self._any = False
        self._do_without = do_without
        self._conclude = conclude

    @property
    def healthy(self) -> bool:
        """True if no more are stuck than are replaced."""
        return len(self.runs) <= self._most

    # --- in the thread of a run

    def watch(self, run: Run, worker: str) -> Overdue:
        """Return what to call when a run, which begins in this thread, does not end after its deadline."""
        run.decided = _thread.allocate_lock()
        options = run.executor.options
        grace = options.patience + (_TO_KILL if options.isolation else 0.0)
        return grace, partial(self._overdue, run, worker, threading.get_ident())

    def thread_ended(self, run: Run) -> None:
        """The thread of one that was given up has come back from its executor."""
        with self._giving_up:
            given_up = self.runs[run]
        given_up.wait()  # first, as its task may start again from then on
        self.ended.append(run)
        del self.runs[run]
        self._services.log.warning(
            "task %s (%s) was stuck, and its thread has ended now; what came of it is dropped",
            *(run.task.id, run.task.type),
        )

    # --- in threads of its own

    def _overdue(self, run: Run, worker: str, ident: int) -> None:
        give_up = partial(self._give_up, run, worker, ident)
        try:  # a policy of the user's own is asked, and the alarms must not wait for that
            threading.Thread(target=give_up, name="taskx-stuck", daemon=True).start()
        except RuntimeError:  # no thread can be had
            give_up()

    def _give_up(self, run: Run, worker: str, ident: int) -> None:
        log = self._services.log
        if run.token.reason is not CancelReason.TIMEOUT:
            return
        stack = stack_of(ident)
        with self._giving_up:
            if not (run.decided and run.decided.acquire(False)):
                return  # it has ended meanwhile
            self._any, run.state = True, "stuck"
            given_up = self.runs[run] = threading.Event()
            self._do_without(run, ident)
        try:  # a policy of the user's own is asked, which may take its time
            self._conclude(run, self._services.runner.abandon(run, worker, stack))
        finally:
            given_up.set()
        log.error(
            "task %s (%s) is stuck: it timed out, and its thread runs on",
            *(run.task.id, run.task.type),
        )
        if not self.healthy:
            log.error(
                "%d threads are stuck, more than max_stuck=%d: this one is not replaced",
                *(len(self.runs), self._most),
            )

    # --- for the housekeeper

    def lift(self) -> None:
        """Let tasks start again whose threads have ended; after a ``RepositoryError`` it is tried again."""
        ended = list(self.ended)
        self._services.ledger.flush()  # how their attempts ended; if it waits on, the audit sees to it
        self.lift_bars((run.task.id for run in ended), self._node)
        for run in ended:
            self.ended.remove(run)

    def audit(self) -> None:
        """Let tasks start again of whose threads nothing is known: a look was cut short."""
        if self._any:
            found = self._services.repository.find("stuck_on", [self._node], ("id",))
            self.lift_bars((task_id for (task_id,) in found), self._node)

    def lift_bars(self, task_ids: Iterable[str], node: str) -> int:
        """Let tasks start again that ran on a node; returns how many."""
        services = self._services
        running = {run.task.id for run in list(self.runs)}
        wanted = [task_id for task_id in dict.fromkeys(task_ids) if task_id not in running]
        found = services.repository.get_many(wanted) if wanted else {}
        tasks = {i: task for i, task in found.items() if task.stuck_on == node}
        if tasks:
            now = services.clock.now_ms()
            writes = [w for task in tasks.values() for w in lifecycle.lift_bar(task, now)]
            services.consequences.commit(writes, tasks)
        return len(tasks)


def stack_of(ident: int) -> str:
    """Return where a thread is, as text, from the executor on; empty if it has ended."""
    frame = top_frames().get(ident)
    if frame is None:
        return ""
    stack: list[Any] = traceback.extract_stack(frame)
    ours = [n for n, entry in enumerate(stack) if entry.filename == runner.__file__]
    lines = traceback.format_list(stack[ours[-1] + 1 if ours else 0 :])
    return "The thread is here (most recent call last):\n" + "".join(lines)
