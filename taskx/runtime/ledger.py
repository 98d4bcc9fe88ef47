"""Group commit: many threads' writes in few transactions, without a writer thread.

Whoever finds the ledger free leads: it commits everything that waits, the others' writes included,
and a follower that gets the lock next finds its own done. Alone, that is one small transaction and no
hand-over between threads; under load, many writers share one.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

from taskx.core.errors import RepositoryUnavailable, TaskxError
from taskx.core.log import GuardedLogger
from taskx.core.writes import Write
from taskx.storage.base import Repository

#: Is told for each write whether its guard held; and what the repository refused them for, if it did.
Callback = Callable[[Sequence[bool], BaseException | None], None]

#: Most entries of one transaction, so that a long queue of them does not become one long lock.
MAX_BATCH = 256


class _Entry:
    """Writes that wait, and what became of them."""

    __slots__ = ("callback", "done", "error", "in_doubt", "results", "writes")

    def __init__(self, writes: Sequence[Write], callback: Callback | None) -> None:
        self.writes = writes
        self.callback = callback
        self.done = False
        self.in_doubt = False
        self.results: Sequence[bool] = ()
        self.error: BaseException | None = None


class Ledger:
    """All of a queue's writes go through one of these.

    Args:
        repository: what they are applied to.
        log: where a failing callback is reported.
    """

    def __init__(self, repository: Repository, log: GuardedLogger) -> None:
        self._repository = repository
        self._log = log
        self._leading = threading.Lock()
        # Only the leader removes from it; a write leaves it when its outcome is known, not before.
        self._waiting: deque[_Entry] = deque()

    def __bool__(self) -> bool:
        """Whether writes wait that no thread waits for, which would be about to commit them."""
        return any(e.callback is not None or e.in_doubt for e in list(self._waiting))

    def commit(self, writes: Sequence[Write]) -> Sequence[bool]:
        """Commit writes, together with what waits; says for each whether its guard held.

        Raises:
            RepositoryError: none of them was applied.
        """
        entry = _Entry(writes, None)
        self._waiting.append(entry)
        concluded: list[_Entry] = []
        try:
            with self._leading:
                try:
                    while not entry.done:
                        self._lead(concluded)
                except TaskxError:
                    if not (entry.done or entry.in_doubt):
                        self._waiting.remove(entry)  # it lay behind others and was not tried
                        entry.done = True
                    raise
        except BaseException:
            entry.in_doubt = not entry.done  # an interrupt: whoever leads next sees to it
            raise
        finally:
            self._call_back(concluded)
        if entry.error is not None:
            raise entry.error
        return entry.results

    def commit_whole(self, writes: Sequence[Write]) -> Sequence[bool]:
        """Commit writes in a transaction of their own: all of them, or none where a guard fails.

        Raises:
            RepositoryError: none of them was applied.
        """
        with self._leading:
            return self._repository.apply(writes, all_or_nothing=True)

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
        if not self._leading.acquire(blocking=wait):
            return False
        concluded: list[_Entry] = []
        try:
            if self:
                self._lead(concluded)
        finally:
            self._leading.release()
            self._call_back(concluded)
        return True

    def _lead(self, concluded: list[_Entry]) -> None:
        """Commit one batch; adds to ``concluded`` what has an outcome now."""
        batch = [self._waiting[i] for i in range(min(len(self._waiting), MAX_BATCH))]
        try:
            self._commit_batch(batch)
        except TaskxError:
            raise  # what has no outcome was not applied, and waits on
        except BaseException:
            # An interrupt or worse, perhaps after the COMMIT: the next leader reads back.
            for entry in batch:
                entry.in_doubt = not entry.done
            raise
        finally:
            for entry in batch:
                if entry.done:
                    self._waiting.remove(entry)
                    concluded.append(entry)

    def _commit_batch(self, batch: list[_Entry]) -> None:
        try:
            for entry in batch:
                if entry.in_doubt:
                    self._read_back(entry)
            self._apply([entry for entry in batch if not entry.done])
        except RepositoryUnavailable as error:
            self._fail(batch, error)
        except MemoryError:
            raise  # no fault of the writes, and perhaps after the COMMIT
        except Exception as error:  # noqa: BLE001  (told to whoever waits for it)
            self._replay([entry for entry in batch if not entry.done], error)

    def _read_back(self, entry: _Entry) -> None:
        results = self._repository.settle(entry.writes)
        entry.in_doubt = False
        if any(results):
            entry.results, entry.done = results, True

    def _apply(self, entries: list[_Entry]) -> None:
        if not entries:
            return
        results = self._repository.apply([write for entry in entries for write in entry.writes])
        position = 0
        for entry in entries:
            end = position + len(entry.writes)
            entry.results, entry.done = results[position:end], True
            position = end

    def _replay(self, entries: list[_Entry], error: Exception) -> None:
        """Commit one by one after a batch failed, so that a bad write fails alone."""
        if len(entries) == 1:
            self._reject(entries[0], error)
            return
        for entry in entries:
            try:
                self._apply([entry])
            except RepositoryUnavailable as unavailable:
                self._fail(entries, unavailable)
            except MemoryError:
                raise
            except Exception as problem:  # noqa: BLE001  (told to whoever waits for it)
                self._reject(entry, problem)

    def _fail(self, entries: list[_Entry], error: RepositoryUnavailable) -> None:
        """Tell those who wait; what was deferred, and what is in doubt, waits on."""
        for entry in entries:
            if entry.callback is None and not entry.in_doubt and not entry.done:
                entry.error, entry.done = error, True
        raise error

    def _reject(self, entry: _Entry, error: Exception) -> None:
        entry.error, entry.done = error, True
        entry.results = [False] * len(entry.writes)
        if entry.callback is not None:
            self._log.error("a write was refused by the repository: %s", error, exc_info=error)

    def _call_back(self, entries: list[_Entry]) -> None:
        for entry in entries:
            try:
                if entry.callback is not None:
                    entry.callback(entry.results, entry.error)
            except Exception:  # noqa: BLE001  (one must not keep the next from being called)
                self._log.exception("what follows a commit failed")
