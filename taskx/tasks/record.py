"""A task as a flat row of plain values, the form in which repositories store and change it.

Times are milliseconds since 1970. Params, result, retry, depends_on, tags (with the flow), checkpoints and
earlier attempts are JSON text. All other values are ``str``, ``int``, ``float`` or None. A row has the
task's own fields and:

``held``
    the reason why a pending task may not start: one of the numbers below.
``waiting_on``
    the id of the unfinished parent whose end the task waits for.
``unique_lock``
    the task's unique key while the task holds it. No two rows have the same value.
``turn``
    the task's concurrency key, from the moment of its turn until the task has ended. No two rows have the
    same value.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from copy import copy
from datetime import datetime
from typing import Any, NamedTuple

import attrs

from taskx.tasks import payload
from taskx.tasks.clock import to_datetime, to_ms
from taskx.tasks.codec import NO_CODECS, Codecs, Unreadable
from taskx.tasks.errors import ConfigurationError, PayloadError
from taskx.tasks.ids import new_id
from taskx.tasks.model import TASK_FIELDS, TIME_FIELDS, Attempt, Task, TaskStatus
from taskx.tasks.payload import CODEC_KEY, clean_text
from taskx.tasks.rate import Cost, check_cost
from taskx.tasks.retry import RetryPolicy
from taskx.tasks.tags import labels_from_text, labels_of, labels_to_text, split
from taskx.tasks.writes import CREATED

#: The values of ``held``. FREE: the task may start. UNTIL_DUE: it waits for its ``run_at``. FOR_PARENTS:
#: its parents have not ended. BY_THREAD: a thread of an earlier attempt still runs. FOR_TURN: other tasks
#: of its concurrency key come first.
FREE, UNTIL_DUE, FOR_PARENTS, BY_THREAD, FOR_TURN = range(5)

#: The columns of a row that are not fields of the task.
INTERNAL = ("held", "waiting_on", "unique_lock", "turn")
#: The columns of a row, in order: the task's own fields, then the internal ones.
COLUMNS: tuple[str, ...] = (*TASK_FIELDS, *INTERNAL)
#: The unique columns: no two rows have the same value in one of them, except None.
UNIQUE = ("unique_lock", "turn")

#: Longest progress message, in characters; a longer one is cut, and the log says :data:`CUT`.
MAX_MESSAGE = 10_000
CUT = f"progress messages of type %r with more than {MAX_MESSAGE:,} characters are cut, and end in '…'"
#: Longest name of a worker, in characters: the column of the Django table has as many.
MAX_WORKER = 500

#: The value of each column in a new task, unless its creation gives another one.
DEFAULTS: dict[str, Any] = {
    **{
        field.name: field.default
        for field in attrs.fields(Task)
        if field.name in TASK_FIELDS and field.name not in ("id", "type", "created_at")
    },
    "status": "pending",
    "params": "{}",
    "depends_on": None,
    "tags": None,
    "dead_letter": 0,
    "earlier_attempts": "",
    "held": FREE,
    "waiting_on": None,
    "unique_lock": None,
    "turn": None,
}


class Stub(NamedTuple):
    """The few columns of an unfinished task that the runtime needs to sort and start it."""

    id: str
    status: str
    starts: int
    priority: int
    created_at: int
    cancel_requested: bool
    type: str
    run_at: int | None
    #: The row of a small task that was never started and has no rare option, so that its start need not
    #: read it; None if it must. It has the number of the record, ``seq``, if the store gives one.
    row: dict[str, Any] | None = None

    @property
    def waits_since(self) -> int:
        """The moment from which on it could start: its creation or, if that is later, its ``run_at``."""
        return max(self.created_at, self.run_at or 0)

    def rank(self, ageing: int) -> int:
        """Return the rank by which pending tasks are sorted: see :func:`rank`."""
        return rank(self.priority, self.created_at, self.run_at, ageing)


def rank(priority: int, created_at: int, run_at: int | None, ageing: int) -> int:
    """Return the rank of a task: smaller ranks start first, equal ranks in the order of storing.

    Without ``ageing``, the rank depends only on the priority. ``ageing`` is the number of milliseconds of
    waiting that count as one more priority. With it, the rank is the moment at which the task began to
    wait (its ``run_at``, if that is later than its creation), moved earlier by ``ageing`` for each
    priority. So the order of two tasks never changes, however long they wait.
    """
    if not ageing:
        return -priority
    return max(created_at, run_at or 0) - priority * ageing


#: The columns of a stub, in order.
STUB = (
    *("id", "status", "starts", "priority", "created_at"),
    *("cancel_requested_at", "type", "run_at"),
)
#: The further columns of a stub's row, in order. These are NULL in it:
PLAIN = ("params", "created_by", "timeout", "max_attempts", "max_crashes")
RARE = (
    *("retry", "unique_key", "depends_on", "concurrency_key", "expires_at", "tags", "checkpoints"),
    *("cancel_requested_at", "cost"),
)
#: The most characters of the params of such a task.
SMALL = 2000


class Ended(NamedTuple):
    """A task that has ended, with the columns that decide if its record may be removed."""

    stub: Stub
    depends_on: Sequence[str]  #: the ids of its parents
    unique_lock: str | None  #: the unique key that it holds; None if it holds none
    unique_scope: str | None  #: the scope of that key
    place: Any  #: the place at which the next page begins, if this task is the last of its page


_STATUS = {status.value: status for status in TaskStatus}
_STATUSES = tuple(_STATUS)  # a tuple, because a damaged status may not be hashable
_KINDS = {field.name: str(field.type) for field in attrs.fields(Task) if field.name in TASK_FIELDS}
_TEXTS = [name for name, kind in _KINDS.items() if kind == "str"]
_KEYS = [name for name, kind in _KINDS.items() if kind == "str | None"]
_NUMBERS = [name for name, kind in _KINDS.items() if kind.split(" | ")[0] in ("int", "float")]


# The columns of a task that is as it was created and has no rare option, in the order of ``task_from_row``.
_AS_CREATED = (
    "pending", None, "", 0, "", None, None, 0, None,
    None, None, None, None, None, None, None,
    0, 0, 0, 0, 0, None, 0,
    "", "", "", "", "", None, "", None, None,
)  # fmt: skip


def task_from_row(row: Sequence[Any], codecs: Codecs = NO_CODECS) -> Task:
    """Return the task of a row with the columns :data:`TASK_FIELDS`. ``task.damage`` names the damage."""
    (
        id_, type_, status, params, result, error, progress, message, created_by, created_at,
        started_at, completed_at, duration, priority, run_at, timeout, max_attempts, max_crashes,
        retry, unique_key, unique_scope, depends_on, on_parent_failure, concurrency_key, expires_at,
        tags, errors, crashes, interruptions, snoozes, starts, cancel_requested_at, dead_letter,
        error_type, traceback, owner, worker, earlier, stuck_on, checkpoints, log, version, cost,
    ) = row  # fmt: skip
    try:
        params = payload.loads(params) if params != "{}" else {}
        rest = (
            status, result, error, progress, message, started_at, completed_at, duration, retry,
            unique_key, unique_scope, depends_on, on_parent_failure, concurrency_key, expires_at, tags,
            errors, crashes, interruptions, snoozes, starts, cancel_requested_at, dead_letter,
            error_type, traceback, worker, earlier, stuck_on, checkpoints, log, version, cost,
        )  # fmt: skip
        if rest == _AS_CREATED and type(params) is dict and CODEC_KEY not in params:
            "".join((id_, type_, created_by, owner))
            for number in (priority, timeout, max_attempts, max_crashes):
                _ = 0 if number is None else number + 0
            return Task(
                id=id_,
                type=type_,
                params=params,
                created_by=created_by,
                created_at=to_datetime(created_at),
                priority=priority,
                run_at=None if run_at is None else to_datetime(run_at),
                timeout=timeout,
                max_attempts=max_attempts,
                max_crashes=max_crashes,
                owner=owner,
            )
        result = payload.loads(result) if result is not None else None
        attempts = _attempts_from_text(earlier, codecs) if earlier else []
        if type(params) is dict and CODEC_KEY in params:
            params = codecs.value(params)
        if type(params) is not dict:
            raise ValueError("params are not a JSON object")
        if type(result) is dict and CODEC_KEY in result:
            result = codecs.value(result)
        # A cheap check of types: join() fails for a value that is not text, + for one that is no number.
        "".join((
            id_, type_, error, message, created_by, error_type, traceback, owner, worker, stuck_on, log,
        ))  # fmt: skip
        _ = starts + errors + crashes + interruptions + snoozes + priority + progress + duration
        for number in (timeout, max_attempts, max_crashes):
            _ = 0 if number is None else number + 0
        task = Task(
            id=id_,
            type=type_,
            status=_STATUS[status],
            params=params,
            result=result,
            error=error,
            progress=progress,
            message=message,
            created_by=created_by,
            created_at=to_datetime(created_at),
            started_at=None if started_at is None else to_datetime(started_at),
            completed_at=None if completed_at is None else to_datetime(completed_at),
            duration=duration,
            priority=priority,
            run_at=None if run_at is None else to_datetime(run_at),
            timeout=timeout,
            max_attempts=max_attempts,
            max_crashes=max_crashes,
            retry=None if retry is None else _policy_from_text(retry),
            errors=errors,
            crashes=crashes,
            interruptions=interruptions,
            snoozes=snoozes,
            starts=starts,
            cancel_requested_at=(
                None if cancel_requested_at is None else to_datetime(cancel_requested_at)
            ),
            dead_letter=bool(dead_letter),
            error_type=error_type,
            traceback=traceback,
            owner=owner,
            worker=worker,
            earlier_attempts=attempts,
        )
        if unique_key is not None:
            task.unique_key, task.unique_scope = _text(unique_key), _text(unique_scope)
        if depends_on is not None:
            task.depends_on = ids_from_text(depends_on)
            task.on_parent_failure = on_parent_failure and _text(on_parent_failure)
        if concurrency_key is not None:
            task.concurrency_key = _text(concurrency_key)
        if expires_at is not None:
            task.expires_at = to_datetime(expires_at)
        if cost is not None:
            task.cost = cost_from_text(cost)
        if tags is not None:
            task.tags, task.flow = split(labels_from_text(tags))
        if stuck_on or log:
            task.stuck_on, task.log = stuck_on, log
        if version is not None:
            task.version = _text(version)
        if checkpoints is not None:
            stored = _object_from_text(checkpoints)
            task.checkpoints = codecs.value(stored) if CODEC_KEY in stored else stored
        return task
    except Unreadable as problem:  # keep all but the columns that codecs write
        return _salvaged_task(row, problem, params="{}", result=None, checkpoints=None)
    except (KeyError, ValueError, TypeError, RecursionError, OverflowError) as problem:
        if isinstance(problem, KeyError) and known_status(status) != status:
            return _salvaged_task(row, f"{status!r:.50} as status", status=known_status(status))
        return _damaged_task(row, problem)


def known_status(status: Any) -> str:
    """Return the status; "failed" for one that is not one of the five."""
    return status if status in _STATUSES else "failed"


def _salvaged_task(row: Sequence[Any], problem: object, **instead: Any) -> Task:
    """Return the task of a row in which some damaged columns are replaced."""
    task = task_from_row(tuple({**dict(zip(TASK_FIELDS, row, strict=True)), **instead}.values()))
    task.damage = task.damage or f"the stored record is damaged: {problem}"
    return task


def _damaged_task(row: Sequence[Any], problem: Exception) -> Task:
    """Return the readable part of a damaged row: no params, no result, no value of a wrong type."""
    stored = dict(zip(TASK_FIELDS, row, strict=True))
    sound = {**stored, "params": "{}", "result": None, "retry": None, "earlier_attempts": ""}
    sound.update(dict.fromkeys((*_KEYS, "depends_on", "tags", "checkpoints", "cost")))
    sound.update(
        (name, DEFAULTS[name]) for name in _NUMBERS if type(stored[name]) not in (int, float)
    )
    sound.update((name, _as_text(stored[name])) for name in _TEXTS)
    sound.update((name, _time_or_none(stored[name])) for name in TIME_FIELDS)
    sound["status"] = known_status(stored["status"])
    if sound["created_at"] is None:
        sound["created_at"] = 0
    checked = (*_TEXTS, *_NUMBERS, *TIME_FIELDS, "status")
    odd = [name for name in checked if sound[name] != stored[name]]
    task = task_from_row(tuple(sound.values()))
    told = f"{stored[odd[0]]!r:.50} as {odd[0]}" if odd else problem
    task.damage = f"the stored record is damaged: {told}"
    return task


def _as_text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _time_or_none(ms: Any) -> int | None:
    try:
        to_datetime(ms)
    except (ValueError, TypeError, OverflowError):
        return None
    moment: int = ms
    return moment


def row_from_task(task: Task) -> dict[str, Any]:
    """Return the row of a task, in column order.

    Raises:
        PayloadError: params, result or checkpoints break the JSON rules.
    """
    row: dict[str, Any] = {name: getattr(task, name) for name in TASK_FIELDS}
    row["status"] = task.status.value
    row["params"] = payload.encode_params(task.params, payload.NO_LIMIT)
    row["result"] = (
        None if task.result is None else payload.encode(task.result, "result", payload.NO_LIMIT)
    )
    row["retry"] = policy_to_text(task.retry)
    row["depends_on"] = ids_to_text(task.depends_on)
    row["tags"] = labels_to_text(task.tags, task.flow)
    noted = undivided(task.checkpoints) if task.checkpoints else None
    row["checkpoints"] = payload.encode(noted, "checkpoints", payload.NO_LIMIT) if noted else None
    row["cost"] = None if task.cost is None else cost_to_text(task.cost)
    row["earlier_attempts"] = attempts_to_text(task.earlier_attempts)
    row["dead_letter"] = int(task.dead_letter)
    for name in TIME_FIELDS:
        row[name] = optional_ms(row[name], name)
    row.update({name: DEFAULTS[name] for name in INTERNAL})
    return row


def created_task(row: Mapping[str, Any]) -> Task:
    """Return the task that a row of ``lifecycle.create`` makes."""
    whole = {**DEFAULTS, **row}
    return task_from_row([whole[name] for name in TASK_FIELDS])


def is_plain(row: Mapping[str, Any]) -> bool:
    """Return True if a row of ``lifecycle.create`` is small, and has only columns of every new task."""
    columns = len(row) - ("seq" in row)
    return columns == _CREATED and row["retry"] is None and len(row["params"]) <= SMALL


_CREATED = len(CREATED)


def _new_task() -> Task:
    """Return ``Task()``, at a third of the cost: the constructor looks up each of its 45 defaults."""
    task: Any = Task.__new__(Task)
    task.id = task.type = task.created_by = task.owner = task.worker = task.flow = task.message = ""
    task.error = task.error_type = task.traceback = task.log = task.stuck_on = task.damage = ""
    task.status, task.params, task.earlier_attempts = TaskStatus.PENDING, {}, []
    task.depends_on = task.tags = ()
    task.progress = task.priority = task.starts = task.errors = task.crashes = 0
    task.interruptions = task.snoozes = 0
    task.duration, task.dead_letter = 0.0, False
    task.result = task.created_at = task.started_at = task.completed_at = task.run_at = None
    task.timeout = task.max_attempts = task.max_crashes = task.retry = task.expires_at = None
    task.unique_key = task.unique_scope = task.concurrency_key = task.on_parent_failure = None
    task.cancel_requested_at = task.checkpoints = task.version = task.cost = None
    return task  # type: ignore[no-any-return]


def plain_tasks(rows: Iterable[Mapping[str, Any]]) -> dict[str, Task]:
    """Return the tasks that plain rows make, by id: as :func:`created_task`, at a quarter of the cost.

    Rows that are damaged, or written by a codec, are left out.
    """
    found: dict[str, Task] = {}
    for row in rows:
        task_id, text, run_at = row["id"], row["params"], row["run_at"]
        kind, creator, priority = row["type"], row["created_by"], row["priority"]
        timeout, attempts, crashes = row["timeout"], row["max_attempts"], row["max_crashes"]
        try:
            params, end = payload.scan(text, 0) if text != "{}" else ({}, 2)
            if end != len(text) or type(params) is not dict or CODEC_KEY in params:
                continue
            "".join((task_id, kind, creator))  # a cheap check of types, as above
            for number in (priority, timeout, attempts, crashes):
                _ = 0 if number is None else number + 0
            task = _new_task()
            task.id, task.type, task.params, task.created_by = task_id, kind, params, creator
            task.created_at = to_datetime(row["created_at"])
            task.priority, task.timeout = priority, timeout
            task.max_attempts, task.max_crashes = attempts, crashes
            task.owner = row["owner"]
            if run_at is not None:
                task.run_at = to_datetime(run_at)
            found[task_id] = task
        except (ValueError, TypeError, RecursionError, OverflowError, StopIteration):
            continue
    return found


def changed_task(task: Task, changes: Mapping[str, Any]) -> Task:
    """Return a copy of a task with the changes of a write."""
    changed = copy(task)
    changed.earlier_attempts = list(task.earlier_attempts)
    for name, value in changes.items():
        if name == "tags":
            changed.tags, changed.flow = split(labels_of(value))
        elif name in TASK_FIELDS:
            read = _READ.get(name)
            setattr(changed, name, value if read is None or value is None else read(value))
    return changed


def optional_ms(moment: datetime | None, what: str) -> int | None:
    """Return a moment as milliseconds; None for None."""
    return None if moment is None else to_ms(moment, what)


def stub_from_row(row: Mapping[str, Any]) -> Stub:
    """Return the stub of a row."""
    return Stub(
        row["id"],
        row["status"],
        row["starts"],
        row["priority"],
        row["created_at"],
        row["cancel_requested_at"] is not None,
        row["type"],
        row["run_at"],
    )


def stub_from_values(values: Sequence[Any]) -> Stub:
    """Return the stub of the columns :data:`STUB`, even if some of them are damaged."""
    id_, status, starts, priority, created_at, asked_at, type_, run_at = values
    return Stub(
        id_,
        status,
        _number(starts),
        _number(priority),
        _number(created_at),
        asked_at is not None,
        _as_text(type_),
        None if run_at is None else _number(run_at),
    )


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0


def check_progress(percent: float, message: str) -> tuple[int, str]:
    """Return progress as it is stored: a whole percentage from 0 to 100, and a text of limited length.

    Raises:
        PayloadError: ``percent`` is not a number, or ``message`` is not text.
    """
    if isinstance(percent, bool) or not isinstance(percent, (int, float)) or percent != percent:
        raise PayloadError("progress", f"must be a number from 0 to 100, not {percent!r}")
    if not isinstance(message, str):
        raise PayloadError("message", f"must be a str, not {type(message).__name__}")
    return int(min(max(percent, 0), 100)), clean_text(message, MAX_MESSAGE)


def policy_to_text(policy: RetryPolicy | None) -> str | None:
    """Return a retry policy as JSON text; None for None. Raises ConfigurationError if it has a function."""
    return None if policy is None else payload.encode(policy.to_dict(), "retry")


def _policy_from_text(text: str) -> RetryPolicy:
    return RetryPolicy.from_dict(_object_from_text(text))


def _object_from_text(text: str) -> dict[str, Any]:
    data = payload.loads(text)
    if type(data) is not dict:
        raise ValueError(f"{text!r:.50} is not a JSON object")
    return data


def cost_to_text(cost: Cost) -> str:
    """Return a cost as JSON text."""
    return json.dumps(cost, separators=(",", ":"))


def cost_from_text(text: str) -> Cost:
    """Return the cost of a text from :func:`cost_to_text`. Raises ``ValueError`` for any other text."""
    try:
        return check_cost(payload.loads(text)) or {}
    except ConfigurationError as error:
        raise ValueError(str(error)) from None


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"{value!r:.50} is not text")
    return value


def ids_to_text(task_ids: Sequence[str]) -> str | None:
    """Return ids as JSON text; None if there are no ids."""
    if not task_ids:
        return None
    return payload.encode(list(task_ids), "depends_on", max_size=payload.NO_LIMIT)


def parents_from_text(text: Any) -> list[str]:
    """Return the ids in a column ``depends_on``; an empty list if the column is empty or damaged."""
    try:
        return ids_from_text(text) if text else []
    except (ValueError, TypeError, RecursionError):
        return []


def ids_from_text(text: str) -> list[str]:
    """Return the ids of a text from :func:`ids_to_text`. Raises ``ValueError`` for any other text."""
    ids = payload.loads(text)
    if type(ids) is not list:
        raise ValueError(f"{text!r:.50} is not a list of ids")
    return [_text(task_id) for task_id in ids]


def checkpoints_to_text(
    steps: Mapping[str, str],
    cursor: str | None,
    parts: Mapping[str, int] | None = None,
    emitted: Mapping[str, Any] | None = None,
) -> str:
    """Return checkpoints as JSON text; the results of the steps and the cursor are JSON text already.

    Many steps are stored in parts, each of which is a note: ``parts`` has the number of steps in each, by
    its name. The record has the other steps, which follow those. ``emitted`` says where the chunks are that
    steps have emitted.
    """
    named = ",".join(f"{payload.encode(name, 'name')}:{text}" for name, text in steps.items())
    fields = [f'"steps":{{{named}}}'] if steps else []
    if cursor is not None:
        fields.append(f'"cursor":{cursor}')
    if parts:
        fields.append(f'"{PARTS}":{payload.encode(parts, PARTS, payload.NO_LIMIT)}')
    if emitted:
        fields.append(f'"{EMITTED}":{payload.encode(emitted, EMITTED, payload.NO_LIMIT)}')
    return f"{{{','.join(fields)}}}"


#: The key of what steps have emitted, in checkpoints: pieces of streams, by the names of the steps.
EMITTED = "emitted"
#: The key of the names of the parts in checkpoints.
PARTS = "parts"
#: The names of the notes with steps begin with this.
PART = "steps/"


def part_name(task_id: str) -> str:
    """Return the name of a new note with steps of a task."""
    return f"{PART}{task_id}/{new_id()}"


def task_of_part(name: str) -> str:
    """Return the id of the task to which the steps in a note belong."""
    return name.removeprefix(PART).rpartition("/")[0]


def parts_of(checkpoints: Mapping[str, Any] | None) -> dict[str, int]:
    """Return the names of the notes with the first steps of a task, with the number of steps in each."""
    parts = checkpoints.get(PARTS) if checkpoints else None
    return parts if isinstance(parts, dict) else {}


def add_parts(task: Task, notes: Mapping[str, str], codecs: Codecs) -> None:
    """Add the steps that are in notes to the checkpoints of a task; ``notes`` has their texts, by name."""
    assert task.checkpoints is not None
    steps: dict[str, Any] = {}
    try:
        for name in parts_of(task.checkpoints):
            part = _object_from_text(notes[name])
            steps.update((codecs.value(part) if CODEC_KEY in part else part)["steps"])
    except (KeyError, ValueError, TypeError, RecursionError) as problem:
        task.damage = task.damage or f"the stored record is damaged: {problem} in its steps"
        return
    steps.update(task.checkpoints.get("steps", {}))
    task.checkpoints = {**task.checkpoints, "steps": steps}


def undivided(checkpoints: Mapping[str, Any]) -> dict[str, Any]:
    """Return checkpoints, as they were read, to be stored without parts."""
    return {name: value for name, value in checkpoints.items() if name != PARTS}


def attempts_to_text(attempts: Sequence[Attempt]) -> str:
    """Return attempts as JSON text; empty if there are none."""
    if not attempts:
        return ""
    return payload.encode(
        [
            [
                attempt.outcome,
                optional_ms(attempt.started_at, "started_at"),
                optional_ms(attempt.ended_at, "ended_at"),
                attempt.worker,
                attempt.error,
                attempt.traceback,
                attempt.error_type,
                *_requeue_to_values(attempt),
            ]
            for attempt in attempts
        ],
        "attempts",
        max_size=payload.NO_LIMIT,
    )


def _requeue_to_values(attempt: Attempt) -> list[dict[str, str]]:
    """Return what a requeue changed, as values that follow those of every attempt."""
    changed = {"from_step": attempt.from_step} if attempt.from_step else {}
    if attempt.old_params is not None:
        changed["params"] = old_params_to_text(attempt.old_params)
    return [changed] if changed else []


def old_params_to_text(params: dict[str, Any]) -> str:
    """Return params of an earlier attempt as JSON text, also if no codec of this process can read them.

    In the log of attempts they are text. So they can be as deep as params, and codecs can convert them.
    """
    if CODEC_KEY in params:
        return json.dumps(params, separators=(",", ":"))
    return payload.encode(params, "params", payload.NO_LIMIT)


def _attempts_from_text(text: str, codecs: Codecs = NO_CODECS) -> list[Attempt]:
    # The first version stored no error_type. A later version may store more values, which are ignored here.
    return [
        Attempt(
            outcome=outcome,
            started_at=None if started_at is None else to_datetime(started_at),
            ended_at=None if ended_at is None else to_datetime(ended_at),
            worker=worker,
            error=error,
            traceback=traceback,
            error_type=more[0] if more else "",
            **_requeue_from_values(more[1:2], codecs),
        )
        for outcome, started_at, ended_at, worker, error, traceback, *more in payload.loads(text)
    ]


def _requeue_from_values(values: Sequence[Any], codecs: Codecs) -> dict[str, Any]:
    if not values or not isinstance(changed := values[0], dict):
        return {}
    old = _object_from_text(changed["params"]) if "params" in changed else None
    if old is not None and CODEC_KEY in old:
        with suppress(Unreadable):  # the old params are not needed to run the task
            old = codecs.value(old)
    return {"old_params": old, "from_step": _text(changed.get("from_step", ""))}


#: The conversions from a column to its field's value, for columns that need one.
_READ: dict[str, Callable[[Any], Any]] = {
    "status": _STATUS.__getitem__,
    "params": payload.loads,
    "result": payload.loads,
    "retry": _policy_from_text,
    "depends_on": ids_from_text,
    "checkpoints": _object_from_text,
    "cost": cost_from_text,
    "dead_letter": bool,
    "earlier_attempts": lambda text: _attempts_from_text(text) if text else [],
    **dict.fromkeys(TIME_FIELDS, to_datetime),
}
