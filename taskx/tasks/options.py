"""The options of tasks, executors and lists. They are defined only here.

Type checkers see an option as a key of a ``TypedDict``. :data:`CHECKS` has the options that every new
record stores in a column, :class:`Options` those of an executor.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence, Set
from datetime import datetime, timedelta
from typing import Any, Literal, Protocol, TypedDict, get_args

import attrs

from taskx.tasks.checks import Duration, as_seconds, check_int, check_number
from taskx.tasks.clock import LAST, Clock, to_datetime, to_ms, within_calendar
from taskx.tasks.conditions import ParamsFilter
from taskx.tasks.errors import ConfigurationError
from taskx.tasks.model import (
    TaskFilter,
    TaskStatus,
    check_filter,
    check_key,
    check_moment,
    check_name,
)
from taskx.tasks.rate import OF_TYPE, Cost, Limit, LimitScope, rates_of
from taskx.tasks.retry import RetryPolicy
from taskx.tasks.tags import check_tags

MAX_PRIORITY = 1_000_000
#: Most tasks of one call of an executor.
MAX_BATCH = 1000
#: Default grace period, in seconds: the time for an executor to end after its token has fired.
DEFAULT_GRACE = 10.0
#: The place where an executor runs, if not in the worker's thread.
Isolation = Literal["process"]
#: How long a task holds its unique key: until it first starts; until it has ended; as long as its record
#: exists; a number of seconds or a timedelta from its creation, whatever happens to the task.
UniqueScope = Literal["pending", "unfinished", "ever"] | float | timedelta
#: The action of a submit whose unique key another task holds: raise ``DuplicateTask``; return that task's
#: handle; if that task is pending, replace its params and options by those of the new one.
OnConflict = Literal["reject", "return", "replace"]
#: The action for a task whose parent failed for good, was cancelled, or is gone. The default is the first.
OnParentFailure = Literal["cancel", "fail", "run"]


class _HasId(Protocol):
    @property
    def id(self) -> str: ...


class CommonOptions(TypedDict, total=False):
    """The options of maps, submits and executors. Like all options, each may be left out or None."""

    priority: int | None
    max_attempts: int | None
    max_crashes: int | None
    retry: RetryPolicy | None
    tags: Sequence[str] | None


class RunOptions(CommonOptions, total=False):
    """The options of submits and executors."""

    timeout: Duration | None


class _OwnOptions(CommonOptions, total=False):
    created_by: str | None
    cost: Cost | None


class MapOptions(_OwnOptions, total=False):
    """The options of ``submit`` that a map passes on to its new tasks: see ``Queue.map``."""

    concurrency_key: str | Callable[[Any], str | None] | None


class _KeyOptions(_OwnOptions, RunOptions, total=False):
    concurrency_key: str | None
    key: str | None


class ScheduleOptions(_KeyOptions, total=False):
    """The options of ``submit`` that a schedule can give to its tasks: see ``Queue.schedule``."""

    expires: Duration | None


class SubmitOptions(_KeyOptions, total=False):
    """The options of ``submit``: see ``Queue.submit``."""

    expires: Duration | datetime | None
    id: str | None
    run_at: datetime | None
    delay: Duration | None
    unique_key: str | None
    unique_scope: UniqueScope | None
    on_conflict: OnConflict | None
    debounce: Duration | None
    at_most: Duration | None
    depends_on: Sequence[str | _HasId] | None
    on_parent_failure: OnParentFailure | None


#: One rate: ``"100/m"``, ``"90000 tokens/m"``, or a count and a period.
OneRate = str | tuple[int, Duration]


class NamedOptions(TypedDict, total=False):
    """The options of a limit with a name: see ``Queue.limit``."""

    concurrency: int | None
    rate: OneRate | list[OneRate] | None
    burst: int | list[int | None] | None
    share: bool | int | None


class LimitOptions(TypedDict, total=False):
    """The limits of a type, as options of its executor and of ``Queue.tune``."""

    max_concurrency: int | None
    rate: OneRate | list[OneRate] | None
    burst: int | list[int | None] | None
    limit_scope: LimitScope | None


class TuneOptions(LimitOptions, total=False):
    """The limits that ``Queue.tune`` overrides: those of a type, or of a limit with a name."""

    concurrency: int | None
    share: bool | int | None


class PlainOptions(RunOptions, LimitOptions, total=False):
    """The options of an executor of one task at a time."""

    limit: str | Sequence[str] | None
    expires: Duration | None
    capture_log: bool | int | str | None
    isolation: Isolation | None
    grace: Duration | None
    stall: Duration | None
    max_snoozes: int | None
    version: int | str | None
    replace: bool | None


class ExecutorOptions(PlainOptions, total=False):
    """The options of an executor: see ``Queue.executor``."""

    batch: int | None
    wait: Duration | None


class FilterOptions(TypedDict, total=False):
    """The fields of a ``TaskFilter``, for methods that also take them by name, and the age of tasks."""

    type: str | None
    status: TaskStatus | str | None
    created_by: str | None
    start_date: datetime | None
    end_date: datetime | None
    older: Duration | None
    newer: Duration | None
    error: str | None
    error_type: str | None
    id_prefix: str | None
    params: ParamsFilter | None
    parent: str | None
    tag: str | Sequence[str] | None
    flow: str | None
    offset: int
    limit: int


def refuse_unknown(given: Mapping[str, Any], known: Any, what: str, hint: str = "") -> None:
    """Raise ``TypeError`` for options that the ``TypedDict`` does not have."""
    refuse_others(given, known.__optional_keys__, what, hint)


def refuse_others(given: Mapping[str, Any], known: Set[str], what: str, hint: str = "") -> None:
    """Raise ``TypeError`` for options that have other names. The message names similar ones."""
    if unknown := sorted(given.keys() - known):
        from difflib import get_close_matches  # slow to load

        foreign = [f"for {key} write {_ours(key, known)}" for key in unknown if key in _ELSEWHERE]
        others = [key for key in unknown if key not in _ELSEWHERE]
        close = [get_close_matches(key, known, n=1) for key in others]
        if similar := ", ".join(repr(names[0]) for names in close if names):
            foreign.append(f"did you mean {similar}?")
        meant = f" ({'; '.join(foreign)})" if foreign else ""
        raise TypeError(f"{what}() has no option {', '.join(unknown)}{meant}{hint}")


# The words of other libraries, and what stands for each here: the first option that the method has, or
# the last one.
_RETRY = ("backoff=RetryPolicy(…)", "retry=RetryPolicy(…)")
_ELSEWHERE: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("retries", "max_retries"), ("max_attempts=…, one more",)),
    **dict.fromkeys(
        ("autoretry_for", "default_retry_delay", "retry_backoff", "retry_delay"), _RETRY
    ),
    **dict.fromkeys(("job_timeout", "soft_time_limit", "time_limit"), ("timeout=…",)),
    "rate_limit": ("rate=…",),
    "countdown": ("run_after=…", "delay=…"),
    "eta": ("run_after=…", "run_at=…"),
    **dict.fromkeys(("job_id", "task_id"), ("id=…",)),
    "bind": ("takes_context=True", "a first parameter ctx"),
    **dict.fromkeys(("concurrency", "workers"), ("worker_num=…", "max_concurrency=…")),
}


def _ours(word: str, known: Set[str]) -> str:
    """Return what stands for a word of another library, with the place that takes it if that is another."""
    texts = _ELSEWHERE[word]
    text = next((text for text in texts if text.partition("=")[0] in known), texts[-1])
    option = text.partition("=")[0]
    if option in known or "=" not in text:
        return text
    return f"{text} of {'submit' if option in SubmitOptions.__optional_keys__ else 'the decorator'}"


# --- checks

#: Raises ConfigurationError if the value of the named option is not valid; returns the value to store.
Check = Callable[[Any, str], Any]


def _count(value: Any, what: str) -> int:
    return check_int(value, what, 1)


def _snoozes(value: Any, what: str) -> int:
    return check_int(value, what, 0)


def _batch(value: Any, what: str) -> int:
    return check_int(value, what, 1, MAX_BATCH)


def _priority(value: Any, what: str) -> Any:
    if value or type(value) is not int:  # saves the call for the usual 0; False is not a number
        check_int(value, what, -MAX_PRIORITY, MAX_PRIORITY)
    return value


def check_time(value: Any, what: str) -> Any:
    """Raise ConfigurationError if a value is not a moment that a record can keep."""
    check_moment(value, what)
    if to_ms(value) > LAST:
        raise ConfigurationError(f"{what} must be before the year 10000 in UTC, not {value}")
    return value


def _timeout(value: Any, what: str) -> float:
    seconds = check_number(value, what)
    if seconds == 0:
        raise ConfigurationError(f"{what} must be more than 0 seconds; use None for no time-out")
    return seconds


def lifetime(value: Any, what: str = "expires") -> int:
    """Return a duration as whole milliseconds, at least 1.

    Raises:
        ConfigurationError: the value is neither a number of seconds above 0 nor such a ``timedelta``.
    """
    seconds = check_number(value, what)
    if seconds == 0:
        raise ConfigurationError(f"{what} must be more than 0 seconds")
    return max(1, round(min(seconds * 1000, LAST)))


def _policy(value: Any, what: str) -> Any:
    if not isinstance(value, RetryPolicy):
        raise ConfigurationError(f"{what} must be a RetryPolicy, not {value!r}")
    return value


def log_level(value: Any, what: str = "capture_log") -> int | None:
    """Return the lowest level whose log lines are captured; None for no capture.

    Raises:
        ConfigurationError: the value is not a level.
    """
    if value is None or value is False:
        return None
    if value is True:
        return logging.INFO
    level = logging.getLevelName(value.upper()) if isinstance(value, str) else value
    if not isinstance(level, int):
        raise ConfigurationError(f"{what} must be True or a level such as 'WARNING', not {value!r}")
    return level


def _flag(value: Any, what: str) -> None:
    if not isinstance(value, bool):
        raise ConfigurationError(f"{what} must be True or False, not {value!r}")


def _tags(value: Any) -> tuple[str, ...] | None:
    return None if value is None else check_tags(value) or None


def _version(value: Any) -> str | None:
    if value is None or (type(value) is str and value != ""):
        return None if value is None else check_name(value, "version")
    if type(value) is not int:
        raise ConfigurationError(f"version must be a whole number or a text, not {value!r}")
    return str(value)


def one_of(literal: Any) -> Callable[[Any, str], None]:
    """Return a check that accepts only the values of a ``Literal``."""
    known = get_args(literal)
    names = ", ".join(map(repr, known)) + " or None"

    def check(value: Any, what: str) -> None:
        if value not in known:
            raise ConfigurationError(f"{what} must be {names}, not {value!r}")

    return check


#: The checks of the options that every new record stores in a column of the same name, in column order.
CHECKS: Mapping[str, Check] = {
    "priority": _priority,
    "run_at": check_time,
    "timeout": _timeout,
    "max_attempts": _count,
    "max_crashes": _count,
    "retry": _policy,
}


def check_limit_name(value: Any, what: str) -> str:
    """Return the name of a limit. Raises ``ConfigurationError`` if it is not valid."""
    name = check_key(value, what)
    if name.startswith(OF_TYPE):
        raise ConfigurationError(
            f"{what} must not begin with {OF_TYPE!r}: the limits of a type have such names"
        )
    return name


def _limits(value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    names = [value] if isinstance(value, str) else value
    if isinstance(names, Mapping) or not isinstance(names, Sequence | Set):
        raise ConfigurationError(f"limit must be the name of a limit, or a list, not {value!r:.80}")
    found = tuple(dict.fromkeys(check_limit_name(name, "limit") for name in names))
    if keyed := [name for name in found if ":" in name]:
        raise ConfigurationError(
            f"limit must not be {keyed[0]!r}: a limit whose name has a colon holds for keys"
        )
    return found or None


#: The options that are fixed when a task starts: the task's own value, else the executor's, else this one.
FALLBACKS: Mapping[str, Any] = {"timeout": None, "max_attempts": 1, "max_crashes": 3}


def checked(holder: object, checks: Mapping[str, Check]) -> dict[str, Any]:
    """Return an object's options that are not None, as they are stored.

    Raises ConfigurationError for an invalid one.
    """
    said = {}
    for name, check in checks.items():
        value = getattr(holder, name)
        if value is not None:
            said[name] = check(value, name)
    return said


@attrs.frozen(kw_only=True)
class Options:
    """The options of an executor; None for each one that was not given. See ``Queue.executor``."""

    max_attempts: int | None = None
    max_crashes: int | None = None
    timeout: float | None = attrs.field(default=None, converter=as_seconds)
    priority: int | None = None
    retry: RetryPolicy | None = None
    tags: Sequence[str] | None = attrs.field(default=None, converter=_tags)
    expires: float | None = attrs.field(default=None, converter=as_seconds)
    capture_log: bool | int | str | None = None
    isolation: Isolation | None = None
    grace: float | None = attrs.field(default=None, converter=as_seconds)
    stall: float | None = attrs.field(default=None, converter=as_seconds)
    max_snoozes: int | None = None
    max_concurrency: int | None = None
    rate: OneRate | list[OneRate] | None = None
    burst: int | list[int | None] | None = None
    limit_scope: LimitScope | None = None
    limit: tuple[str, ...] | None = attrs.field(default=None, converter=_limits)
    version: str | None = attrs.field(default=None, converter=_version)
    replace: bool | None = None
    batch: int | None = None
    wait: float | None = attrs.field(default=None, converter=as_seconds)

    def __attrs_post_init__(self) -> None:
        checked(self, _OF_EXECUTOR)
        rates_of(self.rate, self.burst)

    @property
    def task_defaults(self) -> dict[str, Any]:
        """The executor's values for options that a task leaves open."""
        said = {name: getattr(self, name) for name in FALLBACKS}
        if self.max_attempts is None and self.retry is not None:
            said["max_attempts"] = self.retry.max_attempts
        return {name: value for name, value in said.items() if value is not None}

    @property
    def own_limit(self) -> Limit | None:
        """The limits for tasks that run at once and for starts per time; None for no limits.

        Raises:
            ConfigurationError: an option refers to a limit that was not given.
        """
        if self.max_concurrency is None and self.rate is None:
            if self.limit_scope is not None or self.burst is not None:
                raise ConfigurationError(
                    "limit_scope requires max_concurrency or rate; burst requires rate"
                )
            return None
        if self.burst is not None and self.rate is None:
            raise ConfigurationError("burst requires rate")
        rates = rates_of(self.rate, self.burst)
        return Limit(self.max_concurrency, rates, self.limit_scope or "node")

    @property
    def patience(self) -> float:
        """The grace period: seconds for the executor to end after its token has fired."""
        return DEFAULT_GRACE if self.grace is None else self.grace

    def overridden(self, by: Options) -> Options:
        """Return these options, with every value that ``by`` gives replaced."""
        given = {k: v for k, v in attrs.asdict(by, recurse=False).items() if v is not None}
        return attrs.evolve(self, **given)


_OF_EXECUTOR: Mapping[str, Check] = {
    **{name: check for name, check in CHECKS.items() if name in RunOptions.__optional_keys__},
    "expires": lifetime,
    "capture_log": log_level,
    "isolation": one_of(Isolation),
    "grace": check_number,
    "stall": _timeout,
    "max_snoozes": _snoozes,
    "max_concurrency": _count,
    "limit_scope": one_of(LimitScope),
    "replace": _flag,
    "batch": _batch,
    "wait": check_number,
}


def filter_of(
    filter: TaskFilter | None, fields: Mapping[str, Any], what: str, clock: Clock
) -> TaskFilter:
    """Return the filter that a method was given as an object or by its fields.

    Raises:
        ConfigurationError: both were given, or a value is not valid.
        TypeError: a field is unknown.
    """
    refuse_unknown(fields, FilterOptions, what)
    if not fields:
        return check_filter(filter)
    if filter is not None:
        raise ConfigurationError(
            f"{what}() takes a TaskFilter or its fields, not both: move {', '.join(fields)} into the "
            "TaskFilter"
        )
    return TaskFilter(**_dated(fields, clock.now_ms()))


_LONG_AGO = 1e11  # seconds; the calendar does not go back that far
#: The fields for the age of a task, each with the date that means the same.
AGES: Mapping[str, str] = {"older": "end_date", "newer": "start_date"}


def _dated(fields: Mapping[str, Any], now: int) -> dict[str, Any]:
    """Return the fields with dates instead of ages."""
    dated = {name: value for name, value in fields.items() if name not in AGES}
    for age, date in AGES.items():
        if fields.get(age) is None:
            continue
        if dated.get(date) is not None:
            raise ConfigurationError(f"{age} and {date} say the same: give only one of them")
        ago = int(min(check_number(fields[age], age), _LONG_AGO) * 1000)
        dated[date] = to_datetime(within_calendar(now - ago))
    return dated


def options_of(given: Mapping[str, Any]) -> Options:
    """Return the options given to an executor. Raises TypeError for unknown ones."""
    refuse_unknown(given, ExecutorOptions, "executor")
    return Options(**given)
