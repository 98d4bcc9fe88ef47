"""The commands about schedules."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

import click

from taskx.programs.cli.completion import complete_schedules
from taskx.programs.cli.opening import Actions, Command, Session, command, session_of
from taskx.programs.cli.output import Cell, Column, Row, age, clean, moment
from taskx.programs.cli.values import Moment
from taskx.queue.schedule import Schedule
from taskx.tasks.errors import ScheduleNotFound
from taskx.tasks.findings import suggestion
from taskx.tasks.redact import redacted
from taskx.tasks.redact import show as short

name_argument = click.argument("name", shell_complete=complete_schedules)


@click.group(
    "schedules",
    cls=Actions,
    invoke_without_command=True,
    subcommand_metavar="[ACTION NAME]",
    short_help="List the schedules; show, pause, resume, trigger, back-fill or remove one.",
    help="""\
List the schedules, or do something with one of them.

  $ taskx schedules
  $ taskx schedules show nightly
  $ taskx schedules trigger nightly""",
)
@click.pass_context
def schedules(ctx: click.Context) -> None:
    """List the schedules."""
    if ctx.invoked_subcommand is not None:
        return
    session = session_of(ctx)
    found = session.queue.schedules().values()
    if session.json:
        session.out.json_lines(as_record(session, schedule) for schedule in found)
    elif found:
        now = session.now()
        session.out.table(COLUMNS, [_row(session, schedule, now) for schedule in found])
    else:
        session.out.say("there are no schedules")


COLUMNS = (
    Column("NAME", cut=True),
    Column("SPEC", cut=True),
    Column("ZONE", drop=5),
    Column("TYPE", cut=True, drop=3),
    Column("NEXT"),
    Column("LAST", drop=2),
    Column("OVERLAP", drop=6),
    Column("PARAMS", cut=True, drop=4),
)


def _row(session: Session, schedule: Schedule, now: datetime) -> Row:
    return (
        schedule.name,
        str(schedule.spec),
        schedule.tz,
        schedule.type,
        _next(schedule, now),
        ""
        if schedule.last_tick is None
        else f"{age((now - schedule.last_tick).total_seconds())} ago",
        schedule.overlap,
        short(schedule.params, session.queue.config.redact),
    )


def _next(schedule: Schedule, now: datetime) -> Cell:
    if not schedule.stored:
        return Cell("not stored", "yellow")
    if schedule.next_tick is None:
        return Cell("paused", "yellow")
    left = (schedule.next_tick - now).total_seconds()
    return Cell(f"in {age(left)}") if left >= 0 else Cell(f"overdue {age(-left)}", "red")


def as_record(session: Session, schedule: Schedule) -> dict[str, Any]:
    """Return a schedule as a dict of JSON values, without secrets."""
    return {
        "name": schedule.name,
        "spec": str(schedule.spec),
        "tz": schedule.tz,
        "type": schedule.type,
        "params": redacted(schedule.params, session.queue.config.redact),
        "misfire": schedule.misfire,
        "misfire_grace": schedule.misfire_grace,
        "overlap": schedule.overlap,
        "paused": schedule.paused,
        "next_tick": schedule.next_tick,
        "last_tick": schedule.last_tick,
    }


def _schedule(session: Session, name: str) -> Schedule:
    found = session.queue.schedules()
    if name not in found:
        if hint := suggestion(name, found):
            session.out.say(f"no schedule {name!r}{hint}")
        raise ScheduleNotFound(name)
    return found[name]


def _action(
    name: str, words: str, examples: str, *params: Any
) -> Callable[[Callable[..., Any]], Command]:
    def decorate(function: Callable[..., Any]) -> Command:
        made = command(name, words, examples, name_argument, *params)(function)
        schedules.add_command(made)
        return made

    return decorate


@_action(
    "show",
    "Show a schedule and its next ticks.",
    "taskx schedules show nightly --next 10",
    click.option(
        "--next",
        "count",
        type=click.IntRange(1, 1000),
        default=5,
        show_default=True,
        help="Ticks to show.",
    ),
)
def show(session: Session, name: str, count: int) -> None:
    """Show a schedule."""
    schedule = _schedule(session, name)
    ticks = schedule.next(count)
    record = as_record(session, schedule)
    if session.json:
        session.out.json({**record, "next": ticks})
        return
    for field, value in record.items():
        text = moment(value) if isinstance(value, datetime) else str("" if value is None else value)
        session.out.line(f"{field + ':':<15}{clean(text)}".rstrip())
    session.out.line()
    session.out.line("next ticks", "bold")
    for tick in ticks:
        session.out.line(f"  {tick.isoformat()}")


def _said(session: Session, name: str, outcome: str, **record: Any) -> None:
    if session.json:
        session.out.json({"name": name, "outcome": outcome, **record})
    else:
        session.out.line(f"{clean(name)} {outcome}")


@_action("pause", "Stop a schedule until it is resumed.", "taskx schedules pause nightly")
def pause(session: Session, name: str) -> None:
    """Pause a schedule."""
    _schedule(session, name).pause()
    session.note("pause schedule", name)
    _said(session, name, "paused")


@_action(
    "resume",
    "Let a paused schedule tick again; the ticks of the pause get no tasks.",
    "taskx schedules resume nightly",
)
def resume(session: Session, name: str) -> None:
    """Resume a schedule."""
    _schedule(session, name).resume()
    session.note("resume schedule", name)
    _said(session, name, "resumed")


@_action(
    "trigger",
    "Submit one of a schedule's tasks now; print its id.",
    "taskx schedules trigger nightly",
)
def trigger(session: Session, name: str) -> None:
    """Trigger a schedule."""
    handle = _schedule(session, name).trigger()
    session.note("trigger schedule", name, {"id": handle.id})
    if session.json:
        session.out.json({"name": name, "outcome": "triggered", "id": handle.id})
    else:
        session.out.line(clean(handle.id))


@_action(
    "backfill",
    "Submit the task of each past tick that has none; print the ids of all tasks of these ticks.",
    "taskx schedules backfill nightly --from 2026-11-01 --to 2026-11-08",
    click.option(
        "--from", "start", type=Moment(), required=True, help="The first time (ISO, UTC)."
    ),
    click.option("--to", "end", type=Moment(), help="The last time. [default: now]"),
)
def backfill(session: Session, name: str, start: datetime, end: datetime | None) -> None:
    """Back-fill a schedule."""
    handles = _schedule(session, name).backfill(start, end or session.now())
    session.note("back-fill schedule", name, {"tasks": len(handles)})
    if not handles:
        session.out.say(f"{name} has no tick in this span: no task was made")
    for handle in handles:
        if session.json:
            session.out.json({"name": name, "outcome": "back-filled", "id": handle.id})
        else:
            session.out.line(clean(handle.id))
    if handles:
        session.out.say(f"{name} has a task for each of {len(handles)} ticks")


@_action(
    "remove",
    "Remove a schedule; the tasks that it has made stay.",
    "taskx schedules remove nightly",
)
def remove(session: Session, name: str) -> None:
    """Remove a schedule."""
    _schedule(session, name).remove()
    session.note("remove schedule", name)
    _said(session, name, "removed")


COMMANDS = (schedules,)
