"""Many schedules or delayed tasks that are due at once: how long they keep the housekeeper busy."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import partial

from benchmarks.harness import TASKX, Cell, Plan
from benchmarks.stores import OnSQLite
from benchmarks.taskx_bench import fill_with_delayed, noop
from taskx import Config, Queue, TaskFilter, every
from taskx.node.housekeeper import Housekeeper
from taskx.stores.base import Repository
from taskx.testing import ManualClock

_DURABILITY = "accepted"
_MINUTE, _WEEK = 60.0, 7 * 86_400.0
#: Seconds between the cell's own checks, each of which also delays the housekeeper.
_CHECK_EVERY = 0.05
#: Multiple of the plan's seconds for which an idle queue is watched: some of its duties are rare.
_LONGER = 4


@contextmanager
def _longest_round() -> Iterator[list[float]]:
    """Yield a list that gets the longest round of any housekeeper, in milliseconds.

    The list has two values: the elapsed time, and the processor time of the thread (without waits for the
    disk or a processor).
    """
    longest, tick = [0.0, 0.0], Housekeeper.tick

    def timed(housekeeper: Housekeeper) -> None:
        clocks = time.perf_counter, time.thread_time
        began = [clock() for clock in clocks]
        try:
            tick(housekeeper)
        finally:
            passed = [1000 * (clock() - then) for clock, then in zip(clocks, began, strict=True)]
            longest[:] = map(max, longest, passed)

    Housekeeper.tick = timed  # type: ignore[method-assign]
    try:
        yield longest
    finally:
        Housekeeper.tick = tick  # type: ignore[method-assign]


def _burst(
    folder: str,
    prepare: Callable[[Queue], object],
    seconds: float,
    over: Callable[[Repository], bool],
) -> list[float]:
    """Let time pass on a started queue. Return the longest round of its housekeeper, in milliseconds."""
    clock = ManualClock(datetime.now(timezone.utc))
    with OnSQLite(_DURABILITY).repository(folder) as repository:
        queue = Queue(repository, Config(worker_num=1), clock=clock)
        queue.declare("elsewhere")
        prepare(queue)
        with _longest_round() as longest, queue:
            time.sleep(1.0)  # its first checks
            clock.advance(seconds)
            while not over(repository):
                time.sleep(_CHECK_EVERY)
        return longest


def _ticks(plan: Plan, folder: str) -> dict[str, float]:
    """Let all schedules tick in the same minute. Reading them at the queue's start counts, too."""

    def declare(queue: Queue) -> None:
        # resume() stores it, also in versions that have no store().
        for n in range(plan.schedules):
            queue.schedule(f"tenant {n}", every(_MINUTE), "elsewhere").resume()
        queue.schedule("last", every(_MINUTE), "elsewhere").resume()

    done = plan.schedules + 1
    passed, work = _burst(folder, declare, _MINUTE + 10, lambda r: r.count(TaskFilter()) >= done)
    return {"burst-ticks": passed, "burst-ticks-work": work}


def _due(plan: Plan, folder: str) -> dict[str, float]:
    """Let all delayed tasks become due at once."""
    fill = partial(fill_with_delayed, count=plan.delayed)
    passed, work = _burst(folder, fill, _WEEK, lambda r: not r.due(None, 1))
    return {"burst-due": passed, "burst-due-work": work}


def _idle_schedules(plan: Plan, folder: str) -> dict[str, float]:
    """Measure the processor time that many idle schedules add to a queue with a busy one."""
    with OnSQLite("process").repository(folder) as repository:
        queue = Queue(repository, Config(worker_num=1))
        queue.executor("noop")(noop)
        queue.schedule("busy", every(0.1), "noop")
        with queue:
            alone = _share(plan)
            for n in range(plan.schedules):
                queue.schedule(f"idle {n}", every(_WEEK), "noop")
            return {"idle-schedules": max(0.0, _share(plan) - alone)}


def _share(plan: Plan) -> float:
    """Measure the share of a core that this process uses, in percent."""
    time.sleep(1.0)
    used, began = time.process_time(), time.perf_counter()
    time.sleep(_LONGER * plan.seconds)
    return 100 * (time.process_time() - used) / (time.perf_counter() - began)


def cells(plan: Plan) -> list[Cell]:
    """Return all cells of bursts, on SQLite."""
    return [
        Cell(TASKX, durability, partial(run, plan), figures, once=once)
        for durability, run, figures, once in (
            (_DURABILITY, _ticks, ("burst-ticks", "burst-ticks-work"), False),
            (_DURABILITY, _due, ("burst-due", "burst-due-work"), False),
            ("process", _idle_schedules, ("idle-schedules",), True),
        )
    ]
