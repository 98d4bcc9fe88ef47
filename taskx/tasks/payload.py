"""The JSON rules: the values that can be stored as params or result, the same in every repository.

Allowed are ``None``, ``bool``, ``int`` within 64 bits, finite ``float``, ``str``, and lists, tuples
(stored as lists) and dicts with ``str`` keys of these, at most :data:`MAX_DEPTH` levels deep. Other values
need an annotation, by which :mod:`taskx.tasks.annotations` encodes them before.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from taskx.tasks.errors import PayloadError

#: Largest depth of nesting; below the 100 levels of BSON, so that MongoDB can store the same values.
MAX_DEPTH = 90
#: Largest size of params or a result, in bytes of UTF-8 JSON, unless configured otherwise.
DEFAULT_MAX_SIZE = 1024 * 1024
#: A size limit for values that were checked before.
NO_LIMIT = 1 << 30
#: The key of the objects that codecs store. Other objects must not have it at their top level.
CODEC_KEY = "taskx:codec"

_INT_MIN, _INT_MAX = -(2**63), 2**63 - 1

# The depth check ends every cycle, so the encoder need not search for cycles itself.
_encoder = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, separators=(",", ":"), check_circular=False
)


def _made_once() -> Callable[[Any, bool], Iterable[str]]:
    """Return ``_encoder.iterencode``, without making the same C object again for each value.

    That is half of the time for a small value. An interpreter may have no such object.
    """
    if (make := getattr(json.encoder, "c_make_encoder", None)) is None:
        return _encoder.iterencode
    strings = json.encoder.encode_basestring
    made: Callable[[Any, bool], Iterable[str]] = make(
        None, _encoder.default, strings, None, ":", ",", False, False, False
    )
    return made


_chunks = _made_once()
_decoder = json.JSONDecoder()
#: Decodes JSON text that :func:`encode` made, without white space: returns the value and its end.
scan = _decoder.scan_once  # type: ignore[attr-defined]


def loads(text: str) -> Any:
    """Return the value of JSON text. Raises ``ValueError`` if it is not JSON, ``TypeError`` if not text."""
    try:
        value, end = scan(text, 0)
        return value if end == len(text) else _decoder.decode(text)
    except StopIteration:  # white space comes first, or there is no value
        return _decoder.decode(text)


def encode(value: Any, what: str, max_size: int = DEFAULT_MAX_SIZE) -> str:
    """Return a value as JSON text of at most ``max_size`` bytes in UTF-8.

    Raises:
        PayloadError: the value breaks a rule. The error names the path of the invalid part, starting with
            ``what``.
    """
    if flaw := (_flaw_in_dict if type(value) is dict else _flaw)(value, 1):
        raise PayloadError((what + flaw[0])[:500], flaw[1])
    if isinstance(value, dict) and CODEC_KEY in value:
        raise PayloadError(f"{what}.{CODEC_KEY}", "is a reserved key; use another name")
    text = "".join(_chunks(value, False))
    if text.isascii() and len(text) <= max_size:
        return text
    try:
        check_size(text, what, max_size)
    except UnicodeEncodeError:
        problem = "contains a lone surrogate, which is not valid Unicode"
        raise PayloadError(_surrogate_path(value, what), problem) from None
    return text


def joined(value: Any) -> str:
    """Return a value as JSON text whose parts were checked by :func:`encode`, each as deep as it may be."""
    return "".join(_chunks(value, False))


def check_size(text: str, what: str, max_size: int, besides: int = 0) -> None:
    """Raise ``PayloadError`` if JSON text is larger than ``max_size`` bytes in UTF-8.

    ``besides`` is the size of what is stored besides.
    """
    size = besides + (len(text) if text.isascii() else len(text.encode()))
    if size > max_size:
        raise PayloadError(
            what, f"{size:,} bytes as JSON, more than max_payload_size ({max_size:,})"
        )


def encode_params(params: Any, max_size: int = DEFAULT_MAX_SIZE) -> str:
    """Return the JSON text of a task's params, a mapping with string keys. Raises as :func:`encode`."""
    if type(params) is not dict:
        if not isinstance(params, Mapping):
            raise PayloadError("params", f"must be a dict, not {type(params).__name__}")
        params = dict(params)
    return "{}" if not params else encode(params, "params", max_size)


def _flaw(value: Any, depth: int) -> tuple[str, str] | None:
    """Return the path of the first invalid part, below ``value``, and its problem; None if all is valid."""
    kind = type(value)
    if kind is str or value is None or kind is bool:
        return None
    if kind is int:
        return None if _INT_MIN <= value <= _INT_MAX else ("", "integer does not fit into 64 bits")
    if kind is float:
        return None if math.isfinite(value) else ("", f"{value} is not valid JSON: leave it out")
    if kind is dict or kind is list or kind is tuple:
        if depth > MAX_DEPTH:
            return "", f"is nested more than {MAX_DEPTH} levels deep, or contains itself"
        return _flaw_in_dict(value, depth) if kind is dict else _flaw_in_list(value, depth)
    if isinstance(value, (str, int, float, list, tuple, dict)):
        # A subclass (an IntEnum, a defaultdict): check the plain value that would be encoded.
        return _flaw(_plain(value), depth)
    return "", _not_json(kind)


def _not_json(kind: type[Any]) -> str:
    from pathlib import PurePath

    from taskx.tasks.annotations import has_form, takes_more

    name = kind.__name__
    if kind.__module__ == "numpy":
        return f"{name} is not JSON; write value.item() for a scalar, value.tolist() for an array"
    if name == "coroutine":
        return "coroutine is not JSON: use await, and for a step await ctx.astep(…)"
    if not has_form(kind):
        return f"{name} is not JSON"
    if issubclass(kind, PurePath):  # each system has its own class
        name = "Path"
    if takes_more(kind):
        return (
            f"{name} is not JSON: its __init__ must take its own fields, and require nothing else"
        )
    return (
        f"{name} is not JSON; to store one as a param or result, annotate that of the executor with "
        f"{name} and register the executor with this queue"
    )


def _flaw_in_dict(value: dict[Any, Any], depth: int) -> tuple[str, str] | None:
    for key, item in value.items():
        if not isinstance(key, str):
            return f"[{key!r}]", "a key must be a string"
        if "\0" in key:
            return f"[{key!r}]", "a key must not contain a NUL character"
        kind = type(item)
        if kind is str or item is None or (kind is int and _INT_MIN <= item <= _INT_MAX):
            continue
        if flaw := _flaw(item, depth + 1):
            return f".{key}{flaw[0]}", flaw[1]
    return None


def _flaw_in_list(value: Any, depth: int) -> tuple[str, str] | None:
    for index, item in enumerate(value):
        if flaw := _flaw(item, depth + 1):
            return f"[{index}]{flaw[0]}", flaw[1]
    return None


def _plain(value: Any) -> Any:
    bases: tuple[type[Any], ...] = (str, int, float, list, tuple, dict)
    return next(base(value) for base in bases if isinstance(value, base))


def _surrogate_path(value: Any, path: str) -> str:
    if isinstance(value, str):
        return "" if is_encodable(value) else path
    if isinstance(value, dict):
        for key, item in value.items():
            inner = f"{path}.{key}"
            found = _surrogate_path(item, inner) if is_encodable(key) else f"{path}[{key!a}]"
            if found:
                return found
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            if found := _surrogate_path(item, f"{path}[{index}]"):
                return found
    return ""


def is_encodable(text: str) -> bool:
    """Return True if a text has no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def clean_text(text: str, limit: int) -> str:
    """Return free text that every store keeps as it is.

    It is cut to ``limit`` characters. Lone surrogates are escaped, and NUL becomes U+FFFD.
    """
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    if "\0" in text:  # PostgreSQL cannot store it
        text = text.replace("\0", "\ufffd")
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()
