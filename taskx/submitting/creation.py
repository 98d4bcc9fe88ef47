"""What a submit makes of a task: its options put in, its record checked and completed by its executor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

import attrs

from taskx.core.checks import check_number
from taskx.core.clock import Clock, to_datetime
from taskx.core.creation import new_record
from taskx.core.errors import ConfigurationError
from taskx.core.model import Task, check_key
from taskx.core.options import OnConflict, one_of, refuse_unknown
from taskx.core.unique import scope_to_text
from taskx.core.writes import Insert
from taskx.moving import Services

_check_on_conflict = one_of(OnConflict)


def prepare(services: Services, task: Task, priority: int | None = None) -> Insert:
    """Make the record of a task, with what its executor says where it says nothing; raise what is wrong.

    A ``priority`` that was given wins over the executor's own, zero included.
    """
    if not isinstance(task, Task):
        raise ConfigurationError(f"submit takes a Task or a type, not {type(task).__name__}")
    registry = services.registry
    insert = new_record(task, services.clock.now_ms(), registry.max_payload_size)
    row = insert.row
    executor = registry.get(row["type"])
    if executor is not None:
        if executor.check_params is not None:
            executor.check_params(task.params)
        for name, value in executor.settled.items():
            if row[name] is None:
                row[name] = value
        if priority is None and not row["priority"]:
            row["priority"] = executor.options.priority or 0
    return insert


def task_of(
    task: Task | str, params: Any, options: Mapping[str, Any], known: Any, what: str, clock: Clock
) -> Task:
    """The task that is meant by a task, or by a type and params; with options, which are of ``known``.

    Raises:
        TypeError: there is no such option in the call of ``what``, or both a task and params.
        ConfigurationError: an option is not valid.
    """
    if options:
        refuse_unknown(options, known, what, "; params are given as a dict")
    if isinstance(task, str):
        task = Task(type=task, params={} if params is None else params)
    elif params is not None:
        raise TypeError(f"{what}() of a task takes no params: set task.params, or give a type")
    if not options or not isinstance(task, Task):  # who stores it says what it is not
        return task
    return _with_options(task, options, clock.now_ms())


def _with_options(task: Task, given: Mapping[str, Any], now_ms: int) -> Task:
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
    _check_on_conflict(chosen.pop("on_conflict", "reject"), "on_conflict")
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
