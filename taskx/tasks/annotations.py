"""Python values as JSON, by annotations: a datetime as text, a dataclass as an object of its fields.

The annotation of a parameter or of a result chooses the form. A :class:`Form` encodes a value as JSON and
decodes that JSON to an equal value. An annotation that names no class with a form leaves values as they
are. None stays None under every annotation.

It imports the modules of all classes that have a form, so it is loaded when an annotation is first met.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import sys
import typing
from collections import abc
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from functools import reduce
from itertools import repeat
from operator import or_
from pathlib import PurePath
from types import SimpleNamespace, UnionType
from typing import Annotated, Any, Union, get_args, get_origin
from uuid import UUID

import attrs

from taskx.tasks.forms import Form, Misfit, coded_items, coded_list

_NONE = type(None)
_LISTS = (list, abc.Sequence, abc.MutableSequence, abc.Collection, abc.Iterable)
_DICTS = (dict, abc.Mapping, abc.MutableMapping)
_UNPACK = (getattr(typing, "Unpack", "no such origin"),)  # since Python 3.11
_ALIAS = getattr(typing, "TypeAliasType", ())  # since Python 3.12
_INT_MIN, _INT_MAX = -(2**63), 2**63 - 1


def _not(expected: str, value: Any, back: bool) -> Misfit:
    """Return the error for a value of another kind.

    The text has the value itself only if a caller gave it. The error of a stored value is stored and
    logged, and params may be secret.
    """
    quiet = shown = type(value).__name__
    if isinstance(value, (str, int, float)) and not back:
        shown = f"{value!r:.80}"
    elif isinstance(value, (list, tuple)):
        quiet = shown = f"{shown} of {len(value)}"
    what = f"must be {expected}, not"
    return Misfit(f"{what} {shown}", quiet=f"{what} {quiet}")


# --- the forms


@attrs.frozen(eq=False, repr=False)
class _Scalar(Form):
    """The form of a class whose values become one text or number each.

    Attributes:
        kind: the class.
        json: the classes of its JSON values.
        said: its JSON form, in words.
        encode: makes the JSON value.
        decode: makes the value; raises an exception if the JSON value has another form.
    """

    kind: type[Any]
    json: tuple[type[Any], ...]
    said: str
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]

    def _coded(self, value: Any, back: bool) -> Any:
        if isinstance(value, self.kind) and not self._hides_a_time(value):
            return value if back else self.encode(value)
        decoded = self._decoded(value, back)
        return decoded if back else value

    def _hides_a_time(self, value: Any) -> bool:
        """Return True if a date is a datetime, whose time the form would drop."""
        return self.kind is date and isinstance(value, datetime)

    def _decoded(self, value: Any, back: bool) -> Any:
        cause = None
        if isinstance(value, self.json) and (not isinstance(value, bool) or bool in self.json):
            try:
                return self.decode(value)
            except Exception as error:  # noqa: BLE001  (also one of the user's own ``_missing_``)
                cause = error
        misfit = _not(f"{self.kind.__name__} (in JSON: {self.said})", value, back)
        raise misfit from (None if back else cause)  # the cause may have the value in its text


@attrs.frozen(eq=False, repr=False)
class _List(Form):
    """The form of a list, or of a tuple of any length."""

    kind: type[Any]
    item: Form | None

    def _coded(self, value: Any, back: bool) -> Any:
        if not isinstance(value, (list, tuple)):
            raise _not("a list", value, back)
        made = list(value) if self.item is None else coded_list(value, repeat(self.item), back)
        return self.kind(made) if back else made


@attrs.frozen(eq=False, repr=False)
class _Places(Form):
    """The form of a tuple of fixed length, or of a named tuple; in JSON a list.

    Attributes:
        kind: the class.
        make: makes the tuple of all its values.
        forms: the form of each value.
        defaults: the values of the last places, which a list may leave out.
    """

    kind: type[Any]
    make: Callable[[list[Any]], Any]
    forms: list[Form | None]
    defaults: Sequence[Any] = ()

    def _coded(self, value: Any, back: bool) -> Any:
        most = len(self.forms)
        missing = most - len(value) if isinstance(value, (list, tuple)) else -1
        if not 0 <= missing <= len(self.defaults):
            raise _not(f"{self.kind.__name__} (in JSON: a list of {most} values)", value, back)
        made = coded_list(value, self.forms, back)
        return self.make([*made, *self.defaults[len(self.defaults) - missing :]]) if back else made


@attrs.frozen(eq=False, repr=False)
class _Dict(Form):
    """The form of a dict: of all its values, or with ``forms`` of single keys, as in a TypedDict."""

    every: Form | None
    forms: dict[str, Form | None] = attrs.field(factory=dict)

    def _coded(self, value: Any, back: bool) -> Any:
        if not isinstance(value, Mapping):
            raise _not("a dict", value, back)
        return coded_items(value, {key: self.forms.get(key, self.every) for key in value}, back)


@attrs.frozen(eq=False, repr=False)
class _Fields(Form):
    """The form of a dataclass or an attrs class: an object of the fields that its ``__init__`` takes.

    Attributes:
        kind: the class.
        parameters: the fields by name, each as a parameter of ``__init__``.
        forms: the form of each field.
    """

    kind: type[Any]
    parameters: dict[str, inspect.Parameter]
    forms: dict[str, Form | None] = attrs.field(factory=dict)

    def _coded(self, value: Any, back: bool) -> Any:
        if type(value) is self.kind:
            if back:
                return value
            value = {name: getattr(value, name) for name in self.parameters}
        self._check(value, back)
        made = coded_items(value, self.forms, back)
        return self._made(made) if back else made

    def _check(self, value: Any, back: bool) -> None:
        name, parameters = self.kind.__name__, self.parameters
        if not isinstance(value, dict):
            raise _not(f"{name} (in JSON: an object of its fields)", value, back)
        required = (
            n for n, parameter in parameters.items() if parameter.default is parameter.empty
        )
        if missing := [n for n in required if n not in value]:
            raise Misfit(f"{name} requires {', '.join(missing)}")
        if unknown := [key for key in value if key not in parameters]:
            known = ", ".join(parameters) or "none"
            raise Misfit(f"{name} has no field {unknown[0]!r:.80}; its fields: {known}")

    def _made(self, fields: dict[str, Any]) -> Any:
        try:
            return self.kind(**{self.parameters[n].name: item for n, item in fields.items()})
        except Exception as error:
            quiet = f"{self.kind.__name__} cannot be made: {type(error).__name__}"
            raise Misfit(f"{quiet}: {error}", quiet=quiet) from error


@attrs.frozen(eq=False, repr=False)
class _Unresolved(Form):
    """The form of an annotation that cannot be resolved: JSON stays as it is."""

    problem: str

    def _coded(self, value: Any, back: bool) -> Any:
        if not back and has_form(type(value)):
            raise Misfit(f"{type(value).__name__} is not JSON, and {self.problem}")
        return value


# --- the classes that have a form


def _iso(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a reader of ISO 8601 text that takes ``Z`` on every Python."""
    return lambda text: read(text[:-1] + "+00:00" if text.endswith(("Z", "z")) else text)


def _time_text(value: time) -> str:
    if value.tzinfo is not None and value.utcoffset() is None:
        raise Misfit(
            "time has a time zone without a fixed offset; give a datetime, or a naive time"
        )
    return time.isoformat(value)


def _seconds(value: timedelta) -> float:
    seconds = value.total_seconds()
    with suppress(OverflowError):
        if timedelta(seconds=seconds) == value:
            return seconds
    raise Misfit("timedelta is too long to be kept to the microsecond; give whole seconds")


_SCALARS = {
    datetime: ((str,), "ISO 8601 text", datetime.isoformat, _iso(datetime.fromisoformat)),
    date: ((str,), "ISO 8601 text", date.isoformat, date.fromisoformat),
    time: ((str,), "ISO 8601 text", _time_text, _iso(time.fromisoformat)),
    timedelta: ((int, float), "seconds", _seconds, lambda seconds: timedelta(seconds=seconds)),
    UUID: ((str,), "text", str, UUID),
    Decimal: ((str, int, float), "text", str, lambda number: Decimal(str(number))),
}


def _scalar(kind: Any) -> Form | None:
    """Return the form of a class whose values become one text or number; None if it has none."""
    if issubclass(kind, Enum):
        return _enum(kind)
    if issubclass(kind, PurePath):
        return _Scalar(kind, (str,), "text", str, kind)
    return _Scalar(kind, *_SCALARS[kind])  # type: ignore[arg-type]


def _enum(kind: type[Enum]) -> Form | None:
    members = kind.__members__
    if not members:
        return None
    if all(_is_simple(member._value_) for member in members.values()):
        said = f"one of {', '.join(repr(member._value_) for member in kind):.200}"
        return _Scalar(kind, (str, int, float, bool), said, lambda member: member._value_, kind)
    said = f"one of {', '.join(members):.200}"

    def name_of(member: Any) -> str:
        if member.name not in members:  # flags together
            raise Misfit(f"{kind.__name__} has no name for {member!r:.80}")
        return str(member.name)

    return _Scalar(kind, (str,), said, name_of, kind.__getitem__)


def _is_simple(value: Any) -> bool:
    """Return True if a value is a JSON text, number or boolean."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, str) or (isinstance(value, int) and _INT_MIN <= value <= _INT_MAX)


def has_form(kind: Any) -> bool:
    """Return True if the values of a class are no JSON, but have a form by its annotation."""
    return kind in _SCALARS or issubclass(kind, (Enum, PurePath)) or _has_fields(kind)


def takes_more(kind: Any) -> bool:
    """Return True if a class has fields, but no form: its ``__init__`` does not take just these."""
    return _has_fields(kind) and _parameters(kind) is None


def _has_fields(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind) or attrs.has(kind)


def _parameters(kind: type[Any]) -> dict[str, inspect.Parameter] | None:
    """Return the fields of a class as parameters of its ``__init__``; None if that takes others."""
    if attrs.has(kind):
        names = {field.name: field.alias for field in attrs.fields(kind) if field.init}
    else:
        names = {field.name: field.name for field in dataclasses.fields(kind) if field.init}
    try:
        signature = inspect.signature(kind)
        signature.bind(**dict.fromkeys(names.values()))
        return {name: signature.parameters[parameter] for name, parameter in names.items()}
    except (TypeError, ValueError, KeyError):
        return None


# --- from annotations to forms


class Reader:
    """Makes forms of annotations.

    Attributes:
        failed: True if an annotation could not be resolved.
    """

    def __init__(self) -> None:
        self.failed = False
        self._known: dict[Any, Form | None] = {}
        #: The names for the text in the annotation that is being read.
        self._scope: tuple[dict[str, Any], dict[str, Any] | None] = ({}, None)

    def read(
        self, annotation: Any, names: dict[str, Any], more: dict[str, Any] | None = None
    ) -> Form | None:
        """Return the form of an annotation as it stands in the code; None if it has none.

        Args:
            annotation: a type, or a type as text.
            names: the names that the text may use.
            more: further names, which come second.
        """
        if annotation is inspect.Parameter.empty:
            return None
        outer, self._scope = self._scope, (names, more)
        try:
            carrier = SimpleNamespace(__annotations__={"it": annotation})
            # The module's names come first: a field may have the name of its class (``date: date``).
            globals_, locals_ = (names, None) if more is None else (more, names)
            return self._form(typing.get_type_hints(carrier, globals_, locals_)["it"])
        except RecursionError:  # an alias that contains itself
            return None
        except Exception as error:  # noqa: BLE001  (the text of an annotation can be any code)
            self.failed = True
            said = annotation if isinstance(annotation, str) else repr(annotation)
            return _Unresolved(
                f"the annotation {said!r:.80} cannot be resolved ({type(error).__name__}: {error})"
            )
        finally:
            self._scope = outer

    def _form(self, annotation: Any) -> Form | None:
        if isinstance(annotation, str):  # Python 3.10 leaves the text in ``list["Node"]`` as it is
            return self.read(annotation, *self._scope)
        origin, args = get_origin(annotation), get_args(annotation)
        if isinstance(annotation, _ALIAS):
            return self._form(annotation.__value__)
        if hasattr(annotation, "__supertype__"):  # a NewType
            return self._form(annotation.__supertype__)
        if origin is Annotated:
            return self._form(args[0])
        if origin in (Union, UnionType):
            some = [arg for arg in args if arg is not _NONE]
            return self._form(some[0]) if len(some) == 1 else None
        if origin is tuple or annotation is tuple:
            return self._tuple(args)
        if origin in _LISTS or origin in _DICTS:
            item = self._form(args[-1]) if args else None  # such as a bare ``typing.List``
            return item and (_List(list, item) if origin in _LISTS else _Dict(item))
        return self._of_class(origin or annotation)

    def _tuple(self, args: tuple[Any, ...]) -> Form | None:
        if any(getattr(arg, "__unpacked__", False) or get_origin(arg) in _UNPACK for arg in args):
            return None  # a tuple of any length is a part of it
        if not args or args[-1] is Ellipsis:
            return _List(tuple, self._form(args[0]) if args else None)
        return _Places(tuple, tuple, [self._form(arg) for arg in args])

    def _of_class(self, kind: Any) -> Form | None:
        if not isinstance(kind, type):
            return None
        if kind in _SCALARS or issubclass(kind, (Enum, PurePath)):
            return _scalar(kind)
        if kind not in self._known:
            self._known[kind] = self._compound(kind)
        return self._known[kind]

    def _compound(self, kind: Any) -> Form | None:
        """Return the form of a class of several values, which may contain itself."""
        if typing.is_typeddict(kind):
            keys = self._known[kind] = _Dict(None)
            keys.forms.update(self._forms(kind, kind.__annotations__))
            return keys if any(keys.forms.values()) else None
        if issubclass(kind, tuple) and hasattr(kind, "_fields"):
            defaults = [*kind._field_defaults.values()]
            places = self._known[kind] = _Places(kind, kind._make, [], defaults)
            places.forms.extend(self._forms(kind, kind._fields).values())
            return places
        if not _has_fields(kind) or (parameters := _parameters(kind)) is None:
            return None
        fields = self._known[kind] = _Fields(kind, parameters)
        fields.forms.update(self._forms(kind, parameters))
        return fields

    def _forms(self, kind: type[Any], wanted: Iterable[str]) -> dict[str, Form | None]:
        """Return the forms of attributes of a class."""
        found: dict[str, tuple[Any, ...]] = {}
        if attrs.has(kind):  # a field made by ``attrs.field(type=...)`` has no annotation
            found = {field.name: (field.type, {}) for field in attrs.fields(kind)}
        for base in reversed(kind.__mro__):
            names = vars(sys.modules.get(base.__module__, typing))
            for name, annotation in inspect.get_annotations(base).items():
                found[name] = (annotation, names, dict(vars(base)))
        return {name: self.read(*found[name]) if name in found else None for name in wanted}


class ItemReader(Reader):
    """Makes the forms of the items of lists, one of which may be an exception in place of a result."""

    def read_item(self, annotation: Any, names: dict[str, Any]) -> Form | None:
        """Return the form of an item of the list that an annotation says; None if it has none."""
        form = self.read(annotation, names)
        return form.item if isinstance(form, _List) else form if self.failed else None

    def _form(self, annotation: Any) -> Form | None:
        if get_origin(annotation) in (Union, UnionType):
            args = get_args(annotation)
            some = [a for a in args if not (isinstance(a, type) and issubclass(a, BaseException))]
            annotation = reduce(or_, some) if some else None
        return super()._form(annotation)
