"""The measurements of ``taskx bench``: the speed of a disk and a repository, on a scratch repository."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from typing import Any

import attrs

from taskx.common.config import Config
from taskx.core.errors import RepositoryUnavailable
from taskx.core.model import Task, TaskFilter, TaskStatus
from taskx.executing.process.interpreter import start_python
from taskx.queue import Queue
from taskx.storage.base import Repository
from taskx.storage.sqlite import SQLiteRepository
from taskx.storage.urls import open_repository

#: Tasks of one call of ``submit_many``.
BATCH = 100
#: Threads that submit at the same time.
THREADS = 8
# Seconds that other processes and threads have to do their part.
_PATIENCE = 30.0
_TYPE = "bench"
# Queues that stop with tasks left, or whose types nobody runs, are no news here.
_SILENT = logging.getLogger("taskx.bench")
_SILENT.addHandler(logging.NullHandler())
_SILENT.propagate = False
_UNFINISHED = [TaskFilter(status=status) for status in (TaskStatus.PENDING, TaskStatus.RUNNING)]


@attrs.frozen(kw_only=True)
class Measure:
    """One result.

    Attributes:
        name: the thing that was measured.
        rate: how many of it in a second.
        p50: half of them took at most this many seconds; None if they were not timed one by one.
        p99: 99 of 100 took at most this many seconds.
        meaning: the meaning in a sentence.
    """

    name: str
    rate: float
    p50: float | None = None
    p99: float | None = None
    meaning: str

    def to_dict(self) -> dict[str, Any]:
        """Return it as a dict of JSON values."""
        return attrs.asdict(self)


def measure(repository: Repository, seconds: float, workers: int) -> Iterator[Measure]:
    """Yield the measures of a repository's disk, as they come. Its own tasks are not touched.

    Args:
        repository: the repository beside which a scratch repository is made.
        seconds: the time that all of them take, about.
        workers: the worker threads.
    """
    share = seconds / 6
    with repository.scratch() as (scratch, _):
        scratch.prepare()
        if isinstance(scratch, SQLiteRepository):
            yield _syncs(os.path.dirname(scratch.path), share)
        yield _submits(scratch, share)
        yield _submits_of_threads(scratch, share)
        yield _batches(scratch, share)
        yield _drain(scratch, share, workers)
    with repository.scratch() as (scratch, url):  # without the tasks that are left
        scratch.prepare()
        yield _latency(scratch, share, workers)
        if url:
            yield _two_processes(scratch, url, share, workers)


def _syncs(folder: str, seconds: float) -> Measure:
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".taskx-bench-") as file:
        sync = getattr(os, "fdatasync", os.fsync)

        def write() -> None:
            os.pwrite(file.fileno(), os.urandom(4096), 0)
            sync(file.fileno())

        return _timed(
            "sync",
            _repeated(write, seconds),
            "The disk: a submit waits for one, so that a power cut loses no accepted task.",
        )


def _submits(repository: Repository, seconds: float) -> Measure:
    queue = _declaring(repository)
    times = _repeated(lambda: queue.submit(_TYPE), seconds)
    return _timed("submit", times, "One thread that submits task after task.")


def _submits_of_threads(repository: Repository, seconds: float) -> Measure:
    queue = _declaring(repository)
    began = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        each = pool.map(lambda _: _repeated(lambda: queue.submit(_TYPE), seconds), range(THREADS))
        times = [*chain.from_iterable(each)]
    rate = len(times) / (time.perf_counter() - began)
    found = _timed("submit, 8 threads", times, "Threads that submit at once share commits.")
    return attrs.evolve(found, rate=rate)


def _batches(repository: Repository, seconds: float) -> Measure:
    queue = _declaring(repository)

    def submit() -> None:
        queue.submit_many([Task(type=_TYPE) for _ in range(BATCH)])

    times = _repeated(submit, seconds)
    return Measure(
        name="submit_many",
        rate=BATCH * len(times) / sum(times),
        meaning=f"Tasks in calls of {BATCH}: one commit each.",
    )


def _drain(repository: Repository, seconds: float, workers: int) -> Measure:
    """Run the tasks that the other measures have left, while nothing is submitted."""
    ran: list[float] = []
    with _running(repository, workers, lambda: ran.append(time.perf_counter())):
        began = time.perf_counter()
        # Longer than the others: the first tasks also pay for the start of the queue.
        _wait(lambda: time.perf_counter() > began + 2 * seconds or not _left(repository))
        taken = time.perf_counter() - began
    return Measure(
        name="run",
        rate=len(ran) / taken,
        meaning=f"Empty tasks that wait, run by {workers} workers of one process.",
    )


def _latency(repository: Repository, seconds: float, workers: int) -> Measure:
    started: list[float] = []
    begun = threading.Event()

    def run() -> None:
        started.append(time.perf_counter())
        begun.set()

    with _running(repository, workers, run) as queue:

        def submit() -> float:
            begun.clear()
            at = time.perf_counter()
            queue.submit(_TYPE)
            if not begun.wait(_PATIENCE):
                raise RepositoryUnavailable(f"a task did not start within {_PATIENCE:g} s")
            return started[-1] - at

        deadline, times = time.perf_counter() + seconds, [submit()]
        while time.perf_counter() < deadline:
            times.append(submit())
    return _timed(
        "start", times, "From the call of submit until the task runs, in an idle process."
    )


def _two_processes(repository: Repository, url: str, seconds: float, workers: int) -> Measure:
    queue, count = _declaring(repository), 0
    with _worker(url, workers):
        handle = queue.submit(_TYPE)  # the first task finds the other process ready
        handle.result(timeout=_PATIENCE)
        began = time.perf_counter()
        while time.perf_counter() < began + seconds:
            queue.submit(_TYPE)
            count += 1
        _wait(lambda: not _left(repository))
        taken = time.perf_counter() - began
    return Measure(
        name="two processes",
        rate=count / taken,
        meaning="One process submits, another one runs the tasks, until all have ended.",
    )


@contextmanager
def _worker(url: str, workers: int) -> Iterator[None]:
    """Run the tasks of a repository in another process, which has started."""
    process = start_python(
        "taskx.cli.measures:work",
        url,
        str(workers),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        try:
            if not process.stdout.readline():
                raise RepositoryUnavailable("the other process cannot open the repository")
            yield
        finally:
            process.stdin.close()


def work(url: str, workers: str) -> None:
    """Run the tasks of the repository at a URL with a number of workers, until stdin ends."""
    repository = open_repository(url)
    with _running(repository, int(workers), lambda: None):
        sys.stdout.write("started\n")
        sys.stdout.flush()
        sys.stdin.read()
    repository.close()


# --- parts


def _declaring(repository: Repository) -> Queue:
    queue = Queue(repository, Config(buffer_size=1_000_000), _SILENT)
    queue.declare(_TYPE)
    return queue


@contextmanager
def _running(
    repository: Repository, workers: int, executor: Callable[[], object]
) -> Iterator[Queue]:
    queue = Queue(repository, Config(worker_num=workers, buffer_size=10_000), _SILENT)

    @queue.executor(_TYPE)
    def run() -> None:
        executor()

    queue.start()
    try:
        yield queue
    finally:
        queue.stop(timeout=5, cancel=True)


def _left(repository: Repository) -> int:
    return sum(repository.count_to(filter, 1) for filter in _UNFINISHED)


def _wait(condition: Callable[[], object]) -> None:
    deadline = time.perf_counter() + _PATIENCE
    while not condition():
        if time.perf_counter() > deadline:
            raise RepositoryUnavailable(f"the tasks did not end within {_PATIENCE:g} s")
        time.sleep(0.005)


def _repeated(call: Callable[[], object], seconds: float) -> list[float]:
    """Call again and again for some seconds, at least once; return the seconds of each call."""
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while not times or time.perf_counter() < deadline:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return times


def _timed(name: str, times: Sequence[float], meaning: str) -> Measure:
    ordered = sorted(times)
    return Measure(
        name=name,
        rate=len(ordered) / sum(ordered),
        p50=ordered[len(ordered) // 2],
        p99=ordered[len(ordered) * 99 // 100],
        meaning=meaning,
    )
