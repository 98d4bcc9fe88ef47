"""The records in which questions are answered, and the words for times and lists in their sentences."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

import attrs

ReasonKind = Literal[
    "expired",
    "stuck",
    "parents",
    "waiting",
    "turn",
    "due",
    "no_node",
    "paused",
    "hold",
    "slot",
    "token",
    "suspect",
    "broker",
    "ahead",
    "worker",
    "dead_node",
    "silent_node",
    "cancel_requested",
    "timeout",
    "running",
    "completed",
    "failed",
    "cancelled",
    "damaged",
    "repository",
]
ProblemKind = Literal[
    "repository",
    "disk",
    "stuck",
    "blocked_loop",
    "silent_node",
    "nodes",
    "broker",
    "limit",
    "hold",
    "snoozes",
    "stuck_type",
    "oldest_due",
    "failed",
    "file_size",
    "open_transaction",
    "schedule_overdue",
    "schedule_damaged",
]

Level = Literal["ok", "warn", "fail"]

#: Most names that a sentence lists.
_LISTED = 3


KindT = TypeVar("KindT")


class Answer:
    """An answer to a question: a frozen record."""

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """Return it as a dict of JSON values; times are ISO text."""
        return to_json(attrs.asdict(self))  # type: ignore[no-any-return,arg-type]


@attrs.frozen
class _Finding(Answer, Generic[KindT]):
    kind: KindT
    sentence: str
    facts: Mapping[str, Any] = attrs.field(factory=dict, hash=False)

    def __str__(self) -> str:
        return self.sentence


class Reason(_Finding[ReasonKind]):
    """One reason why a task is in its present state: see :meth:`Queue.why`. ``str()`` is its sentence.

    Attributes:
        kind: the kind of the reason, such as ``"paused"``.
        sentence: the reason in one English sentence.
        facts: the values behind the sentence, by name. The kind decides which ones.
    """

    __slots__ = ()


class Problem(_Finding[ProblemKind]):
    """Something that is wrong: see :meth:`Queue.health`. ``str()`` is its sentence.

    Attributes:
        kind: the kind of the problem, such as ``"oldest_due"``.
        sentence: the problem in one English sentence.
        facts: the values behind the sentence, by name. The kind decides which ones.
    """

    __slots__ = ()


@attrs.frozen
class Check(Answer):
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


def ok(name: str, sentence: str, **facts: Any) -> Check:
    """Return a check that found nothing wrong."""
    return Check(name, "ok", sentence, "", facts)


def warn(name: str, sentence: str, advice: str, **facts: Any) -> Check:
    """Return a check that found something that can do harm."""
    return Check(name, "warn", sentence, advice, facts)


def fail(name: str, sentence: str, advice: str, **facts: Any) -> Check:
    """Return a check that found something that keeps tasks from running."""
    return Check(name, "fail", sentence, advice, facts)


def to_json(value: Any) -> Any:
    """Return a value with times as ISO text and tuples as lists, as JSON has them."""
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Mapping):
        return {name: to_json(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(part) for part in value]
    return value


# --- words


def moment(at: datetime) -> str:
    """Return a time in UTC as text, to the second."""
    return f"{at:%Y-%m-%d %H:%M:%S} UTC"


def duration(seconds: float) -> str:
    """Return a duration as text, in its two largest units: ``2 h 5 min``."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, left = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {left} s" if left else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{hours // 24} days"


def counted(count: int, word: str, at_most: int | None = None) -> str:
    """Return a number with its noun: ``1 task``, ``2 tasks``, ``more than 1000 tasks``."""
    if at_most is not None and count > at_most:
        return f"more than {at_most} {word}s"
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def listed(names: Collection[str]) -> str:
    """Return the first names, and the number of the others."""
    some = ", ".join([*names][:_LISTED])
    return f"{some} and {len(names) - _LISTED} more" if len(names) > _LISTED else some


def first_line(text: str) -> str:
    """Return the first line of a text, shortened."""
    line = text.strip().partition("\n")[0]
    return line if len(line) <= 200 else f"{line[:199]}…"


def in_quotes(text: str) -> str:
    """Return a text in quotes, shortened."""
    return repr(text if len(text) <= 80 else f"{text[:79]}…")


def suggestion(word: str, known: Collection[str]) -> str:
    """Return ``; did you mean 'email'?`` if a known word is close to a word, otherwise an empty text."""
    from difflib import get_close_matches  # only after a mistake

    lower = {name.lower(): name for name in known}
    close = get_close_matches(word.lower(), lower, n=1, cutoff=0.6)
    return f"; did you mean {in_quotes(lower[close[0]])}?" if close else ""
