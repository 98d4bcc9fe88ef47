"""When a task that raised runs again: the policy, and what executors raise to say it themselves."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeGuard

import attrs

from taskx.core.checks import by, check_int, check_number
from taskx.core.errors import ConfigurationError

#: What computes the seconds to wait from the number of the attempt that raised, from 1.
Backoff = Literal["exponential", "linear", "fixed"] | Callable[[int], float]
# 2 ** 900 × MAX_WAIT is still a number, and no jitter makes a NaN of it.
_CURVES: dict[str, Callable[[float, int], float]] = {
    "exponential": lambda base, attempt: base * 2.0 ** min(attempt - 1, 900),
    "linear": lambda base, attempt: base * attempt,
    "fixed": lambda base, attempt: base,
}
#: Longest wait, in seconds: a century, well within the calendar.
MAX_WAIT = 3.2e9


def _names(given: Any, stored: bool = False) -> tuple[str, ...]:
    """Exception classes, or their names, as names that an error can have.

    Stored ones are left as they are: another Python may know other builtins.
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
    """The full name of the class that a text names."""
    name = _name(text).removeprefix("builtins.")
    # A class made in a function is named so, too.
    if not all(part.isidentifier() or part == "<locals>" for part in name.split(".")):
        raise ConfigurationError(
            f"retry_on and give_up_on: {text!r} cannot be the name of an exception class, which is "
            "'module.Class', or of a builtin the name alone"
        )
    module, _, attribute = name.rpartition(".")
    found = getattr(sys.modules.get(module or "builtins"), attribute, None)
    if _is_exception(found):
        return full_name(found)
    if not module:
        raise ConfigurationError(
            f"retry_on and give_up_on: {text!r} is no builtin exception class; write that of a "
            "module as 'module.Class'"
        )
    return name


def _is_exception(thing: Any) -> TypeGuard[type[BaseException]]:
    return isinstance(thing, type) and issubclass(thing, BaseException)


def full_name(error: type) -> str:
    """``module.Class``; of a builtin the name alone."""
    module, name = error.__module__, error.__qualname__
    return name if module == "builtins" else f"{module}.{name}"


def names_of(error: type[BaseException]) -> list[str]:
    """The full names of a class and of its bases."""
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
        max_attempts: attempts that may raise before the task is failed, the first one included.
        backoff: how the wait grows: ``exponential`` (``base`` × 1, 2, 4, 8 …), ``linear`` (``base`` ×
            1, 2, 3 …), ``fixed`` (``base``), or a function that is given the number of the attempt
            that raised and returns seconds.
        base: seconds that the wait is made of.
        max_delay: the longest wait, in seconds.
        jitter: a wait is longer or shorter by up to this fraction of itself, by chance, so that what
            failed together does not come back together. A wait never exceeds ``max_delay``: one that
            has reached it is shorter by up to this fraction, by chance.
        retry_on: the only exceptions after which there is another attempt; empty for all. Classes,
            or their names (``"requests.exceptions.Timeout"``, for a builtin ``"OSError"``);
            subclasses are meant, too. If the module is imported already, any name will do by which
            it has the class (``"requests.Timeout"``). A time-out counts as ``TimeoutError``.
        give_up_on: exceptions after which there is none; they win over ``retry_on``.

    Raises:
        ConfigurationError: an argument is not valid; the message names it.
    """

    max_attempts: int = attrs.field(default=3, validator=by(check_int, 1))
    backoff: Backoff = attrs.field(default="exponential", validator=_backoff, kw_only=True)
    base: float = attrs.field(default=1.0, validator=by(check_number), kw_only=True)
    max_delay: float = attrs.field(default=3600.0, validator=by(check_number), kw_only=True)
    jitter: float = attrs.field(default=0.1, validator=_fraction, kw_only=True)
    retry_on: tuple[str, ...] = attrs.field(default=(), converter=_names, kw_only=True)
    give_up_on: tuple[str, ...] = attrs.field(default=(), converter=_names, kw_only=True)

    def retries(self, error: type[BaseException]) -> bool:
        """Whether there is another attempt after an exception of that class."""
        return not (self.retry_on or self.give_up_on) or self.allows(names_of(error))

    def allows(self, names: Iterable[str]) -> bool:
        """The same, after an exception of a class of which the names are known: its own and its bases'."""
        known = set(names)
        if not known.isdisjoint(self.give_up_on):
            return False
        return not self.retry_on or not known.isdisjoint(self.retry_on)

    def delay(self, attempt: int, chance: float) -> float:
        """Seconds to wait after the attempt of that number, from 1.

        Args:
            chance: from 0 (the shortest wait that ``jitter`` allows) to 1 (the longest).

        Raises:
            ConfigurationError: a ``backoff`` of one's own returned no number of seconds.
        """
        if callable(self.backoff):
            seconds = check_number(self.backoff(attempt), "what backoff returns")
        else:
            seconds = _CURVES[self.backoff](self.base, attempt)
        # Jitter shortens the longest wait, too: else a thousand tasks that wait for it come back together.
        seconds = min(seconds, self.max_delay)
        shortest = seconds * (1 - self.jitter)
        longest = min(seconds * (1 + self.jitter), self.max_delay)
        return min(shortest + chance * (longest - shortest), self.max_delay)

    def to_dict(self) -> dict[str, Any]:
        """The policy as JSON values.

        Raises:
            ConfigurationError: its ``backoff`` is a function, which no store can hold.
        """
        if callable(self.backoff):
            raise ConfigurationError(
                "a retry policy whose backoff is a function cannot be stored with a task: "
                "give it to the executor"
            )
        return attrs.asdict(self, value_serializer=_listed)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RetryPolicy:
        """The policy that :meth:`to_dict` gave; unknown names are ignored.

        Raises:
            ConfigurationError: a value is not valid.
        """
        given = {name: data[name] for name in _FIELDS if name in data}
        errors = {name: _names(given.pop(name), stored=True) for name in _ERRORS if name in given}
        policy = cls(**given)
        for name, names in errors.items():
            object.__setattr__(policy, name, names)  # past the judgement on what somebody writes
        return policy


_FIELDS = tuple(attrs.fields_dict(RetryPolicy))
_ERRORS = ("retry_on", "give_up_on")


def _listed(_: Any, __: Any, value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


# --- what an executor raises


class Retry(Exception):
    """Raised by an executor: the attempt failed, and another one makes sense, whatever the policy says.

    It spends an attempt; where none is left the task is failed. A derived class whose ``__init__`` does not
    call this one asks for no delay.

    Args:
        reason: what is noted as the error.
        delay: seconds to wait before; None for what the retry policy says, or none at all.

    Raises:
        ConfigurationError: the delay is no number of seconds.
    """

    def __init__(self, reason: str = "", *, delay: float | None = None) -> None:
        super().__init__(reason)
        self.delay = None if delay is None else check_number(delay, "delay of Retry")


class Permanent(Exception):
    """Raised by an executor: no further attempt makes sense; the task is failed at once."""


class Snooze(Exception):
    """Raised by an executor: it is too early; the task runs again later, and no attempt is spent.

    An instance of a derived class whose ``__init__`` does not call this one is an ordinary error.

    Args:
        seconds: how long to wait.

    Raises:
        ConfigurationError: this is no number of seconds.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = check_number(seconds, "seconds of Snooze")

    def __str__(self) -> str:
        if not hasattr(self, "seconds"):  # of a class whose __init__ does not call ours
            return super().__str__()
        return f"again in {self.seconds:g} s"
