"""The tasks of the app."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from django.db import transaction
from django.utils import timezone

from taskx.contrib.django import schedule, task

from .models import Report


@task(takes_context=True, max_attempts=2, tags=["report"])
def build(context: Any, report_id: int) -> dict[str, Any]:
    """Build a report; each row takes a moment. Its progress is on the page of the reports.

    The total and the task that sends the report are stored together. So if the process dies and this task
    runs again, the report is sent once.
    """
    report, run = Report.objects.get(pk=report_id), context.taskx
    if report.total is not None:
        return {"report": report_id, "total": report.total}
    total = 0
    for row in range(1, report.rows + 1):
        run.sleep(0.1)  # the work; a cancel ends it at once
        total += row
        run.progress(100 * row / report.rows, f"row {row} of {report.rows}")
    with transaction.atomic():
        Report.objects.filter(pk=report_id).update(total=total)
        send.enqueue(report_id)
    return {"report": report_id, "total": total}


@task(queue_name="mails", takes_context=True, max_attempts=5, backoff=timedelta(seconds=1))
def send(context: Any, report_id: int) -> str:
    """Send a report. The mail server of this example is down at the first attempt."""
    if context.attempt == 1:
        raise ConnectionError("the mail server is down")
    Report.objects.filter(pk=report_id).update(sent=True)
    return "sent"


@task
def remove_old(days: int) -> int:
    """Remove old reports; return their number."""
    limit = timezone.now() - timedelta(days=days)
    return Report.objects.filter(created_at__lt=limit).delete()[0]


schedule("remove old reports", "30 3 * * *", remove_old, {"days": 30}, tz="Europe/Berlin")
