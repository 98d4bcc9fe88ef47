"""Cells, their figures, and the rounds in which they are measured."""

from __future__ import annotations

import gc
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

from benchmarks.children import ChildFailed

DURABILITIES = ("accepted", "full", "process")
WORKERS = 4
SLEEPERS, NAP = 32, 0.01
FLOOR, LEAN, TASKX = "floor", "lean floor", "TaskX"
#: What is kept of a task that has ended: a record with its status and times, and its result.
RECORD = "record, result"
#: Seconds between two tasks of a queue that counts as idle.
IDLE = 0.004
#: Longest pause, in seconds, between two tasks that one process submits and another one starts.
PAUSE = 0.1
ELSEWHERE = ("elsewhere-p50", "elsewhere-p99")
LATENCIES = ("begins-p50", "begins-p99", "result-p50", "result-p99")


@dataclass(frozen=True)
class Plan:
    """The amount of work of each cell, mostly numbers of tasks.

    Attributes:
        tasks: tasks of a cell whose commits do not wait for the disk.
        synced: tasks of a cell whose commits wait for the disk.
        many: tasks of one batch.
        samples: tasks whose latency is measured.
        sleepers: tasks that sleep.
        finished: finished or delayed tasks in the large file of the cells that compare two sizes of file.
        schedules: schedules that tick in the same minute, or not at all.
        delayed: tasks that become due at once.
        spilled: tasks stored to measure the memory of one.
        left: tasks that a dead process leaves.
        messages: tasks and cancels from one process to another.
        kills: processes killed to measure when their task starts again.
        seconds: the time for which an idle queue is watched, in seconds.
    """

    tasks: int = 20_000
    synced: int = 4_000
    many: int = 10_000
    samples: int = 400
    sleepers: int = 1_000
    finished: int = 1_000_000
    schedules: int = 10_000
    delayed: int = 200_000
    spilled: int = 100_000
    left: int = 100_000
    messages: int = 40
    kills: int = 3
    seconds: float = 3.0

    def count(self, durability: str) -> int:
        """Return the number of tasks of a cell with this durability."""
        return self.tasks if durability in ("process", "memory", "none") else self.synced

    def limited_to(self, tasks: int) -> Plan:
        """Return the same plan with at most this number of tasks per cell."""
        names = [f.name for f in fields(self) if f.name not in ("kills", "seconds")]
        return replace(self, **{name: min(getattr(self, name), tasks) for name in names})


QUICK = Plan(
    tasks=3_000,
    synced=600,
    samples=100,
    finished=20_000,
    schedules=1_000,
    delayed=20_000,
    spilled=20_000,
    left=10_000,
    messages=20,
    kills=1,
    seconds=1.0,
)


@dataclass(frozen=True)
class Cell:
    """One measurement: a function that takes a fresh folder and returns figures by name.

    Attributes:
        who: the name in the table.
        durability: the failures that a stored task survives, in the table's words.
        run: the function.
        figures: the names of the figures that it returns.
        rival: True for a peer: its best value counts, and it may fail.
        once: True if it is measured only in the first round.
        lacks: missing packages, without which it cannot run; empty for none.
        keeps: what is kept of a task that has ended.
    """

    who: str
    durability: str
    run: Callable[[str], Mapping[str, float]]
    figures: tuple[str, ...]
    rival: bool = False
    once: bool = False
    lacks: str = ""
    keeps: str = RECORD

    def matches(self, words: Sequence[str]) -> bool:
        """Return True if a figure's name begins with one of the words, or ``who`` contains one."""
        return not words or any(
            word.lower() in self.who.lower()
            or any(figure.startswith(word) for figure in self.figures)
            for word in words
        )


@dataclass
class Measured:
    """The values of one cell for one figure, one for each round; none for a round that failed."""

    figure: str
    who: str
    durability: str
    rival: bool
    lacks: str = ""
    keeps: str = RECORD
    values: list[float] = field(default_factory=list)

    def value(self, *, more_is_better: bool) -> float:
        """Return the median; for a rival, the best value."""
        if self.rival:
            return max(self.values) if more_is_better else min(self.values)
        return statistics.median(self.values)


Key = tuple[str, str, str]


def measure(cells: Sequence[Cell], rounds: int, *, progress: bool) -> dict[Key, Measured]:
    """Run every cell once per round, in random order, so that drift affects all cells equally."""
    measured = {
        (figure, cell.who, cell.durability): Measured(
            figure, cell.who, cell.durability, cell.rival, cell.lacks, cell.keeps
        )
        for cell in cells
        for figure in cell.figures
    }
    for number in range(rounds):
        order = [cell for cell in cells if not cell.lacks and (number == 0 or not cell.once)]
        random.Random(number).shuffle(order)
        for position, cell in enumerate(order, 1):
            began = time.perf_counter()
            for figure, value in _tried(cell).items():
                measured[figure, cell.who, cell.durability].values.append(value)
            if progress:
                print(
                    f"\rround {number + 1}/{rounds}, {position}/{len(order)}: "
                    f"{cell.who} {cell.durability} {cell.figures[0]} "
                    f"({time.perf_counter() - began:.1f} s)\x1b[K",
                    end="",
                    file=sys.stderr,
                    flush=True,
                )
    if progress:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    return measured


def _tried(cell: Cell) -> Mapping[str, float]:
    """Run a cell. If a rival fails, print the error and return no figures."""
    try:
        return run_cell(cell)
    except ChildFailed as error:
        if not cell.rival:
            raise
        print(f"\n{cell.who} FAILED: {error}", file=sys.stderr)
        return {}


def run_cell(cell: Cell) -> Mapping[str, float]:
    """Measure a cell in a fresh folder."""
    gc.collect()
    with tempfile.TemporaryDirectory(prefix="taskx-bench-", ignore_cleanup_errors=True) as folder:
        return cell.run(folder)


class Stopwatch:
    """``with Stopwatch() as watch: ...``; then ``watch.rate(n)``."""

    def __enter__(self) -> Stopwatch:
        self.began = time.perf_counter()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.seconds = time.perf_counter() - self.began

    def rate(self, count: int) -> float:
        """Return ``count`` per second."""
        return count / self.seconds


def percentile(samples: Sequence[float], percent: float) -> float:
    """Return the percentile of samples: ``percent`` percent of them are not larger."""
    ranked = sorted(samples)
    return ranked[min(len(ranked) - 1, int(len(ranked) * percent / 100))]
