"""A map over items: one task for each item. If the map is run again, it finds the tasks by their ids."""

from __future__ import annotations

import _thread
import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import TimeoutError
from contextlib import suppress
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, get_type_hints

import attrs

from taskx.attempt.executors import AnyExecutor, Executor, executor_of
from taskx.attempt.registry import Registry
from taskx.node.moving import Moves
from taskx.node.watcher import Watcher
from taskx.queue.intake import Intake, task_of
from taskx.queue.layers import LayeredIntake
from taskx.stores.base import Repository
from taskx.tasks import lifecycle, payload
from taskx.tasks.bell import Signal
from taskx.tasks.checks import as_seconds, check_int, check_number
from taskx.tasks.clock import Clock
from taskx.tasks.config import Config
from taskx.tasks.display import Display
from taskx.tasks.errors import (
    ConfigurationError,
    DuplicateTask,
    InvalidTransition,
    PayloadError,
    TaskFailed,
    UnknownTaskType,
    on_main_thread,
)
from taskx.tasks.findings import counted, listed
from taskx.tasks.handles import TaskHandle
from taskx.tasks.log import GuardedLogger
from taskx.tasks.model import Task, TaskStatus, check_name
from taskx.tasks.options import MapOptions, refuse_unknown
from taskx.tasks.payload import clean_text
from taskx.tasks.submission import given
from taskx.tasks.timing import Timing
from taskx.tasks.values import Values, encoded

# Tasks submitted ahead for each worker if no window is given: at first, ...
_AHEAD_PER_WORKER = 4
# ... and in all, while tasks end faster than results are taken. More would not find room in a buffer of the
# usual size, and would be read again.
_MOST_AHEAD = 160
# Results that may wait behind one that takes long, for each place in the window.
_MOST_WAITING = 32
# Tasks submitted in one transaction.
_LUMP = 250
# The seconds for which items are drawn while a result is ready.
_HOLD = 0.05
# Tasks whose results were taken and whose ends may not be logged yet: those of a few commits.
_LOGGED_LATE = 1000
_NONE = object()
# Characters of an error by which failures are counted.
_MOST_WORDS = 80
# Parameters with one of these annotations take no tuple.
_SCALARS = (str, int, float, bool, bytes)

R = TypeVar("R")


def ahead(config: Config) -> tuple[int, int]:
    """Return the number of tasks to submit ahead if no window is given: at first, and at most."""
    workers = config.worker_num
    first = min(_AHEAD_PER_WORKER * workers, workers + config.buffer_size)
    return first, max(first, _MOST_AHEAD)


class _Workers(Protocol):
    workers: int
    short: bool


class _Pool(Protocol):
    @property
    def ahead(self) -> _Workers: ...


class _Owner(Protocol):
    @property
    def repository(self) -> Repository: ...
    def requeue(self, task_id: str, /) -> None: ...
    def handle(self, task_id: str, /) -> TaskHandle[Any]: ...
    def watch(self, *handles: TaskHandle[Any]) -> None: ...
    @property
    def _pool(self) -> _Pool | None: ...
    @property
    def _values(self) -> Mapping[str, Values]: ...
    @property
    def _timing(self) -> Timing: ...
    @property
    def _registry(self) -> Registry: ...
    @property
    def _moves(self) -> Moves: ...
    @property
    def _watcher(self) -> Watcher: ...
    @property
    def _log(self) -> GuardedLogger: ...


_canonical = json.JSONEncoder(allow_nan=False, sort_keys=True, separators=(",", ":")).encode


def digest(params: dict[str, Any]) -> str:
    """Return a digest of params that does not depend on the order of their keys.

    It is part of stored ids, so it must never change. The submit checks the rest of the JSON rules.

    Raises:
        PayloadError: the params are not JSON.
    """
    import hashlib  # slow to load, and not needed by a program without maps

    try:
        text = _canonical(params)
    except (TypeError, ValueError, RecursionError):
        text = _canonical(payload.loads(payload.encode_params(params, payload.NO_LIMIT)))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class MapOutcome(NamedTuple):
    """An item of a map, with its result or its error."""

    item: Any
    #: The result of its task; None if there is an error.
    result: Any
    #: The error; None if the task has completed.
    error: Exception | None


#: A handle, or the error of an item that cannot be a task.
_Outcome = TaskHandle[Any] | Exception


@attrs.frozen(kw_only=True, eq=False, repr=False)
class _Submitter:
    """Makes the tasks of items, and submits them: see the arguments of :class:`Results`."""

    executor: AnyExecutor | str
    key: Callable[[Any], str | int] | None
    name: str
    star: bool
    retry_failed: bool
    options: Mapping[str, Any]
    owner: _Owner
    intake: Callable[[], Intake | LayeredIntake]
    clock: Clock
    #: The ids of tasks that had completed before; each is removed when its item is noted.
    stored: set[str] = attrs.field(init=False, factory=set)
    #: The versions of the executor of which the log has said that their items run again.
    replaced: set[str | None] = attrs.field(init=False, factory=set)
    #: The name of the only param that a plain item is; None if the executor must find out.
    param: str | None = attrs.field(init=False)
    #: The name and the annotation of the first parameter, if that takes no tuple; else None.
    scalar: tuple[str, str] | None = attrs.field(init=False)

    @param.default
    def _only_param(self) -> str | None:
        executor = self.executor
        return executor._only_param if isinstance(executor, Executor) else None

    @scalar.default
    def _first_scalar(self) -> tuple[str, str] | None:
        if not isinstance(self.executor, Executor):
            return None
        first = next(iter(self.executor._signature.parameters), "")
        hints: Mapping[str, Any] = {}
        with suppress(Exception):  # an annotation that does not exist when the program runs
            hints = get_type_hints(self.executor.function)
        kind = hints.get(first)
        return (first, kind.__name__) if kind in _SCALARS else None

    @property
    def type(self) -> str:
        return self.executor if isinstance(self.executor, str) else self.executor.type

    @property
    def few(self) -> float:
        """The number of unfinished tasks below which a new one starts at once.

        While tasks are short, one worker runs them all. If the queue is not started, nobody knows.
        Middleware sees each task alone, on the thread of the map.
        """
        pool = self.owner._pool
        if pool is None or not isinstance(self.intake(), Intake):
            return math.inf
        return 1 if pool.ahead.short else pool.ahead.workers

    @property
    def short(self) -> bool:
        """True if tasks are so short that to submit them costs more than to run them."""
        pool = self.owner._pool
        return pool is not None and pool.ahead.short

    def task(self, item: Any) -> Task:
        """Return the task of an item: a dict is its params, any other value is its first parameter.

        With ``star``, the values of the item are the parameters.

        Raises:
            Exception: the item cannot be a task: it does not fit the executor, the key is not valid, or
                what the user's ``key`` function has raised.
        """
        executor = self.executor
        params = dict(item) if isinstance(item, Mapping) else None
        if isinstance(executor, Executor):
            if params is None and type(item) is tuple and self.scalar and not self.star:
                name, kind = self.scalar
                raise TypeError(
                    f"the item {clean_text(repr(item), 100)} is a tuple, but {name} takes {kind}: write "
                    "map(…, star=True) to pass its values as arguments"
                )
            if params is None and self.star:
                task = executor.task(*item)
            elif params is None and self.param is not None:
                task = executor._task_with({self.param: item})
            else:
                task = executor.task(item) if params is None else executor._task_with(params)
        elif params is None:
            raise PayloadError(
                "params", "every item must be a dict if map gets only the name of a type"
            )
        else:
            task = encoded(Task(type=self.type, params=params), self.owner._values)
        key = digest(task.params) if self.key is None else self.key(item)
        if type(key) is not int and (not isinstance(key, str) or not key):
            raise ConfigurationError(f"key must return a text or a whole number, not {key!r}")
        task.id = f"{self.name or self.type}:{key}"
        options = self.options
        if callable(of_item := options.get("concurrency_key")):
            options = given({**options, "concurrency_key": of_item(item)})
        task, _ = task_of(task, None, options, MapOptions, "map", self.clock, self.owner)
        return task

    def submit(
        self, tasks: Sequence[Task], under_way: Callable[[], Mapping[str, TaskHandle[Any]]]
    ) -> list[_Outcome]:
        """Submit tasks with different ids in one transaction; return their handles, or their errors.

        An earlier run of the map, another process or an equal item may have submitted some before.
        ``under_way`` returns the handles of this map whose results were not taken yet.

        Raises:
            TaskxError: the same call can be made again.
        """
        found: dict[str, _Outcome] = {}
        left = {task.id: task for task in tasks}
        while left:
            try:
                watched = self._accept([*left.values()])
                found.update((i, watched.get(i) or self.owner.handle(i)) for i in left)
                left = {}
            except DuplicateTask:
                here = under_way()
                found.update((task_id, here[task_id]) for task_id in left if task_id in here)
                stored = self.owner.repository.get_many([i for i in left if i not in found])
                outdated = [task for task in stored.values() if self._is_outdated(task)]
                self._discard(outdated)  # and so they are submitted again
                for task in stored.values():
                    if task not in outdated:
                        found[task.id] = self._known(left[task.id], task)
                left = {task_id: task for task_id, task in left.items() if task_id not in found}
            except (ConfigurationError, PayloadError, UnknownTaskType) as error:
                if len(left) > 1:  # the others are submitted without the one that is not valid
                    for task_id, task in left.items():
                        [found[task_id]] = self.submit([task], under_way)
                else:
                    found.update(dict.fromkeys(left, error))
                left = {}
        return [found[task.id] for task in tasks]

    def _accept(self, tasks: Sequence[Task]) -> dict[str, TaskHandle[Any]]:
        """Store tasks. Return handles of those that are watched since before they could start."""
        priority = self.options.get("priority")
        intake, handles = self.intake(), dict[str, TaskHandle[Any]]()

        def watch(task_ids: Sequence[str]) -> None:
            handles.update((task_id, self.owner.handle(task_id)) for task_id in task_ids)
            self.owner._watcher.watch(*handles.values(), runs=handles.__contains__)

        if isinstance(intake, Intake) and len(tasks) > 1:
            intake.accept_many(tasks, priority, spill=True, watch=watch)
        else:
            for task in tasks:
                intake.accept(task, priority, spill=True)
        return handles

    @property
    def version(self) -> str | None:
        """The version of the executor; None if it has none, or is in another process."""
        known = self.owner._registry.registered.get(self.type)
        return None if known is None else known.options.version

    def _is_outdated(self, stored: Task) -> bool:
        """Return True if a task of this map has ended with another version of the executor.

        While a thread of it still runs, its record cannot be removed: it is known, and can be requeued.
        """
        version = self.version
        ended = stored.status.finished and not stored.stuck_on
        ran = stored.type == self.type and ended and stored.starts > 0
        return ran and version is not None and stored.version != version

    def _discard(self, tasks: Sequence[Task]) -> None:
        """Remove tasks that have ended, unless they have moved since they were read."""
        if not tasks:
            return
        owner, version = self.owner, self.version
        owner.repository.transactions.refuse_write()
        for old in {task.version for task in tasks} - self.replaced:
            self.replaced.add(old)
            owner._log.warning(
                "map %s: items that %s of the executor has run are run again by version %s",
                self.name or self.type,
                f"version {old}" if old else "no version",
                version,
            )
        owner._moves.commit([lifecycle.discard(task) for task in tasks])

    def _known(self, task: Task, stored: Task) -> _Outcome:
        """Return a handle for a stored task; return an error if it does not belong to this map."""
        if stored.type != task.type:
            return ConfigurationError(
                f"task {task.id} has type {stored.type!r} and does not belong to this map: give the map "
                "another name"
            )
        handle = self.owner.handle(task.id)
        if stored.status is TaskStatus.COMPLETED or not self.retry_failed:
            handle._conclude(stored)
            if stored.status is TaskStatus.COMPLETED:
                self.stored.add(task.id)
        elif stored.status.finished:
            with suppress(InvalidTransition):  # another process has requeued it
                self.owner.requeue(task.id)
        return handle


class _Place:
    """An item that was drawn, then its task, and then its outcome: a handle, or the error of the item."""

    __slots__ = ("item", "outcome", "shown", "stored", "task")

    def __init__(self, item: Any) -> None:
        self.item = item
        self.task: Task | None = None
        self.outcome: _Outcome | None = None
        #: True if its task had completed before this map.
        self.stored = False
        #: True if the display has counted it.
        self.shown = False

    @property
    def ended(self) -> bool:
        """True if its result may be taken."""
        outcome = self.outcome
        return isinstance(outcome, Exception) or (outcome is not None and outcome._has_ended)

    @property
    def failed(self) -> bool:
        """True if it has ended, and without a result."""
        outcome = self.outcome
        return isinstance(outcome, Exception) or (outcome is not None and outcome._ended_badly)


class _Window:
    """The items whose results were not taken yet, in order.

    Items that were drawn are submitted in lumps. The thread of the map may be drawing the next item for
    long, so the thread that reports the end of a task submits them once few tasks are left.

    Args:
        submitter: makes tasks and submits them.
        ordered: take results in the order of the items.
        every: seconds between polls of a thread that waits for a task.
    """

    def __init__(self, submitter: _Submitter, *, ordered: bool, every: float) -> None:
        self.submitter = submitter
        self._ordered = ordered
        self._every = every
        # Lists, of which a copy is one step: another thread may change them.
        self._places: list[_Place] = []
        # The places that may have no outcome yet: those that were added last, and others before them.
        self._drawn: list[_Place] = []
        # Held by the thread that submits.
        self._submitting = _thread.allocate_lock()
        # Other threads remove handles. So no code here iterates over it, only over a copy.
        self._unfinished: dict[TaskHandle[Any], None] = {}
        self._unwatched: list[TaskHandle[Any]] = []
        self._bell: Signal | None = None
        #: Submit what was drawn while fewer tasks than this are unfinished.
        self.few = math.inf
        #: Wake the thread of the map when only so many tasks are unfinished.
        self.low = 0
        # The tasks that were submitted here and whose results were not taken yet, or just now: of the end
        # of a task this thread may hear before the log of the queue does.
        self._ids: set[str] = set()
        self._taken: deque[str] = deque()

    def __contains__(self, task_id: object) -> bool:
        return task_id in self._ids

    def report_failures(self) -> None:
        """From now on the map tells of the failures of its tasks, and the log of the queue does not."""
        self.submitter.owner._watcher.reported.add(self)

    def __len__(self) -> int:
        return len(self._places)

    def _on_end(self, handle: TaskHandle[Any]) -> None:
        self._unfinished.pop(handle, None)
        left = len(self._unfinished)
        if self._drawn and left < self.few and not on_main_thread():
            self._submit_for_others()
        if self._bell is not None and (
            left <= self.low or not self._ordered or self._first_has_ended()
        ):
            self._bell.set()

    def _first_has_ended(self) -> bool:
        try:
            return self._places[0].ended
        except IndexError:
            return False

    @property
    def unfinished(self) -> int:
        """The number of its tasks that have not ended, as far as is known."""
        return len(self._unfinished)

    # --- items that have no task yet

    def add(self, item: Any) -> None:
        """Put an item at the end, and submit it if it can start at once, or if enough others wait."""
        place = _Place(item)
        self._drawn.append(place)
        self._places.append(place)
        self._prepare(place)
        if len(self._unfinished) < self.few or len(self._drawn) >= _LUMP:
            self.submit()

    def _prepare(self, place: _Place) -> None:
        try:
            place.task = self.submitter.task(place.item)
        except Exception as error:  # noqa: BLE001  (``key`` is the user's function)
            place.outcome = error

    def submit(self) -> None:
        """Submit the items that have no task yet: new ones, and those whose submit failed before.

        Raises:
            TaskxError: the next call submits them.
        """
        for place in [*self._drawn]:
            if place.task is None and place.outcome is None:  # an interrupt has struck
                self._prepare(place)
        with self._submitting:
            self._submit()

    def _submit_for_others(self) -> None:
        """Submit the items for the thread of the map, which meets the same error if that fails."""
        more = True
        with suppress(Exception):
            while (
                more
                and self._drawn
                and len(self._unfinished) < self.few
                and self._submitting.acquire(blocking=False)
            ):
                try:
                    # False if an interrupt has struck before the first one had its task: the thread of the
                    # map makes it.
                    more = self._submit()
                finally:
                    self._submitting.release()

    def _submit(self) -> bool:
        """Submit the first items, as far as they have tasks. Return True if there was one."""
        drawn, some = self._drawn, False
        while True:
            while drawn and drawn[0].outcome is not None:
                del drawn[0]
            lump: dict[str, _Place] = {}
            for place in [*drawn]:
                if (task := place.task) is None or task.id in lump:
                    break
                if place.outcome is None:
                    lump[task.id] = place
            if not lump:
                break
            tasks = [place.task for place in lump.values() if place.task is not None]
            self._ids.update(lump)
            outcomes = self.submitter.submit(tasks, self._by_id)
            for place, outcome in zip(lump.values(), outcomes, strict=True):
                self._start(place, outcome)
            some = True
        self._watch()
        return some

    def _start(self, place: _Place, outcome: _Outcome) -> None:
        """Note the task of an item, or the error of the item."""
        if isinstance(outcome, TaskHandle) and not (
            outcome._has_ended or outcome in self._unfinished
        ):
            self._unfinished[outcome] = None
            if outcome._watched_by is None:
                self._unwatched.append(outcome)
            outcome._listen(self._on_end)
        if place.task is not None and place.task.id in (stored := self.submitter.stored):
            place.stored = True
            stored.discard(place.task.id)
        place.outcome = outcome  # at the end: a step that was interrupted is repeated
        place.task = None

    def _by_id(self) -> Mapping[str, TaskHandle[Any]]:
        outcomes = [place.outcome for place in [*self._places]]
        return {outcome.id: outcome for outcome in outcomes if isinstance(outcome, TaskHandle)}

    def _watch(self) -> None:
        """Have the ends of all its tasks reported from now on."""
        if handles := [*self._unwatched]:
            self.submitter.owner.watch(*handles)
            del self._unwatched[: len(handles)]

    # --- results

    def ended(self) -> _Place | None:
        """Return the first item that has ended and may be taken; None if there is none."""
        for place in self._places:
            if place.ended:
                return place
            if self._ordered:
                return None
        return None

    def all_ended(self) -> list[_Place]:
        """Return the items that have ended, in order."""
        return [place for place in self._places if place.ended]

    def bell(self) -> Signal:
        """Return a signal that rings when a task ends for which the thread of the map waits.

        Raises:
            RepositoryError: the repository cannot be read.
        """
        with self._submitting:
            self._watch()
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
        self._taken.append(outcome.id)
        if len(self._taken) > _LOGGED_LATE:
            self._ids.discard(self._taken.popleft())
        self._unfinished.pop(outcome, None)
        return outcome.result(0)


@attrs.define(kw_only=True, eq=False, repr=False)
class MapResults(Iterator[R], Generic[R]):
    """The results of a map, an iterator. ``Queue.map`` makes it."""

    # Each ``next`` fills the window with new tasks. It is made of the arguments of ``Queue.map``, of the
    # queue (``owner``) and its clock, and of ``intake``, which returns the intake of the queue, or of the
    # child in a forked child. The window may grow up to ``widest``.

    _executor: AnyExecutor | str
    _items: Iterable[Any]
    _key: Callable[[Any], str | int] | None
    _name: str
    _star: bool
    _window: int
    _widest: int
    _timeout: float | None = attrs.field(converter=as_seconds)
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
    # The number of errors of each type that were not raised, and their text.
    _failures: dict[str, tuple[int, str]] = attrs.field(init=False, factory=dict)
    _show_at: float = attrs.field(init=False, default=0.0)
    # True if items come so slowly that none is drawn while a result is ready.
    _slow: bool = attrs.field(init=False, default=False)

    def __attrs_post_init__(self) -> None:
        refuse_unknown(self._options, MapOptions, "map")
        if not isinstance(self._executor, str):
            self._executor, bound = executor_of(
                self._executor, "map", "a type or an executor", self._owner
            )
            # The key of a map is another one.
            bound = {"concurrency_key" if k == "key" else k: v for k, v in bound.items()}
            refuse_unknown(bound, MapOptions, "map", ": the executor is bound with it")
            self._options = {**bound, **given(self._options)}
        if self._star and not isinstance(self._executor, Executor):
            raise ConfigurationError(
                "map(star=True) takes an executor that is a function: give it in place of its type"
            )
        if self._key is not None and not callable(self._key):
            raise ConfigurationError(f"key must be a function of an item, not {self._key!r}")
        check_name(self._name, "name")
        check_int(self._window, "window", 1)
        if self._timeout is not None:
            check_number(self._timeout, "timeout")
        self._left = iter(self._items)
        timing = self._owner._timing
        submitter = _Submitter(
            executor=self._executor,
            key=self._key,
            name=self._name,
            star=self._star,
            retry_failed=self._retry_failed,
            options=self._options,
            owner=self._owner,
            intake=self._intake,
            clock=self._clock,
        )
        self._under_way = _Window(submitter, ordered=self._ordered, every=timing.handles_every)
        if self._return_exceptions:
            self._under_way.report_failures()
        if self._progress:
            total = len(self._items) if isinstance(self._items, Sized) else None
            self._display = Display(self._name or submitter.type, total, timing)

    def __repr__(self) -> str:
        submitter = self._under_way.submitter
        return (
            f"<MapResults of {submitter.name or submitter.type}: iterate over it, as by list(), to run the "
            "items>"
        )

    def outcomes(self) -> Iterator[MapOutcome]:
        """Return an iterator over what became of each item: the item, and its result or its error.

        An error is not raised. ``pandas.DataFrame(queue.map(…).outcomes())`` is a table of all items.

        Raises:
            TaskxError: from the iterator, what concerns no single item, as for ``Queue.map``.
        """
        self._under_way.report_failures()
        while True:
            try:
                yield self._take(raises=False)
            except StopIteration:
                return

    def __next__(self) -> R:
        outcome = self._take(raises=not self._return_exceptions)
        return outcome.result if outcome.error is None else outcome.error  # type: ignore[return-value]

    def _take(self, *, raises: bool) -> MapOutcome:
        """Return the outcome of the next item that has ended; raise its error if ``raises``."""
        try:
            place = self._next_ended()
            try:
                result = self._under_way.take(place)
            except Exception as error:
                self._show(place, failed=True)
                if raises:
                    raise
                self._count(error)
                return MapOutcome(place.item, None, error)
            self._show(place, failed=False)
            return MapOutcome(place.item, result, None)
        except BaseException:  # also at the end: the display must not stay below an error message
            if self._display is not None:
                self._display.close()
            self._tell_failures()
            raise

    def _tell_failures(self) -> None:
        """Log how many items failed, and why, since the last such line."""
        failures, self._failures = self._failures, {}
        if failures:
            kinds = sorted(failures.items(), key=lambda pair: pair[1][0], reverse=True)
            told = [f"{count:,} {kind}{text and f': {text}'}" for kind, (count, text) in kinds]
            self._owner._log.warning(
                "map %s: %s failed: %s",
                self._under_way.submitter.name or self._under_way.submitter.type,
                counted(sum(count for count, _ in failures.values()), "item"),
                listed(told),
            )

    def _count(self, error: Exception) -> None:
        """Count an error by its type, with its text if all of that type have the same one."""
        kind, text = type(error).__name__, str(error)
        if isinstance(error, TaskFailed):
            kind, _, text = error.error.partition(": ")
        text = clean_text(text.partition("\n")[0], _MOST_WORDS)
        count, other = self._failures.get(kind, (0, text))
        self._failures[kind] = (count + 1, text if text == other else "")

    def _show(self, place: _Place, *, failed: bool) -> None:
        """Count an item that has ended, unless that was done."""
        if self._display is not None and not place.shown:
            place.shown = True
            self._display.add(not failed, failed, stored=place.stored)

    def _show_ended(self) -> None:
        """Count the items that have ended, also those behind one that takes long."""
        if self._display is not None and (now := time.monotonic()) >= self._show_at:
            self._show_at = now + self._owner._timing.progress_every
            self._display.add()
            for place in self._under_way.all_ended():
                self._show(place, failed=place.failed)

    def _next_ended(self) -> _Place:
        """Wait for the next item that has ended.

        A long task does not make the workers idle. While this waits for it, tasks that end are
        replaced by new ones, until very many results wait behind the long task.
        """
        under_way, deadline = self._under_way, None
        room = self._window - len(under_way)
        place = under_way.ended()
        if place is not None and (self._slow or 2 * room < self._window):
            return place
        self._fill(room)
        if not under_way:
            raise StopIteration
        while (place := under_way.ended()) is None:
            bell = under_way.bell()
            if deadline is None:
                deadline = math.inf if self._timeout is None else bell.now() + self._timeout
            elif bell.now() >= deadline:
                raise TimeoutError(f"no result of the map within {self._timeout:g} s")
            full = len(under_way) >= self._window
            under_way.wait(bell, max(0.0, deadline - bell.now()))
            self._show_ended()
            starve = 4 * under_way.unfinished < self._window or under_way.submitter.short
            if full and starve and self._window < self._widest:
                self._window = min(2 * self._window, self._widest)
            if under_way.ended() is None:
                room = self._window - under_way.unfinished
                self._fill(min(room, _MOST_WAITING * self._window - len(under_way)))
        return place

    def _fill(self, room: int) -> None:
        """Draw items and submit their tasks, up to ``room``, once that is worth a transaction."""
        under_way = self._under_way
        under_way.few = few = under_way.submitter.few
        under_way.submit()
        worth = max(1, self._window // 4)
        under_way.low = max(self._window - worth, int(min(few, self._window)) - 1)
        if room < worth and under_way.unfinished >= few:
            return
        self._slow, until = False, time.monotonic() + _HOLD
        for _ in range(room):
            try:
                if (item := next(self._left, _NONE)) is _NONE:
                    under_way.low = 0
                    break
            except Exception:
                under_way.submit()
                raise
            under_way.add(item)
            self._slow = time.monotonic() > until
            if self._slow and under_way.ended() is not None:
                break
        under_way.submit()
