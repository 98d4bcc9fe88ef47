"""Transactions of executors: their writes, checkpoints and completion are committed together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NoReturn, Protocol

from taskx.core import lifecycle
from taskx.core.clock import Clock
from taskx.core.errors import ConfigurationError, RepositoryError, RepositoryUnavailable
from taskx.core.lifecycle import Ending
from taskx.core.model import Task
from taskx.core.token import CancelToken
from taskx.core.writes import Update
from taskx.storage import queries
from taskx.storage.base import Repository

# Seconds between two tries to begin, while the repository is unavailable.
_PAUSE = 0.2

#: The ending of a run that was stored in a transaction, and the writes that stored it.
Completed = tuple[Ending, list[Update]]


class Transaction:
    """A transaction of an executor: see :meth:`Context.transaction`.

    Attributes:
        connection: the connection to the repository's database, in a transaction. It is for the thread and
            the block that opened it, and cannot commit or roll back.
    """

    def __init__(self, connection: Any, encode: Callable[[Any], str | None]) -> None:
        self.connection = connection
        self._encode = encode
        self._thread = threading.get_ident()
        self.completes = False
        self.result: str | None = None
        #: The checkpoints as they were set last in this transaction; None if none was.
        self.checkpoints: str | None = None

    def complete(self, result: Any = None) -> None:
        """Complete the task at the end of the block, together with all writes of the transaction.

        The executor should then return. What it still returns or raises changes nothing, and is logged.

        Raises:
            PayloadError: the result is not JSON, or is too large.
            ConfigurationError: this was called before.
        """
        if self.completes:
            raise ConfigurationError("complete() was already called in this transaction")
        self.result, self.completes = self._encode(result), True

    def keep(self, checkpoints: str) -> None:
        """Store checkpoints at the end of the block.

        Raises:
            ConfigurationError: another thread has opened the transaction.
        """
        if threading.get_ident() != self._thread:
            raise ConfigurationError(
                "another thread of this run is inside ctx.transaction(): store checkpoints after that block"
            )
        self.checkpoints = checkpoints

    def writes(self, task: Task, ending: Ending, now: int) -> list[Update]:
        """Return the writes that end the transaction; each has the run's fence as its guard."""
        writes = []
        if self.checkpoints is not None:
            writes.append(lifecycle.checkpoint(task, self.checkpoints, durable=True))
        if self.completes:
            writes += lifecycle.conclude(task, ending, now)
        return writes or [lifecycle.still_runs(task)]


class _Kept(Protocol):
    """The checkpoints of a run."""

    task: Task

    def refuse_nested(self) -> None: ...

    def inside(self, transaction: Transaction, /) -> AbstractContextManager[None]: ...

    def lose(self) -> NoReturn: ...


class _Lost(Exception):
    """The run has lost its task."""


@contextmanager
def opened(
    repository: Repository,
    kept: _Kept,
    token: CancelToken,
    encode: Callable[[Any], str | None],
    ending_of: Callable[[str | None], Ending],
    clock: Clock,
) -> Iterator[tuple[Transaction, list[Completed]]]:
    """Open a transaction for a run, and commit it at the end of the block, unless the run lost its task.

    The list that comes with it has the ending of the run after the block, if the task was completed.
    """
    token.raise_if_cancelled()
    kept.refuse_nested()
    completed: list[Completed] = []
    writes: list[Update] = []
    stack, connection = _begin(repository, token)
    tx = Transaction(connection, encode)
    with kept.inside(tx):
        try:
            with stack:
                yield tx, completed
                ending = ending_of(tx.result)
                writes += tx.writes(kept.task, ending, clock.now_ms())
                # The last statements before COMMIT: no other run can take the task in between.
                with repository.joined(connection, None) as joined:
                    if not all(joined.apply(writes)):
                        raise _Lost
        except _Lost:
            kept.lose()
        except RepositoryError as error:
            visible = tx.completes or tx.checkpoints is not None
            if not (error.in_doubt and visible and _took_place(repository, writes, token)):
                raise
    if tx.completes:
        completed.append((ending, writes[-1:]))
        repository.tell_others(writes)


def _begin(repository: Repository, token: CancelToken) -> tuple[ExitStack, Any]:
    """Begin a transaction. While the repository is unavailable, wait and try again."""
    if repository.joins:
        repository.refuse_own_transaction()
    while True:
        try:
            with ExitStack() as stack:
                connection = stack.enter_context(repository.transaction())
                return stack.pop_all(), connection
        except RepositoryUnavailable:
            token.wait(_PAUSE)
            token.raise_if_cancelled()


def _took_place(repository: Repository, writes: list[Update], token: CancelToken) -> bool:
    """Read back if writes were committed; a repository that is unavailable is asked again."""
    while True:
        try:
            return all(queries.shown(repository, writes[-1:]))
        except RepositoryUnavailable:
            token.wait(_PAUSE)
            token.raise_if_cancelled()
