"""``python -m benchmarks.disk PLACE``: the speed of a disk, or of a MongoDB server, with empty tasks.

The tasks are in scratch stores, which are removed at the end: files in a new folder beside yours, or
collections of the same database.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import chain
from urllib.parse import quote, unquote, urlsplit

from benchmarks import children
from benchmarks.harness import percentile
from benchmarks.taskx_bench import noop, noops
from taskx import Config, Queue, TaskFilter, TaskStatus, open_repository

#: Tasks of one call of ``submit_many``.
BATCH = 100
#: Threads that submit at the same time.
THREADS = 8
_CHILD = "import sys; from benchmarks.disk import serve; serve(sys.argv[1], int(sys.argv[2]))"
_UNFINISHED = [TaskFilter(status=status) for status in (TaskStatus.PENDING, TaskStatus.RUNNING)]
#: A result: its name, how many a second, the seconds of each call (none if not timed), the meaning.
Measure = tuple[str, float, list[float], str]


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser("python -m benchmarks.disk", description=__doc__)
    parser.add_argument("place", help="a folder, or the URL of a SQLite file or MongoDB database")
    parser.add_argument("--seconds", type=float, default=6.0, help="time of all measures")
    parser.add_argument("--workers", type=int, default=5, help="number of worker threads")
    options = parser.parse_args()
    logging.getLogger("taskx").setLevel(logging.CRITICAL)  # tasks that are left are no news here
    print(f"{'measure':17} {'per second':>10} {'p50':>9} {'p99':>9}  meaning")
    for name, rate, times, meaning in measures(options.place, options.seconds, options.workers):
        shown = [f"{1000 * percentile(times, p):.2f} ms" if times else "" for p in (50, 99)]
        print(f"{name:17} {rate:10,.0f} {shown[0]:>9} {shown[1]:>9}  {meaning}", flush=True)


def measures(place: str, seconds: float, workers: int) -> Iterator[Measure]:
    """Yield the measures of a folder, or of the store at a URL, as they come."""
    share = seconds / 6
    url = place if "://" in place else f"sqlite:///{quote(os.path.abspath(place))}/tasks.db"
    with scratch(url) as made:
        if made.startswith("sqlite"):
            yield _syncs(os.path.dirname(unquote(urlsplit(made).path[1:])), share)
        with _opened(made) as queue:
            yield _submits(queue, share)
            yield _submits_of_threads(queue, share)
            yield _batches(queue, share)
        yield _drain(made, share, workers)
    with scratch(url) as made:  # without the tasks that are left
        yield _starts(made, share, workers)
        yield _two_processes(made, share, workers)


@contextmanager
def scratch(url: str) -> Iterator[str]:
    """Yield the URL of a new store beside the one at this URL. Remove it at the end."""
    parts = urlsplit(url)
    if parts.scheme == "sqlite":
        beside = os.path.dirname(unquote(parts.path[1:]))
        with tempfile.TemporaryDirectory(dir=beside or ".", prefix="taskx-bench-") as folder:
            yield parts._replace(netloc="", path=f"///{quote(folder)}/tasks.db").geturl()
        return
    import pymongo

    name = f"taskx_bench_{os.urandom(6).hex()}"
    try:
        yield f"{url}{'&' if parts.query else '?'}collection={name}"
    finally:
        with pymongo.MongoClient[dict[str, object]](url) as client:
            database = client.get_default_database()
            for each in database.list_collection_names():
                if each.partition(".")[0] == name:
                    database.drop_collection(each)


def _syncs(folder: str, seconds: float) -> Measure:
    with tempfile.TemporaryFile(dir=folder) as file:

        def write() -> None:
            os.pwrite(file.fileno(), os.urandom(4096), 0)
            os.fdatasync(file.fileno())

        times = _repeated(write, seconds)
    meaning = "The disk: a submit waits for one, so that a power cut loses no accepted task."
    return "sync", len(times) / sum(times), times, meaning


def _submits(queue: Queue, seconds: float) -> Measure:
    times = _repeated(lambda: queue.submit("noop"), seconds)
    return "submit", len(times) / sum(times), times, "One thread that submits task after task."


def _submits_of_threads(queue: Queue, seconds: float) -> Measure:
    began = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        each = pool.map(lambda _: _repeated(lambda: queue.submit("noop"), seconds), range(THREADS))
        times = [*chain.from_iterable(each)]
    rate = len(times) / (time.perf_counter() - began)
    return f"submit, {THREADS} threads", rate, times, "Threads that submit at once share commits."


def _batches(queue: Queue, seconds: float) -> Measure:
    times = _repeated(lambda: queue.submit_many(noops(BATCH)), seconds)
    rate = BATCH * len(times) / sum(times)
    return "submit_many", rate, [], f"Tasks in calls of {BATCH}: one commit each."


def _drain(url: str, seconds: float, workers: int) -> Measure:
    """Run the tasks that the other measures have left, while nothing is submitted."""
    ran: list[float] = []
    with _running(url, workers, lambda: ran.append(time.perf_counter())) as queue:
        began = time.perf_counter()
        queue.drain(2 * seconds)  # longer than the others: the first tasks also pay for the start
        rate = len(ran) / (time.perf_counter() - began)
    return "run", rate, [], f"Empty tasks that wait, run by {workers} workers of one process."


def _starts(url: str, seconds: float, workers: int) -> Measure:
    started: list[float] = []
    begun = threading.Event()

    def run() -> None:
        started.append(time.perf_counter())
        begun.set()

    with _running(url, workers, run) as queue:

        def submit() -> None:
            begun.clear()
            queue.submit("noop")
            if not begun.wait(children.PATIENCE):
                raise SystemExit(f"a task did not start within {children.PATIENCE:g} s")

        began: list[float] = []
        _repeated(lambda: (began.append(time.perf_counter()), submit()), seconds)
    times = [start - submit for submit, start in zip(began, started, strict=True)]
    meaning = "From the call of submit until the task runs, in an idle process."
    return "start", len(times) / sum(times), times, meaning


def _two_processes(url: str, seconds: float, workers: int) -> Measure:
    with _opened(url) as queue, children.talking("-c", _CHILD, url, str(workers)) as child:
        child.hear("ready")
        queue.submit("noop").result()  # the first task finds the other process ready
        began = time.perf_counter()
        count = len(_repeated(lambda: queue.submit("noop"), seconds))
        while any(queue.repository.reads.count_to(each, 1) for each in _UNFINISHED):
            time.sleep(0.005)
        rate = count / (time.perf_counter() - began)
        child.tell("stop")
        child.hear("stopped")
    meaning = "One process submits, another one runs the tasks, until all have ended."
    return "two processes", rate, [], meaning


def serve(url: str, workers: int) -> None:
    """Run the tasks at a URL until a line of input."""
    logging.getLogger("taskx").setLevel(logging.CRITICAL)
    with _running(url, workers, noop):
        print("ready", flush=True)
        sys.stdin.readline()
    print("stopped", flush=True)


@contextmanager
def _opened(url: str, **config: int) -> Iterator[Queue]:
    with closing(open_repository(url)) as repository:
        repository.house.prepare()
        queue = Queue(repository, Config(**config))
        queue.declare("noop")
        yield queue


@contextmanager
def _running(url: str, workers: int, executor: Callable[[], object]) -> Iterator[Queue]:
    with _opened(url, worker_num=workers, buffer_size=10_000) as queue:
        queue.executor("noop")(executor)
        queue.start()
        try:
            yield queue
        finally:
            queue.stop(timeout=5, cancel=True)


def _repeated(call: Callable[[], object], seconds: float) -> list[float]:
    """Call again and again for some seconds, at least once; return the seconds of each call."""
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while not times or time.perf_counter() < deadline:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return times


if __name__ == "__main__":
    main()
