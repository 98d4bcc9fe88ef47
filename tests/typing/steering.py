"""What a type checker sees of requeues and of changes in bulk. Checked, never run."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal

from taskx import Attempt, Bulk, MemoryRepository, Queue, TaskFilter

if TYPE_CHECKING:
    from typing_extensions import assert_type

queue = Queue(MemoryRepository())


def correct(task_id: str) -> None:
    queue.requeue(task_id)
    queue.requeue(task_id, params={"to": "ann"}, from_step="mail")
    queue.requeue(task_id, {"to": "ann"})  # type: ignore[call-arg]
    queue.requeue(task_id, params=[1])  # type: ignore[arg-type]
    queue.requeue(task_id, from_step=1)  # type: ignore[arg-type]
    for attempt in queue.get_task_status(task_id).attempts:
        assert_type(attempt, Attempt)
        assert_type(attempt.old_params, dict[str, Any] | None)
        assert_type(attempt.from_step, str)


def show(bulk: Bulk) -> None:
    assert_type(bulk.action, Literal["requeue", "cancel", "delete"])
    assert_type(bulk.matched, int)
    assert_type(bulk.skipped, Mapping[str, int])
    assert_type(bulk.reached, datetime | None)
    assert_type(bulk.to_dict(), dict[str, Any])
    bulk.changed = 1  # type: ignore[misc]


def steer() -> None:
    assert_type(queue.requeue_all(type="mail", rate="100/m", on_progress=show), Bulk)
    queue.requeue_all(TaskFilter(error="timed out"), rate=(1, timedelta(seconds=2)), dry_run=True)
    queue.cancel_all(everything=True, dry_run=True, at_most=1000)
    queue.delete_all(status="completed", older=timedelta(days=30), on_progress=print)
    queue.requeue_all(rate=100)  # type: ignore[arg-type]
    queue.requeue_all(typ="mail")  # type: ignore[call-arg]
    queue.requeue_all(everything=True)  # type: ignore[call-arg]
    queue.cancel_all(rate="1/s")  # type: ignore[call-arg]
    queue.delete_all("mail")  # type: ignore[arg-type]
    queue.cancel_all(on_progress=lambda: None)  # type: ignore[arg-type,misc]
