"""Group commit: many threads' writes in few transactions, without a writer thread.

The thread that finds the ledger free, and nothing waiting, applies its writes: one small transaction
and no hand-over between threads. Otherwise its writes join those that wait, and whoever gets the lock
leads: it commits all of them, wakes their threads, and calls the first of those that came meanwhile.

The exception of a signal handler may strike a leader between any two lines. So the leader does one
thing at a time, each in an order that lets its successor go on from there: an entry stays in line until
it has an outcome, and is put among those to be told before it leaves the line. What was sent to the
repository and has no outcome yet is read back first; a thread that was struck while it applied its own
writes alone puts them in line for that.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress

from taskx.common.bell import Agenda, Signal
from taskx.core.errors import RepositoryError, RepositoryUnavailable, TaskxError, on_main_thread
from taskx.core.log import GuardedLogger, is_for_the_program
from taskx.core.writes import Write
from taskx.storage import queries
from taskx.storage.base import Reentered, Repository

#: Is told for each write whether its guard held; and what the repository refused them for, if it did.
Callback = Callable[[Sequence[bool], BaseException | None], None]

#: Most entries of one transaction, so that a long queue of them does not become one long lock.
MAX_BATCH = 256
# Seconds after which a follower looks by itself: an interrupt may have struck who was to call it.
_CHECK_EVERY = 0.05


class _Entry:
    """Writes that wait, and what became of them."""

    __slots__ = (
        "callback",
        "deserted",
        "done",
        "error",
        "known",
        "results",
        "told",
        "turn",
        "writes",
    )

    def __init__(self, writes: Sequence[Write], callback: Callback | None) -> None:
        self.writes = writes
        self.callback = callback
        #: Wakes the thread that waits, if one does: there is an outcome, or it is to lead.
        self.turn: Signal | None = None
        self.done = False
        self.told = False
        #: Whether the thread that waited for it was interrupted.
        self.deserted = False
        #: The writes, by ``id``, that were read back after an interrupt and have taken place.
        self.known: Collection[int] = ()
        self.results: Sequence[bool] = ()
        self.error: BaseException | None = None


class Ledger:
    """A queue's group commit: all of its writes go through here.

    The main thread leaves the callbacks of what it has committed for others to the housekeeper, if the
    agenda has one.
    """

    def __init__(self, repository: Repository, log: GuardedLogger, agenda: Agenda) -> None:
        self._repository = repository
        self._target = repository.liveness.applies
        self._log = log
        self._agenda = agenda
        # It knows its owner, so that a thread that is inside already does not wait for itself.
        self._leading = threading.RLock()
        # Only the leader removes from it; a write leaves it when its outcome is known, not before.
        self._waiting: deque[_Entry] = deque()
        # Entries given to the repository, until the outcome of all of it is known.
        self._sent: Sequence[_Entry] = ()
        self._untold: deque[_Entry] = deque()
        # The last entry that was taken in from inside; the thread commits it before it goes on.
        self._late: _Entry | None = None

    def __bool__(self) -> bool:
        """Return True if :meth:`flush` has something to do."""
        return bool(self._untold) or any(
            entry.callback is not None or entry.deserted for entry in list(self._waiting)
        )

    @property
    def entered(self) -> bool:
        """True if the calling thread is in the middle of a write, and so cannot commit another one."""
        return self._leading._is_owned() or self._repository.entered  # type: ignore[attr-defined]

    def commit(self, writes: Sequence[Write]) -> Sequence[bool]:
        """Commit writes, together with what waits; says for each whether its guard held.

        Raises:
            Reentered: the calling thread is in the middle of another write; see :meth:`commit_soon`.
            RepositoryError: none of them was applied.
        """
        # A leader may wait for what this thread holds of the repository.
        if self._leading._is_owned() or self._repository.entered:  # type: ignore[attr-defined]
            raise Reentered
        alone: list[bool] = []
        try:
            if not self._waiting:
                # The lock and the note of it in one step: an interrupt may come between any two.
                alone.extend(map(self._leading.acquire, (False,)))
                if alone == [True] and not self._waiting:
                    return self._target.apply(writes)
        except BaseException as error:
            doubtful = isinstance(error, MemoryError) or not isinstance(error, Exception)
            if alone == [True] and doubtful:
                self._leave_to_successor(writes)
            raise
        finally:
            if alone == [True]:
                self._leading.release()
                if self._waiting:
                    self._call_next()
            if self._untold or self._late is not None:
                self._finish()
        return self._commit_with_others(writes)

    def _leave_to_successor(self, writes: Sequence[Write]) -> None:
        """Put writes in line that an interrupt struck: perhaps they were committed."""
        entry = _Entry(writes, None)
        entry.deserted = True
        self._sent = (entry,)
        self._waiting.append(entry)

    def _commit_with_others(self, writes: Sequence[Write]) -> Sequence[bool]:
        entry = _Entry(writes, None)
        entry.turn = Signal()
        try:
            self._waiting.append(entry)
            while not self._lead_until_done(entry):
                entry.turn.wait(_CHECK_EVERY)
        except BaseException:  # an interrupt, too: whoever leads next sees to the entry
            entry.deserted, entry.turn = not entry.done, None
            raise
        finally:
            if self._untold or self._late is not None:
                self._finish()
        if entry.error is not None:
            raise entry.error
        return entry.results

    def _lead_until_done(self, entry: _Entry) -> bool:
        """Lead if nobody else does; returns whether an entry has its outcome."""
        leads: list[bool] = []
        try:
            if not entry.done:
                leads.extend(map(self._leading.acquire, (False,)))
                while leads == [True] and not entry.done:
                    self._lead()
        except TaskxError as error:
            if entry in self._sent:  # whether it took place could not be read back
                raise _in_doubt(error) from error.__cause__
            if not entry.done:  # else the error may be that of writes after its own
                self._waiting.remove(entry)  # it lay behind others and was not tried
                entry.done = True
                raise _not_tried(error) from error.__cause__
        finally:
            if leads == [True]:
                self._leading.release()
                if self._waiting:
                    self._call_next()
        return entry.done

    def commit_whole(self, writes: Sequence[Write]) -> Sequence[bool]:
        """Commit writes in a transaction of their own: all of them, or none where a guard fails.

        Raises:
            Reentered: the calling thread is in the middle of another write; see :meth:`commit_soon`.
            RepositoryError: none of them was applied.
        """
        if self.entered:
            raise Reentered
        try:
            with self._leading:
                return self._repository.apply(writes, all_or_nothing=True)
        finally:
            if self._waiting:
                self._call_next()
            if self._late is not None:
                self._finish()

    def commit_soon(self, writes: Sequence[Write], callback: Callback) -> None:
        """Take in writes of a thread that is :attr:`entered`.

        They are committed before the write that the thread is in the middle of returns; if that is
        not one of the ledger's, by another thread as soon as it has ended.
        """
        entry = _Entry(writes, callback)
        self._waiting.append(entry)
        self._late = entry
        if not self._leading._is_owned():  # type: ignore[attr-defined]
            threading.Thread(target=self._finish, name="taskx-late", daemon=True).start()

    def defer(self, writes: Sequence[Write], callback: Callback) -> None:
        """Leave writes to the next commit; ``callback`` is told what came of them."""
        self._waiting.append(_Entry(writes, callback))

    def flush(self, *, wait: bool = True) -> bool:
        """Commit what was deferred; without ``wait``, False if another thread is committing.

        Raises:
            RepositoryUnavailable: it waits on.
        """
        if not self:
            return True
        if self.entered:
            return False
        try:
            if wait:
                with self._leading:
                    self._lead()
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
        return True

    def _lead(self) -> None:
        """Commit one batch."""
        batch = [self._waiting[i] for i in range(min(len(self._waiting), MAX_BATCH))]
        try:
            if self._sent:
                self._read_back()
            self._send([entry for entry in batch if not entry.done])
        except (Reentered, MemoryError):
            raise  # no fault of the writes
        except RepositoryUnavailable as error:
            self._fail(batch, error)
        except Exception as error:  # noqa: BLE001  (told to whoever waits for it)
            self._replay([entry for entry in batch if not entry.done], error)
        finally:
            for entry in batch:
                if entry.done:
                    if entry.callback is not None:
                        self._untold.append(entry)
                    self._waiting.remove(entry)
                    if (turn := entry.turn) is not None:
                        turn.set()

    def _read_back(self) -> None:
        """Read back what a leader sent that was interrupted; what does not show is sent again.

        As the same objects: a repository that may have done a part of them knows that part again.
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

    def _send(self, entries: list[_Entry]) -> None:
        if not entries:
            return
        self._sent = entries
        try:
            results = iter(
                self._target.apply(
                    [w for entry in entries for w in entry.writes if id(w) not in entry.known]
                )
            )
        except MemoryError:
            raise  # perhaps after the COMMIT
        except Exception:  # nothing was applied, or the error says that it is in doubt
            self._sent = ()
            raise
        for entry in entries:
            entry.results = [id(write) in entry.known or next(results) for write in entry.writes]
            entry.done = True
        self._sent = ()

    def _replay(self, entries: list[_Entry], error: Exception) -> None:
        """Commit one by one after a batch failed, so that a bad write fails alone."""
        if len(entries) == 1:
            self._reject(entries[0], error)
            return
        for entry in entries:
            try:
                self._send([entry])
            except RepositoryUnavailable as unavailable:
                if isinstance(error, RepositoryError) and error.in_doubt:
                    unavailable.in_doubt = True  # the batch may have stored what is not sent again
                self._fail(entries, unavailable)
            except MemoryError:
                raise
            except Exception as problem:  # noqa: BLE001  (told to whoever waits for it)
                self._reject(entry, problem)

    def _fail(self, entries: list[_Entry], error: RepositoryUnavailable) -> None:
        """Tell those who wait; what was deferred, and what is in doubt, waits on."""
        for entry in entries:
            kept = entry.callback is not None or entry.deserted or entry in self._sent
            if not (kept or entry.done):
                entry.error, entry.done = error, True
        raise error

    def _reject(self, entry: _Entry, error: Exception) -> None:
        entry.results = [False] * len(entry.writes)
        entry.error, entry.done = error, True

    # --- after the lock is free

    def _finish(self) -> None:
        """Commit what was taken in from inside, and tell what has an outcome."""
        while (late := self._late) is not None:
            self._late = None
            with suppress(TaskxError), self._leading:  # what fails waits on
                while not late.done:
                    self._lead()
            self._call_next()
        if self._agenda.attended and on_main_thread():  # where an exception may strike
            if self._untold:
                self._agenda.wake_from_long_sleep()
            return
        self._tell()

    def _call_next(self) -> None:
        """Wake the first thread that waits: the lock is free, and it leads next."""
        for entry in list(self._waiting):
            if (turn := entry.turn) is not None:
                turn.set()
                return

    def _tell(self) -> None:
        interrupt: BaseException | None = None
        while self._untold:
            try:
                entry = self._untold.popleft()
            except IndexError:  # another thread is at it, too
                break
            try:
                self._tell_one(entry)
            except BaseException as error:  # noqa: BLE001  (one must not keep the next from being told)
                if is_for_the_program(error):
                    interrupt = error
                else:
                    self._log.exception("what follows a commit failed")
        if interrupt is not None:
            raise interrupt

    def _tell_one(self, entry: _Entry) -> None:
        if entry.told or entry.callback is None:
            return
        entry.told = True
        if entry.error is not None:
            self._log.error(
                "a write was refused by the repository: %s", entry.error, exc_info=entry.error
            )
        entry.callback(entry.results, entry.error)


def _in_doubt(error: TaskxError) -> TaskxError:
    """Return an error as that of writes which an interrupt struck: they may be applied yet."""
    if isinstance(error, RepositoryError):
        error.in_doubt = True
    return error


def _not_tried(error: TaskxError) -> TaskxError:
    """Return an error as that of writes which were not sent: they are not in doubt."""
    doubtful = isinstance(error, RepositoryError) and error.in_doubt
    return type(error)(*error.args) if doubtful else error
