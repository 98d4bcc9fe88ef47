"""Changes of all tasks that match a filter, cut into requests that do not last for minutes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from taskx.queue.bulk import Bulk
from taskx.tasks.model import TaskFilter


class _Enough(Exception):
    """The time is over."""


class _Watch:
    """Notes how far a change has come, and ends it when the time is over."""

    def __init__(self, patience: float) -> None:
        self.bulk = Bulk(action="cancel")  # nothing yet
        self._until = time.monotonic() + patience

    def __call__(self, bulk: Bulk) -> None:
        self.bulk = bulk
        if time.monotonic() >= self._until:
            raise _Enough


def change_for_a_while(
    change: Callable[..., Bulk],
    wanted: TaskFilter,
    note: Callable[[str], object],
    patience: float,
    **options: Any,
) -> tuple[Bulk, bool]:
    """Change tasks that match for a few seconds.

    Args:
        change: ``queue.cancel_all``, ``queue.requeue_all`` or ``queue.delete_all``.
        wanted: the filter.
        note: notes in the audit log how many tasks were changed, also if an error ends the change.
        patience: seconds after which no further batch of changes is made.
        options: further arguments of the method.

    Returns:
        what was done, and True if no task is left to change.
    """
    watch = _Watch(patience)
    try:
        watch.bulk = change(wanted, on_progress=watch, **options)
        return watch.bulk, True
    except _Enough:
        return watch.bulk, False
    finally:
        if watch.bulk.matched:
            note(f"{watch.bulk.changed} changed")
