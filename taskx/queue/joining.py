"""Calls inside a transaction that the caller has opened in the tasks' database."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from taskx.node.moving import Moves
from taskx.queue.inside import Inside
from taskx.stores.base import Repository
from taskx.stores.door import Door
from taskx.tasks.bell import Agenda
from taskx.tasks.log import GuardedLogger
from taskx.tasks.model import Task
from taskx.tasks.writes import Insert, Write


class Joining:
    """Chooses the door of a call: the queue's own, or that of a transaction of the caller.

    Inside a transaction of the caller there is no group commit and no buffer: what is not committed is in
    no memory. The consequences follow when the commit is seen.

    Args:
        own: the door of the queue, whose commits are transactions of their own.
        agenda: is told of what was committed.
        log: the logger of the queue.
    """

    def __init__(self, own: Moves, agenda: Agenda, log: GuardedLogger) -> None:
        self._own = own
        self._agenda = agenda
        self._log = log

    @contextmanager
    def _door(self, connection: object) -> Iterator[Door]:
        later = _Consequences(self._own, self._agenda, self._log)
        with self._own.repository.transactions.join(connection, later.follow) as repository:
            yield Inside(repository, self._own.now_ms, later.tasks, later.calls)

    @contextmanager
    def reading(self) -> Iterator[Repository]:
        """Return the repository for reads of this thread. They see what its transaction has written."""
        connection = self._own.repository.transactions.current()
        if connection is None:
            yield self._own.repository
            return
        with self._own.repository.transactions.join(connection, None) as repository:
            yield repository

    @contextmanager
    def changing(self, connection: object = None, *, submits: bool = False) -> Iterator[Door]:
        """Return the door for changes of this thread: a part of its transaction if it has one.

        Args:
            connection: the connection with the transaction of the caller; None for that of this thread.
            submits: True if the changes are new tasks: see :meth:`Transactions.current`.

        Raises:
            ConfigurationError: the changes cannot take part in the transaction.
        """
        if connection is None:
            connection = self._own.repository.transactions.current(submits=submits)
        if connection is None:
            self.refuse()
            yield self._own
            return
        with self._door(connection) as door:
            yield door

    def refuse(self) -> None:
        """Raise ``ConfigurationError`` if this thread is in a transaction of its own."""
        self._own.repository.transactions.refuse_write()


class _Consequences:
    """Does what follows from the moves of a transaction, after its commit.

    Attributes:
        tasks: the tasks of the moves that were read.
        calls: functions to call.
    """

    def __init__(self, moves: Moves, agenda: Agenda, log: GuardedLogger) -> None:
        self._moves = moves
        self._agenda = agenda
        self._log = log
        self.tasks: dict[str, Task] = {}
        self.calls: list[Callable[[], object]] = []

    def follow(self, writes: Sequence[Write]) -> None:
        """Do what follows from writes that the caller has committed."""
        try:
            self._moves.follow(writes, self._known(writes))
            self._agenda.fetch_soon()
            # What was counted is left to another call: the end of the caller's block waits for no turn.
            self._moves.process_if_unattended(counts=False)
            for call in self.calls:
                call()
        except Exception:  # noqa: BLE001  (the tasks are stored, and polling finds them)
            self._log.exception("a part of what follows the commit of a caller is late")

    def _known(self, writes: Sequence[Write]) -> Mapping[str, Task]:
        """Return the tasks of the moves that were read, and those that hooks must be told of."""
        moves = [write.id for write in writes if not isinstance(write, Insert)]
        unknown = [task_id for task_id in moves if task_id not in self.tasks]
        return {**self.tasks, **self._moves.repository.get_many(unknown)}
