"""The tasks that the threads of a node began last, as the next process on the host reads them."""

from __future__ import annotations

import pytest

from taskx import SQLiteRepository
from taskx.liveness import began as module
from taskx.liveness.base import Node
from taskx.liveness.began import Began
from taskx.liveness.locks import HostLocks


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "node.began")


def test_what_a_thread_began_last_is_found(path):
    began = Began.make(path)
    began.end(began.begin("first", 1))
    began.begin("second", 3)
    found = Began.read(path)
    assert ("second", 3) in found
    assert [start in found for start in (("first", 1), ("second", 2), ("second", 4))] == [False] * 3


def test_a_task_that_has_ended_is_found_until_its_thread_begins_another(path):
    began = Began.make(path)
    began.end(began.begin("a", 1))
    assert ("a", 1) in Began.read(path)


def test_a_long_task_is_found_however_many_begin_beside_it(path):
    began = Began.make(path)
    began.begin("long", 1)
    for n in range(3 * module.CELLS):
        began.end(began.begin(f"short {n}", 1))
    assert ("long", 1) in Began.read(path)


def test_nothing_is_known_if_more_tasks_run_than_can_be_noted(path):
    began = Began.make(path)
    cells = [began.begin(f"{n}", 1) for n in range(module.CELLS)]
    assert Began.read(path) is None
    for cell in cells:
        began.end(cell)
    assert Began.read(path) is None  # those that were not noted may run still


def test_a_file_of_another_boot_or_a_damaged_one_says_nothing(path, monkeypatch):
    began = Began.make(path)
    began.begin("a", 1)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_boot", lambda: 7)
        assert Began.read(path) is None
    with open(path, "r+b") as file:
        file.truncate(100)
    assert Began.read(path) is None
    assert Began.read(path + " that is not there") is None


def test_nothing_is_noted_if_the_file_cannot_be_made(tmp_path, path):
    assert Began.make(str(tmp_path / "no folder" / "node.began")) is None
    Began.make(path)
    assert Began.make(path) is None  # another node's


def test_the_file_of_a_node_is_made_by_its_process_and_removed_with_it(tmp_path):
    with SQLiteRepository(tmp_path / "tasks.db") as store, SQLiteRepository(store.path) as other:
        assert store.liveness.began("node") is None
        store.liveness.join(Node(id="node", name="node"))
        store.liveness.began("node").begin("a", 1)
        store.liveness._locks.let_go("node")  # it dies
        assert ("a", 1) in other.liveness.began("node")
        other.liveness.leave("node")
        assert other.liveness.began("node") is None
        assert list((tmp_path / "tasks.db-nodes").glob("node*")) == []


def test_nodes_of_one_host_find_it_beside_leases_too(tmp_path):
    locks, others = HostLocks(str(tmp_path)), HostLocks(str(tmp_path))
    locks.hold("node")
    locks.began("node").begin("a", 1)
    locks._opened[0].let_go("node")
    assert ("a", 1) in others.began("node")
    assert HostLocks(str(tmp_path / "another host")).began("node") is None
    others.release("node")
    assert others.began("node") is None
