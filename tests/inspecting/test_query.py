"""The filter line: parsing it, writing it, and the messages for wrong ones."""

from __future__ import annotations

import datetime
import shlex
from datetime import timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskx import ConfigurationError, MemoryRepository, Queue, TaskFilter
from taskx.insight.query import (
    FIELDS,
    as_command,
    as_python,
    duration_of,
    moment_of,
    parse_query,
    query_of,
    suggestion,
)
from taskx.testing import ManualClock

NOON = datetime.datetime(2026, 11, 26, 12, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    ("line", "fields"),
    [
        ("", {}),
        ("   ", {}),
        ("type:email", {"type": "email"}),
        ("status:failed  by:node", {"status": "failed", "created_by": "node"}),
        ("id:0192", {"id_prefix": "0192"}),
        ('error:"timed out"', {"error": "timed out"}),
        ('error:timed" out"', {"error": "timed out"}),
        ('error:"a \\"b\\" \\\\ \\u00e9"', {"error": 'a "b" \\ é'}),
        ("error:a:b", {"error": "a:b"}),
        ("error_type:ValueError", {"error_type": "ValueError"}),
        ("parent:p1", {"parent": "p1"}),
        ("tag:eu", {"tag": "eu"}),
        ("tag:eu type:email tag:big", {"type": "email", "tag": ["eu", "big"]}),
        ("flow:f1", {"flow": "f1"}),
        ('by:""', {"created_by": ""}),
        ("params.user.id:7", {"params": {"user.id": 7}}),
        ('params.user.id:"7"', {"params": {"user.id": "7"}}),
        ("params.a:true params.b:null", {"params": {"a": True, "b": None}}),
        ("params.a:1.5", {"params": {"a": 1.5}}),
        ("params.a:1.0.0", {"params": {"a": "1.0.0"}}),
        ("params.a:[1]", {"params": {"a": "[1]"}}),
        ("params.a:NaN", {"params": {"a": "NaN"}}),
        ('params.a:"null"', {"params": {"a": "null"}}),
        ('params."a.b".c:x', {"params": {("a.b", "c"): "x"}}),
        ('params."a:b":x', {"params": {("a:b",): "x"}}),
        ("since:2026-11-26", {"start_date": NOON - timedelta(hours=12)}),
        ("until:2026-11-26T12:00Z", {"end_date": NOON}),
        ("until:2026-11-26T13:00+01:00", {"end_date": NOON}),
    ],
)
def test_a_line_is_a_filter(line, fields):
    assert parse_query(line) == TaskFilter(**fields)


def test_ages_count_from_now():
    clock = ManualClock(NOON)
    wanted = parse_query("older:1d newer:1w", clock)
    now = clock.now()
    assert wanted == TaskFilter(
        end_date=now - timedelta(days=1), start_date=now - timedelta(weeks=1)
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("typ:email", "the filter has no field 'typ'; did you mean 'type'?"),
        ("created_by:node", "the filter has no field 'created_by'; did you mean 'by'?"),
        ("zzz:1", "the filter has no field 'zzz': use type, status,"),
        ("type.x:1", "the filter has no field 'type.x'; did you mean 'type'?"),
        ("failed", "'failed' has no field: did you mean status:failed?"),
        ("error:timed out", "'out' has no field: write it as type:out, or put quotes around"),
        ('tag:"a b"', "the tag 'a b' contains white space"),
        ("type:a type:b", "the filter has 'type' twice: give it once"),
        ("params.a:1 params.a:2", "the filter has 'params.a' twice"),
        ("type:", "the filter has no value after 'type:'"),
        ("params:1", "params needs a path"),
        ("params.:1", "params needs a path"),
        ("type=charge", "'type=charge' has no field: did you mean type:charge?"),
        ("status=pending", "did you mean status:pending?"),
        ("created_by=web", "did you mean by:web?"),
        ("until=2026-11-26T10:00Z", "did you mean until:2026-11-26T10:00Z?"),
        ("params.a.b=7", "did you mean params.a.b:7?"),
        ('error="timed out"', 'did you mean error:"timed out"?'),
        ("tpye=charge", "did you mean type:charge?"),
        ("zzz=1", "'zzz=1' has no field: write it as type:email"),
        ('error:"timed', "an opening quotation mark without a closing one"),
        (r'error:"\x"', "is not a JSON string"),
        ("status:done", "status must be one of"),
        ("older:1y", "'1y' is not a duration: write a number and a unit"),
        ("since:yesterday", "'yesterday' is not a time"),
        ("older:1d until:2026-11-26", "older and until say the same"),
    ],
)
def test_a_wrong_line_is_refused_with_what_to_write(line, message):
    with pytest.raises(ConfigurationError) as refused:
        parse_query(line)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_control_characters_in_a_wrong_line_are_not_repeated_raw():
    for line in ("\x1b[2J", "\x1b[2J:1", 'error:"\x1b[2J', "older:\x1b[2J"):
        with pytest.raises(ConfigurationError) as refused:
            parse_query(line)
        assert "\x1b" not in str(refused.value)


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
keys = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters='"\\'), min_size=1, max_size=6
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**53), 2**53),
    st.floats(allow_nan=False, allow_infinity=False),
    texts,
    st.sampled_from(["null", "true", "1", "1e5", "NaN", '"', ""]),
)
moments = st.datetimes(
    datetime.datetime(1980, 1, 1), datetime.datetime(2200, 1, 1), timezones=st.just(timezone.utc)
)
labels = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Z", "C"]), min_size=1, max_size=8
).filter(str.isprintable)
filters = st.fixed_dictionaries(
    {},
    optional={
        "type": texts,
        "status": st.sampled_from(["pending", "running", "completed", "failed", "cancelled"]),
        "created_by": texts,
        "error": texts,
        "error_type": texts,
        "id_prefix": texts,
        "parent": texts,
        "tag": st.lists(labels, min_size=1, max_size=3),
        "flow": labels,
        "params": st.dictionaries(
            st.lists(keys, min_size=1, max_size=3).map(tuple), scalars, max_size=3
        ),
        "start_date": moments,
        "end_date": moments,
    },
)


class _Asked:
    """A queue that notes how it was asked for tasks."""

    def list_tasks(self, **fields: Any) -> TaskFilter:
        return TaskFilter(**fields)


@given(filters)
def test_the_line_of_a_filter_gives_the_filter_back(fields):
    wanted = TaskFilter(**fields)
    line = query_of(wanted)
    assert parse_query(line) == wanted
    assert "\n" not in line
    assert "\x1b" not in line


@given(filters, st.none() | st.integers(0, 1000), st.integers(0, 5))
def test_the_python_and_the_command_of_a_filter_say_the_same(fields, limit, offset):
    limits = {} if limit is None else {"limit": limit}
    wanted = TaskFilter(**fields, **limits, offset=offset)
    assert eval(as_python(wanted), {"queue": _Asked(), "datetime": datetime}) == wanted
    name, command, *words = shlex.split(as_command(wanted))
    assert (name, command) == ("taskx", "list")
    if limit is not None:
        assert words[-2:] == ["--limit", str(limit)]
        del words[-2:]
    assert parse_query(" ".join(words)) == TaskFilter(**fields)


def test_the_command_of_a_filter_can_be_pasted_into_a_shell():
    wanted = TaskFilter(type="email", error="timed out", limit=5)
    assert as_command(wanted) == "taskx list type:email 'error:\"timed out\"' --limit 5"
    assert as_python(wanted) == "queue.list_tasks(type='email', error='timed out', limit=5)"


def test_a_parsed_line_finds_tasks():
    queue = Queue(MemoryRepository())
    queue.declare("email", "sms")
    wanted = queue.submit("email", {"user": {"id": 7}})
    queue.submit("email", {"user": {"id": 8}})
    queue.submit("sms", {"user": {"id": 7}})
    [task] = queue.list_tasks(parse_query("type:email params.user.id:7")).tasks
    assert task.id == wanted.id


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("45", 45), ("0.5", 0.5), ("250ms", 0.25), ("15m", 900), ("1h30m", 5400), ("2d", 172800)],
)
def test_a_duration_has_units(text, seconds):
    assert duration_of(text) == seconds


@pytest.mark.parametrize("text", ["", "x", "-1", "1 h", "1hh", "h", "1e3", "inf"])
def test_other_texts_are_no_duration(text):
    with pytest.raises(ConfigurationError, match="is not a duration"):
        duration_of(text)


def test_a_time_without_an_offset_is_utc():
    assert moment_of("2026-11-26T12:00:00") == NOON


def test_a_suggestion_is_made_only_for_close_words():
    assert suggestion("emial", ["email", "sms"]) == "; did you mean 'email'?"
    assert suggestion("zzzz", ["email", "sms"]) == ""


def test_every_field_of_a_line_is_explained():
    assert all(FIELDS.values())
