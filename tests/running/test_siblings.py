"""Two nodes on one repository: an idle node helps a busy one whose buffer is full."""

from __future__ import annotations

import pytest
from helpers import PATIENCE, eventually

from taskx import MongoRepository, Queue, SQLiteRepository


@pytest.fixture
def other(repository, database):
    """The repository, opened a second time as by another process."""
    if isinstance(repository, SQLiteRepository):
        made = SQLiteRepository(database)
    elif isinstance(repository, MongoRepository):
        made = MongoRepository(repository.database)
    else:
        yield repository
        return
    with made:
        yield made


@pytest.fixture
def idle(make_queue, other):
    """Return a function that makes a queue on the same records, which notes the tasks it runs."""
    made = []

    def make(type="note", **config) -> Queue:
        queue = make_queue(other, **config)
        queue.ran = []
        queue.executor(type)(lambda n: queue.ran.append(n))
        made.append(queue)
        return queue

    yield make
    for queue in made:  # before their repository is closed
        queue.stop(PATIENCE, cancel=True)


def test_an_idle_node_takes_tasks_out_of_the_buffer_of_a_busy_one(busy, idle, gate):
    queue = busy()
    for name in range(10):
        queue.submit("note", {"n": name})
    helper = idle(worker_num=1)
    helper.start()
    assert eventually(lambda: len(helper.ran) == 10)
    assert helper.ran == list(range(10))  # the next tasks first
    gate.open()
    assert queue.drain(PATIENCE)
    assert queue.ran == []  # the busy node finds them gone


def test_an_idle_node_takes_higher_priorities_first(busy, idle):
    queue = busy()
    for name, priority in [("low", 0), ("high", 5), ("middle", 3)]:
        queue.submit("note", {"n": name}, priority=priority)
    helper = idle(worker_num=1)
    helper.start()
    assert eventually(lambda: len(helper.ran) == 3)
    assert helper.ran == ["high", "middle", "low"]


@pytest.mark.every_store
def test_an_idle_node_takes_no_task_of_a_type_that_it_cannot_run(busy, idle, gate):
    queue = busy()
    queue.submit("note", {"n": "mine"})
    helper = idle("else", worker_num=1)
    helper.start()
    helper.submit("else", {"n": "its own"}).result(PATIENCE)
    gate.open()
    assert queue.drain(PATIENCE)
    assert queue.ran == ["mine"]


def test_two_nodes_run_every_task_once(make_queue, idle):
    first, second = idle(worker_num=2, buffer_size=500), idle(worker_num=2)
    first.start()
    second.start()
    for name in range(500):
        first.submit("note", {"n": name})
    assert first.drain(PATIENCE)
    assert second.drain(PATIENCE)
    assert sorted(first.ran + second.ran) == list(range(500))
    tasks, total = first.list_tasks()
    assert total == 500
    # Some may have been handed back before they ran, and started twice.
    assert {len(task.attempts) for task in tasks} == {1}
