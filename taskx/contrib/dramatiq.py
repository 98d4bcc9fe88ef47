"""Dramatiq's workers run the tasks of a queue: :class:`DramatiqEngine`. It needs the package dramatiq."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from taskx import ConfigurationError
from taskx.node.broker import BrokerEngine, Ticket, check_queues

if TYPE_CHECKING:
    from dramatiq import Broker

#: The name of the actor that carries tickets.
ACTOR = "taskx.run"
#: Seconds that running tasks get when a worker process ends. Dramatiq has waited for them before, except
#: with RabbitMQ: there it does not know them, and they get as long as its threads would.
STOP_TIMEOUT, STOP_TIMEOUT_OF_HANDED = 10.0, 600.0
# Milliseconds: Dramatiq's default of ten minutes would end an actor. The task's own time-out counts.
_NO_LIMIT = 10 * 365 * 24 * 3600 * 1000

# The brokers that have an engine.
_brokers: weakref.WeakSet[Any] = weakref.WeakSet()


class DramatiqEngine(BrokerEngine):
    """Runs the tasks of a queue in Dramatiq's worker processes.

    ``dramatiq …`` runs the tasks if its program makes the same queue.

    A message has the id and the type of a task, and nothing else. Dramatiq's retries, delays, age limits
    and results are not used: the record of the task has all this. Dramatiq acknowledges a message after its
    actor. RabbitMQ closes the channel of a message that is held for long, so with its broker the actor only
    hands the ticket to a thread of TaskX, one for each of Dramatiq's threads.

    Args:
        broker: the Dramatiq broker.
        queue_name: the Dramatiq queue for all types that have none of their own.
        queues: the name of a Dramatiq queue for each type of tasks that has one of its own.
        one_host: True if all worker processes are on this host. A SQLite file requires it.
        resend: seconds after which a ticket is sent again if workers are free and its task has not started.

    Raises:
        ConfigurationError: dramatiq is missing, or an argument is not valid.
    """

    name = "dramatiq"

    def __init__(
        self,
        broker: Broker,
        *,
        queue_name: str = "taskx",
        queues: Mapping[str, str] | None = None,
        one_host: bool = False,
        resend: float = 5.0,
    ) -> None:
        try:
            import dramatiq
        except ImportError as error:
            raise ConfigurationError(
                "DramatiqEngine requires the package dramatiq: install taskx-queue[dramatiq]"
            ) from error
        if not isinstance(broker, dramatiq.Broker):
            raise ConfigurationError(
                f"broker must be a Dramatiq broker, not {type(broker).__name__}"
            )
        super().__init__(one_host=one_host, resend=resend)
        self._queues = check_queues(queues)
        if broker in _brokers:
            raise ConfigurationError("this broker has a DramatiqEngine already: use another broker")
        _brokers.add(broker)
        self._broker = broker
        #: True if threads of TaskX run the tasks, and Dramatiq's threads only hand over the tickets.
        self.hands_over = _is_rabbitmq(broker)
        if self.hands_over:
            _hush_pika()
        wanted = {
            "max_retries": 0,
            "time_limit": _NO_LIMIT,
            "notify_shutdown": False,
            "store_results": False,
        }
        options: dict[str, Any] = {
            name: value for name, value in wanted.items() if name in broker.actor_options
        }
        declared = dramatiq.actor(actor_name=ACTOR, queue_name=queue_name, broker=broker, **options)
        self._actor: Any = declared(self._run_actor)
        for name in dict.fromkeys(self._queues.values()):
            broker.declare_queue(name)
        broker.add_middleware(_middleware(self))

    def connect(self) -> None:
        """Connect to Redis or RabbitMQ; raise an exception if that is not possible."""
        if self.hands_over:
            self._broker.connection  # type: ignore[attr-defined]  # noqa: B018  (it connects)
        elif (client := getattr(self._broker, "client", None)) is not None:
            client.ping()

    def tend(self) -> None:
        """Send the heartbeats of the connection to RabbitMQ, which would close it otherwise."""
        if self.hands_over:
            try:
                self._broker.connection.process_data_events(0)  # type: ignore[attr-defined]
            except BaseException:
                self.disconnect()
                raise

    def send(self, ticket: Ticket) -> None:
        """Send a ticket. The time-outs of the broker's client limit how long this takes."""
        message = self._actor.message(ticket.id, ticket.type)
        if (name := self._queues.get(ticket.type)) is not None:
            message = message.copy(queue_name=name)
        self._broker.enqueue(message)

    def disconnect(self) -> None:
        """Close the connection to RabbitMQ, of which each thread has its own."""
        if self.hands_over:
            del self._broker.connection  # type: ignore[attr-defined]

    def _run_actor(self, task_id: str, type: str) -> None:
        self.run(task_id, type)

    def begin(self, workers: int) -> None:
        """Begin to work in a process of Dramatiq's workers, with ``workers`` threads."""
        self.begin_work(workers, hand_over=self.hands_over)

    def end(self) -> None:
        """End the work, because Dramatiq's worker has ended."""
        self.end_work(STOP_TIMEOUT_OF_HANDED if self.hands_over else STOP_TIMEOUT)


def _hush_pika() -> None:
    """Drop what pika and Dramatiq log in TaskX's threads: these tell of failures themselves, less often."""
    import pika  # type: ignore[import-untyped]  # noqa: F401  (its loggers exist from now on)

    for name in ("dramatiq.broker.RabbitmqBroker", *logging.root.manager.loggerDict):
        if name.startswith(("pika.", "dramatiq.broker.")):
            logger = logging.getLogger(name)
            if _is_of_others not in logger.filters:
                logger.addFilter(_is_of_others)


def _is_of_others(record: logging.LogRecord) -> bool:
    return not (record.threadName or "").startswith("taskx-")


def _is_rabbitmq(broker: Broker) -> bool:
    return any(kind.__name__ == "RabbitmqBroker" for kind in type(broker).__mro__)


def _middleware(engine: DramatiqEngine) -> Any:
    """Return the middleware that tells an engine of the begin and end of a worker."""
    from dramatiq import Middleware

    class TicketMiddleware(Middleware):
        """Starts and stops the queue in a worker process."""

        def after_worker_boot(self, broker: Any, worker: Any) -> None:
            engine.begin(worker.worker_threads)

        def before_worker_shutdown(self, broker: Any, worker: Any) -> None:
            engine.take_no_more()

        def after_worker_shutdown(self, broker: Any, worker: Any) -> None:
            engine.end()

    return TicketMiddleware()
