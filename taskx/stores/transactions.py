"""The transactions of callers and executors that a store can take part in."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import attrs

from taskx.tasks.errors import ConfigurationError
from taskx.tasks.timing import DEFAULT_TIMING, Timing
from taskx.tasks.writes import Write

#: A function that is told of writes that were committed.
Then = Callable[[Sequence[Write]], object]

#: Tells if a transaction is open; None if nobody keeps account of that.
Active = Callable[[], bool] | None


def pause(since: float, timing: Timing) -> float:
    """Return the seconds until the next look at transactions, the oldest of which began at ``since``."""
    share = (time.monotonic() - since) / 20
    return min(timing.longest_transaction_every, max(timing.transaction_every, share))


@attrs.define(eq=False, repr=False)
class Stored:
    """Writes in a transaction of a caller.

    ``look_up`` returns those of them that are committed.
    """

    look_up: Callable[[], Sequence[Write]]
    then: Then
    timing: Timing
    writes: Sequence[Write] = ()
    since: float = attrs.field(factory=time.monotonic)
    look_up_at: float = 0.0
    ended_at: float | None = None

    def __attrs_post_init__(self) -> None:
        self.look_up_at = self.since + self.timing.look_up_after

    def end(self) -> None:
        """Note that the transaction has ended, so it is looked up at once."""
        if self.ended_at is None:
            self.ended_at = self.look_up_at = time.monotonic()

    def settled(self) -> bool:
        """Look the writes up if it is time, and tell of them. Return True if that was the last time."""
        if time.monotonic() < self.look_up_at:
            return False
        if done := self.look_up():
            self.then(done)
            return True
        return not self._put_off()

    def _put_off(self) -> bool:
        """Set the time of the next look-up. Return False if no further one is needed."""
        now = time.monotonic()
        if self.ended_at is None:
            self.look_up_at = now + min(self.timing.longest_look_up_every, now - self.since)
            return True
        self.look_up_at = now + max(self.timing.transaction_every, now - self.ended_at)
        return now < self.ended_at + self.timing.commit_within


@attrs.define(eq=False, repr=False)
class Unit:
    """An open transaction with writes of TaskX, which a caller began, or TaskX for an executor.

    Attributes:
        active: tells if the transaction is open; any thread may call it. None if nobody keeps account of
            that, so that it must be found out otherwise.
        thread: the thread that has given it.
        ids: the tasks that it has stored or changed.
        stored: its writes that were not seen committed yet.
        waiting: functions to call after its end, by the objects that wait for it.
    """

    active: Active = None
    thread: int = attrs.field(factory=threading.get_ident)
    ids: set[str] = attrs.field(factory=set)
    stored: list[Stored] = attrs.field(factory=list)
    waiting: dict[int, Callable[[], object]] = attrs.field(factory=dict)

    def may_be_open(self) -> bool:
        """Return False if the transaction has certainly ended. Nothing is read; any thread may call."""
        return self.active is None or self.active()

    def end(self) -> None:
        """Look its writes up soon, as it has ended."""
        for one in list(self.stored):
            one.end()


class Transactions:
    """The transactions of callers and executors that a store takes part in.

    This class is for stores that take part in none. Others make a subclass with :meth:`join`, :meth:`begin`
    and, if calls of a thread may have to wait for its own transaction, the methods about that.

    A thread looks every few milliseconds at the open transactions that have writes of TaskX, as long as
    there are some, and tells of their writes when they are committed. Nothing depends on it: nodes also
    find the tasks by polling.

    Args:
        store: the name of the store's class, for messages.
        timing: says how often the thread looks.

    Attributes:
        known: False if no thread is in a transaction that the store knows of. Then nobody needs to ask.
    """

    def __init__(self, store: str, timing: Timing = DEFAULT_TIMING) -> None:
        self._store = store
        self.timing = timing
        self._inherited: list[object] = []
        self.renew()

    def renew(self) -> None:
        """Start again in a forked child: what is open belongs to the parent, and must not be closed."""
        self._inherited.append(vars(self).get("units"))
        self.known = False
        self.units: list[Unit] = []
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        # Released to wake the thread. An interrupt inside a method of an Event could leave it locked.
        self._bell = threading.Lock()
        self._bell.acquire()

    # --- taking part

    def join(self, connection: object, then: Then | None) -> AbstractContextManager[Any]:
        """Return the repository as it is inside a transaction of the caller, for a ``with`` block.

        All reads and writes inside go over ``connection``. They wait for no lock that another thread may
        hold, and are part of the transaction that is open there, or that this method begins. If the block
        raises, they are undone; a store without savepoints aborts the whole transaction if it has written
        something.

        Some time after the commit ``then`` is called on another thread, with the writes that the records
        still show. It is not called after a rollback, and may never be called if the process ends. It is
        None if the caller of this method sees the commit itself.

        Raises:
            ConfigurationError: the store cannot do this, or the connection is none to this store; nothing
                was changed.
            RepositoryError: the transaction cannot begin.
        """
        hint = "; in a test, use taskx.testing.inline(queue)"
        raise ConfigurationError(
            f"{self._store} cannot take part in a transaction of a {type(connection).__name__}: "
            "use SQLiteRepository(path, prefix='taskx_') on the file of the application, "
            f"or MongoRepository on a replica set{hint if self._store == 'MemoryRepository' else ''}"
        )

    def begin(self) -> AbstractContextManager[Any]:
        """Begin a transaction for an executor, on a connection of its own, for a ``with`` block.

        Its value is the driver's connection, which :meth:`join` accepts. It is committed at the end of
        the block, and rolled back if the block raises. The executor itself cannot commit it.

        Raises:
            ConfigurationError: an application's data cannot be in this store.
            RepositoryError: nothing was committed, unless the error's ``in_doubt`` is True.
        """
        raise ConfigurationError(
            f"{self._store} shares no database with your data, so ctx.transaction() is not "
            "available: use SQLiteRepository(path, prefix='taskx_') on the file of the application, or "
            "MongoRepository on a replica set"
        )

    def current(self, *, submits: bool = False) -> object | None:
        """Return the connection of a transaction that the calling thread has open in this store.

        A queue passes it to :meth:`join`, so that its methods take part in that transaction without
        being told. With ``submits`` the transaction may be one in another database: :meth:`join` then
        stores new tasks after its commit. None: the store knows of no such transaction.

        Raises:
            ConfigurationError: no task may be submitted in that transaction.
        """
        return None

    def tell_others(self, writes: Sequence[Write]) -> None:
        """Tell other processes of writes that were committed without ``apply``."""

    # --- what a thread may do

    def refuse_write(self) -> None:
        """Raise ``ConfigurationError`` if this thread is in a transaction for which a write would wait."""

    def refuse_wait(self) -> None:
        """Raise ``ConfigurationError`` if others cannot write as long as this thread waits.

        Its own transaction holds the only write lock of the store, or may hold it.
        """

    def blocking(self) -> AbstractContextManager[None]:
        """Say for a ``with`` block that this thread waits for others.

        If its own transaction holds the only write lock of the store, the others' writes fail at once
        instead of waiting for it.
        """
        return nullcontext()

    def inside(self) -> bool:
        """Return True if the calling thread is in one of the transactions."""
        me = threading.get_ident()
        return any(unit.thread == me and self.is_open(unit) for unit in list(self.units))

    def changed(self, task_id: str) -> bool:
        """Return True if the calling thread has stored or changed a task in a transaction that is open.

        The task cannot go on before the commit, so the thread must not wait for it.
        """
        me = threading.get_ident()
        return any(
            unit.thread == me and task_id in unit.ids and self.is_open(unit)
            for unit in list(self.units)
        )

    def postpone(self, task_id: str, key: int, call: Callable[[], object]) -> bool:
        """Call a function after the end of the transaction, of any thread, that has changed a task.

        A second call with the same key replaces the first. Return False if there is no such transaction.
        """
        me = threading.get_ident()
        for unit in list(self.units):
            # To other threads it may look ended a little before its commit can be seen.
            if task_id in unit.ids and (unit.thread != me or self.is_open(unit)):
                unit.waiting[key] = call
                if unit in self.units:
                    return True
                unit.waiting.pop(key, None)  # it has just ended
        return False

    def is_open(self, unit: Unit) -> bool:
        """Return True if a transaction is open, as far as anybody can know without its connection."""
        if unit.active is not None or not unit.may_be_open():
            return unit.may_be_open()
        return not any(one.look_up() for one in list(unit.stored))

    # --- the transactions

    def watch(self, unit: Unit, stored: Stored | None = None) -> None:
        """Watch a transaction until its end. Writes that are ``stored`` in it are then told of."""
        if stored is not None:
            unit.stored.append(stored)
        with self._lock:
            self.known = True  # inside: the thread clears it there when nothing is left
            # First the thread: an interrupt must not leave a transaction that nobody watches.
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="taskx-commits", daemon=True)
                with suppress(RuntimeError):  # no thread can be started: polling finds the tasks
                    thread.start()
                    self._thread = thread
            if unit not in self.units:
                self.units.append(unit)
        with suppress(RuntimeError):  # it was released already
            self._bell.release()

    def forget(self, unit: Unit) -> None:
        """Forget a transaction that has ended, and call those that wait for its end."""
        with self._lock, suppress(ValueError):
            self.units.remove(unit)
        while unit.waiting:
            with suppress(KeyError):  # it has just been taken back
                unit.waiting.popitem()[1]()

    def close(self) -> None:
        """Forget all transactions, and wait until the thread has ended: it may use the store until then."""
        for unit in list(self.units):
            self.forget(unit)
        with suppress(RuntimeError):  # it was released already
            self._bell.release()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(self.timing.close_within)

    def look(self) -> bool:
        """Look at each transaction, and tell of what is committed. Return True if some are left."""
        for unit in list(self.units):
            if not (is_open := unit.may_be_open()):
                unit.end()
            for one in list(unit.stored):
                if one.settled():
                    with suppress(ValueError):  # it was found to be rolled back in the meantime
                        unit.stored.remove(one)
            if not (unit.stored or (is_open and unit.active)):
                self.forget(unit)
        return bool(self.units)

    def _run(self) -> None:
        while True:
            more = self.look()
            with self._lock:
                if not (more or self.units):
                    self._thread, self.known = None, False
                    return
            since = [one.since for unit in list(self.units) for one in list(unit.stored)]
            if since:
                time.sleep(pause(min(since), self.timing))
            else:
                self._bell.acquire(timeout=self.timing.idle_transactions_every)
