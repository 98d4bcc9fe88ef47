"""The proof of a soak finds each kind of broken promise, and a short soak breaks none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .sidelog import Event, SideLog
from .soak import COLUMNS, Plan, Soak, application
from .soak_audit import Audit
from .soak_shop import shop_of


@pytest.fixture
def audit(tmp_path: Path):
    path = tmp_path / "side.log"
    path.touch()
    return Audit(path)


def hear(
    audit: Audit, *events: tuple[str, str, str] | tuple[str, str, str, dict[str, str]]
) -> None:
    """Tell of events: process, what happened, id of the task, and more."""
    for number, (who, what, task_id, *more) in enumerate(events):
        audit.hear(Event(number, who, what, task_id, **(more[0] if more else {})))


RETURNED = {"outcome": "returned"}


def kind(name: str, note: str = "") -> dict[str, str]:
    return {"kind": name, "note": note}


#: Events that break a promise, and a part of the sentence that says so.
BROKEN = {
    "a task runs twice at once": (
        [("p1", "begin", "a"), ("p2", "begin", "a")],
        "while p1 was running it",
    ),
    "a task runs again after its end": (
        [("p1", "begin", "a"), ("p1", "end", "a", RETURNED), ("p2", "begin", "a")],
        "although p1 had ended it",
    ),
    "a limit is passed": (
        [("p1", "begin", id, kind("limited")) for id in "abc"],
        "one of 3 at once",
    ),
    "two tasks of a key run at once": (
        [("p1", "begin", "a", kind("keyed", "k")), ("p2", "begin", "b", kind("keyed", "k"))],
        "another one of the key k",
    ),
    "a step is done twice": (
        [("p1", "step", "a", {"note": "first"}), ("p2", "step", "a", {"note": "first"})],
        "step first again",
    ),
    "a chunk is missing in a stream": (
        [("p1", "streamed", "a", kind("speaker", "[0, 2]"))],
        "has emitted [0, 2]",
    ),
    "a tick makes two tasks": (
        [("p1", "tick", "a", {"note": "noon"}), ("p1", "tick", "b", {"note": "noon"})],
        "for the tick noon",
    ),
}


@pytest.mark.parametrize(("events", "sentence"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_promise_is_found(audit, events, sentence):
    hear(audit, *events)
    assert [sentence in violation for violation in audit.violations] == [True]


#: Events that break no promise.
ALLOWED = {
    "a task of a killed process runs again": [
        ("p1", "begin", "a"),
        ("conductor", "killing", "", {"note": "p1"}),
        ("p2", "begin", "a"),
        ("p2", "end", "a", RETURNED),
    ],
    "the end was not stored before the kill": [
        ("p1", "begin", "a"),
        ("p1", "end", "a", RETURNED),
        ("conductor", "killing", "", {"note": "p1"}),
        ("p2", "begin", "a"),
        ("p2", "end", "a", RETURNED),
    ],
    "a task that raised is tried again": [
        ("p1", "begin", "a"),
        ("p1", "end", "a", {"outcome": "raised"}),
        ("p1", "begin", "a"),
        ("p1", "end", "a", RETURNED),
    ],
    "a task that was told to stop runs again": [
        ("p1", "begin", "a"),
        ("p1", "end", "a", {"outcome": "stop"}),
        ("p2", "begin", "a"),
        ("p2", "end", "a", RETURNED),
    ],
    "a task that is being started is cancelled, and never called": [
        ("p1", "accepted", "a", kind("slow")),
        ("p1", "cancelled", "a", kind("slow")),
    ],
    "a task that is being started is cancelled": [
        ("p1", "cancelled", "a"),
        ("p2", "begin", "a"),
        ("p2", "end", "a", {"outcome": "cancel"}),
    ],
}


@pytest.mark.parametrize("events", ALLOWED.values(), ids=ALLOWED.keys())
def test_what_is_allowed_is_not_accused(audit, events):
    hear(audit, *events)
    assert (audit.violations, audit.unfinished) == ([], {})


def test_a_task_that_was_accepted_and_never_ended_is_unfinished(audit):
    hear(audit, ("p1", "accepted", "a", kind("quick")), ("p1", "accepted", "b", kind("quick")))
    hear(audit, ("p1", "begin", "b"), ("p1", "end", "b", RETURNED))
    assert audit.unfinished == {"a": "quick"}


def test_a_task_that_has_paid_has_ended_also_if_its_process_was_killed_before_it_told(audit):
    hear(audit, ("p1", "accepted", "a", kind("payer")), ("p1", "begin", "a", kind("payer")))
    audit.settle("ab")
    assert audit.unfinished == {}
    hear(audit, ("p1", "accepted", "b", kind("payer")))  # told after it was paid
    assert audit.unfinished == {}


def test_the_wait_of_a_task_is_the_time_from_its_submit_to_its_start(audit):
    hear(
        audit, ("p1", "accepted", "a", kind("quick", "now")), ("p1", "x", ""), ("p1", "begin", "a")
    )
    assert audit.take_waits() == [2]
    assert audit.take_waits() == []


def test_half_a_line_is_read_when_it_is_whole(audit, tmp_path):
    text = json.dumps(Event(1, "p1", "begin", "a")) + "\n"
    with (tmp_path / "side.log").open("a") as log:
        log.write(text[:10])
        log.flush()
        audit.follow()
        assert audit.counts["begin"] == 0
        log.write(text[10:])
    audit.follow()
    assert audit.counts["begin"] == 1


@pytest.mark.process
@pytest.mark.campaign
@pytest.mark.parametrize("on", ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def test_a_short_soak_loses_nothing_and_tells_what_it_saw(tmp_path, on):
    plan = Plan(kill_every=0.5, row_every=2.0, processes=3, rate=20.0)
    with application(tmp_path, on) as shop:
        soak = Soak(tmp_path, shop, plan, seed=7)
        try:
            rows = [*soak.run(lambda: soak.kills >= 5 and soak.audit.counts["streamed"] > 0)]
        finally:
            soak.end()
    assert soak.audit.violations == []
    assert soak.audit.counts["end"] > 50
    assert soak.orders > 0
    assert {len(row) for row in rows} == {len(COLUMNS)}
    memory, threads, files = (float(cell) for cell in rows[-1][3:6])
    assert (memory > 10.0, threads > 4, files > 5) == (True, True, True)


def test_a_soak_names_tasks_that_were_lost(tmp_path):
    soak = Soak(tmp_path, shop_of(str(tmp_path / "app.db")), Plan())
    SideLog(tmp_path / "side.log", "p0").tell("accepted", "nowhere", kind="quick")
    soak.end()
    soak._judge()
    assert soak.audit.violations == ["quick nowhere was lost"]
