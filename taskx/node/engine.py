"""The interface of engines, which make what runs the tasks of a queue, and the engine of threads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from taskx.attempt.alarms import Alarms
from taskx.attempt.runner import Runner
from taskx.node.housekeeper import Housekeeper
from taskx.node.pool import Ends, PoolParts, WorkerPool
from taskx.stores.base import Repository
from taskx.stores.liveness.base import About, Node
from taskx.tasks.bell import Signal
from taskx.tasks.clock import Clock
from taskx.tasks.config import Config
from taskx.tasks.model import TaskStatus
from taskx.tasks.timing import Timing

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing from 3.11 on


class BoundQueue(Protocol):
    """The methods of a queue that an engine calls."""

    repository: Repository
    _timing: Timing

    def start(self) -> None: ...
    def stop(self, timeout: float) -> list[str]: ...


class Engine:
    """The part of a queue that decides where its tasks run. ``name`` is recorded with each node.

    It makes what runs tasks: here, and in a :class:`Threads`, for threads of this process.
    """

    name = ""
    #: False if hooks and handles have no threads: whoever causes an event tells it.
    threaded = True

    def bind(self, queue: BoundQueue) -> None:
        """Become the engine of a queue.

        Raises:
            ConfigurationError: the engine cannot run the tasks of this queue.
        """

    def renew_after_fork(self) -> None:
        """Forget, in a forked child, what belongs to the parent."""

    def make_runner(self, clock: Clock, timing: Timing, max_payload_size: int) -> Runner:
        """Return what calls executors."""
        return Runner(clock, Alarms(clock, timing), max_payload_size, timing=timing)

    def make_signal(self) -> Signal:
        """Return what a thread waits with for the end of a task."""
        return Signal()

    # --- for a node that is being started

    def describe(self, about: About) -> About:
        """Return the facts about a node, with those that depend on its engine."""
        return about

    def make_pool(
        self, node: Node, config: Config, ends: Ends, **parts: Unpack[PoolParts]
    ) -> WorkerPool:
        """Return what runs tasks: see :class:`WorkerPool`."""
        return WorkerPool(node, config, ends, **parts)

    def make_housekeeper(
        self, pool: WorkerPool, retention: Mapping[TaskStatus, float]
    ) -> Housekeeper:
        """Return what does the duties of the node."""
        return Housekeeper(pool, retention)


class Threads(Engine):
    """The engine of a queue by default: ``Config.worker_num`` threads of the process that starts it."""

    name = "threads"
