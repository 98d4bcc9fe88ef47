"""Calls inside a transaction that the caller has opened in the tasks' database."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from taskx.attempt.registry import Layer
from taskx.node.moving import Services
from taskx.node.pool import State
from taskx.queue.intake import Intake
from taskx.queue.layers import LayeredIntake, layered
from taskx.queue.operations import Operations
from taskx.queue.work import Inside, Work
from taskx.stores.base import Repository
from taskx.tasks.config import Config
from taskx.tasks.model import Task
from taskx.tasks.writes import Insert, Write


class Joining:
    """Chooses the unit of work of a call: the queue's own, or a transaction of the caller.

    Inside a transaction of the caller there is no group commit and no buffer: what is not committed is in
    no memory. The consequences follow when the commit is seen.

    Args:
        own: the work of the queue, whose commits are transactions of their own.
    """

    def __init__(self, services: Services, state: State, config: Config, own: Work) -> None:
        self._services = services
        self._state = state
        self._config = config
        self._own = own
        self._repository = own.repository

    @contextmanager
    def intake(
        self, connection: object, middleware: Iterable[Layer]
    ) -> Iterator[Intake | LayeredIntake]:
        """Return an intake for a ``with`` block. It leaves all tasks in the repository."""
        with self._work(connection) as work:
            yield layered(self.intake_of(work), middleware)

    @contextmanager
    def operations(self, connection: object) -> Iterator[Operations]:
        """Return operations for a ``with`` block."""
        with self._work(connection) as work:
            yield Operations(self._services, self._state, work)

    def intake_of(self, work: Work) -> Intake:
        """Return an intake without middleware."""
        return Intake(self._services, self._state, self._config, work)

    @contextmanager
    def _work(self, connection: object) -> Iterator[Work]:
        later = _Consequences(self._services)
        with self._repository.transactions.join(connection, later.follow) as repository:
            yield Work(repository, Inside(repository, later.tasks), later.calls)

    # --- a thread that may be in a transaction of its own

    @contextmanager
    def reading(self) -> Iterator[Repository]:
        """Return the repository for reads of this thread. They see what its transaction has written."""
        connection = self._repository.transactions.current()
        if connection is None:
            yield self._repository
            return
        with self._repository.transactions.join(connection, None) as repository:
            yield repository

    @contextmanager
    def changing(self, *, submits: bool = False) -> Iterator[Work]:
        """Return the work for changes of this thread: a part of its transaction if it has one.

        ``submits`` says that the changes are new tasks: see :meth:`Transactions.current`.

        Raises:
            ConfigurationError: the changes cannot take part in the transaction.
        """
        connection = self._repository.transactions.current(submits=submits)
        if connection is None:
            self.refuse()
            yield self._own
            return
        with self._work(connection) as work:
            yield work

    def refuse(self) -> None:
        """Raise ``ConfigurationError`` if this thread is in a transaction of its own."""
        self._repository.transactions.refuse_write()


class _Consequences:
    """Does what follows from the moves of a transaction, after its commit.

    Attributes:
        tasks: the tasks of the moves that were read.
        calls: functions to call.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        self.tasks: dict[str, Task] = {}
        self.calls: list[Callable[[], object]] = []

    def follow(self, writes: Sequence[Write]) -> None:
        """Do what follows from writes that the caller has committed."""
        services = self._services
        try:
            services.moves.follow(writes, self._known(writes))
            services.agenda.fetch_soon()
            # What was counted is left to another call: the end of the caller's block waits for no turn.
            services.moves.process_if_unattended(counts=False)
            for call in self.calls:
                call()
        except Exception:  # the tasks are stored, and polling finds them
            services.log.exception("a part of what follows the commit of a caller is late")

    def _known(self, writes: Sequence[Write]) -> Mapping[str, Task]:
        """Return the tasks of the moves that were read, and those that hooks must be told of."""
        moves = [write.id for write in writes if not isinstance(write, Insert)]
        unknown = [task_id for task_id in moves if task_id not in self.tasks]
        return {**self.tasks, **self._services.repository.get_many(unknown)}
