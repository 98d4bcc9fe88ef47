"""A map over items: one task for each item. If the map is run again, it finds the tasks by their ids."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from concurrent.futures import TimeoutError
from contextlib import suppress
from typing import Any, Protocol

import attrs

from taskx.attempt.executors import AnyExecutor, Executor, executor_of
from taskx.queue.intake import Intake, encoded, task_of
from taskx.queue.layers import LayeredIntake
from taskx.tasks import payload
from taskx.tasks.bell import Signal
from taskx.tasks.checks import check_int, check_number, optional_seconds
from taskx.tasks.clock import Clock
from taskx.tasks.config import Config
from taskx.tasks.display import Display
from taskx.tasks.errors import (
    ConfigurationError,
    DuplicateTask,
    InvalidTransition,
    PayloadError,
    TaskNotFound,
    UnknownTaskType,
)
from taskx.tasks.handles import TaskHandle
from taskx.tasks.model import Task, TaskStatus, check_name
from taskx.tasks.options import MapOptions, refuse_unknown
from taskx.tasks.submission import given
from taskx.tasks.timing import Timing
from taskx.tasks.values import Values

# Tasks submitted ahead for each worker if no window is given.
_AHEAD_PER_WORKER = 4
# Results that may wait behind one that takes long, for each place in the window.
_MOST_WAITING = 32
_NONE = object()


def ahead(config: Config) -> int:
    """Return the number of tasks to submit ahead if no window is given."""
    workers = config.worker_num
    return min(_AHEAD_PER_WORKER * workers, workers + config.buffer_size)


class _Owner(Protocol):
    def get_task_status(self, task_id: str, /) -> Task: ...
    def requeue(self, task_id: str, /) -> None: ...
    def handle(self, task_id: str, /) -> TaskHandle[Any]: ...
    @property
    def _values(self) -> Mapping[str, Values]: ...
    @property
    def _timing(self) -> Timing: ...


def digest(params: dict[str, Any]) -> str:
    """Return a digest of params that does not depend on the order of their keys.

    It is part of stored ids, so it must never change.

    Raises:
        PayloadError: the params break the JSON rules.
    """
    import hashlib  # slow to load, and not needed by a program without maps

    value = payload.loads(payload.encode_params(params, payload.NO_LIMIT))
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class _Place:
    """An item that was read. Its outcome is the handle of its task, or the error of an item without one."""

    __slots__ = ("item", "outcome")

    def __init__(self, item: Any) -> None:
        self.item = item
        self.outcome: TaskHandle[Any] | Exception | None = None

    @property
    def ended(self) -> bool:
        """True if its result may be taken."""
        outcome = self.outcome
        return isinstance(outcome, Exception) or (outcome is not None and outcome._has_ended)


class _Window:
    """The items whose results were not taken yet, in order.

    Args:
        ordered: take results in the order of the items.
        every: seconds between polls of a thread that waits for a task.
    """

    def __init__(self, *, ordered: bool, every: float) -> None:
        self._ordered = ordered
        self._every = every
        self._places: deque[_Place] = deque()
        # Other threads remove handles. So no code here iterates over it, only over a copy.
        self._unfinished: dict[TaskHandle[Any], None] = {}
        self._unwatched: deque[TaskHandle[Any]] = deque()
        self._bell: Signal | None = None

    def __len__(self) -> int:
        return len(self._places)

    def _on_end(self, handle: TaskHandle[Any]) -> None:
        self._unfinished.pop(handle, None)
        if self._bell is not None:
            self._bell.set()

    @property
    def unfinished(self) -> int:
        """The number of its tasks that have not ended, as far as is known."""
        return len(self._unfinished)

    @property
    def unstarted(self) -> _Place | None:
        """The item that has no task yet: it is new, or its submit failed or was interrupted."""
        last = self._places[-1] if self._places else None
        return None if last is None or last.outcome is not None else last

    def add(self, item: Any) -> None:
        """Put an item at the end."""
        self._places.append(_Place(item))

    def start(self, place: _Place, outcome: TaskHandle[Any] | Exception) -> None:
        """Note the task of an item, or the error of the item."""
        if isinstance(outcome, TaskHandle) and not (
            outcome._has_ended or outcome in self._unfinished
        ):
            self._unfinished[outcome] = None
            self._unwatched.append(outcome)
            outcome._listen(self._on_end)
        place.outcome = outcome  # at the end: a step that was interrupted is repeated
        place.item = None

    def handle(self, task_id: str) -> TaskHandle[Any] | None:
        """Return the handle of a task whose result was not taken yet."""
        for place in self._places:
            outcome = place.outcome
            if isinstance(outcome, TaskHandle) and outcome.id == task_id:
                return outcome
        return None

    def ended(self) -> _Place | None:
        """Return the first item that has ended and may be taken; None if there is none."""
        for place in self._places:
            if place.ended:
                return place
            if self._ordered:
                return None
        return None

    def bell(self) -> Signal:
        """Return a signal that rings when a task ends.

        Raises:
            RepositoryError: the repository cannot be read.
        """
        while self._unwatched:
            self._unwatched[0].done()  # from now on its end is reported
            self._unwatched.popleft()
        if self._bell is None:
            outcomes = [place.outcome for place in self._places]
            self._bell = next(o for o in outcomes if isinstance(o, TaskHandle))._signal()
            self._bell.set()  # a task may have ended before
        return self._bell

    def wait(self, bell: Signal, seconds: float) -> None:
        """Wait until a task ends, at most for ``seconds``."""
        most = seconds if bell.virtual else min(seconds, self._every)
        if self.ended() is None and not bell.wait(most):
            # The thread that reports may be gone.
            for handle in [*self._unfinished]:
                self._on_end(handle) if handle._has_ended else self._unwatched.append(handle)

    def take(self, place: _Place) -> Any:
        """Remove an item that has ended, and return its result or raise its error."""
        outcome = place.outcome
        self._places.remove(place)
        if not isinstance(outcome, TaskHandle):
            raise outcome or AssertionError("the item has not ended")
        self._unfinished.pop(outcome, None)
        return outcome.result(0)


@attrs.define(kw_only=True, eq=False, repr=False)
class Results(Iterator[Any]):
    """The results of a map. Each ``next`` fills the window with new tasks.

    It is made of the arguments of ``Queue.map``, of the queue (``owner``) and its clock, and of ``intake``,
    which returns the intake of the queue, or of the child in a forked child.

    Raises:
        TypeError: ``map`` has no such option.
        ConfigurationError: a value is not valid.
    """

    _executor: AnyExecutor | str
    _items: Iterable[Any]
    _key: Callable[[Any], str | int] | None
    _name: str
    _window: int
    _timeout: float | None = attrs.field(converter=optional_seconds)
    _return_exceptions: bool
    _ordered: bool
    _retry_failed: bool
    _progress: bool
    _options: Mapping[str, Any]
    _owner: _Owner
    _intake: Callable[[], Intake | LayeredIntake]
    _clock: Clock
    _left: Iterator[Any] = attrs.field(init=False)
    _display: Display | None = attrs.field(init=False, default=None)
    _under_way: _Window = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        refuse_unknown(self._options, MapOptions, "map")
        if not isinstance(self._executor, str):
            self._executor, bound = executor_of(
                self._executor, "map", "a type or an executor", self._owner
            )
            refuse_unknown(bound, MapOptions, "map", ": the executor is bound with it")
            self._options = {**bound, **given(self._options)}
        if self._key is not None and not callable(self._key):
            raise ConfigurationError(f"key must be a function of an item, not {self._key!r}")
        check_name(self._name, "name")
        check_int(self._window, "window", 1)
        if self._timeout is not None:
            check_number(self._timeout, "timeout")
        self._left = iter(self._items)
        timing = self._owner._timing
        self._under_way = _Window(ordered=self._ordered, every=timing.handles_every)
        if self._progress:
            total = len(self._items) if isinstance(self._items, Sized) else None
            self._display = Display(self._name or self._type, total, timing)

    @property
    def _type(self) -> str:
        return self._executor if isinstance(self._executor, str) else self._executor.type

    def __next__(self) -> Any:
        try:
            place = self._next_ended()
            try:
                result = self._under_way.take(place)
            except Exception as error:
                self._show(failed=1)
                if not self._return_exceptions:
                    raise
                return error
            self._show(done=1)
            return result
        except BaseException:  # also at the end: the display must not stay below an error message
            if self._display is not None:
                self._display.close()
            raise

    def _show(self, **counts: int) -> None:
        if self._display is not None:
            self._display.add(**counts)

    def _next_ended(self) -> _Place:
        """Wait for the next item that has ended.

        A long task does not make the workers idle. While this waits for it, each task that ends is
        replaced by a new one, until very many results wait behind the long task.
        """
        under_way, window = self._under_way, self._window

        def has_room() -> bool:
            return under_way.unfinished < window and len(under_way) < _MOST_WAITING * window

        self._fill(lambda: len(under_way) < window)
        if not under_way:
            raise StopIteration
        deadline = None
        while (place := under_way.ended()) is None:
            bell = under_way.bell()
            if deadline is None:
                deadline = math.inf if self._timeout is None else bell.now() + self._timeout
            elif bell.now() >= deadline:
                raise TimeoutError(f"no result of the map within {self._timeout:g} s")
            under_way.wait(bell, max(0.0, deadline - bell.now()))
            self._show()
            if under_way.ended() is None:
                self._fill(has_room)
        return place

    def _fill(self, has_room: Callable[[], bool]) -> None:
        under_way = self._under_way
        while True:
            if (place := under_way.unstarted) is not None:
                under_way.start(place, self._started(place.item))
            if not has_room() or (item := next(self._left, _NONE)) is _NONE:
                return
            under_way.add(item)

    def _started(self, item: Any) -> TaskHandle[Any] | Exception:
        """Submit the task of an item and return its handle; return the error if the item is not valid."""
        try:
            task = self._task(item)
        except Exception as error:  # noqa: BLE001  (``key`` is the user's function)
            return error
        try:
            return self._submit(task)
        except (ConfigurationError, PayloadError, UnknownTaskType) as error:
            return error

    def _task(self, item: Any) -> Task:
        """Return the task of an item: a dict is its params, any other value is its first parameter.

        Raises:
            PayloadError: the item does not fit the executor.
            ConfigurationError: ``key`` returned neither a text nor a whole number.
        """
        params = dict(item) if isinstance(item, Mapping) else None
        if isinstance(self._executor, Executor):
            task = (
                self._executor.task(item) if params is None else self._executor._task_with(params)
            )
        elif params is None:
            raise PayloadError(
                "params", "every item must be a dict if map gets only the name of a type"
            )
        else:
            task = encoded(Task(type=self._type, params=params), self._owner._values)
        key = digest(task.params) if self._key is None else self._key(item)
        if type(key) is not int and (not isinstance(key, str) or not key):
            raise ConfigurationError(f"key must return a text or a whole number, not {key!r}")
        task.id = f"{self._name or self._type}:{key}"
        return task

    def _submit(self, task: Task) -> TaskHandle[Any]:
        task, _ = task_of(task, None, self._options, MapOptions, "map", self._clock, self._owner)
        while True:
            try:
                self._intake().accept(task, self._options.get("priority"), spill=True)
                return self._owner.handle(task.id)
            except DuplicateTask:
                with suppress(TaskNotFound):  # it was deleted in the meantime, so the id is free
                    return self._known(task)

    def _known(self, task: Task) -> TaskHandle[Any]:
        """Return a handle for the stored task with this id.

        An earlier run of the map, another process or an equal item has submitted it.
        """
        if (under_way := self._under_way.handle(task.id)) is not None:
            return under_way
        stored = self._owner.get_task_status(task.id)
        if stored.type != task.type:
            raise ConfigurationError(
                f"task {task.id} has type {stored.type!r} and does not belong to this map: give the map "
                "another name"
            )
        handle = self._owner.handle(task.id)
        if stored.status is TaskStatus.COMPLETED or not self._retry_failed:
            handle._conclude(stored)
        elif stored.status.finished:
            with suppress(InvalidTransition):  # another process has requeued it
                self._owner.requeue(task.id)
        return handle
