"""Tasks of one concurrency key: who has the turn, and who is next.

A task with a key waits in line until the turn of its key is given to it, and keeps it until it has ended:
through retries, too. That two never have it, the repository sees to; so any number of processes may give it
to the next one at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from taskx.core import lifecycle
from taskx.core.errors import RepositoryError
from taskx.core.log import GuardedLogger
from taskx.core.model import Task
from taskx.core.record import FOR_TURN
from taskx.core.writes import Insert, Update
from taskx.runtime.ledger import Ledger
from taskx.storage.base import Repository

#: Keys that are looked after in one transaction.
BATCH = 200


class Lines:
    """Gives the turn of each key to the first in line.

    Args:
        repository: where they wait.
        ledger: what commits.
        log: what it says.
    """

    def __init__(self, repository: Repository, ledger: Ledger, log: GuardedLogger) -> None:
        self._repository = repository
        self._ledger = ledger
        self._log = log
        #: Told that tasks may start, or may be due some time, whose turn has come.
        self.moved: Callable[[], None] = lambda: None
        # Whether all lines are to be looked at; whether that is under way, and how far it has come.
        self._due, self._under_way, self._after = True, False, ""

    def joined(self, inserts: Iterable[Insert]) -> None:
        """Tasks were stored, some of which may wait in line."""
        rows = [insert.row for insert in inserts]
        self.advance(row["concurrency_key"] for row in rows if row["held"] == FOR_TURN)

    def left(self, task: Task, changes: Mapping[str, Any]) -> None:
        """A task was changed; where that ended it, the next one's turn has come."""
        if task.concurrency_key is not None and "turn" in changes:
            self.advance([task.concurrency_key])

    def next_turn(self, key: str) -> Sequence[Update]:
        """What gives the turn to the first in line, in the transaction in which another task ends.

        Nothing where that cannot be told: :meth:`left` makes up for it.
        """
        try:
            return self._next_turn(key)
        except Exception:  # noqa: BLE001  (how the other task ended must be stored in any case)
            return ()

    def _next_turn(self, key: str) -> Sequence[Update]:
        first = self._repository.next_in_line(key)
        return () if first is None else lifecycle.give_turn(first, key)

    def advance(self, keys: Iterable[str]) -> None:
        """Give the turn of each of these keys to the first in line, unless another task has it."""
        wanted = list(dict.fromkeys(keys))
        try:
            for start in range(0, len(wanted), BATCH):
                self._advance(wanted[start : start + BATCH])
        except RepositoryError as error:
            self._due = True
            self._log.warning("whose turn has come is looked at later: %s", error)

    def _advance(self, keys: Sequence[str]) -> bool:
        writes = [write for key in keys for write in self._next_turn(key)]
        moved = bool(writes) and any(self._ledger.commit(writes))
        if moved:
            self.moved()
        return moved

    @property
    def waiting(self) -> bool:
        """True if :meth:`look` has not looked at all lines yet."""
        return self._due or self._under_way

    def look_soon(self) -> None:
        """A turn may have been given up by a task of which only the id is known."""
        self._due = True

    def look(self, patience: float = math.inf) -> None:
        """Look at all lines, if one may stand still.

        Args:
            patience: seconds after which the rest is left to the next call.

        Raises:
            RepositoryError: the repository failed; the next call goes on there.
        """
        until = time.monotonic() + patience
        while self.waiting:
            if not self._under_way:
                self._under_way, self._after, self._due = True, "", False
            self._under_way = self._look_at_some()
            if time.monotonic() >= until:
                break

    def look_slowly(self) -> None:
        """Look at some lines, and go on there next time: who gave up a turn may have died just then.

        Raises:
            RepositoryError: the repository failed.
        """
        self._look_at_some()

    def _look_at_some(self) -> bool:
        """Move those of the next lines that stand still; False where there are no more."""
        page = self._repository.lines(self._after, BATCH)
        self._advance([key for key, stands_still in page.items() if stands_still])
        self._after = next(reversed(page), "")
        return bool(page)

    def overdue(self) -> bool:
        """Return whether a line stands still.

        Raises:
            RepositoryError: the repository failed.
        """
        page = self._repository.lines("", BATCH)
        while page and not any(page.values()):
            page = self._repository.lines(next(reversed(page)), BATCH)
        return bool(page)
