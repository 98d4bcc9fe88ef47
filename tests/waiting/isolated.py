"""Executors that wait, for child processes, which import them by their names."""

from __future__ import annotations

from datetime import timedelta

from taskx import DuplicateTask, Task, Uncertain, UnknownTaskType


def ask(ctx, swallow: bool = False):
    ctx.step("draft", str, "draft")
    try:
        return [ctx.ask("one", {"n": 1}, tags=["finance"]), ctx.ask("two")]
    except BaseException:
        if not swallow:
            raise
        return "wrong"


def refused(ctx, what: str):
    if what == "timeout":
        with ctx.timeout(5):
            ctx.ask("one")
    if what == "missing":
        ctx.wait("nothing")
    if what == "question":
        ctx.ask("one", object())
    ctx.ask("n" * 255)


def late(ctx):
    try:
        return ctx.ask("one", timeout=0.1)
    except TimeoutError:
        return "nobody"


def nap(ctx):
    ctx.sleep(timedelta(days=1), step="nap")
    return ctx.wait("event/x")


def look(ctx):
    return ctx.poll("look", lambda: ctx.cursor, every=timedelta(days=1))


def pay(ctx, log: str):
    def call():
        with open(log, "a") as file:
            file.write(".")
        with open(log) as file:
            if len(file.read()) < 3:
                raise Uncertain
        return "receipt"

    return [ctx.once("pay", call), ctx.key("pay")]


def double(previous=1):
    return previous * 2


def family(ctx, numbers: list[int], needed: int | None = None):
    tasks = [Task(type="double", params={"previous": n}) for n in numbers]
    return [*map(str, ctx.run_all("two", tasks, needed=needed, on_failure="return"))]


def misfit(ctx):
    ctx.run_all("two", [Task(type="nothing")])


def careful(ctx):
    caught = []
    for type in ("nothing", "double"):
        try:
            ctx.run_all(type, [Task(type=type, unique_key="taken")])
        except (UnknownTaskType, DuplicateTask) as error:
            caught.append([error.__class__.__name__, str(error)])
    return caught


def split(ctx):
    return ctx.fork("two", [Task(type="double", params={"previous": 1})])
