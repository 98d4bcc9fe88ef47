"""Conversion between a task's row and a MongoDB document.

The thirteen fields of the original TaskX keep its names and types. Everything else is in the sub-document
``taskx``, which the original ignores:

``held``, ``owner``, ``starts`` …
    the columns of a row that the original does not have.
``seconds``
    the exact duration, because ``duration`` holds whole seconds.
``seq``
    the position among tasks of equal priority; absent in documents that the original wrote.
``params_as``, ``result_as``
    how the stored value differs from the JSON value: ``escaped`` keys, a wrapped ``value``.
``w``
    the marks of the latest writes, by which a repeated write is recognized.
``tags``, ``flow``
    the tags of the task as a list, and the id of its flow; one column of a row.
``batch``
    the batch that hides the task.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from math import isfinite
from typing import Any

from bson.datetime_ms import DatetimeMS
from bson.int64 import Int64

from taskx.tasks import payload
from taskx.tasks.clock import to_datetime, to_ms
from taskx.tasks.codec import NO_CODECS, Codecs
from taskx.tasks.model import TASK_FIELDS, TIME_FIELDS, Task
from taskx.tasks.record import COLUMNS, DEFAULTS, task_from_row
from taskx.tasks.tags import FLOW, labels_of, split

Document = dict[str, Any]

#: The number of marks of writes that a document keeps.
MARKS = 8
#: The most characters in the log of earlier attempts; the oldest attempts are dropped first.
MAX_ATTEMPTS = 2**21

#: The columns that are fields of the original, except ``id``.
ORIGINAL = frozenset(
    (
        *("type", "status", "params", "result", "error", "progress", "message", "created_by"),
        *("created_at", "started_at", "completed_at", "duration"),
    )
)
#: The path of each column in a document, and those of ``seq`` and ``flow``, which are not columns.
PATHS: dict[str, str] = {
    name: name if name in ORIGINAL else f"taskx.{name}" for name in (*COLUMNS, "seq", "flow")
} | {"id": "_id"}

# The columns that are stored in two fields.
_IN_TWO = frozenset(("params", "result", "duration", "tags"))
_MOST_SECONDS = 2**62


# --- to a document


def new_document(row: Mapping[str, Any], seq: int, mark: int, batch: str = "") -> Document:
    """Return the document of a new task."""
    document: Document = {"_id": row["id"], "taskx": {}}
    for path, value in {**_DEFAULT_FIELDS, **fields(row)}.items():
        if path.startswith("taskx."):
            if value is not None:
                document["taskx"][path[6:]] = value
        else:
            document[path] = value
    document["taskx"] = {**document["taskx"], "seq": Int64(seq), "w": [Int64(mark)]}
    if batch:
        document["taskx"]["batch"] = batch
    return document


def fields(columns: Mapping[str, Any]) -> Document:
    """Return columns of a row as fields of a document, by path, without ``id``."""
    changed: Document = {}
    for name, value in columns.items():
        if name == "params":
            changed["params"], changed["taskx.params_as"] = _object(value)
        elif name == "result":
            changed["result"], changed["taskx.result_as"] = _any_value(value)
        elif name == "duration":
            changed["duration"] = Int64(_whole(value))
            changed["taskx.seconds"] = float(value)
        elif name == "earlier_attempts":
            changed[PATHS[name]] = _shortened(value)
        elif name == "tags":
            tags, flow = split(labels_of(value))
            changed["taskx.tags"], changed["taskx.flow"] = [*tags] or None, flow or None
        elif name == "depends_on":  # a list, so that an index finds the task by each parent
            changed[PATHS[name]] = None if value is None else payload.loads(value)
        elif name != "id":
            changed[PATHS[name]] = plain(name, value)
    return changed


def plain(name: str, value: Any) -> Any:
    """Return a column's value as BSON stores it; not for params, result and duration."""
    if value is not None and name in TIME_FIELDS:
        return to_datetime(value)
    return value


def _whole(seconds: float) -> int:
    return int(min(seconds, _MOST_SECONDS))


def _object(text: str) -> tuple[Any, str]:
    value = payload.loads(text)
    if not _has_odd_keys(value, text):
        return value, ""
    return _escaped(value), "escaped"


def _any_value(text: str | None) -> tuple[Any, str]:
    if text is None:
        return None, ""
    value, how = _object(text)
    if type(value) is dict:
        return value, how
    return {"value": value}, f"value {how}".rstrip()


def _shortened(log: str) -> str:
    while len(log) > MAX_ATTEMPTS:
        attempts = payload.loads(log)
        if len(attempts) == 1:
            return ""
        log = payload.encode(attempts[len(attempts) // 2 :], "attempts", max_size=payload.NO_LIMIT)
    return log


# Some servers refuse some keys, or a driver gives them a meaning: keys with a leading "$", keys with
# a ".", the empty key. A value with such a key is escaped, and each "~" in its keys is doubled.


def _has_odd_keys(value: Any, text: str) -> bool:
    if '"$' not in text and "." not in text and '"":' not in text:
        return False
    return any(map(is_odd, _keys(value)))


def is_odd(key: str) -> bool:
    """Return True if a value with this key is escaped."""
    return not key or key[0] == "$" or "." in key


def _keys(value: Any) -> Iterable[str]:
    if type(value) is dict:
        for key, item in value.items():
            yield key
            yield from _keys(item)
    elif type(value) is list:
        for item in value:
            yield from _keys(item)


def _escaped(value: Any) -> Any:
    if type(value) is dict:
        return {escape(key): _escaped(item) for key, item in value.items()}
    return [_escaped(item) for item in value] if type(value) is list else value


def escape(key: str) -> str:
    """Return the key that stands for a key in an escaped value."""
    if not key:
        return "~e"
    key = key.replace("~", "~~").replace(".", "~d")
    return f"~s{key[1:]}" if key[0] == "$" else key


def _unescaped(value: Any) -> Any:
    if isinstance(value, dict):
        return {_unescape(key): _unescaped(item) for key, item in value.items()}
    return [_unescaped(item) for item in value] if isinstance(value, list) else value


_MEANINGS = {"~~": "~", "~d": ".", "~s": "$", "~e": ""}


def _unescape(key: str) -> str:
    parts, position = [], 0
    while (at := key.find("~", position)) >= 0:
        code = key[at : at + 2]
        parts += [key[position:at], _MEANINGS.get(code, code)]
        position = at + 2
    return "".join((*parts, key[position:]))


#: The fields of a new document that its row may lack; it always has params.
_DEFAULT_FIELDS = fields(DEFAULTS)


# --- from a document


def shown(columns: Iterable[str]) -> list[str] | None:
    """Return the fields that hold these columns, and the batch's field; None for all fields."""
    if not _IN_TWO.isdisjoint(columns):
        return None
    return ["taskx.batch", *(PATHS[name] for name in columns)]


def task_from_document(document: Mapping[str, Any], codecs: Codecs = NO_CODECS) -> Task:
    """Return the task of a document, whoever wrote it; ``task.damage`` names the damaged fields."""
    return task_from_row([*row_from_document(document, TASK_FIELDS).values()], codecs)


def row_from_document(
    document: Mapping[str, Any], columns: Sequence[str] = COLUMNS
) -> dict[str, Any]:
    """Return columns of a document, in the order of ``columns``; absent ones have their defaults."""
    ours = ours_of(document)
    row: dict[str, Any] = {}
    for name in columns:
        special = _SPECIAL.get(name)
        if special is not None:
            row[name] = special(document, ours)
            continue
        value = (document if name in ORIGINAL else ours).get(name)
        row[name] = DEFAULTS.get(name) if value is None else _from_bson(value)
    return row


def ours_of(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the sub-document ``taskx`` of a document; an empty one if it is absent."""
    ours = document.get("taskx")
    return ours if isinstance(ours, dict) else {}


def batch_of(document: Mapping[str, Any]) -> str:
    """Return the id of the batch that hides a document; an empty text if it is visible."""
    ours = document.get("taskx")
    return ours.get("batch") or "" if isinstance(ours, dict) else ""


def moment_ms(value: Any) -> int | None:
    """Return the milliseconds of a BSON date; None if the value is not a date."""
    if isinstance(value, datetime):
        return to_ms(value if value.tzinfo else value.replace(tzinfo=timezone.utc))
    return int(value) if isinstance(value, DatetimeMS) else None


def _from_bson(value: Any) -> Any:
    if type(value) is Int64:
        return int(value)
    if type(value) is str:
        return _text_or_bytes(value)
    moment = moment_ms(value)
    return value if moment is None else moment


def _result(document: Mapping[str, Any], ours: Mapping[str, Any]) -> str | bytes | None:
    result = document.get("result")
    return None if result is None else _text(result, ours.get("result_as"))


def _duration(document: Mapping[str, Any], ours: Mapping[str, Any]) -> Any:
    """Return the exact duration, unless another program changed the whole seconds."""
    whole, seconds = document.get("duration"), ours.get("seconds")
    if isinstance(seconds, float) and isfinite(seconds) and _whole(seconds) == whole:
        return seconds
    return float(whole or 0) if whole is None or isinstance(whole, int) else _from_bson(whole)


def _depends_on(document: Mapping[str, Any], ours: Mapping[str, Any]) -> Any:
    parents = ours.get("depends_on")
    return _text(parents, "") if isinstance(parents, list) else _from_bson(parents)


def _tags(document: Mapping[str, Any], ours: Mapping[str, Any]) -> Any:
    tags, flow = ours.get("tags"), ours.get("flow")
    if tags is None and flow is None:
        return None
    labels = [*tags] if isinstance(tags, list) else [tags] if tags is not None else []
    return _text([*labels, FLOW + flow] if isinstance(flow, str) else labels, "")


#: The columns that need a conversion; each function takes the document and its sub-document.
_SPECIAL: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], Any]] = {
    "id": lambda document, ours: _from_bson(document["_id"]),
    "type": lambda document, ours: _from_bson(document.get("type")) or "",
    "params": lambda document, ours: _text(document.get("params") or {}, ours.get("params_as")),
    "result": _result,
    "created_at": lambda document, ours: _from_bson(document.get("created_at")) or 0,
    "duration": _duration,
    "depends_on": _depends_on,
    "tags": _tags,
    "dead_letter": lambda document, ours: int(bool(ours.get("dead_letter"))),
}


def _text_or_bytes(text: str) -> str | bytes:
    """Return text of another program that is not UTF-8 as bytes: the reader reports the damage."""
    if text.isascii() or payload.is_encodable(text):
        return text
    return text.encode("utf-8", "surrogateescape")


def _text(value: Any, how: Any) -> str | bytes:
    how = how if isinstance(how, str) else ""
    if "value" in how and isinstance(value, dict) and list(value) == ["value"]:
        value = value["value"]
    if "escaped" in how:
        value = _unescaped(value)
    try:
        return _text_or_bytes(_dumps(value))
    except (ValueError, RecursionError):
        return ""  # not JSON either: the reader reports the damage


def _foreign(value: Any) -> Any:
    """Return a value of a type that JSON does not have: only another program can have stored it."""
    moment = moment_ms(value)
    if moment is not None:
        return to_datetime(moment).isoformat()
    as_document = getattr(value, "as_doc", None)
    return str(value) if as_document is None else as_document()


_dumps = json.JSONEncoder(
    ensure_ascii=False,
    allow_nan=False,
    separators=(",", ":"),
    check_circular=False,
    default=_foreign,
).encode
