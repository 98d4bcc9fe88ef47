"""The types of the integration with Django. Type checkers check this file; it never runs."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from taskx import Queue, RetryPolicy, TaskHandle, every
from taskx.contrib.django import (
    DjangoRepository,
    InlineBackend,
    TaskxBackend,
    dashboard,
    get_queue,
    load_queue,
    schedule,
    task,
)
from taskx.contrib.django.results import TaskxContext, TaskxResult
from taskx.contrib.django.tasks import TaskxTask

if TYPE_CHECKING:
    from typing_extensions import assert_type


@task
def plain(month: str) -> int:
    return len(month)


@task(priority=5, queue_name="mails", max_attempts=3, backoff=timedelta(seconds=2))
def mail(to: str) -> None: ...


@task(takes_context=True, backoff=RetryPolicy())
def report(context: TaskxContext, month: str) -> int:
    context.taskx.progress(50, month)
    return len(month)


def use(result: TaskxResult) -> None:
    assert_type(plain, TaskxTask)
    assert_type(mail, TaskxTask)
    assert_type(mail.using(unique_key="k", timeout=30), TaskxTask)
    assert_type(mail.max_attempts, int | None)
    assert_type(result.taskx, TaskHandle[Any])
    mail.enqueue(to="ann")

    assert_type(get_queue(), Queue)
    assert_type(get_queue("reports"), Queue)
    assert_type(load_queue("reports", ["mails"]), Queue)
    assert_type(get_queue().submit("report", connection=object()), TaskHandle[Any])
    schedule("nightly", "0 3 * * *", report, {"month": "2024-05"}, tz="Europe/Berlin")
    schedule("often", every(60), "shop.tasks.report", backend="reports")
    assert_type(dashboard(read_only=True), tuple[list[Any], str, str])
    assert_type(TaskxBackend("default", {}).queue, Queue)
    InlineBackend("default", {}).clear()
    Queue(DjangoRepository("tasks", "full", on_commit="refuse", lease_timeout=timedelta(minutes=1)))

    get_queue(5)  # type: ignore[arg-type]
    schedule("never", 60, report)  # type: ignore[arg-type]
    DjangoRepository("tasks", "process")  # type: ignore[arg-type]
    DjangoRepository(on_commit="ignore")  # type: ignore[arg-type]
