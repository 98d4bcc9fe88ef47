"""One task: its states and times, why it waits, what it carries, its attempts, and what can be done."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, NamedTuple

from taskx.attempt.waiting import is_begun, outcome, waits_until
from taskx.programs.dashboard import private
from taskx.programs.dashboard.asking import question
from taskx.programs.dashboard.pages import Action, Done, Page, Screen
from taskx.programs.dashboard.request import Request
from taskx.programs.dashboard.screens.answers import KINDS, Row, rows_of
from taskx.programs.dashboard.trees import Trees
from taskx.queue.queue import Queue
from taskx.tasks.clock import to_datetime
from taskx.tasks.errors import ConfigurationError, TaskNotFound
from taskx.tasks.findings import Reason
from taskx.tasks.lifecycle import ANSWER
from taskx.tasks.model import Task, TaskStatus
from taskx.tasks.redact import unhidden

#: Lines of the log that a page shows: the last ones.
LOG_LINES = 200
# Parents, children and earlier tasks that a page shows.
_RELATIVES = 20
_EARLIER = 10


#: The states that a page names, besides the statuses, and the outcomes of attempts.
STATES = ("submitted", "due", "started", "retried", "snoozed", "interrupted", "crashed", "requeued")


class _Step(NamedTuple):
    """One state in which a task was, is or will be."""

    name: str
    at: datetime | None
    seconds: float | None  #: the time until the next one


def show(request: Request) -> Page:
    """Show a task."""
    queue, task_id = request.queue, request.args.get("id", "")
    task = queue.get_task_status(task_id)
    seen = private.visible(request, task)
    lines = seen.log.splitlines()
    reasons = queue.why(task_id)
    return Page(
        "task.html",
        {
            "task": seen,
            "trees": Trees(request.say),
            "steps": [*_steps(task, request.now)],
            "reasons": reasons,
            "waits": next((reason.facts for reason in reasons if "since" in reason.facts), None),
            "answer": _answer(request, task, reasons),
            "kinds": KINDS,
            "stacks": [reason.facts["stack"] for reason in reasons if reason.facts.get("stack")],
            "attempts": [*reversed(seen.attempts)],
            "log": "\n".join(lines[-LOG_LINES:]),
            "log_cut": max(0, len(lines) - LOG_LINES),
            "parents": [*_parents(queue, task.depends_on)],
            "children": queue.list_tasks(parent=task.id, limit=_RELATIVES, at_most=_RELATIVES + 1),
            "earlier": _earlier(queue, task),
            "actions": _actions(request, task),
            "steps_stored": {
                name: _told(request, value)
                for name, value in ((seen.checkpoints or {}).get("steps") or {}).items()
            },
            "cursor": (seen.checkpoints or {}).get("cursor"),
            "params_text": _as_text(seen.params) if _editable(request, task) else None,
        },
    )


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


def _steps(task: Task, now: datetime) -> Iterator[_Step]:
    """Yield the states of a task with their times, in order."""
    moments = [("submitted", task.created_at)]
    if task.run_at is not None and (task.started_at is None or task.run_at <= task.started_at):
        moments.append(("due", task.run_at))
    if task.started_at is not None:
        moments.append(("started", task.started_at))
    if task.status.finished:
        moments.append((task.status.value, task.completed_at))
    ends = [at for _, at in moments[1:]] + [None if task.status.finished else now]
    for (name, at), end in zip(moments, ends, strict=True):
        span = None if at is None or end is None else (end - at).total_seconds()
        yield _Step(name, at, None if span is None or span < 0 else span)


def _parents(queue: Queue, ids: Sequence[str]) -> Iterator[tuple[str, Task | None]]:
    for task_id in list(ids)[:_RELATIVES]:
        found = None
        with suppress(TaskNotFound):
            found = queue.get_task_status(task_id)
        yield task_id, found


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
