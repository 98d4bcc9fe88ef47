"""Counts of what tasks did, by type and by key: in memory at first, then in notes, by minutes to days.

A node counts what it commits, and adds a note with what it has counted every few seconds: no other node
writes a note of this name. Later, notes of the same time are added up: see :class:`Rollup`. A node that is
killed loses what it has not stored.
"""

from __future__ import annotations

import json
import os
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from itertools import count
from typing import Any, NamedTuple, Protocol

from taskx.attempt.runner import Run
from taskx.stores.base import Repository
from taskx.tasks.clock import Clock
from taskx.tasks.errors import RepositoryError
from taskx.tasks.lifecycle import CANCELLED, COMPLETED, FAILED, NO_WORK, Ending
from taskx.tasks.model import Task
from taskx.tasks.rate import Limit
from taskx.tasks.writes import Note, NoteChange

MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000

_STEPS = (1.0, 1.2, 1.5, 1.8, 2.2, 2.6, 3.0, 3.6, 4.3, 5.2, 6.3, 7.7)
#: The upper limits of the groups of times, in seconds, from a millisecond to eleven days. Longer times are
#: in a last group.
BOUNDS = (*(round(step * 10.0**n, 4) for n in range(-3, 6) for step in _STEPS), 1e6)
_group = partial(bisect_left, BOUNDS)

#: Most keys that are counted apart: in a note, and so in a day.
MOST_KEYS = 1000
#: The names of all notes with counts begin so.
COUNTS = "count/"
#: The note with the time at which counting began, in milliseconds; 0 if no task had ended before.
BEGAN = "count/began"

#: The counts of one type or key: numbers, and dicts of numbers by group of times or unit of cost.
Cell = dict[str, Any]
#: The cells of a time, by type or key.
Cells = dict[str, Cell]


class Level(NamedTuple):
    """Notes with the counts of times of one length.

    Attributes:
        prefix: their names begin so; the beginning of the time follows, in milliseconds.
        grain: the length of the times, in milliseconds.
        keep: the age from which they are added to those of the next level, or removed after the last one.
    """

    prefix: str
    grain: int
    keep: int

    def name(self, moment: int) -> str:
        """Return the name of the note for the time in which a moment is."""
        return f"{self.prefix}{max(0, moment) // self.grain * self.grain:015d}"

    def moment(self, name: str) -> int:
        """Return the beginning of the time of a note; the distant future if the name is damaged."""
        text = name[len(self.prefix) :].partition("/")[0]
        return int(text) if text.isdecimal() else 10**15


#: The levels of the counts by type, and by key. The notes of the first level are those that nodes add.
TYPES = (
    Level("count/type/0/", MINUTE, 2 * MINUTE),
    Level("count/type/1/", MINUTE, 3 * HOUR),
    Level("count/type/2/", 10 * MINUTE, 26 * HOUR),
    Level("count/type/3/", HOUR, 62 * DAY),
    Level("count/type/4/", DAY, 800 * DAY),
)
KEYS = (
    Level("count/key/0/", HOUR, 2 * MINUTE),
    Level("count/key/1/", HOUR, 50 * HOUR),
    Level("count/key/2/", DAY, 400 * DAY),
)


def add(into: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Add numbers to those of the same name, in nested dicts, too."""
    for name, value in more.items():
        if isinstance(value, dict):
            add(into.setdefault(name, {}), value)
        else:
            into[name] = into.get(name, 0) + value


def to_text(cells: Cells, of: Collection[str] = ()) -> str:
    """Return the text of a note; ``of`` names the notes that were added to it and may still be there."""
    return json.dumps({"of": [*of], "cells": cells}, separators=(",", ":"), ensure_ascii=False)


def from_text(text: str) -> tuple[Cells, frozenset[str]]:
    """Return what :func:`to_text` was given; nothing if the note is damaged."""
    with suppress(ValueError, TypeError, LookupError, AttributeError, RecursionError):
        record = json.loads(text)
        cells: Cells = record["cells"]
        if all(type(cell) is dict for cell in cells.values()):
            return cells, frozenset(record["of"])
    return {}, frozenset()


def bounded(cells: Cells) -> Cells:
    """Return the cells of the largest keys, and of each first part of a key that of all the others."""
    if len(cells) <= MOST_KEYS:
        return cells
    kept = {key: cells[key] for key in cells if key == rest_of(key)}
    ranked = sorted(cells.keys() - kept, key=lambda key: (-_size(cells[key]), key))
    kept.update((key, cells[key]) for key in ranked[:MOST_KEYS])
    for key in ranked[MOST_KEYS:]:
        add(kept.setdefault(rest_of(key), {}), cells[key])
    return kept


def _size(cell: Cell) -> int:
    return sum(value for value in cell.values() if isinstance(value, int))


def rest_of(key: str) -> str:
    """Return the name under which a key is counted if there are too many."""
    return key[: key.find(":") + 1]


class Notes(Protocol):
    """The notes of a repository."""

    def after(self, prefix: str, after: str, limit: int) -> dict[str, Note]:
        """Return the first notes with a prefix that follow ``after``, by name."""

    def named(self, names: Sequence[str]) -> dict[str, Note]:
        """Return the notes with these names that exist."""

    def put(self, changes: Sequence[NoteChange]) -> Sequence[bool]:
        """Change each of these notes that has the given version; return for each whether it had."""


class Stored:
    """The notes of a repository that stores some."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository

    def after(self, prefix: str, after: str, limit: int) -> dict[str, Note]:
        return self._repository.reads.notes_after(prefix, after, limit)

    def named(self, names: Sequence[str]) -> dict[str, Note]:
        return self._repository.reads.notes_named(names)

    def put(self, changes: Sequence[NoteChange]) -> Sequence[bool]:
        return self._repository.put_notes(changes) if changes else ()


class _Kept:
    """The notes of a repository that stores none: this process is the only one, and keeps them."""

    def __init__(self) -> None:
        self._notes: dict[str, Note] = {}
        self._lock = threading.Lock()

    def after(self, prefix: str, after: str, limit: int) -> dict[str, Note]:
        with self._lock:
            names = sorted(n for n in self._notes if n.startswith(prefix) and n > after)
            return {name: self._notes[name] for name in names[:limit]}

    def named(self, names: Sequence[str]) -> dict[str, Note]:
        with self._lock:
            return {name: self._notes[name] for name in names if name in self._notes}

    def put(self, changes: Sequence[NoteChange]) -> Sequence[bool]:
        with self._lock:
            return [self._put(*change) for change in changes]

    def _put(self, name: str, text: str | None, version: int) -> bool:
        known = self._notes.get(name)
        if version != (0 if known is None else known.version):
            return False
        if text is None:
            self._notes.pop(name, None)
        else:
            self._notes[name] = Note(text, version + 1)
        return True


# The name of a count, by the name of a move and its new status. Other moves are not counted.
_BY_STATUS = {COMPLETED: "completed", FAILED: "failed", CANCELLED: "cancelled"}


def counted_as(move: str, status: str | None) -> str | None:
    """Return the name of the count of a move to a status; None if it is not counted."""
    return "retried" if move == "retry" else _BY_STATUS.get(status or "")


class Counts:
    """The counts of this process that are not stored yet.

    A plain task costs two appends: of how long it waited and how long it ran. They are added up by
    :meth:`gather`.

    Args:
        repository: gets the notes.
        clock: tells the time.
        limit_of: returns the limit of a key; None if it has none. Only keys with a limit are counted.
    """

    def __init__(
        self, repository: Repository, clock: Clock, limit_of: Callable[[str], Limit | None]
    ) -> None:
        self._repository = repository
        self._clock = clock
        self._limit_of = limit_of
        self.notes: Notes = _Kept() if repository.shortcoming else Stored(repository)
        #: The run times of plain completed tasks since the last gathering, by type. Whoever appends one has
        #: seen that the task ended before :attr:`until`.
        self.run_times: dict[str, list[float]] = {}
        self._waits: dict[str, list[timedelta]] = {}
        # A signal handler may cancel a task in the middle of a count.
        self._lock = threading.RLock()
        #: The number of plain tasks that were counted since the last call of :meth:`store`.
        self.fresh = 0
        #: The end of the minute that is counted now, in milliseconds.
        self.until = 0
        # The names of this object's notes are unlike all others.
        self._tag, self._numbers = os.urandom(8).hex(), count()
        # The cells by the names of their notes: those that grow, by level and time, and those to be stored.
        self._open: dict[tuple[Level, int], tuple[str, Cells]] = {}
        self._full: dict[str, str] = {}
        self._began = clock.now_ms()
        self._began_is_stored = False

    # --- counting

    def started(self, runs: Iterable[Run], now: int) -> None:
        """Count the starts of attempts, at a time in milliseconds."""
        waits = self._waits
        if now >= self.until:
            self.gather()
        for run in runs:
            task = run.task
            since, began = task.created_at, task.started_at
            assert since is not None
            assert began is not None
            if task.starts != 1 or task.concurrency_key is not None or run.resumes:
                self._started(run)
                continue
            if task.run_at is not None:
                since = max(since, task.run_at)
            try:
                waits[task.type].append(began - since)
            except KeyError:
                waits.setdefault(task.type, []).append(began - since)

    def _started(self, run: Run) -> None:
        task = run.task
        assert task.created_at is not None
        assert task.started_at is not None
        if run.resumes:  # the attempt has begun before
            return
        cell: Cell = {"started": 1}
        if not (task.errors or task.crashes or task.interruptions or task.snoozes):
            since = max(task.created_at, task.run_at or task.created_at)
            cell["waits"] = _groups([(task.started_at - since).total_seconds()])
        self._add(task.type, task.concurrency_key, cell)

    def ended(
        self,
        what: str | None,
        type: str,
        key: str | None,
        run: Run | None = None,
        ending: Ending | None = None,
    ) -> None:
        """Count the end of a task or of an attempt.

        Args:
            what: the name of the count; None if only the time and the cost of the attempt count.
            type, key: the type and the concurrency key of the task.
            run, ending: the attempt and its end, if there was one.
        """
        if type in NO_WORK:
            return
        cell = Cell() if what is None else Cell({what: 1})
        if run is not None and ending is not None:
            cell["seconds"] = ending.duration
            if what in ("completed", "failed"):
                cell["runs"] = _groups([ending.duration])
            # An attempt that snoozes did not do its work; one that goes on was counted before its wait.
            estimate = None if run.resumes or ending.snooze is not None else run.task.cost
            if cost := {**(estimate or {}), **run.context._spent_in_truth()}:
                cell["cost"] = cost
        self._add(type, key, cell)

    def ended_unread(self, ended: Mapping[str, str]) -> None:
        """Count the ends of tasks of which only the ids are known: the names of their counts, by id.

        Raises:
            RepositoryError: nothing was counted.
        """
        fields = ("id", "type", "concurrency_key")
        for task_id, type, key in self._repository.find("id", [*ended], fields):
            self.ended(ended[task_id], type, key)

    def completed(self, run: Run, ending: Ending) -> None:
        """Count the end of a task that completed, as the first of its type or of a minute, or at a cost."""
        self.gather()
        self.run_times.setdefault(run.task.type, [])
        self.ended("completed", run.task.type, run.task.concurrency_key, run, ending)

    def handed_back(self, task: Task) -> None:
        """Note that a started attempt did not begin after all."""
        self._add(task.type, task.concurrency_key, {"started": -1})

    def _add(self, type: str, key: str | None, cell: Cell) -> None:
        limited = False
        if key is not None:
            with suppress(RepositoryError):  # a queue that is not started reads what is declared
                limited = self._limit_of(key) is not None
        with self._lock:
            self.gather()
            add(self._cells(TYPES[0]), {type: cell})
            if key is not None and limited:
                add(self._cells(KEYS[0]), {key: cell})

    def gather(self) -> None:
        """Add up what was counted since the last call, for the minute in which it was."""
        now = self._clock.now_ms()
        with self._lock:
            if self._waits or self.run_times:
                self._gather()
            self.until = now // MINUTE * MINUTE + MINUTE

    def _gather(self) -> None:
        cells: Cells = {}
        for type, times in self._waits.copy().items():
            if waits := _taken(times):
                groups = _groups(map(timedelta.total_seconds, waits))
                add(cells, {type: {"started": len(waits), "waits": groups}})
                self.fresh += len(waits)
        for type, run_times in self.run_times.copy().items():
            if done := _taken(run_times):
                seconds = round(sum(done), 6)
                cell = {"completed": len(done), "seconds": seconds, "runs": _groups(done)}
                add(cells, {type: cell})
        if cells:
            add(self._cells(TYPES[0]), cells)

    def _cells(self, level: Level) -> Cells:
        """Return the cells for the minute that is counted now."""
        if not self.until:
            self.until = self._clock.now_ms() // MINUTE * MINUTE + MINUTE
        moment = self.until - MINUTE
        place = level, moment // level.grain
        if place not in self._open:
            self._open[place] = f"{level.name(moment)}/{self._tag}{next(self._numbers):08x}", {}
        name, cells = self._open[place]
        if len(cells) > 2 * MOST_KEYS and level is KEYS[0]:
            cells = bounded(cells)
            self._open[place] = name, cells
        return cells

    # --- storing

    @property
    def some(self) -> bool:
        """True if something was counted and gathered that is not stored."""
        return bool(self._full or self._open)

    def unstored(self) -> dict[str, str]:
        """Return the notes that are not stored yet, by the names that they will have."""
        with self._lock:
            self.gather()
            grown = {name: to_text(cells) for name, cells in self._open.values() if cells}
            return {**self._full, **grown}

    def store(self) -> None:
        """Add notes with what was counted.

        Raises:
            RepositoryError: the next call tries again.
        """
        with self._lock:
            self.gather()
            for name, cells in self._open.values():
                kept = bounded(cells) if name.startswith(KEYS[0].prefix) else cells
                if kept:
                    self._full[name] = to_text(kept)
            self._open.clear()
            self.fresh = 0
            # An earlier call may have stored some of these: they are refused, as the names exist.
            full = {**self._full}
        if not full:
            return
        changes = [NoteChange(name, text, 0) for name, text in full.items()]
        if not self._began_is_stored:
            changes.append(NoteChange(BEGAN, str(self.began(self._repository)), 0))
        self.notes.put(changes)
        self._began_is_stored = True
        for name in full:
            self._full.pop(name, None)

    def began(self, repository: Repository) -> int:
        """Return the time from which on all tasks are counted, in milliseconds; 0: from the first one."""
        notes = self.notes if repository.shortcoming else Stored(repository)
        if (note := notes.named([BEGAN]).get(BEGAN)) is not None and note.text.isdecimal():
            return int(note.text)
        before = (repository.ended(status, self._began, 1) for status in _BY_STATUS)
        return self._began if any(before) else 0


def _taken(values: list[Any]) -> list[Any]:
    """Take what is in a list to which other threads append."""
    taken = values[: len(values)]
    del values[: len(taken)]
    return taken


def _groups(seconds: Iterable[float]) -> dict[str, int]:
    """Return the number of times in each group of :data:`BOUNDS`."""
    return {str(group): number for group, number in Counter(map(_group, seconds)).items()}


class Rollup:
    """Adds up the notes of each level when they are old enough, and removes the oldest.

    A store may make some of several changes, and any node may be killed or do the same at the same time. So
    a sum names the notes of which it is made, and only then are these removed; it goes on to name those
    that were not. Whoever reads such a note besides the sum leaves it out. The sum is read before the notes
    that are added to it, so that one which another node has added and removed is not added again.
    """

    def __init__(self, notes: Notes, batch: int) -> None:
        self._notes = notes
        self._batch = batch

    def step(self, now: int) -> bool:
        """Add up a batch of each level; return True if there may be more."""
        more = False
        for levels in (TYPES, KEYS):
            for level, into in zip(levels, (*levels[1:], None), strict=True):
                more |= self._step(level, into, now)
        return more

    def _step(self, level: Level, into: Level | None, now: int) -> bool:
        if not self._due(level, now, 1) or not (page := self._due(level, now, self._batch)):
            return False
        if into is None:
            self._remove(page)
        else:
            self._add_up(level, into, now, page)
        return len(page) == self._batch

    def _due(self, level: Level, now: int, limit: int) -> dict[str, Note]:
        found = self._notes.after(level.prefix, level.prefix, limit)
        return {name: found[name] for name in found if level.moment(name) < now - level.keep}

    def _add_up(self, level: Level, into: Level, now: int, page: Collection[str]) -> None:
        read = {into.name(level.moment(name)) for name in page}
        sums = self._notes.named([*read])
        parts: dict[str, dict[str, Note]] = {}
        again = self._due(level, now, self._batch)
        for part, note in again.items():
            if (name := into.name(level.moment(part))) in read:
                parts.setdefault(name, {})[part] = note
        # The notes up to this name that are not in the page are gone.
        reach = max(again, default="") if len(again) == self._batch else f"{level.prefix}~"
        changes = []
        for name, there in parts.items():
            cells, of, version = Cells(), frozenset[str](), 0
            if (known := sums.get(name)) is not None:
                (cells, of), version = from_text(known.text), known.version
            for part, note in there.items():
                if part not in of:
                    add(cells, from_text(note.text)[0])
            if into in KEYS:
                cells = bounded(cells)
            text = to_text(cells, [*there, *(part for part in of if part > reach)])
            changes.append(NoteChange(name, text, version))
        for done, there in zip(self._notes.put(changes), parts.values(), strict=True):
            if done:
                self._remove(there)

    def _remove(self, notes: Mapping[str, Note]) -> None:
        self._notes.put([NoteChange(name, None, note.version) for name, note in notes.items()])
