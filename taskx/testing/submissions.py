"""The tasks that were submitted to a queue, and assertions about them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from taskx.node.hooks import Hook
from taskx.tasks.checks import Duration, check_number, in_seconds
from taskx.tasks.clock import to_ms
from taskx.tasks.errors import ConfigurationError, PayloadError
from taskx.tasks.model import TASK_FIELDS, Task
from taskx.tasks.values import Values
from taskx.testing.clock import ManualClock

#: Tasks, and characters of the params of each, that a message lists.
_LISTED, _SHOWN = 20, 200


class Submissions(Hook):
    """Keeps every task that is stored, in order, as it was submitted."""

    def __init__(self, clock: ManualClock) -> None:
        self._clock = clock
        self.tasks: list[Task] = []

    def submitted(self, task: Task) -> None:
        """Keep a task."""
        self.tasks.append(task)

    def matching(
        self,
        type: str | None,
        params: Mapping[str, Any] | None,
        within: Duration | None,
        delay: Duration | None,
        fields: Mapping[str, Any],
        values: Mapping[str, Values],
    ) -> list[Task]:
        """Return the tasks that meet all of these conditions: see :meth:`ManualQueue.submitted`."""
        if unknown := sorted(fields.keys() - {*TASK_FIELDS}):
            raise ConfigurationError(f"a task has no field {', '.join(unknown)}")
        since = None
        if within is not None:
            since = self._clock.now_ms() - check_number(within, "within") * 1000
        seconds = None if delay is None else check_number(delay, "delay")
        return [
            task
            for task in self.tasks
            if (type is None or task.type == type)
            and (params is None or _includes(task.params, params, values.get(task.type)))
            and (since is None or _created(task) >= since)
            and (seconds is None or _delay(task) == seconds)
            and all(_plain(getattr(task, name)) == _plain(v) for name, v in fields.items())
        ]

    def listed(self) -> str:
        """Return what was submitted, as text for a message."""
        if not self.tasks:
            return "No task was submitted."
        shown = [f"  {n}. {described(t)}" for n, t in enumerate(self.tasks[:_LISTED], 1)]
        if (left := len(self.tasks) - _LISTED) > 0:
            shown.append(f"  … and {left} more")
        return "\n".join([f"{len(self.tasks)} task(s) were submitted:", *shown])


def described(task: Task) -> str:
    """Return a task in a line: its type, its params, and its delay if it has one."""
    params = json.dumps(task.params, ensure_ascii=False)
    if len(params) > _SHOWN:
        params = params[:_SHOWN] + " …"
    delay = f", delay {_delay(task):g} s" if task.run_at is not None else ""
    return f"{task.type} {params}{delay}"


def wanted(
    type: str | None,
    params: Mapping[str, Any] | None,
    within: Duration | None,
    delay: Duration | None,
    fields: Mapping[str, Any],
) -> str:
    """Return conditions, as text for a message."""
    words = ["task" if type is None else f"task of type {type!r}"]
    words += [] if params is None else [f"with params {dict(params)!r}"]
    words += [] if within is None else [f"within the last {in_seconds(within):g} s"]
    words += [] if delay is None else [f"with a delay of {in_seconds(delay):g} s"]
    words += [f"with {name}={value!r}" for name, value in fields.items()]
    return " ".join(words)


def in_order(tasks: Sequence[Task], types: Sequence[str]) -> list[str]:
    """Return the types of those tasks that are of one of these types, in order."""
    return [task.type for task in tasks if task.type in types]


def _includes(params: Mapping[str, Any], some: Mapping[str, Any], values: Values | None) -> bool:
    if values is not None:
        try:
            some = values.encode_params(some)
        except PayloadError:  # a submit would refuse them
            return False
    return all(name in params and _plain(value) == params[name] for name, value in some.items())


def _plain(value: Any) -> Any:
    """Return a value with lists for its tuples, as JSON has them."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _created(task: Task) -> int:
    assert task.created_at is not None  # it is stored
    return to_ms(task.created_at)


def _delay(task: Task) -> float:
    return 0.0 if task.run_at is None else max(0.0, (to_ms(task.run_at) - _created(task)) / 1000)
