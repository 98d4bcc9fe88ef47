"""Params as text for people, without secrets."""

from __future__ import annotations

import string
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskx import Config, ConfigurationError
from taskx.tasks.redact import SECRETS, redacted, show


def json_with(text):
    """JSON values, with texts of this kind."""
    return st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text,
        lambda inner: st.lists(inner) | st.dictionaries(text, inner),
    )


JSON = json_with(st.text())
#: A text with this quote may have other quotes around it if only a part of it is shown.
WITHOUT_QUOTE = json_with(st.text(st.characters(codec="utf-8", exclude_characters="'")))


def test_params_are_shown_as_python_values():
    params = {"url": "https://example.org/", "sizes": [1, 2.5, None, True], "more": {}}
    assert show(params) == str(params)


@pytest.mark.parametrize(
    "key", ["password", "PASSWORD", "db_password", "api-key", "X-Api-Key", "apiKey", "accessToken"]
)
def test_the_value_of_a_secret_key_is_hidden(key):
    assert show({"n": 1, key: "hunter2"}) == f"{{'n': 1, {key!r}: '***'}}"


def test_secrets_are_hidden_at_any_depth():
    params = {"users": [{"name": "ada", "login": {"password": "hunter2"}}], "token": {"a": [1]}}
    shown = show(params)
    assert "hunter2" not in shown
    assert shown == ("{'users': [{'name': 'ada', 'login': {'password': '***'}}], 'token': '***'}")


def test_other_words_replace_the_usual_ones():
    params = {"password": "hunter2", "IBAN": "DE02"}
    assert show(params, ("iban",)) == "{'password': 'hunter2', 'IBAN': '***'}"
    assert show(params, (*SECRETS, "iban")) == "{'password': '***', 'IBAN': '***'}"
    assert show(params, ()) == str(params)
    assert show(params, ("*",)) == "{'password': '***', 'IBAN': '***'}"


def test_a_word_is_no_pattern():
    assert show({"aXb": 1, "a.b": 2}, ("a.b",)) == "{'aXb': 1, 'a.b': '***'}"


def test_a_long_text_is_cut():
    shown = show({"url": "https://example.org/" + 200 * "x"}, limit=40)
    assert shown == "{'url': 'https://example.org/xxxxxxxxxx…"
    assert len(shown) == 40


def test_a_line_break_cannot_forge_a_line_in_the_log():
    assert show({"a\n": "b\r\nERROR"}) == r"{'a\n': 'b\r\nERROR'}"


@given(WITHOUT_QUOTE, st.integers(1, 200))
def test_a_text_is_a_prefix_of_the_whole_text(params, limit):
    whole, shown = show(params, (), 10**9), show(params, (), limit)
    assert shown == whole or whole.startswith(shown[:-1])


@given(JSON, st.integers(1, 200))
def test_a_text_is_printable_and_no_longer_than_the_limit(params, limit):
    shown = show(params, (), limit)
    assert len(shown) <= limit
    assert shown.isprintable()


def test_a_text_that_is_cut_before_its_quote_has_the_usual_quotes():
    assert show({"it is Ann's": 1}) == """{"it is Ann's": 1}"""
    assert show({"it is Ann's": 1}, limit=6) == "{'it …"


def test_a_value_without_a_key_is_hidden_if_everything_is():
    values = ["refund eva@example.org", 7, None, {"a": 1}]
    assert show(values, ("*",)) == "['***', '***', None, {'a': '***'}]"
    assert redacted(values, ("*",)) == ["***", "***", None, {"a": "***"}]
    assert [show(value, ("*",)) for value in values] == ["'***'", "'***'", "None", "{'a': '***'}"]
    assert show(values[0], SECRETS) == "'refund eva@example.org'"


@given(st.dictionaries(st.text(string.ascii_letters), st.text(min_size=20)))
def test_nothing_is_shown_if_everything_is_hidden(params):
    shown = show(params, ("*",), 10**9)
    assert shown == str(dict.fromkeys(params, "***"))


def test_large_params_cost_no_more_than_small_ones():
    long = "x" * 10_000_000
    large = {"text": long, "numbers": list(range(1_000_000))}

    def seconds(shown, params):
        began = time.thread_time()
        shown(params)
        return time.thread_time() - began

    for params in (large, {long: 1}):
        assert min(seconds(show, params) for _ in range(20)) < seconds(str, params) / 20


class Loud:
    def __repr__(self):
        raise RuntimeError("must not be called")

    __str__ = __repr__


def test_a_value_that_is_not_json_is_named_by_its_class():
    assert show({"a": Loud(), "b": [object()]}) == "{'a': <Loud>, 'b': [<object>]}"
    assert show(Loud()) == "<Loud>"
    assert show({Loud(): 1, 5: 2, None: 3}) == "{'<Loud>': 1, '5': 2, 'None': 3}"


def test_config_takes_words():
    assert Config().redact == SECRETS
    assert Config(redact=["iban"]).redact == ("iban",)
    assert Config(redact=()).redact == ()


@pytest.mark.parametrize("words", ["password", b"token", None, 3, [""], ["_-"], ["a", 1]])
def test_config_refuses_what_is_no_word(words):
    with pytest.raises(ConfigurationError, match="redact must be a list of words"):
        Config(redact=words)


@given(JSON)
def test_a_redacted_copy_without_secrets_is_equal(value):
    assert redacted(value, ()) == value


def test_a_redacted_copy_hides_secrets_at_any_depth():
    params = {"users": [{"name": "ada", "password": {"old": "hunter2"}}], "token": [1], "n": (1,)}
    assert redacted(params) == {
        "users": [{"name": "ada", "password": "***"}],
        "token": "***",
        "n": [1],
    }
    assert params["token"] == [1]
    assert redacted({"a": 1, "b": [2]}, ("*",)) == {"a": "***", "b": "***"}
