"""An executor for a child process that gives one kind of sign of life again and again, or none."""

from __future__ import annotations

import threading
from pathlib import Path

from taskx import Context, executor


@executor("crawl", isolation="process", capture_log=True)
def crawl(ctx: Context, sign: str, end: str) -> str:
    """Give signs of life until there is a file with this name, or sleep for an hour."""
    never, number = threading.Event(), 0
    if sign == "none":
        never.wait(3600)
    while not Path(end).exists():
        number += 1
        if sign == "progress":
            ctx.progress(number % 100)
        elif sign == "step":
            ctx.step(f"page {number}", int)
        elif sign == "log":
            ctx.logger.info("page")
        else:
            ctx.alive()
        never.wait(0.01)
    return "done"
