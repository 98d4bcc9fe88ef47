"""The commands that read tasks: list, show, dead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

import attrs
import click

from taskx.insight.query import parse_query
from taskx.programs.cli.completion import complete_filter, complete_ids, types_of
from taskx.programs.cli.errors import Usage
from taskx.programs.cli.opening import Session, TaskId, command
from taskx.programs.cli.output import COLOURS, Cell, Column, Row, age, clean, moment, one_line
from taskx.tasks.findings import suggestion
from taskx.tasks.model import Attempt, Task, TaskFilter, TaskStatus
from taskx.tasks.redact import redacted
from taskx.tasks.redact import show as short
from taskx.tasks.tags import without_trace

# Tasks that a list has unless it is told otherwise.
_LIMIT = 100
# The largest total that is counted.
_COUNTED = 10_000

FILTER_HELP = """\
A FILTER is a line of terms, such as `type:email status:failed older:1d`. All must hold. The fields are
type, status, tag, by, error, error_type, id (its beginning), params.PATH, parent, flow, older, newer, since
and until. Quote values with spaces: 'error:"timed out"'."""

filter_argument = click.argument("filter", nargs=-1, shell_complete=complete_filter)
id_argument = click.argument("task_id", metavar="ID", type=TaskId(), shell_complete=complete_ids)

limit_option = click.option(
    "--limit",
    "-n",
    type=click.IntRange(0),
    default=_LIMIT,
    show_default=True,
    help="Most tasks to list.",
)
all_option = click.option("--all", "-a", "everything", is_flag=True, help="List all that match.")


def filter_of(session: Session, words: Sequence[str]) -> TaskFilter:
    """Return the filter that the words of a command line name."""
    return parse_query(" ".join(words), session.queue.repository.clock)


def as_record(session: Session, task: Task) -> dict[str, Any]:
    """Return the task as a dict of JSON values, without secrets."""
    record = {**task.to_dict(), "damage": task.damage}
    secret = session.queue.config.redact
    for name in ("params", "result", "checkpoints"):
        record[name] = redacted(record[name], secret)
    for attempt in record["earlier_attempts"]:
        attempt["old_params"] = redacted(attempt["old_params"], secret)
    return record


TASK_COLUMNS = (
    Column("ID"),
    Column("TYPE", cut=True),
    Column("STATUS"),
    Column("AGE", right=True, drop=1),
    Column("TRY", right=True, drop=3),
    Column("DETAIL", cut=True, drop=2),
    Column("TAGS", cut=True, drop=5),
    Column("PARAMS", cut=True, drop=4),
)


def task_row(session: Session, task: Task, now: datetime) -> Row:
    """Return the cells of a task for :data:`TASK_COLUMNS`."""
    return (
        task.id,
        task.type,
        Cell(task.status.value, COLOURS[task.status]),
        "" if task.created_at is None else age((now - task.created_at).total_seconds()),
        str(task.attempt if not task.status.finished else max(1, len(task.attempts))),
        _detail(task, now),
        " ".join(without_trace(task.tags)),
        short(task.params, session.queue.config.redact),
    )


def _detail(task: Task, now: datetime) -> str:
    if task.status is TaskStatus.RUNNING:
        return f"{task.progress}% {one_line(task.message)}".rstrip()
    if task.error:
        return one_line(task.error)
    if task.status is TaskStatus.PENDING and task.run_at is not None and task.run_at > now:
        return f"due in {age((task.run_at - now).total_seconds())}"
    return one_line(task.message)


def print_tasks(session: Session, wanted: TaskFilter, everything: bool) -> int:
    """Print the tasks of a filter; return their number."""
    tasks = session.queue.iter_tasks(wanted)
    if session.json:
        return session.out.json_lines(as_record(session, task) for task in tasks)
    now = session.now()
    number = session.out.table(TASK_COLUMNS, (task_row(session, task, now) for task in tasks))
    if not number and wanted.limit:
        _say_none(session, wanted)
    elif not everything and number == wanted.limit:
        total = session.queue.count_tasks(wanted, at_most=_COUNTED)
        if total > number:
            more = "" if total.exact else "more than "
            session.out.say(f"{number} of {more}{int(total)} tasks; --limit N or --all shows more")
    return number


def _say_none(session: Session, wanted: TaskFilter) -> None:
    known = types_of(session.queue) if wanted.type is not None else []
    if wanted.type is not None and wanted.type not in known:
        session.out.say(f"no task has type {wanted.type!r}{suggestion(wanted.type, known)}")
    else:
        session.out.say("no task matches")


@command(
    "list",
    f"""List the tasks that match a filter, newest first.

{FILTER_HELP}""",
    """
taskx list
taskx list type:email status:failed newer:1d
taskx list 'error:"timed out"' params.user.id:7 -n 20
taskx list status:failed --all --json | jq -r .id
""",
    filter_argument,
    limit_option,
    all_option,
)
def list_(session: Session, filter: tuple[str, ...], limit: int, everything: bool) -> None:
    """List tasks."""
    print_tasks(session, _limited(filter_of(session, filter), limit, everything), everything)


def _limited(wanted: TaskFilter, limit: int, everything: bool) -> TaskFilter:
    return wanted if everything else attrs.evolve(wanted, limit=limit)


@command(
    "show",
    """Show all that is known of one task.

Params, result, checkpoints, attempts with their tracebacks, and the end of the log.""",
    """
taskx show 019abc12-...
taskx show 019abc12-... --json | jq .params
""",
    id_argument,
    click.option(
        "--log-lines",
        type=click.IntRange(0),
        default=20,
        show_default=True,
        help="Lines of the log.",
    ),
)
def show(session: Session, task_id: str, log_lines: int) -> None:
    """Show a task."""
    task = session.queue.get_task_status(task_id)
    if session.json:
        session.out.json(as_record(session, task))
        return
    for name, value in _facts(task):
        if value:
            style = COLOURS[task.status] if name == "status" else ""
            session.out.line(f"{name + ':':<15}{clean(value)}", style)
    record = as_record(session, task)
    for name in ("params", "result", "checkpoints"):
        if record[name] is not None:
            _section(session, name, _tree(record[name]))
    for attempt in task.attempts:
        if len(task.attempts) > 1 or attempt.traceback:
            _section(session, _attempt(attempt), _attempt_text(session, attempt))
    if task.log and log_lines:
        lines = task.log.rstrip("\n").split("\n")
        _section(session, "log", "\n".join(lines[-log_lines:]))


def _facts(task: Task) -> Iterator[tuple[str, str]]:
    yield "id", task.id
    yield "type", task.type
    yield "status", task.status.value
    yield "progress", f"{task.progress}% {task.message}".rstrip() if task.started_at else ""
    yield "error", one_line(task.error)
    yield "damage", task.damage
    yield "submitted", _since(task.created_at, task.created_by and f"by {task.created_by}")
    yield "due", moment(task.run_at)
    yield "started", _since(task.started_at, task.worker and f"on {task.worker}")
    # 0 was not measured: the task never began, or its process died.
    took = f"after {age(task.duration)}" if task.duration else ""
    yield "ended", _since(task.completed_at, took)
    yield "expires", moment(task.expires_at)
    yield "cancel asked", moment(task.cancel_requested_at)
    yield "priority", str(task.priority or "")
    yield "timeout", "" if task.timeout is None else f"{task.timeout:g} s"
    yield "attempts", _attempts(task)
    yield (
        "unique key",
        "" if task.unique_key is None else f"{task.unique_key} ({task.unique_scope})",
    )
    yield "key", task.concurrency_key or ""
    yield "cost", ", ".join(f"{number:,} {unit}" for unit, number in (task.cost or {}).items())
    yield "version", task.version or ""
    yield "parents", ", ".join(task.depends_on)
    yield "flow", task.flow
    yield "tags", " ".join(task.tags)


def _attempt(attempt: Attempt) -> str:
    """Return the title of an attempt, or of a requeue, which is listed with them."""
    if attempt.outcome == "requeued":
        return f"requeued {moment(attempt.ended_at)}"
    return (
        f"{attempt.outcome or 'running'} {moment(attempt.started_at)} to "
        f"{moment(attempt.ended_at) or 'now'}, on {attempt.worker or 'an unknown worker'}"
    )


def _attempt_text(session: Session, attempt: Attempt) -> str:
    lines = [attempt.traceback or attempt.error]
    if attempt.old_params is not None:
        lines.append(f"params before: {short(attempt.old_params, session.queue.config.redact)}")
    if attempt.from_step:
        lines.append(f"from step: {attempt.from_step}")
    return "\n".join(filter(None, lines))


def _since(at: datetime | None, words: str) -> str:
    return "" if at is None else f"{moment(at)} {words}".rstrip()


def _attempts(task: Task) -> str:
    parts = [
        f"{count} {word}"
        for count, word in (
            (task.errors, "raised"),
            (task.crashes, "crashed"),
            (task.interruptions, "interrupted"),
            (task.snoozes, "snoozed"),
        )
        if count
    ]
    # Only attempts that raise count, and a requeue counts from zero again.
    most = "" if task.max_attempts is None else f"; at most {task.max_attempts} may raise"
    ran = [attempt for attempt in task.attempts if attempt.outcome != "requeued"]
    return f"{len(ran)}" + (f" ({', '.join(parts)})" if parts else "") + most


def _section(session: Session, title: str, text: str) -> None:
    session.out.line()
    session.out.line(clean(title), "bold")
    for line in clean(text.rstrip("\n"), lines=True).split("\n") if text else ():
        session.out.line(f"  {line}")


def _tree(value: Any) -> str:
    """Return a JSON value as indented text for people; the caller cleans it."""
    import json

    return json.dumps(value, indent=2, ensure_ascii=False)


@command(
    "dead",
    """List dead letters: failed tasks, which only a requeue runs again.

They are those of `taskx list status:failed`. `taskx failures` groups them by their cause.""",
    """
taskx dead
taskx dead type:email newer:1d
""",
    filter_argument,
    limit_option,
    all_option,
)
def dead(session: Session, filter: tuple[str, ...], limit: int, everything: bool) -> None:
    """List dead letters."""
    wanted = filter_of(session, filter)
    if wanted.status not in (None, TaskStatus.FAILED):
        raise Usage("dead letters have the status failed: leave out status:")
    wanted = attrs.evolve(wanted, status=TaskStatus.FAILED)
    print_tasks(session, _limited(wanted, limit, everything), everything)


COMMANDS = (list_, show, dead)
