"""One task: its states and times, why it waits, what it carries, its attempts, and what can be done."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from taskx.attempt.waiting import is_begun, outcome, waits_until
from taskx.programs.dashboard import private
from taskx.programs.dashboard.asking import question
from taskx.programs.dashboard.explaining import linked, sentence
from taskx.programs.dashboard.pages import Action, Done, Page, Screen
from taskx.programs.dashboard.request import Request
from taskx.programs.dashboard.screens.answers import KINDS, Row, rows_of
from taskx.programs.dashboard.timeline import timeline
from taskx.programs.dashboard.trees import Trees
from taskx.queue.queue import Queue
from taskx.tasks.clock import to_datetime
from taskx.tasks.errors import ConfigurationError
from taskx.tasks.findings import Reason
from taskx.tasks.lifecycle import ANSWER
from taskx.tasks.model import MAX_NAME, Task, TaskStatus
from taskx.tasks.redact import unhidden

#: Lines of the log that a page shows: the last ones.
LOG_LINES = 200
# Parents, children and earlier tasks that a page shows.
_RELATIVES = 20
_EARLIER = 10


# Answers and children that the timeline reads.
_DRAWN = 60
#: The outcomes of attempts and the states that a page names, besides the statuses.
STATES = ("retried", "snoozed", "interrupted", "crashed", "requeued", "waiting")


def show(request: Request) -> Page:
    """Show a task."""
    queue, task_id = request.queue, request.args.get("id", "")
    task = queue.get_task_status(task_id)
    seen = private.visible(request, task)
    lines = seen.log.splitlines()
    reasons = queue.why(task_id)
    found = queue.repository.get_many([*task.depends_on][:_RELATIVES])
    steps = (seen.checkpoints or {}).get("steps") or {}
    children = queue.list_tasks(parent=task.id, limit=_RELATIVES, at_most=_RELATIVES + 1)
    parents, earlier = [*found.values()], _earlier(queue, task)
    return Page(
        "task.html",
        {
            "task": seen,
            "trees": Trees(request.say),
            "timeline": timeline(request, seen, _own(queue, task)),
            "reasons": [_said(request, reason) for reason in reasons],
            "answer": _answer(request, task, reasons),
            "kinds": KINDS,
            "stacks": [reason.facts["stack"] for reason in reasons if reason.facts.get("stack")],
            "attempts": [*reversed(seen.attempts)],
            "log": "\n".join(lines[-LOG_LINES:]),
            "log_cut": max(0, len(lines) - LOG_LINES),
            "parents": parents,
            "children": children,
            "earlier": earlier,
            "gists": {
                one.id: private.gist(request, one) for one in (*parents, *children.tasks, *earlier)
            },
            "gone": [one for one in [*task.depends_on][:_RELATIVES] if one not in found],
            "actions": _actions(request, task),
            "steps_stored": {name: _told(request, value) for name, value in steps.items()},
            "cursor": (seen.checkpoints or {}).get("cursor"),
            "params_text": _as_text(seen.params) if _editable(request, task) else None,
        },
    )


def _said(request: Request, reason: Reason) -> tuple[Markup, tuple[str, str, str, str] | None]:
    """Return a reason as a sentence, and what ends it: an action, its button, its field and the value."""
    said = sentence(reason, request.display)
    ends = None
    if reason.kind == "hold" and request.may("tune"):
        ends = "types/release", "Release", "limit", reason.facts["limit"]
    elif reason.kind == "paused" and request.may("pause"):
        ends = "types/resume", "Resume", "type", reason.facts["type"] or ""
    return linked(said, lambda task_id: request.link("task", id=task_id)), ends


def _told(request: Request, value: Any) -> Any:
    """Return the value of a step; words for one that is not done, or that has raised."""
    if (until := waits_until(value)) is not None:
        return request.say("waits until {time}", time=request.display.clock(to_datetime(until)))
    if is_begun(value):
        return request.say("has begun, and nobody knows how it has ended")
    try:
        return outcome(value)
    except Exception as error:  # noqa: BLE001  (the error that the step has raised)
        return f"{type(error).__name__}: {error}"


def _answer(request: Request, task: Task, reasons: Sequence[Reason]) -> Row | None:
    """Return the open answer that a page can give: the task itself, or what it waits for."""
    asked = task
    if task.type != ANSWER:
        ids = [r.facts["id"] for r in reasons if r.facts.get("type") == ANSWER]
        found = request.queue.repository.get_many(ids)
        asked = next(iter(found.values()), task)
    if asked.type != ANSWER or asked.status is not TaskStatus.PENDING:
        return None
    return next(rows_of(request, [asked]))


def _own(queue: Queue, task: Task) -> Sequence[Task]:
    """Return the answers that a task asks for, and its children: their ids begin with its id."""
    if len(task.id) >= MAX_NAME:  # no id is longer
        return ()
    return queue.list_tasks(id_prefix=f"{task.id}/", limit=_DRAWN, at_most=1).tasks


def _earlier(queue: Queue, task: Task) -> list[Task]:
    """Return the tasks of the same type that were submitted before a task, the latest first."""
    if task.created_at is None:
        return []
    some = queue.list_tasks(
        type=task.type, end_date=task.created_at, limit=_EARLIER + 1, at_most=_EARLIER + 1
    )
    return [other for other in some.tasks if other.id != task.id][:_EARLIER]


def _as_text(params: Any) -> str:
    return json.dumps(params, indent=2, ensure_ascii=False)


def _ended_badly(task: Task) -> bool:
    return task.status in (TaskStatus.FAILED, TaskStatus.CANCELLED)


def _editable(request: Request, task: Task) -> bool:
    may = all(map(request.may, ("edit", "requeue", "see_params")))
    return may and _ended_badly(task) and not task.damage


def _actions(request: Request, task: Task) -> list[str]:
    """Return the names of the actions that make sense now and that the user may take."""
    possible = {
        "cancel": not task.status.finished,
        "requeue": _ended_badly(task),
        "delete": task.status is not TaskStatus.RUNNING,
    }
    return [name for name, fits in possible.items() if fits and request.may(name)]


# --- actions


def _cancel(request: Request) -> Done | Page:
    if asked := question(request, request.say("Cancel this task?")):
        return asked
    task_id = request.form.get("id", "")
    never_runs = request.queue.cancel_task(task_id)
    request.note("cancel", task_id)
    if never_runs:
        return Done(request.say("The task was cancelled."))
    return Done(request.say("The task runs and was asked to stop."))


def _requeue(request: Request) -> Done:
    task_id, step = request.form.get("id", ""), request.form.get("from_step")
    if step is None:
        request.queue.requeue(task_id)
    else:
        request.queue.requeue(task_id, from_step=step)
    request.note("requeue", task_id, f"from step {step}" if step is not None else "")
    return Done(request.say("The task runs again."))


def _delete(request: Request) -> Done | Page:
    if asked := question(request, request.say("Delete this task?")):
        return asked
    task_id = request.form.get("id", "")
    request.queue.delete(task_id)
    request.note("delete", task_id)
    return Done(request.say("The task {id} was deleted.", id=task_id), request.link("tasks"))


def _edit(request: Request) -> Done:
    request.require("requeue")
    request.require("see_params")
    task_id = request.form.get("id", "")
    params = _params_of(request)
    shown = request.queue.get_task_status(task_id).params
    request.queue.requeue(task_id, params=unhidden(params, shown))
    request.note("edit", task_id, "other params")
    return Done(request.say("The task runs again with other params."))


def _params_of(request: Request) -> dict[str, Any]:
    try:
        params = json.loads(request.form.get("params", ""))
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(
            request.say("The params are not JSON: {error}.", error=str(error))
        ) from None
    if not isinstance(params, dict):
        raise ConfigurationError(request.say("The params must be a JSON object."))
    return params


SCREEN = Screen(
    name="task",
    label="Task",
    show=show,
    actions={
        "cancel": Action("cancel", _cancel),
        "requeue": Action("requeue", _requeue),
        "delete": Action("delete", _delete),
        "edit": Action("edit", _edit),
    },
)
