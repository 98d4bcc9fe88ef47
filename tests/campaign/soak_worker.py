"""A process of a soak: submits tasks of all kinds at a steady rate, and runs them.

    python -m tests.campaign.soak_worker FOLDER NAME RATE

It submits until the file ``enough`` exists in the folder, and runs tasks until its standard input ends.
"""

from __future__ import annotations

import random
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from taskx import (
    Config,
    Context,
    InvalidTransition,
    Queue,
    SQLiteRepository,
    Task,
    TaskCancelled,
    TaskNotFound,
    every,
    group,
    tick_of,
)

from .sidelog import SideLog
from .soak_audit import LIMIT

#: More crashes than a task can have.
_MANY = 1_000_000
#: Seconds for which ended tasks are kept, so that the size of the file can level off.
_KEPT = 300.0


class Executors:
    """The executors, which write what they do to the side log."""

    def __init__(self, queue: Queue, log: SideLog) -> None:
        self._log = log
        for function in (self.quick, self.total, self.report):
            queue.executor(function.__name__, max_crashes=_MANY)(function)
        queue.executor("slow", max_crashes=_MANY, timeout=60.0)(self.slow)
        queue.executor("flaky", max_crashes=_MANY, max_attempts=3)(self.flaky)
        queue.executor("keyed", max_crashes=_MANY)(self.keyed)
        queue.executor("stepper", max_crashes=_MANY)(self.stepper)
        queue.executor("limited", max_crashes=_MANY, max_concurrency=LIMIT, limit_scope="global")(
            self.slow
        )

    @contextmanager
    def _told(self, task: Task, note: str = "") -> Iterator[None]:
        outcome = "returned"
        self._log.tell("begin", task.id, starts=task.starts, kind=task.type, note=note)
        try:
            yield
        except TaskCancelled as error:
            outcome = str(error.reason)
            raise
        except BaseException:
            outcome = "raised"
            raise
        finally:
            self._log.tell("end", task.id, starts=task.starts, kind=task.type, outcome=outcome)

    def quick(self, ctx: Context, size: int = 0) -> str:
        with self._told(ctx.task):
            return "x" * size

    def slow(self, ctx: Context, seconds: float = 1.0) -> None:
        with self._told(ctx.task):
            ctx.progress(50, "half way")
            ctx.sleep(seconds)

    def flaky(self, ctx: Context, raises: int = 1) -> int:
        with self._told(ctx.task):
            if ctx.task.attempt <= raises:
                raise ValueError(f"attempt {ctx.task.attempt}")
            return raises

    def keyed(self, ctx: Context, key: str, seconds: float) -> None:
        with self._told(ctx.task, note=key):
            ctx.sleep(seconds)

    def stepper(self, ctx: Context) -> int:
        with self._told(ctx.task):
            for step in ("first", "second"):
                ctx.step(step, self._do_step, ctx.task.id, step)
            return 2

    def _do_step(self, task_id: str, step: str) -> str:
        self._log.tell("step", task_id, note=step)
        return step

    def total(self, ctx: Context) -> int:
        with self._told(ctx.task):
            return sum(len(parent.result) for parent in ctx.parents)

    def report(self, ctx: Context) -> None:
        self._log.tell("tick", ctx.task.id, note=str(tick_of(ctx.task)))
        with self._told(ctx.task):
            return


class Producer:
    """Submits tasks of all kinds at random."""

    def __init__(self, queue: Queue, log: SideLog, seed: str) -> None:
        self._queue = queue
        self._log = log
        self._rng = random.Random(seed)
        self._slow = ""  # the last slow task

    def submit_one(self) -> None:
        """Submit a task or a flow, and sometimes cancel what was submitted."""
        rng, queue = self._rng, self._queue
        chance = rng.random()
        if chance < 0.55:
            self._accept("quick", {"size": rng.choice((0, 10, 1000))}, note="now")
        elif chance < 0.65:
            self._accept("flaky", {"raises": rng.randint(0, 2)})
        elif chance < 0.75:
            self._accept("limited", {"seconds": rng.uniform(0.0, 0.1)})
        elif chance < 0.85:
            params = {"key": rng.choice("abc"), "seconds": rng.uniform(0.0, 0.05)}
            self._accept("keyed", params, concurrency_key=params["key"])
        elif chance < 0.90:
            self._accept("stepper", {})
        elif chance < 0.94:
            self._accept("quick", {}, delay=rng.uniform(0.0, 20.0))
        elif chance < 0.97:
            parts = group(*(Task(type="quick", params={"size": n}) for n in (1, 2, 3)))
            for task_id in queue.submit_flow(parts.then(Task(type="total"))).ids:
                self._log.tell("accepted", task_id)
        else:
            before, self._slow = (
                self._slow,
                self._accept("slow", {"seconds": rng.uniform(1.0, 20.0)}),
            )
            with suppress(InvalidTransition, TaskNotFound):  # it has ended, or is pruned
                if before and queue.cancel_task(before):
                    self._log.tell("cancelled", before, kind="slow")

    def _accept(self, kind: str, params: dict[str, Any], note: str = "", **options: Any) -> str:
        handle = self._queue.submit(kind, params, **options)
        self._log.tell("accepted", handle.id, kind=kind, note=note)
        return handle.id


def main(folder: Path, name: str, rate: float) -> None:
    log = SideLog(folder / "side.log", name)
    config = Config(
        worker_num=4,
        overflow="spill",
        retention={"completed": _KEPT, "cancelled": _KEPT, "failed": _KEPT},
    )
    queue = Queue(SQLiteRepository(folder / "tasks.db"), config)
    Executors(queue, log)
    producer = Producer(queue, log, name)
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    with queue:
        queue.schedule("report", every(5), "report")
        while not (ended.wait(1 / rate) or (folder / "enough").exists()):
            producer.submit_one()
        ended.wait()
    log.tell("left")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
