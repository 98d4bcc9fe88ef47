"""``queue.diagnose``: checks that fit every repository."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest

import taskx
from taskx import Check, Diagnosis, Queue, RepositoryUnavailable, SQLiteRepository
from taskx.stores.liveness.base import About, Node
from taskx.tasks.clock import to_datetime
from taskx.tasks.findings import fail, ok, warn


def named(queue, name):
    (check,) = [check for check in queue.diagnose().checks if check.name == name]
    return check


@pytest.fixture
def healthy(repository, monkeypatch):
    """The repository, on a machine with which nothing is wrong."""
    monkeypatch.setattr(type(repository.house), "examine", lambda self: iter([ok("file", "Fine.")]))
    return repository


def test_a_queue_with_which_nothing_is_wrong_is_fine_everywhere(healthy, queue):
    queue.declare("mail")
    queue.submit("mail")
    found = queue.diagnose()
    assert found.ok
    assert bool(found)
    assert str(found) == "All is well."
    assert [check.name for check in found.checks] == ["versions", "file", "nodes", "clock"]
    assert taskx.__version__ in found.checks[0].sentence


def test_only_a_failure_makes_a_diagnosis_false():
    at = to_datetime(0)
    bad, odd = fail("disk", "It is full.", "Free some space."), warn("log", "It is large.", "")
    assert Diagnosis((odd,), at).ok
    found = Diagnosis((ok("file", "Fine."), odd, bad), at)
    assert not found
    assert str(found) == "It is large. It is full. Free some space."
    assert found.to_dict() == {
        "ok": False,
        "checks": [
            {"name": "file", "level": "ok", "sentence": "Fine.", "advice": "", "facts": {}},
            {"name": "log", "level": "warn", "sentence": "It is large.", "advice": "", "facts": {}},
            {**Check("disk", "fail", "It is full.", "Free some space.").to_dict()},
        ],
        "checked_at": "1970-01-01T00:00:00+00:00",
    }


def test_the_tasks_of_dead_nodes_are_counted(healthy, queue, monkeypatch):
    queue.declare("mail")
    queue.submit("mail")
    nodes = [Node(id="a", name="host:1", alive=False), Node(id="b", name="host:2", alive=None)]
    monkeypatch.setattr(healthy, "nodes", lambda: nodes)
    monkeypatch.setattr(
        healthy, "find", lambda column, ids, *_: [("x",)] if column == "running_on" else []
    )
    check = named(queue, "nodes")
    assert (check.level, check.facts) == ("ok", {"live": 1, "dead": 1, "tasks": 1})
    nodes.pop()
    check = named(queue, "nodes")
    assert (check.level, check.facts["live"]) == ("warn", 0)
    assert check.sentence == "1 dead node left 1 task behind."
    monkeypatch.setattr(healthy, "find", lambda *_: [])
    check = named(queue, "nodes")
    assert (check.level, check.facts) == ("ok", {"live": 0, "dead": 1, "tasks": 0})
    assert check.sentence == "0 live nodes, and 1 dead one without tasks."


def test_a_node_whose_heartbeat_is_old_is_a_warning(healthy, make_queue, clock, monkeypatch):
    queue = make_queue(clock=clock)
    nodes = [Node(id="a", name="host:1", beat_at=clock.now_ms() - 61_000)]
    monkeypatch.setattr(healthy, "nodes", lambda: nodes)
    check = named(queue, "heartbeats")
    assert (check.level, check.facts) == ("warn", {"silent": ["a"]})
    assert check.sentence == (
        "1 node may be dead: host:1 (the last heartbeat was 1 min 1 s ago, and a lease is 30 s)."
    )
    assert named(queue, "nodes").facts["live"] == 0


def test_live_nodes_of_another_version_are_a_warning(healthy, queue, monkeypatch):
    nodes = [
        Node(id="a", name="host:1", alive=True, about=About(version=taskx.__version__)),
        Node(id="b", name="host:2", alive=True, about=About(version="0.1.9")),
        Node(id="c", name="host:3", alive=False, about=About(version="0.1.8")),
    ]
    monkeypatch.setattr(healthy, "nodes", lambda: nodes)
    check = named(queue, "node versions")
    assert check.level == "warn"
    assert check.sentence.startswith("Live nodes run TaskX 0.1.9, and this is TaskX ")
    del nodes[1]
    assert "node versions" not in {check.name for check in queue.diagnose().checks}


def test_a_task_from_the_future_is_a_warning_about_the_clock(healthy, make_queue, clock):
    ahead = make_queue(clock=clock)
    ahead.declare("mail")
    ahead.submit("mail")
    assert named(ahead, "clock").level == "ok"
    clock.set_wall(clock.now() - timedelta(seconds=90))
    check = named(ahead, "clock")
    assert (check.level, check.facts["seconds"]) == ("warn", 90.0)
    assert "1 min 30 s in the future" in check.sentence


def test_a_clock_from_before_taskx_fails(healthy, make_queue, clock):
    clock.set_wall(datetime(1970, 1, 2, tzinfo=timezone.utc))
    assert named(make_queue(clock=clock), "clock").level == "fail"


def test_a_repository_that_fails_in_the_middle_is_a_check_that_failed(healthy, queue, monkeypatch):
    def nodes():
        raise RepositoryUnavailable("the disk is gone")

    monkeypatch.setattr(healthy, "nodes", nodes)
    found = queue.diagnose()
    assert not found.ok
    assert "the disk is gone" in str(found)


def test_a_file_that_does_not_exist_is_told_and_not_created(database):
    found = Queue(SQLiteRepository(database)).diagnose()
    assert not found.ok
    assert f"There is no file {database}." in str(found)
    assert not database.exists()
