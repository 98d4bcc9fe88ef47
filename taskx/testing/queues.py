"""Queues for tests: their caller runs the tasks, one by one, on a clock that stands still."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import TimeoutError
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from functools import partial, wraps
from typing import Any, TypeVar, cast

from taskx.attempt.executors import BoundExecutor, Executor
from taskx.attempt.registry import Layer
from taskx.attempt.runner import Call, Run, inside_executor, runs_of
from taskx.node.hooks import Hook
from taskx.queue.intake import Intake
from taskx.queue.operations import Operations
from taskx.queue.queue import FindExecutor, Queue
from taskx.stores.adapter import EightMethodAdapter
from taskx.stores.base import Repository
from taskx.stores.door import Door
from taskx.stores.eight import TaskRepository
from taskx.tasks.checks import Duration, check_number, check_plain, is_async
from taskx.tasks.config import Config
from taskx.tasks.errors import ConfigurationError, TaskFailed
from taskx.tasks.handles import TaskHandle
from taskx.tasks.model import Task, TaskStatus
from taskx.tasks.options import OnConflict
from taskx.tasks.writes import Insert
from taskx.testing import submissions
from taskx.testing.clock import ManualClock
from taskx.testing.driven import (
    SHORTEST_STEP,
    Driven,
    DrivenSignal,
    is_for_the_test,
    wait_for_threads,
)
from taskx.testing.joined import DrivenRepository
from taskx.testing.submissions import Submissions

#: A type of tasks: its name, or an executor.
Kind = str | Executor[..., Any] | BoundExecutor[..., Any]


class ManualQueue(Queue):
    """A queue whose tasks run when its caller says so, in the caller's thread.

    It is a real :class:`Queue`: checks, retries, time-outs, limits, schedules and flows work as in one that
    is started. But it has no threads, and its clock stands still. Nothing runs until :meth:`run_next`,
    :meth:`run_all` or :meth:`advance`. ``ctx.sleep`` moves the clock instead of waiting.

    A wait for a task that has not ended (``handle.result()``) raises ``TimeoutError`` at once. Inside an
    executor it runs other tasks in the meantime, as other workers would.

    The buffer has room for every task, whatever the config says.

    Args:
        repository: stores the tasks; by default they are in memory.
        config: the settings of the queue.
        logger: the logger to use; the one named ``taskx`` by default.
        hooks: as of :class:`Queue`; they are told in the thread in which something happens.
        middleware: as of :class:`Queue`.
        find_executor: as of :class:`Queue`.
        clock: the clock; a new one by default.

    Attributes:
        clock: the clock that tasks and schedules go by.
    """

    #: True if a thread that waits for a task runs it.
    _runs_when_waiting = False
    clock: ManualClock

    def __init__(
        self,
        repository: TaskRepository | None = None,
        config: Config | None = None,
        logger: logging.Logger | None = None,
        *,
        hooks: Iterable[Hook] = (),
        middleware: Iterable[Layer] = (),
        find_executor: FindExecutor | None = None,
        clock: ManualClock | None = None,
    ) -> None:
        self.clock = _checked(clock)
        self._submissions = Submissions(self.clock)
        super().__init__(
            DrivenRepository(self.clock) if repository is None else repository,
            config,
            logger,
            hooks=(self._submissions, *hooks),
            middleware=middleware,
            find_executor=find_executor,
            clock=self.clock,
            engine=self._make_engine(),
        )

    def _make_engine(self) -> Driven:
        self._driven = Driven(
            lambda: DrivenSignal(self.clock, self._wait_until, virtual=self._works)
        )
        return self._driven

    def _wire(self) -> None:
        # Held while a task is chosen and started, not while it runs.
        self._choosing = threading.RLock()
        # The threads that run tasks, and how many each runs, one inside the other.
        self._busy: dict[int, int] = {}
        self._driver = threading.get_ident()
        super()._wire()
        self._node.forget()  # one that is left over is not stopped at the exit

    def _replace(self, repository: TaskRepository, clock: ManualClock) -> None:
        """Become a queue for tests, in place of what this queue was."""
        self.clock = clock
        self._submissions = Submissions(clock)
        own = isinstance(repository, Repository)
        self.repository = (
            cast("Repository", repository) if own else EightMethodAdapter(repository, clock)
        )
        self.repository.queues.add(self)
        others = [hook for hook in self._given_hooks if not isinstance(hook, Submissions)]
        self._given_hooks = (self._submissions, *others)
        self._engine = self._make_engine()
        self._wire()

    # --- running

    def run_next(self) -> Task | None:
        """Run the best task that may start now, to its outcome.

        Other tasks run with it if its executor takes many, and they may start now: none waits for more.
        What the executor raises is on the record, not raised here. But ``pytest.fail()`` and
        ``pytest.skip()`` reach the test.

        Returns:
            the task's record after that; None if no task may start now.

        Raises:
            QueueStopped: the queue was stopped.
            RepositoryError: the repository failed. A started queue would log that and try again, as the
                next call does.
            KeyboardInterrupt: the executor was interrupted.
        """
        return next(iter(self._run_next()), None)

    def _run_next(self) -> list[Task]:
        """Run the next call of an executor, mostly for a single task; return the records of its tasks."""
        call = self._start_next()
        if call is None:
            return []
        self._execute(call)
        tasks = {run.task.id: run.task for run in runs_of(call)}
        return [*{**tasks, **self.repository.get_many([*tasks])}.values()]

    def run_all(self, most: int = 10_000, *, check: bool = False) -> list[Task]:
        """Run every task that may start now, and those that may start because of that.

        Retries that wait, and tasks with a delay, stay pending until :meth:`advance`.

        Args:
            most: the number of runs after which this fails: a task may submit itself again and again.
            check: raise an error if a task has failed for good.

        Returns:
            the record of each task after its run, in the order of the runs.

        Raises:
            AssertionError: there are more than ``most`` runs.
            TaskFailed: with ``check``, after all runs: the first task that has failed.
            TaskxError: as :meth:`run_next`.
        """
        ran: list[Task] = []
        while some := self._run_next():
            ran += some
            if len(ran) > most:
                raise AssertionError(
                    f"run_all() has run {most} tasks and there are more; the last one is "
                    f"{submissions.described(ran[-1])}: does a task submit itself?"
                )
        return _checked_runs(ran, check=check)

    def advance(self, seconds: Duration, *, check: bool = False) -> list[Task]:
        """Let time pass, and run what is due, each task and tick at its moment.

        Tasks that may start already run first. There is one thread: while an executor lets time pass, no
        other task runs.

        Args:
            seconds: the time that passes.
            check: raise an error if a task has failed for good.

        Returns:
            the record of each task after its run, in the order of the runs.

        Raises:
            TaskxError: as :meth:`run_next` and, with ``check``, as :meth:`run_all`.
        """
        end = self.clock.monotonic() + check_number(seconds, "seconds")
        ran = self.run_all()
        while (left := end - self.clock.monotonic()) > SHORTEST_STEP / 2:
            self._pass(min(left, self._until_next()))
            ran += self.run_all()
        return _checked_runs(ran, check=check)

    def drain(self, timeout: Duration | None = None) -> bool:
        """Run every task that may start now; return True.

        Raises:
            ConfigurationError: called inside an executor or a hook.
        """
        if inside_executor() or self._hooks.inside:
            return super().drain(timeout)
        self.run_all()
        return True

    def follow(self, timeout: Duration | None = None) -> bool:
        """Do the same as :meth:`drain`, and show nothing."""
        return self.drain(timeout)

    def watch(self, *handles: TaskHandle[Any]) -> None:
        """Resolve handles when their tasks end."""
        watcher, postpone = self._watcher, self.repository.transactions.postpone
        watcher.watch(
            *(
                handle
                for handle in handles
                if not postpone(handle.id, id(handle), partial(watcher.watch_late, handle))
            )
        )

    @property
    def parks(self) -> Mapping[str, int]:
        """The number of waits that each task has begun in the middle of an attempt, by id; 0 for others."""
        return self._driven.runner.parks

    @property
    def _worker(self) -> str:
        return self._driven.pool.worker_name(threading.current_thread().name)

    def _start_next(self) -> Run | Call | None:
        with self._choosing:
            self._node.start()
            pool = self._driven.pool
            while True:
                try:
                    self._driven.housekeeper.do_round()
                    items = pool.buffer.take(1)
                    if not items:
                        return None
                    run = pool.start(items, self._worker)
                except BaseException:
                    self._let_go()
                    raise
                if run is not None:
                    # Here: another thread that waits for it must see that it is taken.
                    here = threading.get_ident()
                    self._busy[here] = self._busy.get(here, 0) + 1
                    return run

    def _let_go(self) -> None:
        """Let tasks be fetched, taken and admitted again, after an interrupt."""
        pool = self._driven.pool
        with self._choosing:
            pool.buffer.started()
            pool.fetcher.let_refill()
            runs = [*pool.runs.values(), *pool.stuck.runs.copy(), *pool.starter.unexecuted]
            pool.admission.keep_only({run.task.id for run in runs})

    def _execute(self, call: Run | Call) -> BaseException | None:
        """Run the tasks of a call to their outcomes; return the first error of an executor, or a result."""
        pool, here = self._driven.pool, threading.get_ident()
        before = threading.enumerate()
        try:
            if isinstance(call, Run):
                endings = [pool.execute(call, self._worker, conclude=pool.conclude)]
            else:
                endings = pool.execute_call(call, self._worker, conclude=pool.conclude)
        except BaseException:
            self._let_go()
            raise
        finally:
            errors = [self._driven.runner.raised.pop(run, None) for run in runs_of(call)]
            self._busy[here] -= 1
            if not self._busy[here]:
                del self._busy[here]
        if pool.stuck.ended:  # how it ended waits to be written
            self._driven.housekeeper.do_round()
        wait_for_threads(before, ("taskx-callbacks", "taskx-cancel"))
        for ending in endings:
            if ending.interrupt is not None:
                raise ending.interrupt
        raised = [error for error in errors if error is not None]
        for error in raised:
            if is_for_the_test(error):
                raise error
        return raised[0] if raised else None

    # --- time

    def _pass(self, seconds: float) -> None:
        """Let time pass, in which this queue was there."""
        self.clock.advance(max(seconds, SHORTEST_STEP))
        self._node.start()
        self._driven.housekeeper.was_there()

    def _until_next(self) -> float:
        """Return the seconds until something is due; inf if nothing is."""
        self._node.start()
        coming = self.clock.until_next_call()
        return min(self._driven.housekeeper.until_next(), math.inf if coming is None else coming)

    @property
    def _works(self) -> bool:
        """True if a wait of this thread runs tasks and lets time pass."""
        return self._runs_when_waiting or inside_executor()

    def _wait_until(self, done: Callable[[], bool], seconds: float) -> bool:
        """Run tasks and let time pass until a condition holds; return False after ``seconds``."""
        here = threading.get_ident()
        if not self._works:
            if done():
                return True
            if here == self._driver:
                raise TimeoutError(
                    "the task has not ended, and nothing runs while a test waits: call run_next(), "
                    "run_all() or advance() first, or use an inline queue"
                )
            return _wait(done, seconds)
        end = self.clock.monotonic() + seconds
        while not done():
            if self.run_next() is not None:
                continue
            if set(self._busy) - {here}:  # it may run there
                _wait(done, 0.01)
                continue
            if done():  # it ran there until a moment ago
                break
            step = min(self._until_next(), end - self.clock.monotonic())
            if step <= 0:
                return False
            if step == math.inf:
                raise TimeoutError("the task has not ended, and nothing is due that could end it")
            self._pass(step)
        return True

    # --- what was submitted

    def submitted(
        self,
        type: Kind | None = None,
        *,
        params: Mapping[str, Any] | None = None,
        within: Duration | None = None,
        delay: Duration | None = None,
        **fields: Any,
    ) -> list[Task]:
        """Return the tasks that were submitted, in order and as they were then, deleted ones included.

        Args:
            type: only tasks of this type, or of this executor's type.
            params: only tasks whose params have these values, as objects or as JSON; they may have
                others, too.
            within: only tasks submitted in the last so many seconds, by the queue's clock.
            delay: only tasks with this delay, in seconds; 0 for those without.
            fields: only tasks with these values, such as ``priority=5``.

        Raises:
            ConfigurationError: a task has no such field, or an argument is not valid.
        """
        return self._submissions.matching(_type(type), params, within, delay, fields, self._values)

    def assert_submitted(
        self,
        type: Kind | None = None,
        *,
        params: Mapping[str, Any] | None = None,
        within: Duration | None = None,
        delay: Duration | None = None,
        times: int | None = None,
        **fields: Any,
    ) -> Task:
        """Assert that such a task was submitted, or with ``times`` exactly so many; return the first one.

        The other arguments are those of :meth:`submitted`.

        Raises:
            AssertionError: they were not; the message lists what was submitted.
        """
        __tracebackhide__ = True  # pytest shows the line of the test
        found = self.submitted(type, params=params, within=within, delay=delay, **fields)
        if not found or (times is not None and len(found) != times):
            asked = submissions.wanted(_type(type), params, within, delay, fields)
            if times is None:
                problem = f"no {asked} was submitted"
            else:
                problem = f"{asked}: expected {times} submission(s), found {len(found)}"
            raise AssertionError(f"{problem}. {self._submissions.listed()}")
        return found[0]

    def assert_not_submitted(
        self,
        type: Kind | None = None,
        *,
        params: Mapping[str, Any] | None = None,
        within: Duration | None = None,
        delay: Duration | None = None,
        **fields: Any,
    ) -> None:
        """Assert that no such task was submitted; without arguments, none at all.

        The arguments are those of :meth:`submitted`.

        Raises:
            AssertionError: one was; the message lists what was submitted.
            ConfigurationError: the queue does not know the type, so the assertion could never fail.
        """
        __tracebackhide__ = True  # pytest shows the line of the test
        if (name := _type(type)) is not None and not self._registry.knows(name):
            raise ConfigurationError(
                f"no task of type {name!r} can be submitted, because the queue knows only: "
                f"{self._registry.known}"
            )
        if found := self.submitted(type, params=params, within=within, delay=delay, **fields):
            asked = submissions.wanted(_type(type), params, within, delay, fields)
            raise AssertionError(
                f"{asked}: expected no submission, found {len(found)}. {self._submissions.listed()}"
            )

    def assert_submitted_in_order(self, *types: Kind) -> None:
        """Assert that tasks of these types were submitted in this order, and as often as given.

        Tasks of other types may come in between.

        Raises:
            AssertionError: they were not; the message lists what was submitted.
        """
        __tracebackhide__ = True  # pytest shows the line of the test
        names = [str(_type(kind)) for kind in types]
        actual = submissions.in_order(self._submissions.tasks, names)
        if actual != names:
            raise AssertionError(
                f"expected {', '.join(names)}; submitted were, of these types, "
                f"{', '.join(actual) or 'none'}. {self._submissions.listed()}"
            )


class _InlineIntake(Intake):
    """An intake that has a task run as soon as it is stored."""

    def __init__(self, after: Callable[[Sequence[str]], object], *parts: Any) -> None:
        super().__init__(*parts)
        self._after = after

    def accept(
        self,
        task: Task,
        priority: int | None = None,
        on_conflict: OnConflict = "reject",
        **more: Any,
    ) -> str:
        task_id = super().accept(task, priority, on_conflict, **more)
        self._after([task_id])
        return task_id

    def accept_plain(self, type: str, params: Any) -> str | None:
        task_id = super().accept_plain(type, params)
        if task_id is not None:
            self._after([task_id])
        return task_id

    def accept_many(
        self, tasks: Iterable[Task], priority: int | None = None, **more: Any
    ) -> list[str]:
        task_ids = super().accept_many(tasks, priority, **more)
        self._after(task_ids)
        return task_ids

    def put(self, insert: Insert) -> None:
        super().put(insert)
        self._after([insert.id])


class InlineQueue(ManualQueue):
    """A queue that runs a task within its ``submit``, in the caller's thread.

    When ``submit`` returns, the task has ended: also after retries, for which the clock is moved. What the
    executor raises is on the record and raised by ``handle.result()``, not by ``submit``.

    A task with a delay, or one that asked to run later (``Snooze``), stays pending until :meth:`advance`. A
    wait for it moves the clock to its time. A task that was submitted with ``connection=`` runs after the
    commit: at the next call of the queue. All else is as in :class:`ManualQueue`.
    """

    _runs_when_waiting = True

    def _make_intake(self, moves: Door, make: Callable[..., Intake] = Intake) -> Intake:
        return super()._make_intake(moves, partial(_InlineIntake, self._finish))

    def _finish(self, task_ids: Iterable[str] = ()) -> None:
        """Run what may start, and the retries of these tasks."""
        # A hook, a log handler or a finalizer: whoever is at it goes on with this.
        if self._hooks.inside or self._moves.entered or self._choosing._is_owned():  # type: ignore[attr-defined]
            return
        wanted = list(task_ids)
        self.run_all()
        while (moment := self._next_retry(wanted)) is not None:
            self._pass((moment - self.clock.now()).total_seconds())
            self.run_all()

    def _next_retry(self, task_ids: Sequence[str]) -> datetime | None:
        found = self.repository.get_many(task_ids).values()
        now = self.clock.now()
        moments = [
            task.run_at
            for task in found
            if task.status is TaskStatus.PENDING
            and task.run_at is not None
            and task.run_at > now
            and task.attempts
            and task.attempts[-1].outcome == "retried"
        ]
        return min(moments, default=None)

    def requeue(
        self,
        task_id: str,
        *,
        params: Mapping[str, Any] | None = None,
        from_step: str | None = None,
    ) -> None:
        super().requeue(task_id, params=params, from_step=from_step)
        self._finish([task_id])

    def requeue_many(self, task_ids: Iterable[str]) -> int:
        wanted = list(task_ids)
        count = super().requeue_many(wanted)
        self._finish(wanted)
        return count

    @contextmanager
    def _changing(self, connection: object = None) -> Iterator[Operations]:
        with super()._changing(connection) as operations:
            yield operations
        if connection is None:  # else the caller has the write lock
            self._finish()

    def resume(self, type: str | None = None) -> None:
        super().resume(type)
        self._finish()

    def _reading(self) -> AbstractContextManager[Repository]:
        self._finish_committed()
        return super()._reading()

    def _finish_committed(self) -> None:
        """Run what callers have committed since the last call: nobody tells of a commit."""
        repository = self.repository
        if isinstance(repository, DrivenRepository) and repository.joined.settle():
            self._finish()


Q = TypeVar("Q", bound=ManualQueue)
F = TypeVar("F", bound=Callable[..., Any])


def _type(kind: Kind | None) -> str | None:
    """Return the name of a type of tasks."""
    return kind if kind is None or isinstance(kind, str) else kind.type


class _Replacing(AbstractContextManager[Q]):
    """Replaces a queue for the length of a block, or of each call of a function."""

    def __init__(self, begin: Callable[[], AbstractContextManager[Q]]) -> None:
        self._begin = begin

    def __enter__(self) -> Q:
        self._block = self._begin()
        return self._block.__enter__()

    def __exit__(self, *raised: Any) -> bool | None:
        return self._block.__exit__(*raised)

    def __call__(self, function: F) -> F:
        if is_async(function):

            @wraps(function)
            async def inside(*args: Any, **kwargs: Any) -> Any:
                with self._begin():
                    return await function(*args, **kwargs)

        else:
            check_plain(function, f"decorated {function!r}")

            @wraps(function)
            def inside(*args: Any, **kwargs: Any) -> Any:
                with self._begin():
                    return function(*args, **kwargs)

        return cast("F", inside)


def manual(
    queue: Queue, repository: TaskRepository | None = None, *, clock: ManualClock | None = None
) -> _Replacing[ManualQueue]:
    """Make an application's queue a :class:`ManualQueue` for the length of a block, or of a function.

    The function may be a coroutine function, but not a generator.

    The queue object stays the same, with its executors, hooks, middleware and config. Inside the block,
    everything that submits to it (``executor.submit()``, code that has imported it) submits to
    ``repository``. Its own repository is not touched. After the block the queue is what it was.

    Executors that are registered inside the block stay registered, as modules are imported once.

    Args:
        queue: the queue. One that is started goes on running its own tasks in its own threads.
        repository: stores the tasks; by default they are in memory.
        clock: the clock; a new one by default.

    Raises:
        ConfigurationError: an argument is not valid.
    """
    return _Replacing(partial(_replaced, queue, ManualQueue, repository, clock))


def inline(
    queue: Queue, repository: TaskRepository | None = None, *, clock: ManualClock | None = None
) -> _Replacing[InlineQueue]:
    """Make an application's queue an :class:`InlineQueue` for the length of a block, or of a function.

    Everything else is as for :func:`manual`.

    Raises:
        ConfigurationError: an argument is not valid.
    """
    return _Replacing(partial(_replaced, queue, InlineQueue, repository, clock))


@contextmanager
def _replaced(
    queue: Queue, kind: type[Q], repository: TaskRepository | None, clock: ManualClock | None
) -> Iterator[Q]:
    if not isinstance(queue, Queue):
        raise ConfigurationError(f"expected a Queue, got {type(queue).__name__}")
    made = _checked(clock)
    if repository is None:
        repository = DrivenRepository(made, queue.repository.codecs)
    before_class, before = type(queue), dict(vars(queue))
    driven = cast("Q", queue)
    try:
        driven.__class__ = _class_for(before_class, kind)
        driven._replace(repository, made)
        yield driven
        if isinstance(driven, InlineQueue):
            driven._finish_committed()
    finally:
        # Other threads may submit to the queue meanwhile. So it gets its parts back in one step, and only
        # then the driven node leaves.
        node, attributes = queue._node, vars(queue)
        attributes.update(before)
        queue.__class__ = before_class
        for name in attributes.keys() - before.keys():
            del attributes[name]
        if node is not before["_node"] and node.name == "started":
            node.withdraw()


def _class_for(before: type[Queue], kind: type[Q]) -> type[Q]:
    """Return the kind of queue for tests, with the methods of an application's own class."""
    plain = next(known for known in before.__mro__ if not issubclass(known, ManualQueue))
    if plain is Queue:
        return kind
    return type(f"{kind.__name__}Of{plain.__name__}", (kind, plain), {})


def _checked(clock: Any) -> ManualClock:
    if clock is None:
        return ManualClock()
    if not isinstance(clock, ManualClock):
        raise ConfigurationError(f"clock must be a ManualClock, not {clock!r}")
    return clock


def _checked_runs(ran: list[Task], *, check: bool) -> list[Task]:
    """Return the records of runs; with ``check``, raise the error of the first task that has failed."""
    for task in ran if check else ():
        if task.status is TaskStatus.FAILED:
            raise TaskFailed(task.id, task.error, max(1, task.errors), task.traceback)
    return ran


def _wait(done: Callable[[], bool], seconds: float) -> bool:
    """Wait for another thread, in real time."""
    pause, left = threading.Event(), seconds
    while not done() and left > 0:
        pause.wait(min(left, 0.01))
        left -= 0.01
    return done()
