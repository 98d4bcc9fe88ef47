"""The ``atomic()`` blocks of the calling thread, and the submits that wait for their commits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from typing import Any, Literal, TypeVar

import attrs
from django.db import Error, connections, transaction

from taskx.stores.base import Fields, Listed, Lookup, Repository, Rows, Timed
from taskx.stores.transactions import Then, Transactions
from taskx.tasks.errors import ConfigurationError
from taskx.tasks.model import Task, TaskFilter
from taskx.tasks.record import DEFAULTS, Ended, Stub
from taskx.tasks.writes import Insert, Note, NoteChange, Update, Write

#: What a submit does inside ``atomic()`` of another database than that of the tasks.
OnCommit = Literal["wait", "refuse"]

R = TypeVar("R", bound=Repository)
_log = logging.getLogger("taskx")


def check_on_commit(value: object) -> OnCommit:
    """Return a valid setting of ``on_commit``; raise ``ConfigurationError`` for another value."""
    if value != "wait" and value != "refuse":
        raise ConfigurationError(f"on_commit must be 'wait' or 'refuse', not {value!r}")
    return value


def open_blocks(*without: str | None) -> list[Any]:
    """Return the connections of this thread that are inside ``atomic()``, except these aliases."""
    made = connections.all(initialized_only=True)
    return [one for one in made if one.in_atomic_block and one.alias not in without]


def is_open(connection: Any) -> bool:
    """Return True if a connection of this thread is in a transaction, or begins one with any statement."""
    if connection.in_atomic_block:
        return True
    if connection.connection is None:
        return not connection.settings_dict["AUTOCOMMIT"]
    return not connection.autocommit


def has_begun(connection: Any) -> bool:
    """Return True if a connection of this thread is in a transaction, or may be in one."""
    driver = connection.connection
    if connection.in_atomic_block or driver is None or connection.autocommit:
        return bool(connection.in_atomic_block)
    if connection.vendor == "postgresql":
        return bool(driver.info.transaction_status)
    if connection.vendor == "mysql":
        with suppress(Error):  # the connection has broken
            if connection.mysql_is_mariadb:
                with connection.cursor() as cursor:
                    cursor.execute("SELECT @@in_transaction")
                    return bool(cursor.fetchone()[0])
    return connection.vendor != "sqlite" or bool(driver.in_transaction)


def commit_implicit() -> None:
    """Commit what this thread has begun outside of ``atomic()``, where settings turn autocommit off."""
    for connection in connections.all(initialized_only=True):
        if has_begun(connection) and not connection.in_atomic_block:
            connection.commit()


@attrs.frozen(eq=False)
class _AfterCommit:
    """A callback of ``transaction.on_commit``. Django drops it if its savepoint is rolled back."""

    repository: Repository
    writes: Sequence[Write]
    call: Callable[[], object]

    def __call__(self) -> None:
        self.call()


def after_commit(
    connection: Any, repository: Repository, writes: Sequence[Write], call: Callable[[], object]
) -> None:
    """Call a function for writes after the commit of a connection that is inside ``atomic()``."""
    transaction.on_commit(_AfterCommit(repository, writes, call), using=connection.alias)


def uncommitted_writes(repository: Repository) -> Iterator[Write]:
    """Yield the writes of this thread that take place with, or after, the commits of open blocks."""
    for connection in open_blocks():
        for _, call, *_ in connection.run_on_commit:
            if isinstance(call, _AfterCommit) and call.repository is repository:
                yield from call.writes


def postponed(repository: Repository, task_id: str, key: int, call: Callable[[], object]) -> bool:
    """Do what :meth:`Transactions.postpone` describes for the blocks of the calling thread."""
    for connection in open_blocks():
        callbacks = [call for _, call, *_ in connection.run_on_commit]
        ours = [one for one in callbacks if isinstance(one, _AfterCommit)]
        if any(
            one.repository is repository and any(write.id == task_id for write in one.writes)
            for one in ours
        ):
            if not any(isinstance(one, _Postponed) and one.key == key for one in callbacks):
                transaction.on_commit(_Postponed(key, call), using=connection.alias)
            return True
    return False


@attrs.frozen(eq=False)
class _Postponed:
    """A callback of ``transaction.on_commit`` for somebody who waits for the commit."""

    key: int
    call: Callable[[], object]

    def __call__(self) -> None:
        self.call()


@attrs.frozen(eq=False)
class _Block:
    """A block in another database: :meth:`Transactions.join` stores the new tasks after its commit."""

    connection: Any


def is_elsewhere(connection: object) -> bool:
    """Return True for the value of ``current`` that stands for a block in another database."""
    return isinstance(connection, _Block)


class BesideBlocks(Transactions):
    """Transactions of a store, where submits also respect the ``atomic()`` blocks of other databases.

    Args:
        outer: the repository.
        inner: its transactions in its own store.
        on_commit: ``"wait"``: a task that is submitted inside such a block is stored after its commit;
            ``"refuse"``: the submit raises ``ConfigurationError``.
        using: the alias of the database with the tasks; None if Django does not know it.
    """

    def __init__(
        self,
        outer: Repository,
        inner: Transactions,
        on_commit: OnCommit,
        using: str | None = None,
    ) -> None:
        self._inner = inner
        super().__init__(type(outer).__name__, outer.timing)
        self.outer = outer
        self.using = using
        self._on_commit = on_commit

    def current(self, *, submits: bool = False) -> object | None:
        found = self._inner.current(submits=submits)
        if found is not None or not submits or not (others := open_blocks(self.using)):
            return found
        alias = others[-1].alias
        if self._on_commit == "refuse":
            raise ConfigurationError(
                f"this thread is inside atomic() of the database {alias!r}, but the tasks are in another "
                "one, so the task would not be rolled back with the data; nothing was stored. Submit after "
                f"the commit, with transaction.on_commit(…, using={alias!r}), or set on_commit='wait'"
            )
        return _Block(others[-1])

    def changed(self, task_id: str) -> bool:
        waiting = (write.id for write in uncommitted_writes(self.outer))
        return task_id in waiting or self._inner.changed(task_id)

    def postpone(self, task_id: str, key: int, call: Callable[[], object]) -> bool:
        return postponed(self.outer, task_id, key, call) or self._inner.postpone(task_id, key, call)

    def join(self, connection: object, then: Then | None) -> AbstractContextManager[Repository]:
        if isinstance(connection, _Block):
            return wait_for_commit(self.outer, connection.connection, then, self.using)
        return self._inner.join(connection, then)

    def begin(self) -> AbstractContextManager[Any]:
        return self._inner.begin()

    def tell_others(self, writes: Sequence[Write]) -> None:
        self._inner.tell_others(writes)

    def refuse_write(self) -> None:
        self._inner.refuse_write()

    def refuse_wait(self) -> None:
        self._inner.refuse_wait()

    def blocking(self) -> AbstractContextManager[None]:
        return self._inner.blocking()

    def close(self) -> None:
        self._inner.close()

    def renew(self) -> None:
        super().renew()
        self.known = True  # Django knows the blocks of all threads
        self._inner.renew()


def beside_blocks(repository: R, on_commit: OnCommit) -> R:
    """Make a repository outside of Django's databases respect ``atomic()`` blocks, and return it."""
    repository._extend_transactions(lambda inner: BesideBlocks(repository, inner, on_commit))
    return repository


# --- submits that wait


@contextmanager
def wait_for_commit(
    outer: Repository, connection: Any, then: Then | None, using: str | None
) -> Iterator[Repository]:
    """Return a repository for a ``with`` block, whose writes are applied after a connection's commit."""
    made = _Waiting(outer)
    yield made
    if made.writes:
        store = partial(_store, made, {using, connection.alias}, then)
        after_commit(connection, outer, made.writes, store)


def _store(waiting: _Waiting, committed: set[str | None], then: Then | None) -> None:
    """Store what waits, unless further blocks are open around the one that has committed."""
    if others := open_blocks(*committed):
        committed.add(others[-1].alias)
        store = partial(_store, waiting, committed, then)
        after_commit(others[-1], waiting.outer, waiting.writes, store)
        return
    stored = waiting.apply_now()
    if then is not None:
        then(stored)


class _Waiting(Repository):
    """A repository whose writes wait for a commit elsewhere. Its reads show what waits in this thread."""

    def __init__(self, outer: Repository) -> None:
        super().__init__(outer.clock, outer.codecs, outer.timing, outer.liveness)
        self.outer = outer
        self.shared, self.shortcoming = outer.shared, outer.shortcoming
        self._batches: list[tuple[list[Write], bool]] = []

    @property
    def writes(self) -> list[Write]:
        """The writes that wait."""
        return [write for batch, _ in self._batches for write in batch]

    def apply(self, writes: Sequence[Write], *, all_or_nothing: bool = False) -> Sequence[bool]:
        """Keep writes for later. A new task is refused at once if its id or its unique key is taken."""
        results, ids = [], set[str]()
        for write in writes:
            taken = False
            if isinstance(write, Insert):
                taken = write.id in ids or self._is_taken(write)
                ids.add(write.id)
            results.append(not taken)
        kept = [write for write, held in zip(writes, results, strict=True) if held]
        if kept and (len(kept) == len(writes) or not all_or_nothing):
            self._batches.append((kept, all_or_nothing))
        return results

    def _is_taken(self, insert: Insert) -> bool:
        key = insert.row.get("unique_lock")
        return bool(
            self.find("id", [insert.id], ("id",))
            or (key is not None and self.find("unique_lock", [key], ("id",)))
        )

    def apply_now(self) -> list[Write]:
        """Apply what waits. Return the writes whose guards held."""
        stored: list[Write] = []
        for batch, whole in self._batches:
            results = self.outer.apply(batch, all_or_nothing=whole)
            all_refused = whole and not all(results)
            for write, held in zip(batch, results, strict=True):
                if held and not all_refused:
                    stored.append(write)
                elif isinstance(write, Insert):
                    _log.error(
                        "task %s (%s) was not stored after the commit: in the meantime another task got %s",
                        write.id,
                        write.row["type"],
                        "an id or a unique key of the same call"
                        if held
                        else "its id or its unique key",
                    )
        return stored

    # --- reading

    def find(
        self, column: Lookup, values: Sequence[str], fields: Fields, limit: int | None = None
    ) -> Rows:
        """Return the rows of the repository, and those that wait."""
        waiting = [*uncommitted_writes(self.outer), *self.writes]
        freed = {write.id for write in waiting if isinstance(write, Update) and _frees(write)}
        rows = [
            row
            for task_id, *row in self.outer.find(column, values, ("id", *fields), limit)
            if column != "unique_lock" or task_id not in freed
        ]
        inserts = [write for write in waiting if isinstance(write, Insert)]
        for coded in self.outer.codecs.coded(inserts):
            whole = {**DEFAULTS, **coded.changes}
            if whole.get(column) in values:
                rows.append([whole[name] for name in fields])
        return [tuple(row) for row in rows[:limit]]

    # These show what is stored only.

    def distinct(self, column: Listed, after: str, limit: int) -> Sequence[str]:
        return self.outer.distinct(column, after, limit)

    def ready(
        self, types: Iterable[str], limit: int, owner: str = "", ageing: int = 0
    ) -> Sequence[Stub]:
        return self.outer.ready(types, limit, owner, ageing)

    def due(
        self, before: int | None, limit: int, column: Timed = "run_at"
    ) -> Sequence[tuple[str, int]]:
        return self.outer.due(before, limit, column)

    def ended(self, status: str, before: int, limit: int, after: Any = None) -> Sequence[Ended]:
        return self.outer.ended(status, before, limit, after)

    def list(self, filter: TaskFilter) -> Sequence[Task]:
        return self.outer.list(filter)

    def count(self, filter: TaskFilter) -> int:
        return self.outer.count(filter)

    def notes(self, prefix: str) -> dict[str, Note]:
        return self.outer.notes(prefix)

    def put_notes(self, changes: Sequence[NoteChange]) -> Sequence[bool]:
        return self.outer.put_notes(changes)

    def version(self) -> object:
        return self.outer.version()


def _frees(write: Update) -> bool:
    return write.changes.get("unique_lock", "") is None
