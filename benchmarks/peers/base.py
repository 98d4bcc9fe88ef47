"""What a peer is, and how it is measured."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable

from benchmarks.children import PATIENCE, ChildFailed
from benchmarks.harness import IDLE, Stopwatch, percentile


def noop() -> int:
    return 1


class Peer(ABC):
    """A queue on a fresh folder: stores tasks, and runs them from ``work`` on.

    Args:
        folder: where it may keep its files.
    """

    @abstractmethod
    def __init__(self, folder: str) -> None: ...

    @abstractmethod
    def submit(self) -> object:
        """Submit a task that does nothing and returns a value."""

    @abstractmethod
    def work(self) -> None:
        """Start the workers."""

    @abstractmethod
    def wait(self, count: int) -> None:
        """Return when so many tasks, of all that were submitted, are done and recorded so."""

    @abstractmethod
    def close(self) -> None:
        """End all that was started."""

    def clock(self) -> tuple[float, float | None]:
        """Submit a task; returns when it began and, if the peer tells, when its result was seen."""
        raise NotImplementedError

    def warm_up(self) -> int:
        """Let started workers get ready; returns how many tasks it took."""
        return 0

    def drained(self, count: int) -> float:
        """Start the workers on a backlog of ``count``; returns how many a second are done."""
        with Stopwatch() as watch:
            self.work()
            self.wait(count)
        return watch.rate(count)


class Apart(Peer):
    """One whose workers are processes of their own.

    Attributes:
        look_every: seconds between looks at how far they are.
    """

    look_every = 0.001

    @abstractmethod
    def finished(self) -> int:
        """How many tasks are done and recorded so."""

    def wait(self, count: int) -> None:
        until(lambda: self.finished() >= count, self.look_every)

    def warm_up(self) -> int:
        self.submit()
        self.wait(1)
        return 1

    def drained(self, count: int) -> float:
        """As above, but the clock starts with the first task: not with the interpreters."""
        self.work()
        self.wait(1)
        first = self.finished()
        with Stopwatch() as watch:
            self.wait(count)
        return watch.rate(max(1, count - first))


def until(condition: Callable[[], bool], look_every: float = 0.0005) -> None:
    """Wait until it is true.

    Raises:
        ChildFailed: it never was.
    """
    deadline = time.monotonic() + PATIENCE / 2
    while not condition():
        if time.monotonic() > deadline:
            raise ChildFailed(f"not within {PATIENCE / 2:g} s")
        time.sleep(look_every)


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


def latency(peer: Peer, count: int) -> dict[str, float]:
    """Submit ``count`` tasks one by one, each when the one before is done."""
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


MEASURES: dict[str, Callable[[Peer, int], dict[str, float]]] = {
    "backlog": backlog,
    "together": together,
    "latency": latency,
}
