"""The repository of a queue for tests: tasks in memory, also those of a caller's transaction."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import attrs

from taskx.attempt.runner import inside_executor
from taskx.stores.memory import MemoryRepository
from taskx.stores.sqlite.joining import begin, driver_connection, in_transaction
from taskx.stores.transactions import Then, Transactions, Unit
from taskx.tasks.clock import Clock
from taskx.tasks.codec import Codecs
from taskx.tasks.errors import ConfigurationError
from taskx.tasks.writes import Write


class DrivenRepository(MemoryRepository):
    """Tasks in memory. Those that are submitted with ``connection=`` are stored when it commits."""

    def __init__(self, clock: Clock, codecs: Codecs | None = None) -> None:
        super().__init__(clock)
        self.codecs = codecs or self.codecs
        self.transactions = self.joined = JoinedTransactions(self)

    def snapshot(self) -> _Snapshot:
        """Return a copy of what is stored now."""
        return _Snapshot(self)


class _Snapshot(MemoryRepository):
    """The tasks as a transaction sees them.

    Attributes:
        applied: the writes so far whose guards held.
    """

    def __init__(self, store: MemoryRepository) -> None:
        super().__init__(store.clock)
        self.codecs = store.codecs
        self._sequence, self._notes = store._sequence, dict(store._notes)
        for task_id, row in store._rows.items():
            self._put(task_id, dict(row))
        self._changed.clear()
        self.applied: list[Write] = []

    def apply(self, writes: Sequence[Write], *, all_or_nothing: bool = False) -> Sequence[bool]:
        held = super().apply(writes, all_or_nothing=all_or_nothing)
        if all(held) or not all_or_nothing:
            self.applied += [write for write, is_held in zip(writes, held, strict=True) if is_held]
        return held


@attrs.define(eq=False, repr=False)
class _Joined(Unit):
    """A transaction of a test on a connection. It is told of each statement there.

    Attributes:
        calls: the writes of each call inside it, and the function to call after the commit.
        committed: True after a commit, False after a rollback, None if there was neither.
    """

    connection: sqlite3.Connection = attrs.field(kw_only=True)
    calls: list[tuple[Sequence[Write], Then | None]] = attrs.field(factory=list)
    committed: bool | None = None
    _over: bool = False
    _marks: dict[str, int] = attrs.field(factory=dict)

    def may_be_open(self) -> bool:
        return not self._over and in_transaction(self.connection)

    def hear(self, statement: str) -> None:
        """Note a statement that SQLite is about to execute."""
        if self._over:
            return
        verb, *rest = statement.upper().rstrip("; ").split() or [""]
        if verb == "SAVEPOINT":
            self._marks[rest[-1]] = len(self.calls)
        elif verb == "ROLLBACK" and "TO" in rest:
            del self.calls[self._marks.get(rest[-1], 0) :]
        elif verb in (
            "COMMIT",
            "END",
            "RELEASE",
        ):  # to release the outermost savepoint is to commit
            self.committed = True
        elif verb == "ROLLBACK":
            self.committed = False
        elif verb == "BEGIN" and self.committed is not None:
            self._over = True  # this is the next transaction


class JoinedTransactions(Transactions):
    """The transactions of a test's connections, which may be open on any database.

    Nobody watches them: :meth:`settle` stores what was committed since the last call. All calls of a queue
    begin with it.
    """

    def __init__(self, store: DrivenRepository) -> None:
        super().__init__(type(store).__name__, store.timing)
        self._memory = store

    def settle(self) -> bool:
        """Store the tasks of transactions that were committed. Return True if there were some."""
        settled = False
        for unit in [unit for unit in list(self.units) if isinstance(unit, _Joined)]:
            if unit.may_be_open():
                continue
            with suppress(sqlite3.Error):  # it was closed, or is another thread's
                unit.connection.set_trace_callback(None)
            self.units.remove(unit)  # first: what follows may come here again
            for writes, then in unit.calls if unit.committed else ():
                self._memory.apply(writes)
                if then is not None:
                    then(writes)
                settled = True
            self.forget(unit)
        self.known = bool(self.units)
        return settled

    @contextmanager
    def join(self, connection: object, then: Then | None) -> Iterator[MemoryRepository]:
        self.settle()
        driver, _ = driver_connection(connection)
        began = begin(driver)
        try:
            unit = self._unit(driver)
            inside = self._memory.snapshot()
            for writes, _ in unit.calls:
                inside.apply(writes)
            inside.applied.clear()
            yield inside
        except BaseException:
            if began:
                driver.rollback()
            raise
        if inside.applied:
            unit.ids.update(write.id for write in inside.applied)
            unit.calls.append((inside.applied, then))
        elif began:
            driver.commit()  # as it is in production, where it would keep the write lock for nothing

    def _unit(self, connection: sqlite3.Connection) -> _Joined:
        """Return the open transaction of a connection."""
        for unit in self.units:
            if isinstance(unit, _Joined) and unit.connection is connection:
                return unit
        made = _Joined(connection=connection)
        connection.set_trace_callback(made.hear)
        self.units.append(made)
        self.known = True
        return made

    # --- each of these asks for the present state

    def current(self, *, submits: bool = False) -> object | None:
        self.settle()
        return None

    def changed(self, task_id: str) -> bool:
        self.settle()
        return super().changed(task_id)

    def postpone(self, task_id: str, key: int, call: Callable[[], object]) -> bool:
        self.settle()
        return super().postpone(task_id, key, call)

    def refuse_write(self) -> None:
        self.settle()
        if self.inside() and not inside_executor():
            raise ConfigurationError(
                "this thread is in a transaction of its own that has tasks of this queue, and in "
                "production it would wait for itself; nothing was stored. Pass connection=..., or commit "
                "first"
            )
