"""Tasks in a FastAPI app: ``pip install taskx-queue fastapi uvicorn``, then, in this folder::

    uvicorn fastapi_app:app

The endpoints are plain functions (``def``), not ``async def``: FastAPI calls them on threads, and a submit
writes to the disk. ``lifespan`` starts the queue in each server process and stops it at the end.
"""

from __future__ import annotations

import os
from typing import Any

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel

from taskx import Context, InvalidTransition, Queue, QueueFull, TaskNotFound, open_repository
from taskx.contrib.asgi import lifespan

queue = Queue(open_repository(os.environ.get("TASKX_REPOSITORY", "sqlite:///tasks.db")))
app = FastAPI(lifespan=lifespan(queue))


class Order(BaseModel):
    """What a client sends."""

    title: str
    pages: int = 20


@queue.executor("report")
def report(ctx: Context, title: str, pages: int) -> dict[str, Any]:
    """Write a report; each page takes a moment."""
    for page in range(1, pages + 1):
        ctx.sleep(0.25)  # the work; a cancel ends it at once
        ctx.progress(100 * page / pages, f"page {page} of {pages}")
    return {"title": title, "pages": pages}


@app.post("/reports", status_code=202)
def submit(order: Order) -> dict[str, str]:
    """Submit a report."""
    try:
        return {"id": report.submit(title=order.title, pages=order.pages).id}
    except QueueFull as error:
        raise HTTPException(503, "busy, try later") from error


@app.get("/reports/{task_id}")
def show(task_id: str) -> dict[str, Any]:
    """Tell how far a report is."""
    try:
        task = queue.get_task_status(task_id)
    except TaskNotFound as error:
        raise HTTPException(404, "no such report") from error
    return {"status": task.status, "progress": task.progress, "result": task.result}


@app.post("/reports/{task_id}/cancel")
def cancel(task_id: str) -> dict[str, bool]:
    """Cancel a report. ``cancelled`` is false for a running one: it is asked to stop and soon will."""
    try:
        return {"cancelled": queue.cancel_task(task_id)}
    except TaskNotFound as error:
        raise HTTPException(404, "no such report") from error
    except InvalidTransition as error:
        raise HTTPException(409, "it has ended") from error
