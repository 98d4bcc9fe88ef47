"""The words of the dashboard, in English and Chinese.

A text is named by its English form. ``"{count} task|{count} tasks"`` has a form for one and another for
more.
"""

from __future__ import annotations

from typing import Any

from werkzeug.datastructures import LanguageAccept
from werkzeug.http import parse_accept_header

from taskx.programs.dashboard.chinese import CHINESE

#: The languages by their codes, with their own names.
LANGUAGES = {"en": "English", "zh": "中文"}


def language(chosen: str | None, accepted: str) -> str:
    """Return the code of the language of a page.

    Args:
        chosen: the language that the user has chosen; None or an unknown one if none.
        accepted: the header ``Accept-Language``.
    """
    if chosen in LANGUAGES:
        return chosen
    by_quality = parse_accept_header(accepted, LanguageAccept)
    codes = (code.partition("-")[0].lower() for code, quality in by_quality if quality > 0)
    return next((code for code in codes if code in LANGUAGES), "en")


def translate(language: str, text: str, **values: Any) -> str:
    """Return an English text in a language, with these values.

    Whole numbers get separators: ``12,345``. ``count`` chooses between the forms of a text.
    """
    found = CHINESE.get(text, text) if language == "zh" else text
    one, _, more = found.partition("|")
    form = more if more and values.get("count") != 1 else one
    if not values:
        return form
    return form.format_map({name: number(value) for name, value in values.items()})


def number(value: Any) -> Any:
    """Return a whole number as text with separators, and everything else as it is."""
    return f"{value:,}" if isinstance(value, int) else value
