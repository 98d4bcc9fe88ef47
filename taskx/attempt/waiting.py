"""Waiting without a thread: what a task asks a person for, waits for, or sleeps through.

Everything that a task waits for is a task, or a time. A run ends by :class:`Parked`, and the attempt goes
on later from the beginning of the executor, which skips its steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from enum import Enum
from itertools import islice
from typing import Any, TypeVar

from taskx.stores.door import Door
from taskx.tasks import errors, lifecycle, payload
from taskx.tasks.checks import check_number
from taskx.tasks.clock import LAST
from taskx.tasks.creation import new_record
from taskx.tasks.errors import (
    ConfigurationError,
    PayloadError,
    RepositoryError,
    RepositoryUnavailable,
    TaskFailed,
    TaskNotFound,
    TaskxError,
)
from taskx.tasks.lifecycle import ANSWER, EVENT, Park
from taskx.tasks.model import MAX_NAME, Task, TaskStatus, check_key
from taskx.tasks.record import parts_of
from taskx.tasks.token import CancelToken
from taskx.tasks.writes import Write

T = TypeVar("T")

#: The key of a step that is not done, or that has raised: see :func:`unfinished` and :func:`failed`.
KEY = "taskx:wait"
#: A wait that is shorter holds the thread: to park and to start again costs more. In seconds.
SHORT = 1.0


class _Again(Enum):
    AGAIN = "again"


#: What is known of a call whose outcome was unknown: it shall be made again.
AGAIN = _Again.AGAIN
_AGAIN = {KEY: {"again": True}}
#: The answer that says so, as JSON text.
AGAIN_TEXT = payload.encode(_AGAIN, "result")
#: The name of the param of an answer that tells about such a call.
ONCE = "once"


class Uncertain(Exception):
    """Raised by the function of :meth:`Context.once`: nobody knows if it has done what it shall do once."""


class NotDone(Exception):
    """Raised by the second function of :meth:`Context.once_or`: it was not done, and may be done now."""


class Parked(BaseException):
    """The attempt ends here, and goes on later. Do not catch it: the task waits all the same.

    Attributes:
        park: what the task waits for.
        step: the name of the step that waits.
        until: the moment until which the step waits, in milliseconds, to be stored with the park; None if
            there is none, or if it is stored already.
    """

    def __init__(self, park: Park, step: str, until: int | None = None) -> None:
        super().__init__(park)
        self.park = park
        self.step = step
        self.until = until

    def __str__(self) -> str:
        if self.park.on is None:
            return "the task sleeps without a thread"
        return f"the task waits for {self.park.on} without a thread"


# --- the results of steps that wait


def unfinished(until: int) -> dict[str, Any]:
    """Return the value of a step that waits until a moment, in milliseconds."""
    return {KEY: {"until": until}}


def waits_until(value: Any) -> int | None:
    """Return the moment until which a step waits; None if it is done."""
    until = value[KEY].get("until") if _is_ours(value) else None
    return until if isinstance(until, int) else None


def step_until(checkpoints: Mapping[str, Any] | None, until: int | None) -> str:
    """Return the name of the step that waits until a moment; empty if there is none."""
    steps: Mapping[str, Any] = (checkpoints or {}).get("steps", {})
    return next((n for n, v in steps.items() if until and waits_until(v) == until), "")


def begun() -> dict[str, Any]:
    """Return the value of a step whose function was perhaps called, and must not be called twice."""
    return {KEY: {"begun": True}}


def some_taken(numbers: Sequence[int]) -> dict[str, Any]:
    """Return the value of the step that says which children of a list were enough."""
    return {KEY: {"taken": [*numbers]}}


def taken_of(value: Any) -> list[int] | None:
    """Return the numbers of the children that were enough; None if another step has this value."""
    taken = value[KEY].get("taken") if _is_ours(value) else None
    return taken if isinstance(taken, list) else None


def is_begun(value: Any) -> bool:
    """Return True if a step has begun, and it is unknown how its function ended."""
    return _is_ours(value) and "begun" in value[KEY]


def awake(checkpoints: Mapping[str, Any] | None, until: int, now: int) -> str | None:
    """Return checkpoints as text in which the steps that sleep until a moment sleep until now.

    None if there are none.
    """
    steps: Mapping[str, Any] = (checkpoints or {}).get("steps", {})
    if not any(waits_until(value) == until for value in steps.values()):
        return None
    in_notes = sum(parts_of(checkpoints).values())  # so many of the first ones: they stay there
    own = islice(steps.items(), in_notes, None)
    done = {k: unfinished(now) if waits_until(v) == until else v for k, v in own}
    return payload.joined({**(checkpoints or {}), "steps": done})


def failed(kind: str, *facts: Any) -> dict[str, Any]:
    """Return the value of a step that has raised an error of this kind."""
    return {KEY: {"error": [kind, *facts]}}


def outcome(value: Any) -> Any:
    """Return the value of a step, or raise the error that it has raised."""
    if (error := error_in(value)) is not None:
        raise error
    return value


def error_in(value: Any) -> Exception | None:
    """Return the error that a step has raised, by its value; None if it has returned that."""
    if not _is_ours(value) or "error" not in value[KEY]:
        return None
    kind, *facts = value[KEY]["error"]
    return _ERRORS[kind](*facts)


_ERRORS: Mapping[str, Callable[..., Exception]] = {
    "gone": TaskNotFound,
    "timeout": TimeoutError,
    "cancelled": CancelledError,
    "failed": TaskFailed,
}


def _is_ours(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get(KEY), dict)


def outcome_of(task: Task) -> Any:
    """Return how a task has ended, as the value of a step."""
    if task.status is TaskStatus.COMPLETED:
        return task.result
    if task.status is TaskStatus.FAILED:
        return failed("failed", task.id, task.error, max(1, task.errors), "", task.error_type)
    if task.type == ANSWER and task.error.startswith(lifecycle.EXPIRED):
        return failed("timeout", f"no answer to {task.id}: it {task.error}")
    why = f": {task.error}" if task.error else ""
    return failed("cancelled", f"task {task.id} was cancelled{why}")


def moment_after(now: int, seconds: float) -> int:
    """Return the moment so many seconds after another one, in milliseconds, within the calendar."""
    return min(now + round(min(seconds, LAST / 1000) * 1000), LAST)


class Waits:
    """The waits of a queue's runs.

    Each method returns the value of a step, or raises :class:`Parked`.

    Args:
        moves: the door to the repository.
        max_payload_size: most bytes of JSON of a question.
        retry_every: seconds between two tries while the repository is unavailable.
    """

    def __init__(
        self,
        moves: Door,
        max_payload_size: int,
        retry_every: float,
    ) -> None:
        self._moves = moves
        self._max_payload_size = max_payload_size
        self._retry_every = retry_every

    def now_ms(self) -> int:
        """Return the time in milliseconds."""
        return self._moves.now_ms()

    def ask(
        self,
        task: Task,
        name: str,
        question: Any,
        timeout: float | None,
        tags: Sequence[str],
        token: CancelToken,
        what: str = "question",
    ) -> Any:
        """Wait until somebody finishes the answer of this name: see :meth:`Context.ask`.

        ``what`` is the name of the param in which the answer has the question.
        """
        answer_id = answer_of(task.id, name)
        asked = Task(
            id=answer_id,
            type=ANSWER,
            params={what: question},
            created_by=task.created_by,
            tags=tags,
            timeout=timeout,
        )
        while True:
            found = self._look(answer_id, token)
            if found is not None and found.type != ANSWER:
                raise ConfigurationError(f"ctx.ask({name!r}): task {answer_id} is no answer")
            if found is not None and found.status.finished and not lifecycle.ended_unasked(found):
                return outcome_of(found)
            insert = new_record(asked, self.now_ms(), self._max_payload_size)
            # Not durable: a power cut that takes it takes the park, too.
            write: Write = lifecycle.opened(insert, task.id)._replace(durable=False)
            if found is not None:
                if found.status is TaskStatus.PENDING and found.params == payload.loads(
                    insert.row["params"]
                ):
                    raise Parked(Park(answer_id, None), name)
                write = lifecycle.asked_again(found, insert)  # the task was requeued
            if self.patiently(token, lambda write=write: self._moves.commit([write]))[0]:  # type: ignore[misc]
                raise Parked(Park(answer_id, None), name)
            # Somebody has just finished it, or made it: look again.

    def settle(self, task: Task, name: str, token: CancelToken) -> Any:
        """Wait until somebody says how a call has ended that must not be made twice; or ``AGAIN``."""
        told = self.ask(task, name, name, None, (), token, ONCE)
        if told != _AGAIN:
            return told
        self.forget(task, name, token)  # first, and durable: it is told once
        return AGAIN

    def forget(self, task: Task, name: str, token: CancelToken) -> object:
        """Remove an answer that was given."""
        gone = lifecycle.forget_answer(answer_of(task.id, name))
        return self.patiently(token, lambda: self._moves.commit([gone]))

    def wait(
        self, task: Task, awaited: str, timeout: float | None, until: int | None, token: CancelToken
    ) -> Any:
        """Wait until a task has ended, or until a moment: see :meth:`Context.wait`.

        ``until`` is the moment that an earlier run has stored; None if it has stored none.
        """
        if awaited == task.id:
            raise ConfigurationError("a task cannot wait for itself")
        while True:
            found = self._look(awaited, token)
            if found is not None and found.status.finished:
                return outcome_of(found)
            now = self.now_ms()
            if until is not None and now >= until:
                return failed("timeout", f"task {awaited} had not ended in time")
            if found is None and not awaited.startswith(EVENT):
                raise TaskNotFound(awaited)
            if found is None:
                event = new_record(Task(id=awaited, type=ANSWER), now)
                insert = lifecycle.opened(event, task.id)._replace(durable=False)
                if not self.patiently(token, lambda insert=insert: self._moves.commit([insert]))[0]:  # type: ignore[misc]
                    continue
            new = moment_after(now, timeout) if until is None and timeout is not None else None
            raise Parked(Park(awaited, until if new is None else new), awaited, new)

    def poll(
        self,
        name: str,
        look: Callable[[], Any],
        every: float,
        timeout: float | None,
        until: int | None,
        short: float,
        token: CancelToken,
        note: Callable[[int], object],
    ) -> Any:
        """Wait until a call returns something, or until a moment: see :meth:`Context.poll`.

        A wait of ``short`` seconds or longer holds no thread. ``note`` stores the moment until which the
        step waits, before the first look.
        """
        if until is None and timeout is not None:
            until = moment_after(self.now_ms(), timeout)
            note(until)
        while (value := look()) is None:
            now = self.now_ms()
            if until is not None and now >= until:
                return failed("timeout", f"{name}: nothing was found in time")
            following = moment_after(now, every)
            if until is not None and following >= until:
                following = min(until + 1, LAST)  # not until: Queue.wake() would end the time-out
            if following - now >= short * 1000:
                raise Parked(Park(None, following), name)
            token.wait((following - now) / 1000)
            token.raise_if_cancelled()
        return value

    def _look(self, task_id: str, token: CancelToken) -> Task | None:
        return self.patiently(token, lambda: self._moves.repository.get_many([task_id])).get(
            task_id
        )

    def patiently(self, token: CancelToken, call: Callable[[], T]) -> T:
        """Make a call that may be repeated; while the repository is unavailable, wait and try again."""
        while True:
            try:
                return call()
            except RepositoryUnavailable:
                token.wait(self._retry_every)
                token.raise_if_cancelled()


def told(call: Callable[[], Any]) -> dict[str, Any]:
    """Return what a method of :class:`Waits` has returned or raised as JSON, for a child process."""
    try:
        return {"value": call()}
    except Parked as parked:
        return {"parked": [*parked.park], "step": [parked.step, parked.until]}
    except TaskNotFound as gone:
        return {"gone": gone.task_id}
    except (PayloadError, RepositoryError):
        raise
    except TaskxError as error:
        return {"refused": [type(error).__name__, *error.args]}


def heard(said: Mapping[str, Any]) -> Any:
    """Return or raise in the child process what :func:`told` has told."""
    if "parked" in said:
        raise Parked(Park(*said["parked"]), *said["step"])
    if "gone" in said:
        raise TaskNotFound(said["gone"])
    if "refused" in said:
        name, *args = said["refused"]
        raise getattr(errors, name, TaskxError)(*args)
    return said["value"]


def answer_of(task_id: str, name: str) -> str:
    """Return the id of the answer with this name that a task asks for.

    Raises ``ConfigurationError`` if it is too long, or if there is no name.
    """
    check_key(name, "the name of an answer")
    answer_id = f"{task_id}/{name}"
    if len(answer_id) > MAX_NAME:
        raise ConfigurationError(
            f"the name of an answer has {len(name)} characters; with the id of the task, of "
            f"{len(task_id)} characters, these are more than {MAX_NAME}: choose a shorter name"
        )
    return answer_id


def seconds_of(value: Any, what: str) -> float | None:
    """Return a number of seconds, or a ``timedelta``, as seconds; None for None."""
    return None if value is None else check_number(value, what)
