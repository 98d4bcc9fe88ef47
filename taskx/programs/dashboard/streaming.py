"""What a task emits, as server-sent events."""

from __future__ import annotations

from werkzeug.wrappers import Response

from taskx.programs.dashboard.private import redacted
from taskx.programs.dashboard.request import Request
from taskx.tasks.streams import EVENTS_WITHIN, Events


def send(request: Request, task_id: str) -> Response:
    """Return what a task emits after the position that the browser has.

    A server that answers one request at a time sends what is there by now.
    """
    request.require("see_params")
    after = request.headers.get("Last-Event-ID") or request.args.get("after") or None
    stream, words = request.queue.handle(task_id).stream(after), request.queue.config.redact
    within = EVENTS_WITHIN if request.is_multithread else 0.0
    events = Events(stream, within, lambda value: redacted(value, words))
    return Response(events, headers=[*events.headers.items()])
