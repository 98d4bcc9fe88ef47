"""A child of the benchmark: a process with a queue on a store that several processes share."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable

from benchmarks.stores import named
from benchmarks.taskx_bench import busy, noops, queue_on
from taskx import Context, Queue

_AT_ONCE = 1_000


def say(*words: object) -> None:
    """Print a line, for the benchmark to read."""
    print(*words, flush=True)


def wait_to_be_ended() -> None:
    """Wait until the benchmark closes the standard input or kills this process."""
    sys.stdin.read()


def leave(queue: Queue, count: int) -> None:
    """Store tasks while other tasks keep the workers busy, and wait for the end."""
    with busy(queue):
        for _ in range(0, count, _AT_ONCE):
            queue.submit_many(noops(min(count, _AT_ONCE)))
        say("left")
        wait_to_be_ended()


def drain(queue: Queue, count: int) -> None:
    """Wait for a line of input, then run all tasks in the store."""
    say("ready")
    sys.stdin.readline()
    with queue:
        queue.drain()
        say("drained")
        wait_to_be_ended()


def hang(queue: Queue, count: int) -> None:
    """Run a task that does not end before this process does."""

    @queue.executor("orphan")
    def orphan() -> None:
        say("running")
        wait_to_be_ended()

    with queue:
        queue.submit("orphan").result()


def serve(queue: Queue, count: int) -> None:
    """Run tasks of other processes, which report when they began or when they were cancelled."""

    queue.executor("clock")(lambda: time.perf_counter())

    @queue.executor("until-cancelled")
    def until_cancelled(ctx: Context) -> None:
        say("running")
        ctx.token.wait()
        say("cancelled", time.perf_counter())
        ctx.token.raise_if_cancelled()

    with queue:
        say("ready")
        wait_to_be_ended()


def stand_by(queue: Queue, count: int) -> None:
    """Run no task. Print the processor time used so far for each line of input."""
    queue.executor("other")(lambda: None)
    with queue:
        say("ready")
        for _ in sys.stdin:
            say("used", time.process_time())


ROLES: dict[str, Callable[[Queue, int], None]] = {
    "leave": leave,
    "drain": drain,
    "hang": hang,
    "serve": serve,
    "stand-by": stand_by,
}


def main(role: str, folder: str, store: str, count: int) -> None:
    """Run one of the roles."""
    logging.getLogger("taskx").setLevel(logging.ERROR)
    with queue_on(named(store), folder, overflow="spill") as queue:
        ROLES[role](queue, count)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
