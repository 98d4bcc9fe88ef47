"""Measure what the threads of one process do at once, with the interpreter's lock or without.

    python -m benchmarks.threads [PYTHON...]

It measures this Python and the other ones in turns, each in processes of its own, and prints the medians.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROUNDS = 5
#: Items of a map, and turns of the loop that each of them is.
ITEMS, TURNS = 100, 100_000
#: Tasks of the other measurements.
TASKS = 2000


def measured() -> dict[str, float]:
    """Return what one round of this process takes, in seconds, or in microseconds of processor time."""
    from taskx import Config, Queue, SQLiteRepository

    def mapped(workers: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            store = SQLiteRepository(Path(folder, "tasks.db"), durability="process")
            queue = Queue(store, Config(worker_num=workers))

            @queue.executor()
            def loop(n: int) -> int:
                total = 0
                for number in range(TURNS):
                    total ^= number
                return total

            with queue:
                began = time.perf_counter()
                for _ in queue.map(loop, range(ITEMS)):
                    pass
                return time.perf_counter() - began

    def plain() -> tuple[float, float]:
        with tempfile.TemporaryDirectory() as folder:
            store = SQLiteRepository(Path(folder, "tasks.db"), durability="process")
            queue = Queue(store, Config(worker_num=8, buffer_size=TASKS))

            @queue.executor()
            def nothing(n: int) -> None:
                pass

            began = time.process_time()
            for n in range(TASKS):
                nothing.submit(n=n)
            submitted = time.process_time()
            with queue:
                queue.drain()
                drained = time.process_time()
            return (submitted - began) / TASKS * 1e6, (drained - submitted) / TASKS * 1e6

    one, two = mapped(1), mapped(2)
    submit, drain = plain()
    return {"one worker": one, "two workers": two, "submit": submit, "drain": drain}


def main(pythons: Sequence[str]) -> None:
    """Measure Pythons in turns, and print a row for each."""
    found: dict[str, list[dict[str, float]]] = {python: [] for python in pythons}
    for _ in range(ROUNDS):
        for python, rounds in found.items():
            told = subprocess.run(
                [python, "-m", "benchmarks.threads", "--once"],
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            rounds.append(json.loads(told))
    for python, rounds in found.items():
        times = [one["one worker"] / one["two workers"] for one in rounds]
        words = [f"two workers {_spread(times)} times one"]
        words += [
            f"{name} {_spread([one[name] for one in rounds])} µs" for name in ("submit", "drain")
        ]
        sys.stdout.write(f"{python}: {', '.join(words)}\n")


def _spread(values: Sequence[float]) -> str:
    """Return the median, with the least and the greatest value."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


if __name__ == "__main__":
    if sys.argv[1:] == ["--once"]:
        sys.stdout.write(json.dumps(measured()))
    else:
        main([sys.executable, *sys.argv[1:]])
