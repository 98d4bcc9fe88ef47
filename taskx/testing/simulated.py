"""The nodes of a simulation: queues without threads, whose time, ids and repository belong to a world."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from threading import get_ident
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import attrs

from taskx.attempt.current import current
from taskx.attempt.runner import Call, Run, Runner, runs_of
from taskx.node.counts import Stored
from taskx.node.housekeeper import Housekeeper
from taskx.node.pool import Ends, PoolParts, WorkerPool
from taskx.queue.intake import Intake
from taskx.queue.queue import Queue
from taskx.stores import base, door
from taskx.stores.base import Repository
from taskx.stores.liveness import leases
from taskx.stores.liveness.base import About, Node
from taskx.stores.liveness.leases import Leases
from taskx.stores.liveness.locks import HostLocks
from taskx.stores.memory import MemoryReads, MemoryRepository
from taskx.tasks import ids
from taskx.tasks.bell import Bell
from taskx.tasks.clock import Clock
from taskx.tasks.config import Config
from taskx.tasks.errors import RepositoryUnavailable
from taskx.tasks.lifecycle import Ending
from taskx.tasks.model import CONDITIONS, Task, TaskStatus
from taskx.tasks.options import OnConflict
from taskx.tasks.timing import Timing
from taskx.tasks.writes import NoteChange, Write
from taskx.testing.clock import ManualClock
from taskx.testing.driven import ROOM, Driven, DrivenPool, DrivenRunner, DrivenSignal

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing from 3.11 on

#: The number of tasks that a node runs at the same time.
WORKERS = 2
#: The length of a lease in seconds.
LEASE = 5.0


class Killed(BaseException):
    """A node is dead: this unwinds what it was just doing."""


class World(Protocol):
    """A simulation, as its nodes use it."""

    #: The ids of the nodes that were killed.
    killed: set[str]
    now: int

    def enter(self, door: Door) -> str | None:
        """Let others go on before a node uses the repository; return the fault that strikes it then."""

    def is_dead(self, node: SimulatedNode) -> bool:
        """Return True if a node counts as dead for the others."""

    def applied(self, door: Door, writes: Sequence[Write], *, was_dead: bool) -> None:
        """Note writes that took place; ``was_dead`` if the node counted as dead before the call."""

    def noted(self, door: Door, changes: Sequence[NoteChange]) -> None:
        """Note changes of notes by a node that took place."""

    def accepted(self, task_ids: Iterable[str]) -> None:
        """Note that a submit of these tasks has returned."""

    def answered(self, task_id: str) -> None:
        """Note that somebody was told to have given this answer."""

    def lost(self, node: SimulatedNode) -> None:
        """Note that a node has lost its lease, and knows it."""

    def pass_time(self, seconds: float) -> None:
        """Let time pass."""

    def others_go_on(self, node: SimulatedNode, seconds: float) -> None:
        """Let the others go on, and time pass, while a thread of a node waits."""

    def broken(self, text: str) -> None:
        """Note that a promise is broken."""


def _replace(owner: object, **attributes: object) -> None:
    """Replace attributes of a part, or of a module, that the engine has made."""
    for name, value in attributes.items():
        setattr(owner, name, value)


# --- the repository, as a node sees it


def _passing(name: str) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **options: Any) -> Any:
        self._world.enter(self)
        return getattr(self._store, name)(*args, **options)

    return call


class Door(Repository):
    """The repository, as one node sees it: others go on before each call, which may fail.

    Args:
        store: the repository.
        world: the simulation.
        clock: the clock of the node.
    """

    shared = False
    conditions = CONDITIONS

    def __init__(self, store: MemoryRepository, world: World, clock: Clock) -> None:
        super().__init__(clock)
        self._store, self._world = store, world
        self._liveness = self.living = Living(self, world)
        self.reads = _Reads(self, store, world)
        self.node: SimulatedNode | None = None
        # The writes that took place although their caller got an error.
        self._in_doubt: dict[int, Write] = {}

    def apply(self, writes: Sequence[Write], *, all_or_nothing: bool = False) -> Sequence[bool]:
        was_dead = self.node is not None and self._world.is_dead(self.node)
        fault = self._world.enter(self)
        doubtful = self._in_doubt
        known = [doubtful.get(id(write)) is write for write in writes] if doubtful else ()
        new = [w for w, old in zip(writes, known, strict=True) if not old] if known else writes
        held = self._store.apply(new, all_or_nothing=all_or_nothing)
        done = [write for write, took_place in zip(new, held, strict=True) if took_place]
        if not all_or_nothing or len(done) == len(new):
            self._world.applied(self, done, was_dead=was_dead)
        if fault is not None:
            doubtful.update((id(write), write) for write in done)
            raise _lost(fault)
        results = iter(held)
        return [old or next(results) for old in known] if known else held

    def put_notes(self, changes: Sequence[NoteChange]) -> Sequence[bool]:
        fault = self._world.enter(self)
        held = self._store.put_notes(changes)
        self._world.noted(self, [one for one, done in zip(changes, held, strict=True) if done])
        if fault is not None:
            raise _lost(fault)
        return held

    find = _passing("find")
    distinct = _passing("distinct")
    ready = _passing("ready")
    due = _passing("due")
    ended = _passing("ended")
    notes = _passing("notes")
    list = _passing("list")
    count = _passing("count")

    def version(self) -> object:
        return object()


class _Reads(MemoryReads):
    def __init__(self, door: Door, store: MemoryRepository, world: World) -> None:
        super().__init__(store)
        self._door, self._world = door, world

    def notes_named(self, names: Sequence[str]) -> Any:
        self._world.enter(self._door)
        return super().notes_named(names)

    def notes_after(self, prefix: str, after: str, limit: int) -> Any:
        self._world.enter(self._door)
        return super().notes_after(prefix, after, limit)


def _lost(text: str) -> RepositoryUnavailable:
    error = RepositoryUnavailable(text)
    error.in_doubt = True
    return error


class _Host(HostLocks):
    """The locks of a host, of which only a death is seen; else leases tell who lives."""

    def __init__(self, world: World) -> None:
        super().__init__(None)
        self._world = world

    def hold(self, node: str) -> tuple[str, int]:
        return "simulated", 1

    def alive(self, node: str, host: str, inode: int) -> bool | None:
        return False if node in self._world.killed else None

    def began(self, node: str) -> None:
        return None

    def release(self, node: str) -> None:
        """Do nothing: there is no file."""


class Living(Leases):
    """The leases of a node, without threads: heartbeats are sent while time passes, and in rounds."""

    def __init__(self, door: Door, world: World) -> None:
        super().__init__(
            door, LEASE, _Host(world), door.clock.monotonic, door.clock.now_ms, door.timing
        )
        self._door, self._world = door, world
        self._stalled = self._beats = False

    def join(self, node: Node, *, tended: bool = False) -> None:
        super().join(node, tended=True)

    def tend(self, node: str) -> None:
        own = self._own.get(node)
        # A thread sends them: one after the other, and none while another thread makes the note.
        if self._stalled or self._beats or own is None or own.making.locked():
            return
        self._beats = True
        try:
            super().tend(node)
        finally:
            self._beats = False

    def go_on(self) -> None:
        """Do what threads do while time passes: send heartbeats, and watch the lease."""
        for node, own in [*self._own.items()]:
            if not (self._stalled or self._beats):
                now = self._monotonic()
                _replace(own, acknowledged=now, next_beat=now)
                self.tend(node)
            if not own.told:
                self._watch_over(node, own)

    @contextmanager
    def stalled(self) -> Iterator[None]:
        """Let no heartbeat arrive, for the length of a block."""
        self._stalled = True
        try:
            yield
        finally:
            self._stalled = False

    def watch(self, node: str, lost: Callable[[], object]) -> None:
        def tell() -> None:
            assert self._door.node is not None
            self._world.lost(self._door.node)
            lost()

        super().watch(node, tell)

    def silent_for(self, node: str) -> float:
        """Return the seconds since the last heartbeat of a node; endless if it sends none any more."""
        own = self._own.get(node)
        return math.inf if own is None else self._monotonic() - own.acknowledged

    def _start_watch(self) -> None:
        """Start no thread: see :meth:`go_on`."""


# --- the engine of a node


class SimulatedClock(ManualClock):
    """The clock of a node. Time that it lets pass, passes for all."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world
        self._monotonic += world.now

    def advance(self, seconds: Any) -> None:
        self._world.pass_time(seconds)

    def move(self, seconds: float) -> None:
        """Let time pass for this node alone."""
        super().advance(seconds)

    def shift(self, seconds: float) -> None:
        """Set the wall clock wrong by so many seconds."""
        self._offset += round(seconds * 1_000_000_000)

    def set_right(self, clock: ManualClock) -> None:
        """Show the time of another clock."""
        self._offset = clock._offset


class _Housekeeper(Housekeeper):
    def start(self) -> None:
        """Start no thread: the rounds are steps of the simulation."""
        self._pool.agenda.attend()


class _Bell(Bell):
    """A bell for which no thread waits: the others go on in the meantime."""

    def __init__(self, node: SimulatedNode) -> None:
        super().__init__()
        self._node = node

    def wait(self, ear: Any, timeout: float | None = None) -> None:
        self.leave(ear)
        self._node.world.others_go_on(self._node, 1.0 if timeout is None else timeout)


class _Engine(Driven):
    def __init__(self, node: SimulatedNode) -> None:
        super().__init__(lambda: DrivenSignal(node.clock, node.wait_until, virtual=True))
        self._node = node

    def describe(self, about: About) -> About:
        facts = attrs.evolve(about, host="simulated", pid=self._node.number, started_at=0)
        return attrs.evolve(facts, worker_num=WORKERS, buffer_size=ROOM)

    def make_pool(
        self, node: Node, config: Config, ends: Ends, **parts: Unpack[PoolParts]
    ) -> WorkerPool:
        config = attrs.evolve(config, worker_num=WORKERS, buffer_size=ROOM, overflow="reject")
        self._node.pool = pool = DrivenPool(node, config, ends, **parts)
        _replace(pool.starter.suspects, changed=_Bell(self._node))
        return pool

    def make_housekeeper(
        self, pool: WorkerPool, retention: Mapping[TaskStatus, float]
    ) -> Housekeeper:
        self._node.housekeeper = keeper = _Housekeeper(pool, retention, lambda: 0.5)
        return keeper

    def make_runner(self, clock: Clock, timing: Timing, max_payload_size: int) -> Runner:
        return _Runner(clock, timing, max_payload_size)


class _Runner(DrivenRunner):
    def ending_of(self, error: BaseException, run: Run) -> Ending:
        return Runner.ending_of(self, error, run)


class _Intake(Intake):
    """An intake that tells the world what it has accepted."""

    world: World

    def accept(
        self,
        task: Task,
        priority: int | None = None,
        on_conflict: OnConflict = "reject",
        **more: Any,
    ) -> str:
        task_id = super().accept(task, priority, on_conflict, **more)
        self.world.accepted([task_id])
        return task_id

    def accept_plain(self, type: str, params: Any) -> str | None:
        task_id = super().accept_plain(type, params)
        self.world.accepted([] if task_id is None else [task_id])
        return task_id

    def accept_many(
        self, tasks: Iterable[Task], priority: int | None = None, **more: Any
    ) -> list[str]:
        task_ids = super().accept_many(tasks, priority, **more)
        self.world.accepted(task_ids)
        return task_ids


class _Queue(Queue):
    def __init__(self, node: SimulatedNode, config: Config | None, log: logging.Logger) -> None:
        self._simulated = node
        engine = _Engine(node)
        super().__init__(node.door, config, log, clock=node.clock, engine=engine)

    def _wire(self) -> None:
        super()._wire()
        self._node.forget()
        # As if no step were on the main thread, where exceptions may strike, and none hung.
        moves = self._moves
        _replace(moves, _finish=moves._tell)
        # Nothing depends on what is counted: no step of a world is spent on it.
        store = self._simulated.door._store
        _replace(moves.counts, _repository=store, notes=Stored(store))
        _replace(self._node, _by=lambda deadline, step: step(), _end_later=lambda: None)

    def _make_intake(self, moves: door.Door, make: Callable[..., Intake] = _Intake) -> Intake:
        made = super()._make_intake(moves, make)
        assert isinstance(made, _Intake)
        made.world = self._simulated.world
        return made

    def finish(self, task_id: str, result: Any = None, **more: Any) -> bool:
        done = super().finish(task_id, result, **more)
        if done:
            self._simulated.world.answered(task_id)
        return done


class SimulatedNode:
    """A node of a simulation: a queue that is started, and what it is just doing.

    Args:
        world: the simulation.
        store: the repository of all nodes.
        number: how many nodes there were before.
        config: the config of the queue.
        log: the logger of the queue.

    Attributes:
        runs: the runs that were started and are not executed yet: their executors are at work.
        asks: what the program may be asked for on this node.
        late: True if it counted as dead once: others may have its tasks.
    """

    pool: DrivenPool
    housekeeper: _Housekeeper

    def __init__(
        self,
        world: World,
        store: MemoryRepository,
        number: int,
        config: Config | None,
        log: logging.Logger,
    ) -> None:
        self.world, self.number = world, number
        self.clock = SimulatedClock(world)
        self.door = Door(store, world, self.clock)
        self.door.node = self
        self.queue = _Queue(self, config, log)
        self.runs: list[Run | Call] = []
        self.asks: list[Callable[[], object]] = []
        self.alive, self.up = True, False

    @property
    def id(self) -> str:
        """The id of the node."""
        return self.pool.node.id

    @property
    def moves(self) -> Any:
        """The door for the moves of the node."""
        return self.queue._moves

    def boot(self, program: Callable[[Queue], Iterable[Callable[[], object]] | None]) -> None:
        """Declare what the program declares, and start."""
        self.asks = list(program(self.queue) or ())
        self.queue._node.start()
        self.up = True

    def die(self) -> None:
        """Use the repository no more."""
        self.alive = False

    @property
    def work(self) -> int:
        """The number of tasks that may begin here, or be executed."""
        return len(self.runs) + len(self.pool.buffer) + len(self.pool.ahead.runs)

    def start(self, most: int) -> list[Run]:
        """Start up to so many tasks, or take up one that was started ahead; return what begins."""
        if len(self.runs) >= WORKERS or self.pool.stopping:
            return []
        call: Run | Call | None = self.pool.ahead.take() if self.pool.ahead.runs else None
        if call is None:
            items = self.pool.buffer.take(most)
            call = self.pool.start(items, self._worker) if items else None
        if call is None:
            return []
        for run in runs_of(call):
            run.state, self.pool.ahead.at_work[run] = "executing", time.monotonic()
        self.runs.append(call)
        return [*runs_of(call)]

    def execute(self, number: int) -> None:
        """Execute one of the calls that have begun, to the outcomes of its runs."""
        if self.runs:
            call = self.runs.pop(number % len(self.runs))
            if isinstance(call, Run):
                self.pool.execute(call, self._worker)
            else:
                self.pool.execute_call(call, self._worker)

    @property
    def _worker(self) -> str:
        return self.pool.worker_name("worker")

    def wait_until(self, done: Callable[[], bool], seconds: float) -> bool:
        """Let the others go on until a condition holds; return False after ``seconds``."""
        end = self.clock.monotonic() + min(seconds, 3600.0)
        while not done():
            if self.clock.monotonic() >= end:
                return False
            self.world.others_go_on(self, 0.5)
        return True


@contextmanager
def outside() -> Iterator[None]:
    """Leave the executor, if this thread is inside one, for the length of a block."""
    context, current.context = current.context, None
    try:
        yield
    finally:
        current.context = context


# --- time and chance


class _Instead:
    """A module of which some functions are replaced."""

    def __init__(self, module: ModuleType, **functions: Callable[..., Any]) -> None:
        self._module = module
        self.__dict__.update(functions)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@contextmanager
def virtual(world: Callable[[], World], quiet: logging.Logger) -> Iterator[Callable[[], None]]:
    """Let the code of TaskX see the time of a world, and draw no random numbers, in this thread.

    Other threads, such as those of a queue that runs beside it, go on with the real ones. ``quiet`` is the
    logger of leases in the meantime. The block gets a function that makes the ids begin again, for the next
    world.
    """
    numbers = count()

    def begin() -> None:
        nonlocal numbers
        numbers = count(1)
        _replace(ids, _latest=ids._NEVER, _counted=0)
        ids._keys.clear()

    def seconds() -> float:
        return world().now / 1_000_000_000

    real, here = time, get_ident()

    def instead(module: ModuleType, **functions: Callable[..., Any]) -> _Instead:
        def of(name: str, ours: Callable[..., Any]) -> Callable[..., Any]:
            theirs = getattr(module, name)
            return lambda *given: (ours if get_ident() == here else theirs)(*given)

        return _Instead(module, **{name: of(name, ours) for name, ours in functions.items()})

    clock = instead(
        real,
        monotonic=seconds,
        time=lambda: 1_704_067_200 + seconds(),
        time_ns=lambda: round(1_704_067_200_000_000_000 + 1_000_000_000 * seconds()),
        thread_time=seconds,
        sleep=lambda some: world().pass_time(some),
    )
    system = instead(os, urandom=lambda length: next(numbers).to_bytes(length, "big"))
    # A version grows with each change of a note, and none may be that of a later note.
    apart = instead(os, urandom=lambda length: (next(numbers) << 24).to_bytes(length, "big"))
    ours = [m for name, m in sys.modules.items() if name.startswith("taskx.") and m is not None]
    loud = vars(leases)["log"]
    timed = [module for module in ours if vars(module).get("time") is real]
    try:
        for module in timed:
            _replace(module, time=clock)
        _replace(ids, os=system)
        _replace(base, os=apart)
        _replace(leases, log=quiet)
        yield begin
    finally:
        for module in timed:
            _replace(module, time=real)
        for module in (ids, base):
            _replace(module, os=os)
        _replace(leases, log=loud)
        ids._renew()
