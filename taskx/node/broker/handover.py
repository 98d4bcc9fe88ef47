"""Handing over: threads that run the tasks of tickets whose broker must not be kept waiting."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from taskx.node.broker.tickets import Ticket
from taskx.tasks.log import log


class HandOver:
    """Threads that take tickets from the threads of a broker.

    There is no buffer: a ticket is taken when a thread is free for it. Otherwise a process whose threads
    are all busy would take one ticket after the other from processes that are idle: RabbitMQ deals messages
    out in turn, and an actor of Dramatiq that returns at once has acknowledged its message.

    Args:
        run: runs the task of a ticket, in the thread that calls it.
        workers: the number of threads.
        within: seconds for which a ticket waits for a free thread.
    """

    def __init__(self, run: Callable[[Ticket], None], workers: int, within: float) -> None:
        self._run = run
        self._within = within
        self._tickets: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self._free = threading.Semaphore(workers)
        self._ended = False
        self._threads = [
            threading.Thread(target=self._work, name=f"taskx-ticket-{number}", daemon=True)
            for number in range(1, workers + 1)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, ticket: Ticket) -> bool:
        """Wait for a free thread, and give it a ticket; return False if there is none in time."""
        if not self._free.acquire(timeout=self._within):
            return False
        if self._ended:
            self._free.release()  # the next one that waits ends its wait, too
            return False
        self._tickets.put(ticket)
        return True

    def end(self) -> None:
        """Take no more tickets; a thread ends after its task."""
        self._ended = True
        self._free.release()
        for _ in self._threads:
            self._tickets.put(None)

    def _work(self) -> None:
        while (ticket := self._tickets.get()) is not None:
            try:
                self._run(ticket)
            except BaseException:  # noqa: BLE001  (a defect of ours, or an interrupt: the thread goes on)
                log.exception("unexpected error in a thread that runs tickets; it continues")
            self._free.release()
