"""Values of Python classes as JSON: what is decoded equals what was encoded."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import json
import traceback
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from functools import partial
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Annotated, Any, Generic, Literal, NamedTuple, NewType, Optional, TypedDict, Union
from uuid import UUID, uuid4
from zoneinfo import ZoneInfo

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskx import PayloadError
from taskx.tasks import payload
from taskx.tasks.annotations import _SCALARS
from taskx.tasks.values import values_of

T = typing.TypeVar("T")


def values_for(annotation):
    """Return the values of an executor whose only param ``x`` and result are annotated so."""

    def function(x):
        raise NotImplementedError

    function.__annotations__ = {"x": annotation, "return": annotation}
    return values_of(function, list(inspect.signature(function).parameters.values()))


def encoded(annotation, value):
    return values_for(annotation).encode_params({"x": value})["x"]


def decoded(annotation, value):
    return values_for(annotation).decode_params({"x": value})["x"]


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Word(str, enum.Enum):
    YES = "y"


class Right(enum.Flag):
    READ = enum.auto()
    WRITE = enum.auto()


class Place(enum.Enum):
    """Values that are no JSON: the names are kept."""

    HERE = (1, 2)
    THERE = None
    FAR = float("inf")


class NoMembers(enum.Enum):
    pass


@dataclass
class Line:
    what: UUID
    price: Decimal
    count: int = 1


@dataclass(frozen=True)
class Order:
    when: datetime
    lines: list[Line]
    color: Color | None = None
    notes: dict[str, timedelta] = field(default_factory=dict)
    total: int = field(default=0, init=False)


@attrs.define
class Point:
    x: int
    _path: Path
    at: datetime = attrs.field(kw_only=True, factory=lambda: datetime(2026, 1, 1))


@attrs.define
class Typed:
    when = attrs.field(type=date)


@dataclass
class Tree:
    day: date
    branches: list[Tree] = field(default_factory=list)


@dataclass
class Box(Generic[T]):
    content: T
    day: date


class Pair(NamedTuple):
    day: date
    name: str


class Row(TypedDict, total=False):
    day: date
    name: str


class PlainRow(TypedDict):
    name: str


class Branch(TypedDict, total=False):
    day: date
    more: list[Branch]


Moment = NewType("Moment", datetime)

naive = st.datetimes()
aware = st.datetimes(timezones=st.timezones() | st.just(timezone(timedelta(seconds=-3661))))
# As long as the seconds of a float are exact to the microsecond: some 285 years.
spans = st.timedeltas(timedelta(days=-100_000), timedelta(days=100_000))
paths = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
decimals = st.decimals(allow_nan=False)
days = st.fixed_dictionaries({"day": st.dates()})
trees = st.recursive(
    st.builds(Tree, st.dates()),
    lambda tree: st.builds(Tree, st.dates(), st.lists(tree, max_size=3)),
    max_leaves=5,
)
lines = st.builds(Line, st.uuids(), decimals, st.integers(-5, 5))

#: Each annotation, and values of it.
KINDS = [
    (datetime, naive),
    (date, st.dates()),
    (time, st.times() | st.times(timezones=st.just(timezone(timedelta(hours=-3))))),
    (timedelta, spans | st.integers(-999_999_999, 999_999_999).map(lambda n: timedelta(days=n))),
    (UUID, st.uuids()),
    (Decimal, decimals),
    (Path, paths.map(Path)),
    (PurePath, paths.map(PurePath)),
    (PureWindowsPath, paths.map(PureWindowsPath)),
    (Color, st.sampled_from(Color)),
    (Level, st.sampled_from(Level)),
    (Word, st.sampled_from(Word)),
    (Right, st.sampled_from([Right.READ, Right.READ | Right.WRITE, Right(0)])),
    (Place, st.sampled_from(Place)),
    (Order, st.builds(Order, naive, st.lists(lines, max_size=3), st.sampled_from([*Color, None]))),
    (Point, st.builds(Point, st.integers(0, 9), paths.map(Path), at=naive)),
    (Typed, st.builds(Typed, st.dates())),
    (Tree, trees),
    (Pair, st.builds(Pair, st.dates(), st.just("name"))),
    (Row, st.fixed_dictionaries({}, optional={"day": st.dates(), "name": st.just("x")})),
    (Branch, st.fixed_dictionaries({"day": st.dates(), "more": st.lists(days)})),
    (Moment, naive),
    (Annotated[datetime, "in UTC"], naive),
    (Optional[date], st.none() | st.dates()),  # noqa: UP045
    (date | None, st.none() | st.dates()),
    ("date | None", st.none() | st.dates()),
    (list[date], st.lists(st.dates(), max_size=3)),
    (Sequence[date], st.lists(st.dates(), max_size=3)),
    (Iterable[list[UUID]], st.lists(st.lists(st.uuids(), max_size=2), max_size=2)),
    (typing.List[date], st.lists(st.dates(), max_size=3)),  # noqa: UP006
    (dict[str, Decimal], st.dictionaries(st.just("a.b"), decimals)),
    (Mapping[str, list[Line]], st.dictionaries(st.just("k"), st.lists(lines, max_size=2))),
    (tuple[date, ...], st.lists(st.dates(), max_size=3).map(tuple)),
    (tuple[int, date | None], st.tuples(st.just(1), st.none() | st.dates())),
    (tuple[int, str], st.just((1, "x"))),
    (tuple, st.just((1, 2))),
    (Box[int], st.builds(Box, st.integers(0, 9), st.dates())),
]
NAMES = [str(annotation) for annotation, _ in KINDS]


class TestRoundTrip:
    @pytest.mark.parametrize(("annotation", "values"), KINDS, ids=NAMES)
    def test_a_decoded_value_equals_what_was_encoded(self, annotation, values):
        forms = values_for(annotation)

        @settings(max_examples=40)
        @given(values)
        def check(value):
            text = payload.encode_params(forms.encode_params({"x": value}))
            back = forms.decode_params(json.loads(text))["x"]
            assert back == value
            assert type(back) is type(value)
            stored = json.loads(payload.encode(forms.encode_result(value), "result"))
            assert forms.decode_result(stored) == value
            assert forms.decode_params({"x": value})["x"] == value

        check()

    @pytest.mark.parametrize(("annotation", "values"), KINDS, ids=NAMES)
    def test_an_encoded_value_can_be_given_instead_of_the_value(self, annotation, values):
        forms = values_for(annotation)

        @settings(max_examples=20)
        @given(values)
        def check(value):
            stored = json.loads(payload.encode_params(forms.encode_params({"x": value})))
            assert forms.encode_params(stored) == stored

        check()

    @settings(max_examples=100)
    @given(aware)
    def test_an_aware_datetime_keeps_its_moment_and_offset(self, value):
        back = decoded(datetime, encoded(datetime, value))
        assert back.utcoffset() == value.utcoffset()
        assert back.replace(tzinfo=None) == value.replace(tzinfo=None, fold=0)

    @pytest.mark.parametrize("special", ["NaN", "-Infinity", "sNaN", "0E-10", "1.50"])
    def test_decimals_are_kept_to_the_digit(self, special):
        assert str(decoded(Decimal, encoded(Decimal, Decimal(special)))) == special

    def test_encoding_leaves_the_value_as_it_was(self):
        order = Order(datetime(2026, 1, 1), [Line(uuid4(), Decimal(1))])
        copy = dataclasses.replace(order, lines=[dataclasses.replace(order.lines[0])])
        encoded(Order, order)
        assert order == copy


class TestForms:
    """The JSON that other programs read."""

    @pytest.mark.parametrize(
        ("annotation", "value", "form"),
        [
            (datetime, datetime(2026, 3, 1, 12, 30), "2026-03-01T12:30:00"),
            (datetime, datetime(2026, 3, 1, tzinfo=timezone.utc), "2026-03-01T00:00:00+00:00"),
            (
                datetime,
                datetime(2026, 7, 1, tzinfo=ZoneInfo("Europe/Berlin")),
                "2026-07-01T00:00:00+02:00",
            ),
            (date, date(2026, 3, 1), "2026-03-01"),
            (time, time(12, 30, 0, 5), "12:30:00.000005"),
            (timedelta, timedelta(minutes=1, milliseconds=5), 60.005),
            (UUID, UUID(int=1), "00000000-0000-0000-0000-000000000001"),
            (Decimal, Decimal("1.50"), "1.50"),
            (PurePosixPath, PurePosixPath("/a/b"), "/a/b"),
            (Color, Color.RED, "red"),
            (Level, Level.HIGH, 2),
            (Place, Place.HERE, "HERE"),
            (Line, Line(UUID(int=0), Decimal(2)), {"what": str(UUID(int=0)), "price": "2", "count": 1}),
            (Point, Point(1, Path("p")), {"x": 1, "_path": "p", "at": "2026-01-01T00:00:00"}),
            (Pair, Pair(date(2026, 1, 1), "n"), ["2026-01-01", "n"]),
            (Row, {"day": date(2026, 1, 1), "other": 1}, {"day": "2026-01-01", "other": 1}),
            (tuple[date, int], (date(2026, 1, 1), 1), ["2026-01-01", 1]),
        ],
    )  # fmt: skip
    def test_each_class_has_its_json_form(self, annotation, value, form):
        assert encoded(annotation, value) == form
        assert type(encoded(annotation, value)) is type(form)

    def test_other_spellings_of_the_form_are_decoded(self):
        assert decoded(datetime, "2026-01-01T00:00:00Z") == datetime(
            2026, 1, 1, tzinfo=timezone.utc
        )
        assert decoded(time, "12:00:00Z") == time(12, tzinfo=timezone.utc)
        assert decoded(timedelta, 90) == timedelta(minutes=1.5)
        assert decoded(Decimal, 3) == Decimal(3)
        assert decoded(Decimal, 0.1) == Decimal("0.1")
        assert decoded(Line, {"what": UUID(int=0).hex, "price": "1"}) == Line(
            UUID(int=0), Decimal(1)
        )

    @pytest.mark.parametrize("annotation", [datetime, Color, Line, list[date], tuple[int, date]])
    def test_none_stays_none(self, annotation):
        assert encoded(annotation, None) is None
        assert decoded(annotation, None) is None

    def test_a_value_inside_an_object_in_json_form_is_encoded(self):
        given = {"what": UUID(int=0), "price": "1.5"}
        assert encoded(Line, given) == {"what": str(UUID(int=0)), "price": "1.5"}
        assert given == {"what": UUID(int=0), "price": "1.5"}


def test_the_page_on_json_lists_each_class_with_its_form():
    page = (Path(__file__).parents[2] / "docs" / "json.rst").read_text("utf-8")
    table = page.partition("In JSON\n")[2].split("\n\n")[0]
    for kind in (*_SCALARS, Path, enum.Enum, NamedTuple, tuple, TypedDict, NewType):
        assert f"``{kind.__name__}``" in table


class Stranger:
    pass


@dataclass
class Opened:
    """Its ``__init__`` takes more than its fields."""

    day: date
    size: dataclasses.InitVar[int]


@dataclass
class Closed:
    day: date
    other: Stranger


@pytest.mark.parametrize(
    "annotation",
    [
        *(inspect.Parameter.empty, Any, None, int, float, bool, str, bytes, object, "int", Stranger),
        *(list, dict, list[int], dict[str, float], Literal["a", 1], set[date], Opened, PlainRow),
        *(int | str, datetime | str, Union[date, int, None], T, type[int], NoMembers),  # noqa: UP007
        *(list["int"], typing.Callable[[date], date], enum.Enum, Box, str | None),
    ],
    ids=str,
)  # fmt: skip
def test_other_annotations_cost_nothing(annotation):
    if annotation is Box:  # a class with a type variable: only what is known is coded
        assert encoded(Box, Box(1, date(2026, 1, 1))) == {"content": 1, "day": "2026-01-01"}
    else:
        assert values_for(annotation) is None


def test_a_stored_list_may_leave_out_the_defaults_of_a_named_tuple():
    class Spot(NamedTuple):
        day: date
        size: int = 1
        note: str = ""

    assert decoded(Spot, ["2026-01-01"]) == Spot(date(2026, 1, 1))
    assert decoded(Spot, ["2026-01-01", 2]) == Spot(date(2026, 1, 1), 2)
    for wrong in ([], ["2026-01-01", 2, "", 4]):
        with pytest.raises(PayloadError, match=f"a list of 3 values.*, not list of {len(wrong)}"):
            decoded(Spot, wrong)


@dataclass
class Password:
    text: str

    def __post_init__(self):
        raise ValueError(f"{self.text} is too short")


@dataclass
class Login:
    password: Password


class TestSecrets:
    @pytest.mark.parametrize(
        ("annotation", "value"),
        [
            (UUID, "hunter2"),
            (datetime, "hunter2"),
            (list[dict[str, Decimal]], [{"part": "hunter2"}]),
        ],
    )
    def test_the_value_of_a_secret_key_is_in_no_error(self, annotation, value):
        def function(api_token):
            raise NotImplementedError

        function.__annotations__ = {"api_token": annotation}
        values = values_of(function, list(inspect.signature(function).parameters.values()))
        with pytest.raises(
            PayloadError, match=r"params\.api_token.* must be .*, not str"
        ) as caught:
            values.encode_params({"api_token": value})
        assert "hunter2" not in "".join(traceback.format_exception(caught.value))

    def test_the_error_of_a_class_is_hidden_for_a_secret_field(self):
        stored = {"x": {"password": {"text": "hunter2"}}}
        with pytest.raises(PayloadError, match=r"Password cannot be made: ValueError$") as caught:
            values_for(Login).decode_params(stored)
        assert "hunter2" not in "".join(traceback.format_exception(caught.value))


class TestRefusal:
    @pytest.mark.parametrize(
        ("annotation", "value", "path", "problem"),
        [
            (datetime, "soon", "x", "must be datetime (in JSON: ISO 8601 text), not 'soon'"),
            (datetime, 5, "x", "must be datetime (in JSON: ISO 8601 text), not 5"),
            (
                datetime,
                date(2026, 1, 1),
                "x",
                "must be datetime (in JSON: ISO 8601 text), not date",
            ),
            (
                date,
                datetime(2026, 1, 1),
                "x",
                "must be date (in JSON: ISO 8601 text), not datetime",
            ),
            (timedelta, "5", "x", "must be timedelta (in JSON: seconds), not '5'"),
            (timedelta, True, "x", "must be timedelta (in JSON: seconds), not True"),
            (timedelta, 1e300, "x", "must be timedelta"),
            (UUID, "1", "x", "must be UUID (in JSON: text), not '1'"),
            (Decimal, "one", "x", "must be Decimal (in JSON: text), not 'one'"),
            (Decimal, False, "x", "must be Decimal"),
            (Path, 5, "x", "must be Path (in JSON: text), not 5"),
            (Color, "green", "x", "must be Color (in JSON: one of 'red', 'blue'), not 'green'"),
            (Place, [1, 2], "x", "must be Place (in JSON: one of HERE, THERE, FAR), not list of 2"),
            (list[date], "2026-01-01", "x", "must be a list, not '2026-01-01'"),
            (list[date], ["2026-01-01", "x"], "x[1]", "must be date"),
            (dict[str, date], [], "x", "must be a dict, not list"),
            (dict[str, list[date]], {"a": [None, 1]}, "x.a[1]", "must be date"),
            (
                tuple[int, date],
                [1],
                "x",
                "must be tuple (in JSON: a list of 2 values), not list of 1",
            ),
            (Pair, ["2026-01-01"], "x", "must be Pair (in JSON: a list of 2 values), not list"),
            (Line, [], "x", "must be Line (in JSON: an object of its fields), not list"),
            (Line, {"price": "1"}, "x", "Line requires what"),
            (Line, {"what": None, "price": "1", "size": 1}, "x", "Line has no field 'size'"),
            (Tree, {"day": None, "branches": [{"day": "x"}]}, "x.branches[0].day", "must be date"),
        ],
    )
    def test_a_value_that_does_not_fit_is_refused_both_ways(self, annotation, value, path, problem):
        forms = values_for(annotation)
        stored = problem.partition(", not")[0]
        for how, said in ((forms.encode_params, problem), (forms.decode_params, stored)):
            with pytest.raises(PayloadError) as caught:
                how({"x": value})
            assert caught.value.path == f"params.{path}"
            assert caught.value.problem.startswith(said)
        with pytest.raises(PayloadError) as caught:
            forms.decode_result(value)
        assert caught.value.path == f"result{path.removeprefix('x')}"

    @pytest.mark.parametrize(
        "annotation", [date, Decimal, Color, list[date], dict[str, date], Line]
    )
    def test_the_error_of_a_stored_value_does_not_show_it(self, annotation):
        password = "hunter2"
        with pytest.raises(PayloadError) as caught:
            decoded(annotation, password)
        assert password not in "".join(traceback.format_exception(caught.value))
        assert caught.value.problem.endswith("not str")

    def test_flags_without_a_name_are_refused(self):
        class Wide(enum.Flag):
            LOW = 1
            HIGH = 2**70

        assert decoded(Wide, encoded(Wide, Wide.HIGH)) is Wide.HIGH
        for none_or_both in (Wide(0), Wide.LOW | Wide.HIGH):
            with pytest.raises(PayloadError, match="Wide has no name for"):
                encoded(Wide, none_or_both)

    def test_a_class_whose_init_takes_more_than_its_fields_says_so(self):
        @dataclass
        class Opened:
            day: date
            mode: InitVar[str]

        assert values_for(Opened) is None
        with pytest.raises(PayloadError, match="x: Opened is not JSON: its __init__ must take"):
            payload.encode({"x": Opened(date(2026, 1, 1), "r")}, "params")

    def test_an_object_of_a_derived_class_is_refused(self):
        @dataclass
        class Special(Line):
            discount: int = 0

        with pytest.raises(PayloadError, match=r"must be Line .*, not Special"):
            encoded(Line, Special(uuid4(), Decimal(1)))

    def test_what_cannot_be_kept_exactly_is_refused(self):
        with pytest.raises(PayloadError, match="too long to be kept to the microsecond"):
            encoded(timedelta, timedelta.max)
        with pytest.raises(PayloadError, match="without a fixed offset"):
            encoded(time, time(12, tzinfo=ZoneInfo("Europe/Berlin")))

    def test_the_error_of_a_class_that_refuses_its_fields_is_the_cause(self):
        @attrs.define
        class Positive:
            day: date
            count: int = attrs.field(validator=attrs.validators.gt(0))

        annotation = list[Positive]
        with pytest.raises(PayloadError, match="Positive cannot be made: ValueError") as caught:
            decoded(annotation, [{"day": None, "count": 0}])
        assert caught.value.path == "params.x[0]"
        assert isinstance(caught.value.__cause__, ValueError)

    def test_an_object_that_contains_itself_is_refused(self):
        tree = Tree(date(2026, 1, 1))
        tree.branches.append(tree)
        with pytest.raises(PayloadError, match="contains itself"):
            encoded(Tree, tree)


def later(x: Later, y: list[Nowhere], z: "no type at all" = 1, **rest: date) -> Nowhere:  # noqa: F722, F821
    raise NotImplementedError


def shifted(by, day: date) -> date:
    return day + timedelta(by)


class Shift:
    def __call__(self, day: date) -> date:
        return day


class TestResolving:
    def test_a_class_that_is_defined_after_the_executor_is_found(self, monkeypatch):
        forms = values_of(later, list(inspect.signature(later).parameters.values()))
        monkeypatch.setitem(globals(), "Later", Point)
        assert forms.encode_params({"x": Point(1, Path("p"))})["x"]["_path"] == "p"

    def test_an_annotation_that_cannot_be_resolved_leaves_json(self):
        forms = values_of(later, list(inspect.signature(later).parameters.values()))
        given = {"x": "a", "y": [{"b": 1}], "z": 2, "w": "2026-01-01"}
        assert forms.encode_params(given) == given
        assert forms.decode_params(given) == {**given, "w": date(2026, 1, 1)}
        assert forms.decode_result({"a": 1}) == {"a": 1}

    def test_a_value_under_it_is_refused_and_the_error_names_the_annotation(self):
        forms = values_of(later, list(inspect.signature(later).parameters.values()))
        with pytest.raises(PayloadError) as caught:
            forms.encode_params({"x": date(2026, 1, 1)})
        assert caught.value.path == "params.x"
        assert "date is not JSON, and the annotation 'Later' cannot be resolved" in str(
            caught.value
        )

    @pytest.mark.parametrize("function", [partial(shifted, 5), Shift(), Shift().__call__])
    def test_names_of_partials_and_callable_objects_are_found(self, function):
        parameters = list(inspect.signature(function).parameters.values())
        assert values_of(function, parameters).encode_params({"day": date.min}) == {
            "day": "0001-01-01"
        }

    def test_a_field_may_have_the_name_of_its_class(self):
        assert decoded(Dated, {"date": "2026-01-01"}) == Dated(date(2026, 1, 1))

    def test_names_within_a_list_or_a_dict_are_found(self):
        """Python 3.10 leaves them as text."""
        leaf = Leaf(date(2026, 1, 1), [Leaf(date(2026, 1, 2))])
        as_json = {"day": "2026-01-01", "leaves": [{"day": "2026-01-02", "leaves": []}]}
        annotation = dict[str, "Leaf"]
        assert encoded(annotation, {"a": leaf}) == {"a": as_json}
        assert decoded(annotation, {"a": as_json}) == {"a": leaf}

    def test_an_alias_that_contains_itself_leaves_json(self):
        assert values_for(Nested) is None


@dataclass
class Leaf:
    day: date
    leaves: list["Leaf"] = field(default_factory=list)  # noqa: UP037


Nested = dict[str, "Nested"]


@dataclass
class Dated:
    date: date | None = None
