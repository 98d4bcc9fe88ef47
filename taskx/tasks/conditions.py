"""Conditions of filters on a task's error text and on values in its params."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from taskx.tasks import payload
from taskx.tasks.errors import ConfigurationError, PayloadError

#: The values in params that a filter can look for.
Scalar = str | int | float | bool | None
#: A path of keys, and the value that params must have there.
Condition = tuple[tuple[str, ...], Scalar]
#: The conditions on params as a user writes them. A key is a path: a text with dots, or a tuple of keys.
#: (A union of the two would refuse a dict of one kind that has been typed before.)
ParamsFilter = Mapping[Any, Scalar]


def as_conditions(
    given: ParamsFilter | tuple[Condition, ...] | None,
) -> tuple[Condition, ...] | None:
    """Return the conditions on params as pairs of a path and a value; None for no conditions.

    Raises ConfigurationError for a path that no store can look up, or a value that is not a scalar.
    """
    pairs = tuple(given.items()) if isinstance(given, Mapping) else given
    if not pairs:
        return None
    if not isinstance(pairs, tuple):
        raise ConfigurationError(
            f"params must be a dict of paths and values, such as {{'user.id': 7}}, not {given!r}"
        )
    return tuple((_path(path), _scalar(path, value)) for path, value in pairs)


def _path(path: Any) -> tuple[str, ...]:
    keys = tuple(path.split(".")) if isinstance(path, str) else path
    if not isinstance(keys, tuple) or not keys or not all(map(_is_key, keys)):
        raise ConfigurationError(
            f"params: {path!a} is not a path: use a text such as 'user.id', or a tuple of keys; a key "
            "must not be empty, nor contain a quotation mark, a backslash or a control character"
        )
    return keys


def _is_key(key: Any) -> bool:
    # SQLite's paths have no way to write the others.
    return (
        isinstance(key, str)
        and key != ""
        and payload.is_encodable(key)
        and not any(character in '"\\' or character < " " for character in key)
    )


def _scalar(path: Any, value: Any) -> Scalar:
    if value is not None and not isinstance(value, (str, int, float)):
        raise ConfigurationError(
            f"params: the value of {path!r} must be a text, a number, a bool or None, not {value!r}"
        )
    try:
        return cast("Scalar", payload.loads(payload.encode(value, "value")))
    except PayloadError as error:
        raise ConfigurationError(
            f"params: the value of {path!r} cannot be stored: {error}"
        ) from None


def meets(params: Any, wanted: Sequence[Condition]) -> bool:
    """Return True if params have these values. A path goes through objects, not through lists."""
    return all(_same(_value_at(params, path), value) for path, value in wanted)


_MISSING = object()


def _value_at(value: Any, path: Sequence[str]) -> Any:
    for key in path:
        if not isinstance(value, dict) or key not in value:
            return _MISSING
        value = value[key]
    return value


def _same(value: Any, wanted: Scalar) -> bool:
    """Compare as JSON does: 1 and 1.0 are equal, 1 and true are not."""
    return isinstance(value, bool) is isinstance(wanted, bool) and bool(value == wanted)


def contains(text: str, part: str) -> bool:
    """Return True if a text contains a part. The case of the letters A to Z does not matter."""
    # Bytes have the lower case of ASCII only, like the functions of SQLite.
    return _lower(part) in _lower(text)


def _lower(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass").lower()
