"""What a type checker sees of the questions that a queue answers. Checked, never run."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

from taskx import (
    Bulk,
    Check,
    Diagnosis,
    FailureGroup,
    Failures,
    Health,
    History,
    KeyUsage,
    MemoryRepository,
    Percentiles,
    Place,
    Problem,
    Queue,
    Reason,
    Stats,
    TypeHistory,
    TypeStats,
    Usage,
)

if TYPE_CHECKING:
    from typing_extensions import assert_type

queue = Queue(MemoryRepository())


def ask(task_id: str) -> None:
    assert_type(queue.why(task_id), list[Reason])
    for reason in queue.why(task_id):
        if reason.kind == "paused":
            assert_type(reason.sentence, str)
        assert_type(reason.facts, Mapping[str, Any])
        assert_type(reason.to_dict(), dict[str, Any])
    queue.why(7)  # type: ignore[arg-type]


def check() -> None:
    health = queue.health(
        oldest_due=timedelta(minutes=1),
        failed=(10, timedelta(minutes=5)),
        nodes={"mail": 2},
        stuck=3,
        file_size=10**9,
        schedule_overdue=None,
    )
    assert_type(health, Health)
    assert_type(health.ok, bool)
    assert_type(health.problems, tuple[Problem, ...])
    assert_type(health.to_dict(), dict[str, Any])
    queue.health(nodes=1, failed=(1, 60.0))
    queue.health(300)  # type: ignore[call-arg]
    queue.health(failed=10)  # type: ignore[arg-type]


def examine() -> None:
    assert_type(queue.diagnose(), Diagnosis)
    assert_type(queue.diagnose().ok, bool)
    for found in queue.diagnose().checks:
        assert_type(found, Check)
        assert_type(found.sentence, str)
    queue.diagnose("disk")  # type: ignore[call-arg]


def wrong_kinds(reason: Reason, problem: Problem) -> None:
    Reason("asleep", "It sleeps.")  # type: ignore[arg-type]
    reason.kind = "paused"  # type: ignore[misc]
    problem.facts["type"] = 1  # type: ignore[index]


def count() -> None:
    stats = queue.stats(period=timedelta(hours=1), at_most=100)
    assert_type(stats, Stats)
    assert_type(stats.types, Mapping[str, TypeStats])
    assert_type(stats.types["a"].waiting, int)
    assert_type(stats.types["a"].oldest_due, float | None)
    assert_type(stats.types["a"].run_time, Percentiles | None)
    assert_type(stats.to_dict(), dict[str, Any])
    queue.stats(3600)  # type: ignore[call-arg]
    queue.stats(at_most="all")  # type: ignore[arg-type]
    history = queue.history(period=timedelta(days=1), intervals=24)
    assert_type(history, History)
    assert_type(history.completed, tuple[int, ...])
    assert_type(history.types, Mapping[str, TypeHistory])
    assert_type(history.types["a"].run_times, tuple[int, ...])
    assert_type(history.bounds, tuple[float, ...])
    assert_type(history.to_dict(), dict[str, Any])
    queue.history(intervals=1.5)  # type: ignore[arg-type]
    usage = queue.usage("tenant:", since=datetime.now(timezone.utc))
    assert_type(usage, Usage)
    assert_type(usage.keys, Mapping[str, KeyUsage])
    assert_type(usage.rest.cost, Mapping[str, int])


def explain() -> None:
    assert_type(queue.failures(), Failures)
    for group in queue.failures(type="a", since=datetime.now(timezone.utc), at_most=10):
        assert_type(group, FailureGroup)
        assert_type(group.place, Place | None)
        assert_type(queue.requeue_failures(group, rate="1/s"), Bulk)
    queue.requeue_failures("ValueError")  # type: ignore[arg-type]
    queue.failures(since=60)  # type: ignore[arg-type]
