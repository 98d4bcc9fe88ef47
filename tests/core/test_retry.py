"""Retry policies: whether there is another attempt, and the wait before it."""

import json
import math
from datetime import timedelta
from decimal import Decimal

import attrs
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from taskx import ConfigurationError, Retry, RetryPolicy, Snooze, Task
from taskx.tasks.retry import MAX_WAIT


class Refused(ConnectionError):
    """An exception that is not a builtin."""


waits = st.floats(0, 1e9)
policies = st.builds(
    RetryPolicy,
    st.integers(1, 2**31 - 1),
    backoff=st.sampled_from(["exponential", "linear", "fixed"]),
    base=waits,
    max_delay=waits,
    jitter=st.floats(0, 1),
    retry_on=st.lists(st.sampled_from([OSError, Refused, "a.b.Error"])),
    give_up_on=st.lists(st.sampled_from([ValueError, "ValueError"])),
)


class TestDelay:
    @pytest.mark.parametrize(
        ("backoff", "waits"),
        [
            ("exponential", [2, 4, 8, 16, 20, 20]),
            ("linear", [2, 4, 6, 8, 10, 12]),
            ("fixed", [2, 2, 2, 2, 2, 2]),
            (lambda attempt: attempt**2, [1, 4, 9, 16, 20, 20]),
        ],
    )
    def test_the_wait_grows_by_the_backoff_up_to_max_delay(self, backoff, waits):
        policy = RetryPolicy(9, backoff=backoff, base=2, max_delay=20, jitter=0)
        assert [policy.delay(attempt, 0.5) for attempt in range(1, 7)] == waits

    @pytest.mark.parametrize(("chance", "wait"), [(0.0, 7.5), (0.5, 10.0), (1.0, 12.5)])
    def test_jitter_changes_the_wait_by_a_fraction(self, chance, wait):
        policy = RetryPolicy(backoff="fixed", base=10, jitter=0.25)
        assert policy.delay(1, chance) == wait

    @pytest.mark.parametrize("backoff", ["exponential", "fixed"])
    def test_the_longest_wait_is_shortened_by_jitter(self, backoff):
        policy = RetryPolicy(backoff=backoff, base=60, max_delay=60, jitter=0.5)
        for attempt in (1, 5, 1000):
            assert [policy.delay(attempt, chance) for chance in (0.0, 0.5, 1.0)] == [30, 45, 60]

    def test_a_wait_near_max_delay_never_exceeds_it(self):
        policy = RetryPolicy(backoff="fixed", base=50, max_delay=60, jitter=0.5)
        assert [policy.delay(1, chance) for chance in (0.0, 1.0)] == [25, 60]

    @given(policies, st.integers(1, 10**9), st.floats(0, 1))
    @example(RetryPolicy(base=MAX_WAIT, max_delay=0, jitter=1), 10**9, 0.0)
    def test_a_wait_is_never_negative_nor_above_max_delay(self, policy, attempt, chance):
        assert 0 <= policy.delay(attempt, chance) <= policy.max_delay

    @given(policies, st.integers(1, 1000))
    def test_a_wait_only_shrinks_by_jitter(self, policy, attempt):
        assert policy.delay(attempt, 0.5) <= policy.delay(attempt + 1, 0.5)

    @pytest.mark.parametrize("value", [-1, math.nan, math.inf, "5", None, True])
    def test_a_backoff_function_must_return_seconds(self, value):
        with pytest.raises(ConfigurationError, match="backoff"):
            RetryPolicy(backoff=lambda attempt: value).delay(1, 0.5)


class TestRetries:
    def test_every_error_is_retried_by_default(self):
        policy = RetryPolicy()
        assert all(map(policy.retries, (ValueError, SystemExit, Refused)))

    @pytest.mark.parametrize("named", [ConnectionError, "ConnectionError", ["ConnectionError"]])
    def test_a_class_includes_its_subclasses(self, named):
        policy = RetryPolicy(retry_on=named)
        assert policy.retries(Refused)
        assert policy.retries(ConnectionResetError)
        assert not policy.retries(OSError)

    def test_a_class_of_a_module_is_known_by_its_full_name(self):
        for named in (Refused, f"{__name__}.Refused"):
            policy = RetryPolicy(retry_on=named)
            assert policy.retry_on == (f"{__name__}.Refused",)
            assert policy.retries(Refused)
            assert not policy.retries(ConnectionError)

    @pytest.mark.parametrize(
        ("named", "known"),
        [
            ("builtins.OSError", "OSError"),
            ("IOError", "OSError"),
            ("json.JSONDecodeError", "json.decoder.JSONDecodeError"),
            ("json.decoder.JSONDecodeError", "json.decoder.JSONDecodeError"),
            ("json.NoSuchError", "json.NoSuchError"),
            ("json.loads", "json.loads"),
            ("not_imported.module.Error", "not_imported.module.Error"),
        ],
    )
    def test_a_name_is_stored_as_the_full_name_of_its_class(self, named, known):
        policy = RetryPolicy(retry_on=named, give_up_on=[named])
        assert policy.retry_on == policy.give_up_on == (known,)

    def test_any_name_that_a_module_has_for_an_error_matches(self):
        assert RetryPolicy(retry_on="json.JSONDecodeError").retries(json.JSONDecodeError)

    def test_give_up_on_wins_over_retry_on(self):
        policy = RetryPolicy(retry_on=OSError, give_up_on=(Refused, FileNotFoundError))
        assert policy.retries(ConnectionError)
        assert not policy.retries(Refused)
        assert not policy.retries(FileNotFoundError)


class TestStored:
    @given(policies)
    def test_a_policy_survives_json(self, policy):
        assert RetryPolicy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy

    @given(policies)
    def test_a_policy_survives_in_a_task(self, policy):
        data = json.loads(json.dumps(Task(id="a", type="t", retry=policy).to_dict()))
        assert Task.from_dict(data).retry == policy

    def test_stored_names_of_errors_are_not_checked(self):
        """Another version of Python may have other builtins, and a class can have any name."""

        class Local(Exception):
            pass

        policy = RetryPolicy(retry_on=[Local, type("an error", (Exception,), {})])
        assert attrs.evolve(RetryPolicy(retry_on=Local), base=2).retries(Local)
        assert RetryPolicy.from_dict(policy.to_dict()) == policy
        stored = {"retry_on": ["ErrorOfALaterPython"], "give_up_on": []}
        assert RetryPolicy.from_dict(stored).to_dict() == {**RetryPolicy().to_dict(), **stored}
        with pytest.raises(ConfigurationError, match="retry_on"):
            RetryPolicy.from_dict({"retry_on": [5]})

    def test_names_of_a_later_version_are_ignored(self):
        assert RetryPolicy.from_dict({"max_attempts": 7, "new": 1}) == RetryPolicy(7)

    def test_a_policy_with_a_function_cannot_be_stored(self):
        with pytest.raises(ConfigurationError, match="give it to the executor"):
            RetryPolicy(backoff=lambda attempt: 1).to_dict()


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"max_attempts": 0}, "max_attempts"),
        ({"max_attempts": 2.0}, "max_attempts"),
        ({"max_attempts": True}, "max_attempts"),
        ({"backoff": "quadratic"}, "backoff"),
        ({"backoff": None}, "backoff"),
        ({"base": -1}, "base"),
        ({"base": math.inf}, "base"),
        ({"max_delay": "1"}, "max_delay"),
        ({"jitter": 1.5}, "jitter"),
        ({"jitter": True}, "jitter"),
        ({"retry_on": 5}, "retry_on"),
        ({"retry_on": int}, "retry_on"),
        ({"give_up_on": [""]}, "give_up_on"),
        ({"retry_on": "a b"}, "'a b' cannot be the name"),
        ({"retry_on": ["OSError", "a..b"]}, r"'a\.\.b' cannot be the name"),
        ({"give_up_on": ["ConectionError"]}, "'ConectionError' is not a builtin exception class"),
        ({"retry_on": "builtins.ConectionError"}, "not a builtin exception class"),
        ({"retry_on": "len"}, "not a builtin exception class"),
        ({"base": 10**400}, "base"),
    ],
)
def test_invalid_policies_are_refused(wrong, word):
    with pytest.raises(ConfigurationError, match=word):
        RetryPolicy(**wrong)


@pytest.mark.parametrize(
    ("make", "delay", "text"),
    [
        (lambda: Retry(), None, ""),
        (lambda: Retry(5), 5.0, "again in 5 s"),
        (lambda: Retry(0.5), 0.5, "again in 0.5 s"),
        (lambda: Retry(timedelta(minutes=1)), 60.0, "again in 60 s"),
        (lambda: Retry(0), 0.0, "again in 0 s"),
        (lambda: Retry(delay=5), 5.0, "again in 5 s"),
        (lambda: Retry("busy"), None, "busy"),
        (lambda: Retry("5"), None, "5"),
        (lambda: Retry(5, "busy"), 5.0, "busy"),
        (lambda: Retry("busy", delay=5), 5.0, "busy"),
        (lambda: Retry(reason="busy", delay=5), 5.0, "busy"),
        (lambda: Retry(5, reason="busy"), 5.0, "busy"),
        (lambda: Retry(OSError("busy")), None, "busy"),
    ],
)
def test_a_retry_takes_a_delay_a_reason_or_both(make, delay, text):
    error = make()
    assert (error.delay, str(error)) == (delay, text)


@pytest.mark.parametrize(
    ("given", "named"),
    [((5,), {"delay": 6}), (("busy",), {"reason": "full"}), (("busy", "full"), {}), ((5, 6), {})],
)
def test_a_retry_takes_each_of_both_once(given, named):
    with pytest.raises(TypeError, match="one delay and one reason"):
        Retry(*given, **named)


@pytest.mark.parametrize(
    "seconds",
    [-1, math.nan, math.inf, "5", True, Decimal(5), pytest.param(10**5000, id="long")],
)
def test_retry_and_snooze_need_a_number_of_seconds(seconds):
    with pytest.raises(ConfigurationError, match="Retry"):
        Retry(delay=seconds)
    if not isinstance(seconds, str):
        with pytest.raises(ConfigurationError, match="Retry"):
            Retry(seconds, "busy")
    with pytest.raises(ConfigurationError, match="Snooze"):
        Snooze(seconds)
