"""The command that runs tasks: worker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from taskx.programs.cli.errors import Usage
from taskx.programs.cli.opening import Command, given, target_of
from taskx.programs.cli.values import Duration, Size
from taskx.programs.worker.settings import MOST, Settings
from taskx.programs.worker.supervisor import supervise

F = TypeVar("F", bound="Callable[..., Any]")

#: The end of the help: what the signals do.
SIGNALS = """\
The first signal lets running tasks end within --stop-timeout; a second one stops at once.
SIGHUP replaces the processes one by one, with the newest code. A process that dies is replaced.
"""

_HELP = f"""\
Run the tasks of a queue in several processes, until SIGTERM or Ctrl-C.

QUEUE is module:name: a Queue, or a function without arguments that returns one.

{SIGNALS}
  $ taskx worker shop.tasks:queue
  $ taskx worker shop.tasks:make_queue --processes 4 --threads 8
  $ taskx worker shop.tasks:queue --max-memory 500M --health-port 8080"""

_HELP_OF_PROGRAM = f"""\
Run the tasks of the app in several processes, until SIGTERM or Ctrl-C.

{SIGNALS}
  $ taskx worker
  $ taskx worker --processes 4 --threads 8
  $ taskx worker --max-memory 500M --health-port 8080"""


class Program(Command):
    """A command without the options that name a repository or a form of output."""

    get_params = click.Command.get_params


#: The options of a worker, as decorators.
WORKER_OPTIONS = (
    click.option(
        "--processes",
        type=click.IntRange(1, MOST),
        default=1,
        show_default=True,
        help="The number of processes.",
    ),
    click.option(
        "--threads",
        type=click.IntRange(1, 10_000),
        help="The worker threads of each process. [default: the queue's worker_num]",
    ),
    click.option(
        "--stop-timeout",
        type=Duration(),
        default="30s",
        show_default=True,
        help="The time that running tasks have to end after a signal.",
    ),
    click.option(
        "--max-tasks",
        type=click.IntRange(1),
        help="Replace a process after this number of attempts.",
    ),
    click.option(
        "--max-memory",
        type=Size(),
        help="Replace a process that takes this much memory, such as 500M.",
    ),
    click.option("--max-age", type=Duration(), help="Replace a process of this age, such as 12h."),
    click.option(
        "--health-file",
        type=click.Path(dir_okay=False),
        help="A file that exists while all is well.",
    ),
    click.option(
        "--health-port",
        type=click.IntRange(0, 65535),
        help="A port that answers GET /health, /live and /ready with 200 or 503.",
    ),
    click.option(
        "--health-host", default="127.0.0.1", show_default=True, help="The address of that port."
    ),
    click.option("--reload", is_flag=True, help="Replace a process when its code changes."),
    click.option(
        "--log-level",
        type=click.Choice(["DEBUG", "INFO", "WARNING", "ERROR"], case_sensitive=False),
        default="INFO",
        show_default=True,
        help="The level of the log, if your program does not set up logging itself.",
    ),
)


def worker_options(function: F) -> F:
    """Give a command the options of a worker; they are the settings of :func:`run_worker`."""
    for decorate in reversed(WORKER_OPTIONS):
        function = decorate(function)
    return function


def run_worker(ctx: click.Context, target: str, **options: Any) -> None:
    """Run the supervisor of the queue at ``target``; its exit code is that of the program."""
    ctx.exit(supervise(Settings(target=target, **options)))


@click.command("worker", cls=Program, help=_HELP, short_help="Run the tasks of a queue.")
@click.argument("target", metavar="QUEUE", required=False)
@worker_options
@click.pass_context
def worker(ctx: click.Context, /, target: str | None, **options: Any) -> None:
    """Run the worker of the queue that is named."""
    wanted = given(ctx)
    if wanted.repository:
        raise Usage("the worker's repository is that of its queue: leave out --repository")
    target = target or wanted.app
    if target is None:
        raise Usage("which queue? Write taskx worker module:queue, such as shop.tasks:queue")
    run_worker(ctx, target, **options)


@click.command("worker", cls=Program, help=_HELP_OF_PROGRAM, short_help="Run the tasks of the app.")
@worker_options
@click.pass_context
def worker_of_program(ctx: click.Context, /, **options: Any) -> None:
    """Run the worker of the queue that the program has mounted the commands for."""
    run_worker(ctx, target_of(ctx), **options)


COMMANDS: tuple[click.Command, ...] = (worker,)
