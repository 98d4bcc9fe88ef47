"""The list of tasks: one filter line, pages both ways, changes of many tasks, export."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from functools import partial
from typing import Any

import attrs
from werkzeug.wrappers import Response

from taskx.insight.query import FIELDS, as_command, as_python, parse_query, query_of
from taskx.programs.dashboard import private
from taskx.programs.dashboard.bulk import change_for_a_while
from taskx.programs.dashboard.pages import Action, Done, Page, Screen
from taskx.programs.dashboard.request import Request
from taskx.programs.dashboard.terms import term, without, words_of
from taskx.queue.bulk import Bulk
from taskx.queue.queue import Queue
from taskx.tasks.errors import ConfigurationError
from taskx.tasks.model import TaskCount, TaskFilter, TaskPage, TaskStatus
from taskx.tasks.tags import without_trace

#: Tasks on a page.
ROWS = 25
#: The largest total that is counted.
MOST_COUNTED = 10_000
#: Conditions without an index: only the newest tasks are searched for them, unless the user asks for all.
UNINDEXED = frozenset({"created_by", "error", "error_type", "id_prefix", "params"})
#: The number of tasks that are searched.
MOST_SEARCHED = 40_000
# Statuses that few tasks have, and that are found by an index.
_FEW = frozenset({TaskStatus.RUNNING, TaskStatus.FAILED, TaskStatus.CANCELLED})
#: The largest number that a tab shows.
MOST_IN_TAB = 1_000
#: The ranges of time above the list: their terms and texts.
RANGES = (("", "any time"), ("1h", "1 hour"), ("1d", "24 hours"), ("7d", "7 days"))
_TIMES = ("newer", "older", "since", "until")
# Pages that can be gone back one by one. Their places are in the URL.
_TRAIL = 12


def read_filter(request: Request, line: str, more: Iterable[tuple[str, str]] = ()) -> TaskFilter:
    """Return the filter of a filter line, and of more fields with their values.

    Raises:
        ConfigurationError: the line is not valid.
        Forbidden: it looks for values that the user may not see.
    """
    found = parse_query(line, request.queue.clock, more)
    private.check_search(request, found)
    return found


def show(request: Request) -> Page:
    """Show one page of the tasks that match the filter line."""
    line = request.args.get("q", "").strip()
    after = request.args.get("after") or None
    values: dict[str, Any] = {
        "line": line,
        "fields": FIELDS,
        "wrong": "",
        "tabs": (),
        "ranges": (),
        "chips": (),
    }
    try:
        wanted = read_filter(request, line)
        since = None if "all" in request.args else _searched_since(request.queue, wanted)
        page = request.queue.list_tasks(
            attrs.evolve(wanted, limit=ROWS, start_date=since or wanted.start_date),
            after=after,
            at_most=MOST_COUNTED,
        )
    except ConfigurationError as error:
        nothing = {"page": None, "suggestions": (), "wrong": str(error)}
        return Page("tasks.html", {**values, **nothing}, 400)
    return Page(
        "tasks.html",
        {
            **values,
            "page": page,
            "tabs": [*_tabs(request.queue, line, wanted)],
            "ranges": [*_ranges(line)],
            "chips": _chips(line),
            "gists": {task.id: private.gist(request, task) for task in page.tasks},
            "since": since or page.searched_since,
            "capped": not page.exact and page.total >= MOST_COUNTED,
            "suggestions": [*_suggestions(request, line, page)],
            "newer": _newer(request, line, after),
            "older": _older(request, line, page, after),
            "command": as_command(wanted),
            "python": as_python(wanted),
            "changes": [each for each in BUTTONS if request.may(each[0])],
        },
    )


def _searched_since(queue: Queue, wanted: TaskFilter) -> datetime | None:
    """Return the moment since which tasks are searched; None if all of them are."""
    if wanted.status in _FEW or wanted.start_date is not None or not wanted.given & UNINDEXED:
        return None
    older = queue.list_tasks(offset=MOST_SEARCHED, limit=1, at_most=1).tasks
    return older[0].created_at if older else None


def _tabs(
    queue: Queue, line: str, wanted: TaskFilter
) -> Iterator[tuple[str, str, TaskCount | None, bool]]:
    """Yield the tabs: the status, the filter line, the number of tasks, and True for the chosen one.

    Nothing is counted if that has no index.
    """
    rest = without(line, ["status"])
    yield "", rest, None, wanted.status is None
    for status in TaskStatus:
        number = None
        if not wanted.given & UNINDEXED:
            one = attrs.evolve(wanted, status=status)
            number = queue.count_tasks(one, at_most=MOST_IN_TAB)
        words = f"{rest} {term('status', status.value)}".strip()
        yield status.value, words, number, wanted.status is status


def _ranges(line: str) -> Iterator[tuple[str, str, bool]]:
    """Yield the ranges of time: the text, the filter line, and True for the chosen one."""
    rest, given = (
        without(line, _TIMES),
        [w for w in words_of(line) if w.partition(":")[0] in _TIMES],
    )
    for age, text in RANGES:
        terms = [term("newer", age)] if age else []
        yield text, " ".join([rest, *terms]).strip(), given == terms


def _chips(line: str) -> list[tuple[str, str]]:
    """Return the terms of a line, each with the line without it."""
    words = words_of(line)
    return [(word, " ".join(words[:at] + words[at + 1 :])) for at, word in enumerate(words)]


def _newer(request: Request, line: str, after: str | None) -> str:
    """Return the URL of the page before; empty on the first one."""
    before = request.args.getlist("trail")
    if after is None:
        return ""
    return _page_link(request, q=line, after=before[0] if before else None, trail=before[1:])


def _older(request: Request, line: str, page: TaskPage, after: str | None) -> str:
    """Return the URL of the next page; empty on the last one."""
    if page.next is None:
        return ""
    trail = [after, *request.args.getlist("trail")][:_TRAIL] if after else []
    return _page_link(request, q=line, after=page.next, trail=trail)


def _page_link(request: Request, **values: Any) -> str:
    return request.link("tasks", **values, all=request.args.get("all"))


def _suggestions(request: Request, line: str, page: TaskPage) -> Iterator[str]:
    """Yield filter lines that add a term to the present one."""
    types = sorted({task.type for task in page.tasks})
    terms = {
        "status": [str(status) for status in TaskStatus],
        "type": types,
        "by": sorted({task.created_by for task in page.tasks if task.created_by}),
        "tag": sorted({tag for task in page.tasks for tag in without_trace(task.tags)}),
        "error_type": sorted({task.error_type for task in page.tasks if task.error_type}),
        "newer": ["1h", "1d"],
        "older": ["1h", "1d"],
    }
    for name, values in terms.items():
        if f"{name}:" not in line:
            for value in values:
                yield f"{line} {term(name, value)}".strip()


# The changes: their names, their buttons, and True if they cannot be undone.
BUTTONS = (("requeue", "Run again", False), ("cancel", "Cancel", True), ("delete", "Delete", True))


# --- export


def export(request: Request) -> Response:
    """Send all tasks that match as JSON lines, newest first, with little memory."""
    wanted = read_filter(request, request.args.get("q", ""))
    first = request.queue.iter_tasks(attrs.evolve(wanted, limit=1))
    next(first, None)  # an error is a page as long as nothing was sent
    response = Response(_lines(request, wanted), mimetype="application/x-ndjson")
    response.headers["Content-Disposition"] = 'attachment; filename="tasks.jsonl"'
    response.cache_control.no_store = True
    return response


def _lines(request: Request, wanted: TaskFilter) -> Iterator[str]:
    for task in request.queue.iter_tasks(wanted):
        yield f"{json.dumps(private.as_json(request, task))}\n"


# --- changes of several tasks


@attrs.frozen
class Change:
    """A change of several tasks.

    Attributes:
        name: its name in URLs, in the audit log, and in the methods of the queue: ``"cancel"``.
        question: asks if it shall be done.
        done: says what was done.
    """

    name: str
    question: str
    done: str

    def some(self, queue: Queue, ids: list[str]) -> int:
        """Change the tasks with these ids; return the number of changed ones."""
        number: int = getattr(queue, f"{self.name}_many")(ids)
        return number

    def all(self, queue: Queue) -> Callable[..., Bulk]:
        """Return the method that changes all tasks that match, or only counts them."""
        method: Callable[..., Bulk] = getattr(queue, f"{self.name}_all")
        return method

    def run(self, request: Request) -> Done | Page:
        """Ask first; do it if the user has confirmed it."""
        chosen = [*request.chosen()]
        if "whole" in request.form:
            return self._run_all(request)
        if not chosen:
            return Done(request.say("No task was chosen."))
        if "confirmed" not in request.form:
            return self._ask(request, len(chosen), ids=chosen)
        number = self.some(request.queue, chosen)
        request.note(self.name, f"{len(chosen)} tasks", " ".join(chosen[:20]))
        return Done(request.say(self.done, count=number))

    def _run_all(self, request: Request) -> Done | Page:
        line = request.form.get("q", "")
        wanted, change = read_filter(request, line), self.all(request.queue)
        if "confirmed" not in request.form:
            if wanted.end_date is None or wanted.end_date > request.now:
                wanted = attrs.evolve(wanted, end_date=request.now)  # none that are submitted later
            found = change(wanted, dry_run=True, at_most=MOST_COUNTED)
            return self._ask(request, found.matched, exact=found.exact, line=query_of(wanted))
        rate = request.form.get("rate", "").strip()
        options = {"rate": rate} if rate and self.name == "requeue" else {}
        note = partial(request.note, self.name, line)
        bulk, finished = change_for_a_while(
            change, wanted, note, request.queue._timing.request_within, **options
        )
        said = request.say(self.done, count=bulk.changed)
        return Done(said) if finished else self._ask(request, 0, line=line, rate=rate, so_far=said)

    def _ask(self, request: Request, count: int, **values: Any) -> Page:
        given = {"ids": [], "line": "", "exact": True, "rate": "", "so_far": "", **values}
        question = request.say(self.question, count=count)
        names = {"change": self.name, "question": question, "refreshing": False}
        return Page("confirm.html", {**names, "back": request.back, **given})


CHANGES = (
    Change(
        "cancel",
        "Cancel {count} task?|Cancel {count} tasks?",
        "{count} task was cancelled.|{count} tasks were cancelled.",
    ),
    Change(
        "requeue",
        "Run {count} task again?|Run {count} tasks again?",
        "{count} task runs again.|{count} tasks run again.",
    ),
    Change(
        "delete",
        "Delete {count} task?|Delete {count} tasks?",
        "{count} task was deleted.|{count} tasks were deleted.",
    ),
)

SCREEN = Screen(
    name="tasks",
    label="Tasks",
    letter="t",
    show=show,
    actions={change.name: Action(change.name, change.run) for change in CHANGES},
    parts={"export": export},
)
