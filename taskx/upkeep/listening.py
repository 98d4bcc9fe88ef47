"""Hears what other processes commit, and has the housekeeper look at it at once."""

from __future__ import annotations

import threading
import time
from contextlib import suppress

from taskx.common.bell import Rest
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

    def start(self) -> None:
        """Start the thread, if there may be anything to hear."""
        if self._pool.services.repository.shared:
            with suppress(RuntimeError):  # no thread can be started
                threading.Thread(target=self._run, name="taskx-listen", daemon=True).start()

    def stop(self) -> None:
        """End the thread soon."""
        self._stopped = True
        if (listener := self._listener) is not None:
            listener.close()

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
        rest, news = Rest(), ""
        while not self._stopped:
            if not news:
                news = listener.wait()
                continue
            fetched = self._pool.fetcher.fetched
            self._tell(news)
            time.sleep(rest.seconds)  # what comes meanwhile is told together
            news = listener.wait(0)
            rest.after(vain=bool(news) and self._pool.fetcher.fetched == fetched)

    def _tell(self, news: str) -> None:
        """Have the housekeeper look, if something can come of it."""
        pool, agenda = self._pool, self._pool.agenda
        cancels = CANCEL_REQUESTED in news and bool(pool.runs)
        more = FREED in news and pool.buffer.room_to_fetch() > 0
        agenda.cancels = agenda.cancels or cancels
        agenda.more_stored = agenda.more_stored or more
        if cancels or more:
            agenda.wake()
