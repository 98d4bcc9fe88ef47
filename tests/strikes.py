"""Exceptions that strike a thread at a chosen point, like exceptions from a signal handler.

CPython runs signal handlers between two instructions of the main thread: after a call, at the start
of a function, and when a loop jumps back. A signal sent at a random moment hits few of these points, and
other ones each time. This module counts the points and raises the exception at the n-th one.
"""

from __future__ import annotations

import _weakrefset
import dis
import gc
import inspect
import itertools
import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

import taskx
from taskx.tasks import in_use


class Strike(BaseException):
    """The exception that a signal handler of an application raises."""


def strike_at(point: int, call: Callable[[], Any]) -> Strike | None:
    """Call a function, and raise :class:`Strike` at the ``point``-th point, counted from 0.

    Points in the functions that it calls count, too.

    Returns:
        The raised exception, even if the function caught it; None if there are fewer points. It has no
        traceback: this would keep the objects in the frames alive, such as connections.
    """
    tracer = _Tracer(point)
    before, handled = sys.gettrace(), sys.exc_info()[1]
    sys._getframe().f_trace_opcodes = True  # Python 3.12 needs it before settrace
    gc.disable()  # finalizers must not add points
    sys.settrace(tracer.enter)
    try:
        call()
    except Strike:
        pass
    finally:
        sys.settrace(before)
        gc.enable()
    if tracer.struck is not None:
        tracer.struck.__traceback__ = tracer.struck.__context__ = None
    assert sys.exc_info()[1] is handled, f"the thread is left in an except block: {tracer.struck}"
    return tracer.struck


def every_strike(call: Callable[[int], Any], first: int = 0, step: int = 1) -> Iterator[Strike]:
    """Call a function repeatedly, and strike each call ``step`` points later than the last one.

    Args:
        call: gets the number of the point. The first call that is not struck ends the loop.
        first: the first point to strike.
        step: 1 for every point.
    """
    point = first
    while (strike := strike_at(point, lambda: call(point))) is not None:  # noqa: B023  (called at once)
        yield strike
        point += step


# An exception in these modules may leave a lock of all threads locked: that of imports or of a log handler.
_UNSAFE = ("<frozen importlib", logging.__file__)
# The callbacks of weak references.
_WEAK = (weakref.__file__, _weakrefset.__file__, in_use.__file__)
_OURS = os.path.dirname(taskx.__file__)


def _imports(frame: FrameType) -> bool:
    """Return True if code runs for an import: what reads the files of modules may leave one open."""
    caller: FrameType | None = frame
    while caller is not None:
        if caller.f_code.co_filename.startswith("<frozen importlib"):
            return True
        caller = caller.f_back
    return False


def _starts_a_thread(frame: FrameType) -> bool:
    """Return True if code runs for ``Thread.start``: an exception may leave that thread hanging.

    It takes the lock of an event that the new thread sets first.
    """
    caller: FrameType | None = frame
    while caller is not None and caller.f_code.co_filename == threading.__file__:
        if caller.f_code.co_name == "start":
            return True
        caller = caller.f_back
    return False


class _Tracer:
    def __init__(self, point: int) -> None:
        self._left = point
        self._in_finalizer = False  # in a weakref.finalize whose object has gone
        self.struck: Strike | None = None

    def enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        file = frame.f_code.co_filename
        if file == __file__ or self._in_finalizer:
            return None
        if file.startswith(_UNSAFE) or (not file.startswith(_OURS) and _imports(frame)):
            return None
        if file == threading.__file__ and _starts_a_thread(frame):
            return None
        name = frame.f_code.co_name
        # Python would print the exception and go on.
        if name == "__del__" or (name.endswith("remove") and file in _WEAK):
            return None
        if name == "__call__" and file == weakref.__file__ and frame.f_locals.get("_") is not None:
            self._in_finalizer = True
            return self._end_of_finalizer
        # A generator may be entered only to be closed.
        if not frame.f_code.co_flags & inspect.CO_GENERATOR:
            self._pass(frame)
        calls = _calls(frame.f_code)
        called = False

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal called
            if event == "exception":  # no signal handler runs after a call that raised
                called = False
            elif event == "opcode":
                if called:
                    self._pass(frame)
                called = frame.f_lasti in calls
            return trace

        frame.f_trace = trace  # Python 3.13 needs it before the next line
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return trace

    def _end_of_finalizer(self, frame: FrameType, event: str, argument: Any) -> Any:
        self._in_finalizer = event != "return"
        return self._end_of_finalizer

    def _pass(self, frame: FrameType) -> None:
        if self._left == 0 and self.struck is None:
            code = frame.f_code
            self.struck = Strike(f"in {code.co_name} ({code.co_filename}:{frame.f_lineno})")
            raise self.struck
        self._left -= 1


_JUMPS_BACK = ("JUMP_BACKWARD", "JUMP_ABSOLUTE")
_known: dict[CodeType, frozenset[int]] = {}


def _calls(code: CodeType) -> frozenset[int]:
    """Return the offsets of the instructions after which CPython may run a signal handler.

    CPython runs the handler as a part of that instruction; this module raises at the next one. So both
    must be inside the same ``except`` or ``with`` block. For example, the instruction after the call in
    ``return f()`` is no longer inside the ``with`` block.
    """
    if code not in _known:
        instructions = list(dis.get_instructions(code))
        handlers = _handlers(code)
        _known[code] = frozenset(
            instruction.offset
            for instruction, following in itertools.pairwise(instructions)
            if instruction.opname in _JUMPS_BACK
            or (
                _is_call(instruction.opname)
                and handlers.get(instruction.offset) == handlers.get(following.offset)
            )
        )
    return _known[code]


def _is_call(opname: str) -> bool:
    """Return True if an instruction is a call. An intrinsic is none: it works inside the interpreter."""
    return opname.startswith("CALL") and "INTRINSIC" not in opname


def _handlers(code: CodeType) -> dict[int, int]:
    """Map each instruction that may raise to its handler; empty before Python 3.11."""
    parse = getattr(dis, "_parse_exception_table", lambda code: ())
    return {
        offset: entry.target for entry in parse(code) for offset in range(entry.start, entry.end, 2)
    }
