"""Whether other processes changed something: by a change stream where the server has one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from pymongo import errors

from taskx.core.log import log
from taskx.storage.mongo.connection import Connection
from taskx.storage.mongo.documents import Document

#: Seconds that the server holds a question for changes open.
_AWAIT = 1.0
#: After so many without an answer the stream is not relied on.
_STALE = 3.0
#: Nobody asked for so long: the thread ends.
_IDLE = 60.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 10.0
_LEAST_INTERVAL = 0.001
# Of what a change says only the marks are looked at; the large parts need not travel.
_LITTLE = [
    {"$project": {f"{where}.{name}": 0 for where in ("fullDocument", "updateDescription.updatedFields")
                  for name in ("params", "result", "error", "message")}}
]  # fmt: skip


class Changes:
    """Answers :meth:`Repository.version` from memory.

    Where there is no stream, that is "perhaps" every ``poll_interval`` seconds. ``is_own`` tells whether a
    mark was left by the one queue here that asks.
    """

    def __init__(
        self,
        connection: Connection,
        poll_interval: float,
        is_own: Callable[[int], bool],
        monotonic: Callable[[], float],
    ) -> None:
        self.monotonic = monotonic
        self._connection = connection
        self._poll_interval = poll_interval
        self._is_own = is_own
        self._rings = 0
        self.renew()

    def renew(self) -> None:
        self._lock = threading.Lock()
        self._watch: _Watch | None = None
        self._can_watch = True

    def version(self) -> object:
        now = self.monotonic()
        watch = self._ensure_watch(now)
        live = watch is not None and now - watch.heard < _STALE
        return self._rings, None if live else now // max(self._poll_interval, _LEAST_INTERVAL)

    def ring(self) -> None:
        self._rings += 1

    def _ensure_watch(self, now: float) -> _Watch | None:
        if not self._can_watch:
            return None
        with self._lock:
            if self._watch is None or self._watch.ended:
                self._watch = _Watch(self)
            self._watch.asked = now
            return self._watch

    def close(self) -> None:
        """End the thread; another call of :meth:`version` starts it again."""
        with self._lock:
            watch, self._watch = self._watch, None
        if watch is not None:
            watch.end()


class _Watch:
    """One thread that listens to the server."""

    def __init__(self, changes: Changes) -> None:
        self._changes = changes
        self.heard = float("-inf")  # when the server last answered
        self.asked = changes.monotonic()
        self.ended = False
        self._stop = threading.Event()
        threading.Thread(target=self._run, name="taskx-changes", daemon=True).start()

    def end(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        pause = _FIRST_PAUSE
        try:
            while not self._over():
                try:
                    self._listen()
                    pause = _FIRST_PAUSE
                except errors.PyMongoError as error:
                    if not isinstance(error, (errors.ConnectionFailure, errors.CursorNotFound)):
                        log.debug("no change stream, so changes are polled for: %s", error)
                        self._changes._can_watch = False
                        return
                self.heard = float("-inf")
                self._stop.wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
        except TypeError as error:  # a mock of the driver has no streams
            log.debug("no change stream, so changes are polled for: %s", error)
            self._changes._can_watch = False
        finally:
            self.ended = True

    def _over(self) -> bool:
        return self._stop.is_set() or self._changes.monotonic() - self.asked > _IDLE

    def _listen(self) -> None:
        tasks = self._changes._connection.tasks
        with tasks.watch(_LITTLE, max_await_time_ms=int(_AWAIT * 1000)) as stream:
            self._changes.ring()  # what came before the stream was open
            while not self._over() and stream.alive:
                change = stream.try_next()
                self.heard = self._changes.monotonic()
                if change is not None and not self._is_own(change):
                    self._changes.ring()

    def _is_own(self, change: Any) -> bool:
        marks = _marks(change)
        return bool(marks) and self._changes._is_own(marks[-1])


def _marks(change: Document) -> list[int]:
    """The marks of writes on a document after a change, as far as the change tells."""
    updated = (change.get("updateDescription") or {}).get("updatedFields") or {}
    for name, value in updated.items():
        if name == "taskx.w":
            return value if isinstance(value, list) else []
        if name.startswith("taskx.w."):
            return [value] if isinstance(value, int) else []
    ours = (change.get("fullDocument") or {}).get("taskx") or {}
    return ours.get("w") or [] if not updated else []
