"""The options of tasks and executors, which are defined here and nowhere else.

A key of a ``TypedDict`` is what type checkers see of an option. :data:`CHECKS` has those that a record
keeps in a column from the start, :class:`Options` those of an executor.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal, Protocol, TypedDict, get_args

import attrs

from taskx.core.checks import check_int, check_number
from taskx.core.clock import LAST, to_ms
from taskx.core.errors import ConfigurationError
from taskx.core.model import check_moment
from taskx.core.rate import Limit, LimitScope, rate_of
from taskx.core.retry import RetryPolicy

MAX_PRIORITY = 1_000_000
#: Seconds that an executor is given after its token has fired, where nobody says otherwise.
DEFAULT_GRACE = 10.0
#: Where an executor runs, if not in the worker's thread.
Isolation = Literal["process"]
#: How long a unique key is held: until the task first starts; until it has ended; as long as its record is
#: kept; so many seconds from its creation, whatever becomes of it.
UniqueScope = Literal["pending", "unfinished", "ever"] | float
#: What a submit does whose key is held: raise ``DuplicateTask``; give the handle of the task that holds it;
#: have that one, if it is pending, take over params and options of the new one.
OnConflict = Literal["reject", "return", "replace"]
#: What becomes of a task whose parent failed for good, was cancelled, or is gone; the first one where
#: nobody says.
OnParentFailure = Literal["cancel", "fail", "run"]


class _HasId(Protocol):
    @property
    def id(self) -> str: ...


class CommonOptions(TypedDict, total=False):
    """The options of maps, submits and executors; as all options, each may be left out or None."""

    priority: int | None
    max_attempts: int | None
    max_crashes: int | None
    retry: RetryPolicy | None


class RunOptions(CommonOptions, total=False):
    """The options of submits and executors."""

    timeout: float | None


class MapOptions(CommonOptions, total=False):
    """The options of ``submit`` that count for the new tasks of a map: see ``Queue.map``."""

    created_by: str | None


class ScheduleOptions(MapOptions, RunOptions, total=False):
    """The options of ``submit`` that a schedule may give its tasks: see ``Queue.schedule``."""

    concurrency_key: str | None


class SubmitOptions(ScheduleOptions, total=False):
    """The options of ``submit``: see ``Queue.submit``."""

    id: str | None
    run_at: datetime | None
    delay: float | None
    unique_key: str | None
    unique_scope: UniqueScope | None
    on_conflict: OnConflict | None
    depends_on: Sequence[str | _HasId] | None
    on_parent_failure: OnParentFailure | None


class ExecutorOptions(RunOptions, total=False):
    """The options of an executor: see ``Queue.executor``."""

    capture_log: bool | int | str | None
    isolation: Isolation | None
    grace: float | None
    max_concurrency: int | None
    rate: str | tuple[int, float] | None
    burst: int | None
    limit_scope: LimitScope | None


def refuse_unknown(given: Mapping[str, Any], known: Any, what: str, hint: str = "") -> None:
    """Raise ``TypeError`` for options that a ``TypedDict`` does not have."""
    if unknown := given.keys() - known.__optional_keys__:
        raise TypeError(f"{what}() has no option {', '.join(sorted(unknown))}{hint}")


# --- what each must be

Check = Callable[[Any, str], object]


def _count(value: Any, what: str) -> None:
    check_int(value, what, 1)


def _priority(value: Any, what: str) -> None:
    if value or type(value) is not int:  # no call for the usual 0; but False is no number
        check_int(value, what, -MAX_PRIORITY, MAX_PRIORITY)


def _run_at(value: Any, what: str) -> None:
    check_moment(value, what)
    if to_ms(value) > LAST:
        raise ConfigurationError(f"{what} is beyond the calendar, in UTC: {value}")


def _timeout(value: Any, what: str) -> None:
    if check_number(value, what) == 0:
        raise ConfigurationError(f"{what} must be above 0 seconds; None means no time-out")


def _policy(value: Any, what: str) -> None:
    if not isinstance(value, RetryPolicy):
        raise ConfigurationError(f"{what} must be a RetryPolicy, not {value!r}")


def log_level(value: Any, what: str = "capture_log") -> int | None:
    """From which level on an executor has lines kept, None for none; ConfigurationError for no level."""
    if value is None or value is False:
        return None
    if value is True:
        return logging.INFO
    level = logging.getLevelName(value.upper()) if isinstance(value, str) else value
    if not isinstance(level, int):
        raise ConfigurationError(
            f"{what} must be True, or a level such as 'WARNING', not {value!r}"
        )
    return level


def one_of(literal: Any) -> Check:
    """A check whether a value is one of a ``Literal``."""
    known = get_args(literal)
    names = ", ".join(map(repr, known)) + " or None"

    def check(value: Any, what: str) -> None:
        if value not in known:
            raise ConfigurationError(f"{what} must be {names}, not {value!r}")

    return check


#: What an option must be, for those that a record keeps in a column of that name from the start, in the
#: order of columns.
CHECKS: Mapping[str, Check] = {
    "priority": _priority,
    "run_at": _run_at,
    "timeout": _timeout,
    "max_attempts": _count,
    "max_crashes": _count,
    "retry": _policy,
}
#: Those that are settled when a task starts, as its executor says, where the task says nothing; and what
#: they are where its executor says nothing either.
UNLESS_SAID: Mapping[str, Any] = {"timeout": None, "max_attempts": 1, "max_crashes": 3}


def checked(holder: object, checks: Mapping[str, Check]) -> dict[str, Any]:
    """The options that somebody has, without those that are None; ConfigurationError for an invalid one."""
    said = {}
    for name, check in checks.items():
        value = getattr(holder, name)
        if value is not None:
            check(value, name)
            said[name] = value
    return said


@attrs.frozen(kw_only=True)
class Options:
    """The options of an executor, each None where it was not given: see ``Queue.executor``."""

    max_attempts: int | None = None
    max_crashes: int | None = None
    timeout: float | None = None
    priority: int | None = None
    retry: RetryPolicy | None = None
    capture_log: bool | int | str | None = None
    isolation: Isolation | None = None
    grace: float | None = None
    max_concurrency: int | None = None
    rate: str | tuple[int, float] | None = None
    burst: int | None = None
    limit_scope: LimitScope | None = None

    def __attrs_post_init__(self) -> None:
        checked(self, _OF_EXECUTOR)
        rate_of(self.rate, self.burst)

    @property
    def settled(self) -> dict[str, Any]:
        """What its tasks are given that say nothing themselves."""
        said = {name: getattr(self, name) for name in UNLESS_SAID}
        if self.max_attempts is None and self.retry is not None:
            said["max_attempts"] = self.retry.max_attempts
        return {name: value for name, value in said.items() if value is not None}

    @property
    def limit(self) -> Limit | None:
        """How many run at once and start in a time; None where there is no limit.

        ``ConfigurationError`` if an option belongs to a limit that is not there.
        """
        if self.max_concurrency is None and self.rate is None:
            if self.limit_scope is not None or self.burst is not None:
                raise ConfigurationError(
                    "limit_scope and burst are of a limit: give max_concurrency or rate, too"
                )
            return None
        if self.burst is not None and self.rate is None:
            raise ConfigurationError("burst is of a rate: give one, too")
        rate = rate_of(self.rate, self.burst)
        return Limit(self.max_concurrency, rate, self.limit_scope or "node")

    @property
    def patience(self) -> float:
        """Seconds that an executor is given after its token has fired."""
        return DEFAULT_GRACE if self.grace is None else self.grace

    def overridden(self, by: Options) -> Options:
        """The same, but for what other options say."""
        given = {k: v for k, v in attrs.asdict(by, recurse=False).items() if v is not None}
        return attrs.evolve(self, **given)


_OF_EXECUTOR: Mapping[str, Check] = {
    **{name: CHECKS[name] for name in RunOptions.__optional_keys__},
    "capture_log": log_level,
    "isolation": one_of(Isolation),
    "grace": check_number,
    "max_concurrency": _count,
    "limit_scope": one_of(LimitScope),
}


def options_of(given: Mapping[str, Any]) -> Options:
    """The options that were given to an executor; TypeError names those that there are not."""
    refuse_unknown(given, ExecutorOptions, "executor")
    return Options(**given)
