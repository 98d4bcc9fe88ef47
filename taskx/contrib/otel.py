"""Tracing with OpenTelemetry: spans for submits and for attempts, linked across processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import attrs

import taskx
from taskx import (
    Attempt,
    BatchContext,
    ConfigurationError,
    Context,
    Middleware,
    Parked,
    Retry,
    Snooze,
    Task,
    TaskCancelled,
)

try:
    from opentelemetry import trace
    from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode, TracerProvider
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError:
    raise ConfigurationError(
        "taskx.contrib.otel needs opentelemetry-api: pip install 'taskx-queue[otel]'"
    ) from None

__all__ = ["TRACE_TAG", "Tracing"]

#: The tag with the trace of a task is this, and a ``traceparent`` as the W3C defines it
#: (https://www.w3.org/TR/trace-context/).
TRACE_TAG = "trace:"

# Names: https://opentelemetry.io/docs/specs/semconv/messaging/messaging-spans/
_ID, _COUNT, _ERROR = "messaging.message.id", "messaging.batch.message_count", "error.type"
_ATTEMPT = "taskx.task.attempt"

# Most tags of a task: a task that has so many already gets no trace.
_MOST_TAGS = 20
_traceparent = TraceContextTextMapPropagator()


class Tracing(Middleware):
    """Middleware that makes spans: ``Queue(..., middleware=[Tracing()])``.

    Each submit has a span of the kind PRODUCER, named ``send`` and the type. Each attempt has one of the
    kind CONSUMER, named ``process`` and the type, which is current while the executor runs. It has an event
    for each attempt before it. A tag of the task carries the trace from the one to the other. A task that
    has 20 tags already has no room for it, and begins a trace of its own; so does a task of a schedule.
    A call for many tasks (``batch``) has one span, with a link to each of their submits.

    Args:
        tracer_provider: makes the spans; by default the global one.
        same_trace: True: an attempt belongs to the trace of its submit. False: it begins its own trace. Its
            span has a link to the span of the submit in both cases.
    """

    def __init__(
        self, tracer_provider: TracerProvider | None = None, *, same_trace: bool = True
    ) -> None:
        self._tracer = trace.get_tracer("taskx", taskx.__version__, tracer_provider)
        self._same_trace = same_trace

    def submit(
        self, tasks: Sequence[Task], call_next: Callable[[Sequence[Task]], Sequence[str]]
    ) -> Sequence[str]:
        """Store tasks inside a span, and give them its trace."""
        types = {task.type for task in tasks}
        name, facts = _named("send", types.pop() if len(types) == 1 else "")
        if len(tasks) != 1:
            facts[_COUNT] = len(tasks)
        with self._span(name, kind=SpanKind.PRODUCER, attributes=facts) as span:
            ids = call_next([_traced(task) for task in tasks])
            if len(ids) == 1:
                span.set_attribute(_ID, ids[0])
            return ids

    def __call__(self, ctx: Context, task: Task, call_next: Callable[[], Any]) -> Any:
        """Run an attempt inside a span."""
        tasks = [one.task for one in ctx.each] if isinstance(ctx, BatchContext) else [task]
        name, facts = _named("process", task.type)
        facts |= {_ID: task.id, _ATTEMPT: task.attempt} if len(tasks) == 1 else {_COUNT: len(tasks)}
        context = trace.set_span_in_context(trace.INVALID_SPAN)
        submits: dict[int, Span] = {}
        for one in tasks:
            span = trace.get_current_span(_traceparent.extract(_carrier(one), context))
            if (known := span.get_span_context()).is_valid:
                submits[known.span_id] = span
        if self._same_trace and len(submits) == 1:
            (submit,) = submits.values()
            context = trace.set_span_in_context(submit, context)
        with self._span(
            name,
            context=context,
            kind=SpanKind.CONSUMER,
            attributes=facts,
            links=[Link(submit.get_span_context()) for submit in submits.values()],
        ) as span:
            for number, attempt in enumerate(task.earlier_attempts if len(tasks) == 1 else (), 1):
                span.add_event("attempt", _told(number, attempt))
            return call_next()

    @contextmanager
    def _span(self, name: str, **facts: Any) -> Iterator[Span]:
        """Make a span current inside the block, with the error that ends the block."""
        with self._tracer.start_as_current_span(
            name, record_exception=False, set_status_on_exception=False, **facts
        ) as span:
            try:
                yield span
            # The `str` of an error may raise, which must not change how the attempt ends.
            except (Parked, Retry, Snooze, TaskCancelled) as asked:
                with suppress(Exception):
                    span.add_event(type(asked).__name__.lower(), {"message": str(asked)})
                raise
            except BaseException as error:
                span.set_attribute(_ERROR, type(error).__qualname__)
                span.set_status(StatusCode.ERROR)
                with suppress(Exception):
                    span.set_status(Status(StatusCode.ERROR, str(error)))
                    span.record_exception(error)
                raise


def _named(operation: str, type: str) -> tuple[str, dict[str, Any]]:
    """Return the name of a span and its attributes."""
    facts = {
        "messaging.system": "taskx",
        "messaging.operation.name": operation,
        "messaging.operation.type": operation,
    }
    if not type:
        return operation, facts
    return f"{operation} {type}", {**facts, "messaging.destination.name": type}


def _told(number: int, attempt: Attempt) -> dict[str, str | int]:
    """Return the facts about an earlier attempt."""
    told: dict[str, str | int] = {_ATTEMPT: number, "taskx.outcome": attempt.outcome}
    if attempt.error:
        told |= {"exception.type": attempt.error_type, "exception.message": attempt.error}
    if attempt.ended_at is not None:
        told["taskx.ended_at"] = attempt.ended_at.isoformat()
    return told


def _traced(task: Task) -> Task:
    """Return a copy of a task with the current trace; the task itself if there is none, or no room."""
    carrier: dict[str, str] = {}
    _traceparent.inject(carrier)
    tags = [tag for tag in task.tags if not tag.startswith(TRACE_TAG)]
    if not carrier or len(tags) >= _MOST_TAGS:
        return task
    return attrs.evolve(task, tags=[*tags, TRACE_TAG + carrier["traceparent"]])


def _carrier(task: Task) -> dict[str, str]:
    """Return the trace of a task in the form of W3C headers; empty if it has none."""
    found = [tag for tag in task.tags if tag.startswith(TRACE_TAG)]
    return {"traceparent": found[0].removeprefix(TRACE_TAG)} if found else {}
