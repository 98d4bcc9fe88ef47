"""Higher priorities first, equal ones in order, wherever they wait; and with ageing, nobody for ever."""

from __future__ import annotations

import pytest
from helpers import PATIENCE, eventually, pool_of

from taskx import SQLiteRepository, Task

pytestmark = [pytest.mark.every_store, pytest.mark.usefixtures("no_batches")]


ORDERED = [(5, "a"), (5, "b"), (0, "c"), (0, "d"), (-3, "e"), (-3, "f")]
#: The same, as they are submitted: each priority in its order.
MIXED = [ORDERED[n] for n in (2, 4, 0, 3, 1, 5)]
NAMES = [name for _, name in ORDERED]


def noting(queue):
    """The queue, with an executor ``note`` that notes what it is given."""
    queue.ran = []
    queue.executor("note")(lambda n: queue.ran.append(n))
    return queue


def submit(queue, tasks):
    for priority, name in tasks:
        queue.submit("note", {"n": name}, priority=priority)


def test_in_the_buffer(busy, gate):
    queue = busy()
    submit(queue, MIXED)
    gate.open()
    assert queue.drain(PATIENCE)
    assert queue.ran == NAMES


def test_none_is_that_of_the_executor_or_0(busy, gate):
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
def test_between_what_is_buffered_and_what_is_spilled(busy, gate, together):
    """What is spilled is fetched, and put where it belongs."""
    queue = busy(buffer_size=2, overflow="spill")
    if together:
        queue.submit_many(Task(type="note", params={"n": n}, priority=p) for p, n in MIXED)
    else:
        submit(queue, MIXED)
    # A worker that is done takes what is best in the buffer: wait until all of it is there.
    eventually(lambda: len(pool_of(queue).buffer) == len(MIXED))
    gate.open()
    assert queue.drain(PATIENCE)
    assert queue.ran == NAMES


def test_of_what_was_stored_before(make_queue):
    queue = noting(make_queue(worker_num=1))
    submit(queue, MIXED)
    queue.start()
    assert queue.drain(PATIENCE)
    assert queue.ran == NAMES


def test_of_what_is_more_than_the_buffer_takes_the_best_is_fetched_first(make_queue):
    queue = noting(make_queue(worker_num=1))
    count = 400
    queue.submit_many(Task(type="note", params={"n": n}, priority=n % 4) for n in range(count))
    queue.start()
    assert queue.drain(3 * PATIENCE)
    assert queue.ran == sorted(range(count), key=lambda n: (-(n % 4), n))


def test_of_what_a_dead_process_held(spawn, database, make_queue):
    """In its buffer, and spilled."""
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
    """A queue on which each task of priority 5 that runs takes a second and submits another one."""
    queue = make_queue(worker_num=1, clock=clock, **config)
    queue.ran = []

    @queue.executor("note")
    def note(n=0):
        queue.ran.append(n)
        clock.advance(1)
        if len(queue.ran) < most and n == 0:
            queue.submit("note", priority=5)

    return queue


def test_without_ageing_a_low_one_waits_for_ever(make_queue, clock):
    """Which is what a priority is."""
    queue = stream(make_queue, clock, 100)
    queue.submit("note", priority=5)
    queue.submit("note", {"n": "low"})
    queue.start()
    assert queue.drain(PATIENCE)
    assert queue.ran.index("low") == len(queue.ran) - 1


@pytest.mark.parametrize("backlog", [1, 250])
def test_a_low_one_starts_when_it_has_waited_as_long_as_they_are_higher(make_queue, clock, backlog):
    """So of those that come more than 5 · 10 s after it, none goes before it: some 50 and the backlog.

    A backlog of them that is more than the buffer takes is no matter: the oldest are fetched, too.
    """
    queue = stream(make_queue, clock, backlog + 100, ageing=10)
    queue.submit_many(Task(type="note", priority=5) for _ in range(backlog))
    queue.submit("note", {"n": "low"})
    queue.start()
    assert queue.drain(3 * PATIENCE)
    assert backlog <= queue.ran.index("low") <= backlog + 52


def test_a_low_one_that_is_in_the_buffer_first_ages_there(busy, gate, clock):
    queue = busy(ageing=10, clock=clock)
    submit(queue, [(0, "low")])
    clock.advance(49)
    submit(queue, [(5, "before")])
    clock.advance(2)
    submit(queue, [(5, "behind")])
    gate.open()
    assert queue.drain(PATIENCE)
    assert queue.ran == ["before", "low", "behind"]


def test_what_was_delayed_ages_from_its_time_on(busy, gate, clock):
    """It did not wait as long as it was not to start."""
    queue = busy(ageing=10, clock=clock)
    queue.submit("note", {"n": "low"}, delay=1000)
    clock.advance(1001)
    eventually(lambda: len(pool_of(queue).buffer) == 1)
    submit(queue, [(5, "before")])
    gate.open()
    assert queue.drain(PATIENCE)
    assert queue.ran == ["before", "low"]


def test_of_types_with_limits_too(make_queue, clock):
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


def test_an_idle_node_takes_the_aged_ones_first(busy, make_queue, clock):
    queue = busy(clock=clock)
    submit(queue, [(0, "low")])
    clock.advance(51)
    submit(queue, [(5, "high")])
    helper = noting(make_queue(worker_num=1, ageing=10, clock=clock))
    helper.start()
    eventually(lambda: len(helper.ran) == 2)
    assert helper.ran == ["low", "high"]
