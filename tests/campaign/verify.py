"""The proof: find all broken promises in the records and the side log."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime

import attrs

from taskx import Task, TaskStatus
from taskx.tasks.options import FALLBACKS

from .sidelog import Event
from .worker import CLOSED_BY_HAND

#: Kinds that crashes may make dead letters: ``crasher``, and ``once``, which may crash only once.
MAY_DIE_OF_CRASHES = ("crasher", "once")
NEVER = 1 << 62


@attrs.define
class Run:
    """One run of a task, as its executor logged it."""

    id: str
    starts: int
    who: str
    began: int
    ended: int = NEVER
    outcome: str = ""


@attrs.define
class Process:
    """One process, as it and the conductor logged it.

    Attributes:
        lived: the last time at which it was certainly alive.
        goes: True if it logged that it was about to end.
        killed: True if SIGKILL ended it.
        stops: the times at which it began to stop a queue.
        leaves: the time at which its last stop had returned.
        left: the ids of the tasks that its stops left running: it may have ended before they did.
        cut_off: the times at which it knew that it had lost its lease, so that others might run its tasks.
        trouble: the alarming part of its log, if any.
    """

    lived: int = 0
    goes: bool = False
    killed: bool = False
    stops: list[int] = attrs.Factory(list)
    leaves: int = NEVER
    left: set[str] = attrs.Factory(set)
    cut_off: list[int] = attrs.Factory(list)
    trouble: str = ""


@attrs.define
class Story:
    """The events of one task."""

    id: str
    kind: str = ""
    submitted: bool = False
    batch: str = ""
    accepted: bool = False
    rejected: bool = False
    duplicate: bool = False
    cancelled: int = NEVER
    asked: int = NEVER
    not_found: bool = False
    closing: bool = False
    closed: int = NEVER
    runs: list[Run] = attrs.Factory(list)

    def by_hand(self, record: Task) -> bool:
        """Return True if it was closed by hand, even if the closing process died before it logged that."""
        shows = record.status is TaskStatus.FAILED and record.message == CLOSED_BY_HAND
        return self.closed != NEVER or (self.closing and shows)


class History:
    """The side log, sorted by process and by task."""

    def __init__(self, events: Sequence[Event]) -> None:
        self.processes: dict[str, Process] = {}
        self.stories: dict[str, Story] = {}
        for event in events:
            self._note_process(event)
            if event.id:
                self._note_task(event)

    def _note_process(self, event: Event) -> None:
        process = self.processes.setdefault(event.who, Process())
        if event.what == "dead":  # logged by the conductor some time after the death
            process.killed = event.outcome == "killed"
            process.trouble = event.note
            return
        if event.what == "killed" and process.goes:
            return  # it may have died before the conductor could kill it
        process.lived = max(process.lived, event.ns)
        if event.what in ("dying", "leaves"):
            process.goes = True
        if event.what == "stop":
            process.stops.append(event.ns)
        elif event.what == "lease lost":
            process.cut_off.append(event.ns)
        elif event.what == "leaves":
            process.leaves = event.ns
        elif event.what == "stopped" and event.note:
            process.left.update(event.note.split(", "))

    def _note_task(self, event: Event) -> None:
        story = self.stories.setdefault(event.id, Story(event.id))
        what = event.what
        if what == "begin":
            story.runs.append(Run(event.id, event.starts, event.who, event.ns))
        elif what == "end":
            self._note_end(story, event)
        elif what == "submit":
            story.submitted, story.kind, story.batch = True, event.kind, event.note
        elif what in ("accepted", "rejected", "duplicate"):
            setattr(story, what, True)
        elif what == "close":
            story.closing = True
        elif what == "closed":
            story.closed = min(story.closed, event.ns)
        elif what == "cancel told":
            self._note_cancel(story, event)

    def _note_end(self, story: Story, event: Event) -> None:
        for run in reversed(story.runs):
            if (run.starts, run.who) == (event.starts, event.who):
                run.ended, run.outcome = event.ns, event.outcome
                return

    def _note_cancel(self, story: Story, event: Event) -> None:
        if event.outcome == "cancelled":
            story.cancelled = min(story.cancelled, event.ns)
        elif event.outcome == "asked":
            story.asked = min(story.asked, event.ns)
        elif event.outcome == "not found":
            story.not_found = True

    def over(self, run: Run) -> int:
        """Return the last time at which a run was certainly under way."""
        return run.ended if run.ended != NEVER else self.processes[run.who].lived

    def may_be_taken_over(self, run: Run) -> bool:
        """Return True if its process lost its lease before the outcome was certainly stored."""
        return any(lost > run.began for lost in self.processes[run.who].cut_off)

    def may_be_lost(self, run: Run) -> bool:
        """Return True if its process may have ended before the outcome was stored."""
        process = self.processes[run.who]
        unsure = "unknown" in process.left  # its stop was interrupted
        named = unsure or run.id in process.left
        return process.killed or named or self.may_be_taken_over(run)

    def may_be_interrupted(self, run: Run) -> bool:
        """Return True if its process stopped a queue before it ended, or its outcome may not be stored.

        A task that no thread executed any more when its process died is interrupted, not crashed.
        """
        stopped = any(stop < run.ended for stop in self.processes[run.who].stops)
        return stopped or self.may_be_lost(run)


def verify(records: Mapping[str, Task], events: Sequence[Event]) -> list[str]:
    """Return the broken promises as sentences; an empty list if there are none."""
    history = History(events)
    found = [
        *_processes(history),
        *_together(records.values()),
        *_batches(history, records),
        *(f"{id}: stored, but never submitted" for id in records.keys() - history.stories.keys()),
    ]
    for story in history.stories.values():
        record = records.get(story.id)
        checks: Iterable[Check] = _CHECKS if record is not None else (_absent,)
        for check in checks:
            found += [
                f"{story.id} ({story.kind}): {what}" for what in check(story, record, history)
            ]
    return found


def _processes(history: History) -> Iterator[str]:
    for who, process in history.processes.items():
        if process.trouble:
            yield f"process {who}: {process.trouble}"


def _batches(history: History, records: Mapping[str, Task]) -> Iterator[str]:
    """Check that tasks that were submitted together are all stored, or none of them."""
    stored: dict[str, set[bool]] = {}
    for story in history.stories.values():
        if story.batch:
            stored.setdefault(story.batch, set()).add(story.id in records)
    for batch, there in stored.items():
        if len(there) > 1:
            yield f"{batch}: of the tasks submitted with it some are stored and some are not"


def _together(records: Iterable[Task]) -> Iterator[str]:
    """Check that a death fails one task at most: a node runs one task on its last chance at a time.

    It fails each task with ``max_crashes=1`` that ran, which has one chance only.
    """
    culprits: dict[tuple[str, datetime | None], list[str]] = {}
    for record in records:
        crashed = [attempt for attempt in record.attempts if attempt.outcome == "crashed"]
        limit = record.max_crashes or FALLBACKS["max_crashes"]
        for attempt in crashed[limit - 1 :] if limit > 1 else ():
            node = attempt.worker.partition(" ")[0]  # without the thread
            culprits.setdefault((node, attempt.ended_at), []).append(record.id)
    for (node, _), ids in culprits.items():
        if len(ids) > 1:
            yield f"one death of node {node} fails several tasks: {ids}"


Check = Callable[[Story, Task, History], Iterator[str]]


def _absent(story: Story, record: Task, history: History) -> Iterator[str]:
    if story.accepted:
        yield "lost: it was accepted, but there is no record"
    if story.runs:
        yield "it ran without a record"
    if not story.submitted:
        yield "it has events, but it was never submitted"


def _accepted(story: Story, record: Task, history: History) -> Iterator[str]:
    if story.rejected:
        yield "it was rejected, but it is stored"
    if story.duplicate:
        yield "it was reported as a duplicate at its first submit"
    if story.not_found:
        yield "a cancel did not find it"


def _finished(story: Story, record: Task, history: History) -> Iterator[str]:
    if not record.status.finished:
        yield f"left {record.status}, owner {record.owner!r}"
    elif record.owner:
        yield f"{record.status}, but still owned by {record.owner!r}"


def _one_at_a_time(story: Story, record: Task, history: History) -> Iterator[str]:
    for earlier, later in zip(story.runs, story.runs[1:], strict=False):
        if later.began < (over := history.over(earlier)):
            ms = (over - later.began) / 1e6
            yield (
                f"run {later.starts} began on {later.who} while run {earlier.starts} was under way "
                f"on {earlier.who} (for {ms:.3f} ms more)"
            )


def _starts(story: Story, record: Task, history: History) -> Iterator[str]:
    numbers = [run.starts for run in story.runs]
    if numbers != sorted(set(numbers)):
        yield f"starts executed twice or out of order: {numbers}"
    if numbers and numbers[-1] > record.starts:
        yield f"run {numbers[-1]} was executed, but the record has {record.starts} starts"


def _stops(story: Story, record: Task, history: History) -> Iterator[str]:
    for run in story.runs:
        process = history.processes[run.who]
        if run.began > process.leaves and run.id not in process.left:
            yield f"run {run.starts} began on {run.who}, whose stop had returned without naming it"


def _cancels(story: Story, record: Task, history: History) -> Iterator[str]:
    if story.cancelled != NEVER:
        late = [run.starts for run in story.runs if run.began > story.cancelled]
        if late:
            yield f"begun after its cancel was acknowledged: runs {late}"
        if record.status is not TaskStatus.CANCELLED:
            yield f"its cancel was acknowledged, but it is {record.status}"
    if story.asked != NEVER:
        late = [run.starts for run in story.runs if run.began > story.asked]
        if any(starts < record.starts for starts in late):
            yield f"started again after it was asked to cancel: runs {late} of {record.starts}"


def _expiries(story: Story, record: Task, history: History) -> Iterator[str]:
    if record.error.startswith("expired at ") and story.runs:
        yield f"{record.error}, but begun: runs {[run.starts for run in story.runs]}"


def _closes(story: Story, record: Task, history: History) -> Iterator[str]:
    if story.closed == NEVER:
        return
    late = [run.starts for run in story.runs if run.began > story.closed]
    if any(starts < record.starts for starts in late) or len(late) > 1:
        yield f"started again after it was closed by hand: runs {late}"
    if record.status is not TaskStatus.FAILED or record.message != CLOSED_BY_HAND:
        yield f"closed by hand as failed, but it is {record.status} ({record.message!r})"


def _outcome(story: Story, record: Task, history: History) -> Iterator[str]:
    """Check that a result comes from the last run, and that no result is lost without a reason."""
    returned = {run.starts: run for run in story.runs if run.outcome == "returned"}
    if record.status is TaskStatus.COMPLETED and (
        record.starts not in returned or record.result != record.starts
    ):
        yield f"completed by start {record.starts} with {record.result!r}, returned: {[*returned]}"
    if story.by_hand(record):
        return
    for run in returned.values():
        kept = record.status is TaskStatus.COMPLETED and record.starts == run.starts
        if not kept and not history.may_be_lost(run):
            yield (
                f"run {run.starts} returned on {run.who}, which lived on, but the record is "
                f"{record.status} after {record.starts} starts"
            )


def _counters(story: Story, record: Task, history: History) -> Iterator[str]:
    unseen = record.starts - len(story.runs)  # started, but killed or handed back before it began
    raised = sum(run.outcome == "raised" for run in story.runs)
    lost = sum(map(history.may_be_lost, story.runs))
    interrupted = sum(map(history.may_be_interrupted, story.runs))
    for name, most in (
        ("errors", raised),
        ("crashes", lost + unseen),
        ("interruptions", interrupted + unseen),
    ):
        if getattr(record, name) > most:
            yield f"{name} is {getattr(record, name)}, but at most {most} are possible"
    counted = record.errors + record.crashes + record.interruptions
    completed = record.status is TaskStatus.COMPLETED
    # One run may have ended as cancelled or closed, which is none of the three.
    other = record.status is TaskStatus.CANCELLED or story.by_hand(record)
    if not len(story.runs) <= counted + completed + other or counted + completed > record.starts:
        yield (
            f"{len(story.runs)} runs and {record.starts} starts against {record.errors} errors, "
            f"{record.crashes} crashes, {record.interruptions} interruptions, {record.status}"
        )


def _failed(story: Story, record: Task, history: History) -> Iterator[str]:
    if record.status is not TaskStatus.FAILED or story.by_hand(record):
        return
    spent = record.errors >= (record.max_attempts or 1)
    limit = record.max_crashes or FALLBACKS["max_crashes"]
    crashed = record.crashes >= limit
    if not record.dead_letter or not (spent or crashed):
        yield f"failed without reason: {record.errors} errors, {record.crashes} crashes"
    if spent and not any(run.outcome == "raised" for run in story.runs):
        yield "failed after errors, but none of its runs raised"
    if not spent and crashed and story.kind not in MAY_DIE_OF_CRASHES:
        yield f"innocent, but failed after {record.crashes} crashes"


def _never_again(story: Story, record: Task, history: History) -> Iterator[str]:
    if record.max_crashes != 1:
        return
    for earlier, later in zip(story.runs, story.runs[1:], strict=False):
        if earlier.ended == NEVER:
            yield f"max_crashes=1, but begun again (run {later.starts}) after a crash of {earlier.who}"
    if record.crashes > 1:
        yield f"max_crashes=1, but {record.crashes} crashes"


_CHECKS: tuple[Check, ...] = (
    _accepted,
    _finished,
    _one_at_a_time,
    _starts,
    _stops,
    _cancels,
    _expiries,
    _closes,
    _outcome,
    _counters,
    _failed,
    _never_again,
)
