"""How a task gets in: checked, stored, and put where a worker finds it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict, get_args

import attrs

from taskx.core import lifecycle, payload
from taskx.core.checks import check_number
from taskx.core.clock import LAST, to_datetime, to_ms
from taskx.core.errors import (
    ConfigurationError,
    DuplicateTask,
    InvalidTransition,
    QueueFull,
    QueueStopped,
    RepositoryError,
    SchemaMismatch,
    TaskxError,
)
from taskx.core.ids import new_id
from taskx.core.lifecycle import OnParentFailure
from taskx.core.model import Task, TaskStatus, check_key, check_moment, check_name
from taskx.core.record import policy_to_text
from taskx.core.retry import RetryPolicy, check_policy
from taskx.core.unique import OnConflict, UniqueScope, scope_to_text
from taskx.core.writes import Insert
from taskx.runtime.buffer import Item
from taskx.runtime.conflicts import Patience, settle
from taskx.runtime.engine import Engine
from taskx.runtime.executors import check_options
from taskx.runtime.parents import find_parents
from taskx.runtime.runner import inside_executor
from taskx.runtime.starter import Services
from taskx.storage.base import Reentered
from taskx.storage.memory import MemoryRepository

if TYPE_CHECKING:
    from taskx.runtime.handles import TaskHandle


#: Why no queue may be started now in this process, nor given tasks; empty where it may.
forbidden = ""
#: Whether this is the child process of an executor: what its queues keep in memory is lost with it.
in_child = False


class ScheduleOptions(TypedDict, total=False):
    """The options of ``submit`` that a schedule may give its tasks: see ``Queue.schedule``."""

    created_by: str | None
    priority: int | None
    timeout: float | None
    max_attempts: int | None
    max_crashes: int | None
    retry: RetryPolicy | None
    concurrency_key: str | None


class SubmitOptions(ScheduleOptions, total=False):
    """The options of ``submit``, each of which may be left out or None: see ``Queue.submit``."""

    id: str | None
    run_at: datetime | None
    delay: float | None
    unique_key: str | None
    unique_scope: UniqueScope | None
    on_conflict: OnConflict | None
    depends_on: Sequence[str | TaskHandle[Any]] | None
    on_parent_failure: OnParentFailure | None


class Intake:
    """Takes tasks in for a queue.

    Args:
        services: what it works with.
        overflow: what a full buffer does.
        block_timeout: seconds that ``block`` waits for room; None for ever.
        max_payload_size: the largest params, in bytes of JSON.
    """

    def __init__(
        self,
        services: Services,
        overflow: str,
        block_timeout: float | None,
        max_payload_size: int,
    ) -> None:
        self._services = services
        self._hooks = services.hooks
        self._overflow = overflow
        self._block_timeout = block_timeout
        self._max_payload_size = max_payload_size
        #: The running node; None as long as the queue has not been started.
        self.engine: Engine | None = None
        self.stopped = False
        self._lost = in_child and isinstance(services.repository, MemoryRepository)

    # --- one task

    def accept(
        self,
        task: Task,
        priority: int | None = None,
        on_conflict: OnConflict = "reject",
        *,
        spill: bool = False,
    ) -> str:
        """Store a task and see to it that it runs; returns its id, or that of the one that stands for it.

        Args:
            task: what to store; it is not changed.
            priority: wins over the task's and the executor's own, zero included.
            on_conflict: what to do where another task holds its unique key.
            spill: leave it in the repository if the buffer is full, whatever ``overflow`` says.

        Raises:
            TaskxError: of the kind that says why not; nothing was stored, unless it is in doubt.
        """
        self.refuse_if_stopped()
        if self._hooks.waiting:
            self._hooks.let_catch_up()
        insert = self.prepare(task, priority)
        if task.depends_on:
            find_parents(self._services.repository, [insert])
        try:
            if task.unique_key is not None:
                return self._accept_unique(insert, on_conflict, spill=spill)
            self._take_in(insert, spill=spill)
            return insert.id
        except Reentered:
            self._take_in_soon([insert])
            return insert.id
        except Exception:
            raise
        except BaseException as error:
            # Whether it is stored cannot be said: submitting the same id again tells.
            error.task_id = insert.id  # type: ignore[attr-defined]
            raise

    def _take_in_soon(self, inserts: Sequence[Insert]) -> None:
        """Leave what a finalizer submits inside a write of its own thread to that write."""
        for insert in inserts:
            insert.row["owner"] = ""
        self._services.ledger.commit_soon(inserts, partial(self._taken_in, inserts))

    def _taken_in(
        self, inserts: Sequence[Insert], results: Sequence[bool], error: BaseException | None
    ) -> None:
        stored = [insert for insert, new in zip(inserts, results, strict=True) if new]
        for insert in inserts:
            if insert not in stored:
                self._services.log.error(
                    "task %s, submitted by a finalizer, was not stored: %s",
                    *(insert.id, error or "its id, or its unique key, is taken"),
                )
        if self._hooks.submitted:
            for insert in stored:
                self._hooks.tell_submitted(insert.row)
        self._stored(stored)
        self.look_for_work()

    def _accept_unique(self, insert: Insert, on_conflict: OnConflict, *, spill: bool) -> str:
        patience = Patience(insert)
        while True:
            try:
                self._take_in(insert, spill=spill)
                return insert.id
            except DuplicateTask:
                instead = settle(self._services, insert, on_conflict)
            except QueueFull:  # what stands for it needs no room
                reject = on_conflict == "reject"
                instead = None if reject else settle(self._services, insert, on_conflict)
                if instead is None:
                    raise
            if instead is not None:
                if on_conflict == "replace" and self.engine is not None:
                    self.engine.buffer.discard([instead])
                    self._tell(self.engine, delayed=True)
                    self._tell(self.engine, delayed=False)
                return instead
            insert.row["owner"] = ""
            patience.wait()

    def _take_in(self, insert: Insert, *, spill: bool) -> None:
        engine = self.engine
        if engine is not None and not self._services.registry.runs(insert.row["type"]):
            engine = None  # declared: another process runs it
        if engine is None or not self._may_buffer(engine, insert):
            self._store(insert)
            self._stored([insert])
            if engine is not None and (insert.row["held"] or engine.has_room(insert.row["type"])):
                self._tell(engine, delayed=bool(insert.row["held"]))
        elif not self._try_to_buffer(engine, insert):
            self._overflowed(engine, insert, "spill" if spill else self._overflow)

    def _stored(self, inserts: Sequence[Insert]) -> None:
        """What waits for other tasks waits from now on."""
        held = [insert for insert in inserts if insert.row["held"]]
        if held:
            self._services.dependents.added(held)
            self._services.lines.joined(held)

    def refuse_if_stopped(self) -> None:
        """Raise ``QueueStopped`` after the stop, and ``ConfigurationError`` where no queue may be used.

        ``SchemaMismatch`` where another process has migrated the file of a running queue.
        """
        if forbidden:
            raise ConfigurationError(forbidden)
        if self._lost:
            raise ConfigurationError(
                "in the child process of an executor a MemoryRepository is another one, which ends with "
                "it: use a repository that processes share, SQLiteRepository for one; nothing was stored"
            )
        if self.engine is not None and self.engine.outdated is not None:
            raise SchemaMismatch(*self.engine.outdated.args)
        if self.stopped:
            raise QueueStopped("the queue was stopped and takes no more tasks; nothing was stored")

    def _may_buffer(self, engine: Engine, insert: Insert) -> bool:
        """Whether it may start, and not only after others; else it is left to the repository."""
        held, type_ = insert.row["held"], insert.row["type"]
        return not held and engine.buffers(type_) and not self._spills(engine)

    def _spills(self, engine: Engine) -> bool:
        """While earlier tasks lie spilled, later ones spill behind them: order is kept."""
        return engine.more_stored and self._overflow == "spill"

    def _tell(self, engine: Engine, *, delayed: bool) -> None:
        if delayed:
            engine.look_for_due()
        else:
            engine.look_for_more()

    def put(self, insert: Insert) -> None:
        """Store a task that was prepared before, for whoever has a hand free, whatever is in the buffer.

        Raises:
            TaskxError: of the kind that says why not; nothing was stored, unless it is in doubt.
        """
        self.refuse_if_stopped()
        try:
            self._store(insert)
            self._stored([insert])
        except Exception:
            raise
        except BaseException as error:  # an interrupt: perhaps it is stored
            error.task_id = insert.id  # type: ignore[attr-defined]
            raise
        self.look_for_work()

    def look_for_work(self) -> None:
        """Tasks were stored otherwise: have those fetched that this node runs."""
        if self.engine is not None:
            self._tell(self.engine, delayed=False)

    def _store(self, insert: Insert) -> None:
        if not self._commit(insert):
            raise DuplicateTask(insert.id)
        if self._hooks.submitted:
            self._hooks.tell_submitted(insert.row)

    def _commit(self, insert: Insert) -> bool:
        try:
            return self._services.ledger.commit([insert])[0]
        except TaskxError as error:
            raise _about(error, insert.id) from error.__cause__

    def _try_to_buffer(self, engine: Engine, insert: Insert, timeout: float | None = 0.0) -> bool:
        """Store a task and put it into the buffer; False, and nothing is done, if there is no room."""
        buffer, row = engine.buffer, insert.row
        slot = (buffer.turn(),)
        try:
            if not buffer.reserve(slot, timeout):
                return False
            row["owner"] = engine.node.id
            self._store(insert)
            self._buffer(engine, insert, slot[0])
        except BaseException:  # an interrupt, too: nobody else knows of this slot
            buffer.release(slot)
            raise
        return True

    def _buffer(self, engine: Engine, insert: Insert, turn: int) -> None:
        row = insert.row
        if not engine.buffer.add(
            row["id"],
            row["type"],
            row["priority"],
            row["created_at"],
            row["run_at"],
            turn,
            fetched=False,
        ):
            engine.wake_scheduler()  # it looks after the task if the busy workers do not

    def _overflowed(self, engine: Engine, insert: Insert, overflow: str) -> None:
        if overflow == "reject":
            self.refuse_if_stopped()
            raise self._full(engine, 1)
        if overflow == "block" and self._may_wait(engine):
            if not self._try_to_buffer(engine, insert, self._block_timeout):
                self.refuse_if_stopped()
                raise self._full(engine, 1)
        elif overflow == "caller_runs" and not self._is_inside(engine):
            self._run_here(engine, insert)
        else:
            # Spill; and block inside an executor, which would wait for a worker: itself, perhaps.
            self._store(insert)
            self._tell(engine, delayed=False)

    def _may_wait(self, engine: Engine) -> bool:
        return not (inside_executor() or self._is_inside(engine))

    def _is_inside(self, engine: Engine) -> bool:
        """Return whether this is a finalizer whose thread holds a lock that the workers need."""
        return self._services.ledger.entered or engine.buffer.entered

    def _full(self, engine: Engine, wanted: int) -> QueueFull:
        buffer = engine.buffer
        return QueueFull(
            f"the buffer holds {buffer.submitted} of buffer_size={buffer.maxsize} tasks and has no "
            f"room for {wanted} more (overflow={self._overflow!r}); nothing was stored. Try later, "
            "raise buffer_size, or set overflow to 'block', 'spill' or 'caller_runs'"
        )

    def _run_here(self, engine: Engine, insert: Insert) -> None:
        row = insert.row
        row["owner"] = engine.node.id
        self._store(insert)
        item = Item(-row["priority"], row["created_at"], 0, row["id"], row["type"], True)
        try:
            for run in engine.starter.start([item]):
                if engine.stopping:
                    engine.starter.hand_back([run], rebuffer=False)
                    return
                ending = engine.execute(run, f"{engine.node.name}/caller", conclude=engine.conclude)
                if ending.interrupt is not None:
                    raise ending.interrupt
        except RepositoryError as error:
            # It was accepted all the same: the audit finds a start that was not made, and the
            # scheduler writes an outcome that was not written.
            self._services.log.warning("task %s is left to the workers: %s", item.id, error)

    # --- many

    def accept_many(self, tasks: Iterable[Task], *, spill: bool = False) -> list[str]:
        """Store tasks in one transaction, all or none; returns their ids in order.

        Args:
            tasks: what to store; they are not changed.
            spill: leave in the repository what the buffer has no room for, whatever ``overflow`` says.

        Raises:
            TaskxError: of the kind that says why not; nothing was stored, unless it is in doubt.
        """
        self.refuse_if_stopped()
        if self._hooks.waiting:
            self._hooks.let_catch_up()
        inserts = self._prepare_many(tasks)
        if not inserts:
            return []
        engine = self.engine
        try:
            if engine is None:
                self._store_many(inserts)
            else:
                refuse = self._overflow == "reject" and not spill
                self._store_and_buffer_many(engine, inserts, refuse=refuse)
        except Reentered:
            self._take_in_soon(inserts)
        except Exception:
            raise
        except BaseException as error:
            # All or none of them are stored, and any one of them tells which.
            error.task_id = inserts[0].id  # type: ignore[attr-defined]
            raise
        return [insert.id for insert in inserts]

    def _store_and_buffer_many(
        self, engine: Engine, inserts: Sequence[Insert], *, refuse: bool
    ) -> None:
        buffer, runs = engine.buffer, self._services.registry.runs
        due = [i for i in inserts if not i.row["held"] and runs(i.row["type"])]
        apart = {type for type in {i.row["type"] for i in due} if not engine.buffers(type)}
        due = [insert for insert in due if insert.row["type"] not in apart]
        turns: list[int] = []
        try:
            # Before they are stored: from then on the rest may be fetched, and must come after.
            turns += [buffer.turn() for _ in due]
            del turns[self._reserve_many(engine, turns, refuse=refuse) :]
            buffered = due[: len(turns)]
            for insert in buffered:
                insert.row["owner"] = engine.node.id
            self._store_many(inserts)
            for insert, turn in zip(buffered, turns, strict=True):
                self._buffer(engine, insert, turn)
        except BaseException:  # an interrupt, too: nobody else knows of these slots
            buffer.release(turns)
            raise
        if len(due) < len(inserts):
            self._tell(engine, delayed=True)
        if len(buffered) < len(due) or any(map(engine.has_room, apart)):
            self._tell(engine, delayed=False)

    def _store_many(self, inserts: Sequence[Insert]) -> None:
        self._store_whole(inserts)
        if self._hooks.submitted:
            for insert in inserts:
                self._hooks.tell_submitted(insert.row)
        self._stored(inserts)

    def _prepare_many(self, tasks: Iterable[Task]) -> list[Insert]:
        inserts = [self.prepare(task) for task in tasks]
        if any("depends_on" in insert.row for insert in inserts):
            find_parents(self._services.repository, inserts)
        return inserts

    def _reserve_many(self, engine: Engine, turns: Sequence[int], *, refuse: bool) -> int:
        """Return how many of some tasks go into the buffer; the rest is refused or spilled."""
        buffer, wanted = engine.buffer, len(turns)
        if self._spills(engine):
            return 0
        if buffer.reserve(turns):
            return wanted
        if refuse:
            self.refuse_if_stopped()
            raise self._full(engine, wanted)
        room = max(0, min(wanted, buffer.maxsize - buffer.submitted))
        return room if room and buffer.reserve(turns[:room]) else 0

    def _store_whole(self, inserts: Sequence[Insert]) -> None:
        keyed = [insert for insert in inserts if "unique_key" in insert.row]
        if keyed:
            _refuse_twins(inserts)
        patience = Patience(keyed[0]) if keyed else None
        while not self._try_to_store(inserts):
            assert patience is not None  # an id that is taken raises
            patience.wait()

    def _try_to_store(self, inserts: Sequence[Insert]) -> bool:
        """Store all; False where a unique key was held that is free now."""
        try:
            results = self._services.ledger.commit_whole(inserts)
        except TaskxError as error:
            raise _about(error, inserts[0].id) from error.__cause__
        for insert, stored in zip(inserts, results, strict=True):
            if not stored:
                settle(self._services, insert, "reject")
                return False  # its key is free by now
        return True

    # --- checks

    def prepare(self, task: Task, priority: int | None = None) -> Insert:
        """The record of a task, or the error that says what is wrong with it."""
        if not isinstance(task, Task):
            raise ConfigurationError(f"submit takes a Task or a type, not {type(task).__name__}")
        if task.status is not TaskStatus.PENDING:
            raise InvalidTransition(
                f"only a pending task can be submitted; this one is {task.status}"
            )
        kind = check_name(task.type, "type")
        if not kind:
            raise ConfigurationError("type must not be empty")
        executor = self._services.registry.get(kind)
        params = payload.encode_params(task.params, self._max_payload_size)
        max_attempts, max_crashes, timeout = task.max_attempts, task.max_crashes, task.timeout
        retry = check_policy(task.retry)
        if max_attempts is None and retry is not None:
            max_attempts = retry.max_attempts
        if executor is not None:
            if executor.check_params is not None:
                executor.check_params(task.params)
            options = executor.options
            if max_attempts is None:
                max_attempts = options.attempts
            if max_crashes is None:
                max_crashes = options.max_crashes
            if timeout is None:
                timeout = options.timeout
            if priority is None:
                priority = task.priority or options.priority or 0
        elif priority is None:
            priority = task.priority
        check_options(max_attempts, max_crashes, timeout, priority)
        now = self._services.clock.now_ms()
        more = lifecycle.between_tasks(task)
        create = partial(lifecycle.create, **more) if more else lifecycle.create
        run_at = None if task.run_at is None else _run_at_ms(task.run_at)
        return create(
            task_id=check_name(task.id, "id") or new_id(),
            type=kind,
            params=params,
            created_by=check_name(task.created_by, "created_by"),
            now=now,
            priority=priority,
            run_at=run_at,
            timeout=timeout,
            max_attempts=max_attempts,
            max_crashes=max_crashes,
            retry=policy_to_text(retry),
        )


def _refuse_twins(inserts: Sequence[Insert]) -> None:
    """New tasks that stand in one another's way, and not in that of any that is stored."""
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
    """The error; one of its own where the submit is in doubt, as all in a commit are told the same."""
    if not isinstance(error, RepositoryError) or not error.in_doubt:
        return error
    own = type(error)(f"task {task_id}: {error}")
    own.in_doubt, own.task_id = True, task_id
    return own


def _run_at_ms(moment: datetime) -> int:
    check_moment(moment, "run_at")
    if (ms := to_ms(moment)) > LAST:
        raise ConfigurationError(f"run_at is beyond the calendar, in UTC: {moment}")
    return ms


def with_options(task: Task, given: dict[str, Any], now_ms: int) -> Task:
    """A copy of a task with the options of ``submit`` that were given.

    Raises:
        ConfigurationError: both ``run_at`` and ``delay``, an invalid delay, or an empty id.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    if "id" in chosen:  # that of a Task may be empty: one is made then
        check_key(chosen["id"], "id")
    parents = chosen.get("depends_on")
    if isinstance(parents, Iterable) and not isinstance(parents, (str, bytes, Mapping)):
        chosen["depends_on"] = [getattr(parent, "id", parent) for parent in parents]
    if chosen.pop("on_conflict", "reject") not in get_args(OnConflict):
        known = ", ".join(map(repr, get_args(OnConflict)))
        raise ConfigurationError(
            f"on_conflict must be one of {known}, not {given['on_conflict']!r}"
        )
    if "on_conflict" in given and task.unique_key is None and "unique_key" not in chosen:
        raise ConfigurationError("on_conflict is of a unique_key: give one, too")
    if "unique_scope" in chosen:
        chosen["unique_scope"] = scope_to_text(chosen["unique_scope"])
    delay = chosen.pop("delay", None)
    if delay is not None:
        if "run_at" in chosen:
            raise ConfigurationError("give run_at or delay, not both")
        seconds = check_number(delay, "delay")
        try:
            chosen["run_at"] = to_datetime(now_ms) + timedelta(seconds=seconds)
        except OverflowError:
            raise ConfigurationError(
                f"delay of {seconds:g} seconds is beyond the calendar"
            ) from None
    return attrs.evolve(task, **chosen) if chosen else task
