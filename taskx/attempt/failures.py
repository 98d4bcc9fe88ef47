"""Errors as text that can be stored, and errors from the child process of an executor.

Code here either runs no code of the exception's class, or catches what that code raises: an error
that escaped from here would leave its task running for ever.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from taskx.attempt.waiting import Parked
from taskx.tasks.checks import check_number
from taskx.tasks.errors import CancelReason, TaskCancelled
from taskx.tasks.lifecycle import Park
from taskx.tasks.model import MAX_NAME
from taskx.tasks.payload import clean_text
from taskx.tasks.retry import Permanent, Retry, Snooze, full_name, names_of

#: Longest error text and traceback that a record keeps, in characters.
MAX_ERROR = 4_000
MAX_TRACEBACK = 20_000


def is_a(error: BaseException, *kinds: type[BaseException]) -> bool:
    """Return True if an error is of one of these kinds.

    Unlike ``isinstance``, this does not ask the object for its ``__class__``.
    """
    return issubclass(type(error), kinds)


def seconds_asked(error: BaseException, attribute: str) -> float | None:
    """Return the wait that a ``Retry`` or ``Snooze`` asks for in ``attribute``; None if it is not a number.

    The class may be a subclass whose ``__init__`` does not call ours.
    """
    try:
        return check_number(getattr(error, attribute), attribute)
    except BaseException:  # noqa: BLE001  (user code)
        return None


def hold_asked(error: BaseException) -> tuple[float, bool | str] | None:
    """Return for how long an error asks to hold limits, and which; None if it is no such ``Snooze``."""
    if not is_a(error, Snooze) or (seconds := seconds_asked(error, "seconds")) is None:
        return None
    try:
        limit = error.limit  # type: ignore[attr-defined]
    except BaseException:  # noqa: BLE001  (user code)
        return None
    return (seconds, limit) if type(limit) in (bool, str) and limit else None


def _reason_told(error: BaseException) -> str | None:
    """Return the reason why a token fired; None if the ``TaskCancelled`` was not raised by a token."""
    try:
        return CancelReason(error.reason).value  # type: ignore[attr-defined]
    except BaseException:  # noqa: BLE001  (user code)
        return None


_name_of = type.__dict__["__name__"].__get__  # ignores what a metaclass says


def error_text(error: BaseException) -> str:
    """Return an exception as text that can be stored, even if its ``str`` raises or is huge."""
    if is_a(error, Remote):
        return error.text  # type: ignore[attr-defined, no-any-return]
    if is_a(error, ChildDied, ChildKilled):
        return str(error)
    name = _name_of(type(error))
    try:
        text = str.__str__(str(error))  # a plain str, even if it returned a subclass
    except BaseException:  # noqa: BLE001  (user code)
        text = "<its str() raised>"
    return clean_text(f"{name}: {text}" if text else name, MAX_ERROR)


def error_type(error: BaseException) -> str:
    """Return the full name of an exception's class; empty if a process ended without an exception."""
    if is_a(error, Remote):
        return error.names[0] if error.names else ""  # type: ignore[attr-defined]
    if is_a(error, ChildDied, ChildKilled):
        return ""
    try:
        return clean_text(full_name(type(error)), MAX_NAME)
    except BaseException:  # noqa: BLE001  (a metaclass of the user's)
        return clean_text(_name_of(type(error)), MAX_NAME)


def traceback_text(error: BaseException, *, skip: int) -> str:
    """Return an exception's traceback as text that can be stored, without the runtime's ``skip`` frames."""
    if is_a(error, Remote, ChildDied):
        return error.trace  # type: ignore[attr-defined, no-any-return]
    try:
        frames = error.__traceback__
        for _ in range(skip):
            frames = frames.tb_next if frames is not None and frames.tb_next else frames
        lines = traceback.format_exception(type(error), error, frames)
        text = "".join(line[:MAX_TRACEBACK] for line in lines)
    except BaseException:  # noqa: BLE001  (user code)
        text = "<the traceback could not be formatted>"
    return shortened(text)


def shortened(text: str) -> str:
    """Return a traceback; if it is too long to be stored, without its middle."""
    if len(text) > MAX_TRACEBACK:
        half = MAX_TRACEBACK // 2
        text = f"{text[:half]}\n…\n{text[-half + 10 :]}"
    return clean_text(text, MAX_TRACEBACK)


# --- between a process and its child process


class Remote(BaseException):
    """An exception from an executor's child process, with its text and traceback."""

    def __init__(self, told: Mapping[str, Any]) -> None:
        BaseException.__init__(self, told["text"])
        self.text: str = told["text"]
        self.trace: str = told["trace"]
        #: The full names of its class and of the bases of its class.
        self.names: Sequence[str] = told["names"]

    def __str__(self) -> str:
        return self.text


class RemoteError(Remote, Exception):
    """An error that the executor raised."""


class _RemotePermanent(RemoteError, Permanent):
    pass


class _RemoteRetry(RemoteError, Retry):
    def __init__(self, told: Mapping[str, Any]) -> None:
        RemoteError.__init__(self, told)
        self.delay = told["value"]


class _RemoteSnooze(RemoteError, Snooze):
    def __init__(self, told: Mapping[str, Any]) -> None:
        RemoteError.__init__(self, told)
        self.seconds, self.limit = told["value"]


class _RemoteCancelled(Remote, TaskCancelled):
    def __init__(self, told: Mapping[str, Any]) -> None:
        Remote.__init__(self, told)
        if told["value"] is not None:  # else user code raised it, without a reason
            self.reason = CancelReason(told["value"])


class _RemoteParked(Remote, Parked):
    def __init__(self, told: Mapping[str, Any]) -> None:
        Remote.__init__(self, told)
        *park, self.step = told["value"]
        self.park, self.until = Park(*park), None


_KINDS: dict[str, type[Remote]] = {
    "parked": _RemoteParked,
    "permanent": _RemotePermanent,
    "retry": _RemoteRetry,
    "snooze": _RemoteSnooze,
    "cancelled": _RemoteCancelled,
}


def told_error(error: BaseException, *, skip: int, main: str) -> dict[str, Any]:
    """Return an exception as JSON values, for :func:`heard_error` in the parent process.

    ``skip`` is as in :func:`traceback_text`. ``main`` is the name that the main module of the parent has
    in this process, empty if it was not imported.
    """
    kind = ""
    value: Any = None
    if is_a(error, Parked):
        kind, value = "parked", [*error.park, error.step]  # type: ignore[attr-defined]
    elif is_a(error, Permanent):
        kind = "permanent"
    elif is_a(error, Retry):
        kind, value = "retry", seconds_asked(error, "delay")
    elif is_a(error, Snooze):
        if (seconds := seconds_asked(error, "seconds")) is not None:
            kind, value = "snooze", hold_asked(error) or (seconds, False)
    elif is_a(error, TaskCancelled):
        kind, value = "cancelled", _reason_told(error)
    return {
        "kind": kind,
        "value": value,
        "text": error_text(error),
        "trace": traceback_text(error, skip=skip),
        "names": _class_names(error, main),
    }


def _class_names(error: BaseException, main: str) -> list[str]:
    """Return the names of an error's class and its bases, as they are in the parent process."""
    try:
        names = names_of(type(error))
        return [re.sub(rf"^{re.escape(main)}\.", "__main__.", name) for name in names]
    except BaseException:  # noqa: BLE001  (a metaclass of the user's)
        return []


def heard_error(told: Mapping[str, Any]) -> BaseException:
    """Return the exception to raise in the parent for an exception of the child."""
    return _KINDS.get(told["kind"], RemoteError)(told)


class ChildDied(Exception):
    """The child process of an executor ended before the executor did, and was not killed by TaskX."""

    def __init__(self, cause: str, trace: str) -> None:
        super().__init__(cause)
        self.trace = trace  #: the stacks of its threads, as far as the process could write them


class ChildKilled(TaskCancelled):
    """The child process of an executor was killed, because it had not heeded its token."""

    def __init__(self, reason: CancelReason, grace: float) -> None:
        super().__init__(reason)
        self.grace = grace

    def __str__(self) -> str:
        return f"its process did not end within {self.grace:g} s and was killed"
