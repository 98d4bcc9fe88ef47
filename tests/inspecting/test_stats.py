"""The statistics of the stored tasks, on every store."""

from __future__ import annotations

from datetime import timedelta

import pytest
from helpers import PATIENCE, eventually

import taskx
from taskx import ConfigurationError, Percentiles, TypeStats
from taskx.tasks import lifecycle
from taskx.tasks.lifecycle import Ending

HOUR = 3600.0


@pytest.fixture
def queue(make_queue, clock):
    """A queue on a clock that the test moves; it is not started."""
    queue = make_queue(worker_num=2, clock=clock)
    queue.declare("a", "b")
    return queue


def of(queue, type="a", **options):
    """Return the numbers of a type; check that asking changed nothing, and that the answer is JSON."""
    before = list(queue.repository.batches)
    found = queue.stats(**options)
    assert list(queue.repository.batches) == before
    assert taskx.tasks.payload.encode(found.to_dict(), "stats")
    assert list(found.types) == sorted(found.types)
    return found.types.get(type, TypeStats())


def start(queue, task_id):
    """Write the start of a task, as a node does."""
    task = queue.get_task_status(task_id)
    assert all(queue.repository.apply([lifecycle.start(task, queue.clock.now_ms(), "node")]))


def end(queue, task_id, **ending):
    """Write the end of a task's attempt, as a node does."""
    task, now = queue.get_task_status(task_id), queue.clock.now_ms()
    assert any(queue.repository.apply(lifecycle.conclude(task, Ending(**ending), now)))


def run(queue, clock, type="a", *, waits=0.0, runs=0.0, error="", **options):
    """Submit a task that starts and ends after some seconds each; it fails if ``error`` is given."""
    handle = queue.submit(type, **options)
    clock.advance(waits)
    start(queue, handle.id)
    clock.advance(runs)
    end(queue, handle.id, returned=not error, error=error, duration=runs)
    return handle.id


def test_an_empty_repository_has_no_types(queue, clock):
    found = queue.stats()
    assert (found.types, found.since, found.complete) == ({}, None, True)
    assert (found.period, found.checked_at) == (HOUR, clock.now())


def test_a_type_with_an_executor_is_listed_without_tasks(queue):
    queue.executor("mine")(lambda: None)
    assert queue.stats().types == {"mine": TypeStats()}


@pytest.mark.every_store
def test_pending_and_running_tasks_are_counted_by_type(queue, clock):
    first = queue.submit("a")
    queue.submit("a", priority=7)
    queue.submit("b")
    queue.submit("a", delay=60)
    queue.submit("a", depends_on=[first])
    for _ in range(3):
        queue.submit("b", concurrency_key="k")  # the first of them has its turn
    start(queue, first.id)
    found = of(queue)
    assert (found.waiting, found.delayed, found.blocked, found.running) == (1, 1, 1, 1)
    found = of(queue, "b")
    assert (found.waiting, found.delayed, found.blocked, found.running) == (2, 0, 2, 0)
    assert queue.stats().complete


def test_a_task_that_waits_for_a_stuck_thread_is_blocked(queue, clock):
    handle = queue.submit("a", max_attempts=2)
    start(queue, handle.id)
    end(queue, handle.id, returned=False, error="late", stuck=True)
    found = of(queue)
    assert (found.waiting, found.blocked, found.stuck, found.failed) == (0, 1, 1, 0)


def test_an_ended_task_whose_thread_is_stuck_is_not_blocked(queue):
    failed, cancelled = (queue.submit("a", max_attempts=most) for most in (1, 2))
    for handle in (failed, cancelled):
        start(queue, handle.id)
        end(queue, handle.id, returned=False, error="late", stuck=True)
    assert cancelled.cancel()
    assert (failed.task().status, cancelled.task().status) == ("failed", "cancelled")
    found = of(queue)
    assert (found.blocked, found.stuck) == (0, 2)


def test_the_oldest_due_task_is_found_whatever_its_priority(queue, clock):
    assert of(queue).oldest_due is None
    queue.submit("a", priority=-1)
    clock.advance(5)
    queue.submit("a", priority=9)
    queue.submit("b")
    clock.advance(2.5)
    assert of(queue).oldest_due == 7.5
    assert of(queue, "b").oldest_due == 2.5


def test_a_delayed_task_whose_time_has_come_is_waiting(queue, clock):
    queue.submit("a", delay=60)
    clock.advance(70)
    found = of(queue)
    assert (found.waiting, found.delayed, found.oldest_due) == (1, 0, 10.0)


def test_tasks_in_the_buffers_of_nodes_are_waiting(make_queue, clock, gate):
    queue = make_queue(worker_num=1, clock=clock)

    @queue.executor("hold")
    def hold():
        gate()

    with queue:
        queue.submit("hold")
        gate.wait_for(1)
        handles = [queue.submit("hold") for _ in range(3)]
        found = eventually(lambda: (f := queue.stats().types["hold"]).waiting == 3 and f)
        assert (found.running, found.oldest_due) == (1, 0.0)
        gate.open()
        for handle in handles:
            handle.result(PATIENCE)
        found = eventually(lambda: (f := queue.stats().types["hold"]).completed == 4 and f)
        assert (found.waiting, found.running, found.oldest_due) == (0, 0, None)


def test_ended_tasks_of_the_period_are_counted(queue, clock):
    run(queue, clock)
    clock.advance(HOUR + 1)
    for error in ("", "", "", "broken"):
        run(queue, clock, error=error)
    run(queue, clock, "b", error="broken")
    queue.cancel_task(queue.submit("a").id)
    found = of(queue)
    assert (found.completed, found.failed, found.error_share) == (3, 1, 0.25)
    assert of(queue, "b").error_share == 1.0
    assert of(queue, period=2 * HOUR).completed == 4
    assert of(queue, period=timedelta(hours=2)).completed == 4
    assert of(queue, period=0) == TypeStats()  # ended tasks are not read
    clock.advance(HOUR + 1)
    assert of(queue) == TypeStats()


def test_a_task_that_was_submitted_long_ago_counts_when_it_ends(queue, clock):
    handle = queue.submit("a")
    clock.advance(5 * HOUR)
    start(queue, handle.id)
    end(queue, handle.id, returned=True)
    assert of(queue).completed == 1


def test_latency_and_run_time_are_percentiles(queue, clock):
    for number in range(1, 21):
        run(queue, clock, waits=number, runs=number / 2)
    found = of(queue)
    assert found.start_latency == Percentiles(10.0, 19.0)
    assert found.run_time == Percentiles(5.0, 9.5)
    run(queue, clock, "b", waits=3, runs=0.5, error="broken")
    found = of(queue, "b")
    assert (found.start_latency, found.run_time) == (Percentiles(3.0, 3.0), Percentiles(0.5, 0.5))


def test_latency_counts_from_when_the_task_could_start(queue, clock):
    handle = queue.submit("a", run_at=clock.now() + timedelta(seconds=100))
    clock.advance(104)
    queue.repository.apply([lifecycle.release(handle.id)])
    start(queue, handle.id)
    end(queue, handle.id, returned=False, error="broken", permanent=True)
    assert of(queue).start_latency == Percentiles(4.0, 4.0)
    clock.advance(50)
    queue.requeue(handle.id)
    clock.advance(7)
    start(queue, handle.id)
    end(queue, handle.id, returned=True)
    assert of(queue).start_latency == Percentiles(7.0, 7.0)


def test_a_retried_task_has_a_run_time_and_no_latency(queue, clock):
    handle = queue.submit("a", max_attempts=2)
    start(queue, handle.id)
    end(queue, handle.id, returned=False, error="broken")
    clock.advance(30)
    start(queue, handle.id)
    end(queue, handle.id, returned=True, duration=2.0)
    found = of(queue)
    assert (found.start_latency, found.run_time) == (None, Percentiles(2.0, 2.0))
    assert (found.completed, found.failed) == (1, 0)


def test_a_task_that_failed_with_its_parent_never_ran(queue, clock):
    parent = queue.submit("a")
    queue.submit("b", depends_on=[parent], on_parent_failure="fail")
    queue.cancel_task(parent.id)
    found = eventually(lambda: (f := of(queue, "b")).failed and f)
    assert (found.error_share, found.start_latency, found.run_time) == (1.0, None, None)


def test_the_answer_says_since_when_it_covers_ended_tasks(queue, clock):
    times = []
    for _ in range(5):
        times.append(clock.now())
        run(queue, clock)
        clock.advance(60)
    found = queue.stats(at_most=3)
    assert (found.since, found.complete, found.types["a"].completed) == (times[2], False, 3)
    found = queue.stats(at_most=6)
    assert (found.since, found.complete, found.types["a"].completed) == (None, True, 5)
    # The third last was submitted before the period: all later ones were read.
    found = queue.stats(at_most=3, period=150)
    assert (found.since, found.complete, found.types["a"].completed) == (times[2], True, 2)


def test_the_share_of_errors_is_of_a_time_that_was_read_completely(queue, clock):
    run(queue, clock, error="broken")
    for error in ("", "", "broken", ""):
        clock.advance(60)
        run(queue, clock, error=error)
    assert of(queue).error_share == 0.4
    # The first failed task was submitted before the completed ones that are read.
    found = of(queue, at_most=3)
    assert (found.completed, found.failed, found.error_share) == (3, 2, 0.25)


def test_the_answer_is_incomplete_if_there_are_more_unfinished_tasks(queue):
    for _ in range(3):
        queue.submit("a", delay=60)
    assert queue.stats(at_most=4).complete
    found = queue.stats(at_most=2)
    assert (found.types["a"].delayed, found.complete) == (2, False)
    for _ in range(3):
        queue.submit("b")
    assert queue.stats(at_most=4).types["b"].waiting == 3
    found = queue.stats(at_most=4, waiting_at_most=2)
    assert (found.types["b"].waiting, found.complete) == (2, False)


def test_a_damaged_record_hides_no_other(queue, clock):
    damaged = run(queue, clock)
    run(queue, clock)
    assert all(queue.repository.apply([taskx.tasks.writes.Update(damaged, {}, {"errors": "x"})]))
    assert of(queue).completed == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"period": -1}, "period"),
        ({"at_most": 0}, "at_most"),
        ({"at_most": 1.5}, "at_most"),
        ({"waiting_at_most": 0}, "waiting_at_most"),
    ],
)
def test_a_wrong_argument_is_refused(queue, options, words):
    with pytest.raises(ConfigurationError, match=words):
        queue.stats(**options)
