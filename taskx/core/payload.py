"""The JSON rules: what may be stored as params or result, the same for every repository.

Allowed: ``None``, ``bool``, ``int`` within 64 bits, finite ``float``, ``str``, and lists, tuples (kept
as lists) and dicts with ``str`` keys of these, at most :data:`MAX_DEPTH` deep.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from taskx.core.errors import PayloadError

#: Levels of nesting; below the hundred that BSON permits, so that MongoDB can keep the same values.
MAX_DEPTH = 90
#: Largest size of params or a result, in bytes of UTF-8 JSON, unless configured otherwise.
DEFAULT_MAX_SIZE = 1024 * 1024
#: A size for what was checked before.
NO_LIMIT = 1 << 30
#: The key of what codecs store, which nobody else's objects may have at their top.
CODEC_KEY = "taskx:codec"

_INT_MIN, _INT_MAX = -(2**63), 2**63 - 1

# The depth check ends every cycle, so the encoder need not look for them itself.
_dumps = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, separators=(",", ":"), check_circular=False
).encode
loads = json.JSONDecoder().decode


def encode(value: Any, what: str, max_size: int = DEFAULT_MAX_SIZE) -> str:
    """The JSON text of a value, of at most ``max_size`` bytes as UTF-8.

    Raises:
        PayloadError: it breaks a rule; the error names the path of the offending value, from ``what`` on.
    """
    if flaw := _flaw(value, 1):
        raise PayloadError((what + flaw[0])[:500], flaw[1])
    if isinstance(value, dict) and CODEC_KEY in value:
        raise PayloadError(f"{what}.{CODEC_KEY}", "is a key that TaskX keeps for itself")
    text = _dumps(value)
    try:
        check_size(text, what, max_size)
    except UnicodeEncodeError:
        raise PayloadError(_surrogate_path(value, what), "a lone surrogate is no text") from None
    return text


def check_size(text: str, what: str, max_size: int) -> None:
    """Refuse JSON text that is too large with a ``PayloadError``."""
    size = len(text) if text.isascii() else len(text.encode())
    if size > max_size:
        raise PayloadError(
            what, f"{size:,} bytes as JSON, more than max_payload_size ({max_size:,})"
        )


def encode_params(params: Any, max_size: int = DEFAULT_MAX_SIZE) -> str:
    """The JSON text of a task's params, which must be a mapping with string keys; as :func:`encode`."""
    if type(params) is not dict:
        if not isinstance(params, Mapping):
            raise PayloadError("params", f"must be a dict, not {type(params).__name__}")
        params = dict(params)
    return "{}" if not params else encode(params, "params", max_size)


def _flaw(value: Any, depth: int) -> tuple[str, str] | None:
    """What breaks a rule: the path to it below ``value``, and the problem. None: nothing does."""
    kind = type(value)
    if kind is str or value is None or kind is bool:
        return None
    if kind is int:
        return None if _INT_MIN <= value <= _INT_MAX else ("", "an integer beyond 64 bits")
    if kind is float:
        return None if math.isfinite(value) else ("", f"{value} is no JSON number")
    if kind is dict or kind is list or kind is tuple:
        if depth > MAX_DEPTH:
            return "", f"nested more than {MAX_DEPTH} levels deep, or a cycle"
        return _flaw_in_dict(value, depth) if kind is dict else _flaw_in_list(value, depth)
    if isinstance(value, (str, int, float, list, tuple, dict)):
        # A subclass (an IntEnum, a defaultdict): judged as what it is encoded as.
        return _flaw(_plain(value), depth)
    return "", f"{kind.__name__} is not JSON"


def _flaw_in_dict(value: dict[Any, Any], depth: int) -> tuple[str, str] | None:
    for key, item in value.items():
        if not isinstance(key, str):
            return f"[{key!r}]", "a key must be a string"
        if "\0" in key:
            return f"[{key!r}]", "a key must not hold a NUL character"
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
    """Whether a text is free of lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def clean_text(text: str, limit: int) -> str:
    """Free text made storable: lone surrogates escaped, cut to ``limit`` characters."""
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()
