"""What new tasks depend on: it must be there, and nothing may wait for itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from taskx.core import lifecycle
from taskx.core.errors import ConfigurationError, TaskNotFound
from taskx.core.record import ids_from_text
from taskx.core.writes import Insert
from taskx.storage.base import Repository


def find_parents(repository: Repository, inserts: Sequence[Insert]) -> None:
    """Have new tasks wait for an unfinished parent each, where they have one.

    Raises:
        TaskNotFound: a parent is neither stored nor among the new tasks.
        ConfigurationError: they depend on one another in a circle.
    """
    parents = {i.id: ids_from_text(i.row["depends_on"]) for i in inserts if "depends_on" in i.row}
    new = {insert.id: lifecycle.PENDING for insert in inserts}
    _refuse_circles(parents)
    wanted = {parent for some in parents.values() for parent in some} - new.keys()
    statuses = {**repository.statuses([*wanted]), **new}
    for some in parents.values():
        for parent in some:
            if parent not in statuses:
                raise TaskNotFound(parent)
    for insert in inserts:
        if insert.id not in parents:
            continue
        waiting_on = lifecycle.next_parent(parents[insert.id], statuses)
        if waiting_on is not None:
            lifecycle.wait_for(insert, waiting_on)


def _refuse_circles(parents: Mapping[str, Sequence[str]]) -> None:
    """Among tasks that are stored together: what is stored already cannot depend on them."""
    done: set[str] = set()
    for first in parents:
        path = {first: iter(parents[first])} if first not in done else {}
        while path:
            task_id, left = next(reversed(path.items()))
            parent = next((p for p in left if p in parents and p not in done), None)
            if parent is None:
                done.add(task_id)
                del path[task_id]
            elif parent in path:
                circle = [*path][[*path].index(parent) :]
                raise ConfigurationError(
                    f"tasks depend on one another in a circle: {' on '.join([*circle, parent])}"
                )
            else:
                path[parent] = iter(parents[parent])
