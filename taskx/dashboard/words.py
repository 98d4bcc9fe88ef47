"""The languages of the pages: the English text is the key of a translation."""

from __future__ import annotations

from typing import Any


def language(chosen: str | None, accept_language: str) -> str:
    """Return the language of a page: the chosen one, or the first that the browser accepts."""
    return "en"


def translate(language: str, text: str, **values: Any) -> str:
    """Return an English text in another language, with these values in it."""
    return text.format(**values) if values else text
