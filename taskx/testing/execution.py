"""One attempt of an executor by itself, with a context that keeps what it is told."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, overload

import attrs

from taskx.attempt.capture import Capture, CapturedLogger
from taskx.attempt.context import Context, Watched, log_prefix
from taskx.attempt.executors import BoundExecutor, Executor, TaskExecutor, make_executor
from taskx.attempt.runner import Run
from taskx.attempt.waiting import Parked
from taskx.tasks import payload
from taskx.tasks.checks import Duration, check_int, is_async, optional_seconds
from taskx.tasks.model import Task, TaskStatus
from taskx.tasks.options import Options, ScheduleOptions, refuse_unknown
from taskx.tasks.values import Values
from taskx.tasks.writes import Update
from taskx.testing.clock import ManualClock
from taskx.testing.queues import ManualQueue

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing from 3.11 on


P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


@attrs.define(eq=False)
class Outcome(Generic[R]):
    """One attempt of an executor: how it ended, and what it did on its way.

    Attributes:
        task: the task's record after the attempt: ``task.status`` is ``pending`` if it is tried again.
        error: what the executor raised, or ``PayloadError`` if what it returned is not JSON; None if it
            returned a JSON value.
        progress: the progress that it told, each as a percentage and a message.
        steps: the results of ``ctx.step`` by the names of the steps, those of earlier attempts included.
        called: the names of the steps whose function was called in this attempt, in order.
        parked: the name of the answer, sleep or other step in which it waits now, without an error; empty
            if it does not.
        cursor: the last value of ``ctx.cursor``.
        log: what it logged by ``ctx.logger`` and, as far as their levels let it through, by other loggers:
            each record as level and message, such as ``"INFO 3 rows"``.
        records: the same as ``logging.LogRecord`` objects.
    """

    task: Task
    error: BaseException | None = None
    progress: list[tuple[int, str]] = attrs.field(factory=list)
    steps: dict[str, Any] = attrs.field(factory=dict)
    called: list[str] = attrs.field(factory=list)
    parked: str = ""
    cursor: Any = None
    log: list[str] = attrs.field(factory=list)
    records: list[logging.LogRecord] = attrs.field(factory=list, repr=False)
    _values: Values | None = attrs.field(default=None, repr=False)

    @property
    def status(self) -> TaskStatus:
        """The status of the task after the attempt."""
        return self.task.status

    @property
    def result(self) -> R:
        """The value that the executor returned, as ``TaskHandle.result`` gives it back.

        Raises:
            BaseException: what the executor raised, if it did: the same object as :attr:`error`.
        """
        if self.error is not None:
            raise self.error
        result: R = self.task.result
        return result if self._values is None else self._values.decode_result(result)


class _RecordingContext(Watched):
    """A context that keeps what the executor tells."""

    __slots__ = ("_declare", "_outcome")

    def __init__(
        self, run: Run, capture: Capture, outcome: Outcome[Any], declare: Callable[..., object]
    ) -> None:
        shared = run.context._shared
        logger = CapturedLogger(shared.log, capture)
        super().__init__(run.task, run.token, shared._replace(log=logger), run.beat)
        self._outcome = outcome
        self._declare = declare

    def progress(self, percent: float, message: str = "") -> None:
        super().progress(percent, message)
        if (told := self._latest_progress()) is not None:
            self._outcome.progress.append(told)

    def step(self, name: str, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        def called() -> T:
            self._outcome.called.append(name)
            return fn(*args, **kwargs)

        result = super().step(name, called)
        self._outcome.steps[name] = result
        return result

    async def astep(
        self, name: str, fn: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs
    ) -> Any:
        def plain() -> Any:
            self._outcome.called.append(name)
            return fn(*args, **kwargs)

        async def in_coroutine() -> Any:
            return await plain()

        result = await super().astep(name, in_coroutine if is_async(fn) else plain)
        self._outcome.steps[name] = result
        return result

    def run_all(self, name: str, tasks: Iterable[Task], **how: Any) -> list[Any]:
        made = [*tasks]  # their executors are no part of this
        self._declare(*(task.type for task in made if isinstance(task, Task)))
        return super().run_all(name, made, **how)

    @property
    def cursor(self) -> Any:
        return super().cursor

    @cursor.setter
    def cursor(self, value: Any) -> None:
        Context.cursor.fset(self, value)  # type: ignore[attr-defined]
        self._outcome.cursor = value


class _Records(Capture):
    def __init__(self, run: Run, prefix: str, outcome: Outcome[Any]) -> None:
        super().__init__(logging.DEBUG, prefix, run.beat)
        self._start, self._outcome = prefix, outcome

    def add(self, record: logging.LogRecord) -> None:
        super().add(record)
        self._outcome.records.append(record)
        try:
            text = record.getMessage()
        except Exception:  # noqa: BLE001  (a message with a bad format, which logging reports)
            text = str(record.msg)
        self._outcome.log.append(f"{record.levelname} {text.removeprefix(self._start)}")


@overload
def run_executor(
    executor: Executor[..., R] | BoundExecutor[..., R],
    params: Mapping[str, Any] | None = None,
    *,
    cancel_after: Duration | None = None,
    attempt: int = 1,
    steps: Mapping[str, Any] | None = None,
    cursor: Any = None,
    parents: Sequence[Any] = (),
    clock: ManualClock | None = None,
    **options: Unpack[ScheduleOptions],
) -> Outcome[R]: ...
@overload
def run_executor(
    executor: TaskExecutor,
    params: Mapping[str, Any] | None = None,
    *,
    cancel_after: Duration | None = None,
    attempt: int = 1,
    steps: Mapping[str, Any] | None = None,
    cursor: Any = None,
    parents: Sequence[Any] = (),
    clock: ManualClock | None = None,
    **options: Unpack[ScheduleOptions],
) -> Outcome[Any]: ...
@overload
def run_executor(
    executor: Callable[..., R],
    params: Mapping[str, Any] | None = None,
    *,
    cancel_after: Duration | None = None,
    attempt: int = 1,
    steps: Mapping[str, Any] | None = None,
    cursor: Any = None,
    parents: Sequence[Any] = (),
    clock: ManualClock | None = None,
    **options: Unpack[ScheduleOptions],
) -> Outcome[R]: ...
def run_executor(
    executor: Executor[..., Any] | BoundExecutor[..., Any] | TaskExecutor | Callable[..., Any],
    params: Mapping[str, Any] | None = None,
    *,
    cancel_after: Duration | None = None,
    attempt: int = 1,
    steps: Mapping[str, Any] | None = None,
    cursor: Any = None,
    parents: Sequence[Any] = (),
    clock: ManualClock | None = None,
    **options: Any,
) -> Outcome[Any]:
    """Run one attempt of an executor, in this thread, without a queue, and return how it went.

    It is given a real context. Params and result are checked as always, and time-outs, ``Retry`` and
    checkpoints work. ``ctx.sleep`` moves the clock instead of waiting. What the executor raises is kept as
    ``outcome.error``, and raised by ``outcome.result``. An executor with ``isolation="process"`` runs in
    this process. Middleware is not called.

    Args:
        executor: an executor, an instance of a ``TaskExecutor``, or a function that could be one.
        params: the task's params.
        cancel_after: seconds on the clock after which the task is cancelled; with 0, before the executor is
            called. A loop that only asks its token is cancelled, too: after the first thousand looks in a
            row, each look lets a millisecond pass.
        attempt: the number of the attempt.
        steps: the results of the steps that earlier attempts have stored, by name, of answers, and of lists
            of children.
        cursor: the cursor that an earlier attempt has stored.
        parents: the results of the tasks that ``ctx.parents`` returns.
        clock: the clock; a new one by default.
        options: ``timeout``, ``retry`` and other options of the task, as :meth:`Queue.schedule` takes them.

    Raises:
        PayloadError: the params are not JSON, or do not fit the executor.
        ConfigurationError: an argument is not valid.
        KeyboardInterrupt: the executor was interrupted.
    """
    if isinstance(executor, BoundExecutor):
        bound = executor.options.items()
        options = {**{k: v for k, v in bound if k in ScheduleOptions.__annotations__}, **options}
        executor = executor.executor
    refuse_unknown(options, ScheduleOptions, "run_executor")
    queue = ManualQueue(clock=clock)
    type_ = _register(queue, executor)
    task_id = queue.submit(
        type_,
        dict(params or {}),
        depends_on=_completed(queue, f"{type_} parent", parents),
        **options,
    ).id
    _amend(queue, task_id, attempt, steps, cursor)
    run = queue._start_next()
    assert isinstance(run, Run)  # it may start: nothing holds it back
    outcome: Outcome[Any] = Outcome(
        run.task, steps=dict(steps or {}), cursor=cursor, values=run.executor.values
    )
    run.capture = _Records(run, log_prefix(task_id, type_), outcome)
    run.context = _RecordingContext(run, run.capture, outcome, queue.declare)
    seconds = optional_seconds(cancel_after)
    if seconds == 0:
        queue.cancel_task(task_id)
    elif seconds is not None:
        queue.clock.call_later(seconds, lambda: queue.cancel_task(task_id))
    outcome.error = queue._execute(run)
    if isinstance(outcome.error, Parked):
        outcome.parked, outcome.error = outcome.error.step, None
    outcome.task = queue.get_task_status(task_id)
    return outcome


def _register(queue: ManualQueue, executor: Any) -> str:
    """Register an executor, or a copy of it that stays bound to its own queue; return its type."""
    if isinstance(executor, Executor):
        options = attrs.evolve(executor.options, isolation=None)
        executor = make_executor(executor.function, executor.type, options)
    elif not callable(getattr(executor, "execute", None)):
        executor = make_executor(executor, None, Options())
    queue.register_executor(executor)
    type_: str = executor.type
    return type_


def _completed(queue: ManualQueue, type: str, results: Sequence[Any]) -> list[str]:
    """Store completed tasks with these results; return their ids."""
    if not results:
        return []
    queue.executor(type)(lambda result: result)
    handles = [queue.submit(type, {"result": result}) for result in results]
    queue.run_all()
    return [handle.id for handle in handles]


def _amend(
    queue: ManualQueue, task_id: str, attempt: int, steps: Mapping[str, Any] | None, cursor: Any
) -> None:
    """Give the stored task what earlier attempts would have left."""
    stored: dict[str, Any] = {}
    if steps:
        stored["steps"] = dict(steps)
    if cursor is not None:
        stored["cursor"] = cursor
    changes: dict[str, Any] = {"errors": check_int(attempt, "attempt", 1) - 1}
    if stored:
        changes["checkpoints"] = payload.encode(stored, "steps and cursor")
    queue.repository.apply([Update(task_id, {}, changes)])
