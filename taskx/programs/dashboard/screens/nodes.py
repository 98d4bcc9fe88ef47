"""The nodes: the processes that run tasks, and what each of their threads does."""

from __future__ import annotations

from taskx.node.threads import ThreadStack
from taskx.programs.dashboard.asking import question
from taskx.programs.dashboard.pages import Action, Done, Page, Screen
from taskx.programs.dashboard.request import Request
from taskx.tasks.errors import ConfigurationError

#: Nodes on a page.
ROWS = 50
#: Running tasks that are listed.
TASKS = 100
# Seconds to wait for the stacks of another process.
_PATIENCE = 3.0


def show(request: Request) -> Page:
    """Show the nodes, this one first."""
    nodes = sorted(request.queue.nodes(), key=lambda node: (not node.this, node.name))
    values = {
        "nodes": nodes[:ROWS],
        "number": len(nodes),
        "running": [(node, task) for node in nodes[:ROWS] for task in node.running],
        "most": TASKS,
        "workers": request.queue.tuned().workers,
    }
    return Page("nodes.html", values)


def show_stacks(request: Request) -> Page:
    """Show what each thread of a node is doing. Another process is asked through the repository."""
    node, wrong, stacks = request.form.get("id", ""), "", list[ThreadStack]()
    try:
        stacks = request.queue.stacks(node, timeout=_PATIENCE)
    except TimeoutError as error:
        wrong = str(error)
    known = {found.id: found.name for found in request.queue.nodes()}
    groups: dict[tuple[str, str], list[ThreadStack]] = {}
    for one in stacks:  # those of idle threads are alike
        groups.setdefault((one.stack, one.task_id), []).append(one)
    values = {
        "node": node,
        "groups": [(stack, threads) for (stack, _), threads in groups.items()],
        "name": known.get(node, node),
        "wrong": wrong,
        "refreshing": False,
    }
    return Page("stacks.html", values)


def stop(request: Request) -> Done | Page:
    """Let a node end: it starts no more tasks, and stops when the running ones have ended."""
    node = request.form.get("id", "")
    names = {found.id: found.name for found in request.queue.nodes()}
    text = request.say("Stop the node {name}?", name=names.get(node, node))
    if asked := question(request, text):
        return asked
    request.queue.stop_node(node)
    request.note("stop node", node)
    return Done(request.say("The node was asked to stop."))


def workers(request: Request) -> Done:
    """Set the number of workers of a node, or of all; an empty field leaves what the program says."""
    node = request.form.get("id") or None
    text = request.form.get("workers", "").strip()
    if not text:
        request.queue.untune(workers=True, node=node)
        request.note("untune workers", node or "all nodes")
        return Done(request.say("The program's own number of workers is in effect again."))
    if not text.isdecimal() or len(text) > 9:
        raise ConfigurationError(f"workers must be a whole number, not {text!r:.100}")
    request.queue.tune(workers=int(text), node=node)
    request.note("tune workers", node or "all nodes", text)
    return Done(request.say("The number of workers is now {number}.", number=int(text)))


SCREEN = Screen(
    name="nodes",
    label="Nodes",
    letter="n",
    show=show,
    actions={
        "stacks": Action("read", show_stacks),  # by POST, since it stores a question
        "stop": Action("tune", stop),
        "workers": Action("tune", workers),
    },
    fresh=False,
)
