"""JSON values as trees in HTML: bounded, whatever a task carries."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import attrs
from markupsafe import Markup, escape

#: Most values that a tree shows.
MOST = 1_000
#: Most characters of a text that a tree shows.
LONGEST = 4_000


@attrs.define
class Trees:
    """Draws the trees of one page. Together they show a limited number of values.

    Attributes:
        say: translates.
        left: the number of values that can still be shown.
    """

    say: Callable[..., str]
    left: int = MOST

    def draw(self, value: Any) -> Markup:
        """Return a value as HTML."""
        if isinstance(value, dict):
            return self._branch([(str(key), item) for key, item in value.items()], "{}")
        if isinstance(value, (list, tuple)):
            return self._branch([(str(place), item) for place, item in enumerate(value)], "[]")
        return _leaf(value)

    def _branch(self, items: list[tuple[str, Any]], empty: str) -> Markup:
        if not items:
            return Markup("<code>{}</code>").format(empty)
        return Markup('<ul class="tree">{}</ul>').format(Markup("").join(self._rows(items)))

    def _rows(self, items: list[tuple[str, Any]]) -> Iterable[Markup]:
        for place, (name, item) in enumerate(items):
            if self.left <= 0:
                left = len(items) - place
                text = self.say("{count} more value|{count} more values", count=left)
                yield Markup('<li class="muted">{}</li>').format(text)
                return
            self.left -= 1
            yield Markup("<li><b>{}</b> {}</li>").format(_short(name), self.draw(item))


def _leaf(value: Any) -> Markup:
    if isinstance(value, str):
        return Markup('<span class="text">{}</span>').format(_short(value))
    return Markup("<code>{}</code>").format(json.dumps(value))


def _short(text: str) -> Markup:
    # A lone surrogate, which JSON allows, cannot be sent.
    shown = text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
    return escape(shown.encode("utf-8", "backslashreplace").decode())
