"""Spans of submits and attempts, linked across threads and processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import PATIENCE, eventually
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from taskx import (
    Permanent,
    Queue,
    Retry,
    RetryPolicy,
    Snooze,
    SQLiteRepository,
    Task,
    TaskStatus,
    every,
)
from taskx.contrib.otel import TRACE_TAG, Tracing
from taskx.tasks.tags import without_trace
from taskx.testing import ManualQueue

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def spans():
    """An exporter that keeps the finished spans."""
    return InMemorySpanExporter()


@pytest.fixture
def provider(spans):
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    return provider


@pytest.fixture
def make(make_queue, provider):
    """Return a function that makes a queue with one worker and tracing."""

    def make(**options):
        queue = make_queue(worker_num=1, middleware=[Tracing(provider, **options)])
        queue.executor("add")(lambda a=0, b=0: a + b)
        return queue

    return make


@pytest.fixture
def named(spans):
    """Return a function that returns the spans with a name, in the order of their ends."""
    return lambda name: [span for span in spans.get_finished_spans() if span.name == name]


def test_an_attempt_belongs_to_the_trace_of_its_submit(make, named, provider):
    queue = make()
    queue.start()
    with provider.get_tracer("app").start_as_current_span("request"):
        handle = queue.submit("add", {"a": 1, "b": 2})
    assert handle.result(PATIENCE) == 3
    assert queue.drain(PATIENCE)
    ([request], [send], [process]) = map(named, ("request", "send add", "process add"))
    assert (send.kind, process.kind) == (SpanKind.PRODUCER, SpanKind.CONSUMER)
    assert send.parent.span_id == request.context.span_id
    assert process.parent.span_id == send.context.span_id
    assert process.context.trace_id == send.context.trace_id == request.context.trace_id
    assert [link.context.span_id for link in process.links] == [send.context.span_id]
    shared = {"messaging.system": "taskx", "messaging.destination.name": "add"}
    shared["messaging.message.id"] = handle.id
    operation = "messaging.operation.name", "messaging.operation.type"
    assert send.attributes == {**shared, **dict.fromkeys(operation, "send")}
    assert process.attributes == {
        **shared,
        **dict.fromkeys(operation, "process"),
        "taskx.task.attempt": 1,
    }
    assert {span.status.status_code for span in (send, process)} == {StatusCode.UNSET}


def test_lists_of_tasks_leave_out_the_tag_of_the_trace(make):
    queue = make()
    task = queue.submit("add", tags=["mine"]).task()
    assert len(task.tags) == 2
    assert without_trace(task.tags) == ["mine"]


def test_an_attempt_can_have_a_trace_of_its_own_with_a_link(make, named):
    queue = make(same_trace=False)
    queue.start()
    queue.submit("add").result(PATIENCE)
    assert queue.drain(PATIENCE)
    ([send], [process]) = map(named, ("send add", "process add"))
    assert process.parent is None
    assert process.context.trace_id != send.context.trace_id
    assert [link.context.trace_id for link in process.links] == [send.context.trace_id]


def test_a_task_that_an_executor_submits_is_in_the_same_trace(make, named):
    queue = make()
    queue.executor("outer")(lambda: queue.submit("add").id)
    queue.start()
    queue.submit("outer")
    assert queue.drain(PATIENCE)
    [outer], [inner] = named("process outer"), named("send add")
    assert inner.parent.span_id == outer.context.span_id
    assert len({span.context.trace_id for span in (outer, inner, *named("process add"))}) == 1


def test_many_tasks_have_one_span_of_their_submit(make, named):
    queue = make()
    queue.declare("other")
    queue.submit_many([Task(type="add"), Task(type="add")])
    queue.submit_many([Task(type="add"), Task(type="other"), Task(type="other")])
    assert [s.attributes["messaging.batch.message_count"] for s in named("send add")] == [2]
    [mixed] = named("send")
    assert mixed.attributes["messaging.batch.message_count"] == 3
    assert "messaging.destination.name" not in mixed.attributes
    queue.start()
    assert queue.stop(PATIENCE) == []
    parents = {span.parent.span_id for span in named("process add")}
    assert parents <= {span.context.span_id for span in (*named("send add"), mixed)}


def test_a_call_for_many_tasks_has_a_link_to_each_of_their_submits(provider, named):
    queue = ManualQueue(middleware=[Tracing(provider)])
    queue.executor("many", batch=3)(lambda tasks: [1 for _ in tasks])
    for _ in range(3):
        queue.submit("many", {"n": 1})
    queue.submit_many([Task(type="many", params={"n": 2}) for _ in range(3)])
    queue.run_all()
    *alone, together = named("send many")
    first, second = named("process many")
    assert first.parent is None
    assert {link.context.span_id for link in first.links} == {s.context.span_id for s in alone}
    assert second.parent.span_id == together.context.span_id
    assert [link.context.span_id for link in second.links] == [together.context.span_id]
    for span in (first, second):
        assert span.attributes["messaging.batch.message_count"] == 3
        assert "messaging.message.id" not in span.attributes


def test_each_attempt_tells_of_those_before(make, named):
    queue = make()
    endings = [Retry("busy", delay=0), ValueError("bad"), None]

    @queue.executor("flaky", max_attempts=3, retry=RetryPolicy(base=0))
    def flaky():
        if (ending := endings.pop(0)) is not None:
            raise ending

    queue.start()
    handle = queue.submit("flaky")
    handle.result(PATIENCE)
    assert queue.drain(PATIENCE)
    first, second, third = named("process flaky")
    assert [span.attributes["taskx.task.attempt"] for span in (first, second, third)] == [1, 2, 3]
    assert [event.name for event in first.events] == ["retry"]
    assert first.status.status_code is StatusCode.UNSET
    assert [event.name for event in second.events] == ["attempt", "exception"]
    assert second.attributes["error.type"] == "ValueError"
    assert (second.status.status_code, second.status.description) == (StatusCode.ERROR, "bad")
    before = [dict(event.attributes) for event in third.events]
    assert [event.pop("taskx.ended_at")[:4].isdigit() for event in before] == [True, True]
    assert [event["taskx.outcome"] for event in before] == ["retried", "retried"]
    assert before[1]["exception.type"] == "ValueError"
    assert before[1]["exception.message"] == "ValueError: bad"


def test_a_snooze_and_a_cancel_are_events_and_no_errors(make, named):
    queue = make()
    queue.executor("later")(lambda: (_ for _ in ()).throw(Snooze(3600)))

    @queue.executor("stops")
    def stops(ctx):
        queue.cancel_task(ctx.task.id)
        ctx.token.raise_if_cancelled()

    queue.start()
    queue.submit("later")
    queue.submit("stops")
    eventually(lambda: named("process later") and named("process stops"))
    [later], [cancelled] = named("process later"), named("process stops")
    assert [event.name for event in later.events] == ["snooze"]
    assert [event.name for event in cancelled.events] == ["taskcancelled"]
    assert {span.status.status_code for span in (later, cancelled)} == {StatusCode.UNSET}


def test_a_wait_without_a_thread_is_an_event_and_no_error(make, named):
    queue = make()
    queue.executor("ask")(lambda ctx: ctx.ask("one"))
    queue.start()
    handle = queue.submit("ask")
    eventually(lambda: queue.list_tasks(type="answer").tasks)
    queue.finish(f"{handle.id}/one", 1)
    handle.result(PATIENCE)
    eventually(lambda: len(named("process ask")) == 2)
    waited, ended = named("process ask")
    assert [event.name for event in waited.events] == ["parked"]
    assert {span.status.status_code for span in (waited, ended)} == {StatusCode.UNSET}


def test_a_failed_attempt_has_its_exception(make, named):
    queue = make()

    @queue.executor("bad")
    def bad():
        raise Permanent("never")

    queue.start()
    assert queue.submit("bad").exception(PATIENCE) is not None
    assert queue.drain(PATIENCE)
    [span] = named("process bad")
    assert span.status.status_code is StatusCode.ERROR
    [event] = span.events
    assert event.attributes["exception.message"] == "never"


@pytest.mark.parametrize(
    ("kind", "status"), [(ValueError, StatusCode.ERROR), (Retry, StatusCode.UNSET)]
)
def test_an_error_whose_text_cannot_be_read_stays_the_error_of_the_task(make, named, kind, status):
    class Wordless(kind):
        def __str__(self):
            raise RuntimeError("no text")

    queue = make()

    @queue.executor("bad", max_attempts=1)
    def bad():
        raise Wordless(1)

    queue.start()
    handle = queue.submit("bad")
    assert handle.exception(PATIENCE) is not None
    assert queue.drain(PATIENCE)
    assert handle.task().error_type.endswith("Wordless")
    [span] = named("process bad")
    assert span.status.status_code is status


def test_a_refused_submit_has_its_error(make_queue, provider, named):
    queue = make_queue(middleware=[Tracing(provider)])
    queue.declare("t")
    queue.submit("t", id="a")
    with pytest.raises(Exception, match="exists"):
        queue.submit("t", id="a")
    _, refused = named("send t")
    assert refused.attributes["error.type"] == "DuplicateTask"
    assert refused.status.status_code is StatusCode.ERROR


def test_the_trace_is_a_tag_beside_those_of_the_caller(make, named):
    queue = make()
    given = Task(type="add", tags=["nightly"])
    task = queue.submit(given).task()
    [send] = named("send add")
    context = send.context
    ids = f"{context.trace_id:032x}-{context.span_id:016x}"
    mark = f"{TRACE_TAG}00-{ids}-{context.trace_flags:02x}"
    assert task.tags == ("nightly", mark)
    assert tuple(given.tags) == ("nightly",)
    again = queue.submit(Task(type="add", tags=task.tags)).task()
    assert len(again.tags) == 2
    assert again.tags[1] != mark
    full = [f"t{n}" for n in range(20)]
    assert list(queue.submit("add", tags=full).task().tags) == full
    assert [task.id for task in queue.list_tasks(tag=mark).tasks] == [task.id]


def test_a_task_without_a_trace_begins_one(make, named, clock):
    queue = make()
    queue.schedule("often", every(60), "add").trigger()
    queue.submit("add", tags=[f"t{n}" for n in range(20)])
    queue.submit("add", tags=[f"{TRACE_TAG}nonsense"], id="nonsense")
    queue.start()
    assert queue.drain(PATIENCE)
    spans = named("process add")
    assert [span.parent for span in spans[:2]] == [None, None]
    assert queue.get_task_status("nonsense").status is TaskStatus.COMPLETED


def test_without_an_sdk_nothing_is_stored(make_queue):
    queue = make_queue(middleware=[Tracing(trace.NoOpTracerProvider())])
    queue.executor("add")(lambda: None)
    queue.start()
    handle = queue.submit("add")
    handle.result(PATIENCE)
    assert handle.task().tags == ()


PROGRAM = """
import sys
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor
from taskx import Queue, SQLiteRepository
from taskx.contrib.otel import Tracing

provider = TracerProvider()
form = lambda span: f"{span.name} {span.context.trace_id:032x} {span.parent.span_id:016x}\\n"
provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter(formatter=form)))
with Queue(SQLiteRepository(sys.argv[1]), middleware=[Tracing(provider)]) as queue:
    queue.executor("add")(lambda: None)
    queue.drain(60)
"""


@pytest.mark.process
def test_another_process_goes_on_with_the_trace(tmp_path, provider, named):
    path = tmp_path / "tasks.db"
    queue = Queue(SQLiteRepository(path), middleware=[Tracing(provider)])
    queue.declare("add")
    queue.submit("add")
    queue.close()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, str(path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    [send] = named("send add")
    expected = f"process add {send.context.trace_id:032x} {send.context.span_id:016x}\n"
    assert ran.stdout == expected
