"""Executors that run in child processes, which import this module."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from datetime import date, timedelta
from pathlib import Path

from taskx import (
    CancelReason,
    PayloadError,
    Permanent,
    Retry,
    Snooze,
    Task,
    TaskCancelled,
    TaskExecutor,
    current_context,
    executor,
)

FOR_EVER = 600.0
STATE = []


logging.getLogger("app.own").addHandler(logging.NullHandler())
logging.getLogger("app.own").propagate = False


class OwnError(Exception):
    pass


class OwnRetry(Retry):
    pass


def note(path, word):
    with Path(path).open("a") as log:
        log.write(f"{word}\n")


@executor("add", isolation="process")
def add(a, b=0):
    return a + b


@executor("who", isolation="process")
def who(ctx):
    """Return the process that it runs in, and the task that it got."""
    STATE.append(1)
    print("on the stdout of the child")
    return {
        "pid": os.getpid(),
        "parent": os.getppid(),
        "states": len(STATE),
        "main thread": threading.current_thread() is threading.main_thread(),
        "task": {**ctx.task.to_dict(), "result": None},
        "remaining": ctx.remaining(),
    }


@executor("tell", isolation="process")
def tell(ctx, length):
    ctx.progress(50, "x" * length)


@executor("fail", isolation="process")
def fail(kind):
    raise {
        "own": lambda: OwnError("bad ☃"),
        "key": lambda: KeyError("name"),
        "exit": lambda: SystemExit(3),
        "retry": lambda: OwnRetry("again", delay=0.01),
        "permanent": lambda: Permanent("never"),
        "snooze": lambda: Snooze(60),
        "cancelled": lambda: TaskCancelled(CancelReason.CANCEL),
        "memory": lambda: MemoryError(),
    }[kind]()


@executor("give", isolation="process")
def give(kind):
    return {"nan": float("nan"), "large": "x" * 3000, "set": {1}, "tuple": (1, "☃")}[kind]


@executor("die", isolation="process")
def die(ctx, how):
    ctx.progress(40, "so far")
    if how == "segfault":
        ctypes.string_at(0)
    if how == "exit":
        os._exit(7)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "fork":  # the grandchild keeps the child's end of the socket
        if os.fork() == 0:
            while True:
                signal.pause()
        os._exit(7)
    if how == "once":
        if ctx.task.crashes == 0:
            os._exit(1)
        return "second time"
    return "unknown"


@executor("listen", isolation="process")
def listen(ctx, path="", inner=False, linger=0):
    """Note how the token fired; end after ``linger`` seconds."""
    ctx.progress(1, str(os.getpid()))
    called = threading.Event()
    ctx.on_cancel(called.set)
    try:
        if inner:
            with ctx.timeout(0.05):
                ctx.sleep(FOR_EVER)
        ctx.sleep(FOR_EVER)
    except TimeoutError:
        return "inner"
    except TaskCancelled as error:
        if path:
            note(path, f"{error.reason} {ctx.token.reason} {called.wait(100)}")
        threading.Event().wait(linger)
        raise


@executor("ignore", isolation="process", grace=0.2)
def ignore(ctx, path=""):
    """Never check the token, hold the interpreter's lock, and start a program."""
    nothing = subprocess.DEVNULL
    program = subprocess.Popen(
        [sys.executable, "-c", "import signal; signal.pause()"], stdout=nothing, stderr=nothing
    )
    ctx.progress(1, f"{os.getpid()} {program.pid}")
    if path:
        note(path, os.getpid())
    while ctx._unwritten:  # until the progress is reported
        time.sleep(0.01)  # blocks on purpose
    re.match(r"(a+)+$", "a" * 64 + "b")


@executor("walk", isolation="process")
def walk(ctx, path):
    note(f"{path}pid", os.getpid())
    for step in range(1, 4):
        ctx.progress(step * 10, f"step {step}")
        while not Path(f"{path}{step}").exists():
            ctx.sleep(0.01)
    ctx.progress(90, "the last")


@executor("log", isolation="process")
def log(ctx):
    ctx.logger.info("from the context: %d", 1, extra={"more": 5})
    logging.getLogger("app.part").warning("from the %s", "module")
    logging.getLogger("app.own").error("from a logger with its own handlers")
    logging.getLogger("app.quiet").info("filtered out")
    try:
        raise OwnError("logged")
    except OwnError:
        ctx.logger.exception("with an error")


@executor("steps", isolation="process", max_attempts=2)
def steps(ctx, path):
    first = ctx.step("first", note, path, "first")
    second = ctx.step("second", lambda: [1, {"a": "☃"}])
    if ctx.task.errors == 0:
        ctx.cursor = {"at": 7}
        raise OwnError("between")
    return [first, second, ctx.cursor]


@executor("ask", isolation="process")
def ask(ctx):
    return [[parent.id, parent.result, parent.status.value] for parent in ctx.parents]


@executor("wait_to_step", isolation="process")
def wait_to_step(ctx, path):
    ctx.progress(1, "waits")
    while not Path(path).exists():
        ctx.token.wait(0.01)
    ctx.step("one", int)


@executor("goes_on_without", isolation="process")
def goes_on_without(ctx):
    try:
        return ctx.step("one", int)
    except PayloadError as error:
        return [str(error)]


class Classic(TaskExecutor):
    type = "classic"

    def execute(self, ctx, task: Task):
        task.result = {"pid": os.getpid(), "n": task.params["n"]}


class Holder:
    class Inner(TaskExecutor):
        type = "inner"

        def execute(self, ctx, task):
            return "inner"


class Needy(TaskExecutor):
    type = "needy"

    def __init__(self, url):
        self.url = url

    def execute(self, ctx, task):
        raise NotImplementedError


def plain(word):
    return word.upper()


def replaced():
    """An executor whose name belongs to another object."""


really_replaced, replaced = replaced, add


@executor("fork", isolation="process")
def fork(how):
    """Return the exit status of a forked child that returns from here."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    signal.alarm(100)  # in case the child does not end
    if how == "raise":
        raise ValueError("in the child")
    return "of the child"


class RetryWithout(Retry):
    """A class whose ``__init__`` does not call that of its base."""

    def __init__(self, code):
        self.code = code


class SnoozeWithout(Snooze):
    def __init__(self, code):
        self.code = code


class CancelledWithout(TaskCancelled):
    def __init__(self, code):
        self.code = code


@executor("odd", isolation="process")
def odd(kind):
    raise {
        "by hand": lambda: TaskCancelled("enough"),
        "retry": lambda: RetryWithout(5),
        "snooze": lambda: SnoozeWithout(5),
        "cancelled": lambda: CancelledWithout(5),
    }[kind]()


# Starts a program and prints its process id; ends before the program, or waits for ever.
STARTS = """
import os, signal, subprocess, sys
how, nothing = sys.argv[1], subprocess.DEVNULL
pause = [sys.executable, "-c", "import signal; signal.pause()"]
more = {"env": {}} if how == "no environment" else {}
program = subprocess.Popen(pause, start_new_session=True, stdout=nothing, stderr=nothing, **more)
print(program.pid, flush=True)
if how == "no environment":
    signal.pause()
"""


@executor("leaves", isolation="process", grace=0.1)
def leaves(ctx, how, dies=False):
    """Start a program through another program, then hang or die."""
    starter = subprocess.Popen([sys.executable, "-c", STARTS, how], stdout=subprocess.PIPE)
    ctx.progress(1, starter.stdout.readline().decode().strip())
    if how == "daemon":
        starter.wait()
    while ctx._unwritten:
        time.sleep(0.01)  # blocks on purpose
    if dies:
        os._exit(7)
    time.sleep(FOR_EVER)  # blocks on purpose


@executor("tomorrow", isolation="process")
def tomorrow(day: date) -> date:
    """Return the day after an object that it got."""
    return day + timedelta(days=1)


def many_steps(ctx, text: str, count: int):
    for n in range(count):
        ctx.step(f"step {n}", lambda: text)
    if ctx.task.errors == 0:
        raise ValueError("once")
    return len(ctx.task.checkpoints["steps"])


@executor(isolation="process")
async def awaiting(ctx, a):
    """Return a value, and whether the context is the current one; wait for a cancel if it is negative."""
    await asyncio.sleep(0)
    if a < 0:
        ctx.progress(50)
        await asyncio.sleep(3600)
    return [a + 1, current_context() is ctx]


@executor("speak", isolation="process", max_attempts=2)
def speak(ctx):
    """Emit within a step, and outside of it."""
    ctx.emit("begin")
    ctx.step("say", lambda: [ctx.emit(word) for word in ("one", "two")])
    ctx.emit("end")
    if ctx.task.attempt == 1:
        raise Retry(0)
