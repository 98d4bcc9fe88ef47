"""Tests that processes on one file notice each other soon; the bounds are generous for slow machines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from taskx import Queue, SQLiteRepository

from .campaign import Campaign


@pytest.fixture
def campaign(tmp_path: Path) -> Iterator[Campaign]:
    made = Campaign(tmp_path)
    yield made
    made.end()


@pytest.fixture
def queue(campaign: Campaign) -> Iterator[Queue]:
    """A queue in this process that only submits and cancels."""
    with SQLiteRepository(campaign.database) as repository:
        queue = Queue(repository)
        queue.declare("instant", "patient", "stubborn", "brief")
        yield queue


#: A second or less is promised, and the rest is for a slow machine; executors sleep for a minute.
SOON = 50.0


def seconds_between(campaign: Campaign, told: str, what: str, **like: object) -> float:
    return (campaign.wait_for(what, **like).ns - campaign.wait_for("told", note=told).ns) / 1e9


def test_many_processes_can_create_the_same_file_at_once(campaign):
    children = [campaign.spawn(role="open") for _ in range(8)]
    for child in children:
        campaign.wait_for("ready", who=child.who)
    for child in children:
        child.tell()
    assert [child.finish() for child in children] == [0] * 8
    assert not campaign.verdict().violations


def test_a_task_submitted_elsewhere_begins_at_once(campaign, queue):
    campaign.spawn(role="serve")
    campaign.wait_for("started")
    queue.submit("instant", id="a")
    campaign.log.tell("told", note="submit")
    assert seconds_between(campaign, "submit", "begin", id="a") < SOON


def test_a_cancel_from_another_process_arrives_at_once(campaign, queue):
    campaign.spawn(role="serve")
    queue.submit("patient", {"seconds": 60.0}, id="a")
    campaign.wait_for("begin", id="a")
    campaign.log.tell("told", note="cancel")
    assert queue.cancel_task("a") is False
    assert seconds_between(campaign, "cancel", "end", id="a", outcome="cancelled") < SOON


def test_a_task_of_a_killed_process_runs_again_elsewhere(campaign, queue):
    first = campaign.spawn(role="serve")
    queue.submit("patient", {"seconds": 60.0}, id="a")
    campaign.wait_for("begin", id="a", who=first.who)
    second = campaign.spawn(role="serve")
    campaign.wait_for("started", who=second.who)
    campaign.log.tell("told", note="kill")
    first.kill()
    assert seconds_between(campaign, "kill", "begin", id="a", who=second.who) < SOON


def test_pending_tasks_of_a_killed_process_run_elsewhere(campaign, queue):
    """The tasks in its buffer are taken over."""
    first = campaign.spawn(
        role="submit",
        workers=1,
        tasks=[{"kind": "patient", "params": {"seconds": 60.0}}, {"kind": "instant", "count": 5}],
    )
    campaign.wait_for("accepted", id=f"{first.who}-6")
    campaign.wait_for("begin", kind="patient")
    second = campaign.spawn(role="serve")
    campaign.wait_for("started", who=second.who)
    campaign.log.tell("told", note="kill")
    first.kill()
    for number in range(2, 7):
        like = {"id": f"{first.who}-{number}", "who": second.who}
        assert seconds_between(campaign, "kill", "begin", **like) < SOON
