"""Retention: remove finished tasks when they are old enough, a few at a time, and add up counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Any

from taskx.node.counts import Rollup
from taskx.node.moving import Moves
from taskx.stores.base import Repository
from taskx.tasks import lifecycle
from taskx.tasks.clock import Clock, to_ms, within_calendar
from taskx.tasks.errors import ConfigurationError
from taskx.tasks.log import GuardedLogger
from taskx.tasks.model import TaskStatus, check_moment, check_status
from taskx.tasks.record import PART, task_of_part
from taskx.tasks.streams import AFTER_ALL, STREAM, life_of, task_of
from taskx.tasks.timing import Timing
from taskx.tasks.writes import NoteChange

# Most dependents that are read at a time.
_MOST_PAIRS = 1000
# Milliseconds for which an answer stays that belongs to no task: a task that it has woken reads it later.
_KEPT = 24 * 3600 * 1000
# Tasks whose streams are looked at in one step, with a read for each; and notes that are removed at once.
_MOST_STREAMS = 20
# More seconds than the calendar has.
_FOR_EVER = 1e12
# Tasks that did not complete usually depend on tasks that did; the reverse is rare.
_CHILDREN_FIRST = (TaskStatus.CANCELLED, TaskStatus.FAILED, TaskStatus.COMPLETED)


def prune(
    moves: Moves, batch: int, status: TaskStatus, before: int, after: Any = None
) -> tuple[int, Any]:
    """Scan a batch of the tasks that ended in a status before a moment, and remove those that can go.

    Args:
        moves: the door to the repository.
        batch: the number of tasks.
        status: the status of the tasks.
        before: the moment, in milliseconds since the epoch.
        after: the place to go on from, as the previous call returned it; None begins with the newest.

    Returns:
        The number of removed tasks, and the place to go on from; None if there are no more tasks.
    """
    repository, now = moves.repository, moves.now_ms()
    page = repository.ended(status.value, within_calendar(before), batch, after)
    if not page:
        return 0, None
    kept = needed(repository, [task.stub.id for task in page])
    if answers := [task.stub.id for task in page if task.stub.type == lifecycle.ANSWER]:
        kept |= _still_asked(repository, now, answers)
    if listed := [task.stub.id for task in page if task.stub.type == lifecycle.CHILDREN]:
        kept |= _of_parents(repository, listed)
    stubs = lifecycle.prunable(page, kept, now)
    removed = sum(moves.commit([lifecycle.prune(stub) for stub in stubs]) if stubs else ())
    return removed, page[-1].place if len(page) == batch else None


def _still_asked(repository: Repository, now: int, answers: Sequence[str]) -> set[str]:
    """Return the answers for which an unfinished task may ask, and those to no task that are young."""
    askers = {answer: lifecycle.askers(answer) for answer in answers}
    statuses = repository.statuses([*{one for some in askers.values() for one in some}])
    kept = {
        answer
        for answer, some in askers.items()
        if any(statuses.get(one) in lifecycle.UNFINISHED for one in some)
    }
    events = [answer for answer in answers if answer.startswith(lifecycle.EVENT)]
    found = repository.find("id", events, ("id", "completed_at")) if events else ()
    kept.update(event for event, ended_at in found if (ended_at or 0) > now - _KEPT)
    return kept


def _of_parents(repository: Repository, lists: Sequence[str]) -> set[str]:
    """Return the lists of children whose parent has a record: it may be requeued."""
    parents = {i: one.params.get("parent") for i, one in repository.get_many(lists).items()}
    known = repository.statuses([*{str(parent) for parent in parents.values()}])
    return {one for one, parent in parents.items() if parent in known}


def needed(repository: Repository, task_ids: Sequence[str]) -> set[str]:
    """Return the ids of these tasks on which another stored task depends."""
    these, pairs = set(task_ids), ("parent", "id")
    found = repository.find("parent", task_ids, pairs, _MOST_PAIRS)
    if len(found) == _MOST_PAIRS:
        # There are too many pairs. For each task, one child more than these tasks are is enough: at least
        # one child is then another task.
        found = [
            pair
            for task_id in task_ids
            for pair in repository.find("parent", [task_id], pairs, len(these) + 1)
        ]
    return {parent for parent, child in found if child not in these}


def forget_steps(repository: Repository, batch: int, after: str = "") -> tuple[int, str]:
    """Remove the notes of a page that have steps of tasks without a record.

    Returns:
        how many were removed, and the name to go on from; empty if there are no more.
    """
    if repository.shortcoming or not (
        page := repository.reads.notes_after(PART, after or PART, batch)
    ):
        return 0, ""
    owners = {name: task_of_part(name) for name in page}
    known = repository.statuses([*{*owners.values()}])
    gone = [name for name, task_id in owners.items() if task_id not in known]
    if gone:
        repository.put_notes([NoteChange(name, None, page[name].version) for name in gone])
    return len(gone), max(page) if len(page) == batch else ""


def forget_streams(repository: Repository, after: str = "") -> tuple[int, str]:
    """Remove what some tasks have emitted that have no record any more.

    Returns:
        the number of removed notes, and the name to go on from; empty if there are no more.
    """
    streams = dict[str, tuple[str, str]]()
    if repository.shortcoming:
        return 0, ""
    after = after or STREAM
    # The first note of each task only: the others are long.
    while len(streams) < _MOST_STREAMS and (page := repository.reads.notes_after(STREAM, after, 1)):
        ((name, _),) = page.items()
        stream = name[: name.rindex("-") + 1]
        streams[stream] = task_of(name)
        after = stream + AFTER_ALL
    ids = [*{task_id for task_id, _ in streams.values()}]
    found = repository.find("id", ids, ("id", "created_at")) if ids else ()
    known = {(task_id, life_of(created_at)) for task_id, created_at in found}
    removed = 0
    for stream in [stream for stream, owner in streams.items() if owner not in known]:
        while page := repository.reads.notes_after(stream, stream, _MOST_STREAMS):
            repository.put_notes([NoteChange(n, None, note.version) for n, note in page.items()])
            removed += len(page)
    return removed, after if len(streams) == _MOST_STREAMS else ""


def prune_all(
    moves: Moves,
    timing: Timing,
    before: datetime,
    status: TaskStatus | str | None,
) -> int:
    """Remove all tasks that ended before a moment, of one status or of each; return how many.

    It scans again until nothing is removed, because a removed task may be the only one that kept others.

    Raises:
        ConfigurationError: the moment is not an aware datetime, or tasks do not end in that status.
    """
    if before is None:
        raise ConfigurationError("before must be a datetime, not None")
    check_moment(before, "before")
    wanted = None if status is None else check_status(status)
    if wanted is not None and not wanted.finished:
        raise ConfigurationError(f"only tasks that have ended can be pruned, got status {wanted}")
    removed, some = 0, 1
    while some:
        some = 0
        for kind in _CHILDREN_FIRST if wanted is None else (wanted,):
            after, begun = None, False
            while after is not None or not begun:
                count, after = prune(moves, timing.batch, kind, to_ms(before), after)
                some, begun = some + count, True
        removed += some
    repository = moves.repository
    for forget in (
        partial(forget_steps, repository, timing.scan_batch),
        partial(forget_streams, repository),
    ):
        _, name = forget()
        while name:
            _, name = forget(name)
    while repository.house.shrink():
        continue
    return removed


class Retention:
    """Removes ended tasks that are older than the retention period of their status, in seconds.

    It also adds up what was counted, whether or not there is such a period.
    """

    def __init__(
        self,
        moves: Moves,
        clock: Clock,
        log: GuardedLogger,
        timing: Timing,
        periods: Mapping[TaskStatus, float],
    ) -> None:
        self._moves = moves
        self._clock = clock
        self._log = log
        self._timing = timing
        self._periods = periods
        self._next = clock.monotonic()
        # The place from which the current scan goes on, for each status that it has not finished.
        self._left: dict[TaskStatus, Any] = {}
        self._steps = self._streams = (
            ""  # the same, for the notes with steps, and with what tasks emit
        )

    def tick(self) -> None:
        """Remove a batch of each status, and give some space back, if it is time."""
        if (now := self._clock.monotonic()) < self._next:
            return
        repository, timing = self._moves.repository, self._timing
        _, self._steps = forget_steps(repository, timing.scan_batch, self._steps)
        _, self._streams = forget_streams(repository, self._streams)
        rollup = Rollup(self._moves.counts.notes, timing.scan_batch)
        more = rollup.step(self._moves.now_ms()) or bool(self._steps or self._streams)
        if not self._periods:
            self._next = now if more else now + timing.retention_every
            return
        self._next = now + timing.retention_every
        wall = self._moves.now_ms()
        scans, self._left = self._left or dict.fromkeys(self._periods), {}
        for status, after in scans.items():
            before = wall - round(min(self._periods[status], _FOR_EVER) * 1000)
            removed, after = prune(self._moves, timing.batch, status, before, after)
            if removed:
                self._log.debug("removed %d old %s tasks", removed, status)
            if after is not None:
                self._left[status] = after
        if repository.house.shrink() or self._left or more:
            self._next = now
