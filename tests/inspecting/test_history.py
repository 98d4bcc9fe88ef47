"""Ended tasks over time and their run times, on every store."""

from __future__ import annotations

from datetime import timedelta

import pytest
from helpers import eventually

import taskx
from taskx import ConfigurationError
from taskx.tasks import lifecycle
from taskx.tasks.lifecycle import Ending


@pytest.fixture
def queue(make_queue, clock):
    """A queue on a clock that the test moves; it is not started."""
    queue = make_queue(worker_num=2, clock=clock)
    queue.declare("a", "b")
    return queue


def run(queue, clock, type="a", *, runs=0.0, error=""):
    """Submit a task that starts at once and ends after some seconds; it fails if ``error`` is given."""
    handle = queue.submit(type)
    task = handle.task()
    assert all(queue.repository.apply([lifecycle.start(task, clock.now_ms(), "node")]))
    clock.advance(runs)
    ending = Ending(returned=not error, error=error, duration=runs)
    assert any(queue.repository.apply(lifecycle.conclude(handle.task(), ending, clock.now_ms())))
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
    assert (found.types, found.since, found.complete) == ({}, None, True)
    assert (found.start, found.interval) == (clock.now() - timedelta(hours=1), 60.0)


def test_ended_tasks_are_counted_in_the_interval_in_which_they_ended(queue, clock):
    run(queue, clock)  # ends before the period
    clock.advance(10)
    run(queue, clock)  # ends at the begin of the period
    clock.advance(10)
    run(queue, clock)
    run(queue, clock, error="broken")
    clock.advance(20)
    run(queue, clock, "b", error="broken")
    found = history(queue, period=30, intervals=3)
    assert (found.completed, found.failed) == ((1, 0, 0), (1, 0, 1))
    assert found.types["a"].completed == (1, 0, 0)
    assert found.types["a"].failed == (1, 0, 0)
    assert found.types["b"].failed == (0, 0, 1)
    assert history(queue, period=timedelta(seconds=40), intervals=1).completed == (2,)


def test_a_history_can_be_narrowed_to_one_type(queue, clock):
    run(queue, clock)
    run(queue, clock, "b", error="broken")
    found = history(queue, intervals=2)
    assert (found.of("b").completed, found.of("b").failed) == ((0, 0), (0, 1))
    assert found.of("b").types == {"b": found.types["b"]}
    assert (found.of("c").completed, found.of("c").types) == ((0, 0), {})


def test_run_times_are_counted_in_groups(queue, clock):
    for seconds in (0.0, 0.001, 0.0011, 2.0, 3.0, 3.5, 5000.0):
        run(queue, clock, runs=seconds)
    run(queue, clock, runs=0.2, error="broken")
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
    parent = queue.submit("a")
    queue.submit("b", depends_on=[parent], on_parent_failure="fail")
    queue.cancel_task(parent.id)
    found = eventually(lambda: history(queue).types.get("b"))
    assert (sum(found.failed), sum(found.run_times)) == (1, 0)


def test_the_history_says_since_when_it_covers_ended_tasks(queue, clock):
    times = []
    for _ in range(5):
        times.append(clock.now())
        run(queue, clock)
        clock.advance(60)
    found = history(queue, at_most=3)
    assert (found.since, found.complete, sum(found.completed)) == (times[2], False, 3)
    assert history(queue, at_most=6).complete
    assert history(queue, at_most=3, period=150).complete


def test_a_damaged_record_hides_no_other(queue, clock):
    damaged = run(queue, clock)
    run(queue, clock)
    assert all(
        queue.repository.apply([taskx.tasks.writes.Update(damaged, {}, {"completed_at": None})])
    )
    assert sum(history(queue).completed) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"period": -1}, "period"),
        ({"period": 0.01, "intervals": 11}, "a millisecond or longer"),
        ({"intervals": 0}, "intervals"),
        ({"intervals": 1001}, "intervals must be at most 1000"),
        ({"at_most": 0}, "at_most"),
    ],
)
def test_a_wrong_argument_is_refused(queue, options, words):
    with pytest.raises(ConfigurationError, match=words):
        queue.history(**options)
