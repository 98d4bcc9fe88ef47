"""The queue: the object that a program uses. It wires the parts together and contains no rules."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import attrs

from taskx.common.config import Config
from taskx.common.controls import Paused
from taskx.common.handles import TaskHandle
from taskx.common.hooks import Hook
from taskx.core.clock import SYSTEM_CLOCK, Clock, check_clock
from taskx.core.errors import ConfigurationError, RepositoryError
from taskx.core.ids import new_id
from taskx.core.log import GuardedLogger, check_logger
from taskx.core.model import (
    Task,
    TaskCount,
    TaskFilter,
    TaskPage,
    TaskStatus,
    check_key,
    check_name,
)
from taskx.core.options import (
    ExecutorOptions,
    FilterOptions,
    LimitOptions,
    MapOptions,
    OnConflict,
    ScheduleOptions,
    SubmitOptions,
    filter_of,
    options_of,
)
from taskx.core.ticks import Every, Misfire
from taskx.core.values import Values
from taskx.executing.executors import (
    AnyExecutor,
    BoundExecutor,
    Executor,
    ExecutorDecorator,
    TaskExecutor,
)
from taskx.executing.registry import Layer, Registry, check_middleware
from taskx.flows import Flow, FlowHandle, FlowSummary, Shape, lay_out
from taskx.flows import newest as newest_flows
from taskx.inspecting.changelog import Change, changes, note_change
from taskx.inspecting.diagnosis import Diagnosis, diagnose
from taskx.inspecting.failures import FailureGroup, Failures, failures, requeue_group
from taskx.inspecting.findings import Reason
from taskx.inspecting.health import Health, own_problems, thresholds
from taskx.inspecting.health import check as check_health
from taskx.inspecting.history import History, history
from taskx.inspecting.nodes import NodeInfo, nodes
from taskx.inspecting.reasons import why
from taskx.inspecting.stats import MOST_WAITING, Stats, stats
from taskx.moving import Services
from taskx.running.pool import State, WorkerPool
from taskx.running.threads import ThreadStack
from taskx.schedules.schedule import Schedule, Schedules
from taskx.schedules.stored import Overlap, make_entry
from taskx.storage import queries
from taskx.storage.adapter import EightMethodAdapter
from taskx.storage.base import Repository
from taskx.storage.eight import TaskRepository
from taskx.submitting.bulk import Bulk, OnProgress, Terms
from taskx.submitting.intake import Intake, task_of
from taskx.submitting.joining import Joining
from taskx.submitting.layers import layered
from taskx.submitting.mapping import Results, ahead
from taskx.submitting.operations import Operations
from taskx.submitting.requeuing import Requeues
from taskx.submitting.selecting import dead
from taskx.upkeep import foreground, requests, tuning
from taskx.upkeep.following import follow
from taskx.upkeep.node import Lifetime, LocalNode
from taskx.upkeep.retention import prune_all
from taskx.upkeep.tuning import Tuned

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing from 3.11 on

R = TypeVar("R")


class Queue:
    """A task queue on a repository.

    A queue that is not started only stores the tasks that you submit; another process runs them. A
    started queue also runs tasks: its own, and free tasks that other processes have stored.
    ``with queue:`` starts and stops it.

    Args:
        repository: stores the tasks: one of TaskX's repositories, or any object with the eight
            methods of :class:`TaskRepository`.
        config: the settings of the queue.
        logger: the logger to use; the one named ``taskx`` by default.
        hooks: instances of :class:`Hook`; the queue tells them what happens to tasks.
        middleware: instances of :class:`Middleware`, or functions with the same signature. They are
            wrapped around every execution; the first one is the outermost.
        clock: the source of the time; for tests.

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
            check_middleware(middleware),
            self._require,
            self.config.max_payload_size,
            self._warn_of_first_use,
        )
        # The JSON forms of params and results, by type. Handles decode results by them.
        self._values: Mapping[str, Values] = self._registry.values
        self._schedules = Schedules(self.handle)
        self.repository.queues.add(self)
        self._wire()
        _queues.add(self)

    # The classes of its parts; a queue that its caller drives has others.
    _services_class: type[Services] = Services
    _intake_class: type[Intake] = Intake
    _life_class: type[Lifetime] = Lifetime

    def _wire(self) -> None:
        state = State()
        self._services = self._services_class(
            *(self.repository, self._registry, self._hooks, state, self._clock, self._log),
            redact=self.config.redact,
        )
        self._intake = self._intake_class(self._services, state, self.config)
        self._operations = Operations(self._services, state)
        self._requeues = Requeues(self._services, state)
        self._joining = Joining(self._services, state, self.config)
        self._entrance = layered(self._intake, self._registry.middleware)
        self._schedules.wire(self._services, self._intake)
        self._life = self._life_class(self._services, self.config, state, self)

    def _require(self, what: str) -> None:
        self.repository.require(what)

    def _nobody_runs(self, type: str) -> bool:
        """Return True if it is known that no running queue has an executor for the type."""
        if self.repository.shortcoming:  # the queues of other processes are not known
            return False
        try:
            return not queries.runs_somewhere(self.repository, type)
        except RepositoryError:
            return False

    def _warn_of_first_use(self, type: str) -> None:
        if self._nobody_runs(type):
            self._log.warning(
                "no running queue has an executor for type %r, which this queue only declares; its tasks "
                "wait until one is started",
                type,
            )

    def __repr__(self) -> str:
        return f"<Queue on {self.repository!r}, {self._life.name}>"

    # --- executors

    def executor(
        self, type: str | None = None, **options: Unpack[ExecutorOptions]
    ) -> ExecutorDecorator:
        """Turn the decorated function into an executor and register it.

        Args:
            type: the type of the tasks that it runs; the function's name by default.
            max_attempts: number of attempts that may raise before the task fails (default 1, or the
                value that ``retry`` sets).
            max_crashes: number of times that the process may die before the task fails (default 3).
            timeout: seconds after which an attempt's token fires.
            priority: tasks with a higher number run first (default 0).
            retry: how often, when and after which errors another attempt follows (default: at once).
            tags: short texts to filter by; each task has these besides those of its submit.
            expires: seconds, or a ``timedelta``, from a task's ``run_at``, or from its submit, within
                which it must start for the first time; otherwise it is cancelled (default: no limit).
            capture_log: store what the executor logs in ``task.log``: True for level INFO and above,
                or the name of a level, such as ``"WARNING"``.
            isolation: ``"process"`` runs each attempt in its own child process, which imports the
                function by its name.
            grace: grace period: seconds that the executor has to end after its token fired (default
                10). Then its child process is killed. An executor in a thread is abandoned, but only
                after a time-out.
            max_concurrency: most tasks of the type that run at the same time.
            rate: most tasks that start in a period: ``"100/m"`` (units ``s``, ``m``, ``h``, ``d``),
                or a tuple of a count and seconds.
            burst: most tasks that may start at once after a quiet period (default: the count of
                ``rate``).
            limit_scope: ``"node"`` (default): each node has these limits for itself; ``"global"``:
                all nodes share them.
            replace: replace the type's executor if there is one, for notebook cells that run again.
                Tasks that are running end with the old code. The isolation and the limits must be the
                same.

        Raises:
            ConfigurationError: an option is not valid, the type is taken, the function cannot be
                an executor, or a child process could not find it.
        """
        if callable(type):
            raise ConfigurationError(
                "@queue.executor needs parentheses: write @queue.executor() or @queue.executor('name')"
            )
        return ExecutorDecorator(type, options_of(options), self.register_executor)

    def register_executor(
        self, executor: TaskExecutor | Executor[Any, Any], **options: Unpack[ExecutorOptions]
    ) -> None:
        """Register an executor that was made elsewhere.

        Args:
            executor: an executor made by ``@executor(...)``, or an instance of a
                :class:`TaskExecutor` subclass.
            options: the options of :meth:`executor`; they override the executor's own.

        Raises:
            ConfigurationError: an option is not valid, the type is taken, or the object is not an
                executor.
        """
        self._registry.register(executor, options_of(options))
        if isinstance(executor, Executor):
            executor.bind(self)
        if self._node is not None:
            with suppress(RepositoryError):  # the housekeeper records them later
                self._node.engine.record()
        self._services.agenda.fetch_soon()

    def declare(self, *types: str) -> None:
        """Accept tasks of types whose executors are registered only in another process."""
        for type_ in [check_key(type_, "type") for type_ in types]:
            self._registry.declare(type_)

    # --- submitting

    @overload
    def submit(
        self, task: Task, /, *, connection: object = None, **options: Unpack[SubmitOptions]
    ) -> TaskHandle[Any]: ...
    @overload
    def submit(
        self,
        executor: Executor[..., R] | BoundExecutor[..., R],
        params: dict[str, Any] | None = None,
        /,
        *,
        connection: object = None,
        **options: Unpack[SubmitOptions],
    ) -> TaskHandle[R]: ...
    @overload
    def submit(
        self,
        type: str,
        params: dict[str, Any] | None = None,
        /,
        *,
        connection: object = None,
        **options: Unpack[SubmitOptions],
    ) -> TaskHandle[Any]: ...
    def submit(
        self,
        task: Task | AnyExecutor | str,
        params: dict[str, Any] | None = None,
        /,
        *,
        connection: object = None,
        **options: Any,
    ) -> TaskHandle[Any]:
        """Submit a task. When the call returns, the task is stored and will run.

        Args:
            task: a type, an executor, or a pending :class:`Task`, which is not changed.
            params: the executor's params, a JSON object; not together with a ``Task``.
            id: a unique id; a new UUIDv7 by default.
            created_by: free text that you can filter by.
            priority: tasks with a higher number run first, equal ones in the order of submission; 0
                by default, or the executor's priority.
            run_at: an aware datetime; the task does not start earlier.
            delay: seconds from now; the task does not start earlier.
            timeout: seconds after which an attempt's token fires.
            max_attempts: number of attempts that may raise before the task fails.
            max_crashes: number of times that the process may die before the task fails; with 1 the
                task never runs again after a crash.
            retry: how often, when and after which errors another attempt follows.
            tags: at most 20 short texts that you can filter by: 1 to 64 characters each, without white
                space. The task also has the tags of its executor.
            unique_key: a text that at most one task can hold at a time.
            unique_scope: how long the task holds the unique key: ``"pending"``: until it first starts;
                ``"unfinished"`` (default): until it has ended; ``"ever"``: as long as its record is
                stored; or a number of seconds from now.
            on_conflict: the reaction if another task holds the unique key. ``"reject"`` (default)
                raises ``DuplicateTask``. ``"return"`` returns the other task's handle. ``"replace"``
                gives the other task the params and options of this one and returns its handle; the
                other task must be pending and have the same type, parents and concurrency key.
            depends_on: tasks, as ids or handles, that must complete before this one starts.
            on_parent_failure: the reaction if all tasks in ``depends_on`` have ended and one did not
                complete: ``"cancel"`` (default), ``"fail"`` or ``"run"`` this task.
            concurrency_key: tasks with the same key run one at a time, in the order of submission,
                across all processes.
            expires: a task that has not started for the first time by then is cancelled: an aware
                datetime, or seconds or a ``timedelta`` from its ``run_at``, or from now.
            connection: your ``sqlite3.Connection``, or SQLAlchemy ``Session`` or ``Connection``, on the
                file of the tasks. The task is then stored in your transaction: it starts after your
                commit, and never existed after a rollback. It does not use the buffer, so ``overflow``
                does not matter.

        Raises:
            UnknownTaskType: the type is neither registered nor declared.
            PayloadError: params are not JSON, are too large, or do not fit the function.
            DuplicateTask: another task has this id or holds the unique key.
            QueueFull: the buffer is full.
            QueueStopped: the queue was stopped.
            TaskNotFound: a task in ``depends_on`` does not exist.
            InvalidTransition: the task is not pending.
            ConfigurationError: another argument is not valid.
            RepositoryError: the task could not be stored. If the error's ``in_doubt`` is True, it may
                have been stored: submit again with the error's ``task_id`` to find out.
        """
        wanted, said = task_of(task, params, options, SubmitOptions, "submit", self._clock, self)
        priority: int | None = said.get("priority")
        on_conflict: OnConflict = said.get("on_conflict") or "reject"
        if connection is None:
            task_id = self._entrance.accept(wanted, priority, on_conflict)
        else:
            with self._joining.intake(connection, self._registry.middleware) as intake:
                task_id = intake.accept(wanted, priority, on_conflict)
        try:
            return TaskHandle(task_id, self)
        except BaseException as error:  # an interrupt
            error.task_id = task_id  # type: ignore[attr-defined]
            raise

    def submit_many(
        self, tasks: Iterable[Task], *, connection: object = None
    ) -> list[TaskHandle[Any]]:
        """Submit several tasks in one transaction, all or none.

        If the buffer has no room for all of them, ``overflow="reject"`` refuses all; with every other
        setting the rest waits in the repository.

        Args:
            tasks: the tasks, which are not changed.
            connection: store them in your transaction on this connection: see :meth:`submit`.

        Returns:
            the handles of the tasks, in the same order.

        Raises:
            TaskxError: the same errors as :meth:`submit`. Nothing was stored, unless ``in_doubt`` is
                True.
        """
        if connection is None:
            return [TaskHandle(task_id, self) for task_id in self._entrance.accept_many(tasks)]
        with self._joining.intake(connection, self._registry.middleware) as intake:
            return [TaskHandle(task_id, self) for task_id in intake.accept_many(tasks)]

    @overload
    def map(
        self,
        executor: Executor[..., R] | BoundExecutor[..., R],
        items: Iterable[Any],
        key: Callable[[Any], str | int] | None = None,
        *,
        name: str = "",
        window: int | None = None,
        timeout: float | timedelta | None = None,
        return_exceptions: Literal[False] = False,
        ordered: bool = True,
        retry_failed: bool = True,
        progress: bool = False,
        **options: Unpack[MapOptions],
    ) -> Iterator[R]: ...
    @overload
    def map(
        self,
        executor: Executor[..., R] | BoundExecutor[..., R],
        items: Iterable[Any],
        key: Callable[[Any], str | int] | None = None,
        *,
        name: str = "",
        window: int | None = None,
        timeout: float | timedelta | None = None,
        return_exceptions: bool,
        ordered: bool = True,
        retry_failed: bool = True,
        progress: bool = False,
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
        timeout: float | timedelta | None = None,
        return_exceptions: bool = False,
        ordered: bool = True,
        retry_failed: bool = True,
        progress: bool = False,
        **options: Unpack[MapOptions],
    ) -> Iterator[Any]: ...
    def map(
        self,
        executor: AnyExecutor | str,
        items: Iterable[Any],
        key: Callable[[Any], str | int] | None = None,
        *,
        name: str = "",
        window: int | None = None,
        timeout: float | timedelta | None = None,
        return_exceptions: bool = False,
        ordered: bool = True,
        retry_failed: bool = True,
        progress: bool = False,
        **options: Any,
    ) -> Iterator[Any]:
        """Run an executor for each item and return an iterator over the results, in order.

        The iterator submits nothing before you ask for the first result. Then it keeps a few tasks
        ahead of the results. The id of each task consists of ``name`` and the item's key. So you can
        run the same map again, for example after a crash: it returns the results of completed tasks,
        waits for unfinished ones, and requeues tasks that failed or were cancelled.

        Args:
            executor: an executor, or the type of one.
            items: the params of each task as a dict, or the value of the executor's first parameter.
            key: a function that returns the key of an item: a text or a whole number; ``1`` and
                ``"1"`` are the same key. By default the key is made from the params.
            name: the name of the map; the type of the executor by default.
            window: the number of tasks submitted ahead; four for each worker by default, or as many as
                the buffer has room for. While the iterator waits for a result, it keeps this many tasks
                unfinished, so that one long task does not stop the others.
            timeout: seconds to wait for a result.
            return_exceptions: return the exception of a failed item in its place, and go on.
            ordered: return results in the order of the items; if False, as soon as they are available.
            retry_failed: requeue a task that failed or was cancelled in an earlier run of the map; if
                False, raise its error again.
            progress: show on ``sys.stderr`` how many items are done: a bar in a terminal or a notebook
                if the package rich is installed, else a line every five seconds.
            options: options of new tasks: ``created_by``, ``priority``, ``max_attempts``,
                ``max_crashes``, ``retry`` and ``tags``, as in :meth:`submit`.

        Raises:
            TaskFailed: from the iterator, in the place of an item whose task failed. The iterator
                can go on: the next call returns the next item's result.
            concurrent.futures.CancelledError: the same, if the task was cancelled.
            TaskNotFound: the same, if the record was deleted before its result was read.
            RepositoryCorrupt: the same, if the record is damaged.
            PayloadError: the same, if the item is not JSON or does not fit the executor.
            concurrent.futures.TimeoutError: from the iterator, if the result took too long. The next
                call waits for the same item again.
            ConfigurationError: an argument is not valid; from the iterator, if the key of an item is
                not valid.
            TaskxError: from the iterator, any error of :meth:`submit` except ``QueueFull``. The next
                call tries the same item again.
        """
        return Results(
            executor=executor,
            items=items,
            key=key,
            name=name,
            window=ahead(self.config) if window is None else window,
            timeout=timeout,
            return_exceptions=return_exceptions,
            ordered=ordered,
            retry_failed=retry_failed,
            progress=progress,
            options=options,
            owner=self,
            intake=lambda: self._entrance,
            clock=self._clock,
        )

    def submit_flow(
        self, flow: Flow, *, tags: Sequence[str] = (), connection: object = None
    ) -> FlowHandle:
        """Submit a chain or group of tasks, all or none, and return one handle for all of them.

        A flow can have any size: tasks that do not fit into the buffer wait in the repository.

        Args:
            flow: the flow, made by :func:`chain` or :func:`group`.
            tags: short texts to filter by; each task has these besides its own.
            connection: store them in your transaction on this connection: see :meth:`submit`.

        Raises:
            TaskxError: the errors of :meth:`submit_many` except ``QueueFull``. Nothing was stored,
                unless ``in_doubt`` is True.
        """
        flow_id = new_id()
        tasks, shape = lay_out(flow, flow_id, tags)
        if connection is None:
            self._entrance.accept_many(tasks, spill=True)
        else:
            with self._joining.intake(connection, self._registry.middleware) as intake:
                intake.accept_many(tasks, spill=True)
        return FlowHandle(shape, self, flow_id)

    def flow_handle(self, shape: Shape) -> FlowHandle:
        """Return a handle for a flow that any process submitted before.

        Args:
            shape: the ``shape`` of the handle that :meth:`submit_flow` returned.

        Raises:
            ConfigurationError: the value is not such a shape.
        """
        return FlowHandle(shape, self)

    def flows(self, *, at_most: int = 20, after: str | None = None) -> list[FlowSummary]:
        """Return the flows that were submitted last, newest first, with the counts of their tasks.

        A flow is listed as long as one of its tasks is stored. The cost depends on the tasks of these flows
        only: at most 5,000 tasks of each are counted.

        Args:
            at_most: most flows to return.
            after: the id of the last flow of the call before, for the flows that follow it.

        Raises:
            ConfigurationError: an argument is not valid.
            RepositoryError: the repository cannot be read.
        """
        return newest_flows(self.repository, at_most, after)

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
        misfire_grace: float | timedelta | None = None,
        overlap: Overlap = "allow",
        **options: Unpack[ScheduleOptions],
    ) -> Schedule: ...
    @overload
    def schedule(
        self,
        name: str,
        spec: str | Every,
        type: str | AnyExecutor,
        params: dict[str, Any] | None = None,
        /,
        *,
        tz: str | None = None,
        misfire: Misfire = "one",
        misfire_grace: float | timedelta | None = None,
        overlap: Overlap = "allow",
        **options: Unpack[ScheduleOptions],
    ) -> Schedule: ...
    def schedule(
        self,
        name: str,
        spec: str | Every,
        task: Task | AnyExecutor | str,
        params: dict[str, Any] | None = None,
        /,
        *,
        tz: str | None = None,
        misfire: Misfire = "one",
        misfire_grace: float | timedelta | None = None,
        overlap: Overlap = "allow",
        **options: Any,
    ) -> Schedule:
        """Store a schedule; the started queues on the repository submit a task at each of its ticks.

        Call this every time your program starts. If a schedule of this name is stored already, it is
        updated: it stays paused if it was, and continues with its next tick unless ``spec`` or ``tz``
        has changed.

        Args:
            name: a unique name in the repository, at most 200 characters. The ids of the schedule's
                tasks begin with it.
            spec: the times of the ticks: a cron expression of five fields, or ``every(seconds)``.
            task: the type of its tasks, their executor, or a :class:`Task` without id as their model.
            params: the executor's params; not together with a ``Task``.
            tz: the time zone of a cron expression, such as ``"Europe/Berlin"``; UTC by default.
            misfire: the handling of ticks that were missed because no queue was started: one task for
                all of them (``"one"``), no task (``"skip"``), or one task for each (``"all"``) that is
                at most ``misfire_grace`` seconds old.
            misfire_grace: seconds that a tick may be late and still get a task. The default is 10 with
                ``"skip"``, and unlimited with ``"one"``; ``"all"`` requires a value.
            overlap: with ``"skip"``, a tick gets no task while the schedule's last task has not ended.
            created_by: this field of its tasks; ``schedule:`` and the name by default.
            priority, timeout, max_attempts, max_crashes, retry, tags, concurrency_key: options of its
                tasks, as in :meth:`submit`.
            expires: seconds, or a ``timedelta``, from a tick, or from when its task is made if that is
                later; the task is cancelled if it has not started by then.

        Raises:
            ConfigurationError: an argument is not valid, a package is missing, or the repository cannot
                store schedules.
            UnknownTaskType: the type is neither registered nor declared.
            PayloadError: params are not JSON, are too large, do not fit the function, or a codec
                refuses them.
            RepositoryError: the schedule could not be stored.
        """
        entry = make_entry(name, spec, tz, misfire, misfire_grace, overlap)
        wanted, said = task_of(
            task, params, options, ScheduleOptions, "schedule", self._clock, self
        )
        return self._schedules.declare(entry, wanted, said.get("priority"), said.get("expires"))

    def schedules(self) -> dict[str, Schedule]:
        """Return all schedules in the repository, by name, including those of other processes."""
        return self._schedules.all()

    # --- reading

    def handle(self, task_id: str) -> TaskHandle[Any]:
        """Return a handle for a task of any process, without checking that the task exists."""
        return TaskHandle(check_name(task_id, "id"), self)

    def get_task_status(self, task_id: str) -> Task:
        """Return the task's record as it is now.

        Raises:
            TaskNotFound: no task has this id.
        """
        return self.repository.get_by_id(task_id)

    def list_tasks(
        self,
        filter: TaskFilter | None = None,
        *,
        after: str | None = None,
        at_most: int | None = None,
        **fields: Unpack[FilterOptions],
    ) -> TaskPage:
        """Return one page of the tasks that match, newest first, and the total number of matches.

        The page has 100 tasks unless ``limit`` says otherwise; its ``more`` is the number of tasks after
        it. Use :meth:`iter_tasks` for all of them.

        Args:
            filter: the conditions for the tasks.
            after: the ``next`` of the page before, with the same conditions. Every page then costs the
                same. Its total is that of the first page, because the tasks are not counted again.
            at_most: the largest total that is counted; None for no limit.
            fields: the fields of a :class:`TaskFilter`, instead of one: ``type``, ``status``,
                ``created_by``, ``start_date``, ``end_date``, ``error``, ``error_type``, ``id_prefix``,
                ``params``, ``parent``, ``tag``, ``flow``, ``offset``, ``limit``; and the age of the tasks
                in seconds or as a timedelta: ``older`` than that, ``newer`` than that. With ``params`` only
                the newest 100,000 tasks are searched; ``searched_since`` of the page says so.

        Raises:
            ConfigurationError: a value is not valid, or both a filter and fields were given, or params were
                given and a codec hides them.
        """
        wanted = filter_of(filter, fields, "list_tasks", self._clock)
        return queries.page(self.repository, wanted, after, at_most)

    def count_tasks(
        self,
        filter: TaskFilter | None = None,
        *,
        at_most: int | None = None,
        **fields: Unpack[FilterOptions],
    ) -> TaskCount:
        """Return the number of tasks that match.

        Args:
            filter, fields: as in :meth:`list_tasks`; ``offset`` and ``limit`` have no effect.
            at_most: the largest number that is counted; None to count all. If more tasks match, the result
                is this number, and its ``exact`` is False. If it is given, a search in params is limited as
                in :meth:`list_tasks`.

        Raises:
            ConfigurationError: as in :meth:`list_tasks`.
        """
        wanted = filter_of(filter, fields, "count_tasks", self._clock)
        return queries.count(self.repository, wanted, at_most)

    def iter_tasks(
        self, filter: TaskFilter | None = None, **fields: Unpack[FilterOptions]
    ) -> Iterator[Task]:
        """Iterate over all tasks that match, newest first, or over ``limit`` of them.

        The iterator reads 200 tasks at a time, each time from where it is in the list: it needs little
        memory, and a late task costs no more than an early one. Tasks that are stored or deleted in the
        meantime neither hide nor repeat another one. After an error, begin a new iteration.

        Args:
            filter, fields: as in :meth:`list_tasks`.

        Raises:
            ConfigurationError: a value is not valid, or both a filter and fields were given.
            RepositoryError: from the iterator, if the repository cannot be read.
        """
        return queries.matching(
            self.repository, filter_of(filter, fields, "iter_tasks", self._clock)
        )

    def watch(self, handle: TaskHandle[Any]) -> None:
        """Resolve a handle when its task ends. Handles call this themselves."""
        self._services.watcher.watch(handle)
        if self._node is None:
            self._services.watcher.warn_if_nobody_runs(handle.id)

    @property
    def buffered(self) -> int:
        """The number of submitted tasks that wait in this queue's buffer, at most ``buffer_size``."""
        return 0 if self._node is None else self._node.engine.buffer.submitted

    @property
    def events_waiting(self) -> int:
        """The number of events that the hooks of this queue were not told yet."""
        return len(self._services.hooks.waiting)

    @property
    def running(self) -> int:
        """The number of executors that this queue is running."""
        return 0 if self._node is None else len(self._node.engine.runs.executing)

    @property
    def stopped(self) -> bool:
        """True if the queue was stopped: it accepts no more tasks."""
        return self._life.name == "stopped"

    @property
    def healthy(self) -> bool:
        """True if this queue can do its work: the part of :meth:`health` that needs no read.

        It is False while more threads are stuck than the queue replaces (``max_stuck``), while the
        SQLite file is moved away, deleted or replaced, and after a newer TaskX has migrated the file. It
        does not tell you if the queue was started: a queue that only submits has no threads, and is
        healthy as long as its file exists. :meth:`health` tells you if any queue runs tasks.
        """
        return not [*own_problems(self._services, self._engine, self.config.max_stuck)]

    # --- questions

    def why(self, task_id: str) -> list[Reason]:
        """Return the reasons why a task waits, runs or has ended, the decisive one first.

        A pending task can have several reasons: all of them must pass before it starts. If the repository
        cannot be read, the only reason says so. The answer is of one moment, and nothing is changed. The
        queue need not be started.

        Raises:
            TaskNotFound: no task has this id.
        """
        ageing = round((self.config.ageing or 0) * 1000)
        return why(self._services, self._engine, ageing, check_name(task_id, "id"))

    def health(
        self,
        *,
        oldest_due: float | timedelta | None = 300.0,
        failed: tuple[int, float | timedelta] | None = None,
        nodes: int | Mapping[str, int] = 1,
        stuck: int | None = None,
        file_size: int | None = None,
        schedule_overdue: float | timedelta | None = 60.0,
    ) -> Health:
        """Check the repository and this queue, and return what is wrong.

        A repository that is away, a lost file and a newer schema are problems, not errors. The queue need
        not be started. None as a threshold: do not check.

        Args:
            oldest_due: most seconds since a task could have started; paused types do not count.
            failed: ``(count, seconds)``: most tasks that failed in the last ``seconds``. Only the thousand
                failed tasks that were submitted last are examined.
            nodes: fewest live nodes, in all and for each type that has tasks to run; a dict has other
                numbers for some types. 0: do not check.
            stuck: most threads on one node that run on after a time-out; ``max_stuck`` by default.
            file_size: most bytes that a SQLite file and its write-ahead log take.
            schedule_overdue: most seconds by which a tick of a schedule may be late.

        Raises:
            ConfigurationError: an argument is not valid, or the repository has no file.
        """
        wanted = thresholds(
            oldest_due=oldest_due,
            failed=failed,
            nodes=nodes,
            stuck=self.config.max_stuck if stuck is None else stuck,
            file_size=file_size,
            schedule_overdue=schedule_overdue,
        )
        return check_health(self._services, self._engine, wanted)

    def diagnose(self) -> Diagnosis:
        """Examine what is around the tasks: versions, file, permissions, disk, locks, dead nodes, clock.

        Nothing is created, migrated or changed, and the queue need not be started. What cannot be read is
        a check that has failed, not an error. It may take some seconds.
        """
        return diagnose(self._services)

    def stats(
        self,
        *,
        period: float | timedelta = 3600.0,
        at_most: int = 5_000,
        waiting_at_most: int = MOST_WAITING,
    ) -> Stats:
        """Return how many tasks of each type wait, run and have ended, and how long that took.

        The numbers are of all processes. A task that moves between two reads may be counted twice, or not
        at all. The tasks that ended in the period are counted among those that were submitted last: the
        answer's ``since`` and ``complete`` say if these are all. The cost depends on ``at_most``, and
        hardly on the number of tasks. The queue need not be started.

        Args:
            period: the seconds before now in which tasks are counted as completed or failed; with 0 no
                ended tasks are read.
            at_most: most completed and most failed tasks to read, and most delayed, blocked and running
                ones.
            waiting_at_most: the largest number of waiting tasks that is counted for each type and node.

        Raises:
            ConfigurationError: an argument is not valid.
            RepositoryError: the repository cannot be read.
        """
        return stats(self._services, period, at_most, waiting_at_most)

    def history(
        self,
        *,
        period: float | timedelta = 3600.0,
        intervals: int = 60,
        at_most: int = 5_000,
    ) -> History:
        """Return how many tasks completed and failed in each interval of a period, and their run times.

        The numbers are of all processes, for charts. As in :meth:`stats`, the tasks are counted among those
        that were submitted last: the answer's ``since`` and ``complete`` say if these are all. The cost
        depends on ``at_most``, and hardly on the number of tasks. The queue need not be started.

        Args:
            period: the seconds before now that are divided into intervals.
            intervals: the number of equal intervals, 1 to 1,000.
            at_most: most completed and most failed tasks to read.

        Raises:
            ConfigurationError: an argument is not valid.
            RepositoryError: the repository cannot be read.
        """
        return history(self._services, period, intervals, at_most)

    def failures(
        self, *, type: str | None = None, since: datetime | None = None, at_most: int = 1_000
    ) -> Failures:
        """Return the failed tasks in groups of the same type, class of error and place in the code.

        Run a whole group again with :meth:`requeue_failures`.

        Args:
            type: only tasks of this type.
            since: only tasks that failed at or after this aware datetime.
            at_most: most failed tasks to read: those that were submitted last. The answer's ``complete``
                says if these were all.

        Raises:
            ConfigurationError: an argument is not valid.
            RepositoryError: the repository cannot be read.
        """
        return failures(self._services, type, since, at_most)

    def nodes(self) -> list[NodeInfo]:
        """Return the nodes on the repository, of all processes, and the tasks that they are running.

        Dead nodes are listed until another node has taken over their tasks. The queue need not be started.

        Raises:
            ConfigurationError: the repository has only the eight methods.
            RepositoryError: the repository cannot be read.
        """
        return nodes(self._services, self._engine)

    def stacks(
        self, node_id: str | None = None, *, timeout: float | timedelta = 5.0
    ) -> list[ThreadStack]:
        """Return what the threads of a process do, with their stacks.

        The threads that run tasks come first. At most 200 threads are returned, and at most some 4,000
        characters of each stack.

        Args:
            node_id: the id of a node, from :meth:`nodes`; None for this process. A node of another process
                is asked through the repository, and answers within about a second.
            timeout: seconds to wait for the answer.

        Raises:
            NodeNotFound: no live node has this id.
            TimeoutError: the node did not answer in time.
            ConfigurationError: the repository has only the eight methods, and a node was named.
            RepositoryError: the repository failed.
        """
        return requests.stacks(self._services, node_id, timeout)

    def stop_node(self, node_id: str) -> None:
        """Ask a node to stop, in this or another process, and return at once.

        The node gets the request within about a second. It then takes no more tasks, and its running tasks
        can go on as after :meth:`stop` with 30 seconds. A program that :func:`taskx.run` or a supervisor
        runs ends as after SIGTERM. In other programs only the queue stops.

        Args:
            node_id: the id of the node, from :meth:`nodes`.

        Raises:
            NodeNotFound: no live node has this id.
            ConfigurationError: the repository has only the eight methods.
            RepositoryError: the repository failed.
        """
        requests.stop_node(self._services, node_id)

    def changes(self, at_most: int = 100) -> list[Change]:
        """Return the newest entries of the log of changes, the newest first.

        Args:
            at_most: most entries to return. Only the newest 1,000 are kept.

        Raises:
            ConfigurationError: an argument is not valid, or the repository has only the eight methods.
            RepositoryError: the repository cannot be read.
        """
        return changes(self._services, at_most)

    def note_change(self, by: str, action: str, target: str, detail: Any = None) -> None:
        """Add an entry to the log of changes.

        The command line and the dashboard call this for each change. The methods of the queue do not,
        because they do not know who calls.

        Args:
            by: the person or program that made the change.
            action: the name of the action, such as ``"cancel"``.
            target: the thing that was changed: a task's id, a type, a filter.
            detail: more about the change: a JSON value of at most 10,000 bytes.

        Raises:
            ConfigurationError: an argument is not valid, or the repository has only the eight methods.
            PayloadError: ``detail`` is not JSON or too large.
            RepositoryError: the repository failed.
        """
        note_change(self._services, by, action, target, detail)

    # --- changing

    def cancel_task(self, task_id: str, *, connection: object = None) -> bool:
        """Cancel a task.

        Args:
            task_id: the task's id.
            connection: cancel it in your transaction on this connection: see :meth:`submit`. A running
                task is asked to stop after your commit.

        Returns:
            True if the task will never run; False if it is running and was asked to stop.

        Raises:
            TaskNotFound: no task has this id.
            InvalidTransition: the task has ended.
            RepositoryCorrupt: the record is so damaged that it cannot be cancelled.
        """
        if connection is None:
            return self._operations.cancel(check_name(task_id, "id"))
        with self._joining.operations(connection) as operations:
            return operations.cancel(check_name(task_id, "id"))

    def cancel_many(self, task_ids: Iterable[str]) -> int:
        """Cancel the given tasks in a few transactions; tasks that have ended stay unchanged.

        Returns:
            the number of tasks that will never run. Running tasks do not count: they were asked to
            stop.

        Raises:
            RepositoryError: the repository failed; some tasks may have been cancelled.
        """
        return self._operations.cancel_many([check_name(task_id, "id") for task_id in task_ids])

    def requeue(
        self,
        task_id: str,
        *,
        params: Mapping[str, Any] | None = None,
        from_step: str | None = None,
    ) -> None:
        """Run a failed or cancelled task again; its attempts and crashes are counted from zero.

        Tasks that failed or were cancelled because of it, such as the rest of a chain, wait for it
        again. The task waits for parents that have not ended. It runs even if parents have failed.

        The results of its steps and its cursor are kept, also with other params: the task goes on where it
        was. What the requeue changes is noted in ``task.attempts``, with the outcome ``requeued``.

        Args:
            task_id: the id of the task.
            params: other params, checked as by :meth:`submit` if the type is registered here; None to keep
                them.
            from_step: run from this step on: its result is removed, with those of all steps that were
                stored after it, and the cursor. None to keep them.

        Raises:
            TaskNotFound: no task has this id.
            InvalidTransition: the task is neither failed nor cancelled.
            DuplicateTask: another task holds its unique key now.
            PayloadError: params are not JSON, are too large, do not fit the function, or a codec refuses
                them.
            ConfigurationError: the task has stored no such step.
            RepositoryCorrupt: the record is damaged, and the requeue would change it.
            QueueStopped: the queue was stopped.
        """
        self._requeues.one(check_name(task_id, "id"), params, from_step)

    def requeue_many(self, task_ids: Iterable[str]) -> int:
        """Requeue the given tasks if they failed or were cancelled, in a few transactions.

        Tasks that failed or were cancelled because of the given tasks are requeued, too. Each task
        waits again for its parents among all of these. A task whose unique key is now held by another
        task stays unchanged.

        Returns:
            the number of tasks that run again, including those that had ended because of the given
            tasks.

        Raises:
            QueueStopped: the queue was stopped.
            RepositoryError: the repository failed; some tasks may have been requeued.
        """
        return self._requeues.requeue_many([check_name(task_id, "id") for task_id in task_ids])

    def requeue_all(
        self,
        filter: TaskFilter | None = None,
        *,
        rate: str | tuple[int, float | timedelta] | None = None,
        dry_run: bool = False,
        at_most: int | None = None,
        on_progress: OnProgress | None = None,
        **fields: Unpack[FilterOptions],
    ) -> Bulk:
        """Requeue all tasks that match, newest first, in batches; without a status, the failed ones.

        Tasks that failed or were cancelled because of them run again after them. A task that fails again
        in the meantime is not requeued a second time. After an error or an interrupt, the batches before it
        are done: call it again to go on.

        Args:
            filter, fields: as in :meth:`list_tasks`. All that match are requeued, or ``limit`` of them.
            rate: the tasks start one by one at this rate, such as ``"100/m"``, each at its ``run_at``: the
                calling process need not stay alive for that. Later calls with the same conditions (dates
                do not count) and the same rate continue after the last of these tasks.
            dry_run: only count the tasks.
            at_most: the largest number that a dry run counts, as in :meth:`count_tasks`; only with
                ``dry_run``.
            on_progress: a function that gets a :class:`Bulk` after each batch. If it raises, no further
                batch is changed.

        Raises:
            ConfigurationError: an argument is not valid, or the status is neither failed nor cancelled.
            QueueStopped: the queue was stopped.
            RepositoryError: the repository failed; some batches may have been requeued.
        """
        wanted = filter_of(filter, fields, "requeue_all", self._clock)
        terms = Terms(dry_run, at_most, on_progress)
        return self._requeues.requeue_all(wanted, terms, rate=rate)

    def requeue_failures(
        self,
        group: FailureGroup,
        *,
        rate: str | tuple[int, float | timedelta] | None = None,
        dry_run: bool = False,
        on_progress: OnProgress | None = None,
    ) -> Bulk:
        """Requeue all failed tasks of a group of :meth:`failures`, also those that it has not read.

        They are the failed tasks of the same type, class of error and place in the code. For that, all
        failed tasks of this type and class of error are read, a batch at a time. On a repository with only
        the eight methods, they are the ``task_ids`` of the group.

        Args:
            group: the group.
            rate, dry_run, on_progress: as in :meth:`requeue_all`.

        Raises:
            TaskxError: as in :meth:`requeue_all`.
        """
        return requeue_group(self._requeues, group, Terms(dry_run, None, on_progress), rate)

    def cancel_all(
        self,
        filter: TaskFilter | None = None,
        *,
        everything: bool = False,
        dry_run: bool = False,
        at_most: int | None = None,
        on_progress: OnProgress | None = None,
        **fields: Unpack[FilterOptions],
    ) -> Bulk:
        """Cancel all pending tasks that match and ask the running ones to stop, in batches.

        Args:
            filter, fields: as in :meth:`list_tasks`. All that match are cancelled, or ``limit`` of them.
            everything: must be True if there is no condition.
            dry_run, at_most, on_progress: as in :meth:`requeue_all`.

        Raises:
            ConfigurationError: an argument is not valid, or the status is that of ended tasks.
            RepositoryError: the repository failed; some batches may have been cancelled.
        """
        wanted = filter_of(filter, fields, "cancel_all", self._clock)
        terms = Terms(dry_run, at_most, on_progress)
        return self._operations.cancel_all(wanted, terms, everything=everything)

    def delete_all(
        self,
        filter: TaskFilter | None = None,
        *,
        everything: bool = False,
        dry_run: bool = False,
        at_most: int | None = None,
        on_progress: OnProgress | None = None,
        **fields: Unpack[FilterOptions],
    ) -> Bulk:
        """Delete the records of all tasks that match, in batches: also of those that have not run.

        These stay: running tasks, tasks with a thread that still runs, and tasks on which an unfinished
        task depends that stays.

        Args:
            filter, fields: as in :meth:`list_tasks`. All that match are deleted, or ``limit`` of them.
            everything: must be True if there is no condition.
            dry_run, at_most, on_progress: as in :meth:`requeue_all`. A dry run also counts tasks that stay.

        Raises:
            ConfigurationError: an argument is not valid, or the status is running.
            RepositoryError: the repository failed; some batches may have been deleted.
        """
        wanted = filter_of(filter, fields, "delete_all", self._clock)
        terms = Terms(dry_run, at_most, on_progress)
        return self._operations.delete_all(wanted, terms, everything=everything)

    def delete(self, task_id: str) -> None:
        """Delete the record of a task that is not running.

        Raises:
            TaskNotFound: no task has this id.
            InvalidTransition: the task is running, or a thread of an ended attempt still runs
                (``stuck_on``).
        """
        self._operations.delete(check_name(task_id, "id"))

    def prune(self, before: datetime, status: TaskStatus | str | None = None) -> int:
        """Delete tasks that ended before a given time, a few in each transaction.

        A task stays while a task that depends on it is stored, and while it holds a unique key for a
        number of seconds.

        Args:
            before: an aware datetime.
            status: delete only completed, failed or cancelled tasks; by default all three.

        Returns:
            the number of deleted tasks.

        Raises:
            ConfigurationError: an argument is not valid.
            RepositoryError: the repository failed; some tasks may have been deleted.
        """
        return prune_all(self._services, before, status)

    # --- pausing and tuning

    def pause(self, type: str | None = None) -> None:
        """Pause a type in all processes: none of its tasks starts. With None, pause all types.

        The pause lasts until :meth:`resume`, even after restarts. Running tasks go on, and submitted
        tasks are stored. In this process the pause is in effect when the call returns, except for a
        start that is being written at that moment; in other processes within a second.

        A type that is not registered, not declared, and not run by any running queue is paused, too, but
        a warning is logged: the type may be misspelt.

        Raises:
            ConfigurationError: the type is not a valid name, or the repository has only the eight
                methods.
            RepositoryError: the repository failed.
        """
        self._services.controls.pause(type)
        self._check_controls()
        self._warn_if_misspelt(type, "paused")

    def _warn_if_misspelt(self, type: str | None, what: str) -> None:
        if type is not None and not self._registry.knows(type) and self._nobody_runs(type):
            self._log.warning(
                "type %r is %s, but no running queue has an executor for it; is it misspelt? This queue "
                "knows: %s",
                *(type, what, self._registry.known),
            )

    def resume(self, type: str | None = None) -> None:
        """End the :meth:`pause` of the same type. With None, types paused by name stay paused.

        Raises:
            ConfigurationError: the type is not a valid name.
            RepositoryError: the repository failed.
        """
        self._services.controls.resume(type)
        self._check_controls()

    def _check_controls(self) -> None:
        if self._node is not None:
            self._node.engine.tuning.refresh()
            self._services.agenda.wake_from_long_sleep()

    @property
    def paused(self) -> Paused:
        """The pauses that are stored in the repository.

        Raises:
            RepositoryError: the repository failed.
        """
        return self._services.controls.read_paused()

    def tune(
        self,
        type: str | None = None,
        *,
        workers: int | None = None,
        node: str | None = None,
        **limits: Unpack[LimitOptions],
    ) -> None:
        """Override the limits of a type, or the number of workers, in all processes.

        The overrides are stored: they last until :meth:`untune`, even after restarts. In this process they
        are in effect when the call returns, in other processes within a second. Overrides that were set
        before and are not named here stay.

        If a limit is lowered, running tasks go on, and none starts until enough have ended. Workers that
        are added start within moments. Surplus workers end after their current task.

        A type that no queue runs is tuned, too, but a warning is logged: it may be misspelt.

        Args:
            type: the type whose limits to override.
            workers: the number of workers of each node; not together with a type.
            node: the id of a node: only this one gets ``workers``, whatever the others have.
            max_concurrency: most tasks of the type that run at the same time; None for no limit.
            rate: most tasks that start in a period, as ``"100/m"`` or ``(count, seconds)``; None for no
                limit.
            burst: most tasks that may start at once after a quiet period; None for the count of ``rate``.
            limit_scope: ``"node"`` or ``"global"``; None for ``"node"``.

        Raises:
            ConfigurationError: an argument is not valid, or the repository has only the eight methods.
            NodeNotFound: no live node has this id.
            RepositoryError: the repository failed.
        """
        tuning.tune(self._services, type, limits, workers, node)
        self._check_controls()
        self._warn_if_misspelt(type, "tuned")

    def untune(
        self,
        type: str | None = None,
        *,
        only: Collection[str] | None = None,
        workers: bool = False,
        node: str | None = None,
    ) -> None:
        """Remove overrides: the values of the executors and programs apply again.

        Args:
            type: the type whose limits are no longer overridden.
            only: the names of the limits, such as ``["rate"]``, if not all of the type's.
            workers: True: the number of workers is no longer overridden; not together with a type.
            node: with ``workers``, the id of a node: only the number of this node is removed.

        Raises:
            ConfigurationError: an argument is not valid, or the repository has only the eight methods.
            RepositoryError: the repository failed.
        """
        tuning.untune(self._services, type, only, workers, node)
        self._check_controls()

    def tuned(self) -> Tuned:
        """Return the stored overrides, and the values that they override.

        Raises:
            ConfigurationError: the repository has only the eight methods.
            RepositoryError: the repository failed.
        """
        return tuning.tuned(self._services)

    # --- dead letters

    def dead_letters(
        self,
        filter: TaskFilter | None = None,
        *,
        after: str | None = None,
        at_most: int | None = None,
        **fields: Unpack[FilterOptions],
    ) -> TaskPage:
        """Return one page of the failed tasks that match, newest first, and the number of all matches.

        The arguments are those of :meth:`list_tasks`. Use ``iter_tasks(status="failed")`` for all.

        Raises:
            ConfigurationError: the filter is not valid, or it has another status.
        """
        wanted = dead(filter_of(filter, fields, "dead_letters", self._clock))
        return self.list_tasks(wanted, after=after, at_most=at_most)

    def requeue_dead_letters(
        self, filter: TaskFilter | None = None, **fields: Unpack[FilterOptions]
    ) -> int:
        """Requeue dead letters: all that match a filter, or the newest ones if the filter has a limit.

        Filter and fields are those of :meth:`list_tasks`.

        Without a limit all matches are requeued, although :meth:`dead_letters` lists only 100. To
        requeue a few of many, give the filter a limit. Tasks that fail again in the meantime are not
        requeued a second time. Tasks that failed or were cancelled because of the dead letters, such
        as the rest of a chain, run again after them, even if they do not match the filter.

        Returns:
            the number of tasks that run again, including those that had ended because of the dead
            letters.

        Raises:
            ConfigurationError: the filter is not valid, or it has another status.
            QueueStopped: the queue was stopped.
        """
        wanted = filter_of(filter, fields, "requeue_dead_letters", self._clock)
        return self._requeues.requeue_dead_letters(wanted)

    def discard_dead_letters(
        self, filter: TaskFilter | None = None, **fields: Unpack[FilterOptions]
    ) -> int:
        """Delete dead letters: all that match a filter, or the newest ones if the filter has a limit.

        The filter works as in :meth:`requeue_dead_letters`. If an unfinished task depends on a dead
        letter, the dead letter stays, because that task may ask for it.

        Returns:
            the number of deleted tasks.

        Raises:
            ConfigurationError: the filter is not valid, or it has another status.
        """
        wanted = filter_of(filter, fields, "discard_dead_letters", self._clock)
        return self._operations.discard_dead_letters(wanted)

    # --- starting and stopping

    def start(self) -> None:
        """Start the workers; a second call does nothing.

        The queue also takes over the tasks of processes that died, including those that were running.
        If the call raises, nothing was started, and you can call it again.

        Raises:
            QueueStopped: the queue was stopped; create a new one.
            RepositoryError: the repository cannot be used.
            RuntimeError: the system cannot start more threads.
        """
        self._life.start()

    def drain(self, timeout: float | timedelta | None = None) -> bool:
        """Wait until no task is left to run; return False if ``timeout`` seconds passed before.

        The call does not wait for tasks that may not start yet (``run_at``, ``delay``) or whose type is
        paused. It does wait for tasks of this queue's other types that run in other processes.

        Raises:
            ConfigurationError: called inside an executor or a hook, or on a queue that is not
                started.
            QueueStopped: the queue was stopped.
        """
        return self._life.drain(timeout)

    def follow(self, timeout: float | timedelta | None = None) -> bool:
        """Show a person how many tasks wait, run and have ended, until nothing is left to run.

        The display is a bar in a terminal or a notebook if the package rich is installed, else a line
        on ``sys.stderr`` every five seconds. It counts the tasks of all processes on the repository.
        A started queue follows until :meth:`drain` would return, another one until no task runs or may
        start. Ctrl-C ends the display only.

        Args:
            timeout: seconds to wait at most; None waits for ever.

        Returns:
            False if ``timeout`` seconds have passed before.

        Raises:
            TaskxError: as :meth:`drain`, on a started queue.
            RepositoryError: the repository cannot be read.
        """
        return follow(self.repository, self.drain if self._node is not None else None, timeout)

    def stop(self, timeout: float | timedelta = 30.0, cancel: bool = False) -> list[str]:
        """Stop the queue: accept and start no more tasks, and wait for the running ones.

        Running tasks can go on for four fifths of ``timeout``; then their tokens fire with reason
        STOP. With ``cancel`` the tokens fire at once. A task that ends because of this is pending
        again, and no attempt is counted. A thread that still runs afterwards can end later, and its
        outcome is stored. If the process ends first, its task counts as interrupted.

        Args:
            timeout: seconds after which the call returns in any case; it returns a second later if the
                repository or a hook hangs.
            cancel: tell running tasks to stop at once.

        Returns:
            the ids of the tasks that still run.
        """
        return self._life.stop(timeout, cancel=cancel)

    def close(self) -> None:
        """Stop the queue and close its repository.

        Threads that wait for the result of an unfinished task get ``QueueStopped``.
        """
        self.stop()
        self._services.watcher.close()
        self.repository.close()

    def __enter__(self) -> Queue:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Stop the queue, also after an error or ``SystemExit``: running tasks can go on for 24 seconds.

        After Ctrl-C running tasks are told to stop at once.
        """
        self.stop(cancel=kind is not None and issubclass(kind, KeyboardInterrupt))

    # --- forks

    def _renew_after_fork(self) -> None:
        """Reset the queue in a forked child to "not started", without touching the parent's resources."""
        self.repository.renew_after_fork()
        self._services.watcher.renew_after_fork()
        self._life.forget()
        self._wire()

    @property
    def _node(self) -> LocalNode | None:
        return self._life.node

    @property
    def _engine(self) -> WorkerPool | None:
        return None if self._node is None else self._node.engine


def run(*queues: Queue, timeout: float | timedelta = 30.0) -> int:
    """Start queues, run them until SIGTERM or SIGINT (Ctrl-C), and stop them.

    After the first signal running tasks can go on, and the queues stop as :meth:`Queue.stop` describes.
    After the second one all tokens fire, and the call returns a second later at most. A task that still
    runs when the program ends is interrupted: it runs again, and no attempt is counted. The call also
    returns if other threads have stopped all queues. Signals that the program ignores stay ignored. The
    signal handlers are restored at the end.

    Args:
        queues: the queues, started or not.
        timeout: seconds, or a timedelta, that running tasks have after the first signal, as in
            :meth:`Queue.stop`.

    Returns:
        the exit code of the program, for ``sys.exit``: 0 if no task runs any more; 1 if tasks still run
        after ``timeout``, or a newer TaskX has migrated the file; 143 after a second signal that was
        SIGTERM, 130 after one that was SIGINT.

    Raises:
        ConfigurationError: not called in the main thread, or an argument is not valid.
        TaskxError: the errors of :meth:`Queue.start`. The other queues were stopped.
    """
    for queue in queues:
        if not isinstance(queue, Queue):
            raise ConfigurationError(f"run() takes queues, not {type(queue).__name__}")
    if not queues:
        raise ConfigurationError("run() requires at least one queue")
    return foreground.run([queue._life for queue in dict.fromkeys(queues)], timeout)


def life_of(queue: Queue, workers: int | None = None) -> Lifetime:
    """Return the lifetime of a queue that a supervised process runs, with another number of workers."""
    if workers is not None:
        queue.config = queue._life.config = attrs.evolve(queue.config, worker_num=workers)
    return queue._life


_queues: weakref.WeakSet[Queue] = weakref.WeakSet()


def _renew_all_after_fork() -> None:
    for queue in list(_queues):
        queue._renew_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all_after_fork)
