"""Making the record of a new task, with every check. All new tasks are made here.

Changes that a user makes to a record by hand are checked here, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from operator import attrgetter
from typing import Any

import attrs

from taskx.tasks import lifecycle, payload, unique
from taskx.tasks.checks import check_int, check_number
from taskx.tasks.clock import to_ms
from taskx.tasks.errors import ConfigurationError, InvalidTransition
from taskx.tasks.ids import keyed_id
from taskx.tasks.model import (
    MAX_NAME,
    TIME_FIELDS,
    Task,
    TaskStatus,
    check_key,
    check_moment,
    check_name,
    check_status,
)
from taskx.tasks.options import CHECKS, OnParentFailure, check_time, checked, one_of
from taskx.tasks.rate import check_cost
from taskx.tasks.record import MAX_WORKER, check_progress, cost_to_text, policy_to_text
from taskx.tasks.tags import check_flow, check_tags, labels_to_text
from taskx.tasks.writes import Insert, maker

#: Longest error or traceback that a user can write by hand, in characters.
MAX_TEXT = 100_000
_check_failure_policy = one_of(OnParentFailure)


def new_record(task: Task, now: int, max_size: int = payload.DEFAULT_MAX_SIZE) -> Insert:
    """Return the write that stores a new task. The task object is not changed; an empty id is generated.

    Raises:
        InvalidTransition: the task is not pending.
        PayloadError: its params break the JSON rules or are too large.
        ConfigurationError: another field has an invalid value.
    """
    if task.status is not TaskStatus.PENDING:
        raise InvalidTransition(f"a new task must be pending; this one is {task.status}")
    task_id, key = keyed_id(now) if task.id == "" else (check_key(task.id, "id"), 0)
    columns = {
        "id": task_id,
        "type": check_key(task.type, "type"),
        "params": payload.encode_params(task.params, max_size),
        "created_by": check_name(task.created_by, "created_by") if task.created_by != "" else "",
        "created_at": now,
    }
    if _links(task) != _ALONE:
        columns.update(_between_tasks(task))
    said = _options(task)
    if said != _NOTHING or type(said[0]) is not int:  # most tasks have none
        columns.update(checked(task, CHECKS))
    if task.retry is not None:
        columns.setdefault("max_attempts", task.retry.max_attempts)
        columns["retry"] = policy_to_text(task.retry)
    if task.run_at is not None:
        columns["run_at"] = to_ms(task.run_at)
    if task.expires_at is not None:
        columns["expires_at"] = _expiry(task.expires_at, task.run_at)
    return lifecycle.created(columns, key)


def model_of(type: str, **columns: Any) -> Mapping[str, Any]:
    """Return the row of a new task with these columns, for :func:`copy_of`."""
    return lifecycle.created(
        {"id": "", "type": type, "created_by": "", "created_at": 0, **columns}
    ).row


def copy_of(
    model: Mapping[str, Any],
    params: Any,
    now: int,
    max_size: int,
    check: Callable[[Any], object] | None,
    chosen: str = "",
    created_by: str = "",
) -> Insert:
    """Return the write that stores a new task that differs from a model in its params.

    Its id and ``created_by`` may be its own, too. ``check`` raises ``PayloadError`` if the params do not
    fit the executor; the rest is as in :func:`new_record`.
    """
    own = check_key(chosen, "id") if chosen != "" else ""
    text = payload.encode_params(params, max_size)
    if created_by != "":
        created_by = check_name(created_by, "created_by")
    if check is not None:
        check(params)
    task_id, key = (own, 0) if own else keyed_id(now)
    row = {**model, "id": task_id, "params": text, "created_by": created_by, "created_at": now}
    return _make_insert((row, True, key))


_make_insert = maker(Insert)


def is_bare(task: Task) -> bool:
    """Return True if a task has nothing but a type, params, an id and ``created_by``."""
    if not (task.run_at is None and task.retry is None and task.expires_at is None):
        return False
    said = _all(task)
    return said == _BARE and type(said[0]) is int


_LINKS = (
    *("unique_key", "unique_scope", "depends_on", "on_parent_failure", "tags", "flow"),
    *("concurrency_key", "cost"),
)
_options = attrgetter(*CHECKS)
_NOTHING = _options(Task())
_links = attrgetter(*_LINKS)
_ALONE = _links(Task())
_all = attrgetter(*CHECKS, *_LINKS, "status")
_BARE = _all(Task())


def _expiry(expires_at: datetime, run_at: datetime | None) -> int:
    check_time(expires_at, "expires_at")
    if run_at is not None and expires_at <= run_at:
        raise ConfigurationError(
            f"the task would expire at {expires_at}, before it may start at {run_at}; give a later "
            "`expires`, or seconds, which are counted from `run_at`"
        )
    return to_ms(expires_at)


def _between_tasks(task: Task) -> dict[str, Any]:
    """Return the columns that concern other tasks, and the cost."""
    said: dict[str, Any] = {}
    if task.unique_key is not None:
        said["unique_key"] = check_key(task.unique_key, "unique_key")
        said["unique_scope"] = unique.scope_to_text(task.unique_scope or unique.UNFINISHED)
    elif task.unique_scope is not None:
        raise ConfigurationError("unique_scope requires unique_key")
    if task.on_parent_failure is not None:
        _check_failure_policy(task.on_parent_failure, "on_parent_failure")
    if task.depends_on and (parents := check_parents(task.depends_on, task.id)):
        said.update(depends_on=parents, on_parent_failure=task.on_parent_failure)
    if task.tags or task.flow:
        said["tags"] = labels_to_text(check_tags(task.tags), _checked_flow(task))
    if task.concurrency_key is not None:
        said["concurrency_key"] = check_key(task.concurrency_key, "concurrency_key")
    if task.cost is not None and (cost := check_cost(task.cost)) is not None:
        said["cost"] = cost_to_text(cost)
    return said


def _checked_flow(task: Task) -> str:
    return check_flow(task.flow) if task.flow else ""


def check_parents(parents: Any, task_id: str = "") -> list[str]:
    """Return the ids of a task's parents, each once. Raises ConfigurationError if they are invalid."""
    if not isinstance(parents, Iterable) or isinstance(parents, (str, bytes, Mapping)):
        raise ConfigurationError(f"depends_on must be a list of tasks, not {parents!r:.80}")
    ids = list(dict.fromkeys(check_key(parent, "depends_on") for parent in parents))
    if task_id and task_id in ids:
        raise ConfigurationError(f"task {task_id} cannot depend on itself")
    return ids


# A record can have values that submit would refuse. It must still be possible to change such a record.
_BY_HAND = {name: check for name, check in CHECKS.items() if name != "priority"}
_BY_HAND.update(timeout=check_number, expires_at=check_time)


def storable(task: Task) -> Task:
    """Return a copy of the task whose values a database can store.

    Raises:
        PayloadError: its progress is not a number, or its message is not text.
        ConfigurationError: another field has an invalid value.
    """
    for what in ("id", "type", "created_by"):
        check_name(getattr(task, what), what)
    check_int(task.priority, "priority", -(2**31))
    for what in TIME_FIELDS:
        check_moment(getattr(task, what), what)
    progress, message = check_progress(task.progress, task.message)
    return attrs.evolve(
        task,
        **checked(task, _BY_HAND),
        duration=check_number(task.duration, "duration"),
        tags=check_tags(task.tags),
        flow=_checked_flow(task),
        status=check_status(task.status),
        progress=progress,
        message=message,
        error=payload.clean_text(task.error, MAX_TEXT),
        error_type=payload.clean_text(task.error_type, MAX_NAME),
        traceback=payload.clean_text(task.traceback, MAX_TEXT),
        worker=payload.clean_text(task.worker, MAX_WORKER),
    )
