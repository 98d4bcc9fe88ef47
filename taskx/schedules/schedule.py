"""A schedule, as a program holds it in its hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime, timezone
from itertools import islice
from typing import Any

from taskx.common.handles import TaskHandle
from taskx.core import payload
from taskx.core.checks import check_int
from taskx.core.clock import to_datetime
from taskx.core.errors import ConfigurationError
from taskx.core.model import Task
from taskx.core.ticks import Every, Misfire, zone
from taskx.schedules.stored import Entry, Overlap, Schedules

_TICK = re.compile(r"@(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{3})?)Z\Z")


class Schedule:
    """A schedule that is stored, as it was when it was asked for or last changed by this object.

    ``queue.schedule(…)`` makes them, ``queue.schedules()`` lists them. Every method but :meth:`next` raises
    :class:`ScheduleNotFound` once somebody has removed it.
    """

    def __init__(
        self,
        entry: Entry,
        schedules: Callable[[], Schedules],
        handle: Callable[[str], TaskHandle[Any]],
    ) -> None:
        self._entry = entry
        self._schedules = schedules  # asked for each time: a forked child has others
        self._handle = handle

    def __repr__(self) -> str:
        paused = ", paused" if self.paused else ""
        return f"<Schedule {self.name!r} ({self.spec}): {self.type!r}{paused}>"

    # --- what it is

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
        """The time zone that a cron expression is read in."""
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
    def misfire(self) -> Misfire:
        """What is done about ticks at which no started queue was there."""
        return self._entry.misfire

    @property
    def misfire_grace(self) -> float | None:
        """Seconds that a tick may be late and still get a task; None for any number."""
        grace = self._entry.grace
        return None if grace is None else grace / 1000

    @property
    def overlap(self) -> Overlap:
        """What is done at a tick while the task of the last one that got any has not ended."""
        return self._entry.overlap

    @property
    def paused(self) -> bool:
        """Whether it is paused."""
        return self._entry.paused

    @property
    def next_tick(self) -> datetime | None:
        """When it ticks next, in UTC; None while it is paused."""
        return None if self.paused else _moment(self._entry.next)

    @property
    def last_tick(self) -> datetime | None:
        """The last tick that got a task, in UTC."""
        return _moment(self._entry.last)

    def next(self, count: int = 1) -> list[datetime]:
        """A preview: so many ticks from now on, whether it is paused or not, in its own time zone.

        Raises:
            ConfigurationError: this is no whole number from 1, or the host does not know the zone.
        """
        ticks = islice(self._schedules().upcoming(self._entry), check_int(count, "count", 1))
        local = zone(self.tz)
        return [to_datetime(tick).astimezone(local) for tick in ticks]

    # --- what can be done to it

    def pause(self) -> None:
        """Have it tick no more until :meth:`resume`, over restarts and declarations, too."""
        self._entry = self._schedules().pause(self.name)

    def resume(self) -> None:
        """Have it tick again; ticks that it was paused for get no task."""
        self._entry = self._schedules().resume(self.name)

    def remove(self) -> None:
        """Forget it. Tasks that it has made stay."""
        self._schedules().remove(self.name)

    def trigger(self) -> TaskHandle[Any]:
        """Make a task of it now, beside those of its ticks.

        Raises:
            QueueStopped: the queue was stopped.
        """
        return self._handle(self._schedules().trigger(self.name))

    def backfill(self, start: datetime, end: datetime) -> list[TaskHandle[Any]]:
        """Make the task of each tick of a span in the past, both ends included.

        A task that is there already is not made again. They run side by side, whatever ``overlap`` says.

        Returns:
            the handles of all of them, in the order of ticks.

        Raises:
            ConfigurationError: a moment is naive, or the span is none or ends in the future.
            QueueStopped: the queue was stopped.
        """
        ids = self._schedules().backfill(self.name, start, end)
        return [self._handle(task_id) for task_id in ids]


def _moment(ms: int | None) -> datetime | None:
    return None if ms is None else to_datetime(ms)


def tick_of(task: Task) -> datetime | None:
    """The tick that a task was made for, in UTC: what it is to be about, however late it runs.

    None for a task that was made by hand.

    Raises:
        ConfigurationError: it is no task.
    """
    if not isinstance(task, Task):
        raise ConfigurationError(f"tick_of takes a Task, not {type(task).__name__}")
    found = _TICK.search(task.id)
    try:
        moment = datetime.fromisoformat(found[1]) if found else None
    except ValueError:  # an id that looks like one
        return None
    return moment and moment.replace(tzinfo=timezone.utc)
