"""The options of a task, as type checkers see them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, TypedDict

from taskx.common.handles import TaskHandle
from taskx.core.lifecycle import OnParentFailure
from taskx.core.retry import RetryPolicy
from taskx.core.unique import OnConflict, UniqueScope


class ScheduleOptions(TypedDict, total=False):
    """The options of ``submit`` that a schedule may give its tasks: see ``Queue.schedule``."""

    created_by: str | None
    priority: int | None
    timeout: float | None
    max_attempts: int | None
    max_crashes: int | None
    retry: RetryPolicy | None
    concurrency_key: str | None


class SubmitOptions(ScheduleOptions, total=False):
    """The options of ``submit``, each of which may be left out or None: see ``Queue.submit``."""

    id: str | None
    run_at: datetime | None
    delay: float | None
    unique_key: str | None
    unique_scope: UniqueScope | None
    on_conflict: OnConflict | None
    depends_on: Sequence[str | TaskHandle[Any]] | None
    on_parent_failure: OnParentFailure | None
