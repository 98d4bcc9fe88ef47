"""The command that submits tasks."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import islice
from typing import Any

import click

from taskx.programs.cli.completion import complete_ids, complete_types, types_of
from taskx.programs.cli.errors import Usage
from taskx.programs.cli.opening import Session, TaskId, command
from taskx.programs.cli.output import clean
from taskx.programs.cli.values import Duration, Moment, json_object
from taskx.tasks.errors import ConfigurationError
from taskx.tasks.findings import suggestion
from taskx.tasks.model import Task

# Tasks that are stored in one transaction.
_BATCH = 500


@command(
    "submit",
    """Submit tasks of one type; print their ids.

Each JSON is an object with the params of one task; without one, the task has no params. `-` reads them from
stdin, one a line. Tasks are stored some at a time; an error says how many were stored before it.""",
    """
taskx submit email '{"to": "ann"}'
taskx submit email -p to=ann -p copies=2 --delay 1h
taskx submit report --id nightly-2026-11-26
jq -c '.[]' users.json | taskx submit welcome -
""",
    click.argument("type_", metavar="TYPE", shell_complete=complete_types),
    click.argument("json_params", metavar="[JSON]...", nargs=-1),
    click.option(
        "-p",
        "--param",
        "pairs",
        metavar="KEY=VALUE",
        multiple=True,
        help="One param; VALUE is JSON, or else a text.",
    ),
    click.option("--id", "task_id", help="The id of the task. [default: a new one]"),
    click.option("--by", "created_by", help="The created_by of the tasks."),
    click.option("--tag", "tags", multiple=True, help="A tag; may be given several times."),
    click.option("--priority", type=int, help="Tasks with a higher number run first."),
    click.option(
        "--delay", type=Duration(), help="Start this much later at the earliest, such as 10m."
    ),
    click.option("--run-at", type=Moment(), help="Start at this time at the earliest (ISO, UTC)."),
    click.option(
        "--expires", type=Duration(), help="Cancel it if it has not started within this time."
    ),
    click.option("--timeout", type=Duration(positive=True), help="Longest time of an attempt."),
    click.option("--max-attempts", type=click.IntRange(1), help="Attempts that may raise."),
    click.option("--unique-key", help="A text that one task at a time can hold."),
    click.option(
        "--key",
        "--concurrency-key",
        "concurrency_key",
        help="Tasks with the same key run one at a time, or as the limit of the key says.",
    ),
    click.option(
        "--cost",
        "costs",
        metavar="UNIT=N",
        multiple=True,
        help="What it takes of rates with this unit, such as tokens=1200; may be given several times.",
    ),
    click.option(
        "--depends-on",
        type=TaskId(),
        metavar="ID",
        multiple=True,
        shell_complete=complete_ids,
        help="A task that must complete first; may be given several times.",
    ),
)
def submit(
    session: Session,
    type_: str,
    json_params: Sequence[str],
    pairs: Sequence[str],
    delay: float | None,
    run_at: datetime | None,
    expires: float | None,
    task_id: str | None,
    costs: Sequence[str],
    **options: Any,
) -> None:
    """Submit tasks."""
    if delay is not None and run_at is not None:
        raise Usage("--delay and --run-at say the same: give only one of them")
    if task_id is not None and (len(json_params) > 1 or "-" in json_params):
        raise Usage("--id is for one task: give one JSON")
    if task_id == "":  # perhaps because a variable of the shell is not set
        raise Usage("--id is empty: leave it out for a new id")
    due = run_at if delay is None else session.after(delay)
    given = {name: value for name, value in options.items() if value not in (None, ())}
    if expires is not None:
        given["expires_at"] = session.after(expires, due)
    if costs:
        given["cost"] = dict(map(_cost, costs))
    model = {**given, "type": type_, "run_at": due, "id": task_id or ""}
    _know(session, type_)
    wanted = (Task(**model, params=params) for params in _all_params(json_params, pairs))
    _submit(session, wanted)


def _submit(session: Session, tasks: Iterator[Task]) -> None:
    stored = 0
    try:
        while some := [*islice(tasks, _BATCH)]:
            handles = session.queue.submit_many(some)
            stored += len(handles)
            for handle in handles:
                if session.json:
                    session.out.json({"id": handle.id, "type": some[0].type})
                else:
                    session.out.line(clean(handle.id))
    except BaseException:  # also Ctrl-C: the user must know how far it came
        if stored:
            number = "1 task was" if stored == 1 else f"{stored} tasks were"
            session.out.say(f"{number} stored before the error")
        raise


def _know(session: Session, type: str) -> None:
    """Accept a type; if it may be misspelt, say so. If no node runs it, the queue's log says that."""
    session.queue.declare(type)
    known = types_of(session.queue)
    if type not in known and (hint := suggestion(type, known)):
        session.out.say(f"no node and no task has type {type!r}{hint}")


def _cost(text: str) -> tuple[str, int]:
    unit, equals, number = text.partition("=")
    if not equals or not number.isdecimal():
        raise Usage(f"--cost must be UNIT=N, such as tokens=1200, not {text!r}")
    return unit, int(number)


def _all_params(texts: Sequence[str], pairs: Sequence[str]) -> Iterator[dict[str, Any]]:
    more = dict(map(_pair, pairs))
    for text in texts or ["{}"]:
        if text != "-":
            yield {**json_object(text, "the JSON of the params"), **more}
            continue
        for number, line in enumerate(sys.stdin, 1):
            if line.strip():
                yield {**json_object(line, f"line {number} of stdin"), **more}


def _pair(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigurationError(f"--param {text!r}: write it as key=value")
    try:
        return key, json.loads(value)
    except (ValueError, RecursionError):
        return key, value


COMMANDS = (submit,)
