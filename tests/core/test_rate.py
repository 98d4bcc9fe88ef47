"""Token buckets: never more than they may, and never less than they could."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskx import ConfigurationError
from taskx.core.rate import FULL, Rate, rate_of

#: Seconds of slack for the rounding of clocks that are floats.
SLACK = 1e-3

rates = st.builds(
    Rate,
    count=st.integers(1, 1000),
    seconds=st.floats(0.1, 1e5),
    burst=st.integers(1, 50),
)
#: At which moment how many are wanted: seconds after the one before.
wishes = st.lists(
    st.tuples(st.floats(0, 100) | st.just(0.0), st.integers(1, 60)), min_size=1, max_size=60
)
beginnings = st.sampled_from([0.0, 1e4, 1.8e9])


def taken(rate, wishes, beginning, put_back=lambda n: 0):
    """When how many were taken by somebody who takes what there is, and gives some of it back."""
    mark, now, log = FULL, beginning, []
    for number, (wait, wanted) in enumerate(wishes):
        now += wait * rate.interval
        got = min(wanted, rate.tokens(mark, now))
        assert rate.tokens(mark, now) <= rate.burst
        if got:
            mark = rate.take(mark, now, got)
            unused = min(got, put_back(number))
            mark = rate.put_back(mark, unused)
            log.append((now, got - unused))
    return log


def excess(rate, log):
    """By how many too many were taken, in the interval in which it is worst."""
    worst = 0.0
    for first in range(len(log)):
        total = 0
        for moment, count in log[first:]:
            total += count
            time = moment - log[first][0] + SLACK
            worst = max(worst, total - rate.burst - time / rate.interval)
    return worst


@given(rates, wishes, beginnings)
def test_over_any_interval_at_most_burst_and_rate_times_time(rate, wishes, beginning):
    assert excess(rate, taken(rate, wishes, beginning)) <= SLACK


@given(rates, wishes, beginnings, st.integers(0, 3))
def test_what_is_put_back_makes_no_more(rate, wishes, beginning, every):
    log = taken(rate, wishes, beginning, lambda number: number % (every + 1))
    assert excess(rate, log) <= SLACK


@given(rates, beginnings)
def test_who_takes_each_token_when_it_comes_gets_the_whole_rate(rate, beginning):
    mark = rate.take(FULL, beginning, rate.burst)
    now = beginning
    for _ in range(20):
        assert rate.tokens(mark, now) == 0
        now = rate.when(mark, 1)
        assert rate.tokens(mark, now) == 1
        mark = rate.take(mark, now, 1)
    assert now - beginning == pytest.approx(20 * rate.interval, rel=1e-3, abs=1e-4)


@given(rates, st.integers(1, 60), beginnings)
def test_when_there_are_so_many_they_are_there(rate, count, beginning):
    mark = rate.take(FULL, beginning, rate.burst)
    moment = rate.when(mark, count)
    assert rate.tokens(mark, moment) == min(count, rate.burst)
    if count <= rate.burst:
        assert rate.tokens(mark, moment - rate.interval / 2) < count


def test_a_bucket_that_rested_is_full_and_no_fuller():
    rate = Rate(10, 1.0, 3)
    mark = rate.take(FULL, 0.0, 3)
    assert [rate.tokens(mark, now) for now in (0.0, 0.05, 0.1, 0.2, 0.3, 100.0)] == [
        *(0, 0, 1, 2, 3, 3)
    ]


@pytest.mark.parametrize(
    ("given", "burst", "rate"),
    [
        ("100/m", None, Rate(100, 60.0, 100)),
        ("1/s", None, Rate(1, 1.0, 1)),
        ("5/h", 2, Rate(5, 3600.0, 2)),
        ("7/d", 70, Rate(7, 86400.0, 70)),
        ((3, 0.5), None, Rate(3, 0.5, 3)),
        (None, None, None),
    ],
)
def test_what_is_a_rate(given, burst, rate):
    assert rate_of(given, burst) == rate


@pytest.mark.parametrize(
    "given",
    [
        *("", "100", "100/", "/m", "100/w", "-1/s", "0/s", "1.5/s", "1/m ", "٣/s", "9999999/s"),
        *(5, (1,), (0, 1), (1, 0), (1, -1), (1, "s"), ("1", 1), (1.5, 1), (True, 1)),
        (1, float("nan")),
    ],
)
def test_what_is_none_is_refused(given):
    with pytest.raises(ConfigurationError, match="rate"):
        rate_of(given, None)


@pytest.mark.parametrize("burst", [0, -1, 1.5, True, "1"])
def test_what_is_no_burst_is_refused(burst):
    with pytest.raises(ConfigurationError, match="burst"):
        rate_of("1/s", burst)
