"""Schedules with several processes on one repository; some are killed, yet each tick gets one task."""

from __future__ import annotations

import signal
from collections import Counter
from datetime import timedelta

import pymongo
import pytest
from helpers import PATIENCE, eventually, housekeeper_of
from mongo_server import new_database, shared

from taskx import MongoRepository, SQLiteRepository, TaskFilter, every, tick_of
from taskx.tasks.timing import Timing

# The arguments are the repository and a log file for runs; further lines are appended.
PROGRAM = """
import os, signal, sys
from taskx import Config, MongoRepository, Queue, SQLiteRepository, every, tick_of
from taskx.testing import ManualClock
import pymongo

kind, place, name, log = sys.argv[1:5]
if kind == "sqlite":
    repository = SQLiteRepository(place)
else:
    database = pymongo.MongoClient(place)[name]
    repository = MongoRepository(database, run_folder=log + ".run", timeout=60)
queue = Queue(repository, Config(worker_num=2))

@queue.executor()
def work(ctx):
    with open(log, "a") as file:
        file.write(ctx.task.id + "\\n")

def run():
    queue.schedule("beat", every(0.4), "work", misfire="all", misfire_grace=600)
    queue.start()
    print("runs", flush=True)
    sys.stdin.readline()
    queue.stop()

def die(*args, **options):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(params=["sqlite", "standalone", "set"])
def place(request, tmp_path):
    """The arguments that tell a program where the repository is."""
    if request.param == "sqlite":
        yield ("sqlite", tmp_path / "tasks.db", "-", tmp_path / "log")
    else:
        url = shared(request.param)
        database = new_database(url)
        yield ("mongo", url, database.name, tmp_path / "log")
        database.client.drop_database(database.name)


@pytest.fixture
def repository(place):
    kind, at, name, log = place
    if kind == "sqlite":
        with SQLiteRepository(at) as made:
            yield made
    else:
        client = pymongo.MongoClient(at)
        with client, MongoRepository(client[name], run_folder=f"{log}.run", timeout=60) as made:
            yield made


@pytest.fixture
def run(spawn, place):
    """Return a function that starts the program with more lines."""
    return lambda more: spawn(PROGRAM + more, *place)


#: A slow machine must run the tasks of a tick before the next one, or they pile up.
TICK = timedelta(seconds=0.4)


def let_tick(queue):
    """Wait for two further ticks."""
    begun = queue.schedules()["beat"].next_tick
    eventually(lambda: queue.schedules()["beat"].next_tick > begun + 2 * TICK)


def test_every_tick_gets_one_task_even_if_processes_die(run, repository, make_queue, place):
    """Four processes declare the same schedule; two are killed and one of them starts again."""
    queue = make_queue()
    queue.declare("work")
    children = [run("run()") for _ in range(4)]
    for child in children:
        assert child.read() == "runs"
    for victim in children[:2]:
        let_tick(queue)
        victim.kill()
    children = [*children[2:], run("run()")]
    assert children[-1].read() == "runs"
    let_tick(queue)
    queue.schedules()["beat"].pause()
    while left := queue.count_tasks(status="pending"):  # a slow machine has a backlog of ticks
        eventually(lambda left=left: queue.count_tasks(status="pending") < left)
    for child in children:
        child.tell()
        child.ends()
    queue.executor("work")(lambda: None)  # runs what a killed child was running
    queue.start()
    assert queue.drain(PATIENCE)

    tasks, total = queue.list_tasks(TaskFilter(limit=10_000))
    found = sorted(tick_of(task) for task in tasks)
    assert total == len(found) > 6
    assert found == [found[0] + n * TICK for n in range(total)]
    assert queue.schedules()["beat"].last_tick in found
    with open(place[-1]) as log:
        runs = Counter(log.read().split())
    crashed = {task.id for task in tasks if task.crashes or task.interruptions}
    assert {task_id for task_id, times in runs.items() if times > 1} <= crashed


def test_a_schedule_of_another_process_is_noticed(run, place, make_queue):
    """It is noticed at once, or by the audit if the store has a change stream, which shows only tasks."""
    timing = Timing() if place[1] == shared("set") else Timing(audit_every=float("inf"))
    queue = make_queue(timing=timing)
    queue.start()
    ticker = housekeeper_of(queue)._ticker
    eventually(lambda: ticker._refresh_at and not ticker.waiting)  # it has read all schedules
    assert run("queue.schedule('s', every(3600), 'work').store()").ends()[1] == ""
    eventually(lambda: ticker.next)


DYING = """
put = repository.put_notes

def of_schedules(changes):  # not of nodes, which are notes, too
    return any(change.name.startswith("schedule/") for change in changes)

queue = Queue(repository, clock=ManualClock())
queue.declare("work")
queue.schedule("beat", every(60), "work", misfire="one").store()
{patch}
queue.start()
queue.clock.advance(60)  # to the first tick, and not to the second one, however slow this process is
signal.pause()
"""
BEFORE = "repository.apply = die"
BETWEEN = """
repository.put_notes = lambda changes: die() if of_schedules(changes) else put(changes)
"""
AFTER = """
repository.put_notes = lambda changes: (put(changes), of_schedules(changes) and die())[0]
"""


@pytest.mark.parametrize(
    "patch", [BEFORE, BETWEEN, AFTER], ids=["before the task", "before the schedule", "after both"]
)
def test_a_process_killed_during_a_tick_loses_no_task(run, repository, make_queue, clock, patch):
    """The next process ensures that there is exactly one task, even if none was stored."""
    queue = make_queue(worker_num=1, clock=clock)
    ran = []
    queue.executor("work")(lambda ctx: ran.append(ctx.task.id))
    child = run(DYING.format(patch=patch))
    assert child.process.wait(PATIENCE) == -signal.SIGKILL
    [stored] = queue.schedules().values()
    before = {task.id for task in queue.list_tasks()[0]}
    assert len(before) == (patch != BEFORE)
    assert (stored.last_tick is not None) == (patch == AFTER)
    queue.schedule("beat", every(60), "work", misfire="all", misfire_grace=3600)
    first = stored.next_tick
    clock.advance(180)
    queue.start()
    eventually(lambda: queue.schedules()["beat"].next_tick > first)
    queue.schedules()["beat"].pause()
    assert queue.drain(PATIENCE)
    ticks = sorted(tick_of(task) for task in queue.list_tasks(TaskFilter(limit=10_000))[0])
    begin = ticks[0]
    assert ticks == [begin + n * timedelta(seconds=60) for n in range(len(ticks))]
    assert first in ticks
    assert set(ran) == {task.id for task in queue.list_tasks(TaskFilter(limit=10_000))[0]}
    assert len(ran) == len(set(ran))
