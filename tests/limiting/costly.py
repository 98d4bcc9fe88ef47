"""An executor for a child process that says what it has spent."""

from taskx import executor


@executor("costly", isolation="process")
def costly(ctx):
    ctx.spent(tokens=7)
