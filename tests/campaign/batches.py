"""The campaign about calls for many tasks: poison that raises, and tasks that kill their process.

    python -m tests.campaign.batches --tasks 10000

It prints what was counted, and fails if a task other than the poison has failed, or the reverse.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from taskx import Config, Queue, SQLiteRepository, Task, TaskStatus

from .campaign import LONGEST, until

_BATCH = 100
# A child imports this module under the same name as its parent.
_BASE = Path(__file__).parents[1 + __package__.count(".")]
#: What becomes of a task.
FINE, POISON, KILLER = "fine", "poison", "killer"


def work(file: str, log: str) -> None:
    """Run tasks until somebody kills this process, mostly a task."""
    queue = Queue(SQLiteRepository(file), Config(worker_num=2))
    calls = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    @queue.executor("embed", batch=_BATCH, wait=0.05)
    def embed(tasks: list[dict[str, Any]]) -> list[int]:
        os.write(calls, f"{len(tasks)}\n".encode())
        kinds = [task["kind"] for task in tasks]
        if KILLER in kinds:
            os.kill(os.getpid(), signal.SIGKILL)
        if POISON in kinds:
            raise ValueError("poison")
        return [task["n"] + 1 for task in tasks]

    queue.start()
    signal.pause()


def run(folder: Path, number: int, poison: int, killers: int, seed: int) -> dict[str, Any]:
    """Run so many tasks, some of them poison, in two processes; return what was counted."""
    file, log = str(folder / "tasks.db"), str(folder / "calls")
    kinds = [POISON] * poison + [KILLER] * killers
    kinds += [FINE] * (number - len(kinds))
    random.Random(seed).shuffle(kinds)
    queue = Queue(SQLiteRepository(file), Config())
    queue.declare("embed")
    tasks = [Task(type="embed", params={"n": n, "kind": kind}) for n, kind in enumerate(kinds)]
    began = time.monotonic()
    ids = [handle.id for handle in queue.submit_many(tasks)]
    program = [sys.executable, "-m", f"{__package__}.batches", "--work", file, log]
    children: list[subprocess.Popen[bytes]] = []
    deaths = 0

    def over() -> bool:
        nonlocal deaths
        dead = [child for child in children if child.poll() is not None]
        deaths += len(dead)
        for child in dead:
            children.remove(child)
            assert child.returncode == -signal.SIGKILL, f"a process ended: {child.returncode}"
        while len(children) < 2:
            children.append(subprocess.Popen(program, cwd=_BASE))
        # Not "none is pending or running": one may become the other between the two counts.
        return sum(queue.count_tasks(status=end) for end in ("completed", "failed")) == number

    try:
        until(over, "all tasks have ended", 10 * LONGEST)
        # One may have died after it was looked at, and its last task been ended by the other one.
        deaths += sum(child.poll() is not None for child in children)
    finally:
        for child in children:
            child.kill()
            child.wait()
    found = queue.repository.get_many(ids)
    ended = Counter[tuple[str, str]]()
    for task_id, (n, kind) in zip(ids, enumerate(kinds), strict=True):
        task = found[task_id]
        right = task.status is not TaskStatus.COMPLETED or task.result == n + 1
        ended[kind, task.status.value if right else "wrong result"] += 1
    sizes = [int(line) for line in Path(log).read_text().split()]
    queue.repository.close()
    return {
        "ended": dict(ended),
        "calls": len(sizes),
        "calls for many": sum(size > 1 for size in sizes),
        "deaths": deaths,
        "seconds": round(time.monotonic() - began, 1),
    }


def right(number: int, poison: int, killers: int) -> dict[tuple[str, str], int]:
    """Return how the tasks must end."""
    ends = {(FINE, "completed"): number - poison - killers, (POISON, "failed"): poison}
    return {**ends, (KILLER, "failed"): killers}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", nargs=2)
    parser.add_argument("--tasks", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    if given.work:
        work(*given.work)
    counts = given.tasks, given.tasks // 100, given.tasks // 1000
    with tempfile.TemporaryDirectory() as folder:
        found = run(Path(folder), *counts, given.seed)
    print(found)
    return int(found["ended"] != right(*counts))


if __name__ == "__main__":
    sys.exit(main())
