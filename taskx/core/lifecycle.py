"""The life of a task: the only module that knows which moves there are and what each one sets.

Every function returns guarded writes; where it returns several, they exclude one another and the
one whose guard holds is the move that happened.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple
from zlib import crc32

import attrs

from taskx.core import unique
from taskx.core.clock import to_datetime, to_ms
from taskx.core.errors import CancelReason, InvalidTransition
from taskx.core.model import Attempt, Task, TaskStatus
from taskx.core.options import CHECKS, UNLESS_SAID
from taskx.core.record import (
    BY_THREAD,
    DEFAULTS,
    FOR_PARENTS,
    FOR_TURN,
    FREE,
    INTERNAL,
    UNTIL_DUE,
    Ended,
    Stub,
    attempts_to_text,
    created_task,
    ids_to_text,
    optional_ms,
    row_from_task,
)
from taskx.core.retry import MAX_WAIT
from taskx.core.writes import CREATED, PRESENT, Delete, Insert, Update, Write

#: Ended attempts that a record keeps; the oldest are dropped first.
MAX_KEPT_ATTEMPTS = 50
#: Characters of what executors logged that a record keeps; the earliest lines go first.
MAX_LOG = 64 * 1024

PENDING, RUNNING, COMPLETED, FAILED, CANCELLED = (status.value for status in TaskStatus)
UNFINISHED = (PENDING, RUNNING)
FINISHED = (COMPLETED, FAILED, CANCELLED)


class Move(NamedTuple):
    """One row of the table of moves."""

    name: str
    source: str
    target: str


#: Every change of status there is. Progress, a request to cancel and the owner of a pending task
#: change a record without moving it.
MOVES = (
    Move("start", PENDING, RUNNING),
    Move("complete", RUNNING, COMPLETED),
    Move("fail", RUNNING, FAILED),
    Move("retry", RUNNING, PENDING),
    Move("snooze", RUNNING, PENDING),
    Move("interrupt", RUNNING, PENDING),
    Move("hand back", RUNNING, PENDING),
    Move("crash", RUNNING, PENDING),
    Move("crash", RUNNING, FAILED),
    Move("crash", RUNNING, CANCELLED),
    Move("rescue", RUNNING, PENDING),
    Move("rescue", RUNNING, FAILED),
    Move("rescue", RUNNING, CANCELLED),
    Move("cancel", PENDING, CANCELLED),
    Move("orphan", PENDING, CANCELLED),
    Move("orphan", PENDING, FAILED),
    Move("cancelled", RUNNING, CANCELLED),
    Move("requeue", FAILED, PENDING),
    Move("requeue", CANCELLED, PENDING),
)
# Those that somebody may make by hand.
_EDGES = frozenset((move.source, move.target) for move in MOVES if move.name != "orphan")


@attrs.define(kw_only=True)  # not frozen: made once per task, and frozen ones cost thrice
class Ending:
    """The end of an attempt, as the runner saw it."""

    returned: bool  #: the executor returned a value that can be stored
    result: str | None = None  #: that value as JSON text; None for None
    error: str = ""  #: what it raised, as text
    error_type: str = ""  #: the full name of its class; empty if it raised nothing
    traceback: str = ""  #: where, as text
    permanent: bool = False  #: another attempt would be pointless
    crashed: bool = False  #: the child process that ran it died
    stuck: bool = False  #: it is given up while its thread still runs
    delay: float = 0.0  #: seconds to wait before the next attempt, if there is one
    snooze: float | None = None  #: seconds after which it asked to run again
    reason: CancelReason | None = None  #: why its token had fired; None if it had not
    duration: float = 0.0  #: seconds it took
    worker: str = ""  #: who ran it
    progress: int | None = None  #: the last progress it told; None if it told none
    message: str = ""  #: the last message it told
    log: str = ""  #: the lines it logged, where they are kept
    interrupt: BaseException | None = None  #: the Ctrl-C that ended it, in the main thread


# --- from nothing, and before the start


def create(*, task_id: str, now: int, **columns: Any) -> Insert:
    """Store a new pending task: see :func:`created`."""
    return created({**columns, "id": task_id, "created_at": now})


def created(columns: Mapping[str, Any]) -> Insert:
    """Store a new pending task; ``columns`` has its id, type, params, and what is not as in ``DEFAULTS``.

    They are given as rows keep them: JSON text, milliseconds; but ``depends_on`` as a list. The task waits
    for its parents first (see :func:`wait_for`), then for its turn, then for its time.
    """
    row = {**_NEW, **columns}
    if row["run_at"] is not None:
        row["held"] = until_due(row["run_at"], row["created_at"])
    if len(row) > len(_NEW):  # few have more
        if "unique_key" in row:
            row["unique_lock"] = row["unique_key"]
        if "concurrency_key" in row:
            row["held"] = FOR_TURN
        if "depends_on" in row:
            row["depends_on"] = ids_to_text(row["depends_on"])
    return Insert(row)


_NEW: dict[str, Any] = {name: DEFAULTS.get(name) for name in CREATED}


def until_due(run_at: int | None, now: int) -> int:
    """Why a pending task that waits for nothing else may not start: its time, or nothing."""
    return UNTIL_DUE if run_at is not None and run_at > now else FREE


def release(task_id: str) -> Update:
    """Let a pending task start that was held back until now."""
    guard = {"status": PENDING, "held": UNTIL_DUE}
    return Update(task_id, guard, {"held": FREE}, move="release")


def take(task_id: str, node: str, owner: str = "") -> Update:
    """Note that ``node`` holds a pending task in its buffer that was free, or in another's buffer.

    One that is held back is nobody's.
    """
    guard = {"status": PENDING, "held": FREE, "owner": owner}
    return Update(task_id, guard, {"owner": node}, move="take")


def give_up(task_id: str, node: str) -> Update:
    """Note that ``node`` no longer holds a pending task."""
    return Update(task_id, {"status": PENDING, "owner": node}, {"owner": ""}, move="give up")


def cancel(task_id: str, now: int) -> list[Update]:
    """Cancel a task: a pending one at once, a running one by asking for it (the last of the writes).

    A pending one gives its unique key up, whatever the scope.
    """
    gone = {"status": CANCELLED, "completed_at": now, "owner": ""}
    gone.update(unique_lock=None, waiting_on=None)
    # Where a thread of an earlier attempt still runs, it keeps the turn: see lift_bar. None: the
    # original's records say nothing.
    free = {"status": PENDING, "held": (FREE, UNTIL_DUE, FOR_TURN, None)}
    barred = {"status": PENDING, "held": (FOR_PARENTS, BY_THREAD)}
    runs, asked = {"status": RUNNING, "cancel_requested_at": None}, {"cancel_requested_at": now}
    return [
        Update(task_id, free, {**gone, "turn": None}, durable=True, move="cancel"),
        Update(task_id, barred, gone, durable=True, move="cancel"),
        Update(task_id, runs, asked, durable=True, move="request cancel"),
    ]


def replace(holder: Task, new: Insert) -> list[Update]:
    """Have the pending task that holds the key of a new one take over its params and options.

    It is as old as it was, and what it waits for beside its time, it goes on waiting for. Nothing if it
    is not pending, or differs in what cannot be taken over: type, parents, concurrency key.
    """
    if holder.status is not TaskStatus.PENDING or _fixed(holder) != _fixed(created_task(new.row)):
        return []
    # Steps that an earlier attempt did, it did with other params. Who has read the record to start it has
    # read old params, and finds that ``starts`` has moved on.
    changes = {name: new.row[name] for name in _REPLACED}
    changes.update(checkpoints=None, starts=holder.starts + 1)
    # Nobody's: it is fetched anew, to its place by its priority.
    due = {**changes, "held": until_due(changes["run_at"], new.row["created_at"]), "owner": ""}
    guard = {"status": PENDING, "unique_lock": holder.unique_key, "starts": holder.starts}
    return _pending_changed(holder.id, guard, due, changes, "replace")


def _pending_changed(
    task_id: str, guard: dict[str, Any], due: dict[str, Any], waiting: dict[str, Any], move: str
) -> list[Update]:
    """Change a pending task; what it waits for beside its time, it goes on waiting for."""
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


# --- waiting in line


def give_turn(task_id: str, key: str) -> list[Update]:
    """Let a pending task start whose turn has come, when its time has come, too.

    It does not hold as long as another task of its key has the turn.
    """
    guard = {"status": PENDING, "held": FOR_TURN}
    return [
        Update(task_id, {**guard, "run_at": when}, {"held": held, "turn": key}, move="give turn")
        for when, held in ((None, FREE), (PRESENT, UNTIL_DUE))
    ]


# --- waiting for parents


def wait_for(insert: Insert, parent: str) -> None:
    """Have a new task wait for the end of a parent before anything else."""
    insert.row.update(held=FOR_PARENTS, waiting_on=parent)


def next_parent(parents: Sequence[str], statuses: Mapping[str, str]) -> str | None:
    """Of its parents, the one whose end a new task waits for; None where all have completed.

    Where all have ended and not all completed, it is the last one: then it is decided what becomes of it.
    """
    unfinished = unfinished_parent(parents, statuses)
    if unfinished is not None or _bad_parent(parents, statuses) is None:
        return unfinished
    return parents[-1]


def unfinished_parent(parents: Sequence[str], statuses: Mapping[str, str]) -> str | None:
    """One of its parents that has not ended, as if drawn by lot; None if all have.

    So it is seldom that it ends while others have not, whatever their order: of ten thousand parents, some
    ten times. The lot is the same for all children, and for whoever draws.
    """
    left = [parent for parent in parents if statuses.get(parent) in UNFINISHED]
    return max(left, key=lambda parent: crc32(parent.encode()), default=None)


def _bad_parent(parents: Sequence[str], statuses: Mapping[str, str]) -> str | None:
    return next((parent for parent in parents if statuses.get(parent) != COMPLETED), None)


# The error of a task that ended because of a parent begins so; a requeue knows it by that.
_ITS_PARENT = "its parent "


def parents_moved(child: Task, statuses: Mapping[str, str], now: int) -> Update:
    """What becomes of a task that waits for its parents, as far as they have come.

    One that is gone counts as one that did not complete.
    """
    guard: dict[str, Any] = {"status": PENDING, "held": FOR_PARENTS}
    waiting_on = unfinished_parent(child.depends_on, statuses)
    if waiting_on is not None:
        return Update(child.id, guard, {"waiting_on": waiting_on}, move="parents moved")
    bad = _bad_parent(child.depends_on, statuses)
    if bad is None or child.on_parent_failure == "run":
        run_at = None if child.run_at is None else to_ms(child.run_at)
        held = until_due(run_at, now) if child.concurrency_key is None else FOR_TURN
        if child.stuck_on:
            guard["stuck_on"], held = child.stuck_on, BY_THREAD
        free = {"waiting_on": None, "held": held}
        return Update(child.id, guard, free, move="parents moved")
    changes = {
        "status": CANCELLED,
        "completed_at": now,
        "error": f"{_ITS_PARENT}{bad} {_WORDS.get(statuses.get(bad, ''), 'is gone')}",
        "waiting_on": None,
    }
    if child.on_parent_failure == "fail":
        changes.update(status=FAILED, dead_letter=1, **unique.freed_by_end(child))
    else:
        changes["unique_lock"] = None  # as of any task that is cancelled before it starts
    return Update(child.id, guard, changes, move="orphan")


_WORDS = {FAILED: "failed", CANCELLED: "was cancelled"}


def ended_with(child: Task, parents: Collection[str]) -> bool:
    """Return whether a task failed or was cancelled because one of these parents did not complete."""
    theirs = tuple(f"{_ITS_PARENT}{parent} " for parent in child.depends_on if parent in parents)
    return child.status.value in (FAILED, CANCELLED) and child.error.startswith(theirs)


# --- running


def start(task: Task, now: int, node: str, worker: str = "") -> Update | None:
    """Start a pending task as it was read, on a node of that id; None if it cannot start.

    The guard on ``starts`` makes it a compare-and-set, the raised ``starts`` is the fence of the run.
    A power cut must not undo the start of a task that may never run again after a crash. ``worker`` is
    the node's name: which of its threads will run the task is not known yet.
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
    if task.unique_key is not None:
        changes.update(unique.freed_by_start(task))
    guard = {"status": PENDING, "starts": task.starts, "held": FREE}
    return Update(task.id, guard, changes, task.max_crashes == 1, "start")


def created_started(insert: Insert, start: Update) -> Insert:
    """Store a new task as its :func:`start` leaves it, in one write instead of two."""
    return Insert({**insert.row, **start.changes})


def as_submitted(insert: Insert) -> dict[str, Any]:
    """The row of a new task before its start, if it is stored as started."""
    if "status" not in insert.row:
        return insert.row
    return {**insert.row, "status": PENDING, "starts": 0, "started_at": None, "worker": ""}


def last_chance(task: Task) -> bool:
    """Whether one more crash would be one too many for a task that has crashed before."""
    return 0 < task.crashes >= _crashes_allowed(task) - 1


def mark_started(task: Task, update: Update) -> None:
    """Bring the task that was read up to the start that was written."""
    task.status = TaskStatus.RUNNING
    task.starts = update.changes["starts"]
    task.started_at = to_datetime(update.changes["started_at"])
    task.owner = update.changes["owner"]
    task.worker = update.changes["worker"]


def _fence(task: Task, **more: Any) -> dict[str, Any]:
    return {"status": RUNNING, "starts": task.starts, **more}


def hand_back(task: Task, now: int) -> list[Update]:
    """Undo a start whose executor was never called; its node still holds it."""
    worker = task.earlier_attempts[-1].worker if task.earlier_attempts else ""
    changes = {"status": PENDING, "started_at": None, "worker": worker}
    ending = Ending(returned=False, worker=worker)
    return _unless_cancelled(task, changes, ending, now, "hand back")


def progress(task_id: str, starts: int | None, percent: int, message: str) -> Update:
    """Note how far a run has come; without ``starts``, whichever run there is."""
    guard: dict[str, Any] = {"status": RUNNING}
    if starts is not None:
        guard["starts"] = starts
    return Update(task_id, guard, {"progress": percent, "message": message}, move="progress")


def checkpoint(task: Task, checkpoints: str, *, durable: bool) -> Update:
    """Note what a run has done so far, for later attempts; as JSON text."""
    return Update(task.id, _fence(task), {"checkpoints": checkpoints}, durable, "checkpoint")


def conclude(task: Task, ending: Ending, now: int) -> list[Update]:
    """End an attempt: which move it is follows from how it ended and why its token fired."""
    if ending.returned:
        return [_complete(task, ending, now)]
    if ending.reason is CancelReason.CANCEL:
        return [_cancelled(task, ending, now)]
    if ending.reason in (CancelReason.STOP, CancelReason.LEASE_LOST):
        return _interrupt(task, ending, now)
    if ending.snooze is not None and ending.reason is None:
        counted = {"snoozes": task.snoozes + 1, **_put_off(task, ending.snooze, now)}
        return _again(task, ending, now, "snooze", "snoozed", counted)
    if ending.crashed and ending.reason is None:
        return _crash(task, ending, now, owner=task.owner)
    counted = {"errors": task.errors + 1, **_error(ending)}
    if ending.permanent or counted["errors"] >= (task.max_attempts or UNLESS_SAID["max_attempts"]):
        changes = {**_end(task, ending, now, FAILED), **counted, "dead_letter": 1}
        writes = [Update(task.id, _fence(task), changes, move="fail")]
    else:
        counted.update(_put_off(task, ending.delay, now))
        writes = _again(task, ending, now, "retry", "retried", counted)
    return [_barred(task, write) for write in writes] if ending.stuck else writes


def _barred(task: Task, write: Update) -> Update:
    """An end whose thread runs on, on the task's node: until that ends, the task does not start again.

    Nor does another one of its concurrency key: it keeps its turn.
    """
    changes = {**write.changes, "stuck_on": task.owner}
    changes.pop("turn", None)
    if changes["status"] == PENDING:
        changes.update(held=BY_THREAD, owner="")
    return write._replace(changes=changes)


def _put_off(task: Task, seconds: float, now: int) -> dict[str, Any]:
    """Let a task wait for some seconds: nobody's until then; with none to wait, its node's."""
    wait = round(min(seconds, MAX_WAIT) * 1000)
    if wait <= 0:
        return {"owner": task.owner}
    return {"held": UNTIL_DUE, "run_at": now + wait}


def _end(task: Task, ending: Ending, now: int, status: str) -> dict[str, Any]:
    changes: dict[str, Any] = {
        "status": status,
        "completed_at": now,
        "duration": ending.duration,
        "owner": "",
        "worker": ending.worker,
    }
    if ending.progress is not None:
        changes["progress"] = ending.progress
        changes["message"] = ending.message
    if ending.log:
        changes["log"] = _logged(task, ending)
    if task.unique_key is not None:
        changes.update(unique.freed_by_end(task))
    if task.concurrency_key is not None:
        changes["turn"] = None
    return changes


_NO_ERROR = {"error": "", "error_type": "", "traceback": ""}


def _error(ending: Ending) -> dict[str, str]:
    return {name: getattr(ending, name) for name in _NO_ERROR}


def _logged(task: Task, ending: Ending) -> str:
    """The lines of the earlier attempts and of this one, below a line that says which it is."""
    lines = f"{task.log}--- attempt {task.attempt}, start {task.starts}\n{ending.log}"
    return lines if len(lines) <= MAX_LOG else lines[-MAX_LOG:].partition("\n")[2]


def _complete(task: Task, ending: Ending, now: int) -> Update:
    changes = _end(task, ending, now, COMPLETED)
    changes["result"] = ending.result
    changes["progress"] = 100
    if task.errors:
        changes.update(_NO_ERROR)
    return Update(task.id, _fence(task), changes, False, "complete")


def _cancelled(task: Task, ending: Ending, now: int, **guard: Any) -> Update:
    changes = _end(task, ending, now, CANCELLED)
    return Update(task.id, _fence(task, **guard), changes, move="cancelled")


def _interrupt(task: Task, ending: Ending, now: int) -> list[Update]:
    counted = {"interruptions": task.interruptions + 1}
    return _again(task, ending, now, "interrupt", "interrupted", counted)


def _again(
    task: Task, ending: Ending, now: int, move: str, outcome: str, more: Mapping[str, Any]
) -> list[Update]:
    """Pending again, and nobody's unless ``more`` says otherwise; or cancelled."""
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
        changes["log"] = _logged(task, ending)
    return _unless_cancelled(task, changes, ending, now, move)


def _unless_cancelled(
    task: Task, changes: dict[str, Any], ending: Ending, now: int, move: str
) -> list[Update]:
    """The move, or the end as cancelled where a cancel was asked for while the attempt ran."""
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
        **_error(ending),
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
    """Take back the tasks that ran on a node that died; for each its alternatives.

    A node that was stopping interrupted them. Otherwise each counts a crash, but where a suspect (a
    task with a crash to its name) ran among them it is held to be the culprit, and the others were
    interrupted. Tasks of ``isolated`` types ran in child processes, where what they do is no harm to
    the node: of them nothing is thought as long as any other ran. Nor of those that are not among the
    ids in ``executing``: no thread was executing them (None: that is not known). A task that allows a
    single crash never starts again, whoever was the culprit.
    """
    ran = [task for task in tasks if executing is None or task.id in executing]
    judged = [task for task in ran if task.type not in isolated] or ran
    suspects = [task for task in judged if task.crashes]
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


def _crashes_allowed(task: Task) -> int:
    return task.max_crashes or UNLESS_SAID["max_crashes"]


def _crash(task: Task, ending: Ending, now: int, *, owner: str) -> list[Update]:
    """The process died that ran it: pending again, and of that node, or a dead letter."""
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


# --- after the end of a thread that was given up


def lift_bar(task: Task, now: int) -> list[Update]:
    """Let a task start again, as its thread, or the node on which that ran, has ended.

    One that waits for other things goes on waiting for those, and gives up its turn meanwhile, as does one
    that has ended.
    """
    held = until_due(optional_ms(task.run_at, "run_at"), now)
    barred = {"status": PENDING, "held": BY_THREAD}
    over: dict[str, Any] = {}
    lifted: list[tuple[dict[str, Any], dict[str, Any]]] = [(barred, {"held": held})]
    if (key := task.concurrency_key) is not None:
        over = {"turn": None}
        lifted = [({**barred, "turn": key}, {"held": held})]
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
    """``InvalidTransition`` for a task that neither failed nor was cancelled."""
    if task.status.value not in (FAILED, CANCELLED):
        raise InvalidTransition(
            f"task {task.id} is {task.status}; only failed and cancelled ones can be requeued"
        )


def requeue(task: Task, now: int, waiting_on: str | None = None) -> Update:
    """Let a failed or cancelled task run again, with a budget that starts anew.

    It waits since ``now``, first for ``waiting_on`` if that is a parent. Raises as :func:`check_requeue`.
    """
    check_requeue(task)
    changes = {name: DEFAULTS[name] for name in _AS_NEW}
    changes["earlier_attempts"] = attempts_to_text(task.attempts[-MAX_KEPT_ATTEMPTS:])
    changes.update(unique.taken_again(task))
    guard: dict[str, Any] = {"status": task.status.value, "starts": task.starts}
    if task.stuck_on:
        guard["stuck_on"] = task.stuck_on
        changes["held"] = BY_THREAD
    elif task.concurrency_key is not None:
        changes.update(held=FOR_TURN, turn=None)
    if waiting_on is not None:
        changes.update(held=FOR_PARENTS, waiting_on=waiting_on)
    if changes["held"] == FREE:  # else a host whose clock is behind might hold it until then
        changes["run_at"] = now
    return Update(task.id, guard, changes, durable=True, move="requeue")


# Columns that a requeue sets to what they are in a new task.
_AS_NEW = (
    *("status", "result", "error", "error_type", "traceback", "progress", "message"),
    *("started_at", "completed_at", "duration", "run_at", "cancel_requested_at", "dead_letter"),
    *("errors", "crashes", "interruptions", "snoozes", "owner", "held"),
)

# With a record its turn and its id are freed. So the record stays while a thread of the task runs.
_NO_THREAD = {"stuck_on": ""}


def delete(task_id: str) -> Delete:
    """Remove the record of a task that is not running, and of which no thread runs on."""
    return Delete(task_id, {"status": (PENDING, *FINISHED), **_NO_THREAD}, move="delete")


def not_deleted(task: Task) -> InvalidTransition:
    """Return the error that says why the guard of :func:`delete` did not hold."""
    if task.stuck_on:
        return InvalidTransition(
            f"task {task.id} cannot be deleted: a thread of an ended attempt still runs on node "
            f"{task.stuck_on}; delete it when that thread, or its process, has ended"
        )
    return InvalidTransition(f"task {task.id} is running; cancel it before deleting it")


def prunable(page: Sequence[Ended], needed: Collection[str], now: int) -> list[Stub]:
    """Return the tasks of a page whose records may be removed; all of them have ended.

    A record stays as long as the records of the tasks that depend on it: they may ask for its result, and
    later the program that follows the flow may. It also stays while it holds a unique key for a number
    of seconds. ``needed`` has the ids of those that tasks which are not in ``page`` depend on.
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
        for task in page:  # children mostly come before their parents: then once is enough
            if task.stub.id in kept:
                kept.update(task.depends_on)
    return [task.stub for task in page if task.stub.id not in kept]


def prune(stub: Stub) -> Delete:
    """Remove the record of a task that has ended, unless it was let run again since it was read."""
    guard = {"status": stub.status, "starts": stub.starts, **_NO_THREAD}
    return Delete(stub.id, guard, durable=False, move="prune")


def discard(task: Task) -> Delete:
    """Remove the record of a dead letter, unless it was let run again since it was read."""
    guard = {"status": FAILED, "starts": task.starts, **_NO_THREAD}
    return Delete(task.id, guard, move="discard")


# --- what other processes may wait for

#: Kinds of news: a task may start that no node holds; a running one is to be cancelled; one has ended.
FREED, CANCEL_REQUESTED, ENDED = "f", "c", "e"


def news(write: Write) -> str:
    """Return the kind of news that a write is for other processes; empty if it is none."""
    changes = write.changes
    if isinstance(write, Delete) or changes.get("status") in FINISHED:
        return ENDED
    if changes.get("cancel_requested_at") is not None:
        return CANCEL_REQUESTED
    freed = changes.get("owner") == "" or "held" in changes
    return FREED if freed and not changes.get("owner") and changes.get("held", FREE) == FREE else ""


# --- writes that are still allowed in a file with a newer schema


def lets_go(write: Write) -> bool:
    """Return whether a write only ends a run or gives a task back, and begins nothing."""
    return isinstance(write, Update) and write.changes.get("status") != RUNNING


# --- what a user writes to a record by hand

#: Columns that ``update`` leaves alone: identity, fence, a request to cancel (it may have come after
#: the caller read the task), and what only the moves may count.
_NOT_BY_HAND = frozenset(
    (
        *("id", "type", "status", "created_at", "starts", "owner", "cancel_requested_at"),
        *("completed_at", "errors", "crashes", "interruptions", "snoozes", "earlier_attempts"),
        *("unique_key", "unique_scope", "depends_on", "on_parent_failure", "concurrency_key"),
        *("stuck_on", "checkpoints", "log", *INTERNAL),
    )
)


def amend(stored: Task, wanted: Task, now: int) -> list[Update]:
    """Replace a record by what a caller made of it, if its status may move so.

    Raises:
        InvalidTransition: no move leads from the stored status to the wanted one.
        PayloadError: its params or result break the JSON rules.
    """
    _check_edge(stored, wanted.status)
    changes = {k: v for k, v in row_from_task(wanted).items() if k not in _NOT_BY_HAND}
    if stored.damage:  # what could not be read, and so was not changed, may be read by others
        for name in ("params", "result"):
            if getattr(wanted, name) == getattr(stored, name):
                del changes[name]
    if wanted.status is not stored.status:
        changes.update(_status_change(stored, wanted.status, now))
    # A task that has ended, and no other, has the moment when it did.
    if wanted.status.finished and wanted.completed_at is not None:
        changes["completed_at"] = to_ms(wanted.completed_at, "completed_at")
    guard = {"status": stored.status.value, "starts": stored.starts}
    if wanted.status is not TaskStatus.PENDING:
        return [Update(stored.id, guard, changes, durable=True, move="by hand")]
    if stored.status is TaskStatus.PENDING:
        # Who has read it to start it has read what it was before, and is not to start that.
        changes["starts"] = stored.starts + 1
    # A requeued one may have to wait for its turn, whatever its time.
    due = {**changes, "held": changes.get("held") or until_due(changes["run_at"], now)}
    if stored.stuck_on:
        due["held"] = BY_THREAD
    if due["held"]:
        due["owner"] = ""
    return _pending_changed(stored.id, guard, due, changes, "by hand")


def set_status(stored: Task, status: TaskStatus, message: str, now: int) -> Update:
    """Move a record to a status by hand; ``InvalidTransition`` if no move leads there."""
    _check_edge(stored, status)
    changes = _status_change(stored, status, now) if status is not stored.status else {}
    changes["message"] = message
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
            "waiting_on": None,
            "turn": stored.concurrency_key,  # where another task has it, it cannot start
            **unique.freed_by_start(stored),
        }
    if status is TaskStatus.PENDING:
        if stored.status is TaskStatus.RUNNING:
            return {"status": PENDING, "started_at": None, "owner": ""}
        return dict(requeue(stored, now).changes)
    changes = {"status": status.value, "completed_at": now, "owner": "", "waiting_on": None}
    if not stored.stuck_on:  # else it keeps it as long as its thread runs
        changes["turn"] = None
    changes.update(unique.freed_by_end(stored))
    if stored.status is TaskStatus.PENDING:  # cancelled: see cancel
        changes["unique_lock"] = None
    if status is TaskStatus.COMPLETED:
        changes["progress"] = 100
    return changes
