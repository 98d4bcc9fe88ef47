"""What tasks emit, as server-sent events: of the dashboard, and in programs of one's own."""

from __future__ import annotations

import asyncio
import json

import pytest
from helpers import PATIENCE
from werkzeug.wrappers import Response

from taskx import ConfigurationError
from taskx.contrib.sse import events
from taskx.programs.dashboard import PERMISSIONS
from taskx.tasks import streams


@pytest.fixture
def queue(make_queue):
    queue = make_queue()

    @queue.executor("words")
    def words(ctx, fails: bool = False):
        for word in ("one\ntwo", {"token": "secret", "n": 2}):
            ctx.emit(word)
        if fails:
            raise ValueError("no")

    return queue


@pytest.fixture
def done(queue):
    handle = queue.submit("words", id="a/b c")
    with queue:
        handle.result(PATIENCE)
    return handle.id


def parsed(data):
    """Return server-sent events, each as a dict of its fields."""
    found = []
    for block in data.decode().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if ": " in line)
        if "data" in fields:
            found.append({**fields, "data": json.loads(fields["data"])})
    return found


END = {"event": "end", "data": {"status": "completed"}}


def test_the_dashboard_sends_what_follows_a_position(look, queue, done):
    browser = look(queue)
    answer = browser.get("/tasks/a/b%20c/stream")
    assert answer.content_type == "text/event-stream; charset=utf-8"
    second = {"id": "1-2", "data": {"value": {"token": "***", "n": 2}, "restart": False}}
    assert parsed(answer.data) == [
        {"id": "1-1", "data": {"value": "one\ntwo", "restart": False}},
        second,
        END,
    ]
    again = browser.get("/tasks/a/b%20c/stream", headers={"Last-Event-ID": "1-1"})
    assert parsed(again.data) == [second, END]
    assert parsed(browser.get("/tasks/a/b%20c/stream?after=1-2").data) == [END]
    assert "/tasks/a/b%20c/stream" in browser.get("/task?id=a/b%20c").text


def test_the_dashboard_refuses_others(look, queue, done):
    assert look(queue).get("/tasks/unknown/stream").status_code == 404
    assert look(queue).get("/tasks/a/b%20c/stream?after=x").status_code == 400
    reader = look(queue, permissions={"read"} & {*PERMISSIONS})
    assert reader.get("/tasks/a/b%20c/stream").status_code == 403
    assert "data-stream" not in reader.get("/task?id=a/b%20c").text


def test_there_are_so_many_connections(look, queue, done, monkeypatch):
    monkeypatch.setattr(streams, "MOST_EVENTS", 2)
    open_ones = [events(queue, done) for _ in range(2)]
    refused = events(queue, done)
    assert (refused.status, refused.headers["Retry-After"]) == (503, "5")
    assert look(queue).get("/tasks/a/b%20c/stream").status_code == 503
    open_ones[0].body.close()
    assert events(queue, done).status == 200
    # Those that a server has forgotten to close count no more after their time.
    monkeypatch.setattr(streams.time, "monotonic", lambda now=streams.time.monotonic: now() + 40)
    assert [events(queue, done).status for _ in range(3)] == [200, 200, 503]
    streams.Events._sent.clear()


def test_events_end_before_the_task_does(look, queue):
    waits = queue.submit("words")
    browser = look(queue)
    alone = browser.get(f"/tasks/{waits.id}/stream", environ_overrides={"wsgi.multithread": False})
    assert alone.data == b"retry: 1000\n\n"
    answer = events(queue, waits.id)
    answer.body._until = 0
    assert b"".join(answer.body) == b"retry: 1000\n\n"
    assert not streams.Events._sent


def test_programs_send_them_as_responses(queue, done):
    response = Response(*events(queue, done, "1-1"))  # as in Flask
    assert [event.get("id") for event in parsed(response.data)] == ["1-2", None]
    assert events(queue, "unknown").status == 404
    assert events(queue, done, "x").status == 400
    with pytest.raises(ConfigurationError, match="requires a Queue, not str"):
        events("queue", done)

    async def collect():  # as in Starlette
        return b"".join([part async for part in events(queue, done).body])

    assert [event.get("id") for event in parsed(asyncio.run(collect()))] == ["1-1", "1-2", None]


def test_the_last_event_names_the_outcome(queue):
    failed, cancelled = queue.submit("words", {"fails": True}), queue.submit("words", delay=60)
    cancelled.cancel()
    with queue:
        failed.exception(PATIENCE)
    statuses = [
        parsed(b"".join(events(queue, handle.id).body))[-1] for handle in (failed, cancelled)
    ]
    assert [event["data"]["status"] for event in statuses] == ["failed", "cancelled"]
