"""Peers whose workers are threads: the standard library's pool, and queues that store tasks in SQLite."""

from __future__ import annotations

import os
import signal
import threading
import time
from abc import abstractmethod
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.harness import WORKERS
from benchmarks.peers.base import Began, Peer, nap, noop, same, tell_time, until

_TASKS = {"noop": noop, "nap": nap}


class Pool(Peer):
    """``concurrent.futures.ThreadPoolExecutor``: nothing is stored."""

    def __init__(self, folder: str, workers: int = WORKERS) -> None:
        self._pool = ThreadPoolExecutor(workers)
        self._go = threading.Event()
        for _ in range(workers):
            self._pool.submit(self._go.wait)

    def submit(self, task: str = "noop") -> object:
        return self._pool.submit(_TASKS[task])

    def work(self) -> None:
        self._go.set()

    def wait(self, count: int) -> None:
        self._pool.shutdown(wait=True)

    def map(self, count: int) -> Iterable[int]:
        return self._pool.map(same, range(count))

    def clock(self) -> tuple[float, float | None]:
        return self._pool.submit(tell_time).result(), time.perf_counter()

    def close(self) -> None:
        self._go.set()
        self._pool.shutdown()


class Joblib:
    """joblib's ``Parallel`` with threads; nothing is stored. It has a map, and nothing else."""

    def __init__(self, folder: str, workers: int = WORKERS) -> None:
        from joblib import Parallel

        self._parallel = Parallel(workers, backend="threading", return_as="generator")

    def work(self) -> None:
        """Do nothing: its map starts the threads."""

    def map(self, count: int) -> Iterable[int]:
        from joblib import delayed

        task = delayed(same)
        results: Iterable[int] = self._parallel(task(n) for n in range(count))
        return results

    def close(self) -> None:
        """Do nothing: its map has ended the threads."""


class Huey(Peer):
    """huey's ``SqliteHuey`` with its consumer's threads in this process."""

    def __init__(self, folder: str, workers: int = WORKERS, **options: Any) -> None:
        from huey import SqliteHuey

        self._workers = workers
        self._huey = SqliteHuey("bench", filename=os.path.join(folder, "huey.db"), **options)
        self._tasks = {name: self._huey.task(name=name)(run) for name, run in _TASKS.items()}
        self._clock = self._huey.task(name="clock")(tell_time)
        self._consumer: Any = None

    def submit(self, task: str = "noop") -> object:
        return self._tasks[task]()

    def work(self) -> None:
        self._consumer = self._huey.create_consumer(workers=self._workers, periodic=False)
        handlers = {number: signal.getsignal(number) for number in self._consumer._signal_actions}
        self._consumer.start()
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def wait(self, count: int) -> None:
        # result_count() counts all stored results, so it is called rarely.
        while (left := count - self._huey.result_count()) > 0:
            time.sleep(min(0.05, left / 50_000))

    def clock(self) -> tuple[float, float | None]:
        return self._clock().get(blocking=True), time.perf_counter()

    def close(self) -> None:
        if self._consumer is not None:
            self._consumer.stop(graceful=True)
        self._huey.storage.close()


class Bare(Peer):
    """A queue without workers of its own: threads of the benchmark take messages from it."""

    def __init__(self, folder: str, workers: int = WORKERS) -> None:
        self._workers = workers
        self._done: list[int] = []
        self._began = Began(folder)
        self._threads: list[threading.Thread] = []

    @abstractmethod
    def put(self, message: str) -> object: ...

    @abstractmethod
    def take(self) -> None:
        """Take and run messages; each thread calls this."""

    def submit(self, task: str = "noop") -> object:
        return self.put(task)

    def work(self) -> None:
        self._threads = [threading.Thread(target=self.take) for _ in range(self._workers)]
        for thread in self._threads:
            thread.start()

    def run(self, message: str) -> None:
        if message == "clock":
            self._began.tell()
        else:
            _TASKS[message]()

    def wait(self, count: int) -> None:
        until(lambda: len(self._done) >= count)

    def clock(self) -> tuple[float, float | None]:
        self.put("clock")
        return self._began.hear(), None

    def join(self) -> None:
        for thread in self._threads:
            thread.join()
        self._began.close()


class LiteQueue(Bare):
    """litequeue, with a connection for each thread."""

    def __init__(self, folder: str, workers: int = WORKERS) -> None:
        super().__init__(folder, workers)
        self._path = os.path.join(folder, "litequeue.db")
        self._producer = self._open()
        self._stopped = False

    def _open(self) -> Any:
        from litequeue import LiteQueue

        return LiteQueue(self._path, timeout=60)

    def put(self, message: str) -> object:
        return self._producer.put(message)

    def take(self) -> None:
        taking = self._open()
        while not self._stopped:
            message = taking.pop()
            if message is None:
                time.sleep(0.001)
                continue
            self.run(message.data)
            # From litequeue 0.14 on, a claim has a fence.
            fence = {"claim_id": message.claim_id} if hasattr(message, "claim_id") else {}
            taking.done(message.message_id, **fence)
            self._done.append(1)
        taking.conn.close()

    def close(self) -> None:
        self._stopped = True
        self.join()
        self._producer.conn.close()


class PersistQueue(Bare):
    """persist-queue's ``SQLiteAckQueue``."""

    def __init__(self, folder: str, workers: int = WORKERS) -> None:
        super().__init__(folder, workers)
        from persistqueue import SQLiteAckQueue

        self._queue = SQLiteAckQueue(folder, multithreading=True, auto_commit=True)

    def put(self, message: str) -> object:
        return self._queue.put(message)

    def take(self) -> None:
        while (message := self._queue.get()) != "stop":
            self.run(message)
            self._queue.ack(message)
            self._done.append(1)

    def close(self) -> None:
        for _ in self._threads:
            self._queue.put("stop")
        self.join()
        self._queue.close()
