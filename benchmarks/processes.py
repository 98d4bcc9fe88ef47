"""Cells of TaskX in several processes that share a store."""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from benchmarks.children import PATIENCE, Child, ChildFailed, talking
from benchmarks.harness import ELSEWHERE, PAUSE, TASKX, Cell, Plan, percentile
from benchmarks.stores import Store
from benchmarks.taskx_bench import drained, noop, noops, queue_on
from taskx import Queue, TaskFilter

#: Seconds until a process that was started, or a task that began, is idle.
_UNTIL_IDLE = 0.2
#: Seconds between two tasks while another process, which runs none of them, is watched.
_BUSY_EVERY = 0.04
#: Records read at once.
_PAGE = 10_000
_SHARES = ("both-alone", "both-together", "both-ratio", "both-share")


@contextmanager
def node_process(store: Store, role: str, folder: str, count: int = 0) -> Iterator[Child]:
    with talking("-m", "benchmarks.node", role, folder, store.name(), str(count)) as child:
        yield child


# --- tasks of a dead process


def _left(plan: Plan, store: Store, folder: str) -> dict[str, float]:
    """Kill a process with busy workers and with tasks in its buffer and in the file; run these tasks."""
    with node_process(store, "leave", folder, plan.left) as child:
        child.hear("left")
        child.kill()
    with queue_on(store, folder) as queue:
        queue.executor("gate")(noop)  # the type of its running tasks
        return {"left": drained(queue, plan.left + queue.config.worker_num)}


def _rescue(plan: Plan, store: Store, folder: str) -> dict[str, float]:
    folders = [os.path.join(folder, str(number)) for number in range(plan.kills)]
    return {"rescue": max(_rescued(store, each) for each in folders)}


def _rescued(store: Store, folder: str) -> float:
    """Measure the milliseconds from the death of a process to the start of its task in another one."""
    os.mkdir(folder)
    began: list[float] = []
    again = threading.Event()

    def orphan() -> None:
        began.append(time.perf_counter())
        again.set()

    with node_process(store, "hang", folder) as child, queue_on(store, folder) as queue:
        child.hear("running")
        queue.executor("orphan")(orphan)
        with queue:
            time.sleep(_UNTIL_IDLE)
            killed = time.perf_counter()
            child.kill()
            if not again.wait(PATIENCE):
                raise ChildFailed("the task of a dead process did not start again")
    return 1000 * (began[0] - killed)


# --- two processes share the work


def _both(plan: Plan, store: Store, folder: str) -> dict[str, float]:
    count = 2 * plan.tasks  # in runs of less than two seconds, the shares are random
    alone, _ = _drained_by(store, 1, count, os.path.join(folder, "one"))
    both, share = _drained_by(store, 2, count, os.path.join(folder, "two"))
    return {
        "both-alone": alone,
        "both-together": both,
        "both-ratio": both / alone,
        "both-share": share,
    }


def _drained_by(store: Store, processes: int, count: int, folder: str) -> tuple[float, float]:
    """Return the tasks per second, and the smallest share of one process in percent."""
    os.mkdir(folder)
    with queue_on(store, folder) as first, first:
        first.drain()  # it is the first node; otherwise the nodes would first make the indexes of MongoDB
    with queue_on(store, folder) as queue, ExitStack() as stack:
        queue.submit_many(noops(count))
        nodes = [
            stack.enter_context(node_process(store, "drain", folder)) for _ in range(processes)
        ]
        for node in nodes:
            node.hear("ready")
        began = time.time()
        for node in nodes:
            node.tell("go")
        for node in nodes:
            node.hear("drained")
        ended, runs = _ended_and_runs(queue)
        # ``runs`` does not include a process that ran no task.
        share = 100 * min(runs) / count if len(runs) == processes else 0.0
        return count / (ended - began), share


def _ended_and_runs(queue: Queue) -> tuple[float, list[int]]:
    """Return when the last task was done, and how many tasks each process ran, by the records."""
    ended, runs, seen = 0.0, Counter[str](), 0
    while tasks := queue.repository.list(TaskFilter(limit=_PAGE, offset=seen)):
        seen += len(tasks)
        for task in tasks:
            assert task.completed_at is not None
            ended = max(ended, task.completed_at.timestamp())
            runs[task.worker.partition(" ")[0]] += 1
    return ended, [*runs.values()]


# --- messages between processes


def _elsewhere(plan: Plan, store: Store, folder: str) -> dict[str, float]:
    """Measure the milliseconds from a submit to the start in another process, and back to the result."""
    chance = random.Random(0)
    there, back = [], []
    with node_process(store, "serve", folder) as child, queue_on(store, folder) as queue:
        child.hear("ready")
        queue.declare("clock")
        for _ in range(plan.messages):
            time.sleep(chance.uniform(0, PAUSE))
            submitted = time.perf_counter()  # on Linux the same clock in every process
            began = queue.submit("clock").result(timeout=PATIENCE)
            back.append(1000 * (time.perf_counter() - began))
            there.append(1000 * (began - submitted))
    return {
        "elsewhere-p50": percentile(there, 50),
        "elsewhere-p99": percentile(there, 99),
        "outcome-p50": percentile(back, 50),
        "outcome-p99": percentile(back, 99),
    }


def _cancel(plan: Plan, store: Store, folder: str) -> dict[str, float]:
    """Measure the milliseconds from a cancel until the token fires in another process."""
    chance = random.Random(0)
    samples = []
    with node_process(store, "serve", folder) as child, queue_on(store, folder) as queue:
        child.hear("ready")
        queue.declare("until-cancelled")
        for _ in range(plan.messages):
            task_id = queue.submit("until-cancelled").id
            child.hear("running")
            time.sleep(chance.uniform(0, PAUSE))
            asked = time.perf_counter()
            queue.cancel_task(task_id)
            samples.append(1000 * (float(child.hear("cancelled")) - asked))
    return {"cancel-p50": percentile(samples, 50), "cancel-p99": percentile(samples, 99)}


def _with_busy_others(plan: Plan, store: Store, folder: str) -> dict[str, float]:
    """Measure the share of a core that an idle process uses while two others work, in percent."""
    with (
        node_process(store, "serve", folder) as child,
        node_process(store, "stand-by", folder) as idle,
        queue_on(store, folder) as queue,
    ):
        child.hear("ready")
        idle.hear("ready")
        queue.declare("clock")
        time.sleep(_UNTIL_IDLE)
        used, began = _used(idle), time.perf_counter()
        while (seconds := time.perf_counter() - began) < plan.seconds:
            queue.submit("clock").result(timeout=PATIENCE)
            time.sleep(_BUSY_EVERY)
        return {"others-cpu": 100 * (_used(idle) - used) / seconds}


def _used(child: Child) -> float:
    child.tell("")
    return float(child.hear("used"))


def cells(plan: Plan, store: Store) -> list[Cell]:
    """Return all cells that need more than one process."""
    return [
        Cell(TASKX, store.durability, partial(run, plan, store), figures, once=once)
        for run, figures, once in (
            (_left, ("left",), False),
            (_both, _SHARES, False),
            (_rescue, ("rescue",), False),
            (_elsewhere, (*ELSEWHERE, "outcome-p50", "outcome-p99"), True),
            (_cancel, ("cancel-p50", "cancel-p99"), True),
            (_with_busy_others, ("others-cpu",), False),
        )
    ]
