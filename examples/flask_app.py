"""Tasks in a Flask app: submit from a view, show progress, cancel.

The place of ``queue.start()`` depends on the server:

One process
    ``python examples/flask_app.py``: :func:`main` starts the queue before it serves.

The debug reloader
    ``python examples/flask_app.py --debug`` runs this program twice: as a parent that only watches the
    files, and as a child that serves and is replaced when a file changes. :func:`main` starts the queue
    only in the child, where ``WERKZEUG_RUN_MAIN`` is set.

gunicorn
    ``gunicorn --chdir examples -w 2 -c examples/flask_app.py 'flask_app:create_app()'``: every worker
    process has its own queue on the same file, and the queues share the tasks.
    :func:`post_worker_init` starts the queue after the fork. This also works with ``--preload``, where
    the master makes the app and a fork does not copy the master's threads.

Other servers
    For ``flask run`` see *Flask* in ``docs/web.rst``: the factory itself starts the queue there. For a
    server without such a hook, use ``app.before_request(queue_of(app).start)``. Further calls of
    ``start()`` do nothing. The disadvantage: after a restart, no task runs before the first request.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from flask import Flask, Response, jsonify, redirect, request, url_for

from taskx import (
    ConfigurationError,
    Context,
    DuplicateTask,
    InvalidTransition,
    PayloadError,
    Queue,
    QueueFull,
    QueueStopped,
    RepositoryUnavailable,
    SQLiteRepository,
    Task,
    TaskNotFound,
    executor,
)

STATUS_CODES: dict[type[Exception], int] = {
    ConfigurationError: 400,  # an invalid filter or id
    PayloadError: 400,
    TaskNotFound: 404,
    DuplicateTask: 409,
    InvalidTransition: 409,
    QueueFull: 503,
    QueueStopped: 503,
    RepositoryUnavailable: 503,
}


@executor("report")
def report(ctx: Context, title: str, pages: int = 20) -> dict[str, Any]:
    """Write a report; each page takes a moment."""
    for page in range(1, pages + 1):
        ctx.sleep(0.25)  # the work; a cancel ends it at once
        ctx.progress(100 * page / pages, f"page {page} of {pages}")
    return {"title": title, "pages": pages}


def create_app(database: str = "tasks.db") -> Flask:
    """Make the app and its queue. The queue is started elsewhere: see above."""
    queue = Queue(SQLiteRepository(database))
    queue.register_executor(report)
    app = Flask(__name__)
    app.extensions["taskx"] = queue
    for error, code in STATUS_CODES.items():
        app.register_error_handler(
            error, lambda error, code=code: (jsonify(error=str(error)), code)
        )

    @app.get("/")
    def page() -> str:
        return PAGE

    @app.post("/tasks")
    def submit() -> Any:
        """Submit a report, given as a form or as JSON. With an ``id`` it is stored at most once."""
        given = request.get_json() if request.is_json else request.form.to_dict()
        if not isinstance(given, dict):
            raise PayloadError("params", "must be an object")
        task_id = given.pop("id", None)
        handle = queue.submit("report", numbers(given), id=task_id)
        if not request.is_json:
            return redirect(url_for("page"), code=303)
        location = url_for("show", task_id=handle.id)
        return jsonify(id=handle.id), 202, {"Location": location}

    @app.get("/tasks")
    def show_all() -> Response:
        """Return the tasks, newest first: ``?status=running&offset=20&limit=20``."""
        tasks, total = queue.list_tasks(
            status=request.args.get("status"),
            offset=request.args.get("offset", 0, type=int),
            limit=request.args.get("limit", 20, type=int),
        )
        return jsonify(tasks=[summary(task) for task in tasks], total=total)

    @app.get("/tasks/<task_id>")
    def show(task_id: str) -> Response:
        return jsonify(summary(queue.get_task_status(task_id)))

    @app.post("/tasks/<task_id>/cancel")
    def cancel(task_id: str) -> Response:
        """Cancel a task. ``cancelled`` is false for a running task: it is asked to stop and soon will."""
        return jsonify(cancelled=queue.cancel_task(task_id))

    return app


def queue_of(app: Flask) -> Queue:
    """Return the queue of an app."""
    queue: Queue = app.extensions["taskx"]
    return queue


def numbers(params: dict[str, Any]) -> dict[str, Any]:
    """Return the params with the number of pages as a number: in a form it is text."""
    try:
        return {**params, "pages": int(params["pages"])} if "pages" in params else params
    except (TypeError, ValueError):
        raise PayloadError("params.pages", "must be a whole number") from None


def summary(task: Task) -> dict[str, Any]:
    """Return the fields of a task that a client gets."""
    fields = ("id", "status", "params", "progress", "message", "result", "error", "created_at")
    told = task.to_dict()
    return {name: told[name] for name in fields}


PAGE = """<!doctype html>
<meta charset="utf-8"><title>Reports</title>
<h1>Reports</h1>
<form method="post" action="/tasks">
  <input name="title" placeholder="Title" required>
  <input name="pages" type="number" value="20" min="1">
  <button>Write</button>
</form>
<table id="tasks"></table>
<script>
async function refresh() {
  const {tasks} = await (await fetch("/tasks")).json();
  const table = document.getElementById("tasks");
  table.replaceChildren();
  for (const task of tasks) {
    const row = table.insertRow();
    row.insertCell().textContent = task.params.title;
    const bar = row.insertCell().appendChild(document.createElement("progress"));
    bar.max = 100;
    bar.value = task.progress;
    row.insertCell().textContent = task.error || task.message || task.status;
    if (["pending", "running"].includes(task.status)) {
      const button = row.insertCell().appendChild(document.createElement("button"));
      button.textContent = "Cancel";
      button.onclick = () => fetch(`/tasks/${encodeURIComponent(task.id)}/cancel`, {method: "POST"});
    }
  }
}
refresh();
setInterval(refresh, 500);
</script>
"""


# The hook of gunicorn: with ``-c examples/flask_app.py`` this module is also its configuration file.


def post_worker_init(worker: Any) -> None:
    """Start the queue of a worker process that has loaded the app. It is stopped when the process ends."""
    queue_of(worker.wsgi).start()


def main(debug: bool, port: int) -> None:
    """Serve with Flask's own server."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # runs the ``finally`` below, too
    app = create_app(os.environ.get("TASKX_DATABASE", "tasks.db"))
    queue = queue_of(app)
    if not debug or os.environ.get("WERKZEUG_RUN_MAIN") == "true":
        queue.start()
    try:
        app.run(debug=debug, port=port)
    finally:
        queue.stop(cancel=True)


if __name__ == "__main__":
    main(debug="--debug" in sys.argv[1:], port=int(os.environ.get("PORT", "5000")))
