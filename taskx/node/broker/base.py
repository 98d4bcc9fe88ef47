"""The base of engines that use a broker."""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs

from taskx.attempt.alarms import Alarms
from taskx.attempt.runner import Runner
from taskx.node.broker.tickets import Ticket
from taskx.node.engine import BoundQueue, Engine
from taskx.node.pool import Ends, PoolParts, WorkerPool
from taskx.stores.liveness.base import About, Node
from taskx.tasks.checks import check_number
from taskx.tasks.clock import Clock
from taskx.tasks.config import Config
from taskx.tasks.errors import ConfigurationError, QueueStopped, RepositoryError, SchemaMismatch
from taskx.tasks.log import log
from taskx.tasks.timing import DEFAULT_TIMING, Timing

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing from 3.11 on

    from taskx.node.broker.handover import HandOver
    from taskx.node.broker.pool import TicketPool


def check_queues(queues: Any) -> dict[str, str]:
    """Return a copy of a mapping of types to names of queues, or raise ``ConfigurationError``."""
    named = {} if queues is None else queues
    if not isinstance(named, Mapping) or not all(
        isinstance(word, str) for pair in named.items() for word in pair
    ):
        raise ConfigurationError(
            f"queues must give a queue's name for each type, such as {{'video': 'gpu'}}, not {queues!r}"
        )
    return dict(named)


class BrokerEngine(Engine, ABC):
    """An engine whose tickets a message broker carries to worker processes.

    A program that starts its queue only sends tickets. A worker process calls :meth:`begin_work`, which
    starts the queue there, and :meth:`run` for each ticket that it gets. A subclass implements
    :meth:`send`.

    Args:
        one_host: True if all processes that use the queue are on this host. A SQLite file requires it.
        resend: seconds after which a ticket is sent again if workers are free and its task has not started.

    Attributes:
        workers: the number of tasks that this process runs at a time; 0 if it is no worker process.

    Raises:
        ConfigurationError: an argument is not valid.
    """

    def __init__(self, *, one_host: bool = False, resend: float = 5.0) -> None:
        if not isinstance(one_host, bool):
            raise ConfigurationError(f"one_host must be True or False, not {one_host!r}")
        self._one_host = one_host
        self.resend = check_number(resend, "resend", 0.01)
        self._queue: weakref.ref[BoundQueue] | None = None
        self._timing = DEFAULT_TIMING  # until it has a queue
        self.renew_after_fork()

    def renew_after_fork(self) -> None:
        """Forget, in a forked child, what belongs to the parent."""
        self.workers = 0
        self._pool: TicketPool | None = None
        self._handed: HandOver | None = None
        self._begun = threading.Event()
        self._ending = threading.Event()
        # Taken, and never released, by the thread that logs that this process runs no more tasks.
        self._told = threading.Lock()

    @abstractmethod
    def send(self, ticket: Ticket) -> None:
        """Send a ticket to the worker processes, or raise any exception.

        A thread of TaskX calls it; in a worker process that cannot run tasks, the threads that get tickets
        do, too. It must end in bounded time, because other tickets wait for it.
        """

    def connect(self) -> None:
        """Connect to the broker, or raise any exception. A thread calls it before it sends tickets."""

    def tend(self) -> None:
        """Keep the connection alive, or raise any exception if it is lost.

        The thread that sends tickets calls it twice a second, or more often, while it has none to send.
        """

    def disconnect(self) -> None:
        """Close this thread's connection to the broker. A thread that sends tickets calls it at its end."""

    def process_ends(self) -> bool:
        """Return True if a signal ends this worker process by an exception in the main thread.

        A task that the exception ends has not failed: it is interrupted, and starts again elsewhere.
        """
        return False

    def bind(self, queue: BoundQueue) -> None:
        repository = queue.repository
        repository.require("the tasks of several processes, which an engine with a broker needs")
        if not repository.shared:
            raise ConfigurationError(
                f"{self.name} runs tasks in other processes, which cannot see this repository: use "
                "PostgresRepository, MongoRepository, or SQLiteRepository if all processes are on one host"
            )
        if repository.house.one_host and not self._one_host:
            raise ConfigurationError(
                f"{self.name} may run tasks on other hosts, and they cannot share a SQLite file: use "
                "PostgresRepository or MongoRepository, or pass one_host=True if all worker "
                "processes are on this host"
            )
        if self._queue is not None and self._queue() not in (None, queue):
            raise ConfigurationError("an engine has one queue: create another engine")
        self._queue = weakref.ref(queue)
        self._timing = queue._timing

    def describe(self, about: About) -> About:
        return attrs.evolve(about, engine=self.name, worker_num=self.workers, buffer_size=0)

    def make_runner(self, clock: Clock, timing: Timing, max_payload_size: int) -> Runner:
        return Runner(
            clock, Alarms(clock, timing), max_payload_size, self.process_ends, timing=timing
        )

    def make_pool(
        self, node: Node, config: Config, ends: Ends, **parts: Unpack[PoolParts]
    ) -> WorkerPool:
        """Return a pool that sends tickets and, in a worker process, runs tasks for them."""
        # Imported here, because most programs have no broker.
        from taskx.node.broker.pool import TicketPool

        config = attrs.evolve(config, worker_num=max(1, self.workers))
        return TicketPool(node, config, ends, self, self._has_begun, **parts)

    def _has_begun(self, pool: TicketPool) -> None:
        self._pool = pool
        self._begun.set()

    # --- in a worker process

    def begin_work(self, workers: int, *, hand_over: bool = False) -> None:
        """Make this process a worker process that runs ``workers`` tasks at a time; return at once.

        A thread starts the queue, and tries again while the repository is away. With ``hand_over``,
        :meth:`run` returns at once, and ``workers`` threads of this engine run the tasks.
        """
        self.workers = workers
        if hand_over:
            from taskx.node.broker.handover import HandOver

            self._handed = HandOver(self._run_here, workers, self._timing.ticket_within)
        self._ending.clear()
        threading.Thread(target=self._start, name="taskx-join", daemon=True).start()

    def _start(self) -> None:
        pause = self._timing.join_pause
        while (queue := self._bound()) is not None and not self._ending.is_set():
            try:
                queue.start()
            except RepositoryError as error:
                log.warning("this worker process cannot start its queue yet: %s", error)
            except QueueStopped:
                return
            except Exception:  # noqa: BLE001  (a defect: without its queue, this process would idle)
                log.exception("this worker process cannot start its queue; it tries again")
            else:
                return
            del queue
            self._ending.wait(pause)
            pause = min(2 * pause, self._timing.longest_join_pause)

    def take_no_more(self) -> None:
        """Begin the end of a worker process with ``hand_over``: it sends tickets back from now on."""
        self._ending.set()
        if self._handed is not None:
            self._handed.end()

    def end_work(self, timeout: float) -> None:
        """Stop the queue of a worker process that ends; running tasks get ``timeout`` seconds."""
        self.take_no_more()
        if self.workers and (queue := self._bound()) is not None:
            queue.stop(timeout)

    def run(self, task_id: str, type: str) -> None:
        """Run the best task of a type that is due, in this thread; return when its outcome is stored.

        If nothing may start, this does nothing: the ticket is sent again when that has changed.
        """
        ticket = Ticket(task_id, type)
        if not self.workers:
            log.warning("a ticket for task %s is dropped: this process is no worker", ticket.id)
        elif self._handed is None:
            self._run_here(ticket)
        elif not self._handed.put(ticket):
            self._give_back(ticket)

    def _run_here(self, ticket: Ticket) -> None:
        pool = self._pool if self._begun.wait(self._timing.join_within) else None
        if pool is None or not pool.run(ticket):
            if pool is not None and pool.outdated is not None:
                self._tell_outdated(pool.outdated)
            self._ending.wait(self._timing.keep_ticket)
            self._give_back(ticket)

    def _give_back(self, ticket: Ticket) -> None:
        """Send a ticket that this process cannot use once more, so that another process gets it."""
        try:
            try:
                self.send(ticket)
            finally:
                self.disconnect()
        except Exception as error:  # noqa: BLE001  (the libraries of brokers have no common class of errors)
            log.debug("a ticket for task %s is dropped, and sent again later: %s", ticket.id, error)

    def _tell_outdated(self, error: SchemaMismatch) -> None:
        if self._told.acquire(blocking=False):
            log.error(
                "this worker process runs no more tasks, and sends its tickets back to the broker: "
                "stop it, and start it with the newer TaskX: %s",
                error,
            )

    def _bound(self) -> Any:
        return None if self._queue is None else self._queue()
