"""The context of the executor that a thread is inside, and log records that name its task."""

from __future__ import annotations

import logging
import threading

import pytest
from helpers import PATIENCE, run_in_thread

import taskx
from taskx import MemoryRepository, Queue, TaskLogFilter, current_context


@pytest.fixture
def records():
    """The records that a handler with the filter gets from a logger of the program."""
    found = []
    handler = logging.Handler()
    handler.emit = found.append
    handler.addFilter(TaskLogFilter())
    log = logging.getLogger("program.part")
    log.addHandler(handler)
    yield found
    log.removeHandler(handler)


def test_a_function_finds_the_context_of_the_executor_that_calls_it(started):
    started.executor("outer")(lambda ctx: current_context() is ctx)
    assert current_context() is None
    assert started.submit("outer").result(PATIENCE)
    assert current_context() is None


def test_a_task_that_runs_inside_another_has_its_own_context(make_queue):
    queue = make_queue(worker_num=1, buffer_size=1, overflow="caller_runs")
    seen = []

    @queue.executor("inner")
    def inner(number):
        seen.append(current_context().task.params["number"])

    @queue.executor("outer")
    def outer():
        for number in range(3):
            queue.submit("inner", {"number": number})
            seen.append(current_context().task.type)

    queue.start()
    queue.submit("outer").result(PATIENCE)
    assert queue.drain(PATIENCE)
    assert seen.count("outer") == 3
    assert sorted(set(seen) - {"outer"}) == [0, 1, 2]


def test_a_thread_that_an_executor_starts_is_outside(started):
    started.executor("outer")(lambda: run_in_thread(current_context)() is None)
    assert started.submit("outer").result(PATIENCE)


def test_the_context_is_gone_after_an_error(started):
    threads = []

    @started.executor("bad")
    def bad():
        threads.append(threading.current_thread())
        raise SystemExit

    started.executor("after")(lambda ctx: current_context() is ctx)
    assert started.submit("bad").exception(PATIENCE) is not None
    assert started.submit("after").result(PATIENCE)


def test_records_of_all_loggers_name_the_task(started, records):
    log = logging.getLogger("program.part")

    @started.executor("talk")
    def talk():
        log.warning("inside")
        log.warning("with an id of its own", extra={"task_id": "other"})

    handle = started.submit("talk")
    handle.result(PATIENCE)
    log.warning("outside")
    assert [(r.task_id, r.task_type) for r in records] == [
        (handle.id, "talk"),
        ("other", "talk"),
        ("", ""),
    ]


@taskx.executor(isolation="process")
def isolated(ctx):
    """Return the id that a log record has in a child process."""
    record = logging.LogRecord("x", logging.INFO, "", 0, "", (), None)
    TaskLogFilter().filter(record)
    return [record.task_id, current_context() is ctx]


@pytest.mark.process
def test_a_child_process_knows_its_task():
    with Queue(MemoryRepository()) as queue:
        queue.register_executor(isolated)
        handle = queue.submit("isolated")
        assert handle.result(PATIENCE) == [handle.id, True]
