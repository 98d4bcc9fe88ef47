"""The backend for tests runs tasks at once, or when the transaction of the test commits."""

from __future__ import annotations

import asyncio
import threading
import unittest
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.auth.models import Group, Permission
from django.db import connection, transaction
from django.test import TestCase
from django.test.utils import override_settings
from shop import tasks

from taskx import ConfigurationError, every
from taskx.contrib.django import InlineBackend, get_queue, schedules
from taskx.contrib.django.compat import (
    TaskResultDoesNotExist,
    TaskResultStatus,
    task_backends,
    task_enqueued,
    task_finished,
    task_started,
)

READY, FAILED, SUCCESSFUL = (
    TaskResultStatus.READY,
    TaskResultStatus.FAILED,
    TaskResultStatus.SUCCESSFUL,
)
TASKS = {"default": {"BACKEND": "taskx.contrib.django.InlineBackend"}}


@pytest.fixture
def backend() -> Iterator[InlineBackend]:
    tasks.notes.clear()
    with override_settings(TASKS=TASKS):
        yield task_backends["default"]
        connection.close()


@pytest.mark.parametrize("task", [tasks.add, tasks.add_async], ids=["def", "async def"])
def test_a_task_has_ended_when_enqueue_returns_and_no_worker_was_started(
    backend, task, threads_begun
):
    result = task.enqueue(1, b=2)
    assert (result.status, result.return_value, result.attempts) == (SUCCESSFUL, 3, 1)
    assert result.enqueued_at <= result.started_at <= result.finished_at
    assert task.get_result(result.id) == result
    assert asyncio.run(task.aenqueue(1, b=2)).return_value == 3
    result.refresh()
    assert result.return_value == 3
    begun = [thread.name for thread in threads_begun if thread.name.startswith("taskx")]
    assert {*begun} <= {"taskx-loop"}


def test_errors_are_on_the_result_and_ctrl_c_reaches_the_test(backend):
    result = tasks.fail.enqueue("no stock")
    assert (result.status, result.errors[0].exception_class) == (FAILED, ValueError)
    assert tasks.leave.enqueue().errors[0].exception_class is SystemExit
    with pytest.raises(KeyboardInterrupt):
        tasks.interrupt.enqueue()


def test_retries_take_no_time_and_a_task_with_a_time_stays_ready(backend):
    result = tasks.fail_twice.using(backoff=timedelta(hours=1)).enqueue("key")
    assert (result.status, result.attempts) == (SUCCESSFUL, 3)
    later = tasks.add.using(run_after=timedelta(hours=1)).enqueue(1)
    assert later.status == READY
    assert backend.get_result(later.id) == later
    backend.queue.advance(3600)
    later.refresh()
    assert later.status == SUCCESSFUL


def test_a_task_that_enqueues_a_task_has_its_result_at_once(backend):
    assert tasks.nested.enqueue().return_value == 42


def test_signals_are_those_of_the_real_backend(backend):
    seen: list[tuple[str, Any, Any]] = []

    def note(name: str) -> Any:
        return lambda sender, task_result, **more: seen.append((name, sender, task_result.status))

    receivers = {
        signal: note(name)
        for name, signal in {
            "enqueued": task_enqueued,
            "started": task_started,
            "finished": task_finished,
        }.items()
    }
    for signal, receiver in receivers.items():
        signal.connect(receiver)
    try:
        tasks.add.enqueue(1)
    finally:
        for signal, receiver in receivers.items():
            signal.disconnect(receiver)
    assert seen == [
        ("enqueued", InlineBackend, READY),
        ("started", InlineBackend, TaskResultStatus.RUNNING),
        ("finished", InlineBackend, SUCCESSFUL),
    ]


def test_the_native_api_runs_at_once_too_and_clear_forgets_all_tasks(backend):
    queue = get_queue()
    queue.executor("double")(lambda number: 2 * number)
    handle = queue.submit("double", {"number": 21})
    assert handle.result(0) == 42
    result = tasks.add.enqueue(1)
    assert len(get_queue().submitted()) == 2
    backend.clear()
    with pytest.raises(TaskResultDoesNotExist):
        backend.get_result(result.id)
    assert get_queue().submitted() == []


def test_the_native_api_finds_a_task_by_its_type_and_runs_its_schedule(backend):
    assert get_queue().submit("shop.tasks.add", {"a": 1, "b": 2}).result(0) == 3
    get_queue().schedule("adds", every(60), tasks.add.type, {"a": 1})
    ran = get_queue().advance(180)
    assert [(task.type, task.result) for task in ran] == [("shop.tasks.add", 1)] * 3


def test_a_call_that_takes_no_task_of_django_says_its_type(backend):
    for call in (get_queue().submit, lambda task: get_queue().count_tasks(type=task)):
        with pytest.raises(ConfigurationError, match=r"; give its type, 'shop\.tasks\.add'$"):
            call(tasks.add)


def test_declared_schedules_tick_only_in_a_test_that_asks_for_them(backend, monkeypatch):
    monkeypatch.setattr(schedules, "_declared", {})
    schedules.schedule("adds", every(60), tasks.add, {"a": 1})
    assert get_queue().advance(180) == []
    schedules.declare("default", get_queue())
    ran = get_queue().advance(180)
    assert [(task.type, task.result) for task in ran] == [("shop.tasks.add", 1)] * 3


@pytest.mark.parametrize("odd", ["", "a\0", "\ud800", "x" * 256, 7, None, [], {}])
def test_no_result_has_an_odd_id(backend, odd):
    with pytest.raises(TaskResultDoesNotExist):
        tasks.add.get_result(odd)


# --- transactions


def test_a_task_runs_at_the_commit_and_not_after_a_rollback(backend):
    with transaction.atomic():
        result = tasks.add.enqueue(1)
        assert result.status == backend.get_result(result.id).status == READY
        with transaction.atomic():
            lost = tasks.add.enqueue(2)
            assert backend.get_result(lost.id).status == READY
            transaction.set_rollback(True)
        with pytest.raises(TaskResultDoesNotExist):
            lost.refresh()
    result.refresh()
    assert result.return_value == 1
    with pytest.raises(TaskResultDoesNotExist):
        lost.refresh()


def test_a_test_case_runs_its_tasks_when_it_captures_the_callbacks_of_the_commit(backend):
    class Case(TestCase):
        def test(self) -> None:
            with self.captureOnCommitCallbacks(execute=True) as callbacks:
                result = tasks.query.enqueue()
                assert result.status == READY
            assert len(callbacks) == 1
            result.refresh()
            assert result.return_value == [threading.current_thread().name, True]

            with self.captureOnCommitCallbacks() as callbacks:
                result = tasks.add.enqueue(1)
            assert backend.get_result(result.id).status == READY
            callbacks[0]()
            assert backend.get_result(result.id).status == SUCCESSFUL

    outcome = unittest.TestSuite([Case("test")]).run(unittest.TestResult())
    assert (outcome.errors, outcome.failures, outcome.testsRun) == ([], [], 1)


# --- transactions of executors


def names() -> list[str]:
    """Return the names in the rows of the site."""
    return sorted(Group.objects.values_list("name", flat=True))


def test_an_executor_writes_in_the_transaction_of_the_test(site, backend):
    class Case(TestCase):
        def test(self) -> None:
            with self.captureOnCommitCallbacks(execute=True):
                result = tasks.join_group.enqueue("readers", fails=1)
                failing = tasks.join_group.enqueue("writers", fails=2)
            result.refresh()
            assert (result.return_value, result.attempts) == ("readers is done", 2)
            failing.refresh()
            assert (failing.status, failing.errors[0].exception_class) == (FAILED, OSError)
            assert names() == ["readers 0", "readers 1", "writers 0"]
            assert len(get_queue().submitted("shop.tasks.add")) == 1

    outcome = unittest.TestSuite([Case("test")]).run(unittest.TestResult())
    assert (outcome.errors, outcome.failures, outcome.testsRun) == ([], [], 1)
    assert names() == []


def test_a_commit_that_fails_completes_no_task(site, backend):
    queue = get_queue()

    @queue.executor("orphan")
    def orphan(ctx: Any) -> None:
        with ctx.transaction() as tx:
            Permission.objects.create(name="read", codename="read", content_type_id=-1)
            tx.complete("never")

    task = queue.submit("orphan").task()
    assert (task.status.value, task.result) == ("failed", None)
    assert "FOREIGN KEY" in task.error.upper()
    assert not Permission.objects.filter(codename="read").exists()


def test_the_connection_of_a_block_can_be_given(site, backend):
    queue = get_queue()
    queue.executor("double")(lambda number: 2 * number)
    with transaction.atomic():
        handle = queue.submit("double", {"number": 21}, connection=connection)
        assert queue.count_tasks() == 0
    assert handle.result(timeout=1) == 42  # on the queue's clock


def test_overridden_settings_begin_with_no_tasks(backend):
    result = tasks.add.enqueue(1)
    with override_settings(TASKS=TASKS):
        with pytest.raises(TaskResultDoesNotExist):
            tasks.add.get_result(result.id)
        assert tasks.add.enqueue(2).return_value == 2
    assert tasks.add.enqueue(3).return_value == 3
