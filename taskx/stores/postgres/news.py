"""News of commits: a thread that hears those of other processes, and tells them of our own.

``NOTIFY`` inside the transaction of a write would make all commits of the database wait for each other. So
it is sent after the commit, by this thread, and seldom: the first news at once, then all that there are.
"""

from __future__ import annotations

import os
import select
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress

import psycopg

from taskx.stores.parts import Listener
from taskx.stores.postgres.link import Connections
from taskx.tasks.in_use import InUse
from taskx.tasks.timing import Timing

#: A kind of news that only changes :attr:`Channel.rung`: a note has changed.
NOTED = "n"


class Ear(Listener):
    """A listener for some kinds of news. Releasing its bell wakes the thread that waits."""

    def __init__(self, wanted: str) -> None:
        self.wanted = wanted
        self._heard: dict[str, bool] = {}
        self._closed = False
        self._bell = threading.Lock()
        self._bell.acquire()

    def hear(self, news: Iterable[str]) -> None:
        """Wake the thread that waits, if it wants to hear this."""
        if heard := {*news}.intersection(self.wanted):
            self._heard.update(dict.fromkeys(heard, True))
            self._ring()

    def wait(self, timeout: float | None = None) -> str:
        if not self._closed:
            self._bell.acquire(timeout=-1 if timeout is None else timeout)
        return "".join(kind for kind in self.wanted if self._heard.pop(kind, False))

    def close(self) -> None:
        self._closed = True
        self._ring()

    def _ring(self) -> None:
        with suppress(RuntimeError):  # it was released already
            self._bell.release()


class Channel:
    """The news of one database.

    Args:
        connections: opens the connection, which is never in a transaction.
        name: the name of the channel.
        several: tells if several queues of this process must hear of each other's commits.
        timing: the intervals of its work.

    Attributes:
        rung: another object after each change of a note, and after news may have been missed.
        hears: True while the thread listens to the server.
    """

    def __init__(
        self, connections: Connections, name: str, several: Callable[[], bool], timing: Timing
    ) -> None:
        self._connections = connections
        self._name = name
        self._several = several
        self._timing = timing
        self.renew()

    def renew(self) -> None:
        """Start over, in a forked child, without the parent's thread and connection."""
        self.rung: object = object()
        self.hears = False
        self._own = os.urandom(8).hex()
        self._ears = InUse[Ear]()
        self._unsent: dict[str, bool] = {}  # changed by single steps, as several threads do
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._asked = 0.0
        self._closed = False
        self._read, self._write = ends = os.pipe()
        for end in ends:
            os.set_blocking(end, False)
        # Closed with the last reference only: another file may get their numbers at once.
        self._close_fd = weakref.finalize(self, _close, *ends)
        self._close_fd.atexit = False

    def listen(self, wanted: str) -> Listener:
        """Return a listener for some kinds of news."""
        ear = Ear(wanted)
        self._ears.add(ear)
        self._ensure_thread()
        return ear

    def send(self, news: Iterable[str]) -> None:
        """Tell the other processes, soon, and the listeners of this one if several queues share it."""
        if new := [kind for kind in news if kind not in self._unsent]:
            self._unsent.update(dict.fromkeys(new, True))
            if self._several():
                self._tell(new)
        if new or not self._is_alive:
            self._ensure_thread()

    def ask(self) -> None:
        """Keep the thread at work, as somebody looks at :attr:`rung`."""
        self._asked = time.monotonic()
        if not self._is_alive:
            self._ensure_thread()

    @property
    def _is_alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def close(self) -> None:
        """End the thread, after it has sent what there is. A later call starts it again."""
        self._closed = True
        self._wake()
        if (thread := self._thread) is not None:
            thread.join(self._timing.close_within)

    def _wake(self) -> None:
        with suppress(BlockingIOError):  # it is awake
            os.write(self._write, b".")

    def _ensure_thread(self) -> None:
        self._asked, self._closed = time.monotonic(), False
        # A signal handler may come here in the middle of the same call, so nobody waits for the lock.
        if self._lock.acquire(blocking=False):
            try:
                if not self._is_alive:
                    thread = threading.Thread(target=self._run, name="taskx-news", daemon=True)
                    with suppress(RuntimeError):  # no thread can be started: others poll
                        thread.start()
                        self._thread = thread
            finally:
                self._lock.release()
        self._wake()

    # --- the thread

    def _run(self) -> None:
        pause = self._timing.stream_pause
        while not self._is_over():
            try:
                self._follow()
                pause = self._timing.stream_pause
            except (psycopg.Error, OSError):  # polling finds the tasks
                if self._closed:
                    return
                self._sleep(pause)
                pause = min(2 * pause, self._timing.longest_stream_pause)
            finally:
                self.hears = False

    def _is_over(self) -> bool:
        idle = time.monotonic() - self._asked > self._timing.close_stream_after
        return not self._unsent and (self._closed or (idle and not [*self._ears]))

    def _follow(self) -> None:
        """Hear and send over one connection, until it is old."""
        with self._connections.connect() as driver:
            driver.add_notify_handler(self._heard)
            driver.execute(f"LISTEN {self._name}")
            until = time.monotonic() + self._timing.renew_listener_after
            self.hears = True
            self._tell(None)  # for what was missed
            send_at = 0.0
            while (now := time.monotonic()) < until and not self._is_over():
                if self._unsent and (now >= send_at or self._closed):
                    news = [kind for kind in list(self._unsent) if self._unsent.pop(kind, False)]
                    payload = f"{self._own}:{''.join(news)}"
                    driver.execute("SELECT pg_notify(%s, %s)", (self._name, payload))
                    send_at = time.monotonic() + self._timing.news_every
                    continue
                rest = send_at - now if self._unsent else self._timing.longest_stream_pause
                self._wait(max(0.0, min(rest, until - now)), driver.fileno())
                driver.pgconn.consume_input()
                while (notice := driver.pgconn.notifies()) is not None:
                    self._take(notice.extra.decode())

    def _sleep(self, seconds: float) -> None:
        """Wait until a close, or for some seconds."""
        until = time.monotonic() + seconds
        while not self._closed and (left := until - time.monotonic()) > 0:
            self._wait(left)
            time.sleep(min(left, self._timing.shortest_rest))

    def _wait(self, seconds: float, *files: int) -> None:
        """Wait for some seconds, or until somebody wakes this thread or there is something to read."""
        poll = select.poll()  # select.select refuses the numbers of files above 1,023
        for file in (self._read, *files):
            poll.register(file, select.POLLIN)
        poll.poll(seconds * 1000)
        with suppress(BlockingIOError):
            os.read(self._read, 4096)

    def _heard(self, notice: psycopg.Notify) -> None:
        self._take(notice.payload)

    def _take(self, payload: str) -> None:
        sender, _, news = payload.partition(":")
        if sender != self._own:
            self._tell(news)

    def _tell(self, news: Iterable[str] | None) -> None:
        """Wake the listeners of some kinds of news; None wakes all."""
        if news is None or NOTED in news:
            self.rung = object()
        for ear in list(self._ears):
            ear.hear(ear.wanted if news is None else news)


def _close(*ends: int) -> None:
    for end in ends:
        os.close(end)
