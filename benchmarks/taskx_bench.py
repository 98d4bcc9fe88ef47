"""Cells of TaskX itself. They use only its public names, so that they also measure earlier versions."""

from __future__ import annotations

import os
import random
import resource
import sqlite3
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

from benchmarks import children
from benchmarks.counting import COMMITS, READS, WRITES, Seen, watching
from benchmarks.harness import (
    DURABILITIES,
    IDLE,
    NAP,
    SLEEPERS,
    TASKX,
    WORKERS,
    Cell,
    Plan,
    Stopwatch,
    percentile,
)
from benchmarks.stores import OnSQLite, Store
from taskx import Config, Context, Queue, Task, TaskFilter, TaskStatus

FINISHED = ("finished-drain", "finished-get", "finished-list", "finished-count")
DELAYED = ("delayed-drain", "delayed-late")
COSTS_OF_SUBMIT = (
    "cost-submit-reads",
    "cost-submit-writes",
    "cost-submit-commits",
    "cost-submit-elsewhere",
    "cost-submit-switches",
)
_COSTS = {
    name: tuple(f"{name}-{what}" for what in ("reads", "writes", "commits"))
    for name in ("cost-drain", "cost-alone")
}
FEW = 1_000
#: Number of measured drains on one file with other tasks.
_DRAINS = 3
#: Number of backlogs whose statements are counted.
_COUNTS = 5
#: Seconds for which a query of such a file is repeated, so that one bad moment does not count.
_REPEAT = 0.5


@contextmanager
def queue_on(
    store: Store, folder: str, *, workers: int = WORKERS, buffer: int = 100, **config: Any
) -> Iterator[Queue]:
    """Yield a queue that is not started, with a no-op executor, on the folder's repository."""
    with store.repository(folder) as repository:
        queue = Queue(repository, Config(worker_num=workers, buffer_size=buffer, **config))
        queue.executor("noop")(noop)
        try:
            yield queue
        finally:
            queue.close()


def noop() -> int:
    return 1


def noops(count: int) -> list[Task]:
    return [Task(type="noop", params={}) for _ in range(count)]


@contextmanager
def busy(queue: Queue) -> Iterator[Callable[[], None]]:
    """Start the queue and keep all its workers busy. Yield a function that lets them go on."""
    workers = queue.config.worker_num
    began, go = threading.Semaphore(0), threading.Event()

    @queue.executor("gate")
    def gate(ctx: Context) -> None:
        began.release()
        ctx.on_cancel(go.set)
        go.wait()

    with queue:
        for _ in range(workers):
            queue.submit("gate")
            began.acquire()
        try:
            yield go.set
        finally:
            # If they were not let go, the tasks that wait behind them must not run.
            queue.stop(cancel=not go.is_set())


# --- throughput


def _submit(plan: Plan, store: Store, folder: str) -> dict[str, float]:
    count = plan.count(store.durability)
    with queue_on(store, folder, buffer=count + WORKERS) as queue, busy(queue):
        submit = queue.submit
        with Stopwatch() as watch:
            for _ in range(count):
                submit("noop")
        return {"submit": watch.rate(count)}


def _many(plan: Plan, store: Store, folder: str) -> dict[str, float]:
    with queue_on(store, folder, overflow="spill") as queue, busy(queue):
        tasks = noops(plan.many)
        with Stopwatch() as watch:
            queue.submit_many(tasks)
        return {"many": watch.rate(plan.many)}


def _drain_buffer(plan: Plan, store: Store, folder: str) -> dict[str, float]:
    count = plan.count("full" if store.durability == "full" else "process")
    with queue_on(store, folder, buffer=count) as queue, busy(queue) as go:
        queue.submit_many(noops(count))
        with Stopwatch() as watch:
            go()
            queue.drain()
    return {"drain": watch.rate(count)}


def drained(queue: Queue, count: int) -> float:
    """Start a queue with ``count`` tasks in its file. Return the finished tasks per second."""
    with Stopwatch() as watch:
        queue.start()
        queue.drain()
    return watch.rate(count)


def _together(plan: Plan, store: Store, folder: str) -> dict[str, float]:
    count = plan.count(store.durability)
    with queue_on(store, folder, buffer=count) as queue, queue:
        submit = queue.submit
        with Stopwatch() as watch:
            for _ in range(count):
                submit("noop")
            queue.drain()
    return {"together": watch.rate(count)}


def _map(plan: Plan, store: Store, folder: str) -> dict[str, float]:
    count = plan.count(store.durability)
    with queue_on(store, folder) as queue:
        same = queue.executor("same")(_same)
        with queue, Stopwatch() as watch:
            for _ in queue.map(same, range(count)):
                pass
    return {"map": watch.rate(count)}


def _same(value: int) -> int:
    return value


def _sleepers(plan: Plan, store: Store, folder: str) -> dict[str, float]:
    with _sleeping(plan, store, folder) as queue, Stopwatch() as watch:
        for _ in range(plan.sleepers):
            queue.submit("nap")
        queue.drain()
    return {"sleepers": watch.seconds / (plan.sleepers * NAP / SLEEPERS)}


def _many_sleepers(plan: Plan, store: Store, folder: str) -> dict[str, float]:
    with _sleeping(plan, store, folder) as queue, Stopwatch() as watch:
        queue.submit_many([Task(type="nap") for _ in range(plan.sleepers)])
        queue.drain()
    return {"sleepers-many": watch.seconds / (plan.sleepers * NAP / SLEEPERS)}


@contextmanager
def _sleeping(plan: Plan, store: Store, folder: str) -> Iterator[Queue]:
    """Yield a started queue with many workers and an executor that sleeps."""
    with queue_on(store, folder, workers=SLEEPERS, buffer=plan.sleepers) as queue:
        queue.executor("nap")(lambda: time.sleep(NAP))
        with queue:
            yield queue


# --- latency


def _begins(plan: Plan, store: Store, folder: str) -> dict[str, float]:
    began: list[float] = []
    samples = []
    with queue_on(store, folder) as queue:
        queue.executor("clock")(lambda: began.append(time.perf_counter()))
        with queue:
            for _ in range(plan.samples):
                time.sleep(IDLE)
                submitted = time.perf_counter()
                queue.submit("clock")
                while not began:
                    time.sleep(0.0005)
                samples.append(1e6 * (began.pop() - submitted))
    return {"begins-p50": percentile(samples, 50), "begins-p99": percentile(samples, 99)}


def _result(plan: Plan, store: Store, folder: str) -> dict[str, float]:
    samples = []
    with queue_on(store, folder) as queue, queue:
        for _ in range(plan.samples):
            time.sleep(IDLE)
            with Stopwatch() as watch:
                queue.submit("noop").result()
            samples.append(1e6 * watch.seconds)
    return {"result-p50": percentile(samples, 50), "result-p99": percentile(samples, 99)}


# --- with many finished or delayed tasks in the file


def _finished(plan: Plan, finished: int, folder: str) -> dict[str, float]:
    with queue_on(OnSQLite("process"), folder) as queue:
        ids = _fill(queue, finished, _DONE, 3)
        done = TaskFilter(status=TaskStatus.COMPLETED)
        newest = TaskFilter(status=TaskStatus.COMPLETED, limit=20)
        figures = {
            "finished-get": _timed(lambda: queue.get_task_status(ids[len(ids) // 2])),
            "finished-list": _timed(lambda: queue.repository.list(newest)),
            "finished-count": _timed(lambda: queue.repository.count(done)) / 1000,
        }
    return {"finished-drain": _drain_with_others(plan, folder), **figures}


def _delayed(plan: Plan, delayed: int, folder: str) -> dict[str, float]:
    with queue_on(OnSQLite("process"), folder) as queue:
        fill_with_delayed(queue, delayed)
    figures = {"delayed-drain": _drain_with_others(plan, folder)}
    with queue_on(OnSQLite("process"), folder) as queue, queue:
        handles = [queue.submit("noop", delay=0.2 + 0.01 * n) for n in range(plan.messages)]
        late = []
        for handle in handles:
            handle.result()
            task = handle.task()
            assert task.started_at is not None
            assert task.run_at is not None
            late.append(1000 * (task.started_at - task.run_at).total_seconds())
    return {**figures, "delayed-late": percentile(late, 99)}


def _drain_with_others(plan: Plan, folder: str) -> float:
    count = plan.tasks // 4 or 1
    rates = []
    for _ in range(_DRAINS):
        with queue_on(OnSQLite("process"), folder) as queue:
            queue.submit_many(noops(count))
            rates.append(drained(queue, count))
    return statistics.median(rates)


_DONE = (
    "INSERT INTO tasks (seq, id, created_at, started_at, completed_at, type, params, status, result,"
    " progress, duration, max_attempts, max_crashes, starts, worker)"
    " VALUES (?, ?, ?, ? + 1, ? + 1, 'noop', '{}', 'completed', '1', 100,"
    " 0.00001, 1, 3, 1, 'host:1:aaaaaa taskx-worker-1')"
)
_WAITING = (
    "INSERT INTO tasks (seq, id, created_at, run_at, type, params, status, max_attempts, max_crashes, held)"
    " VALUES (?, ?, ?, ? + 86400000, 'noop', '{}', 'pending', 1, 3, 1)"
)


def fill_with_delayed(queue: Queue, count: int) -> None:
    """Write delayed tasks, as fast as SQLite can. They are due a day later."""
    _fill(queue, count, _WAITING, 2)


def _fill(queue: Queue, count: int, insert: str, times: int) -> list[str]:
    """Write records, as fast as SQLite can. Each has ``times`` columns with a time."""
    queue.list_tasks()  # creates the file
    now = time.time_ns() // 1_000_000 - count
    ids = [_id_of(now + i) for i in range(count)]
    path = queue.repository.path  # type: ignore[attr-defined]
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executemany(
            insert, ((now + i << 20, id_, *[now + i] * times) for i, id_ in enumerate(ids))
        )
    return ids


def _id_of(ms: int) -> str:
    """Return the id that has the key of a moment in it: the milliseconds, and 20 bits of 0."""
    return f"{ms >> 16:08x}-{ms & 0xFFFF:04x}-7000-a000-{random.getrandbits(48):012x}"


def _timed(call: Callable[[], object]) -> float:
    """Return the median duration of many calls, in µs."""
    samples: list[float] = []
    until = time.perf_counter() + _REPEAT
    while len(samples) < 21 or time.perf_counter() < until:
        with Stopwatch() as watch:
            call()
        samples.append(1e6 * watch.seconds)
    return percentile(samples, 50)


# --- import time, memory and idle cost


# The names of the package are loaded when they are first used.
_IMPORTS = {
    "import": "import taskx",
    "import-queue": "from taskx import Queue, SQLiteRepository",
}
_IMPORT = "import time; t = time.perf_counter(); {}; print(time.perf_counter() - t)"
#: Prints the number of packages that a queue on SQLite loads, besides Python's, its own and required ones.
_OPTIONAL = """
import sys
before = set(sys.modules)
from taskx import Queue, SQLiteRepository
new = {name.partition(".")[0] for name in sys.modules.keys() - before}
print(len(new - sys.stdlib_module_names - {"taskx", "attr", "attrs"}))
"""


def _import(plan: Plan, folder: str) -> dict[str, float]:
    found = {"import-optional": float(children.run("-c", _OPTIONAL))}
    for name, what in _IMPORTS.items():
        times = [1000 * float(children.run("-c", _IMPORT.format(what))) for _ in range(5)]
        found[name] = percentile(times, 50)
    return found


def _memory(plan: Plan, folder: str) -> dict[str, float]:
    return {"memory": float(children.run("-m", "benchmarks.memory", folder, str(plan.spilled)))}


def _idle(plan: Plan, folder: str) -> dict[str, float]:
    with watching() as seen, queue_on(OnSQLite("accepted"), folder) as queue, queue:
        queue.submit("noop").result()
        time.sleep(0.2)
        seen.clear()
        used = time.process_time()
        with Stopwatch() as watch:
            time.sleep(plan.seconds)
        used = time.process_time() - used
        return {
            "idle-cpu": 100 * used / watch.seconds,
            "idle-commits": seen.count(COMMITS) / watch.seconds,
        }


# --- costs of a task: counted, not timed


def _cost_of_submit(plan: Plan, store: Store, folder: str) -> dict[str, float]:
    """Count the costs of submits to a started queue whose workers are busy and do not use the file."""
    count = max(1, plan.synced // 4)
    with (
        watching() as seen,
        queue_on(store, folder, buffer=count + 1 + WORKERS) as queue,
        busy(queue),
    ):
        queue.submit("noop")
        seen.clear()
        switches = _switches()
        for _ in range(count):
            queue.submit("noop")
        switches = _switches() - switches
        figures = {
            "cost-submit-reads": seen.count(READS) / count,
            "cost-submit-writes": seen.count(WRITES) / count,
            "cost-submit-commits": seen.count(COMMITS) / count,
            "cost-submit-elsewhere": 100 * _elsewhere(seen) / count,
        }
        if store.durability == "process":  # with other durabilities the thread waits for the disk
            figures["cost-submit-switches"] = switches / count
    return figures


def _elsewhere(seen: Seen) -> int:
    """Return how many records other threads than this one stored."""
    return seen.count(("INSERT",), not_on=threading.get_ident())


def _switches() -> int:
    """Return how often this thread has released the processor to wait."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


def _cost_of_drain(plan: Plan, store: Store, folder: str) -> dict[str, float]:
    """Count the costs of a backlog, several times, and return the least.

    When the machine stalls, tasks that were started ahead are handed back, which are more writes.
    """
    count = max(1, plan.synced // 4)
    found = []
    for number in range(_COUNTS):
        os.mkdir(path := os.path.join(folder, str(number)))
        found.append(_cost_of_one_drain(count, store, path))
    return min(found, key=lambda figures: figures["cost-drain-writes"])


def _cost_of_one_drain(count: int, store: Store, folder: str) -> dict[str, float]:
    with (
        watching() as seen,
        queue_on(store, folder, buffer=count) as queue,
        busy(queue) as go,
    ):
        queue.submit_many(noops(count))
        seen.clear()
        go()
        queue.drain()
        figures = _per_task("cost-drain", seen, count)
        # The ends of the tasks that kept the workers busy do not count.
        figures["cost-drain-writes"] -= WORKERS / count
        return figures


def _cost_alone(plan: Plan, store: Store, folder: str) -> dict[str, float]:
    count = min(plan.samples, 50)
    with watching() as seen, queue_on(store, folder) as queue, queue:
        queue.submit("noop").result()
        seen.clear()
        for _ in range(count):
            time.sleep(IDLE)  # a worker must be idle; only then is the task stored as started
            queue.submit("noop").result()
        return _per_task("cost-alone", seen, count)


def _per_task(name: str, seen: Seen, count: int) -> dict[str, float]:
    return {
        f"{name}-reads": seen.count(READS) / count,
        f"{name}-writes": seen.count(WRITES) / count,
        f"{name}-commits": seen.count(COMMITS) / count,
    }


def throughput(plan: Plan, store: Store) -> list[Cell]:
    """Return the cells of throughput."""
    return _cells(
        plan,
        store,
        (_submit, ("submit",)),
        (_many, ("many",)),
        (_drain_buffer, ("drain",)),
        (_together, ("together",)),
        (_map, ("map",)),
    )


def latency(plan: Plan, store: Store) -> list[Cell]:
    """Return the cells of latency, and of sleeping tasks that share the threads."""
    return _cells(
        plan,
        store,
        (_begins, ("begins-p50", "begins-p99")),
        (_result, ("result-p50", "result-p99")),
        (_sleepers, ("sleepers",)),
        (_many_sleepers, ("sleepers-many",)),
    )


def _cells(
    plan: Plan, store: Store, *runs: tuple[Any, tuple[str, ...]], **options: Any
) -> list[Cell]:
    return [
        Cell(TASKX, store.durability, partial(run, plan, store), figures, **options)
        for run, figures in runs
    ]


def _costs(plan: Plan, store: Store) -> list[Cell]:
    return _cells(
        plan,
        store,
        (_cost_of_submit, COSTS_OF_SUBMIT),
        (_cost_of_drain, _COSTS["cost-drain"]),
        (_cost_alone, _COSTS["cost-alone"]),
        once=True,
    )


def cells(plan: Plan) -> list[Cell]:
    """Return all cells of TaskX on SQLite."""
    cells = []
    for durability in DURABILITIES:
        cells += throughput(plan, OnSQLite(durability))
    for durability in ("accepted", "process"):
        cells += latency(plan, OnSQLite(durability)) + _costs(plan, OnSQLite(durability))
    cells += [
        Cell(
            f"TaskX, {size:,} {which}",
            "process",
            partial(run, plan, size),
            figures,
            once=True,
        )
        for which, run, figures in (
            ("finished", _finished, FINISHED),
            ("delayed", _delayed, DELAYED),
        )
        for size in dict.fromkeys((min(FEW, plan.finished), plan.finished))
    ]
    cells += [
        Cell(TASKX, durability, partial(run, plan), figures, once=True)
        for durability, run, figures in (
            ("", _import, (*_IMPORTS, "import-optional")),
            ("process", _memory, ("memory",)),
            ("accepted", _idle, ("idle-cpu", "idle-commits")),
        )
    ]
    return cells
