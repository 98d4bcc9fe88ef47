"""``queue.diagnose``: checks that fit every repository."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest

import taskx
from taskx import Check, Diagnosis, Queue, RepositoryUnavailable, SQLiteRepository, Task
from taskx.insight import diagnosis, parked
from taskx.stores.liveness.base import About, Node
from taskx.tasks.clock import to_datetime
from taskx.tasks.findings import fail, ok, warn
from taskx.testing import ManualQueue


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
    clock.set_wall(clock.now() - timedelta(seconds=1))
    assert named(ahead, "clock").sentence == "The newest task was submitted 0 s ago."
    clock.set_wall(clock.now() - timedelta(seconds=89))
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


class TestWaitingTasks:
    """Where tasks wait without a thread, by type, version of the executor and step."""

    @pytest.fixture
    def waiting(self, healthy):
        """A queue with tasks that wait in three steps."""
        queue = ManualQueue(healthy)

        @queue.executor(version=1)
        def refund(ctx, sleep: bool = False):
            if sleep:
                ctx.sleep(timedelta(days=1), step="grace")
            return ctx.ask("approval")

        @queue.executor()
        def ship(ctx):
            return ctx.wait("event/paid")

        for _ in range(2):
            queue.submit("refund", {})
        queue.submit("refund", {"sleep": True})
        queue.submit("ship")
        queue.run_all()
        return queue

    def told(self, queue):
        return [check for check in queue.diagnose().checks if check.name == "waiting tasks"]

    @pytest.mark.every_store
    def test_they_are_listed_by_type_version_and_step(self, waiting):
        found = self.told(waiting)
        assert [check.level for check in found] == ["ok"] * 3
        assert str(found[0]) == (
            "2 tasks of type 'refund', version 1, wait without a thread in approval."
        )
        assert found[0].facts == {
            "type": "refund",
            "version": "1",
            "step": "approval",
            "tasks": 2,
        }
        assert {str(check) for check in found[1:]} == {
            "1 task of type 'refund', version 1, waits without a thread in grace.",
            "1 task of type 'ship', no version, waits without a thread in event/paid.",
        }

    @pytest.mark.parametrize("name", ["pages", "p" * 80])
    def test_tasks_that_wait_for_children_wait_in_their_list(self, healthy, name):
        queue = ManualQueue(healthy)
        queue.declare("page")
        queue.executor("crawl")(lambda ctx: ctx.run_all(name, [Task(type="page")] * 3))
        for number in range(2):
            queue.submit("crawl", id=f"crawl {number} {'x' * len(name)}")
        queue.run_all()
        (only,) = self.told(queue)
        assert (only.facts["step"], only.facts["tasks"]) == (name, 2)

    def test_another_version_of_the_executor_is_a_warning(self, waiting):
        waiting.executor("refund", version=2, replace=True)(lambda ctx: None)
        first = self.told(waiting)[0]
        assert first.level == "warn"
        assert first.advice.startswith("Here the executor has version 2: it goes on with the steps")
        assert waiting.diagnose().ok

    def test_tasks_that_wait_for_parents_or_were_not_started_are_left_out(self, healthy):
        queue = ManualQueue(healthy)
        queue.declare("a")
        parent = queue.submit("a")
        queue.submit("a", depends_on=[parent])
        queue.submit("a", delay=60)
        assert self.told(queue) == []

    def test_most_places_are_told_of_the_most_tasks(self, healthy, monkeypatch):
        monkeypatch.setattr(diagnosis, "_PLACES", 1)
        queue = ManualQueue(healthy)
        queue.executor("ask")(lambda ctx, name: ctx.ask(name))
        for name in ("one", "two", "two"):
            queue.submit("ask", {"name": name})
        queue.run_all()
        (only,) = self.told(queue)
        assert only.facts["step"] == "two"

    def test_only_so_many_tasks_are_looked_at(self, waiting, monkeypatch):
        monkeypatch.setattr(parked, "_MOST", 1)
        monkeypatch.setattr(parked, "_LUMP", 1)
        assert sum(check.facts["tasks"] for check in self.told(waiting)) <= 2
