"""The records: tasks to and from JSON, their status, filters of lists, and clocks."""

import json
import time
from datetime import datetime, timedelta, timezone

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskx import Attempt, ConfigurationError, Task, TaskFilter, TaskStatus
from taskx.tasks.clock import SystemClock, check_clock, to_datetime, to_ms
from taskx.tasks.model import TASK_FIELDS
from taskx.tasks.record import COLUMNS, DEFAULTS, row_from_task, task_from_row
from taskx.tasks.writes import CREATED
from taskx.testing import ManualClock

from .test_payload import json_values, keys, texts

moments = st.integers(0, 4_000_000_000_000).map(to_datetime)
maybe = st.none() | moments
counts = st.integers(0, 2**31)
seconds = st.floats(0, 1e9)
attempts = st.builds(
    Attempt,
    outcome=texts,
    started_at=maybe,
    ended_at=maybe,
    worker=texts,
    error=texts,
    error_type=texts,
    traceback=texts,
)
tasks = st.builds(
    Task,
    id=texts,
    type=texts,
    status=st.sampled_from(TaskStatus),
    params=st.dictionaries(keys, json_values, max_size=3),
    result=json_values,
    error=texts,
    progress=st.integers(0, 100),
    message=texts,
    created_by=texts,
    created_at=moments,
    started_at=maybe,
    completed_at=maybe,
    duration=seconds,
    priority=st.integers(-1000, 1000),
    run_at=maybe,
    timeout=st.none() | seconds,
    max_attempts=st.none() | counts,
    max_crashes=st.none() | counts,
    errors=counts,
    crashes=counts,
    interruptions=counts,
    starts=counts,
    cancel_requested_at=maybe,
    dead_letter=st.booleans(),
    error_type=texts,
    traceback=texts,
    owner=texts,
    worker=texts,
    earlier_attempts=st.lists(attempts, max_size=3),
    depends_on=st.just(()) | st.lists(texts, min_size=1, max_size=3),
    concurrency_key=st.none() | texts,
    stuck_on=texts,
    checkpoints=st.none() | st.dictionaries(keys, json_values, min_size=1, max_size=3),
    log=texts,
)


def read(row):
    return task_from_row([row[name] for name in TASK_FIELDS])


class TestTask:
    @settings(max_examples=100)
    @given(tasks)
    def test_a_task_survives_json(self, task):
        data = json.loads(json.dumps(task.to_dict()))
        assert Task.from_dict(data) == task

    @settings(max_examples=100)
    @given(tasks)
    def test_a_task_survives_a_row(self, task):
        row = row_from_task(task)
        assert tuple(row) == COLUMNS
        assert read(row) == task

    def test_the_first_thirteen_fields_are_those_of_the_original(self):
        assert list(Task().to_dict())[:13] == [
            "id", "type", "status", "params", "result", "error", "progress", "message",
            "created_by", "created_at", "started_at", "completed_at", "duration",
        ]  # fmt: skip

    def test_every_field_except_damage_is_stored(self):
        """The column of the tags holds the flow, too."""
        names = [field.name for field in attrs.fields(Task)]
        assert list(TASK_FIELDS) == [name for name in names if name not in ("flow", "damage")]
        assert names[-1] == "damage"
        assert set(CREATED) | set(DEFAULTS) == set(COLUMNS)

    def test_unique_scope_and_parent_policy_are_kept(self):
        task = Task(
            id="a",
            created_at=to_datetime(0),
            unique_key="k",
            unique_scope="ever",
            depends_on=["b"],
            on_parent_failure="run",
        )
        assert read(row_from_task(task)) == task
        assert Task.from_dict(task.to_dict()) == task

    def test_fields_of_a_later_version_are_ignored(self):
        data = Task(earlier_attempts=[Attempt(error="x")]).to_dict()
        data["earlier_attempts"][0]["mood"] = "bad"
        assert Task.from_dict(data).attempts == [Attempt(error="x")]

    def test_a_new_row_is_a_new_task(self):
        task = Task(id="a", type="t", created_at=to_datetime(0))
        created = {"id": "a", "type": "t", "created_at": 0}
        assert row_from_task(task) == {**DEFAULTS, **created}

    @pytest.mark.parametrize(
        ("text", "milliseconds"),
        [
            ("1970-01-01T00:00:01Z", 1000),
            ("1970-01-01T00:00:01+00:00", 1000),
            ("1970-01-01T08:00:01.5+08:00", 1500),
            ("1970-01-01T00:00:01.123Z", 1123),
            ("1970-01-01T00:00:01.123456789Z", 1123),
        ],
    )
    def test_iso_times_of_other_writers_can_be_read(self, text, milliseconds):
        """Also those of Go, which writes Z and up to nine digits."""
        moment = Task.from_dict({"created_at": text}).created_at
        assert (to_ms(moment), moment.tzinfo) == (milliseconds, timezone.utc)

    @pytest.mark.parametrize(
        "data", [{"created_at": "2024-01-01T00:00:00"}, {"status": "sleeping"}]
    )
    def test_unreadable_values_are_refused(self, data):
        with pytest.raises(ValueError, match=r"time zone|sleeping"):
            Task.from_dict(data)

    def test_unknown_names_are_ignored_and_missing_ones_default(self):
        assert Task.from_dict({"id": "a", "of the future": 1}) == Task(id="a")

    def test_a_damaged_row_names_its_damage(self):
        row = row_from_task(Task(id="a", type="t", params={"x": 1}, created_at=to_datetime(0)))
        for column in ("params", "result", "earlier_attempts", "depends_on", "checkpoints"):
            task = read({**row, column: "{not JSON"})
            assert "damaged" in task.damage
            assert (task.id, task.params) == ("a", {})
        assert "not a JSON object" in read({**row, "params": "[1]"}).damage
        for column in ("unique_key", "concurrency_key", "log"):
            assert "damaged" in read({**row, column: b"\xff"}).damage

    def test_only_errors_count_as_attempts(self):
        assert Task(errors=2, crashes=5, interruptions=5, starts=12).attempt == 3

    def test_a_task_that_never_started_has_no_attempts(self):
        assert Task().attempts == []
        [running] = Task(status=TaskStatus.RUNNING, started_at=to_datetime(0)).attempts
        assert (running.outcome, running.ended_at) == ("", None)


class TestStatus:
    @pytest.mark.parametrize("status", list(TaskStatus))
    def test_a_status_prints_as_its_value_and_equals_it(self, status):
        assert f"{status}" == str(status) == status.value == status
        assert f"{status:>12}" == f"{status.value:>12}"
        assert "%s" % status == status.value  # noqa: UP031
        assert json.dumps(status) == f'"{status.value}"'

    def test_there_are_five_statuses(self):
        assert list(TaskStatus) == ["pending", "running", "completed", "failed", "cancelled"]
        assert [s for s in TaskStatus if s.finished] == ["completed", "failed", "cancelled"]


class TestFilter:
    @pytest.mark.parametrize(
        "condition",
        [
            {"start_date": datetime(2024, 1, 1)},
            {"end_date": datetime(2024, 1, 1)},
            {"start_date": "2024-01-01"},
            {"offset": -1},
            {"limit": -1},
            {"offset": 1.0},
            {"limit": "10"},
            {"limit": True},
            {"limit": None},
            {"offset": 2**62},
            {"limit": 2**62},
            {"status": "sleeping"},
            {"type": 5},
            {"created_by": "x" * 256},
            {"created_by": "\ud800"},
            {"type": "a\0b"},
            {"error": 5},
            {"error": "a\0b"},
            {"error": "\ud800"},
            {"error_type": ValueError},
            {"id_prefix": 5},
            {"id_prefix": "x" * 256},
            {"params": "user.id"},
            {"params": ["user.id"]},
            {"params": {5: 5}},
            {"params": {"": 5}},
            {"params": {"a..b": 5}},
            {"params": {"a.": 5}},
            {"params": {(): 5}},
            {"params": {("a", ""): 5}},
            {"params": {("a", 0): 5}},
            {"params": {'a"b': 5}},
            {"params": {"a\\b": 5}},
            {"params": {"a\nb": 5}},
            {"params": {"\ud800": 5}},
            {"params": {"a": [5]}},
            {"params": {"a": {}}},
            {"params": {"a": float("nan")}},
            {"params": {"a": 2**64}},
            {"params": {"a": "\ud800"}},
            {"params": {"a": datetime(2024, 1, 1)}},
        ],
        ids=str,
    )
    def test_invalid_conditions_are_refused(self, condition):
        with pytest.raises(ConfigurationError, match=next(iter(condition))):
            TaskFilter(**condition)

    def test_a_filter_has_defaults(self):
        assert TaskFilter() == TaskFilter(
            type=None,
            status=None,
            created_by=None,
            start_date=None,
            end_date=None,
            error=None,
            error_type=None,
            id_prefix=None,
            params=None,
            parent=None,
            offset=0,
            limit=100,
        )

    def test_a_path_of_params_is_a_text_or_a_tuple_of_keys(self):
        wanted = TaskFilter(params={"user.id": 7, ("a.b",): None})
        assert wanted.params == ((("user", "id"), 7), (("a.b",), None))
        assert attrs.evolve(wanted, limit=5).params == wanted.params
        assert hash(wanted) == hash(TaskFilter(params={("user", "id"): 7, ("a.b",): None}))
        assert TaskFilter(params={}).params is None

    def test_the_given_conditions_are_named(self):
        assert TaskFilter(limit=5, offset=5).given == set()
        wanted = TaskFilter(type="a", error="x", params={"a": None})
        assert wanted.given == {"type", "error", "params"}

    @pytest.mark.parametrize("name", ["error", "id_prefix"])
    def test_the_empty_text_in_each_text_is_no_condition(self, name):
        """Else an unset variable would let a change of all tasks pass."""
        assert TaskFilter(**{name: ""}).given == set()

    def test_a_filter_knows_the_tasks_that_match(self):
        task = Task(id="ab", error="Boom!", error_type="m.Boom", params={"a": {"b": 1}})
        for condition, expected in [
            ({"error": "bOOM"}, True),
            ({"error": "bang"}, False),
            ({"error_type": "m.Boom"}, True),
            ({"error_type": "Boom"}, False),
            ({"id_prefix": "a"}, True),
            ({"id_prefix": "b"}, False),
            ({"params": {"a.b": 1}}, True),
            ({"params": {"a.b": True}}, False),
            ({"params": {"a.b.c": 1}}, False),
            ({"params": {"a.c": None}}, False),
        ]:
            assert TaskFilter(**condition).matches(task) is expected, condition

    @pytest.mark.parametrize("status", ["failed", TaskStatus.FAILED])
    def test_a_status_may_be_text(self, status):
        assert TaskFilter(status=status).status is TaskStatus.FAILED

    def test_an_empty_text_means_any_status(self):
        """Query strings contain it."""
        assert TaskFilter(status="").status is None


class TestManualClock:
    def test_the_wall_clock_can_be_set_alone(self):
        clock = ManualClock(datetime(2024, 6, 1, tzinfo=timezone.utc))
        monotonic = clock.monotonic()
        for hours in (-5, 5):
            moment = clock.now() + timedelta(hours=hours)
            clock.set_wall(moment)
            assert (clock.now(), clock.monotonic()) == (moment, monotonic)

    def test_a_manual_clock_cannot_advance_backwards(self):
        with pytest.raises(ValueError, match="backwards"):
            ManualClock().advance(-1)

    def test_naive_moments_are_refused(self):
        with pytest.raises(ValueError, match="time zone"):
            ManualClock(datetime(2024, 1, 1))


def test_a_subclass_of_the_system_clock_is_a_clock_whatever_its_constructor_does():
    class Ahead(SystemClock):
        def __init__(self):
            self.ahead = 60_000

        def now_ms(self):
            return super().now_ms() + self.ahead

    clock = check_clock(Ahead())
    assert clock.now_ms() > SystemClock().now_ms()
    assert clock.monotonic() <= time.monotonic()


def test_the_system_clock_tells_the_time():
    before = datetime.now(timezone.utc)
    told = SystemClock().now_ms()
    assert to_ms(before) <= told <= to_ms(datetime.now(timezone.utc))
