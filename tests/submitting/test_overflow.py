"""A full buffer: reject, block, spill or run in the caller, also inside an executor."""

from __future__ import annotations

import threading
import tracemalloc
from datetime import datetime, timedelta, timezone

import pytest
from helpers import PATIENCE, eventually, ids, no_batches, pool_of, run_in_thread

from taskx import QueueFull, QueueStopped, Task, TaskStatus

OVERFLOWS = ["reject", "block", "spill", "caller_runs"]


def test_reject_is_the_default_and_leaves_no_record(busy):
    queue = busy(buffer_size=2)
    kept = [queue.submit("note", {"n": n}) for n in range(2)]
    before = ids(queue)
    with pytest.raises(QueueFull, match=r"holds 2 of buffer_size=2.*overflow='reject'"):
        queue.submit("note")
    assert ids(queue) == before
    assert not any(handle.done() for handle in kept)


def test_a_slot_is_free_again_when_a_worker_has_taken_its_task(busy, gate):
    queue = busy(buffer_size=1)
    queue.submit("note", {"n": 1})
    gate.open()
    assert queue.drain(PATIENCE)
    queue.submit("note", {"n": 2}).result(PATIENCE)
    assert queue.ran == [1, 2]


def test_block_waits_for_room(busy, gate):
    queue = busy(buffer_size=1, overflow="block")
    queue.submit("note", {"n": 1})
    second = run_in_thread(lambda: queue.submit("note", {"n": 2}))
    assert len(ids(queue)) == 2
    gate.open()
    second().result(PATIENCE)
    assert queue.ran == [1, 2]


def test_block_raises_after_its_timeout(busy):
    queue = busy(buffer_size=1, overflow="block", block_timeout=0.05)
    queue.submit("note")
    before = ids(queue)
    with pytest.raises(QueueFull, match="block"):
        queue.submit("note")
    assert ids(queue) == before


def test_a_stop_ends_a_blocked_submit(busy, gate):
    queue = busy(buffer_size=1, overflow="block")
    queue.submit("note")
    blocked = [run_in_thread(lambda: queue.submit("note", id="late")) for _ in range(3)]
    eventually(lambda: len(pool_of(queue).buffer.room.listening) == 3)
    stopping = run_in_thread(lambda: queue.stop(PATIENCE))
    for result in blocked:
        with pytest.raises(QueueStopped):
            result()
    gate.open()
    stopping()
    assert "late" not in ids(queue)


@no_batches
def test_spill_runs_all_tasks_in_order(busy, gate):
    queue = busy(buffer_size=3, overflow="spill")
    handles = [queue.submit("note", {"n": n}) for n in range(150)]
    gate.open()
    for handle in handles:
        handle.result(PATIENCE)
    assert queue.ran == list(range(150))


@pytest.mark.parametrize("repository", ["sqlite"], indirect=True)
def test_spilled_tasks_need_little_memory(busy):
    queue = busy(buffer_size=10, overflow="spill")
    tasks = [Task(type="note", params={"n": n}) for n in range(200)]
    queue.submit_many(tasks)
    pool = pool_of(queue)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(20):
            queue.submit_many(tasks)
            queue.repository.batches.clear()
        held = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert queue.list_tasks()[1] == 4201
    assert held / 4000 < 200
    assert len(pool.buffer) <= 10 + pool.buffer.fetch_size


def test_caller_runs_executes_the_task_in_the_callers_thread(busy):
    queue = busy(buffer_size=1, overflow="caller_runs")
    here = []
    queue.executor("here")(lambda: here.append(threading.current_thread()))
    queue.submit("note")
    handle = queue.submit("here")
    assert here == [threading.current_thread()]
    assert handle.task().status is TaskStatus.COMPLETED
    assert handle.task().worker.endswith(f" {threading.current_thread().name}")
    assert handle.result(0) is None


def test_a_task_in_the_callers_thread_may_fail_like_any_other(busy):
    queue = busy(buffer_size=1, overflow="caller_runs")

    @queue.executor("fail")
    def fail():
        raise SystemExit("not the submitter's")

    queue.submit("note")
    assert queue.submit("fail").task().error == "SystemExit: not the submitter's"


def test_ctrl_c_during_caller_runs_reaches_the_caller(busy):
    queue = busy(buffer_size=1, overflow="caller_runs")

    @queue.executor("interrupted")
    def interrupted():
        raise KeyboardInterrupt

    queue.submit("note")
    with pytest.raises(KeyboardInterrupt):
        queue.submit("interrupted", id="x")
    task = queue.get_task_status("x")
    assert (task.status, task.errors, task.interruptions) == (TaskStatus.PENDING, 0, 1)


def test_ctrl_c_after_the_deadline_of_a_block_reaches_the_caller(busy):
    queue = busy(buffer_size=1, overflow="caller_runs")

    @queue.executor("interrupted")
    def interrupted(ctx):
        with ctx.timeout(0.01) as token:
            assert token.wait(PATIENCE)
            raise KeyboardInterrupt

    queue.submit("note")
    with pytest.raises(KeyboardInterrupt):
        queue.submit("interrupted")


def test_a_stop_waits_for_a_task_in_the_callers_thread(busy, gate):
    """The time that a stop gives to running tasks also applies to a task in the caller's thread."""
    queue = busy(buffer_size=1, overflow="caller_runs")
    begun, go_on = threading.Event(), threading.Event()

    @queue.executor("here")
    def here(ctx):
        begun.set()
        go_on.wait(PATIENCE)
        ctx.token.raise_if_cancelled()

    queue.submit("note")
    caller = run_in_thread(lambda: queue.submit("here"))
    assert begun.wait(PATIENCE)
    gate.open()
    stopping = run_in_thread(lambda: queue.stop(PATIENCE))
    eventually(lambda: pool_of(queue).workers_left == 0)
    go_on.set()
    assert stopping() == []
    assert caller().task().status is TaskStatus.COMPLETED


@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_submits_inside_executors_never_deadlock(make_queue, overflow):
    """All workers submit more tasks than fit into the buffer, at the same time."""
    queue = make_queue(worker_num=2, buffer_size=2, overflow=overflow)
    barrier = threading.Barrier(2)
    ran = []

    queue.executor("leaf")(lambda n: ran.append(n))

    @queue.executor("parent")
    def parent(start):
        barrier.wait(PATIENCE)
        accepted = []
        for n in range(start, start + 10):
            try:
                queue.submit("leaf", {"n": n})
                accepted.append(n)
            except QueueFull:
                assert overflow == "reject"
        return accepted

    queue.start()
    parents = [queue.submit("parent", {"start": start}) for start in (0, 100)]
    accepted = [n for handle in parents for n in handle.result(PATIENCE)]
    assert queue.drain(PATIENCE)
    assert sorted(ran) == sorted(accepted)
    assert len(accepted) == 20 or overflow == "reject"


@no_batches
@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_submit_many_may_exceed_the_buffer_unless_it_rejects(busy, gate, overflow):
    queue = busy(buffer_size=4, overflow=overflow)
    tasks = [Task(type="note", params={"n": n}) for n in range(20)]
    before = ids(queue)
    if overflow == "reject":
        with pytest.raises(QueueFull, match="20 more"):
            queue.submit_many(tasks)
        assert ids(queue) == before
        tasks = tasks[:4]
    handles = queue.submit_many(tasks)
    gate.open()
    for handle in handles:
        handle.result(PATIENCE)
    assert queue.ran == list(range(len(tasks)))


@no_batches
def test_the_spilled_rest_of_a_batch_runs_after_its_buffered_part(busy, gate, repository):
    """The order holds even if the rest is fetched before the others are in the buffer."""
    queue = busy(buffer_size=4, overflow="spill")
    pool = pool_of(queue)
    eventually(lambda: pool.fetcher.alone)

    def fetch(writes):
        repository.after = lambda writes: None
        pool.agenda.expect_more()
        pool.fetcher.refill()

    repository.after = fetch
    queue.submit_many([Task(type="note", params={"n": n}) for n in range(20)])
    gate.open()
    assert queue.drain(PATIENCE)
    assert queue.ran == list(range(20))


def test_fetched_tasks_take_no_room_from_submits(make_queue, gate):
    """A backlog in the repository fills only the other part of the buffer."""
    queue = make_queue(worker_num=1, buffer_size=3)
    ran = []
    queue.executor("note")(lambda n: ran.append(n))
    queue.executor("hold", priority=9)(lambda: gate())
    queue.submit("hold")
    for n in range(200):
        queue.submit("note", {"n": n})
    queue.start()
    gate.wait_for(1)
    for n in range(200, 203):
        queue.submit("note", {"n": n})
    with pytest.raises(QueueFull):
        queue.submit("note", {"n": 203})
    gate.open()
    assert queue.drain(PATIENCE)
    assert sorted(ran) == list(range(203))


@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_delayed_tasks_wake_no_worker(make_queue, overflow):
    queue = make_queue(worker_num=1, overflow=overflow)
    queue.executor("fine")(lambda: None)
    queue.start()
    pool, woken = pool_of(queue), []
    eventually(lambda: pool.ahead.waiting)
    pool.buffer._wake = lambda: woken.append("a worker") or True
    tomorrow = datetime.now(timezone.utc) + timedelta(days=1)
    queue.submit_many([Task(type="fine", run_at=tomorrow) for _ in range(2)])
    assert woken == []
