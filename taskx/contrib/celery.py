"""Celery's workers run the tasks of a queue: :class:`CeleryEngine`. It needs the package celery."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from taskx import ConfigurationError
from taskx.node.broker import BrokerEngine, Ticket, check_queues

if TYPE_CHECKING:
    from celery import Celery

#: The name of the Celery task that carries tickets.
TASK = "taskx.run"
#: Seconds after which the broker counts as away when a ticket is sent.
TIMEOUT = 2.0
#: Seconds that running tasks get when a pool of threads ends. Celery has waited for them before.
STOP_TIMEOUT = 10.0
# Seconds: the limits of the app or the worker would end a child. The task's own time-out counts.
_NO_LIMIT = 10 * 365 * 24 * 3600


# The apps that have an engine.
_apps: weakref.WeakSet[Any] = weakref.WeakSet()


class CeleryEngine(BrokerEngine):
    """Runs the tasks of a queue in Celery's worker processes.

    ``celery -A … worker`` runs the tasks if its program makes the same queue. The pools ``prefork``,
    ``threads`` and ``solo`` are supported.

    A message has the id and the type of a task, and nothing else. Celery's retries, countdowns, results and
    late acknowledgement are not used: the record of the task has all this.

    Args:
        app: the Celery app.
        queues: the name of a Celery queue for each type of tasks that has one of its own. Tickets of other
            types go to the app's default queue.
        one_host: True if all worker processes are on this host. A SQLite file requires it.
        resend: seconds after which a ticket is sent again if workers are free and its task has not started.

    Raises:
        ConfigurationError: celery is missing, or an argument is not valid.
    """

    name = "celery"

    def __init__(
        self,
        app: Celery,
        *,
        queues: Mapping[str, str] | None = None,
        one_host: bool = False,
        resend: float = 5.0,
    ) -> None:
        try:
            from celery import Celery, signals
        except ImportError as error:
            raise ConfigurationError(
                "CeleryEngine requires the package celery: install taskx-queue[celery]"
            ) from error
        if not isinstance(app, Celery):
            raise ConfigurationError(f"app must be a Celery app, not {type(app).__name__}")
        super().__init__(one_host=one_host, resend=resend)
        self._queues = check_queues(queues)
        if app in _apps:
            raise ConfigurationError("this Celery app has a CeleryEngine already: use another app")
        _apps.add(app)
        self._app = app
        app.task(
            self.run,
            name=TASK,
            shared=False,
            ignore_result=True,
            acks_late=False,
            max_retries=0,
            time_limit=_NO_LIMIT,
            soft_time_limit=_NO_LIMIT,
            serializer="json",
        )
        signals.worker_process_init.connect(self._begin_process)
        signals.worker_process_shutdown.connect(self._end_process)
        signals.worker_ready.connect(self._begin_threads)
        signals.worker_shutdown.connect(self._end_threads)

    def renew_after_fork(self) -> None:
        """Forget, in a forked child, what belongs to the parent."""
        super().renew_after_fork()
        self._local = threading.local()  # a connection is for one thread

    def connect(self) -> None:
        """Connect to the broker; raise an exception if it has not answered in about :data:`TIMEOUT`."""
        try:
            self._connection().default_channel  # noqa: B018  (it connects, and logs in)
        except BaseException:
            self.disconnect()
            raise

    def send(self, ticket: Ticket) -> None:
        """Send a ticket; raise an exception if the broker has not taken it in about :data:`TIMEOUT`."""
        is_open = getattr(self._local, "connection", None) is not None
        try:
            self._publish(ticket)
        except Exception:  # of the driver of the broker
            if not is_open:
                raise
            self._publish(ticket)  # the broker may have been restarted since the last ticket

    def _publish(self, ticket: Ticket) -> None:
        try:
            queue = self._queues.get(ticket.type)
            self._app.send_task(
                TASK,
                (ticket.id, ticket.type),
                connection=self._connection(),
                retry=False,
                ignore_result=True,
                serializer="json",
                **({} if queue is None else {"queue": queue}),
            )
        except BaseException:  # also an interrupt: half a message may have been sent
            self.disconnect()
            raise

    def disconnect(self) -> None:
        """Close this thread's connection to the broker."""
        connection, self._local.connection = getattr(self._local, "connection", None), None
        if connection is not None:
            with suppress(Exception):  # the broker may be away
                connection.release()

    def process_ends(self) -> bool:
        """Return True if a signal ends this child of the pool ``prefork``, or this process of ``solo``."""
        from billiard import common  # type: ignore[import-untyped]
        from celery.worker import state

        # The signal handlers set these before an exception reaches the task: here an exit code, perhaps 0.
        cold = state.should_terminate is not None and state.should_terminate is not False
        return cold or bool(common._should_have_exited[0])

    def _connection(self) -> Any:
        found = getattr(self._local, "connection", None)
        if found is None:
            found = self._local.connection = self._make_connection()
        return found

    def _make_connection(self) -> Any:
        bounds = {
            "max_retries": 0,
            "socket_timeout": TIMEOUT,
            "socket_connect_timeout": TIMEOUT,
            "read_timeout": TIMEOUT,
            "write_timeout": TIMEOUT,
        }
        return self._app.connection_for_write(connect_timeout=TIMEOUT, transport_options=bounds)

    # --- signals of Celery's worker

    def _begin_process(self, **_: Any) -> None:
        """Begin to work in a child of the pool ``prefork``, or in the process of the pool ``solo``."""
        if self._is_current():
            self.begin_work(1)

    def _end_process(self, **_: Any) -> None:
        # The child has ended its last task before.
        self.end_work(STOP_TIMEOUT)

    def _begin_threads(self, sender: Any = None, **_: Any) -> None:
        from celery.concurrency.thread import TaskPool

        if self._is_current() and isinstance(getattr(sender, "pool", None), TaskPool):
            self.begin_work(sender.pool.limit)

    def _end_threads(self, **_: Any) -> None:
        self.end_work(STOP_TIMEOUT)

    def _is_current(self) -> bool:
        """Return True if the worker of this process is one of this app."""
        from celery import current_app

        return bool(current_app._get_current_object() is self._app)
