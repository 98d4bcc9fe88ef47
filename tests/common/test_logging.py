"""Errors of logging, raised by a user's own filter or handler, change nothing for tasks."""

from __future__ import annotations

import logging
import threading

import pytest
from helpers import PATIENCE, eventually, housekeeper_of, node_of, pool_of

from taskx import RetryPolicy, Task, TaskFailed, TaskStatus, every


class NoRequest(logging.Filter):
    """A filter that needs a web request, which TaskX's threads do not have."""

    def filter(self, record):
        raise RuntimeError("working outside of request context")


class Exits(logging.Handler):
    """A handler that exits, which ends only the thread that calls it."""

    def emit(self, record):
        if threading.current_thread() is not threading.main_thread():
            raise SystemExit(1)


@pytest.fixture(params=["filter", "handler"])
def logger(request):
    """A logger that raises at each log record, even for single tasks."""
    made = logging.Logger("app", logging.DEBUG)  # noqa: LOG001  (of this test alone)
    if request.param == "filter":
        made.addFilter(NoRequest())
    else:
        made.addHandler(Exits())
    return made


@pytest.fixture
def queue(make_queue, logger, monkeypatch):
    monkeypatch.setattr(logging, "raiseExceptions", False)  # thousands of lines on stderr
    queue = make_queue(worker_num=2, logger=logger)
    queue.executor("fine")(lambda: "fine")
    queue.executor("wrong")(lambda: 1 / 0)
    return queue


def threads(queue):
    """Return the threads of a started queue that have not ended."""
    node = node_of(queue)
    return [t for t in (*node.pool.threads, node._housekeeper._thread) if t.is_alive()]


def test_tasks_end_normally_if_logging_raises(queue):
    """This holds even if many outcomes are committed at once. The queue loses no thread."""
    queue.start()
    kinds = ["fine", "wrong"] * 40
    handles = queue.submit_many([Task(type=kind) for kind in kinds])
    for kind, handle in zip(kinds, handles, strict=True):
        if kind == "fine":
            assert handle.result(PATIENCE) == "fine"
        else:
            with pytest.raises(TaskFailed, match="ZeroDivisionError"):
                handle.result(PATIENCE)
    assert queue.drain(PATIENCE)
    assert len(threads(queue)) == 3
    assert queue.stop(PATIENCE) == []


def test_a_retry_happens_if_logging_raises(queue):
    attempts = []

    @queue.executor("second", max_attempts=2)
    def second():
        attempts.append(1)
        if len(attempts) == 1:
            raise ValueError("not yet")
        return "done"

    queue.start()
    assert queue.submit("second").result(PATIENCE) == "done"


def test_a_failing_retry_policy_costs_no_attempt_if_logging_raises(queue):
    def backoff(attempt):  # the run itself logs its error
        raise ValueError("no")

    policy = RetryPolicy(2, backoff=backoff, base=0)
    queue.executor("never", retry=policy)(lambda: 1 / 0)
    queue.start()
    handle = queue.submit("never")
    with pytest.raises(TaskFailed, match="ZeroDivisionError") as failed:
        handle.result(PATIENCE)
    assert failed.value.attempt == 2


@pytest.mark.every_store
def test_the_housekeeper_goes_on_if_logging_raises(make_queue, logger, clock, monkeypatch):
    """It logs ticks that were missed, and does so before it checks delayed tasks."""
    monkeypatch.setattr(logging, "raiseExceptions", False)
    queue = make_queue(logger=logger, clock=clock)
    queue.executor("fine")(lambda: "fine")
    queue.schedule("late", every(60), "fine").store()
    clock.advance(100)
    queue.start()
    eventually(lambda: queue.list_tasks()[1] == 1)
    delayed = queue.submit("fine", delay=1)
    clock.advance(2)
    assert delayed.result(PATIENCE) == "fine"
    assert len(threads(queue)) == queue.config.worker_num + 1


@pytest.mark.timing(longest_pause=0.05)
def test_a_worker_goes_on_after_a_defect_if_logging_raises(queue, monkeypatch):
    """The thread that logs a defect of TaskX must not end by that."""
    queue.start()
    pool, stumbled = pool_of(queue), threading.Semaphore(0)

    def stumble(*args):
        stumbled.release()
        raise RuntimeError("a defect")

    with monkeypatch.context() as patch:
        patch.setattr(pool.ahead, "take", stumble)
        patch.setattr(housekeeper_of(queue), "tick", stumble)
        queue.submit("fine")  # wakes a worker
        for _ in range(10):
            assert stumbled.acquire(timeout=PATIENCE)
    assert queue.submit("fine").result(PATIENCE) == "fine"
    assert len(threads(queue)) == 3


def test_a_stuck_task_is_abandoned_if_logging_raises(make_queue, logger, clock, gate, monkeypatch):
    monkeypatch.setattr(logging, "raiseExceptions", False)
    queue = make_queue(worker_num=2, logger=logger, clock=clock)
    queue.executor("hang", timeout=60, grace=0.0)(lambda: gate())
    queue.start()
    handle = queue.submit("hang")
    gate.wait_for()
    clock.advance(60)
    with pytest.raises(TaskFailed, match="its thread still runs"):
        handle.result(PATIENCE)
    gate.open()
    eventually(lambda: handle.task().stuck_on == "")
    eventually(lambda: len(threads(queue)) == 3)  # the thread that came back ends a moment later


def test_an_error_of_ctx_logger_reaches_the_executor(queue):
    """``ctx.logger`` is the queue's logger itself, so it raises in the executor."""

    @queue.executor("talk")
    def talk(ctx):
        assert ctx.logger.logger is queue_logger
        ctx.logger.info("hello")

    queue_logger = queue._log.logger
    queue.start()
    handle = queue.submit("talk")
    with pytest.raises(TaskFailed, match=r"request context|SystemExit"):
        handle.result(PATIENCE)
    assert handle.task().status is TaskStatus.FAILED
