"""The filter line: a ``TaskFilter`` as one line of text, for command lines and search boxes.

.. code-block:: text

    type:email status:failed error:"timed out" params.user.id:7 older:1d

A term is a field, a colon and a value. Terms are separated by spaces. A part in double quotes is a JSON
string, for values with spaces and for keys with dots.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping
from datetime import datetime, timezone
from itertools import chain
from typing import Any, NamedTuple

from taskx.tasks.checks import duration_of
from taskx.tasks.clock import SYSTEM_CLOCK, Clock
from taskx.tasks.conditions import Scalar
from taskx.tasks.errors import ConfigurationError
from taskx.tasks.findings import in_quotes, suggestion
from taskx.tasks.model import CONDITIONS, TaskFilter, TaskStatus
from taskx.tasks.options import filter_of

#: The fields of a filter line, with their meaning.
FIELDS: Mapping[str, str] = {
    "type": "tasks of this type",
    "status": f"one of {', '.join(TaskStatus)}",
    "tag": "tasks with this tag; give it again for tasks with both tags",
    "by": "tasks with this created_by",
    "error": "tasks whose error contains this text",
    "error_type": "tasks whose last attempt raised this class, such as ValueError",
    "id": "tasks whose id begins with this text",
    "params.": "tasks with this value in their params, such as params.user.id:7",
    "parent": "tasks that depend on the task with this id",
    "flow": "tasks of the flow with this id",
    "older": "tasks submitted longer ago than this, such as 90s, 15m, 2h, 1d or 1w",
    "newer": "tasks submitted within this time",
    "since": "tasks submitted at or after this time, such as 2026-11-26T10:00Z",
    "until": "tasks submitted before or at this time",
}
_PLAIN = [field for field in FIELDS if field != "params."]
# The fields of a TaskFilter that have another name in a line.
_NAMES = {"by": "created_by", "id": "id_prefix", "since": "start_date", "until": "end_date"}
_FIELD_OF = {long: short for short, long in _NAMES.items()}
_PARAMS, _TAG = "params", "tag"

_PIECE = re.compile(r'(?P<space>\s+)|(?P<quoted>"(?:[^"\\]|\\.)*")|(?P<plain>[^\s"]+)', re.DOTALL)


class _Piece(NamedTuple):
    text: str
    quoted: bool


class _Term(NamedTuple):
    """One term: the keys of its field, and its value."""

    keys: tuple[str, ...]
    value: str
    quoted: bool


def parse_query(
    line: str, clock: Clock = SYSTEM_CLOCK, more: Iterable[tuple[str, str]] = ()
) -> TaskFilter:
    """Return the filter of a filter line.

    Args:
        line: terms such as ``type:email older:1d``; an empty line is the filter of all tasks.
        clock: the source of the time for ``older`` and ``newer``.
        more: further terms: pairs of a field and its value, which needs no quotes. In params ``7`` is a
            number and ``"7"`` is a text, as in a line.

    Raises:
        ConfigurationError: the line is not valid. The message is one line, and says what to write.
    """
    fields: dict[str, Any] = {}
    params: dict[tuple[str, ...], Scalar] = {}
    for term in chain(_terms(line), (_term_of(field, value) for field, value in more)):
        name = term.keys[0]
        if name == _PARAMS:
            if term.keys[1:] in params:
                raise _twice(".".join(term.keys))
            params[term.keys[1:]] = _scalar(term)
            continue
        field = _NAMES.get(name, name)
        if name == _TAG:
            fields.setdefault(name, []).append(term.value)
            continue
        if field in fields:
            raise _twice(name)
        fields[field] = _value(name, term.value)
    if params:
        fields[_PARAMS] = params
    try:
        return filter_of(None, fields, "the filter", clock)
    except ConfigurationError as error:
        raise ConfigurationError(renamed(str(error), _FIELD_OF)) from None


def query_of(filter: TaskFilter) -> str:
    """Return the filter line of a filter, without its limit and offset."""
    return " ".join(_terms_of(filter))


def as_command(filter: TaskFilter) -> str:
    """Return the shell command that lists the tasks of a filter."""
    words = ["taskx", "list", *_terms_of(filter)]
    if filter.limited:
        words += ["--limit", str(filter.limit)]
    return shlex.join(words)


def as_python(filter: TaskFilter) -> str:
    """Return the Python expression that lists the tasks of a filter.

    Times need ``import datetime``.
    """
    fields: dict[str, Any] = {}
    for name in (*_NAMES_IN_ORDER, "offset", "limit"):
        value = getattr(filter, name)
        if name == _PARAMS and value:
            fields[name] = {".".join(k) if _is_plain(k) else k: v for k, v in value}
        elif name == _TAG and value:
            fields[name] = value[0] if len(value) == 1 else [*value]
        elif name == "limit":
            if filter.limited:
                fields[name] = int(value)
        elif name == "offset":
            if value:
                fields[name] = value
        elif value is not None:
            fields[name] = value.value if isinstance(value, TaskStatus) else value
    return f"queue.list_tasks({', '.join(f'{name}={value!r}' for name, value in fields.items())})"


def moment_of(text: str) -> datetime:
    """Return the time of an ISO text such as ``2026-11-26`` or ``2026-11-26T10:00Z``; UTC by default.

    Raises:
        ConfigurationError: the text is not such a time.
    """
    iso = f"{text[:-1]}+00:00" if text[-1:] in ("Z", "z") else text
    try:
        moment = datetime.fromisoformat(iso)
    except ValueError:
        raise ConfigurationError(
            f"{in_quotes(text)} is not a time: write it as 2026-11-26 or 2026-11-26T10:00Z"
        ) from None
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


def field_suggestion(word: str, known: Collection[str]) -> str:
    """Return a :func:`suggestion` of a field, also for the name that it has in a ``TaskFilter``."""
    names = [long for long, short in _FIELD_OF.items() if short in known]
    return renamed(suggestion(word, [*known, *names]), _FIELD_OF)


def renamed(text: str, names: Mapping[str, str]) -> str:
    """Return a text in which words have other names, such as those of a command line."""
    return re.sub(r"\w+", lambda word: names.get(word[0], word[0]), text)


# --- reading


def _terms(line: str) -> Iterator[_Term]:
    word: list[_Piece] = []
    place = 0
    while place < len(line):
        found = _PIECE.match(line, place)
        if found is None:
            raise ConfigurationError(
                f"the filter has an opening quotation mark without a closing one: {in_quotes(line[place:])}"
            )
        place = found.end()
        if found["space"] is None:
            word.append(_piece(found[0], found["quoted"] is not None))
        elif word:
            yield _term(word)
            word = []
    if word:
        yield _term(word)


def _piece(text: str, quoted: bool) -> _Piece:
    if not quoted:
        return _Piece(text, False)
    try:
        return _Piece(json.loads(text, strict=False), True)
    except ValueError:
        raise ConfigurationError(
            f"{in_quotes(text)} in the filter is not a JSON string: write a backslash as \\\\"
        ) from None


def _term(word: list[_Piece]) -> _Term:
    for number, (text, quoted) in enumerate(word):
        if quoted or ":" not in text:
            continue
        before, _, after = text.partition(":")
        if "=" in before and not (number or before.startswith(f"{_PARAMS}.")):
            break
        value = [*([_Piece(after, False)] if after else []), *word[number + 1 :]]
        keys = _keys([*word[:number], _Piece(before, False)])
        if not value:
            raise ConfigurationError(
                f'the filter has no value after {in_quotes(".".join(keys) + ":")}: write one, or "" for an '
                "empty text"
            )
        return _Term(keys, "".join(piece.text for piece in value), value[0].quoted)
    raise _no_field("".join(piece.text for piece in word))


def _term_of(name: str, value: str) -> _Term:
    keys = _keys([_Piece(name, False)])
    quoted = _PIECE.fullmatch(value) if keys[0] == _PARAMS else None
    piece = _piece(value, quoted is not None and quoted["quoted"] is not None)
    return _Term(keys, piece.text, piece.quoted)


def _keys(pieces: list[_Piece]) -> tuple[str, ...]:
    keys = [""]
    for text, quoted in pieces:
        first, *others = [text] if quoted else text.split(".")
        keys[-1] += first
        keys += others
    name = keys[0]
    if name == _PARAMS:
        if len(keys) == 1 or "" in keys:
            raise ConfigurationError("params needs a path: write it as params.user.id:7")
    elif len(keys) > 1 or name not in FIELDS:
        field = ".".join(keys)
        hint = field_suggestion(field, _PLAIN) or ": use " + ", ".join([*_PLAIN, "params.…"])
        raise ConfigurationError(f"the filter has no field {in_quotes(field)}{hint}")
    return tuple(keys)


def _no_field(word: str) -> ConfigurationError:
    if word in TaskStatus.__members__.values():
        return ConfigurationError(f"{in_quotes(word)} has no field: did you mean status:{word}?")
    name, equals, value = word.partition("=")
    if not equals:
        value = word if word.isprintable() else "email"
        return ConfigurationError(
            f"{in_quotes(word)} has no field: write it as type:{value}, or "
            'put quotes around a value with spaces, as in error:"timed out"'
        )
    field = _meant(name)
    hint = f"did you mean {field}:{_quoted(value)}?" if field else "write it as type:email"
    return ConfigurationError(f"{in_quotes(word)} has no field: {hint}")


def _meant(name: str) -> str:
    """Return the field that a word before an equals sign names; empty if it names none."""
    from difflib import get_close_matches  # only after a mistake

    if name.startswith(f"{_PARAMS}.") and name.isprintable():
        return name
    close = get_close_matches(name, [*_PLAIN, *_FIELD_OF], n=1)
    return _FIELD_OF.get(close[0], close[0]) if close else ""


def _twice(name: str) -> ConfigurationError:
    return ConfigurationError(f"the filter has {in_quotes(name)} twice: give it once")


def _value(name: str, text: str) -> Any:
    if name in ("older", "newer"):
        return duration_of(text)
    return moment_of(text) if name in ("since", "until") else text


def _scalar(term: _Term) -> Scalar:
    """Return a value in params: JSON's numbers, true, false and null; other words are texts."""
    value = None if term.quoted else _json_scalar(term.value)
    return term.value if value is None and (term.quoted or term.value != "null") else value


def _json_scalar(text: str) -> Scalar:
    try:
        value = json.loads(text, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, (bool, int, float)) else None


# --- writing

#: The conditions of a filter, in the order of a line.
_NAMES_IN_ORDER = tuple(
    name
    for name in (_NAMES.get(field, field) for field in (*FIELDS, _PARAMS))
    if name in CONDITIONS
)


def _terms_of(filter: TaskFilter) -> Iterator[str]:
    names = {field: name for name, field in _NAMES.items()}
    for field in _NAMES_IN_ORDER:
        value = getattr(filter, field)
        if value is None:
            continue
        if field == _PARAMS:
            for path, wanted in value:
                yield f"params.{'.'.join(map(_key_text, path))}:{_scalar_text(wanted)}"
        elif field == _TAG:
            yield from (f"tag:{_quoted(tag)}" for tag in value)
        elif isinstance(value, datetime):
            moment = value.astimezone(timezone.utc).isoformat().replace("+00:00", "Z")
            yield f"{names[field]}:{moment}"
        else:
            yield f"{names.get(field, field)}:{_quoted(str(value))}"


def _is_plain(path: tuple[str, ...]) -> bool:
    return not any("." in key for key in path)


def _key_text(key: str) -> str:
    return _quoted(key) if not re.search(r"[.:]", key) else _as_json(key)


def _scalar_text(value: Scalar) -> str:
    if not isinstance(value, str):
        return json.dumps(value)
    bare = value != "null" and _json_scalar(value) is None
    return _quoted(value) if bare else _as_json(value)


def _quoted(text: str) -> str:
    plain = text and text.isprintable() and not re.search(r'[\s"]', text)
    return text if plain else _as_json(text)


def _as_json(text: str) -> str:
    return json.dumps(text, ensure_ascii=not text.isprintable())
