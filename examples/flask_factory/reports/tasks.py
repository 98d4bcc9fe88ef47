"""The tasks. This module needs no app: the queue of the current one is used."""

from __future__ import annotations

from flask import current_app

from taskx import Context, every
from taskx.contrib.flask import Taskx

taskx = Taskx()


@taskx.executor("report", max_attempts=3)
def report(ctx: Context, month: str, sales: list[float]) -> str:
    """Add up the sales of a month, one after the other."""
    total = 0.0
    for number, amount in enumerate(sales, 1):
        total += amount
        ctx.progress(100 * number / len(sales), f"sale {number} of {len(sales)}")
    return f"{month}: {total:.2f} {current_app.config['CURRENCY']}"


@taskx.executor("clean_up")
def clean_up(keep: int) -> int:
    """Delete all but the newest reports, and return the number of deleted ones."""
    old = [*taskx.queue.iter_tasks(type="report", status="completed")][keep:]
    for task in old:
        taskx.queue.delete(task.id)
    return len(old)


# Stored when a queue starts.
taskx.schedule("nightly", every(24 * 3600), clean_up, {"keep": 100})
