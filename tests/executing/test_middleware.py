"""Middleware wraps the calls of executors, and affects a task only through its outcome."""

from __future__ import annotations

import threading
from functools import partial

import attrs
import pytest
from helpers import PATIENCE

from executing.test_outcomes import ERRORS
from taskx import (
    CancelReason,
    ConfigurationError,
    DuplicateTask,
    MemoryRepository,
    Middleware,
    Permanent,
    Queue,
    Snooze,
    Task,
    TaskExecutor,
    TaskFailed,
    TaskStatus,
    chain,
)
from taskx.attempt.executors import make_executor
from taskx.attempt.registry import Registry
from taskx.tasks.options import Options
from taskx.testing import manual


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


class AsyncSubmit(Middleware):
    async def submit(self, tasks, call_next):
        return call_next(tasks)


class AsyncEnd(Middleware):
    async def worker_ended(self):
        pass


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        (coroutine, "is async"),
        (partial(coroutine), "is async"),
        (Async(), "is async"),
        (Stream(), "is an asynchronous generator"),
        (generator, "is a generator"),
        (AsyncSubmit(), "is async"),
        (AsyncEnd(), "is async"),
    ],
)
def test_async_and_generator_middleware_is_refused(wrong, problem):
    """A call would only create a coroutine or a generator, and never run its body."""
    with pytest.raises(ConfigurationError, match=rf"middleware .* {problem}"):
        Queue(MemoryRepository(), middleware=[wrong])


class Signing(Middleware):
    """Middleware that notes the types of each submit, and writes its name into ``created_by``."""

    def __init__(self, name, notes):
        self.name = name
        self.notes = notes

    def submit(self, tasks, call_next):
        self.notes.append((self.name, [task.type for task in tasks]))
        signed = [attrs.evolve(t, created_by=f"{t.created_by}{self.name}") for t in tasks]
        ids = call_next(signed)
        self.notes.append((self.name, len(ids)))
        return ids


@pytest.fixture
def signing(make_queue):
    """A queue with two layers around its submits, and what they note."""
    notes = []
    queue = make_queue(middleware=[Signing("a", notes), Signing("b", notes)])
    queue.executor("t")(lambda n=0: n)
    return queue, notes


@pytest.mark.every_store
def test_middleware_can_change_the_tasks_of_every_submit(signing):
    queue, notes = signing
    given = Task(type="t", created_by="me, ")
    alone = queue.submit(given)
    many = queue.submit_many([Task(type="t"), Task(type="t")])
    queue.submit_flow(chain(Task(type="t"), Task(type="t")))
    assert [handle.task().created_by for handle in (alone, *many)] == ["me, ab", "ab", "ab"]
    assert queue.count_tasks(created_by="ab") == 4
    assert given.created_by == "me, "
    assert notes[:4] == [("a", ["t"]), ("b", ["t"]), ("b", 1), ("a", 1)]
    assert notes[4:8] == [("a", ["t", "t"]), ("b", ["t", "t"]), ("b", 2), ("a", 2)]
    queue.start()
    assert [*queue.map("t", [{"n": 1}, {"n": 2}])] == [1, 2]
    assert queue.count_tasks(created_by="ab") == 6
    assert queue.count_tasks(created_by="me, ab") == 1


def test_an_exception_of_middleware_refuses_the_submit(make_queue):
    class Closed(Middleware):
        def submit(self, tasks, call_next):
            raise PermissionError("closed")

    queue = make_queue(middleware=[Closed()])
    queue.executor("t")(lambda: None)
    for call in (lambda: queue.submit("t"), lambda: queue.submit_many([Task(type="t")])):
        with pytest.raises(PermissionError, match="closed"):
            call()
    assert queue.count_tasks() == 0


def test_middleware_sees_the_error_and_the_options_of_a_submit(signing):
    queue, notes = signing
    first = queue.submit("t", unique_key="u")
    with pytest.raises(DuplicateTask):
        queue.submit("t", unique_key="u")
    assert notes[-2:] == [("a", ["t"]), ("b", ["t"])]
    assert queue.submit("t", unique_key="u", on_conflict="return").id == first.id


def test_a_queue_without_such_middleware_has_none_of_it_in_the_way(make_queue):
    queue = make_queue(middleware=[Notes("n", [])])
    assert queue._entrance is queue._intake


def test_a_driven_queue_has_the_middleware_of_its_queue(signing):
    queue, notes = signing
    with manual(queue) as driven:
        driven.submit("t")
        assert notes
        assert driven.run_all()


class Connections(Middleware):
    """Middleware that keeps something for each worker, and fails when it closes the one of worker 1."""

    def __init__(self):
        self.closed = []

    def worker_ended(self):
        self.closed.append(threading.current_thread().name)
        if self.closed[-1] == "taskx-worker-1":
            raise RuntimeError("cannot close")


def test_each_worker_that_ends_tells_middleware_so_on_its_own_thread(make_queue, caplog):
    layer = Connections()
    queue = make_queue(worker_num=2, middleware=[layer, lambda ctx, task, call_next: call_next()])
    queue.executor("add")(lambda a, b: a + b)
    queue.start()
    assert queue.submit("add", {"a": 1, "b": 2}).result(PATIENCE) == 3
    assert layer.closed == []
    assert queue.stop() == []
    assert sorted(layer.closed) == ["taskx-worker-1", "taskx-worker-2"]
    assert "cannot close" in caplog.text
