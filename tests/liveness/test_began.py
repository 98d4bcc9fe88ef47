"""Tests of the tasks that a node's threads began last, as another process on the host reads them."""

from __future__ import annotations

import pytest

from taskx import SQLiteRepository
from taskx.stores.liveness import began as module
from taskx.stores.liveness.base import Node
from taskx.stores.liveness.began import Began
from taskx.stores.liveness.locks import HostLocks


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "node.began")


def test_the_task_that_a_thread_began_last_is_found(path):
    began = Began.make(path)
    began.end(began.begin("first", 1))
    began.begin("second", 3)
    found = Began.read(path)
    assert ("second", 3) in found
    assert [start in found for start in (("first", 1), ("second", 2), ("second", 4))] == [False] * 3


def test_an_ended_task_is_found_until_its_thread_begins_another(path):
    began = Began.make(path)
    began.end(began.begin("a", 1))
    assert ("a", 1) in Began.read(path)


def test_a_long_task_is_found_after_many_short_ones(path):
    began = Began.make(path)
    began.begin("long", 1)
    for n in range(3 * module.CELLS):
        began.end(began.begin(f"short {n}", 1))
    assert ("long", 1) in Began.read(path)


def test_a_file_without_room_for_all_tasks_is_not_read(path):
    began = Began.make(path)
    cells = [began.begin(f"{n}", 1) for n in range(module.CELLS)]
    assert Began.read(path) is None
    for cell in cells:
        began.end(cell)
    assert Began.read(path) is None  # the tasks that were not noted may still run


def test_a_damaged_file_or_one_of_another_boot_is_not_read(path, monkeypatch):
    began = Began.make(path)
    began.begin("a", 1)
    with monkeypatch.context() as patch:
        patch.setattr(module, "boot", lambda: 7)
        assert Began.read(path) is None
    with open(path, "r+b") as file:
        file.truncate(100)
    assert Began.read(path) is None
    assert Began.read(path + " that does not exist") is None


def test_nothing_is_noted_if_the_file_cannot_be_created(tmp_path, path):
    assert Began.make(str(tmp_path / "no folder" / "node.began")) is None
    Began.make(path)
    assert Began.make(path) is None  # the file of another node


def test_a_node_creates_its_file_and_leaving_removes_it(tmp_path):
    with SQLiteRepository(tmp_path / "tasks.db") as store, SQLiteRepository(store.path) as other:
        assert store.liveness.began("node") is None
        store.liveness.join(Node(id="node", name="node"))
        store.liveness.began("node").begin("a", 1)
        store.liveness._locks.let_go("node")  # it dies
        assert ("a", 1) in other.liveness.began("node")
        other.liveness.leave("node")
        assert other.liveness.began("node") is None
        assert list((tmp_path / "tasks.db-nodes").glob("node*")) == []


def test_with_leases_a_node_on_the_same_host_finds_the_file(tmp_path):
    locks, others = HostLocks(str(tmp_path)), HostLocks(str(tmp_path))
    locks.hold("node")
    locks.began("node").begin("a", 1)
    locks._opened[0].let_go("node")
    assert ("a", 1) in others.began("node")
    assert HostLocks(str(tmp_path / "another host")).began("node") is None
    others.release("node")
    assert others.began("node") is None
