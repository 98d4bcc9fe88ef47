"""An executor for a child process that an API refuses once."""

from __future__ import annotations

from taskx import Context, Snooze, executor


@executor("call", isolation="process")
def call(ctx: Context) -> str:
    """Ask for an hour, for all tasks of the type."""
    if not ctx.task.snoozes:
        raise Snooze(3600, limit=True)
    return "done"
