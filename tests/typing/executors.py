"""The types of executors and handles. Type checkers check this file; it never runs."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from uuid import UUID

import taskx
from taskx import (
    Config,
    Context,
    Hook,
    MapResults,
    MemoryRepository,
    Middleware,
    Queue,
    Schedule,
    Task,
    TaskExecutor,
    TaskHandle,
    TaskStatus,
    Tick,
    every,
    run,
    tick_of,
)

if TYPE_CHECKING:
    from typing_extensions import assert_type

queue = Queue(MemoryRepository(), Config(worker_num=2))


@queue.executor("fetch", max_attempts=3, timeout=30)
def fetch(ctx: Context, url: str, retries: int = 3) -> dict[str, int]:
    ctx.progress(50, "half way")
    with ctx.closing(_connect()) as connection:
        assert_type(connection, Connection)
    with ctx.timeout(5) as token:
        assert_type(token, taskx.CancelToken)
    assert_type(ctx.remaining(), float | None)
    assert_type(ctx.step("size", len, url), int)
    ctx.step("size", len, 5)  # type: ignore[arg-type]
    assert_type(ctx.once("pay", len, url), int)
    ctx.once("pay", len, 5)  # type: ignore[arg-type]
    assert_type(ctx.poll("look", lambda: url or None, every=60), str)
    assert_type(ctx.key("pay"), str)
    ctx.sleep(60, step="nap")
    ctx.cursor = {"page": 5}
    return {url: retries}


@queue.executor()
def add(a: int, b: int = 2) -> int:
    return a + b


@queue.executor()
async def awaited(ctx: Context, a: int) -> str:
    assert_type(await ctx.astep("one", len, "x"), Any)
    return str(a)


@queue.executor()
async def soon(a: int) -> str:
    return str(a)


@queue.executor()
async def pieces(ctx: Context, a: int) -> AsyncIterator[str]:
    yield str(a)


async def call_coroutines() -> None:
    assert_type(pieces.submit(1).result(), None)
    pieces.submit("1")  # type: ignore[arg-type]
    assert_type(awaited.submit(1), TaskHandle[str])
    assert_type(soon.submit(a=1).result(), str)
    soon.submit("1")  # type: ignore[arg-type]
    assert_type(await soon(1), str)


@queue.executor(max_attempts=3)
def again(status: int, wait: timedelta) -> None:
    if status == 429:
        raise taskx.Retry(5)
    if status == 500:
        raise taskx.Retry("the server failed")
    if status == 503:
        raise taskx.Retry("the server is busy", delay=wait)
    if status == 504:
        raise taskx.Retry(0.5, "the server is slow")
    raise taskx.Retry(wait, 5)  # type: ignore[call-overload]


@taskx.executor("later", priority=3)
def later(ctx: Context, *, name: str) -> str:
    return name


@queue.executor("embed", batch=100, wait=0.2)
def embed(texts: list[dict[str, str]]) -> list[int | Exception]:
    return [len(text["text"]) if text else ValueError("no text") for text in texts]


@taskx.executor(batch=10)
def watched(ctx: taskx.BatchContext, orders: list[Order]) -> list[date]:
    ctx.each[0].token.raise_if_cancelled()
    return [order.day for order in orders]


def batches() -> None:
    assert_type(embed.submit({"text": "a"}), TaskHandle[int])
    assert_type(embed.task({"text": "a"}), Task)
    assert_type(watched.submit(Order(date(2030, 1, 1), {})), TaskHandle[date])
    assert_type(watched, taskx.BatchExecutor[Order, date])
    embed.submit(text="a")  # type: ignore[call-arg]
    watched.submit([1])  # type: ignore[arg-type]
    queue.executor("add", batch="many")  # type: ignore[call-overload]
    queue.executor("add", wait=3)  # type: ignore[call-overload]


@dataclass
class Order:
    day: date
    prices: dict[str, Decimal]


@queue.executor()
def postponed(order: Order, by: timedelta | None = None) -> tuple[Order, UUID]:
    return order, UUID(int=0)


class Connection:
    def abort(self) -> None: ...

    def close(self) -> None: ...


def _connect() -> Connection:
    return Connection()


def submitting() -> None:
    assert_type(fetch.submit("url"), TaskHandle[dict[str, int]])
    assert_type(fetch.submit(url="url", retries=1).result(), dict[str, int])
    assert_type(add.submit(1).result(timeout=5), int)
    assert_type(add.submit(1, b=5).id, str)
    assert_type(later.submit(name="x").result(), str)
    assert_type(add.task(1), Task)
    fetch.submit()  # type: ignore[call-arg]
    fetch.submit(5)  # type: ignore[arg-type]
    fetch.submit("url", tries=1)  # type: ignore[call-arg]
    add.submit("1")  # type: ignore[arg-type]
    add.task(1, 2, 3)  # type: ignore[call-arg]
    later.submit("x")  # type: ignore[call-arg]


def submitting_with_data(connection: sqlite3.Connection) -> None:
    handle = queue.submit(fetch, {"url": "x"}, connection=connection)
    assert_type(handle, TaskHandle[dict[str, int]])
    assert_type(queue.submit_many([add.task(1)], connection=connection), list[TaskHandle[Any]])
    assert_type(queue.cancel_task("id", connection=connection), bool)
    queue.submit(fetch, {"url": "x"}, connections=connection)  # type: ignore[call-overload]


def submitting_objects(order: Order) -> None:
    assert_type(postponed.submit(order).result(), tuple[Order, UUID])
    assert_type(postponed.submit(order, timedelta(1)).follow(), tuple[Order, UUID])
    assert_type(queue.map(postponed, [{"order": order}]), MapResults[tuple[Order, UUID]])
    postponed.submit({"day": "2026-01-01"})  # type: ignore[arg-type]
    postponed.submit(order, by=60)  # type: ignore[arg-type]


def flowing() -> None:
    flow = taskx.chain(add.task(1), taskx.group(add.task(2), later.task(name="x"))).then(
        add.task(3)
    )
    assert_type(flow, taskx.Flow)
    assert_type(queue.submit_flow(flow), taskx.FlowHandle)
    queue.submit("add", {"a": 1}, depends_on=[add.submit(1), "an id"], on_parent_failure="run")
    queue.submit("add", unique_key="k", unique_scope=3600, on_conflict="return")
    for moment in (5.0, timedelta(hours=1), datetime(2030, 1, 1)):
        queue.submit("add", {"a": 1}, expires=moment)
    queue.schedule("hourly", every(3600), "add", {"a": 1}, expires=timedelta(hours=1))
    queue.submit("add", expires=b"soon")  # type: ignore[call-overload]
    queue.schedule("once", every(5), "add", expires=datetime(2030, 1, 1))  # type: ignore[call-overload]
    taskx.executor("add", expires=datetime(2030, 1, 1))  # type: ignore[call-overload]
    queue.submit("add", unique_key="k", on_conflict="ignore")  # type: ignore[call-overload]
    taskx.chain(add, later.using(priority=5)).then(add)
    taskx.chain("add")  # type: ignore[arg-type]


def binding() -> None:
    bound = fetch.using(delay=60, priority=5).on(queue)
    assert_type(bound.submit("url", retries=1), TaskHandle[dict[str, int]])
    assert_type(bound.task(url="url"), Task)
    assert_type(later.on(queue).submit(name="x").result(), str)
    bound.submit()  # type: ignore[call-arg]
    bound.submit(5)  # type: ignore[arg-type]
    bound.using(unique_key="k").submit("url", tries=1)  # type: ignore[call-arg]
    add.using(prioritty=5)  # type: ignore[call-arg]
    add.using(priority="high")  # type: ignore[arg-type]
    add.using(delay=timedelta(minutes=1), timeout=5, unique_key="k", unique_scope=timedelta(1))
    add.using(delay=b"1 minute")  # type: ignore[arg-type]
    add.on("queue")  # type: ignore[arg-type]
    assert_type(queue.submit(fetch, {"url": "x"}, priority=5), TaskHandle[dict[str, int]])
    assert_type(queue.submit(add.using(delay=5)).result(), int)
    assert_type(queue.map(add.using(priority=5), [1]), MapResults[int])
    assert_type(queue.schedule("a", every(5), add.using(priority=5), {"a": 1}), Schedule)
    queue.submit(fetch, url="x")  # type: ignore[call-overload]


def calling(ctx: Context) -> None:
    assert_type(fetch(ctx, "url"), dict[str, int])
    assert_type(fetch(ctx, url="url", retries=1), dict[str, int])
    assert_type(add(1, b=2), int)
    assert_type(later(ctx, name="x"), str)
    fetch("url")  # type: ignore[call-arg, arg-type]
    add("1")  # type: ignore[arg-type]
    add()  # type: ignore[call-arg]


def in_a_transaction(ctx: Context) -> None:
    with ctx.transaction() as tx:
        assert_type(tx, taskx.Transaction)
        tx.complete({"paid": True})
        tx.complete(1, 2)  # type: ignore[call-arg]


def by_name() -> None:
    handle = queue.submit("fetch", {"url": "x"}, priority=5, delay=1.5, created_by="me")
    assert_type(handle, TaskHandle[Any])
    assert_type(handle.result(), Any)
    assert_type(handle.task(), Task)
    assert_type(handle.cancel(), bool)
    assert_type(queue.submit(Task(type="fetch"), id="mine"), TaskHandle[Any])
    assert_type(queue.submit_many([Task(type="fetch")]), list[TaskHandle[Any]])
    queue.submit("fetch", prioritty=5)  # type: ignore[call-overload]
    queue.submit("fetch", priority="high")  # type: ignore[call-overload]
    queue.submit(5)  # type: ignore[call-overload]
    queue.submit(Task(type="fetch"), {"url": "x"})  # type: ignore[call-overload]


def mapping() -> None:
    assert_type(queue.map(add, [1, 2]), MapResults[int])
    for outcome in queue.map(add, [(1, 2)], star=True).outcomes():
        assert_type(outcome.error, Exception | None)
    assert_type(next(queue.map(fetch, ["a"], key=str, window=5)), dict[str, int])
    for result in queue.map(add, [1], return_exceptions=True):
        assert_type(result, int | Exception)
    assert_type(queue.map("fetch", [{"url": "x"}]), MapResults[Any])
    queue.map(add, [1], priority=1, delay=5)  # type: ignore[call-overload]
    queue.map(add, 1)  # type: ignore[call-overload]


class Sync(TaskExecutor):
    type = "sync"

    def execute(self, ctx: Context, task: Task) -> Any:
        ctx.logger.info("syncing %s", task.params)
        task.result = {"synced": True}


class Incomplete(TaskExecutor):
    type = "incomplete"


class Reversed(taskx.Codec):
    name = "reversed"

    def encode(self, data: bytes) -> bytes:
        return data[::-1]

    def decode(self, data: bytes) -> bytes:
        return data[::-1]


def coding() -> None:
    MemoryRepository(codec=Reversed())
    taskx.SQLiteRepository("tasks.db", codec=[taskx.ZlibCodec(), Reversed()])
    taskx.open_repository("memory://", codec=Reversed())
    MemoryRepository(codec=Reversed)  # type: ignore[arg-type]


def refused(ctx: taskx.Context, response: object) -> None:
    ctx.alive()
    assert_type(taskx.retry_after(response), float)
    assert_type(taskx.retry_after({"Retry-After": "5"}, default=timedelta(minutes=1)), float)
    assert_type(taskx.Snooze(5, limit=True).limit, bool | str)
    taskx.Snooze("5s", limit="key")
    taskx.Snooze(5, limit=["api"])  # type: ignore[arg-type]
    taskx.Snooze(5, True)  # type: ignore[call-arg]
    assert_type(Config(max_hold=60).max_hold, float)


def registering() -> None:
    queue.register_executor(Sync(), max_attempts=2, isolation="process", grace=1.5)
    queue.register_executor(later, isolation="thread")  # type: ignore[arg-type]
    queue.register_executor(later, replace=True, stall=60, max_snoozes=9)
    queue.register_executor(later, stall="1m", limit=["api"])
    queue.register_executor(later, max_snoozes="9")  # type: ignore[arg-type]
    queue.register_executor(Sync)  # type: ignore[arg-type]
    queue.register_executor(lambda: None)  # type: ignore[arg-type]
    Incomplete()  # type: ignore[abstract]
    queue.register_executor(later, timeout=timedelta(1), rate=(5, timedelta(minutes=1)))
    Config(overflow="drop")  # type: ignore[arg-type]
    assert_type(Config(block_timeout=timedelta(seconds=5), ageing=60).block_timeout, float | None)
    Config(ageing=[60])  # type: ignore[arg-type]
    assert_type(taskx.RetryPolicy(5, base=timedelta(seconds=1), max_delay=60).base, float)
    taskx.RetryPolicy(base=[1])  # type: ignore[arg-type]


def reading() -> None:
    assert_type(queue.get_task_status("x"), Task)
    tasks, total = queue.list_tasks()
    assert_type(tasks[0], Task)
    assert_type(total, int)
    page = queue.dead_letters(type="fetch", limit=5, start_date=tasks[0].created_at)
    assert_type(page, taskx.TaskPage)
    assert_type(page.more, int)
    if isinstance(failed := queue.handle("x").exception(), taskx.TaskFailed):
        assert_type((failed.error_type, failed.traceback), tuple[str, str])
    assert_type(next(queue.iter_tasks(status="failed")), Task)
    queue.iter_tasks(taskx.TaskFilter(type="fetch"))
    queue.list_tasks("fetch")  # type: ignore[arg-type]
    queue.list_tasks(typ="fetch")  # type: ignore[call-arg]
    queue.iter_tasks(limit="5")  # type: ignore[arg-type]
    assert_type(queue.list_tasks(after=page.next, at_most=10).next, str | None)
    assert_type(queue.dead_letters(after=page.next).searched_since, datetime | None)
    queue.iter_tasks(error="x", error_type="m.X", id_prefix="a", older=60, newer=timedelta(days=1))
    queue.iter_tasks(params={"user.id": 7, ("a.b",): None})
    queue.iter_tasks(tag="a", flow="f")
    queue.list_tasks(tag=["a", "b"])
    taskx.TaskFilter(tag=("a", "b"))
    queue.list_tasks(tag=7)  # type: ignore[arg-type]
    assert_type(queue.get_task_status("x").flow, str)
    queue.submit("fetch", tags=["a"])
    queue.submit(Task(type="fetch", tags=("a",)))
    queue.submit("fetch", tags=7)  # type: ignore[call-overload]
    flow = queue.submit_flow(taskx.chain(Task(type="fetch")), tags=["a"])
    assert_type(queue.flows(at_most=5, after=flow.id), list[taskx.FlowSummary])
    by_name: dict[str, int] = {"user.id": 7}
    queue.requeue_dead_letters(params=by_name)
    taskx.TaskFilter(params=by_name, error="x")
    queue.list_tasks(params={"user.id": [7]})  # type: ignore[dict-item]
    queue.list_tasks(after=5)  # type: ignore[arg-type]
    count = queue.count_tasks(type="fetch", at_most=10_000)
    assert_type(count, taskx.TaskCount)
    assert_type(count.exact, bool)
    divmod(count, 100)
    queue.count_tasks(at_most="5")  # type: ignore[arg-type]
    assert_type(queue.drain(1), bool)
    assert_type(queue.drain(timedelta(minutes=1)), bool)
    queue.stop(None)  # type: ignore[arg-type]
    assert_type(queue.stop(), list[str])
    with queue as started:
        assert_type(started, Queue)


def schedules() -> None:
    assert_type(queue.schedule("a", "0 3 * * *", "t", {"n": 1}, tz="Europe/Berlin"), Schedule)
    made = queue.schedule(
        "b", every(30), Task(type="t"), misfire="skip", overlap="skip", priority=1
    )
    assert_type(queue.schedules(), dict[str, Schedule])
    for tick in queue.schedules()["a"].last(5):
        assert_type(tick, Tick)
        assert_type(tick.status, TaskStatus | None)
    assert_type(made.next(5), list[datetime])
    assert_type(made.trigger().id, str)
    assert_type(tick_of(Task()), datetime | None)
    queue.schedule("d", every(timedelta(hours=1)), "t", misfire_grace=timedelta(minutes=1))
    queue.schedule("c", 30, "t")  # type: ignore[call-overload]
    queue.schedule("c", every(30), "t", misfire="some")  # type: ignore[call-overload]
    queue.schedule("c", every(30), "t", delay=5)  # type: ignore[call-overload]


Config(redact=(*Config().redact, "iban"))
Config(redact=5)  # type: ignore[arg-type]


def in_the_foreground() -> None:
    assert_type(run(queue, Queue(MemoryRepository()), timeout=60), int)
    run(queue, timeout=timedelta(minutes=1))
    run("tasks.db")  # type: ignore[arg-type]
    run([queue])  # type: ignore[arg-type]


class Alerts(Hook):
    def finished(self, task: Task) -> None:
        print(task.error)

    def queue_started(self, queue: Queue) -> None:
        print(queue.running)


class Connected(Middleware):
    def __call__(self, ctx: Context, task: Task, call_next: Callable[[], Any]) -> Any:
        return call_next()


def timed(ctx: Context, task: Task, call_next: Callable[[], Any]) -> Any:
    return call_next()


def no_middleware(ctx: Context) -> Any:
    return None


Queue(MemoryRepository(), hooks=[Alerts()], middleware=[Connected(), timed])
Queue(MemoryRepository(), middleware=[no_middleware])  # type: ignore[list-item]
Queue(MemoryRepository(), hooks=[Alerts])  # type: ignore[list-item]
