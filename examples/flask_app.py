"""A small Flask application: upload a text, watch how its words are counted, cancel, see the dashboard.

Run it in one of these ways; none of them needs a change of the code::

    flask --app examples/flask_app.py run --debug
    gunicorn --chdir examples --workers 2 'flask_app:create_app()'
    ADMIN_PASSWORD=secret flask --app examples/flask_app.py run   # the dashboard is at /taskx

The commands of TaskX are there, too: ``flask --app examples/flask_app.py taskx list``. All settings can
come from the environment, such as ``FLASK_TASKX_REPOSITORY``, ``FLASK_TASKX_WORKERS`` or ``FLASK_UPLOADS``.

With ``--config examples/flask_app.py`` gunicorn also reads this module as its configuration file. Then the
tasks that are left from before a restart run before the first request.
"""

from __future__ import annotations

import hmac
import math
import os
import uuid
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

from flask import Flask, Response, abort, current_app, jsonify, redirect, request, url_for

from taskx import (
    ConfigurationError,
    Context,
    DuplicateTask,
    InvalidTransition,
    PayloadError,
    Permanent,
    QueueFull,
    QueueStopped,
    RepositoryUnavailable,
    Task,
    TaskNotFound,
)
from taskx.contrib.flask import Taskx

#: The number of lines of a page.
PAGE_LENGTH = 20
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

taskx = Taskx()


@taskx.executor("count_words")
def count_words(ctx: Context, title: str, file: str) -> dict[str, Any]:
    """Count the words of an uploaded text, page by page."""
    path = Path(current_app.config["UPLOADS"], file)
    if not path.exists():
        raise Permanent(f"{title} is no longer there")  # another attempt would not help
    words: Counter[str] = Counter()
    with path.open(encoding="utf-8", errors="replace") as text:
        pages = max(1, math.ceil(sum(1 for _ in text) / PAGE_LENGTH))
        text.seek(0)
        for page in range(1, pages + 1):
            for line in islice(text, PAGE_LENGTH):
                words.update(line.lower().split())
            ctx.sleep(current_app.config["SECONDS_PER_PAGE"])  # a cancel ends it at once
            ctx.progress(100 * page / pages, f"page {page} of {pages}")
    return {"words": words.total(), "pages": pages, "most": words.most_common(3)}


@taskx.dashboard_check
def check_admin() -> bool:
    """Let the admin see and change everything in the dashboard, and nobody else."""
    password = os.environ.get("ADMIN_PASSWORD")
    given = request.authorization
    if not password:
        return False
    typed = "" if given is None else given.password or ""
    if not hmac.compare_digest(typed.encode(), password.encode()):
        abort(Response("Please log in.", 401, {"WWW-Authenticate": 'Basic realm="tasks"'}))
    request.environ["REMOTE_USER"] = given.username or "admin"
    return True


def create_app(**config: Any) -> Flask:
    """Make the app. Its queue starts with the first request that a process answers."""
    app = Flask(__name__)
    app.config.update(
        TASKX_REPOSITORY="sqlite:///tasks.db",
        TASKX_DASHBOARD_URL="/taskx",
        UPLOADS="uploads",
        SECONDS_PER_PAGE=0.25,  # stands for work that takes longer
        MAX_CONTENT_LENGTH=10_000_000,
    )
    app.config.from_prefixed_env()
    app.config.update(config)
    app.config["UPLOADS"] = os.path.abspath(app.config["UPLOADS"])
    taskx.init_app(app)
    for error, code in STATUS_CODES.items():
        app.register_error_handler(
            error, lambda error, code=code: (jsonify(error=str(error)), code)
        )

    @app.get("/")
    def page() -> str:
        return PAGE

    @app.post("/tasks")
    def upload() -> Any:
        """Store a file, and submit its task. With an ``id`` it is submitted at most once."""
        given = request.files.get("file")
        if given is None or not given.filename:
            raise PayloadError("file", "is missing")
        folder, name = Path(app.config["UPLOADS"]), uuid.uuid4().hex
        folder.mkdir(exist_ok=True)
        given.save(folder / name)
        try:
            handle = count_words.using(id=request.form.get("id")).submit(
                title=given.filename, file=name
            )
        except Exception:
            (folder / name).unlink()
            raise
        if request.accept_mimetypes.accept_html:
            return redirect(url_for("page"), code=303)
        location = url_for("show", task_id=handle.id)
        return jsonify(id=handle.id), 202, {"Location": location}

    @app.get("/tasks")
    def show_all() -> Response:
        """Return the tasks, newest first: ``?status=running&offset=20&limit=20``."""
        tasks, total = taskx.queue.list_tasks(
            status=request.args.get("status"),
            offset=request.args.get("offset", 0, type=int),
            limit=request.args.get("limit", 20, type=int),
        )
        return jsonify(tasks=[summary(task) for task in tasks], total=total)

    @app.get("/tasks/<task_id>")
    def show(task_id: str) -> Response:
        return jsonify(summary(taskx.queue.get_task_status(task_id)))

    @app.post("/tasks/<task_id>/cancel")
    def cancel(task_id: str) -> Response:
        """Cancel a task. ``cancelled`` is false for a running task: it is asked to stop and soon will."""
        return jsonify(cancelled=taskx.queue.cancel_task(task_id))

    return app


def summary(task: Task) -> dict[str, Any]:
    """Return the fields of a task that a client gets."""
    fields = ("id", "status", "params", "progress", "message", "result", "error", "created_at")
    told = task.to_dict()
    return {name: told[name] for name in fields}


PAGE = """<!doctype html>
<meta charset="utf-8"><title>Word counter</title>
<h1>Word counter</h1>
<form method="post" action="/tasks" enctype="multipart/form-data">
  <input name="file" type="file" accept="text/*" required>
  <button>Count the words</button>
</form>
<table id="tasks"></table>
<p><a href="/taskx">Dashboard for the admin</a></p>
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
    const words = task.result ? `${task.result.words} words` : task.message;
    row.insertCell().textContent = task.error || words || task.status;
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


# The hook of gunicorn: with ``--config examples/flask_app.py`` this module is also its configuration file.


def post_worker_init(worker: Any) -> None:
    """Start the queue of a worker process that has loaded the app."""
    taskx.start(worker.wsgi)


if __name__ == "__main__":
    create_app().run()
