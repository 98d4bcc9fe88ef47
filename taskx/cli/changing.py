"""The commands that change tasks: cancel, requeue, delete, prune, pause, resume."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import click

from taskx.cli.completion import complete_ids, complete_types, types_of
from taskx.cli.errors import AWAY, FAILED, Failure, Usage, code_of
from taskx.cli.opening import Session, command
from taskx.cli.output import clean
from taskx.cli.values import Duration
from taskx.core.errors import TaskxError
from taskx.core.model import TaskFilter, TaskStatus
from taskx.inspecting.query import suggestion

# The largest number that is counted before a question.
_COUNTED = 100_000

ids_argument = click.argument("task_ids", metavar="[ID]...", nargs=-1, shell_complete=complete_ids)
yes_option = click.option("--yes", "-y", is_flag=True, help="Do not ask.")
dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Only say how many tasks would be changed."
)


def confirm(session: Session, question: str, yes: bool) -> None:
    """Ask a person before a change of many tasks.

    Raises:
        Usage: nobody can be asked, and ``--yes`` was not given.
        Failure: the answer is no.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise Usage(
            f"{question} Nobody can be asked here: give --yes to do it, or --dry-run to only count"
        )
    if not click.confirm(clean(question), err=True):
        raise Failure("nothing was changed", FAILED)


def change_each(
    session: Session, task_ids: Sequence[str], change: Callable[[str], dict[str, Any]]
) -> None:
    """Change each task and print the outcome. An error of one task does not keep the others back.

    Args:
        session: the session.
        task_ids: the ids of the tasks.
        change: a function that changes one task, and returns what to print: its ``outcome``, and more.

    Raises:
        click.exceptions.Exit: with the code of the first error.
    """
    codes = []
    for task_id in task_ids:
        try:
            done = change(task_id)
        except TaskxError as error:
            if (code := code_of(error)) == AWAY:
                raise
            codes.append(code)
            session.out.say(f"taskx: {error}")
            continue
        if session.json:
            session.out.json({"id": task_id, **done})
        else:
            session.out.line(f"{clean(task_id)} {done['outcome']}")
    if codes:
        raise click.exceptions.Exit(codes[0])


@command(
    "cancel",
    """Cancel tasks.

A pending task never runs. A running one is asked to stop.""",
    """
taskx cancel 019abc12-...
""",
    ids_argument,
)
def cancel(session: Session, task_ids: Sequence[str]) -> None:
    """Cancel tasks."""

    def change(task_id: str) -> dict[str, Any]:
        cancelled = session.queue.cancel_task(task_id)
        return {"outcome": "cancelled" if cancelled else "asked to stop"}

    change_each(session, task_ids, change)


@command(
    "requeue",
    """Run failed or cancelled tasks again.""",
    """
taskx requeue 019abc12-...
""",
    ids_argument,
)
def requeue(session: Session, task_ids: Sequence[str]) -> None:
    """Requeue tasks."""

    def change(task_id: str) -> dict[str, Any]:
        session.queue.requeue(task_id)
        return {"outcome": "requeued"}

    change_each(session, task_ids, change)


@command(
    "delete",
    """Delete the records of tasks that do not run.""",
    """
taskx delete 019abc12-...
""",
    ids_argument,
)
def delete(session: Session, task_ids: Sequence[str]) -> None:
    """Delete tasks."""

    def change(task_id: str) -> dict[str, Any]:
        session.queue.delete(task_id)
        return {"outcome": "deleted"}

    change_each(session, task_ids, change)


@command(
    "prune",
    """Delete the records of tasks that ended some time ago.

Tasks stay while a stored task depends on them, or while they hold a unique key for a number of seconds.""",
    """
taskx prune --older 30d --dry-run
taskx prune --older 7d --status completed --yes
""",
    click.option(
        "--older",
        type=Duration(),
        required=True,
        help="Tasks that ended longer ago than this, such as 30d.",
    ),
    click.option(
        "--status",
        type=click.Choice([status.value for status in TaskStatus if status.finished]),
        help="Only tasks with this status.",
    ),
    yes_option,
    dry_run_option,
)
def prune(session: Session, older: float, status: str | None, yes: bool, dry_run: bool) -> None:
    """Delete old tasks."""
    before = session.now() - timedelta(seconds=older)
    ended = [status] if status else [each for each in TaskStatus if each.finished]
    counts = [
        session.queue.count_tasks(TaskFilter(status=each, end_date=before), at_most=_COUNTED)
        for each in ended
    ]
    number = sum(counts)
    capped = any(not count.exact for count in counts)
    words = f"{'more than ' if capped else ''}{number} {'task' if number == 1 else 'tasks'}"
    if dry_run:
        # A task that was submitted before that time may have ended after it.
        _report(
            session, f"at most {words} would be deleted", {"at_most": None if capped else number}
        )
        return
    if number:
        confirm(session, f"Delete up to {words} that ended longer ago?", yes)
    deleted = session.queue.prune(before, status)
    _report(session, f"{deleted} deleted", {"deleted": deleted})


def _report(session: Session, words: str, record: dict[str, Any]) -> None:
    if session.json:
        session.out.json(record)
    else:
        session.out.line(words)


# --- pauses

types_argument = click.argument(
    "types", metavar="[TYPE]...", nargs=-1, shell_complete=complete_types
)


def _wanted_types(types: Sequence[str], everything: bool) -> list[str | None]:
    if everything is bool(types):
        raise Usage("name the types, or give --all for all types")
    return [None] if everything else [*types]


@command(
    "pause",
    """Pause types: none of their tasks starts, in any process, until `taskx resume`.

Running tasks go on.""",
    """
taskx pause email
taskx pause --all
""",
    types_argument,
    click.option("--all", "everything", is_flag=True, help="Pause all types."),
)
def pause(session: Session, types: Sequence[str], everything: bool) -> None:
    """Pause types."""
    wanted = _wanted_types(types, everything)
    known = types_of(session.queue)
    for type in wanted:
        if type is not None and type not in known:
            session.out.say(f"no node and no task has type {type!r}{suggestion(type, known)}")
        session.queue.declare(*([] if type is None else [type]))  # else the log would warn, too
        session.queue.pause(type)
        _report(session, f"{_shown(type)} paused", {"type": type, "paused": True})


@command(
    "resume",
    """End the pause of types.

`taskx resume --all` ends `taskx pause --all`; types that were paused by name stay paused.""",
    """
taskx resume email
taskx resume --all
""",
    types_argument,
    click.option("--all", "everything", is_flag=True, help="End the pause of all types."),
)
def resume(session: Session, types: Sequence[str], everything: bool) -> None:
    """Resume types."""
    before = session.queue.paused
    for type in _wanted_types(types, everything):
        if not (before.everything if type is None else type in before.types):
            session.out.say(f"{_shown(type)} {'were' if type is None else 'was'} not paused")
        session.queue.resume(type)
        _report(session, f"{_shown(type)} resumed", {"type": type, "paused": False})
    after = session.queue.paused
    if after.everything:
        session.out.say("all types are still paused: taskx resume --all ends this")


def _shown(type: str | None) -> str:
    return "all types" if type is None else clean(type)


COMMANDS = (cancel, requeue, delete, prune, pause, resume)
