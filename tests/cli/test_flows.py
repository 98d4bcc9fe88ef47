"""``taskx flows``."""

from __future__ import annotations

import pytest

from taskx import Task, chain


@pytest.fixture
def flows(outside):
    """The ids of two flows, the newest first; a task of the older one is cancelled."""
    outside.declare("a", "b")
    older = outside.submit_flow(chain(Task(type="a"), Task(type="b")))
    newer = outside.submit_flow(chain(Task(type="a"), Task(type="b")))
    outside.cancel_task(outside.list_tasks(flow=older.id, type="a").tasks[0].id)
    return [newer.id, older.id]


def test_flows_are_listed_newest_first_with_their_status_and_counts(flows, taskx):
    said = taskx("flows")
    assert said.code == 0
    head, newer, older = said.lines
    assert head.split() == ["FLOW", "STATUS", "AGE", "TASKS", "COUNTS"]
    assert newer.split()[:2] == [flows[0], "pending"]
    assert newer.endswith("2 pending")
    assert older.split()[:2] == [flows[1], "cancelled"]
    assert older.endswith("2 cancelled")
    rows = taskx("flows", "--json").rows
    assert [row["id"] for row in rows] == flows
    assert rows[0] == {
        "id": flows[0],
        "created_at": rows[0]["created_at"],
        "status": "pending",
        "total": 2,
        "counts": {"pending": 2},
        "exact": True,
    }


def test_a_page_of_flows_follows_another_one(flows, taskx):
    [first] = taskx("flows", "--limit", "1", "--json").rows
    [second] = taskx("flows", "--limit", "1", "--after", first["id"], "--json").rows
    assert [first["id"], second["id"]] == flows
    said = taskx("flows", "--after", flows[1])
    assert (said.code, said.out, said.err) == (0, "", "there are no more flows\n")


def test_there_are_no_flows(taskx):
    said = taskx("flows")
    assert (said.code, said.out, said.err) == (0, "", "there are no flows\n")
