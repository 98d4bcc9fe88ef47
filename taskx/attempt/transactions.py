"""Transactions of executors: their writes, checkpoints and completion are committed together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any, NoReturn, Protocol

from taskx.stores import queries
from taskx.stores.base import Repository
from taskx.tasks import lifecycle
from taskx.tasks.clock import Clock
from taskx.tasks.errors import ConfigurationError, RepositoryError, RepositoryUnavailable
from taskx.tasks.lifecycle import Ending
from taskx.tasks.model import Task
from taskx.tasks.token import CancelToken
from taskx.tasks.writes import Update, matches

#: The ending of a run that was stored in a transaction, and the writes that stored it.
Completed = tuple[Ending, list[Update]]


class Transaction:
    """A transaction of an executor: see :meth:`Context.transaction`.

    Attributes:
        connection: the ``sqlite3.Connection`` to the repository's file, a ``psycopg.Connection``, or a
            ``ClientSession`` of pymongo. It is in a transaction, for the thread and the block that opened
            it, and cannot commit or roll back.
    """

    def __init__(self, encode: Callable[[Any], str | None]) -> None:
        self.connection: Any = None  # until it begins
        self._encode = encode
        self._thread = threading.get_ident()
        #: True after the end of the block: then nothing more can be part of it.
        self._over = False
        self._completes = False
        self._result: str | None = None
        #: True after the end of the block if everything is stored.
        self._committed = False
        #: The checkpoints as they were set last in this transaction; None if none was.
        self._checkpoints: str | None = None
        #: The checkpoints as they were before it.
        self._before: str | None = None

    def complete(self, result: Any = None) -> None:
        """Complete the task at the end of the block, together with all writes of the transaction.

        The executor should then return. What it still returns or raises changes nothing, and is logged.

        Raises:
            PayloadError: the result is not JSON, or is too large.
            ConfigurationError: this was called before, or the block has ended.
        """
        if self._over:
            raise ConfigurationError(
                "complete() must be called inside the block of ctx.transaction(), which has ended: return "
                "the result instead, or call complete() before the end of the block"
            )
        if self._completes:
            raise ConfigurationError("complete() was already called in this transaction")
        self._result, self._completes = self._encode(result), True

    def _is_here(self) -> bool:
        """Return True if the calling thread has opened the transaction."""
        return threading.get_ident() == self._thread

    def _keep(self, checkpoints: str) -> None:
        """Store checkpoints at the end of the block.

        Raises:
            ConfigurationError: another thread has opened the transaction.
        """
        if not self._is_here():
            raise ConfigurationError(
                "another thread of this run is inside ctx.transaction(): store checkpoints after that block"
            )
        self._checkpoints = checkpoints

    def _writes(self, task: Task, ending: Ending, now: int) -> list[Update]:
        """Return the writes that end the transaction; each has the run's fence as its guard."""
        writes = []
        if self._checkpoints is not None:
            writes.append(lifecycle.checkpoint(task, self._checkpoints, durable=True))
        if self._completes:
            writes += lifecycle.conclude(task, ending, now)
        return writes or [lifecycle.still_runs(task)]


class _Kept(Protocol):
    """The checkpoints of a run."""

    task: Task

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
    completed: list[Completed],
    retry_every: float,
) -> Iterator[Transaction]:
    """Open a transaction for a run, and commit it at the end of the block, unless the run lost its task.

    If the task was completed, the ending of the run is added to ``completed``. While the repository is
    unavailable, it is tried again every ``retry_every`` seconds.
    """
    token.raise_if_cancelled()
    tx = Transaction(encode)
    # First the run's lock: another thread may hold it while its step waits for the store.
    with kept.inside(tx):
        stack, tx.connection = _begin(repository, token, retry_every)
        commit = _Commit(
            repository=repository,
            task=kept.task,
            token=token,
            tx=tx,
            completed=completed,
            retry_every=retry_every,
        )
        try:
            with stack:
                try:
                    yield tx
                finally:
                    tx._over = True
                commit.write(ending_of(tx._result), clock.now_ms())
            commit.note()
        except _Lost:
            kept.lose()
        except RepositoryError as error:
            if not (error.in_doubt and commit.took_place()):
                if not error.in_doubt and commit.was_lost():
                    kept.lose()
                raise
        except BaseException:  # an interrupt may have come after COMMIT
            commit.look_up()
            raise
    if tx._completes:
        repository.transactions.tell_others(commit.writes)


class _Commit:
    """The end of a transaction.

    Attributes:
        writes: the writes that end it; none before they are made.
    """

    def __init__(
        self,
        repository: Repository,
        task: Task,
        token: CancelToken,
        tx: Transaction,
        completed: list[Completed],
        retry_every: float,
    ) -> None:
        self._repository = repository
        self._task = task
        self._token = token
        self._tx = tx
        self._completed = completed
        self._retry_every = retry_every
        self._ending = Ending(returned=True)
        self.writes: list[Update] = []

    def write(self, ending: Ending, now: int) -> None:
        """Make the last writes before COMMIT: no other run can take the task in between."""
        writes = self._tx._writes(self._task, ending, now)
        with self._repository.transactions.join(self._tx.connection, None) as joined:
            if not all(joined.apply(writes)):
                raise _Lost
            self._ending, self.writes = ending, writes

    def note(self) -> None:
        """Note that the transaction is committed. It may be called again after an interrupt."""
        if self._tx._completes and not self._completed:
            self._completed.append((self._ending, self.writes[-1:]))
        self._tx._committed = True

    def took_place(self) -> bool:
        """Read back if it is committed, and note it; a repository that is unavailable is asked again."""
        while True:
            try:
                return self._shown()
            except RepositoryUnavailable:
                self._token.wait(self._retry_every)
                self._token.raise_if_cancelled()

    def look_up(self) -> None:
        """Read back once if it is committed, and note it."""
        with suppress(RepositoryError):  # then the guards of the next writes decide
            self._shown()

    def was_lost(self) -> bool:
        """Return True if the run has certainly lost its task."""
        guard = lifecycle.still_runs(self._task).guard
        try:
            rows = self._repository.find("id", [self._task.id], tuple(guard))
        except RepositoryError:
            return False
        return not any(matches(dict(zip(guard, row, strict=True)), guard) for row in rows)

    def _shown(self) -> bool:
        tx = self._tx
        # Checkpoints that are as they were before prove nothing.
        if not (self.writes and (tx._completes or tx._checkpoints not in (None, tx._before))):
            return False
        if shown := all(queries.shown(self._repository, self.writes[-1:])):
            self.note()
        return shown


def _begin(repository: Repository, token: CancelToken, retry_every: float) -> tuple[ExitStack, Any]:
    """Begin a transaction. While the repository is unavailable, wait and try again."""
    while True:
        try:
            with ExitStack() as stack:
                connection = stack.enter_context(repository.transactions.begin())
                return stack.pop_all(), connection
        except RepositoryUnavailable:
            token.wait(retry_every)
            token.raise_if_cancelled()
