"""Calls inside a transaction that the caller has opened in the tasks' database."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, cast

import attrs

from taskx.common.bell import Agenda
from taskx.common.config import Config
from taskx.common.controls import Controls
from taskx.core.model import Task
from taskx.core.writes import Insert, Write
from taskx.executing.registry import Layer
from taskx.moving import Moves, Services
from taskx.running.pool import State
from taskx.storage.base import Repository
from taskx.submitting.intake import Intake
from taskx.submitting.layers import LayeredIntake, layered
from taskx.submitting.operations import Operations


class Joining:
    """Makes intakes and operations whose reads and writes are part of a transaction of the caller.

    They use no group commit and no buffer: what is not committed is in no memory. The consequences follow
    when the commit is seen.
    """

    def __init__(self, services: Services, state: State, config: Config) -> None:
        self._services = services
        self._state = state
        self._config = config

    @contextmanager
    def intake(
        self, connection: object, middleware: Iterable[Layer]
    ) -> Iterator[Intake | LayeredIntake]:
        """Return an intake for a ``with`` block. It leaves all tasks in the repository."""
        with self.services(connection) as services:
            yield layered(Intake(services, self._without_engine(), self._config), middleware)

    @contextmanager
    def operations(self, connection: object) -> Iterator[Operations]:
        """Return operations for a ``with`` block."""
        with self.services(connection) as services:
            yield Operations(services, self._without_engine())

    @contextmanager
    def services(
        self, connection: object, after: Callable[[], object] | None = None
    ) -> Iterator[Services]:
        """Return services for a ``with`` block. They are without an engine.

        ``after`` is called after the commit.
        """
        later = _Later(self._services)
        if after is not None:
            later.calls.append(after)
        with self._services.repository.transactions.join(connection, later.follow) as repository:
            later.repository = repository
            yield attrs.evolve(
                self._services,
                repository=repository,
                moves=cast(Moves, later),
                controls=Controls(repository),
                agenda=_Afterwards(self._services.agenda, later.calls),
            )

    def intake_of(self, services: Services) -> Intake:
        """Return an intake without middleware for services of :meth:`services`."""
        return Intake(services, self._without_engine(), self._config)

    # --- a thread that may be in a transaction of its own

    @contextmanager
    def reading(self) -> Iterator[Services]:
        """Return services for reads of this thread. They see what its transaction has written."""
        connection = self._services.repository.transactions.current()
        if connection is None:
            yield self._services
            return
        with self.services(connection) as services:
            yield services

    @contextmanager
    def changing(
        self, after: Callable[[], object] | None = None, *, submits: bool = False
    ) -> Iterator[Services]:
        """Return services for changes of this thread, as a part of its transaction if it has one.

        ``after`` is called after the changes, or after the commit. ``submits`` says that the changes are
        new tasks: see :meth:`Transactions.current`.

        Raises:
            ConfigurationError: the changes cannot take part in the transaction.
        """
        connection = self._services.repository.transactions.current(submits=submits)
        if connection is None:
            self.refuse()
            yield self._services
            if after is not None:
                after()
            return
        with self.services(connection, after) as services:
            yield services

    def refuse(self) -> None:
        """Raise ``ConfigurationError`` if this thread is in a transaction of its own."""
        self._services.repository.transactions.refuse_write()

    def _without_engine(self) -> State:
        return _Unstarted(None, self._state.stopped, self._state.closed)


class _Unstarted(NamedTuple):
    """A queue as it is without its pool: an intake leaves all tasks in the repository."""

    pool: None
    stopped: bool
    closed: bool


class _Afterwards(Agenda):
    """An agenda whose duties about schedules are posted after the commit of the caller."""

    def __init__(self, outer: Agenda, calls: list[Callable[[], object]]) -> None:
        super().__init__()
        self._outer = outer
        self._calls = calls

    def check_schedule_soon(self, name: str) -> None:
        self._calls.append(partial(self._outer.check_schedule_soon, name))


class _Later:
    """The door inside a transaction: applies moves at once, and their consequences after the commit.

    Attributes:
        repository: the repository as it is inside the transaction.
        calls: functions to call after the commit.
    """

    repository: Repository
    entered = False

    def __init__(self, services: Services) -> None:
        self._services = services
        self.calls: list[Callable[[], object]] = []
        self._tasks: dict[str, Task] = {}

    def commit(
        self,
        writes: Sequence[Write],
        tasks: Mapping[str, Task] | None = None,
        *,
        whole: bool = False,
    ) -> Sequence[bool]:
        self._tasks.update(tasks or {})
        return self.repository.apply(writes, all_or_nothing=whole)

    def process_if_unattended(self) -> None:
        """Do nothing yet."""

    def follow(self, writes: Sequence[Write]) -> None:
        """Do what follows from writes that the caller has committed."""
        services = self._services
        try:
            services.moves.follow(writes, self._known(writes))
            services.agenda.fetch_soon()
            services.moves.process_if_unattended()
            for call in self.calls:
                call()
        except Exception:  # the tasks are stored, and polling finds them
            services.log.exception("a part of what follows the commit of a caller is late")

    def _known(self, writes: Sequence[Write]) -> Mapping[str, Task]:
        """Return the tasks of the moves that were read, and those that hooks must be told of."""
        moves = [write.id for write in writes if not isinstance(write, Insert)]
        unknown = [task_id for task_id in moves if task_id not in self._tasks]
        return {**self._tasks, **self._services.repository.get_many(unknown)}
