"""Tests that kill processes on one file: no task is lost, runs twice at a time, or is left behind.

They also test the proof itself: if a part of the library is broken, it must find a violation.
"""

from __future__ import annotations

import itertools
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from taskx import TaskFilter, TaskStatus
from taskx.tasks.timing import DEFAULT_TIMING

from . import hooks
from .campaign import Campaign, Outcome, summary, until

KILLED = -signal.SIGKILL


@pytest.fixture
def campaign(tmp_path: Path) -> Iterator[Campaign]:
    made = Campaign(tmp_path, seed=20)
    yield made
    made.end()


def prove(campaign: Campaign, **drain: Any) -> Outcome:
    """Run the remaining tasks, and check that no promise is broken."""
    campaign.drain(**drain)
    outcome = campaign.verdict()
    assert not outcome.violations, "\n".join([*outcome.violations[:20], *summary(outcome)])
    return outcome


def counts(outcome: Outcome, name: str) -> list[int]:
    return sorted(getattr(task, name) for task in outcome.records.values())


# At random


def test_random_kills_break_no_promise(campaign):
    campaign.storm(kills=25)
    # On a busy machine they may complete only a few tasks.
    with campaign.open() as repository:
        done = TaskFilter(status=TaskStatus.COMPLETED)
        campaign.mix_until(
            lambda: repository.count(done) > 100, "more than 100 tasks are completed"
        )
    campaign.end()
    outcome = prove(campaign)
    assert sum(event.what == "dead" for event in outcome.events) >= 25
    assert sum(task.status == "completed" for task in outcome.records.values()) > 100


# At every named point

#: The options of the process that dies at each point, and a check of the outcome.
NAMED: dict[str, tuple[dict[str, Any], Callable[[Outcome], bool]]] = {
    "after commit, before buffer": (
        {"passings": 5, "tasks": [{"kind": "brief", "count": 200}]},
        # Tasks that were spilled in between do not pass the point.
        lambda outcome: 5 <= len(outcome.records) <= 200,
    ),
    "after start, before execute": (
        {"passings": 3, "tasks": [{"kind": "brief", "count": 20}], "workers": 1},
        # No thread was executing it.
        lambda outcome: counts(outcome, "crashes")[-1] == 0 < counts(outcome, "interruptions")[-1],
    ),
    "started ahead": (
        {"tasks": [{"kind": "instant", "count": 2000}], "workers": 2, "buffer": 2000},
        lambda outcome: counts(outcome, "crashes")[-1] == 0 < counts(outcome, "interruptions")[-1],
    ),
    "after result, before finish": (
        {"passings": 5, "tasks": [{"kind": "instant", "count": 20}], "workers": 1},
        lambda outcome: counts(outcome, "crashes")[-1] == 1,
    ),
    "inside a commit": (
        {"passings": 12, "tasks": [{"kind": "brief", "count": 40}]},
        lambda outcome: len(outcome.records) <= 12,
    ),
    "after a commit": (
        {"passings": 12, "tasks": [{"kind": "brief", "count": 40}]},
        lambda outcome: len(outcome.records) <= 12,
    ),
    "while stopping": (
        {"role": "mix", "seconds": 0.3, "workers": 4, "seed": 3},
        lambda outcome: any(event.what == "stop" for event in outcome.events),
    ),
    "before leaving": (
        {"tasks": [{"kind": "brief", "count": 5}]},
        lambda outcome: counts(outcome, "crashes") == counts(outcome, "interruptions") == [0] * 5,
    ),
}


def test_every_point_has_a_test():
    assert NAMED.keys() == hooks.KILL_POINTS.keys()


@pytest.mark.parametrize("point", NAMED)
def test_a_kill_at_a_named_point_breaks_no_promise(campaign, point):
    options, expected = NAMED[point]
    first = campaign.spawn(**{"role": "submit", "point": point, **options})
    assert first.wait() == KILLED
    campaign.wait_for("dying", note=point)
    outcome = prove(campaign, processes=1)
    assert expected(outcome), summary(outcome)


def test_a_task_of_a_killed_stopping_process_is_interrupted(campaign):
    """It does not count as crashed."""
    first = campaign.spawn(
        role="submit",
        point="while stopping",
        tasks=[{"kind": "stubborn", "params": {"seconds": 30.0}}],
    )
    campaign.wait_for("begin", kind="stubborn")
    first.kill()  # this process is not stopping, so its death counts as a crash
    second = campaign.spawn(role="serve", point="while stopping")
    campaign.wait_for("begin", kind="stubborn", who=second.who)
    assert second.finish() == KILLED
    last = campaign.spawn(role="serve")
    campaign.wait_for("begin", kind="stubborn", who=last.who)
    last.kill()
    [task] = campaign.verdict().records.values()
    assert (task.starts, task.crashes, task.interruptions) == (3, 1, 1)


def test_interrupts_of_commit_leaders_break_no_promise(campaign):
    """One process for each moment and error, all on one file, each with followers."""
    tasks = [{"kind": "brief", "count": 10}, {"kind": "parent", "count": 10}]
    children = {}
    for where, error in itertools.product(hooks.INTERRUPTS, ("KeyboardInterrupt", "MemoryError")):
        children[where, error] = campaign.spawn(
            role="submit", workers=3, interrupt=where, error=error, passings=6, tasks=tasks
        )
    for (where, _), child in children.items():
        assert child.wait() == 0, child.output
        campaign.wait_for("interrupt", note=where, who=child.who)
    outcome = prove(campaign, processes=1)
    assert len(outcome.records) == 30 * len(children)
    assert counts(outcome, "crashes")[-1] == 0


# Culprits and innocents


def test_innocent_neighbours_of_a_crashing_task_complete(campaign):
    """The crashing task kills its process again and again, until it is a dead letter."""
    crasher = {"kind": "crasher", "params": {"after": 0.05}, "max_crashes": 3}
    innocents = {"kind": "innocent", "count": 6, "params": {"seconds": 0.1}}
    campaign.spawn(role="store", tasks=[innocents, crasher, innocents]).wait()
    outcome = prove(campaign, processes=2)
    for task in outcome.records.values():
        if task.type == "crasher":
            assert (task.status, task.crashes, task.dead_letter) == ("failed", 3, True)
        else:
            assert task.status == "completed"
            assert task.crashes <= 2


def crashers_beside_innocents(campaign: Campaign, **options: Any) -> None:
    """Run as many crashing tasks as there are workers: first each runs beside innocents or crashed ones."""
    crashers = {"kind": "crasher", "count": 4, "params": {"after": 0.05}, "max_crashes": 3}
    innocents = {"kind": "innocent", "count": 2, "params": {"seconds": 1.0}}
    tasks = [innocents, crashers, innocents]
    campaign.spawn(role="store", tasks=tasks, durability="process").wait()
    campaign.drain(processes=1, **options)


def test_innocents_complete_among_many_crashing_tasks(campaign):
    crashers_beside_innocents(campaign)
    outcome = campaign.verdict()
    assert not outcome.violations, "\n".join(outcome.violations)
    for task in outcome.records.values():
        assert (task.status, task.dead_letter) == (
            ("failed", True) if task.type == "crasher" else ("completed", False)
        )


def test_a_task_that_may_crash_once_never_starts_again(campaign):
    once = {"kind": "crasher", "max_crashes": 1, "params": {"after": 0.05}}
    campaign.spawn(role="store", tasks=[{"kind": "once", "count": 10}, once]).wait()
    outcome = prove(campaign, processes=1)
    [crasher] = [task for task in outcome.records.values() if task.type == "crasher"]
    assert (crasher.status, crasher.starts, crasher.crashes) == ("failed", 1, 1)


# The guards, without the hints that usually keep processes apart


def fill(campaign: Campaign, **entry: Any) -> None:
    campaign.spawn(role="store", tasks=[entry], durability="process").wait()


def crowd(campaign: Campaign, **options: Any) -> None:
    """Run several processes that compete for the same tasks."""
    fill(campaign, kind="brief", count=150)
    wanted = {"role": "drain", "alone": True, "dawdle": 0.004, "workers": 3, "waits": True}
    children = [campaign.spawn(**wanted, **options) for _ in range(3)]
    for child in children:
        campaign.wait_for("ready", who=child.who)
    for child in children:
        child.tell()
    until(lambda: all(child.ended() for child in children), "all tasks are drained")


def test_processes_that_compete_for_tasks_break_no_promise(campaign):
    crowd(campaign)
    assert not campaign.verdict().violations


def close_by_hand(campaign: Campaign, **options: Any) -> None:
    """Close a running task by hand; its run loses its fence and still returns."""
    fill(campaign, kind="held", params=campaign.hold())
    runner = campaign.spawn(role="serve", **options)
    campaign.wait_for("begin")
    closer = campaign.spawn(role="close")
    assert closer.wait() == 0, closer.output
    campaign.let_go()
    campaign.wait_for("end")
    assert runner.finish() == 0, runner.output


def test_a_late_outcome_is_dropped(campaign):
    close_by_hand(campaign)
    prove(campaign, processes=1)


def live_neighbours(campaign: Campaign, **options: Any) -> None:
    """Run two living processes: neither may take over the other's running tasks."""
    fill(campaign, kind="held", count=2, params=campaign.hold())
    first = campaign.spawn(role="serve", **options)
    ids = [f"p1-{number}" for number in (1, 2)]
    for task_id in ids:
        campaign.wait_for("begin", id=task_id, who=first.who)
    second = campaign.spawn(role="serve")
    campaign.wait_for("started", who=second.who)
    if options:
        campaign.wait_for("begin", who=second.who)
    else:
        threading.Event().wait(
            3 * DEFAULT_TIMING.recover_every
        )  # blocks on purpose: it checks for dead nodes
    campaign.let_go()
    for task_id in ids:
        campaign.wait_for("end", id=task_id, who=first.who)
    first.finish()
    second.finish()


def test_a_task_of_a_living_process_is_not_taken_over(campaign):
    live_neighbours(campaign)
    outcome = campaign.verdict()
    assert not outcome.violations
    assert counts(outcome, "starts") == [1, 1]


def early_end(campaign: Campaign, **options: Any) -> None:
    """Run a process that ends as soon as its tasks are acknowledged, and drain its tasks."""
    campaign.spawn(role="store", tasks=[{"kind": "brief", "count": 50}], **options).wait()
    campaign.drain(processes=1)


def cancel_what_runs(campaign: Campaign, **options: Any) -> None:
    """Cancel a running task that still returns."""
    fill(campaign, kind="held", params=campaign.hold())
    runner = campaign.spawn(role="serve")
    campaign.wait_for("begin")
    campaign.spawn(role="cancel", **options).wait()
    campaign.let_go()
    campaign.wait_for("end")
    runner.finish()


def expire_what_ran(campaign: Campaign, **options: Any) -> None:
    """Kill the process that runs a task which can expire, and let another one take the task back."""
    fill(campaign, kind="held", params=campaign.hold(), expires=3600)
    runner = campaign.spawn(role="serve")
    campaign.wait_for("begin")
    runner.kill()
    campaign.let_go()
    campaign.drain(processes=1, **options)


def test_a_task_whose_process_was_killed_does_not_expire(campaign):
    expire_what_ran(campaign)
    outcome = prove(campaign, processes=1)
    assert [str(task.status) for task in outcome.records.values()] == ["completed"]


def crash_beside_innocents(campaign: Campaign, **options: Any) -> None:
    """Run a task that crashes again and again beside others that take longer."""
    crasher = {"kind": "crasher", "params": {"after": 0.1}, "max_crashes": 3}
    innocent = {"kind": "innocent", "params": {"seconds": 2.0}}
    tasks = [innocent, crasher, innocent]
    campaign.spawn(role="store", tasks=tasks, durability="process").wait()
    campaign.drain(processes=1, **options)


# Tests of the proof

#: For each broken part, the function that provokes it and a part of the violation that must be found.
PROVOKED: dict[str, tuple[Callable[..., None], str]] = {
    "start without guard": (crowd, "executed twice"),
    "outcome without fence": (close_by_hand, "closed by hand"),
    "node without lock": (live_neighbours, "was under way"),
    "acknowledged before the commit": (early_end, "lost"),
    "cancel without guard": (cancel_what_runs, "lived on, but the record is cancelled"),
    "expiry after the start": (
        expire_what_ran,
        "before its first start since it was replaced, but begun",
    ),
    "suspects run together": (crash_beside_innocents, "fails several tasks"),
    "a last chance beside others": (crashers_beside_innocents, "innocent, but failed"),
}


def test_every_broken_part_is_provoked():
    assert PROVOKED.keys() == hooks.BROKEN.keys()


@pytest.mark.parametrize("part", PROVOKED)
def test_a_broken_part_is_found(campaign, part):
    provoke, word = PROVOKED[part]
    provoke(campaign, broken=part)
    violations = campaign.verdict().violations
    assert any(word in violation for violation in violations), violations
