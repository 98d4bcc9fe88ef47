"""A program whose writes are recorded, to cut the power at any of them; and its executors.

    python -m tests.campaign.cuts_worker FILE TOLD DURABILITY

It tells in the file ``TOLD`` what a caller was told, after the call, and what its executors do outside
of the database, which no power cut undoes.
"""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from taskx import Config, Context, Queue, RetryPolicy, SQLiteRepository, Task, chain, every
from taskx.attempt.checkpoints import Keeper
from taskx.stores.base import Repository
from taskx.stores.sqlite import connections
from taskx.stores.sqlite.links import FileLinks

#: Tells something: what, the id of the task, and more.
Tell = Callable[..., None]
#: What names the tables in the application's file.
PREFIX = "taskx_"
#: Pages in the log before it is copied into the file: few, so that it is done and begun again often.
_CHECKPOINT_EVERY = 60
_PATIENCE = 500.0
_EACH = ("plain", "single", "stepper", "buyer", "flaky", "speaker")
#: What the task that emits shows in the end, however often it is called: the middle is that of a step.
SPOKEN = ["begin", 0, 1, 2, "end"]


def in_application(path: str) -> bool:
    """Return True if a path is that of an application's file."""
    return Path(path).name == "app.db"


def in_django(path: str) -> bool:
    """Return True if a path is that of the database of a Django project, which has no write-ahead log."""
    return Path(path).name == "django.db"


def queue_on(path: str, durability: Any, tell: Tell) -> Queue:
    """Return a queue with all executors on a file."""
    repository: Repository
    if in_django(path):
        repository = _django_repository(path, durability)
    elif in_application(path):
        # Its settings, whatever they are, do not change what TaskX promises.
        connect = lambda: _loose(path)  # noqa: E731
        repository = SQLiteRepository(path, durability, prefix=PREFIX, connect=connect)
    else:
        repository = SQLiteRepository(path, durability)
    queue = Queue(repository, Config(worker_num=2))
    for executor in (plain, single, stepper, buyer, speaker, asker, parent, flaky, failing, payer):
        given: dict[str, Any] = {
            "single": {"max_crashes": 1},
            "flaky": {"max_attempts": 2, "retry": RetryPolicy(2, base=0.001, jitter=0)},
        }.get(executor.__name__, {"max_crashes": 10})
        queue.executor(executor.__name__, **given)(_telling(executor, tell))
    queue.declare("later")
    return queue


def _django_repository(path: str, durability: Any) -> Repository:
    import django_project

    new = not os.path.exists(path)
    django_project.set_up()
    django_project.add_database("cut", NAME=path)
    if new:
        django_project.migrate("cut")
    from taskx.contrib.django import DjangoRepository

    made: Repository = DjangoRepository(
        "cut", durability, run_folder=os.path.dirname(path), timeout=60.0
    )
    return made


def _loose(path: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, timeout=60)
    connection.execute("PRAGMA synchronous = NORMAL")
    return connection


def _telling(executor: Callable[..., Any], tell: Tell) -> Callable[..., Any]:
    def run(ctx: Context, **params: Any) -> Any:
        tell("began", ctx.task.id, ctx.task.starts)
        return executor(ctx, tell, **params)

    return run


# --- the executors


def plain(ctx: Context, tell: Tell, n: int = 0) -> int:
    return n


def single(ctx: Context, tell: Tell) -> None:
    """Do something that must not be done twice, by a task that fails at its first crash."""
    tell("single", ctx.task.id)


def stepper(ctx: Context, tell: Tell) -> str:
    for step in ("first", "second"):
        ctx.step(step, tell, "call", ctx.task.id, step)
        tell("step", ctx.task.id, step)
    ctx.cursor = 5
    return "stepped"


def buyer(ctx: Context, tell: Tell) -> str:
    """Buy something, which must never be done twice without an answer."""

    def charge() -> str:
        tell("charged", ctx.task.id)
        return "receipt"

    receipt: str = ctx.once("charge", charge)
    tell("bought", ctx.task.id)
    return receipt


def speaker(ctx: Context, tell: Tell) -> None:
    """Emit chunks: some are stored while the step runs, some with its result, some at the end."""

    def say() -> None:
        tell("call", ctx.task.id, "say")
        for word in SPOKEN[1:-1]:
            ctx.emit(word)

    ctx.emit(SPOKEN[0])
    time.sleep(0.15)  # blocks on purpose: longer than chunks are kept in memory
    ctx.step("say", say)
    tell("step", ctx.task.id, "say")
    ctx.emit(SPOKEN[-1])


def asker(ctx: Context, tell: Tell) -> str:
    told: str = ctx.ask("approval", "may I?")
    return told


def parent(ctx: Context, tell: Tell) -> int:
    return sum(ctx.run_all("kids", [Task(type="plain", params={"n": n}) for n in (1, 2)]))


def flaky(ctx: Context, tell: Tell) -> int:
    if ctx.task.attempt == 1:
        raise ValueError("the first attempt")
    return ctx.task.attempt


def failing(ctx: Context, tell: Tell) -> None:
    """Fail until it is requeued."""
    if ctx.task.starts == 1:
        raise ValueError("until it is requeued")


def payer(ctx: Context, tell: Tell) -> None:
    with ctx.transaction() as tx:
        tx.connection.execute("INSERT INTO payments VALUES (?)", (ctx.task.id,))
        tx.complete("paid")
    tell("paid", ctx.task.id)


# --- what the caller does


class Caller:
    """The calls of a program, and what it was told."""

    def __init__(self, queue: Queue, path: str, tell: Tell, name: str) -> None:
        self._queue, self._path, self._tell, self._name = queue, path, tell, name

    def submit(self, kind: str, id: str = "", **options: Any) -> str:
        chosen = {"id": f"{self._name} {id}"} if id else {}
        handle = self._queue.submit(kind, **chosen, **options)
        self._tell("accepted", handle.id)
        return handle.id

    def end(self, task_id: str, *, failed: bool = False) -> None:
        """Wait for the end of a task."""
        error = self._queue.handle(task_id).exception(timeout=_PATIENCE)
        assert (error is not None) is failed, error
        self._tell("failed" if failed else "completed", task_id)

    def run_tasks(self, number: int) -> None:
        """Submit tasks of all kinds, and follow them."""
        queue, tell = self._queue, self._tell
        ids = [self.submit(kind) for kind in _EACH]
        asks = [self.submit("asker") for _ in range(2)]
        fails = self.submit("failing", f"fails {number}")
        many = queue.submit_many([Task(type="plain", params={"n": n}) for n in range(4)])
        tell("accepted", *(handle.id for handle in many))
        flow = queue.submit_flow(chain(Task(type="plain"), Task(type="parent"), Task(type="plain")))
        tell("accepted", *flow.ids)
        self._answer(asks[0])  # maybe before it asks
        self.end(fails, failed=True)
        for task_id in [*ids, asks[0], *flow.ids, *(handle.id for handle in many)]:
            self.end(task_id)
        # Nothing else happens now, so no other write syncs these.
        self._answer(asks[1])
        self.end(asks[1])
        tell("requeueing", fails)
        queue.requeue(fails)
        tell("requeued", fails)
        self.end(fails)
        tell("deleting", ids[0])
        queue.delete(ids[0])
        tell("deleted", ids[0])

    def _answer(self, task_id: str) -> None:
        assert self._queue.finish(f"{task_id}/approval", "yes")
        self._tell("answered", f"{task_id}/approval", "yes")

    def steer(self, number: int) -> None:
        """Cancel, wake, hold, pause and schedule."""
        queue, tell = self._queue, self._tell
        gone = self.submit("later", f"cancelled {number}")
        assert queue.cancel_task(gone)
        tell("cancelled", gone)
        delayed = self.submit("plain", delay=3600)
        assert queue.wake(delayed)
        tell("woken", delayed)
        self.end(delayed)
        queue.pause(f"type{number}")
        tell("noted", f"pause/type{number}")
        queue.schedule(f"{self._name} {number}", every(86_400), "later").store()
        tell("noted", f"schedule/{self._name} {number}")

    def transact(self, number: int) -> None:
        """Store rows with tasks, in transactions of the application and of an executor."""
        with closing(sqlite3.connect(self._path, timeout=60)) as connection:
            for kept in (True, False, True):
                row = connection.execute("INSERT INTO orders (task) VALUES ('')").lastrowid
                handle = self._queue.submit("plain", created_by="order", connection=connection)
                connection.execute("UPDATE orders SET task = ? WHERE id = ?", (handle.id, row))
                if not kept:
                    connection.rollback()
                    continue
                connection.commit()
                self._tell("accepted", handle.id)
                self._tell("ordered", handle.id)
                self.end(handle.id)
        self.end(self.submit("payer"))


def make_application(path: str) -> None:
    """Make the file of an application, as far as it is not there."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(
            "CREATE TABLE IF NOT EXISTS orders (id INTEGER PRIMARY KEY, task TEXT NOT NULL)"
        )
        connection.execute("CREATE TABLE IF NOT EXISTS payments (task TEXT NOT NULL)")
        connection.commit()


def plant(move: str) -> None:
    """Break TaskX: do not sync writes of these moves, with commas in between; "" for none."""
    if move == "complete":
        # The last statement before the transaction begins, so that it overrules TaskX's own.
        begin = FileLinks.begin_on

        def begin_on(self: FileLinks, connection: sqlite3.Connection) -> None:
            connection.execute("PRAGMA synchronous = NORMAL")
            begin(self, connection)

        FileLinks.begin_on = begin_on  # type: ignore[method-assign]
        return
    if move == "chunks":
        # The end of a task is stored first, and then what it has emitted.
        save = Keeper.save
        Keeper.save = lambda *given: threading.Timer(0.5, save, given).start()  # type: ignore[method-assign]
        return
    real = FileLinks.transaction

    def transaction(
        self: FileLinks, work: Any, durable: bool, sent: Any = None, **more: Any
    ) -> Any:
        moves = (
            {write.move for write in sent[0] if write.durable} if sent and sent[0] else {"notes"}
        )
        return real(self, work, durable and not moves <= {*move.split(",")}, sent, **more)

    def never(self: FileLinks, work: Any, durable: bool, *more: Any, **named: Any) -> Any:
        return real(self, work, False, *more, **named)

    if move:
        FileLinks.transaction = never if move == "all" else transaction  # type: ignore[method-assign]


def only_submit(path: str, tell: Tell, durability: str) -> None:
    """Submit tasks in a process of its own, while another one runs them."""
    queue = queue_on(path, durability, tell)
    caller = Caller(queue, path, tell, "second")
    for number in range(6):
        caller.submit("plain" if number % 2 else "single", "" if number < 3 else f"s{number}")
    queue.close()


def main(path: str, told: str, durability: str, role: str = "first") -> None:
    connections.CHECKPOINT_EVERY = _CHECKPOINT_EVERY
    plant(os.environ["TASKX_PLANTED"])
    file = os.open(told, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def tell(*words: object) -> None:
        os.write(file, json.dumps(words).encode())

    if role == "second":
        only_submit(path, tell, durability)
        return
    if in_application(path):
        make_application(path)
    for life in range(2):  # the log is removed and made again in between
        queue = queue_on(path, durability, tell)
        with queue:
            caller = Caller(queue, path, tell, "first")
            command = [sys.executable, "-m", f"{__package__}.cuts_worker", path, told, durability]
            second = subprocess.Popen([*command, "second"]) if life == 0 else None
            caller.run_tasks(life)
            caller.steer(life)
            if in_application(path):
                caller.transact(life)
            assert second is None or second.wait(_PATIENCE) == 0
        queue.close()
    tell("over", "")


if __name__ == "__main__":
    main(*sys.argv[1:])
