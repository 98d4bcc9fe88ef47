"""Token buckets: never more tokens than allowed, and never fewer than possible."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskx import ConfigurationError
from taskx.tasks.rate import FULL, Rate, rate_of

#: Tolerance in seconds for the rounding of float clocks.
SLACK = 1e-3

rates = st.builds(
    Rate,
    count=st.integers(1, 1000),
    seconds=st.floats(0.1, 1e5),
    burst=st.integers(1, 50),
)
#: Requests for tokens: the wait since the request before, in intervals, and the number of tokens.
wishes = st.lists(
    st.tuples(st.floats(0, 100) | st.just(0.0), st.integers(1, 60)), min_size=1, max_size=60
)
beginnings = st.sampled_from([0.0, 1e4, 1.8e9])


def taken(rate, wishes, beginning, put_back=lambda n: 0):
    """Return (time, count) pairs of a taker that takes what is available and puts some tokens back."""
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
    """Return the number of tokens taken above the limit, in the worst interval."""
    worst = 0.0
    for first in range(len(log)):
        total = 0
        for moment, count in log[first:]:
            total += count
            time = moment - log[first][0] + SLACK
            worst = max(worst, total - rate.burst - time / rate.interval)
    return worst


@given(rates, wishes, beginnings)
def test_no_interval_exceeds_burst_plus_rate(rate, wishes, beginning):
    assert excess(rate, taken(rate, wishes, beginning)) <= SLACK


@given(rates, wishes, beginnings, st.integers(0, 3))
def test_tokens_put_back_do_not_raise_the_rate(rate, wishes, beginning, every):
    log = taken(rate, wishes, beginning, lambda number: number % (every + 1))
    assert excess(rate, log) <= SLACK


@given(rates, beginnings)
def test_taking_each_token_at_once_gives_the_full_rate(rate, beginning):
    mark = rate.take(FULL, beginning, rate.burst)
    now = beginning
    for _ in range(20):
        assert rate.tokens(mark, now) == 0
        now = rate.when(mark, 1)
        assert rate.tokens(mark, now) == 1
        mark = rate.take(mark, now, 1)
    assert now - beginning == pytest.approx(20 * rate.interval, rel=1e-3, abs=1e-4)


@given(rates, st.integers(1, 60), beginnings)
def test_tokens_are_available_at_the_announced_time(rate, count, beginning):
    mark = rate.take(FULL, beginning, rate.burst)
    moment = rate.when(mark, count)
    assert rate.tokens(mark, moment) == min(count, rate.burst)
    if count <= rate.burst:
        assert rate.tokens(mark, moment - rate.interval / 2) < count


def test_a_rested_bucket_has_burst_tokens_and_no_more():
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
def test_valid_rates_are_accepted(given, burst, rate):
    assert rate_of(given, burst) == rate


@pytest.mark.parametrize(
    "given",
    [
        *("", "100", "100/", "/m", "100/w", "-1/s", "0/s", "1.5/s", "1/m ", "٣/s", "9999999/s"),
        *(5, (1,), (0, 1), (1, 0), (1, -1), (1, "s"), ("1", 1), (1.5, 1), (True, 1)),
        (1, float("nan")),
    ],
)
def test_invalid_rates_are_refused(given):
    with pytest.raises(ConfigurationError, match="rate"):
        rate_of(given, None)


@pytest.mark.parametrize("burst", [0, -1, 1.5, True, "1"])
def test_invalid_bursts_are_refused(burst):
    with pytest.raises(ConfigurationError, match="burst"):
        rate_of("1/s", burst)
