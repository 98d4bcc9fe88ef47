"""A child of the benchmark: the memory of the process for a spilled task, in bytes."""

from __future__ import annotations

import gc
import os
import sys

from benchmarks.stores import OnSQLite
from benchmarks.taskx_bench import busy, noops, queue_on

_AT_ONCE = 1_000


def resident() -> int:
    """Return the resident memory of this process in bytes."""
    gc.collect()
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(folder: str, count: int) -> None:
    """Print the memory per task that ``count`` spilled tasks add to a queue that already has some."""
    with queue_on(OnSQLite("process"), folder, overflow="spill") as queue, busy(queue):
        for _ in range(5):
            queue.submit_many(noops(_AT_ONCE))
        before = resident()
        for _ in range(0, count, _AT_ONCE):
            queue.submit_many(noops(_AT_ONCE))
        print(max(0, resident() - before) / count)


main(sys.argv[1], int(sys.argv[2]))
