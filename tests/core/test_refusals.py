"""``retry_after``: how long the answer of an API asks to wait."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from email.message import Message
from types import SimpleNamespace

import pytest

from taskx import ConfigurationError, Snooze, retry_after

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "120"}, 120),
        ({"retry-after": " 0.5 "}, 0.5),
        ({"RETRY-AFTER": "0"}, 0),
        ({"Retry-After": "-3"}, 0),
        ({"Retry-After": "Sun, 01 Mar 2026 12:01:30 GMT"}, 90),
        ({"Retry-After": "Sun, 01 Mar 2026 11:00:00 GMT"}, 0),  # it has passed
        ({"Retry-After": "2026-03-01T12:00:10Z"}, 10),
        ({"Retry-After": "7", "x-ratelimit-reset": "99"}, 7),
        ({"Retry-After": "soon", "x-ratelimit-reset": "99"}, 99),
        ({"X-RateLimit-Reset": "30"}, 30),
        ({"X-RateLimit-Reset": str(int(NOW.timestamp()) + 45)}, 45),
        ({"X-RateLimit-Reset": str(1000 * int(NOW.timestamp()) + 1500)}, 1.5),
        ({"X-RateLimit-Reset-After": "1.25"}, 1.25),
        ({"x-ratelimit-reset-requests": "6m0s"}, 360),
        ({"x-ratelimit-reset-tokens": "1h2m3.5s"}, 3723.5),
        ({"x-ratelimit-reset-tokens": "12ms"}, 0.012),
        ({"x-ratelimit-reset-a": "9s", "x-ratelimit-reset-b": "4s"}, 4),
        (
            {
                "x-ratelimit-reset-requests": "1s",
                "x-ratelimit-remaining-requests": "5",
                "x-ratelimit-reset-tokens": "6m0s",
                "x-ratelimit-remaining-tokens": "0",
            },
            360,
        ),
        ({"X-RateLimit-Reset": "60", "X-RateLimit-Remaining": "0", "x-ratelimit-reset-x": "3"}, 60),
        ({}, 5),
        ({"Retry-After": "", "Content-Type": "text/html"}, 5),
        ({"Retry-After": "nan"}, 5),
        ({"Retry-After": "inf"}, 5),
        ({"x-ratelimit-limit": "100"}, 5),
    ],
)
def test_it_reads_what_apis_say(headers, seconds):
    assert retry_after(headers, now=NOW) == pytest.approx(seconds)


def test_a_date_counts_from_the_date_of_the_answer():
    """The clocks of the hosts may differ."""
    headers = {"Date": "Sun, 01 Mar 2026 12:00:00 GMT"}
    assert retry_after({**headers, "Retry-After": "Sun, 01 Mar 2026 12:00:20 GMT"}) == 20
    assert retry_after({**headers, "x-ratelimit-reset": str(NOW.timestamp() + 7)}) == 7


def test_without_any_other_date_it_counts_from_now():
    moment = datetime.now(timezone.utc) + timedelta(hours=1)
    assert 3500 < retry_after({"Retry-After": moment.isoformat()}) <= 3600


def test_without_a_header_it_returns_the_default():
    assert retry_after({}, default=60) == 60
    assert retry_after({}, default=timedelta(minutes=2)) == 120
    assert retry_after({}, "1m30s") == 90


def in_message():
    headers = Message()
    headers["Retry-After"] = "8"
    return SimpleNamespace(headers=headers)


@pytest.mark.parametrize(
    "response",
    [
        {"Retry-After": "8"},
        SimpleNamespace(headers={"retry-after": "8"}),
        SimpleNamespace(response=SimpleNamespace(headers={"retry-after": "8"})),
        in_message(),
    ],
    ids=["headers", "response", "error", "urllib"],
)
def test_it_takes_a_response_an_error_or_headers(response):
    assert Snooze(retry_after(response), limit=True).seconds == 8


@pytest.mark.parametrize("response", [None, 429, "Retry-After: 5", ValueError("429")])
def test_without_headers_it_says_what_it_needs(response):
    with pytest.raises(ConfigurationError, match="requires a response, an error with one, or head"):
        retry_after(response)


def test_a_wrong_default_is_refused():
    with pytest.raises(ConfigurationError, match="default"):
        retry_after({}, default=-1)
