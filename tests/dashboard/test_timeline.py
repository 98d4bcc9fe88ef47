"""The timeline of a task: what took how long, and what is known of it."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from types import SimpleNamespace

import pytest

from taskx import Attempt, Task
from taskx.attempt.waiting import unfinished
from taskx.programs.dashboard.display import Display
from taskx.programs.dashboard.timeline import MOST_CHILDREN, SHORTEST, WIDTH, timeline
from taskx.tasks.clock import to_ms

NOW = datetime(2026, 3, 1, 12, tzinfo=timezone.utc)
REQUEST = SimpleNamespace(now=NOW, say=Display("en", NOW).say)


def at(seconds):
    """Return a time before now."""
    return NOW - timedelta(seconds=seconds)


def lanes(task, others=()):
    """Return the lines: the label, and each part with the seconds before now of its ends."""
    drawn = timeline(REQUEST, task, others)
    return [
        (
            lane.label,
            *(
                (p.style, *((NOW - t).total_seconds() for t in (p.start, p.end)))
                for p in lane.parts
            ),
        )
        for lane in drawn.lanes
    ]


def test_a_task_that_waits_has_a_line_up_to_now_and_one_to_come():
    assert lanes(Task(id="t", type="a", created_at=at(60))) == [("waiting", ("pending", 60, 0))]
    later = Task(id="t", type="a", created_at=at(60), run_at=at(-3600))
    assert lanes(later) == [("waiting", ("pending", 60, 0), ("pending open", 0, -3600))]
    drawn = timeline(REQUEST, later, ())
    assert drawn.end - NOW == timedelta(seconds=30)  # what is to come has a third of the picture


def test_each_attempt_has_a_line_that_begins_with_its_wait():
    task = Task(
        id="t",
        type="a",
        status="failed",
        created_at=at(60),
        started_at=at(20),
        completed_at=at(15),
        earlier_attempts=[
            Attempt(outcome="retried", started_at=at(50), ended_at=at(40)),
            Attempt(outcome="requeued", ended_at=at(30)),
        ],
    )
    assert lanes(task) == [
        ("attempt 1", ("pending thin", 60, 50), ("retried", 50, 40)),
        ("attempt 2", ("pending thin", 40, 20), ("failed", 20, 15)),
    ]


def test_steps_are_between_what_is_known_of_their_neighbours():
    task = Task(
        id="t",
        type="a",
        created_at=at(60),
        started_at=at(30),
        checkpoints={"steps": {"one": 1, "ask": 2, "two": 3, "nap": unfinished(to_ms(at(-9)))}},
    )
    asked = Task(
        id="t/ask", type="answer", status="completed", created_at=at(50), completed_at=at(40)
    )
    attempt, *rest = lanes(task, [asked])
    assert attempt == ("attempt 1", ("pending thin", 60, 50), ("pending", 50, 0))
    assert rest == [
        ("one", ("completed thin", 50, 50)),
        ("asks: ask", ("completed", 50, 40)),
        ("two", ("completed thin", 40, 30)),
        ("sleeps: nap", ("pending", 30, 0), ("pending open", 0, -9)),
    ]


@pytest.mark.parametrize("number", [2, MOST_CHILDREN + 1])
def test_few_children_have_a_line_each(number):
    ids = [f"t/pages/{place}" for place in range(number)]
    listed = Task(id="t/pages/all", type="children", created_at=at(40), depends_on=ids)
    children = [Task(id=one, type="page", status="running", created_at=at(40)) for one in ids]
    task = Task(id="t", type="a", created_at=at(60), started_at=at(50))
    _, first, *rest = lanes(task, [*children, listed])
    assert first == ("children: pages", ("running thin", 40, 0))
    assert rest == [("– page", ("running", 40, 0))] * (number if number <= MOST_CHILDREN else 0)


def test_every_part_is_inside_the_picture_and_visible():
    task = Task(
        id="t",
        type="a",
        status="completed",
        created_at=at(86_400),
        started_at=at(0.001),
        completed_at=NOW,
    )
    drawn = timeline(REQUEST, task, ())
    for lane in drawn.lanes:
        for part in lane.parts:
            left, width = drawn.place(part)
            assert left >= 0
            assert width >= SHORTEST
            assert left + width <= WIDTH
    assert timeline(REQUEST, Task(id="t", type="a"), ()) is None
