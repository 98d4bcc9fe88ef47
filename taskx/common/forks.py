"""Forked children: code that is interrupted by a fork notices that it is in the child, and ends it.

An executor that forks returns twice: in the parent, where its attempt goes on, and perhaps in the child,
which has a copy of the worker's stack and of all that the worker knows, and owns nothing of it.
"""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import suppress
from typing import NoReturn

#: The number of forks between the process that imported this module and this one. Comparing a number
#: costs a tenth of asking for the process id.
generation = 0


def _count() -> None:
    global generation
    generation += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_count)


def end_in_child(before: int, error: BaseException | None = None) -> None:
    """End this process if it is a forked child that has come back from the code that forked it.

    Its exit status is that of a program: 0 if the code returned, that of ``sys.exit(n)``, or 1 for any
    other exception, whose traceback goes to stderr. Nothing else is ended in order: it is the parent's.
    ``before`` is the :data:`generation` before the code was called, ``error`` what the code raised.
    """
    if generation != before:
        _end(error)


def _end(error: BaseException | None) -> NoReturn:
    status = 1
    try:
        status = 0 if error is None else _status(error)
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):  # closed or replaced
                stream.flush()
    finally:
        os._exit(status)


def _status(error: BaseException) -> int:
    if not issubclass(type(error), SystemExit):
        traceback.print_exception(type(error), error, error.__traceback__)
        return 1
    code = error.code  # type: ignore[attr-defined]
    if code is None or isinstance(code, int):
        return (code or 0) & 0xFF
    sys.stderr.write(f"{code}\n")
    return 1
