"""The JSON rules: the values that can be stored, and the errors for all others."""

import enum
import json
import math
import re
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from datetime import date, datetime, timezone
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from uuid import uuid4

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from taskx import PayloadError
from taskx.tasks.payload import (
    CODEC_KEY,
    DEFAULT_MAX_SIZE,
    MAX_DEPTH,
    clean_text,
    encode,
    encode_params,
    is_encodable,
    loads,
)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
keys = texts.filter(lambda key: "\0" not in key and key != CODEC_KEY)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=20,
)


def typed(value):
    """Return the value in a form in which 1, 1.0 and True differ, and 0.0 and -0.0."""
    if isinstance(value, dict):
        return {key: typed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [typed(item) for item in value]
    return type(value), repr(value)


def nested(depth):
    value = []
    for _ in range(depth - 1):
        value = [value]
    return value


class TestRoundTrip:
    @settings(max_examples=200)
    @given(json_values)
    def test_every_json_value_comes_back_with_its_types(self, value):
        assert typed(loads(encode(value, "result"))) == typed(value)

    @settings(max_examples=50)
    @given(st.dictionaries(keys, json_values, max_size=4))
    def test_params_come_back_with_their_types(self, params):
        assert typed(loads(encode_params(params))) == typed(params)

    def test_any_json_parser_can_read_the_text(self):
        text = encode({"a": [1, "é\u2028\0"]}, "params")
        assert json.loads(text) == {"a": [1, "é\u2028\0"]}

    def test_tuples_and_subclasses_become_plain_values(self):
        """Tuples become lists, and subclasses the plain type."""
        number = enum.IntEnum("number", {"one": 1})
        word = enum.Enum("word", {"yes": "YES"}, type=str)
        value = {
            "tuple": (1, (2,)),
            "int": number.one,
            "str": word.yes,
            "dict": OrderedDict(a=defaultdict(list, b=[1])),
        }
        assert loads(encode(value, "params")) == {
            "tuple": [1, [2]],
            "int": 1,
            "str": "YES",
            "dict": {"a": {"b": [1]}},
        }

    def test_params_may_be_any_mapping(self):
        assert encode_params(MappingProxyType({"a": 1})) == '{"a":1}'
        assert encode_params({}) == "{}"

    def test_encoding_does_not_change_the_value(self):
        value = {"a": (1, 2)}
        encode(value, "params")
        assert value == {"a": (1, 2)}


cycle_in_list = [1]
cycle_in_list.append(cycle_in_list)
cycle_in_dict = {}
cycle_in_dict["self"] = [cycle_in_dict]


class TestRefusal:
    @pytest.mark.parametrize(
        ("value", "path", "problem"),
        [
            (float("nan"), "params", "nan"),
            ({"a": [0.0, float("inf")]}, "params.a[1]", "inf"),
            ({"a": {"b": (1, -float("inf"))}}, "params.a.b[1]", "-inf"),
            ({"n": 2**63}, "params.n", "does not fit into 64 bits"),
            ({"n": -(2**63) - 1}, "params.n", "does not fit into 64 bits"),
            ({"items": [{}, {}, {"price": Decimal("1.5")}]}, "params.items[2].price", "Decimal"),
            ({1: "x"}, "params[1]", "key must be a string"),
            ({"a": {None: "x"}}, "params.a[None]", "key must be a string"),
            ({"a\0b": 1}, "params['a\\x00b']", "NUL"),
            ({"a": "x\ud800"}, "params.a", "lone surrogate"),
            ({"a": [{"\udfff": 1}]}, "params.a[0]['\\udfff']", "lone surrogate"),
            ({"a": b"bytes"}, "params.a", "bytes is not JSON"),
            ({"a": bytearray()}, "params.a", "bytearray is not JSON"),
            ({"a": {1, 2}}, "params.a", "set is not JSON"),
            ({"a": frozenset()}, "params.a", "frozenset is not JSON"),
            ({"a": datetime.now(timezone.utc)}, "params.a", "datetime is not JSON"),
            ({"a": date(2024, 1, 1)}, "params.a", "date is not JSON"),
            ({"a": uuid4()}, "params.a", "UUID is not JSON"),
            ({"a": 1j}, "params.a", "complex is not JSON"),
            ({"a": object}, "params.a", "type is not JSON"),
            ({"a": range(3)}, "params.a", "range is not JSON"),
            ({"a": iter([])}, "params.a", "list_iterator is not JSON"),
        ],
        ids=lambda value: value if isinstance(value, str) and value.isascii() else "",
    )
    def test_the_error_names_path_and_problem(self, value, path, problem):
        with pytest.raises(PayloadError, match=re.escape(problem)) as caught:
            encode(value, "params")
        assert caught.value.path == path
        assert str(caught.value).startswith(f"{path}: ")

    @pytest.mark.parametrize("value", [cycle_in_list, cycle_in_dict], ids=["list", "dict"])
    def test_a_value_that_contains_itself_is_refused(self, value):
        with pytest.raises(PayloadError, match="contains itself") as caught:
            encode(value, "result")
        assert len(caught.value.path) <= 500

    def test_the_deepest_nesting_is_kept_and_the_next_is_refused(self):
        assert loads(encode(nested(MAX_DEPTH), "result")) == nested(MAX_DEPTH)
        for depth in (MAX_DEPTH + 1, 100_000):
            with pytest.raises(PayloadError, match="deep"):
                encode(nested(depth), "result")

    @pytest.mark.parametrize("text", ["x" * 8, "é" * 4, "☃☃xx"])
    def test_the_size_limit_counts_utf8_bytes(self, text):
        encode(text, "result", max_size=10)
        with pytest.raises(PayloadError, match=r"11 bytes.*max_payload_size \(10\)"):
            encode(text + "x", "result", max_size=10)

    def test_the_largest_and_smallest_integers_are_kept(self):
        for number in (2**63 - 1, -(2**63)):
            assert loads(encode(number, "result")) == number

    @pytest.mark.parametrize("params", [None, [], "text", 1, [("a", 1)]])
    def test_params_that_are_not_a_dict_are_refused(self, params):
        with pytest.raises(PayloadError, match="params: must be a dict"):
            encode_params(params)

    def test_an_empty_value_of_a_wrong_type_is_refused(self):
        with pytest.raises(PayloadError):
            encode_params(set())


@given(st.text(max_size=30), st.integers(1, 20))
@example("a\0b", 2)
def test_any_text_can_be_cleaned_for_storage(text, limit):
    cleaned = clean_text(text, 1000)
    assert is_encodable(cleaned)
    assert "\0" not in cleaned
    assert cleaned == text.replace("\0", "\ufffd") or not is_encodable(text)
    if is_encodable(text):
        cut = clean_text(text, limit)
        assert len(cut) <= limit
        assert cut == cleaned or (cut[:-1] == cleaned[: limit - 1] and cut[-1] == "…")


@dataclass
class Point:
    x: int
    y: int


class Pair(NamedTuple):
    x: int
    y: int


class Color(enum.IntEnum):
    RED = 1


class Name(str):
    pass


class Half(float):
    pass


CYCLE: list[Any] = []
CYCLE.append(CYCLE)

#: The rows of the table in ``docs/json.rst``: examples, and the place that the error names.
REFUSED = {
    "Params": [],  # a result may be any value: see below
    "Other types": [
        *((value, "") for value in (b"x", {1}, date(2026, 1, 1), Decimal(1), uuid4(), object())),
        (Point(1, 2), ""),
    ],
    "Numbers": [(value, "") for value in (math.nan, math.inf, -math.inf, 2**63, -(2**63) - 1)],
    "Text": [("\ud800", ""), ({"\ud800": 1}, "['\\ud800']")],
    "Keys": [({1: 1}, "[1]"), ({None: 1}, "[None]"), ({"a\0": 1}, "['a\\x00']")],
    "Depth": [(nested(MAX_DEPTH), "[0]" * (MAX_DEPTH - 1)), (CYCLE, "[0]" * (MAX_DEPTH - 1))],
    "Size": [("x" * DEFAULT_MAX_SIZE, None), ("é" * (DEFAULT_MAX_SIZE // 2), None)],
    "The key taskx:codec": [],
}
KEPT = [
    *(None, True, 2**63 - 1, -(2**63), 0.5, -0.0, 1e308, "text \0 with a NUL", "é𝄞", ""),
    *([], {}, {"": 1}, {"a.b": 1, "$c": 2}, [1, [2, {"a": []}]], nested(MAX_DEPTH - 1)),
    *("x" * (DEFAULT_MAX_SIZE - len('{"a":""}')), {"taskx:codec": 1}),
]


class TestDocumentation:
    """The page on params and results lists every refused value, and no value that is kept."""

    def test_its_table_has_the_rows_that_are_tested_here(self):
        text = (Path(__file__).parents[2] / "docs" / "json.rst").read_text(encoding="utf-8")
        table = text.partition("Refused are:")[2].split("===\n")[1]
        rows = re.findall(r"^([A-Z].{0,22}?)  +", table, re.MULTILINE)
        assert [row.replace("``", "") for row in rows] == list(REFUSED)

    @pytest.mark.parametrize(
        ("value", "path"), [example for examples in REFUSED.values() for example in examples]
    )
    def test_values_that_it_lists_are_refused_and_the_error_names_the_place(self, value, path):
        for what, encoded in (("params", {"a": value}), ("result", {"a": value})):
            with pytest.raises(PayloadError) as error:
                encode(encoded, what)
            assert error.value.path == (what if path is None else f"{what}.a{path}"[:500])

    @pytest.mark.parametrize("params", [None, [], "text", 5, [("a", 1)]])
    def test_params_must_be_a_dict(self, params):
        with pytest.raises(PayloadError, match="must be a dict"):
            encode_params(params)
        assert encode_params(MappingProxyType({"a": 1})) == '{"a":1}'

    def test_the_codecs_key_is_refused_at_the_top(self):
        for what in ("params", "result"):
            with pytest.raises(PayloadError, match="is a reserved key"):
                encode({CODEC_KEY: 1}, what)

    @pytest.mark.parametrize("value", KEPT)
    def test_all_other_values_are_kept(self, value):
        assert loads(encode_params({"a": value})) == {"a": value}

    def test_tuples_and_subclasses_are_kept_as_the_plain_value(self):
        values = [(1, 2), Pair(1, 2), defaultdict(list, a=1), Color.RED, Name("n"), Half(0.5)]
        assert loads(encode(values, "result")) == [[1, 2], [1, 2], {"a": 1}, 1, "n", 0.5]
