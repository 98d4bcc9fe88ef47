"""Middleware wraps the calls of executors, and affects a task only through its outcome."""

from __future__ import annotations

import threading
from functools import partial

import pytest
from helpers import PATIENCE

from executing.test_outcomes import ERRORS
from taskx import (
    CancelReason,
    ConfigurationError,
    MemoryRepository,
    Middleware,
    Permanent,
    Queue,
    Snooze,
    TaskExecutor,
    TaskFailed,
    TaskStatus,
)
from taskx.core.options import Options
from taskx.executing.executors import make_executor
from taskx.executing.registry import Registry


class Notes(Middleware):
    """Middleware that notes in a shared list when it is entered and left."""

    def __init__(self, name, notes):
        self.name = name
        self.notes = notes

    def __call__(self, ctx, task, call_next):
        self.notes.append((self.name, "enters", task.id, threading.current_thread().name))
        try:
            return call_next()
        finally:
            self.notes.append((self.name, "leaves", task.id, threading.current_thread().name))


@pytest.mark.every_store
def test_middleware_runs_in_the_workers_thread_and_the_first_is_outermost(make_queue):
    notes = []
    layers = [Notes("outer", notes), Notes("inner", notes)]
    queue = make_queue(worker_num=1, middleware=layers)
    queue.executor("add")(lambda a, b: notes.append(("executor",)) or a + b)
    queue.start()
    assert queue.submit("add", {"a": 1, "b": 2}, id="x").result(PATIENCE) == 3
    worker = "taskx-worker-1"
    assert notes == [
        ("outer", "enters", "x", worker),
        ("inner", "enters", "x", worker),
        ("executor",),
        ("inner", "leaves", "x", worker),
        ("outer", "leaves", "x", worker),
    ]


def started(make_queue, *layers, **options):
    """Return a started queue that runs ``fine`` inside these layers."""
    queue = make_queue(worker_num=1, middleware=layers, **options)
    queue.ran = []
    queue.executor("fine")(lambda: queue.ran.append(1) or "fine")
    queue.start()
    return queue


def test_middleware_can_be_a_function_and_its_return_value_is_the_result(make_queue):
    queue = started(make_queue, lambda ctx, task, call_next: [task.type, call_next()])
    assert queue.submit("fine").result(PATIENCE) == ["fine", "fine"]


def test_the_base_class_changes_nothing(make_queue):
    queue = started(make_queue, Middleware())
    assert queue.submit("fine").result(PATIENCE) == "fine"


def test_middleware_gets_the_context_and_task_of_the_run(make_queue):
    seen = []

    def layer(ctx, task, call_next):
        ctx.progress(30, "on the way")
        seen.append((task is ctx.task, task.status, task.attempt, task.params))
        return call_next()

    class Classic(TaskExecutor):
        type = "classic"

        def execute(self, ctx, task):
            seen.append(task is ctx.task)
            task.result = "kept"

    queue = started(make_queue, layer)
    queue.register_executor(Classic())
    handle = queue.submit("classic", {"a": 1})
    assert handle.result(PATIENCE) == "kept"
    assert handle.task().message == "on the way"
    assert seen == [(True, TaskStatus.RUNNING, 1, {"a": 1}), True]


@pytest.mark.parametrize("case", ["exception", "exit", "interrupt", "base", "no attributes"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_error_of_middleware_counts_as_the_executors_error(make_queue, case, when):
    error, text = ERRORS[case]

    def layer(ctx, task, call_next):
        if when == "before":
            raise error
        call_next()
        raise error

    queue = started(make_queue, layer)
    handle = queue.submit("fine", max_attempts=2)
    with pytest.raises(TaskFailed):
        handle.result(PATIENCE)
    task = handle.task()
    assert (task.error, task.errors, task.status) == (text, 2, TaskStatus.FAILED)
    assert [attempt.outcome for attempt in task.attempts] == ["retried", "failed"]
    assert queue.ran == [1, 1] * (when == "after")


def test_middleware_can_raise_snooze_and_permanent(make_queue):
    def layer(ctx, task, call_next):
        if task.snoozes == 0:
            raise Snooze(0)
        raise Permanent("no use")

    queue = started(make_queue, layer)
    handle = queue.submit("fine", max_attempts=5)
    with pytest.raises(TaskFailed, match="no use"):
        handle.result(PATIENCE)
    assert (handle.task().snoozes, handle.task().errors, queue.ran) == (1, 1, [])


def test_middleware_can_replace_an_error_with_a_result(make_queue):
    seen = []

    def layer(ctx, task, call_next):
        try:
            return call_next()
        except KeyError as error:
            seen.append(error)
            return "mended"

    queue = started(make_queue, layer)
    queue.executor("bad")(lambda: {}["x"])
    assert queue.submit("bad").result(PATIENCE) == "mended"
    assert len(seen) == 1


def test_a_middleware_result_that_is_not_json_fails_the_task(make_queue):
    queue = started(make_queue, lambda ctx, task, call_next: object())
    with pytest.raises(TaskFailed, match="result"):
        queue.submit("fine").result(PATIENCE)


def test_a_cancel_passes_through_middleware(make_queue):
    begun, reasons = threading.Event(), []

    def layer(ctx, task, call_next):
        try:
            return call_next()
        finally:
            reasons.append(ctx.token.reason)

    queue = started(make_queue, layer)

    @queue.executor()
    def listen(ctx):
        begun.set()
        ctx.sleep(60)

    handle = queue.submit("listen")
    assert begun.wait(PATIENCE)
    handle.cancel()
    assert queue.drain(PATIENCE)
    assert handle.task().status is TaskStatus.CANCELLED
    assert reasons == [CancelReason.CANCEL]


def test_middleware_is_skipped_when_the_function_is_called_directly(make_queue):
    queue = started(make_queue, lambda ctx, task, call_next: "wrapped")
    add = queue.executor("add")(lambda a, b: a + b)
    assert add(1, 2) == 3
    assert add.submit(a=1, b=2).result(PATIENCE) == "wrapped"


def test_without_middleware_the_executor_is_called_directly():
    registry = Registry()
    made = make_executor(lambda: None, "t", Options())
    registry.register(made, Options())
    assert registry.get("t").function is made.function


@pytest.mark.parametrize("wrong", [object(), Middleware, None, "text"])
def test_an_object_that_cannot_be_middleware_is_refused(wrong):
    with pytest.raises(ConfigurationError, match="middleware"):
        Queue(MemoryRepository(), middleware=[wrong])


async def coroutine(ctx, task, call_next):
    return call_next()


def generator(ctx, task, call_next):
    yield call_next()


class Async(Middleware):
    async def __call__(self, ctx, task, call_next):
        return call_next()


class Stream(Middleware):
    async def __call__(self, ctx, task, call_next):
        yield call_next()


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        (coroutine, "is async"),
        (partial(coroutine), "is async"),
        (Async(), "is async"),
        (Stream(), "is async"),
        (generator, "is a generator"),
    ],
)
def test_async_and_generator_middleware_is_refused(wrong, problem):
    """A call would only create a coroutine or a generator, and never run the executor."""
    with pytest.raises(ConfigurationError, match=rf"middleware .* {problem}"):
        Queue(MemoryRepository(), middleware=[wrong])
