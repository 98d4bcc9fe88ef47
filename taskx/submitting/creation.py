"""How a record is made of a task: its options, what they are where nobody says, and all checks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from functools import partial
from typing import Any, get_args

import attrs

from taskx.core import lifecycle, payload
from taskx.core.checks import check_number
from taskx.core.clock import LAST, to_datetime, to_ms
from taskx.core.errors import ConfigurationError, InvalidTransition
from taskx.core.ids import new_id
from taskx.core.model import Task, TaskStatus, check_key, check_moment, check_name
from taskx.core.record import policy_to_text
from taskx.core.retry import check_policy
from taskx.core.unique import OnConflict, scope_to_text
from taskx.core.writes import Insert
from taskx.executing.executors import check_options
from taskx.running.starter import Services


def prepare(services: Services, task: Task, priority: int | None = None) -> Insert:
    """The record of a task, or the error that says what is wrong with it."""
    if not isinstance(task, Task):
        raise ConfigurationError(f"submit takes a Task or a type, not {type(task).__name__}")
    if task.status is not TaskStatus.PENDING:
        raise InvalidTransition(f"only a pending task can be submitted; this one is {task.status}")
    kind = check_name(task.type, "type")
    if not kind:
        raise ConfigurationError("type must not be empty")
    executor = services.registry.get(kind)
    params = payload.encode_params(task.params, services.registry.max_payload_size)
    max_attempts, max_crashes, timeout = task.max_attempts, task.max_crashes, task.timeout
    retry = check_policy(task.retry)
    if max_attempts is None and retry is not None:
        max_attempts = retry.max_attempts
    if executor is not None:
        if executor.check_params is not None:
            executor.check_params(task.params)
        options = executor.options
        if max_attempts is None:
            max_attempts = options.attempts
        if max_crashes is None:
            max_crashes = options.max_crashes
        if timeout is None:
            timeout = options.timeout
        if priority is None:
            priority = task.priority or options.priority or 0
    elif priority is None:
        priority = task.priority
    check_options(max_attempts, max_crashes, timeout, priority)
    now = services.clock.now_ms()
    more = lifecycle.between_tasks(task)
    create = partial(lifecycle.create, **more) if more else lifecycle.create
    run_at = None if task.run_at is None else _run_at_ms(task.run_at)
    return create(
        task_id=check_name(task.id, "id") or new_id(),
        type=kind,
        params=params,
        created_by=check_name(task.created_by, "created_by"),
        now=now,
        priority=priority,
        run_at=run_at,
        timeout=timeout,
        max_attempts=max_attempts,
        max_crashes=max_crashes,
        retry=policy_to_text(retry),
    )


def _run_at_ms(moment: datetime) -> int:
    check_moment(moment, "run_at")
    if (ms := to_ms(moment)) > LAST:
        raise ConfigurationError(f"run_at is beyond the calendar, in UTC: {moment}")
    return ms


def with_options(task: Task, given: dict[str, Any], now_ms: int) -> Task:
    """A copy of a task with the options of ``submit`` that were given.

    Raises:
        ConfigurationError: both ``run_at`` and ``delay``, an invalid delay, or an empty id.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    if "id" in chosen:  # that of a Task may be empty: one is made then
        check_key(chosen["id"], "id")
    parents = chosen.get("depends_on")
    if isinstance(parents, Iterable) and not isinstance(parents, (str, bytes, Mapping)):
        chosen["depends_on"] = [getattr(parent, "id", parent) for parent in parents]
    if chosen.pop("on_conflict", "reject") not in get_args(OnConflict):
        known = ", ".join(map(repr, get_args(OnConflict)))
        raise ConfigurationError(
            f"on_conflict must be one of {known}, not {given['on_conflict']!r}"
        )
    if "on_conflict" in given and task.unique_key is None and "unique_key" not in chosen:
        raise ConfigurationError("on_conflict is of a unique_key: give one, too")
    if "unique_scope" in chosen:
        chosen["unique_scope"] = scope_to_text(chosen["unique_scope"])
    delay = chosen.pop("delay", None)
    if delay is not None:
        if "run_at" in chosen:
            raise ConfigurationError("give run_at or delay, not both")
        seconds = check_number(delay, "delay")
        try:
            chosen["run_at"] = to_datetime(now_ms) + timedelta(seconds=seconds)
        except OverflowError:
            raise ConfigurationError(
                f"delay of {seconds:g} seconds is beyond the calendar"
            ) from None
    return attrs.evolve(task, **chosen) if chosen else task
