"""Tasks that wait for others: for their parents, or for the turn of their concurrency key.

A task that waits for parents is registered with one unfinished parent. When that one ends, the task is
registered with another unfinished one; when there is none left, it is decided. So the end of a task without
dependents costs nothing, and that of a parent no more than the tasks that are registered with it.

A task with a concurrency key waits in line until the turn of its key is given to it, and keeps it until it
has ended: through retries, too. The repository sees to it that two never have it; so any number of
processes may give it to the next one at once.
"""

from __future__ import annotations

import math
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

from taskx.common.bell import Agenda
from taskx.core import lifecycle
from taskx.core.clock import Clock
from taskx.core.errors import ConfigurationError, RepositoryError, TaskNotFound, TaskxError
from taskx.core.lifecycle import PENDING, UNFINISHED
from taskx.core.log import GuardedLogger
from taskx.core.model import Task
from taskx.core.record import ids_from_text
from taskx.core.writes import Insert, Update
from taskx.storage.base import Repository

#: Waiting tasks that are decided, and keys that are looked after, in one transaction.
BATCH = 200
#: Parents that are looked at in each round of a slow look.
_PAGE = 1000

#: Commits moves of tasks as they were read, and does what follows.
Commit = Callable[[Sequence[Update], Mapping[str, Task]], object]


class _Scanner(ABC):
    """Looks at all that may stand still, a page at a time; each call goes on where the last one stopped.

    A look raises ``RepositoryError`` where the repository fails, and the next one goes on.
    """

    def __init__(self) -> None:
        # Whether all is to be looked at; whether that is under way, and how far it has come.
        self._all_due, self._under_way, self._after = True, False, ""

    @abstractmethod
    def _page(self, after: str) -> tuple[Sequence[str], str]:
        """Return what stands still of the next page, and where that ends: empty if it is the last one."""

    @abstractmethod
    def _scan_page(self) -> bool:
        """Look at the next page; False where there are no more."""

    @property
    def waiting(self) -> bool:
        """True if :meth:`process` has left work that is due."""
        return self._all_due or self._under_way

    def overdue(self) -> bool:
        """Return whether anything stands still."""
        found, after = self._page("")
        while after and not found:
            found, after = self._page(after)
        return bool(found)

    def process(self, patience: float = math.inf) -> None:
        """Look after what stands still, as far as it is known that something may.

        Args:
            patience: seconds after which the rest is left to the next call: where one task ends with
                another, as in a long chain, it may take long.
        """
        until = time.monotonic() + patience
        while self.waiting:
            self._process_step()
            if time.monotonic() >= until:
                break

    def _process_step(self) -> None:
        if not self._under_way:
            self._under_way, self._after, self._all_due = True, "", False
        self._under_way = self._scan_page()


class Dependents(_Scanner):
    """The tasks that wait for their parents; the housekeeper calls :meth:`process` for them."""

    def __init__(
        self,
        repository: Repository,
        commit: Commit,
        agenda: Agenda,
        clock: Clock,
        log: GuardedLogger,
    ) -> None:
        super().__init__()
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
        self._processing = threading.RLock()
        self._additions = 0

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
    def waiting(self) -> bool:
        """True if it is looking, or about to: tasks may be released by that."""
        return self.told or super().waiting

    @property
    def told(self) -> bool:
        """True if it was told of something that it has not looked at yet."""
        return bool(self.ended or self._due)

    def overdue(self) -> bool:
        """Return whether a task waits for one that has ended; it is looked at soon."""
        if gone := super().overdue():
            self._all_due = True
            self._agenda.wake_from_long_sleep()
        return gone

    def _page(self, after: str) -> tuple[Sequence[str], str]:
        """Return the parents that have ended."""
        awaited = self._repository.distinct("waiting_on", after, _PAGE)
        statuses = self._repository.statuses(awaited)
        gone = [parent for parent in awaited if statuses.get(parent) not in UNFINISHED]
        return gone, awaited[-1] if awaited else ""

    # --- looking

    def process(self, patience: float = math.inf) -> None:
        """Decide the tasks whose parents have ended, as far as that is known."""
        # A thread that is looking goes on with this.
        if not self._processing._is_owned():  # type: ignore[attr-defined]
            super().process(patience)

    def _process_step(self) -> None:
        with self._processing:
            self._process_told() if self.told else super()._process_step()

    def _process_told(self) -> None:
        """Take the dependents of what has ended for due, and decide a batch of what is due."""
        if ended := _first(self.ended, _PAGE):
            self._due.extend(self._waiting_for(ended))
            _leave_out(self.ended, ended)
        if due := _first(self._due, BATCH):
            self._decide(due)
            _leave_out(self._due, due)

    def refresh(self) -> None:
        """Other processes may have stored tasks that wait: from when there are some, ends are told."""
        additions = self._additions
        some = bool(self._repository.distinct("waiting_on", "", 1))
        with self._lock:
            if additions == self._additions:
                # What ended before it was known that somebody waits, nobody was told of.
                self._all_due = self._all_due or (some and not self.any)
                self.any = some

    def scan_some(self) -> None:
        """Look at some of the parents that are waited for, and go on there next time.

        For what no event told: a process that died just then, a record changed by hand. What is more than
        a batch is left to :meth:`process`.
        """
        with self._processing:
            self._scan_page()

    def _scan_page(self) -> bool:
        gone, after = self._page(self._after)
        if gone:
            self._due.extend(self._waiting_for(gone))
        self._after = after
        if gone:
            self._process_told()
        return bool(after)

    def _waiting_for(self, parents: Sequence[str]) -> list[str]:
        """The tasks that wait for one of these."""
        return [child for (child,) in self._repository.find("waiting_on", parents, ("id",))]

    # --- deciding

    def _decide(self, task_ids: Sequence[str]) -> None:
        """Let tasks come as far as their parents have."""
        found = self._repository.get_many(task_ids)
        if children := {i: t for i, t in found.items() if t.status.value == PENDING}:
            self._move(children)

    def _move(self, children: Mapping[str, Task]) -> None:
        parents = {parent: None for child in children.values() for parent in child.depends_on}
        statuses = self._repository.statuses([*parents])
        now = self._clock.now_ms()
        moves = [lifecycle.parents_moved(child, statuses, now) for child in children.values()]
        self._commit(moves, children)


def _first(told: deque[str], most: int) -> list[str]:
    # By their places: other threads add to it meanwhile, and an iterator would not bear that.
    return [told[place] for place in range(min(most, len(told)))]


def _leave_out(told: deque[str], done: Sequence[str]) -> None:
    """Take off the first ones, when they are done: until then somebody may wait for that."""
    for _ in done:
        told.popleft()


class Turns(_Scanner):
    """Gives the turn of each key to the first in line."""

    def __init__(
        self,
        repository: Repository,
        commit: Callable[[Sequence[Update]], object],
        log: GuardedLogger,
    ) -> None:
        super().__init__()
        self._repository = repository
        self._commit = commit
        self._log = log

    def next_turn(self, key: str) -> Sequence[Update]:
        """Return what gives the turn to the first in line, in the transaction in which another task ends.

        Nothing where that cannot be told: :meth:`advance` makes up for it.
        """
        try:
            return self._next_turn(key)
        except Exception:  # noqa: BLE001  (how the other task ended must be stored in any case)
            return ()

    def _next_turn(self, key: str) -> Sequence[Update]:
        first = self._repository.find("line", [key], ("id",), 1)
        return [write for (task_id,) in first for write in lifecycle.give_turn(task_id, key)]

    def advance(self, keys: Iterable[str]) -> None:
        """Give the turn of each of these keys to the first in line, unless another task has it."""
        wanted = list(dict.fromkeys(keys))
        try:
            for start in range(0, len(wanted), BATCH):
                self._advance(wanted[start : start + BATCH])
        except RepositoryError as error:
            self._all_due = True
            self._log.warning("whose turn has come is looked at later: %s", error)

    def _advance(self, keys: Sequence[str]) -> None:
        if writes := [write for key in keys for write in self._next_turn(key)]:
            self._commit(writes)

    def scan_all_soon(self) -> None:
        """A turn may have been given up by a task of which only the id is known."""
        self._all_due = True

    def scan_some(self) -> None:
        """Look at some lines, and go on there next time: who gave up a turn may have died just then."""
        self._scan_page()

    def _scan_page(self) -> bool:
        still, after = self._page(self._after)
        self._advance(still)
        self._after = after
        return bool(after)

    def _page(self, after: str) -> tuple[Sequence[str], str]:
        """Return the keys whose lines stand still, as nobody has the turn."""
        keys = self._repository.distinct("line", after, BATCH)
        moving = {key for (key,) in self._repository.find("turn", keys, ("turn",))}
        return [key for key in keys if key not in moving], keys[-1] if keys else ""


def find_parents(repository: Repository, inserts: Sequence[Insert]) -> None:
    """Have new tasks wait for an unfinished parent each, where they have one.

    Raises:
        TaskNotFound: a parent is neither stored nor among the new tasks.
        ConfigurationError: they depend on one another in a circle.
    """
    parents = {i.id: ids_from_text(i.row["depends_on"]) for i in inserts if "depends_on" in i.row}
    new = {insert.id: lifecycle.PENDING for insert in inserts}
    _refuse_circles(parents)
    wanted = {parent for some in parents.values() for parent in some} - new.keys()
    statuses = {**repository.statuses([*wanted]), **new}
    for some in parents.values():
        for parent in some:
            if parent not in statuses:
                raise TaskNotFound(parent)
    for insert in inserts:
        if insert.id not in parents:
            continue
        waiting_on = lifecycle.next_parent(parents[insert.id], statuses)
        if waiting_on is not None:
            lifecycle.wait_for(insert, waiting_on)


def _refuse_circles(parents: Mapping[str, Sequence[str]]) -> None:
    """Among tasks that are stored together: what is stored already cannot depend on them."""
    done: set[str] = set()
    for first in parents:
        path = {first: iter(parents[first])} if first not in done else {}
        while path:
            task_id, left = next(reversed(path.items()))
            parent = next((p for p in left if p in parents and p not in done), None)
            if parent is None:
                done.add(task_id)
                del path[task_id]
            elif parent in path:
                circle = [*path][[*path].index(parent) :]
                raise ConfigurationError(
                    f"tasks depend on one another in a circle: {' on '.join([*circle, parent])}"
                )
            else:
                path[parent] = iter(parents[parent])
