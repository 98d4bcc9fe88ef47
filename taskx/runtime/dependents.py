"""Tasks that wait for others: released, or ended with them, when those have ended.

A waiting task is registered with one unfinished parent. When that one ends, the task is registered with
another unfinished one; when there is none left, it is decided. So the end of a task without dependents
costs nothing, and that of a parent no more than the tasks that are registered with it.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from taskx.core import lifecycle
from taskx.core.clock import Clock
from taskx.core.errors import TaskxError
from taskx.core.lifecycle import PENDING, UNFINISHED
from taskx.core.log import GuardedLogger
from taskx.core.model import Task
from taskx.core.writes import Insert
from taskx.runtime.hooks import Hooks
from taskx.runtime.ledger import Ledger
from taskx.runtime.lines import Lines
from taskx.runtime.watcher import Watcher
from taskx.storage.base import Repository

#: Waiting tasks that are decided in one transaction.
BATCH = 200
#: Parents that are looked at in each round of a slow look.
_PAGE = 1000


class Dependents:
    """Looks after the tasks that wait for their parents.

    Args:
        repository: where they are.
        ledger: what commits.
        hooks: who is told of those that end with a parent.
        watcher: who resolves handles.
        lines: where those go on waiting that have a concurrency key.
        clock: the time.
        log: what it says.
    """

    def __init__(
        self,
        repository: Repository,
        ledger: Ledger,
        hooks: Hooks,
        watcher: Watcher,
        lines: Lines,
        clock: Clock,
        log: GuardedLogger,
    ) -> None:
        self._repository = repository
        self._ledger = ledger
        self._hooks = hooks
        self._watcher = watcher
        self._clock = clock
        self._log = log
        #: Whether a task may be waiting for another one: as long as not, ends need not be told.
        self.any = False
        #: Parents that have ended, and whose dependents were not looked at yet.
        self.ended: deque[str] = deque()
        #: Told that there is something in ``ended``, and that tasks were released.
        self.wake: Callable[[], None] = lambda: None
        self.released: Callable[[], None] = lambda: None
        self._lines = lines
        self._lock, self._looking = threading.Lock(), threading.Lock()
        self._additions = 0
        self._left: Sequence[str] = ()
        # Whether all parents are to be looked at; whether that is under way, and how far it has come.
        self._all_due, self._under_way, self._after = True, False, ""

    # --- what happens

    def added(self, inserts: Iterable[Insert]) -> None:
        """Tasks were stored, some of which may wait."""
        self.waits({i.id: i.row["waiting_on"] for i in inserts if i.row.get("waiting_on")})

    def waits(self, waiting: Mapping[str, str]) -> None:
        """Tasks wait from now on, each for that parent; if it has ended meanwhile, they are decided."""
        if not waiting:
            return
        with self._lock:
            self.any = True
            self._additions += 1
        try:
            statuses = self._repository.statuses([*set(waiting.values())])
            due = [i for i, parent in waiting.items() if statuses.get(parent) not in UNFINISHED]
            self._decide(due)
        except TaskxError as error:  # they are stored: whoever did so must not be told otherwise
            self._all_due = True
            self._log.warning("tasks that wait for others are looked at later: %s", error)

    def parent_ended(self, task_id: str) -> None:
        """A task has ended that may have dependents; its write is committed."""
        self.ended.append(task_id)
        self.wake()

    def ended_elsewhere(self) -> None:
        """A process died that may not have come to look at the dependents of what it ended."""
        self._all_due = True

    @property
    def looks(self) -> bool:
        """Whether it is looking, or about to: tasks may be released by that."""
        return self.waiting or self._looking.locked()

    @property
    def waiting(self) -> bool:
        """True if :meth:`look` has left work that is due."""
        return bool(self.ended or self._left or self._all_due or self._under_way)

    def overdue(self) -> bool:
        """Whether a task waits for one that has ended, which is then looked at soon.

        Raises:
            RepositoryError: the repository failed.
        """
        gone, after = self._gone("")
        while after and not gone:
            gone, after = self._gone(after)
        if gone:
            self._all_due = True
            self.wake()
        return bool(gone)

    def _gone(self, after: str) -> tuple[Sequence[str], str]:
        """Those that have ended of the next parents that are waited for; and after which to go on.

        Empty where there are no more.
        """
        awaited = self._repository.awaited(after, _PAGE)
        statuses = self._repository.statuses(awaited)
        gone = [parent for parent in awaited if statuses.get(parent) not in UNFINISHED]
        return gone, awaited[-1] if awaited else ""

    # --- looking

    def look(self, patience: float = math.inf) -> None:
        """Decide the tasks whose parents have ended, as far as that is known.

        Args:
            patience: seconds after which the rest is left to the next call: where one task ends with
                another, as in a long chain, it may take long.

        Raises:
            RepositoryError: the repository failed; the rest is looked at next time.
        """
        if not self.waiting:
            return
        until = time.monotonic() + patience
        with self._looking:
            while self.ended or self._left:
                ids = list(self.ended)
                found = self._repository.waiting_for(ids) if ids else ()
                self._left = self._decide([*self._left, *found], until)
                for _ in ids:  # only now: until then somebody may wait for this to be done
                    self.ended.popleft()
                if self._left:
                    return
            self._look_at_all(until)

    def _look_at_all(self, until: float) -> None:
        """Look at all parents that tasks wait for, if that is due; go on where the last call stopped."""
        if self._all_due and not self._under_way:
            self._under_way, self._after, self._all_due = True, "", False
        while self._under_way and not self._left:
            self._under_way = self._look_at_some(until)
            if time.monotonic() >= until:
                break

    def look_around(self) -> None:
        """Other processes may have stored tasks that wait: from when there are some, ends are told.

        Raises:
            RepositoryError: the repository failed.
        """
        additions = self._additions
        some = bool(self._repository.awaited("", 1))
        with self._lock:
            if additions == self._additions:
                # What ended before it was known that somebody waits, nobody was told of.
                self._all_due = self._all_due or (some and not self.any)
                self.any = some

    def look_slowly(self, patience: float = math.inf) -> None:
        """Look at some of the parents that are waited for, and go on there next time.

        For what no event told: a process that died just then, a record changed by hand.

        Args:
            patience: seconds after which what is found is left to :meth:`look`.

        Raises:
            RepositoryError: the repository failed.
        """
        until = time.monotonic() + patience
        with self._looking:
            self._look_at_some(until)

    def _look_at_some(self, until: float) -> bool:
        """Look at some parents; False where these were the last ones."""
        gone, self._after = self._gone(self._after)
        if gone:
            found = self._repository.waiting_for(gone)
            self._left = [*self._left, *self._decide(found, until)]
        return bool(self._after)

    # --- deciding

    def _decide(self, task_ids: Sequence[str], until: float = math.inf) -> Sequence[str]:
        """Let tasks come as far as their parents have; returns those that it did not come to in time."""
        todo = deque(task_ids)
        while todo:
            some = [todo.popleft() for _ in range(min(BATCH, len(todo)))]
            children = [
                task
                for task in self._repository.get_many(some).values()
                if task.status.value == PENDING
            ]
            todo.extend(self._move(children))
            if time.monotonic() >= until:
                break
        return todo

    def _move(self, children: Sequence[Task]) -> list[str]:
        """Those that must be looked at again: what they wait for has ended meanwhile, or they have."""
        parents = list({parent: None for child in children for parent in child.depends_on})
        statuses = self._repository.statuses(parents)
        now = self._clock.now_ms()
        writes = [lifecycle.parents_moved(child, statuses, now) for child in children]
        results = self._ledger.commit(writes) if writes else ()
        waiting: dict[str, str] = {}
        ended: list[str] = []
        for child, write, held in zip(children, writes, results, strict=True):
            if not held:
                continue
            if "status" in write.changes:
                ended.append(child.id)
                self._tell_ended(child, write.changes)
            elif write.changes["waiting_on"] is not None:
                waiting[child.id] = write.changes["waiting_on"]
        if sum(results) > len(ended) + len(waiting):
            self.released()
            self._lines.advance(
                child.concurrency_key for child in children if child.concurrency_key is not None
            )
        again = list(self._repository.waiting_for(ended)) if ended else []
        if waiting:
            now_known = self._repository.statuses([*set(waiting.values())])
            again += [
                child
                for child, parent in waiting.items()
                if now_known.get(parent) not in UNFINISHED
            ]
        return again

    def _tell_ended(self, child: Task, changes: Mapping[str, Any]) -> None:
        self._log.warning(
            "task %s (%s) is %s: %s", child.id, child.type, changes["status"], changes["error"]
        )
        if self._hooks.finished:
            self._hooks.tell_changed(self._hooks.finished, child, changes)
        self._watcher.look_if_watched(child.id)
