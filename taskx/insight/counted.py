"""Reads what the nodes have counted: for statistics, charts, and the use of keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import attrs

from taskx.node.counts import (
    BOUNDS,
    KEYS,
    Cell,
    Cells,
    Counts,
    Level,
    Notes,
    Stored,
    add,
    from_text,
    rest_of,
)
from taskx.stores.base import Repository
from taskx.tasks.checks import Duration, check_number
from taskx.tasks.clock import to_datetime, to_ms
from taskx.tasks.errors import ConfigurationError
from taskx.tasks.findings import Answer
from taskx.tasks.model import check_moment, check_name
from taskx.tasks.rate import is_key

# Notes that are read at a time.
_PAGE = 1000


@attrs.frozen
class Counted:
    """The counts since a time.

    Attributes:
        since: the beginning of the first minutes, hour or day that were read, or the time at which counting
            began, if that is later; in milliseconds.
        complete: True if counting had begun before.
        parts: the cells, each with the beginning of their time.
    """

    since: int
    complete: bool
    parts: Sequence[tuple[int, Cells]]

    def sums(self) -> Cells:
        """Return the sum of all cells of each type or key."""
        sums: Cells = {}
        for _, cells in self.parts:
            add(sums, cells)
        return sums


def beginning(period: Duration, since: datetime | None, now: int) -> int:
    """Return the time from which to count, in milliseconds: ``since``, or else ``period`` before now.

    Raises:
        ConfigurationError: an argument is not valid.
    """
    if since is None:
        return now - round(check_number(period, "period") * 1000)
    check_moment(since, "since")
    return to_ms(since)


def grain_at(levels: Sequence[Level], age: int) -> int:
    """Return the length of the times of which counts of an age are kept, in milliseconds."""
    return next((level.grain for level in levels[1:] if age <= level.keep), levels[-1].grain)


def counted(
    repository: Repository, counts: Counts, now: int, levels: Sequence[Level], start: int
) -> Counted:
    """Read what was counted from a time on: from the beginning of its minute, or longer time."""
    notes = counts.notes if repository.shortcoming else Stored(repository)
    grain = grain_at(levels, now - start)
    first = start // grain * grain
    kept = max(counts.began(repository), now - levels[-1].keep)
    return Counted(
        since=max(first, kept),
        complete=kept <= first,
        parts=[(moment, cells) for moment, cells in _parts(counts, notes, levels, first)],
    )


def _parts(
    counts: Counts, notes: Notes, levels: Sequence[Level], first: int
) -> Sequence[tuple[int, Cells]]:
    # Whatever moves meanwhile is found twice, and not missed: what is stored is read after what is not, and
    # sums after their parts.
    texts = [counts.unstored(), *(_texts(notes, level, first) for level in levels)]
    found = {name: from_text(text) for some in texts for name, text in some.items()}
    summed = {name for _, of in found.values() for name in of}
    parts = []
    for level in levels:
        for name, (cells, _) in found.items():
            if name.startswith(level.prefix) and name not in summed:
                parts.append((level.moment(name), cells))
    return [part for part in parts if part[0] >= first]


def _texts(notes: Notes, level: Level, first: int) -> dict[str, str]:
    """Return the texts of the notes of a level from a time on."""
    # The first name that is too early sorts before this, whatever follows the time in it.
    after = f"{level.name(first - 1)}~" if first > 0 else level.prefix
    texts: dict[str, str] = {}
    while page := notes.after(level.prefix, after, _PAGE):
        texts.update((name, note.text) for name, note in page.items())
        after = max(page)
    return texts


def percentile(groups: Mapping[str, int], share: float) -> float:
    """Return the time that is the longest of a share of all, as far as their groups tell.

    It is at most a fifth too long or too short: the times of a group count as spread evenly.
    """
    rank, passed = share * sum(groups.values()), 0
    for group, number in sorted((int(group), number) for group, number in groups.items()):
        if passed + number >= rank:
            low = BOUNDS[group - 1] if group else 0.0
            high = BOUNDS[group] if group < len(BOUNDS) else low
            return low + (high - low) * (rank - passed) / number
        passed += number
    return BOUNDS[-1]


@attrs.frozen(kw_only=True)
class KeyUsage:
    """The counts of the tasks of a concurrency key: see :meth:`Queue.usage`.

    Attributes:
        started: the number of attempts that began.
        completed: the number of tasks that completed.
        failed: the number of tasks that failed.
        retried: the number of attempts that failed and were followed by another.
        cancelled: the number of tasks that were cancelled.
        seconds: how long all attempts took.
        cost: what they have taken of each unit of their cost: as ``ctx.spent`` said, or else ``cost``; of
            an attempt that raised ``Snooze`` only what ``ctx.spent`` said.
    """

    started: int = 0
    completed: int = 0
    failed: int = 0
    retried: int = 0
    cancelled: int = 0
    seconds: float = 0.0
    cost: Mapping[str, int] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class Usage(Answer):
    """The answer of :meth:`Queue.usage`.

    Attributes:
        keys: the usage of each key, that with the most seconds first.
        rest: the usage of all keys together that were not among the 1,000 largest of a day.
        since: the beginning of the first hour or day that is counted, or the time at which counting began,
            if that is later.
        complete: True if counting had begun before, and no other key is in the rest.
    """

    keys: Mapping[str, KeyUsage]
    rest: KeyUsage
    since: datetime
    complete: bool


def usage(
    repository: Repository,
    counts: Counts,
    now: int,
    name: str,
    period: Duration,
    since: datetime | None,
) -> Usage:
    """Return what the tasks of keys did: see ``Queue.usage``."""
    if not is_key(check_name(name, "name")):
        raise ConfigurationError(
            f"usage is counted for keys with a declared limit: {name!r} has no ':' and is none"
        )
    start = beginning(period, since, now)
    found = counted(repository, counts, now, KEYS, start)
    sums = found.sums()
    rest = sums.pop(rest_of(name), {})
    wanted = {key: cell for key, cell in sums.items() if _is_of(key, name)}
    ranked = sorted(wanted, key=lambda key: (-wanted[key].get("seconds", 0), key))
    return Usage(
        keys={key: KeyUsage(**numbers_of(wanted[key])) for key in ranked},
        rest=KeyUsage(**numbers_of(rest)),
        since=to_datetime(found.since),
        complete=found.complete and not (rest and name != rest_of(name)),
    )


def _is_of(key: str, name: str) -> bool:
    return key.startswith(name) if name.endswith(":") else key == name


def numbers_of(cell: Cell) -> dict[str, Any]:
    """Return the numbers of a cell without its groups of times."""
    return {name: value for name, value in cell.items() if name not in ("waits", "runs")}
