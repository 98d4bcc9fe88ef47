"""``taskx schedules``."""

from __future__ import annotations

import pytest
from helpers import storing

from taskx import every


@pytest.fixture
def nightly(outside):
    """A schedule that ticks each night, and another one."""
    storing(outside).declare("report")
    outside.schedule("often", every(3600), "report")
    return outside.schedule(
        "nightly", "0 3 * * *", "report", {"password": "hunter2"}, tz="Europe/Berlin"
    )


def test_schedules_are_listed(nightly, taskx):
    said = taskx("schedules")
    assert said.code == 0
    head, one, two = said.lines
    assert head.split() == ["NAME", "SPEC", "ZONE", "TYPE", "NEXT", "OVERLAP", "PARAMS"]
    assert one.startswith("nightly  0 3 * * *")
    assert two.startswith("often")
    assert "hunter2" not in said.out
    rows = taskx("schedules", "--json").rows
    assert [row["name"] for row in rows] == ["nightly", "often"]
    assert rows[0]["params"] == {"password": "***"}
    assert rows[0]["next_tick"].endswith("+00:00")


def test_no_schedules(taskx):
    said = taskx("schedules")
    assert (said.code, said.out, said.err) == (0, "", "there are no schedules\n")


def test_a_schedule_is_shown_with_its_next_ticks(nightly, taskx):
    said = taskx("schedules", "show", "nightly", "--next", "3")
    assert said.code == 0
    assert sum("T03:00:00+0" in line for line in said.lines) == 3
    [row] = taskx("schedules", "show", "nightly", "--next", "3", "--json").rows
    assert len(row["next"]) == 3


def test_a_schedule_is_paused_and_resumed(nightly, outside, taskx):
    assert taskx("schedules", "pause", "nightly").out == "nightly paused\n"
    assert outside.schedules()["nightly"].paused
    assert "paused" in taskx("schedules").lines[1]
    assert taskx("schedules", "resume", "nightly", "--json").rows == [
        {"name": "nightly", "outcome": "resumed"}
    ]
    assert not outside.schedules()["nightly"].paused


def test_a_schedule_is_triggered(nightly, outside, taskx):
    [task_id] = taskx("schedules", "trigger", "nightly").lines
    assert outside.get_task_status(task_id).created_by == "schedule:nightly"


def test_a_schedule_is_backfilled(nightly, outside, taskx):
    said = taskx("schedules", "backfill", "nightly", "--from", "2026-01-01", "--to", "2026-01-04")
    assert said.code == 0
    assert len(said.lines) == outside.count_tasks() == 3
    assert said.err == "nightly has a task for each of 3 ticks\n"


def test_a_backfill_says_if_there_is_no_tick(nightly, outside, taskx):
    said = taskx("schedules", "backfill", "nightly", "--from", "2026-01-01", "--to", "2026-01-01")
    assert (said.code, said.out) == (0, "")
    assert said.err == "nightly has no tick in this span: no task was made\n"


def test_a_backfill_of_too_many_ticks_is_a_wrong_call(nightly, outside, taskx, monkeypatch):
    monkeypatch.setattr("taskx.queue.schedule.MOST_BACKFILLED", 3)
    said = taskx("schedules", "backfill", "nightly", "--from", "0001-01-01")
    assert said.code == 2
    assert "'nightly' has more than 3 ticks" in said.err
    assert outside.count_tasks() == 0


def test_a_wrong_time_to_backfill_is_a_wrong_call(nightly, outside, taskx):
    said = taskx("schedules", "backfill", "nightly", "--from", "2026-01-04", "--to", "2026-01-01")
    assert said.code == 2
    assert outside.count_tasks() == 0


def test_a_schedule_is_removed(nightly, outside, taskx):
    assert taskx("schedules", "remove", "nightly").out == "nightly removed\n"
    assert [*outside.schedules()] == ["often"]


def test_an_unknown_schedule_is_not_found(nightly, taskx):
    said = taskx("schedules", "trigger", "nighty")
    assert said.code == 3
    assert said.err.splitlines() == [
        "no schedule 'nighty'; did you mean 'nightly'?",
        "taskx: no schedule named 'nighty' in the repository",
    ]


def test_an_unknown_action_is_a_wrong_call(taskx):
    said = taskx("schedules", "triger", "nightly")
    assert said.code == 2
    assert said.err == "taskx: `schedules` has no action 'triger'; did you mean 'trigger'?\n"
    said = taskx("schedules", "list")
    assert said.err == ("taskx: `schedules` has no action 'list': `schedules` alone lists them\n")
