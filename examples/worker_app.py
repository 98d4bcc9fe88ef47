"""A program for ``taskx worker``: one queue, at the top level of a module.

    pip install 'taskx-queue[cli]'
    taskx worker worker_app:queue --processes 2       # runs the tasks, until Ctrl-C
    python worker_app.py README.rst                    # in another terminal: submits a task

``Dockerfile`` and ``taskx.service`` run the same program in a container and under systemd. ``TASKX_DB`` is
the path of the file, which all of them share.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

from taskx import Config, Context, Queue, SQLiteRepository

queue = Queue(SQLiteRepository(os.environ.get("TASKX_DB", "tasks.db")), Config(worker_num=4))


@queue.executor(max_attempts=3, timeout=60)
def count_words(ctx: Context, path: str, most: int = 3) -> dict[str, int]:
    """Return the most frequent words of a text file."""
    words: Counter[str] = Counter()
    with open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            ctx.token.raise_if_cancelled()
            words.update(line.split())
    return dict(words.most_common(most))


def main() -> None:
    """Submit a task for each file, and wait for the results."""
    handles = [count_words.submit(path=str(Path(name).resolve())) for name in sys.argv[1:]]
    for handle in handles:
        print(handle.result(timeout=300))


if __name__ == "__main__":
    main()
