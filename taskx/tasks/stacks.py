"""The stacks of the threads of this process."""

from __future__ import annotations

import gc
import sys
from operator import methodcaller
from types import FrameType
from typing import Any

_call = methodcaller("__call__")


def top_frames() -> dict[int, FrameType]:
    """Return the innermost frame of every thread.

    Garbage collection is off in the meantime. Up to Python 3.11 a collection could run while the list of
    threads is locked, and its finalizers could release the interpreter lock. A thread that ends at that
    moment then waits for the list while it holds the interpreter lock, and the whole process hangs for ever
    (python/cpython#106883).
    """
    done: list[Any] = []
    try:
        # One step in C: no other thread that does the same, and no signal handler, can run in between.
        done.extend(map(_call, (gc.isenabled, gc.disable, sys._current_frames)))
        return done[-1]  # type: ignore[no-any-return]
    finally:
        if done[:1] == [True]:
            gc.enable()
