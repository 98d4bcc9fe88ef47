"""Tasks whose process died while they ran: one at a time and, on their last chance, alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

from taskx.common.bell import Bell
from taskx.executing.runner import Run
from taskx.running.buffer import Item

#: Most seconds that a task on its last chance waits for others to end, and that others wait for it.
ALONE = 60.0


class Suspects:
    """Whose turn it is among the tasks with a crash to their name.

    Args:
        runs: all runs of the node, by task id.
    """

    def __init__(self, runs: Mapping[str, Run]) -> None:
        self._runs = runs
        self._turn = threading.Lock()
        #: Those that wait for the one that runs.
        self.waiting: list[Item] = []
        self._changed = Bell()
        self._alone_until: float | None = None
        self._closed = False

    def admit(self, item: Item) -> bool:
        """Whether it is this one's turn; else it waits."""
        if self._turn.acquire(blocking=False):
            return True
        self.waiting.append(item)
        return False

    def called(self) -> Item | None:
        """One that waits though nobody has the turn: who was next did not come, or just left."""
        if self._turn.locked():
            return None
        with suppress(IndexError):  # the others were called meanwhile
            return self.waiting.pop(0)
        return None

    def leave(self) -> Item | None:
        """Its run is over, or never came about; returns who is next."""
        self._alone_until = None
        self.tell()
        self._turn.release()
        return self.waiting.pop(0) if self.waiting else None

    def go_alone(self) -> None:
        """Before the start of one on its last chance: wait for the runs there are, and hold up others."""
        self._wait(lambda: not self._runs, time.monotonic() + ALONE)
        self._alone_until = time.monotonic() + ALONE

    def stand_aside(self) -> None:
        """Before the start of any task: wait while another one is to be alone."""
        if (until := self._alone_until) is not None:
            self._wait(lambda: self._alone_until is None, until)

    def tell(self) -> None:
        """A run is over."""
        if self._changed.listening:
            self._changed.ring_all()

    def close(self) -> None:
        """The node stops: nobody waits any more."""
        self._closed = True
        self.waiting.clear()
        self.tell()

    def _wait(self, condition: Callable[[], bool], until: float) -> None:
        while (left := until - time.monotonic()) > 0:
            ear = self._changed.listen()
            if self._closed or condition():
                self._changed.leave(ear)
                return
            self._changed.wait(ear, left)
