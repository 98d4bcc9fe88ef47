"""The commands that follow tasks: wait, tail, watch."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as Late
from contextlib import suppress
from os.path import commonprefix
from typing import Any

import attrs
import click

from taskx.programs.cli.completion import complete_ids, complete_types, types_of
from taskx.programs.cli.errors import FAILED, Failure, Usage
from taskx.programs.cli.listing import as_record, id_argument
from taskx.programs.cli.nodes import nodes
from taskx.programs.cli.opening import Session, TaskId, command
from taskx.programs.cli.output import clean, to_json
from taskx.programs.cli.scheduling import schedules
from taskx.programs.cli.values import Duration
from taskx.queue.queue import Queue
from taskx.stores.streams import Reader
from taskx.tasks.errors import RepositoryError, TaskNotFound
from taskx.tasks.findings import suggestion
from taskx.tasks.model import Task, TaskStatus
from taskx.tasks.payload import clean_text
from taskx.tasks.redact import redacted

# Most running tasks of a type that are followed.
_MOST = 100
# Most characters of a progress message on a line; --json has all of them.
_MOST_WORDS = 200

interval_option = click.option(
    "--interval", type=Duration(), default="2s", show_default=True, help="Time between two reads."
)


@command(
    "wait",
    """Wait until a task has ended; exit with its outcome.

The exit code is 0 if it completed: its result is printed as JSON. It is 1 if the task failed, was
cancelled, or has not ended within --timeout.""",
    """
taskx wait 019abc12-... && echo done
taskx wait 019abc12-... --timeout 10m
taskx wait $(taskx submit report) --json | jq .duration
""",
    id_argument,
    click.option("--timeout", type=Duration(), help="Wait at most this long, such as 10m."),
)
def wait(session: Session, task_id: str, timeout: float | None) -> None:
    """Wait for a task."""
    session.queue.get_task_status(task_id)  # an unknown id is an error, not a long wait
    handle = session.queue.handle(task_id)
    try:
        with suppress(CancelledError):
            if sys.stderr.isatty() and not handle.done():
                handle.follow(timeout)
            else:
                handle.exception(timeout)
    except (Late, TimeoutError) as error:
        raise Failure(str(error), FAILED) from None
    except Exception:  # the task's own error, which is shown below; else one of the repository
        if not handle.done():
            raise
    task = session.queue.get_task_status(task_id)
    if session.json:
        session.out.json(as_record(session, task))
    elif task.status is TaskStatus.COMPLETED:
        session.out.line(to_json(redacted(task.result, session.queue.config.redact)))
    if task.status is not TaskStatus.COMPLETED:
        words = f"task {task.id}: {task.status}"
        raise Failure(f"{words}: {task.error.strip()}" if task.error else words, FAILED)


# --- tail


@attrs.define
class _Seen:
    """The part of a task that was printed."""

    status: str = ""
    progress: tuple[int, str] = (0, "")
    log: str = ""


class Tail:
    """Yields what is new of tasks, as records with an ``event``: ``status``, ``log``, ``chunk``, ...

    Args:
        queue: their queue.
    """

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._seen: dict[str, _Seen] = {}
        self._readers: dict[str, Reader] = {}

    @property
    def open(self) -> list[str]:
        """The ids of the tasks that had not ended."""
        return [
            task_id for task_id, seen in self._seen.items() if not TaskStatus(seen.status).finished
        ]

    def forget(self, task_id: str) -> None:
        """Forget a task that was deleted."""
        del self._seen[task_id]
        self._readers.pop(task_id, None)

    def news(self, task: Task) -> Iterator[dict[str, Any]]:
        """Yield what is new of a task, and note it."""
        seen = self._seen.setdefault(task.id, _Seen())
        who = {"id": task.id, "type": task.type}
        if task.status is TaskStatus.RUNNING and seen.status != task.status:
            yield {
                **who,
                "event": "status",
                "status": "running",
                "error": "",
                "attempt": task.attempt,
            }
        for line in _new_lines(seen.log, task.log):
            yield {**who, "event": "log", "line": line}
        # The record was read before, so an ended task has emitted all of this.
        reader = self._readers.get(task.id) or Reader(self._queue.repository, task)
        self._readers[task.id] = reader
        while chunks := reader.read():
            for chunk in chunks:
                value = redacted(chunk.value, self._queue.config.redact)
                yield {**who, "event": "chunk", **chunk._asdict(), "value": value}
        progress = task.progress, task.message
        if progress not in (seen.progress, (0, "")):
            yield {**who, "event": "progress", "progress": task.progress, "message": task.message}
        if task.status is not TaskStatus.RUNNING and seen.status != task.status:
            yield {
                **who,
                "event": "status",
                "status": task.status.value,
                "error": task.error,
                "attempt": task.attempt,
            }
        seen.status, seen.progress, seen.log = task.status.value, progress, task.log


def _new_lines(before: str, now: str) -> list[str]:
    """Return the lines of a log that were not in it before. Its first lines may have been cut off."""
    # The heading of the attempt may stay. After it comes what is left of the old lines.
    same = len(commonprefix([before, now]))  # noqa: RUF071  (letters are meant)
    start = kept = now.rfind("\n", 0, same) + 1
    while not now.startswith(before[start:], kept):
        start = before.find("\n", start) + 1 or len(before)
    new = now[kept + len(before) - start :]
    return new.removesuffix("\n").split("\n") if new else []


@command(
    "tail",
    """Print what tasks emit, their progress and their log as they come.

Ends when the tasks with these IDs have ended; with --type, it follows all running tasks of the type until
Ctrl-C. The log is that of executors with `capture_log`; its lines come a second later or so.""",
    """
taskx tail 019abc12-...
taskx tail --type email
taskx tail 019abc12-... --no-follow --json
""",
    click.argument(
        "task_ids", metavar="[ID]...", nargs=-1, type=TaskId(), shell_complete=complete_ids
    ),
    click.option(
        "--type",
        "type_",
        help="Follow all running tasks of this type.",
        shell_complete=complete_types,
    ),
    click.option(
        "--follow/--no-follow", default=True, help="Wait for more, or print what is there."
    ),
    click.option(
        "--interval",
        type=Duration(),
        default="0.5s",
        show_default=True,
        help="Time between two reads.",
    ),
)
def tail(
    session: Session, task_ids: Sequence[str], type_: str | None, follow: bool, interval: float
) -> None:
    """Follow tasks."""
    if bool(task_ids) is (type_ is not None):
        raise Usage("name the tasks by their ids, or by --type")
    if type_ is not None and type_ not in (known := types_of(session.queue)):
        session.out.say(f"no node and no task has type {type_!r}{suggestion(type_, known)}")
    following = Tail(session.queue)
    several = len(task_ids) != 1
    for task_id in task_ids:
        session.queue.get_task_status(task_id)  # all must be there at the beginning
    wanted = [*task_ids]
    while True:
        for task in _tasks(session, wanted, type_, following):
            for event in following.news(task):
                _print_event(session, event, several)
        wanted = [task_id for task_id in task_ids if task_id in following.open]
        if not follow or (task_ids and not wanted):
            return
        time.sleep(interval)


def _tasks(
    session: Session, task_ids: Sequence[str], type: str | None, following: Tail
) -> Iterator[Task]:
    for task_id in task_ids or following.open:
        try:
            yield session.queue.get_task_status(task_id)
        except TaskNotFound:
            following.forget(task_id)
            session.out.say(f"task {task_id} was deleted")
    if type is not None:
        running = session.queue.list_tasks(
            type=type, status="running", limit=_MOST, at_most=1
        ).tasks
        yield from reversed(running)


def _print_event(session: Session, event: dict[str, Any], several: bool) -> None:
    if session.json:
        session.out.json({"at": session.now(), **event})
        return
    who = f"{event['id']} " if several else ""
    if event["event"] == "log":
        words, style = event["line"], ""
    elif event["event"] == "chunk":
        value = event["value"]
        words, style = value if isinstance(value, str) else to_json(value), ""
    elif event["event"] == "progress":
        message = clean_text(event["message"], _MOST_WORDS)
        words, style = f"{event['progress']}% {message}".rstrip(), "cyan"
    else:
        error = event["error"].strip()
        words = event["status"] + (f": {error.splitlines()[0]}" if error else "")
        style = "red" if event["status"] == "failed" else "bold"
    session.out.line(clean(who + words), style)


# --- watch

#: The commands that can be repeated.
WATCHABLE = (
    "list",
    "show",
    "why",
    "stats",
    "check",
    "failures",
    "dead",
    "flows",
    "schedules",
    "nodes",
)

# The actions of these commands that change something.
_ACTIONS = {"nodes": {*nodes.commands}, "schedules": schedules.commands.keys() - {"show"}}


@command(
    "watch",
    """Repeat another command.

On a terminal, the screen is cleared before each time, until Ctrl-C. In a pipe the command runs once, or
--times.""",
    """
taskx watch list status:running
taskx watch --interval 10s stats
""",
    interval_option,
    click.option("--times", type=click.IntRange(1), help="Repeat so often."),
    click.argument(
        "words", metavar="COMMAND [ARG]...", nargs=-1, type=click.UNPROCESSED, required=True
    ),
)
def watch(session: Session, interval: float, times: int | None, words: Sequence[str]) -> None:
    """Repeat a command."""
    name, *args = words
    if name not in WATCHABLE:
        raise Usage(f"{name!r} cannot be repeated: use {', '.join(WATCHABLE)}")
    parent, found = _found(name)
    if name in _ACTIONS:
        # As click reads them: the value of an option is no action.
        rest = found.make_parser(click.Context(found, parent, name)).parse_args([*args])[1]
        if rest and rest[0] in _ACTIONS[name]:
            raise Usage(f"`{name} {rest[0]}` changes something: it is not repeated")
    live = session.out.live and not session.json
    left = times or (0 if live else 1)  # 0: for ever
    code = 0
    while True:
        if live:
            session.out.console.clear()
            session.out.line(
                f"every {interval:g} s: taskx {clean(' '.join(words))}", "bright_black"
            )
        code = _run(name, args, session, patient=live)
        left -= 1
        if left == 0:
            break
        time.sleep(interval)
    if code:
        raise click.exceptions.Exit(code)


watch.context_settings["ignore_unknown_options"] = True
watch.context_settings["allow_interspersed_args"] = False


def _found(name: str) -> tuple[click.Context, click.Command]:
    """Return the context of the group of commands, and a command of it."""
    parent = click.get_current_context().parent
    assert parent is not None
    group = parent.command
    assert isinstance(group, click.Group)
    found = group.get_command(parent, name)
    assert found is not None
    return parent, found


def _run(name: str, args: Sequence[str], session: Session, patient: bool) -> int:
    """Run a command in this process; return its exit code."""
    parent, found = _found(name)
    try:
        with found.make_context(name, [*args], parent=parent) as ctx:
            found.invoke(ctx)
    except click.exceptions.Exit as ended:
        return ended.exit_code
    except RepositoryError as error:
        if not patient:
            raise
        session.out.say(f"taskx: {error}")
    return 0


COMMANDS = (wait, tail, watch)
