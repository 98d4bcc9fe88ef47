"""The outcomes of attempts, as the record shows them; a failure affects no other task."""

from __future__ import annotations

import builtins
import gc
import logging
import os
import re
import socket
import sys
import threading
import weakref
from datetime import timedelta

import pytest
from helpers import PATIENCE, eventually, frequent_checks, node_of, settle_references

from taskx import (
    ConfigurationError,
    InvalidTransition,
    Permanent,
    RepositoryError,
    Retry,
    TaskFailed,
    TaskNotFound,
    TaskStatus,
)
from taskx.tasks.writes import Insert

# Tests count the starts of tasks, so a slow machine must hand no started task back.
pytestmark = pytest.mark.usefixtures("calm")


class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("no words")

    __repr__ = __str__


class Rude(BaseException):
    pass


def recurse(n=0):
    return recurse(n + 1)


class UnusualStr(Exception):
    def __str__(self):
        return 5  # type: ignore[return-value]


class Text(str):
    """A text whose methods all raise."""

    def fail(self, *args):
        raise RuntimeError("no use")

    __format__ = __len__ = __bool__ = __eq__ = __getitem__ = encode = isascii = fail
    __hash__ = str.__hash__


class OwnKindOfStr(Exception):
    def __str__(self):
        return Text("x")


class Nameless(type):
    @property
    def __name__(cls):
        raise SystemExit


class OfNoName(Exception, metaclass=Nameless):
    pass


class OfNoClass(Exception):
    @property
    def __class__(self):
        raise SystemExit


class Secretive(Exception):
    def __getattribute__(self, name):
        raise SystemExit


ERRORS = {
    "exception": (ValueError("bad value"), "ValueError: bad value"),
    "no text": (ValueError(), "ValueError"),
    "exit": (SystemExit(3), "SystemExit: 3"),
    "interrupt": (KeyboardInterrupt(), "KeyboardInterrupt"),
    "generator exit": (GeneratorExit(), "GeneratorExit"),
    "memory": (MemoryError(), "MemoryError"),
    "stop iteration": (StopIteration(1), "StopIteration: 1"),
    "base": (Rude("x"), "Rude: x"),
    "unprintable": (Unprintable(), "Unprintable: <its str() raised>"),
    "no str": (UnusualStr(), "UnusualStr: <its str() raised>"),
    "own kind of str": (OwnKindOfStr(), "OwnKindOfStr: x"),
    "no name": (OfNoName("x"), "OfNoName: x"),
    "no class": (OfNoClass("x"), "OfNoClass: x"),
    "no attributes": (Secretive("x"), "Secretive: x"),
    "surrogates": (ValueError("a\ud800b"), "ValueError: a\\ud800b"),
    "nul": (ValueError("a\0b"), "ValueError: a\N{REPLACEMENT CHARACTER}b"),
    "ten megabytes": (ValueError("y" * 10_000_000), "ValueError: yyyy"),
}
if sys.version_info >= (3, 11):
    Group = builtins.ExceptionGroup
    group = Group("several", [ValueError(1), Group("inner", [KeyError(2)])])
    ERRORS["group"] = (group, "ExceptionGroup: several (2 sub-exceptions)")


def check_workers(queue):
    """Check that all workers live: as many tasks as there are workers meet at one barrier."""
    barrier = threading.Barrier(queue.config.worker_num)
    queue.executor("meet")(lambda: barrier.wait(PATIENCE) * 0)
    for handle in [queue.submit("meet") for _ in range(queue.config.worker_num)]:
        assert handle.result(PATIENCE) == 0


@pytest.mark.parametrize("case", ERRORS)
def test_any_exception_fails_the_task_and_harms_no_worker(started, case):
    error, text = ERRORS[case]

    @started.executor("raise")
    def raise_():
        raise error

    handles = [started.submit("raise") for _ in range(3)]
    for handle in handles:
        with pytest.raises(TaskFailed) as caught:
            handle.result(PATIENCE)
        assert caught.value.error.startswith(text)
        assert caught.value.attempt == 1
    task = handles[0].task()
    assert (task.status, task.errors, task.crashes) == (TaskStatus.FAILED, 1, 0)
    assert task.error.startswith(text)
    assert task.error_type.rpartition(".")[2] == text.partition(":")[0]
    assert len(task.error) <= 4000
    assert len(task.traceback) <= 20_000
    assert task.dead_letter
    assert "raise error" in task.traceback or "could not be formatted" in task.traceback
    check_workers(started)


def test_endless_recursion_fails_the_task(started):
    started.executor("recurse")(lambda: recurse())
    with pytest.raises(TaskFailed, match="RecursionError"):
        started.submit("recurse").result(PATIENCE)
    check_workers(started)


def test_the_record_of_a_completed_task_is_complete(started):
    before = started.submit("fine")
    assert before.result(PATIENCE) == "fine"
    task = before.task()
    assert task.status is TaskStatus.COMPLETED
    assert (task.progress, task.result, task.error, task.traceback) == (100, "fine", "", "")
    assert task.created_at <= task.started_at <= task.completed_at
    assert 0 <= task.duration < PATIENCE
    assert (task.starts, task.errors, task.crashes, task.interruptions) == (1, 0, 0, 0)
    assert task.owner == ""
    [attempt] = task.attempts
    assert (attempt.outcome, attempt.worker) == ("completed", task.worker)
    assert attempt.worker


def test_the_duration_is_measured_with_the_monotonic_clock(started):
    started.executor("rest")(lambda ctx: ctx.sleep(0.05))
    handle = started.submit("rest")
    handle.result(PATIENCE)
    assert 0.05 <= handle.task().duration < PATIENCE
    assert handle.task().completed_at - handle.task().started_at < timedelta(seconds=PATIENCE)


def test_a_failing_task_is_retried_at_once_until_max_attempts(started):
    seen = []

    @started.executor("stubborn", max_attempts=3)
    def stubborn(ctx):
        seen.append(ctx.task.attempt)
        ctx.progress(50, f"attempt {ctx.task.attempt}")
        raise ValueError(f"attempt {ctx.task.attempt}")

    handle = started.submit("stubborn")
    with pytest.raises(TaskFailed, match="attempt 3") as caught:
        handle.result(PATIENCE)
    assert seen == [1, 2, 3]
    assert caught.value.attempt == 3
    task = handle.task()
    assert (task.status, task.errors, task.starts) == (TaskStatus.FAILED, 3, 3)
    assert task.dead_letter
    assert [a.outcome for a in task.attempts] == ["retried", "retried", "failed"]
    assert [a.error for a in task.attempts] == [f"ValueError: attempt {n}" for n in (1, 2, 3)]
    assert all("stubborn" in a.traceback and a.worker for a in task.attempts)
    assert all(a.started_at <= a.ended_at for a in task.attempts)
    assert (task.progress, task.message) == (50, "attempt 3")


def test_the_record_names_the_class_of_each_error(started):
    """The name is the one that retry policies use: with the module, except for builtins."""
    errors = [OSError("x"), Rude("x"), Retry(delay=0.0), Permanent("x")]

    @started.executor("fickle", max_attempts=9)
    def fickle(ctx):
        raise errors[ctx.task.errors]

    handle = started.submit("fickle")
    with pytest.raises(TaskFailed):
        handle.result(PATIENCE)
    task = handle.task()
    assert [attempt.error_type for attempt in task.attempts] == [
        "OSError",
        f"{__name__}.Rude",
        "taskx.tasks.retry.Retry",
        "taskx.tasks.retry.Permanent",
    ]
    assert task.error_type == "taskx.tasks.retry.Permanent"
    started.requeue(handle.id)
    with pytest.raises(TaskFailed):
        handle.result(PATIENCE)
    assert handle.task().attempts[3].error_type == "taskx.tasks.retry.Permanent"


def test_an_attempt_that_timed_out_has_error_type_timeout_error(started):
    @started.executor("late", timeout=0.01)
    def late(ctx):
        ctx.token.wait(PATIENCE)
        raise ConnectionError("closed under it")

    handle = started.submit("late")
    with pytest.raises(TaskFailed, match="timed out"):
        handle.result(PATIENCE)
    assert handle.task().error_type == "TimeoutError"


def test_the_record_names_the_process_and_the_thread_of_a_task(started, gate):
    """A running task that any waiting thread could take has the process alone."""

    @started.executor("hold")
    def hold():
        gate()
        return threading.current_thread().name

    handle = hold.submit()
    gate.wait_for()
    node = f"{socket.gethostname()}:{os.getpid()}:"
    assert handle.task().worker.startswith(node)
    gate.open()
    thread = handle.result(PATIENCE)
    assert re.fullmatch(rf"{re.escape(node)}\w+ {thread}", handle.task().worker)
    assert re.fullmatch(r"taskx-worker-\d", thread)


def test_a_running_task_names_its_thread_if_it_is_known(make_queue, gate):
    queue = make_queue(worker_num=1)

    @queue.executor("hold")
    def hold():
        gate()

    handle = hold.submit()
    queue.start()  # the task is pending: its only worker starts it
    gate.wait_for()
    assert handle.task().worker == f"{node_of(queue).record.name} taskx-worker-1"
    gate.open()
    handle.result(PATIENCE)


def test_a_later_attempt_can_succeed(started):
    @started.executor("second", max_attempts=5)
    def second(ctx):
        if ctx.task.attempt < 2:
            raise ValueError("not yet")
        return ctx.task.attempt

    handle = started.submit("second")
    assert handle.result(PATIENCE) == 2
    task = handle.task()
    assert (task.status, task.errors, task.error) == (TaskStatus.COMPLETED, 1, "")
    assert (task.dead_letter, task.error_type) == (False, "")
    assert [a.outcome for a in task.attempts] == ["retried", "completed"]
    assert task.attempts[0].error_type == "ValueError"


def test_the_list_of_attempts_is_limited(started):
    @started.executor("many", max_attempts=80)
    def many():
        raise ValueError

    handle = started.submit("many")
    assert handle.exception(PATIENCE)
    assert handle.task().errors == 80
    assert 50 <= len(handle.task().attempts) <= 51


# Requeue, delete, list and read


def test_a_requeued_task_starts_again_at_attempt_one(started):
    fail = [True]

    @started.executor("switch", max_attempts=2)
    def switch(ctx):
        if fail[0]:
            raise ValueError("off")
        return ctx.task.attempt

    handle = started.submit("switch")
    assert handle.exception(PATIENCE)
    fail[0] = False
    started.requeue(handle.id)
    assert started.handle(handle.id).result(PATIENCE) == 1
    task = handle.task()
    assert (task.errors, task.starts, task.dead_letter) == (0, 3, False)
    assert [a.outcome for a in task.attempts] == ["retried", "failed", "completed"]


def test_a_task_that_does_not_run_can_be_deleted(started, gate):
    started.executor("hold")(lambda: gate())
    running, done = started.submit("hold"), started.submit("fine")
    gate.wait_for(1)
    done.result(PATIENCE)
    waiting = started.submit("fine", delay=100)
    with pytest.raises(InvalidTransition, match="running"):
        started.delete(running.id)
    for handle in (done, waiting):
        started.delete(handle.id)
        for call in (handle.task, lambda h=handle: started.delete(h.id)):
            with pytest.raises(TaskNotFound, match=handle.id):
                call()


def test_an_outcome_that_is_refused_is_stored_without_its_traceback(queue):
    def refuse(writes):
        if any(getattr(write, "changes", {}).get("traceback") for write in writes):
            raise RepositoryError("too large")

    queue.repository.before = refuse
    queue.executor("work")(lambda: 1 / 0)
    queue.start()
    with pytest.raises(TaskFailed, match="ZeroDivisionError"):
        queue.submit("work").result(PATIENCE)
    assert queue.list_tasks()[0][0].traceback == ""


@frequent_checks
def test_a_task_whose_outcome_cannot_be_stored_runs_again(queue, caplog):
    refusals = []

    def refuse(writes):
        if any(getattr(write, "changes", {}).get("status") == "failed" for write in writes):
            refusals.append(writes)
            if len(refusals) <= 2:
                raise RepositoryError("not this one")

    queue.repository.before = refuse
    queue.executor("work")(lambda: 1 / 0)
    queue.start()
    handle = queue.submit("work")
    with pytest.raises(TaskFailed, match="ZeroDivisionError"):
        handle.result(PATIENCE)
    assert (handle.task().interruptions, handle.task().errors) == (1, 1)
    assert "could not be stored, so it runs again: not this one" in caplog.text
    assert "another run had taken over" not in caplog.text


def test_a_task_deleted_from_the_buffer_never_runs(busy, gate):
    queue = busy()
    handle = queue.submit("note", {"n": 1})
    queue.delete(handle.id)
    gate.open()
    queue.submit("note", {"n": 2}).result(PATIENCE)
    assert queue.ran == [2]


def test_a_message_may_have_10000_characters_and_a_longer_one_is_cut(started, caplog):
    @started.executor("report")
    def report(ctx, length):
        ctx.progress(5.5, "é" * length)

    for length in (10_000, 10_001, 20_000):
        handle = started.submit("report", {"length": length})
        handle.result(PATIENCE)
        cut = length > 10_000
        assert handle.task().message == "é" * (9_999 if cut else 10_000) + "…" * cut
        assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
            "progress messages of type 'report' with more than 10,000 characters are cut, and end in '…'"
        ] * cut


def test_an_executor_cannot_set_attributes_of_the_context(started):
    """An attempt to do so is an error of that task only."""

    @started.executor("by_hand")
    def by_hand(ctx):
        ctx.progress(5, "told")
        ctx.message = 5

    handle = started.submit("by_hand")
    with pytest.raises(TaskFailed, match="AttributeError"):
        handle.result(PATIENCE)
    assert (handle.task().progress, handle.task().message) == (5, "told")
    assert started.submit("fine").result(PATIENCE) == "fine"


def test_the_status_of_an_unknown_task_is_not_found(queue):
    with pytest.raises(TaskNotFound, match="'nobody'"):
        queue.get_task_status("nobody")


@pytest.mark.parametrize(
    "hostile", [{"$ne": ""}, {"$gt": ""}, ["x"], b"x", 1, None, "x\0", "\ud800"]
)
def test_an_invalid_id_is_refused(queue, hostile):
    """An operator of a query language must not read, change or delete a task."""
    queue.declare("note")
    queue.submit("note", id="x")
    before = queue.get_task_status("x")
    for call in (
        queue.get_task_status,
        queue.cancel_task,
        queue.requeue,
        queue.delete,
        queue.handle,
    ):
        with pytest.raises(ConfigurationError, match="id"):
            call(hostile)
    assert queue.list_tasks() == ([before], 1)


@pytest.mark.every_store
@pytest.mark.parametrize("text", ["", "' OR '1'='1", "%", "{}", "$ne", "X"])
def test_an_id_is_never_a_pattern_or_query(queue, text):
    queue.declare("note")
    queue.submit("note", id="x")
    before = queue.get_task_status("x")
    for call in (queue.get_task_status, queue.cancel_task, queue.requeue, queue.delete):
        with pytest.raises(TaskNotFound):
            call(text)
    assert queue.list_tasks() == ([before], 1)


# Logging


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, "taskx")
    return lambda level: [r.getMessage() for r in caplog.records if r.levelno == level]


def test_a_failure_is_logged_as_an_error_with_its_traceback(started, log):
    @started.executor("broken", max_attempts=2)
    def broken():
        raise ValueError("look here")

    handle = started.submit("broken")
    assert handle.exception(PATIENCE)
    started.stop()  # until then a worker may be about to log
    [error] = log(logging.ERROR)
    assert handle.id in error
    assert "ValueError: look here" in error
    assert "Traceback" in error
    assert "in broken" in error
    [warning] = log(logging.WARNING)
    assert handle.id in warning
    assert "attempt 1: ValueError: look here" in warning


@pytest.mark.parametrize(
    ("redact", "shown"),
    [
        ({}, "{'url': 'https://example.org/', 'login': {'user': 'ada', 'Password': '***'}}"),
        (
            {"redact": ["user", "URL"]},
            "{'url': '***', 'login': {'user': '***', 'Password': 'hunter2'}}",
        ),
    ],
)
def test_retries_and_failures_show_params_without_secrets(make_queue, log, redact, shown):
    queue = make_queue(**redact)
    params = {"url": "https://example.org/", "login": {"user": "ada", "Password": "hunter2"}}

    @queue.executor("fetch", max_attempts=2)
    def fetch(url, login):
        raise OSError("down")

    with queue:
        assert queue.submit("fetch", params).exception(PATIENCE)
    [error], [retry, _] = log(logging.ERROR), [*log(logging.WARNING), ""]
    assert error.splitlines()[0].endswith(f" (fetch) failed: OSError: down (params={shown})")
    assert "Traceback" in error
    assert retry.endswith(f" after attempt 1: OSError: down (params={shown})")


def test_long_params_are_cut_in_the_log(make_queue, log):
    queue = make_queue()
    queue.executor("broken")(lambda text: 1 / 0)
    with queue:
        assert queue.submit("broken", {"text": "x" * 100_000}).exception(PATIENCE)
    [error] = log(logging.ERROR)
    first = error.splitlines()[0]
    assert first.endswith("xxx…)")
    assert len(first.partition("params=")[2]) == 101


def test_start_and_stop_are_logged_and_successful_tasks_are_not(queue, log):
    queue.executor("fine")(lambda: None)
    with queue:
        queue.submit("fine").result(PATIENCE)
    started, stopped = log(logging.INFO)
    assert "started: 2 workers, types fine" in started
    assert "stopped" in stopped
    assert log(logging.WARNING) == log(logging.ERROR) == []


def test_a_queue_can_use_its_own_logger(make_queue, caplog):
    queue = make_queue(logger=logging.getLogger("mine"))

    @queue.executor("say")
    def say(ctx):
        ctx.logger.warning("told %d", 5, extra={"also": 1})
        raise ValueError

    with queue:
        handle = queue.submit("say")
        assert handle.exception(PATIENCE)
    assert {r.name for r in caplog.records} == {"mine"}
    [said] = [r for r in caplog.records if "told" in r.getMessage()]
    assert said.getMessage() == f"[say {handle.id}] told 5"
    assert (said.task_id, said.task_type, said.also) == (handle.id, "say", 1)


# Memory and threads


class Thing:
    pass


@pytest.mark.parametrize("fails", [False, True])
def test_an_idle_worker_keeps_no_object_of_its_last_task_alive(started, fails):
    made = []

    @started.executor("make")
    def make(ctx):
        thing = Thing()
        made.append(weakref.ref(thing))
        ctx.task.params["thing"] = thing
        if fails:
            raise ValueError(thing)

    gc.disable()
    try:
        handles = [started.submit("make") for _ in range(4)]
        for handle in handles:
            handle.exception(PATIENCE)
        del handle, handles

        def gone():
            settle_references()
            return not any(ref() for ref in made)

        eventually(gone)
    finally:
        gc.enable()
    assert len(made) == 4


def test_the_threads_of_a_queue_end_with_it(make_queue):
    before = threading.active_count()
    for _ in range(3):
        queue = make_queue(worker_num=4)
        queue.executor("fine")(lambda: None)
        with queue:
            queue.submit("fine", timeout=5).result(PATIENCE)
    eventually(lambda: threading.active_count() <= before)


@pytest.mark.parametrize("how", ["completed", "failed", "cancelled"])
def test_a_task_ends_in_one_write_that_resets_no_field(queue, how):
    """The status and the result come in the same write."""

    @queue.executor("end")
    def end(ctx, how):
        queue.repository.update_progress(ctx.task.id, 30, "half way")
        if how == "failed":
            raise ValueError("no")
        if how == "cancelled":
            queue.cancel_task(ctx.task.id)
            ctx.token.raise_if_cancelled()
        return {"n": 1}

    queue.start()
    handle = queue.submit("end", {"how": how}, created_by="user123")
    eventually(handle.done)
    task = handle.task()
    assert (task.status, task.created_by, task.message) == (how, "user123", "half way")
    assert (task.progress, task.params) == (100 if how == "completed" else 30, {"how": how})
    assert task.created_at <= task.started_at <= task.completed_at
    ends = [
        write
        for batch in queue.repository.batches
        for write in batch
        if not isinstance(write, Insert) and write.changes.get("status") == how
    ]
    assert len([write for write in ends if "duration" in write.changes]) == 1
    assert "completed_at" in ends[-1].changes
    if how == "completed":
        assert ends[-1].changes["result"] == '{"n":1}'
