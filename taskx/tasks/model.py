"""The records: a task, an attempt, and the filter for lists of tasks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from enum import Enum
from typing import Any, NamedTuple

import attrs
from attrs.validators import optional

from taskx.tasks.checks import by
from taskx.tasks.clock import to_datetime, to_ms
from taskx.tasks.conditions import Condition, as_conditions, contains, meets
from taskx.tasks.errors import ConfigurationError
from taskx.tasks.payload import is_encodable
from taskx.tasks.rate import Cost
from taskx.tasks.retry import RetryPolicy
from taskx.tasks.tables import html_table, line
from taskx.tasks.tags import FLOW, as_tags, check_flow

#: Longest id, type and created_by, in characters: all three are keys of indexes.
MAX_NAME = 255


class TaskStatus(str, Enum):
    """The status of a task: one of these five."""

    PENDING = "pending"  #: stored, and not started or waiting to start again
    RUNNING = "running"  #: an executor works on it
    COMPLETED = "completed"  #: its executor returned
    FAILED = "failed"  #: it has no attempts left, or it crashed too often
    CANCELLED = "cancelled"  #: cancelled before it started, or stopped by its token

    def __str__(self) -> str:
        return self.value

    @property
    def finished(self) -> bool:
        """True for completed, failed and cancelled."""
        return self in _FINISHED


_FINISHED = frozenset({TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.CANCELLED})


def its_type(thing: object) -> str:
    """Return advice for a message: to give the type of a thing, such as an executor, if it has one."""
    kind = getattr(thing, "type", None)
    return f"; give its type, {kind!r}" if isinstance(kind, str) else ""


def check_name(value: Any, what: str) -> str:
    """Return a text that is valid as id, type or created_by. Raises ConfigurationError if it is not."""
    if type(value) is str and value.isascii() and len(value) <= MAX_NAME and "\0" not in value:
        return value
    if not isinstance(value, str):
        hint = its_type(value) if what == "type" else ""
        raise ConfigurationError(f"{what} must be a str, not {type(value).__name__}{hint}")
    text = value if type(value) is str else str.__str__(value)
    if len(text) > MAX_NAME:
        raise ConfigurationError(f"{what} has {len(text)} characters, more than {MAX_NAME}")
    if "\0" in text or not (text.isascii() or is_encodable(text)):
        raise ConfigurationError(
            f"{what} {text!a} contains a NUL character or a lone surrogate; remove it"
        )
    return text


def check_key(value: Any, what: str) -> str:
    """Return a valid name that is not empty. Raises ConfigurationError if it is neither."""
    if type(value) is str and 0 < len(value) <= MAX_NAME and value.isascii() and "\0" not in value:
        return value
    text = check_name(value, what)
    if not text:
        raise ConfigurationError(f"{what} must not be empty")
    return text


@attrs.frozen(kw_only=True)
class Attempt:
    """One run of a task.

    Attributes:
        outcome: ``completed``, ``failed``, ``cancelled``, ``retried``, ``snoozed``, ``interrupted``,
            ``crashed`` or, while it runs, an empty string. ``requeued`` is no run: it says what a requeue
            changed before the next one.
        started_at: the time of its start; None for a requeue.
        ended_at: the time of its end, or of the requeue; None while it runs.
        worker: host, process and start of the node that ran it, then its thread: ``host:4711:3f2a9c
            taskx-worker-2``; without the thread if the process died and it was not known.
        error: the error text; empty if there was no error.
        error_type: the full class name of the exception it raised, such as ``ValueError`` or
            ``requests.exceptions.Timeout``; empty if it raised none.
        traceback: the exception's traceback as text; empty if there is none.
        old_params: the params before a requeue that changed them; None if they were not changed.
        from_step: the first step whose result a requeue removed; empty if it kept them all.
    """

    outcome: str = ""
    started_at: datetime | None = None
    ended_at: datetime | None = None
    worker: str = ""
    error: str = ""
    error_type: str = ""
    traceback: str = attrs.field(default="", repr=False)
    old_params: dict[str, Any] | None = attrs.field(default=None, repr=False)
    from_step: str = ""


_ATTEMPT_FIELDS = tuple(field.name for field in attrs.fields(Attempt))


def _task_status(value: Any) -> TaskStatus:
    return value if value.__class__ is TaskStatus else check_status(value)


# Converters run when a task is made, not when it is changed: that hook would slow down every attribute.
@attrs.define(kw_only=True, repr=False, on_setattr=attrs.setters.NO_OP)
class Task:
    """A task as the repository stores it.

    Changing a Task object changes nothing in the repository. The first thirteen fields are those of the
    original TaskX; the others are new. All times are aware UTC datetimes in whole milliseconds.

    Attributes:
        id: the unique id; ``submit`` and ``create`` generate one if it is empty.
        type: the type of the task, which selects its executor.
        status: see :class:`TaskStatus`.
        params: the input of the executor; a JSON object.
        result: the return value of the executor; any JSON value.
        error: the text of the last error; empty if there was none.
        progress: percent, 0 to 100.
        message: the latest progress message.
        created_by: free text, for filters.
        created_at: the time at which it was accepted.
        started_at: the start of the current or last attempt; if that has waited without a thread, the time
            at which it went on.
        completed_at: the time at which it was completed, failed or cancelled.
        duration: seconds that the last attempt took, by the monotonic clock, without such waits.
        priority: tasks with a higher priority run first; equal ones run in the order of submission.
        run_at: the task does not start before this time; None for at once. After a requeue, or a wait in
            the middle of an attempt, the time from which on it could start.
        timeout: seconds after which an attempt's token fires; None for never.
        max_attempts: number of attempts that may raise before the task fails; None for the executor's.
        max_crashes: number of times its process may die before the task fails; None for the executor's.
        retry: the policy for another attempt after one that raised; None for the executor's.
        unique_key: at most one task at a time holds this key; None for no key.
        unique_scope: how long it holds the key: ``"pending"``, ``"unfinished"``, ``"ever"``, or a number
            of seconds since it was created (as text); None without a key.
        depends_on: the ids of its parents; it may start when all of them have completed.
        on_parent_failure: what happens to it if a parent does not complete: ``"cancel"`` (also None),
            ``"fail"`` or ``"run"``.
        concurrency_key: tasks with the same key run one at a time, or as many as its limit allows, in the
            order of submission; None for no key.
        expires_at: if the task has not started for the first time by then, it is cancelled; None for
            never, and after its first attempt. While it waits in the middle of an attempt: the end of the
            wait.
        tags: short texts that you can filter by.
        flow: the id of the flow that it is part of; empty if it is part of none. ``submit_flow`` sets it.
        errors: number of attempts that raised.
        crashes: number of attempts during which the process died.
        interruptions: number of attempts cut short by a stop, or by the crash of another task.
        snoozes: number of attempts that asked to run again later (``Snooze``).
        starts: number of times it was started, or changed while it was pending; the fence of its current
            run.
        cancel_requested_at: the time at which a running task was asked to stop; None if it was not.
        dead_letter: True for a task that failed for good; only a requeue runs it again.
        error_type: the full class name of the exception behind ``error``, as in :class:`Attempt`.
        traceback: the last error's traceback.
        owner: the id of the node that holds it; empty if no node does.
        worker: host, process and start of the node that runs it, then the name of the thread:
            ``host:4711:3f2a9c taskx-worker-2``. The thread may be missing until the attempt has ended.
        earlier_attempts: the ended attempts before the current or last one (a limited number); see
            :attr:`attempts`.
        stuck_on: the id of the node on which a thread of an ended attempt still runs; empty if none does.
        checkpoints: the values that its executor stored for later attempts; None for none.
        log: the captured log of its executor, if capturing is on.
        version: the version of the executor that ran it last, as text; None if the executor had none.
        cost: what its start takes from the rates with units: ``{"tokens": 1200}``; None for nothing.
        damage: describes the part of the stored record that could not be read; empty if all is well.
            Never stored.
    """

    id: str = ""
    type: str = ""
    status: TaskStatus = attrs.field(default=TaskStatus.PENDING, converter=_task_status)
    params: dict[str, Any] = attrs.field(factory=dict)
    result: Any = None
    error: str = ""
    progress: int = 0
    message: str = ""
    created_by: str = ""
    created_at: datetime | None = None
    started_at: datetime | None = None
    completed_at: datetime | None = None
    duration: float = 0.0
    priority: int = 0
    run_at: datetime | None = None
    timeout: float | None = None
    max_attempts: int | None = None
    max_crashes: int | None = None
    retry: RetryPolicy | None = None
    unique_key: str | None = None
    unique_scope: str | None = None
    depends_on: Sequence[str] = ()
    on_parent_failure: str | None = None
    concurrency_key: str | None = None
    expires_at: datetime | None = None
    tags: Sequence[str] = ()
    flow: str = ""
    errors: int = 0
    crashes: int = 0
    interruptions: int = 0
    snoozes: int = 0
    starts: int = 0
    cancel_requested_at: datetime | None = None
    dead_letter: bool = False
    error_type: str = ""
    traceback: str = ""
    owner: str = ""
    worker: str = ""
    earlier_attempts: list[Attempt] = attrs.field(factory=list)
    stuck_on: str = ""
    checkpoints: dict[str, Any] | None = None
    log: str = ""
    version: str | None = None
    cost: Cost | None = None
    damage: str = attrs.field(default="", eq=False)

    def __copy__(self) -> Task:
        # The attributes one by one take a third of the time of the state as a dict, which attrs would make.
        copied = object.__new__(type(self))
        for field in attrs.fields(type(self)):
            setattr(copied, field.name, getattr(self, field.name))
        return copied

    def __repr__(self) -> str:
        return line("Task", self._told(_IN_LINE))

    def _repr_html_(self) -> str:
        return html_table(("field", "value"), self._told(TASK_FIELDS).items(), "Task")

    def _told(self, names: Iterable[str]) -> dict[str, Any]:
        """Return the status, and the fields that differ from those of a new task."""
        told = {}
        for name in names:
            value, new = getattr(self, name), _NEW[name]
            # An array is no value of a stored task, and is neither equal to another value nor not.
            if name == "status" or type(value) is not type(new) or value != new:
                told[name] = value
        return told

    @property
    def attempt(self) -> int:
        """The number of the current or next attempt, from 1. Only errors use up attempts."""
        return self.errors + 1

    @property
    def attempts(self) -> list[Attempt]:
        """All attempts in order: the earlier ones, then the current or last one."""
        earlier = list(self.earlier_attempts)
        if self.started_at is None or (earlier and self._is_latest(earlier[-1])):
            return earlier
        return [*earlier, self._latest_attempt()]

    def _is_latest(self, attempt: Attempt) -> bool:
        """Return True if an archived attempt is the last one: a crash that ends a task is archived."""
        return (
            attempt.outcome in ("crashed", "interrupted")
            and attempt.started_at == self.started_at
            and attempt.ended_at == self.completed_at
        )

    def _latest_attempt(self) -> Attempt:
        return Attempt(
            outcome=self.status.value if self.status.finished else "",
            started_at=self.started_at,
            ended_at=self.completed_at,
            worker=self.worker,
            error=self.error,
            error_type=self.error_type,
            traceback=self.traceback,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the task as a dict of JSON values. Its keys are the field names; times are ISO text."""
        data = {name: _to_json(getattr(self, name)) for name in TASK_FIELDS}
        data["retry"] = None if self.retry is None else self.retry.to_dict()
        data["depends_on"] = list(self.depends_on)
        data["tags"] = list(self.tags)
        data["flow"] = self.flow
        data["earlier_attempts"] = [
            {name: _to_json(value) for name, value in attrs.asdict(attempt, recurse=False).items()}
            for attempt in self.earlier_attempts
        ]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Task:
        """Return the task of a dict from :meth:`to_dict`.

        Unknown names are ignored; missing ones get their defaults.

        Raises:
            ValueError: a time is not ISO text with an offset, or the status is not one of the five.
        """
        known = {name: data[name] for name in TASK_FIELDS if name in data}
        for name in TIME_FIELDS:
            known[name] = _from_iso(known.get(name))
        known["status"] = TaskStatus(known.get("status", "pending"))
        known["depends_on"] = known.get("depends_on") or ()
        known["tags"] = tuple(known.get("tags") or ())
        known["flow"] = data.get("flow") or ""
        if known.get("retry") is not None:
            known["retry"] = RetryPolicy.from_dict(known["retry"])
        known["earlier_attempts"] = [
            Attempt(
                **{name: attempt[name] for name in _ATTEMPT_FIELDS if name in attempt}
                | {name: _from_iso(attempt.get(name)) for name in ("started_at", "ended_at")}
            )
            for attempt in data.get("earlier_attempts", ())
        ]
        return cls(**known)


#: The stored fields, in order. The column ``tags`` holds ``flow``, too.
TASK_FIELDS: tuple[str, ...] = tuple(
    field.name for field in attrs.fields(Task) if field.name not in ("flow", "damage")
)
# The fields in a line about a task: those that are short, and that users set or look for.
_IN_LINE = (*TASK_FIELDS[: TASK_FIELDS.index("error_type")], "flow")
_NEW = {name: getattr(Task(), name) for name in (*TASK_FIELDS, "flow")}
TIME_FIELDS = (
    *("created_at", "started_at", "completed_at"),
    *("run_at", "expires_at", "cancel_requested_at"),
)


_FRACTION = re.compile(r"\.\d+")


def _to_json(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    return value.value if isinstance(value, TaskStatus) else value


def _from_iso(value: Any) -> datetime | None:
    if value is None:
        return None
    # Before Python 3.11, fromisoformat accepts no "Z", and only fractions of three or six digits (Go
    # writes up to nine).
    text = value[:-1] + "+00:00" if value.endswith("Z") else value
    text = _FRACTION.sub(lambda found: f"{found[0][:4]:0<4}", text, count=1)
    return to_datetime(to_ms(datetime.fromisoformat(text), repr(value)))


def check_moment(value: Any, what: str) -> None:
    """Raise ConfigurationError if a value is neither an aware datetime nor None."""
    if value is None:
        return
    if not isinstance(value, datetime):
        raise ConfigurationError(f"{what} must be a datetime, not {type(value).__name__}")
    try:
        to_ms(value, what)
    except ValueError as error:
        raise ConfigurationError(str(error)) from None


_MAX_COUNT = 2**62 - 1  # the sum of two still fits into a database's 64-bit integer


def check_part(value: Any, what: str) -> None:
    """Raise ConfigurationError if a value is not a text that can be looked for."""
    if not isinstance(value, str):
        raise ConfigurationError(f"{what} must be a str, not {type(value).__name__}")
    if "\0" in value or not is_encodable(value):
        raise ConfigurationError(
            f"{what} {value!a} contains a NUL character or a lone surrogate; remove it"
        )


def _unless_empty(value: Any) -> Any:
    """Return None for the empty text: each text contains it, so it is no condition."""
    return None if value == "" else value


class _DefaultLimit(int):
    """The limit of a filter that was made without one; only lists use it."""


def _count(_: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if type(value) not in (int, _DefaultLimit) or not 0 <= value <= _MAX_COUNT:
        raise ConfigurationError(
            f"{attribute.name} must be a whole number of at least 0, not {value!r}"
        )


def _to_status(value: Any) -> TaskStatus | None:
    return None if value is None or value == "" else check_status(value)


def check_status(value: Any) -> TaskStatus:
    """Return a status that is given as itself or as text. Raises ConfigurationError if it is unknown."""
    try:
        return TaskStatus(value)
    except ValueError:
        known = ", ".join(TaskStatus)
        raise ConfigurationError(f"status must be one of {known}, not {value!r}") from None


@attrs.frozen(kw_only=True)
class TaskFilter:
    """Conditions for the tasks to list or count. A task must meet all given ones. Lists are newest first.

    Attributes:
        type: tasks of this type.
        status: tasks with this status.
        created_by: tasks with this ``created_by``.
        start_date: tasks created at or after this aware datetime.
        end_date: tasks created before or at this aware datetime.
        error: tasks whose ``error`` contains this text. The case of the letters A to Z does not matter.
        error_type: tasks whose ``error_type`` is this full class name.
        id_prefix: tasks whose id begins with this text.
        params: tasks whose params have these values: a dict of paths and values. A path is a text such as
            ``"user.id"``, or a tuple of keys, for keys that contain dots. It leads through objects, not
            through lists. A value is a text, a number, a bool or None.
        parent: tasks that depend on the task with this id.
        tag: tasks with this tag; of several tags, tasks with all of them.
        flow: tasks of the flow with this id.
        offset: number of tasks to skip.
        limit: largest number of tasks; lists use 100 if it is not given.

    Raises:
        ConfigurationError: a naive datetime, a negative offset or limit, an unknown status, a path or value
            of params that cannot be looked for.
    """

    type: str | None = attrs.field(default=None, validator=optional(by(check_name)))
    status: TaskStatus | None = attrs.field(default=None, converter=_to_status)
    created_by: str | None = attrs.field(default=None, validator=optional(by(check_name)))
    start_date: datetime | None = attrs.field(default=None, validator=by(check_moment))
    end_date: datetime | None = attrs.field(default=None, validator=by(check_moment))
    offset: int = attrs.field(default=0, validator=_count)
    limit: int = attrs.field(default=_DefaultLimit(100), validator=_count)
    error: str | None = attrs.field(
        default=None, converter=_unless_empty, validator=optional(by(check_part))
    )
    error_type: str | None = attrs.field(default=None, validator=optional(by(check_name)))
    id_prefix: str | None = attrs.field(
        default=None, converter=_unless_empty, validator=optional(by(check_name))
    )
    params: tuple[Condition, ...] | None = attrs.field(default=None, converter=as_conditions)
    parent: str | None = attrs.field(default=None, validator=optional(by(check_name)))
    tag: tuple[str, ...] | None = attrs.field(default=None, converter=as_tags)
    flow: str | None = attrs.field(default=None, validator=optional(by(check_flow)))

    @property
    def labels(self) -> tuple[str, ...]:
        """The items that a matching task must have in its column ``tags``: see ``taskx.tasks.tags``."""
        labels = self.tag or ()
        return labels if self.flow is None else (*labels, FLOW + self.flow)

    @property
    def limited(self) -> bool:
        """True if a limit was given."""
        return type(self.limit) is not _DefaultLimit

    @property
    def given(self) -> frozenset[str]:
        """The names of the conditions that are not None."""
        return frozenset(name for name in CONDITIONS if getattr(self, name) is not None)

    def matches(self, task: Task) -> bool:
        """Return True if a task meets every condition, for repositories that filter in Python."""
        created = task.created_at
        return (
            self.type in (None, task.type)
            and self.status in (None, task.status)
            and self.created_by in (None, task.created_by)
            and (self.start_date is None or (created is not None and created >= self.start_date))
            and (self.end_date is None or (created is not None and created <= self.end_date))
            and (self.error is None or contains(task.error, self.error))
            and self.error_type in (None, task.error_type)
            and (self.id_prefix is None or task.id.startswith(self.id_prefix))
            and (self.params is None or meets(task.params, self.params))
            and (self.parent is None or self.parent in task.depends_on)
            and (self.tag is None or set(self.tag) <= {*task.tags})
            and self.flow in (None, task.flow)
        )


#: The fields of a filter that are conditions for tasks.
CONDITIONS = frozenset(field.name for field in attrs.fields(TaskFilter)) - {"offset", "limit"}


def check_filter(value: Any) -> TaskFilter:
    """Return the filter; for None, the filter of all tasks. Raises ConfigurationError for other values."""
    if value is None:
        return TaskFilter()
    if not isinstance(value, TaskFilter):
        raise ConfigurationError(
            f"filter must be a TaskFilter, not {value!r}; or give its fields by name: type='report'"
        )
    return value


class _Page(NamedTuple):
    tasks: Sequence[Task]
    total: int


class TaskPage(_Page):
    """One page of a list of tasks. It unpacks as a pair: ``tasks, total = queue.list_tasks()``.

    Attributes:
        tasks: the tasks, newest first.
        total: the number of all tasks that match the filter, whatever its offset and limit.
        more: the number of tasks that follow this page; 0 if the list ends with it.
        next: the place after this page, to give as ``after`` for the next page; None if the list ends.
        exact: False if ``total`` and ``more`` are only lower bounds.
        searched_since: None, or a moment: older tasks were not looked at.
    """

    more: int = 0
    next: str | None = None
    exact: bool = True
    searched_since: datetime | None = None

    def __new__(
        cls,
        tasks: Sequence[Task],
        total: int,
        more: int = 0,
        next: str | None = None,
        exact: bool = True,
        searched_since: datetime | None = None,
    ) -> TaskPage:
        page = super().__new__(cls, tasks, total)
        page.more, page.next = more, next
        page.exact, page.searched_since = exact, searched_since
        return page

    def _replace(self, **fields: Any) -> TaskPage:
        """Return a page in which these attributes have other values."""
        return TaskPage(**{"tasks": self.tasks, "total": self.total, **vars(self), **fields})

    def __repr__(self) -> str:
        return f"TaskPage(total={self.total}, more={self.more}, tasks={self.tasks!r})"

    def _repr_html_(self) -> str:
        heads = ("id", "type", "status", "params", "created_at", "error")
        rows = ([getattr(task, name) for name in heads] for task in self.tasks)
        return html_table(heads, rows, f"{len(self.tasks):,} of {self.total:,} tasks")


class TaskCount(int):
    """A number of tasks.

    Attributes:
        exact: False if there may be more: the count stopped at its largest number, or older tasks were not
            looked at.
    """

    exact: bool

    def __new__(cls, number: int, exact: bool = True) -> TaskCount:
        count = super().__new__(cls, number)
        count.exact = exact
        return count
