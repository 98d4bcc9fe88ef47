"""Notice changes by other processes, with a change stream if the server has one."""

from __future__ import annotations

import threading
from collections.abc import Callable

from bson.int64 import Int64
from pymongo import errors

from taskx.stores.mongo.connection import Connection
from taskx.stores.mongo.documents import Document
from taskx.tasks.errors import ConfigurationError
from taskx.tasks.log import log

_LEAST_INTERVAL = 0.001
#: Only the fact that something changed matters, so the server sends no contents.
_LITTLE: Document = {"$project": {"_id": 1}}


class Changes:
    """Answers :meth:`Repository.version` from memory.

    Without a stream the version changes every ``poll_interval`` seconds. ``own`` returns the marks of the
    only queue on this repository object. It returns None if there are several queues, because each must
    hear of the others' changes.
    """

    def __init__(
        self,
        connection: Connection,
        poll_interval: float,
        own: Callable[[], range | None],
        monotonic: Callable[[], float],
    ) -> None:
        self.monotonic = monotonic
        self.timing = connection.timing
        self._connection = connection
        self._poll_interval = poll_interval
        self.own = own
        self._rung = object()  # another one after each change
        self.renew()

    def renew(self) -> None:
        self._lock = threading.Lock()
        self._watch: _Watch | None = None
        self._can_watch = True

    def version(self) -> object:
        now = self.monotonic()
        watch = self._ensure_watch(now)
        live = watch is not None and now - watch.heard < self.timing.stream_broken_after
        return self._rung, None if live else now // max(self._poll_interval, _LEAST_INTERVAL)

    def ring(self) -> None:
        self._rung = object()

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
        self._timing = changes.timing
        self.heard = float("-inf")  # the time of the server's last answer
        self.asked = changes.monotonic()
        self.ended = False
        self._stop = threading.Event()
        threading.Thread(target=self._run, name="taskx-changes", daemon=True).start()

    def end(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        first, longest = self._timing.stream_pause, self._timing.longest_stream_pause
        pause = first
        try:
            while not self._over():
                try:
                    while self._listen():
                        pass
                    pause = first
                except errors.PyMongoError as error:
                    # A stream that has answered may fail for good, for example when its history is lost.
                    refused = not isinstance(
                        error, (errors.ConnectionFailure, errors.CursorNotFound)
                    )
                    if refused and self.heard == float("-inf"):
                        log.debug("no change stream, polling for changes instead: %s", error)
                        self._changes._can_watch = False
                        return
                self.heard = float("-inf")
                self._stop.wait(pause)
                pause = min(2 * pause, longest)
        except (TypeError, ConfigurationError) as error:
            # A mock of the driver has no streams. Of a URL that is not valid, the next operation tells.
            log.debug("no change stream, polling for changes instead: %s", error)
            self._changes._can_watch = False
        finally:
            self.ended = True

    def _over(self) -> bool:
        return (
            self._stop.is_set()
            or self._changes.monotonic() - self.asked > self._timing.close_stream_after
        )

    def _listen(self) -> bool:
        """Listen until the stream ends; return True if the own marks changed: open a new stream at once."""
        tasks, own = self._changes._connection.tasks, self._changes.own()
        pipeline = [_LITTLE] if own is None else [_of_others(own), _LITTLE]
        with tasks.watch(
            pipeline, max_await_time_ms=int(self._timing.change_within * 1000)
        ) as stream:
            self._changes.ring()  # for changes that were made before the stream was open
            while not self._over() and stream.alive:
                if self._changes.own() != own:
                    return True
                change = stream.try_next()
                self.heard = self._changes.monotonic()
                if change is not None:
                    self._changes.ring()
                else:  # a server may answer at once, without a change, after it filtered one out
                    self._stop.wait(self._timing.change_every)
        return False


def _of_others(own: range) -> Document:
    """Return the stage that makes the server filter out changes whose last mark is one of these."""
    # An update names the whole list of marks, or one of its items; an insert has the document.
    inserted = [{"k": "taskx.w", "v": "$fullDocument.taskx.w"}]
    updated = {"$ifNull": [{"$objectToArray": "$updateDescription.updatedFields"}, []]}
    fields = {"$cond": [{"$eq": ["$operationType", "insert"]}, inserted, updated]}
    last = {"$arrayElemAt": ["$$field.v", -1]}
    mark = {"$cond": [{"$isArray": "$$field.v"}, last, "$$field.v"]}
    is_own = {
        "$and": [
            {"$eq": [{"$substrCP": ["$$field.k", 0, 7]}, "taskx.w"]},
            {"$gte": [mark, Int64(own.start)]},
            {"$lt": [mark, Int64(own.stop)]},
        ]
    }
    owns = {"$map": {"input": fields, "as": "field", "in": is_own}}
    return {"$match": {"$expr": {"$not": [{"$anyElementTrue": [owns]}]}}}
