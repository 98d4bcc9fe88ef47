"""The tasks of the app. Their modules are imported under any setting of ``TASKS``."""

from __future__ import annotations

import asyncio
import os
import threading
from contextlib import suppress
from typing import Any

from asgiref.sync import async_to_sync, sync_to_async
from django.db import connection, transaction
from django.utils import timezone, translation

import taskx
from taskx.contrib.django import task
from taskx.contrib.django.compat import task_backends

#: The notes of the tasks of this process.
notes: list[Any] = []
#: Set by tests: the task ``wait`` ends then.
gate = threading.Event()


@task
def add(a: int, b: int = 0) -> int:
    return a + b


@task
async def add_async(a: int, b: int = 0) -> int:
    await asyncio.sleep(0)
    return a + b


@task
def echo(*args: Any, **kwargs: Any) -> Any:
    return [args, kwargs]


@task
def fail(text: str) -> None:
    raise ValueError(text)


@task
async def fail_async(text: str) -> None:
    raise ValueError(text)


@task
def leave() -> None:
    raise SystemExit("leaving")


@task
def interrupt() -> None:
    raise KeyboardInterrupt("interrupted")


@task
def unserialisable() -> object:
    return threading.Lock()


@task(takes_context=True)
def attempt(context: Any, text: str) -> list[Any]:
    context.taskx.progress(50, "half")
    return [context.task_result.id, context.attempt, text]


@task(takes_context=True)
async def attempt_async(context: Any) -> list[Any]:
    return [context.task_result.id, context.attempt]


@task(max_attempts=3, backoff=0)
def fail_twice(key: str) -> str:
    notes.append(key)
    if notes.count(key) < 3:
        raise OSError(f"try {notes.count(key)}")
    return key


@task(timeout=0.2)
async def hang() -> None:
    await asyncio.sleep(300)


@task
async def hang_until_cancelled() -> None:
    gate.set()
    await asyncio.sleep(300)


@task
def wait() -> str:
    gate.wait(60)
    return "passed"


@task
def localised(language: str = "", zone: str = "") -> list[str]:
    found = [translation.get_language(), timezone.get_current_timezone_name()]
    if language:
        translation.activate(language)
        timezone.activate(zone)
    return found


@task
def query() -> list[Any]:
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
    return [threading.current_thread().name, connection.connection is not None]


@task
async def query_async() -> list[Any]:
    context = taskx.current_context()
    assert context is not None
    context.progress(10, f"in {threading.current_thread().name}")
    return [*await sync_to_async(query.func)(), context.task.id]


@task
def loop_of_async_to_sync() -> str:
    """Return the thread of the loop that a function gets from asgiref."""

    async def here() -> str:
        return threading.current_thread().name

    return async_to_sync(here)()


@task(takes_context=True)
async def orm_in_transactions(context: Any) -> list[Any]:
    """Write in a transaction, and in one that fails; return the results of steps, and what was written."""
    from django.contrib.auth.models import Group

    def write(name: str, *, fails: bool = False) -> None:
        with transaction.atomic():
            Group.objects.create(name=name)
            if fails:
                raise LookupError

    await sync_to_async(write)("kept")
    with suppress(LookupError):
        await sync_to_async(write)("undone", fails=True)
    steps = [context.taskx.step("on the loop", lambda: 1), await context.taskx.astep("aside", int)]
    written = [group.name async for group in Group.objects.filter(name__in=["kept", "undone"])]
    await Group.objects.filter(name="kept").adelete()
    return [*steps, written]


@task
def nested() -> int:
    result = add.enqueue(20, 1)
    return 2 * int(result.return_value)


@task
def backends() -> int:
    """Return the number of the backend of this thread."""
    return id(task_backends["default"])


@task(takes_context=True, max_attempts=2)
def join_group(context: Any, name: str, *, fails: int = 0) -> str:
    from django.contrib.auth.models import Group

    for n in range(context.taskx.cursor or 0, 2):
        with context.taskx.transaction():
            Group.objects.create(name=f"{name} {n}")
            context.taskx.cursor = n + 1
            if n == 1 and context.attempt <= fails:
                raise OSError("rolled back, with the cursor")
    with context.taskx.transaction() as tx:
        add.enqueue(1)
        tx.complete(f"{name} is done")
    return "too late"


@task(isolation="process", takes_context=True)
def apart(context: Any, number: int) -> list[Any]:
    context.taskx.progress(50, "in a child")
    return [os.getpid(), context.task_result.id, number, str(timezone.now().tzinfo)]


@task(
    rate="5/h",
    max_concurrency=2,
    expires=3600,
    capture_log="WARNING",
    stall="90s",
    max_snoozes=9,
)
def limited() -> None: ...


@task(batch=3, wait=60)
def lengths(texts: list[str]) -> list[Any]:
    notes.append(texts)
    return [len(text) if text else ValueError("empty") for text in texts]


@task(batch=5, takes_context=True)
def together(context: Any, texts: list[str]) -> list[Any]:
    notes.append((len(context.taskx.each), str(context.task_result.id)))
    return [object() if text == "odd" else text for text in texts]
