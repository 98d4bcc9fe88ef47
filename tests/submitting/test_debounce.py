"""Debounced submits: one run after many calls, with the params of the latest, and not too late."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest

from taskx import ConfigurationError
from taskx.testing import ManualQueue


@pytest.fixture
def runs(clock):
    """The params of each run, and the seconds at which it began."""
    return []


@pytest.fixture
def queue(clock, runs):
    made, begun = ManualQueue(clock=clock), clock.monotonic()
    made.executor("t")(lambda n: runs.append((n, round(clock.monotonic() - begun, 3))))
    with made:
        yield made


def call(queue, n, key="k", **options):
    return queue.submit("t", {"n": n}, unique_key=key, **options)


def test_one_call_runs_after_its_wait(queue, runs):
    call(queue, 1, debounce=5, at_most=20)
    queue.advance(60)
    assert runs == [(1, 5)]


def test_the_last_of_many_calls_wins(queue, runs):
    handles = []
    for n in range(4):
        handles.append(call(queue, n, debounce=5))
        queue.advance(2)
    queue.advance(60)
    assert runs == [(3, 11)]
    assert len({handle.id for handle in handles}) == 1


def test_calls_that_never_stop_run_at_the_cap_with_the_latest_params(queue, runs):
    for n in range(100):
        call(queue, n, debounce=5, at_most="20s")
        queue.advance(1)
    assert [at for _, at in runs] == [20, 40, 60, 80, 100]
    assert [n for n, _ in runs] == [19, 39, 59, 79, 99]


def test_a_call_after_the_start_makes_a_new_task(queue, runs):
    first = call(queue, 1, debounce=timedelta(seconds=5))
    queue.advance(10)
    assert call(queue, 2, debounce=5).id != first.id
    queue.advance(10)
    assert runs == [(1, 5), (2, 15)]


def test_keys_do_not_disturb_each_other(queue, runs):
    call(queue, 1, "a", debounce=5)
    call(queue, 2, "b", debounce=5)
    queue.advance(10)
    assert sorted(runs) == [(1, 5), (2, 5)]


def test_the_cap_is_that_of_each_call(queue, runs):
    call(queue, 1, debounce=5, at_most=100)
    queue.advance(4)
    call(queue, 2, debounce=5, at_most=6)
    queue.advance(10)
    assert runs == [(2, 6)]


@pytest.mark.every_store
def test_every_store_keeps_the_age_of_the_first_call(repository, make_queue):
    queue = make_queue()
    queue.declare("t")
    first = call(queue, 1, debounce=1000, at_most=2000).task()
    task = call(queue, 2, debounce=5000, at_most=6000).task()
    assert (task.id, task.created_at, task.params) == (first.id, first.created_at, {"n": 2})
    assert task.run_at - task.created_at < timedelta(seconds=6000)
    last = call(queue, 3, debounce=5000, at_most=5000).task()
    assert last.run_at - last.created_at == timedelta(seconds=5000)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"debounce": 5}, "debounce requires unique_key"),
        ({"unique_key": "k", "at_most": 5}, "at_most requires debounce"),
        ({"unique_key": "k", "debounce": 5, "at_most": 4}, "at_most must be 5 s or more"),
        ({"unique_key": "k", "debounce": -1}, "debounce"),
        ({"unique_key": "k", "debounce": 5, "delay": 1}, "debounce sets delay"),
        ({"unique_key": "k", "debounce": 5, "unique_scope": "ever"}, "debounce sets unique_scope"),
        ({"unique_key": "k", "debounce": 5, "on_conflict": "return"}, "leave out on_conflict"),
        (
            {"unique_key": "k", "debounce": 5, "run_at": datetime.now(timezone.utc)},
            "debounce sets run_at",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(queue, options, words):
    with pytest.raises(ConfigurationError, match=words):
        queue.submit("t", {"n": 1}, **options)
    assert queue.count_tasks() == 0
