"""The options of every command, and the session of one call: its queue and its output."""

from __future__ import annotations

import getpass
import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cached_property, update_wrapper
from typing import Any

import attrs
import click

from taskx.insight.query import renamed
from taskx.programs.cli.errors import Failure, Usage, code_of
from taskx.programs.cli.output import Output
from taskx.programs.cli.values import ParamType
from taskx.programs.worker.loading import load_queue
from taskx.queue.queue import Queue
from taskx.stores.base import Repository
from taskx.stores.sqlite import SQLiteRepository
from taskx.stores.urls import open_repository
from taskx.tasks.clock import to_datetime, to_ms, within_calendar
from taskx.tasks.errors import ConfigurationError, PayloadError, RepositoryError, TaskxError
from taskx.tasks.findings import suggestion

#: The environment variable with the URL of the repository.
VARIABLE = "TASKX_REPOSITORY"

_GIVEN = "taskx.given"
_SESSION = "taskx.session"
# Most ids with the same beginning that are read, and most that a message names.
_MOST_IDS, _SHOWN_IDS = 50, 5

#: A queue, or a function that returns one.
QueueSource = Queue | Callable[[], Queue]


@attrs.define
class Given:
    """The options of every command; the last one given counts."""

    repository: str | None = None
    app: str | None = None
    json: bool = False
    debug: bool = False


def given(ctx: click.Context) -> Given:
    """Return the options of every command that this call was given."""
    found: Given = ctx.meta.setdefault(_GIVEN, Given())
    return found


def _keep(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    if value == "":  # it must not mean another repository
        raise click.BadParameter("it is empty, perhaps because a variable of the shell is not set")
    if value and param.name:
        setattr(given(ctx), param.name, value)
    return value


def _option(*names: str, **settings: Any) -> click.Option:
    return click.Option([*names], expose_value=False, is_eager=True, callback=_keep, **settings)


def where_options() -> list[click.Parameter]:
    """Return the options that say where the tasks are."""
    return [
        _option(
            "--repository",
            metavar="URL",
            help=f"The repository, such as tasks.db or mongodb://host/db. [default: ${VARIABLE}]",
        ),
        _option(
            "--app",
            metavar="MODULE:QUEUE",
            help="A queue of your program, or a function that returns it, instead of a URL.",
        ),
    ]


def how_options() -> list[click.Parameter]:
    """Return the options that say how to print."""
    return [
        _option("--json", is_flag=True, help="Print JSON: one object a line."),
        _option("--debug", is_flag=True, hidden=True, help="Show the traceback of an error."),
    ]


class Command(click.Command):
    """A command with the options of every command."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the command's own parameters and those of every command."""
        own = super().get_params(ctx)
        where = _where(ctx)
        known = {param.name for param in own}
        # The help option stays last.
        common = [param for param in (*where, *how_options()) if param.name not in known]
        return [*own[:-1], *common, *own[-1:]]

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. An error calls the options as the user has typed them."""
        try:
            return super().invoke(ctx)
        except TaskxError as error:
            typed = {
                param.name or "": max(param.opts, key=len)
                for param in self.params
                if isinstance(param, click.Option) and "_" in (param.name or "")
            }
            message = as_typed(ctx, renamed(str(error), typed))
            raise Failure(message, code_of(error)) from error
        except Failure as error:
            raise Failure(as_typed(ctx, error.message), error.exit_code) from error.__cause__

    def get_short_help_str(self, limit: int = 45) -> str:
        """Return the line of the list of commands."""
        context = click.get_current_context(silent=True)
        return as_typed(context, super().get_short_help_str(limit))

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the help: paragraphs that fit the terminal, then examples as they are."""
        words, _, examples = as_typed(ctx, self.help or "").rpartition("\n\n")
        for paragraph in words.split("\n\n"):
            formatter.write_paragraph()
            with formatter.indentation():
                formatter.write_text(" ".join(paragraph.split()))
        formatter.write(f"\n{examples}\n")


def as_typed(at: click.Context | None, text: str) -> str:
    """Return a text whose calls begin as users of this program type them: ``flask taskx list``."""
    while at is not None and not hasattr(at.command, "target"):
        at = at.parent
    return text if at is None else re.sub(r"(?<!\w )\btaskx (?=\w)", f"{at.command_path} ", text)


class Actions(Command, click.Group):
    """A command that makes a list, and has actions on one thing of it, such as ``taskx schedules``."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the action; suggest one for a misspelt name."""
        if not ctx.resilient_parsing and args[0] not in self.commands:
            hint = suggestion(args[0], self.commands)
            if args[0] in ("list", "ls"):
                hint = f": `{self.name}` alone lists them"
            raise Usage(
                f"`{self.name}` has no action {args[0]!r}"
                f"{hint or ': use ' + ', '.join(self.commands)}"
            )
        return super().resolve_command(ctx, args)


def command(
    name: str, words: str, examples: str, *params: Any
) -> Callable[[Callable[..., Any]], Command]:
    """Turn a function into a command; its first argument is the :class:`Session`.

    Args:
        name: the name of the command.
        words: the description: the first line is a sentence for the list of commands.
        examples: some calls, one a line.
        params: decorators of click for the parameters.
    """

    def decorate(function: Callable[..., Any]) -> Command:
        def run(*args: Any, **kwargs: Any) -> Any:
            ctx = click.get_current_context()
            session = session_of(ctx)
            for param in ctx.command.params:
                if isinstance(param.type, TaskId) and param.name:
                    given = kwargs[param.name]
                    several = isinstance(given, tuple)
                    each = tuple(map(session.id_of, given if several else [given]))
                    kwargs[param.name] = each if several else each[0]
            return function(session, *args, **kwargs)

        wrapped: Any = update_wrapper(run, function)
        for decorator in reversed(params):
            wrapped = decorator(wrapped)
        lines = "\n".join(f"  $ {line}" for line in examples.strip().splitlines())
        first = words.strip().partition("\n")[0]
        return click.command(
            name, cls=Command, help=f"{words.strip()}\n\n{lines}", short_help=first
        )(wrapped)

    return decorate


class TaskId(ParamType):
    """The id of a stored task, or the beginning of one: a command gets the whole id."""

    name = "id"


class Session:
    """One call of the command line: its queue, and its output.

    Attributes:
        json: True if JSON was asked for.
        out: the output.
    """

    def __init__(self, ctx: click.Context) -> None:
        self._ctx = ctx
        self.json = given(ctx).json
        self.out = Output()

    @cached_property
    def queue(self) -> Queue:
        """The queue, which is never started here."""
        return self._ctx.find_root().with_resource(opened(self._ctx))

    def id_of(self, text: str) -> str:
        """Return the id of the task with this id, or beginning of an id; else the text itself.

        Raises:
            Usage: several ids begin with it.
        """
        try:
            if not text or self.queue.repository.statuses([text]):
                return text
            found = self.queue.list_tasks(id_prefix=text, limit=_MOST_IDS, at_most=_MOST_IDS + 1)
        except (
            RepositoryError,
            ConfigurationError,
        ):  # the command meets the same error, and tells it
            return text
        tasks = {task.id: task for task in found.tasks}
        # The ids of what a task waits for begin with its own.
        own = [id for id in tasks if not any(id.startswith(f"{other}/") for other in tasks)]
        if len(own) > 1 or int(found.total) > len(tasks):
            shown = [f"{id} ({tasks[id].type}, {tasks[id].status})" for id in own[:_SHOWN_IDS]]
            more = " and others" if len(own) > len(shown) or int(found.total) > len(tasks) else ""
            raise Usage(
                f"several ids begin with {text!r}: {', '.join(shown)}{more}; give more of the id"
            )
        return own[0] if own else text

    def note(self, action: str, target: str, detail: Any = None) -> None:
        """Note a change in the log of changes, if the repository has one. The change is made already."""
        with suppress(RepositoryError, ConfigurationError, PayloadError):
            self.queue.note_change(self.user, action, target, detail)

    @property
    def user(self) -> str:
        """The person at the terminal: ``user@host``."""
        return _user()

    def now(self) -> datetime:
        """Return the time of the repository's clock."""
        return to_datetime(self.queue.repository.clock.now_ms())

    def after(self, seconds: float, start: datetime | None = None) -> datetime:
        """Return the time ``seconds`` after ``start``, or after now; within the calendar."""
        return to_datetime(within_calendar(to_ms(start or self.now()) + round(seconds * 1000)))


def _user() -> str:
    """Return the person at the terminal: ``user@host``."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError, ImportError):  # the system does not know the user
        name = str(os.getuid())
    return f"{name}@{socket.gethostname()}"


def session_of(ctx: click.Context) -> Session:
    """Return the session of a context; its parts share one."""
    session = ctx.meta.get(_SESSION)
    if session is None:
        session = ctx.meta[_SESSION] = Session(ctx)
    session.json = given(ctx).json
    return session


@contextmanager
def opened(ctx: click.Context) -> Iterator[Queue]:
    """Open the queue of a call, and close it at the end if it was opened by its URL.

    Meanwhile its repository neither creates a file nor migrates one.

    Raises:
        Usage: it is not said where the tasks are, or that is wrong.
    """
    source, wanted = _source(ctx), given(ctx)
    if wanted.app and wanted.repository:
        raise Usage("--app and --repository say the same: give only one of them")
    if source is not None:
        queue = source if isinstance(source, Queue) else source()
    elif wanted.app:
        queue = load_queue(wanted.app)
    else:
        queue = Queue(_repository(wanted.repository or os.environ.get(VARIABLE, "")))
    try:
        with queue.repository.house.only_existing():
            yield queue
    finally:
        if source is None and not wanted.app:
            queue.close()


def target_of(ctx: click.Context) -> str:
    """Return the place of the queue that the program has mounted the commands for."""
    target: Callable[[], str] = _of_group(ctx, "target")
    return target()


def _where(ctx: click.Context) -> Sequence[click.Parameter]:
    """Return the options of every command that say where the tasks are."""
    where: Callable[[], Sequence[click.Parameter]] = _of_group(ctx, "where") or where_options
    return where()


def _source(ctx: click.Context | None) -> QueueSource | None:
    source: QueueSource | None = _of_group(ctx, "queue")
    return source


def _of_group(ctx: click.Context | None, name: str) -> Any:
    """Return an attribute of the group of commands, None if no group has it."""
    while ctx is not None:
        if (found := getattr(ctx.command, name, None)) is not None:
            return found
        ctx = ctx.parent
    return None


def _repository(url: str) -> Repository:
    if not url:
        raise Usage(
            "which repository? Give --repository sqlite:///tasks.db or --app module:queue, or set "
            f"{VARIABLE}"
        )
    if url.startswith("memory:"):
        raise Usage(
            "memory:// is the memory of one process, and empty in this one: use the URL of a file or a "
            "server, or --app"
        )
    if ":" not in url:
        return SQLiteRepository(url)
    try:
        return open_repository(url)
    except ConfigurationError as error:
        raise Usage(str(error)) from error
    except ImportError as error:
        raise Usage(
            f"this repository needs the package {error.name}: pip install 'taskx-queue[mongo]'"
        ) from error
