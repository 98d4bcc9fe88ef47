"""The backend for ``TASKS`` behaves as Django's own backends do; the tasks run on threads of TaskX."""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import os
import pickle
import re
import sys
import threading
import traceback
from collections import defaultdict
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import django_project
import pytest
from asgiref.sync import async_to_sync
from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.test.utils import (
    override_settings,
    setup_test_environment,
    teardown_test_environment,
)
from django.utils import timezone as django_timezone
from django.utils import translation
from helpers import PATIENCE, eventually
from shop import tasks

from taskx import (
    DuplicateTask,
    MemoryRepository,
    PayloadError,
    Queue,
    TaskCancelled,
    TaskStatus,
    every,
)
from taskx.contrib.django import TaskxBackend, get_queue, load_queue
from taskx.contrib.django import task as taskx_task
from taskx.contrib.django.compat import (
    InvalidTask,
    TaskResultDoesNotExist,
    TaskResultStatus,
    task_backends,
    task_enqueued,
    task_finished,
    task_started,
)
from taskx.tasks.clock import SystemClock

READY, RUNNING = TaskResultStatus.READY, TaskResultStatus.RUNNING
FAILED, SUCCESSFUL = TaskResultStatus.FAILED, TaskResultStatus.SUCCESSFUL


def entry(tmp_path: Any, **options: Any) -> dict[str, Any]:
    """Return an entry of ``TASKS`` with a file of its own."""
    return {
        "BACKEND": "taskx.contrib.django.TaskxBackend",
        "QUEUES": ["default", "mails"],
        "OPTIONS": {"repository": f"sqlite:///{tmp_path}/tasks.db", "workers": 2, **options},
    }


@pytest.fixture
def threads() -> int:
    """The number of worker threads, unless a test gives another one."""
    return 2


@pytest.fixture(params=["file", "database"])
def stored(request, tmp_path, threads) -> Iterator[TaskxBackend]:
    """The backend on a file of its own, and on a database of the site; nothing runs its tasks."""
    settings = entry(tmp_path, workers=threads)
    if request.param == "database":
        alias = settings["OPTIONS"]["database"] = f"backend {tmp_path}"
        del settings["OPTIONS"]["repository"]
        django_project.make_sqlite(tmp_path / "site.db", alias)
    with override_settings(TASKS={"default": settings}):
        yield task_backends["default"]


@pytest.fixture
def backend(stored, monkeypatch) -> TaskxBackend:
    """The backend, with a started queue. Its tasks wait for their signal as long as the tests would."""
    monkeypatch.setattr("taskx.contrib.django.running._PATIENCE", PATIENCE)
    tasks.notes.clear()
    tasks.gate.clear()
    stored.queue.start()
    return stored


def ended(result: Any) -> Any:
    """Wait until the task has ended; return its result, read again."""
    eventually(result.taskx.done)
    result.refresh()
    return result


# --- running


@pytest.mark.parametrize("task", [tasks.add, tasks.add_async], ids=["def", "async def"])
def test_a_task_runs_and_its_times_are_in_order(backend, task):
    result = task.enqueue(1, b=2)
    assert (result.args, result.kwargs, result.backend) == ([1], {"b": 2}, "default")
    assert result.task.func is task.func
    assert ended(result).status == SUCCESSFUL
    assert result.return_value == 3
    assert result.is_finished
    assert result.attempts == len(result.worker_ids) == 1
    assert result.errors == []
    assert result.enqueued_at <= result.started_at <= result.finished_at
    assert result.last_attempted_at == result.started_at
    assert len(result.id) < 64


@pytest.mark.parametrize("task", [tasks.add, tasks.add_async], ids=["def", "async def"])
def test_a_task_is_enqueued_and_read_by_async_code(backend, task):
    async def enqueue():
        result = await task.aenqueue(1, b=2)
        while not result.is_finished:
            await asyncio.sleep(0.01)
            await result.arefresh()
        return result, await task.aget_result(result.id)

    for result in asyncio.run(enqueue()):
        assert (result.status, result.return_value) == (SUCCESSFUL, 3)


def test_arguments_are_stored_as_json(backend):
    result = tasks.echo.enqueue((1, 2), b"bytes", key={"a": (3,)})
    assert (result.args, result.kwargs) == ([[1, 2], "bytes"], {"key": {"a": [3]}})
    assert ended(result).return_value == [[[1, 2], "bytes"], {"key": {"a": [3]}}]
    with pytest.raises(TypeError, match="Unsupported type"):
        tasks.echo.enqueue(object())


def test_a_task_that_has_not_ended_has_no_value(stored):
    result = tasks.add.enqueue(1)
    assert (result.status, result.attempts, result.errors) == (READY, 0, [])
    with pytest.raises(ValueError, match="has not finished"):
        _ = result.return_value


@pytest.mark.parametrize(
    ("task", "args", "kind", "text"),
    [
        (tasks.fail, ["no stock"], ValueError, "no stock"),
        (tasks.fail_async, ["no stock"], ValueError, "no stock"),
        (tasks.leave, [], SystemExit, "leaving"),
        (tasks.interrupt, [], KeyboardInterrupt, "interrupted"),
        (tasks.unserialisable, [], TypeError, "Unsupported type: <class '_thread.lock'>"),
    ],
)
def test_every_exception_makes_a_task_failed(backend, task, args, kind, text):
    result = ended(task.enqueue(*args))
    assert result.status == FAILED
    assert result.started_at <= result.finished_at
    (error,) = result.errors
    assert error.exception_class is kind
    assert error.traceback.startswith("Traceback (most recent call last):")
    assert error.traceback.rstrip().endswith(text)
    with pytest.raises(ValueError, match="Task failed"):
        _ = result.return_value


def test_a_task_that_takes_the_context_gets_its_result_and_the_context_of_taskx(backend):
    result = ended(tasks.attempt.enqueue("x"))
    assert result.return_value == [result.id, 1, "x"]
    record = result.taskx.task()
    assert (record.progress, record.message) == (100, "half")
    result = ended(tasks.attempt_async.enqueue())
    assert result.return_value == [result.id, 1]


def test_a_running_task_is_shown_as_running(backend):
    result = tasks.wait.enqueue()
    eventually(lambda: result.refresh() or result.status == RUNNING)
    assert result.attempts == 1
    assert result.started_at is not None
    assert result.finished_at is None
    tasks.gate.set()
    assert ended(result).return_value == "passed"


def test_a_task_waits_for_its_time(backend):
    later = datetime.now(timezone.utc) + timedelta(hours=1)
    result = tasks.add.using(run_after=later).enqueue(1)
    stored = later.replace(microsecond=later.microsecond // 1000 * 1000)
    assert result.task.run_after == result.taskx.task().run_at == stored
    assert [reason.kind for reason in result.taskx.why()] == ["due"]


def test_run_after_may_be_a_timedelta_from_the_enqueue(backend):
    soon = tasks.add.using(run_after=timedelta(milliseconds=300))
    assert soon.run_after == timedelta(milliseconds=300)
    before = datetime.now(timezone.utc)
    result = soon.enqueue(1)
    assert result.task.run_after - before > timedelta(
        milliseconds=299
    )  # whole milliseconds are stored
    assert ended(result).started_at >= result.task.run_after


@pytest.mark.parametrize("threads", [1])  # of two, the second one may start its task first
def test_tasks_with_a_higher_priority_run_first(stored):
    results = [tasks.echo.using(priority=p).enqueue(p) for p in (-100, 0, 100)]
    assert [r.task.priority for r in results] == [-100, 0, 100]
    stored.queue.start()
    started = [ended(result).started_at for result in results]
    assert started[2] <= started[1] <= started[0]
    assert tasks.echo.get_result(results[2].id).task.priority == 100


# --- results


def test_a_result_is_found_by_its_id_and_only_by_its_own_task(stored):
    result = tasks.add.using(queue_name="mails", priority=3).enqueue(1, b=2)
    found = tasks.add.get_result(result.id)
    assert found == stored.get_result(result.id)
    assert (found.id, found.args, found.kwargs) == (result.id, [1], {"b": 2})
    assert (found.task.queue_name, found.task.priority) == ("mails", 3)
    assert found.task.func is tasks.add.func
    with pytest.raises(Exception, match="Task does not match"):
        tasks.echo.get_result(result.id)


def test_a_result_that_is_not_there_does_not_exist(stored):
    with pytest.raises(TaskResultDoesNotExist, match="missing"):
        stored.get_result("missing")
    with pytest.raises(TaskResultDoesNotExist, match="missing"):
        asyncio.run(stored.aget_result("missing"))
    for type, why in {
        "report": "report doesn't look like a module path",
        "shop.tasks.gone": 'Module "shop.tasks" does not define a "gone"',
        "shop.tasks.gate": "'shop.tasks.gate' is not a task of Django",
    }.items():
        stored.queue.declare(type)
        with pytest.raises(TaskResultDoesNotExist, match=why):
            stored.get_result(stored.queue.submit(type).id)


def test_refresh_reads_the_state_of_now(backend):
    result = tasks.add.enqueue(2)
    assert result.status == READY
    result.taskx.result(PATIENCE)
    assert result.status == READY
    result.refresh()
    assert (result.status, result.return_value) == (SUCCESSFUL, 2)
    other = tasks.add.get_result(result.id)
    asyncio.run(other.arefresh())
    assert other == result


def test_tasks_and_results_pickle(backend):
    task = tasks.fail_twice.using(priority=7, queue_name="mails", tags=["a"])
    assert pickle.loads(pickle.dumps(task)) == task
    result = ended(task.enqueue("key"))
    copy = pickle.loads(pickle.dumps(result))
    assert copy == result
    assert copy.return_value == "key"
    assert copy.taskx.id == result.id


# --- signals and the log


class Told:
    """Receives the signals of tasks: for each its name, the sender, the result, and the exception."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Any, Any, Any]] = []
        self.named = {
            name: self._receiver(name, signal)
            for name, signal in {
                "enqueued": task_enqueued,
                "started": task_started,
                "finished": task_finished,
            }.items()
        }

    def _receiver(self, name: str, signal: Any) -> Any:
        def receive(sender: Any, task_result: Any, **more: Any) -> None:
            self.seen.append((name, sender, task_result, sys.exc_info()[1]))

        signal.connect(receive)
        return signal, receive

    def of(self, result: Any) -> list[tuple[str, Any]]:
        """Return the names and statuses of the signals for a task."""
        return [(name, told.status) for name, _, told, _ in self.seen if told.id == result.id]


@pytest.fixture
def told() -> Iterator[Told]:
    made = Told()
    yield made
    for signal, receiver in made.named.values():
        signal.disconnect(receiver)


def test_signals_come_in_order_with_the_class_of_the_backend_as_sender(backend, told):
    ids = set()
    for _ in range(30):
        result = tasks.add.enqueue(1)
        ids.add(result.id)
        eventually(lambda result=result: len(told.of(result)) == 3)
        assert told.of(result) == [
            ("enqueued", READY),
            ("started", RUNNING),
            ("finished", SUCCESSFUL),
        ]
    # A task of the test before may be told late.
    told_of_these = [signal for signal in told.seen if signal[2].id in ids]
    assert {(sender, error) for _, sender, _, error in told_of_these} == {(TaskxBackend, None)}
    finished = told_of_these[-1][2]
    assert (finished.id, finished.return_value) == (result.id, 1)
    assert finished == tasks.add.get_result(finished.id)


def test_no_task_starts_before_the_receivers_know_that_it_is_enqueued(backend, told):
    begun = defaultdict[str, threading.Event](threading.Event)  # a task of another test may be late
    early = []

    def note(task_result: Any, **more: Any) -> None:
        begun[task_result.id].set()

    def enqueued(task_result: Any, **more: Any) -> None:
        eventually(lambda: task_result.taskx.task().status is TaskStatus.RUNNING)
        early.append(begun[task_result.id].wait(0.3))

    task_started.connect(note)
    task_enqueued.connect(enqueued)
    try:
        result = tasks.add.enqueue(1)
        assert early == [False]
        assert begun[result.id].wait(PATIENCE)
    finally:
        task_started.disconnect(note)
        task_enqueued.disconnect(enqueued)


def test_the_signal_of_a_failed_task_is_sent_inside_the_except_block(backend, told, caplog):
    caplog.set_level(logging.INFO)
    result = tasks.fail.enqueue("no stock")
    eventually(lambda: len(told.of(result)) == 3)
    assert told.of(result)[-1] == ("finished", FAILED)
    [error] = [error for _, _, about, error in told.seen if about.id == result.id and error]
    assert (type(error), str(error)) == (ValueError, "no stock")
    frames = traceback.extract_tb(error.__traceback__)
    assert frames[-1].name == "fail"


def test_a_late_signal_has_the_exception_of_the_last_attempt(backend, told):
    held, go_on = threading.Event(), threading.Event()

    def hold(task_result: Any, **more: Any) -> None:
        held.set()
        assert go_on.wait(PATIENCE)

    task_finished.connect(hold)
    try:
        tasks.add.enqueue(1)
        assert held.wait(PATIENCE)  # so both attempts raise before anyone hears of the first one
        result = tasks.fail.using(max_attempts=2, backoff=0).enqueue("no stock")
        eventually(result.taskx.done)
    finally:
        go_on.set()
        task_finished.disconnect(hold)
    eventually(lambda: ("finished", FAILED) in told.of(result))
    [error] = [error for _, _, about, error in told.seen if about.id == result.id and error]
    assert (type(error), str(error)) == (ValueError, "no stock")


def test_a_task_that_is_retried_finishes_once(backend, told):
    result = tasks.fail_twice.enqueue("retried")
    eventually(lambda: ("finished", SUCCESSFUL) in told.of(result))
    assert [name for name, _ in told.of(result)] == ["enqueued", *["started"] * 3, "finished"]
    result.refresh()
    assert [error.exception_class for error in result.errors] == [OSError, OSError]
    assert result.attempts == len(result.worker_ids) == 3
    assert result.started_at <= result.last_attempted_at


def test_a_task_that_is_cancelled_before_it_starts_finishes_as_failed(backend, told):
    result = tasks.add.using(run_after=timedelta(hours=1)).enqueue(1)
    assert result.taskx.cancel()
    eventually(lambda: told.of(result) == [("enqueued", READY), ("finished", FAILED)])
    result.refresh()
    assert result.status == FAILED
    assert [error.exception_class for error in result.errors] == [TaskCancelled]
    assert result.attempts == 0


def test_a_task_without_its_parent_fails_with_the_reason(backend):
    parent = tasks.fail.enqueue("no stock")
    result = ended(tasks.add.using(depends_on=[parent]).enqueue(1))
    assert (result.status, result.attempts) == (FAILED, 0)
    assert result.errors[0].traceback == f"its parent {parent.id} failed"


def test_three_lines_of_the_log_tell_a_task(backend, caplog, told):
    caplog.set_level(logging.DEBUG)
    for task, args, level in ((tasks.add, [1], logging.INFO), (tasks.fail, ["x"], logging.ERROR)):
        caplog.clear()
        result = task.enqueue(*args)
        eventually(lambda result=result: len(told.of(result)) == 3)
        lines = [
            r for r in caplog.records if r.name.startswith("django") and result.id in r.message
        ]
        assert [line.levelno for line in lines] == [logging.DEBUG, logging.INFO, level]
        assert "enqueued" in lines[0].message
        assert f"state={RUNNING}" in lines[1].message
        assert f"state={SUCCESSFUL if level == logging.INFO else FAILED}" in lines[2].message
        assert not any("None" in line.message for line in lines)
    assert lines[2].exc_info[0] is ValueError


# --- checks of tasks


def local() -> Any:
    def function() -> None: ...

    return function


def no_context(text: str) -> None: ...


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: taskx_task(local()), "module level"),
        (lambda: taskx_task(len), "module level"),
        (lambda: taskx_task(no_context, takes_context=True), "first argument of 'context'"),
        (lambda: tasks.add.using(priority=101), "priority must be a whole number"),
        (lambda: tasks.add.using(priority=1.5), "priority must be a whole number"),
        (lambda: tasks.add.using(run_after=datetime(2099, 1, 1)), "aware datetime"),
        (lambda: tasks.add.using(run_after=3), "must be a datetime or a timedelta, not 3"),
        (lambda: tasks.add.using(queue_name="unknown"), "Queue 'unknown' is not valid"),
        (lambda: tasks.add.using(max_attempts=0), "max_attempts"),
        (lambda: tasks.add.using(backoff="sometimes"), "backoff must be"),
        (lambda: tasks.add.using(timeout=-1), "timeout"),
        (lambda: tasks.add.using(tags=["with space"]), "tag"),
        (lambda: tasks.add.using(on_conflict="return"), "on_conflict requires unique_key"),
        (lambda: tasks.add.using(expires=-1), "expires"),
        (lambda: taskx_task(tasks.add.func, rate="often"), "rate"),
        (lambda: taskx_task(tasks.add.func, isolation="thread"), "isolation"),
        (lambda: taskx_task(tasks.add.func, max_concurrency=0), "max_concurrency"),
    ],
)
def test_a_task_that_is_not_valid_is_refused_when_it_is_made(stored, make, text):
    with pytest.raises(InvalidTask, match=text):
        make()


def test_an_option_that_does_not_exist_is_refused(stored):
    with pytest.raises(TypeError, match="using\\(\\) has no option colour"):
        tasks.add.using(colour="red")
    with pytest.raises(TypeError, match=r"task\(\) has no option colour"):
        taskx_task(no_context, colour="red")
    with pytest.raises(TypeError, match=r"max_atempts \(did you mean 'max_attempts'\?\)"):
        taskx_task(no_context, max_atempts=3)
    with pytest.raises(TypeError, match=r"uniqe_key \(did you mean 'unique_key'\?\)"):
        tasks.add.using(uniqe_key="one")
    with pytest.raises(TypeError, match=r"using\(\) has no option rate: give it to @task"):
        tasks.add.using(rate="5/s")
    with pytest.raises(TypeError, match="run_after cannot be given to the decorator"):
        taskx_task(no_context, run_after=timedelta(1))


@pytest.mark.parametrize(
    ("word", "ours"),
    [
        ("countdown", "run_after=…"),
        ("eta", "run_after=…"),
        ("max_retries", "max_attempts=…, one more"),
        ("default_retry_delay", "backoff=RetryPolicy(…)"),
        ("soft_time_limit", "timeout=…"),
        ("rate_limit", "rate=… of the decorator"),
    ],
)
def test_the_option_of_celery_gets_the_word_for_it_here(word, ours):
    text = f"using() has no option {word} (for {word} write {ours})"
    with pytest.raises(TypeError, match=f"^{re.escape(text)}$"):
        tasks.add.using(**{word: 3})


def test_a_task_is_checked_again_when_it_is_enqueued(tmp_path):
    with override_settings(TASKS={"default": entry(tmp_path)}):
        task = tasks.add.using(queue_name="mails")
    with override_settings(TASKS={"default": {**entry(tmp_path), "QUEUES": []}}):
        anywhere = tasks.add.using(queue_name="anywhere")  # no QUEUES: all names are valid
    with override_settings(TASKS={"default": {**entry(tmp_path), "QUEUES": ["default"]}}):
        for invalid in (task, anywhere):
            with pytest.raises(InvalidTask, match="is not valid for backend"):
                invalid.enqueue(1)
            with pytest.raises(InvalidTask, match="is not valid for backend"):
                asyncio.run(invalid.aenqueue(1))
    with override_settings(TASKS={"default": entry(tmp_path)}):
        assert task.enqueue(1).task.queue_name == "mails"


LATER = datetime(2099, 1, 1, 12, 0, 0, 123_456, timezone.utc)


@pytest.mark.parametrize("use_tz", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"priority": 7, "queue_name": "mails"},
        {"run_after": LATER},
        {"run_after": timedelta(hours=1)},
        {"unique_key": "one", "tags": ["night"], "backoff": 5.0, "timeout": 60},
    ],
    ids=["plain", "priority", "run_after", "timedelta", "taskx"],
)
def test_enqueue_returns_what_get_result_returns(stored, options, use_tz, monkeypatch):
    """Also if the clock goes on in between."""
    clock = itertools.count(SystemClock().now_ms())
    monkeypatch.setattr(SystemClock, "now_ms", lambda self: next(clock))
    with override_settings(USE_TZ=use_tz, TIME_ZONE="Asia/Tokyo"):
        if not use_tz and options.get("run_after") == LATER:
            options = {"run_after": LATER.replace(tzinfo=None)}
        task = tasks.echo.using(**options)
        for result in (task.enqueue((1, 2), a={"b": (3,)}), asyncio.run(tasks.add.aenqueue(1))):
            assert stored.get_result(result.id) == result
            before = [getattr(result, name) for name in ("enqueued_at", "args", "task")]
            result.refresh()
            assert before == [getattr(result, name) for name in ("enqueued_at", "args", "task")]


class Odd(str):
    __slots__ = ()


ODD = ("", "\0", "a\0b", "\ud800", "x" * 255, "x" * 256, "x" * 100_000, " ", "%", "é", "'", "🐌")
NO_TEXT = (None, 0, -1, 1.5, True, b"id", UUID(int=7), [], {})


@pytest.mark.parametrize(
    "odd",
    [*ODD, Odd("a\0"), *NO_TEXT],
    ids=lambda odd: f"{type(odd).__name__} {len(str(odd))} {odd!a:.12}",
)
def test_no_result_has_an_odd_id(stored, odd):
    for get_result in (stored.get_result, async_to_sync(stored.aget_result), tasks.add.get_result):
        with pytest.raises(TaskResultDoesNotExist) as caught:
            get_result(odd)
        str(caught.value).encode()  # it can be printed


@pytest.mark.parametrize(
    "type_", [".odd", "odd", "a..b", "..", "@", "add@mails", "not a path.at all"]
)
def test_no_result_belongs_to_a_task_whose_type_is_no_path(stored, type_):
    stored.queue.declare(type_)
    with pytest.raises(TaskResultDoesNotExist, match="native"):
        stored.get_result(stored.queue.submit(type_, id="native").id)


def test_naive_times_are_those_of_the_local_time_zone_without_use_tz(stored):
    with override_settings(USE_TZ=False, TIME_ZONE="Asia/Tokyo"):
        result = tasks.add.using(run_after=datetime(2099, 1, 1, 9)).enqueue(1)
        assert result.taskx.task().run_at == datetime(2099, 1, 1, tzinfo=timezone.utc)
        found = tasks.add.get_result(result.id)
        assert found.task.run_after == datetime(2099, 1, 1, 9)
        assert found.enqueued_at.tzinfo is None
        assert abs(
            found.enqueued_at - datetime.now(ZoneInfo("Asia/Tokyo")).replace(tzinfo=None)
        ) < (timedelta(minutes=5))


# --- what TaskX adds


def test_options_are_stored_with_the_task_and_used_by_it(stored):
    task = tasks.add.using(
        max_attempts=4,
        backoff=timedelta(seconds=5),
        timeout=timedelta(minutes=1),
        unique_key="one",
        unique_scope="ever",
        concurrency_key="shop",
        tags=["night"],
    )
    record = task.enqueue(1).taskx.task()
    assert (record.max_attempts, record.timeout) == (4, 60)
    assert (record.retry.backoff, record.retry.base, record.retry.max_attempts) == ("fixed", 5, 4)
    assert (record.unique_key, record.unique_scope) == ("one", "ever")
    assert (record.concurrency_key, record.tags) == ("shop", ("night",))
    assert (record.type, record.params) == ("shop.tasks.add", {"args": [1], "kwargs": {}})


def test_options_of_the_decorator_hold_for_tasks_that_others_submit(backend):
    tasks.fail_twice.enqueue("first")
    handle = backend.queue.submit("shop.tasks.fail_twice", {"key": "by name"})
    assert handle.result(PATIENCE) == "by name"
    assert backend.get_result(handle.id).kwargs == {"key": "by name"}


def test_options_of_a_type_are_those_of_its_executor(stored):
    result = tasks.limited.enqueue()
    options = get_queue()._registry.registered["shop.tasks.limited"].options
    assert (options.rate, options.max_concurrency, options.capture_log) == ("5/h", 2, "WARNING")
    assert (options.stall, options.max_snoozes) == (90, 9)
    for record in (result.taskx.task(), get_queue().submit("shop.tasks.limited").task()):
        assert timedelta(hours=1) <= record.expires_at - record.created_at < timedelta(hours=2)
    until = datetime.now(timezone.utc).replace(microsecond=0) + timedelta(days=1)
    assert tasks.add.using(expires=until).enqueue(1).taskx.task().expires_at == until


def test_one_call_gets_the_arguments_of_many_tasks(backend, told):
    results = [tasks.lengths.enqueue(text) for text in ("a", "", "abc")]
    first, second, third = (ended(result) for result in results)
    assert tasks.notes == [["a", "", "abc"]]
    assert [first.return_value, third.return_value] == [1, 3]
    assert second.status == FAILED
    assert second.errors[0].exception_class is ValueError
    for result, end in ((first, SUCCESSFUL), (second, FAILED), (third, SUCCESSFUL)):
        eventually(lambda result=result: len(told.of(result)) == 3)
        assert told.of(result)[1:] == [("started", RUNNING), ("finished", end)]


def test_a_call_for_many_has_the_context_of_all_and_a_value_that_is_not_json_fails_its_task(
    backend,
):
    result = ended(tasks.together.enqueue("odd"))
    assert result.status == FAILED
    assert tasks.notes == [(1, result.id)]


@pytest.mark.parametrize("call", [lambda task: task.enqueue(), lambda task: task.enqueue("a", "b")])
def test_a_task_with_a_batch_takes_one_argument(stored, call):
    with pytest.raises(TypeError, match="takes one argument, an item of the list"):
        call(tasks.lengths)


def test_a_batch_that_cannot_be_is_refused_when_the_task_is_made(stored):
    with pytest.raises(InvalidTask, match="isolation"):
        taskx_task(batch=5, isolation="process")(tasks.add.func)
    with pytest.raises(InvalidTask, match="wait requires batch"):
        taskx_task(wait=5)(tasks.add.func)


@pytest.mark.process
def test_a_task_in_a_child_process_has_the_site(backend, monkeypatch):
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "project.settings")
    result = ended(tasks.apart.enqueue(number=3))
    assert result.status == SUCCESSFUL, result.errors
    child, task_id, number, zone = result.return_value
    assert (child != os.getpid(), task_id, number, zone) == (True, result.id, 3, "UTC")
    assert result.taskx.task().message == "in a child"


@pytest.mark.parametrize(
    ("enqueue", "text"),
    [
        (lambda: tasks.add.enqueue(), "shop.tasks.add.*missing a required argument: 'a'"),
        (lambda: tasks.add.enqueue(1, c=2), "unexpected keyword argument 'c'"),
        (lambda: tasks.add.enqueue(1, 2, 3), "too many positional arguments"),
        (lambda: tasks.attempt.enqueue(), "missing a required argument: 'text'"),
        (lambda: asyncio.run(tasks.add.aenqueue()), "missing a required argument: 'a'"),
    ],
)
def test_arguments_that_the_function_does_not_take_are_refused_at_once(stored, enqueue, text):
    with pytest.raises(TypeError, match=f"{text}.*nothing was stored"):
        enqueue()
    assert get_queue().count_tasks() == 0


@pytest.mark.parametrize("params", [{"c": 1}, {"a": 1, "c": 1}, {"args": [], "kwargs": {}}])
def test_the_native_api_checks_the_arguments_of_a_task_too(stored, params):
    for call in (
        lambda: get_queue().submit("shop.tasks.add", params),
        lambda: get_queue().schedule("s", every(60), "shop.tasks.add", params),
    ):
        with pytest.raises(PayloadError, match=r"params: shop\.tasks\.add\(a.*nothing was stored"):
            call()
    assert get_queue().submit("shop.tasks.add", {"a": 1}).task().params == {"a": 1}


def test_a_task_names_its_type(stored):
    assert (tasks.add.type, tasks.add.using(queue_name="mails").type) == (
        "shop.tasks.add",
        "shop.tasks.add@mails",
    )
    tasks.add.enqueue(1)
    assert get_queue().count_tasks(type=tasks.add.type) == 1


def test_a_decorator_may_give_a_function_more_arguments(stored):
    wrapped = taskx_task(functools.wraps(tasks.add.func)(lambda *args: args))
    assert wrapped.enqueue().status == READY


def test_the_names_of_celery_lead_to_those_of_django():
    with pytest.raises(AttributeError, match=r"no attribute 'delay': write add.enqueue\(…\)"):
        _ = tasks.add.delay
    with pytest.raises(AttributeError, match=r"add.enqueue\(…\), with its options as using"):
        _ = tasks.add.apply_async
    assert not hasattr(tasks.add, "anything")


def test_a_result_is_one_short_line(stored):
    result = tasks.add.enqueue(1)
    assert repr(result) == f"<TaskxResult {result.id} of shop.tasks.add, READY>"


def test_a_unique_key_refuses_a_second_task_or_returns_the_first(stored, told):
    unique = tasks.add.using(unique_key="one")
    first = unique.enqueue(1)
    with pytest.raises(DuplicateTask):
        unique.enqueue(2)
    again = unique.using(on_conflict="return").enqueue(3)
    assert (again.id, again.args) == (first.id, [1])
    assert len(told.of(first)) == 1


def test_a_coroutine_ends_at_its_time_out(backend):
    result = ended(tasks.hang.enqueue())
    assert result.status == FAILED
    assert [error.exception_class for error in result.errors] == [TimeoutError]
    assert result.finished_at - result.started_at < timedelta(seconds=60)


def test_a_cancel_is_raised_at_the_await_of_a_coroutine(backend):
    result = tasks.hang_until_cancelled.enqueue()
    assert tasks.gate.wait(PATIENCE)
    result.taskx.cancel()
    assert [error.exception_class for error in ended(result).errors] == [TaskCancelled]


def test_a_queue_name_is_part_of_the_type(backend):
    result = ended(tasks.add.using(queue_name="mails").enqueue(1))
    assert result.taskx.task().type == "shop.tasks.add@mails"
    assert (result.task.queue_name, result.return_value) == ("mails", 1)


def test_a_queue_of_some_queue_names_leaves_the_other_tasks_alone(stored):
    queue = load_queue(queue_names=["mails"])
    queue.start()
    mail = tasks.add.using(queue_name="mails")
    other = tasks.add.enqueue(1)  # also if this process enqueues it
    backend = Queue(queue.repository)
    backend.declare("shop.tasks.echo", "shop.tasks.echo@mails")
    unknown = backend.submit("shop.tasks.echo")
    found = backend.submit("shop.tasks.echo@mails")
    assert ended(mail.enqueue(2)).return_value == 2
    assert found.result(PATIENCE) == [[], {}]
    assert tasks.add.get_result(other.id).status == READY
    assert unknown.task().status is TaskStatus.PENDING


def test_the_native_queue_of_the_alias_is_the_backends(backend):
    queue = get_queue()
    assert queue is backend.queue is get_queue("default")
    assert queue.repository is tasks.add.enqueue(1).taskx._owner.repository

    @queue.executor("native")
    def native(ctx, name: str) -> str:
        return f"{name} {translation.get_language()}"

    with translation.override("de"):
        assert native.submit(name="x").result(PATIENCE) == "x en-us"


# --- surroundings


def test_language_and_time_zone_leak_neither_into_a_task_nor_out_of_it(tmp_path):
    options = entry(tmp_path, workers=1)
    with override_settings(TASKS={"default": options}, TIME_ZONE="Europe/Berlin"):
        get_queue().start()
        with translation.override("fr"), django_timezone.override("Asia/Tokyo"):
            first = tasks.localised.enqueue("de", "America/Lima")
            second = tasks.localised.enqueue()
            assert ended(first).return_value == ["en-us", "Europe/Berlin"]
            assert ended(second).return_value == ["en-us", "Europe/Berlin"]
            assert translation.get_language() == "fr"


def test_the_connections_of_workers_are_closed_after_each_task_and_at_the_end(backend, monkeypatch):
    closed: list[str] = []
    close = BaseDatabaseWrapper.close

    def noted(self: Any) -> None:
        closed.append(threading.current_thread().name)
        close(self)

    monkeypatch.setattr(BaseDatabaseWrapper, "close", noted)
    thread, opened = ended(tasks.query.enqueue()).return_value
    assert opened
    assert thread in closed  # CONN_MAX_AGE is 0
    closed.clear()
    monkeypatch.setitem(connections.settings["default"], "CONN_MAX_AGE", None)
    threads = {ended(tasks.query.enqueue()).return_value[0] for _ in range(5)}
    backend.queue.stop()
    assert threads <= {*closed}


def test_a_coroutine_uses_the_connections_of_its_worker_and_knows_its_run(backend):
    result = tasks.query_async.enqueue()
    thread, opened, task_id = ended(result).return_value
    assert thread.startswith("taskx-worker-")
    assert opened
    assert task_id == result.id
    assert result.taskx.task().message == "in taskx-loop"


@pytest.mark.parametrize("threads", [1])
def test_a_function_after_a_coroutine_does_not_use_the_loop_of_coroutines(backend):
    ended(tasks.query_async.enqueue())
    assert ended(tasks.loop_of_async_to_sync.enqueue()).return_value != "taskx-loop"


def test_a_coroutine_has_transactions_and_steps(backend):
    django_project.migrate("default")
    result = ended(tasks.orm_in_transactions.enqueue())
    assert result.return_value == [1, 0, ["kept"]], result.errors


def test_each_thread_has_its_own_backend_and_all_share_one_queue(backend):
    number = ended(tasks.backends.enqueue()).return_value
    assert number != id(backend)
    assert get_queue() is backend.queue


# --- settings


def test_other_settings_have_another_queue_and_the_first_is_closed(tmp_path):
    first = entry(tmp_path)
    second = {**first, "OPTIONS": {"repository": f"sqlite:///{tmp_path}/second.db"}}
    with override_settings(TASKS={"default": first}):
        before = get_queue()
        before.start()
        result = tasks.add.enqueue(1)
        ended(result)
        with override_settings(TASKS={"default": second}):
            assert get_queue() is not before
            assert before.stopped
            with pytest.raises(TaskResultDoesNotExist):
                tasks.add.get_result(result.id)
        assert get_queue() is not before
        assert tasks.add.get_result(result.id).return_value == 1


def test_two_aliases_have_a_queue_and_a_file_each(tmp_path):
    settings = {"default": {"BACKEND": "taskx.contrib.django.TaskxBackend"}}
    settings["low"] = dict(settings["default"])
    with (
        override_settings(TASKS=settings, BASE_DIR=tmp_path),
        override_settings(INSTALLED_APPS=["django.contrib.contenttypes"]),
    ):
        tasks.add.enqueue(1)
        low = tasks.add.using(backend="low").enqueue(2)
        assert sorted(path.name for path in tmp_path.glob("*.sqlite3")) == [
            "taskx-low.sqlite3",
            "taskx.sqlite3",
        ]
        get_queue("low").start()
        assert ended(low).return_value == 2
        assert get_queue().count_tasks() == get_queue("low").count_tasks() == 1


def test_in_djangos_test_environment_no_file_is_written(tmp_path):
    with override_settings(TASKS={"default": entry(tmp_path)}):
        setup_test_environment()
        try:
            assert tasks.add.enqueue(1).status == READY
            assert isinstance(get_queue().repository, MemoryRepository)
        finally:
            teardown_test_environment()
        assert list(tmp_path.iterdir()) == []
