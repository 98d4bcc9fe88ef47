"""Group commit: the writes of many threads in few transactions, without a writer thread.

If the ledger is free and no writes wait, a thread applies its writes itself: one small transaction, and no
hand-over between threads. Otherwise its writes join the waiting entries. The thread that gets the lock
becomes the leader: it commits all waiting entries, wakes their threads, and calls the first thread that has
come in the meantime.

The exception of a signal handler may strike a leader between any two lines. So the leader does one
step at a time, in an order that lets its successor continue. An entry stays in the queue until it
has an outcome, and joins the untold entries before it leaves the queue. Writes that were sent to the
repository and have no outcome yet are read back first. A thread that is struck while it applies its own
writes alone puts them into the queue for that.

Where an application's transaction may lock a record for long, the repository says so soon. The entries of
the batch are then committed one by one. Those that are locked are tried again later: by their threads, or
by a later leader if no thread waits for them.

What follows from writes is done after the lock is free, by the subclass in :mod:`taskx.node.moving`.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import compress
from typing import Generic, TypeVar

from taskx.stores import queries
from taskx.stores.base import Locked, Reentered, Repository
from taskx.stores.patience import longer, patiently, try_again, varied
from taskx.tasks.bell import Agenda, Signal
from taskx.tasks.errors import RepositoryError, RepositoryUnavailable, TaskxError, on_main_thread
from taskx.tasks.log import GuardedLogger, is_for_the_program
from taskx.tasks.model import Task
from taskx.tasks.timing import Timing
from taskx.tasks.writes import Write

#: How an attempt ended, for the code that acts on its outcome.
OutcomeT = TypeVar("OutcomeT")

# The locked entries of a batch after which the rest of it is tried later: perhaps the table is locked.
_MOST_LOCKED = 5


class _Entry(Generic[OutcomeT]):
    """Writes that wait, and their results.

    Attributes:
        outcome: the outcome that they store; None if a thread waits for them.
        turn: wakes the waiting thread, if there is one: the entry has its outcome, or the thread must lead.
        deserted: True if the thread that waited for the entry was interrupted.
        known: the writes, by ``id``, that turned out to be stored when they were read back after an
            interrupt.
        locked: why the entry was put off.
        not_before: the monotonic time until which it is put off.
        pause: the next pause in seconds; 0 if it was not put off yet.
    """

    turn: Signal | None = None
    done = told = deserted = False
    known: Collection[int] = ()
    locked: Locked | None = None
    not_before = pause = 0.0
    results: Sequence[bool] = ()
    error: BaseException | None = None

    def __init__(self, writes: Sequence[Write], outcome: OutcomeT | None) -> None:
        self.writes = writes
        self.outcome = outcome


class Ledger(ABC, Generic[OutcomeT]):
    """A queue's group commit: all moves of the queue go through the ledger.

    When the main thread has committed outcomes of other threads, it leaves what follows from them to the
    housekeeper, if there is one.
    """

    def __init__(
        self, repository: Repository, log: GuardedLogger, agenda: Agenda, timing: Timing
    ) -> None:
        self._repository = repository
        self._target = repository.liveness.applies
        self._log = log
        self._timing = timing
        self._agenda = agenda
        # A lock that knows its owner, so that a thread that already holds it does not wait for itself.
        self._leading = threading.RLock()
        # Only the leader removes entries, and only when their outcome is known.
        self._waiting: list[_Entry[OutcomeT]] = []
        # The entries sent to the repository, until the outcome of all of them is known.
        self._sent: Sequence[_Entry[OutcomeT]] = ()
        self._untold: deque[_Entry[OutcomeT]] = deque()
        self._put_off = False  # True once an entry was put off
        self._first: _Entry[OutcomeT] | None = None  # the one that waited first at a late flush

    @abstractmethod
    def follow(self, writes: Iterable[Write], tasks: Mapping[str, Task] | None) -> None:
        """Do what follows from writes that took place: see :meth:`commit`."""

    @abstractmethod
    def _concluded(
        self,
        outcome: OutcomeT,
        writes: Sequence[Write],
        results: Sequence[bool],
        error: BaseException | None,
    ) -> None:
        """Do what follows from an outcome: it was committed, or refused with ``error``."""

    @property
    def unsettled(self) -> bool:
        """True if :meth:`flush` has something to do."""
        return bool(self._untold) or any(
            entry.outcome is not None or entry.deserted for entry in list(self._waiting)
        )

    @property
    def entered(self) -> bool:
        """True if the calling thread is in the middle of a write, and so cannot commit another write."""
        return self._leading._is_owned() or self._repository.entered  # type: ignore[attr-defined]

    def commit(
        self,
        writes: Sequence[Write],
        tasks: Mapping[str, Task] | None = None,
        *,
        whole: bool = False,
    ) -> Sequence[bool]:
        """Commit moves, together with the waiting ones, and do what follows from those that took place.

        Args:
            writes: the moves.
            tasks: the tasks of the moves as they were read, by id; None if they were not read.
            whole: commit the moves in a transaction of their own: all of them, or none if a guard fails.

        Returns:
            for each move, True if its guard held.

        Raises:
            Reentered: the calling thread is in the middle of another write.
            RepositoryError: no move took place, unless the error is in doubt.
        """
        send = self._commit_whole if whole else self._commit
        try:
            results = send(writes)
        except Locked as error:
            results = try_again(partial(send, writes), error, self._timing)
        if not whole or all(results):
            self.follow(compress(writes, results), tasks)
        return results

    def conclude(self, writes: Sequence[Write], outcome: OutcomeT) -> None:
        """Commit the moves of an outcome now, and do what follows from it on this thread.

        Raises:
            RepositoryUnavailable: no move took place.
        """
        results: Sequence[bool] = ()
        refused: TaskxError | None = None
        try:
            results = patiently(partial(self._commit, writes), self._timing)
        except RepositoryUnavailable:
            raise
        except TaskxError as error:
            refused = error
        self._concluded(outcome, writes, results, refused)

    def _commit(self, writes: Sequence[Write]) -> Sequence[bool]:
        if self._leading._is_owned():  # type: ignore[attr-defined]
            raise Reentered
        leads: list[bool] = []
        entry: _Entry[OutcomeT] | None = None
        try:
            try:
                # Take the lock and note it in one step: an interrupt may come between two steps.
                leads[:] = map(self._leading.acquire, (False,))
                if leads == [True] and not self._waiting:
                    with self._repository.house.without_waiting():
                        return self._target.apply(writes)
                # A leader may wait for a lock of the repository that this thread holds.
                if self._repository.entered:
                    raise Reentered
                entry = _Entry(writes, None)
                self._waiting.append(entry)
                while not entry.done:
                    if leads != [True]:
                        leads[:] = map(self._leading.acquire, (False,))
                    if leads == [True]:
                        self._lead()
                    elif entry.turn is not None:
                        entry.turn.wait(self._timing.follower_every)
                    else:  # from now on a leader wakes this thread, unless it has just looked
                        entry.turn = Signal()
            except TaskxError as error:
                if entry is None:
                    raise
                if entry in self._sent:  # it could not be read back, so its outcome is unknown
                    raise _in_doubt(error) from error.__cause__
                if not entry.done:  # else the error may come from writes after its own
                    self._waiting.remove(entry)  # it was behind other entries and was not tried
                    entry.done = True
                    raise _not_tried(error) from error.__cause__
        except BaseException as error:  # also an interrupt: the next leader handles the entry
            doubtful = isinstance(error, MemoryError) or not isinstance(error, Exception)
            if entry is None and leads == [True] and doubtful:
                entry = _Entry(writes, None)
                # An earlier leader may have been interrupted, too.
                self._sent = (*self._sent, entry)
                self._waiting.append(entry)
            if entry is not None:
                entry.deserted, entry.turn = not entry.done, None
            raise
        finally:
            if leads == [True]:
                self._leading.release()
                if self._waiting:
                    self._call_next()
            if self._untold:
                self._finish()
        if entry.error is not None:
            raise entry.error
        return entry.results

    def _commit_whole(self, writes: Sequence[Write]) -> Sequence[bool]:
        if self.entered:
            raise Reentered
        try:
            with self._leading, self._repository.house.without_waiting():
                return self._repository.apply(writes, all_or_nothing=True)
        finally:
            if self._waiting:
                self._call_next()

    def later(self, writes: Sequence[Write], outcome: OutcomeT) -> None:
        """Queue the moves of an outcome. They are committed together with the next commit or flush."""
        self._waiting.append(_Entry(writes, outcome))

    def flush(self, *, wait: bool = True, patient: bool = False, late: bool = False) -> bool:
        """Commit the queued outcomes; return True if none is left.

        Without ``wait``, it leaves them if another thread is committing. With ``patient``, writes that
        another transaction has locked are tried again for some time. With ``late``, nothing is committed
        unless the first outcome was the first at the last such call, too. Until then, a worker that starts
        tasks may commit it with the starts: two threads that write at once give way to each other at each
        row.

        Raises:
            RepositoryUnavailable: the writes stay in the queue. It is :class:`Locked` if only some of them
                do, and these are put off. Without ``wait`` it is not raised for those.
        """
        if late:
            last, self._first = self._first, None
            with suppress(IndexError):  # nothing waits
                self._first = self._waiting[0]
            if not self._untold and (last is None or last is not self._first):
                return not self.unsettled
        work = partial(self._flush, wait=wait)
        return patiently(work, self._timing) if patient else work()

    def _flush(self, *, wait: bool) -> bool:
        if not self.unsettled:
            return True
        if self.entered:
            return False
        try:
            if wait:
                with self._leading:
                    self._lead()
                for entry in list(self._waiting):
                    if entry.locked is not None:
                        raise entry.locked
            elif self._leading.acquire(blocking=False):  # never on the main thread
                try:
                    self._lead()
                finally:
                    self._leading.release()
            else:
                return False
        finally:
            self._call_next()
            self._finish()
        return not self.unsettled

    def _lead(self, alone: _Entry[OutcomeT] | None = None) -> None:
        """Commit the next batch, and wake the threads that wait for it; or commit the entry ``alone``."""
        batch = list(self._waiting) if alone is None else [alone]
        if self._put_off:
            now = time.monotonic()
            batch = [entry for entry in batch if entry.not_before <= now or entry is alone]
        if len(batch) > self._timing.commit_batch:
            del batch[self._timing.commit_batch :]
        try:
            if self._sent:
                self._read_back()
            self._sent = entries = [entry for entry in batch if not entry.done]
            writes = [w for e in entries for w in e.writes if not e.known or id(w) not in e.known]
            try:
                with self._repository.house.without_waiting():
                    results = iter(self._target.apply(writes) if entries else ())
            except MemoryError:
                raise  # perhaps after the COMMIT
            except Exception:  # nothing was applied, or the error is marked as in doubt
                self._sent = ()
                raise
            for entry in entries:
                if known := entry.known:
                    entry.results = [id(w) in known or next(results) for w in entry.writes]
                else:  # in most entries, one write
                    entry.results = [next(results) for _ in entry.writes]
                entry.done = True
            self._sent = ()
        except (Reentered, MemoryError):
            raise  # not the fault of the writes
        except Exception as error:  # noqa: BLE001  (the waiting threads get it)
            self._failed([entry for entry in batch if not entry.done], error)
        finally:
            if alone is None:
                done = [entry for entry in batch if entry.done]
                self._untold.extend([entry for entry in done if entry.outcome is not None])
                if self._waiting[: len(done)] == done:  # as a rule; others only join behind them
                    del self._waiting[: len(done)]
                else:
                    for entry in done:
                        self._waiting.remove(entry)
                for entry in done:
                    if (turn := entry.turn) is not None:
                        turn.set()

    def _read_back(self) -> None:
        """Read back what an interrupted leader has sent. Writes that were not stored are sent again.

        They are sent as the same objects, so that a repository that has stored a part recognises that part.
        """
        entries = [entry for entry in self._sent if not entry.done]
        writes = [write for entry in entries for write in entry.writes]
        shown = queries.shown(self._repository, writes)
        known = {id(write) for write, is_shown in zip(writes, shown, strict=True) if is_shown}
        for entry in entries:
            entry.known = known.union(entry.known)
            if all(id(write) in entry.known for write in entry.writes):
                entry.results, entry.done = [True] * len(entry.writes), True
        self._sent = ()

    def _failed(self, entries: list[_Entry[OutcomeT]], error: Exception) -> None:
        """Commit entries one by one after a batch failed, so that a bad or locked write fails alone.

        If the repository is away, fail those with a waiting thread. Outcomes and doubtful entries stay in
        the queue.
        """
        if isinstance(error, RepositoryUnavailable) and not isinstance(error, Locked):
            for entry in entries:
                if not (entry.outcome is not None or entry.deserted or entry in self._sent):
                    entry.error, entry.done = error, True
            raise error
        self._sent = ()
        if len(entries) == 1:
            self._reject(entries[0], error)
            return
        locked = 0
        for entry in entries:
            if locked == _MOST_LOCKED:
                self._reject(entry, error)
                continue
            try:
                self._lead(entry)
            except RepositoryUnavailable as unavailable:
                if isinstance(error, RepositoryError) and error.in_doubt:
                    unavailable.in_doubt = True  # the batch may have stored more than is sent again
                self._failed([entry for entry in entries if not entry.done], unavailable)
            problem = entry.error if entry.done else entry.locked
            if isinstance(problem, Locked):
                locked, error = locked + 1, problem

    def _reject(self, entry: _Entry[OutcomeT], error: Exception) -> None:
        if isinstance(error, Locked) and (entry.outcome is not None or entry.deserted):
            pause = entry.pause or self._timing.lock_pause
            self._put_off = True
            entry.locked, entry.not_before = error, time.monotonic() + varied(pause)
            entry.pause = longer(pause, self._timing)
            return
        entry.results = [False] * len(entry.writes)
        entry.error, entry.done = error, True

    # --- after the lock is free

    def _finish(self) -> None:
        """Do what follows from the outcomes that are committed."""
        if self._agenda.attended and on_main_thread():  # where an exception may strike
            if self._untold:
                self._agenda.wake_from_long_sleep()
            return
        self._tell()

    def _call_next(self) -> None:
        """Wake the first waiting thread: the lock is free, and that thread leads next."""
        for entry in list(self._waiting):
            if (turn := entry.turn) is not None:
                turn.set()
                return

    def _tell(self) -> None:
        interrupt: BaseException | None = None
        while self._untold:
            try:
                entry = self._untold.popleft()
            except IndexError:  # another thread does the same
                break
            try:
                if entry.told or entry.outcome is None:
                    continue
                entry.told = True
                if (error := entry.error) is not None:
                    self._log.error("the repository refused a write: %s", error, exc_info=error)
                self._concluded(entry.outcome, entry.writes, entry.results, error)
            except BaseException as failure:  # noqa: BLE001  (the next entry must be told in any case)
                if is_for_the_program(failure):
                    interrupt = failure
                else:
                    self._log.exception("what follows from an outcome failed")
        if interrupt is not None:
            raise interrupt


def _in_doubt(error: TaskxError) -> TaskxError:
    """Return the error for interrupted writes: they may be applied after all."""
    if isinstance(error, RepositoryError):
        error.in_doubt = True
    return error


def _not_tried(error: TaskxError) -> TaskxError:
    """Return the error for writes that were not sent: they are not in doubt."""
    doubtful = isinstance(error, RepositoryError) and error.in_doubt
    return type(error)(*error.args) if doubtful else error
