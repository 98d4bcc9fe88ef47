"""Several new tasks that become visible together, on a server without transactions.

So it is also done where a transaction was refused, as that does not tell which of the tasks it was for. The
tasks are stored hidden. One small document then says that their batch was committed: that one write is
the moment. What is left, to take the mark of the batch off them, anybody can do who meets them. A
batch whose submitter died before is abandoned by such a document, too, so that of commit and abandon
the first decides.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from pymongo.errors import DuplicateKeyError

from taskx.core.errors import ConfigurationError, RepositoryError, RepositoryUnavailable
from taskx.core.ids import new_id
from taskx.core.log import log
from taskx.core.writes import Insert, Write
from taskx.storage.mongo.connection import Connection
from taskx.storage.mongo.documents import batch_of
from taskx.storage.mongo.filters import HIDDEN


class Batches:
    """Stores batches of tasks, and looks after what others left half done.

    A batch that is hidden for more than ``patience`` seconds counts as left behind.
    """

    def __init__(
        self, connection: Connection, patience: float, monotonic: Callable[[], float]
    ) -> None:
        self._monotonic = monotonic
        self._connection = connection
        self._patience = patience
        self.renew()

    def renew(self) -> None:
        self._lock = threading.Lock()
        self._seen: dict[str, float] = {}
        self._next_look = float("-inf")

    # --- storing

    def insert(
        self, writes: Sequence[Write], store: Callable[[Sequence[Write], str], list[bool]]
    ) -> list[bool]:
        """Store new tasks, all or none, by ``store(writes, batch)``; says for each if its id was free."""
        if not all(isinstance(write, Insert) for write in writes):
            raise ConfigurationError(
                "MongoRepository applies all or nothing of new tasks only: it uses no transactions"
            )
        ids = [write.id for write in writes]
        if len(set(ids)) < len(ids):
            return self._refused(ids)
        batch = new_id()
        try:
            results = store(writes, batch)
            if not all(results):
                self._discard(batch)
                return results
        except BaseException:
            self._discard(batch)
            raise
        self._commit(batch)
        return results

    def _refused(self, ids: Sequence[str]) -> list[bool]:
        tasks = self._connection.tasks
        found = self._connection.run(lambda: list(tasks.find({"_id": {"$in": list(ids)}}, {})))
        taken = {document["_id"] for document in found}
        results = []
        for task_id in ids:
            results.append(task_id not in taken)
            taken.add(task_id)
        return results

    def _discard(self, batch: str) -> None:
        try:
            self._connection.run(
                lambda: self._connection.tasks.delete_many({"taskx.batch": batch}), timeout=1.0
            )
        except RepositoryError as error:
            log.debug("the rest of batch %s is left to be cleared away later: %s", batch, error)

    def _commit(self, batch: str) -> None:
        deadline = time.monotonic() + self._connection.timeout
        while True:
            left = max(0.001, deadline - time.monotonic())
            try:
                first = self._connection.run(lambda: self._decide(batch, True), left)
                break
            except RepositoryUnavailable as error:
                error.in_doubt = True
                if time.monotonic() + 0.05 >= deadline:
                    raise
                time.sleep(0.05)
        if not first:
            raise RepositoryUnavailable(f"batch {batch} took too long to store; it was given up")
        try:
            self._connection.run(lambda: self._reveal(batch))
        except RepositoryError as error:
            log.debug("batch %s is committed, and revealed by whoever meets it: %s", batch, error)

    def _decide(self, batch: str, committed: bool) -> bool:
        """Commit or abandon a batch; says whether that is what was decided, by whomever."""
        batches = self._connection.batches
        try:
            batches.insert_one({"_id": batch, "committed": committed})
            return True
        except DuplicateKeyError:
            decided = batches.find_one({"_id": batch})
            return decided is not None and decided["committed"] is committed

    def _reveal(self, batch: str) -> None:
        self._connection.tasks.update_many({"taskx.batch": batch}, {"$unset": {"taskx.batch": ""}})
        self._connection.batches.delete_one({"_id": batch, "committed": True})

    # --- what others left

    def reveal_committed(self, batches: Sequence[str]) -> set[str]:
        """Of batches that are hidden, reveal those that were committed; returns which."""
        if not batches:
            return set()
        wanted: dict[str, Any] = {"_id": {"$in": list(batches)}, "committed": True}
        found = {document["_id"] for document in self._connection.batches.find(wanted)}
        for batch in found:
            self._reveal(batch)
        return found

    def make_way(self, task_ids: Sequence[str], force: bool) -> set[str]:
        """Of ids that were taken, those that may be free now or soon.

        That is what a batch holds that is under way, or was left behind; with ``force`` it is abandoned.
        """
        wanted = {"_id": {"$in": list(task_ids)}}
        documents = self._connection.tasks.find(wanted, {"taskx.batch": 1})
        found = {document["_id"]: batch_of(document) for document in documents}
        batches = {batch for batch in found.values() if batch}
        batches -= self.reveal_committed([*batches])
        for batch in batches if force else ():
            self._abandon(batch)
        return {task_id for task_id in task_ids if found.get(task_id) in {None, *batches}}

    def hidden(self) -> list[str]:
        """The batches that tasks are hidden in."""
        found: list[str] = self._connection.tasks.distinct("taskx.batch", HIDDEN)
        return found

    def look_after_sometimes(self) -> None:
        """Do as :meth:`look_after`, if it is time."""
        now = self._monotonic()
        if now >= self._next_look:
            self._next_look = now + self._patience / 6
            self.look_after()

    def look_after(self) -> None:
        """Reveal what was committed, and clear away what was left behind too long ago.

        Time is this process's own, from when it first saw the batch.
        """
        hidden = self._connection.run(self.hidden)
        now = self._monotonic()
        with self._lock:
            self._seen = {batch: self._seen.get(batch, now) for batch in hidden}
            old = [batch for batch, since in self._seen.items() if now - since >= self._patience]
        self._connection.run(lambda: self.reveal_committed(hidden))
        for batch in old:
            self._connection.run(partial(self._abandon, batch))

    def _abandon(self, batch: str) -> None:
        if self._decide(batch, False):
            self._connection.tasks.delete_many({"taskx.batch": batch})
            log.warning("the rest of batch %s was cleared away: it was never committed", batch)
