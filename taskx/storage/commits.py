"""The watch over transactions of callers: it tells of their writes when they are committed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import attrs

from taskx.core.timing import Timing
from taskx.core.writes import Write
from taskx.storage.base import Then


def pause(since: float, timing: Timing) -> float:
    """Return the seconds until the next look at transactions, the oldest of which began at ``since``."""
    share = (time.monotonic() - since) / 20
    return min(timing.longest_transaction_every, max(timing.transaction_every, share))


@attrs.define(eq=False, repr=False)
class Stored:
    """Writes in a transaction of a caller.

    ``look_up`` returns those of them that are committed.
    """

    look_up: Callable[[], Sequence[Write]]
    then: Then
    timing: Timing
    since: float = attrs.field(factory=time.monotonic)
    look_up_at: float = 0.0
    ended_at: float | None = None

    def __attrs_post_init__(self) -> None:
        self.look_up_at = self.since + self.timing.look_up_after

    def end(self) -> None:
        """Note that the transaction has ended, so it is looked up at once."""
        if self.ended_at is None:
            self.ended_at = self.look_up_at = time.monotonic()

    def settled(self) -> bool:
        """Look the writes up if it is time, and tell of them. Return True if that was the last time."""
        if time.monotonic() < self.look_up_at:
            return False
        if done := self.look_up():
            self.then(done)
            return True
        return not self._put_off()

    def _put_off(self) -> bool:
        """Set the time of the next look-up. Return False if no further one is needed."""
        now = time.monotonic()
        if self.ended_at is None:
            self.look_up_at = now + min(self.timing.longest_look_up_every, now - self.since)
            return True
        self.look_up_at = now + max(self.timing.transaction_every, now - self.ended_at)
        return now < self.ended_at + self.timing.commit_within


class Watch:
    """A thread that looks at open transactions every few milliseconds, as long as there are some.

    Nothing depends on it: nodes also find the tasks by polling.
    """

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        self._watched: list[tuple[Callable[[], bool], Stored]] = []
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, is_open: Callable[[], bool], stored: Stored) -> None:
        """Watch a transaction. ``is_open`` tells if it may still be open."""
        with self._lock:
            self._watched.append((is_open, stored))
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="taskx-commits", daemon=True)
                with suppress(RuntimeError):  # no thread can be started: polling finds the tasks
                    thread.start()
                    self._thread = thread

    def close(self) -> None:
        """Forget all transactions, so that the thread ends."""
        with self._lock:
            self._watched.clear()

    def _run(self) -> None:
        while True:
            for each in list(self._watched):
                is_open, stored = each
                if not is_open():
                    stored.end()
                if stored.settled():
                    with suppress(ValueError):  # it was closed in the meantime
                        self._watched.remove(each)
            with self._lock:
                if not self._watched:
                    self._thread = None
                    return
            since = [stored.since for _, stored in list(self._watched)]
            timing = self._timing
            time.sleep(pause(min(since), timing) if since else timing.transaction_every)
