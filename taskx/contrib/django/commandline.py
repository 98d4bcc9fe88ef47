"""The commands of ``manage.py taskx``, on the queue of a backend."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import click
import django

from taskx.contrib.django import schedules
from taskx.contrib.django.choosing import chosen, where
from taskx.contrib.django.importing import import_beat
from taskx.contrib.django.queues import load_queue
from taskx.contrib.django.settings import entries
from taskx.programs.cli import app, worker
from taskx.programs.cli.errors import Usage
from taskx.queue.queue import Queue
from taskx.tasks.findings import suggestion

#: The variable with the alias of the backend, for the processes of a worker.
BACKEND = "TASKX_DJANGO_BACKEND"
#: The variable with the queue names, one a line, for the processes of a worker; empty for all.
QUEUES = "TASKX_DJANGO_QUEUES"

_HELP = f"""\
Run the tasks of the site in several processes, until SIGTERM or Ctrl-C.

Each process sets Django up, and imports the modules `tasks` of all apps.

{worker.SIGNALS}

  $ taskx worker
  $ taskx worker --processes 4 --threads 8
  $ taskx worker --queue emails --queue reports
  $ taskx worker --max-memory 500M --health-port 8080"""


class _Worker(worker.Program):
    """The command that runs tasks; it has the option that chooses the backend."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return its own parameters and that option, the help last."""
        own = super().get_params(ctx)
        return [*own[:-1], *where(), *own[-1:]]


@click.command("worker", cls=_Worker, help=_HELP, short_help="Run the tasks of the site.")
@click.option(
    "--queue",
    "queue_names",
    metavar="NAME",
    multiple=True,
    help="Run only tasks with this queue_name; may be given several times.",
)
@worker.worker_options
@click.pass_context
def _worker(ctx: click.Context, /, queue_names: Sequence[str], **options: Any) -> None:
    known = entries().get(chosen(), {}).get("QUEUES", ["default"])
    for name in queue_names:
        if known and name not in known:
            raise Usage(
                f"TASKS[{chosen()!r}]['QUEUES'] has no queue name {name!r}{suggestion(name, known)}"
            )
    os.environ[BACKEND], os.environ[QUEUES] = chosen(), "\n".join(queue_names)
    worker.run_worker(ctx, f"{__name__}:worker_queue", **options)


def worker_queue() -> Queue:
    """Return the queue for a process of ``manage.py taskx worker``, which sets Django up first."""
    django.setup()
    alias, names = os.environ.get(BACKEND, "default"), os.environ.get(QUEUES, "")
    queue = load_queue(alias, names.split("\n") if names else ())
    schedules.declare(alias, queue)
    return queue


def make_group() -> click.Group:
    """Return the group of all commands, on the queue of the backend that ``--backend`` names."""
    group = app.make_group(
        lambda: load_queue(chosen()), target=lambda: f"{__name__}:worker_queue", where=where
    )
    group.add_command(_worker)
    group.add_command(import_beat)
    return group
