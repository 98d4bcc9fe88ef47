"""What else one might take: the standard library's pool, and queues that keep tasks in SQLite.

All run in this process, four threads work, the no-op task returns a value. Each with its defaults.
"""

from __future__ import annotations

import importlib.metadata
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

from benchmarks.harness import WORKERS, Cell, Plan, Stopwatch, percentile

_LOOK_EVERY = 0.0005


class Peer(Protocol):
    """A queue on a fresh folder: stores tasks, and runs them from ``work`` on."""

    def __init__(self, folder: str) -> None: ...
    def submit(self) -> object: ...
    def work(self) -> None: ...
    def wait(self, count: int) -> None: ...
    def close(self) -> None: ...


def noop() -> int:
    return 1


def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(_LOOK_EVERY)


class Pool:
    """``concurrent.futures.ThreadPoolExecutor``: nothing is stored."""

    def __init__(self, folder: str) -> None:
        self._pool = ThreadPoolExecutor(WORKERS)
        self._go = threading.Event()
        for _ in range(WORKERS):
            self._pool.submit(self._go.wait)
        self._last: Future[int] | None = None

    def submit(self) -> object:
        self._last = self._pool.submit(noop)
        return self._last

    def work(self) -> None:
        self._go.set()

    def wait(self, count: int) -> None:
        self._pool.shutdown(wait=True)

    def close(self) -> None:
        self._go.set()
        self._pool.shutdown()


class Huey:
    """huey's ``SqliteHuey`` with its consumer's threads in this process."""

    def __init__(self, folder: str, **options: Any) -> None:
        from huey import SqliteHuey

        self._huey = SqliteHuey("bench", filename=os.path.join(folder, "huey.db"), **options)
        self._task = self._huey.task()(noop)
        self._consumer: Any = None

    def submit(self) -> object:
        return self._task()

    def work(self) -> None:
        self._consumer = self._huey.create_consumer(workers=WORKERS, periodic=False)
        handlers = {number: signal.getsignal(number) for number in self._consumer._signal_actions}
        self._consumer.start()
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def wait(self, count: int) -> None:
        # How many results are stored is counted over all of them: looked at seldom.
        while (left := count - self._huey.result_count()) > 0:
            time.sleep(min(0.05, left / 50_000))

    def close(self) -> None:
        if self._consumer is not None:
            self._consumer.stop(graceful=True)
        self._huey.storage.close()


class LiteQueue:
    """litequeue: each of the threads has a connection of its own."""

    def __init__(self, folder: str) -> None:
        self._path = os.path.join(folder, "litequeue.db")
        self._producer = self._open()
        self._done: list[int] = []
        self._stopped = False
        self._threads: list[threading.Thread] = []

    def _open(self) -> Any:
        from litequeue import LiteQueue

        return LiteQueue(self._path, timeout=60)

    def submit(self) -> object:
        return self._producer.put("noop")

    def work(self) -> None:
        self._threads = [threading.Thread(target=self._work) for _ in range(WORKERS)]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        queue = self._open()
        while not self._stopped:
            message = queue.pop()
            if message is None:
                time.sleep(0.001)
                continue
            noop()
            queue.done(message.message_id)
            self._done.append(1)
        queue.conn.close()

    def wait(self, count: int) -> None:
        _until(lambda: len(self._done) >= count)

    def close(self) -> None:
        self._stopped = True
        for thread in self._threads:
            thread.join()
        self._producer.conn.close()


class PersistQueue:
    """persist-queue's ``SQLiteAckQueue``."""

    def __init__(self, folder: str) -> None:
        from persistqueue import SQLiteAckQueue

        self._queue = SQLiteAckQueue(folder, multithreading=True, auto_commit=True)
        self._done: list[int] = []
        self._threads: list[threading.Thread] = []

    def submit(self) -> object:
        return self._queue.put("noop")

    def work(self) -> None:
        self._threads = [threading.Thread(target=self._work) for _ in range(WORKERS)]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        while (item := self._queue.get()) != "stop":
            noop()
            self._queue.ack(item)
            self._done.append(1)

    def wait(self, count: int) -> None:
        _until(lambda: len(self._done) >= count)

    def close(self) -> None:
        for _ in self._threads:
            self._queue.put("stop")
        for thread in self._threads:
            thread.join()
        self._queue.close()


@contextmanager
def _opened(make: Callable[[str], Peer], folder: str) -> Iterator[Peer]:
    peer = make(folder)
    try:
        yield peer
    finally:
        peer.close()


def _backlog(make: Callable[[str], Peer], count: int, folder: str) -> dict[str, float]:
    with _opened(make, folder) as peer:
        with Stopwatch() as submitting:
            for _ in range(count):
                peer.submit()
        with Stopwatch() as draining:
            peer.work()
            peer.wait(count)
    return {"submit": submitting.rate(count), "drain": draining.rate(count)}


def _together(make: Callable[[str], Peer], count: int, folder: str) -> dict[str, float]:
    with _opened(make, folder) as peer:
        peer.work()
        with Stopwatch() as watch:
            for _ in range(count):
                peer.submit()
            peer.wait(count)
    return {"together": watch.rate(count)}


def _pool_latency(plan: Plan, folder: str) -> dict[str, float]:
    began, seen = [], []
    with ThreadPoolExecutor(WORKERS) as pool:
        for _ in range(plan.samples):
            time.sleep(0.004)
            submitted = time.perf_counter()
            begin = pool.submit(time.perf_counter).result()
            seen.append(1e6 * (time.perf_counter() - submitted))
            began.append(1e6 * (begin - submitted))
    return {
        "begins-p50": percentile(began, 50),
        "begins-p99": percentile(began, 99),
        "result-p50": percentile(seen, 50),
        "result-p99": percentile(seen, 99),
    }


def _pool_sleepers(plan: Plan, folder: str) -> dict[str, float]:
    from benchmarks.taskx_bench import NAP, SLEEPERS

    with Stopwatch() as watch, ThreadPoolExecutor(SLEEPERS) as pool:
        for _ in range(plan.sleepers):
            pool.submit(time.sleep, NAP)
    return {"sleepers": watch.seconds / (plan.sleepers * NAP / SLEEPERS)}


#: Name, distribution that must be installed, what its commits survive, how it is made.
PEERS: tuple[tuple[str, str | None, str, Callable[[str], Any]], ...] = (
    ("ThreadPoolExecutor", None, "memory", Pool),
    ("huey", "huey", "full", Huey),
    ("huey fsync=False", "huey", "none", partial(Huey, fsync=False)),
    ("litequeue", "litequeue", "process", LiteQueue),
    ("persist-queue", "persist-queue", "full", PersistQueue),
)

#: Where more would only take long, or make a peer look slow: litequeue is, with a long backlog.
_MOST = {"litequeue": 2_000, "huey fsync=False": 8_000}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """The version of each peer's distribution; None where it is not installed."""
    return {name: _version(name) for _, name, _, _ in PEERS if name is not None}


def missing() -> list[tuple[str, str]]:
    """Name and durability of the peers that are not installed."""
    found = versions()
    return [
        (who, durability)
        for who, distribution, durability, _ in PEERS
        if distribution is not None and found[distribution] is None
    ]


def cells(plan: Plan) -> list[Cell]:
    """All cells of the peers that are installed."""
    absent = dict(missing())
    cells = []
    for who, _, durability, make in PEERS:
        if who in absent:
            continue
        count = min(plan.count(durability), _MOST.get(who, plan.tasks))
        cells += [
            Cell(who, durability, partial(_backlog, make, count), ("submit", "drain"), rival=True),
            Cell(who, durability, partial(_together, make, count), ("together",), rival=True),
        ]
    latencies = ("begins-p50", "begins-p99", "result-p50", "result-p99")
    pool = "ThreadPoolExecutor"
    cells.append(Cell(pool, "memory", partial(_pool_latency, plan), latencies, rival=True))
    cells.append(Cell(pool, "memory", partial(_pool_sleepers, plan), ("sleepers",), rival=True))
    return cells
