"""Lists of children, as they are stored: what their parents wait for, and how all are cancelled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import compress

from taskx.stores.base import Repository
from taskx.tasks import children, lifecycle
from taskx.tasks.lifecycle import UNFINISHED
from taskx.tasks.model import Task
from taskx.tasks.writes import Update

# Attempts to cancel children that move between the read and the write.
_TRIES = 20


def done(repository: Repository, list_ids: Iterable[str]) -> list[str]:
    """Return those of these lists of which enough children have ended for the parent to go on."""
    ids = [*list_ids]
    some = repository.get_many(ids).values() if ids else ()
    found = [one for one in some if one.type == lifecycle.CHILDREN]
    every = {child for one in found for child in one.depends_on}
    statuses = repository.statuses([*every]) if every else {}
    return [one.id for one in found if children.awaited(one, statuses) is None]


def cancel(
    repository: Repository,
    commit: Callable[[Sequence[Update]], Sequence[bool]],
    listed: Task,
    now: int,
) -> None:
    """Cancel the children of a list that have not ended; those that run are asked to stop.

    Args:
        repository: the repository to read.
        commit: commits moves.
        listed: the record of the list.
        now: the time.
    """
    batch, tries = repository.timing.batch, range(_TRIES)
    for start in range(0, len(listed.depends_on), batch):
        left = [*listed.depends_on[start : start + batch]]
        for _ in tries:  # children may move between a read and a write
            if not (left := _unfinished(repository, left)):
                break
            writes = [write for child in left for write in lifecycle.cancel(child, now)]
            held = {write.id for write in compress(writes, commit(writes))}
            left = [child for child in left if child not in held]


def _unfinished(repository: Repository, task_ids: Sequence[str]) -> list[str]:
    """Return those of these tasks that have not ended, and were not asked to stop."""
    found = repository.find("id", task_ids, ("id", "status", "cancel_requested_at"))
    return [i for i, status, asked_at in found if status in UNFINISHED and asked_at is None]
