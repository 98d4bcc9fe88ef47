"""The command that copies the tasks of an earlier TaskX: migrate."""

from __future__ import annotations

import os
import sys

import attrs
import click

from taskx.programs.cli.opening import Session, command
from taskx.programs.cli.output import clean
from taskx.stores.sqlite.copying import copy_tasks


@command(
    "migrate",
    """Copy the tasks of a file that an earlier TaskX made into a new file, which this one can use.

Stop all programs that use OLD, and start them with NEW afterwards. OLD stays as it is. If the tables are in
the file of an application, give the prefix of their names: NEW may then be the same file, in which the new
tables replace the old ones. An interrupted call has changed nothing.""",
    """
taskx migrate tasks.db new.db
taskx migrate app.db app.db --prefix taskx_
""",
    click.argument("old", type=click.Path()),
    click.argument("new", type=click.Path()),
    click.option(
        "--prefix", default="", help="What the names of the tables begin with, in both files."
    ),
)
def migrate(session: Session, old: str, new: str, prefix: str) -> None:
    """Copy tasks, and show on a terminal how far it is."""
    shown = sys.stderr.isatty()

    def progress(done: int, total: int) -> None:
        if shown:
            click.echo(f"\r{done:,} of {total:,} tasks ", nl=False, err=True)

    try:
        copied = copy_tasks(old, new, prefix, progress)
    finally:
        if shown:
            click.echo(err=True)
    if session.json:
        session.out.json(attrs.asdict(copied))
        return
    what = f"{copied.tasks:,} {'task' if copied.tasks == 1 else 'tasks'}"
    where = (
        f"from {old} to {new}" if os.path.realpath(old) != os.path.realpath(new) else f"in {new}"
    )
    session.out.line(
        clean(
            f"copied {what} of schema version {copied.version} {where}; start your programs with {new}"
        )
    )


COMMANDS: tuple[click.Command, ...] = (migrate,)
