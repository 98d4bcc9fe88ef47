"""A new task whose id is taken, or whose unique key is held: what becomes of the submit."""

from __future__ import annotations

import time

from taskx.core import lifecycle, unique
from taskx.core.errors import DuplicateTask, RepositoryUnavailable
from taskx.core.options import OnConflict
from taskx.core.writes import Insert
from taskx.moving import Services

# A key whose holder does not show belongs to one that is just being stored, or is given up this moment.
_TRIES, _PAUSE = 100, 0.01


def settle(services: Services, insert: Insert, on_conflict: OnConflict) -> str | None:
    """The id of the task that stands for the new one; None if it can be stored now.

    Raises:
        DuplicateTask: its id is taken, or its key is held and ``on_conflict`` has no answer to that.
        RepositoryUnavailable: the key is held by a task that is not there yet.
    """
    key = insert.row.get("unique_lock")
    repository = services.repository
    if key is None or insert.id in repository.statuses([insert.id]):
        raise DuplicateTask(insert.id)
    for _ in range(_TRIES):
        found = repository.find("unique_lock", [key], ("id",))
        holders = repository.get_many([task_id for (task_id,) in found])
        if (holder := next(iter(holders.values()), None)) is None:
            return None
        if (given_up := unique.give_up(holder, services.clock.now_ms())) is not None:
            services.consequences.commit([given_up])
            return None
        if on_conflict == "return":
            return holder.id
        writes = lifecycle.replace(holder, insert) if on_conflict == "replace" else []
        if not writes:
            raise DuplicateTask(holder.id, key)
        if any(services.consequences.commit(writes, {holder.id: holder})):
            return holder.id
    raise _busy(key)


def _busy(key: str) -> RepositoryUnavailable:
    return RepositoryUnavailable(
        f"the unique key {key!r} is held by a task that is just being stored; try again"
    )


class Patience:
    """How often the storing of a new task is tried while its key passes from hand to hand."""

    def __init__(self, insert: Insert) -> None:
        self._key = insert.row["unique_lock"]
        self._left = _TRIES

    def wait(self) -> None:
        """A moment before the next try.

        Raises:
            RepositoryUnavailable: there were enough of them.
        """
        self._left -= 1
        if not self._left:
            raise _busy(self._key)
        if self._left < _TRIES - 2:
            time.sleep(_PAUSE)
