"""A worker process of the campaign: runs, submits, cancels and stops, and writes the side log."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import attrs

from taskx import (
    Config,
    Context,
    DuplicateTask,
    InvalidTransition,
    Queue,
    QueueFull,
    QueueStopped,
    Task,
    TaskCancelled,
    TaskFilter,
    TaskNotFound,
    TaskStatus,
)
from taskx.tasks.clock import SystemClock
from taskx.tasks.timing import DEFAULT_TIMING

from . import hooks
from .sidelog import SideLog
from .stores import store_of

#: More crashes than a task can have when its processes are killed from outside.
MANY = 1_000_000
#: Seconds after which a process that has not ended counts as hanging.
HANGS = 120.0
CLOSED_BY_HAND = "closed by hand"


@attrs.frozen(kw_only=True)
class Options:
    """The options of a worker process; passed as JSON.

    Attributes:
        who: the unique name of the process.
        database: the file, or the URL of a database of a MongoDB server.
        side_log: the path of the side log.
        host, lease: on a server, the folder of lock files that stands for a host, and its
            ``lease_timeout``.
        margin: the part of the lease by which its running tasks are asked to end before the lease is over.
        ahead: the hours that the clock of the process is ahead.
        role: ``mix`` follows a random plan, ``submit`` submits the ``tasks`` and runs them,
            ``store`` only stores them, ``drain`` runs the stored tasks until none is left, ``serve``
            submits the ``tasks``, runs tasks, and submits one more for each line on its standard input
            until that ends, ``open`` opens the file when a line arrives there,
            ``cancel`` and ``close`` cancel, or close by hand, all running tasks.
        seconds: the time after which ``mix`` stops, in seconds.
        tasks: for ``submit`` and ``store``, the kinds with their options, their ``count``, and
            ``together`` if they are submitted in one call.
        waits: ``drain`` begins when a line arrives on its standard input.
        point, passings: the point at which the process kills itself, and the passing that does it.
        interrupt: the point at which the leader of a commit is interrupted.
        error: the error that interrupts the leader.
        interrupts: the longest time between interrupts of the main thread, in seconds.
        burst: submit only tasks that take no time.
        dawdle: the longest of the pauses that widen races, in seconds.
        alone: behave as if no other node existed, so that all nodes compete for the same tasks.
        broken: the name of the broken part.
    """

    who: str
    database: str
    side_log: str
    host: str = ""
    lease: float = 3.0
    margin: float = DEFAULT_TIMING.lease_margin
    ahead: float = 0.0
    role: str = "mix"
    seed: int = 0
    seconds: float = 1.0
    workers: int = 2
    buffer: int = 20
    overflow: str = "spill"
    durability: str = "accepted"
    tasks: list[dict[str, Any]] = attrs.Factory(list)
    waits: bool = False
    point: str = ""
    passings: int = 1
    interrupt: str = ""
    error: str = "KeyboardInterrupt"
    interrupts: float = 0.0
    burst: bool = False
    dawdle: float = 0.0
    alone: bool = False
    broken: str = ""


class ClockAhead(SystemClock):
    """The machine's clock, set some hours ahead."""

    def __init__(self, hours: float) -> None:
        self._ms = int(hours * 3_600_000)

    def now_ms(self) -> int:
        return super().now_ms() + self._ms


class Executors:
    """The executors of all kinds of tasks; each logs when it begins and ends."""

    def __init__(self, log: SideLog, queue: Queue, submit: Callable[..., Any]) -> None:
        self._log = log
        self._submit = submit
        queue.executor("instant", max_crashes=MANY)(self.instant)
        queue.executor("brief", max_crashes=MANY)(self.brief)
        queue.executor("patient", max_crashes=MANY)(self.patient)
        queue.executor("stubborn", max_crashes=MANY)(self.stubborn)
        queue.executor("held", max_crashes=MANY)(self.held)
        queue.executor("waiting", max_crashes=MANY)(self.waiting)
        queue.executor("raiser", max_crashes=MANY, max_attempts=3)(self.raiser)
        queue.executor("parent", max_crashes=MANY)(self.parent)
        queue.executor("once", max_crashes=1)(self.brief)
        queue.executor("crasher", max_crashes=2)(self.crasher)
        queue.executor("innocent")(self.patient)

    @contextmanager
    def _told(self, ctx: Context) -> Iterator[None]:
        task, outcome = ctx.task, "returned"
        self._log.tell("begin", task.id, starts=task.starts, kind=task.type)
        try:
            yield
        except TaskCancelled:
            outcome = "cancelled"
            raise
        except BaseException:
            outcome = "raised"
            raise
        finally:
            self._log.tell("end", task.id, starts=task.starts, outcome=outcome)

    def instant(self, ctx: Context) -> int:
        with self._told(ctx):
            return ctx.task.starts

    def brief(self, ctx: Context, seconds: float = 0.004) -> int:
        with self._told(ctx):
            threading.Event().wait(seconds)
            return ctx.task.starts

    def patient(self, ctx: Context, seconds: float = 0.1) -> int:
        """Sleep, but end early if the token fires."""
        with self._told(ctx):
            ctx.progress(50, "half way")
            ctx.sleep(seconds)
            return ctx.task.starts

    def stubborn(self, ctx: Context, seconds: float = 0.2) -> int:
        """Sleep, and ignore the token."""
        return self.brief(ctx, seconds)

    def held(self, ctx: Context, until: str) -> int:
        """Ignore the token, and end when the file ``until`` exists."""
        with self._told(ctx):
            while not os.path.exists(until):
                threading.Event().wait(0.01)
            return ctx.task.starts

    def waiting(self, ctx: Context, until: str) -> int:
        """End when the file ``until`` exists, or early if the token fires."""
        with self._told(ctx):
            while not os.path.exists(until):
                ctx.sleep(0.02)
            return ctx.task.starts

    def raiser(self, ctx: Context, raises: int = 1) -> int:
        """Raise in the first ``raises`` attempts."""
        with self._told(ctx):
            if ctx.task.attempt <= raises:
                raise ValueError(f"attempt {ctx.task.attempt}")
            return ctx.task.starts

    def parent(self, ctx: Context) -> int:
        """Submit another task."""
        with self._told(ctx):
            self._submit("instant", f"{ctx.task.id}.{ctx.task.starts}", ctx=ctx)
            return ctx.task.starts

    def crasher(self, ctx: Context, after: float = 0.0) -> None:
        """Kill the process."""
        self._log.tell("begin", ctx.task.id, starts=ctx.task.starts, kind="crasher")
        threading.Event().wait(after)
        hooks.die(self._log, "crasher")


class Worker:
    """A queue, and the actions of the process on it."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.log = SideLog(options.side_log, options.who)
        self.rng = random.Random(options.seed)
        self._number = 0
        self._never = threading.Event()
        self._store = store_of(options.database)
        self.queue = self._new_queue()

    def _new_queue(self) -> Queue:
        options = self.options
        repository = self._store.open(options)
        config = Config(
            worker_num=options.workers,
            buffer_size=options.buffer,
            overflow=options.overflow,
            block_timeout=1.0,
        )
        queue = Queue(repository, config, clock=ClockAhead(options.ahead))
        Executors(self.log, queue, self.submit)
        return queue

    def start(self) -> None:
        while True:
            try:
                self.queue.start()
                break
            except (KeyboardInterrupt, MemoryError, *self._store.outages):
                self.log.tell("start again")
        self.log.tell("started")

    # --- actions that are logged before and after

    def submit(
        self,
        kind: str,
        task_id: str = "",
        params: Any = None,
        *,
        ctx: Context | None = None,
        **options: Any,
    ) -> None:
        """Submit a task, again while it is in doubt whether it is stored. An executor heeds its token."""
        self._number += not task_id
        task_id = task_id or f"{self.options.who}-{self._number}"
        self.log.tell("submit", task_id, kind=kind)
        unsure = False
        while True:
            try:
                self.queue.submit(kind, params or {}, id=task_id, **options)
                self.log.tell("accepted", task_id)
            except (KeyboardInterrupt, MemoryError):
                unsure = True
                continue
            except self._store.outages as error:
                unsure = unsure or error.in_doubt
                if unsure and not (ctx is not None and ctx.token.cancelled):
                    continue
                self.log.tell("unsure" if unsure else "rejected", task_id, note=str(error))
            except DuplicateTask:
                self.log.tell("accepted" if unsure else "duplicate", task_id)
            except (QueueFull, QueueStopped) as error:
                self.log.tell("unsure" if unsure else "rejected", task_id, note=str(error))
            return

    def submit_many(self, kind: str, count: int) -> None:
        ids = []
        for _ in range(count):
            self._number += 1
            ids.append(f"{self.options.who}-{self._number}")
            self.log.tell("submit", ids[-1], kind=kind, note=ids[0])
        outcome = self._submit_together([Task(id=task_id, type=kind) for task_id in ids])
        for task_id in ids:
            self.log.tell(outcome, task_id)

    def _submit_together(self, tasks: list[Task]) -> str:
        """Submit tasks in one call, again while the outcome is in doubt; return the library's answer."""
        unsure = False
        while True:
            try:
                self.queue.submit_many(tasks)
            except DuplicateTask:
                return "accepted" if unsure else "duplicate"
            except QueueFull:
                return "unsure" if unsure else "rejected"
            except (KeyboardInterrupt, MemoryError):
                unsure = True
            except self._store.outages as error:
                unsure = unsure or error.in_doubt
                if not unsure:
                    return "rejected"
            else:
                return "accepted"

    def cancel(self, task_id: str) -> None:
        self.log.tell("cancel", task_id)
        try:
            outcome = "cancelled" if self.queue.cancel_task(task_id) else "asked"
        except InvalidTransition:
            outcome = "too late"
        except TaskNotFound:
            outcome = "not found"
        except (KeyboardInterrupt, MemoryError, *self._store.outages):
            return
        self.log.tell("cancel told", task_id, outcome=outcome)

    def close_by_hand(self, task_id: str) -> None:
        self.log.tell("close", task_id)
        try:
            self.queue.repository.update_status(task_id, TaskStatus.FAILED, CLOSED_BY_HAND)
        except (InvalidTransition, KeyboardInterrupt, MemoryError, *self._store.outages):
            return
        self.log.tell("closed", task_id)

    def stop(self, timeout: float, *, cancel: bool) -> None:
        self.log.tell("stop")
        try:
            still = self.queue.stop(timeout, cancel)
        except (KeyboardInterrupt, MemoryError):
            still = ["unknown"]
        self.log.tell("stopped", note=", ".join(still))

    # --- the random plan

    def mix(self) -> None:
        options = self.options
        faulthandler.dump_traceback_later(HANGS, exit=True)
        self.start()
        until = time.monotonic() + options.seconds
        # An interrupt strikes in what is called here, never in a step of this function itself.
        try:
            if options.interrupts:
                hooks.Interrupter(
                    options.seed, options.interrupts, self.log, Worker.mix, until
                ).start()
        except KeyboardInterrupt:
            pass  # it has begun to interrupt
        while time.monotonic() < until:
            try:
                self._step()
                if self.rng.random() < 0.5 and not options.burst:
                    hooks.sleep(self.rng.random() * 0.01)
            except (KeyboardInterrupt, *self._store.outages):
                continue
        self.stop(self.rng.choice((0.0, 0.05, 5.0)), cancel=self.rng.random() < 0.5)

    def _step(self) -> None:
        (step,) = self.rng.choices(
            (
                self._submit_some,
                self._submit_pile,
                self._cancel_some,
                self._close_some,
                self._restart,
            ),
            (0, 20, 5, 0, 2) if self.options.burst else (70, 3, 14, 3, 2),
        )
        step()

    def _submit_some(self) -> None:
        rng = self.rng
        kinds = ("instant", "brief", "patient", "stubborn", "raiser", "parent", "once", "crasher")
        (kind,) = rng.choices(kinds, (40, 25, 7, 2, 10, 5, 8, 0.3))
        params = {}
        if kind in ("patient", "stubborn"):
            params["seconds"] = rng.uniform(0.02, 0.2)
        elif kind == "raiser":
            params["raises"] = rng.randint(1, 3)
        elif kind == "crasher":
            # Its neighbours end first. Otherwise some of them, which may crash for ever, would never end.
            params["after"] = 0.5
        options: dict[str, Any] = {"priority": rng.choice((0, 0, 0, 5))}
        if rng.random() < 0.1:
            options["delay"] = rng.uniform(0.01, 0.3)
        if rng.random() < 0.1:
            options["expires"] = rng.uniform(0.001, 0.2)
        self.submit(kind, "", params, **options)

    def _submit_pile(self) -> None:
        if self.options.burst:
            self.submit_many("instant", self._store.pile)
            hooks.sleep(0.02)
        else:
            self.submit_many(self.rng.choice(("instant", "brief")), self.rng.randint(2, 30))

    def _unfinished(self, status: TaskStatus) -> list[str]:
        found = self.queue.repository.list(TaskFilter(status=status, limit=30))
        return [task.id for task in found]

    def _cancel_some(self) -> None:
        status = self.rng.choice((TaskStatus.PENDING, TaskStatus.RUNNING))
        if ids := self._unfinished(status):
            self.cancel(self.rng.choice(ids))

    def _close_some(self) -> None:
        if ids := self._unfinished(TaskStatus.RUNNING):
            self.close_by_hand(self.rng.choice(ids))

    def _restart(self) -> None:
        """Stop the queue and continue with another one in this process."""
        if self.options.interrupts:
            return  # an interrupted stop does not stop the queue
        self.stop(self.rng.choice((0.0, 0.05, 1.0)), cancel=self.rng.random() < 0.5)
        self.queue = self._new_queue()
        self.start()

    # --- the plain roles

    def submit_listed(self) -> None:
        self.start()
        self.store_listed()
        self._run_until_nothing_is_left()
        self.stop(5.0, cancel=False)

    def store_listed(self) -> None:
        for entry in self.options.tasks:
            wanted = dict(entry)
            kind, count = wanted.pop("kind"), wanted.pop("count", 1)
            if wanted.pop("together", False):
                self.submit_many(kind, count)
                continue
            for _ in range(count):
                self.submit(kind, **wanted)

    def drain(self) -> None:
        if self.options.waits:
            self.log.tell("ready")
            sys.stdin.readline()
        self.start()
        self._run_until_nothing_is_left()
        self.stop(5.0, cancel=False)

    def _run_until_nothing_is_left(self) -> None:
        while not (self.queue.drain(1.0) and not self._unfinished(TaskStatus.PENDING)):
            self._never.wait(0.01)

    def serve(self) -> None:
        self.start()
        self.store_listed()
        self.log.tell("ready")
        for _ in sys.stdin:
            self.submit("brief")
        self.stop(5.0, cancel=True)

    def open(self) -> None:
        self.log.tell("ready")
        sys.stdin.readline()
        self.queue.repository.count(TaskFilter())
        self.start()
        self.stop(5.0, cancel=False)

    def cancel_running(self) -> None:
        for task_id in self._unfinished(TaskStatus.RUNNING):
            self.cancel(task_id)

    def close_running(self) -> None:
        for task_id in self._unfinished(TaskStatus.RUNNING):
            self.close_by_hand(task_id)


def prepare(options: Options, log: SideLog) -> None:
    """Change the library as the options say."""
    if options.broken:
        {**hooks.BROKEN, **store_of(options.database).broken}[options.broken]()
    if options.alone:
        hooks.ignore_owners()
    if options.dawdle:
        hooks.dawdle(options.seed, options.dawdle)
    store = store_of(options.database)
    store.prepare(log)
    if options.point:
        store.points[options.point](hooks.death(options.point, options.passings, log))
    if options.interrupt:
        error = {"KeyboardInterrupt": KeyboardInterrupt, "MemoryError": MemoryError}[options.error]
        point = hooks.interrupt(options.interrupt, options.passings, log, error, store.repository)
        if options.interrupt == "inside the commit":
            store.points["inside a commit"](point)


ROLES = {
    "mix": Worker.mix,
    "submit": Worker.submit_listed,
    "store": Worker.store_listed,
    "drain": Worker.drain,
    "serve": Worker.serve,
    "open": Worker.open,
    "cancel": Worker.cancel_running,
    "close": Worker.close_running,
}


def main() -> None:
    options = Options(**json.loads(sys.argv[1]))
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(threadName)s %(message)s")
    # The process ends with the conductor, which may be killed itself.
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    worker = Worker(options)
    prepare(options, worker.log)
    ROLES[options.role](worker)
    worker.log.tell("leaves")


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        threading.Event().wait(1.0)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
