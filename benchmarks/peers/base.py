"""The base class of peers, and their measurements."""

from __future__ import annotations

import os
import random
import select
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from benchmarks.children import PATIENCE, ChildFailed, talking
from benchmarks.harness import IDLE, NAP, PAUSE, SLEEPERS, WORKERS, Stopwatch, percentile


def noop() -> int:
    return 1


def nap() -> int:
    time.sleep(NAP)
    return 1


def same(value: int) -> int:
    return value


def tell_time() -> float:
    return time.perf_counter()


class Peer(ABC):
    """A queue in a folder. It stores tasks, and runs them after ``work()``.

    Args:
        folder: the folder for its files.
        workers: the number of worker threads or processes.
    """

    @abstractmethod
    def __init__(self, folder: str, workers: int = WORKERS) -> None: ...

    @abstractmethod
    def submit(self, task: str = "noop") -> object:
        """Submit a task that does nothing and returns a value, or one that sleeps: ``nap``."""

    @abstractmethod
    def work(self) -> None:
        """Start the workers."""

    @abstractmethod
    def wait(self, count: int) -> None:
        """Wait until ``count`` of all submitted tasks are done and recorded as done."""

    @abstractmethod
    def close(self) -> None:
        """End all threads and processes that were started."""

    def clock(self) -> tuple[float, float | None]:
        """Submit a task. Return when it began, and when its result was seen (None if it has none)."""
        raise NotImplementedError

    def map(self, count: int) -> Iterable[int]:
        """Run a task that returns its number for each of ``count`` numbers; return the results in order."""
        raise NotImplementedError

    def warm_up(self) -> int:
        """Wait until the started workers are ready. Return the number of tasks that this used."""
        return 0

    def drained(self, count: int) -> float:
        """Start the workers on a backlog of ``count`` tasks. Return the finished tasks per second."""
        with Stopwatch() as watch:
            self.work()
            self.wait(count)
        return watch.rate(count)


class Apart(Peer):
    """A peer whose workers are separate processes.

    Attributes:
        poll_interval: seconds between checks of their progress.
    """

    poll_interval = 0.001

    @abstractmethod
    def finished(self) -> int:
        """Return the number of tasks that are recorded as done."""

    def wait(self, count: int) -> None:
        until(lambda: self.finished() >= count, self.poll_interval)

    def warm_up(self) -> int:
        self.submit()
        self.wait(1)
        return 1

    def drained(self, count: int) -> float:
        """Measure from the end of the first task, so that the start of the interpreters does not count."""
        self.work()
        self.wait(1)
        first = self.finished()
        with Stopwatch() as watch:
            self.wait(count)
        return watch.rate(max(1, count - first))


class Began:
    """A pipe in a folder, by which tasks of any process report when they began."""

    def __init__(self, folder: str) -> None:
        path = os.path.join(folder, "began")
        if not os.path.exists(path):
            os.mkfifo(path)
        self._pipe = os.open(path, os.O_RDWR)

    def tell(self) -> None:
        """Report that a task begins now."""
        os.write(self._pipe, f"{time.perf_counter()!r}\n".encode())

    def hear(self) -> float:
        """Return when the next task began.

        Raises:
            ChildFailed: no task began in time.
        """
        ready, _, _ = select.select([self._pipe], [], [], PATIENCE / 2)
        if not ready:
            raise ChildFailed("a task did not begin")
        return float(os.read(self._pipe, 100))

    def close(self) -> None:
        """Close the pipe."""
        os.close(self._pipe)


def until(condition: Callable[[], bool], poll_interval: float = 0.0005) -> None:
    """Wait until a condition is true.

    Raises:
        ChildFailed: it did not become true in time.
    """
    deadline = time.monotonic() + PATIENCE / 2
    while not condition():
        if time.monotonic() > deadline:
            raise ChildFailed(f"not done within {PATIENCE / 2:g} s")
        time.sleep(poll_interval)


def backlog(peer: Peer, count: int) -> dict[str, float]:
    """Submit ``count`` tasks, then start the workers."""
    with Stopwatch() as watch:
        for _ in range(count):
            peer.submit()
    return {"submit": watch.rate(count), "drain": peer.drained(count)}


def together(peer: Peer, count: int) -> dict[str, float]:
    """Start the workers, then submit ``count`` tasks."""
    peer.work()
    before = peer.warm_up()
    with Stopwatch() as watch:
        for _ in range(count):
            peer.submit()
        peer.wait(before + count)
    return {"together": watch.rate(count)}


def mapped(peer: Peer, count: int) -> dict[str, float]:
    """Take the results of a map over ``count`` numbers, one after the other."""
    peer.work()
    with Stopwatch() as watch:
        for _ in peer.map(count):
            pass
    return {"map": watch.rate(count)}


def latency(peer: Peer, count: int) -> dict[str, float]:
    """Submit ``count`` tasks one by one, each after the previous one is done."""
    peer.work()
    peer.clock()
    began, seen = [], []
    for _ in range(count):
        time.sleep(IDLE)
        submitted = time.perf_counter()  # on Linux the same clock in every process
        begin, result = peer.clock()
        began.append(1e6 * (begin - submitted))
        if result is not None:
            seen.append(1e6 * (result - submitted))
    figures = {"begins-p50": percentile(began, 50), "begins-p99": percentile(began, 99)}
    if seen:
        figures |= {"result-p50": percentile(seen, 50), "result-p99": percentile(seen, 99)}
    return figures


def sleepers(peer: Peer, count: int) -> dict[str, float]:
    """Submit sleeping tasks one by one. Return their total time, as a multiple of the ideal time."""
    peer.work()
    before = peer.warm_up()
    with Stopwatch() as watch:
        for _ in range(count):
            peer.submit("nap")
        peer.wait(before + count)
    return {"sleepers": watch.seconds / (count * NAP / SLEEPERS)}


def elsewhere(peer: Peer, count: int) -> dict[str, float]:
    """Submit tasks at random moments. They begin in the workers' process."""
    chance = random.Random(0)
    samples = []
    peer.clock()
    for _ in range(count):
        time.sleep(chance.uniform(0, PAUSE))
        submitted = time.perf_counter()
        begin, _ = peer.clock()
        samples.append(1000 * (begin - submitted))
    return {"elsewhere-p50": percentile(samples, 50), "elsewhere-p99": percentile(samples, 99)}


@contextmanager
def worked_elsewhere(peer: Peer, *again: str) -> Iterator[None]:
    """Run the peer's workers in another process during the block.

    Args:
        peer: the peer that submits.
        again: arguments from which :mod:`benchmarks.peers.serve` makes another one in the same folder.
    """
    if isinstance(peer, Apart):
        peer.work()
        yield
        return
    with talking("-m", "benchmarks.peers.serve", *again) as child:
        child.hear("ready")
        yield


MEASURES: dict[str, Callable[[Peer, int], dict[str, float]]] = {
    "backlog": backlog,
    "together": together,
    "map": mapped,
    "latency": latency,
    "sleepers": sleepers,
    "elsewhere": elsewhere,
}
