"""The commands for what people answer: answers, finish."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import attrs
import click

from taskx.programs.cli.completion import complete_filter, complete_ids
from taskx.programs.cli.errors import CONFLICT, Failure, Usage
from taskx.programs.cli.listing import (
    FILTER_HELP,
    all_option,
    as_record,
    filter_of,
    limit_option,
)
from taskx.programs.cli.opening import Session, command
from taskx.programs.cli.output import Column, Row, age, clean
from taskx.programs.cli.values import json_value
from taskx.tasks.lifecycle import ANSWER
from taskx.tasks.model import Task, TaskStatus
from taskx.tasks.redact import show
from taskx.tasks.tags import without_trace

_COLUMNS = (
    Column("ID"),
    Column("AGE", right=True),
    Column("LEFT", right=True),
    Column("QUESTION", cut=True),
    Column("TAGS", cut=True, drop=2),
    Column("BY", cut=True, drop=1),
)


@command(
    "answers",
    f"""List the answers that tasks wait for, newest first: `taskx finish` gives one.

{FILTER_HELP}""",
    """
taskx answers
taskx answers tag:finance older:1d
""",
    click.argument("filter", nargs=-1, shell_complete=complete_filter),
    limit_option,
    all_option,
)
def answers(session: Session, filter: Sequence[str], limit: int, everything: bool) -> None:
    """List open answers."""
    wanted = filter_of(session, filter)
    if wanted.type not in (None, ANSWER) or wanted.status not in (None, TaskStatus.PENDING):
        raise Usage("open answers have the type answer and the status pending: leave these out")
    wanted = attrs.evolve(wanted, type=ANSWER, status=TaskStatus.PENDING)
    found = session.queue.iter_tasks(wanted if everything else attrs.evolve(wanted, limit=limit))
    if session.json:
        session.out.json_lines(as_record(session, task) for task in found)
        return
    now = session.now()
    if not session.out.table(_COLUMNS, (_row(session, task, now) for task in found)):
        session.out.say("no task waits for an answer")


def _row(session: Session, task: Task, now: datetime) -> Row:
    since, until = task.created_at, task.expires_at
    return (
        task.id,
        "" if since is None else age((now - since).total_seconds()),
        "" if until is None else age(max(0.0, (until - now).total_seconds())),
        show(task.params, session.queue.config.redact),
        " ".join(without_trace(task.tags)),
        task.created_by,
    )


@command(
    "finish",
    """Give an answer, for which a task may wait: a JSON value, or an error.

An answer may be given before a task asks. Only the first one counts.""",
    """
taskx finish 019abc12-.../approval '"yes"'
taskx finish 019abc12-.../approval --error 'refused by Eva'
taskx finish 019abc12-.../pay --again
taskx finish event/shipped:42 '{"by": "ship"}'
""",
    click.argument("task_id", metavar="ID", shell_complete=complete_ids),
    click.argument("value", metavar="[JSON]", required=False),
    click.option("--error", metavar="TEXT", default="", help="The answer has failed."),
    click.option(
        "--again",
        is_flag=True,
        help="What the task does once, with an unknown outcome, shall be done again.",
    ),
)
def finish(session: Session, task_id: str, value: str | None, error: str, again: bool) -> None:
    """Give an answer."""
    if (value is not None) + bool(error) + again != 1:
        raise Usage("give the answer as JSON, such as '\"yes\"', or --error TEXT, or --again")
    result = None if value is None else json_value(value, "the answer")
    if not session.queue.finish(task_id, result, error=error, again=again, by=session.user):
        raise Failure(f"the answer {task_id} was given before, or has ended", CONFLICT)
    if session.json:
        session.out.json({"id": task_id, "outcome": "finished"})
    else:
        session.out.line(f"{clean(task_id)} finished")


COMMANDS = (answers, finish)
