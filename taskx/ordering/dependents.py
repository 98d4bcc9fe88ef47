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
from collections.abc import Callable, Mapping, Sequence

from taskx.common.agenda import Agenda
from taskx.core import lifecycle
from taskx.core.clock import Clock
from taskx.core.errors import TaskxError
from taskx.core.lifecycle import PENDING, UNFINISHED
from taskx.core.log import GuardedLogger
from taskx.core.model import Task
from taskx.core.writes import Update
from taskx.storage.base import Repository

#: Waiting tasks that are decided in one transaction.
BATCH = 200
#: Parents that are looked at in each round of a slow look.
_PAGE = 1000


#: Commits moves of these tasks, and does what follows.
Commit = Callable[[Sequence[Update], Mapping[str, Task]], object]


class Dependents:
    """Looks after the tasks that wait for their parents.

    Args:
        repository: where they are.
        commit: commits what becomes of them.
        agenda: where the housekeeper is told to :meth:`look`.
        clock: the time.
        log: what it says.
    """

    def __init__(
        self,
        repository: Repository,
        commit: Commit,
        agenda: Agenda,
        clock: Clock,
        log: GuardedLogger,
    ) -> None:
        self._repository = repository
        self._commit = commit
        self._agenda = agenda
        self._clock = clock
        self._log = log
        #: Whether a task may be waiting for another one: as long as not, ends need not be told.
        self.any = False
        #: Parents that have ended, and whose dependents were not looked at yet.
        self.ended: deque[str] = deque()
        # Tasks whose parents may have ended.
        self._due: deque[str] = deque()
        self._lock = threading.Lock()
        # It knows its owner: a log handler, or a callback of a handle, that is told what comes of a look
        # may cancel a task, and must not wait for itself.
        self._looking, self._deciding = threading.RLock(), False
        self._additions = 0
        # Whether all parents are to be looked at; whether that is under way, and how far it has come.
        self._all_due, self._under_way, self._after = True, False, ""

    # --- what happens

    def waits(self, waiting: Mapping[str, str]) -> None:
        """Tasks wait from now on, each for that parent; if it has ended meanwhile, they are due."""
        with self._lock:
            self.any = True
            self._additions += 1
        try:
            statuses = self._repository.statuses([*set(waiting.values())])
        except TaskxError as error:  # they are stored: whoever did so must not be told otherwise
            self._all_due = True
            self._log.warning("tasks that wait for others are looked at later: %s", error)
            return
        due = [i for i, parent in waiting.items() if statuses.get(parent) not in UNFINISHED]
        if due:
            self._due.extend(due)
            self._agenda.wake_from_long_sleep()

    def parent_ended(self, task_id: str) -> None:
        """A task has ended that may have dependents; its write is committed."""
        self.ended.append(task_id)
        self._agenda.wake_from_long_sleep()

    def ended_elsewhere(self) -> None:
        """A process died that may not have come to look at the dependents of what it ended."""
        self._all_due = True

    @property
    def looks(self) -> bool:
        """Whether it is looking, or about to: tasks may be released by that."""
        return self.waiting or self._deciding

    @property
    def waiting(self) -> bool:
        """True if :meth:`look` has left work that is due."""
        return self.told or self._all_due or self._under_way

    @property
    def told(self) -> bool:
        """Whether it was told of something that it has not looked at yet."""
        return bool(self.ended or self._due)

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
            self._agenda.wake_from_long_sleep()
        return bool(gone)

    def _gone(self, after: str) -> tuple[Sequence[str], str]:
        """Those that have ended of the next parents that are waited for; and after which to go on.

        Empty where there are no more.
        """
        awaited = self._repository.distinct("waiting_on", after, _PAGE)
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
        until = time.monotonic() + patience
        if self._looking._is_owned():  # type: ignore[attr-defined]
            return  # it goes on with this
        while self.waiting:
            with self._looking:
                self._look_at_told(until) if self.told else self._look_at_all(until)
            if time.monotonic() >= until:
                return

    def _look_at_told(self, until: float) -> None:
        ids, due = list(self.ended), list(self._due)
        self._due.extend(self._decide([*due, *self._waiting_for(ids)], until))
        for told, done in ((self.ended, ids), (self._due, due)):
            for _ in done:  # only now: until then somebody may wait for this to be done
                told.popleft()

    def _look_at_all(self, until: float) -> None:
        """Look at some of all parents that tasks wait for; go on where the last call stopped."""
        if not self._under_way:
            self._under_way, self._after, self._all_due = True, "", False
        self._under_way = self._look_at_some(until)

    def look_around(self) -> None:
        """Other processes may have stored tasks that wait: from when there are some, ends are told.

        Raises:
            RepositoryError: the repository failed.
        """
        additions = self._additions
        some = bool(self._repository.distinct("waiting_on", "", 1))
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
            self._due.extend(self._decide(self._waiting_for(gone), until))
        return bool(self._after)

    def _waiting_for(self, parents: Sequence[str]) -> list[str]:
        """The tasks that wait for one of these."""
        return [child for (child,) in self._repository.find("waiting_on", parents, ("id",))]

    # --- deciding

    def _decide(self, task_ids: Sequence[str], until: float = math.inf) -> Sequence[str]:
        """Let tasks come as far as their parents have; returns those that it did not come to in time."""
        todo, self._deciding = deque(task_ids), True
        try:
            while todo:
                some = [todo.popleft() for _ in range(min(BATCH, len(todo)))]
                found = self._repository.get_many(some)
                if children := {i: t for i, t in found.items() if t.status.value == PENDING}:
                    self._move(children)
                if time.monotonic() >= until:
                    break
        finally:
            self._deciding = False
        return todo

    def _move(self, children: Mapping[str, Task]) -> None:
        parents = {parent: None for child in children.values() for parent in child.depends_on}
        statuses = self._repository.statuses([*parents])
        now = self._clock.now_ms()
        moves = [lifecycle.parents_moved(child, statuses, now) for child in children.values()]
        self._commit(moves, children)
