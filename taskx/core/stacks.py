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

    Up to Python 3.11 a garbage collection may come in between, whose finalizers let go of the interpreter
    while all threads are held: one that ends then waits for these, with the interpreter, and the whole
    process stands still for ever (python/cpython#106883).
    """
    done: list[Any] = []
    try:
        # In one step in C: neither another thread that does the same nor a signal handler comes between.
        done.extend(map(_call, (gc.isenabled, gc.disable, sys._current_frames)))
        return done[-1]  # type: ignore[no-any-return]
    finally:
        if done[:1] == [True]:
            gc.enable()
