"""Views that submit a task, show its progress and cancel it."""

from __future__ import annotations

from collections.abc import Callable

from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_GET, require_POST

from taskx import (
    ConfigurationError,
    DuplicateTask,
    InvalidTransition,
    PayloadError,
    QueueFull,
    QueueStopped,
    RepositoryUnavailable,
    TaskNotFound,
)

from .tasks import queue

STATUS_CODES: dict[type[Exception], int] = {
    ConfigurationError: 400,  # an invalid id
    PayloadError: 400,
    TaskNotFound: 404,
    DuplicateTask: 409,
    InvalidTransition: 409,
    QueueFull: 503,
    QueueStopped: 503,
    RepositoryUnavailable: 503,
}


class TaskErrors:
    """Middleware that answers TaskX's errors with a suitable status code."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self._get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        """Pass a request on."""
        return self._get_response(request)

    def process_exception(self, request: HttpRequest, error: Exception) -> HttpResponse | None:
        """Answer an error of TaskX; leave other errors to Django."""
        code = STATUS_CODES.get(type(error))
        return None if code is None else JsonResponse({"error": str(error)}, status=code)


@require_POST
def submit(request: HttpRequest) -> HttpResponse:
    """Submit a report.

    A task may start before this request has ended. If a task reads data that the request writes to the
    database, submit it with ``transaction.on_commit(lambda: queue.submit(…))``.
    """
    params = {"title": request.POST.get("title", "")}
    if rows := request.POST.get("rows"):
        try:
            params["rows"] = int(rows)
        except ValueError:
            raise PayloadError("params.rows", "must be a whole number") from None
    handle = queue.submit("build_report", params, id=request.POST.get("id"))
    response = redirect("tasks")
    response["X-Task-Id"] = handle.id
    return response


@require_GET
def show_all(request: HttpRequest) -> HttpResponse:
    """Show the newest tasks on a page that updates itself."""
    tasks, total = queue.list_tasks(type="build_report", limit=20)
    return render(request, "reports/tasks.html", {"tasks": tasks, "total": total})


@require_GET
def show(request: HttpRequest, task_id: str) -> HttpResponse:
    """Return one task as JSON."""
    task = queue.get_task_status(task_id).to_dict()
    fields = ("id", "status", "progress", "message", "result", "error")
    return JsonResponse({name: task[name] for name in fields})


@require_POST
def cancel(request: HttpRequest, task_id: str) -> HttpResponse:
    """Cancel a task. A running one is asked to stop and soon will."""
    queue.cancel_task(task_id)
    return redirect("tasks")
