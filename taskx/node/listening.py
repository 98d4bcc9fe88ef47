"""Wake-ups: hear the commits of other processes, and react to them at once."""

from __future__ import annotations

import random
import threading
import time
from contextlib import suppress
from string import ascii_uppercase

from taskx.node.pool import WorkerPool
from taskx.stores.parts import Listener
from taskx.tasks.bell import Rest
from taskx.tasks.errors import RepositoryError
from taskx.tasks.lifecycle import CANCEL_REQUESTED, FREED, freed_of


class Listening:
    """A thread that waits for news from other processes, if the repository can hear them.

    No other part depends on it, because the housekeeper also polls.
    """

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool
        self._stopped = False
        self._listener: Listener | None = None
        self._wanted = ""  # the kinds of news that it hears
        self._thread = threading.Thread(target=self._run, name="taskx-listen", daemon=True)

    def start(self) -> None:
        """Start the thread, if there can be news."""
        if self._pool.moves.repository.shared:
            with suppress(RuntimeError):  # no thread can be started
                self._thread.start()

    def stop(self) -> None:
        """End the thread, because it must take no task for a node that leaves."""
        self._stopped = True
        if (listener := self._listener) is not None:
            listener.close()
        if self._thread.is_alive():
            self._thread.join(self._pool.timing.join_thread_within)

    def follow(self) -> None:
        """Listen for the types that the node runs now, if these are others than before.

        One thread calls this, which no signal handler interrupts.
        """
        before, wanted = self._listener, self._kinds()
        if before is None or self._stopped or wanted == self._wanted:
            return
        # The old one is closed last, so that nothing is missed.
        if (listener := self._pool.moves.repository.news.listen(wanted)) is not None:
            self._listener, self._wanted = listener, wanted
            before.close()
            if self._stopped:  # the stop may have closed the old one only
                listener.close()

    def _kinds(self) -> str:
        """Return the kinds of news that concern this node."""
        registry = self._pool.registry
        letters = {*ascii_uppercase} if registry.finds else {*map(freed_of, registry.types)}
        return FREED + CANCEL_REQUESTED + "".join(sorted(letters))

    def _run(self) -> None:
        try:
            # In this thread: in another, the exception of a signal handler could leave an open pipe.
            if not self._stopped:
                self._wanted = self._kinds()
                self._listener = self._pool.moves.repository.news.listen(self._wanted)
            while not self._stopped and (listener := self._listener) is not None:
                self._listen(listener)
        except Exception:  # a defect of ours
            self._pool.log.exception("cannot listen to other processes; this node only polls")
        finally:
            if (listener := self._listener) is not None:
                self._listener = None
                listener.close()

    def _listen(self, listener: Listener) -> None:
        timing, fetcher = self._pool.timing, self._pool.fetcher
        rest = Rest(timing)
        while not self._stopped and self._listener is listener:
            if not (news := listener.wait()):
                continue
            if seconds := rest.seconds:
                # Wait first: by then the node that got a task lately has this one, too. If it has no
                # room, the other nodes come one after another.
                time.sleep(random.uniform(0.5, 1.5) * seconds)
                news += listener.wait(0)
            fetched = fetcher.fetched
            fired = self._process(news)
            rest.after(vain=not fired and fetcher.fetched == fetched)
            time.sleep(timing.shortest_rest)

    def _process(self, news: str) -> bool:
        """Fire tokens and fetch tasks, if the news may concern this node; the housekeeper retries.

        Return True if a token was fired.
        """
        pool, done, fired = self._pool, True, False
        try:
            if CANCEL_REQUESTED in news and pool.runs:
                fired = pool.fire_cancelled()
            if (FREED in news or news != news.lower()) and pool.buffer.room_to_fetch() > 0:
                pool.tuning.refresh()  # a task stored after a pause must not start
                done = pool.fetcher.refill()
        except RepositoryError:
            done = False
        if not done:
            pool.agenda.expect_more()
            pool.agenda.wake()
        return fired
