"""Errors as text that can be stored, and errors that happened in the child process of an executor.

What is asked of an exception here runs no code of its class, or runs it where it may raise: an error
that got out of here would leave its task running for ever.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from taskx.core.checks import check_number
from taskx.core.errors import CancelReason, TaskCancelled
from taskx.core.model import MAX_NAME
from taskx.core.payload import clean_text
from taskx.core.retry import Permanent, Retry, Snooze, full_name, names_of

#: Longest error text and traceback that a record keeps, in characters.
MAX_ERROR = 4_000
MAX_TRACEBACK = 20_000


def is_a(error: BaseException, *kinds: type[BaseException]) -> bool:
    """As ``isinstance``, which also asks the object for its ``__class__``."""
    return issubclass(type(error), kinds)


def seconds_asked(error: BaseException, attribute: str) -> float | None:
    """Return the wait that a ``Retry`` or ``Snooze`` asks for in ``attribute``; None if that is no number.

    The class may be a derived one whose ``__init__`` does not call ours.
    """
    try:
        return check_number(getattr(error, attribute), attribute)
    except BaseException:  # noqa: BLE001  (user code)
        return None


def _reason_told(error: BaseException) -> str | None:
    """Return why a token fired, if it was a token that raised ``TaskCancelled``."""
    try:
        return CancelReason(error.reason).value  # type: ignore[attr-defined]
    except BaseException:  # noqa: BLE001  (user code)
        return None


_name_of = type.__dict__["__name__"].__get__  # whatever a metaclass says


def error_text(error: BaseException) -> str:
    """An exception as text that can be stored, even where its own ``str`` raises or is huge."""
    if is_a(error, Remote):
        return error.text  # type: ignore[attr-defined, no-any-return]
    if is_a(error, ChildDied, ChildKilled):
        return str(error)
    name = _name_of(type(error))
    try:
        text = str.__str__(str(error))  # a plain one, where it returned a kind of its own
    except BaseException:  # noqa: BLE001  (user code)
        text = "<its str() raised>"
    return clean_text(f"{name}: {text}" if text else name, MAX_ERROR)


def error_type(error: BaseException) -> str:
    """Return the full name of an exception's class; empty if a process ended and nothing was raised."""
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
    """A traceback cut in its middle, where it is too long to be stored."""
    if len(text) > MAX_TRACEBACK:
        half = MAX_TRACEBACK // 2
        text = f"{text[:half]}\n…\n{text[-half + 10 :]}"
    return clean_text(text, MAX_TRACEBACK)


# --- over the line between a process and its child


class Remote(BaseException):
    """An exception from an executor's child process, with the text and traceback from there."""

    def __init__(self, told: Mapping[str, Any]) -> None:
        BaseException.__init__(self, told["text"])
        self.text: str = told["text"]
        self.trace: str = told["trace"]
        #: The full names of its class and of the bases of that.
        self.names: Sequence[str] = told["names"]

    def __str__(self) -> str:
        return self.text


class RemoteError(Remote, Exception):
    """An error of the executor."""


class _RemotePermanent(RemoteError, Permanent):
    pass


class _RemoteRetry(RemoteError, Retry):
    def __init__(self, told: Mapping[str, Any]) -> None:
        RemoteError.__init__(self, told)
        self.delay = told["value"]


class _RemoteSnooze(RemoteError, Snooze):
    def __init__(self, told: Mapping[str, Any]) -> None:
        RemoteError.__init__(self, told)
        self.seconds = told["value"]


class _RemoteCancelled(Remote, TaskCancelled):
    def __init__(self, told: Mapping[str, Any]) -> None:
        Remote.__init__(self, told)
        if told["value"] is not None:  # else it was raised by hand, with no reason
            self.reason = CancelReason(told["value"])


_KINDS: dict[str, type[Remote]] = {
    "permanent": _RemotePermanent,
    "retry": _RemoteRetry,
    "snooze": _RemoteSnooze,
    "cancelled": _RemoteCancelled,
}


def told_error(error: BaseException, *, skip: int, main: str) -> dict[str, Any]:
    """An exception as JSON values, for :func:`heard_error` in the parent process.

    ``skip`` is as in :func:`traceback_text`; ``main`` is what the main module of the parent is called here,
    empty if it was not imported.
    """
    kind = ""
    value: float | str | None = None
    if is_a(error, Permanent):
        kind = "permanent"
    elif is_a(error, Retry):
        kind, value = "retry", seconds_asked(error, "delay")
    elif is_a(error, Snooze):
        if (value := seconds_asked(error, "seconds")) is not None:
            kind = "snooze"
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
    """The names of its class and bases, as they are in the parent."""
    try:
        names = names_of(type(error))
        return [re.sub(rf"^{re.escape(main)}\.", "__main__.", name) for name in names]
    except BaseException:  # noqa: BLE001  (a metaclass of the user's)
        return []


def heard_error(told: Mapping[str, Any]) -> BaseException:
    """The exception to raise in the parent for one that was raised in the child."""
    return _KINDS.get(told["kind"], RemoteError)(told)


class ChildDied(Exception):
    """The child process of an executor ended by itself before the executor did."""

    def __init__(self, cause: str, trace: str) -> None:
        super().__init__(cause)
        self.trace = trace  #: where its threads were, as far as the process could still say it


class ChildKilled(TaskCancelled):
    """The child process of an executor was killed, as it had not heeded its token."""

    def __init__(self, reason: CancelReason, grace: float) -> None:
        super().__init__(reason)
        self.grace = grace

    def __str__(self) -> str:
        return f"its process did not end within {self.grace:g} s and was killed"
