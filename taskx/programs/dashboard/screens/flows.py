"""The flows: how far each of them is, and its graph as a picture."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

from werkzeug.exceptions import NotFound

from taskx.programs.dashboard.asking import question
from taskx.programs.dashboard.layout import Box, Dot
from taskx.programs.dashboard.pages import Action, Done, Page, Screen
from taskx.programs.dashboard.pictures import picture
from taskx.programs.dashboard.request import Request
from taskx.programs.dashboard.terms import term
from taskx.tasks.model import Task

#: Flows on a page.
ROWS = 20
#: Most tasks of a flow that are in its picture: the newest ones.
MOST_TASKS = 2_000


def show(request: Request) -> Page:
    """Show the newest flows."""
    found = request.queue.flows(at_most=ROWS + 1, after=request.args.get("after") or None)
    rows = [
        (flow, {status.value: number for status, number in flow.counts.items()})
        for flow in found[:ROWS]
    ]
    following = found[ROWS - 1].id if len(found) > ROWS else ""
    return Page("flows.html", {"rows": rows, "following": following, "charts": request.charts})


def show_one(request: Request) -> Page:
    """Show the picture of a flow."""
    flow = request.args.get("id", "")
    tasks = [*islice(request.queue.iter_tasks(flow=flow), MOST_TASKS + 1)] if flow else []
    if not tasks:
        raise NotFound(request.say("No task of this flow is stored."))
    shown = tasks[:MOST_TASKS]
    counts: dict[str, int] = {}
    for task in shown:
        counts[task.status.value] = counts.get(task.status.value, 0) + 1
    name = request.say("The tasks of flow {id}", id=flow)
    return Page(
        "flow.html",
        {
            "flow": flow,
            "counts": counts,
            "charts": request.charts,
            "picture": picture(
                [_dot(task) for task in shown], request.display, name, _link(request, flow)
            ),
            "cut": len(tasks) > MOST_TASKS,
            "most": MOST_TASKS,
            "query": term("flow", flow),
        },
    )


def _dot(task: Task) -> Dot:
    return Dot(task.id, task.type, task.status.value, task.depends_on)


def _link(request: Request, flow: str) -> Callable[[Box], str]:
    def link(box: Box) -> str:
        if len(box.dots) == 1:
            return request.link("task", id=box.dots[0].id)
        types = [term("type", type) for type in box.types] if len(box.types) == 1 else []
        return request.link("tasks", q=" ".join([term("flow", flow), *types]))

    return link


def requeue(request: Request) -> Done | Page:
    """Run the failed tasks of a flow again, and those that ended because of them."""
    flow = request.form.get("id", "")
    if asked := question(request, request.say("Run the failed tasks of this flow again?")):
        return asked
    bulk = request.queue.requeue_all(flow=flow)
    number = bulk.changed + bulk.more
    request.note("requeue", term("flow", flow), f"{number} tasks")
    return Done(request.say("{count} task runs again.|{count} tasks run again.", count=number))


SCREEN = Screen(
    name="flows",
    label="Flows",
    letter="w",
    show=show,
    parts={"one": show_one},
    actions={"requeue": Action("requeue", requeue)},
)
