"""Tasks that wait without a thread, in a Django database."""

from __future__ import annotations

from datetime import timedelta

import django_project
import pytest
from django.db import transaction
from helpers import PATIENCE, eventually

from taskx import Queue
from taskx.tasks import lifecycle


@pytest.fixture(params=django_project.MAKERS)
def queue(request, tmp_path):
    with django_project.MAKERS[request.param](tmp_path) as repository:
        queue = Queue(repository)

        @queue.executor("refund")
        def refund(ctx, event: str):
            approved = ctx.ask("approval", timeout=timedelta(days=3))
            ctx.sleep(timedelta(days=14), step="grace")
            return [approved, ctx.wait(event)]

        with queue:
            yield queue


def waits_for(queue, task_id, awaited):
    def found():
        [(waiting_on,)] = queue.repository.find("id", [task_id], ("waiting_on",))
        return waiting_on == awaited and lifecycle.is_parked(queue.get_task_status(task_id))

    eventually(found)


def test_it_waits_for_a_person_a_time_and_an_event(queue):
    handle = queue.submit("refund", {"event": "event/a"})
    waits_for(queue, handle.id, f"{handle.id}/approval")
    assert queue.finish(f"{handle.id}/approval", "yes", by="eva")
    assert not queue.finish(f"{handle.id}/approval", "no")
    eventually(lambda: queue.wake(handle.id))
    waits_for(queue, handle.id, "event/a")
    assert queue.finish("event/a", 7)
    assert handle.result(PATIENCE) == ["yes", 7]
    assert len(handle.task().attempts) == 1


def test_a_cancel_takes_the_answer_and_passes_the_turn_on(queue):
    first, second = (
        queue.submit("refund", {"event": "event/b"}, concurrency_key="k") for _ in range(2)
    )
    waits_for(queue, first.id, f"{first.id}/approval")
    assert queue.cancel_task(first.id)
    waits_for(queue, second.id, f"{second.id}/approval")
    gone = f"{first.id}/approval"
    eventually(lambda: queue.repository.statuses([gone]) == {gone: "cancelled"})
    assert queue.cancel_task(second.id)


def test_an_answer_in_a_transaction_of_the_caller_counts_from_its_commit(queue):
    handle = queue.submit("refund", {"event": "event/c"})
    answer, using = f"{handle.id}/approval", queue.repository.using
    waits_for(queue, handle.id, answer)
    with transaction.atomic(using=using):
        assert queue.finish(answer, "rolled back")
        transaction.set_rollback(True, using=using)
    waits_for(queue, handle.id, answer)
    with transaction.atomic(using=using):
        assert queue.finish(answer, "committed", by="eva")
    assert queue.get_task_status(answer).result == "committed"
    eventually(lambda: queue.wake(handle.id))
    waits_for(queue, handle.id, "event/c")
    assert queue.cancel_task(handle.id)
