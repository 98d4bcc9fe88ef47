"""What a type checker sees of tuning, of nodes and of the log of changes. Checked, never run."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from taskx import (
    Change,
    MemoryRepository,
    NodeInfo,
    Queue,
    RunningTask,
    ThreadStack,
    Tuned,
    TunedType,
)

if TYPE_CHECKING:
    from typing_extensions import assert_type

queue = Queue(MemoryRepository())


def tune() -> None:
    queue.tune("mail", max_concurrency=3, rate="100/m", burst=5, limit_scope="global")
    queue.tune("mail", max_concurrency=None, rate=(5, timedelta(minutes=2)))
    queue.limit("tenant:", share=True, concurrency=3)
    queue.limit("tenant:acme", share=3)
    queue.limit("tenant:acme", share="3")  # type: ignore[arg-type]
    queue.tune(limit="tenant:", share=None)
    queue.tune(workers=8, node="id")
    queue.untune("mail", only=["rate"])
    queue.untune(workers=True)
    queue.tune("mail", max_concurrency="3")  # type: ignore[arg-type]
    queue.tune("mail", max_workers=3)  # type: ignore[call-arg]
    queue.tune("mail", limit_scope="host")  # type: ignore[arg-type]
    queue.tune("mail", "3")  # type: ignore[call-arg]
    queue.untune(workers=3)  # type: ignore[arg-type]


def holds() -> None:
    queue.hold("api", 600)
    queue.hold("type/mail", timedelta(minutes=5))
    queue.hold("tenant:acme", datetime.now().astimezone())
    assert_type(queue.release("api"), bool)
    assert_type(queue.limits()[0].held_until, datetime | None)
    queue.hold("api")  # type: ignore[call-arg]
    queue.hold("api", None)  # type: ignore[arg-type]
    queue.release(["api"])  # type: ignore[arg-type]


def tuned() -> None:
    known = queue.tuned()
    assert_type(known, Tuned)
    assert_type(known.types, Mapping[str, TunedType])
    assert_type(known.workers, int | None)
    queue.tune("mail", **known.types["mail"].limits)
    if (own := known.types["mail"].own) is not None:
        assert_type(own.get("max_concurrency"), int | None)
    known.workers = 3  # type: ignore[misc]


def nodes() -> None:
    for node in queue.nodes():
        assert_type(node, NodeInfo)
        assert_type(node.alive, bool | None)
        assert_type(node.running, tuple[RunningTask, ...])
        assert_type(node.last_beat, datetime | None)
        assert_type(queue.stacks(node.id, timeout=timedelta(seconds=2)), list[ThreadStack])
        queue.stop_node(node.id)
    assert_type(queue.stacks(), list[ThreadStack])
    queue.stacks("id", 2.0)  # type: ignore[call-arg]
    queue.stop_node()  # type: ignore[call-arg]


def changes() -> None:
    queue.note_change("ann", "tune", "mail", {"rate": "5/s"})
    assert_type(queue.changes(), list[Change])
    assert_type(queue.changes(10)[0].to_dict(), dict[str, Any])
    queue.note_change("ann", "tune")  # type: ignore[call-arg]
    queue.changes(at_most="all")  # type: ignore[arg-type]
