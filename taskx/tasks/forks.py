"""Forked children: after a fork, code can notice that it runs in the child, and end the child.

An executor that forks may return twice: in the parent, where its attempt goes on, and in the child. The
child has a copy of the worker's stack and memory, but owns nothing of it.
"""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import suppress
from typing import NoReturn

#: The number of forks between the process that imported this module and this process. Comparing it
#: costs a tenth of the time of ``os.getpid()``.
generation = 0


def _count() -> None:
    global generation
    generation += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_count)


def end_in_child(before: int, error: BaseException | None = None) -> None:
    """End this process if it is a forked child that has returned from the code that forked it.

    The exit status is that of a program: 0 if the code returned, ``n`` for ``sys.exit(n)``, and 1 for any
    other exception, whose traceback goes to stderr. Nothing else is cleaned up, as it belongs to the
    parent. ``before`` is the :data:`generation` before the code was called, ``error`` the code's exception.
    """
    if generation != before:
        _end(error)


def _end(error: BaseException | None) -> NoReturn:
    status = 1
    try:
        status = 0 if error is None else _status(error)
        flush_streams()
    finally:
        os._exit(status)


def flush_streams() -> None:
    """Write what stdout and stderr hold, for a process that ends at once."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # the program may have closed or replaced it
            stream.flush()


def _status(error: BaseException) -> int:
    if not issubclass(type(error), SystemExit):
        traceback.print_exception(type(error), error, error.__traceback__)
        return 1
    code = error.code  # type: ignore[attr-defined]
    if code is None or isinstance(code, int):
        return (code or 0) & 0xFF
    sys.stderr.write(f"{code}\n")
    return 1
