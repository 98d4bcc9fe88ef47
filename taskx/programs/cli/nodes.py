"""The commands about nodes: nodes, stacks."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import click

from taskx.insight.nodes import NodeInfo
from taskx.programs.cli.completion import complete_nodes
from taskx.programs.cli.errors import FAILED, Failure, Usage
from taskx.programs.cli.opening import Actions, Session, command, session_of
from taskx.programs.cli.output import Cell, Column, Row, age, clean
from taskx.programs.cli.values import Duration

node_argument = click.argument("node", shell_complete=complete_nodes)


def node_id(session: Session, text: str) -> str:
    """Return the id of the node with this id, beginning of an id, or name; else the text itself.

    Raises:
        Usage: it fits several nodes.
    """
    nodes = session.queue.nodes()
    exact = {node.id for node in nodes if text in (node.id, node.name)}
    found = exact or {node.id for node in nodes if text and node.id.startswith(text)}
    if len(found) > 1:
        raise Usage(f"{len(found)} nodes begin with {text!r}: give more of the id")
    return found.pop() if found else text


NODE_COLUMNS = (
    Column("NODE", cut=True),
    Column("STATE"),
    Column("UP", right=True, drop=1),
    Column("WORKERS", right=True),
    Column("RUNNING", right=True),
    Column("STUCK", right=True, drop=1),
    Column("BUFFERED", right=True, drop=4),
    Column("VERSION", drop=5),
    Column("TYPES", cut=True, drop=2),
    Column("ID", drop=3),
)


def node_row(node: NodeInfo, now: datetime) -> Row:
    """Return the cells of a node for :data:`NODE_COLUMNS`."""
    changed = "" if node.workers == node.worker_num else f" (of {node.worker_num})"
    return (
        node.name,
        _state(node, now),
        "" if node.started_at is None else age((now - node.started_at).total_seconds()),
        f"{node.workers}{changed}",
        str(len(node.running)),
        Cell(str(node.stuck or ""), "red"),
        str(node.buffered),
        node.version,
        " ".join(node.types),
        node.id,
    )


def _state(node: NodeInfo, now: datetime) -> Cell:
    if node.alive is False:
        return Cell("dead", "red")
    if node.silent and node.last_beat is not None:
        since = age((now - node.last_beat).total_seconds())
        return Cell(f"last beat {since} ago, lease {age(node.lease or 0.0)}", "red")
    if node.suspected:
        return Cell("suspected", "yellow")
    if node.broker_error:
        return Cell("no broker", "red")
    return Cell("stopping", "yellow") if node.stopping else Cell("alive", "green")


RUNNING_COLUMNS = (
    Column("NODE", cut=True),
    Column("THREAD", drop=2),
    Column("TYPE", cut=True),
    Column("SINCE", right=True),
    Column("TASK", drop=1),
)


def running_rows(nodes: Sequence[NodeInfo], now: datetime) -> list[Row]:
    """Return the rows of all running tasks for :data:`RUNNING_COLUMNS`."""
    return [
        (
            node.name,
            task.thread,
            task.type,
            "" if task.since is None else age((now - task.since).total_seconds()),
            task.id,
        )
        for node in nodes
        for task in node.running
    ]


@click.group(
    "nodes",
    cls=Actions,
    invoke_without_command=True,
    subcommand_metavar="[stop NODE]",
    short_help="The started queues of all processes, and what they run; stop one.",
    help="""\
List the nodes: the started queues of all processes, and what they run. Or stop one of them.

A dead node is listed until another one has taken over its tasks. If a heartbeat is older than two leases,
the state is its age: the node may be dead, or the clocks of the hosts differ. STUCK is the number of
threads that run on after the time-out of their tasks.

  $ taskx nodes
  $ taskx nodes --json | jq '.running[].id'
  $ taskx nodes stop 01a21a47-2287-77ea-8c32-aa356e5e03af""",
)
@click.pass_context
def nodes(ctx: click.Context) -> None:
    """List the nodes."""
    if ctx.invoked_subcommand is not None:
        return
    session = session_of(ctx)
    found = session.queue.nodes()
    if session.json:
        session.out.json_lines(node.to_dict() for node in found)
        return
    if not found:
        session.out.say("no node is started")
        return
    now = session.now()
    session.out.table(NODE_COLUMNS, [node_row(node, now) for node in found])
    if rows := running_rows(found, now):
        session.out.line()
        session.out.table(RUNNING_COLUMNS, rows)


@command(
    "stop",
    """Ask a node to stop.

NODE is an id of `taskx nodes`, the beginning of one, or a name. The node takes no more tasks, and its
running ones can end. A process of `taskx worker` is replaced by a new one. A program that is run by
taskx.run ends; in other programs only the queue stops.""",
    """
taskx nodes stop 01a21a47-2287-77ea-8c32-aa356e5e03af
taskx nodes stop web1:4711:5e03af
""",
    node_argument,
)
def stop(session: Session, node: str) -> None:
    """Stop a node."""
    found = node_id(session, node)
    session.queue.stop_node(found)
    session.note("stop node", found)
    if session.json:
        session.out.json({"id": found, "outcome": "asked to stop"})
    else:
        session.out.line(f"{clean(found)} asked to stop")


nodes.add_command(stop)


@command(
    "stacks",
    """Print what the threads of a node do: their stacks.

The node is asked through the repository, and answers within about a second. NODE is an id of `taskx nodes`,
the beginning of one, or a name.""",
    """
taskx stacks 01a21a47-2287-77ea-8c32-aa356e5e03af
taskx stacks 01a2 --json | jq -r .stack
""",
    node_argument,
    click.option(
        "--timeout",
        type=Duration(),
        default="5s",
        show_default=True,
        help="Wait at most this long.",
    ),
)
def stacks(session: Session, node: str, timeout: float) -> None:
    """Print stacks."""
    try:
        threads = session.queue.stacks(node_id(session, node), timeout=timeout)
    except TimeoutError as error:
        raise Failure(str(error), FAILED) from None
    for thread in threads:
        if session.json:
            session.out.json(thread.to_dict())
            continue
        words = f" {thread.type} {thread.task_id}" if thread.task_id else ""
        session.out.line(clean(thread.thread + words), "bold")
        for line in clean(thread.stack.rstrip("\n"), lines=True).split("\n"):
            session.out.line(f"  {line}")


COMMANDS: tuple[click.Command, ...] = (nodes, stacks)
