"""The commands that ask: why, stats, check, doctor, failures."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import click

from taskx.insight.failures import FailureGroup
from taskx.insight.stats import Percentiles, TypeStats
from taskx.programs.cli.completion import complete_types
from taskx.programs.cli.errors import AWAY, FAILED
from taskx.programs.cli.listing import id_argument
from taskx.programs.cli.opening import Session, command
from taskx.programs.cli.output import Cell, Column, Row, age, clean, moment, one_line
from taskx.programs.cli.values import OFF, Duration, OrOff, Size, unless_off
from taskx.tasks.errors import ConfigurationError
from taskx.tasks.findings import counted, suggestion

# Letters of the key of a group of failures.
_KEY = 8


@command(
    "why",
    """Say why a task waits, where it runs, or how it ended.

Prints one sentence for each reason, the decisive one first. The exit code is 5 if the repository cannot be
read.""",
    """
taskx why 019abc12-...
taskx why 019abc12-... --json | jq -r .kind
""",
    id_argument,
)
def why(session: Session, task_id: str) -> None:
    """Say why a task waits."""
    reasons = session.queue.why(task_id)
    for reason in reasons:
        if session.json:
            session.out.json(reason.to_dict())
        else:
            session.out.line(clean(reason.sentence))
    if any(reason.kind == "repository" for reason in reasons):
        raise click.exceptions.Exit(AWAY)


@command(
    "stats",
    """Show the numbers of each type: waiting, running, ended, how long they waited and ran.

COMPLETED and FAILED are of the last hour, or of --since, as all processes have counted them; a line
below the table says if the counts begin later. Name types to see only those. WAIT is the time from when a
task could start until it did, RUN the time of its last attempt: half of the tasks took at most the first
figure, 95 of 100 the second. STUCK is the number of threads that run on after the time-out of their
tasks.""",
    """
taskx stats
taskx stats email --since 2h
taskx stats --json | jq 'select(.failed > 0)'
""",
    click.argument("types", metavar="[TYPE]...", nargs=-1, shell_complete=complete_types),
    click.option(
        "--since",
        "--period",
        "period",
        type=Duration(),
        default="1h",
        show_default=True,
        help="Count tasks that ended within this time, such as 2h.",
    ),
)
def stats(session: Session, types: Sequence[str], period: float) -> None:
    """Show statistics."""
    found = session.queue.stats(period=period)
    for name in types:
        if name not in found.types:
            session.out.say(
                f"no task that was read or counted has type {name!r}{suggestion(name, found.types)}"
            )
    shown = {name: of for name, of in found.types.items() if not types or name in types}
    if session.json:
        record = found.to_dict()
        numbers = record.pop("types")
        for name in shown:
            session.out.json({"type": name, **numbers[name], **record})
        return
    if shown:
        session.out.table(STATS_COLUMNS, [stats_row(name, each) for name, each in shown.items()])
    elif not types:
        session.out.say("no type has a task or an executor")
    if found.answers and not types:
        session.out.say(f"{counted(found.answers, 'answer')} to give: taskx answers lists them")
    if not found.complete:
        session.out.say(
            f"not all was read, or the counts begin at {moment(found.since)}: the numbers are at least "
            "so high"
        )


STATS_COLUMNS = (
    Column("TYPE", cut=True),
    Column("WAITING", right=True),
    Column("DELAYED", right=True, drop=5),
    Column("BLOCKED", right=True, drop=6),
    Column("RUNNING", right=True),
    Column("STUCK", right=True, drop=1),
    Column("OLDEST", right=True, drop=1),
    Column("COMPLETED", right=True, drop=3),
    Column("FAILED", right=True),
    Column("ERRORS", right=True, drop=4),
    Column("WAIT", right=True, drop=7),
    Column("RUN", right=True, drop=8),
)


def stats_row(name: str, numbers: TypeStats) -> Row:
    """Return the cells of a type for :data:`STATS_COLUMNS`."""
    share = numbers.error_share
    return (
        name,
        _number(numbers.waiting),
        _number(numbers.delayed),
        _number(numbers.blocked),
        Cell(_number(numbers.running), "cyan"),
        Cell(str(numbers.stuck or ""), "red"),
        "" if numbers.oldest_due is None else age(numbers.oldest_due),
        _number(numbers.completed),
        Cell(_number(numbers.failed), "red"),
        "" if share is None else Cell(f"{share:.1%}", "red" if share else ""),
        _percentiles(numbers.start_latency),
        _percentiles(numbers.run_time),
    )


def _number(value: int) -> str:
    return str(value) if value else "-"


def _percentiles(values: Percentiles | None) -> str:
    return "" if values is None else f"{age(values.p50)} {age(values.p95)}"


# --- health


def _nodes(words: Sequence[str]) -> int | dict[str, int]:
    """Return the values of ``--nodes``: a number, or numbers of types."""
    counts = [word for word in words if "=" not in word]
    types = dict(word.split("=", 1) for word in words if "=" in word)
    try:
        if types and not counts:
            return {type: int(count) for type, count in types.items()}
        if len(counts) == 1 and not types:
            return int(counts[0])
    except ValueError:
        counts = []
    if not words:
        return 1
    raise ConfigurationError(
        "--nodes takes one number, or numbers of types such as --nodes email=2 --nodes report=1"
    )


@command(
    "check",
    """Check the repository and its nodes; exit with 1 if something is wrong.

Prints one sentence for each problem. The exit code is 5 if the repository cannot be read. A threshold that
takes `off` is turned off by it.""",
    """
taskx check
taskx check --max-age 5m --max-failed 10 --within 10m --nodes 2
taskx check --nodes email=2 --nodes report=1 --max-size 2G --json
""",
    click.option(
        "--max-age",
        type=OrOff(Duration()),
        default="5m",
        show_default=True,
        help="Longest that a task may be due without starting.",
    ),
    click.option(
        "--max-failed",
        type=OrOff(click.IntRange(0)),
        default=OFF,
        show_default=True,
        help="Most tasks that failed lately.",
    ),
    click.option(
        "--within",
        type=Duration(),
        default="5m",
        show_default=True,
        help="What lately means for --max-failed.",
    ),
    click.option(
        "--nodes",
        metavar="N|TYPE=N",
        multiple=True,
        help="Fewest live nodes, in all or for a type; 0 turns it off.  [default: 1]",
    ),
    click.option(
        "--max-stuck", type=click.IntRange(0), help="Most stuck threads on a node.  [default: 10]"
    ),
    click.option(
        "--max-size",
        type=OrOff(Size()),
        default=OFF,
        show_default=True,
        help="Most bytes of the file, such as 2G.",
    ),
    click.option(
        "--max-overdue",
        type=OrOff(Duration()),
        default="1m",
        show_default=True,
        help="Longest that a tick of a schedule may be late.",
    ),
)
def check(
    session: Session,
    max_age: Any,
    max_failed: Any,
    within: float,
    nodes: Sequence[str],
    max_stuck: int | None,
    max_size: Any,
    max_overdue: Any,
) -> None:
    """Check the health."""
    health = session.queue.health(
        oldest_due=unless_off(max_age),
        failed=None if max_failed == OFF else (max_failed, within),
        nodes=_nodes(nodes),
        stuck=max_stuck,
        file_size=unless_off(max_size),
        schedule_overdue=unless_off(max_overdue),
    )
    if session.json:
        session.out.json(health.to_dict())
    elif health.ok:
        session.out.line("All is well.", "green")
    else:
        for problem in health.problems:
            session.out.line(clean(problem.sentence), "red")
    if not health.ok:
        away = any(problem.kind == "repository" for problem in health.problems)
        raise click.exceptions.Exit(AWAY if away else FAILED)


# --- failures


def key_of(group: FailureGroup) -> str:
    """Return a short name of a group, the same at every call."""
    place = "" if group.place is None else str(group.place)
    text = "\0".join((group.type, group.error_type, place))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:_KEY]


FAILURE_COLUMNS = (
    Column("GROUP"),
    Column("COUNT", right=True),
    Column("TYPE", cut=True),
    Column("LAST", right=True, drop=2),
    Column("ERROR", cut=True),
    Column("PLACE", cut=True, drop=1),
    Column("EXAMPLE", drop=3),
)


def failure_row(group: FailureGroup, now: datetime) -> Row:
    """Return the cells of a group for :data:`FAILURE_COLUMNS`."""
    return (
        key_of(group),
        str(group.count),
        group.type,
        f"{age((now - group.last).total_seconds())}",
        Cell(one_line(group.error) or group.error_type, "red"),
        "" if group.place is None else str(group.place),
        group.example,
    )


@command(
    "failures",
    """Show the failed tasks in groups of the same type, class of error and place in the code.

GROUP names a group: `taskx requeue --group GROUP` runs its tasks again. The newest 1,000 failed tasks are
read.""",
    """
taskx failures
taskx failures --type email --since 1d
taskx failures --json | jq -r '.task_ids[]'
""",
    click.option("--type", "type_", help="Only tasks of this type.", shell_complete=complete_types),
    click.option(
        "--since", type=Duration(), help="Only tasks that failed within this time, such as 1d."
    ),
    click.option(
        "--at-most",
        type=click.IntRange(1),
        default=1000,
        show_default=True,
        help="Most failed tasks to read.",
    ),
)
def failures(session: Session, type_: str | None, since: float | None, at_most: int) -> None:
    """Show groups of failures."""
    now = session.now()
    start = None if since is None else session.after(-since)
    found = session.queue.failures(type=type_, since=start, at_most=at_most)
    if session.json:
        session.out.json_lines({"group": key_of(group), **group.to_dict()} for group in found)
        return
    if found:
        session.out.table(FAILURE_COLUMNS, [failure_row(group, now) for group in found])
    else:
        session.out.say(
            "no task has failed" if type_ is None and since is None else "no failed task matches"
        )
    if not found.complete:
        session.out.say(
            f"failed tasks that were submitted before {moment(found.since)} were not read"
        )


_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@command(
    "doctor",
    """Examine versions, file, permissions, disk, locks, dead nodes, clock, and where tasks wait.

Prints a line for each check, with what to do. A warning says what can do harm; a failure keeps tasks from
running, and the exit code is 1. Nothing is changed. `taskx check` examines the tasks themselves.""",
    """
taskx doctor
taskx doctor --json | jq -r 'select(.level != "ok") | .sentence'
""",
)
def doctor(session: Session) -> None:
    """Examine the surroundings."""
    found = session.queue.diagnose()
    for check in found.checks:
        if session.json:
            session.out.json(check.to_dict())
        else:
            session.out.line(
                f"{check.level:<5} {check.name}: {clean(str(check))}", _COLOURS[check.level]
            )
    if not found.ok:
        raise click.exceptions.Exit(FAILED)


COMMANDS = (why, stats, check, doctor, failures)
