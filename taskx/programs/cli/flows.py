"""The command about flows: flows."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import click

from taskx.programs.cli.opening import Session, command
from taskx.programs.cli.output import COLOURS, Cell, Column, Row, age
from taskx.queue.flows import FlowSummary

# Flows that are listed unless it is told otherwise.
_LIMIT = 20

COLUMNS = (
    Column("FLOW"),
    Column("STATUS"),
    Column("AGE", right=True, drop=2),
    Column("TASKS", right=True, drop=1),
    Column("COUNTS", cut=True),
)


def as_record(flow: FlowSummary) -> dict[str, Any]:
    """Return a flow as a dict of JSON values."""
    return {
        "id": flow.id,
        "created_at": flow.created_at,
        "status": flow.status.value,
        "total": flow.total,
        "counts": {status.value: number for status, number in flow.counts.items()},
        "exact": flow.exact,
    }


def _row(flow: FlowSummary, now: datetime) -> Row:
    return (
        flow.id,
        Cell(flow.status.value, COLOURS[flow.status]),
        "" if flow.created_at is None else age((now - flow.created_at).total_seconds()),
        f"{flow.total}{'' if flow.exact else '+'}",
        ", ".join(f"{number} {status.value}" for status, number in flow.counts.items()),
    )


@command(
    "flows",
    """List the flows that were submitted last: how far each of them is.

`taskx list flow:ID` lists the tasks of one. At most 5,000 tasks of a flow are counted; `+` says that it may
have more.""",
    """
taskx flows
taskx flows --limit 100 --json | jq -r 'select(.status == "failed").id'
""",
    click.option(
        "--limit",
        type=click.IntRange(1),
        default=_LIMIT,
        show_default=True,
        help="Most flows to list.",
    ),
    click.option("--after", metavar="ID", help="Go on after this flow, the last one of a call."),
)
def flows(session: Session, limit: int, after: str | None) -> None:
    """List flows."""
    found = session.queue.flows(at_most=limit, after=after)
    if session.json:
        session.out.json_lines(map(as_record, found))
    elif found:
        now = session.now()
        session.out.table(COLUMNS, [_row(flow, now) for flow in found])
    else:
        session.out.say("there are no flows" if after is None else "there are no more flows")


COMMANDS: tuple[click.Command, ...] = (flows,)
