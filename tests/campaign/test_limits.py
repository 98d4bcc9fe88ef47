"""A campaign about limits: processes are killed all the time, and no limit is ever exceeded."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

import pytest
from helpers import PATIENCE

from taskx import Queue, SQLiteRepository

from . import limits_worker

# How long a process may take to hear of another limit, in seconds, and how far a begin may lie behind the
# moment at which its token was taken.
LATE, LAG = 2.5, 0.5
SCRIPT = Path(limits_worker.__file__)


def run(folder: Path, *, seconds: float, processes: int, keys: int, each: int, seed: int = 1):
    """Run tasks of keys while processes are killed; return the starts by limit, and the changes of N."""
    chance, file = random.Random(seed), str(folder / "tasks.db")
    queue = Queue(SQLiteRepository(file))
    limits_worker.declare(queue)
    queue.declare("plain", "shared")
    for n in range(each):
        for number in range(keys):
            name = ("n1:", "n2:", "n3:", "n4:", "n5:", "v:", "r:", "s:")[number % 8]
            cost = {"units": 1 + n % 50} if name == "r:" else None
            queue.submit(
                "plain" if number % 3 else "shared",
                {"seconds": chance.choice([0, 0.005, 0.02])},
                key=f"{name}{number}",
                cost=cost,
            )
    arguments = [sys.executable, str(SCRIPT), file, str(folder)]
    path = f"{SCRIPT.parents[2]}:{os.environ.get('PYTHONPATH', '')}"
    start = lambda: subprocess.Popen(  # noqa: E731
        arguments, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.DEVNULL
    )
    running, kills, turns = [start() for _ in range(processes)], 0, [(0.0, 5)]
    begun, changed, pause = time.monotonic(), time.monotonic(), threading.Event()
    try:
        while kills < 2 or time.monotonic() < begun + seconds:
            pause.wait(1)
            victim = chance.randrange(processes)
            running[victim].kill()
            running[victim].wait()
            running[victim], kills = start(), kills + 1
            if time.monotonic() > changed + 2:
                changed, number = time.monotonic(), chance.randrange(1, 6)
                turns.append((time.time(), number))
                queue.tune(limit="v:", concurrency=number)
        end = time.monotonic() + 10 * PATIENCE
        while queue.count_tasks(status="completed") < keys * each and time.monotonic() < end:
            pause.wait(0.2)
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert queue.count_tasks(status="completed") == keys * each
    starts = defaultdict(list)
    for line in (folder / "log").read_text().splitlines():
        name, taken, at, seen = line.split()
        starts[name].append((float(at), float(seen), int(taken)))
    return starts, turns, kills


def check(starts, turns, late=LATE):
    """Check that no limit was exceeded, and return the most at once by limit."""
    most = defaultdict(int)
    for name, some in starts.items():
        limit = name.partition(":")[0]
        most[limit] = max(most[limit], *(taken for *_, taken in some))
    for number in range(1, 6):
        assert most[f"n{number}"] <= number
    assert most["api"] <= 3
    assert most["s"] <= 4
    assert most["r"] <= 3
    for name, some in starts.items():
        if name.startswith("v:"):
            for at, _, taken in some:
                known = [n for since, n in turns if since <= at]
                recent = [n for since, n in turns if at - late <= since <= at]
                assert taken <= max([known[-1], *recent, known[-1 - len(recent)]]), (name, at)
        if name.startswith("r:"):
            times = sorted(at for at, *_ in some)
            for first in range(len(times)):
                for last in range(first, len(times)):
                    allowed = 3 + 20 * (times[last] - times[first] + LAG)
                    assert last - first + 1 <= allowed, name
    return dict(most)


@pytest.mark.process
def test_no_limit_is_exceeded_while_processes_are_killed(tmp_path):
    """The small version; ``python -m campaign.test_limits 60 200 40`` in ``tests`` is a large one."""
    starts, turns, kills = run(tmp_path, seconds=3, processes=2, keys=16, each=6)
    check(starts, turns, late=PATIENCE)  # a loaded machine may stop a process
    assert kills >= 2


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as made:
        began = time.monotonic()
        keys, each = map(int, sys.argv[2:])
        found = run(Path(made), seconds=float(sys.argv[1]), processes=4, keys=keys, each=each)
        print(check(*found[:2]), f"{found[2]} kills, {sum(map(len, found[0].values()))} starts,")
        print(f"{len(found[1]) - 1} changes of N, {time.monotonic() - began:.0f} s")
