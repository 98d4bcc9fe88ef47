"""Running a task again: the retry policy, and the exceptions by which executors decide themselves."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from numbers import Number
from typing import Any, Literal, TypeGuard, overload

import attrs

from taskx.tasks.checks import Duration, as_seconds, by, check_int, check_number
from taskx.tasks.errors import ConfigurationError

#: The back-off: a named curve, or a function of the number of the attempt that raised (from 1), to seconds.
Backoff = Literal["exponential", "linear", "fixed"] | Callable[[int], float | timedelta]
# 2 ** 900 × MAX_WAIT still fits into a float, so jitter cannot turn it into NaN.
_CURVES: dict[str, Callable[[float, int], float]] = {
    "exponential": lambda base, attempt: base * 2.0 ** min(attempt - 1, 900),
    "linear": lambda base, attempt: base * attempt,
    "fixed": lambda base, attempt: base,
}
#: Longest wait, in seconds: a century, well within the calendar.
MAX_WAIT = 3.2e9


def _names(given: Any, stored: bool = False) -> tuple[str, ...]:
    """Return the full names of exception classes, given as classes or names.

    Stored names are not checked: another version of Python may have other builtins.
    """
    single = isinstance(given, (str, type)) or not isinstance(given, Iterable)
    return tuple(
        _name_of(one) if isinstance(one, str) and not stored else _name(one)
        for one in ((given,) if single else given)
    )


def _name(error: Any) -> str:
    if _is_exception(error):
        return full_name(error)
    if isinstance(error, str) and error:
        return error
    raise ConfigurationError(
        f"retry_on and give_up_on take exception classes or their names, not {error!r}"
    )


def _name_of(text: str) -> str:
    """Return the full name of the class that a text names."""
    name = _name(text).removeprefix("builtins.")
    # "<locals>" is in the name of a class that was made in a function.
    if not all(part.isidentifier() or part == "<locals>" for part in name.split(".")):
        raise ConfigurationError(
            f"retry_on and give_up_on: {text!r} cannot be the name of an exception class; "
            "write 'module.Class', or only 'Class' for a builtin"
        )
    module, _, attribute = name.rpartition(".")
    found = getattr(sys.modules.get(module or "builtins"), attribute, None)
    if _is_exception(found):
        return full_name(found)
    if not module:
        raise ConfigurationError(
            f"retry_on and give_up_on: {text!r} is not a builtin exception class; write a class of a "
            "module as 'module.Class'"
        )
    return name


def _is_exception(thing: Any) -> TypeGuard[type[BaseException]]:
    return isinstance(thing, type) and issubclass(thing, BaseException)


def full_name(error: type) -> str:
    """Return ``module.Class``; for a builtin only ``Class``."""
    module, name = error.__module__, error.__qualname__
    return name if module == "builtins" else f"{module}.{name}"


def names_of(error: type[BaseException]) -> list[str]:
    """Return the full names of a class and of its bases."""
    return [full_name(base) for base in error.__mro__]


def _backoff(_: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if not callable(value) and not (isinstance(value, str) and value in _CURVES):
        raise ConfigurationError(
            f"backoff must be {', '.join(map(repr, _CURVES))} or a function, not {value!r}"
        )


def _fraction(_: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise ConfigurationError(f"jitter must be a fraction from 0 to 1, not {value!r}")


@attrs.frozen
class RetryPolicy:
    """Rules for running a task again after an attempt raised.

    Attributes:
        max_attempts: number of attempts that may raise before the task fails, including the first one.
        backoff: the growth of the wait: ``exponential`` (``base`` × 1, 2, 4, 8 …), ``linear`` (``base`` ×
            1, 2, 3 …), ``fixed`` (``base``), or a function that gets the number of the attempt that
            raised and returns seconds.
        base: the unit of the wait, in seconds or as a ``timedelta``.
        max_delay: the longest wait, in seconds or as a ``timedelta``.
        jitter: each wait is made longer or shorter by a random part of up to this fraction, so that tasks
            that failed together do not run again together. A wait never exceeds ``max_delay``: a wait
            that has reached it is only made shorter.
        retry_on: the only exceptions after which there is another attempt; empty for all. They are given
            as classes or as names (``"requests.exceptions.Timeout"``, or ``"OSError"`` for a builtin) and
            include subclasses. If the module is already imported, any of its names for the class works
            (``"requests.Timeout"``). A time-out counts as ``TimeoutError``.
        give_up_on: exceptions after which there is no other attempt; they win over ``retry_on``.

    Raises:
        ConfigurationError: an argument is not valid; the message names it.
    """

    max_attempts: int = attrs.field(default=3, validator=by(check_int, 1))
    backoff: Backoff = attrs.field(default="exponential", validator=_backoff, kw_only=True)
    base: float = attrs.field(
        default=1.0, converter=as_seconds, validator=by(check_number), kw_only=True
    )
    max_delay: float = attrs.field(
        default=3600.0, converter=as_seconds, validator=by(check_number), kw_only=True
    )
    jitter: float = attrs.field(default=0.1, validator=_fraction, kw_only=True)
    retry_on: tuple[str, ...] = attrs.field(default=(), converter=_names, kw_only=True)
    give_up_on: tuple[str, ...] = attrs.field(default=(), converter=_names, kw_only=True)

    def retries(self, error: type[BaseException]) -> bool:
        """Return True if another attempt follows an exception of this class."""
        return not (self.retry_on or self.give_up_on) or self._allows(names_of(error))

    def _allows(self, names: Iterable[str]) -> bool:
        """Return the same as :meth:`retries`, for a class given by the names of itself and its bases."""
        known = set(names)
        if not known.isdisjoint(self.give_up_on):
            return False
        return not self.retry_on or not known.isdisjoint(self.retry_on)

    def delay(self, attempt: int, chance: float) -> float:
        """Return the seconds to wait after an attempt.

        Args:
            attempt: the number of the attempt, from 1.
            chance: from 0 (the shortest wait that ``jitter`` allows) to 1 (the longest).

        Raises:
            ConfigurationError: a ``backoff`` function did not return a number of seconds.
        """
        if callable(self.backoff):
            seconds = check_number(self.backoff(attempt), "the return value of backoff")
        else:
            seconds = _CURVES[self.backoff](self.base, attempt)
        # Jitter also shortens the longest wait: otherwise many tasks with that wait would run together.
        seconds = min(seconds, self.max_delay)
        shortest = seconds * (1 - self.jitter)
        longest = min(seconds * (1 + self.jitter), self.max_delay)
        return min(shortest + chance * (longest - shortest), self.max_delay)

    def to_dict(self) -> dict[str, Any]:
        """Return the policy as JSON values.

        Raises:
            ConfigurationError: its ``backoff`` is a function, which cannot be stored.
        """
        if callable(self.backoff):
            raise ConfigurationError(
                "a retry policy whose backoff is a function cannot be stored with a task: "
                "give it to the executor"
            )
        return attrs.asdict(self, value_serializer=_listed)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RetryPolicy:
        """Return the policy of a dict from :meth:`to_dict`. Unknown names are ignored.

        Raises:
            ConfigurationError: a value is not valid.
        """
        given = {name: data[name] for name in _FIELDS if name in data}
        errors = {name: _names(given.pop(name), stored=True) for name in _ERRORS if name in given}
        policy = cls(**given)
        for name, names in errors.items():
            object.__setattr__(policy, name, names)  # skips the checks of names that a user writes
        return policy


_FIELDS = tuple(attrs.fields_dict(RetryPolicy))
_ERRORS = ("retry_on", "give_up_on")


def _listed(_: Any, __: Any, value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


# --- exceptions for executors


class Retry(Exception):
    """Raised by an executor: the attempt failed, and another one makes sense, whatever the policy says.

    It uses up an attempt; if none is left, the task fails. A derived class whose ``__init__`` does not call
    this one asks for no delay.

    ``Retry(5)`` waits five seconds, as ``Snooze(5)`` does. ``Retry("busy")``, ``Retry(5, "busy")`` and
    ``Retry("busy", delay=5)`` give a reason.

    Args:
        delay: the time to wait before the next attempt, in seconds or as a ``timedelta``; None for the wait
            of the retry policy, or no wait without a policy.
        reason: the error text to store; by default it names the delay.

    Raises:
        ConfigurationError: the delay is not a number of seconds.
    """

    @overload
    def __init__(self, reason: str = "", *, delay: Duration | None = None) -> None: ...
    @overload
    def __init__(self, delay: float | timedelta, reason: str = "") -> None: ...
    def __init__(self, *given: Any, reason: Any = "", delay: Any = None) -> None:
        for value in given:
            if isinstance(value, (Number, timedelta)):
                twice, delay = delay is not None, value
            else:
                twice, reason = bool(reason), value
            if twice:
                raise TypeError("Retry takes one delay and one reason, as in Retry(5, 'busy')")
        self.delay = None if delay is None else check_number(delay, "delay of Retry")
        super().__init__(reason or ("" if self.delay is None else f"again in {self.delay:g} s"))


class Permanent(Exception):
    """Raised by an executor: another attempt would be pointless. The task fails at once."""


class Snooze(Exception):
    """Raised by an executor: it is too early. The task runs again later, and no attempt is used up.

    With ``limit`` other tasks wait, too: ``raise Snooze(retry_after(response), limit=True)`` holds the
    limits of the task's type until then, in all processes, because an API has refused a call.

    An instance of a derived class whose ``__init__`` does not call this one is an ordinary error.

    Args:
        seconds: the time to wait, in seconds or as a ``timedelta``.
        limit: True for all limits of the task's type, ``"key"`` for the task's key, or the name of a limit.
            It is held for ``Config.max_hold`` seconds at most.

    Raises:
        ConfigurationError: ``seconds`` is not a number of seconds, or ``limit`` is no name.
    """

    def __init__(self, seconds: Duration, *, limit: bool | str = False) -> None:
        super().__init__(seconds)
        self.seconds = check_number(seconds, "seconds of Snooze")
        if not isinstance(limit, bool | str) or limit == "":
            raise ConfigurationError(
                f"limit of Snooze must be True, 'key' or the name of a limit, not {limit!r:.80}"
            )
        self.limit = limit

    def __str__(self) -> str:
        if not hasattr(self, "seconds"):  # a subclass whose __init__ does not call this one
            return super().__str__()
        return f"again in {self.seconds:g} s"
