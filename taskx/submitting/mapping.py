"""A map over items: a task for each, which is found again by its id when the map is run again."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Protocol

import attrs

from taskx.common.config import Config
from taskx.common.handles import TaskHandle
from taskx.core import payload
from taskx.core.checks import check_int, check_number
from taskx.core.clock import Clock
from taskx.core.errors import (
    ConfigurationError,
    DuplicateTask,
    InvalidTransition,
    PayloadError,
    TaskNotFound,
    UnknownTaskType,
)
from taskx.core.model import Task, TaskStatus, check_name
from taskx.core.options import MapOptions, refuse_unknown
from taskx.executing.executors import Executor
from taskx.submitting.creation import task_of
from taskx.submitting.intake import Intake

# Tasks that lie ahead for each worker, unless the caller says otherwise.
_AHEAD_PER_WORKER = 4
_NONE = object()


def ahead(config: Config) -> int:
    """How many tasks are submitted ahead, unless the caller says otherwise."""
    workers = config.worker_num
    return min(_AHEAD_PER_WORKER * workers, workers + config.buffer_size)


class _Owner(Protocol):
    def get_task_status(self, task_id: str, /) -> Task: ...
    def requeue(self, task_id: str, /) -> None: ...
    def handle(self, task_id: str, /) -> TaskHandle[Any]: ...


@attrs.frozen(kw_only=True)
class Plan:
    """What is mapped over the items, and how they are told apart.

    Attributes:
        executor: the executor, or its type.
        key: what an item is known by, a text or a number; by its params unless given.
        name: what the map is known by; the type of the executor unless given.
        window: how many tasks are submitted ahead of the result that is asked for.
        timeout: seconds that the next result is waited for; None for ever.
        return_exceptions: give what a failed item raised in its place, and go on.
        options: those of ``submit``, for tasks that are new.

    Raises:
        TypeError: there is no such option.
        ConfigurationError: a value is not valid.
    """

    executor: Executor[Any, Any] | str
    key: Callable[[Any], str | int] | None
    name: str
    window: int
    timeout: float | None
    return_exceptions: bool
    options: Mapping[str, Any]

    def __attrs_post_init__(self) -> None:
        refuse_unknown(self.options, MapOptions, "map")
        if not isinstance(self.executor, (Executor, str)):
            raise ConfigurationError(
                f"map takes an executor made by @executor(…), or a type, not {self.executor!r}"
            )
        if self.key is not None and not callable(self.key):
            raise ConfigurationError(f"key must be a function of an item, not {self.key!r}")
        check_name(self.name, "name")
        check_int(self.window, "window", 1)
        if self.timeout is not None:
            check_number(self.timeout, "timeout")

    def task(self, item: Any) -> Task:
        """The task of an item: a dict is its params, any other value that of the first parameter.

        Raises:
            PayloadError: it does not fit the executor.
            ConfigurationError: ``key`` gives neither a text nor a number.
        """
        if isinstance(item, Mapping):
            task = Task(type=self.type, params=dict(item))
        elif isinstance(self.executor, Executor):
            task = self.executor.task(item)
        else:
            raise PayloadError("params", "of a type by its name, every item must be a dict")
        task.id = f"{self.name or self.type}:{self._key(item, task.params)}"
        return task

    @property
    def type(self) -> str:
        """The type of the tasks."""
        return self.executor if isinstance(self.executor, str) else self.executor.type

    def _key(self, item: Any, params: dict[str, Any]) -> str | int:
        if self.key is None:
            return digest(params)
        key = self.key(item)
        if type(key) is not int and (not isinstance(key, str) or not key):
            raise ConfigurationError(f"key must give a text or a whole number, not {key!r}")
        return key


def digest(params: dict[str, Any]) -> str:
    """What params are known by, whatever the order of their keys: part of stored ids.

    Raises:
        PayloadError: they break the JSON rules.
    """
    value = payload.loads(payload.encode_params(params, payload.NO_LIMIT))
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Results(Iterator[Any]):
    """The results of a map, in the order of its items; each ``next`` submits what the window has room for.

    Args:
        plan: what is mapped.
        items: over what.
        owner: the queue.
        intake: gives what takes its new tasks in: in a forked child, not what did so before.
        clock: what moments are told by.
    """

    def __init__(
        self,
        plan: Plan,
        items: Iterable[Any],
        owner: _Owner,
        intake: Callable[[], Intake],
        clock: Clock,
    ) -> None:
        self._plan = plan
        self._items = iter(items)
        self._owner = owner
        self._intake = intake
        self._clock = clock
        self._item: Any = _NONE
        #: What is under way, in order; an error stands for an item that is no task.
        self._ahead: deque[TaskHandle[Any] | Exception] = deque()

    def __next__(self) -> Any:
        self._fill()
        if not self._ahead:
            raise StopIteration
        head = self._ahead[0]
        try:
            if isinstance(head, Exception):
                raise head
            result = head.result(self._plan.timeout)
        except Exception as error:
            # A time-out, or the repository is away: it is asked for again.
            if isinstance(head, TaskHandle) and not head.done():
                raise
            self._ahead.popleft()
            if not self._plan.return_exceptions:
                raise
            return error
        self._ahead.popleft()
        return result

    def _fill(self) -> None:
        while len(self._ahead) < self._plan.window and (item := self._next_item()) is not _NONE:
            self._ahead.append(self._started(item))
            self._item = _NONE

    def _started(self, item: Any) -> TaskHandle[Any] | Exception:
        """The task of an item, or what is wrong with the item and is no better at another try."""
        try:
            task = self._plan.task(item)
        except Exception as error:  # noqa: BLE001  (``key`` is a function of the user's)
            return error
        try:
            return self._submit(task)
        except (ConfigurationError, PayloadError, UnknownTaskType) as error:
            return error

    def _next_item(self) -> Any:
        """The next one, or the one whose submit failed, so that none is passed over."""
        if self._item is _NONE:
            self._item = next(self._items, _NONE)
        return self._item

    def _submit(self, task: Task) -> TaskHandle[Any]:
        while True:
            try:
                return self._owner.handle(self._accept(task, self._plan.options))
            except DuplicateTask:
                with suppress(TaskNotFound):  # it was deleted since, so it is free now
                    return self._known(task)

    def _accept(self, task: Task, options: Mapping[str, Any]) -> str:
        """Store a task, whatever room the buffer has; returns its id."""
        task = task_of(task, None, options, MapOptions, "map", self._clock)
        return self._intake().accept(task, options.get("priority"), spill=True)

    def _known(self, task: Task) -> TaskHandle[Any]:
        """The task that has this id: of an earlier run, of another process, or of an equal item."""
        for handle in self._ahead:
            if isinstance(handle, TaskHandle) and handle.id == task.id:
                return handle
        stored = self._owner.get_task_status(task.id)
        if stored.type != task.type:
            raise ConfigurationError(
                f"task {task.id} is of type {stored.type!r} and none of this map: give it a name "
                "of its own"
            )
        handle = self._owner.handle(task.id)
        if stored.status is TaskStatus.COMPLETED:
            handle.conclude(stored)
        elif stored.status.finished:
            with suppress(InvalidTransition):  # another process was faster
                self._owner.requeue(task.id)
        return handle
