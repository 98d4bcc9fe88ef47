"""A map over items: a task for each, which is found again by its id when the map is run again."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping
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
from taskx.submitting.intake import Intake, task_of

# Tasks that lie ahead for each worker, unless the caller says otherwise.
_AHEAD_PER_WORKER = 4
_NONE = object()


def ahead(config: Config) -> int:
    """Return the number of tasks submitted ahead, unless the caller says otherwise."""
    workers = config.worker_num
    return min(_AHEAD_PER_WORKER * workers, workers + config.buffer_size)


class _Owner(Protocol):
    def get_task_status(self, task_id: str, /) -> Task: ...
    def requeue(self, task_id: str, /) -> None: ...
    def handle(self, task_id: str, /) -> TaskHandle[Any]: ...


def digest(params: dict[str, Any]) -> str:
    """Return a digest of params, the same in any order of their keys; it is part of stored ids.

    Raises:
        PayloadError: they break the JSON rules.
    """
    value = payload.loads(payload.encode_params(params, payload.NO_LIMIT))
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@attrs.define(kw_only=True, eq=False, repr=False)
class Results(Iterator[Any]):
    """The results of a map, in the order of its items; each ``next`` submits what the window has room for.

    Its other attributes are the arguments of ``Queue.map``.

    Attributes:
        owner: the queue.
        intake: gives what takes its new tasks in: in a forked child, not what did so before.
        clock: what moments are told by.

    Raises:
        TypeError: there is no such option.
        ConfigurationError: a value is not valid.
    """

    executor: Executor[Any, Any] | str
    items: Iterator[Any]
    key: Callable[[Any], str | int] | None
    name: str
    window: int
    timeout: float | None
    return_exceptions: bool
    options: Mapping[str, Any]
    owner: _Owner
    intake: Callable[[], Intake]
    clock: Clock
    _item: Any = attrs.field(init=False, default=_NONE)
    #: The tasks under way, in order; an error stands for an item that is no task.
    _ahead: deque[TaskHandle[Any] | Exception] = attrs.field(init=False, factory=deque)

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

    def __next__(self) -> Any:
        self._fill()
        if not self._ahead:
            raise StopIteration
        head = self._ahead[0]
        try:
            if isinstance(head, Exception):
                raise head
            result = head.result(self.timeout)
        except Exception as error:
            # A time-out, or the repository is away: it is asked for again.
            if isinstance(head, TaskHandle) and not head.done():
                raise
            self._ahead.popleft()
            if not self.return_exceptions:
                raise
            return error
        self._ahead.popleft()
        return result

    def _fill(self) -> None:
        while len(self._ahead) < self.window:
            if self._item is _NONE:  # else its submit failed: no item is passed over
                self._item = next(self.items, _NONE)
            if self._item is _NONE:
                return
            self._ahead.append(self._started(self._item))
            self._item = _NONE

    def _started(self, item: Any) -> TaskHandle[Any] | Exception:
        """The task of an item, or what is wrong with the item and is no better at another try."""
        try:
            task = self._task(item)
        except Exception as error:  # noqa: BLE001  (``key`` is a function of the user's)
            return error
        try:
            return self._submit(task)
        except (ConfigurationError, PayloadError, UnknownTaskType) as error:
            return error

    def _task(self, item: Any) -> Task:
        """The task of an item: a dict is its params, any other value that of the first parameter.

        Raises:
            PayloadError: it does not fit the executor.
            ConfigurationError: ``key`` gives neither a text nor a number.
        """
        type_ = self.executor if isinstance(self.executor, str) else self.executor.type
        if isinstance(item, Mapping):
            task = Task(type=type_, params=dict(item))
        elif isinstance(self.executor, Executor):
            task = self.executor.task(item)
        else:
            raise PayloadError("params", "of a type by its name, every item must be a dict")
        key = digest(task.params) if self.key is None else self.key(item)
        if type(key) is not int and (not isinstance(key, str) or not key):
            raise ConfigurationError(f"key must give a text or a whole number, not {key!r}")
        task.id = f"{self.name or type_}:{key}"
        return task

    def _submit(self, task: Task) -> TaskHandle[Any]:
        task = task_of(task, None, self.options, MapOptions, "map", self.clock)
        while True:
            try:
                self.intake().accept(task, self.options.get("priority"), spill=True)
                return self.owner.handle(task.id)
            except DuplicateTask:
                with suppress(TaskNotFound):  # it was deleted since, so it is free now
                    return self._known(task)

    def _known(self, task: Task) -> TaskHandle[Any]:
        """The task that has this id: of an earlier run, of another process, or of an equal item."""
        for handle in self._ahead:
            if isinstance(handle, TaskHandle) and handle.id == task.id:
                return handle
        stored = self.owner.get_task_status(task.id)
        if stored.type != task.type:
            raise ConfigurationError(
                f"task {task.id} is of type {stored.type!r} and none of this map: give it a name "
                "of its own"
            )
        handle = self.owner.handle(task.id)
        if stored.status is TaskStatus.COMPLETED:
            handle.conclude(stored)
        elif stored.status.finished:
            with suppress(InvalidTransition):  # another process was faster
                self.owner.requeue(task.id)
        return handle
