"""The pages."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, jsonify, request

from reports.tasks import report, taskx
from taskx import TaskNotFound

views = Blueprint("views", __name__)


@views.post("/reports/<month>")
def submit(month: str) -> Any:
    """Submit the report of a month; the body is a list of sales. A month has one report at a time."""
    bound = report.using(unique_key=f"report {month}", on_conflict="return")
    return jsonify(id=bound.submit(month=month, sales=request.get_json()).id), 202


@views.get("/reports/<task_id>")
def show(task_id: str) -> Any:
    """Tell how far a report is, and its result."""
    try:
        task = taskx.queue.get_task_status(task_id)
    except TaskNotFound:
        return jsonify(error="no such report"), 404
    return jsonify(status=task.status, progress=task.progress, result=task.result)
