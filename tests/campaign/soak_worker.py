"""A process of a soak: submits tasks of all kinds, and runs them.

    python -m tests.campaign.soak_worker FOLDER NAME RATE SHARE PLACE

It submits until the file ``enough`` exists in the folder, and runs tasks until its standard input ends.
``PLACE`` is that of the application: see :func:`.soak_shop.shop_of`.
"""

from __future__ import annotations

import asyncio
import queue as queues
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from taskx import (
    BatchContext,
    Config,
    Context,
    InvalidTransition,
    Queue,
    Task,
    TaskCancelled,
    TaskNotFound,
    TaskxError,
    every,
    group,
    tick_of,
)

from .sidelog import SideLog
from .soak_audit import LIMIT
from .soak_shop import Shop, shop_of

#: More crashes than a task can have.
_MANY = 1_000_000
#: Seconds for which ended tasks are kept, so that the size of the file can level off.
_KEPT = 300.0
#: The chunks that a task emits which emits some.
_CHUNKS = 40
#: The streams that wait for their reader, at most.
_STREAMS = 4
#: Unfinished tasks from which on a process submits more slowly.
_ENOUGH = 2000


class Executors:
    """The executors, which write what they do to the side log."""

    def __init__(self, queue: Queue, log: SideLog, shop: Shop) -> None:
        self._log, self._shop = log, shop
        for function in (self.quick, self.total, self.report, self.speaker):
            queue.executor(function.__name__, max_crashes=_MANY)(function)
        queue.executor("slow", max_crashes=_MANY, timeout=60.0)(self.slow)
        queue.executor("flaky", max_crashes=_MANY, max_attempts=3)(self.flaky)
        queue.executor("keyed", max_crashes=_MANY)(self.keyed)
        queue.executor("stepper", max_crashes=_MANY)(self.stepper)
        queue.executor("limited", max_crashes=_MANY, max_concurrency=LIMIT, limit_scope="global")(
            self.slow
        )
        queue.executor("batched", max_crashes=_MANY, batch=20, wait=0.02)(self.batched)
        for waiting in (self.asker, self.sleeper, self.parent, self.coroutine):
            queue.executor(waiting.__name__, max_crashes=_MANY)(waiting)
        queue.executor("payer", max_crashes=_MANY)(self.payer)

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

    def batched(self, ctx: BatchContext, tasks: list[dict[str, Any]]) -> list[int]:
        for one in ctx.each:
            self._log.tell("begin", one.task.id, starts=one.task.starts, kind="batched")
        for one in ctx.each:
            ends = {"kind": "batched", "outcome": "returned"}
            self._log.tell("end", one.task.id, starts=one.task.starts, **ends)
        return [task["n"] for task in tasks]

    async def coroutine(self, ctx: Context) -> int:
        with self._told(ctx.task):
            await asyncio.sleep(0.005)
            return 1

    def asker(self, ctx: Context) -> str:
        """Wait for an answer, which may be there already."""
        with self._told(ctx.task):
            told: str = ctx.ask("approval", "may I?")
            return told

    def sleeper(self, ctx: Context) -> str:
        with self._told(ctx.task):
            ctx.sleep(1.5, step="nap")
            return "rested"

    def parent(self, ctx: Context) -> int:
        with self._told(ctx.task):
            kids = [Task(type="quick", params={"size": n}) for n in (1, 2)]
            return len(ctx.run_all("kids", kids))

    def payer(self, ctx: Context) -> None:
        """Pay for an order, in a transaction with the end of the task."""
        with self._told(ctx.task), ctx.transaction() as tx:
            self._shop.add(tx.connection, "payments", ctx.task.id)
            tx.complete()

    def speaker(self, ctx: Context) -> None:
        """Emit the numbers below ``_CHUNKS``: half of them in a step."""
        with self._told(ctx.task):

            def say(first: int) -> None:
                for number in range(first, first + _CHUNKS // 2):
                    ctx.emit(number)
                    ctx.sleep(0.005)

            say(0)
            ctx.step("rest", say, _CHUNKS // 2)

    def total(self, ctx: Context) -> int:
        with self._told(ctx.task):
            return sum(len(parent.result) for parent in ctx.parents)

    def report(self, ctx: Context) -> None:
        self._log.tell("tick", ctx.task.id, note=str(tick_of(ctx.task)))
        with self._told(ctx.task):
            return


class Producer:
    """Submits tasks of all kinds at random."""

    def __init__(self, queue: Queue, shop: Shop, log: SideLog, seed: str) -> None:
        self._queue = queue
        self._shop = shop
        self._log = log
        self._rng = random.Random(seed)
        self._slow = ""  # the last slow task
        self._asks = ""  # the last task that asks
        self._streams = queues.Queue[str](_STREAMS)
        threading.Thread(target=self._read, daemon=True).start()

    def submit_one(self) -> None:
        """Submit a task or a flow, and sometimes cancel what was submitted."""
        rng, queue = self._rng, self._queue
        chance = rng.random()
        if chance < 0.50:
            self._accept("quick", {"size": rng.choice((0, 10, 1000))}, note="now")
        elif chance < 0.58:
            self._accept("flaky", {"raises": rng.randint(0, 2)})
        elif chance < 0.62:
            self._accept("limited", {"seconds": rng.uniform(0.0, 0.02)})
        elif chance < 0.66:
            params = {"key": rng.choice("abcdefgh"), "seconds": rng.uniform(0.0, 0.02)}
            self._accept("keyed", params, concurrency_key=params["key"])
        elif chance < 0.70:
            self._accept("stepper", {})
        elif chance < 0.78:
            self._accept("batched", {"n": 1})
        elif chance < 0.81:
            self._accept("coroutine", {})
        elif chance < 0.82:
            self._speak()
        elif chance < 0.84:
            self._ask()
        elif chance < 0.86:
            self._accept(rng.choice(("sleeper", "parent")), {})
        elif chance < 0.90:
            self._order()
        elif chance < 0.94:
            self._accept("quick", {}, delay=rng.uniform(0.0, 5.0))
        elif chance < 0.998:
            parts = group(*(Task(type="quick", params={"size": n}) for n in (1, 2, 3)))
            for task_id in queue.submit_flow(parts.then(Task(type="total"))).ids:
                self._log.tell("accepted", task_id)
        else:
            before, self._slow = (
                self._slow,
                self._accept("slow", {"seconds": rng.uniform(1.0, 5.0)}),
            )
            with suppress(InvalidTransition, TaskNotFound):  # it has ended, or is pruned
                if before:  # one that is just being started may end without a call
                    queue.cancel_task(before)
                    self._log.tell("cancelled", before, kind="slow")

    def _ask(self) -> None:
        """Answer the last task that asks, and submit another; a third of them are answered at once."""
        before, self._asks = self._asks, self._accept("asker", {})
        for asks in (before, self._asks if self._rng.random() < 0.3 else ""):
            with suppress(InvalidTransition, TaskNotFound):  # it is pruned
                if asks:
                    self._queue.finish(f"{asks}/approval", "yes")

    def _speak(self) -> None:
        """Submit a task that emits; its stream is read, if not too many wait for that."""
        task_id = self._accept("speaker", {})
        with suppress(queues.Full):
            self._streams.put_nowait(task_id)

    def _read(self) -> None:
        """Read the streams of tasks to their ends, and tell what is not as it should be."""
        while True:
            task_id, chunks = self._streams.get(), list[Any]()
            try:
                for chunk in self._queue.handle(task_id).stream():
                    chunks = [chunk.value] if chunk.restart else [*chunks, chunk.value]
            except TaskxError:  # it is pruned, or this process ends
                continue
            whole = chunks == [*range(_CHUNKS)]
            self._log.tell("streamed", task_id, kind="speaker", note="" if whole else str(chunks))

    def _order(self) -> None:
        """Store an order and its task in a transaction of the application; some are rolled back."""
        with closing(self._shop.connect()) as connection:
            handle = self._queue.submit("payer", connection=connection)
            self._shop.add(connection, "orders", handle.id)
            if self._rng.random() < 0.1:
                connection.rollback()
            else:
                connection.commit()
                self._log.tell("accepted", handle.id, kind="payer")

    def _accept(self, kind: str, params: dict[str, Any], note: str = "", **options: Any) -> str:
        handle = self._queue.submit(kind, params, **options)
        self._log.tell("accepted", handle.id, kind=kind, note=note)
        return handle.id


class Pace:
    """The time between two submits: fixed, or such that the process takes its share of the processors."""

    def __init__(self, queue: Queue, rate: float, share: float) -> None:
        self._queue, self._rate, self._share = queue, rate or 20.0, share
        self._fixed = rate > 0
        self._looked, self._used = time.monotonic(), time.process_time()

    def pause(self) -> float:
        """Return how long to wait before the next submit."""
        now = time.monotonic()
        if not self._fixed and now - self._looked > 1.0:
            used = time.process_time()
            busy = (used - self._used) / (now - self._looked)
            self._looked, self._used = now, used
            # A machine that others use may give less than the share: then unfinished tasks pile up.
            behind = self._queue.count_tasks(status="pending") > _ENOUGH
            self._rate *= 0.8 if behind else min(1.2, max(0.8, self._share / max(busy, 0.001)))
            self._rate = max(1.0, self._rate)
        return 1 / self._rate


def main(folder: Path, name: str, rate: float, share: float, shop: Shop) -> None:
    log = SideLog(folder / "side.log", name)
    config = Config(
        worker_num=4,
        overflow="spill",
        retention={"completed": _KEPT, "cancelled": _KEPT, "failed": _KEPT},
    )
    queue = Queue(shop.repository(), config)
    Executors(queue, log, shop)
    producer = Producer(queue, shop, log, name)
    pace = Pace(queue, rate, share)
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    with queue:
        queue.schedule("report", every(5), "report")
        while not (ended.wait(pace.pause()) or (folder / "enough").exists()):
            producer.submit_one()
        ended.wait()
    log.tell("left")


if __name__ == "__main__":
    folder, name, rate, share, place = sys.argv[1:]
    main(Path(folder), name, float(rate), float(share), shop_of(place))
