"""Starting at once: if a worker waits, a new task is stored as started."""

from __future__ import annotations

import threading
import time

import pytest
from helpers import (
    PATIENCE,
    Waiting,
    eventually,
    parts_of,
    pool_of,
    undisturbed,
    whole_round,
)

from taskx import DuplicateTask, Hook, RepositoryUnavailable, TaskStatus
from taskx.node.buffer import Item
from taskx.stores.liveness.leases import Leases
from taskx.tasks.ids import key_of
from taskx.tasks.timing import DEFAULT_TIMING
from taskx.tasks.writes import Insert

#: Makes the housekeeper look for changes as usual, as after an interrupt nobody tells it of them.
polling = pytest.mark.timing(poll_every=DEFAULT_TIMING.poll_every)

SAME = "018cc251-f400-7851-a960-fbefa5d418a5"

# A slow machine hands no started task back, except in the test of that.
pytestmark = [pytest.mark.usefixtures("calm"), undisturbed]


def idle(queue):
    """Wait until all workers of a queue wait, and its housekeeper, too; return the queue."""
    pool = pool_of(queue)
    whole_round(queue)  # the first one checks everything
    eventually(lambda: len(pool.ahead.waiting) == pool.ahead.workers)
    eventually(lambda: not parts_of(queue).agenda.more_stored)
    queue.repository.batches.clear()
    return queue


def moves(queue):
    """Return the moves of each transaction so far."""
    return [[write.move for write in batch] for batch in queue.repository.batches]


def test_a_task_is_stored_and_started_in_one_transaction(started):
    handle = idle(started).submit("fine")
    [[stored]] = started.repository.batches[:1]
    assert isinstance(stored, Insert)
    assert stored.row["status"] == "running"
    assert stored.row["starts"] == 1
    assert handle.result(PATIENCE) == "fine"
    assert [move for batch in moves(started) for move in batch] == ["create", "complete"]
    task = started.get_task_status(handle.id)
    assert task.status is TaskStatus.COMPLETED
    assert task.starts == 1
    assert task.created_at <= task.started_at <= task.completed_at
    assert [attempt.outcome for attempt in task.attempts] == ["completed"]


def test_hooks_hear_of_the_submit_before_the_start(make_queue):
    told = []

    class Listener(Hook):
        def submitted(self, task):
            told.append(("submitted", task.status))

        def started(self, task):
            told.append(("started", task.status))

    queue = make_queue(worker_num=1, hooks=[Listener()])
    queue.executor("fine")(lambda: "fine")
    queue.start()
    idle(queue).submit("fine").result(PATIENCE)
    eventually(lambda: len(told) == 2)
    assert told == [("submitted", TaskStatus.PENDING), ("started", TaskStatus.RUNNING)]


@pytest.mark.parametrize(
    "options",
    [
        {"delay": 60.0},
        {"unique_key": "k"},
        {"concurrency_key": "k"},
        {"id": "the caller's"},
        {"max_crashes": 1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_task_that_may_have_to_wait_is_stored_as_pending(started, options):
    idle(started).submit("fine", **options)
    assert started.repository.batches[0][0].row.get("status", "pending") == "pending"


def test_a_task_behind_a_waiting_one_is_stored_as_pending(busy, gate):
    queue = busy()
    first = queue.submit("note", {"n": 1})
    second = queue.submit("note", {"n": 2})
    assert queue.get_task_status(first.id).status is TaskStatus.PENDING
    gate.open()
    second.result(PATIENCE)
    assert queue.ran == [1, 2]


def test_a_limited_type_is_stored_as_pending(make_queue):
    queue = make_queue(worker_num=2)
    queue.executor("one", max_concurrency=1)(lambda: "one")
    queue.start()
    handle = idle(queue).submit("one")
    assert "status" not in queue.repository.batches[0][0].row
    assert handle.result(PATIENCE) == "one"


def test_a_submit_that_fails_leaves_no_run(started):
    idle(started).repository.down = True
    with pytest.raises(RepositoryUnavailable):
        started.submit("fine")
    assert not pool_of(started).runs
    started.repository.down = False
    assert started.submit("fine").result(PATIENCE) == "fine"


def test_a_submit_with_a_taken_id_leaves_no_run(started, monkeypatch):
    monkeypatch.setattr("taskx.tasks.creation.keyed_id", lambda now: (SAME, key_of(SAME)))
    idle(started).submit("fine").result(PATIENCE)
    eventually(lambda: not pool_of(started).runs)
    with pytest.raises(DuplicateTask):
        idle(started).submit("fine")
    assert not pool_of(started).runs


def test_two_tasks_submitted_for_one_waiting_worker_both_run(make_queue, gate, calm):
    """Both submits find the worker waiting. The second task is handed back, and runs later."""
    calm.set()
    queue = make_queue(worker_num=1)
    Waiting(queue, gate)
    queue.executor("fine")(lambda: "fine")
    queue.start()
    idle(queue)

    other, pool = [], pool_of(queue)
    serve = pool.ahead.serve

    def late(run):
        """Submit another task before the worker is woken for this one."""
        pool.ahead.serve = serve
        other.append(queue.submit("hold"))
        gate.wait_for(1)
        return serve(run)

    pool.ahead.serve = late
    mine = queue.submit("fine")
    assert len(other) == 1
    eventually(lambda: queue.get_task_status(mine.id).status is TaskStatus.PENDING)
    gate.open()
    assert mine.result(PATIENCE) == "fine"
    assert queue.get_task_status(mine.id).interruptions == 0


def test_a_stop_makes_a_task_pending_again_that_no_worker_took(make_queue):
    queue = make_queue(worker_num=1)
    queue.executor("fine")(lambda: "fine")
    queue.start()
    idle(queue)
    pool = pool_of(queue)

    def stopping(writes):
        pool.stopping = True

    queue.repository.after = stopping
    handle = queue.submit("fine")
    assert eventually(lambda: handle.task().status is TaskStatus.PENDING)
    assert not pool.runs


def test_no_task_starts_while_another_one_must_run_alone(started):
    """A submit makes its run visible first, and then checks for a task that must run alone."""
    pool = pool_of(idle(started))
    make = pool.starter._make_run

    def goes_alone(task):
        pool.starter.suspects.item = Item(0, 0, 0, "another", "fine", True)
        pool.starter.suspects._alone_until = float("inf")
        return make(task)

    pool.starter._make_run = goes_alone
    handle = started.submit("fine")
    del pool.starter._make_run
    assert "status" not in started.repository.batches[0][0].row
    pool.starter.suspects.ended("another")
    assert handle.result(PATIENCE) == "fine"


@pytest.mark.every_store
def test_a_node_that_lost_its_lease_starts_nothing(started, monkeypatch):
    """It stores a new task as pending, because other nodes may have taken over its tasks."""
    pool = pool_of(idle(started))
    lost = Leases(started.repository, 10.0, None, time.monotonic)
    monkeypatch.setattr(lost, "lost", lambda node: node == pool.node.id)
    monkeypatch.setattr(parts_of(started).moves, "_target", lost)
    handle = started.submit("fine")
    assert started.get_task_status(handle.id).status is TaskStatus.PENDING


@polling
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_task_whose_submit_was_interrupted_counts_no_interruption(started, when):
    """The interrupt strikes around the commit. The housekeeper undoes the start."""
    idle(started)

    def strike(writes):
        setattr(started.repository, when, lambda writes: None)
        raise KeyboardInterrupt

    setattr(started.repository, when, strike)
    with pytest.raises(KeyboardInterrupt) as struck:
        started.submit("fine")
    task_id = struck.value.task_id
    assert not pool_of(started).runs
    if when == "before":
        assert started.submit("fine").result(PATIENCE) == "fine"
    assert eventually(lambda: task_id in started.repository.statuses([task_id]))
    assert started.handle(task_id).result(PATIENCE) == "fine"
    task = started.get_task_status(task_id)
    assert (task.interruptions, task.crashes, len(task.attempts)) == (0, 0, 1)


@polling
def test_a_submit_that_is_interrupted_before_it_hands_its_task_over_counts_no_interruption(started):
    pool = pool_of(idle(started))

    def strike(run):
        del pool.ahead.serve
        raise KeyboardInterrupt

    pool.ahead.serve = strike
    with pytest.raises(KeyboardInterrupt):
        started.submit("fine")
    [task] = started.list_tasks()[0]
    assert started.handle(task.id).result(PATIENCE) == "fine"
    task = started.get_task_status(task.id)
    assert (task.interruptions, task.starts, len(task.attempts)) == (0, 2, 1)


def test_a_submit_that_is_interrupted_after_it_handed_its_task_over_runs_it_once(started):
    """A worker has it already: its start is not undone."""
    ran = threading.Event()
    started.executor("note")(ran.set)
    pool = pool_of(idle(started))
    serve = pool.ahead.serve

    def strike(run):
        del pool.ahead.serve
        serve(run)
        assert ran.wait(PATIENCE)
        raise KeyboardInterrupt

    pool.ahead.serve = strike
    with pytest.raises(KeyboardInterrupt):
        started.submit("note")
    assert started.drain(PATIENCE)
    [task] = [task for task in started.list_tasks()[0] if task.type == "note"]
    assert (task.interruptions, task.starts) == (0, 1)
