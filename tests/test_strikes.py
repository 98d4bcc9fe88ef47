"""The tool that strikes at every point: only where a signal handler could run."""

from __future__ import annotations

import threading

from strikes import Strike, every_strike, strike_at


def test_each_call_is_struck_at_the_next_point():
    ran = []

    def work(point):
        ran.append(point)
        len("a")
        len("b")

    strikes = list(every_strike(work))
    assert len(strikes) == 4  # at its start, and after each of its calls
    assert ran == [1, 2, 3, 4]


def test_no_strike_happens_after_the_last_point():
    assert strike_at(10_000, lambda: len("a")) is None


def test_a_caught_strike_is_still_returned():
    def work(point):
        try:
            len("a")
        except Strike:
            return

    assert any(strike is not None for strike in every_strike(work))


def test_a_lock_in_a_with_statement_is_never_left_locked():
    lock = threading.Lock()

    def work(point):
        with lock:
            return len("a")

    for strike in every_strike(work):
        assert not lock.locked(), strike


def test_a_condition_can_be_left_locked():
    condition = threading.Condition(threading.Lock())
    left = []

    def work(point):
        with condition:
            len("a")

    for strike in every_strike(work):
        if condition._lock.locked():
            left.append(strike)
            condition._lock.release()
    assert left
