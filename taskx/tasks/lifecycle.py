"""The life of a task: the only module that knows how a move changes a record.

The table of the moves, with what follows from each one, is in :mod:`taskx.tasks.moves`.

Every function returns guarded writes. If it returns several, they exclude one another: the write whose
guard holds is the move that happened.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from operator import attrgetter
from string import ascii_uppercase
from typing import Any, NamedTuple, Protocol
from zlib import crc32

import attrs

from taskx.tasks import payload, unique
from taskx.tasks.clock import LAST, to_datetime, to_ms, to_text
from taskx.tasks.errors import (
    CancelReason,
    ConfigurationError,
    InvalidTransition,
    RepositoryCorrupt,
)
from taskx.tasks.model import Attempt, Task, TaskStatus
from taskx.tasks.moves import MOVES
from taskx.tasks.options import CHECKS, FALLBACKS
from taskx.tasks.rate import MOST_TURNS, Limit
from taskx.tasks.record import (
    BY_THREAD,
    DEFAULTS,
    EMITTED,
    FOR_PARENTS,
    FOR_TURN,
    FREE,
    INTERNAL,
    UNTIL_DUE,
    Ended,
    Stub,
    attempts_to_text,
    checkpoints_to_text,
    created_task,
    ids_to_text,
    old_params_to_text,
    optional_ms,
    row_from_task,
)
from taskx.tasks.retry import MAX_WAIT
from taskx.tasks.tags import labels_to_text
from taskx.tasks.writes import CREATED, PRESENT, Delete, Insert, Update, Write, maker

#: Number of ended attempts that a record keeps; the oldest are dropped first.
MAX_KEPT_ATTEMPTS = 50
#: Number of characters of the old params that a record keeps in its log of attempts, as JSON text.
MAX_OLD_PARAMS = 1024 * 1024
#: Number of characters of captured log that a record keeps; the earliest lines are dropped first.
MAX_LOG = 64 * 1024

PENDING, RUNNING, COMPLETED, FAILED, CANCELLED = (status.value for status in TaskStatus)
UNFINISHED = (PENDING, RUNNING)
FINISHED = (COMPLETED, FAILED, CANCELLED)


#: The type of answers: no executor runs them; somebody finishes them.
ANSWER = "answer"
#: The type of the records that stand for a list of children: see :mod:`taskx.tasks.children`.
CHILDREN = "children"
#: The types of the tasks that are no work.
NO_WORK = frozenset({ANSWER, CHILDREN})
#: The ids of answers that belong to no task begin with this.
EVENT = "event/"

# The changes of status that a user may make by hand.
_EDGES = frozenset(
    edge for move in MOVES if move.name not in ("orphan", "finish") for edge in move.edges
)


class Park(NamedTuple):
    """The end of a run whose task goes on later: it waits without a thread.

    Attributes:
        on: the task whose end it waits for; None if it waits for a time.
        until: the moment, in milliseconds, at which it goes on in any case; None if there is none.
        checkpoints: its checkpoints from now on, as JSON text; None if they are as they were stored last.
    """

    on: str | None
    until: int | None
    checkpoints: str | None = None


class Ending:
    """The end of an attempt, as the runner reports it: what is not given has its default."""

    returned: bool  #: the executor returned a value that can be stored
    result: str | None = None  #: that value as JSON text; None for None
    error: str = ""  #: the exception it raised, as text
    error_type: str = ""  #: the full class name of the exception; empty if there was none
    traceback: str = ""  #: the exception's traceback, as text
    permanent: bool = False  #: another attempt would be pointless
    apart: bool = False  #: a call with other tasks failed: it runs again, without them
    crashed: bool = False  #: the child process that ran it died
    stuck: bool = False  #: the attempt is abandoned while its thread still runs
    delay: float = 0.0  #: seconds to wait before the next attempt, if there is one
    snooze: float | None = None  #: seconds after which the executor asked to run again
    #: The limits to hold for some seconds: all of the type, that of the key, or the one with a name.
    hold: tuple[float, bool | str] | None = None
    parked: Park | None = None  #: what the attempt waits for before it goes on
    reason: CancelReason | None = None  #: why its token fired; None if it did not fire
    duration: float = 0.0  #: how long it took, in seconds
    worker: str = ""  #: the worker that ran it
    progress: int | None = None  #: the last progress that it reported; None if it reported none
    message: str = ""  #: the last message that it reported
    log: str = ""  #: the lines that it logged, if they are captured
    interrupt: BaseException | None = None  #: the Ctrl-C that ended it, in the main thread

    # One is made for each task, and mostly with three of the facts.
    def __init__(self, *, returned: bool, result: str | None = None, **facts: Any) -> None:
        self.returned, self.result = returned, result
        if facts:
            if unknown := facts.keys() - Ending.__annotations__.keys():
                raise TypeError(f"an Ending has no {', '.join(unknown)}")
            self.__dict__.update(facts)

    def changed(self, **facts: Any) -> Ending:
        """Return a copy with other facts."""
        return Ending(**{**self.__dict__, **facts})


# --- creation, and before the start


def create(*, task_id: str, now: int, **columns: Any) -> Insert:
    """Store a new pending task: see :func:`created`."""
    return created({**columns, "id": task_id, "created_at": now})


def created(columns: Mapping[str, Any], key: int = 0) -> Insert:
    """Store a new pending task.

    ``columns`` has its id, type, params, and every column that differs from ``DEFAULTS``. The values are
    those of rows (JSON text, milliseconds), but ``depends_on`` is a list, and ``expires`` may be given
    instead of ``expires_at`` (see :func:`expiry`). The task first waits for its parents (see
    :func:`wait_for`), then for its turn, then for its time. ``key`` is as in ``Insert``.
    """
    row = {**_NEW, **columns}
    if row["run_at"] is not None:
        row["held"] = until_due(row["run_at"], row["created_at"])
    if len(row) > len(_NEW):  # few tasks have more columns
        if "unique_key" in row:
            row["unique_lock"] = row["unique_key"]
        if "concurrency_key" in row:
            row["held"] = FOR_TURN
        if "depends_on" in row:
            row["depends_on"] = ids_to_text(row["depends_on"])
        if "expires" in row:
            row["expires_at"] = expiry(row["created_at"], row["run_at"], row.pop("expires"))
    return Insert(row, key=key)


_NEW: dict[str, Any] = {name: DEFAULTS.get(name) for name in CREATED}


def until_due(run_at: int | None, now: int) -> int:
    """Return the value of ``held`` for a pending task that can wait only for its time."""
    return UNTIL_DUE if run_at is not None and run_at > now else FREE


def expiry(created_at: int, run_at: int | None, expires: int) -> int:
    """Return the ``expires_at`` of a new task: ``expires`` milliseconds after its time to start."""
    return min(max(created_at, run_at or 0) + expires, LAST)


def release(task_id: str, run_at: Any = PRESENT) -> Update:
    """Let a pending task start whose time has come.

    ``run_at`` is that time, as it was read: a task that was put off meanwhile goes on waiting.
    """
    guard = {"status": PENDING, "held": UNTIL_DUE, "run_at": run_at}
    return Update(task_id, guard, {"held": FREE}, move="release", skips=True)


def take(task_id: str, node: str, owner: str = "") -> Update:
    """Note that ``node`` now has a pending task in its buffer, instead of ``owner`` (empty: of no node).

    A task that is held back has no owner.
    """
    guard = {"status": PENDING, "held": FREE, "owner": owner}
    return Update(task_id, guard, {"owner": node}, move="take", skips=True)


def free(task_id: str, node: str) -> Update:
    """Free a pending task: ``node`` no longer has it in its buffer, and any node can fetch it."""
    return Update(task_id, {"status": PENDING, "owner": node}, {"owner": ""}, move="free")


def put_off(task: Task, until: int) -> Update:
    """Put off the turn of a pending task: the rate of its key lets it start no sooner."""
    guard = {"status": PENDING, "held": FREE, "starts": task.starts}
    return Update(
        task.id, guard, {"held": UNTIL_DUE, "run_at": until, "owner": ""}, move="give turn"
    )


def hasten(task: Task, put_off_to: int, due: int) -> Update:
    """Let a pending task that was put off start sooner: the tokens that it lacked were put back."""
    guard = {"status": PENDING, "held": UNTIL_DUE, "run_at": put_off_to, "starts": task.starts}
    return Update(task.id, guard, {"held": UNTIL_DUE, "run_at": due}, move="give turn", skips=True)


def cancel(task_id: str, now: int) -> list[Update]:
    """Cancel a task: a pending one at once, a running one by a request (the last of the writes).

    A pending task releases its unique key, whatever its scope.
    """
    runs, asked = {"status": RUNNING, "cancel_requested_at": None}, {"cancel_requested_at": now}
    return [
        *_cancel_pending(task_id, {}, {"completed_at": now}, durable=True, move="cancel"),
        Update(task_id, runs, asked, durable=True, move="request cancel"),
    ]


def _cancel_pending(
    task_id: str,
    guard: Mapping[str, Any],
    changes: Mapping[str, Any],
    *,
    durable: bool,
    move: str,
    skips: bool = False,
) -> list[Update]:
    gone = {"status": CANCELLED, "owner": "", "unique_lock": None, "waiting_on": None}
    gone.update(expires_at=None, **changes)
    # If a thread of an earlier attempt still runs, the task keeps its turn: see lift_bar. ``held`` is
    # None in records that the original TaskX wrote.
    free = {"status": PENDING, "held": (FREE, UNTIL_DUE, FOR_TURN, None), **guard}
    parked = {"status": PENDING, "held": FOR_PARENTS, "started_at": PRESENT, **guard}
    barred = {"status": PENDING, "held": (FOR_PARENTS, BY_THREAD), "started_at": None, **guard}
    return [
        Update(task_id, free, {**gone, "turn": None}, durable=durable, move=move, skips=skips),
        Update(task_id, parked, {**gone, "turn": None}, durable=durable, move=move, skips=skips),
        Update(task_id, barred, gone, durable=durable, move=move, skips=skips),
    ]


def has_expired(task: Task, now: int) -> bool:
    """Return True if a task is pending and has not started for the first time by its ``expires_at``."""
    if task.expires_at is None or task.status is not TaskStatus.PENDING:
        return False
    return to_ms(task.expires_at) <= now


def expire(task: Task, now: int) -> list[Update]:
    """Cancel a pending task that has expired; a parked one goes on, as it has waited long enough.

    The guard fails once it runs, or cannot expire any more.
    """
    assert task.expires_at is not None
    expires_at = to_ms(task.expires_at)
    if is_parked(task):
        return [wake(task, now, expires_at=expires_at)]
    before = "an answer" if task.type == ANSWER else "its first start"
    error = f"{EXPIRED} {to_text(expires_at)} before {before}"
    if task.earlier_attempts:  # those of the task that this one has replaced
        error += " since it was replaced"
    changes = {"completed_at": now, "error": error}
    return _cancel_pending(
        task.id, {"expires_at": expires_at}, changes, durable=False, move="expire", skips=True
    )


#: The error of a task that has expired begins with this.
EXPIRED = "expired at"


def replace(holder: Task, new: Insert, at_most: float | None = None) -> list[Update]:
    """Replace params and options of the pending task that holds a unique key by those of a new task.

    The holder keeps its age, and goes on waiting for its parents, its turn or a thread. Return no write if
    the holder is not pending, if it waits in the middle of an attempt, or if its type, parents or
    concurrency key differ: these cannot be replaced. It waits for the new ``run_at``, but not longer than
    ``at_most`` seconds since it was created.
    """
    wanted = created_task(new.row)
    if holder.status is not TaskStatus.PENDING or is_parked(holder):
        return []
    if _fixed(holder) != _fixed(wanted):
        return []
    # The checkpoints of earlier attempts belong to the old params. A node that has read the record to start
    # it has the old params, too: it finds that ``starts`` has changed.
    changes = {name: new.row[name] for name in _REPLACED}
    if at_most is not None and holder.created_at is not None:
        latest = to_ms(holder.created_at) + round(at_most * 1000)
        changes["run_at"] = min(changes["run_at"] or latest, latest)
    changes.update(checkpoints=None, starts=holder.starts + 1)
    if holder.expires_at is not None or "expires_at" in new.row:
        changes["expires_at"] = new.row.get("expires_at")
    if wanted.cost != holder.cost:
        changes["cost"] = new.row.get("cost")
    if wanted.tags != holder.tags:
        changes["tags"] = labels_to_text(wanted.tags, holder.flow)
    # No owner: the task is fetched again and sorted by its new priority.
    due = {**changes, "held": until_due(changes["run_at"], new.row["created_at"]), "owner": ""}
    guard = {"status": PENDING, "unique_lock": holder.unique_key, "starts": holder.starts}
    return _pending_changed(holder.id, guard, due, changes, "replace")


def _pending_changed(
    task_id: str, guard: dict[str, Any], due: dict[str, Any], waiting: dict[str, Any], move: str
) -> list[Update]:
    """Change a pending task: by ``due`` if it waits for nothing or for its time, else by ``waiting``."""
    return [
        Update(task_id, {**guard, "held": held}, changes, durable=True, move=move)
        for held, changes in (
            ((FREE, UNTIL_DUE), due),
            ((FOR_PARENTS, BY_THREAD, FOR_TURN), waiting),
        )
    ]


def _fixed(task: Task) -> tuple[object, ...]:
    policy = task.on_parent_failure or "cancel"
    return task.type, task.depends_on, policy, task.concurrency_key


_REPLACED = ("params", "created_by", *CHECKS, "unique_scope")


# --- waiting for its turn


def turns_of(key: str, number: int) -> list[str]:
    """Return the names of the first turns of a key, as the column ``turn`` has them."""
    return [key, *(f"{key}{_NUMBER}{n}" for n in range(1, number))]


def key_of(turn: str) -> str:
    """Return the key of a turn."""
    return turn.partition(_NUMBER)[0]


_NUMBER = "\x1f"


def turns_at_once(limit: Limit) -> int:
    """Return the number of turns that a limit gives to each of its keys."""
    return min(limit.max_concurrency or 1, MOST_TURNS)


def give_turn(
    task_id: str, turn: str, due: int | None = None, run_at: int | None = None, node: str = ""
) -> list[Update]:
    """Give a pending task a turn of its key. It may start when its time has come, too.

    ``due`` is the time at which a rate lets it start, if it has one, and ``run_at`` its own time, as it was
    read. ``node`` has the task in its buffer from then on: its time has come. The guard fails while another
    task has the turn.
    """
    ways: Sequence[tuple[Any, dict[str, Any]]] = (
        (None, {"held": FREE}),
        (PRESENT, {"held": UNTIL_DUE}),
    )
    if due is not None:
        ways = ((run_at, {"held": UNTIL_DUE, "run_at": max(due, run_at or 0)}),)
    elif node:
        ways = ((run_at, {"held": FREE, "owner": node}),)
    return [
        Update(
            task_id,
            {"status": PENDING, "held": FOR_TURN, "run_at": when},
            {**changes, "turn": turn},
            move="give turn",
            skips=True,
        )
        for when, changes in ways
    ]


# --- waiting for parents


def wait_for(insert: Insert, parent: str) -> None:
    """Make a new task wait for the end of a parent first."""
    insert.row.update(held=FOR_PARENTS, waiting_on=parent)
    if insert.row["type"] == ANSWER:  # its time counts from when it can be given
        insert.row.pop("expires_at", None)


def next_parent(parents: Sequence[str], statuses: Mapping[str, str]) -> str | None:
    """Return the parent whose end a new task waits for; None if all parents have completed.

    If all parents have ended but not all completed, return the last one. The task then waits until
    :func:`parents_moved` decides about it.
    """
    unfinished = unfinished_parent(parents, statuses)
    if unfinished is not None or _bad_parent(parents, statuses) is None:
        return unfinished
    return parents[-1]


def unfinished_parent(parents: Sequence[str], statuses: Mapping[str, str]) -> str | None:
    """Return a pseudo-random parent that has not ended; None if all have ended.

    A random choice makes it rare that this parent ends before the others, in whatever order they end: with
    ten thousand parents, a task chooses again about ten times. The choice depends only on the parents' ids,
    so it is the same for all children and on all nodes.
    """
    left = [parent for parent in parents if statuses.get(parent) in UNFINISHED]
    return max(left, key=lambda parent: crc32(parent.encode()), default=None)


def _bad_parent(parents: Sequence[str], statuses: Mapping[str, str]) -> str | None:
    return next((parent for parent in parents if statuses.get(parent) != COMPLETED), None)


# The error of a task that ended because of a parent begins with this; a requeue recognises it by that.
_ITS_PARENT = "its parent "


def parents_moved(child: Task, statuses: Mapping[str, str], now: int) -> Update:
    """Decide about a task that waits for its parents: it waits for another one, may go on, or ends.

    A parent whose record is gone counts as one that did not complete. The guard fails if a parent was
    requeued since ``statuses`` were read (see :func:`wait_again`), or if the task was replaced.
    """
    guard: dict[str, Any] = {"status": PENDING, "held": FOR_PARENTS, "starts": child.starts}
    waiting_on = unfinished_parent(child.depends_on, statuses)
    if waiting_on is not None:
        return Update(child.id, guard, {"waiting_on": waiting_on}, move="parents moved", skips=True)
    bad = _bad_parent(child.depends_on, statuses)
    if bad is None or child.on_parent_failure == "run":
        run_at = None if child.run_at is None else to_ms(child.run_at)
        held = until_due(run_at, now) if child.concurrency_key is None else FOR_TURN
        if child.stuck_on:
            guard["stuck_on"], held = child.stuck_on, BY_THREAD
        free: dict[str, Any] = {"waiting_on": None, "held": held}
        if child.type == ANSWER:
            guard["expires_at"] = None  # else its time-out has begun on another node
            free = _opened(child.id, child.timeout, now)
        return Update(child.id, guard, free, move="parents moved", skips=True)
    changes = {
        "status": CANCELLED,
        "completed_at": now,
        "error": _because_of(bad, statuses.get(bad, "")),
        "waiting_on": None,
    }
    if child.expires_at is not None:
        changes["expires_at"] = None
    if child.on_parent_failure == "fail":
        changes.update(status=FAILED, dead_letter=1, **unique.freed_by_end(child))
    else:
        changes["unique_lock"] = None  # as for any task that is cancelled before it starts
    return Update(child.id, guard, changes, move="orphan", skips=True)


def wait_for_more(child: Task, parents: Sequence[str]) -> Update:
    """Let a task that waits for its parents, or has ended without success, depend on further tasks.

    One of its parents runs, so nobody decides about it until that ends. Somebody may have read it for a
    decision after that: the guard of this will fail, because ``starts`` is raised.
    """
    every = [*dict.fromkeys((*child.depends_on, *parents))]
    changes = {"depends_on": ids_to_text(every), "starts": child.starts + 1}
    guard: dict[str, Any] = {"status": child.status.value, "starts": child.starts}
    if child.status is TaskStatus.PENDING:
        guard["held"] = FOR_PARENTS
    return Update(child.id, guard, changes, durable=True, move="parents moved")


def wait_again(child: Task, parents: Mapping[str, Task], now: int) -> list[Update]:
    """Let a task go on waiting for parents that are requeued in the same transaction.

    Another process may be deciding about the task by the old statuses of these parents. If its decision is
    not committed yet, the guard of that will fail, because ``starts`` is raised. If the task has ended by
    it, the second write requeues the task.
    """
    theirs = [parents[parent] for parent in child.depends_on if parent in parents]
    guard = {"status": PENDING, "held": FOR_PARENTS, "starts": child.starts}
    waits = {"waiting_on": theirs[0].id, "starts": child.starts + 1}
    ended = requeue(attrs.evolve(child, status=TaskStatus.CANCELLED), now, theirs[0].id)
    errors = tuple(_because_of(parent.id, parent.status.value) for parent in theirs)
    by_them = {**ended.guard, "status": REQUEUEABLE, "error": errors}
    return [Update(child.id, guard, waits, move="parents moved"), ended._replace(guard=by_them)]


def _because_of(parent: str, status: str) -> str:
    return f"{_ITS_PARENT}{parent} {_WORDS.get(status, 'is gone')}"


_WORDS = {FAILED: "failed", CANCELLED: "was cancelled"}


def ended_with(child: Task, parents: Collection[str]) -> bool:
    """Return True if a task failed or was cancelled because one of these parents did not complete."""
    theirs = tuple(f"{_ITS_PARENT}{parent} " for parent in child.depends_on if parent in parents)
    return child.status.value in (FAILED, CANCELLED) and child.error.startswith(theirs)


# --- waiting for a person, for another task or for a time, in the middle of an attempt


def is_parked(task: Task) -> bool:
    """Return True if a pending task waits in the middle of an attempt, or has just waited."""
    return task.status is TaskStatus.PENDING and task.started_at is not None


def opened(insert: Insert, waits_for: str | None = None) -> Insert:
    """Make a new answer wait until somebody finishes it, or until the task that waits for it has ended.

    Without such a task, it waits for its own end, so that nothing moves it on.
    """
    row = insert.row
    row.update(_opened(waits_for or insert.id, row["timeout"], row["created_at"]))
    return insert


def _opened(waiting_on: str, timeout: float | None, now: int) -> dict[str, Any]:
    changes: dict[str, Any] = {"held": FOR_PARENTS, "waiting_on": waiting_on}
    if timeout is not None:
        changes["expires_at"] = expiry(now, None, max(1, round(min(timeout, MAX_WAIT) * 1000)))
    return changes


def finish(answer: Task, now: int, result: str | None, error: str, by: str) -> Update:
    """End an answer, by its result as JSON text or by an error. The guard fails if it has ended."""
    changes: dict[str, Any] = {"status": COMPLETED, "result": result, "progress": 100}
    if error:
        changes = {"status": FAILED, "error": error, "dead_letter": 1}
    changes.update(completed_at=now, worker=by, held=FREE, waiting_on=None, expires_at=None)
    guard = {"status": PENDING, "starts": answer.starts}
    return Update(answer.id, guard, changes, durable=True, move="finish")


def askers(answer_id: str) -> list[str]:
    """Return the ids of the tasks that could ask for an answer with this id, the longest first."""
    parts = answer_id.split("/")
    return ["/".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]


def created_finished(insert: Insert, finish: Update) -> Insert:
    """Store a new answer as already finished, because nobody has asked for it yet."""
    return insert._replace(row={**insert.row, **finish.changes})


def moved_on(
    task: Task, on: str | None, statuses: Mapping[str, str], waiters: Sequence[str], now: int
) -> list[Update | Delete]:
    """Decide about a parked task, or about an open answer, when what it waits for may have ended.

    A parked task goes on. An answer ends with the last task that waits for it: one that belongs to no task
    leaves no record, so that it may be finished later.

    Args:
        task: the parked task, or the answer.
        on: the task that it waits for: of an answer, one that waits for the answer.
        statuses: the statuses of tasks.
        waiters: the tasks that wait for the answer.
        now: the time.
    """
    if on is None or statuses.get(on) in UNFINISHED:
        return []
    if is_parked(task):
        return [wake(task, now, held=FOR_PARENTS, waiting_on=on)]
    guard = {"status": PENDING, "starts": task.starts, "waiting_on": on}
    if others := [waiter for waiter in waiters if waiter not in (on, task.id)]:
        return [Update(task.id, guard, {"waiting_on": others[0]}, move="wake", skips=True)]
    if task.id.startswith(EVENT):
        return [Delete(task.id, guard, durable=False, move="delete", skips=True)]
    error = f"{_WAITED}{on} {_ENDS.get(statuses.get(on, ''), 'is gone')}"
    changes = {"status": CANCELLED, "completed_at": now, "error": error}
    changes.update(waiting_on=None, expires_at=None)
    return [Update(task.id, guard, changes, move="cancel", skips=True)]


# The error of an answer that ended with the task that waited for it begins with this.
_WAITED = "its task "
_ENDS = {COMPLETED: "has completed", FAILED: "failed", CANCELLED: "was cancelled"}


def ended_unasked(answer: Task) -> bool:
    """Return True if an answer was cancelled because the task that waited for it had ended."""
    return answer.status.value == CANCELLED and answer.error.startswith(_WAITED)


def asked_again(answer: Task, asked: Insert) -> Update:
    """Ask as ``asked`` does, with its question and its time, because the task was requeued.

    The answer was cancelled with that task, or is still open.
    """
    guard = {"status": answer.status.value, "starts": answer.starts, "error": answer.error}
    changes = {name: asked.row.get(name) for name in _ASKED}
    if answer.status.value == PENDING:
        return Update(answer.id, guard, changes, move="parents moved")
    changes = {name: DEFAULTS[name] for name in _AS_NEW} | changes
    return Update(answer.id, guard, changes, move="requeue")


# The columns of an answer that say what is asked, and until when.
_ASKED = ("params", "tags", "timeout", "held", "waiting_on", "expires_at")


def listed_ended(listed: Task, parent: str, status: str, now: int) -> Update:
    """End the record of a list of children with their parent, which has this status."""
    guard = {"status": PENDING, "starts": listed.starts, "waiting_on": parent}
    changes = {"status": COMPLETED, "completed_at": now, "held": FREE, "waiting_on": None}
    if status == CANCELLED:
        changes.update(status=CANCELLED, error=f"{_WAITED}{parent} {_ENDS[CANCELLED]}")
    move = "cancel" if status == CANCELLED else "finish"
    return Update(listed.id, guard, changes, move=move, skips=True)


def listed_again(listed: Task, parent: str) -> Update:
    """Open the record of a list of children again: its parent had ended, and was requeued."""
    guard = {"status": FINISHED, "starts": listed.starts}
    changes = {name: DEFAULTS[name] for name in _AS_NEW}
    changes.update(held=FOR_PARENTS, waiting_on=parent)
    return Update(listed.id, guard, changes, move="requeue")


def waits_for_next(task: Task, on: str, following: str) -> Update:
    """Let a parked task wait for another one instead of this one."""
    guard = {"status": PENDING, "starts": task.starts, "held": FOR_PARENTS, "waiting_on": on}
    return Update(task.id, guard, {"waiting_on": following}, move="parents moved", skips=True)


def wake(task: Task, now: int, **guard: Any) -> Update:
    """Let a task start that waits for a time, or for the end of another task, in the middle of an attempt.

    Its waiting time counts from now.
    """
    wanted = {"status": PENDING, "starts": task.starts, **guard}
    changes = {"held": FREE, "waiting_on": None, "expires_at": None, "run_at": now}
    return Update(task.id, wanted, changes, move="wake", skips=True)


def wake_early(task: Task, now: int, checkpoints: str | None) -> Update:
    """Let a pending task start now that waits for its time; ``checkpoints`` are new ones, or None."""
    write = wake(task, now, held=UNTIL_DUE)
    changes: dict[str, Any] = {"held": FREE, "run_at": now}
    if checkpoints is not None:
        changes["checkpoints"] = checkpoints
    return write._replace(changes=changes, durable=True, skips=False)


def end_delay(task: Task, now: int) -> Update:
    """Let a pending task that waits for something else first wait for its time no more.

    Another process may be deciding about it by its old time: the guard of that will fail.
    """
    others = (FOR_PARENTS, FOR_TURN, BY_THREAD)
    guard = {"status": PENDING, "starts": task.starts, "held": others}
    changes = {"run_at": now, "starts": task.starts + 1}
    return Update(task.id, guard, changes, durable=True, move="wake")


# --- running


def start(task: Task, now: int, node: str, worker: str = "") -> Update | None:
    """Start a pending task on the node with the id ``node``.

    Return None if the task is not pending, or has expired.

    The guard on ``starts`` makes this a compare-and-set; the increased ``starts`` is the run's fence. If a
    single crash is the task's end, the start is durable: a power cut must not undo it. ``worker`` is the
    node's name, or the worker's if it is already known which one will run the task.
    """
    if task.status is not TaskStatus.PENDING:
        return None
    changes = {
        "status": RUNNING,
        "starts": task.starts + 1,
        "started_at": now,
        "owner": node,
        "worker": worker,
        "timeout": task.timeout,
        "max_attempts": task.max_attempts,
        "max_crashes": task.max_crashes,
    }
    if task.version is not None or task.starts:  # an earlier start may have stored another version
        changes["version"] = task.version
    if task.unique_key is not None:
        changes.update(unique.freed_by_start(task))
    if task.expires_at is not None and has_expired(task, now):
        return None
    guard = {"status": PENDING, "starts": task.starts, "held": FREE}
    return Update(task.id, guard, changes, task.max_crashes == 1, "start", skips=True)


def start_all(
    tasks: Sequence[Task],
    now: int,
    node: str,
    worker: str,
    numbers: Mapping[str, int] | None = None,
) -> list[Update | None]:
    """Start several tasks, as :func:`start` does. Starts that are alike share their guard and changes.

    ``numbers`` are those of the records, by id, as far as they are known: see ``Update.seq``.
    """
    numbers = numbers or {}
    made: list[Update | None] = []
    known: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    for task in tasks:
        seq = numbers.get(task.id, 0)
        if task.unique_key is not None or task.expires_at is not None:
            update = start(task, now, node, worker)
            made.append(update and update._replace(seq=seq))
            continue
        alike = (
            *(task.status, task.starts, task.timeout),
            *(task.max_attempts, task.max_crashes, task.version),
        )
        if (rest := known.get(alike)) is not None:
            made.append(_update((task.id, *rest, seq)))
        elif (update := start(task, now, node, worker)) is not None:
            known[alike] = update[1:-1]
            made.append(update._replace(seq=seq))
        else:
            made.append(None)
    return made


_insert, _update = maker(Insert), maker(Update)


def created_started(insert: Insert, start: Update) -> Insert:
    """Store a new task as already started: creation and :func:`start` in one write instead of two."""
    return _insert(({**insert.row, **start.changes}, *insert[1:]))


def as_submitted(insert: Insert) -> dict[str, Any]:
    """Return the row of a new task as submitted, without the start that was stored with it."""
    if "status" not in insert.row:
        return insert.row
    return {**insert.row, "status": PENDING, "starts": 0, "started_at": None, "worker": ""}


class _Counts(Protocol):
    @property
    def crashes(self) -> int: ...
    @property
    def max_crashes(self) -> int | None: ...


def last_chance(task: _Counts) -> bool:
    """Return True if the task has crashed before and one more crash would fail it."""
    return 0 < task.crashes >= _crashes_allowed(task) - 1


def mark_started(tasks: Sequence[Task], starts: Sequence[Update]) -> None:
    """Change task objects as the written starts have changed their records."""
    began = to_datetime(starts[0].changes["started_at"]) if starts else None  # all at one time
    for task, (_, _, changes, *_) in zip(tasks, starts, strict=True):
        task.status = TaskStatus.RUNNING
        task.starts = changes["starts"]
        task.started_at = began
        task.owner = changes["owner"]
        task.worker = changes["worker"]


def _fence(task: Task, **more: Any) -> dict[str, Any]:
    return {"status": RUNNING, "starts": task.starts, **more}


_FIRST_FENCE = {"status": RUNNING, "starts": 1}


def hand_back(task: Task, now: int, *, resumed: bool = False) -> list[Update]:
    """Undo a start whose executor was never called; the task goes back into its node's buffer.

    ``resumed`` says that it was to go on in the middle of an attempt. A task whose first start has freed
    its unique key takes it again, unless another task has it by now.
    """
    worker = task.earlier_attempts[-1].worker if task.earlier_attempts else ""
    changes = {"status": PENDING, "started_at": None, "worker": worker, "owner": task.owner}
    if resumed:
        del changes["started_at"]
    ending = Ending(returned=False, worker=worker)
    writes = _unless_cancelled(task, changes, ending, now, "hand back")
    before = resumed or task.errors or task.crashes or task.interruptions or task.snoozes
    if task.unique_scope == unique.PENDING and not before:
        first = writes[0]
        writes.insert(0, first._replace(changes={**changes, **unique.taken_again(task, now)}))
    return writes


def progress(task_id: str, starts: int | None, percent: int, message: str) -> Update:
    """Store the progress of a run: the one with this ``starts``, or the current one if it is None.

    A node stores the progress of its runs again and again, so it waits for no lock.
    """
    guard: dict[str, Any] = {"status": RUNNING}
    if starts is not None:
        guard["starts"] = starts
    return Update(
        task_id,
        guard,
        {"progress": percent, "message": message},
        move="progress",
        skips=starts is not None,
    )


def log_so_far(task: Task, lines: str) -> Update:
    """Store the lines that a run has logged by now. Its end stores them again, with those that follow."""
    changes = {"log": _logged(task, lines)}
    return Update(task.id, _fence(task), changes, move="checkpoint", skips=True)


def checkpoint(task: Task, checkpoints: str, *, durable: bool) -> Update:
    """Store a run's checkpoints, given as JSON text, for later attempts."""
    return Update(task.id, _fence(task), {"checkpoints": checkpoints}, durable, "checkpoint")


def still_runs(task: Task) -> Update:
    """Change nothing, if the run still has its task."""
    return Update(task.id, _fence(task), {"starts": task.starts}, move="checkpoint")


def conclude(task: Task, ending: Ending, now: int, seq: int = 0) -> list[Update]:
    """End an attempt; the move depends on how the attempt ended and on why its token fired.

    ``seq`` is the number of the record if it is known: see ``Update``.
    """
    if ending.returned:
        changes = {
            "status": COMPLETED,
            "completed_at": now,
            "duration": ending.duration + task.duration,
            "owner": "",
            "worker": ending.worker,
            "result": ending.result,
            "progress": 100,
        }
        if _needs_more(task) != _NO_MORE or ending.log or ending.progress is not None:
            changes = {**_end(task, ending, now, COMPLETED), **changes}
        if task.errors:
            changes.update(_NO_ERROR)
        fence = _FIRST_FENCE if task.starts == 1 else _fence(task)  # one for most attempts
        return [_update((task.id, fence, changes, False, "complete", False, seq))]
    if ending.reason is CancelReason.CANCEL:
        return [_cancelled(task, ending, now)]
    if ending.parked is not None and ending.reason is not CancelReason.TIMEOUT:
        return _park(task, ending, ending.parked, now)
    if ending.reason in (CancelReason.STOP, CancelReason.LEASE_LOST):
        return _interrupt(task, ending, now)
    if ending.snooze is not None and ending.reason is None:
        counted = {"snoozes": task.snoozes + 1, **_put_off(task, ending.snooze, now)}
        return _again(task, ending, now, "snooze", "snoozed", counted)
    if ending.crashed and ending.reason is None:
        return _crash(task, ending, now, owner=task.owner)
    counted = {"errors": task.errors + 1, **_error(ending)}
    if ending.apart:
        writes = _interrupt(task, ending, now, owner=task.owner)
    elif ending.permanent or counted["errors"] >= (task.max_attempts or FALLBACKS["max_attempts"]):
        changes = {**_end(task, ending, now, FAILED), **counted, "dead_letter": 1}
        writes = [Update(task.id, _fence(task), changes, move="fail")]
    else:
        counted.update(_put_off(task, ending.delay, now))
        writes = _again(task, ending, now, "retry", "retried", counted)
    return [_barred(task, write) for write in writes] if ending.stuck else writes


# Most tasks have none of these, whose columns change at the end.
_needs_more = attrgetter("unique_key", "concurrency_key", "expires_at")
_NO_MORE = (None, None, None)


def _barred(task: Task, write: Update) -> Update:
    """Change the write that ends an attempt whose thread still runs on the task's node.

    Until that thread ends, the task does not start again. The task also keeps its turn, so that no other
    task of its concurrency key starts.
    """
    changes = {**write.changes, "stuck_on": task.owner}
    changes.pop("turn", None)
    if changes["status"] == PENDING:
        changes.update(held=BY_THREAD, owner="")
    return write._replace(changes=changes)


def _put_off(task: Task, seconds: float, now: int) -> dict[str, Any]:
    """Let a task wait for some seconds without an owner; without a wait it stays with its node."""
    wait = round(min(seconds, MAX_WAIT) * 1000)
    if wait <= 0:
        return {"owner": task.owner}
    return {"held": UNTIL_DUE, "run_at": now + wait}


def _end(task: Task, ending: Ending, now: int, status: str) -> dict[str, Any]:
    changes: dict[str, Any] = {
        "status": status,
        "completed_at": now,
        "duration": ending.duration + task.duration,
        "owner": "",
        "worker": ending.worker,
    }
    if ending.progress is not None:
        changes["progress"] = ending.progress
        changes["message"] = ending.message
    if ending.log:
        changes["log"] = _logged(task, ending.log)
    if task.unique_key is not None:
        changes.update(unique.freed_by_end(task))
    if task.concurrency_key is not None:
        changes["turn"] = None
    if task.expires_at is not None:
        changes["expires_at"] = None
    return changes


_NO_ERROR = {"error": "", "error_type": "", "traceback": ""}


def _error(ending: Ending) -> dict[str, str]:
    return {name: getattr(ending, name) for name in _NO_ERROR}


def _logged(task: Task, new: str) -> str:
    """Return the captured log: earlier attempts, a heading for this attempt, then its lines."""
    lines = f"{task.log}--- attempt {task.attempt}, start {task.starts}\n{new}"
    return lines if len(lines) <= MAX_LOG else lines[-MAX_LOG:].partition("\n")[2]


def _cancelled(task: Task, ending: Ending, now: int, **guard: Any) -> Update:
    changes = _end(task, ending, now, CANCELLED)
    return Update(task.id, _fence(task, **guard), changes, move="cancelled")


#: The error of an attempt in a call with other tasks that failed as a whole begins with this.
TOGETHER = "in a call with "


def runs_apart(task: Task) -> bool:
    """Return True if a task may have been the reason why a call failed, or a process died."""
    if task.errors or task.crashes:
        return True
    last = task.earlier_attempts[-1] if task.earlier_attempts else None
    return last is not None and last.outcome == "interrupted" and last.error.startswith(TOGETHER)


def _interrupt(task: Task, ending: Ending, now: int, *, owner: str = "") -> list[Update]:
    counted = {"interruptions": task.interruptions + 1, "owner": owner}
    return _again(task, ending, now, "interrupt", "interrupted", counted)


def _park(task: Task, ending: Ending, park: Park, now: int) -> list[Update]:
    """Make the task wait in the middle of the attempt. The log of attempts and all counts stay."""
    changes = {
        "status": PENDING,
        "owner": "",
        "worker": ending.worker,
        "duration": ending.duration + task.duration,
        "held": FOR_PARENTS,
        "waiting_on": park.on,
        "expires_at": park.until,
    }
    if park.on is None:
        changes.update(held=UNTIL_DUE, run_at=park.until, expires_at=None)
    if park.checkpoints is not None:
        changes["checkpoints"] = park.checkpoints
    if ending.progress is not None:
        changes.update(progress=ending.progress, message=ending.message)
    if ending.log:
        changes["log"] = _logged(task, ending.log)
    return _unless_cancelled(task, changes, ending, now, "park")


def _again(
    task: Task, ending: Ending, now: int, move: str, outcome: str, more: Mapping[str, Any]
) -> list[Update]:
    """Make the task pending again, without an owner unless ``more`` names one; or cancel it."""
    changes = {
        "status": PENDING,
        "started_at": None,
        "progress": 0,
        "message": "",
        "owner": "",
        "worker": ending.worker,
        "earlier_attempts": _archive(task, now, outcome, ending),
        **more,
    }
    if ending.log:
        changes["log"] = _logged(task, ending.log)
    if task.expires_at is not None:  # only the first start can be too late
        changes["expires_at"] = None
    if task.duration:  # of an attempt that has waited in between
        changes["duration"] = 0.0
    return _unless_cancelled(task, changes, ending, now, move)


def _unless_cancelled(
    task: Task, changes: dict[str, Any], ending: Ending, now: int, move: str
) -> list[Update]:
    """Return the move, and an end as cancelled for the case that a cancel was requested."""
    return [
        Update(task.id, _fence(task, cancel_requested_at=None), changes, move=move),
        _cancelled(task, ending, now, cancel_requested_at=PRESENT),
    ]


def _archive(task: Task, now: int, outcome: str, ending: Ending) -> str:
    attempt = Attempt(
        outcome=outcome,
        started_at=task.started_at,
        ended_at=to_datetime(now),
        worker=ending.worker,
        error=ending.error,
        error_type=ending.error_type,
        traceback=ending.traceback,
    )
    return attempts_to_text([*task.earlier_attempts, attempt][-MAX_KEPT_ATTEMPTS:])


# --- after a crash


def rescue(
    tasks: list[Task],
    now: int,
    *,
    stopping: bool,
    isolated: Collection[str] = (),
    executing: Collection[str] | None = None,
) -> list[list[Update]]:
    """Take back the tasks that ran on a node that died; return the alternative writes for each task.

    - If the node was stopping, all tasks were interrupted.
    - Otherwise, if a suspect (a task on its last chance) ran, it counts a crash and the other tasks were
      interrupted. If no suspect ran, each task counts a crash.
    - Tasks of ``isolated`` types ran in child processes and cannot kill the node. They are judged only if
      no other task ran.
    - Tasks whose ids are not in ``executing`` were not being executed by a thread, so they are not judged.
      None means that this is not known.
    - A task that allows only one crash never starts again, whichever task was the culprit.
    """
    ran = [task for task in tasks if executing is None or task.id in executing]
    judged = [task for task in ran if task.type not in isolated] or ran
    suspects = [task for task in judged if last_chance(task)]
    culprits = [] if stopping else suspects or judged
    return [_rescue(task, now, crashed=task in culprits) for task in tasks]


def _rescue(task: Task, now: int, *, crashed: bool) -> list[Update]:
    crashed = crashed or _crashes_allowed(task) == 1
    error = "the process that ran it died" if crashed else "its process ended after it had started"
    ending = Ending(returned=False, error=error, worker=task.worker or task.owner)
    writes = _crash(task, ending, now, owner="") if crashed else _interrupt(task, ending, now)
    return [
        write._replace(guard={**write.guard, "owner": task.owner}, move="rescue")
        for write in writes
    ]


def _crashes_allowed(task: _Counts) -> int:
    return task.max_crashes or FALLBACKS["max_crashes"]


def _crash(task: Task, ending: Ending, now: int, *, owner: str) -> list[Update]:
    """Count a crash of the process that ran a task: pending again with this owner, or a dead letter."""
    limit, crashes = _crashes_allowed(task), task.crashes + 1
    if crashes >= limit:
        changes = _end(task, ending, now, FAILED)
        error = f"{ending.error} ({crashes} of max_crashes={limit})"
        changes.update(_error(ending), error=error, dead_letter=1)
        changes["earlier_attempts"] = _archive(task, now, "crashed", ending)
        writes = _unless_cancelled(task, changes, ending, now, "crash")
    else:
        writes = _again(task, ending, now, "crash", "crashed", {"owner": owner})
    return [
        write._replace(changes={**write.changes, "crashes": crashes}, move="crash")
        for write in writes
    ]


# --- after the end of an abandoned thread


def lift_bar(task: Task, now: int) -> list[Update]:
    """Let a task start again: the thread of its abandoned attempt has ended, or the node of that thread.

    A task that also waits for parents or its turn goes on waiting and passes its turn on. A task that has
    ended passes its turn on, too.
    """
    held = until_due(optional_ms(task.run_at, "run_at"), now)
    barred = {"status": PENDING, "held": BY_THREAD}
    over: dict[str, Any] = {}
    lifted: list[tuple[dict[str, Any], dict[str, Any]]] = [(barred, {"held": held})]
    if task.concurrency_key is not None:
        over = {"turn": None}
        lifted = [({**barred, "turn": PRESENT}, {"held": held})]
        lifted.append(({**barred, "turn": None}, {"held": FOR_TURN}))
    alternatives = [
        *lifted,
        ({"status": PENDING, "held": (FREE, UNTIL_DUE)}, {}),
        ({"status": PENDING, "held": (FOR_PARENTS, FOR_TURN)}, over),
        ({"status": RUNNING}, {}),
        ({"status": FINISHED}, over),
    ]
    stuck, free = {"stuck_on": task.stuck_on}, {"stuck_on": ""}
    return [
        Update(task.id, {**stuck, **guard}, {**free, **changes}, move="lift bar")
        for guard, changes in alternatives
    ]


# --- after the end


def check_requeue(task: Task) -> None:
    """Raise ``InvalidTransition`` for a task that cannot be requeued."""
    if was_asked(task):
        what, how = "an answer that a task has asked for", ", with from_step to ask again"
        if task.type == CHILDREN:
            what, how = "the list of a task's children", ""
        raise InvalidTransition(f"{task.id} is {what}: requeue that task{how}")
    if task.status.value not in REQUEUEABLE:
        raise InvalidTransition(
            f"task {task.id} is {task.status}; only failed or cancelled tasks can be requeued. "
            f"{_INSTEAD[task.status.value]}"
        )


#: The statuses of the tasks that a requeue can run again.
REQUEUEABLE = (FAILED, CANCELLED)
_INSTEAD = {
    PENDING: "It has yet to run; to change it, cancel it first",
    RUNNING: "Cancel it first, and requeue it when it has ended",
    COMPLETED: (
        "Its result may be in use: to run it again, submit a new task with its type and params"
    ),
}


def was_asked(task: Task) -> bool:
    """Return True for an answer that a task has asked for, and for a list of its children.

    That task asks for it again. Any other answer has a name, as a step of a flow or as a child.
    """
    if task.type == CHILDREN:
        return True
    return task.type == ANSWER and "/" in task.id and "name" not in task.params


def requeue(
    task: Task,
    now: int,
    waiting_on: str | None = None,
    *,
    run_at: int | None = None,
    correction: Mapping[str, Any] | None = None,
) -> Update:
    """Let a failed or cancelled task run again, with all counts of errors and crashes back at zero.

    Its waiting time counts from ``now``. If ``waiting_on`` is a parent's id, the task waits for that parent
    first. It does not start before ``run_at``, if that is given. ``correction`` has columns from
    :func:`corrected`. Raises the same error as :func:`check_requeue`.
    """
    check_requeue(task)
    changes = {name: DEFAULTS[name] for name in _AS_NEW}
    changes["earlier_attempts"] = attempts_to_text(task.attempts[-MAX_KEPT_ATTEMPTS:])
    changes.update(unique.taken_again(task, now), **(correction or {}))
    if "params" in changes:  # a node that had it in its buffer must not start it by the old record
        changes["starts"] = task.starts + 1
    guard: dict[str, Any] = {"status": task.status.value, "starts": task.starts}
    if task.stuck_on:
        guard["stuck_on"] = task.stuck_on
        changes["held"] = BY_THREAD
    elif task.concurrency_key is not None:
        changes.update(held=FOR_TURN, turn=None)
    if waiting_on is not None:
        changes.update(held=FOR_PARENTS, waiting_on=waiting_on)
    elif task.type == ANSWER:
        changes.update(_opened(task.id, task.timeout, now))
    # A task that waits for something else gets no run_at: a host whose clock is behind might hold it back.
    if changes["held"] == FREE:
        changes["run_at"] = now
    if run_at is not None:
        changes["run_at"] = run_at
        if changes["held"] == FREE:
            changes["held"] = until_due(run_at, now)
    return Update(task.id, guard, changes, durable=True, move="requeue")


def corrected(task: Task, now: int, params: str | None, from_step: str | None) -> dict[str, Any]:
    """Return the columns that a requeue changes so that the task runs otherwise than before.

    What it changes is noted in the log of attempts, after the last attempt.

    Args:
        task: the task, as it was before the requeue.
        now: the time of the requeue.
        params: other params, as JSON text; None to keep those that the task has.
        from_step: the step whose result is removed, with those of all steps that were stored after it, and
            the cursor; None to keep them all.

    Raises:
        ConfigurationError: the task has stored no such step.
        RepositoryCorrupt: the record is damaged, so that what it was before cannot be noted.
    """
    if task.damage:
        raise RepositoryCorrupt(
            f"task {task.id} can only be requeued as it is: {task.damage}; submit a new task instead"
        )
    note = Attempt(
        outcome="requeued",
        ended_at=to_datetime(now),
        old_params=None if params is None else task.params,
        from_step=from_step or "",
    )
    kept = _with_bounded_params([*task.attempts, note][-MAX_KEPT_ATTEMPTS:])
    changes: dict[str, Any] = {"earlier_attempts": attempts_to_text(kept)}
    if params is not None:
        changes["params"] = params
    if from_step is not None:
        changes["checkpoints"] = _up_to_step(task, from_step)
    return changes


def forgotten_answers(task: Task, from_step: str) -> list[Delete]:
    """Remove the answers to what a task asks again when it is requeued from a step."""
    steps: dict[str, Any] = (task.checkpoints or {}).get("steps", {})
    again = itertools.dropwhile(lambda step: step != from_step, steps)
    return [forget_answer(f"{task.id}/{name}") for name in again]


def forget_answer(answer_id: str) -> Delete:
    """Remove an answer that has ended."""
    return Delete(answer_id, {"type": ANSWER, "status": FINISHED}, move="discard")


def _up_to_step(task: Task, name: str) -> str | None:
    """Return the checkpoints that were stored before a step, without the cursor."""
    steps: dict[str, Any] = (task.checkpoints or {}).get("steps", {})
    if name not in steps:
        raise ConfigurationError(f"task {task.id} has stored no step {name!a}: {_stored(steps)}")
    before = itertools.takewhile(lambda step: step != name, steps)
    texts = {step: payload.encode(steps[step], step, payload.NO_LIMIT) for step in before}
    emitted: dict[str, Any] = (task.checkpoints or {}).get(EMITTED, {})
    kept = {step: emitted[step] for step in texts if step in emitted}
    return checkpoints_to_text(texts, None, emitted=kept) if texts else None


def _stored(steps: Collection[str]) -> str:
    if not steps:
        return "it has stored none"
    named = ", ".join(map(ascii, itertools.islice(steps, _MOST_NAMED)))
    more = len(steps) - _MOST_NAMED
    return f"it has stored {named}" + (f" and {more:,} more" if more > 0 else "")


_MOST_NAMED = 20


def _with_bounded_params(attempts: list[Attempt]) -> list[Attempt]:
    """Remove old params beyond :data:`MAX_OLD_PARAMS`, the oldest first; those of the last entry stay."""
    size, kept = 0, list[Attempt]()
    for attempt in reversed(attempts):
        if attempt.old_params is not None:
            size += len(old_params_to_text(attempt.old_params))
            if size > MAX_OLD_PARAMS and kept:
                attempt = attrs.evolve(attempt, old_params=None)
        kept.append(attempt)
    return kept[::-1]


# The columns that a requeue sets to the values of a new task.
_AS_NEW = (
    *("status", "result", "error", "error_type", "traceback", "progress", "message"),
    *("started_at", "completed_at", "duration", "run_at", "cancel_requested_at", "dead_letter"),
    *("expires_at", "errors", "crashes", "interruptions", "snoozes", "owner", "held"),
)

# Removing a record frees its turn and its id. So the record stays while a thread of the task runs.
_NO_THREAD = {"stuck_on": ""}


def delete(task_id: str) -> Delete:
    """Remove the record of a task that is not running and has no thread that still runs."""
    return Delete(task_id, {"status": (PENDING, *FINISHED), **_NO_THREAD}, move="delete")


def not_deleted(task: Task) -> InvalidTransition:
    """Return the error that explains why the guard of :func:`delete` failed."""
    if task.stuck_on:
        return InvalidTransition(
            f"task {task.id} cannot be deleted: a thread of an ended attempt still runs on node "
            f"{task.stuck_on}; delete it when that thread or its process has ended"
        )
    return InvalidTransition(f"task {task.id} is running; cancel it before deleting it")


def prunable(page: Sequence[Ended], needed: Collection[str], now: int) -> list[Stub]:
    """Return the tasks of a page whose records may be removed. All tasks of the page have ended.

    A record stays as long as a task that depends on it has a record: that task may read its result, and
    later so may the program that follows the flow. A record also stays while it holds a unique key for a
    number of seconds. ``needed`` has the ids of tasks on which tasks outside of ``page`` depend.
    """
    kept = {
        task.stub.id
        for task in page
        if unique.held_until(task.unique_lock, task.unique_scope, task.stub.created_at) > now
    }
    kept.update(needed)
    before = -1
    while len(kept) > before:
        before = len(kept)
        for task in page:  # children mostly come before their parents; then one pass is enough
            if task.stub.id in kept:
                kept.update(task.depends_on)
    return [task.stub for task in page if task.stub.id not in kept]


def prune(stub: Stub) -> Delete:
    """Remove the record of a task that has ended, unless it was requeued since it was read."""
    guard = {"status": stub.status, "starts": stub.starts, **_NO_THREAD}
    return Delete(stub.id, guard, durable=False, move="prune", skips=True)


def discard(task: Task) -> Delete:
    """Remove the record of a task that does not run, unless it has moved since it was read."""
    guard = {"status": task.status.value, "starts": task.starts, **_NO_THREAD}
    return Delete(task.id, guard, move="discard" if task.status.finished else "delete")


# --- news for other processes

#: Kinds of news: a task without an owner may start; a running task must be cancelled; a task has ended.
#: For a new task that may start, :func:`freed_of` tells the kind: nodes without its type are not woken.
FREED, CANCEL_REQUESTED, ENDED = "f", "c", "e"
# Those of the most frequent moves.
_OFTEN = {"start": "", "complete": ENDED}


@lru_cache(maxsize=1024)
def freed_of(type: str) -> str:
    """Return the kind of news that a new task of a type may start: a capital letter.

    Several types may have the same letter.
    """
    return ascii_uppercase[crc32(type.encode("utf-8", "surrogatepass")) % len(ascii_uppercase)]


def news_of(writes: Sequence[Write]) -> set[str]:
    """Return the kinds of news in writes, for other processes: small letters, and those of types."""
    kinds: set[str] = set()
    for write in writes:
        if not isinstance(write, Insert):
            kind, changes = _OFTEN.get(write.move), write.changes
        elif write.row["owner"] and "status" not in write.row:
            continue  # most new tasks: this node holds them
        else:  # a property costs a call
            kind, changes = None, write.row
        if kind is None:  # the move does not tell
            if isinstance(write, Delete) or changes.get("status") in FINISHED:
                kind = ENDED
            elif changes.get("cancel_requested_at") is not None:
                kind = CANCEL_REQUESTED
            # The nodes give turns to keys that share the workers.
            elif changes.get("held", FREE) in (FREE, FOR_TURN) and (
                changes.get("owner") == "" or ("held" in changes and not changes.get("owner"))
            ):
                fresh = isinstance(write, Insert) and changes.get("held", FREE) == FREE
                kind = freed_of(changes["type"]) if fresh else FREED
        if kind:
            kinds.add(kind)
    return kinds


# --- writes that are still allowed in a file with a newer schema


def lets_go(write: Write) -> bool:
    """Return True if a write only ends a run or gives a task back, and starts nothing."""
    return isinstance(write, Update) and write.changes.get("status") != RUNNING


# --- changes that a user makes to a record by hand

#: Columns that ``update`` does not change: identity, fence, a request to cancel (it may be later than the
#: caller's read), and the counts that only moves may change.
_NOT_BY_HAND = frozenset(
    (
        *("id", "type", "status", "created_at", "starts", "owner", "cancel_requested_at"),
        *("completed_at", "errors", "crashes", "interruptions", "snoozes", "earlier_attempts"),
        *("unique_key", "unique_scope", "depends_on", "on_parent_failure", "concurrency_key"),
        *("stuck_on", "checkpoints", "log", "version", "cost", *INTERNAL),
    )
)


def amend(stored: Task, wanted: Task, now: int) -> list[Update]:
    """Replace a record by the task that a caller wants, if a move allows the change of status.

    Raises:
        InvalidTransition: no move leads from the stored status to the wanted one.
        PayloadError: the wanted params or result break the JSON rules.
    """
    _check_edge(stored, wanted.status)
    changes = {k: v for k, v in row_from_task(wanted).items() if k not in _NOT_BY_HAND}
    if (
        wanted.status is TaskStatus.PENDING
    ):  # it tells that a task waits in the middle of an attempt
        del changes["started_at"]
    # The caller could not read a damaged value, so cannot have changed it. Another node may be able to.
    if stored.damage:
        for name in ("params", "result"):
            if getattr(wanted, name) == getattr(stored, name):
                del changes[name]
    if wanted.status is not stored.status:
        changes.update(_status_change(stored, wanted.status, now))
    if wanted.status is not TaskStatus.PENDING:  # only a pending task can expire
        changes["expires_at"] = None
    # Only a task that has ended has a ``completed_at``.
    if wanted.status.finished and wanted.completed_at is not None:
        changes["completed_at"] = to_ms(wanted.completed_at, "completed_at")
    guard = {"status": stored.status.value, "starts": stored.starts}
    if wanted.status is not TaskStatus.PENDING:
        return [Update(stored.id, guard, changes, durable=True, move="by hand")]
    # A node that knows the old record must not start it by that.
    changes["starts"] = stored.starts + 1
    # A requeued task may have to wait for its turn, whatever its time.
    due = {**changes, "held": changes.get("held") or until_due(changes["run_at"], now)}
    if stored.stuck_on:
        due["held"] = BY_THREAD
    if due["held"]:
        due["owner"] = ""
    return _pending_changed(stored.id, guard, due, changes, "by hand")


def set_status(stored: Task, status: TaskStatus, message: str, now: int) -> Update:
    """Move a record to a status by hand. Raises ``InvalidTransition`` if no move leads there."""
    _check_edge(stored, status)
    changes = _status_change(stored, status, now) if status is not stored.status else {}
    changes["message"] = message
    if status is stored.status is TaskStatus.PENDING:
        changes["starts"] = stored.starts + 1  # as in amend()
    guard = {"status": stored.status.value, "starts": stored.starts}
    return Update(stored.id, guard, changes, durable=True, move="by hand")


def _check_edge(stored: Task, status: TaskStatus) -> None:
    edge = (stored.status.value, status.value)
    if edge[0] != edge[1] and edge not in _EDGES:
        raise InvalidTransition(f"task {stored.id} is {edge[0]} and cannot become {edge[1]}")


def _status_change(stored: Task, status: TaskStatus, now: int) -> dict[str, Any]:
    if status is TaskStatus.RUNNING:
        return {
            "status": RUNNING,
            "starts": stored.starts + 1,
            "started_at": now,
            "held": FREE,
            "expires_at": None,
            "waiting_on": None,
            "turn": stored.concurrency_key,  # if another task has the turn, the guard fails
            **unique.freed_by_start(stored),
        }
    if status is TaskStatus.PENDING:
        if stored.status is TaskStatus.RUNNING:
            return {"status": PENDING, "started_at": None, "owner": "", "expires_at": None}
        return dict(requeue(stored, now).changes)
    changes = {"status": status.value, "completed_at": now, "owner": "", "waiting_on": None}
    changes["expires_at"] = None
    if not stored.stuck_on:  # otherwise the task keeps its turn while its thread runs
        changes["turn"] = None
    changes.update(unique.freed_by_end(stored))
    if stored.status is TaskStatus.PENDING:  # as in cancel()
        changes["unique_lock"] = None
    if status is TaskStatus.COMPLETED:
        changes["progress"] = 100
    return changes
