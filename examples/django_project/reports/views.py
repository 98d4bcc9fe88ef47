"""Views that submit a report, show its progress and cancel it."""

from __future__ import annotations

from django.db import transaction
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.http import require_GET, require_POST

from taskx import InvalidTransition
from taskx.contrib.django import get_queue

from .models import Report
from .tasks import build


@require_POST
def submit(request: HttpRequest) -> HttpResponse:
    """Store a report together with the task that builds it: both, or neither."""
    try:
        rows = int(request.POST.get("rows") or 50)
    except ValueError:
        return JsonResponse({"error": "rows must be a whole number"}, status=400)
    with transaction.atomic():
        report = Report.objects.create(title=request.POST.get("title", ""), rows=rows)
        report.task_id = build.enqueue(report.pk).id
        report.save()
    return redirect("reports")


@require_GET
def show_all(request: HttpRequest) -> HttpResponse:
    """Show the newest reports on a page that updates itself."""
    reports = Report.objects.order_by("-pk")[:20]
    return render(request, "reports/reports.html", {"reports": reports})


@require_GET
def show(request: HttpRequest, pk: int) -> HttpResponse:
    """Return the state of a report as JSON."""
    report = get_object_or_404(Report, pk=pk)
    task = build.get_result(report.task_id).taskx.task()
    return JsonResponse(
        {
            "title": report.title,
            "total": report.total,
            "sent": report.sent,
            "status": task.status.value,
            "progress": task.progress,
            "message": task.error or task.message,
        }
    )


@require_POST
def cancel(request: HttpRequest, pk: int) -> HttpResponse:
    """Cancel the task of a report. A running one is asked to stop, and soon will."""
    report = get_object_or_404(Report, pk=pk)
    try:
        get_queue().cancel_task(report.task_id)
    except InvalidTransition as error:
        return JsonResponse({"error": str(error)}, status=409)
    return redirect("reports")
