"""The pools of Celery: children that end after some tasks, pools that grow and shrink, threads and solo."""

from __future__ import annotations

import os
import signal
from collections import Counter

import pytest
from celery import Celery
from helpers import PATIENCE, eventually

from engines.conftest import Ground
from taskx import TaskStatus


@pytest.fixture
def site(ground) -> Ground:
    made = ground("celery")
    made.edge()
    return made


def run_all(site: Ground, count: int) -> list[int]:
    """Run tasks; return the ids of the processes that ran them. None may run twice."""
    handles = [site.note(f"task{number}") for number in range(count)]
    pids = [handle.result(PATIENCE) for handle in handles]
    assert Counter(site.began("task")) == {f"task{number}": 1 for number in range(count)}
    return pids


def known_to_run(site: Ground) -> int:
    """Return the number of messages that the main processes of Celery know to run."""
    answers = Celery(broker=site.broker.url).control.inspect(limit=1).active() or {}
    return sum(map(len, answers.values()))


def test_children_that_end_after_two_tasks_lose_none(site):
    site.crew.start("--max-tasks-per-child", "2")
    site.workers(2)
    pids = run_all(site, 12)
    assert len(set(pids)) >= 6


def test_a_pool_that_grows_and_shrinks_loses_no_task(site):
    site.crew.start("--autoscale", "3,1")
    site.workers(1)
    handles = [site.hold(f"held{number}") for number in range(3)]
    for number in range(3):
        site.begun(f"held{number}")  # three at once: the pool has grown
    for handle, free in handles:
        free()
        handle.result(PATIENCE)
    run_all(site, 10)


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_other_pools_run_the_tasks_in_place(site, pool):
    process = site.crew.start("--pool", pool)
    site.workers({"threads": 2, "solo": 1}[pool])
    assert set(run_all(site, 10)) == {process.pid}
    if pool == "threads":
        held = [site.hold(f"held{number}") for number in range(2)]
        for number in range(2):
            site.begun(f"held{number}")
        for handle, free in held:
            free()
            handle.result(PATIENCE)
    site.crew.stop(process)
    assert [node for node in site.queue.nodes() if node.workers] == []


@pytest.mark.parametrize("pool", ["prefork", "solo"])
def test_a_cold_shutdown_interrupts_the_tasks_which_start_again(site, pool):
    process = site.crew.start("--pool", pool, CONTROL="1")
    count = {"prefork": 2, "solo": 1}[pool]
    site.workers(count)
    held = [site.hold(f"held{number}") for number in range(count)]
    for number in range(count):
        site.begun(f"held{number}")
    if pool == "prefork":  # its main process waits for the tasks that it does not know of
        eventually(lambda: known_to_run(site) == count)
    process.send_signal(signal.SIGQUIT)
    process.wait(PATIENCE)
    for handle, _ in held:  # a child may end after its parent
        eventually(lambda one=handle: one.task().status is TaskStatus.PENDING)
        task = handle.task()
        assert (task.interruptions, task.crashes, task.errors) == (1, 0, 0)
    assert "left pending" not in site.crew.said()
    site.crew.start("--pool", pool)
    for handle, free in held:
        free()
        handle.result(PATIENCE)


def test_time_limits_of_celery_do_not_concern_tasks(site):
    """A limit would end the child by a signal, like a shutdown, and the task would start again for ever."""
    site.crew.start("--time-limit", "1", "--soft-time-limit", "1")
    site.workers(2)
    handle = site.note("long", 3.0)
    handle.result(PATIENCE)
    task = handle.task()
    assert (task.starts, task.interruptions, task.crashes) == (1, 0, 0)


def test_a_killed_child_costs_its_own_task_one_crash(site):
    site.crew.start()
    site.workers(2)
    held, free = site.hold("held")
    other, free_other = site.hold("other")
    victim = site.begun("held")
    site.begun("other")
    os.kill(victim, signal.SIGKILL)
    eventually(lambda: held.task().crashes == 1)
    free()
    free_other()
    assert held.result(PATIENCE) != victim
    assert (other.result(PATIENCE) != victim, other.task().starts) == (True, 1)
