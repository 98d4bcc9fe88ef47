"""The settings of a queue."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Literal, get_args

import attrs
from attrs.validators import optional

from taskx.core.checks import by, check_int, check_number
from taskx.core.errors import ConfigurationError
from taskx.core.model import TaskStatus, check_status
from taskx.core.payload import DEFAULT_MAX_SIZE

#: What a full buffer does with a submit.
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
            raise ConfigurationError(f"retention is of tasks that have ended, not of {known} ones")
        seconds = period.total_seconds() if isinstance(period, timedelta) else period
        periods[known] = check_number(seconds, f"retention of {known}")
    return periods


@attrs.frozen
class Config:
    """The settings of a queue.

    Attributes:
        worker_num: worker threads.
        buffer_size: submitted tasks that may wait in the buffer.
        overflow: what ``submit`` does when the buffer is full: ``"reject"`` raises ``QueueFull``;
            ``"block"`` waits for room (inside an executor it spills, as waiting might be for
            itself); ``"spill"`` leaves the task in the repository until there is room;
            ``"caller_runs"`` runs it in the thread that submits.
        block_timeout: seconds that ``"block"`` waits before ``QueueFull``; None for ever.
        max_payload_size: the largest params, and the largest result, in bytes of JSON.
        retention: for how long tasks that have ended are kept, by status: a ``timedelta`` or seconds.
            For ever where none is given.
        max_stuck: worker threads that do not end after their task's time-out and are replaced by others.
        ageing: seconds of waiting that count as one priority more, so that low priorities are not
            starved; None: priority alone counts.

    Raises:
        ConfigurationError: a value is not valid.
    """

    worker_num: int = attrs.field(default=5, validator=by(check_int, 1, 10_000))
    buffer_size: int = attrs.field(default=100, validator=by(check_int, 1, 10_000_000))
    overflow: Overflow = attrs.field(default="reject", validator=_known_overflow)
    block_timeout: float | None = attrs.field(default=None, validator=optional(by(check_number)))
    max_payload_size: int = attrs.field(
        default=DEFAULT_MAX_SIZE, validator=by(check_int, 2, 1 << 30)
    )
    retention: Mapping[TaskStatus, float] = attrs.field(factory=dict, converter=_periods)
    max_stuck: int = attrs.field(default=10, validator=by(check_int, 0, 10_000))
    ageing: float | None = attrs.field(default=None, validator=optional(by(check_number, 0.001)))
