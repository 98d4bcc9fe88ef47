"""A process of the campaign about limits: it runs tasks, and kernel locks witness who runs at once."""

from __future__ import annotations

import fcntl
import os
import sys
import time
from pathlib import Path

from taskx import Config, Queue, SQLiteRepository

#: More places than any limit has: a task takes the first that is free, and counts those that are not.
PLACES = 12


def witness(folder: Path, name: str) -> tuple[int, int]:
    """Take a place until the process closes it or dies; return it, and how many are taken with it."""
    taken, mine = 1, -1
    for number in range(PLACES):
        place = os.open(folder / f"{name}.{number}", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            taken += 1
            os.close(place)
            continue
        if mine < 0:
            mine = place
        else:
            os.close(place)
    return mine, taken


def declare(queue: Queue) -> None:
    """Declare the limits of the campaign."""
    for number in range(1, 6):
        queue.limit(f"n{number}:", concurrency=number)
    queue.limit("v:", concurrency=5)
    queue.limit("r:", concurrency=3, rate=["20/s", "400 units/s"], burst=[3, 60])
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
        time.sleep(seconds)
        for _, place, _ in places:
            os.close(place)

    queue.executor("plain", max_crashes=1000)(work)
    queue.executor("shared", max_crashes=1000, limit="api")(work)
    queue.start()
    print("started", flush=True)
    time.sleep(3600)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
