"""The buffer of a node: what a thread sees while another one takes and puts back tasks."""

from __future__ import annotations

import random
import sys
import threading

import pytest

from taskx.node.buffer import Buffer

TASKS = [f"t{number}" for number in range(8)]


@pytest.fixture
def frequent_switches():
    """Let threads take turns as often as possible."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture
def buffer():
    """A buffer with eight fetched tasks."""
    buffer = Buffer(maxsize=10, fetch_size=10, wake=lambda: True)
    for order, task_id in enumerate(TASKS):
        buffer.add(task_id, "t", 0, 0, None, order)
    return buffer


@pytest.mark.usefixtures("frequent_switches")
def test_a_task_that_is_put_back_is_known_at_every_moment(buffer):
    """Otherwise the node would fetch it again, as the last one of its millisecond."""
    ended = threading.Event()

    def work():
        while not ended.is_set():
            buffer.put_back(buffer.take(len(TASKS)))
            buffer.started()

    worker = threading.Thread(target=work)
    worker.start()
    try:
        missing = [set(TASKS).difference(buffer.fetched_ids) for _ in range(20_000)]
    finally:
        ended.set()
        worker.join()
    assert not any(missing)


def test_a_task_that_starts_alone_is_taken_alone_and_in_its_order(buffer):
    first, second, *others = buffer.take(len(TASKS))
    buffer.put_back([first, second._replace(apart=True), *others])
    buffer.started()
    taken = []
    while items := buffer.take(len(TASKS)):
        taken.append([item.id for item in items])
        buffer.started()
    assert taken == [["t0"], ["t1"], TASKS[2:]]


# --- lots: tasks that are to be started together


@pytest.fixture
def woken():
    return []


@pytest.fixture
def lots(woken):
    """A buffer whose tasks of type ``many`` share calls of three, which wait for an hour."""
    return Buffer(
        *(10, 10, lambda: woken.append(1) or True), batches={"many": (3, 3600.0), "now": (3, 0.0)}
    )


def add(buffer, type, *task_ids, priority=0):
    """Put in tasks whose ids are letters, as if they had been submitted in the order of the alphabet."""
    for task_id in task_ids:
        buffer.add(task_id, type, priority, ord(task_id), None, ord(task_id))


def taken(buffer):
    items = buffer.take(2)
    buffer.started()
    return [item.id for item in items]


def test_a_lot_is_taken_when_it_is_full(lots):
    add(lots, "many", "a", "b")
    assert (taken(lots), lots.has_next(), lots.ready, len(lots)) == ([], False, 0, 2)
    assert 3500 < lots.until_lot() <= 3600
    add(lots, "many", "c", "d")
    assert (taken(lots), lots.ready, len(lots)) == (["a", "b", "c"], 0, 1)


def test_a_lot_that_does_not_wait_is_taken_as_it_is(lots):
    add(lots, "now", "a", "b")
    assert lots.until_lot() is None
    assert (lots.has_next(), lots.ready) == (True, 2)
    assert taken(lots) == ["a", "b"]


def test_other_tasks_are_taken_while_a_lot_waits_and_the_more_urgent_first(lots):
    add(lots, "many", "a", "b", "c")
    add(lots, "one", "x", priority=1)
    add(lots, "one", "y")
    assert [taken(lots) for _ in range(4)] == [["x", "y"], ["a", "b", "c"], [], []]


def test_a_lot_is_in_the_order_of_its_tasks_not_in_that_of_their_arrival(lots):
    add(lots, "many", "a", "b")
    add(lots, "many", "c", priority=5)
    assert taken(lots) == ["c", "a", "b"]


def test_a_worker_is_woken_for_the_first_task_of_a_lot_and_when_it_is_full(lots, woken):
    for number, task_id in enumerate(("a", "b", "c")):
        add(lots, "many", task_id)
        assert len(woken) == (1, 1, 2)[number]


def test_a_task_of_a_lot_can_be_discarded_and_put_back(lots):
    add(lots, "many", "a", "b", "c", "d")
    lots.discard(["b"])
    items = lots.take(1)
    lots.put_back(items[1:])
    lots.started()
    assert [item.id for item in items] == ["a", "c", "d"]
    assert lots.fetched_ids == ["c", "d"]
    add(lots, "many", "e")
    assert taken(lots) == ["c", "d", "e"]


def test_a_task_of_the_type_that_runs_apart_is_in_no_lot(lots):
    add(lots, "now", "a")
    (item,) = lots.take(1)
    lots.put_back([item._replace(apart=True, entered=0.0)])
    lots.started()
    assert not lots.lots["now"].items
    assert taken(lots) == ["a"]


def test_tasks_come_out_in_their_order_however_they_came_in():
    chance = random.Random(5)
    buffer = Buffer(maxsize=10, fetch_size=1000, wake=lambda: True)
    inside, order = [], 0
    for _ in range(300):
        for _ in range(chance.randrange(4)):
            priority, created_at, order = (
                chance.randrange(3),
                chance.randrange(order + 1),
                order + 1,
            )
            buffer.add(f"t{order}", "t", priority, created_at, None, order)
            inside.append((-priority, created_at, order))
        inside.sort()
        most = chance.randrange(4)
        taken = [item[:3] for item in buffer.take(most)]
        assert taken == inside[:most]
        del inside[:most]
        buffer.started()
    assert len(buffer) == len(inside) > 0
