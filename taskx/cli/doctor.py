"""The command that examines what is around the tasks: doctor."""

from __future__ import annotations

import click

from taskx.cli.errors import FAILED
from taskx.cli.opening import Session, command
from taskx.cli.output import clean

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@command(
    "doctor",
    """Examine versions, file, permissions, disk, locks, dead nodes and clock.

Prints a line for each check, with what to do. A warning says what can do harm; a failure keeps tasks from
running, and the exit code is 1. Nothing is changed. `taskx check` examines the tasks themselves.""",
    """
taskx doctor
taskx doctor --json | jq -r 'select(.level != "ok") | .sentence'
""",
)
def doctor(session: Session) -> None:
    """Examine the surroundings."""
    found = session.queue.diagnose()
    for check in found.checks:
        if session.json:
            session.out.json(check.to_dict())
        else:
            session.out.line(
                f"{check.level:<5} {check.name}: {clean(str(check))}", _COLOURS[check.level]
            )
    if not found.ok:
        raise click.exceptions.Exit(FAILED)


COMMANDS: tuple[click.Command, ...] = (doctor,)
