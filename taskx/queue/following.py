"""A live display of the tasks of a repository, until nothing is left to run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from taskx.stores import queries
from taskx.stores.base import Repository
from taskx.tasks.checks import Duration, in_seconds
from taskx.tasks.display import Display
from taskx.tasks.model import TaskFilter, TaskStatus
from taskx.tasks.timing import Timing

# Counting takes at most a twentieth of the time.
_SHARE = 20


def follow(
    repository: Repository,
    drain: Callable[[float], bool] | None,
    timeout: Duration | None,
    timing: Timing,
) -> bool:
    """Show a person what waits, runs and has ended: see :meth:`Queue.follow`.

    ``drain`` is that of a started queue.
    """
    deadline = math.inf if timeout is None else time.monotonic() + in_seconds(timeout)
    first = _counts(repository)
    with Display("tasks", timing=timing) as display:
        while True:
            began = time.monotonic()
            left = _show(display, repository, first)
            pause = max(timing.follow_every, _SHARE * (time.monotonic() - began))
            pause = max(0.0, min(pause, deadline - time.monotonic()))
            if drain is not None:
                over = drain(pause)
            elif not (over := not left and queries.oldest_ready(repository) is None):
                time.sleep(pause)
            if over:
                _show(display, repository, first)
                return True
            if time.monotonic() >= deadline:
                return False


def _counts(repository: Repository) -> dict[TaskStatus, int]:
    return {status: repository.count(TaskFilter(status=status)) for status in TaskStatus}


def _show(display: Display, repository: Repository, first: dict[TaskStatus, int]) -> int:
    """Show the present state; return the number of running tasks."""
    counts = _counts(repository)
    waiting, running = counts[TaskStatus.PENDING], counts[TaskStatus.RUNNING]
    # Some of the tasks that had ended before may have been deleted since.
    new = {status: max(0, counts[status] - first[status]) for status in TaskStatus}
    ended = sum(count for status, count in new.items() if status.finished)
    words = f"{waiting} waiting, {running} running, {new[TaskStatus.FAILED]} failed"
    display.update(ended, words, total=ended + waiting + running)
    return running
