"""Round trips to the server: counted, not timed.

The housekeeper, and threads that drain or stop a queue, also poll the server a fixed number of times per
second. The slower the machine, the more polls there are per task, so they are counted separately.
"""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import Any

from pymongo.monitoring import CommandListener

from benchmarks.harness import TASKX, Cell, Plan
from benchmarks.mongo.store import OnMongo
from benchmarks.taskx_bench import busy, noops, queue_on
from taskx import Queue

#: The command by which a change stream asks for more changes.
_STREAM = "getMore"
_TASKS = ("tasks", "tasks.batches")
_READS = frozenset(("find", "aggregate", "distinct"))
#: Threads whose reads count as polls.
_DRAINING = "benchmark-drain"
_POLLING = frozenset(("taskx-housekeeper", "taskx-changes", "taskx-stop", _DRAINING))
#: Number of tasks in the backlog. The first sixteen start one by one, until the type is known to be short.
_BACKLOG = 200


class Commands(CommandListener):
    """The commands about tasks, in order, without the heartbeats of nodes."""

    def __init__(self) -> None:
        self._log: list[tuple[int, str]] = []
        #: Number of polls.
        self.polls = 0

    def started(self, event: Any) -> None:
        name = event.command_name
        on = event.command.get("collection" if name == _STREAM else name)
        if on not in _TASKS and name != "commitTransaction":
            return
        if any(update.get("upsert") for update in event.command.get("updates", ())):
            name = "insert"  # the command also contains starts and outcomes
        if name in _READS and threading.current_thread().name in _POLLING:
            self.polls += 1
        else:
            self._log.append((threading.get_ident(), name))

    def succeeded(self, event: Any) -> None: ...

    def failed(self, event: Any) -> None: ...

    def clear(self) -> None:
        """Forget all commands."""
        self._log.clear()
        self.polls = 0

    def on(self, thread: int) -> int:
        """Return how many commands a thread sent, including the writes of others that it committed."""
        return sum(who == thread for who, _ in list(self._log))

    def count(self, *, but: tuple[str, ...] = (_STREAM,)) -> int:
        """Return how many commands were sent for which a thread waits, except those named in ``but``."""
        return sum(name not in but for _, name in list(self._log))

    def of_stream(self) -> int:
        """Return how many commands a change stream sent, on a connection of its own."""
        return sum(name == _STREAM for _, name in list(self._log))


def _of_submit(plan: Plan, url: str, folder: str) -> dict[str, float]:
    """Count round trips of submits to a started queue whose workers are busy."""
    seen = Commands()
    with queue_on(OnMongo(url, seen), folder, buffer=plan.synced + 5) as queue, busy(queue):
        queue.submit("noop")
        seen.clear()
        for _ in range(plan.synced):
            queue.submit("noop")
        return {"trips-submit": seen.on(threading.get_ident()) / plan.synced}


def _of_many(plan: Plan, url: str, folder: str) -> dict[str, float]:
    seen = Commands()
    with queue_on(OnMongo(url, seen), folder) as queue:
        queue.submit("noop")
        seen.clear()
        queue.submit_many(noops(plan.many))
        return {"trips-many": seen.count()}


def _of_backlog(plan: Plan, url: str, folder: str) -> dict[str, float]:
    seen, tasks = Commands(), max(plan.synced, _BACKLOG)
    with queue_on(OnMongo(url, seen), folder, buffer=tasks) as queue, busy(queue) as go:
        queue.submit_many(noops(tasks))
        seen.clear()
        go()
        _drain(queue)
        return {"trips-backlog": seen.count() / tasks}


def _of_producer(plan: Plan, url: str, folder: str) -> dict[str, float]:
    """Count round trips while this thread submits tasks one by one."""
    seen = Commands()
    with queue_on(OnMongo(url, seen), folder, buffer=plan.synced) as queue, queue:
        queue.submit("noop").result()
        seen.clear()
        for _ in range(plan.synced):
            queue.submit("noop")
        own = seen.on(threading.get_ident())
        _drain(queue)
        return {
            "trips-submitting": own / plan.synced,
            "trips-producer": seen.count(but=("insert", _STREAM)) / plan.synced,
            "trips-stream": seen.of_stream() / plan.synced,
        }


def _of_one(plan: Plan, url: str, folder: str) -> dict[str, float]:
    seen = Commands()
    with queue_on(OnMongo(url, seen), folder) as queue, queue:
        queue.submit("noop").result()
        seen.clear()
        began = time.monotonic()
        for _ in range(plan.samples):
            queue.submit("noop").result()
        took = time.monotonic() - began
        return {"trips-alone": seen.count() / plan.samples, "trips-polls": seen.polls / took}


def _drain(queue: Queue) -> None:
    """Drain a queue on a thread whose name marks its reads as polls."""
    thread = threading.Thread(target=queue.drain, name=_DRAINING)
    thread.start()
    thread.join()


def cells(plan: Plan, url: str) -> list[Cell]:
    """Return all cells that count round trips."""
    return [
        Cell(TASKX, OnMongo.durability, partial(run, plan, url), figures, once=True)
        for run, figures in (
            (_of_submit, ("trips-submit",)),
            (_of_many, ("trips-many",)),
            (_of_backlog, ("trips-backlog",)),
            (_of_producer, ("trips-submitting", "trips-producer", "trips-stream")),
            (_of_one, ("trips-alone", "trips-polls")),
        )
    ]
