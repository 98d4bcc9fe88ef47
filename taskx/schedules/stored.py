"""Schedules as they are stored, and what is done to one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import islice
from typing import Any, Literal, get_args

import attrs
from attrs.validators import in_, instance_of, optional

from taskx.core import lifecycle, payload
from taskx.core.checks import check_number
from taskx.core.clock import to_datetime, to_ms
from taskx.core.errors import ConfigurationError, RepositoryCorrupt, ScheduleNotFound
from taskx.core.ids import new_id
from taskx.core.model import Task, check_moment, check_name
from taskx.core.options import ScheduleOptions
from taskx.core.ticks import (
    BATCH,
    LONGEST,
    MISFIRES,
    Every,
    Misfire,
    Ticks,
    between,
    check_spec,
    ticks_of,
    upcoming,
    zone,
)
from taskx.core.writes import Insert, Note
from taskx.moving import Services
from taskx.submitting.creation import prepare
from taskx.submitting.intake import Intake

#: What the names of the notes begin with that schedules are kept in.
PREFIX = "schedule/"
#: Longest name of a schedule, in characters: with the tick it is the id of a task.
MAX_NAME = 200
#: Seconds that a tick may be late where what is late is skipped, unless told otherwise.
SKIP_GRACE = 10.0

#: What is done where the task of an earlier tick has not ended.
Overlap = Literal["allow", "skip"]
OVERLAPS = get_args(Overlap)

# The columns of a task that its schedule decides.
_OF_TASK = frozenset(("type", "params", *ScheduleOptions.__optional_keys__))
_OPTIONAL_INT = optional(instance_of(int))


@attrs.frozen(kw_only=True)
class Entry:
    """A schedule as it is stored.

    Attributes:
        name: unique in a repository.
        spec: a cron expression, or an interval.
        tz: in whose local time an expression is read.
        since: from when an interval is counted, in milliseconds, as all moments here.
        task: what its tasks are made of: what ``lifecycle.create`` takes.
        misfire: what is done about ticks at which nobody was there.
        grace: milliseconds that a tick may be late; None for any number.
        overlap: what is done where the task of the last tick that got one has not ended.
        paused: whether it does not tick at present.
        next: the first tick that is not decided about yet; None if there is none any more.
        last: the last tick that got a task.
        making: the tick whose task is being made, where tasks must not overlap; None for none.
    """

    name: str = attrs.field(validator=instance_of(str))
    spec: str | Every = attrs.field(validator=instance_of((str, Every)))
    tz: str = attrs.field(validator=instance_of(str))
    since: int = attrs.field(validator=instance_of(int))
    task: Mapping[str, Any] = attrs.field(validator=instance_of(dict))
    misfire: Misfire = attrs.field(validator=in_(MISFIRES))
    grace: int | None = attrs.field(validator=_OPTIONAL_INT)
    overlap: Overlap = attrs.field(validator=in_(OVERLAPS))
    paused: bool = attrs.field(default=False, validator=instance_of(bool))
    next: int | None = attrs.field(default=None, validator=_OPTIONAL_INT)
    last: int | None = attrs.field(default=None, validator=_OPTIONAL_INT)
    making: int | None = attrs.field(default=None, validator=_OPTIONAL_INT)

    @property
    def ticks(self) -> Ticks:
        """Its ticks.

        Raises:
            ConfigurationError: this process does not know the zone.
        """
        return ticks_of(self.spec, self.tz, self.since)

    def resumed(self, now: int) -> Entry:
        """The same, going on with the first tick that is yet to come."""
        begin = now if self.last is None else max(now, self.last)
        return attrs.evolve(self, paused=False, next=upcoming(self.ticks, begin))

    def declared_again(self, old: Entry, now: int) -> Entry:
        """The same, in the place of one that was stored: it ticks on where that one did."""
        new = attrs.evolve(self, last=old.last, making=old.making)
        if (self.spec, self.tz) != (old.spec, old.tz):
            return attrs.evolve(new.resumed(now), paused=old.paused)
        return attrs.evolve(new, since=old.since, next=old.next, paused=old.paused)

    def insert(self, tick: int, now: int) -> Insert:
        """The task of a tick."""
        return lifecycle.create(task_id=tick_id(self.name, tick), now=now, run_at=tick, **self.task)

    def to_text(self) -> str:
        """As JSON text."""
        data = attrs.asdict(self, recurse=False)
        if isinstance(self.spec, Every):
            data["spec"] = self.spec.seconds
        return payload.encode(data, "schedule", max_size=1 << 30)


def entry_of(note: Note) -> Entry:
    """The schedule that a note keeps.

    Raises:
        RepositoryCorrupt: it is damaged, or of a version that can do more than this one.
    """
    try:
        data = payload.loads(note.text)
        if type(data["spec"]) is not str:
            data["spec"] = Every(data["spec"])
        entry = Entry(**data)
        if not {"type", "params", "created_by"} <= entry.task.keys() <= _OF_TASK:
            raise ValueError(f"no task has {sorted(entry.task)}")
        lifecycle.create(task_id="", now=0, **entry.task)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise RepositoryCorrupt(
            f"a schedule is damaged, or of a newer version: {error!r}"
        ) from error
    return entry


def tick_id(name: str, tick: int) -> str:
    """The id of the task of a tick, which no two tasks can have."""
    moment = to_datetime(tick).replace(tzinfo=None)
    return f"{name}@{moment.isoformat(timespec='milliseconds' if tick % 1000 else 'seconds')}Z"


def store(services: Services, inserts: Sequence[Insert]) -> bool:
    """Store tasks of schedules, each for itself; returns whether any was not there yet."""
    results = services.ledger.commit(inserts)
    services.consequences.created([i for i, new in zip(inserts, results, strict=True) if new])
    services.agenda.look_for_more()
    return any(results)


class Schedules:
    """The schedules of a repository.

    Args:
        services: what it works with.
        intake: what checks the tasks, and stores some.
    """

    def __init__(self, services: Services, intake: Intake) -> None:
        self._services = services
        self._intake = intake

    # --- looking

    def all(self) -> dict[str, Entry]:
        """Every schedule that can be read, by its name, in the order of names."""
        notes = self._services.repository.notes(PREFIX)
        found = {}
        for note_name in sorted(notes):
            try:
                entry = entry_of(notes[note_name])
            except RepositoryCorrupt as error:
                self._services.log.warning("%s is left out: %s", note_name, error)
            else:
                found[entry.name] = entry
        return found

    def get(self, name: str) -> Entry:
        """A schedule as it is now.

        Raises:
            ScheduleNotFound: there is none of that name.
        """
        return entry_of(self._note(name))

    def _note(self, name: str) -> Note:
        note = self._services.repository.notes(PREFIX + name).get(PREFIX + name)
        if note is None:
            raise ScheduleNotFound(name)
        return note

    def upcoming(self, entry: Entry) -> Iterator[int]:
        """The ticks that are yet to come, as if it were not paused."""
        now = self._services.clock.now_ms()
        return entry.ticks.after(now if entry.next is None else max(now, entry.next - 1))

    # --- changing

    def declare(self, entry: Entry, task: Task, priority: int | None) -> Entry:
        """Store a schedule, or what is different about one of that name that is stored.

        Args:
            entry: what it is to be, but for its task.
            task: what its tasks are to be like.
            priority: wins over the task's and the executor's own.
        """
        wanted = attrs.evolve(entry, task=self._template(entry.name, task, priority))
        note_name = PREFIX + entry.name
        while True:
            note = self._services.repository.notes(note_name).get(note_name)
            new = self._merged(wanted, note)
            if note is not None and new.to_text() == note.text:
                return new
            if self._put(new, 0 if note is None else note.version):
                return new

    def _template(self, name: str, task: Task, priority: int | None) -> dict[str, Any]:
        if not isinstance(task, Task):
            raise ConfigurationError(f"schedule takes a Task or a type, not {type(task).__name__}")
        if task.id or task.run_at is not None:
            raise ConfigurationError("a schedule gives its tasks their id and run_at itself")
        if not task.created_by:
            task = attrs.evolve(task, created_by=f"schedule:{name}")
        if task.unique_key is not None or task.depends_on:
            raise ConfigurationError(
                "a schedule makes many tasks, which can have no unique_key and no depends_on"
            )
        row = prepare(self._services, task, priority).row
        self._services.repository.codecs.columns(row)  # refused now, and not at every tick
        return {column: value for column, value in row.items() if column in _OF_TASK}

    def _merged(self, wanted: Entry, note: Note | None) -> Entry:
        now = self._services.clock.now_ms()
        fresh = attrs.evolve(wanted, since=now)
        if note is None:
            return fresh.resumed(now)
        try:
            return fresh.declared_again(entry_of(note), now)
        except RepositoryCorrupt as error:
            self._services.log.warning("schedule %r is stored anew: %s", wanted.name, error)
            return attrs.evolve(fresh.resumed(now), paused=_says_paused(note))

    def _change(self, name: str, change: Callable[[Entry], Entry]) -> Entry:
        """Change a schedule as it is now.

        Raises:
            ScheduleNotFound: there is none of that name.
        """
        while True:
            note = self._note(name)
            old = entry_of(note)
            new = change(old)
            if new == old or self._put(new, note.version):
                return new

    def pause(self, name: str) -> Entry:
        """Have it tick no more until it is resumed."""
        return self._change(name, lambda entry: attrs.evolve(entry, paused=True))

    def resume(self, name: str) -> Entry:
        """Have it tick again; what was missed while it was paused is not made good."""
        now = self._services.clock.now_ms()
        return self._change(name, lambda entry: entry.resumed(now) if entry.paused else entry)

    def remove(self, name: str) -> None:
        """Forget a schedule; tasks that it has made stay."""
        while not self._services.repository.put_note(PREFIX + name, None, self._note(name).version):
            continue
        self._tell(name)

    def _put(self, entry: Entry, version: int) -> bool:
        stored = self._services.repository.put_note(PREFIX + entry.name, entry.to_text(), version)
        if stored:
            self._tell(entry.name)
        return stored

    def _tell(self, name: str) -> None:
        self._services.agenda.look_for_schedule(name)

    # --- tasks out of turn

    def trigger(self, name: str) -> str:
        """Make a task of it now, beside those of its ticks; returns its id."""
        task = self.get(name).task
        insert = lifecycle.create(task_id=new_id(), now=self._services.clock.now_ms(), **task)
        self._intake.put(insert)
        return insert.id

    def backfill(self, name: str, start: datetime, end: datetime) -> list[str]:
        """Make the tasks of all ticks of a span, unless they are there; returns all ids, in order."""
        self._intake.refuse_if_stopped()
        entry = self.get(name)
        now = self._services.clock.now_ms()
        ids: list[str] = []
        for ticks in _batches(between(entry.ticks, *_span(start, end, now))):
            inserts = [entry.insert(tick, now) for tick in ticks]
            store(self._services, inserts)
            ids += [insert.id for insert in inserts]
        return ids


def _span(start: datetime, end: datetime, now: int) -> tuple[int, int]:
    for moment, what in ((start, "start"), (end, "end")):
        if moment is None:
            raise ConfigurationError(f"{what} must be a datetime, not None")
        check_moment(moment, what)
    first, last = to_ms(start), to_ms(end)
    if not first <= last <= now:
        raise ConfigurationError(
            f"a span to fill ends after it starts, and not in the future: {start} to {end} does not"
        )
    return first, last


def _says_paused(note: Note) -> bool:
    """Whether a schedule that cannot be read is paused: one of a newer version may be."""
    try:
        data = payload.loads(note.text)
    except ValueError:
        return False
    return isinstance(data, dict) and data.get("paused") is True


def _batches(ticks: Iterator[int]) -> Iterator[list[int]]:
    while batch := list(islice(ticks, BATCH)):
        yield batch


def make_entry(
    name: Any, spec: Any, tz: Any, misfire: Any, misfire_grace: Any, overlap: Any
) -> Entry:
    """A schedule that is not stored yet and has no task.

    Raises:
        ConfigurationError: an argument is not valid.
    """
    checked = check_name(name, "name")
    if not 0 < len(checked) <= MAX_NAME:
        raise ConfigurationError(f"the name of a schedule has 1 to {MAX_NAME} characters")
    if misfire not in MISFIRES:
        raise ConfigurationError(f"misfire is 'skip', 'one' or 'all', not {misfire!r}")
    if overlap not in OVERLAPS:
        raise ConfigurationError(f"overlap is 'allow' or 'skip', not {overlap!r}")
    if isinstance(spec, Every) and tz is not None:
        raise ConfigurationError("an interval is the same in every time zone: leave tz out")
    tz = "UTC" if tz is None else tz
    zone(tz)  # refused if it is not known
    return Entry(
        name=checked,
        spec=check_spec(spec),
        tz=tz,
        since=0,
        task={},
        misfire=misfire,
        grace=_grace(misfire, misfire_grace),
        overlap=overlap,
    )


def _grace(misfire: Misfire, seconds: Any) -> int | None:
    if seconds is not None:
        if check_number(seconds, "misfire_grace") > LONGEST:
            raise ConfigurationError(
                f"misfire_grace is at most {LONGEST:g} seconds, not {seconds!r}; for any number of them "
                "leave it out of misfire='one'"
            )
        return round(float(seconds) * 1000)
    if misfire == "all":
        raise ConfigurationError(
            "misfire='all' needs misfire_grace: how many seconds late a tick may be to get its task"
        )
    return round(SKIP_GRACE * 1000) if misfire == "skip" else None
