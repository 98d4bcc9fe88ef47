"""The queue: what a program holds in its hand. It wires the parts together and holds no rules."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from taskx.common.config import Config
from taskx.common.handles import TaskHandle
from taskx.common.hooks import Hook
from taskx.common.pauses import Paused
from taskx.core.clock import SYSTEM_CLOCK, Clock, check_clock
from taskx.core.errors import ConfigurationError, RepositoryError
from taskx.core.log import GuardedLogger, check_logger
from taskx.core.model import Task, TaskFilter, TaskStatus, check_filter, check_key, check_name
from taskx.core.options import (
    ExecutorOptions,
    MapOptions,
    ScheduleOptions,
    SubmitOptions,
    options_of,
)
from taskx.core.ticks import Every, Misfire
from taskx.executing.executors import Executor, ExecutorDecorator, TaskExecutor
from taskx.executing.registry import Layer, Registry, check_middleware
from taskx.flows import Flow, FlowHandle, Shape, lay_out
from taskx.moving import Services
from taskx.running.pool import State
from taskx.schedules.schedule import Schedule, Schedules
from taskx.schedules.stored import Overlap, make_entry
from taskx.storage import queries
from taskx.storage.adapter import EightMethodAdapter
from taskx.storage.base import Repository
from taskx.storage.eight import TaskRepository
from taskx.submitting.intake import Intake, task_of
from taskx.submitting.mapping import Results, ahead
from taskx.submitting.operations import Operations, dead
from taskx.upkeep.node import Lifetime, LocalNode
from taskx.upkeep.retention import prune_all

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing from 3.11 on

R = TypeVar("R")


class Queue:
    """A task queue on a repository.

    Not started, it stores what is submitted for whoever runs; started, it runs tasks, its own and
    what others left. ``with queue:`` starts and stops it.

    Args:
        repository: where tasks are kept: one of ours, or any object with the eight methods of
            :class:`TaskRepository`.
        config: how it works.
        logger: what it logs to; the logger named ``taskx`` unless given.
        hooks: instances of :class:`Hook`, which are told what happens to tasks.
        middleware: instances of :class:`Middleware`, or functions of their signature, which are
            wrapped around every execution; the first one is the outermost.
        clock: where it reads time from; for tests.

    Raises:
        ConfigurationError: an argument is not valid.
    """

    def __init__(
        self,
        repository: TaskRepository,
        config: Config | None = None,
        logger: logging.Logger | None = None,
        *,
        hooks: Iterable[Hook] = (),
        middleware: Iterable[Layer] = (),
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        if config is not None and not isinstance(config, Config):
            raise ConfigurationError(f"config must be a Config, not {type(config).__name__}")
        self.config = config or Config()
        self._log = GuardedLogger(check_logger(logger))
        self._clock = check_clock(clock)
        self.repository = (
            repository
            if isinstance(repository, Repository)
            else EightMethodAdapter(repository, clock)
        )
        self._hooks = tuple(hooks)
        self._registry = Registry(
            check_middleware(middleware), self.repository.require, self.config.max_payload_size
        )
        self._schedules = Schedules(self.handle)
        self.repository.queues.add(self)
        self._wire()
        _queues.add(self)

    def _wire(self) -> None:
        state = State()
        self._services = Services(
            *(self.repository, self._registry, self._hooks, state, self._clock, self._log)
        )
        self._intake = Intake(self._services, state, self.config)
        self._operations = Operations(self._services, state)
        self._schedules.wire(self._services, self._intake)
        self._life = Lifetime(self._services, self.config, state, self)

    def __repr__(self) -> str:
        return f"<Queue on {self.repository!r}, {self._life.name}>"

    # --- executors

    def executor(
        self, type: str | None = None, **options: Unpack[ExecutorOptions]
    ) -> ExecutorDecorator:
        """Make an executor of the function below and register it.

        Args:
            type: the type of task it runs; the function's name unless given.
            max_attempts: attempts that may raise before the task is failed (default 1, or as
                ``retry`` says).
            max_crashes: deaths of the process before the task is failed (default 3).
            timeout: seconds after which an attempt's token fires.
            priority: higher runs first (default 0).
            retry: when an attempt that raised is followed by another (default: at once).
            capture_log: keep what the executor logs in ``task.log``: True for what is of level INFO
                and above, or a level, such as ``"WARNING"``.
            isolation: ``"process"``: each attempt in a child process of its own, which imports the
                function by its name.
            grace: seconds that the executor is given after its token has fired (default 10). Then its
                child process is killed; in a thread it is given up, if it was for a time-out.
            max_concurrency: how many tasks of the type run at once.
            rate: how many start in a time: ``"100/m"`` (``s``, ``m``, ``h``, ``d``), or a count and
                seconds.
            burst: how many may start at once when none did for a while (default: the count of
                ``rate``).
            limit_scope: ``"node"`` (default) for limits of each node by itself, ``"global"`` for
                limits of all nodes together.

        Raises:
            ConfigurationError: an option is not valid, the type is taken, the function cannot be
                an executor, or a child process could not find it.
        """
        if callable(type):
            raise ConfigurationError("write @queue.executor() or ('name'), with parentheses")
        return ExecutorDecorator(type, options_of(options), self.register_executor)

    def register_executor(
        self, executor: TaskExecutor | Executor[Any, Any], **options: Unpack[ExecutorOptions]
    ) -> None:
        """Register an executor; the options are those of :meth:`executor` and win over its own.

        Raises:
            ConfigurationError: an option is not valid, the type is taken, or it is no executor.
        """
        self._registry.register(executor, options_of(options))
        if isinstance(executor, Executor):
            executor.bind(self)
        if self._node is not None:
            with suppress(RepositoryError):  # then the housekeeper records them
                self._node.engine.record_types()
        self._services.agenda.fetch_soon()

    def declare(self, *types: str) -> None:
        """Accept tasks of these types, whose executors are registered in another process."""
        for type_ in [check_key(type_, "type") for type_ in types]:
            self._registry.declare(type_)

    # --- submitting

    @overload
    def submit(self, task: Task, /, **options: Unpack[SubmitOptions]) -> TaskHandle[Any]: ...
    @overload
    def submit(
        self,
        type: str,
        params: dict[str, Any] | None = None,
        /,
        **options: Unpack[SubmitOptions],
    ) -> TaskHandle[Any]: ...
    def submit(
        self,
        task: Task | str,
        params: dict[str, Any] | None = None,
        /,
        **options: Any,
    ) -> TaskHandle[Any]:
        """Submit a task; when it returns, the task is stored and will run.

        Args:
            task: a pending :class:`Task`, which is not changed, or a type.
            params: the executor's params, a JSON object; only with a type.
            id: unique; made (UUIDv7) unless given.
            created_by: free text, to filter by.
            priority: higher runs first, equal ones in order; 0 unless the executor says otherwise.
            run_at: not before this aware datetime.
            delay: not before so many seconds from now.
            timeout: seconds after which an attempt's token fires.
            max_attempts: attempts that may raise before the task is failed.
            max_crashes: deaths of the process before the task is failed; 1 for "never again".
            retry: when an attempt that raised is followed by another.
            unique_key: a text that at most one task at a time holds.
            unique_scope: how long the task holds it: ``"pending"`` until it first starts,
                ``"unfinished"`` (unless given) until it has ended, ``"ever"`` as long as its record is
                kept, or so many seconds from now.
            on_conflict: where another task holds the unique key: ``"reject"`` (unless given) raises,
                ``"return"`` gives that one's handle, ``"replace"`` gives that one, if it is pending and of
                the same type, parents and concurrency key, the params and options of this one, and
                returns its handle.
            depends_on: tasks, by id or handle, that must have completed before this one starts.
            on_parent_failure: what becomes of it when all of them have ended and one did not complete:
                ``"cancel"`` (unless given), ``"fail"`` or ``"run"``.
            concurrency_key: tasks with the same key run one at a time, in the order of submission, in
                whatever process.

        Raises:
            UnknownTaskType: the type is neither registered nor declared.
            PayloadError: params are not JSON, too large, or do not fit the function.
            DuplicateTask: a task has that id, or holds that key.
            QueueFull: the buffer is full.
            QueueStopped: the queue was stopped.
            TaskNotFound: a task that it depends on is not there.
            InvalidTransition: the task is not pending.
            ConfigurationError: another argument is not valid.
            RepositoryError: it could not be stored; or, where its ``in_doubt`` is True, may have been:
                to submit its ``task_id`` again tells.
        """
        wanted = task_of(task, params, options, SubmitOptions, "submit", self._clock)
        task_id = self._intake.accept(
            wanted, options.get("priority"), options.get("on_conflict") or "reject"
        )
        try:
            return TaskHandle(task_id, self)
        except BaseException as error:  # an interrupt
            error.task_id = task_id  # type: ignore[attr-defined]
            raise

    def submit_many(self, tasks: Iterable[Task]) -> list[TaskHandle[Any]]:
        """Submit tasks in one transaction, all or none; returns their handles in order.

        More than the buffer has room for: ``overflow="reject"`` refuses them all, else the rest
        waits in the repository.

        Raises:
            TaskxError: as :meth:`submit` does; nothing was stored, unless it is in doubt.
        """
        return [TaskHandle(task_id, self) for task_id in self._intake.accept_many(tasks)]

    @overload
    def map(
        self,
        executor: Executor[..., R],
        items: Iterable[Any],
        key: Callable[[Any], str | int] | None = None,
        *,
        name: str = "",
        window: int | None = None,
        timeout: float | None = None,
        return_exceptions: Literal[False] = False,
        **options: Unpack[MapOptions],
    ) -> Iterator[R]: ...
    @overload
    def map(
        self,
        executor: Executor[..., R],
        items: Iterable[Any],
        key: Callable[[Any], str | int] | None = None,
        *,
        name: str = "",
        window: int | None = None,
        timeout: float | None = None,
        return_exceptions: bool,
        **options: Unpack[MapOptions],
    ) -> Iterator[R | Exception]: ...
    @overload
    def map(
        self,
        executor: str,
        items: Iterable[Any],
        key: Callable[[Any], str | int] | None = None,
        *,
        name: str = "",
        window: int | None = None,
        timeout: float | None = None,
        return_exceptions: bool = False,
        **options: Unpack[MapOptions],
    ) -> Iterator[Any]: ...
    def map(
        self,
        executor: Executor[..., Any] | str,
        items: Iterable[Any],
        key: Callable[[Any], str | int] | None = None,
        *,
        name: str = "",
        window: int | None = None,
        timeout: float | None = None,
        return_exceptions: bool = False,
        **options: Any,
    ) -> Iterator[Any]:
        """Run an executor for each item; gives the results in order, and can be run again.

        Nothing is submitted before the first result is asked for; then a few tasks ahead of the
        results. The id of a task is made of ``name`` and the item's key. So when the map is run
        again, after a crash say, what is completed is returned, what is under way is waited for,
        and what failed or was cancelled is requeued.

        Args:
            executor: an executor, or the type of one.
            items: for each task its params, a dict; or the value of the executor's first parameter.
            key: what an item is known by: a function of the item that gives a text or a whole
                number, of which ``1`` and ``"1"`` are the same. By its params unless given.
            name: what the map is known by; the type of the executor unless given.
            window: how many tasks are submitted ahead: four for each worker unless given, or as
                many as the buffer has room for. Where it is full, they wait in the repository.
            timeout: seconds that a result is waited for.
            return_exceptions: return what a failed item raises in its place, and go on.
            options: for tasks that are new: ``created_by``, ``priority``, ``max_attempts``,
                ``max_crashes`` and ``retry``, as :meth:`submit` takes them.

        Raises:
            TaskFailed: from the iterator, in the place of an item that failed; the next item is
                next.
            concurrent.futures.CancelledError: … that was cancelled.
            TaskNotFound: … whose record was deleted before its result was read.
            RepositoryCorrupt: … whose record is damaged.
            concurrent.futures.TimeoutError: … that took too long; it is asked for again next.
            PayloadError: … that is not JSON or does not fit the executor.
            ConfigurationError: an argument is not valid; from the iterator, in the place of an item
                whose key is not.
            TaskxError: from the iterator, what :meth:`submit` raises, but ``QueueFull``; it is tried
                again next.
        """
        return Results(
            executor=executor,
            items=iter(items),
            key=key,
            name=name,
            window=ahead(self.config) if window is None else window,
            timeout=timeout,
            return_exceptions=return_exceptions,
            options=options,
            owner=self,
            intake=lambda: self._intake,
            clock=self._clock,
        )

    def submit_flow(self, flow: Flow) -> FlowHandle:
        """Submit a chain or group of tasks, all or none; returns one handle for all of them.

        It may be of any size: what the buffer has no room for waits in the repository.

        Raises:
            TaskxError: as :meth:`submit_many` does, but for ``QueueFull``; nothing was stored, unless it
                is in doubt.
        """
        tasks, shape = lay_out(flow)
        self._intake.accept_many(tasks, spill=True)
        return FlowHandle(shape, self)

    def flow_handle(self, shape: Shape) -> FlowHandle:
        """A handle on a flow that was submitted before, in whatever process.

        Args:
            shape: what its first handle had as ``shape``.

        Raises:
            ConfigurationError: it is none.
        """
        return FlowHandle(shape, self)

    # --- schedules

    @overload
    def schedule(
        self,
        name: str,
        spec: str | Every,
        task: Task,
        /,
        *,
        tz: str | None = None,
        misfire: Misfire = "one",
        misfire_grace: float | None = None,
        overlap: Overlap = "allow",
        **options: Unpack[ScheduleOptions],
    ) -> Schedule: ...
    @overload
    def schedule(
        self,
        name: str,
        spec: str | Every,
        type: str,
        params: dict[str, Any] | None = None,
        /,
        *,
        tz: str | None = None,
        misfire: Misfire = "one",
        misfire_grace: float | None = None,
        overlap: Overlap = "allow",
        **options: Unpack[ScheduleOptions],
    ) -> Schedule: ...
    def schedule(
        self,
        name: str,
        spec: str | Every,
        task: Task | str,
        params: dict[str, Any] | None = None,
        /,
        *,
        tz: str | None = None,
        misfire: Misfire = "one",
        misfire_grace: float | None = None,
        overlap: Overlap = "allow",
        **options: Any,
    ) -> Schedule:
        """Declare a schedule: it is stored, and the started queues on the repository make its tasks.

        To be called whenever the program starts. What is stored under the name is brought up to date; it
        ticks on where it was unless ``spec`` or ``tz`` are different, and stays paused if it was.

        Args:
            name: unique in the repository, at most 200 characters; the id of each of its tasks begins
                with it.
            spec: when it ticks: a cron expression of five fields, or ``every(seconds)``.
            task: what its tasks are like: a type, or a :class:`Task` without id.
            params: the executor's params; only with a type.
            tz: the time zone that an expression is read in, such as ``"Europe/Berlin"``; UTC unless given.
            misfire: what becomes of ticks at which no started queue was there: one task for all of them
                (``"one"``), none (``"skip"``), or one for ``"all"`` that are at most ``misfire_grace`` old.
            misfire_grace: seconds that a tick may be late and still get a task: 10 with ``"skip"``, any
                number with ``"one"``, to be given with ``"all"``.
            overlap: with ``"skip"``, a tick gets no task while that of the last one that got any has not
                ended.
            created_by: of its tasks; ``schedule:`` and the name unless given.
            priority, timeout, max_attempts, max_crashes, retry, concurrency_key: of its tasks, as for
                :meth:`submit`.

        Raises:
            ConfigurationError: an argument is not valid, a package is missing, or the repository cannot
                keep schedules.
            UnknownTaskType: the type is neither registered nor declared.
            PayloadError: params are not JSON, too large, do not fit the function, or a codec refuses
                them.
            RepositoryError: it could not be stored.
        """
        entry = make_entry(name, spec, tz, misfire, misfire_grace, overlap)
        wanted = task_of(task, params, options, ScheduleOptions, "schedule", self._clock)
        return self._schedules.declare(entry, wanted, options.get("priority"))

    def schedules(self) -> dict[str, Schedule]:
        """The schedules in the repository, by name, whichever process declared them."""
        return self._schedules.all()

    # --- reading

    def handle(self, task_id: str) -> TaskHandle[Any]:
        """A handle on a task, whichever process submitted it; whether it exists is not checked."""
        return TaskHandle(check_name(task_id, "id"), self)

    def get_task_status(self, task_id: str) -> Task:
        """The task's record as it is now.

        Raises:
            TaskNotFound: there is none with that id.
        """
        return self.repository.get_by_id(task_id)

    def list_tasks(self, filter: TaskFilter | None = None) -> tuple[Sequence[Task], int]:
        """The tasks that meet a filter, newest first, and how many meet it in all.

        Raises:
            ConfigurationError: the filter is no ``TaskFilter``.
        """
        return queries.page(self.repository, check_filter(filter))

    def watch(self, handle: TaskHandle[Any]) -> None:
        """Have a handle resolved when its task ends; handles call this themselves."""
        self._services.watcher.watch(handle)
        if self._node is None:
            self._services.watcher.warn_if_nobody_runs(handle.id)

    @property
    def buffered(self) -> int:
        """The number of submitted tasks that wait in this queue's buffer, of ``buffer_size``."""
        return 0 if self._node is None else self._node.engine.buffer.submitted

    @property
    def running(self) -> int:
        """The number of this queue's executors that are at work."""
        return 0 if self._node is None else len(self._node.engine.runs.executing)

    @property
    def healthy(self) -> bool:
        """True if this queue can do its work: for a health check.

        False while more threads are stuck than are replaced (``max_stuck``), while the SQLite file is
        moved away, deleted or replaced, and after a newer TaskX has migrated it. It does not tell whether
        the queue was started: one that only submits has no threads, and is healthy as long as its file
        is there.
        """
        return self._life.healthy

    # --- changing

    def cancel_task(self, task_id: str) -> bool:
        """Cancel a task: True if it never runs, False if it runs and was asked to stop.

        Raises:
            TaskNotFound: there is none with that id.
            InvalidTransition: it has ended.
            RepositoryCorrupt: its record is damaged in such a way that it cannot be cancelled.
        """
        return self._operations.cancel(check_name(task_id, "id"))

    def cancel_many(self, task_ids: Iterable[str]) -> int:
        """Cancel those of these tasks that have not ended, in a few transactions.

        Returns:
            how many of them never run; others run, and were asked to stop.

        Raises:
            RepositoryError: the repository failed; some may have been cancelled.
        """
        return self._operations.cancel_many([check_name(task_id, "id") for task_id in task_ids])

    def requeue(self, task_id: str) -> None:
        """Have a failed or cancelled task run again, with its attempts and crashes counted anew.

        Tasks that failed or were cancelled because of it, such as the rest of a chain, wait for it again.
        It waits for parents that have not ended; it runs even if parents have failed.

        Raises:
            TaskNotFound: there is none with that id.
            InvalidTransition: it is neither failed nor cancelled.
            DuplicateTask: another task holds its unique key now.
            QueueStopped: the queue was stopped.
        """
        self._operations.requeue(task_id)

    def requeue_many(self, task_ids: Iterable[str]) -> int:
        """Have those of these tasks run again that failed or were cancelled, in a few transactions.

        Tasks that depend on others of these wait for them again, and so do tasks that failed or were
        cancelled because of these. A task whose unique key another task holds now is left alone.

        Returns:
            how many run again, including tasks that had ended because of these.

        Raises:
            QueueStopped: the queue was stopped.
            RepositoryError: the repository failed; some may have been requeued.
        """
        return self._operations.requeue_many([check_name(task_id, "id") for task_id in task_ids])

    def delete(self, task_id: str) -> None:
        """Remove the record of a task that is not running.

        Raises:
            TaskNotFound: there is none with that id.
            InvalidTransition: it is running, or a thread of an ended attempt still runs (``stuck_on``).
        """
        self._operations.delete(check_name(task_id, "id"))

    def prune(self, before: datetime, status: TaskStatus | str | None = None) -> int:
        """Remove tasks that ended before a moment, a few in each transaction; returns how many.

        A task stays while a task that depends on it is stored, and while it holds a unique key for a
        number of seconds.

        Args:
            before: an aware datetime.
            status: only those that are completed, failed or cancelled; all unless given.

        Raises:
            ConfigurationError: an argument is not valid.
            RepositoryError: the repository failed; some may have been removed.
        """
        return prune_all(self._services, before, status)

    # --- pausing

    def pause(self, type: str | None = None) -> None:
        """Have no more tasks of a type started by any process, or with None no task at all.

        It holds until :meth:`resume`, over restarts, too. What runs goes on; what is submitted is
        stored. In this process it holds when the call returns, but for a start that is being written at
        that moment; in others within a second.

        Raises:
            ConfigurationError: the type is no name, or the repository has the eight methods only.
            RepositoryError: the repository failed.
        """
        self._services.pauses.set(type)
        self._check_pauses()

    def resume(self, type: str | None = None) -> None:
        """End what :meth:`pause` with the same type began; with None, types paused by name stay so.

        Raises:
            ConfigurationError: the type is no name.
            RepositoryError: the repository failed.
        """
        self._services.pauses.lift(type)
        self._check_pauses()

    def _check_pauses(self) -> None:
        if self._node is not None:
            self._node.engine.fetcher.look_for_pauses()
            self._services.agenda.wake_from_long_sleep()

    @property
    def paused(self) -> Paused:
        """The pauses that the repository holds.

        Raises:
            RepositoryError: the repository failed.
        """
        return self._services.pauses.read()

    # --- dead letters

    def dead_letters(self, filter: TaskFilter | None = None) -> tuple[Sequence[Task], int]:
        """The failed tasks that meet a filter, newest first, and how many meet it in all.

        Raises:
            ConfigurationError: the filter is no ``TaskFilter``, or asks for another status.
        """
        return self.list_tasks(dead(filter))

    def requeue_dead_letters(self, filter: TaskFilter | None = None) -> int:
        """Have dead letters run again: all that meet a filter, or the newest ones if it has a limit.

        A filter without a limit means all, although :meth:`dead_letters` lists 100: to requeue a few of
        many, give the filter a limit. Tasks that fail again in the meantime are left alone. Tasks that
        failed or were cancelled because of these, such as the rest of a chain, run again after them,
        whether they meet the filter or not.

        Returns:
            how many run again, including tasks that had ended because of these.

        Raises:
            ConfigurationError: the filter is no ``TaskFilter``, or asks for another status.
            QueueStopped: the queue was stopped.
        """
        return self._operations.requeue_dead_letters(filter)

    def discard_dead_letters(self, filter: TaskFilter | None = None) -> int:
        """Remove dead letters: all that meet a filter, or the newest ones if it has a limit.

        They are chosen as by :meth:`requeue_dead_letters`. A dead letter that an unfinished task depends
        on stays, as that task may ask for it.

        Returns:
            how many were removed.

        Raises:
            ConfigurationError: the filter is no ``TaskFilter``, or asks for another status.
        """
        return self._operations.discard_dead_letters(filter)

    # --- starting and stopping

    def start(self) -> None:
        """Start the workers; a second call does nothing.

        Tasks left behind by processes that died are taken up: what they were running, too. Where it
        raises, nothing was started, and it can be tried again.

        Raises:
            QueueStopped: the queue was stopped; make another one.
            RepositoryError: the repository cannot be used.
            RuntimeError: the system has no more threads.
        """
        self._life.start()

    def drain(self, timeout: float | None = None) -> bool:
        """Wait until nothing is left to run: False if ``timeout`` seconds passed before.

        Tasks that may not start yet (``run_at``, ``delay``) are not waited for, nor are those of
        paused types; tasks of its other types that other processes on the repository run are.

        Raises:
            ConfigurationError: called inside an executor or a hook, or on a queue that is not
                started.
            QueueStopped: the queue was stopped.
        """
        return self._life.drain(timeout)

    def stop(self, timeout: float = 30.0, cancel: bool = False) -> list[str]:
        """Stop: take no more tasks, let running ones end, hand back what does not.

        Running tasks may go on for four fifths of ``timeout``, then their tokens fire with reason
        STOP; with ``cancel`` they fire at once. What ends by that is pending again, with no attempt
        spent. A thread that still runs afterwards may end later and its outcome counts; if the
        process ends first, its task counts as interrupted.

        Args:
            timeout: seconds after which it returns in any case, or a second later where the repository
                or a hook hangs.
            cancel: do not wait before telling running tasks to stop.

        Returns:
            the ids of the tasks that still run.
        """
        return self._life.stop(timeout, cancel=cancel)

    def close(self) -> None:
        """Stop, and close the repository; who waits for a task that has not ended gets ``QueueStopped``."""
        self.stop()
        self._services.watcher.close()
        self.repository.close()

    def __enter__(self) -> Queue:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Stop; after Ctrl-C, or as the program exits, running tasks are told to at once."""
        self.stop(cancel=kind is not None and issubclass(kind, (KeyboardInterrupt, SystemExit)))

    # --- forks

    def _renew_after_fork(self) -> None:
        """In a forked child: as if it had not been started; nothing of the parent's is touched."""
        self.repository.renew_after_fork()
        self._services.watcher.renew_after_fork()
        self._life.forget()
        self._wire()

    @property
    def _node(self) -> LocalNode | None:
        return self._life.node


_queues: weakref.WeakSet[Queue] = weakref.WeakSet()


def _renew_all_after_fork() -> None:
    for queue in list(_queues):
        queue._renew_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all_after_fork)
