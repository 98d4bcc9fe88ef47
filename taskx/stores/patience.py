"""Patience with a lock: when to try a write again that another transaction has locked."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from taskx.stores.base import Locked
from taskx.tasks.timing import Timing

T = TypeVar("T")


def longer(pause: float, timing: Timing) -> float:
    """Return the seconds of the pause after this one: twice as long, up to the longest."""
    return min(2 * pause, timing.longest_lock_pause)


def varied(pause: float) -> float:
    """Make a pause shorter or longer, at random.

    Two transactions that have refused each other would otherwise meet, and do so, again and again.
    """
    return random.uniform(0.2, 1.8) * pause


def patiently(work: Callable[[], T], timing: Timing) -> T:
    """Do work, and do it again as long as somebody keeps a lock and the patience lasts."""
    try:
        return work()
    except Locked as error:
        return try_again(work, error, timing)


def try_again(work: Callable[[], T], error: Locked, timing: Timing) -> T:
    """Do work that raised ``error`` again, until nobody keeps a lock.

    Raises:
        Locked: the patience of the error is over.
    """
    until, pause = time.monotonic() + error.patience, timing.lock_pause
    while time.monotonic() < until:
        time.sleep(varied(pause))
        pause = longer(pause, timing)
        try:
            return work()
        except Locked as again:
            error = again
    raise error
