"""Batches: new tasks that become visible together, on a server without transactions.

A batch is also used after the server refused a transaction, because the refusal does not name the task
that caused it.

1. The tasks are stored hidden: each document names its batch.
2. One small document records that the batch is committed. This single write is the moment of the commit.
3. The tasks are revealed: the name of the batch is removed from each. Any process that meets hidden
   tasks of a committed batch can do this.

If the submitter dies before step 2, another process abandons the batch with the same kind of document. So
the first of commit and abandon decides.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from pymongo.errors import DuplicateKeyError

from taskx.stores.mongo.connection import Connection
from taskx.stores.mongo.documents import batch_of
from taskx.stores.mongo.filters import HIDDEN
from taskx.tasks.errors import ConfigurationError, RepositoryError, RepositoryUnavailable
from taskx.tasks.ids import new_id
from taskx.tasks.log import log
from taskx.tasks.writes import Insert, Write


class Batches:
    """Stores batches of tasks, and finishes or removes those that another process left incomplete.

    A batch that stays hidden for more than ``patience`` seconds counts as left incomplete.
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
        self._next_recovery = float("-inf")

    # --- storing

    def insert(
        self, writes: Sequence[Write], store: Callable[[Sequence[Write], str], list[bool]]
    ) -> list[bool]:
        """Store new tasks, all or none, by ``store(writes, batch)``; return for each if its id was free."""
        if not all(isinstance(write, Insert) for write in writes):
            raise ConfigurationError(
                "MongoRepository supports `all_or_nothing` for new tasks only; "
                "apply other writes without it"
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
            log.debug(
                "cannot remove the tasks of batch %s now, they are removed later: %s", batch, error
            )

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
            raise RepositoryUnavailable(
                f"batch {batch} took too long to store and was abandoned; try again"
            )
        try:
            self._connection.run(lambda: self._reveal(batch))
        except RepositoryError as error:
            log.debug("batch %s is committed, but its tasks are revealed later: %s", batch, error)

    def _decide(self, batch: str, committed: bool) -> bool:
        """Commit or abandon a batch; return True if this is the decision, whoever made it."""
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

    # --- batches of other processes

    def reveal_committed(self, batches: Sequence[str]) -> set[str]:
        """Reveal those of some hidden batches that were committed; return their ids."""
        if not batches:
            return set()
        wanted: dict[str, Any] = {"_id": {"$in": list(batches)}, "committed": True}
        found = {document["_id"] for document in self._connection.batches.find(wanted)}
        for batch in found:
            self._reveal(batch)
        return found

    def make_way(self, task_ids: Sequence[str], force: bool) -> set[str]:
        """Return those of some taken ids that may be free now or soon.

        A batch that is not committed holds such an id: it is under way, or was left incomplete. With
        ``force`` these batches are abandoned.
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
        """Return the ids of the batches that have hidden tasks."""
        found: list[str] = self._connection.tasks.distinct("taskx.batch", HIDDEN)
        return found

    def recover_if_due(self) -> None:
        """Call :meth:`recover` if the last call was a sixth of ``patience`` ago."""
        now = self._monotonic()
        if now >= self._next_recovery:
            self._next_recovery = now + self._patience / 6
            self.recover()

    def recover(self) -> None:
        """Reveal committed batches, and abandon those that stay hidden for too long.

        The time is measured by this process, from the moment it first saw the batch.
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
            log.warning("removed the tasks of batch %s: it was never committed", batch)
