"""The options of a repository in the query of its URL."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from taskx.tasks.errors import ConfigurationError


def split(url: str, known: Mapping[str, Callable[[str], Any]]) -> tuple[str, dict[str, Any]]:
    """Split a URL into the URL for a driver and the options of a repository.

    Args:
        url: the URL.
        known: for each option of the repository, what makes its value of a text.

    Raises:
        ConfigurationError: the URL names no database, or an option is not valid.
    """
    from urllib.parse import unquote_plus, urlsplit  # slow to load, and seldom needed

    parts = urlsplit(url)
    if len(parts.path) < 2:
        raise ConfigurationError(f"the {parts.scheme} URL names no database: write …/database?…")
    # As it was written: put together from its parts, it would lose the slashes of an empty host.
    base, _, query = url.partition("?")
    given = [part.partition("=") for part in query.split("&") if part]
    ours = {n: _value(n, unquote_plus(text), known[n]) for n, _, text in given if n in known}
    kept = "&".join("".join(part) for part in given if part[0] not in known)
    return f"{base}?{kept}" if kept else base, ours


def _value(name: str, text: str, make: Callable[[str], Any]) -> Any:
    try:
        return make(text)
    except (ValueError, KeyError):
        raise ConfigurationError(
            f"{text!r} is no value of `{name}`, which must be {_WORDS[make]}"
        ) from None


def truth_of(text: str) -> bool:
    """Return the value of ``true`` or ``false``."""
    return {"true": True, "false": False}[text]


def seconds_of(text: str) -> float:
    """Return a number of seconds."""
    return float(text)


_WORDS = {truth_of: "true or false", seconds_of: "a number of seconds", str: "a text"}
