"""Tests of the proof: it names the broken promise of a story, and accepts sound stories."""

from __future__ import annotations

from typing import Any

import pytest

from taskx import Task
from taskx.tasks.clock import to_datetime
from taskx.tasks.model import Attempt

from .sidelog import Event
from .verify import verify
from .worker import CLOSED_BY_HAND

Line = tuple[str, str, dict[str, Any]]


def line(who: str, what: str, **more: Any) -> Line:
    return who, what, {"id": "" if what in ABOUT_PROCESSES else "a", **more}


ABOUT_PROCESSES = ("killed", "dead", "stop", "stopped", "leaves", "lease lost")


def begin(starts: int = 1, who: str = "p1") -> Line:
    return line(who, "begin", starts=starts)


def end(starts: int = 1, who: str = "p1", outcome: str = "returned") -> Line:
    return line(who, "end", starts=starts, outcome=outcome)


def dies(who: str = "p1") -> list[Line]:
    return [line(who, "killed"), line(who, "dead", outcome="killed")]


def cancelled(outcome: str = "cancelled") -> Line:
    return line("p0", "cancel told", outcome=outcome)


SUBMITTED = line("p0", "submit", kind="brief")
ACCEPTED = [SUBMITTED, line("p0", "accepted")]


TOGETHER = {"kind": "brief", "note": "a"}
TOGETHER_REJECTED: list[tuple[str, dict[str, Any]]] = [("submit", TOGETHER), ("rejected", {})]


def record(**more: Any) -> Task:
    return Task(**{"id": "a", "type": "brief", "status": "completed", "starts": 1, **more})


def completed(starts: int = 1, **more: Any) -> Task:
    return record(starts=starts, result=starts, **more)


def violations(lines: list[Line], *records: Task) -> list[str]:
    events = [Event(ns, who, what, **more) for ns, (who, what, more) in enumerate(lines, 1)]
    return verify({task.id: task for task in records}, events)


EXPIRED = "expired at 2026-05-03T09:30:00Z before its first start"
CRASHED_ONCE = [*ACCEPTED, begin(), *dies(), begin(2, "p2"), end(2, "p2")]

SOUND: dict[str, tuple[list[Line], list[Task]]] = {
    "completed": ([*ACCEPTED, begin(), end()], [completed()]),
    "rejected": ([SUBMITTED, line("p0", "rejected")], []),
    "submitted by a process that died before it got the answer": ([SUBMITTED, *dies("p0")], []),
    "crashed, and run again": (CRASHED_ONCE, [completed(2, crashes=1)]),
    "raised, and run again": (
        [*ACCEPTED, begin(), end(outcome="raised"), begin(2), end(2)],
        [completed(2, errors=1)],
    ),
    "interrupted, and run again": (
        [
            *ACCEPTED,
            begin(),
            line("p1", "stop"),
            end(outcome="raised"),
            begin(2, "p2"),
            end(2, "p2"),
        ],
        [completed(2, interruptions=1)],
    ),
    "returned before a stop that was interrupted, and its outcome not stored": (
        [
            *ACCEPTED,
            begin(),
            end(),
            line("p1", "stop"),
            line("p1", "stopped", note="unknown"),
            begin(2, "p2"),
            end(2, "p2"),
        ],
        [completed(2, interruptions=1)],
    ),
    "taken over from a process that had lost its lease": (
        [
            *ACCEPTED,
            begin(),
            line("p1", "lease lost"),
            end(outcome="cancelled"),
            begin(2, "p2"),
            end(2, "p2"),
        ],
        [completed(2, crashes=1)],
    ),
    "submitted together, and rejected": (
        [line("p0", what, id=id, **more) for id in "ab" for what, more in TOGETHER_REJECTED],
        [],
    ),
    "cancelled while it was pending": ([*ACCEPTED, cancelled()], [record(status="cancelled")]),
    "cancelled while it ran": (
        [*ACCEPTED, begin(), cancelled("asked"), end(outcome="cancelled")],
        [record(status="cancelled")],
    ),
    "expired before its first start": (ACCEPTED, [record(status="cancelled", error=EXPIRED)]),
    "closed by hand": (
        [*ACCEPTED, begin(), line("p0", "close"), line("p0", "closed"), end()],
        [record(status="failed", message=CLOSED_BY_HAND)],
    ),
    "a dead letter by its errors": (
        [*ACCEPTED, begin(), end(outcome="raised")],
        [record(status="failed", errors=1, dead_letter=True)],
    ),
}


@pytest.mark.parametrize("story", SOUND)
def test_a_sound_story_is_accepted(story):
    lines, records = SOUND[story]
    assert violations(lines, *records) == []


BROKEN: dict[str, tuple[list[Line], list[Task], str]] = {
    "accepted without a record": (ACCEPTED, [], "lost: it was accepted"),
    "run without a record": ([SUBMITTED, begin()], [], "it ran without a record"),
    "never submitted": ([], [completed()], "never submitted"),
    "rejected but stored": (
        [SUBMITTED, line("p0", "rejected"), begin(), end()],
        [completed()],
        "it was rejected, but it is stored",
    ),
    "a result that was dropped after the lease was back": (
        [line("p1", "lease lost"), *ACCEPTED, begin(), end()],
        [record(status="cancelled")],
        "returned on p1, which lived on",
    ),
    "submitted together, and stored in part": (
        [line("p0", "submit", id=id, **TOGETHER) for id in "ab"],
        [record(status="cancelled", starts=0)],
        "some are stored and some are not",
    ),
    "taken over before its process ended it after losing its lease": (
        [*ACCEPTED, begin(), line("p1", "lease lost"), begin(2, "p2"), end(), end(2, "p2")],
        [completed(2, crashes=1)],
        "began on p2 while run 1 was under way on p1",
    ),
    "not found by a cancel": (
        [*ACCEPTED, cancelled("not found"), begin(), end()],
        [completed()],
        "a cancel did not find it",
    ),
    "left pending": (ACCEPTED, [record(status="pending", starts=0)], "left pending"),
    "left running": ([*ACCEPTED, begin(), *dies()], [record(status="running")], "left running"),
    "finished but owned": ([*ACCEPTED, begin(), end()], [completed(owner="n")], "but still owned"),
    "two runs at once": (
        [*ACCEPTED, begin(), begin(2, "p2"), end(2, "p2"), end()],
        [completed(2, crashes=1)],
        "began on p2 while run 1 was under way on p1",
    ),
    "begun elsewhere before its process was dead": (
        [*ACCEPTED, begin(), begin(2, "p2"), *dies(), end(2, "p2")],
        [completed(2, crashes=1)],
        "began on p2 while run 1 was under way on p1",
    ),
    "one start executed twice": (
        [*ACCEPTED, begin(), end(), begin(1, "p2"), end(1, "p2")],
        [completed()],
        "starts executed twice",
    ),
    "executed but never started": (
        [*ACCEPTED, begin(2), end(2)],
        [record(result=2)],
        "the record has 1 starts",
    ),
    "begun after its process had stopped": (
        [*ACCEPTED, line("p1", "stop"), line("p1", "leaves"), begin(), end()],
        [completed()],
        "whose stop had returned",
    ),
    "begun after its cancel": (
        [*ACCEPTED, cancelled(), begin(), end(outcome="cancelled")],
        [record(status="cancelled")],
        "begun after its cancel was acknowledged",
    ),
    "completed after its cancel": (
        [*ACCEPTED, begin(), cancelled(), end()],
        [completed()],
        "its cancel was acknowledged, but it is completed",
    ),
    "started again after it was asked to cancel": (
        [
            *ACCEPTED,
            begin(),
            cancelled("asked"),
            *dies(),
            begin(2, "p2"),
            *dies("p2"),
            begin(3, "p3"),
            end(3, "p3"),
        ],
        [completed(3, crashes=2)],
        "started again after it was asked to cancel",
    ),
    "expired after its first start": (
        [*ACCEPTED, begin(), *dies()],
        [record(status="cancelled", error=EXPIRED)],
        "before its first start, but begun: runs [1]",
    ),
    "closed by hand, and overwritten": (
        [*ACCEPTED, begin(), line("p0", "close"), line("p0", "closed"), end()],
        [completed()],
        "closed by hand as failed, but it is completed",
    ),
    "the result of a run that was not the last": (
        CRASHED_ONCE,
        [record(starts=2, result=1, crashes=1)],
        "completed by start 2 with 1",
    ),
    "a result that was dropped": (
        [*ACCEPTED, begin(), end()],
        [record(status="cancelled")],
        "returned on p1, which lived on",
    ),
    "an error without a raised exception": (
        CRASHED_ONCE,
        [completed(2, errors=1)],
        "errors is 1, but at most 0 are possible",
    ),
    "a crash without a death": (
        [*ACCEPTED, begin(), end(outcome="raised"), begin(2), end(2)],
        [completed(2, crashes=1)],
        "crashes is 1, but at most 0 are possible",
    ),
    "an interruption without a stop": (
        [*ACCEPTED, begin(), end(outcome="raised"), begin(2), end(2)],
        [completed(2, interruptions=1)],
        "interruptions is 1, but at most 0 are possible",
    ),
    "a crash that was not counted": (
        CRASHED_ONCE,
        [completed(2)],
        "2 runs and 2 starts against 0 errors, 0 crashes",
    ),
    "failed without reason": (
        [*ACCEPTED, begin(), *dies()],
        [record(status="failed", crashes=1, dead_letter=True)],
        "failed without reason",
    ),
    "an innocent dead letter": (
        [*ACCEPTED, *(x for n in (1, 2, 3) for x in (begin(n, f"p{n}"), *dies(f"p{n}")))],
        [record(status="failed", starts=3, crashes=3, dead_letter=True)],
        "innocent, but failed after 3 crashes",
    ),
    "begun again although it may crash only once": (
        CRASHED_ONCE,
        [completed(2, crashes=1, max_crashes=1)],
        "max_crashes=1, but begun again",
    ),
    "an alarming log": (
        [line("p1", "dead", outcome="ended", note="its log says: ERROR")],
        [],
        "process p1: its log says: ERROR",
    ),
}


@pytest.mark.parametrize("story", BROKEN)
def test_a_broken_promise_is_named(story):
    lines, records, word = BROKEN[story]
    assert [found for found in violations(lines, *records) if word in found]


def test_two_tasks_that_fail_by_the_same_death_are_named():
    """Both were on their last chance, so a node may run only one of them at a time."""

    def crash(second: int, node: str) -> Attempt:
        return Attempt(outcome="crashed", ended_at=to_datetime(second * 1000), worker=node)

    def story(*ends: tuple[int, str], max_crashes: int = 2) -> list[str]:
        return violations(
            [(who, what, {**more, "id": id}) for id in "ab" for who, what, more in ACCEPTED]
            + [cancelled(), line("p0", "cancel told", id="b", outcome="cancelled")],
            *(
                record(
                    id=id,
                    status="cancelled",
                    starts=2,
                    max_crashes=max_crashes,
                    earlier_attempts=[crash(1, "n1"), crash(*end)],
                )
                for id, end in zip("ab", ends, strict=True)
            ),
        )

    assert story((2, "n2"), (3, "n3")) == []
    for first, second in [("n2", "n2"), ("n2 taskx-worker-1", "n2 taskx-worker-2")]:
        found = story((2, first), (2, second))
        assert [text for text in found if "node n2 fails several tasks" in text]
        assert story((2, first), (2, second), max_crashes=3) == []  # both had another chance
