"""Params as a short text for people, without secrets. Everything that shows params uses it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

from taskx.tasks.errors import ConfigurationError

#: The words that are redacted unless ``Config(redact=...)`` gives others.
SECRETS = (
    *("password", "passwd", "pwd", "passphrase", "secret", "token", "credential", "authorization"),
    *("cookie", "api_key", "access_key", "private_key"),
)
#: The text that stands for a redacted value.
HIDDEN = "'***'"
#: The word that redacts all values.
ALL = "*"
#: The length of a text of params in a log message, in characters.
SHORT = 100
# JSON text can be nested more deeply than Python calls can, and more deeply than params may be.
_DEEPEST = 100


def show(params: Any, redact: tuple[str, ...] = SECRETS, limit: int = SHORT) -> str:
    """Return JSON values as one line of at most ``limit`` characters, for people.

    The cost depends on ``limit``, not on the size of the values.

    Args:
        params: the values; at any depth.
        redact: hide each value whose key contains one of these words, in any case, with or without
            ``-`` and ``_``; ``("*",)`` hides the value of every key, and values without a key.
        limit: the length of the text; what is longer ends in ``…``.
    """
    text, secret = "", _pattern(redact)
    for part in _parts(params, secret, limit):
        text += part
        if len(text) > limit:
            return text[: limit - 1] + "…"
    return text


def redacted(value: Any, redact: tuple[str, ...] = SECRETS) -> Any:
    """Return a copy of a JSON value in which what :func:`show` hides is ``***``, at any depth."""
    secret = _pattern(redact)
    bare = _hides_all(secret)

    def copy(part: Any) -> Any:
        if isinstance(part, dict):
            return {
                key: "***" if secret.search(_plain(_name(key))) else copy(item)
                for key, item in part.items()
            }
        if isinstance(part, (list, tuple)):
            return [copy(item) for item in part]
        return "***" if bare and part is not None else part

    return copy(value)


def unhidden(edited: Any, stored: Any, depth: int = 1) -> Any:
    """Return an edited copy of :func:`redacted` values in which the stored ones are back.

    Parts that are nested deeper than params may be stay as they are.

    Args:
        edited: the JSON values; a value that is still ``***`` stands for the stored one in its place.
        stored: the values before they were redacted.
        depth: the levels of nesting up to here.
    """
    if edited == "***" and stored is not None:
        return stored
    if depth > _DEEPEST:
        return edited
    if isinstance(edited, dict):
        known = stored if isinstance(stored, dict) else {}
        return {key: unhidden(value, known.get(key), depth + 1) for key, value in edited.items()}
    if isinstance(edited, list):
        items = stored if isinstance(stored, (list, tuple)) else ()
        padded = [*items, *[None] * len(edited)]
        return [unhidden(value, padded[place], depth + 1) for place, value in enumerate(edited)]
    return edited


def is_secret(key: str, redact: tuple[str, ...] = SECRETS) -> bool:
    """Return True if the value of a key must be hidden; of the key ``""``, if that of each key must be."""
    return _pattern(redact).search(_plain(key)) is not None


def check_redact(words: Iterable[str]) -> tuple[str, ...]:
    """Return the words as a tuple. Raises ConfigurationError if one is no text with letters or digits."""
    wrong = isinstance(words, (str, bytes))  # a text is a sequence of letters, too
    try:
        found = tuple(words)
    except TypeError:
        wrong, found = True, ()
    if wrong or not all(isinstance(w, str) and (w == ALL or _plain(w)) for w in found):
        raise ConfigurationError(
            f"redact must be a list of words, such as ('password', 'token'), not {words!r}"
        )
    return found


def _plain(text: str) -> str:
    return re.sub(r"[\W_]", "", text).casefold()


@lru_cache(maxsize=64)
def _pattern(redact: tuple[str, ...]) -> re.Pattern[str]:
    if ALL in redact:
        return re.compile("")
    return re.compile("|".join(map(_plain, redact)) or r"(?!)")


def _hides_all(secret: re.Pattern[str]) -> bool:
    return secret.search("") is not None


def _name(key: Any) -> str:
    kind = type(key)
    if kind is str:
        return str(key)
    return repr(key) if key is None or kind in (bool, int, float) else f"<{kind.__name__}>"


def _parts(value: Any, secret: re.Pattern[str], limit: int) -> Iterator[str]:
    """Yield the text in parts, none of them much longer than ``limit``. Never calls code of the value."""
    kind = type(value)
    if value is not None and kind not in (dict, list, tuple) and _hides_all(secret):
        yield HIDDEN  # it has no key
    elif kind is str:
        yield repr(value[: limit + 1])
    elif value is None or kind in (bool, int, float):
        yield repr(value)
    elif kind is dict:
        yield "{"
        for number, (key, item) in enumerate(value.items()):
            name = _name(key)[: limit + 1]  # the value of a longer one is cut off
            yield f"{', ' if number else ''}{name!r}: "
            if secret.search(_plain(name)):
                yield HIDDEN
            else:
                yield from _parts(item, secret, limit)
        yield "}"
    elif kind in (list, tuple):
        yield "["
        for number, item in enumerate(value):
            if number:
                yield ", "
            yield from _parts(item, secret, limit)
        yield "]"
    else:
        yield f"<{kind.__name__}>"
