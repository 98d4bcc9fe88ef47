"""The command that measures a disk and a repository: bench."""

from __future__ import annotations

import click

from taskx.cli.measures import Measure, measure
from taskx.cli.opening import Session, command
from taskx.cli.output import Column, Row
from taskx.cli.values import Duration

_COLUMNS = (
    Column("MEASURE"),
    Column("PER SECOND", right=True),
    Column("P50", right=True),
    Column("P99", right=True),
    Column("MEANING", cut=True, drop=1),
)


@command(
    "bench",
    """Measure your disk and repository for some seconds.

The tasks are in a scratch repository beside yours, which is removed at the end: a file in the same folder,
or a collection of the same database. Your own tasks are not touched. Stop other programs that use the disk:
they share it.

P50 is the time that half of the calls took at most, P99 that of 99 of 100. `sync` is the disk itself: a
submit cannot be faster, but submits of several threads share one, and so do the tasks of submit_many.""",
    """
taskx bench
taskx bench --seconds 30s --workers 20
taskx bench --json | jq 'select(.name == "submit").rate'
""",
    click.option(
        "--seconds",
        type=Duration(),
        default="6s",
        show_default=True,
        help="The time of all measures.",
    ),
    click.option(
        "--workers",
        type=click.IntRange(1, 1000),
        default=5,
        show_default=True,
        help="The worker threads.",
    ),
)
def bench(session: Session, seconds: float, workers: int) -> None:
    """Measure the repository."""
    found = measure(session.queue.repository, seconds, workers)
    if session.json:
        session.out.json_lines(each.to_dict() for each in found)
    else:
        session.out.table(_COLUMNS, map(_row, found))


def _row(found: Measure) -> Row:
    rate = f"{found.rate:,.0f}" if found.rate >= 10 else f"{found.rate:.2g}"
    return (found.name, rate, _time(found.p50), _time(found.p99), found.meaning)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds * 1000:.2f}ms" if seconds < 1 else f"{seconds:.1f}s"


COMMANDS: tuple[click.Command, ...] = (bench,)
