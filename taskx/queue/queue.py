"""The queue: the object that a program uses. It wires the parts together and contains no rules."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import attrs

from taskx.attempt.checkpoints import Keeper
from taskx.attempt.executors import (
    AnyExecutor,
    BatchDecorator,
    BoundExecutor,
    Executor,
    ExecutorDecorator,
    TaskExecutor,
    decorator_of,
)
from taskx.attempt.registry import Layer, Registry, check_middleware
from taskx.node.engine import Engine, Threads
from taskx.node.hooks import Hook, Hooks
from taskx.node.moving import Moves
from taskx.node.node import LocalNode
from taskx.node.schedules import Entry, Overlap, make_entry
from taskx.node.watcher import Watcher
from taskx.queue import foreground
from taskx.queue.following import follow
from taskx.queue.intake import Intake, task_of
from taskx.queue.joining import Joining
from taskx.queue.layers import LayeredIntake, layered
from taskx.queue.questions import Questions
from taskx.queue.schedule import Schedule, Schedules
from taskx.queue.steering import Steering
from taskx.stores.adapter import EightMethodAdapter
from taskx.stores.base import Repository
from taskx.stores.controls import Controls, check_named, from_named
from taskx.stores.door import Door
from taskx.stores.eight import TaskRepository
from taskx.stores.streams import Reader
from taskx.tasks.bell import Agenda
from taskx.tasks.checks import Duration, check_number
from taskx.tasks.clock import SYSTEM_CLOCK, Clock, check_clock
from taskx.tasks.config import Config
from taskx.tasks.errors import ConfigurationError, RepositoryError
from taskx.tasks.handles import TaskHandle
from taskx.tasks.ids import new_id
from taskx.tasks.in_use import InUse
from taskx.tasks.log import GuardedLogger, check_logger
from taskx.tasks.model import (
    Task,
    check_key,
    check_name,
)
from taskx.tasks.options import (
    ExecutorOptions,
    MapOptions,
    NamedOptions,
    OnConflict,
    PlainOptions,
    ScheduleOptions,
    SubmitOptions,
    check_limit_name,
    options_of,
)
from taskx.tasks.rate import Limit, is_key
from taskx.tasks.ticks import Every, Misfire
from taskx.tasks.timing import DEFAULT_TIMING, Timing
from taskx.tasks.values import Values
from taskx.tasks.writes import Insert

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing from 3.11 on

    from taskx.queue.flows import Flow, FlowHandle, Shape
    from taskx.queue.mapping import MapResults

R = TypeVar("R")
#: Returns the executor of a type, or None.
FindExecutor = Callable[[str], TaskExecutor | Executor[Any, Any] | None]


class Queue(Questions, Steering):
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
        find_executor: finds executors that nobody has registered. It is called once with each type that
            the queue does not know: at a submit, and by a started queue for waiting tasks. It returns the
            executor, or None if there is none here, or if it has registered one itself.
        clock: the source of the time; for tests.
        timing: the intervals of the queue's own work; for tests. By default they are the repository's.
        engine: what runs the tasks of this queue once it is started; threads of this process by default.

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
        find_executor: FindExecutor | None = None,
        clock: Clock = SYSTEM_CLOCK,
        engine: Engine | None = None,
        timing: Timing | None = None,
    ) -> None:
        if config is not None and not isinstance(config, Config):
            raise ConfigurationError(f"config must be a Config, not {type(config).__name__}")
        self.config = config or Config()
        self._log = GuardedLogger(check_logger(logger))
        self.clock = check_clock(clock)
        self.repository = (
            repository
            if isinstance(repository, Repository)
            else EightMethodAdapter(repository, clock, timing or DEFAULT_TIMING)
        )
        self._timing = timing or self.repository.timing
        self._given_hooks = tuple(hooks)
        self._registry = Registry(
            check_middleware(middleware),
            self._require,
            self.config.max_payload_size,
            self._warn_of_first_use,
            None if find_executor is None else self._found_by(find_executor),
            self._timing,
        )
        # The JSON forms of params and results, by type. Handles decode results by them.
        self._values: Mapping[str, Values] = self._registry.values
        # The schedules that wait for the start, by name; a forked child stores them, too.
        self._declared: dict[str, Entry] = {}
        if not isinstance(engine, Engine | None):
            raise ConfigurationError(f"engine must be an Engine, not {type(engine).__name__}")
        self._engine = Threads() if engine is None else engine
        self._engine.bind(self)
        self.repository.queues.add(self)
        self._wire()
        _queues.add(self)

    def _wire(self) -> None:
        """Make the parts. Those of a forked child are new; the engine makes what starts threads."""
        engine, repository, log, timing = self._engine, self.repository, self._log, self._timing
        registry, clock = self._registry, self.clock
        most = registry.max_payload_size
        threaded, signal = engine.threaded, engine.make_signal
        self._agenda = agenda = Agenda()
        self._controls = Controls(repository)
        self._hooks = hooks = Hooks(self._given_hooks, log, timing, threaded=threaded)
        self._watcher = Watcher(repository, log, agenda, timing, signal, threaded=threaded)
        about = (log, timing, self.config.redact, self._limit_of_key, lambda: registry.shares)
        self._moves = moves = Moves(repository, agenda, hooks, self._watcher, clock, *about)
        self._runner = engine.make_runner(clock, timing, most)
        make_pool = partial(
            engine.make_pool,
            moves=moves,
            controls=self._controls,
            agenda=agenda,
            registry=registry,
            runner=self._runner,
            keeper=Keeper(
                moves,
                most,
                registry.values,
                clock,
                timing,
                self._submit_children,
            ),
            watcher=self._watcher,
            hooks=hooks,
            clock=clock,
            log=log,
            timing=timing,
        )
        self._node = node = LocalNode(self, engine, make_pool, moves, hooks, log, timing)
        self._intake = self._make_intake(moves)
        self._entrance = layered(self._intake, registry.middleware)
        self._operations = self._make_operations(moves)
        self._joining = Joining(moves, agenda, log)
        self._schedules: Schedules = Schedules(
            self._declared,
            current=lambda: self._schedules,
            handle=self.handle,
            intake=self._intake,
            make_intake=self._make_intake,
            joining=self._joining,
            state=node,
            registry=registry,
            agenda=agenda,
            log=log,
        )

    def _limit_of_key(self, key: str) -> Limit | None:
        """Return the limit of a key. A queue that is not started asks the repository what holds now."""
        if not is_key(key):
            return None
        if self._node.pool is None and not self.repository.shortcoming:
            controls = self._controls
            controls.refresh()
            held = controls.held(
                self.clock.now_ms()
            )  # a queue that just starts must go on to obey them
            self._registry.follow(controls.overrides, controls.declared, held)
        return self._registry.limit_of_key(key)

    def _submit_children(self, tasks: Sequence[Task], priority: int, listed: Insert) -> None:
        """Store the children of a task and the record of their list, with at least this priority."""
        known, made = self._registry.registered, list[Task]()
        for task in tasks:
            own = task.priority
            if not own and (executor := known.get(task.type)) is not None:
                own = executor.options.priority or 0
            made.append(task if own >= priority else attrs.evolve(task, priority=priority))
        self._entrance.accept_many(made, spill=True, also=[listed])

    def _make_intake(self, moves: Door, make: Callable[..., Intake] = Intake) -> Intake:
        return make(
            moves,
            self._node,
            self.config,
            self._registry,
            self._hooks,
            self._agenda,
            self._log,
            self._timing,
        )

    @contextmanager
    def _submitting(self, connection: object) -> Iterator[Intake | LayeredIntake]:
        """Return the intake, with middleware, for a connection or this thread."""
        if connection is None and self.repository.transactions.known:
            connection = self.repository.transactions.current(submits=True)
        if connection is None:
            yield self._entrance
            return
        with self._joining.changing(connection) as door:
            yield layered(self._make_intake(door), self._registry.middleware)

    def _require(self, what: str) -> None:
        self.repository.require(what)

    def _warn_of_first_use(self, type: str) -> None:
        if self._nobody_runs(type):
            self._log.warning(
                "no running queue has an executor for type %r, and this queue has none; its tasks wait "
                "until a queue that has one is started",
                type,
            )

    def _found_by(self, find_executor: FindExecutor) -> Callable[[str], None]:
        if not callable(find_executor):
            raise ConfigurationError(f"find_executor must be a function, not {find_executor!r}")

        def find(type: str) -> None:
            try:
                if (executor := find_executor(type)) is not None:
                    self.register_executor(executor)
            except Exception as error:  # noqa: BLE001  (user code; other types must still be found)
                self._log.exception(
                    "no executor was found for type %r, so its tasks wait for another process: %s",
                    type,
                    error,
                )

        return find

    def __repr__(self) -> str:
        return f"<Queue on {self.repository!r}, {self._node.name}>"

    # --- executors

    @overload
    def executor(
        self,
        type: str | None = None,
        *,
        batch: int,
        wait: Duration | None = None,
        **options: Unpack[PlainOptions],
    ) -> BatchDecorator: ...
    @overload
    def executor(
        self, type: str | None = None, **options: Unpack[PlainOptions]
    ) -> ExecutorDecorator: ...
    def executor(self, type: str | None = None, **options: Any) -> ExecutorDecorator:
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
            stall: seconds after which an attempt times out that gives no sign of life: no progress, no
                step, no captured log line, and no call of ``ctx.alive()``.
            max_snoozes: number of times that a task may raise ``Snooze`` before it fails (default: no
                limit).
            max_concurrency: most tasks of the type that run at the same time.
            rate: most tasks that start in a period: ``"100/m"`` (units ``s``, ``m``, ``h``, ``d``),
                or a tuple of a count and seconds.
            burst: most tasks that may start at once after a quiet period (default: the count of
                ``rate``).
            limit_scope: ``"node"`` (default): each node has these limits for itself; ``"global"``:
                all nodes share them.
            limit: the name of a limit that it shares with other types, or a list: see :meth:`limit`.
            version: the version of the code, a number or a text; the record of a task has that of the
                executor that ran it last. A map of the same name runs items of other versions again.
            replace: replace the type's executor if there is one, for notebook cells that run again.
                Tasks that are running end with the old code. The isolation and the limits must be the
                same.
            batch: most tasks of one call, at most 1,000. The function takes a list with the params of each
                of them, and returns a list with a result, or an exception, for each in order.
            wait: the longest time for which the tasks of a call wait for more of them, while there are
                fewer than ``batch`` (default 0).

        Raises:
            ConfigurationError: an option is not valid, the type is taken, the function cannot be
                an executor, or a child process could not find it.
        """
        if callable(type):
            raise ConfigurationError(
                "@queue.executor needs parentheses: write @queue.executor() or @queue.executor('name')"
            )
        return decorator_of(type, options_of(options), self.register_executor)

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
            executor._bind(self)
        if self._pool is not None:
            # The housekeeper records them later if this cannot be done now.
            with suppress(RepositoryError, ConfigurationError):
                self._joining.refuse()
                self._pool.record()
        self._agenda.fetch_soon()

    def limit(self, name: str, /, **options: Unpack[NamedOptions]) -> None:
        """Declare a limit that types share, or one for keys. It holds for all nodes together.

        The executors of types name it: ``@queue.executor(limit="openai")``. If its name has a colon, it
        holds for tasks with such a key: see the page about limits.

        Nothing is stored before the queue starts. If programs declare different values, those of the one
        that started last hold. :meth:`tune` changes them while queues run, until :meth:`untune`.

        Args:
            name: the name of the limit. It must not begin with ``type/``.
            concurrency: most tasks that run at the same time.
            rate: most tasks that start in a period, as for :meth:`executor`; or most of a unit that the
                ``cost`` of tasks has: ``"90000 tokens/m"``; or a list of these.
            burst: what may be taken at once after a quiet period; a list for a list of rates. By default it
                is the count of each rate.
            share: True, for keys: the workers are divided between the keys that have tasks. A number is the
                weight of each of these keys; True is 1.

        Raises:
            ConfigurationError: an argument is not valid, or the repository has only the eight methods.
            RepositoryError: the queue is started, and the repository failed.
        """
        checked = check_limit_name(name, "the name of a limit")
        wanted = check_named(from_named(checked, options))
        self._require("limits with a name")
        self._registry.limit(checked, wanted)
        if (pool := self._pool) is not None:
            self._joining.refuse()
            pool.tuning.declare()
            pool.record()

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
            debounce: seconds after the last submit with this unique key at which the task runs, with
                the params of that one: it replaces the pending task.
            at_most: with ``debounce``: seconds after the first of these submits at which it runs in
                any case.
            depends_on: tasks, as ids or handles, that must complete before this one starts.
            on_parent_failure: the reaction if all tasks in ``depends_on`` have ended and one did not
                complete: ``"cancel"`` (default), ``"fail"`` or ``"run"`` this task.
            key: tasks with the same key run one at a time, or as many as its limit allows, in the
                order of submission, across all processes: see :meth:`limit`.
            concurrency_key: the old name of ``key``.
            cost: what its start takes from limits with such units: ``{"tokens": 1200}``. See
                :meth:`Context.spent`.
            expires: a task that has not started for the first time by then is cancelled: an aware
                datetime, or seconds or a ``timedelta`` from its ``run_at``, or from now.
            connection: your ``sqlite3.Connection``, or SQLAlchemy ``Session`` or ``Connection``, on the
                file of the tasks; or your ``ClientSession`` of pymongo, in a transaction. The task is then
                stored in your transaction: it starts after your commit, and never existed after a
                rollback. It does not use the buffer, so ``overflow`` does not matter.

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
        plain = task.__class__ is str and not options and connection is None
        if plain and not self.repository.transactions.known:
            task_id = self._entrance.accept_plain(str(task), params)
            if task_id is not None:
                try:
                    return TaskHandle(task_id, self)
                except BaseException as error:  # an interrupt
                    error.task_id = task_id  # type: ignore[attr-defined]
                    raise
        return self._submit(task, params, connection, options)

    def _submit(
        self,
        task: Task | AnyExecutor | str,
        params: dict[str, Any] | None,
        connection: object,
        options: Mapping[str, Any],
        created_at: int | None = None,
    ) -> TaskHandle[Any]:
        """Submit a task whose ``created_at`` the caller knows, in milliseconds; by default it is now."""
        wanted, said = task_of(task, params, options, SubmitOptions, "submit", self.clock, self)
        priority: int | None = said.get("priority")
        on_conflict: OnConflict = said.get("on_conflict") or "reject"
        more: dict[str, Any] = {"created_at": created_at}
        if said.get("debounce") is not None:
            on_conflict = "replace"
            if (most := said.get("at_most")) is not None:
                more["at_most"] = check_number(most, "at_most")
        if connection is None and self.repository.transactions.known:
            connection = self.repository.transactions.current(submits=True)
        if connection is None:
            task_id = self._entrance.accept(wanted, priority, on_conflict, **more)
        else:
            with self._submitting(connection) as intake:
                task_id = intake.accept(wanted, priority, on_conflict, **more)
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
        with self._submitting(connection) as intake:
            return [TaskHandle(task_id, self) for task_id in intake.accept_many(tasks)]

    @overload
    def map(
        self,
        executor: Executor[..., R] | BoundExecutor[..., R],
        items: Iterable[Any],
        key: Callable[[Any], str | int] | None = None,
        *,
        name: str = "",
        star: bool = False,
        window: int | None = None,
        timeout: Duration | None = None,
        return_exceptions: Literal[False] = False,
        ordered: bool = True,
        retry_failed: bool = True,
        progress: bool = False,
        **options: Unpack[MapOptions],
    ) -> MapResults[R]: ...
    @overload
    def map(
        self,
        executor: Executor[..., R] | BoundExecutor[..., R],
        items: Iterable[Any],
        key: Callable[[Any], str | int] | None = None,
        *,
        name: str = "",
        star: bool = False,
        window: int | None = None,
        timeout: Duration | None = None,
        return_exceptions: bool,
        ordered: bool = True,
        retry_failed: bool = True,
        progress: bool = False,
        **options: Unpack[MapOptions],
    ) -> MapResults[R | Exception]: ...
    @overload
    def map(
        self,
        executor: str,
        items: Iterable[Any],
        key: Callable[[Any], str | int] | None = None,
        *,
        name: str = "",
        star: bool = False,
        window: int | None = None,
        timeout: Duration | None = None,
        return_exceptions: bool = False,
        ordered: bool = True,
        retry_failed: bool = True,
        progress: bool = False,
        **options: Unpack[MapOptions],
    ) -> MapResults[Any]: ...
    def map(
        self,
        executor: AnyExecutor | str,
        items: Iterable[Any],
        key: Callable[[Any], str | int] | None = None,
        *,
        name: str = "",
        star: bool = False,
        window: int | None = None,
        timeout: Duration | None = None,
        return_exceptions: bool = False,
        ordered: bool = True,
        retry_failed: bool = True,
        progress: bool = False,
        **options: Any,
    ) -> MapResults[Any]:
        """Run an executor for each item and return an iterator over the results, in order.

        Its method ``outcomes()`` gives each item with its result or its error.

        The iterator submits nothing before you ask for the first result. Then it keeps a few tasks
        ahead of the results. An item is submitted at once if a worker could run it now; more items are
        drawn and submitted together while enough tasks are under way.

        The id of each task consists of ``name`` and the item's key. So you can run the same map again,
        for example after a crash: it returns the results of completed tasks, waits for unfinished ones,
        and requeues tasks that failed or were cancelled.

        Args:
            executor: an executor, or the type of one.
            items: the params of each task as a dict, or the value of the executor's first parameter.
            key: a function that returns the key of an item: a text or a whole number; ``1`` and
                ``"1"`` are the same key. By default the key is made from the params.
            name: the name of the map; the type of the executor by default.
            star: each item is a sequence of arguments, as for ``itertools.starmap``.
            window: the number of tasks submitted ahead. By default it is four for each worker, or as many
                as the buffer has room for, and grows up to 160 while tasks end very quickly. While the
                iterator waits for a result, it keeps this many tasks unfinished, so that one long task
                does not stop the others.
            timeout: seconds to wait for a result.
            return_exceptions: return the exception of a failed item in its place, and go on.
            ordered: return results in the order of the items; if False, as soon as they are available.
            retry_failed: requeue a task that failed or was cancelled in an earlier run of the map; if
                False, raise its error again.
            progress: show on ``sys.stderr`` how many items are done: a bar in a terminal or a notebook
                if the package rich is installed, else a line every five seconds.
            concurrency_key: the key of :meth:`submit`, by which tasks take turns: that of all tasks, or a
                function that returns that of an item.
            options: other options of new tasks: ``created_by``, ``priority``, ``max_attempts``,
                ``max_crashes``, ``retry``, ``tags`` and ``cost``, as in :meth:`submit`.

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
        from taskx.queue.mapping import MapResults, ahead

        first, widest = ahead(self.config)
        return MapResults(
            executor=executor,
            items=items,
            key=key,
            name=name,
            star=star,
            window=first if window is None else window,
            widest=widest if window is None else 0,
            timeout=timeout,
            return_exceptions=return_exceptions,
            ordered=ordered,
            retry_failed=retry_failed,
            progress=progress,
            options=options,
            owner=self,
            intake=lambda: self._entrance,
            clock=self.clock,
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
        from taskx.queue.flows import FlowHandle, lay_out

        flow_id = new_id()
        tasks, shape = lay_out(flow, flow_id, tags)
        with self._submitting(connection) as intake:
            intake.accept_many(tasks, spill=True)
        return FlowHandle(shape, self, flow_id)

    def flow_handle(self, shape: Shape) -> FlowHandle:
        """Return a handle for a flow that any process submitted before.

        Args:
            shape: the ``shape`` of the handle that :meth:`submit_flow` returned.

        Raises:
            ConfigurationError: the value is not such a shape.
        """
        from taskx.queue.flows import FlowHandle

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
        misfire_grace: Duration | None = None,
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
        misfire_grace: Duration | None = None,
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
        misfire_grace: Duration | None = None,
        overlap: Overlap = "allow",
        **options: Any,
    ) -> Schedule:
        """Declare a schedule; the started queues on the repository submit a task at each of its ticks.

        A queue that is not started checks the schedule now, and stores it when it starts. A program that
        does not start the queue calls :meth:`Schedule.store`.

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
            priority, timeout, max_attempts, max_crashes, retry, tags, key, concurrency_key, cost:
                options of its tasks, as in :meth:`submit`.
            expires: seconds, or a ``timedelta``, from a tick, or from when its task is made if that is
                later; the task is cancelled if it has not started by then.

        Raises:
            ConfigurationError: an argument is not valid, a package is missing, or the repository cannot
                store schedules.
            UnknownTaskType: the type is neither registered nor declared.
            PayloadError: params are not JSON, are too large, do not fit the function, or a codec
                refuses them.
            RepositoryError: the queue is started, and the schedule could not be stored.
        """
        entry = make_entry(name, spec, tz, misfire, misfire_grace, overlap)
        wanted, said = task_of(task, params, options, ScheduleOptions, "schedule", self.clock, self)
        return self._schedules.declare(entry, wanted, said.get("priority"), said.get("expires"))

    def schedules(self) -> dict[str, Schedule]:
        """Return all schedules by name: those in the repository, of all processes, and declared ones."""
        return self._schedules.all()

    # --- handles

    def handle(self, task_id: str) -> TaskHandle[Any]:
        """Return a handle for a task of any process, without checking that the task exists."""
        return TaskHandle(check_name(task_id, "id"), self)

    def watch(self, *handles: TaskHandle[Any]) -> None:
        """Resolve handles when their tasks end. Handles call this themselves."""
        watcher, postpone = self._watcher, self.repository.transactions.postpone
        now = [
            handle
            for handle in handles
            if not postpone(handle.id, id(handle), partial(watcher.watch_late, handle))
        ]
        if (pool := self._pool) is not None:
            watcher.watch(*now, runs=pool.runs.running)
        elif now:
            watcher.watch(*now)
            watcher.warn_if_nobody_runs(now[0].id)

    def _source(self, task: Task, after: str | None) -> Reader:
        """Return what reads the chunks of a task, for its handle."""
        return Reader(self.repository, task, after)

    # --- starting and stopping

    def start(self) -> None:
        """Start the workers; a second call does nothing.

        The queue also takes over the tasks of processes that died, including those that were running.
        If the call raises, nothing was started, and you can call it again.

        Raises:
            QueueStopped: the queue was stopped; create a new one.
            RepositoryError: the repository cannot be used.
            RuntimeError: the system cannot start more threads.
            ConfigurationError: this thread is in a transaction of its own, for which it would wait.
        """
        self.repository.transactions.refuse_wait()
        self._node.start()

    def drain(self, timeout: Duration | None = None) -> bool:
        """Wait until no task is left to run; return False if ``timeout`` seconds passed before.

        The call does not wait for tasks that may not start yet (``run_at``, ``delay``) or whose type is
        paused. It does wait for tasks of this queue's other types that run in other processes.

        Raises:
            ConfigurationError: called inside an executor or a hook, or on a queue that is not
                started, or this thread is in a transaction of its own.
            QueueStopped: the queue was stopped.
        """
        self._joining.refuse()
        return self._node.drain(timeout)

    def follow(self, timeout: Duration | None = None) -> bool:
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
        self._joining.refuse()
        drain = self.drain if self._pool is not None else None
        return follow(self.repository, drain, timeout, self._timing)

    def stop(self, timeout: Duration = 30.0, cancel: bool = False) -> list[str]:
        """Stop the queue: accept and start no more tasks, and wait for the running ones.

        Running tasks can go on for four fifths of ``timeout``; then their tokens fire with reason
        STOP. With ``cancel`` the tokens fire at once. A task that ends because of this is pending
        again, and no attempt is counted. A thread that still runs afterwards can end later, and its
        outcome is stored. If the process ends first, its task counts as interrupted.

        Until the last executor has returned, executors can submit. Other nodes run these tasks.

        Args:
            timeout: seconds after which the call returns in any case; it returns a second later if the
                repository or a hook hangs.
            cancel: tell running tasks to stop at once.

        Returns:
            the ids of the tasks that still run.
        """
        return self._node.stop(timeout, cancel=cancel)

    def close(self) -> None:
        """Stop the queue and close its repository.

        Threads that wait for the result of an unfinished task get ``QueueStopped``.
        """
        self.stop()
        self._watcher.close()
        self.repository.close()

    def __enter__(self) -> Queue:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Stop the queue, also after an error or ``SystemExit``: running tasks can go on for 24 seconds.

        After Ctrl-C running tasks are told to stop at once.
        """
        self.stop(cancel=kind is not None and issubclass(kind, KeyboardInterrupt))

    def _set_workers(self, number: int) -> None:
        """Have the next start begin with another number of workers."""
        self.config = attrs.evolve(self.config, worker_num=number)

    # --- forks

    def _renew_after_fork(self) -> None:
        """Reset the queue in a forked child to "not started", without touching the parent's resources."""
        self.repository.forks.renew_after_fork()
        self.repository.transactions.renew()
        self._watcher.renew_after_fork()
        self._node.forget()
        self._engine.renew_after_fork()
        self._wire()


def run(*queues: Queue, timeout: Duration = 30.0) -> int:
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
    return foreground.run([queue._node for queue in dict.fromkeys(queues)], timeout)


def node_of(queue: Queue, workers: int | None = None) -> LocalNode:
    """Return the node of a queue that a supervised process runs, with another number of workers."""
    if workers is not None:
        queue._set_workers(workers)
    return queue._node


_queues = InUse[Queue]()


def _renew_all_after_fork() -> None:
    for queue in _queues:
        queue._renew_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all_after_fork)
