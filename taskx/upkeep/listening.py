"""Hears what other processes commit, and looks at it at once."""

from __future__ import annotations

import random
import threading
import time
from contextlib import suppress

from taskx.common.bell import SHORTEST_REST, Rest
from taskx.core.errors import RepositoryError
from taskx.core.lifecycle import CANCEL_REQUESTED, FREED
from taskx.running.pool import WorkerPool
from taskx.storage.base import Listener


class Listening:
    """A thread that waits for news from other processes, where the repository can hear them.

    Nobody depends on it: the housekeeper polls, too.
    """

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool
        self._stopped = False
        self._listener: Listener | None = None
        self._thread = threading.Thread(target=self._run, name="taskx-listen", daemon=True)

    def start(self) -> None:
        """Start the thread, if there may be anything to hear."""
        if self._pool.services.repository.shared:
            with suppress(RuntimeError):  # no thread can be started
                self._thread.start()

    def stop(self) -> None:
        """End the thread: it must take no task for a node that leaves."""
        self._stopped = True
        if (listener := self._listener) is not None:
            listener.close()
        if self._thread.is_alive():
            self._thread.join(5.0)

    def _run(self) -> None:
        try:
            # Here: an exception of a signal handler would leave a pipe that nobody closes.
            if not self._stopped:
                self._listener = self._pool.services.repository.listen(FREED + CANCEL_REQUESTED)
            if self._listener is not None:
                self._listen(self._listener)
        except Exception:  # a defect of ours
            self._pool.services.log.exception("other processes are not heard, and polled for only")
        finally:
            if (listener := self._listener) is not None:
                self._listener = None
                listener.close()

    def _listen(self, listener: Listener) -> None:
        rest, fetcher = Rest(), self._pool.fetcher
        while not self._stopped:
            if not (news := listener.wait()):
                continue
            if seconds := rest.seconds:
                # Before looking: by then the node that got something of late has it. If it has no room,
                # the others come one after the other.
                time.sleep(random.uniform(0.5, 1.5) * seconds)
                news += listener.wait(0)
            fetched = fetcher.fetched
            self._look(news)
            rest.after(vain=fetcher.fetched == fetched)
            time.sleep(SHORTEST_REST)

    def _look(self, news: str) -> None:
        """Look, if something can come of it; what fails is left to the housekeeper."""
        pool, looked = self._pool, True
        try:
            if CANCEL_REQUESTED in news and pool.runs:
                pool.fire_cancelled()
            if FREED in news and pool.buffer.room_to_fetch() > 0:
                pool.fetcher.look_for_pauses()  # what was stored after a pause must not start
                looked = pool.fetcher.refill()
        except RepositoryError:
            looked = False
        if not looked:
            pool.agenda.more_stored = True
            pool.agenda.wake()
