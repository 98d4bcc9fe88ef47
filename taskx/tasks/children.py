"""Children: the tasks that a task submits while it runs, and the record that stands for all of them.

The record of a list of children is a task of type ``children`` that no executor runs. It is stored in one
transaction with them, and names them as what it depends on. It waits for the end of its parent: so it ends
with that, and finds whose children are to be cancelled. Ids are made of the parent's id and the name of the
list, so that an attempt which repeats the call finds what was submitted:

``<parent>/<name>/all``
    the record of the list.
``<parent>/<name>/<number>``
    its children, from 0 on.

If that is long, there is a digest in the place of the parent's id.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from taskx.tasks import lifecycle, payload
from taskx.tasks.errors import ConfigurationError
from taskx.tasks.lifecycle import COMPLETED, UNFINISHED
from taskx.tasks.model import Task, check_key

#: Most lists of children inside one another.
MAX_DEPTH = 100
#: Longest name of a list of children, in characters.
MAX_LIST_NAME = 80
#: Most pairs of a dependent of a task and a child of it that :meth:`Context.fork` makes.
MOST_PAIRS = 1_000_000
# Longest beginning of an id that has the parent's id in it. Answers to a child have longer ids.
_LONGEST = 120
_ALL = "/all"


def list_id(parent: str, name: str) -> str:
    """Return the id of the record of a list of children.

    Raises ``ConfigurationError`` if the name cannot be that of a list.
    """
    check_key(name, "the name of a list of tasks")
    if len(name) > MAX_LIST_NAME or "/" in name:
        what = "a slash" if "/" in name else f"{len(name)} characters"
        raise ConfigurationError(
            f"the name of a list of tasks is a part of their ids, and {name!r:.100} has {what}: choose a "
            f"name without slashes, of at most {MAX_LIST_NAME} characters"
        )
    start = f"{parent}/{name}"
    if len(start) > _LONGEST:
        start = f"{digest_of(parent)}/{name}"
    return start + _ALL


def child_id(listed: str, number: int) -> str:
    """Return the id of a child, by the id of the record of its list."""
    return f"{listed.removesuffix(_ALL)}/{number}"


def list_of(task_id: str) -> str:
    """Return the id of the record of the list that a task may be in, by its id; empty for none."""
    start, _, number = task_id.rpartition("/")
    return start + _ALL if "/" in start and number.isdigit() else ""


def name_in(list_id: str) -> str:
    """Return the name of a list, by the id of its record."""
    return list_id.removesuffix(_ALL).rpartition("/")[2]


def may_be_list(task_id: str) -> bool:
    """Return False if a task with this id is certainly not the record of a list."""
    return task_id.endswith(_ALL)


def digest_of(text: str) -> str:
    """Return a digest. It is a part of stored ids, so it must never change."""
    import hashlib  # slow to load, and seldom needed

    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def digest_of_list(tasks: Sequence[Task], needed: int | None) -> str:
    """Return a digest of what a list of children is to do."""
    texts = [payload.encode_params(task.params, payload.NO_LIMIT) for task in tasks]
    parts = [[task.type, payload.loads(text)] for task, text in zip(tasks, texts, strict=True)]
    return digest_of(json.dumps([needed, parts], sort_keys=True))


def new_list(
    parent: Task, name: str, tasks: Sequence[Task], needed: int | None, depth: int
) -> Task:
    """Return the record of a list of children."""
    listed = list_id(parent.id, name)
    params = {"parent": parent.id, "needed": needed, "depth": depth}
    params["digest"] = digest_of_list(tasks, needed)
    return Task(
        id=listed,
        type=lifecycle.CHILDREN,
        params=params,
        created_by=parent.created_by,
        depends_on=[child_id(listed, number) for number in range(len(tasks))],
    )


def is_of(listed: Task | None, parent: str) -> bool:
    """Return True for the record of a list of this parent's children."""
    return (
        listed is not None
        and listed.type == lifecycle.CHILDREN
        and listed.params.get("parent") == parent
    )


def awaited(listed: Task, statuses: Mapping[str, str]) -> str | None:
    """Return the id of what the parent waits for: a child, or any of them; None if it may go on.

    Until all have ended, it is a child, as for a task that depends on them. If some are enough, the end of
    each of them counts: then it is the record of the list.
    """
    children, needed = listed.depends_on, listed.params.get("needed")
    if needed is None:
        return lifecycle.unfinished_parent(children, statuses)
    completed = sum(statuses.get(child) == COMPLETED for child in children)
    possible = completed + sum(statuses.get(child) in UNFINISHED for child in children)
    return None if completed >= needed or possible < needed else listed.id
