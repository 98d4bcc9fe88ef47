"""``Schedule``, the object that a program uses, and the set of all schedules in a repository."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from datetime import datetime, timezone
from functools import partial
from itertools import islice
from typing import Any

import attrs

from taskx.attempt.registry import Registry
from taskx.node.pool import State
from taskx.node.schedules import OF_TASK, PREFIX, Entry, Overlap, entry_of, tick_id
from taskx.queue.intake import Intake
from taskx.queue.joining import Joining
from taskx.stores.base import Repository
from taskx.stores.door import Door
from taskx.tasks import lifecycle, payload
from taskx.tasks.bell import Agenda
from taskx.tasks.checks import Duration, check_int
from taskx.tasks.clock import to_datetime, to_ms
from taskx.tasks.errors import ConfigurationError, RepositoryCorrupt, ScheduleNotFound
from taskx.tasks.handles import TaskHandle
from taskx.tasks.ids import new_id
from taskx.tasks.log import GuardedLogger
from taskx.tasks.model import TASK_FIELDS, Task, TaskStatus, check_moment
from taskx.tasks.options import lifetime
from taskx.tasks.record import DEFAULTS, task_from_row
from taskx.tasks.tags import labels_of, split
from taskx.tasks.ticks import BATCH, Every, Misfire, between, latest, zone
from taskx.tasks.writes import Note

#: Most ticks of a span that is back-filled by one call.
MOST_BACKFILLED = 100_000
_TICK = re.compile(r"@(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{3})?)Z\Z")


@attrs.frozen
class Tick:
    """A past tick of a schedule.

    Attributes:
        at: its time, in the schedule's time zone.
        task_id: the id that its task has or would have.
        status: the status of its task; None if no such task is stored. The tick may have got none, for
            example during a pause, or the task may have been deleted.
    """

    at: datetime
    task_id: str
    status: TaskStatus | None


class Schedule:
    """A schedule, in the state in which this object last read or changed it.

    ``queue.schedule(…)`` returns one, ``queue.schedules()`` lists all. Every method except :meth:`next`
    and :meth:`last` raises :class:`ScheduleNotFound` after the schedule was removed. These methods store
    a schedule first that waits for the start of its queue.

    Attributes:
        stored: False if it is only declared, and the start of its queue will store it.
    """

    def __init__(
        self, entry: Entry, schedules: Callable[[], Schedules], *, stored: bool = True
    ) -> None:
        self._entry = entry
        # Returns the schedules of its queue: those of a forked child are others.
        self._schedules = schedules
        self.stored = stored

    def __repr__(self) -> str:
        more = ("" if self.stored else ", not stored yet") + (", paused" if self.paused else "")
        return f"<Schedule {self.name!r} ({self.spec}): {self.type!r}{more}>"

    # --- reading

    @property
    def name(self) -> str:
        """Its name, unique in the repository."""
        return self._entry.name

    @property
    def spec(self) -> str | Every:
        """Its cron expression or interval."""
        return self._entry.spec

    @property
    def tz(self) -> str:
        """The time zone of its cron expression."""
        return self._entry.tz

    @property
    def type(self) -> str:
        """The type of its tasks."""
        type_: str = self._entry.task["type"]
        return type_

    @property
    def params(self) -> dict[str, Any]:
        """The params of its tasks."""
        params: dict[str, Any] = payload.loads(self._entry.task["params"])
        return params

    @property
    def tags(self) -> tuple[str, ...]:
        """The tags of its tasks."""
        return split(labels_of(self._entry.task.get("tags")))[0]

    @property
    def task(self) -> Task:
        """The model of its tasks, with their params and options: ``queue.schedule`` takes it."""
        row = {**DEFAULTS, **lifecycle.create(task_id="", now=0, **self._entry.task).row}
        model = task_from_row([row[name] for name in TASK_FIELDS])
        return attrs.evolve(model, created_at=None, expires_at=None)

    @property
    def expires(self) -> float | None:
        """Seconds from a tick after which its task is cancelled if it has not started; None for never."""
        expires: int | None = self._entry.task.get("expires")
        return None if expires is None else expires / 1000

    @property
    def misfire(self) -> Misfire:
        """The handling of ticks that were missed because no queue was started."""
        return self._entry.misfire

    @property
    def misfire_grace(self) -> float | None:
        """Seconds that a tick may be late and still get a task; None if there is no limit."""
        grace = self._entry.grace
        return None if grace is None else grace / 1000

    @property
    def overlap(self) -> Overlap:
        """The handling of a tick while the schedule's last task has not ended."""
        return self._entry.overlap

    @property
    def paused(self) -> bool:
        """True if it is paused."""
        return self._entry.paused

    @property
    def next_tick(self) -> datetime | None:
        """The next tick, in UTC; None while it is paused."""
        return None if self.paused else _moment(self._entry.next)

    @property
    def last_tick(self) -> datetime | None:
        """The last tick that got a task, in UTC."""
        return _moment(self._entry.last)

    def next(self, count: int = 1) -> list[datetime]:
        """Return the next ``count`` ticks in its own time zone, even if it is paused.

        Raises:
            ConfigurationError: ``count`` is not a whole number of 1 or more, or the host does not know the
                time zone.
            RepositoryError: the start of the queue has stored the schedule, and it cannot be read.
        """
        now, coming = self._as_started().now(), self._entry.next
        ticks = self._entry.ticks.after(now if coming is None else max(now, coming - 1))
        local = zone(self.tz)
        found = islice(ticks, check_int(count, "count", 1))
        return [to_datetime(tick).astimezone(local) for tick in found]

    def last(self, count: int = 1) -> list[Tick]:
        """Return the last ``count`` ticks since the schedule was declared, the newest first.

        They have the statuses of their tasks. The schedule itself is not read again, but for the first time
        after the start of the queue has stored it.

        Raises:
            ConfigurationError: ``count`` is not a whole number of 1 or more, or the host does not know the
                time zone.
            RepositoryError: the repository cannot be read.
        """
        schedules = self._as_started()
        most, entry, local = check_int(count, "count", 1), self._entry, zone(self.tz)
        ticks = latest(entry.ticks, entry.since + 1, schedules.now(), most)
        ids = {tick: tick_id(self.name, tick) for tick in reversed(ticks)}
        with schedules.reading() as repository:
            known = repository.statuses([*ids.values()])
        return [
            Tick(
                to_datetime(tick).astimezone(local),
                task_id,
                TaskStatus(known[task_id]) if task_id in known else None,
            )
            for tick, task_id in ids.items()
        ]

    def _as_started(self) -> Schedules:
        """Read a declared schedule as the start of the queue has stored it; return the schedules."""
        schedules = self._schedules()
        if not self.stored and not schedules.waiting:
            with schedules.reading() as repository:
                note = repository.notes(PREFIX + self.name).get(PREFIX + self.name)
            if note is not None:
                self._entry, self.stored = entry_of(note), True
        return schedules

    # --- changing

    def store(self) -> None:
        """Store it now, if it was only declared: started queues of other processes then let it tick.

        A program needs this only if it does not start the queue.
        """
        self._change(lambda entry, now: entry)
        self._schedules().declared.pop(self.name, None)

    def pause(self) -> None:
        """Stop its ticks until :meth:`resume`, even after restarts and new declarations."""
        self._change(lambda entry, now: attrs.evolve(entry, paused=True))

    def resume(self) -> None:
        """Let it tick again; the ticks during the pause get no tasks."""
        self._change(lambda entry, now: entry.resumed(now) if entry.paused else entry)

    def _change(self, change: Callable[[Entry, int], Entry]) -> None:
        self._entry, self.stored = self._schedules().change(self.name, change), True

    def remove(self) -> None:
        """Delete the schedule; the tasks that it has made stay."""
        schedules = self._schedules()
        with schedules.changing() as moves:
            while not schedules.put(
                moves, self.name, None, schedules.note(moves, self.name).version
            ):
                continue
            schedules.declared.pop(self.name, None)

    def trigger(self) -> TaskHandle[Any]:
        """Submit one of its tasks now, in addition to the tasks of its ticks.

        Raises:
            QueueStopped: the queue was stopped.
        """
        schedules = self._schedules()
        with schedules.changing(submits=True) as moves:
            task = entry_of(schedules.note(moves, self.name)).task
            insert = lifecycle.create(task_id=new_id(), now=schedules.now(), **task)
            schedules.intake_of(moves).put(insert)
        return schedules.handle(insert.id)

    def backfill(self, start: datetime, end: datetime) -> list[TaskHandle[Any]]:
        """Submit the task of each tick between two past times, both included.

        A task that is stored already is not submitted again. The tasks may run at the same time, even if
        ``overlap`` is ``"skip"``.

        Returns:
            the handles of all tasks of the span, in the order of the ticks.

        Raises:
            ConfigurationError: a time is naive, ``end`` is before ``start`` or in the future, or the span
                has more than 100,000 ticks. Nothing was submitted.
            QueueStopped: the queue was stopped.
        """
        handles: list[TaskHandle[Any]] = []
        schedules = self._schedules()
        with schedules.changing(submits=True) as moves:
            schedules.intake_of(moves).refuse_if_stopped()
            entry, now = entry_of(schedules.note(moves, self.name)), schedules.now()
            ticks = list(islice(between(entry.ticks, *_span(start, end, now)), MOST_BACKFILLED + 1))
            if len(ticks) > MOST_BACKFILLED:
                raise ConfigurationError(
                    f"schedule {self.name!r} has more than {MOST_BACKFILLED:,} ticks from {start} to "
                    f"{end}; back-fill a shorter span, or several of them"
                )
            for first in range(0, len(ticks), BATCH):
                some = ticks[first : first + BATCH]
                inserts = [entry.insert(tick, now) for tick in some]
                moves.commit(inserts)
                handles += [schedules.handle(insert.id) for insert in inserts]
                moves.after(schedules.agenda.fetch_soon)
        return handles


class Schedules:
    """The schedules of a repository.

    Args:
        declared: the schedules that were declared before the start of the queue, by name.
        current: returns the object that a :class:`Schedule` uses: a forked child makes another one.
        handle: makes a handle for a task.
        intake: takes in their tasks.
        make_intake: makes an intake for another door.
        joining: chooses the door of a call.
        state: tells if the queue is started, and if it was stopped.
        registry: the executors.
        agenda: is told of schedules that were changed.
        log: the logger of the queue.
    """

    def __init__(
        self,
        declared: dict[str, Entry],
        *,
        current: Callable[[], Schedules],
        handle: Callable[[str], TaskHandle[Any]],
        intake: Intake,
        make_intake: Callable[[Door], Intake],
        joining: Joining,
        state: State,
        registry: Registry,
        agenda: Agenda,
        log: GuardedLogger,
    ) -> None:
        self.declared = declared
        self._current = current
        self.handle = handle
        self._intake = intake
        self._make_intake = make_intake
        self._joining = joining
        self._state = state
        self._registry = registry
        self.agenda = agenda
        self._log = log

    @property
    def waiting(self) -> bool:
        """True if declared schedules wait for the start of the queue."""
        return self._state.pool is None and not self._state.stopped

    def reading(self) -> AbstractContextManager[Repository]:
        """Return the repository for a read of this thread: it may be in a transaction of its own."""
        return self._joining.reading()

    def changing(self, *, submits: bool = False) -> AbstractContextManager[Door]:
        """Return the door for changes of this thread: see :meth:`Joining.changing`."""
        return self._joining.changing(submits=submits)

    def intake_of(self, moves: Door) -> Intake:
        """Return an intake for a door."""
        return self._make_intake(moves) if moves.inside else self._intake

    def now(self) -> int:
        """Return the time, in milliseconds."""
        return self._intake.moves.now_ms()

    def all(self) -> dict[str, Schedule]:
        """Return all schedules that can be read or are declared, by name and in the order of names."""
        with self.reading() as repository:
            notes = repository.notes(PREFIX)
        found = {}
        for note_name, note in notes.items():
            try:
                entry = entry_of(note)
            except RepositoryCorrupt as error:
                self._log.warning("%s cannot be listed: %s", note_name, error)
            else:
                found[entry.name] = Schedule(entry, self._current)
        for name, wanted in self.declared.copy().items() if self.waiting else ():
            stored = name in found
            entry = self._merged(wanted, notes.get(PREFIX + name))
            found[name] = Schedule(entry, self._current, stored=stored)
        return {name: found[name] for name in sorted(found)}

    def note(self, moves: Door, name: str) -> Note:
        """Return the note of a schedule; raise ``ScheduleNotFound`` if it does not exist.

        A schedule that waits for the start of the queue is stored first.
        """
        if self.waiting and (wanted := self.declared.get(name)) is not None:
            self._store(moves, wanted)
        note = moves.repository.notes(PREFIX + name).get(PREFIX + name)
        if note is None:
            raise ScheduleNotFound(name)
        return note

    def declare(
        self, entry: Entry, task: Task, priority: int | None, expires: Duration | None
    ) -> Schedule:
        """Store a schedule, or update the stored one of the same name; wait for the start before.

        Args:
            entry: the wanted schedule, without its task.
            task: the model of its tasks.
            priority: overrides the priorities of the task and of the executor.
            expires: the option of its tasks; None for that of the executor.
        """
        self._intake.moves.repository.require("schedules")
        wanted = attrs.evolve(entry, task=self._template(entry.name, task, priority, expires))
        if self.waiting:
            self.declared[entry.name] = wanted
            if self.waiting:  # else the start, meanwhile, may have missed it
                return Schedule(self._merged(wanted, None), self._current, stored=False)
        with self.changing() as moves:
            return Schedule(self._store(moves, wanted), self._current)

    def store_declared(self, stored: Mapping[str, Entry] | None = None) -> dict[str, Entry]:
        """Store the schedules that were declared before the start, and return them.

        Those in ``stored`` are left out, unless they were declared anew.
        """
        declared = dict(self.declared)
        for name, wanted in declared.items():
            if stored is None or stored.get(name) is not wanted:
                self._store(self._intake.moves, wanted)
        return declared

    def _store(self, moves: Door, wanted: Entry) -> Entry:
        """Store a schedule, merged with the stored one of the same name; return the result."""
        note_name = PREFIX + wanted.name
        while True:
            note = moves.repository.notes(note_name).get(note_name)
            new = self._merged(wanted, note)
            unchanged = note is not None and new.to_text() == note.text
            version = 0 if note is None else note.version
            if unchanged or self.put(moves, wanted.name, new, version):
                return new

    def _template(
        self, name: str, task: Task, priority: int | None, expires: Duration | None
    ) -> dict[str, Any]:
        if task.id or task.run_at is not None:
            raise ConfigurationError(
                "the task of a schedule must have no id and no run_at: leave them out"
            )
        if not task.created_by:
            task = attrs.evolve(task, created_by=f"schedule:{name}")
        if task.unique_key is not None or task.depends_on:
            raise ConfigurationError(
                "the tasks of a schedule must have no unique_key and no depends_on: leave them out"
            )
        if task.expires_at is not None and expires is None:
            raise ConfigurationError(
                "the task of a schedule must have no expires_at: give `expires` in seconds instead"
            )
        row = self._intake.prepare(task, priority, stored=False).row
        self._intake.moves.repository.codecs.columns(row)  # raises now instead of at every tick
        template = {column: value for column, value in row.items() if column in OF_TASK}
        executor = self._registry.registered.get(row["type"])
        if expires is not None:
            template["expires"] = lifetime(expires)
        elif executor is not None and executor.expires is not None:
            template["expires"] = executor.expires
        return template

    def _merged(self, wanted: Entry, note: Note | None) -> Entry:
        now = self.now()
        fresh = attrs.evolve(wanted, since=now)
        if note is None:
            return fresh.resumed(now)
        try:
            return fresh.declared_again(entry_of(note), now)
        except RepositoryCorrupt as error:
            self._log.warning("schedule %r is replaced by a new one: %s", wanted.name, error)
            return attrs.evolve(fresh.resumed(now), paused=_says_paused(note))

    def change(self, name: str, change: Callable[[Entry, int], Entry]) -> Entry:
        """Change the stored schedule; ``change`` gets the schedule and the time.

        Raises:
            ScheduleNotFound: no schedule has this name.
        """
        with self.changing() as moves:
            while True:
                note = self.note(moves, name)
                old = entry_of(note)
                new = change(old, self.now())
                if new == old or self.put(moves, name, new, note.version):
                    return new

    def put(self, moves: Door, name: str, entry: Entry | None, version: int) -> bool:
        """Store a schedule, or delete it (None); return False if its note has another version now."""
        text = None if entry is None else entry.to_text()
        stored = moves.repository.put_note(PREFIX + name, text, version)
        if stored:
            moves.after(partial(self.agenda.check_schedule_soon, name))
        return stored


def _span(start: datetime, end: datetime, now: int) -> tuple[int, int]:
    for moment, what in ((start, "start"), (end, "end")):
        if moment is None:
            raise ConfigurationError(f"{what} must be a datetime, not None")
        check_moment(moment, what)
    first, last = to_ms(start), to_ms(end)
    if not first <= last <= now:
        raise ConfigurationError(
            f"a back-fill must not end before its start, nor in the future: {start} to {end}"
        )
    return first, last


def _says_paused(note: Note) -> bool:
    """Return True if an unreadable schedule is paused; a newer version may have paused it."""
    try:
        data = payload.loads(note.text)
    except ValueError:
        return False
    return isinstance(data, dict) and data.get("paused") is True


def _moment(ms: int | None) -> datetime | None:
    return None if ms is None else to_datetime(ms)


def tick_of(task: Task) -> datetime | None:
    """Return the tick of a schedule's task, in UTC, however late the task runs.

    Returns:
        the time of the tick; None if no tick made the task.

    Raises:
        ConfigurationError: the argument is not a :class:`Task`.
    """
    if not isinstance(task, Task):
        raise ConfigurationError(f"tick_of requires a Task, not {type(task).__name__}")
    found = _TICK.search(task.id)
    try:
        moment = datetime.fromisoformat(found[1]) if found else None
    except ValueError:  # an id that only looks like the id of a tick
        return None
    return moment and moment.replace(tzinfo=timezone.utc)
