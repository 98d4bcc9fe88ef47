"""The statistics of the stored tasks, on every store."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from helpers import PATIENCE, eventually

import taskx
from taskx import ConfigurationError, Context, Percentiles, Snooze, Task, TypeStats
from taskx.tasks import lifecycle
from taskx.tasks.lifecycle import Ending
from taskx.testing import ManualQueue

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


def test_an_empty_repository_has_no_types(queue, clock):
    found = queue.stats()
    since = clock.now() - timedelta(hours=1)
    assert (found.types, found.since, found.complete) == ({}, since, True)
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


@pytest.fixture
def driven(repository, clock):
    """A queue on the same clock, whose tasks run in this thread, for some seconds."""
    queue = ManualQueue(repository, clock=clock)

    @queue.executor("a")
    @queue.executor("b")
    def work(ctx: Context, runs: float = 0, error: str = ""):
        ctx.sleep(runs)
        if error:
            raise ValueError(error)

    yield queue
    queue.close()


def run(queue, type="a", *, waits=0.0, **params):
    """Submit a task and run it after some seconds."""
    handle = queue.submit(type, params)
    queue.clock.advance(waits)
    queue.run_all()
    return handle.id


@pytest.mark.every_store
def test_ended_tasks_of_the_period_are_counted(driven, clock):
    begin = clock.now()
    run(driven)
    driven.advance(HOUR + 60)
    for error in ("", "", "", "broken"):
        run(driven, error=error)
    run(driven, "b", error="broken")
    driven.cancel_task(driven.submit("a", {}).id)
    found = of(driven)
    assert (found.completed, found.failed, found.error_share) == (3, 1, 0.25)
    assert (found.started, found.cancelled) == (4, 1)
    assert of(driven, "b").error_share == 1.0
    assert of(driven, period=2 * HOUR).completed == 4
    assert of(driven, period=timedelta(hours=2)).completed == 4
    assert of(driven, since=begin).completed == 4
    assert of(driven, period=0) == TypeStats()  # nothing is counted
    driven.advance(HOUR + 60)
    assert of(driven) == TypeStats()


def test_a_task_that_was_submitted_long_ago_counts_when_it_ends(driven):
    run(driven, waits=5 * HOUR)
    assert of(driven, period=60).completed == 1


def test_whole_minutes_are_counted(driven, clock):
    run(driven)
    clock.advance(75)
    stats = driven.stats(period=30)
    assert (stats.since, stats.types["a"].completed) == (clock.now() - timedelta(seconds=75), 1)
    assert stats.period == 30


def test_latency_and_run_time_are_percentiles(driven):
    for number in range(1, 21):
        run(driven, waits=number, runs=number / 2)
    found = of(driven)
    about(found.start_latency, 10.0, 19.0)
    about(found.run_time, 5.0, 9.5)
    run(driven, "b", waits=3, runs=0.5, error="broken")
    found = of(driven, "b")
    about(found.start_latency, 3.0, 3.0)
    about(found.run_time, 0.5, 0.5)
    assert found.seconds == 0.5


def about(found, p50, p95):
    """Check percentiles, which are at most a fifth too long or too short."""
    assert (found.p50, found.p95) == (pytest.approx(p50, rel=0.2), pytest.approx(p95, rel=0.2))


def test_a_time_beyond_all_groups_is_the_longest(driven):
    run(driven, waits=3e6)
    assert of(driven).start_latency == Percentiles(1e6, 1e6)


def test_latency_counts_from_when_the_task_could_start(driven, clock):
    driven.submit("a", {"runs": 0}, run_at=clock.now() + timedelta(seconds=100))
    clock.advance(104)
    driven.run_all()
    about(of(driven).start_latency, 4.0, 4.0)


def test_a_retried_task_has_a_run_time_and_no_further_latency(driven):
    attempts = []

    @driven.executor("flaky", max_attempts=2)
    def flaky(ctx: Context):
        attempts.append(ctx.sleep(2))
        if len(attempts) == 1:
            raise ValueError

    driven.submit("flaky")
    driven.run_all()
    found = of(driven, "flaky")
    assert (found.started, found.retried, found.completed, found.failed) == (2, 1, 1, 0)
    assert (found.start_latency.p95, found.seconds) == (pytest.approx(0.001, rel=0.2), 4.0)
    about(found.run_time, 2.0, 2.0)


def test_an_attempt_that_asks_to_run_later_counts_as_time(driven):
    attempts = []

    @driven.executor("later")
    def later(ctx: Context):
        attempts.append(ctx.sleep(2))
        if len(attempts) == 1:
            raise Snooze(60)

    driven.submit("later")
    driven.advance(120)
    found = of(driven, "later")
    assert (found.started, found.retried, found.completed, found.seconds) == (2, 0, 1, 4.0)


def test_a_task_that_failed_with_its_parent_never_ran(driven):
    parent = driven.submit("a", {})
    driven.submit("b", {}, depends_on=[parent], on_parent_failure="fail")
    driven.cancel_task(parent.id)
    driven.run_all()
    found = of(driven, "b")
    assert (found.failed, found.error_share) == (1, 1.0)
    assert (found.start_latency, found.run_time) == (None, None)


def test_answers_and_lists_of_children_are_no_work(driven):
    @driven.executor("parent")
    def parent(ctx: Context):
        ctx.run_all("children", [Task(type="a") for _ in range(3)])
        return ctx.ask("well")

    handle = driven.submit("parent")
    driven.run_all()
    assert driven.finish(f"{handle.id}/well", "yes")
    driven.run_all()
    assert {type: found.completed for type, found in driven.stats().types.items()} == {
        "a": 3,
        "b": 0,
        "parent": 1,
    }
    assert of(driven, "parent").started == 1


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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"period": -1}, "period"),
        ({"since": 3600}, "since must be a datetime"),
        ({"since": datetime(2026, 1, 1)}, "since"),
        ({"at_most": 0}, "at_most"),
        ({"at_most": 1.5}, "at_most"),
        ({"waiting_at_most": 0}, "waiting_at_most"),
    ],
)
def test_a_wrong_argument_is_refused(queue, options, words):
    with pytest.raises(ConfigurationError, match=words):
        queue.stats(**options)
