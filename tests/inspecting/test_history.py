"""Ended tasks over time and their run times, on every store."""

from __future__ import annotations

from datetime import timedelta

import pytest
from helpers import eventually

import taskx
from taskx import ConfigurationError, Context
from taskx.testing import ManualQueue

HOUR = 3600


@pytest.fixture
def queue(repository, clock):
    """A queue on a clock that the test moves, whose tasks run for some seconds."""
    queue = ManualQueue(repository, clock=clock)

    @queue.executor("a")
    @queue.executor("b")
    def work(ctx: Context, runs: float, error: str = ""):
        ctx.sleep(runs)
        if error:
            raise ValueError(error)

    yield queue
    queue.close()


def run(queue, type="a", *, runs=0.0, error=""):
    """Run a task for some seconds; it fails if ``error`` is given."""
    handle = queue.submit(type, {"runs": runs, "error": error})
    queue.run_all()
    return handle.id


def history(queue, **options):
    """Return the history; check that asking changed nothing, and that the answer is JSON."""
    before = list(queue.repository.batches)
    found = queue.history(**options)
    assert list(queue.repository.batches) == before
    assert taskx.tasks.payload.encode(found.to_dict(), "history")
    assert list(found.types) == sorted(found.types)
    return found


def test_a_history_without_tasks_has_empty_intervals(queue, clock):
    found = history(queue)
    assert (found.completed, found.failed) == ((0,) * 60, (0,) * 60)
    assert (found.types, found.complete, found.since) == ({}, True, found.start)
    assert (found.start, found.interval) == (clock.now() - timedelta(minutes=59), 60.0)


@pytest.mark.every_store
def test_ended_tasks_are_counted_in_the_interval_in_which_they_ended(queue, clock):
    run(queue)  # ends before the period
    clock.advance(60)
    run(queue)
    run(queue, error="broken")
    clock.advance(90)
    run(queue, "b", error="broken")
    found = history(queue, period=120, intervals=2)
    assert (found.completed, found.failed) == ((1, 0), (1, 1))
    assert found.types["a"].completed == (1, 0)
    assert found.types["a"].failed == (1, 0)
    assert found.types["b"].failed == (0, 1)
    assert history(queue, period=timedelta(minutes=3), intervals=1).completed == (2,)


def test_the_last_interval_ends_with_the_present_minute(queue, clock):
    clock.advance(30)
    found = history(queue, period=120, intervals=2)
    assert found.start == clock.now() - timedelta(seconds=90)


@pytest.mark.every_store
def test_older_counts_are_kept_by_hours_and_then_by_days(queue, clock):
    for _ in range(3):
        run(queue)
        queue.advance(20 * 60)
    queue.advance(30 * HOUR)
    run(queue)
    assert sum(history(queue, period=timedelta(hours=26), intervals=26).completed) == 1
    assert history(queue, period=timedelta(hours=32), intervals=32).completed == (3, *[0] * 30, 1)
    queue.advance(timedelta(days=70))
    run(queue)
    found = history(queue, period=timedelta(days=72), intervals=72)
    assert (found.completed, found.complete) == ((3, 1, *[0] * 69, 1), True)
    assert sum(found.types["a"].run_times) == 5
    queue.advance(timedelta(days=900))
    assert history(queue, period=timedelta(days=990), intervals=1).completed == (0,)


def test_a_history_can_be_narrowed_to_one_type(queue):
    run(queue)
    run(queue, "b", error="broken")
    found = history(queue, intervals=2)
    assert (found.of("b").completed, found.of("b").failed) == ((0, 0), (0, 1))
    assert found.of("b").types == {"b": found.types["b"]}
    assert (found.of("c").completed, found.of("c").types) == ((0, 0), {})


def test_run_times_are_counted_in_groups(queue):
    for seconds in (0.0, 0.001, 0.0011, 2.0, 3.0, 3.5, 5000.0):
        run(queue, runs=seconds)
    run(queue, runs=0.2, error="broken")
    found = history(queue, period=10_000)
    groups = dict(zip((*found.bounds, None), found.types["a"].run_times, strict=True))
    assert {bound: number for bound, number in groups.items() if number} == {
        0.001: 2,
        0.003: 1,
        0.3: 1,
        3.0: 2,
        10.0: 1,
        None: 1,
    }


def test_a_task_that_failed_with_its_parent_has_no_run_time(queue):
    parent = queue.submit("a", {"runs": 0.0})
    queue.submit("b", {"runs": 0.0}, depends_on=[parent], on_parent_failure="fail")
    queue.cancel_task(parent.id)
    found = eventually(lambda: history(queue).types.get("b"))
    assert (sum(found.failed), sum(found.run_times)) == (1, 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"period": -1}, "period"),
        ({"period": 60, "intervals": 2}, "an interval must be 1 min or longer"),
        ({"period": timedelta(hours=4), "intervals": 25}, "an interval must be 10 min or longer"),
        ({"period": timedelta(days=2), "intervals": 49}, "an interval must be 1 h or longer"),
        ({"period": timedelta(days=99), "intervals": 100}, "an interval must be 24 h or longer"),
        ({"period": 1e15, "intervals": 3}, "before the calendar: give a shorter one"),
        ({"intervals": 0}, "intervals"),
        ({"intervals": 1001}, "intervals must be at most 1000"),
    ],
)
def test_a_wrong_argument_is_refused(queue, options, words):
    with pytest.raises(ConfigurationError, match=words):
        queue.history(**options)


def test_the_start_latency_is_that_of_the_attempts_that_began_in_an_interval(queue, clock):
    queue.submit("a", {"runs": 0.0})
    clock.advance(20)
    queue.run_all()
    found = history(queue)
    *before, last = found.start_latency
    assert 16 <= last.p50 <= last.p95 <= 24
    assert {*before} == {None}
    assert found.of("a").start_latency == found.start_latency
    assert found.of("b").start_latency == (None,) * len(found.start_latency)
