"""``taskx top``: what the queue does now, live on a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

import attrs
import click

from taskx.insight.nodes import NodeInfo
from taskx.insight.stats import Stats
from taskx.programs.cli.asking import STATS_COLUMNS, stats_row
from taskx.programs.cli.following import interval_option
from taskx.programs.cli.nodes import NODE_COLUMNS, node_row
from taskx.programs.cli.opening import Session, command
from taskx.programs.cli.output import Cell, Column, Row, age, moment, one_line
from taskx.programs.cli.values import Duration
from taskx.stores.controls import Paused
from taskx.tasks.errors import ConfigurationError, RepositoryError
from taskx.tasks.model import Task

# Most running tasks that are read.
_MOST = 200

RUNNING_COLUMNS = (
    Column("WORKER", cut=True),
    Column("TYPE", cut=True),
    Column("SINCE", right=True),
    Column("TASK", drop=1),
    Column("PROGRESS", cut=True, drop=2),
)


@attrs.frozen(kw_only=True)
class View:
    """The state of the queue at one moment."""

    at: datetime
    period: float
    stats: Stats
    nodes: Sequence[NodeInfo]
    running: Sequence[Task]
    paused: Paused

    @classmethod
    def of(cls, session: Session, period: float) -> View:
        """Read the state."""
        queue = session.queue
        return cls(
            at=session.now(),
            period=period,
            stats=queue.stats(period=period),
            nodes=_nodes(session),
            running=queue.list_tasks(status="running", limit=_MOST, at_most=1).tasks,
            paused=queue.paused,
        )

    def record(self) -> dict[str, Any]:
        """Return it as a dict of JSON values."""
        return {
            "at": self.at,
            **self.stats.to_dict(),
            "paused": {"everything": self.paused.everything, "types": sorted(self.paused.types)},
            "nodes": [node.to_dict() for node in self.nodes],
            "running": [
                {
                    "id": task.id,
                    "type": task.type,
                    "since": task.started_at,
                    "worker": task.worker,
                    "progress": task.progress,
                    "message": task.message,
                }
                for task in self.running
            ],
        }

    def lines(self, session: Session) -> Iterator[list[Cell]]:
        """Yield the lines of the view."""
        types = self.stats.types
        ended = sum(each.completed for each in types.values())
        failed = sum(each.failed for each in types.values())
        waiting = sum(each.waiting for each in types.values())
        running = sum(each.running for each in types.values())
        # Whole minutes are counted.
        seconds = max(1.0, (self.stats.checked_at - self.stats.since).total_seconds())
        yield [
            Cell(f"{moment(self.at)}  "),
            Cell(one_line(repr(session.queue.repository)), "bright_black"),
        ]
        yield [
            Cell(f"{waiting} waiting  "),
            Cell(f"{running} running  ", "cyan"),
            Cell(f"{ended / seconds:.3g}/s completed  ", "green"),
            Cell(f"{failed / seconds:.3g}/s failed", "red" if failed else ""),
            Cell(f"  (last {age(seconds)})"),
        ]
        if self.paused:
            names = "all types" if self.paused.everything else ", ".join(sorted(self.paused.types))
            yield [Cell(f"paused: {one_line(names)}", "yellow")]
        yield []
        busiest = sorted(
            types.items(), key=lambda item: (-item[1].running, -item[1].waiting, item[0])
        )
        yield from session.out.table_lines(STATS_COLUMNS, [stats_row(*item) for item in busiest])
        yield []
        yield from session.out.table_lines(
            NODE_COLUMNS, [node_row(node, self.at) for node in self.nodes]
        )
        yield []
        rows = [_running_row(task, self.at) for task in self.running]
        yield from session.out.table_lines(RUNNING_COLUMNS, rows)


def _nodes(session: Session) -> Sequence[NodeInfo]:
    try:
        return session.queue.nodes()
    except ConfigurationError:  # the repository has only the eight methods
        return ()


def _running_row(task: Task, now: datetime) -> Row:
    since = "" if task.started_at is None else age((now - task.started_at).total_seconds())
    return (task.worker, task.type, since, task.id, f"{task.progress}% {one_line(task.message)}")


@command(
    "top",
    """Show types, rates, the oldest tasks, and what runs where; live on a terminal, until Ctrl-C.

In a pipe, or with --once, the state is printed once.""",
    """
taskx top
taskx top --once
taskx top --json | jq .types
""",
    interval_option,
    click.option(
        "--period",
        type=Duration(),
        default="1m",
        show_default=True,
        help="Count ended tasks of this time.",
    ),
    click.option("--once", is_flag=True, help="Print it once."),
)
def top(session: Session, interval: float, period: float, once: bool) -> None:
    """Show the state."""
    if session.json:
        session.out.json(View.of(session, period).record())
    elif once or not session.out.live:
        for line in View.of(session, period).lines(session):
            session.out.cells(line)
    else:
        _live(session, interval, period)


def _live(session: Session, interval: float, period: float) -> None:
    from rich.live import Live

    screen = session.out.console
    with Live(console=screen, screen=True, auto_refresh=False) as live:
        while True:
            began = time.monotonic()
            live.update(session.out.text(_lines(session, period), screen.height), refresh=True)
            # A large repository is read for a twentieth of the time at most.
            time.sleep(max(interval, 20 * (time.monotonic() - began)))


def _lines(session: Session, period: float) -> Iterator[list[Cell]]:
    try:
        yield from View.of(session, period).lines(session)
    except RepositoryError as error:
        yield [Cell(one_line(str(error)), "red")]


COMMANDS = (top,)
