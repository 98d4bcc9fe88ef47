"""A queue whose tasks run in Dramatiq's workers.

    pip install 'taskx-queue[dramatiq]' redis
    dramatiq dramatiq_app:broker                       # runs the tasks, until Ctrl-C
    python dramatiq_app.py README.rst                  # in another terminal: submits a task

``BROKER`` is the URL of the broker. ``TASKX_DB`` is the path of the file, which all of them share. On
several hosts, use ``MongoRepository`` in place of the file, and leave out ``one_host``.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

from dramatiq.brokers.redis import RedisBroker

from taskx import Context, Queue, SQLiteRepository
from taskx.contrib.dramatiq import DramatiqEngine

# Without time-outs, a broker that hangs would hold up the thread that sends tickets for ever.
broker = RedisBroker(
    url=os.environ.get("BROKER", "redis://localhost/0")
    + "?socket_timeout=5&socket_connect_timeout=5"
)

queue = Queue(
    SQLiteRepository(os.environ.get("TASKX_DB", "tasks.db")),
    engine=DramatiqEngine(broker, one_host=True),
)


@queue.executor(max_attempts=3, timeout=60)
def sha256(ctx: Context, path: str) -> str:
    """Return the checksum of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            ctx.token.raise_if_cancelled()
            digest.update(block)
    return digest.hexdigest()


def main() -> None:
    """Submit a task for each file, and wait for the results."""
    with queue:  # sends tickets; the workers run the tasks
        names = sys.argv[1:]
        handles = [sha256.submit(path=str(Path(name).resolve())) for name in names]
        for name, handle in zip(names, handles, strict=True):
            print(handle.result(timeout=300), name)


if __name__ == "__main__":
    main()
