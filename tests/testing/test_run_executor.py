"""One attempt of an executor by itself."""

from __future__ import annotations

import logging
import threading

import pytest
from helpers import run_in_thread

import taskx
from taskx import (
    Context,
    MemoryRepository,
    PayloadError,
    Permanent,
    Queue,
    Retry,
    RetryPolicy,
    Snooze,
    TaskCancelled,
    TaskExecutor,
    TaskStatus,
)
from taskx.testing import ManualClock, run_executor


@taskx.executor("fetch", timeout=30)
def fetch(ctx: Context, url: str, parts: int = 2):
    for n in range(parts):
        ctx.logger.info("part %d of %s", n + 1, url)
        ctx.sleep(10)
        ctx.progress(100 * (n + 1) / parts, f"part {n + 1}")
    return {"url": url, "parts": (1, 2)}


def test_it_returns_what_the_executor_did():
    outcome = run_executor(fetch, {"url": "u"})
    assert outcome.result == {"url": "u", "parts": [1, 2]}
    assert (outcome.error, outcome.status) == (None, TaskStatus.COMPLETED)
    assert outcome.progress == [(50, "part 1"), (100, "part 2")]
    assert outcome.log == ["INFO part 1 of u", "INFO part 2 of u"]
    assert outcome.records[0].args == (1, "u")
    assert outcome.task.duration == 20


def test_an_executor_without_a_context_runs_too():
    assert run_executor(taskx.executor("add")(lambda a, b: a + b), {"a": 1, "b": 2}).result == 3
    assert run_executor(lambda: threading.current_thread().name).result == "MainThread"


def test_a_plain_function_and_a_class_run():
    def double(ctx, n):
        ctx.progress(50)
        return 2 * n

    class Classic(TaskExecutor):
        type = "classic"

        def execute(self, ctx, task):
            task.result = task.params

    assert run_executor(double, {"n": 4}).progress == [(50, "")]
    assert run_executor(Classic(), {"any": 1}).result == {"any": 1}


def test_an_executor_with_bound_options_runs_with_them():
    outcome = run_executor(fetch.using(timeout=5, delay=60), {"url": "u"})
    assert outcome.task.error == "timed out after 5 s"


def test_the_error_is_kept_and_raised_by_result():
    class Mine(Exception):
        pass

    def broken():
        raise Mine("no")

    # In a new thread, which handles no other exception: the traceback would show that, too.
    outcome = run_in_thread(lambda: run_executor(broken))()
    assert type(outcome.error) is Mine
    assert (outcome.status, outcome.task.error) == (TaskStatus.FAILED, "Mine: no")
    with pytest.raises(Mine) as raised:
        _ = outcome.result
    assert raised.value is outcome.error
    assert outcome.task.traceback.count("File ") == 1  # nothing of the kit is in it


def test_a_result_that_is_not_json_is_an_error():
    outcome = run_executor(lambda: object())
    assert outcome.status is TaskStatus.FAILED
    with pytest.raises(PayloadError, match="result"):
        _ = outcome.result


@pytest.mark.parametrize("params", [{}, {"url": "u", "more": 1}, {"url": object()}])
def test_params_that_do_not_fit_are_refused(params):
    with pytest.raises(PayloadError):
        run_executor(fetch, params)


def test_a_retry_leaves_the_task_pending():
    def away():
        raise Retry("later", delay=60)

    outcome = run_executor(away, max_attempts=2)
    assert isinstance(outcome.error, Retry)
    assert outcome.status is TaskStatus.PENDING
    assert (outcome.task.run_at - outcome.task.created_at).total_seconds() == 60
    assert run_executor(away, max_attempts=2, attempt=2).status is TaskStatus.FAILED
    policy = RetryPolicy(3, base=7)
    failing = run_executor(lambda: 1 / 0, retry=policy)
    assert (failing.task.run_at - failing.task.created_at).total_seconds() == 7


def test_snooze_and_permanent_say_what_comes_next():
    def snoozes():
        raise Snooze(5)

    def never():
        raise Permanent("no such user")

    assert run_executor(snoozes).task.snoozes == 1
    assert run_executor(never, max_attempts=5).status is TaskStatus.FAILED


def test_it_is_cancelled_at_a_moment_of_the_clock():
    outcome = run_executor(fetch, {"url": "u", "parts": 5}, cancel_after=15)
    assert isinstance(outcome.error, TaskCancelled)
    assert outcome.status is TaskStatus.CANCELLED
    assert outcome.progress == [(20, "part 1")]
    assert outcome.task.duration == 15
    assert run_executor(fetch, {"url": "u"}, cancel_after=0).progress == []


def test_a_loop_that_only_asks_its_token_is_cancelled():
    def loop(ctx):
        while not ctx.token.cancelled:
            ctx.progress(1)
        return "stopped"

    outcome = run_executor(loop, cancel_after=1)
    assert outcome.result == "stopped"
    assert outcome.task.duration == 1


def test_it_times_out_on_the_clock():
    clock = ManualClock()
    outcome = run_executor(fetch, {"url": "u", "parts": 9}, clock=clock)
    assert outcome.task.error == "timed out after 30 s"
    assert run_executor(fetch, {"url": "u"}, timeout=5).task.error == "timed out after 5 s"
    assert clock.monotonic() == ManualClock().monotonic() + 30


def test_steps_and_cursor_are_recorded_and_can_be_given():
    def copy(ctx):
        first = ctx.step("list", lambda: ["a", "b", "c"])
        for n in range(ctx.cursor or 0, len(first)):
            ctx.step(f"copy {first[n]}", str.upper, first[n])
            ctx.cursor = n + 1
        return ctx.cursor

    whole = run_executor(copy)
    assert whole.called == ["list", "copy a", "copy b", "copy c"]
    assert whole.steps["copy b"] == "B"
    assert (whole.cursor, whole.result) == (3, 3)
    rest = run_executor(copy, attempt=2, steps={"list": ["x", "y", "z"]}, cursor=2)
    assert rest.called == ["copy z"]
    assert rest.steps == {"list": ["x", "y", "z"], "copy z": "Z"}


def test_parents_have_the_results_that_are_given():
    outcome = run_executor(lambda ctx: [p.result for p in ctx.parents], parents=[1, {"a": 2}])
    assert outcome.result == [1, {"a": 2}]


def test_other_loggers_are_heard(caplog):
    def talks():
        logging.getLogger("some.module").warning("%d left", 3)

    assert run_executor(talks).log == ["WARNING 3 left"]


def test_a_message_that_cannot_be_formatted_fails_nothing(monkeypatch):
    monkeypatch.setattr(logging, "raiseExceptions", False)

    def talk(ctx):
        ctx.logger.info("page %d", "one")
        return "done"

    outcome = run_executor(talk)
    assert outcome.result == "done"
    assert outcome.log == ["INFO page %d"]


def test_on_cancel_and_closing_work():
    told = []

    class Resource:
        def abort(self):
            told.append("abort")

        def close(self):
            told.append("close")

    def reads(ctx):
        with ctx.closing(Resource()):
            ctx.on_cancel(lambda: told.append("callback"))
            ctx.sleep(60)

    assert isinstance(run_executor(reads, cancel_after=5).error, TaskCancelled)
    assert sorted(told) == ["abort", "callback", "close"]


def test_the_executor_stays_with_its_own_queue():
    queue = Queue(MemoryRepository())
    own = queue.executor("own", isolation="process")(_isolated)
    assert run_executor(own, {"n": 1}).result == 1
    own.submit(n=2)
    assert queue.list_tasks()[1] == 1


def _isolated(n):
    return n


def test_an_option_that_would_delay_it_is_refused():
    with pytest.raises(TypeError, match="delay"):
        run_executor(_isolated, {"n": 1}, delay=60)
