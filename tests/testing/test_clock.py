"""A clock that a test moves."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest

from taskx import ConfigurationError
from taskx.testing import ManualClock


def test_it_stands_still_until_it_is_moved():
    clock = ManualClock(datetime(2030, 1, 1, tzinfo=timezone.utc))
    before = (clock.now(), clock.now_ms(), clock.monotonic())
    assert before[0] == datetime(2030, 1, 1, tzinfo=timezone.utc)
    assert (clock.now(), clock.now_ms(), clock.monotonic()) == before
    clock.advance(1.5)
    assert clock.now() - before[0] == timedelta(seconds=1.5)
    assert (clock.now_ms() - before[1], clock.monotonic() - before[2]) == (1500, 1.5)


def test_many_small_steps_add_up():
    clock = ManualClock()
    before = clock.now_ms()
    for _ in range(10_000):
        clock.advance(0.0001)
    assert clock.now_ms() - before == 1000


def test_the_wall_clock_is_set_by_itself():
    clock = ManualClock()
    before = clock.monotonic()
    clock.set_wall(datetime(2020, 1, 1, tzinfo=timezone.utc))
    clock.advance(60)
    assert clock.now() == datetime(2020, 1, 1, 0, 1, tzinfo=timezone.utc)
    assert clock.monotonic() - before == 60


def test_it_does_not_go_back():
    with pytest.raises(ValueError, match="use set_wall"):
        ManualClock().advance(-1)


def test_calls_are_made_at_their_moments_and_in_order():
    clock, made = ManualClock(), []
    start = clock.monotonic()
    for seconds in (5, 1, 3, 1):
        clock.call_later(seconds, lambda s=seconds: made.append((s, clock.monotonic() - start)))
    assert clock.until_next_call() == 1
    clock.advance(4)
    assert made == [(1, 1), (1, 1), (3, 3)]
    clock.advance(0.999)
    assert len(made) == 3
    clock.advance(0.001)
    assert made[3] == (5, 5)
    assert clock.until_next_call() is None


def test_a_call_may_plan_another_and_move_the_clock():
    clock, made = ManualClock(), []
    start = clock.monotonic()

    def first():
        clock.call_later(1, lambda: made.append(clock.monotonic() - start))
        clock.advance(10)

    clock.call_later(5, first)
    clock.advance(7)
    assert made == [6]
    assert clock.monotonic() - start == 15


def test_a_call_is_taken_back():
    clock, made = ManualClock(), []
    take_back = clock.call_later(1, lambda: made.append(1))
    clock.call_later(1, lambda: made.append(2))
    take_back()
    take_back()
    clock.advance(1)
    assert made == [2]


def test_a_call_is_never_in_the_past():
    with pytest.raises(ConfigurationError, match="seconds"):
        ManualClock().call_later(-1, print)
