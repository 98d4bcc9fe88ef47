"""Tests of the campaign on MongoDB: it kills processes, cuts connections and restarts the server."""

from __future__ import annotations

import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mongo_server import REAL, shared

from taskx import Queue, TaskStatus
from taskx.tasks.timing import DEFAULT_TIMING

from . import hooks, on_mongo
from .campaign import Child, until
from .mongo_campaign import DISTURBANCES, MongoCampaign, on_own_server
from .test_campaign import KILLED, prove
from .worker import CLOSED_BY_HAND, MANY


@pytest.fixture
def campaign(tmp_path: Path) -> Iterator[MongoCampaign]:
    """A campaign on a server that other tests use, too."""
    name = f"taskx_{uuid.uuid4().hex[:16]}"
    made = MongoCampaign(tmp_path, shared("set"), seed=20, name=name)
    yield made
    made.close()


@pytest.fixture
def stormy(tmp_path: Path, campaign: MongoCampaign) -> Iterator[MongoCampaign]:
    """A campaign on its own server, which may be killed; a server of the environment may not."""
    if REAL:
        yield campaign
        return
    made = on_own_server(tmp_path, seed=20)
    yield made
    made.close()


def returned(campaign: MongoCampaign) -> set[str]:
    """Return the ids of the tasks whose executors have returned."""
    ends = (event for event in campaign.events() if event.what == "end")
    return {event.id for event in ends if event.outcome == "returned"}


def test_random_kills_cuts_and_restarts_break_no_promise(stormy):
    stormy.storm(kills=4)
    last = stormy.mix_until(lambda: len(returned(stormy)) > 25, "tasks return")
    for how in DISTURBANCES:
        stormy.disturb(stormy.proxies[last.who], how, 0.2)
    if stormy.server is not None:
        stormy.restart_server()
    if not last.ended():
        last.kill()
    outcome = prove(stormy)
    assert Counter(event.what for event in outcome.events)["dead"] > 4
    assert sum(task.status == "completed" for task in outcome.records.values()) > 20


NINE = {"kind": "brief", "count": 9, "together": True}
#: The options of the process that dies at each point of MongoDB.
NAMED: dict[str, dict[str, Any]] = {
    "inside a commit": {"passings": 5, "tasks": [{"kind": "brief", "count": 20}]},
    "after a commit": {"passings": 5, "tasks": [{"kind": "brief", "count": 20}]},
    "before a transaction": {"tasks": [NINE]},
    "inside a transaction": {"tasks": [NINE]},
    "after a transaction": {"tasks": [NINE]},
    "inside a batch": {"tasks": [NINE]},
    "before a batch is committed": {"tasks": [{"kind": "brief", "count": 3}, NINE]},
    "before a batch is shown": {"tasks": [NINE]},
    "before leaving": {"tasks": [{"kind": "brief", "count": 3}]},
}


#: The number of tasks that are stored at the end, for the points of batches.
STORED = {
    "before a transaction": 0,
    "inside a transaction": 0,
    "after a transaction": 9,
    "inside a batch": 0,
    "before a batch is committed": 3,
    "before a batch is shown": 9,
}


def test_every_point_has_a_test():
    assert NAMED.keys() == on_mongo.KILL_POINTS.keys() - hooks.COMMON_POINTS.keys()


def test_a_kill_at_each_point_breaks_no_promise(campaign):
    """One process for each point, all on one collection."""
    children = {
        point: campaign.spawn(**{"role": "submit", "point": point, **options})
        for point, options in NAMED.items()
    }
    for point, child in children.items():
        assert child.wait() == KILLED
        campaign.wait_for("dying", note=point, who=child.who)
    outcome = prove(campaign, processes=1)
    stored = Counter(task_id.split("-")[0] for task_id in outcome.records)
    assert {point: stored[children[point].who] for point in STORED} == STORED


# Tests of the proof


def store(campaign: MongoCampaign, kind: str, **params: Any) -> None:
    """Store a task for any process."""
    with campaign.open() as repository:
        queue = Queue(repository)
        queue.declare(kind)
        campaign.log.tell("submit", "stored", kind=kind)
        queue.submit(kind, params, id="stored", max_crashes=MANY)
        campaign.log.tell("accepted", "stored")


def close_while_it_runs(campaign: MongoCampaign, **options: Any) -> None:
    """Close a running task by hand; its run loses its fence and still returns."""
    store(campaign, "held", **campaign.hold())
    runner = campaign.spawn(role="serve", **options)
    task = campaign.wait_for("begin", who=runner.who)
    with campaign.open() as repository:
        campaign.log.tell("close", task.id)
        repository.update_status(task.id, TaskStatus.FAILED, CLOSED_BY_HAND)
        campaign.log.tell("closed", task.id)
    campaign.let_go()
    campaign.wait_for("end", who=runner.who)
    assert runner.finish() == 0, runner.output


def cut_off_for_long(campaign: MongoCampaign, **options: Any) -> None:
    """Cut off a host for longer than a lease: its task is taken over, so it must have ended before."""
    store(campaign, "patient", seconds=60.0)
    first = campaign.spawn(role="serve", host="there", **options)
    campaign.wait_for("begin", who=first.who)
    second = campaign.spawn(role="serve")
    campaign.wait_for("started", who=second.who)
    campaign.proxies[first.who].cut(refuse=True)
    campaign.wait_for("begin", who=second.who)


def neighbours_elsewhere(campaign: MongoCampaign, **options: Any) -> None:
    """Run two living hosts for more than a lease: neither may take over the other's running task."""
    store(campaign, "stubborn", seconds=60.0)
    first = campaign.spawn(role="serve", host="there")
    campaign.wait_for("begin", who=first.who)
    second = campaign.spawn(role="serve", **options)
    campaign.wait_for("started", who=second.who)
    enough = campaign.beats() + 2 * (DEFAULT_TIMING.lease_beats + 2)  # heartbeats of both nodes
    until(
        lambda: took(campaign, second) or campaign.beats() > enough,
        "the task is taken over, or enough heartbeats were sent",
    )


def took(campaign: MongoCampaign, child: Child) -> bool:
    return any(event.what == "begin" and event.who == child.who for event in campaign.events())


def an_answer_is_lost(campaign: MongoCampaign, **options: Any) -> None:
    """Store a new task and drop the server's answer."""
    tasks = [{"kind": "brief", "count": 2}]
    child = campaign.spawn(role="store", retries=False, tasks=tasks, **options)
    proxy, asked = campaign.proxies[child.who], threading.Event()

    def judge(direction: str, piece: bytes) -> bool:
        if direction == "ask" and b"p1-1" in piece:
            asked.set()
        elif direction == "answer" and asked.is_set() and b"maxBsonObjectSize" not in piece:
            # Not an answer to the driver's monitor, which checks the server from time to time.
            proxy.heal()
            return False
        return True

    proxy.judge = judge
    assert child.wait() == 0, child.output
    assert asked.is_set()


def the_answer_to_a_commit_is_lost(campaign: MongoCampaign, **options: Any) -> None:
    """Drop the answer to a commit until the operation times out; then the tasks are sent again."""
    child = campaign.spawn(role="store", tasks=[NINE], **options)
    proxy, committed = campaign.proxies[child.who], threading.Event()

    def judge(direction: str, piece: bytes) -> bool:
        if direction == "ask" and b"commitTransaction" in piece:
            committed.set()
        elif direction == "ask" and b"p1-1" in piece and committed.is_set():
            proxy.heal()
        return direction == "ask" or not committed.is_set() or b"maxBsonObjectSize" in piece

    proxy.judge = judge
    assert child.wait() == 0, child.output
    assert committed.is_set()


def stored_together(campaign: MongoCampaign, **options: Any) -> None:
    assert campaign.spawn(role="store", tasks=[NINE], **options).wait() == 0


def killed_amid_a_transaction(campaign: MongoCampaign, **options: Any) -> None:
    """Kill a process at its fourth commit; if the part is not broken, there is only one commit."""
    child = campaign.spawn(
        role="store", point="inside a transaction", passings=4, tasks=[NINE], **options
    )
    child.wait()


def killed_amid_a_batch(campaign: MongoCampaign, **options: Any) -> None:
    """Kill a process after its fourth write; if the part is not broken, there is only one write."""
    child = campaign.spawn(
        role="store", point="inside a batch", passings=4, tasks=[NINE], **options
    )
    child.wait()


#: For each broken part, the function that provokes it and a part of the violation that must be found.
PROVOKED: dict[str, tuple[Callable[..., None], str]] = {
    "outcome without fence": (close_while_it_runs, "closed by hand"),
    "lost lease ignored": (cut_off_for_long, "was under way"),
    "heartbeats ignored": (neighbours_elsewhere, "was under way"),
    "marks ignored": (an_answer_is_lost, "reported as a duplicate at its first submit"),
    "transactions in pieces": (
        killed_amid_a_transaction,
        "some are stored and some are not",
    ),
    "commit left out": (stored_together, "it was accepted, but there is no record"),
    "lost commit treated as rolled back": (
        the_answer_to_a_commit_is_lost,
        "it was rejected, but it is stored",
    ),
    "batches in pieces": (killed_amid_a_batch, "some are stored and some are not"),
}


def test_every_broken_part_is_provoked():
    assert PROVOKED.keys() - on_mongo.OnMongo.broken.keys() == {"outcome without fence"}


def found(campaign: MongoCampaign, word: str) -> list[str]:
    return [violation for violation in campaign.verdict().violations if word in violation]


@pytest.mark.parametrize("part", PROVOKED)
def test_a_broken_part_is_found(campaign, part):
    provoke, word = PROVOKED[part]
    provoke(campaign, broken=part)
    assert found(campaign, word)


@pytest.mark.parametrize("part", on_mongo.OnMongo.broken)
def test_a_part_that_is_not_broken_is_not_accused(campaign, part):
    provoke, word = PROVOKED[part]
    provoke(campaign)
    assert not found(campaign, word)
