"""The queue and its executors. Importing this module does not start the queue: ``project/wsgi.py`` does."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from django.conf import settings
from django.db import close_old_connections

from taskx import Context, Queue, open_repository

from .models import Report

queue = Queue(open_repository(settings.TASKX_REPOSITORY))


def uses_database(function: Callable[..., Any]) -> Callable[..., Any]:
    """Close old or broken database connections around an executor that uses Django's database.

    Django does this around each request. A worker thread keeps its connection, so it must do it itself.
    """

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        close_old_connections()
        try:
            return function(*args, **kwargs)
        finally:
            close_old_connections()

    return wrapped


@queue.executor("build_report")
@uses_database
def build_report(ctx: Context, title: str, rows: int = 50) -> dict[str, Any]:
    """Build a report; each row takes a moment.

    A task may run again after a crash. Then the report is replaced, so there is never a second one.
    """
    for row in range(1, rows + 1):
        ctx.sleep(0.1)  # the work; a cancel ends it at once
        ctx.progress(100 * row / rows, f"row {row} of {rows}")
    report, _created = Report.objects.update_or_create(
        task_id=ctx.task.id, defaults={"title": title, "rows": rows}
    )
    return {"report": report.pk}
