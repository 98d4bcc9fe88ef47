"""Duties: the parts of a round of the housekeeper, and the release of tasks that are due."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from taskx.common.bell import Agenda
from taskx.core import lifecycle
from taskx.core.clock import Clock
from taskx.core.timing import Timing
from taskx.moving import Moves
from taskx.storage.base import Repository


def _never() -> float:
    return math.inf


class Duty:
    """A duty of a housekeeper.

    Args:
        name: a word for it.
        step: does some of it, if possible until a time on the monotonic clock; returns True if more is
            left, which the next round does soon.
        every: seconds from one step to the next; 0 for a step in every round.
        due: returns the seconds until a step is needed, at the latest by the round after that.
    """

    def __init__(
        self,
        name: str,
        step: Callable[[float], object],
        every: float = 0.0,
        due: Callable[[], float] = _never,
    ) -> None:
        self.name = name
        self._step = step
        self._every = every
        self._due = due
        self._last = -math.inf
        #: True if the last step has left something.
        self.more = False

    def comes(self, now: float) -> bool:
        """Return True if the round that begins now takes a step."""
        return self.more or now - self._last >= self._every * 0.9

    def take(self, now: float, until: float) -> None:
        """Take a step."""
        self._last, self.more = (
            now,
            False,
        )  # first: after an error, other duties come before this one
        self.more = bool(self._step(until))

    def seconds_left(self) -> float:
        """Return the seconds until the next step is needed."""
        return 0.0 if self.more else self._due()


class Release:
    """Lets tasks start whose time has come, a batch at a time."""

    def __init__(
        self, repository: Repository, moves: Moves, agenda: Agenda, clock: Clock, timing: Timing
    ) -> None:
        self._repository = repository
        self._moves = moves
        self._agenda = agenda
        self._clock = clock
        self._batch, self._poll_every = timing.due_batch, timing.poll_every
        #: The time at which the next task is due, in milliseconds; None if none is.
        self.next: int | None = None
        # The time, on the monotonic clock, until which due tasks are left to other nodes.
        self._again_at = -math.inf

    def step(self, until: float) -> None:
        """Release batches of the tasks that are due, until a time on the monotonic clock."""
        now = self._clock.now_ms()
        if self._agenda.claim_due():  # first: a task stored from now on takes it back
            try:
                self.next = self.earliest()
            except BaseException:
                self._agenda.check_due()
                raise
        while self.next is not None and self.next <= now and not self._others_release:
            self._release_some(now)
            self.next = self.earliest()
            if time.monotonic() >= until:
                break

    def due(self) -> float:
        """Return the seconds until the next task is due."""
        if self.next is None or self._others_release:
            return math.inf
        return (self.next - self._clock.now_ms()) / 1000

    def earliest(self) -> int | None:
        """Read the time at which the next task is due."""
        return next((run_at for _, run_at in self._repository.due(None, 1)), None)

    def _release_some(self, now: int) -> None:
        """Release the next tasks that are due, unless another node has just done so.

        If very many are due, all nodes try the same ones at the same time. The node that releases them goes
        on. The others find them released, and come back a little later, as they do if another transaction
        has locked all of them.
        """
        ids = [task_id for task_id, _ in self._repository.due(now, self._batch)]
        if ids:
            released = sum(self._moves.commit([lifecycle.release(task_id) for task_id in ids]))
            if not released or (len(ids) == self._batch and 2 * released < self._batch):
                self._again_at = time.monotonic() + self._poll_every

    @property
    def _others_release(self) -> bool:
        """True if another node was releasing the due tasks a moment ago."""
        return time.monotonic() < self._again_at
