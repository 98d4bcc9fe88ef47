"""Priorities: higher ones first, equal ones in order, wherever tasks wait; and ageing."""

from __future__ import annotations

import pytest
from helpers import PATIENCE, eventually, no_batches, pool_of

from taskx import SQLiteRepository, Task

pytestmark = no_batches


ORDERED = [(5, "a"), (5, "b"), (0, "c"), (0, "d"), (-3, "e"), (-3, "f")]
#: The same tasks in the order in which they are submitted.
MIXED = [ORDERED[n] for n in (2, 4, 0, 3, 1, 5)]
NAMES = [name for _, name in ORDERED]


def noting(queue):
    """Register an executor ``note`` that notes its argument; return the queue."""
    queue.ran = []
    queue.executor("note")(lambda n: queue.ran.append(n))
    return queue


def submit(queue, tasks):
    for priority, name in tasks:
        queue.submit("note", {"n": name}, priority=priority)


def test_a_task_without_a_priority_has_its_executors_or_0(busy, gate):
    queue = busy()
    queue.executor("high", priority=5)(lambda n: queue.ran.append(n))
    for type, name, options in [
        ("note", "none", {}),
        ("high", "lowered", {"priority": -1}),
        ("high", "high", {}),
        ("note", "zero", {"priority": 0}),
    ]:
        queue.submit(type, {"n": name}, **options)
    gate.open()
    assert queue.drain(PATIENCE)
    assert queue.ran == ["high", "none", "zero", "lowered"]


@pytest.mark.parametrize("together", [True, False])
def test_buffered_and_spilled_tasks_run_by_priority(busy, gate, together):
    """A spilled task is fetched and put into its place."""
    queue = busy(buffer_size=2, overflow="spill")
    if together:
        queue.submit_many(Task(type="note", params={"n": n}, priority=p) for p, n in MIXED)
    else:
        submit(queue, MIXED)
    # A free worker takes the first task of the buffer: wait until all tasks are there.
    eventually(lambda: len(pool_of(queue).buffer) == len(MIXED))
    gate.open()
    assert queue.drain(PATIENCE)
    assert queue.ran == NAMES


def test_tasks_stored_before_the_start_run_by_priority(make_queue):
    queue = noting(make_queue(worker_num=1))
    submit(queue, MIXED)
    queue.start()
    assert queue.drain(PATIENCE)
    assert queue.ran == NAMES


@pytest.mark.every_store
def test_the_highest_priorities_are_fetched_first_if_the_buffer_is_too_small(make_queue):
    queue = noting(make_queue(worker_num=1))
    count = 400
    queue.submit_many(Task(type="note", params={"n": n}, priority=n % 4) for n in range(count))
    queue.start()
    assert queue.drain(3 * PATIENCE)
    assert queue.ran == sorted(range(count), key=lambda n: (-(n % 4), n))


def test_tasks_of_a_dead_process_run_by_priority(spawn, database, make_queue):
    """Some are in its buffer, some are spilled."""
    child = spawn(
        """
        import sys, threading
        from taskx import Config, Queue, SQLiteRepository
        queue = Queue(
            SQLiteRepository(sys.argv[1]), Config(worker_num=1, buffer_size=2, overflow="spill")
        )
        queue.executor("hold")(lambda: (print("holding", flush=True), threading.Event().wait()))
        queue.executor("note")(lambda n: None)
        queue.start()
        queue.submit("hold", max_crashes=1)
        sys.stdin.readline()
        for name, priority in zip(sys.argv[2::2], sys.argv[3::2]):
            queue.submit("note", {"n": name}, priority=int(priority))
        print("submitted", flush=True)
        sys.stdin.readline()
        """,
        database,
        *(part for priority, name in MIXED for part in (name, priority)),
    )
    assert child.read() == "holding"
    child.tell()
    assert child.read() == "submitted"
    child.kill()
    with SQLiteRepository(database) as repository:
        queue = noting(make_queue(repository, worker_num=1))
        queue.start()
        assert queue.drain(PATIENCE)
        assert queue.ran == NAMES
        queue.stop(PATIENCE)


# Ageing


def stream(make_queue, clock, most, **config):
    """Make a queue whose tasks of priority 5 take a second each and submit the next one."""
    queue = make_queue(worker_num=1, clock=clock, **config)
    queue.ran = []

    @queue.executor("note")
    def note(n=0):
        queue.ran.append(n)
        clock.advance(1)
        if len(queue.ran) < most and n == 0:
            queue.submit("note", priority=5)

    return queue


def test_without_ageing_a_task_of_low_priority_waits_for_ever(make_queue, clock):
    """A priority means just that."""
    queue = stream(make_queue, clock, 100)
    queue.submit("note", priority=5)
    queue.submit("note", {"n": "low"})
    queue.start()
    assert queue.drain(PATIENCE)
    assert queue.ran.index("low") == len(queue.ran) - 1


@pytest.mark.parametrize("backlog", [1, 250])
def test_with_ageing_a_task_of_low_priority_starts_after_it_has_aged(make_queue, clock, backlog):
    """No task that comes more than 5 · 10 s later runs before it: only some 50 and the backlog do.

    This also holds if the backlog is larger than the buffer: the oldest tasks are fetched, too.
    """
    queue = stream(make_queue, clock, backlog + 100, ageing=10)
    queue.submit_many(Task(type="note", priority=5) for _ in range(backlog))
    queue.submit("note", {"n": "low"})
    queue.start()
    assert queue.drain(3 * PATIENCE)
    assert backlog <= queue.ran.index("low") <= backlog + 52


def test_a_task_ages_in_the_buffer(busy, gate, clock):
    queue = busy(ageing=10, clock=clock)
    submit(queue, [(0, "low")])
    clock.advance(49)
    submit(queue, [(5, "before")])
    clock.advance(2)
    submit(queue, [(5, "behind")])
    gate.open()
    assert queue.drain(PATIENCE)
    assert queue.ran == ["before", "low", "behind"]


def test_a_delayed_task_ages_from_its_run_at(busy, gate, clock):
    """The delay does not count as waiting."""
    queue = busy(ageing=10, clock=clock)
    queue.submit("note", {"n": "low"}, delay=1000)
    clock.advance(1001)
    eventually(lambda: len(pool_of(queue).buffer) == 1)
    submit(queue, [(5, "before")])
    gate.open()
    assert queue.drain(PATIENCE)
    assert queue.ran == ["before", "low"]


def test_tasks_of_limited_types_age(make_queue, clock):
    queue = noting(make_queue(worker_num=1, clock=clock, ageing=10))
    queue.executor("limited", max_concurrency=1)(lambda n: queue.ran.append(n))
    queue.submit("limited", {"n": "low"})
    clock.advance(51)
    submit(queue, [(5, "high")])
    queue.submit("limited", {"n": "high, too"}, priority=5)
    queue.start()
    assert queue.drain(PATIENCE)
    assert queue.ran.index("low") < queue.ran.index("high, too")
    assert queue.ran[0] == "low"


def test_an_idle_node_takes_aged_tasks_of_other_nodes_first(busy, make_queue, clock):
    queue = busy(clock=clock)
    submit(queue, [(0, "low")])
    clock.advance(51)
    submit(queue, [(5, "high")])
    helper = noting(make_queue(worker_num=1, ageing=10, clock=clock))
    helper.start()
    eventually(lambda: len(helper.ran) == 2)
    assert helper.ran == ["low", "high"]
