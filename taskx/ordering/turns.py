"""Tasks of one concurrency key: who has the turn, and who is next.

A task with a key waits in line until the turn of its key is given to it, and keeps it until it has ended:
through retries, too. That two never have it, the repository sees to; so any number of processes may give it
to the next one at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence

from taskx.core import lifecycle
from taskx.core.errors import RepositoryError
from taskx.core.log import GuardedLogger
from taskx.core.writes import Update
from taskx.storage.base import Repository

#: Keys that are looked after in one transaction.
BATCH = 200


class Turns:
    """Gives the turn of each key to the first in line.

    Args:
        repository: where they wait.
        commit: commits moves, and does what follows; says for each whether it took place.
        log: what it says.
    """

    def __init__(
        self,
        repository: Repository,
        commit: Callable[[Sequence[Update]], Sequence[bool]],
        log: GuardedLogger,
    ) -> None:
        self._repository = repository
        self._commit = commit
        self._log = log
        # Whether all lines are to be looked at; whether that is under way, and how far it has come.
        self._due, self._under_way, self._after = True, False, ""

    def next_turn(self, key: str) -> Sequence[Update]:
        """What gives the turn to the first in line, in the transaction in which another task ends.

        Nothing where that cannot be told: :meth:`advance` makes up for it.
        """
        try:
            return self._next_turn(key)
        except Exception:  # noqa: BLE001  (how the other task ended must be stored in any case)
            return ()

    def _next_turn(self, key: str) -> Sequence[Update]:
        first = self._repository.find("line", [key], ("id",), 1)
        return [write for (task_id,) in first for write in lifecycle.give_turn(task_id, key)]

    def advance(self, keys: Iterable[str]) -> None:
        """Give the turn of each of these keys to the first in line, unless another task has it."""
        wanted = list(dict.fromkeys(keys))
        try:
            for start in range(0, len(wanted), BATCH):
                self._advance(wanted[start : start + BATCH])
        except RepositoryError as error:
            self._due = True
            self._log.warning("whose turn has come is looked at later: %s", error)

    def _advance(self, keys: Sequence[str]) -> None:
        if writes := [write for key in keys for write in self._next_turn(key)]:
            self._commit(writes)

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
        still, after = self._still(self._after)
        self._advance(still)
        self._after = after
        return bool(after)

    def overdue(self) -> bool:
        """Return whether a line stands still.

        Raises:
            RepositoryError: the repository failed.
        """
        still, after = self._still("")
        while after and not still:
            still, after = self._still(after)
        return bool(still)

    def _still(self, after: str) -> tuple[Sequence[str], str]:
        """The keys of the next lines that stand still, as nobody has the turn; and where to go on.

        Empty where there are no more.
        """
        keys = self._repository.distinct("line", after, BATCH)
        moving = {key for (key,) in self._repository.find("turn", keys, ("turn",))}
        return [key for key in keys if key not in moving], keys[-1] if keys else ""
