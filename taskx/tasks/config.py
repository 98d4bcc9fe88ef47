"""The settings of a queue."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, get_args

import attrs
from attrs.validators import optional

from taskx.tasks.checks import as_seconds, by, check_int, check_number
from taskx.tasks.errors import ConfigurationError
from taskx.tasks.model import TaskStatus, check_status
from taskx.tasks.options import refuse_others
from taskx.tasks.payload import DEFAULT_MAX_SIZE
from taskx.tasks.redact import SECRETS, check_redact

#: The reaction of a full buffer to a submit.
Overflow = Literal["reject", "block", "spill", "caller_runs"]


def _known_overflow(_: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if value not in get_args(Overflow):
        known = ", ".join(map(repr, get_args(Overflow)))
        raise ConfigurationError(f"{attribute.name} must be one of {known}, not {value!r}")


def _periods(given: Mapping[TaskStatus | str, timedelta | float]) -> dict[TaskStatus, float]:
    if not isinstance(given, Mapping):
        raise ConfigurationError(f"retention must map statuses to periods, not {given!r}")
    periods = {}
    for status, period in given.items():
        if not (known := check_status(status)).finished:
            raise ConfigurationError(
                f"retention applies only to tasks that have ended, not to {known} tasks"
            )
        periods[known] = check_number(period, f"retention of {known}")
    return periods


@attrs.frozen
class Config:
    """The settings of a queue. Seconds can be given as a number, a ``timedelta`` or a text.

    Attributes:
        worker_num: the number of worker threads.
        buffer_size: the number of submitted tasks that may wait in the buffer.
        overflow: the reaction of ``submit`` to a full buffer: ``"reject"`` raises ``QueueFull``;
            ``"block"`` waits for room (inside an executor it spills, because it might wait for
            itself); ``"spill"`` leaves the task in the repository until there is room;
            ``"caller_runs"`` runs the task on the thread that submits.
        block_timeout: the seconds that ``"block"`` waits before ``QueueFull``; None waits for ever.
        max_payload_size: the largest params, and the largest result, in bytes of JSON.
        retention: the seconds for which tasks that have ended are kept, by status. Tasks in a status
            without a time are kept for ever.
        max_stuck: the number of worker threads that may run on after their task's time-out and are
            replaced by others.
        ageing: the seconds of waiting that raise a task's priority by one, so that tasks of low priority
            do not starve; None: waiting does not change the priority.
        redact: the words whose values are hidden where params are shown, such as in the log: the value of
            each key that contains one of them, in any case, with or without ``-`` and ``_``. ``("*",)``
            hides all values, ``()`` hides none.
        max_hold: the most seconds for which ``Snooze(…, limit=…)`` holds a limit.

    Raises:
        ConfigurationError: a value is not valid.
    """

    worker_num: int = attrs.field(default=5, validator=by(check_int, 1, 10_000))
    buffer_size: int = attrs.field(default=100, validator=by(check_int, 1, 10_000_000))
    overflow: Overflow = attrs.field(default="reject", validator=_known_overflow)
    block_timeout: float | None = attrs.field(
        default=None, converter=as_seconds, validator=optional(by(check_number))
    )
    max_payload_size: int = attrs.field(
        default=DEFAULT_MAX_SIZE, validator=by(check_int, 2, 1 << 30)
    )
    retention: Mapping[TaskStatus, float] = attrs.field(factory=dict, converter=_periods)
    max_stuck: int = attrs.field(default=10, validator=by(check_int, 0, 10_000))
    ageing: float | None = attrs.field(
        default=None, converter=as_seconds, validator=optional(by(check_number, 0.001))
    )
    redact: tuple[str, ...] = attrs.field(default=SECRETS, converter=check_redact)
    max_hold: float = attrs.field(default=3600.0, converter=as_seconds, validator=by(check_number))

    if not TYPE_CHECKING:  # a type checker finds out by itself

        def __new__(cls, *values: Any, **options: Any) -> Any:
            refuse_others(options, {field.name for field in attrs.fields(cls)}, "Config")
            return super().__new__(cls)
