"""Handing over: threads that run the tasks of tickets whose broker must not be kept waiting."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from taskx.core.log import log
from taskx.engines.tickets import Ticket

#: Most tickets that wait. Their senders keep the number far below.
MOST = 1000


class HandOver:
    """A bounded buffer of tickets, and the threads that take them.

    Args:
        run: runs the task of a ticket, in the thread that calls it.
        workers: the number of threads.
    """

    def __init__(self, run: Callable[[Ticket], None], workers: int) -> None:
        self._run = run
        self._tickets: queue.Queue[Ticket | None] = queue.Queue(MOST)
        self._ended = False
        self._threads = [
            threading.Thread(target=self._work, name=f"taskx-ticket-{number}", daemon=True)
            for number in range(1, workers + 1)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, ticket: Ticket) -> None:
        """Put in a ticket; drop it if there is no room, as it is then sent again later."""
        try:
            self._tickets.put_nowait(ticket)
        except queue.Full:
            log.debug("a ticket for task %s is dropped: all threads are busy", ticket.id)

    def end(self) -> None:
        """Take no more tickets; a thread ends after its task."""
        self._ended = True
        while True:
            try:
                self._tickets.get_nowait()
            except queue.Empty:
                break
        for _ in self._threads:
            self._tickets.put(None)

    def _work(self) -> None:
        while (ticket := self._tickets.get()) is not None and not self._ended:
            try:
                self._run(ticket)
            except BaseException:  # noqa: BLE001  (a defect of ours, or an interrupt: the thread goes on)
                log.exception("unexpected error in a thread that runs tickets; it continues")
