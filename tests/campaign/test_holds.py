"""A campaign about refusals: an API refuses calls, and all processes heed the first refusal."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import PATIENCE

from taskx import Queue, SQLiteRepository

from . import holds_worker
from .holds_worker import Rule

SCRIPT = Path(holds_worker.__file__)


class Found(NamedTuple):
    """What a run has shown."""

    calls: int
    refused: int
    later: int  #: refused after the end of the first hold
    most: int  #: allowed in any period
    first: int  #: calls in the first quarter of a period after the first hold
    burst: int  #: most calls in a twentieth of a period, after the first hold
    seconds: float  #: from the first call to the last
    ideal: float  #: from the first call, which was refused
    snoozes: int


def run(folder: Path, *, tasks: int, processes: int, rule: Rule, burst: int) -> Found:
    """Run tasks that call the API; return what it has seen. No task may fail."""
    file = str(folder / "tasks.db")
    queue = Queue(SQLiteRepository(file))
    queue.declare("call")
    for _ in range(tasks):
        queue.submit("call")
    arguments = [sys.executable, str(SCRIPT), file, str(folder), str(burst), *map(str, rule)]
    path = f"{SCRIPT.parents[2]}:{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "PYTHONPATH": path}
    running = [
        subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL)
        for _ in range(processes)
    ]
    end = time.monotonic() + 10 * PATIENCE + 2 * tasks / rule.calls * rule.period
    try:
        while queue.count_tasks(status="completed") < tasks and time.monotonic() < end:
            threading.Event().wait(0.2)
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert queue.count_tasks(status="completed") == tasks
    snoozes = errors = 0
    for task in queue.iter_tasks():
        snoozes, errors = snoozes + task.snoozes, errors + task.errors
    assert errors == 0
    return judge(folder, rule, snoozes)


def judge(folder: Path, rule: Rule, snoozes: int) -> Found:
    lines = [line.split() for line in (folder / "calls").read_text().splitlines()]
    calls = sorted((float(at), refused == "1", float(wait)) for at, refused, wait in lines)
    refusals = [(at, wait) for at, refused, wait in calls if refused]
    allowed = [at for at, refused, _ in calls if not refused]
    first, wait = refusals[0] if refusals else (calls[-1][0], 0.0)
    after = [at for at, *_ in calls if at > first + wait]
    return Found(
        calls=len(calls),
        refused=len(refusals),
        later=sum(at > first + wait for at, _ in refusals),
        most=densest(allowed, rule.period),
        first=sum(at < first + wait + rule.period / 4 for at in after),
        burst=densest(after, rule.period / 20),
        seconds=calls[-1][0] - calls[0][0],
        ideal=len(allowed) / rule.calls * rule.period,
        snoozes=snoozes,
    )


def densest(times: list[float], period: float) -> int:
    """Return the most of these times in any period."""
    most = start = 0
    for end, at in enumerate(times):
        while times[start] <= at - period:
            start += 1
        most = max(most, end - start + 1)
    return most


@pytest.mark.process
def test_all_processes_heed_a_refusal(tmp_path):
    """The small version; ``python -m campaign.test_holds 3000 4 100 2 4`` in ``tests`` is a large one."""
    found = run(tmp_path, tasks=60, processes=2, rule=Rule(20, 0.5), burst=3)
    assert found.refused
    assert found.snoozes == found.refused
    assert found.most <= 20


if __name__ == "__main__":
    tasks, processes, calls = map(int, sys.argv[1:4])
    with tempfile.TemporaryDirectory() as made:
        rule = Rule(calls, float(sys.argv[4]))
        print(run(Path(made), tasks=tasks, processes=processes, rule=rule, burst=int(sys.argv[5])))
