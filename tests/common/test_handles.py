"""Handles: a task as a Future, in the process that submitted it and in any other."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from concurrent.futures import CancelledError, Future, as_completed, wait

import pytest
from helpers import (
    PATIENCE,
    eventually,
    frequent_checks,
    no_rounds,
    parts_of,
    run_in_thread,
)

from taskx import Queue, SQLiteRepository, Task, TaskFailed, TaskHandle, TaskNotFound, TaskStatus


@pytest.fixture
def started(queue):
    queue.executor("echo")(lambda value: value)
    queue.executor("fail")(lambda: 1 / 0)
    queue.start()
    return queue


def test_a_handle_is_a_future(started):
    handle = started.submit("echo", {"value": 1})
    assert isinstance(handle, Future)
    assert isinstance(handle, TaskHandle)
    assert handle.result(PATIENCE) == 1
    assert handle.done()
    assert not handle.cancelled()
    assert handle.exception(0) is None
    assert handle.id in repr(handle)


def test_the_handle_of_a_failed_task_raises_task_failed(started):
    handle = started.submit("fail")
    failure = handle.exception(PATIENCE)
    assert isinstance(failure, TaskFailed)
    assert (failure.task_id, failure.attempt) == (handle.id, 1)
    assert failure.error == "ZeroDivisionError: division by zero"
    assert "in <lambda>" in failure.traceback
    assert failure.error_type == "ZeroDivisionError"
    with pytest.raises(TaskFailed, match="failed in attempt 1: ZeroDivisionError"):
        handle.result()
    assert handle.done()


def test_the_handle_of_a_cancelled_task_raises_cancelled_error(busy):
    queue = busy()
    handle = queue.submit("note")
    assert not handle.done()
    assert handle.cancel() is True
    assert handle.cancelled()
    assert handle.done()
    for call in (handle.result, handle.exception):
        with pytest.raises(CancelledError):
            call(0)


@pytest.mark.every_store
def test_cancelling_a_running_task_asks_it_to_stop(started, gate):
    started.executor("hold")(lambda ctx: (gate(), ctx.token.raise_if_cancelled()))
    handle = started.submit("hold")
    gate.wait_for(1)
    assert handle.running()
    assert handle.cancel() is False
    assert not handle.done()
    gate.open()
    with pytest.raises(CancelledError, match=f"task {handle.id} was cancelled"):
        handle.result(PATIENCE)
    assert handle.cancelled()
    assert not handle.running()


def test_result_raises_timeout_error_after_its_timeout(busy):
    handle = busy().submit("note")
    with pytest.raises(concurrent.futures.TimeoutError, match=f"{handle.id} has .* within 0.01 s"):
        handle.result(timeout=0.01)
    with pytest.raises(concurrent.futures.TimeoutError):
        handle.exception(timeout=0)


def test_handles_work_with_wait_and_as_completed(started, gate):
    started.executor("hold")(lambda: gate())
    held = started.submit("hold")
    gate.wait_for(1)
    quick = [started.submit("echo", {"value": n}) for n in range(20)]
    done, open_ = wait([held, *quick], PATIENCE, return_when=concurrent.futures.FIRST_COMPLETED)
    assert done
    assert held in open_
    assert sorted(h.result() for h in as_completed(quick, PATIENCE)) == list(range(20))
    failed = started.submit("fail")
    done, _ = wait([held, failed], PATIENCE, return_when=concurrent.futures.FIRST_EXCEPTION)
    assert done == {failed}
    gate.open()
    done, open_ = wait([held, *quick, failed], PATIENCE)
    assert not open_


def test_handles_of_tasks_that_have_already_ended_resolve_at_once(started):
    handles = [started.submit("echo", {"value": n}) for n in range(5)]
    assert started.drain(PATIENCE)
    done, open_ = wait(handles, PATIENCE)
    assert (len(done), len(open_)) == (5, 0)
    assert [h.result(0) for h in handles] == list(range(5))


def test_handles_work_with_asyncio(started):
    async def main():
        good, bad = started.submit("echo", {"value": 1}), started.submit("fail")
        assert await asyncio.wait_for(asyncio.wrap_future(good), PATIENCE) == 1
        with pytest.raises(TaskFailed):
            await asyncio.wait_for(asyncio.wrap_future(bad), PATIENCE)

    asyncio.run(main())


def test_each_done_callback_is_called_once(started, gate):
    started.executor("hold")(lambda: gate())
    handle = started.submit("hold")
    seen = []
    called = threading.Semaphore(0)

    def callback(future):
        seen.append((future, threading.current_thread()))
        called.release()

    handle.add_done_callback(callback)
    handle.add_done_callback(callback)
    gate.open()
    for _ in range(2):
        assert called.acquire(timeout=PATIENCE)
    assert [future for future, _ in seen] == [handle, handle]
    handle.add_done_callback(callback)  # called at once, because the task has ended
    assert called.acquire(timeout=PATIENCE)


def test_a_done_callback_that_hangs_blocks_no_worker(started, gate):
    added = threading.Event()  # the callback of a task that has ended is called at once
    started.executor("hold")(lambda: added.wait(PATIENCE))
    handles = [started.submit("hold") for _ in range(4)]
    for handle in handles:
        handle.add_done_callback(lambda _: gate())
    added.set()
    gate.wait_for(4)
    assert started.submit("echo", {"value": 5}).result(PATIENCE) == 5


def test_a_handle_resolves_after_the_outcome_is_committed(started):
    statuses = []
    handle = started.submit("echo", {"value": 1}, delay=0.05)
    reached = threading.Event()
    handle.add_done_callback(lambda h: (statuses.append(h.task().status), reached.set()))
    assert reached.wait(PATIENCE)
    assert statuses == [TaskStatus.COMPLETED]


@pytest.mark.timing(handles_every=10 * PATIENCE)
def test_the_result_of_a_task_that_ran_here_is_not_read_back(started, gate):
    started.executor("hold")(lambda: gate() or [1])
    handle = started.submit("hold")
    assert not handle.done()
    gate.wait_for(1)
    reads = []
    with no_rounds(started):  # the housekeeper reads what has changed, and nobody was told of yet
        started.repository.get_many = lambda task_ids: reads.append(task_ids) or {}
        gate.open()
        assert handle.result(PATIENCE) == [1]
        assert [handle.id] not in reads


def test_an_unused_handle_costs_nothing(started):
    handle = started.submit("echo", {"value": 1})
    assert vars(handle).keys() == {"id", "_owner"}
    assert not parts_of(started).watcher.watching
    handle.result(PATIENCE)
    eventually(lambda: not parts_of(started).watcher.watching)


def test_a_handle_that_gets_the_place_in_memory_of_an_unused_one_is_watched(queue):
    """The task completes at that moment, so the thread that tells its end has seen the unused one."""
    watcher, handle = parts_of(queue).watcher, queue.handle("t")

    def unused():
        watcher._register(handle)

    watcher._handles["t"] = {id(handle): unused}
    watcher.complete(Task(id="t", type="t"), "7")
    assert watcher._live("t") == [handle]


def test_many_threads_can_wait_for_one_task(started, gate):
    started.executor("hold")(lambda: (gate(), "value")[1])
    handle = started.submit("hold")
    waiting = [run_in_thread(lambda: handle.result(PATIENCE)) for _ in range(10)]
    waiting += [
        run_in_thread(lambda: started.handle(handle.id).result(PATIENCE)) for _ in range(10)
    ]
    gate.wait_for(1)
    gate.open()
    assert [result() for result in waiting] == ["value"] * 20


def test_the_handle_of_an_unknown_id_raises_task_not_found(started):
    handle = started.handle("nobody")
    with pytest.raises(TaskNotFound, match="nobody"):
        handle.result(PATIENCE)
    for call in (handle.task, handle.cancel, handle.running):
        with pytest.raises(TaskNotFound):
            call()


def test_deleting_a_task_wakes_the_threads_that_wait_for_it(started):
    handle = started.submit("echo", {"value": 1}, delay=1000)
    waiting = run_in_thread(lambda: handle.result(PATIENCE))
    eventually(lambda: parts_of(started).watcher.watching)
    started.delete(handle.id)
    with pytest.raises(TaskNotFound, match=handle.id):
        waiting()


@pytest.mark.every_store
@frequent_checks
def test_result_can_be_called_again_on_a_queue_that_is_not_started(queue, make_queue):
    queue.declare("echo")
    handle = queue.submit("echo", {"value": 1})
    queue.repository.down = True
    with pytest.raises(Exception, match="down"):
        handle.result(PATIENCE)
    queue.repository.down = False
    runner = make_queue()
    runner.executor("echo")(lambda value: value)
    runner.start()
    assert handle.result(PATIENCE) == 1


# Queues that do not run tasks


@frequent_checks
def test_a_queue_that_is_not_started_stores_tasks_for_other_queues(make_queue):
    submitter, runner = make_queue(), make_queue(worker_num=1)
    submitter.declare("echo", "other")
    handles = [submitter.submit("echo", {"value": n}) for n in range(250)]  # has no buffer to fill
    assert {h.task().status for h in handles} == {TaskStatus.PENDING}
    runner.executor("echo")(lambda value: value)
    runner.start()
    assert [h.result(PATIENCE) for h in handles] == list(range(250))


def test_a_queue_does_not_run_a_type_that_it_only_declares(started, make_queue):
    started.declare("elsewhere")
    handle = started.submit("elsewhere", max_attempts=2)
    assert started.drain(PATIENCE)
    assert handle.task().status is TaskStatus.PENDING
    later = make_queue(worker_num=1)
    later.declare("elsewhere")
    later.executor("last")(lambda: "run")
    later.start()  # fetches the stored tasks
    assert later.submit("last").result(PATIENCE) == "run"
    assert (handle.task().status, handle.task().starts) == (TaskStatus.PENDING, 0)
    other = make_queue()
    other.executor("elsewhere", timeout=7, max_attempts=5)(
        lambda ctx: [ctx.task.timeout, ctx.task.max_attempts]
    )
    other.start()
    assert handle.result(PATIENCE) == [7, 2]


def test_waiting_for_a_task_that_no_node_can_run_warns_once(queue, make_queue, caplog):
    queue.declare("echo")
    handles = [queue.submit("echo", {"value": n}) for n in range(2)]
    for handle in handles:
        with pytest.raises(concurrent.futures.TimeoutError):
            handle.result(0.01)
    messages = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    [warning] = [message for message in messages if message.startswith("waiting")]
    assert handles[0].id in warning
    assert "'echo'" in warning


@pytest.mark.timing(handles_every=0.0)  # each wait is looked at
def test_each_type_that_no_node_can_run_is_warned_of_also_in_later_waits(
    queue, make_queue, repository, caplog
):
    worker = make_queue(repository)
    worker.executor("run")(lambda: 5)
    worker.start()
    queue.declare("run", "echo", "other")
    assert queue.submit("run").result(PATIENCE) == 5
    for type in ("echo", "other", "echo"):
        with pytest.raises(concurrent.futures.TimeoutError):
            queue.submit(type).result(0.01)
    waits = [r.getMessage() for r in caplog.records if r.getMessage().startswith("waiting")]
    assert [next(t for t in ("echo", "other") if repr(t) in wait) for wait in waits] == [
        "echo",
        "other",
    ]


@frequent_checks
def test_waiting_for_a_task_that_another_queue_runs_does_not_warn(
    queue, started, make_queue, caplog
):
    submitter = make_queue()
    submitter.declare("echo")
    assert submitter.submit("echo", {"value": 1}).result(PATIENCE) == 1
    assert not [r for r in caplog.records if r.levelno == logging.WARNING]


@pytest.mark.every_store
def test_two_queues_share_the_work(make_queue, repository):
    from helpers import SpySQLite

    others = repository
    if isinstance(repository, SpySQLite):
        others = SpySQLite(repository.path)
    ran: list[tuple[str, int]] = []
    both = {"a": threading.Event(), "b": threading.Event()}

    def note(name, n):
        both[name].set()
        assert all(one.wait(PATIENCE) for one in both.values())  # until both queues run a task
        ran.append((name, n))

    queues = []
    for name, on in (("a", repository), ("b", others)):
        queue = make_queue(on, worker_num=2)
        queue.executor("note")(lambda n, name=name: note(name, n))
        queues.append(queue)
    handles = [queues[0].submit("note", {"n": n}) for n in range(300)]
    for queue in queues:
        queue.start()
    for handle in handles:
        handle.result(PATIENCE)
    assert sorted(n for _, n in ran) == list(range(300))
    assert {name for name, _ in ran} == {"a", "b"}
    for queue in queues:
        queue.stop()
    others.close()


# In another process

WAITER = """
import sys
from taskx import Queue, SQLiteRepository

queue = Queue(SQLiteRepository(sys.argv[1]))
handle = queue.handle("mine")
print(handle.task().status, flush=True)
print(handle.result(100), flush=True)
try:
    queue.handle("nobody").result(100)
except LookupError as error:
    print(error)
"""


def test_a_handle_works_in_another_process(database, spawn):
    repository = SQLiteRepository(database)
    queue = Queue(repository)
    opened = threading.Event()

    @queue.executor("hold")
    def hold():
        assert opened.wait(PATIENCE)
        return {"from": "here"}

    with repository, queue:
        queue.submit("hold", id="mine")
        child = spawn(WAITER, database)
        assert child.read() in ("pending", "running")
        opened.set()
        assert child.read() == "{'from': 'here'}"
        out, err = child.ends()
        assert "no task with id 'nobody'" in out
        assert err == ""


RUNNER = """
import sys
from taskx import Config, Queue, SQLiteRepository

queue = Queue(SQLiteRepository(sys.argv[1]), Config(worker_num=2))

@queue.executor()
def double(ctx, n):
    ctx.progress(50, "half way")
    return 2 * n

@queue.executor()
def listen(ctx):
    print("listening", flush=True)
    ctx.sleep(600)

with queue:
    print("started", flush=True)
    sys.stdin.readline()
"""


def test_a_worker_process_runs_the_tasks_of_a_web_process(database, spawn):
    child = spawn(RUNNER, database)
    assert child.read() == "started"
    with SQLiteRepository(database) as repository:
        queue = Queue(repository)
        queue.declare("double", "listen")
        assert queue.submit("double", {"n": 4}).result(PATIENCE) == 8
        handles = [queue.submit("double", {"n": n}) for n in range(50)]
        assert [h.result(PATIENCE) for h in handles] == [2 * n for n in range(50)]
        listening = queue.submit("listen")
        assert child.read() == "listening"
        assert listening.cancel() is False
        with pytest.raises(CancelledError):
            listening.result(PATIENCE)
        child.tell()
        assert child.ends()[1] == ""
