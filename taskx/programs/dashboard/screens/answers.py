"""The answers that tasks wait for: who asks what, since when and until when, and a form to give one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

import attrs

from taskx.programs.dashboard import private
from taskx.programs.dashboard.pages import Action, Done, Page, Screen
from taskx.programs.dashboard.request import Request
from taskx.programs.dashboard.trees import Trees
from taskx.tasks.errors import ConfigurationError
from taskx.tasks.lifecycle import ANSWER, EVENT, UNFINISHED, askers
from taskx.tasks.model import Task, TaskStatus
from taskx.tasks.tags import without_trace

#: Answers on a page.
ROWS = 50
#: The largest total that is counted.
MOST_COUNTED = 1_000
#: The ways to give an answer, with their labels.
KINDS = (("text", "a text"), ("json", "JSON"), ("error", "an error"))


@attrs.frozen(kw_only=True)
class Row:
    """An open answer.

    Attributes:
        task: the answer, as far as the user may see it.
        name: what it is about.
        asker: the task that asks, or for which it was asked; None if it belongs to no task.
        once: True if it is about a call with an unknown outcome, which may be made again.
        early: True if it cannot be given yet, because it waits for other tasks itself.
    """

    task: Task
    name: str
    asker: Task | None
    once: bool
    early: bool

    @property
    def question(self) -> Any:
        """Return the question; None if there is none, or if the user may not see it."""
        return None if self.once else self.task.params.get("question")

    @property
    def since(self) -> datetime | None:
        """The time at which it was asked."""
        return self.task.created_at

    @property
    def tags(self) -> Iterable[str]:
        """Its tags, without those of traces."""
        return without_trace(self.task.tags)


def rows_of(request: Request, answers: Iterable[Task]) -> Iterator[Row]:
    """Yield answers with what a page shows of them."""
    answers = [*answers]
    ids = {task_id for task in answers for task_id in (*askers(task.id), *task.depends_on)}
    known: Mapping[str, Task] = request.queue.repository.get_many([*ids]) if ids else {}
    for task in answers:
        seen = private.visible(request, task)
        asker = next((known[i] for i in askers(task.id) if i in known), None)
        yield Row(
            task=seen,
            name=_name(seen, asker),
            asker=asker,
            once="once" in task.params,
            early=any(i in known and known[i].status in UNFINISHED for i in task.depends_on),
        )


def _name(task: Task, asker: Task | None) -> str:
    if asker is not None:
        return task.id.removeprefix(f"{asker.id}/")
    named = task.params.get("name")  # that of an answer in a flow
    return named if isinstance(named, str) else task.id.removeprefix(EVENT)


def show(request: Request) -> Page:
    """Show the open answers, the newest first."""
    tag = request.args.get("tag", "")
    page = request.queue.list_tasks(
        type=ANSWER,
        status=TaskStatus.PENDING,
        tag=tag or None,
        limit=ROWS,
        after=request.args.get("after") or None,
        at_most=MOST_COUNTED,
    )
    return Page(
        "answers.html",
        {
            "rows": [*rows_of(request, page.tasks)],
            "page": page,
            "tag": tag,
            "kinds": KINDS,
            "trees": Trees(request.say),
        },
    )


# --- changes


def finish(request: Request) -> Done:
    """Give an answer."""
    task_id, error = request.form.get("id", ""), ""
    again, result = bool(request.form.get("again")), None
    if not again:
        result, error = _given(request)
    by = request.user or "dashboard"
    if request.queue.finish(task_id, result, error=error, again=again, by=by):
        return Done(request.say("The answer was given."))
    return Done(request.say("Nothing was done: the answer was given before, or has ended."))


def _given(request: Request) -> tuple[Any, str]:
    """Return the result and the error of a form; one of them is empty."""
    text, kind = request.form.get("value", "").replace("\r\n", "\n"), request.form.get("kind")
    if not text.strip():
        raise ConfigurationError(request.say("The answer is empty."))
    if kind == "error":
        return None, text
    if kind != "json":
        return text, ""
    try:
        return json.loads(text), ""
    except (ValueError, RecursionError) as error:
        words = request.say("The answer is not JSON: {error}.", error=str(error))
        raise ConfigurationError(words) from None


SCREEN = Screen(
    name="answers",
    label="Waiting for people",
    letter="p",
    show=show,
    actions={"finish": Action("answer", finish)},
)
