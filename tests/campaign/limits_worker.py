"""A process of the campaign about limits: it runs tasks, and kernel locks witness who runs at once."""

from __future__ import annotations

import fcntl
import os
import sys
import threading
import time
from pathlib import Path

from taskx import Config, Queue, SQLiteRepository

#: More places than any limit has: a task takes the first that is free.
PLACES = 12


def witness(folder: Path, name: str) -> tuple[int, int]:
    """Take a place until it is closed or the process dies; return it, and its number from 1.

    The kernel frees the places of the dead. If no more than N run at once, no number is above N.
    """
    for number in range(PLACES):
        place = os.open(folder / f"{name}.{number}", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(place)
        else:
            return place, number + 1
    raise AssertionError(f"more than {PLACES} run at once: {name}")


def declare(queue: Queue) -> None:
    """Declare the limits of the campaign."""
    for number in range(1, 6):
        queue.limit(f"n{number}:", concurrency=number)
    queue.limit("v:", concurrency=5)
    queue.limit("r:", concurrency=3, rate=["20/s", "400 units/s"], burst=[3, 60])
    queue.limit("s:", share=True, concurrency=4)
    queue.limit("api", concurrency=3)


def main(file: str, folder: Path) -> None:
    """Run tasks until somebody kills this process."""
    queue = Queue(SQLiteRepository(file), Config(worker_num=6))
    declare(queue)
    log = os.open(folder / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def work(ctx: object, seconds: float) -> None:
        task = ctx.task  # type: ignore[attr-defined]
        names = [name for name in (task.concurrency_key, task.type == "shared" and "api") if name]
        places = [(name, *witness(folder, str(name).replace(":", "_"))) for name in names]
        at = task.started_at.timestamp()
        for name, _, taken in places:
            os.write(log, f"{name} {taken} {at} {time.time()}\n".encode())
        threading.Event().wait(seconds)
        for _, place, _ in places:
            os.close(place)

    queue.executor("plain", max_crashes=1000)(work)
    queue.executor("shared", max_crashes=1000, limit="api")(work)
    queue.start()
    print("started", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
