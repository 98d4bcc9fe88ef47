"""The options of a submit, checked and set on the task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any

import attrs

from taskx.tasks import lifecycle, unique
from taskx.tasks.checks import check_number, in_seconds
from taskx.tasks.clock import SYSTEM_CLOCK, to_datetime
from taskx.tasks.creation import new_record
from taskx.tasks.errors import ConfigurationError
from taskx.tasks.model import Task, check_key
from taskx.tasks.options import (
    OnConflict,
    SubmitOptions,
    check_time,
    lifetime,
    one_of,
    refuse_unknown,
)
from taskx.tasks.record import optional_ms
from taskx.tasks.tags import check_tags

_check_on_conflict = one_of(OnConflict)


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def of_submit(options: Mapping[str, Any]) -> list[str]:
    """Return the options that concern the moment of the submit, so that no :class:`Task` can hold them."""
    timed = options.get("expires")
    relative = timed is not None and not isinstance(timed, datetime)
    found = [name for name in _OF_MOMENT if name in options]
    return [*found, "expires"] if relative else found


_OF_MOMENT = ("delay", "on_conflict", "debounce", "at_most")


def with_options(task: Task, options: Mapping[str, Any], now_ms: int) -> Task:
    """Return the task with the options of ``submit`` that are not None.

    Raises:
        ConfigurationError: an option is not valid, or ``run_at`` and ``delay`` are both given.
    """
    chosen = {name: value for name, value in options.items() if value is not None}
    if "id" in chosen:  # only Task.id may be empty: then an id is made
        check_key(chosen["id"], "id")
    parents = chosen.get("depends_on")
    if isinstance(parents, Iterable) and not isinstance(parents, (str, bytes, Mapping)):
        chosen["depends_on"] = [getattr(parent, "id", parent) for parent in parents]
    if (key := chosen.pop("key", None)) is not None:
        if "concurrency_key" in chosen:
            raise ConfigurationError("give key or concurrency_key, its old name, not both")
        chosen["concurrency_key"] = check_key(key, "key")
    if "tags" in chosen:
        chosen["tags"] = check_tags(chosen["tags"])
    on_conflict = chosen.pop("on_conflict", "reject")
    _check_on_conflict(on_conflict, "on_conflict")
    if "debounce" in chosen and "on_conflict" in options and on_conflict != "replace":
        raise ConfigurationError("debounce replaces the task that waits: leave out on_conflict")
    if "on_conflict" in options and task.unique_key is None and "unique_key" not in chosen:
        raise ConfigurationError(
            "on_conflict requires unique_key; for an id that may exist, catch DuplicateTask: its task_id "
            "names the task, for queue.handle"
        )
    _debounce(task, chosen)
    if "unique_scope" in chosen:
        chosen["unique_scope"] = unique.scope_to_text(chosen["unique_scope"])
    delay = chosen.pop("delay", None)
    if delay is not None:
        if "run_at" in chosen:
            raise ConfigurationError("give run_at or delay, not both")
        seconds = check_number(delay, "delay")
        try:
            chosen["run_at"] = to_datetime(now_ms) + timedelta(seconds=seconds)
        except OverflowError:
            raise ConfigurationError(
                f"delay of {seconds:g} seconds is beyond the calendar: give a shorter one"
            ) from None
    expires = chosen.pop("expires", None)
    if expires is not None:
        chosen["expires_at"] = _expiry(expires, chosen.get("run_at", task.run_at), now_ms)
    return attrs.evolve(task, **chosen) if chosen else task


def _debounce(task: Task, chosen: dict[str, Any]) -> None:
    """Replace ``debounce`` by the options that it stands for; ``at_most`` concerns only the submit.

    Raises:
        ConfigurationError: an option is not valid, or there is another one that says the same.
    """
    wait, most = chosen.pop("debounce", None), chosen.pop("at_most", None)
    if wait is None:
        if most is not None:
            raise ConfigurationError("at_most requires debounce")
        return
    if task.unique_key is None and "unique_key" not in chosen:
        raise ConfigurationError("debounce requires unique_key")
    if other := [name for name in ("delay", "run_at", "unique_scope") if name in chosen]:
        raise ConfigurationError(f"debounce sets {other[0]}: leave it out")
    seconds = check_number(wait, "debounce")
    if most is not None and check_number(most, "at_most") < seconds:
        raise ConfigurationError(f"at_most must be {seconds:g} s or more, as debounce is: {most!r}")
    chosen.update(delay=seconds, unique_scope=unique.PENDING)


def _expiry(expires: Any, run_at: datetime | None, now_ms: int) -> datetime:
    if isinstance(expires, datetime):
        return expires
    if run_at is not None:
        check_time(run_at, "run_at")
    return to_datetime(lifecycle.expiry(now_ms, optional_ms(run_at, "run_at"), lifetime(expires)))


# The options that are a length of time, and may be a text.
_LENGTHS = ("delay", "debounce", "at_most", "expires", "timeout")


def bound_options(
    type: str, before: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return options to submit tasks of a type with: those from before, and further ones that win.

    Raises:
        TypeError: ``submit`` has no such option.
        ConfigurationError: an option is not valid.
    """
    hint = "params are given to submit"
    if "connection" in options:
        hint = "write queue.submit(executor, {…}, connection=…)"
    refuse_unknown(options, SubmitOptions, "using", f"; {hint}")
    seconds = {
        name: in_seconds(value)
        for name, value in options.items()
        if isinstance(value, timedelta) or (isinstance(value, str) and name in _LENGTHS)
    }
    bound = {**before, **given(options), **seconds}
    now = SYSTEM_CLOCK.now_ms()
    task = with_options(Task(type=type), bound, now)
    new_record(task, now)  # checks the other options
    if "depends_on" in bound:
        bound["depends_on"] = tuple(task.depends_on)  # the caller may change its list
    if "tags" in bound:
        bound["tags"] = task.tags
    return bound
