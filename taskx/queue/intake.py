"""The intake of tasks: check them, store them, and put them where a worker finds them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

from taskx.attempt.executors import AnyExecutor, executor_of
from taskx.attempt.registry import Registry
from taskx.attempt.runner import inside_executor
from taskx.node.buffer import Item
from taskx.node.hooks import Hooks
from taskx.node.ordering import find_parents
from taskx.node.place import Place
from taskx.node.pool import State, WorkerPool
from taskx.stores.door import Door
from taskx.tasks import lifecycle, payload, permission, unique
from taskx.tasks.bell import Agenda
from taskx.tasks.clock import Clock
from taskx.tasks.config import Config
from taskx.tasks.creation import copy_of, is_bare, new_record
from taskx.tasks.errors import (
    ConfigurationError,
    DuplicateTask,
    QueueFull,
    QueueStopped,
    RepositoryError,
    RepositoryUnavailable,
    SchemaMismatch,
    TaskxError,
)
from taskx.tasks.log import GuardedLogger
from taskx.tasks.model import Task, check_key
from taskx.tasks.options import OnConflict, refuse_unknown
from taskx.tasks.record import created_task
from taskx.tasks.submission import given, with_options
from taskx.tasks.tags import with_more
from taskx.tasks.timing import Timing
from taskx.tasks.values import encoded
from taskx.tasks.writes import Insert

# If a unique key is held but no holder is found, the holder is just being stored, or just releases the key.
_TRIES = 100


class Store(Place):
    """The place of new tasks in the repository alone: any node may fetch them when they may start."""

    def __init__(self, moves: Door, state: State, writes: Sequence[Insert]) -> None:
        self.writes = writes
        self._inside = moves.inside
        self._state = state

    def fill(self) -> None:
        """Have tasks fetched soon, if one of these might start here now.

        In a transaction of the caller they may start after the commit, from which that follows.
        """
        if (pool := self._state.pool) is None or self._inside:
            return
        types = {write.row["type"] for write in self.writes if not write.row["held"]}
        if any(pool.fetcher.serves(type) and pool.fetcher.has_room(type) for type in types):
            pool.agenda.fetch_soon()


class Here(Place):
    """The place of a new task in the thread that submits it, which runs the task."""

    def __init__(self, pool: WorkerPool, write: Insert, log: GuardedLogger) -> None:
        write.row["owner"] = pool.node.id
        self.writes = (write,)
        self._pool = pool
        self._log = log

    def fill(self) -> None:
        """Run the task to its outcome.

        Raises:
            BaseException: the executor was interrupted by what is meant for the program.
        """
        pool, row = self._pool, self.writes[0].row
        item = Item(-row["priority"], row["created_at"], 0, row["id"], row["type"], True)
        try:
            worker = pool.worker_name(threading.current_thread().name)
            for run in pool.starter.start([item], worker):
                if pool.stopping:
                    pool.starter.hand_back([run])
                    return
                ending = pool.execute(run, worker, conclude=pool.conclude)
                if ending.interrupt is not None:
                    raise ending.interrupt
        except RepositoryError as error:
            # The task is accepted in any case: the audit finds a start that was not made, and the
            # housekeeper writes an outcome that was not written.
            self._log.warning(
                "task %s could not run in the caller's thread, a worker runs it later: %s",
                item.id,
                error,
            )


class Intake:
    """Takes in the tasks that are submitted to a queue.

    Args:
        moves: the door through which it reads and writes.
        state: tells if the queue is started, and if it was stopped.
        config: the settings, for ``overflow`` and ``block_timeout``.
        registry: the executors and their limits.
        hooks: tells hooks.
        agenda: tells if earlier tasks were spilled.
        log: the logger of the queue.
        timing: the intervals of its work.
    """

    def __init__(
        self,
        moves: Door,
        state: State,
        config: Config,
        registry: Registry,
        hooks: Hooks,
        agenda: Agenda,
        log: GuardedLogger,
        timing: Timing,
    ) -> None:
        self.moves = moves
        self._inside = moves.inside
        self._state = state
        self._registry = registry
        self._hooks = hooks
        self._agenda = agenda
        self._log = log
        self._unique_every = timing.unique_every
        self._overflow = config.overflow
        self._block_timeout = config.block_timeout
        self._lost = permission.in_child and not moves.repository.shared

    # --- one task

    def accept(
        self,
        task: Task,
        priority: int | None = None,
        on_conflict: OnConflict = "reject",
        *,
        spill: bool = False,
        created_at: int | None = None,
        at_most: float | None = None,
    ) -> str:
        """Store a task and arrange that it runs.

        Args:
            task: the task to store; it is not changed.
            priority: overrides the priorities of the task and of the executor, even with 0.
            on_conflict: the reaction if another task holds its unique key.
            spill: leave the task in the repository if the buffer is full, whatever ``overflow`` says.
            created_at: its ``created_at`` in milliseconds; None for now.
            at_most: seconds after the creation of a task that it replaces, at which that runs in any case.

        Returns:
            the task's id, or the id of the existing task that ``on_conflict`` chose instead.

        Raises:
            TaskxError: its class tells the reason. Nothing was stored, unless ``in_doubt`` is True.
        """
        self.refuse_if_stopped()
        if self._hooks.waiting:
            self._hooks.let_catch_up()
        insert = self.prepare(task, priority, created_at)
        if task.depends_on:
            find_parents(self.moves.repository, [insert])
        try:
            return self._take_in(insert, on_conflict, spill=spill, at_most=at_most)
        except BaseException as error:
            self._refused(insert, error)
            raise

    def accept_plain(self, type: str, params: Any) -> str | None:
        """Do what :meth:`accept` does for a task that has only a type and params, in less time.

        Return None, and do nothing, if its executor does not allow that.
        """
        registry = self._registry
        if (model := registry.models.get(type)) is None:
            return None
        self.refuse_if_stopped()
        if self._hooks.waiting:
            self._hooks.let_catch_up()
        if params is None:
            params = {}
        executor = registry.registered.get(type)
        check = None if executor is None else executor.check_params
        insert = copy_of(model, params, self.moves.now_ms(), registry.max_payload_size, check)
        try:
            return self._take_in(insert, "reject", spill=False)
        except BaseException as error:
            self._refused(insert, error)
            raise

    def prepare(
        self,
        task: Task,
        priority: int | None = None,
        created_at: int | None = None,
        *,
        stored: bool = True,
    ) -> Insert:
        """Make the record of a task; options that it does not set come from its executor.

        A given ``priority`` overrides the executor's, even with 0. ``created_at`` is now by default.
        ``stored`` is False if the record is only a model.

        Raises:
            TaskxError: the task is not valid; the class tells the reason.
        """
        if not isinstance(task, Task):
            raise ConfigurationError(
                f"expected a Task, not {task!r:.80}; an executor makes one: executor.task(…)"
            )
        if type(task.type) is not str:
            check_key(task.type, "type")
        registry = self._registry
        if registry.values:
            task = encoded(task, registry.values)
        now = self.moves.now_ms() if created_at is None else created_at
        size = registry.max_payload_size
        if task.type in lifecycle.NO_WORK:
            self.moves.repository.require("answers")
            if task.type == lifecycle.CHILDREN:
                raise ConfigurationError("only ctx.run_all() and ctx.fork() make lists of children")
            return lifecycle.opened(new_record(task, self.moves.now_ms(), size))
        executor = registry.registered.get(task.type)
        model = registry.models.get(task.type)
        if model is not None and priority is None and is_bare(task):
            check = None if executor is None else executor.check_params
            return copy_of(model, task.params, now, size, check, task.id, task.created_by)
        insert = new_record(task, now, size)
        row = insert.row
        if executor is None:
            executor = registry.get(row["type"], used=stored)
        if task.cost:
            registry.refuse_cost(row["type"], task.concurrency_key, task.cost)
        if executor is not None:
            if executor.check_params is not None:
                executor.check_params(task.params)
            for name, value in executor.defaults.items():
                if row[name] is None:
                    row[name] = value
            if priority is None and not row["priority"]:
                row["priority"] = executor.options.priority or 0
            if executor.options.tags:
                row["tags"] = with_more(row.get("tags"), executor.options.tags)
            if executor.expires is not None and "expires_at" not in row:
                row["expires_at"] = lifecycle.expiry(
                    row["created_at"], row["run_at"], executor.expires
                )
        return insert

    def _take_in(
        self, insert: Insert, on_conflict: OnConflict, *, spill: bool, at_most: float | None = None
    ) -> str:
        row = insert.row
        task_id: str = row["id"]
        keyed = "unique_key" in row
        # If the caller chose the id, another task may have it.
        fresh = insert.key > 0 and not keyed
        places: list[Place] = []
        try:
            for tried in range(_TRIES):
                if tried:
                    self._pause(tried)
                try:
                    place = self._reserve(insert, places, fresh=fresh, spill=spill)
                    if self.moves.commit(place.writes)[0]:
                        place.fill()
                        return task_id
                except QueueFull:  # the existing task that on_conflict chooses needs no room
                    if not keyed or on_conflict == "reject":
                        raise
                    if (instead := self._resolve_conflict(insert, on_conflict, at_most)) is None:
                        raise
                    return instead
                for place in places:
                    place.release(None)
                places.clear()
                if not fresh:
                    instead = self._resolve_conflict(insert, on_conflict, at_most)
                    if instead is not None:
                        return instead
                # The node may have lost its lease: then it must not start the task.
                fresh, row["owner"] = False, ""
            raise _busy(row["unique_lock"])
        except BaseException as error:
            for place in places:
                place.release(error)
            raise

    def _resolve_conflict(
        self, insert: Insert, on_conflict: OnConflict, at_most: float | None = None
    ) -> str | None:
        """Return the id of the existing task to use instead of a new one; None if that can be stored now.

        Raises:
            DuplicateTask: another task has the id, or holds the unique key and ``on_conflict`` does not
                resolve this.
            RepositoryUnavailable: the holder of the key is just being stored.
        """
        key = insert.row.get("unique_lock")
        repository, moves = self.moves.repository, self.moves
        if key is None or insert.id in repository.statuses([insert.id]):
            raise DuplicateTask(insert.id)
        for _ in range(_TRIES):
            found = repository.find("unique_lock", [key], ("id",))
            holders = repository.get_many([task_id for (task_id,) in found])
            if (holder := next(iter(holders.values()), None)) is None:
                return None
            now = moves.now_ms()
            if lifecycle.has_expired(holder, now) and not lifecycle.is_parked(holder):
                if any(moves.commit(lifecycle.expire(holder, now), {holder.id: holder})):
                    return None
                continue
            if (released := unique.release_key(holder, now)) is not None:
                moves.commit([released])
                return None
            if on_conflict == "return":
                return holder.id
            replaces = on_conflict == "replace"
            writes = lifecycle.replace(holder, insert, at_most) if replaces else []
            if not writes:
                raise DuplicateTask(holder.id, key)
            if any(moves.commit(writes, {holder.id: holder})):
                return holder.id
        raise _busy(key)

    def _reserve(self, insert: Insert, places: list[Place], *, fresh: bool, spill: bool) -> Place:
        """Reserve a place for a new task; ``places`` gets it, and those that must be released with it.

        Raises:
            QueueFull: the buffer has no room.
        """
        pool, row = None if self._inside else self._state.pool, insert.row
        if (
            pool is None
            or row["held"]
            or not pool.buffers(row["type"])
            or (self._overflow == "spill" and self._agenda.more_stored)
        ):  # earlier tasks are spilled: so are later ones, to keep the order
            places.append(Store(self.moves, self._state, [insert]))
        elif not pool.reserve(insert, places, fresh=fresh):
            self._overflowed(pool, insert, places, spill=spill)
        return places[-1]

    def _overflowed(
        self, pool: WorkerPool, insert: Insert, places: list[Place], *, spill: bool
    ) -> None:
        # The buffer is closed if an executor submits during the stop: other nodes run that task.
        overflow = "spill" if spill or pool.buffer.closed else self._overflow
        # A finalizer must not wait for the workers: its thread may hold a lock that they need.
        inside = self.moves.entered or pool.buffer.entered
        if overflow == "reject":
            self._refuse(pool, 1)
        elif overflow == "block" and not (inside or inside_executor()):
            places.append(slots := pool.slots([insert]))
            if not slots.reserve(self._block_timeout):
                self._refuse(pool, 1)
        elif overflow == "caller_runs" and not inside:
            places.append(Here(pool, insert, self._log))
        else:  # also for "block" inside an executor: it might wait for itself to become free
            places.append(Store(self.moves, self._state, [insert]))

    def refuse_if_stopped(self) -> None:
        """Raise an error if this queue must not accept tasks.

        Raises:
            QueueStopped: the queue was stopped.
            ConfigurationError: no queue may be used here, or this thread is in a transaction of its own.
            SchemaMismatch: another process has migrated the file of a running queue.
        """
        if permission.forbidden:
            permission.refuse_if_forbidden()
        if (transactions := self.moves.repository.transactions).known:
            transactions.refuse_write()
        if self._lost:
            raise ConfigurationError(
                "in the child process of an executor a MemoryRepository is a separate one, which is lost "
                "with the process: use a shared repository, such as SQLiteRepository; nothing was stored"
            )
        if (pool := self._state.pool) is not None and pool.outdated is not None:
            raise SchemaMismatch(*pool.outdated.args)
        if self._state.stopped and self._state.closed:
            raise QueueStopped(
                "the queue was stopped and accepts no more tasks: create a new queue; nothing was stored"
            )

    def put(self, insert: Insert) -> None:
        """Store a prepared task without an owner; any node may fetch it. The buffer is not used.

        Raises:
            TaskxError: its class tells the reason. Nothing was stored, unless ``in_doubt`` is True.
        """
        self.refuse_if_stopped()
        place = Store(self.moves, self._state, [insert])
        try:
            if not self.moves.commit(place.writes)[0]:
                raise DuplicateTask(insert.id)
            place.fill()
        except BaseException as error:
            self._refused(insert, error)
            raise

    def _refuse(self, pool: WorkerPool, wanted: int) -> NoReturn:
        self.refuse_if_stopped()
        buffer = pool.buffer
        raise QueueFull(
            f"the buffer holds {buffer.submitted} of buffer_size={buffer.maxsize} tasks and has no "
            f"room for {wanted} more (overflow={self._overflow!r}); nothing was stored. Try later, "
            "raise buffer_size, or set overflow to 'block', 'spill' or 'caller_runs'"
        )

    def _refused(self, insert: Insert, error: BaseException) -> None:
        """Tell hooks that a task was refused. After an interrupt, name the task that may be stored.

        Raises:
            TaskxError: an error in doubt, as the error of this task.
        """
        if isinstance(error, TaskxError):
            own = _about(error, insert.id)
            if listeners := self._hooks.refused:
                self._hooks.tell(listeners, partial(created_task, insert.row), own)
            if own is not error:
                raise own from error.__cause__
        elif not isinstance(error, Exception):  # submit the same id again to find out
            error.task_id = insert.id  # type: ignore[attr-defined]

    # --- many

    def accept_many(
        self,
        tasks: Iterable[Task],
        priority: int | None = None,
        *,
        spill: bool = False,
        also: Sequence[Insert] = (),
        watch: Callable[[Sequence[str]], object] | None = None,
    ) -> list[str]:
        """Store tasks in one transaction, all or none; return their ids in the same order.

        Args:
            tasks: the tasks to store; they are not changed.
            priority: overrides the priorities of the tasks and of their executors, even with 0.
            spill: tasks that do not fit into the buffer stay in the repository, whatever ``overflow`` says.
            also: records that are no work, to be stored in that transaction.
            watch: is given the ids of tasks that are stored, and that only this node may start, before it
                may start one: so who watches them from then on misses no outcome. The next audit sees those
                that were cancelled or deleted before.

        Raises:
            TaskxError: its class tells the reason. Nothing was stored, unless ``in_doubt`` is True.
        """
        self.refuse_if_stopped()
        if self._hooks.waiting:
            self._hooks.let_catch_up()
        inserts = [self.prepare(task, priority) for task in tasks]
        if not inserts:
            return []
        if any("depends_on" in insert.row for insert in inserts):
            find_parents(self.moves.repository, inserts)
        places: list[Place] = []
        try:
            refuse = self._overflow == "reject" and not spill
            self._reserve_many(inserts, places, refuse=refuse)
            self._store_whole([*inserts, *also])
            if watch is not None:
                watch([insert.id for insert in inserts if insert.row["owner"]])
            for place in places:
                place.fill()
        except BaseException as error:
            for place in places:
                place.release(error)
            if not isinstance(error, Exception):
                # All tasks or none were stored: the first one is enough to find out.
                error.task_id = inserts[0].id  # type: ignore[attr-defined]
            raise
        return [insert.id for insert in inserts]

    def _reserve_many(
        self, inserts: Sequence[Insert], places: list[Place], *, refuse: bool
    ) -> None:
        """Reserve slots for the first tasks that go into the buffer; the rest is refused or spilled."""
        if self._inside or (pool := self._state.pool) is None:
            return
        buffer, due = pool.buffer, list[Insert]()
        if not (self._overflow == "spill" and self._agenda.more_stored):
            due = [i for i in inserts if not i.row["held"] and pool.buffers(i.row["type"])]
        # Their numbers are drawn before the tasks are stored: after that, spilled ones may be fetched and
        # must come later.
        places.append(slots := pool.slots(due))
        if not slots.reserve():
            if refuse and not buffer.closed:
                self._refuse(pool, len(due))
            room = max(0, buffer.maxsize - buffer.submitted)
            places[:] = [slots := pool.slots(due[:room])]
            if not slots.reserve():
                places.clear()
        places.append(Store(self.moves, self._state, [i for i in inserts if not i.row["owner"]]))

    def _store_whole(self, inserts: Sequence[Insert]) -> None:
        """Store all tasks or none."""
        keyed = [insert for insert in inserts if "unique_key" in insert.row]
        if keyed:
            _refuse_twins(inserts)
        for tried in range(_TRIES):
            self._pause(tried)
            try:
                results = self.moves.commit(inserts, whole=True)
            except TaskxError as error:
                raise _about(error, inserts[0].id) from error.__cause__
            refused = [insert for insert, held in zip(inserts, results, strict=True) if not held]
            if not refused:
                return
            self._resolve_conflict(refused[0], "reject")  # raises, unless the key is free now
        raise _busy(keyed[0].row["unique_lock"])  # a duplicate id has raised before

    def _pause(self, tried: int) -> None:
        """Wait a moment before the next try: the unique key is passed from task to task."""
        if tried > 2:
            time.sleep(self._unique_every)


def _busy(key: str) -> RepositoryUnavailable:
    return RepositoryUnavailable(
        f"the unique key {key!r} is held by a task that is just being stored; try again"
    )


def _refuse_twins(inserts: Sequence[Insert]) -> None:
    """Raise ``DuplicateTask`` if two of the new tasks have the same id or the same unique key."""
    ids: set[str] = set()
    holders: dict[str, str] = {}
    for insert in inserts:
        if insert.id in ids:
            raise DuplicateTask(insert.id)
        ids.add(insert.id)
        key = insert.row.get("unique_key")
        if key is not None and holders.setdefault(key, insert.id) != insert.id:
            raise DuplicateTask(holders[key], key)


def _about(error: TaskxError, task_id: str) -> TaskxError:
    """Return the error; if it is in doubt, a copy for this task, as a whole commit shares one error."""
    if not isinstance(error, RepositoryError) or not error.in_doubt:
        return error
    own = type(error)(f"task {task_id}: {error}")
    own.in_doubt, own.task_id = True, task_id
    return own


# --- from arguments to a task and its record


def new_params(registry: Registry, type: str, params: Any) -> str:
    """Return other params for a stored task as JSON text, checked as for a new task.

    What only its executor knows is checked if that is registered here.

    Raises:
        PayloadError: they break the JSON rules, are too large, or do not fit the executor.
    """
    task = encoded(Task(type=type, params=params), registry.values)
    text = payload.encode_params(task.params, registry.max_payload_size)
    executor = registry.registered.get(type)
    if executor is not None and executor.check_params is not None:
        executor.check_params(task.params)
    return text


def task_of(
    task: Task | str | AnyExecutor,
    params: Any,
    options: Mapping[str, Any],
    known: Any,
    what: str,
    clock: Clock,
    queue: object,
) -> tuple[Task, Mapping[str, Any]]:
    """Make the task from the arguments of a call, and return it with all options of the call.

    Args:
        task, params: as in ``Queue.submit``.
        options: the options of the call; they win over those that an executor is bound with.
        known: the ``TypedDict`` of the allowed options.
        what: the name of the called method, for error messages.
        clock: the clock that ``delay`` is counted by.
        queue: the queue whose method was called.

    Raises:
        TypeError: the method has no such option, or both a task and params are given.
        PayloadError: an executor requires params, and none are given.
        ConfigurationError: the task is not one or is bound to another queue, an option is not valid, or
            ``run_at`` and ``delay`` are both given.
    """
    if options:
        refuse_unknown(options, known, what, "; params are given as a dict")
    if isinstance(task, str):
        task = Task(type=task, params={} if params is None else params)
    elif not isinstance(task, Task):
        executor, bound = executor_of(task, what, queue=queue)
        refuse_unknown(bound, known, what, ": the executor is bound with it")
        task, options = executor._task_with(params), {**bound, **given(options)}
    elif params is not None:
        raise TypeError(f"{what}() accepts no params with a Task: set task.params, or give a type")
    if not options:
        return task, options
    return with_options(task, options, clock.now_ms()), options
