"""The results of examining a repository: see ``Queue.diagnose``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import attrs

Level = Literal["ok", "warn", "fail"]


@attrs.frozen
class Check:
    """One thing that :meth:`Queue.diagnose` has examined. ``str()`` is its sentence, and the advice.

    Attributes:
        name: the thing, such as ``"disk"``.
        level: ``"ok"``; ``"warn"`` if it can do harm; ``"fail"`` if it keeps tasks from running.
        sentence: what was found, in one English sentence.
        advice: what to do about it; empty if there is nothing to do.
        facts: the values behind the sentence, by name; JSON values.
    """

    name: str
    level: Level
    sentence: str
    advice: str = ""
    facts: Mapping[str, Any] = attrs.field(factory=dict, hash=False)

    def __str__(self) -> str:
        return f"{self.sentence} {self.advice}".strip()

    def to_dict(self) -> dict[str, Any]:
        """Return it as a dict of JSON values."""
        return attrs.asdict(self)


def ok(name: str, sentence: str, **facts: Any) -> Check:
    """Return a check that found nothing wrong."""
    return Check(name, "ok", sentence, "", facts)


def warn(name: str, sentence: str, advice: str, **facts: Any) -> Check:
    """Return a check that found something that can do harm."""
    return Check(name, "warn", sentence, advice, facts)


def fail(name: str, sentence: str, advice: str, **facts: Any) -> Check:
    """Return a check that found something that keeps tasks from running."""
    return Check(name, "fail", sentence, advice, facts)
