"""Bulk changes: their terms, the record of what they did, and the times at which requeued tasks start."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Literal

import attrs

from taskx.stores.base import Repository
from taskx.tasks.clock import LAST, to_datetime
from taskx.tasks.errors import ConfigurationError
from taskx.tasks.findings import Answer
from taskx.tasks.model import Task, TaskCount
from taskx.tasks.rate import Rate
from taskx.tasks.writes import Note

#: The name of the note with the times up to which tasks are staggered.
_NOTE = "bulk"

Action = Literal["requeue", "cancel", "delete"]


@attrs.frozen(kw_only=True)
class Bulk(Answer):
    """A change of all tasks that match a filter, as it is now.

    Attributes:
        action: ``"requeue"``, ``"cancel"`` or ``"delete"``.
        dry_run: True if nothing was changed, and the tasks were only counted.
        matched: the number of tasks that were found to match so far: ``changed`` and those skipped.
        exact: False if a dry run stopped counting at ``at_most``.
        changed: the number of tasks among them that were changed.
        asked: the number of tasks among the changed ones that were running and were asked to stop.
        more: the number of other tasks that were requeued, because they had ended with the changed ones.
        skipped: the number of tasks that were not changed, by reason: ``"changed"`` (it moved in the
            meantime), ``"unique_key"`` (another task holds its unique key), ``"running"``, ``"thread"`` (a
            thread of it still runs), ``"needed"`` (an unfinished task depends on it), ``"asked"`` (it was
            asked to stop before), ``"answer"`` (an answer cannot run again).
        reached: the ``created_at`` of the last task that was looked at, as the newest comes first; None if
            there was none. After an interrupt, a call with this ``end_date`` goes on from there.
        starts_until: the time at which the last of the staggered tasks may start; None without a rate.
    """

    action: Action
    dry_run: bool = False
    matched: int = 0
    exact: bool = True
    changed: int = 0
    asked: int = 0
    more: int = 0
    skipped: Mapping[str, int] = attrs.field(factory=dict)
    reached: datetime | None = None
    starts_until: datetime | None = None


#: A function that is told how far a bulk change has come, after each batch.
OnProgress = Callable[[Bulk], object]


@attrs.frozen
class Terms:
    """The terms of a bulk change that do not depend on what is changed: see ``Queue.requeue_all``."""

    dry_run: bool = False
    at_most: int | None = None
    on_progress: OnProgress | None = None

    def __attrs_post_init__(self) -> None:
        if self.at_most is not None and not self.dry_run:
            raise ConfigurationError(
                "at_most limits the count of a dry run: say dry_run=True, or limit=... to change fewer"
            )
        if self.on_progress is not None and not callable(self.on_progress):
            raise ConfigurationError(
                f"on_progress must be a function, not {self.on_progress!r:.80}"
            )


#: No further terms: change all tasks, and tell nobody.
PLAIN = Terms()


def counted(action: Action, number: TaskCount) -> Bulk:
    """Return the record of a dry run."""
    return Bulk(action=action, dry_run=True, matched=int(number), exact=number.exact)


class Tally:
    """Counts what a bulk change has done, and tells ``on_progress``."""

    def __init__(self, action: Action, terms: Terms) -> None:
        self.bulk = Bulk(action=action)
        self._on_progress = terms.on_progress

    def add(
        self,
        matched: int,
        tasks: Mapping[str, Task],
        *,
        changed: int,
        skipped: Iterable[str],
        asked: int = 0,
        more: int = 0,
        starts_until: int | None = None,
    ) -> None:
        """Add a batch that is done, with its tasks as they were read; tell how far the change has come."""
        before = self.bulk
        last = before.starts_until if starts_until is None else to_datetime(starts_until)
        self.bulk = attrs.evolve(
            before,
            matched=before.matched + matched,
            changed=before.changed + changed,
            asked=before.asked + asked,
            more=before.more + more,
            skipped=dict(Counter(before.skipped) + Counter(skipped)),
            reached=[*tasks.values()][-1].created_at if tasks else before.reached,
            starts_until=last,
        )
        if self._on_progress is not None:
            self._on_progress(self.bulk)


class Stagger:
    """Gives tasks the times at which they may start, at a rate, the first one at once.

    The last time given is noted in the repository. So tasks that are requeued later for the same reason and
    at the same rate come after these, also in another process, and after a crash. A note is kept until its
    time has come. A repository without notes begins anew with each call.

    Args:
        repository: keeps the note.
        now_ms: returns the time in milliseconds.
        rate: the number of tasks in a period.
        reason: says which tasks these are.
    """

    def __init__(
        self, repository: Repository, now_ms: Callable[[], int], rate: Rate, reason: object
    ) -> None:
        self._repository = repository
        self._now_ms = now_ms
        self._interval = rate.interval * 1000
        import hashlib  # slow to load, and seldom needed

        text = repr((rate.count, rate.seconds, reason))
        self._key = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        self._until = 0.0

    def take(self, count: int) -> list[int]:
        """Return the times of the next ``count`` tasks, in milliseconds."""
        first = self._reserve(count * self._interval)
        return [min(round(first + number * self._interval), LAST) for number in range(count)]

    def _reserve(self, length: float) -> float:
        """Return the start of the next free period of this length; it is not given to others then."""
        while True:
            now = float(self._now_ms())
            note = None if self._repository.shortcoming else self._read()
            known = {} if note is None else _untils(note.text)
            first = max(now, self._until, known.get(self._key, 0.0))
            if self._repository.shortcoming:
                self._until = first + length
                return first
            kept = {key: until for key, until in known.items() if until > now}
            text = json.dumps({**kept, self._key: first + length})
            if self._repository.put_note(_NOTE, text, 0 if note is None else note.version):
                return first

    def _read(self) -> Note | None:
        return self._repository.reads.notes_named([_NOTE]).get(_NOTE)


def _untils(text: str) -> dict[str, float]:
    """Return the times in a note; a damaged note has none."""
    try:
        return {str(key): float(until) for key, until in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError):
        return {}
