"""The command about the log of changes: changes."""

from __future__ import annotations

import click

from taskx.insight.changelog import Change
from taskx.programs.cli.opening import Session, command
from taskx.programs.cli.output import Column, Row, moment
from taskx.tasks.redact import redacted
from taskx.tasks.redact import show as short
from taskx.tasks.timing import DEFAULT_TIMING

COLUMNS = (
    Column("AT"),
    Column("BY", cut=True, drop=2),
    Column("ACTION"),
    Column("TARGET", cut=True),
    Column("DETAIL", cut=True, drop=1),
)


def _row(session: Session, change: Change) -> Row:
    detail = "" if change.detail is None else short(change.detail, session.queue.config.redact)
    return moment(change.at), change.by, change.action, change.target, detail


@command(
    "changes",
    f"""List who changed what: the log of changes, newest first.

It has the changes that were made with the command line and the dashboard, and those that programs note. The
newest {DEFAULT_TIMING.most_changes:,} are kept.""",
    """
taskx changes
taskx changes --limit 1000 --json | jq 'select(.action == "cancel")'
""",
    click.option(
        "--limit",
        type=click.IntRange(1),
        default=100,
        show_default=True,
        help="Most changes to list.",
    ),
)
def changes(session: Session, limit: int) -> None:
    """List changes."""
    found = session.queue.changes(limit)
    if session.json:
        secret = session.queue.config.redact
        session.out.json_lines(
            {**change.to_dict(), "detail": redacted(change.detail, secret)} for change in found
        )
    elif found:
        session.out.table(COLUMNS, [_row(session, change) for change in found])
    else:
        session.out.say("no change is noted")


COMMANDS: tuple[click.Command, ...] = (changes,)
