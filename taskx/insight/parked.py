"""The tasks that wait in the middle of an attempt: by type, version of the executor, and step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from taskx.attempt.waiting import step_until
from taskx.stores.base import Repository
from taskx.tasks import children
from taskx.tasks.clock import to_ms

# Most tasks that wait for tasks, and most that wait for a time, that are looked at.
_MOST = 10_000
# Tasks that are read at once.
_LUMP = 500


class Place(NamedTuple):
    """A place in an executor at which tasks wait."""

    type: str
    #: The version of the executor that ran them last; None if it had none.
    version: str | None
    #: The name of the step or of the children, or the id of what they wait for; empty if it is not known.
    step: str


def places(repository: Repository) -> Counter[Place]:
    """Return the places at which tasks wait without a thread, each with the number of its tasks."""
    return Counter((*_waiting(repository), *_sleeping(repository)))


def _waiting(repository: Repository) -> Iterator[Place]:
    """Yield the places of tasks that wait for the end of another task."""
    fields = ("id", "type", "version", "started_at", "waiting_on")
    after, left = "", _MOST
    while left > 0 and (values := repository.distinct("waiting_on", after, _LUMP)):
        for task_id, type, version, started_at, on in repository.find(
            "waiting_on", values, fields, left
        ):
            left -= 1
            if started_at is not None:
                yield Place(type, version, _step(task_id, on))
        after = values[-1]


def _step(task_id: str, on: str) -> str:
    """Return the name of the step that waits for a task."""
    own = on.startswith((f"{task_id}/", f"{children.digest_of(task_id)}/"))
    if own and (listed := on if children.may_be_list(on) else children.list_of(on)):
        return children.name_in(listed)
    return on.removeprefix(f"{task_id}/")


def _sleeping(repository: Repository) -> Iterator[Place]:
    """Yield the places of tasks that wait for a time."""
    due = [task_id for task_id, _ in repository.due(None, _MOST)]
    for start in range(0, len(due), _LUMP):
        found = repository.find("id", due[start : start + _LUMP], ("id", "status", "started_at"))
        parked = [i for i, status, at in found if status == "pending" and at is not None]
        yield from _steps(repository, parked)


def _steps(repository: Repository, task_ids: Sequence[str]) -> Iterator[Place]:
    for task in repository.get_many(task_ids).values():
        until = None if task.run_at is None else to_ms(task.run_at)
        yield Place(task.type, task.version, step_until(task.checkpoints, until))
