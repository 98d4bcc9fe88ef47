"""The JSON API: the same questions and changes as on the pages, for programs."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Literal

import attrs
from werkzeug.exceptions import ServiceUnavailable
from werkzeug.wrappers import Response

from taskx.insight.query import FIELDS, field_suggestion
from taskx.programs.dashboard import private
from taskx.programs.dashboard.bulk import change_for_a_while
from taskx.programs.dashboard.request import Request
from taskx.programs.dashboard.screens.tasks import CHANGES, MOST_COUNTED, Change, read_filter
from taskx.tasks.errors import ConfigurationError, TaskNotFound
from taskx.tasks.model import Task, TaskFilter

#: The largest number of tasks in an answer.
MOST_TASKS = 1_000
#: Tasks that a stream of changes looks at: the newest that match.
MOST_WATCHED = 100
#: The longest time of a stream of changes, in seconds. Each one holds a thread of the server.
LONGEST_STREAM = 300
#: Streams that one dashboard serves at the same time.
MOST_STREAMS = 8

_streams = threading.BoundedSemaphore(MOST_STREAMS)


@attrs.frozen
class Parameter:
    """A parameter in the query of a call.

    Attributes:
        name: its name; one that ends with a dot stands for all names that begin with it.
        about: what it means, in one sentence.
        type: the type of its value.
        required: True if the call fails without it.
        repeated: True if it may be given several times.
    """

    name: str
    about: str
    type: Literal["string", "integer"] = "string"
    required: bool = False
    repeated: bool = False

    def fits(self, name: str) -> bool:
        """Return True if a name in a query means this parameter."""
        return name == self.name or (self.name.endswith(".") and name.startswith(self.name))


@attrs.frozen
class Call:
    """One call of the API, at ``/api/name``.

    Attributes:
        name: its name.
        about: what it does, in one sentence.
        run: does it; returns JSON values or a response.
        answer: the name of the schema of its answer.
        method: GET, or POST with a JSON object as the body.
        permission: the permission that it needs.
        parameters: the parameters in its query.
        body: the name of the schema of its body.
    """

    name: str
    about: str
    run: Callable[[Request], Any]
    answer: str
    method: Literal["GET", "POST"] = "GET"
    permission: str = "read"
    parameters: tuple[Parameter, ...] = ()
    body: str = ""


def answer(request: Request, call: Call) -> Response:
    """Return the answer to a call."""
    request.require(call.permission)
    check_parameters(request, call.parameters)
    made = call.run(request)
    response = made if isinstance(made, Response) else as_json(made)
    response.cache_control.no_store = True
    return response


def check_parameters(request: Request, known: Sequence[Parameter]) -> None:
    """Check that a call knows the parameters of a request: a misspelt one would change its meaning.

    Raises:
        ConfigurationError: it does not know one, or one is given too often.
    """
    for name, values in request.args.lists():
        found = next((one for one in known if one.fits(name)), None)
        if found is None:
            names = [one.name for one in known]
            listed = ", ".join(f"{name}…" if name.endswith(".") else name for name in names)
            raise ConfigurationError(
                f"unknown parameter {name!r:.50}{field_suggestion(name, names)}; "
                f"{f'the known ones are {listed}' if listed else 'this call has none'}"
            )
        if len(values) > 1 and not found.repeated:
            raise ConfigurationError(f"the parameter {name!r:.50} is given twice: give it once")


def as_json(value: Any, status: int = 200) -> Response:
    """Return JSON values as a response."""
    return Response(f"{json.dumps(value)}\n", status=status, mimetype="application/json")


# --- questions


def _list(request: Request) -> dict[str, Any]:
    limit = _number(request, "limit", 100, MOST_TASKS)
    at_most = _number(request, "at_most", MOST_COUNTED)
    wanted = attrs.evolve(_filter(request), limit=limit)
    page = request.queue.list_tasks(
        wanted, after=request.args.get("after") or None, at_most=at_most
    )
    since = page.searched_since
    return {
        "tasks": [private.as_json(request, task) for task in page.tasks],
        "total": page.total,
        "exact": page.exact,
        "next": page.next,
        "searched_since": None if since is None else since.isoformat(),
    }


def _task(request: Request) -> dict[str, Any]:
    return private.as_json(request, request.queue.get_task_status(_id(request)))


def _why(request: Request) -> list[dict[str, Any]]:
    return [reason.to_dict() for reason in request.queue.why(_id(request))]


def _stats(request: Request) -> dict[str, Any]:
    return request.queue.stats(period=_number(request, "period", 3600)).to_dict()


def _health(request: Request) -> Response:
    health = request.queue.health()
    return as_json(health.to_dict(), 200 if health.ok else 503)


def _filter(request: Request) -> TaskFilter:
    given = request.args.items(multi=True)
    more = [(name, value) for name, value in given if any(one.fits(name) for one in _FIELDS)]
    return read_filter(request, request.args.get("q", ""), more)


def _id(request: Request) -> str:
    if not (task_id := request.args.get("id")):
        raise ConfigurationError("the parameter id is missing: write ?id=…")
    return task_id


def _number(request: Request, name: str, default: int, most: int = 2**31) -> int:
    text = request.args.get(name)
    if text is None:
        return default
    if not text.isascii() or not text.isdecimal() or len(text) > 12 or not 1 <= int(text) <= most:
        raise ConfigurationError(
            f"{name} must be a whole number from 1 to {most}, not {text!r:.50}"
        )
    return int(text)


# --- changes


def _change(change: Change) -> Callable[[Request], dict[str, Any]]:
    def run(request: Request) -> dict[str, Any]:
        body = _body(request, {"ids", "query", "dry_run", "rate"})
        if "ids" in body:
            return _change_some(request, change, body)
        if not isinstance(body.get("query"), str):
            raise ConfigurationError(
                'the body needs "ids", a list of texts, or "query", a filter line such as "type:email"'
            )
        return _change_all(request, change, body)

    return run


def _change_some(request: Request, change: Change, body: Mapping[str, Any]) -> dict[str, Any]:
    ids = body["ids"]
    if not isinstance(ids, list) or not all(isinstance(one, str) for one in ids):
        raise ConfigurationError('"ids" must be a list of texts')
    if len(body) > 1:
        raise ConfigurationError('"ids" cannot be combined with other names')
    number = change.some(request.queue, [*dict.fromkeys(ids)])
    request.note(change.name, f"{len(ids)} tasks", " ".join(ids[:20]))
    return {"action": change.name, "changed": number, "finished": True}


def _change_all(request: Request, change: Change, body: Mapping[str, Any]) -> dict[str, Any]:
    wanted = read_filter(request, body["query"])
    options: dict[str, Any] = {}
    if "rate" in body:
        if change.name != "requeue" or not isinstance(body["rate"], str):
            raise ConfigurationError('"rate" is a text such as "100/m", and only for requeue')
        options["rate"] = body["rate"]
    if not wanted.given and change.name != "requeue":
        options["everything"] = True  # the caller wrote an empty query
    dry_run = body.get("dry_run", False)
    if not isinstance(dry_run, bool):
        raise ConfigurationError('"dry_run" must be true or false')
    method = change.all(request.queue)
    if dry_run:
        bulk = method(wanted, dry_run=True, at_most=MOST_COUNTED, **options)
        return {**bulk.to_dict(), "finished": True}
    note = partial(request.note, change.name, body["query"] or "all tasks")
    bulk, finished = change_for_a_while(
        method, wanted, note, request.queue._timing.request_within, **options
    )
    return {**bulk.to_dict(), "finished": finished}


def _body(request: Request, known: set[str]) -> dict[str, Any]:
    if request.mimetype != "application/json":
        raise ConfigurationError(
            "send a JSON object, with the header Content-Type: application/json"
        )
    try:
        body = json.loads(request.get_data())
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise ConfigurationError("the body must be a JSON object")
    if unknown := body.keys() - known:
        raise ConfigurationError(
            f"the body has the unknown name {min(unknown)!r:.50}; known are {', '.join(sorted(known))}"
        )
    return body


# --- the stream of changes


def _changes(request: Request) -> Response:
    wanted = attrs.evolve(_filter(request), limit=MOST_WATCHED)
    seconds = _number(request, "seconds", 60, LONGEST_STREAM)
    if request.method == "HEAD":  # no body is sent, so nothing would close the stream
        return Response(mimetype="application/x-ndjson")
    if not _streams.acquire(blocking=False):
        raise ServiceUnavailable(
            f"{MOST_STREAMS} streams of changes are open, which is the most. Try again later."
        )
    try:
        known = _tasks_of(request, wanted)
        response = Response(
            _stream(request, wanted, seconds, known), mimetype="application/x-ndjson"
        )
        response.headers["X-Accel-Buffering"] = "no"  # or nginx would hold lines back
        response.call_on_close(_streams.release)
    except BaseException:  # also an interrupt: else the place would stay taken for ever
        _streams.release()
        raise
    return response


def _stream(
    request: Request, wanted: TaskFilter, seconds: float, known: Mapping[str, Task]
) -> Iterator[str]:
    """Yield the tasks that match, and each of them again when it has changed."""
    now = time.monotonic()
    until, said, pause = now + seconds, now, threading.Event()
    yield from (_line(request, task) for task in reversed([*known.values()]))
    yield f"{json.dumps({'now': request.now.isoformat()})}\n"  # what follows is new
    revision, timing = None, request.queue._timing
    while (now := time.monotonic()) < until:
        pause.wait(min(timing.stream_every, until - now))
        latest = request.queue.repository.news.revision()
        if latest is None or latest != revision:
            revision, before, known = latest, known, _tasks_of(request, wanted)
            for task in _differences(request, before, known):
                said = time.monotonic()
                yield _line(request, task)
        if time.monotonic() - said >= timing.silence_within:
            said = time.monotonic()
            yield "{}\n"  # a client that is gone is noticed by this


def _differences(
    request: Request, before: Mapping[str, Task], known: Mapping[str, Task]
) -> Iterator[Task]:
    """Yield the tasks that are new or have changed; also those that therefore do not match any more."""
    for task_id, task in before.items():
        if task_id not in known:
            with suppress(TaskNotFound):
                latest = request.queue.get_task_status(task_id)
                if latest != task:
                    yield latest
    for task in reversed([*known.values()]):
        if before.get(task.id) != task:
            yield task


def _tasks_of(request: Request, wanted: TaskFilter) -> dict[str, Task]:
    page = request.queue.list_tasks(wanted, at_most=1)
    return {task.id: task for task in page.tasks}


def _line(request: Request, task: Task) -> str:
    return f"{json.dumps(private.as_json(request, task))}\n"


# --- all calls

_FIELDS = tuple(
    Parameter(name, f"{about[0].upper()}{about[1:]}.", repeated=name == "tag")
    for name, about in FIELDS.items()
)
_FILTER = (
    Parameter("q", "A filter line, such as type:email status:failed newer:1d."),
    *_FIELDS,
)
_ID = Parameter("id", "The id of the task.", required=True)
_ABOUTS = {
    "cancel": "Cancel tasks; running ones are asked to stop.",
    "requeue": "Run failed or cancelled tasks again.",
    "delete": "Delete tasks that are not running.",
}

CALLS: tuple[Call, ...] = (
    Call(
        "tasks",
        "List tasks, newest first.",
        _list,
        "Page",
        parameters=(
            *_FILTER,
            Parameter("limit", f"Most tasks in the answer, 1 to {MOST_TASKS}; 100.", "integer"),
            Parameter("after", "The next of the page before."),
            Parameter("at_most", f"The largest total that is counted; {MOST_COUNTED}.", "integer"),
        ),
    ),
    Call("task", "Get one task.", _task, "Task", parameters=(_ID,)),
    Call("why", "Say why a task waits, runs or has ended.", _why, "Reasons", parameters=(_ID,)),
    Call(
        "stats",
        "Count the tasks of each type.",
        _stats,
        "Stats",
        parameters=(
            Parameter("period", "Seconds in which ended tasks are counted; 3600.", "integer"),
        ),
    ),
    Call("health", "Say what is wrong; with status 503 if anything is.", _health, "Health"),
    Call(
        "changes",
        "Stream tasks that match as JSON lines, and each again when it changes.",
        _changes,
        "Lines",
        parameters=(
            *_FILTER,
            Parameter(
                "seconds", f"The length of the stream, 1 to {LONGEST_STREAM}; 60.", "integer"
            ),
        ),
    ),
    *(
        Call(
            change.name,
            _ABOUTS[change.name],
            _change(change),
            "Changed",
            method="POST",
            permission=change.name,
            body="Change",
        )
        for change in CHANGES
    ),
)
