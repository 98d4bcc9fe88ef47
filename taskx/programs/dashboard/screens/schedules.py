"""The schedules: when they tick, whether they did, and what can be done about it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta, timezone

import attrs

from taskx.programs.dashboard.asking import question
from taskx.programs.dashboard.pages import Action, Done, Page, Screen
from taskx.programs.dashboard.request import Request
from taskx.queue.schedule import Schedule, Tick
from taskx.tasks.errors import ConfigurationError, ScheduleNotFound

#: Schedules on a page.
ROWS = 50
#: The next and the last ticks that are shown.
TICKS = 5
# How late a tick may be before the schedule counts as overdue.
_LATE = timedelta(minutes=1)


@attrs.frozen(kw_only=True)
class Row:
    """A schedule with its ticks.

    Attributes:
        schedule: the schedule.
        next: its next ticks.
        last: its last ticks, the newest first.
        overdue: True if its next tick should have come a minute ago or earlier.
        problem: an error that hides the ticks, such as an unknown time zone; empty if there is none.
    """

    schedule: Schedule
    next: Sequence[datetime] = ()
    last: Sequence[Tick] = ()
    overdue: bool = False
    problem: str = ""


def show(request: Request) -> Page:
    """Show a page of schedules, by name."""
    found = request.queue.schedules()
    wanted, after = request.args.get("q", "").strip(), request.args.get("after", "")
    names = [name for name in found if wanted.lower() in name.lower() and name > after]
    now = request.display.now
    return Page(
        "schedules.html",
        {
            "wanted": wanted,
            "number": len(found),
            "rows": [_row(found[name], now) for name in names[:ROWS]],
            "following": names[ROWS - 1] if len(names) > ROWS else "",
            "now": now.strftime("%Y-%m-%dT%H:%M"),
            "before": (now - timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M"),
        },
    )


def _row(schedule: Schedule, now: datetime) -> Row:
    try:
        due = schedule.next_tick
        return Row(
            schedule=schedule,
            next=schedule.next(TICKS),
            last=schedule.last(TICKS),
            overdue=due is not None and now - due > _LATE,
        )
    except ConfigurationError as error:
        return Row(schedule=schedule, problem=str(error))


# --- changes


def _schedule(request: Request) -> Schedule:
    name = request.form.get("name", "")
    found = request.queue.schedules().get(name)
    if found is None:
        raise ScheduleNotFound(name)
    return found


def pause(request: Request) -> Done:
    """Stop the ticks of a schedule."""
    schedule = _schedule(request)
    schedule.pause()
    request.note("pause schedule", schedule.name)
    return Done(request.say("Schedule {name} is paused.", name=schedule.name))


def resume(request: Request) -> Done:
    """Let a schedule tick again."""
    schedule = _schedule(request)
    schedule.resume()
    request.note("resume schedule", schedule.name)
    return Done(request.say("Schedule {name} ticks again.", name=schedule.name))


def trigger(request: Request) -> Done:
    """Submit one task of a schedule now."""
    schedule = _schedule(request)
    handle = schedule.trigger()
    request.note("trigger schedule", schedule.name, handle.id)
    return Done(request.say("Task {id} was submitted.", id=handle.id))


def backfill(request: Request) -> Done:
    """Submit the tasks of the ticks of a past time that have none."""
    schedule = _schedule(request)
    start, end = (_moment(request, name) for name in ("start", "end"))
    number = len(schedule.backfill(start, end))
    request.note("backfill schedule", schedule.name, f"{start.isoformat()} to {end.isoformat()}")
    return Done(
        request.say(
            "The span has {count} tick, which has a task now.|The span has {count} ticks, which have "
            "tasks now.",
            count=number,
        )
    )


def remove(request: Request) -> Done | Page:
    """Delete a schedule."""
    schedule = _schedule(request)
    text = request.say("Remove the schedule {name}?", name=schedule.name)
    if asked := question(request, text):
        return asked
    schedule.remove()
    request.note("remove schedule", schedule.name)
    return Done(request.say("Schedule {name} was removed.", name=schedule.name))


def _moment(request: Request, name: str) -> datetime:
    """Return a time of a form, which is in UTC."""
    text = request.form.get(name, "")
    try:
        given = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigurationError(
            f"{name} must be a time such as 2026-01-31T08:30, not {text!r:.100}"
        ) from None
    return given if given.tzinfo is not None else given.replace(tzinfo=timezone.utc)


SCREEN = Screen(
    name="schedules",
    label="Schedules",
    letter="s",
    show=show,
    actions={
        "pause": Action("schedules", pause),
        "resume": Action("schedules", resume),
        "trigger": Action("schedules", trigger),
        "backfill": Action("schedules", backfill),
        "remove": Action("schedules", remove),
    },
)
