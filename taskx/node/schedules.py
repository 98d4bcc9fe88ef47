"""Schedules as they are stored, and the tasks of their ticks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import attrs
from attrs.validators import in_, instance_of, optional

from taskx.tasks import lifecycle, payload
from taskx.tasks.checks import check_number
from taskx.tasks.clock import to_text
from taskx.tasks.errors import ConfigurationError, RepositoryCorrupt
from taskx.tasks.model import check_name
from taskx.tasks.options import ScheduleOptions
from taskx.tasks.ticks import (
    LONGEST,
    MISFIRES,
    Every,
    Misfire,
    Ticks,
    check_spec,
    ticks_of,
    upcoming,
    zone,
)
from taskx.tasks.writes import Insert, Note

#: Prefix of the names of the notes that store schedules.
PREFIX = "schedule/"
#: Longest name of a schedule, in characters. The name and the tick form the id of a task.
MAX_NAME = 200
#: Default of ``misfire_grace`` with ``misfire="skip"``, in seconds.
SKIP_GRACE = 10.0

#: The handling of a tick while the task of an earlier tick has not ended.
Overlap = Literal["allow", "skip"]
OVERLAPS = get_args(Overlap)

#: The columns of a task that its schedule sets.
OF_TASK = frozenset(("type", "params", *ScheduleOptions.__optional_keys__))
_OPTIONAL_INT = optional(instance_of(int))


@attrs.frozen(kw_only=True)
class Entry:
    """A schedule as it is stored. All times are in milliseconds since 1970, UTC.

    Attributes:
        name, spec, tz, misfire, overlap: arguments of ``Queue.schedule``.
        since: the start of the first interval.
        task: the values of its tasks: arguments of ``lifecycle.create``.
        grace: milliseconds that a tick may be late; None if there is no limit.
        paused: True if it does not tick at present.
        next: the first tick that is not decided yet; None if no tick will come.
        last: the last tick that got a task.
        making: the tick whose task is being made, if tasks must not overlap; None for none.
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
            ConfigurationError: this process does not know the time zone.
        """
        return ticks_of(self.spec, self.tz, self.since)

    def resumed(self, now: int) -> Entry:
        """Return a copy that is not paused and continues with the first future tick."""
        begin = now if self.last is None else max(now, self.last)
        return attrs.evolve(self, paused=False, next=upcoming(self.ticks, begin))

    def declared_again(self, old: Entry, now: int) -> Entry:
        """Return a copy that replaces a stored schedule and continues with its next tick."""
        new = attrs.evolve(self, last=old.last, making=old.making)
        if (self.spec, self.tz) != (old.spec, old.tz):
            return attrs.evolve(new.resumed(now), paused=old.paused)
        return attrs.evolve(new, since=old.since, next=old.next, paused=old.paused)

    def insert(self, tick: int, now: int) -> Insert:
        """Return the new task of a tick."""
        return lifecycle.create(task_id=tick_id(self.name, tick), now=now, run_at=tick, **self.task)

    def to_text(self) -> str:
        """Return the schedule as JSON text."""
        data = attrs.asdict(self, recurse=False)
        if isinstance(self.spec, Every):
            data["spec"] = self.spec.seconds
        return payload.encode(data, "schedule", max_size=1 << 30)


def entry_of(note: Note) -> Entry:
    """Return the schedule that a note stores.

    Raises:
        RepositoryCorrupt: the note is damaged, or a newer version of TaskX has written it.
    """
    try:
        data = payload.loads(note.text)
        if type(data["spec"]) is not str:
            data["spec"] = Every(data["spec"])
        entry = Entry(**data)
        if not {"type", "params", "created_by"} <= entry.task.keys() <= OF_TASK:
            raise ValueError(f"its task has the wrong fields: {sorted(entry.task)}")
        lifecycle.create(task_id="", now=0, **entry.task)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise RepositoryCorrupt(
            f"the schedule is damaged, or was stored by a newer version: {error!r}"
        ) from error
    return entry


def tick_id(name: str, tick: int) -> str:
    """Return the id of the task of a tick. The id ensures that each tick gets one task only."""
    return f"{name}@{to_text(tick)}"


def make_entry(
    name: Any, spec: Any, tz: Any, misfire: Any, misfire_grace: Any, overlap: Any
) -> Entry:
    """Return a schedule that is not stored yet and has no task.

    Raises:
        ConfigurationError: an argument is not valid.
    """
    checked = check_name(name, "name")
    if not 0 < len(checked) <= MAX_NAME:
        raise ConfigurationError(
            f"the name of a schedule must have 1 to {MAX_NAME} characters, not {len(checked)}"
        )
    if misfire not in MISFIRES:
        raise ConfigurationError(f"misfire must be 'skip', 'one' or 'all', not {misfire!r}")
    if overlap not in OVERLAPS:
        raise ConfigurationError(f"overlap must be 'allow' or 'skip', not {overlap!r}")
    if isinstance(spec, Every) and tz is not None:
        raise ConfigurationError("tz requires a cron expression: leave tz out with every(seconds)")
    tz = "UTC" if tz is None else tz
    zone(tz)  # raises if the time zone is unknown
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
        number = check_number(seconds, "misfire_grace")
        if number > LONGEST:
            raise ConfigurationError(
                f"misfire_grace must be at most {LONGEST:g} seconds, not {seconds!r}; for no limit use "
                "misfire='one' without misfire_grace"
            )
        return round(number * 1000)
    if misfire == "all":
        raise ConfigurationError(
            "misfire='all' requires misfire_grace: the seconds that a tick may be late and still get a task"
        )
    return round(SKIP_GRACE * 1000) if misfire == "skip" else None
