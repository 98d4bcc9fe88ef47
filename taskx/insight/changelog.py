"""The log of changes: who changed what with the command line, the dashboard or another tool.

Each change is a note. Only the newest ones are kept. No other part of the queue reads them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from typing import Any

import attrs

from taskx.stores.base import Repository
from taskx.tasks import payload
from taskx.tasks.checks import check_int
from taskx.tasks.clock import Clock, to_datetime
from taskx.tasks.errors import ConfigurationError
from taskx.tasks.ids import new_id
from taskx.tasks.model import MAX_NAME
from taskx.tasks.timing import Timing
from taskx.tasks.writes import Note, NoteChange

_PREFIX = "change/"
# A write removes old changes with this probability: most writes read nothing.
_SHARE = 0.02
#: Most bytes of the detail of a change, as JSON.
MAX_DETAIL = 10_000


@attrs.frozen(kw_only=True)
class Change:
    """One entry of the log of changes: see :meth:`Queue.changes`.

    Attributes:
        at: the time of the change.
        by: the person or program that made it.
        action: the name of the action, such as ``"cancel"``.
        target: the thing that was changed: a task's id, a type, a filter.
        detail: more about the change, as a JSON value; None if there is no more.
    """

    at: datetime
    by: str
    action: str
    target: str
    detail: Any = None

    def to_dict(self) -> dict[str, Any]:
        """Return it as a dict of JSON values; the time is ISO text."""
        return {**attrs.asdict(self, recurse=False), "at": self.at.isoformat()}


def note_change(
    repository: Repository,
    clock: Clock,
    timing: Timing,
    by: str,
    action: str,
    target: str,
    detail: Any,
    chance: Callable[[], float] = random.random,
) -> None:
    """Add an entry to the log of changes; ``chance`` decides if old entries are removed."""
    repository.require("the log of changes")
    facts = {"by": by, "action": action, "target": target}
    for name, text in facts.items():
        if not isinstance(text, str):
            raise ConfigurationError(f"{name} must be text, not {text!r}")
    shown = {name: payload.clean_text(text, MAX_NAME) for name, text in facts.items()}
    payload.encode(detail, "detail", MAX_DETAIL)
    entry = {"at": clock.now_ms(), **shown, "detail": detail}
    changes = [NoteChange(_PREFIX + new_id(), json.dumps(entry), 0)]
    if chance() < _SHARE:
        notes = sorted(repository.notes(_PREFIX).items(), reverse=True)
        old = notes[timing.most_changes - 1 :]
        changes += [NoteChange(name, None, note.version) for name, note in old]
    repository.put_notes(changes)


def changes(repository: Repository, timing: Timing, at_most: int) -> list[Change]:
    """Return the newest entries of the log of changes: see ``Queue.changes``."""
    repository.require("the log of changes")
    check_int(at_most, "at_most", 1)
    most = min(at_most, timing.most_changes)
    notes = repository.notes(_PREFIX)
    found = (_change(note) for _, note in sorted(notes.items(), reverse=True))
    return [change for change in found if change is not None][:most]


def _change(note: Note) -> Change | None:
    """Return the change that a note describes; None if it is damaged."""
    with suppress(ValueError, TypeError, LookupError, RecursionError):
        entry = json.loads(note.text)
        return Change(**{**entry, "at": to_datetime(entry["at"])})
    return None
