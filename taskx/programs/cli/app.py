"""The group of all commands: ``taskx``, and what other command lines mount."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

import taskx
from taskx.programs.cli import (
    answering,
    asking,
    changes,
    changing,
    dashboard,
    flows,
    following,
    listing,
    migrating,
    nodes,
    scheduling,
    submitting,
    top,
    tuning,
    worker,
)
from taskx.programs.cli.errors import Usage, one_line_errors
from taskx.programs.cli.opening import QueueSource, as_typed, given, how_options, where_options
from taskx.tasks.findings import suggestion

#: All commands, in the order of the help.
COMMANDS: tuple[click.Command, ...] = (
    *listing.COMMANDS,
    *asking.COMMANDS,
    *flows.COMMANDS,
    *top.COMMANDS,
    *following.COMMANDS,
    *submitting.COMMANDS,
    *answering.COMMANDS,
    *changing.COMMANDS,
    *changes.COMMANDS,
    *nodes.COMMANDS,
    *tuning.COMMANDS,
    *scheduling.COMMANDS,
    *worker.COMMANDS,
    *dashboard.COMMANDS,
    *migrating.COMMANDS,
)

EXAMPLES = """\

  $ taskx list status:failed --repository sqlite:///tasks.db
  $ taskx why 019abc12
  $ taskx top --app shop.tasks:queue
"""

HELP = """\
See and steer the tasks of a TaskX repository.

No command creates a file, except `migrate`, and `worker`, which runs the tasks. Data goes to stdout, words
go to stderr. `taskx COMMAND --help` has examples. The beginning of an id is enough if no other begins so.
"""

#: The sections of the list of commands.
SECTIONS = {
    "Look at tasks": "list show why dead failures flows answers wait tail",
    "Look at the whole": "stats top nodes limits stacks check doctor changes watch",
    "Change tasks": "submit cancel requeue delete prune finish",
    "Change what runs": "pause resume tune hold release schedules",
    "Run and serve": "worker dashboard migrate",
}

EPILOG = """\
Exit codes: 0 ok, 1 unhealthy or failed, 2 wrong call, 3 not found, 4 conflict, 5 repository away,
75 recycle (a process of the worker), 130 interrupted.
"""


class Group(click.Group):
    """The group of commands.

    Attributes:
        queue: the queue of all commands, or a function that returns it; None: the options name it.
        target: a function that returns the place of this queue, ``module:name``, for the processes of a
            worker; None: the user names it.
        where: a function that returns the options of every command that say where the tasks are.
    """

    def __init__(
        self,
        *args: Any,
        queue: QueueSource | None = None,
        target: Callable[[], str] | None = None,
        where: Callable[[], Sequence[click.Parameter]] = where_options,
        **settings: Any,
    ) -> None:
        super().__init__(*args, **settings)
        self.queue = queue
        self.target = target
        self.where = where

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """Parse the options before the command. An error is one line on stderr."""
        with one_line_errors(lambda: False):
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. Every error is one line on stderr, and an exit code."""
        with one_line_errors(lambda: given(ctx).debug):
            return super().invoke(ctx)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; suggest one for a misspelt name."""
        name = args[0]
        if not name.startswith("-") and not ctx.resilient_parsing and name not in self.commands:
            hint = suggestion(name, self.commands) or f"; see {ctx.command_path} --help"
            raise Usage(f"there is no command {name!r}{hint}")
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands in their own order."""
        return [*self.commands]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands in sections."""
        width = max(map(len, self.commands))
        known = {name for names in SECTIONS.values() for name in names.split()}
        of_program = " ".join(name for name in self.commands if name not in known)
        for title, names in {**SECTIONS, "More": of_program}.items():
            rows = [
                (name.ljust(width), self.commands[name].get_short_help_str(formatter.width))
                for name in names.split()
                if name in self.commands
            ]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the text of the help as it is."""
        formatter.write(f"\n{as_typed(ctx, self.help or '')}")

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the exit codes as they are."""
        formatter.write(f"\n{self.epilog or ''}")


def make_group(
    queue: QueueSource | None = None,
    name: str = "taskx",
    *,
    target: Callable[[], str] | None = None,
    where: Callable[[], Sequence[click.Parameter]] | None = None,
) -> Group:
    """Return the click group of all commands.

    Args:
        queue: the queue that the commands use, or a function that returns it, for programs that mount
            the group in their own command line. None: the user names it by options.
        name: the name of the group.
        target: a function that returns the place of this queue, ``module:name``. The processes of
            ``worker`` import the queue from there.
        where: a function that returns options that choose the queue, if the program has several. Every
            command accepts them; their values are for their own callbacks.
    """
    if where is None:
        where = where_options if queue is None else list
    commands = [*COMMANDS] if target is None else [*COMMANDS, worker.worker_of_program]
    group = Group(
        name,
        queue=queue,
        target=target,
        where=where,
        help=HELP if queue is not None else HELP + EXAMPLES,
        epilog=EPILOG,
        params=[*where(), *how_options()],
        context_settings={"help_option_names": ["-h", "--help"]},
        commands={command.name or "": command for command in commands},
    )
    return click.version_option(taskx.__version__, prog_name="taskx")(group)
