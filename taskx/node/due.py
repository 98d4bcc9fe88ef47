"""Tasks whose time has come, a few at a time: those that may start, and those that have expired."""

from __future__ import annotations

import math
import time

from taskx.node.moving import Moves
from taskx.stores.base import Repository
from taskx.tasks import lifecycle
from taskx.tasks.bell import Agenda
from taskx.tasks.timing import Timing


class Release:
    """Lets tasks start whose time has come, a batch at a time."""

    def __init__(self, moves: Moves, agenda: Agenda, timing: Timing) -> None:
        self._moves = moves
        self._agenda = agenda
        self._batch, self._poll_every = timing.due_batch, timing.poll_every
        #: The time at which the next task is due, in milliseconds; None if none is.
        self.next: int | None = None
        # The time, on the monotonic clock, until which due tasks are left to other nodes.
        self._again_at = -math.inf

    def step(self, until: float) -> None:
        """Release batches of the tasks that are due, until a time on the monotonic clock."""
        now = self._moves.now_ms()
        if self._agenda.claim_due():  # first: a task stored from now on takes it back
            try:
                self.next = self.earliest()
            except BaseException:
                self._agenda.check_due()
                raise
        while self.next is not None and self.next <= now and time.monotonic() >= self._again_at:
            self._release_some(now)
            self.next = self.earliest()
            if time.monotonic() >= until:
                break

    def due(self) -> float:
        """Return the seconds until the next task is due; 0 if that must be read first."""
        if not self._agenda.due_known:  # it may come before the next regular round
            return 0.0
        if self.next is None:
            return math.inf
        return max((self.next - self._moves.now_ms()) / 1000, self._again_at - time.monotonic())

    def earliest(self) -> int | None:
        """Read the time at which the next task is due."""
        return next((run_at for _, run_at in self._moves.repository.due(None, 1)), None)

    def _release_some(self, now: int) -> None:
        """Release the next tasks that are due, unless another node has just done so.

        If very many are due, all nodes try the same ones at the same time. The node that releases them goes
        on. The others find them released, and come back a little later, as they do if another transaction
        has locked all of them.
        """
        due = self._moves.repository.due(now, self._batch)
        if due:
            released = sum(self._moves.commit([lifecycle.release(*one) for one in due]))
            if not released or (len(due) == self._batch and 2 * released < self._batch):
                self._again_at = time.monotonic() + self._poll_every


def next_expiry(repository: Repository) -> int | None:
    """Return the next ``expires_at`` of a pending task, in milliseconds; None if none can expire."""
    return next((at for _, at in repository.due(None, 1, "expires_at")), None)


def expire(moves: Moves, batch: int, until: float) -> bool:
    """Cancel tasks that have not started by their ``expires_at``; return True if more is left.

    A start refuses such a task by itself. This finds the tasks that nothing starts: their type has no
    executor or is paused, or they wait for their time, their parents, their turn or a limit. Batches are
    cancelled until a time on the monotonic clock.

    Raises:
        RepositoryError: the repository failed; the next call tries again.
    """
    while more := _expire_some(moves, batch):
        if time.monotonic() >= until:
            break
    return more


def _expire_some(moves: Moves, batch: int) -> bool:
    """Cancel a batch; return True if there may be more, which no other node is cancelling now."""
    now = moves.now_ms()
    ids = [task_id for task_id, _ in moves.repository.due(now, batch, "expires_at")]
    found = moves.repository.get_many(ids) if ids else {}
    expired = [task for task in found.values() if lifecycle.has_expired(task, now)]
    writes = [write for task in expired for write in lifecycle.expire(task, now)]
    # All nodes try the same tasks at the same time. The node that cancels most of them goes on.
    done = sum(moves.commit(writes, found)) if writes else 0
    return len(ids) == batch and 2 * done >= batch
