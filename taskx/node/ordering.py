"""Tasks that wait for other tasks: for their parents, or for the turn of their concurrency key.

A task that waits for parents is registered with one unfinished parent. When that parent ends, the task is
registered with another unfinished parent. When no unfinished parent is left, the task is decided: it may
start, or it ends. So the end of a task without dependents costs nothing. The end of a parent costs no more
than the tasks that are registered with it.

Parked tasks, open answers and lists of children are registered in the same way: a parked task with the task
that it waits for, an answer with a task that waits for it, and a list of children with their parent. A
parent that needs only some of its children is registered with their list, and hears of each end.

A task with a concurrency key waits until it gets a turn of its key. It keeps the turn until it has ended,
even through retries. A key has one turn, or as many as its limit says: each has a name, and the repository
ensures that two tasks never have the same one. So several processes may give a turn to the next task at the
same time.
"""

from __future__ import annotations

import math
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import zip_longest
from typing import Any

from taskx.node.shared_limits import RATE, SharedBucket, is_full, until_token
from taskx.node.shares import Candidate, Shares
from taskx.stores import lists
from taskx.stores.base import Repository
from taskx.stores.door import Door
from taskx.tasks import children, lifecycle
from taskx.tasks.bell import Agenda
from taskx.tasks.clock import Clock
from taskx.tasks.errors import ConfigurationError, RepositoryError, TaskNotFound, TaskxError
from taskx.tasks.lifecycle import ANSWER, CANCELLED, CHILDREN, NO_WORK, PENDING, UNFINISHED
from taskx.tasks.log import GuardedLogger
from taskx.tasks.model import Task
from taskx.tasks.rate import MOST_TURNS, NOTHING, Cost, Limit
from taskx.tasks.record import (
    FOR_PARENTS,
    STUB,
    Stub,
    cost_from_text,
    ids_from_text,
    stub_from_values,
)
from taskx.tasks.writes import Delete, Insert, Update, Write

#: Commits moves of tasks, with the tasks as they were read, and applies the consequences.
Commit = Callable[[Sequence[Update | Delete], Mapping[str, Task] | None], Sequence[bool]]


class _Scanner(ABC):
    """Scans the store for waiting tasks that nothing moves on, a page at a time.

    Each call continues where the last one stopped, also after a ``RepositoryError``.
    """

    def __init__(self) -> None:
        # True if a full scan is due; True if one is under way; the last value that it has read.
        self._all_due, self._under_way, self._after = True, False, ""

    @abstractmethod
    def _page(self, after: str) -> tuple[Sequence[str], str]:
        """Return the stalled parents or keys of the next page, and its last value (empty: no more)."""

    @abstractmethod
    def _scan_page(self) -> bool:
        """Scan the next page and process what is stalled; return False after the last page."""

    @property
    def waiting(self) -> bool:
        """True if work is due that :meth:`process` has not finished."""
        return self._all_due or self._under_way

    def overdue(self) -> bool:
        """Return True if anything is stalled."""
        found, after = self._page("")
        while after and not found:
            found, after = self._page(after)
        return bool(found)

    def process(self, until: float = math.inf) -> bool:
        """Do the work that is due; return True if more is left.

        Args:
            until: the time, on the monotonic clock, from which the rest is left to the next call: the work
                may take long, if the end of one task ends the next one, as in a long chain.

        Raises:
            RepositoryError: the repository failed; the next call continues.
        """
        while self.waiting:
            self._process_step()
            if time.monotonic() >= until:
                break
        return self.waiting

    def _process_step(self) -> None:
        if not self._under_way:
            self._under_way, self._after, self._all_due = True, "", False
        self._under_way = self._scan_page()


class Dependents(_Scanner):
    """The tasks that wait for their parents; the housekeeper calls :meth:`process` for them."""

    def __init__(
        self,
        moves: Door,
        agenda: Agenda,
        log: GuardedLogger,
        batch: int,
        scan_batch: int,
    ) -> None:
        super().__init__()
        self._batch, self._scan_batch = batch, scan_batch
        self._moves = moves
        self._agenda = agenda
        self._log = log
        #: True if a task may wait for another one. If False, nobody needs to report that tasks end.
        self.any = False
        #: Parents that have ended, and whose dependents were not processed yet.
        self.ended: deque[str] = deque()
        # Tasks whose parents may have ended.
        self._due: deque[str] = deque()
        self._lock = threading.Lock()
        # Reentrant: a log handler or a callback of a handle that is called during the processing may cancel
        # a task. Its thread must not wait for itself.
        self._processing = threading.RLock()
        self._additions = 0

    # --- what happens

    def waits(self, waiting: Mapping[str, str]) -> None:
        """Note that tasks wait, each for one parent. They are due if it has ended in the meantime."""
        with self._lock:
            self.any = True
            self._additions += 1
        try:
            statuses = self._moves.repository.statuses([*set(waiting.values())])
        except TaskxError as error:  # the tasks are stored: their submitter must not get an error
            self._all_due = True
            self._log.warning("tasks that wait for other tasks are checked later: %s", error)
            return
        due = [
            task_id
            for task_id, parent in waiting.items()
            if statuses.get(parent) not in UNFINISHED or children.may_be_list(parent)
        ]
        if due:
            self._due.extend(due)
            self._agenda.wake_from_long_sleep()

    def parent_ended(self, task_id: str) -> None:
        """Note that a task has ended that may have dependents; its write is committed."""
        self.ended.append(task_id)
        self._agenda.wake_from_long_sleep()

    def ended_elsewhere(self) -> None:
        """Make a full scan due: a process died, perhaps before it processed the dependents of its tasks."""
        self._all_due = True

    @property
    def waiting(self) -> bool:
        """True if processing is under way or due: tasks may be released by it."""
        return self.told or super().waiting

    @property
    def told(self) -> bool:
        """True if something was reported that is not processed yet."""
        return bool(self.ended or self._due)

    def overdue(self) -> bool:
        """Return True if a task waits for a parent that has ended; that task is processed soon."""
        if gone := super().overdue():
            self._all_due = True
            self._agenda.wake_from_long_sleep()
        return gone

    def _page(self, after: str) -> tuple[Sequence[str], str]:
        """Return the parents of the next page that have ended, and the last parent of the page."""
        awaited = self._moves.repository.distinct("waiting_on", after, self._scan_batch)
        statuses = self._moves.repository.statuses(awaited)
        gone = [parent for parent in awaited if statuses.get(parent) not in UNFINISHED]
        ended = set(gone)
        some = [
            parent for parent in awaited if children.may_be_list(parent) and parent not in ended
        ]
        gone += lists.done(self._moves.repository, some)
        return gone, awaited[-1] if awaited else ""

    # --- processing

    def process(self, until: float = math.inf) -> bool:
        """Decide the tasks whose parents are known to have ended."""
        # A thread that is already processing does this when it goes on.
        if self._processing._is_owned():  # type: ignore[attr-defined]
            return False
        return super().process(until)

    def _process_step(self) -> None:
        with self._processing:
            self._process_told() if self.told else super()._process_step()

    def _process_told(self) -> None:
        """Mark the dependents of ended parents as due, and decide a batch of the due tasks."""
        if ended := _first(self.ended, self._scan_batch):
            self._due.extend(self._waiting_for(ended))
            _leave_out(self.ended, ended)
        if due := _first(self._due, self._batch):
            self._decide(due)
            _leave_out(self._due, due)

    def process_some(self) -> None:
        """Process some of what was reported, unless another thread is processing: it goes on with this."""
        if self.told and self._processing.acquire(blocking=False):
            try:
                self._process_told()
            finally:
                self._processing.release()

    def refresh(self) -> None:
        """Read if any task waits, as other processes may have stored some; if so, ends are reported."""
        additions = self._additions
        some = bool(self._moves.repository.distinct("waiting_on", "", 1))
        with self._lock:
            if additions == self._additions:
                # Tasks that ended before this was known were not reported.
                self._all_due = self._all_due or (some and not self.any)
                self.any = some

    def scan_some(self) -> None:
        """Scan a page of the parents that tasks wait for; the next call continues there.

        This finds parents whose end no event reported, because a process died at that moment or a record
        was changed by hand. Work beyond one batch is left to :meth:`process`.
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
        """Return the tasks that wait for one of these parents, or for some of a list that it is in."""
        listed = {children.list_of(parent): None for parent in parents}
        awaited = [*dict.fromkeys((*parents, *filter(None, listed)))]
        return [child for (child,) in self._moves.repository.find("waiting_on", awaited, ("id",))]

    # --- deciding

    def _decide(self, task_ids: Sequence[str]) -> None:
        """Move tasks on according to the statuses of their parents."""
        found = self._moves.repository.get_many(task_ids)
        if waiting := {i: t for i, t in found.items() if t.status.value == PENDING}:
            self._move(waiting)

    def _move(self, waiting: Mapping[str, Task]) -> None:
        parents = {
            parent: None
            for task in waiting.values()
            if task.type != CHILDREN
            for parent in task.depends_on
        }
        on, waiters = self._waits(waiting)
        parents.update(dict.fromkeys(parent for parent in on.values() if parent is not None))
        statuses = self._moves.repository.statuses([*parents])
        following = self._following(waiting, on, statuses)
        now, moves = self._moves.now_ms(), list[Update | Delete]()
        for task in waiting.values():
            awaited, some = on.get(task.id), waiters.get(task.id, ())
            if task.type == CHILDREN:
                moves += self._with_parent(task, awaited, statuses, now)
            elif awaited is not None and (other := following.get(task.id)) is not None:
                if other != awaited:
                    moves.append(lifecycle.waits_for_next(task, awaited, other))
            elif task.id in following:
                moves.append(lifecycle.wake(task, now, held=FOR_PARENTS, waiting_on=awaited))
            elif lifecycle.is_parked(task) or (task.id in on and awaited not in task.depends_on):
                moves += lifecycle.moved_on(task, awaited, statuses, some, now)
            else:
                moves.append(lifecycle.parents_moved(task, statuses, now))
        if moves:
            self._moves.commit(moves, waiting)

    def _waits(
        self, waiting: Mapping[str, Task]
    ) -> tuple[Mapping[str, str | None], Mapping[str, list[str]]]:
        """Return what parked tasks, answers and lists wait for, by id, and who waits for each answer."""
        answers = [i for i, task in waiting.items() if task.type == ANSWER]
        others = [i for i, t in waiting.items() if t.type == CHILDREN or lifecycle.is_parked(t)]
        if not (answers or others):
            return {}, {}
        find, waiters = self._moves.repository.find, dict[str, list[str]]()
        for answer, waiter in find("waiting_on", answers, ("waiting_on", "id")) if answers else ():
            waiters.setdefault(answer, []).append(waiter)
        return dict(find("id", [*answers, *others], ("id", "waiting_on"))), waiters

    # --- children

    def _following(
        self,
        waiting: Mapping[str, Task],
        on: Mapping[str, str | None],
        statuses: Mapping[str, str],
    ) -> dict[str, str | None]:
        """Return what each parent of children waits for from now on, by id; None if it may go on."""
        listed: dict[str, str] = {}
        for task_id, awaited in on.items():
            if awaited is None or waiting[task_id].type in NO_WORK:
                continue
            ended = statuses.get(awaited) not in UNFINISHED
            if children.may_be_list(awaited):
                listed[task_id] = awaited
            elif ended and (one := children.list_of(awaited)):
                listed[task_id] = one
        if not listed:
            return {}
        found = self._moves.repository.get_many([*{*listed.values()}])
        theirs = {
            task_id: found[one]
            for task_id, one in listed.items()
            if children.is_of(found.get(one), task_id)
        }
        every = {child for one in theirs.values() for child in one.depends_on}
        known = self._moves.repository.statuses([*every])
        return {task_id: children.awaited(one, known) for task_id, one in theirs.items()}

    def _with_parent(
        self, listed: Task, parent: str | None, statuses: Mapping[str, str], now: int
    ) -> list[Update | Delete]:
        """End a list of children if their parent has ended; if that was cancelled, cancel them first."""
        status = statuses.get(str(parent), "")
        if parent is None or status in UNFINISHED:
            return []
        if status == CANCELLED:
            lists.cancel(self._moves.repository, self._moves.commit, listed, now)
        return [lifecycle.listed_ended(listed, parent, status, now)]


def _first(told: deque[str], most: int) -> list[str]:
    # By index: an iterator fails if another thread adds to the deque in the meantime.
    return [told[place] for place in range(min(most, len(told)))]


def _leave_out(told: deque[str], done: Sequence[str]) -> None:
    """Remove the first items after they are done; until then a drain must see them."""
    for _ in done:
        told.popleft()


class Turns(_Scanner):
    """Gives the turns of each key to the tasks that have waited longest for them.

    Args:
        moves: the door to the repository.
        limit_of: returns the limit of a key; None if it has one turn, and no rate.
        shares: chooses the keys that get a turn, of those that share the workers.
        clock: the clock of the rates.
        log: the logger.
        batch: the number of keys that are read at once.
    """

    def __init__(
        self,
        moves: Door,
        limit_of: Callable[[str], Limit | None],
        shares: Shares,
        clock: Clock,
        log: GuardedLogger,
        batch: int,
    ) -> None:
        super().__init__()
        self._batch = batch
        self._shares = shares
        self._moves = moves
        self._limit_of = limit_of
        self._clock = clock
        self._log = log
        self._rates_used = False  # True if this process has used the rate of a key
        self._rated = RATE  # the last rate that was looked at

    def next_turn(self, key: str, leaver: str) -> Sequence[Update]:
        """Return writes that give the free turns to the first waiting tasks, while ``leaver`` ends.

        They belong into the same transaction as the end of that task.

        The result is empty if the repository fails; :meth:`advance` gives the turns later.
        """
        try:
            return self._next_turn(key, leaver)
        except Exception:  # noqa: BLE001  (the outcome of the other task must be stored in any case)
            return ()

    def _next_turn(self, key: str, leaver: str = "") -> Sequence[Update]:
        limit = self._limit_of(key)
        if limit is None:  # the guard of the write tells if the only turn is free
            first = self._moves.repository.find("line", [key], ("id",), 1)
            return [write for (task_id,) in first for write in lifecycle.give_turn(task_id, key)]
        if limit.share is not None:
            return self._share_out(leaver)
        every = lifecycle.turns_of(key, MOST_TURNS)  # the limit may have been lowered
        holders = self._moves.repository.find("turn", every, ("turn", "id"))
        taken = {turn for turn, task_id in holders if task_id != leaver}
        number = lifecycle.turns_at_once(limit)
        free = [turn for turn in every[:number] if turn not in taken]
        free = free[: max(0, number - len(taken))]
        fields = ("id", "run_at", "cost")
        first = self._moves.repository.find("line", [key], fields, len(free)) if free else ()
        waits = self._waits(key, limit, [cost for *_, cost in first]) if limit.rates else ()
        writes: list[Update] = []
        for turn, (task_id, run_at, _), wait in zip_longest(free[: len(first)], first, waits):
            due = self._moves.now_ms() + math.ceil(1000 * wait) if wait else None
            writes += lifecycle.give_turn(task_id, turn, due, run_at)
        return writes

    # --- keys that share the workers

    def share_out(self) -> bool:
        """Give turns to keys that share the workers, for the free ones of this node; return True if any.

        Raises:
            RepositoryError: the repository failed.
        """
        if writes := self._share_out():
            self._commit_turns(writes)
        return bool(writes)

    def _commit_turns(self, writes: Sequence[Update]) -> None:
        try:
            self._moves.commit(writes)
        finally:
            self._shares.settle(writes)

    def _share_out(self, leaver: str = "") -> Sequence[Update]:
        writes: list[Update] = []
        with self._shares.lock:
            turns, known = self._shares.begin(leaver), set[str]()
            while turns is not None and (one := turns.next()) is not None:
                given, stub = self._turn_of(one, leaver, known)
                writes += given
                if given:
                    known.update(write.id for write in given)
                    turns.give(one, given[-1], stub)
                else:
                    turns.pass_over(one)
        return writes

    def take_in(self, writes: Iterable[Write]) -> None:
        """Put those tasks into the buffer of this node that it takes with their turns by these writes.

        They may not be committed yet: then a start comes after them, and fails if they do.
        """
        for write in writes:
            given = self._shares.mine.get(write.id)
            if given is not None and given.stub is not None and write.changes.get("owner"):
                self._shares.take_in(given.stub)

    def _turn_of(
        self, one: Candidate, leaver: str, known: Collection[str]
    ) -> tuple[Sequence[Update], Stub | None]:
        """Return writes that give a turn of a key to its first task, and that task if it may start at once.

        The last write does so. The others repeat what other threads are about to commit for this key, but
        for the tasks that are known: if those threads fail, no task is overtaken.
        """
        key, limit = one.key, one.limit
        writes, now, given = list[Update](), self._moves.now_ms(), self._shares.mine
        found = self._moves.repository.find("line", [key], (*STUB, "cost"), 1 + len(given))
        for *values, cost in found:
            stub = stub_from_values(tuple(values))
            if (before := given.get(stub.id)) is not None:
                if stub.id not in known:
                    node = "" if before.stub is None else self._shares.taker
                    writes += lifecycle.give_turn(stub.id, before.turn, None, stub.run_at, node)
                continue
            if not self._shares.may_start(stub.type, key):
                break
            if (turn := self._free_turn(one, leaver)) is None:
                break
            [wait] = self._waits(key, limit, [cost]) if limit.rates else [0.0]
            due = now + math.ceil(1000 * wait) if wait else None
            starts = max(due or 0, stub.run_at or 0) <= now
            node = self._shares.taker if starts else ""
            writes += lifecycle.give_turn(stub.id, turn, due, stub.run_at, node)
            return writes, stub if starts else None
        return (), None

    def _free_turn(self, one: Candidate, leaver: str) -> str | None:
        """Return a turn of a key that no task has, or is about to get."""
        key, limit, given = one.key, one.limit, self._shares.mine
        every = lifecycle.turns_of(key, MOST_TURNS)
        taken = one.taken
        if limit.max_concurrency is not None or len(taken) >= one.read:  # which of the others are?
            taken = dict(self._moves.repository.find("turn", every, ("turn", "id")))
        taken.update((g.turn, i) for i, g in given.items() if lifecycle.key_of(g.turn) == key)
        number = limit.max_concurrency or MOST_TURNS
        if sum(task_id != leaver for task_id in taken.values()) >= number:
            return None
        free = (turn for turn in every[:number] if turn not in taken)
        # The turn of the leaver comes last: it may be retried, and keep that.
        return next(free, next((t for t, task_id in taken.items() if task_id == leaver), None))

    def _waits(self, key: str, limit: Limit, costs: Sequence[Any]) -> list[float]:
        """Return for each of some tasks of a key when its rate may let it start, in seconds from now.

        The start decides. So this need not know what other tasks take.
        """
        self._rates_used = True
        bucket = SharedBucket(self._moves.repository, key, limit.rates, self._clock, self._log)
        asked = [_cost_of(cost) for cost in costs]
        return [until_token(bucket, cost, number) for number, cost in enumerate(asked, 1)]

    def advance(self, keys: Iterable[str]) -> None:
        """Give the free turns of each key to its first waiting tasks."""
        wanted = list(dict.fromkeys(keys))
        try:
            for start in range(0, len(wanted), self._batch):
                self._advance(wanted[start : start + self._batch])
        except RepositoryError as error:
            self._all_due = True
            self._log.warning("turns of concurrency keys are given later: %s", error)

    def _advance(self, keys: Sequence[str]) -> None:
        writes: list[Update] = []
        sharing = {key for key in keys if self._shares.has(key)}
        for key in keys:
            writes += () if key in sharing else self._next_turn(key)
        if sharing:
            writes += self._share_out()
        if writes:
            self._commit_turns(writes)

    def several(self, key: str) -> bool:
        """Return True if several tasks of a key may have a turn, or wait for its rate."""
        return self._limit_of(key) is not None

    def scan_all_soon(self) -> None:
        """Make a full scan due: a task whose key is not known here may have given up its turn."""
        self._all_due = True

    def scan_some(self) -> None:
        """Scan a page of keys: a process may have died before it gave a free turn to the next task."""
        self._scan_page()
        self._forget_full()

    def _forget_full(self) -> None:
        """Remove the rates of keys that are full again, a page at a time: there may be many keys."""
        if not self._rates_used:
            return
        found = self._moves.repository.reads.notes_after(RATE, self._rated, self._batch)
        self._rated = max(found, default=RATE)
        for name, note in found.items():
            limit = self._limit_of(name.removeprefix(RATE))
            if limit is not None and is_full(note, self._clock):
                self._moves.repository.put_note(name, None, note.version)

    def overdue(self) -> bool:
        """Return True if a turn is free for which a task waits."""
        return self.share_out() or super().overdue()

    def _scan_page(self) -> bool:
        self.share_out()
        stalled, after = self._page(self._after)
        self._advance(stalled)
        self._after = after
        return bool(after)

    def _page(self, after: str) -> tuple[Sequence[str], str]:
        """Return the keys of the next page for which tasks wait and a turn is free."""
        keys = self._moves.repository.distinct("line", after, self._batch)
        free = {turn: key for key in keys for turn in self._turns(key)}
        for (turn,) in self._moves.repository.find("turn", [*free], ("turn",)):
            free.pop(turn, None)
        return [*dict.fromkeys(free.values())], keys[-1] if keys else ""

    def _turns(self, key: str) -> Sequence[str]:
        limit = self._limit_of(key)
        if limit is None:
            return [key]
        shares = limit.share is not None  # other keys may come first
        return () if shares else lifecycle.turns_of(key, lifecycle.turns_at_once(limit))


def _cost_of(text: Any) -> Cost:
    """Return the cost in a column; that of a damaged one is none, as at the start."""
    if text is not None:
        with suppress(ValueError, TypeError, RecursionError):
            return cost_from_text(text)
    return NOTHING


def find_parents(repository: Repository, inserts: Sequence[Insert]) -> None:
    """Register each new task with one of its unfinished parents, if it has any.

    Raises:
        TaskNotFound: a parent is neither stored nor among the new tasks.
        ConfigurationError: the tasks depend on one another in a circle.
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
    """Refuse circles among the new tasks; tasks that are already stored cannot depend on these."""
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
