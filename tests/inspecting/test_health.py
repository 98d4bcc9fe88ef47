"""The health of a queue and its repository: every problem, on every store."""

from __future__ import annotations

import math
import re
import shutil
import sqlite3
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
from helpers import PATIENCE, eventually, node_of, pool_of

import taskx
from taskx import (
    ConfigurationError,
    Health,
    Problem,
    RepositoryUnavailable,
    SQLiteRepository,
    Task,
    TaskStatus,
    every,
)
from taskx.stores.sqlite import schema
from taskx.tasks import lifecycle
from taskx.tasks.findings import ProblemKind
from taskx.tasks.writes import NoteChange, Update


def problems(queue, **thresholds):
    """Check the health; check that this changes nothing, and that the answer is fit to be printed."""
    before = list(queue.repository.batches)
    found = queue.health(**thresholds)
    # Started queues write by themselves.
    if not any(node_of(one) for one in queue.repository.queues):
        assert list(queue.repository.batches) == before
    assert found.ok is bool(found) is (not found.problems)
    for problem in found.problems:
        assert re.fullmatch(r"[A-Z0-9].+\.", str(problem), re.S), problem
    assert taskx.tasks.payload.encode(found.to_dict(), "health")
    return list(found.problems)


def only(queue, kind, **thresholds):
    [problem] = problems(queue, **thresholds)
    assert problem.kind == kind
    return problem


@pytest.fixture
def idle(make_queue, clock):
    """A queue on a clock that the test moves; it is not started, and does not ask for nodes."""
    queue = make_queue(clock=clock)
    queue.declare("t", "u")
    return queue


def test_a_started_queue_without_trouble_is_well(started):
    assert started.health().ok
    assert started.health()
    assert str(started.health()) == "All is well."
    started.submit("fine").result(PATIENCE)
    assert problems(started, failed=(0, 60), nodes={"fine": 1}) == []


# Nodes


def test_a_queue_that_is_not_started_asks_if_anybody_runs_tasks(queue, make_queue):
    problem = only(queue, "nodes")
    assert problem.facts == {"type": None, "nodes": 0, "least": 1}
    assert str(problem) == "0 live nodes run tasks of this repository; at least 1 must."
    assert queue.healthy  # its own part
    make_queue().start()
    assert queue.health()
    assert str(only(queue, "nodes", nodes=2)) == (
        "1 live node runs tasks of this repository; at least 2 must."
    )
    assert queue.health(nodes=0)


def test_tasks_of_a_type_that_no_live_node_runs_are_a_problem(started, queue):
    queue.declare("rare")
    assert queue.health()
    queue.submit("rare")
    problem = only(queue, "nodes")
    assert problem.facts == {"type": "rare", "nodes": 0, "least": 1}
    assert str(problem) == "0 live nodes have an executor for type 'rare'; at least 1 must."
    queue.pause("rare")
    assert queue.health()
    queue.resume("rare")
    assert queue.health(nodes=0)
    assert queue.health(nodes={"rare": 0})


def test_a_type_can_need_several_nodes(started):
    problem = only(started, "nodes", nodes={"fine": 2})
    assert problem.facts == {"type": "fine", "nodes": 1, "least": 2}
    assert str(problem) == "1 live node has an executor for type 'fine'; at least 2 must."


def test_a_dead_node_does_not_count(queue, monkeypatch):
    nodes = [
        taskx.stores.liveness.base.Node(id="d", name="d", types=("t",), alive=False),
        taskx.stores.liveness.base.Node(id="s", name="s", types=("t",), alive=True, stopping=True),
    ]
    monkeypatch.setattr(queue.repository.liveness, "nodes", lambda: nodes)
    assert only(queue, "nodes").facts["nodes"] == 0
    nodes.append(
        taskx.stores.liveness.base.Node(id="u", name="u", types=("t",))
    )  # nothing is known
    assert queue.health(nodes={"t": 1})


def silent(name, at, **more):
    return taskx.stores.liveness.base.Node(id=name, name=name, types=("t",), beat_at=at, **more)


def test_a_node_whose_heartbeat_is_old_does_not_count_and_is_a_problem(idle, clock, monkeypatch):
    now, lease = clock.now_ms(), idle.repository.lease_timeout
    nodes = [silent("a", now - 119_000)]
    monkeypatch.setattr(idle.repository.liveness, "nodes", lambda: nodes)
    problem, other = problems(idle)
    assert problem.kind == "silent_node"
    assert problem.facts == {"nodes": {"a": 119.0}, "number": 1, "lease": lease, "seconds": 119.0}
    assert str(problem) == (
        "Node a may be dead: the last heartbeat was 1 min 59 s ago, and a lease is 30 s. If not, the "
        "clocks of the hosts differ."
    )
    assert (other.kind, other.facts["nodes"]) == ("nodes", 0)
    nodes.append(silent("b", now + 90_000))
    problem, _ = problems(idle)
    assert str(problem).startswith(
        "2 nodes may be dead (a, b): the last heartbeat is 1 min 30 s in the future, "
    )
    assert (problem.facts["number"], problem.facts["seconds"]) == (2, -90.0)
    nodes.append(silent("c", now, alive=True))
    assert only(idle, "silent_node").facts["number"] == 2
    assert problems(idle, nodes=0) == []


# The oldest due task


def test_a_task_that_waits_too_long_is_a_problem(idle, clock):
    handle = idle.submit("t")
    clock.advance(100)
    idle.submit("t")
    clock.advance(200)
    assert problems(idle, nodes=0) == []
    clock.advance(1)
    problem = only(idle, "oldest_due", nodes=0)
    assert problem.facts["task_id"] == handle.id
    assert problem.facts["since"] == handle.task().created_at
    assert (problem.facts["seconds"], problem.facts["most"]) == (301, 300)
    assert str(problem).startswith(f"Task {handle.id} could have started 5 min 1 s ago, at ")
    assert problems(idle, nodes=0, oldest_due=None) == []
    assert problems(idle, nodes=0, oldest_due=timedelta(hours=1)) == []
    assert only(idle, "oldest_due", nodes=0, oldest_due=0.5).facts["most"] == 0.5


def test_how_many_tasks_wait_too_long_is_said(idle, clock):
    first = idle.submit("t")
    idle.submit("t", delay=1)
    idle.submit("u")
    clock.advance(302)
    idle.submit("t")
    problem = only(idle, "oldest_due", nodes=0)
    assert (problem.facts["task_id"], problem.facts["number"]) == (first.id, 3)
    assert str(problem).endswith("; 3 tasks could have started more than 5 min ago.")
    assert not problem.facts["more"]
    idle.submit_many([Task(type="t") for _ in range(1000)])
    assert only(idle, "oldest_due", nodes=0).facts["number"] == 3
    clock.advance(302)
    problem = only(idle, "oldest_due", nodes=0)
    assert problem.facts["more"]
    assert "; at least 100" in str(problem)


def test_a_delayed_task_that_nobody_releases_is_a_problem(idle, clock):
    handle = idle.submit("t", delay=1000)
    clock.advance(1200)
    assert problems(idle, nodes=0) == []
    clock.advance(101)
    problem = only(idle, "oldest_due", nodes=0)
    assert (problem.facts["task_id"], problem.facts["seconds"]) == (handle.id, 301)


def test_tasks_of_paused_types_may_wait(idle, clock):
    idle.submit("t")
    clock.advance(500)
    later = idle.submit("u")
    idle.submit("t", delay=50)
    idle.pause("t")
    clock.advance(400)
    problem = only(idle, "oldest_due", nodes=0)
    assert (problem.facts["task_id"], problem.facts["number"]) == (later.id, 1)
    idle.pause()
    assert problems(idle, nodes=0) == []


def test_tasks_that_wait_for_others_do_not_count(idle, clock):
    first = idle.submit("t", concurrency_key="k", delay=5000)
    idle.submit("t", concurrency_key="k")
    idle.submit("t", depends_on=[first.id])
    clock.advance(4000)
    assert [problem.kind for problem in problems(idle, nodes=0)] == []


# Failures


def fail(queue, handle=None):
    """Store a task, a new one by default, as failed now."""
    task = (handle or queue.submit("t")).task()
    task.starts, task.status = 1, TaskStatus.RUNNING
    start = lifecycle.start(queue.get_task_status(task.id), 0, "n")
    ending = lifecycle.Ending(returned=False, error="broken", permanent=True)
    ends = lifecycle.conclude(task, ending, queue.clock.now_ms())
    assert any(queue.repository.apply([start, *ends])[1:])


def test_many_failures_in_a_short_time_are_a_problem(idle, clock):
    fail(idle)
    clock.advance(50)
    fail(idle)
    fail(idle, idle.submit("u"))
    wanted = {"nodes": 0, "oldest_due": None}
    assert problems(idle, **wanted) == []  # not checked
    assert problems(idle, failed=(3, 60), **wanted) == []
    problem = only(idle, "failed", failed=(2, 60), **wanted)
    assert problem.facts == {
        "failed": 3,
        "types": {"t": 2, "u": 1},
        "more": False,
        "most": 2,
        "seconds": 60,
    }
    assert str(problem) == ("3 tasks failed in the last 1 min (2 of t, 1 of u), more than 2.")
    clock.advance(20)
    assert problems(idle, failed=(2, 60), **wanted) == []
    assert only(idle, "failed", failed=(1, timedelta(minutes=1)), **wanted).facts["failed"] == 2


def test_a_failure_counts_by_the_end_of_the_task(idle, clock):
    late = idle.submit("t")
    fail(idle)
    clock.advance(1000)
    fail(idle, late)
    [problem] = problems(idle, failed=(0, 10), nodes=0)
    assert problem.facts["failed"] == 1


@pytest.mark.timing(most_explained=2)
def test_only_the_newest_failures_are_read(idle):
    for _ in range(4):
        fail(idle)
    problem = only(idle, "failed", failed=(1, 60), nodes=0)
    assert (problem.facts["failed"], problem.facts["more"]) == (2, True)
    assert str(problem) == "At least 2 tasks failed in the last 1 min (2 of t), more than 1."
    assert only(idle, "failed", failed=(3, 60), nodes=0).facts["failed"] == 4


def test_a_failed_task_whose_thread_runs_on_is_a_failure(make_queue, gate, clock):
    queue = make_queue(worker_num=1, clock=clock)
    queue.executor("hang", timeout=60, grace=0.0)(gate)
    queue.start()
    handle = queue.submit("hang")
    gate.wait_for()
    clock.advance(60)
    eventually(lambda: handle.task().status == "failed")
    assert handle.task().stuck_on
    assert only(queue, "failed", failed=(0, 3600), stuck=1).facts["types"] == {"hang": 1}


# Stuck threads


def test_a_task_that_snoozes_again_and_again_is_a_problem(queue):
    """Only the tasks that are due next are looked at, and a task that snoozes is soon among them."""
    queue.declare("t")
    for snoozes in (1000, 1001):
        queue.submit("t", id=f"task {snoozes}", delay=3600)
        queue.repository.apply([Update(f"task {snoozes}", {}, {"snoozes": snoozes})])
    [problem] = queue.health(nodes=0).problems
    assert problem.kind == "snoozes"
    assert str(problem) == (
        "Task task 1001 of type 't' has asked 1001 times to run later: max_snoozes would end this."
    )


def test_stuck_threads_are_a_problem_for_every_queue_that_asks(make_queue, gate, clock):
    queue = make_queue(worker_num=1, max_stuck=1, clock=clock)
    other = make_queue(max_stuck=1, clock=clock)
    queue.executor("hang", timeout=60, grace=0.0)(gate)
    queue.start()
    for number in (1, 2):
        assert queue.healthy
        handle = queue.submit("hang")
        gate.wait_for()
        clock.advance(60)
        eventually(lambda: handle.task().stuck_on)  # noqa: B023
        assert len(pool_of(queue).stuck.runs) == number
    assert (queue.healthy, other.healthy) == (False, True)
    for one in (queue, other):
        problem = only(one, "stuck")
        node = node_of(queue).record
        assert problem.facts == {"node": node.id, "name": node.name, "threads": 2, "most": 1}
        assert str(problem) == (
            f"On node {node.name}, 2 threads of timed-out tasks run on, more than 1."
        )
        assert problems(one, stuck=2) == []


# Types of which all waiting tasks wait for stuck threads


@pytest.fixture
def stuck(make_queue, gate, clock):
    """Return a function that makes a started queue with stuck tasks of a type ``hang``."""

    def stuck(tasks, **options):
        queue = make_queue(worker_num=2, clock=clock)
        queue.executor("hang", timeout=60, grace=0.0, **{"max_attempts": 2, **options})(gate)
        queue.start()
        for _ in range(tasks):
            handle = queue.submit("hang")
            gate.wait_for()
            clock.advance(60)
            eventually(lambda: handle.task().stuck_on)  # noqa: B023
        return queue

    return stuck


@pytest.mark.every_store
def test_a_type_whose_waiting_tasks_all_wait_for_stuck_threads_is_a_problem(
    stuck, make_queue, gate
):
    queue = stuck(2)
    first, second = queue.list_tasks(type="hang").tasks
    for one in (queue, make_queue(clock=queue.clock)):
        problem = only(one, "stuck_type")
        node = node_of(queue).record
        assert problem.facts == {
            "type": "hang",
            "waiting": 2,
            "threads": 2,
            "nodes": {node.id: node.name},
            "task_id": min(first.id, second.id),
        }
        assert str(problem) == (
            "2 tasks of type 'hang' cannot start, and none runs: all wait for 2 stuck threads on "
            f"{node.name}."
        )
    queue.pause("hang")
    assert queue.health()
    queue.resume("hang")
    gate.open()
    for task in (first, second):
        queue.handle(task.id).result(PATIENCE)
    assert problems(queue) == []


def test_a_type_of_which_a_task_runs_or_may_start_is_no_problem(stuck, gate):
    queue = stuck(1)
    handle = queue.submit("hang")
    gate.wait_for()
    assert problems(queue) == []
    assert handle.task().status == "running"
    queue.executor("other")(gate)
    queue.submit("other")
    gate.wait_for()  # both workers are busy
    queue.clock.advance(60)
    eventually(lambda: handle.task().stuck_on)
    for _ in range(2):
        queue.submit("other")
    gate.wait_for()
    waits = queue.submit("hang")
    assert problems(queue) == []
    assert waits.cancel()
    assert only(queue, "stuck_type").facts["waiting"] == 2


@pytest.mark.parametrize("scope", ["node", "global"])
def test_tasks_that_wait_for_the_slot_of_a_stuck_thread_count(stuck, scope):
    queue = stuck(1, max_concurrency=1, limit_scope=scope, max_attempts=1)
    assert problems(queue) == []  # the task has failed, and no other one waits
    for _ in range(3):
        queue.submit("hang")
    problem = only(queue, "stuck_type")
    assert (problem.facts["waiting"], problem.facts["threads"]) == (3, 1)
    assert problem.facts["task_id"] is None


def test_a_free_slot_beside_a_stuck_thread_is_no_problem(stuck, gate):
    queue = stuck(1, max_concurrency=2)
    queue.executor("other")(gate)
    for _ in range(2):
        queue.submit("other")
    gate.wait_for(2)
    queue.submit("hang")
    assert problems(queue) == []


def test_a_cancelled_task_does_not_wait_for_its_stuck_thread(stuck):
    queue = stuck(1)
    [task] = queue.list_tasks(type="hang").tasks
    assert queue.cancel_task(task.id)
    assert queue.get_task_status(task.id).stuck_on
    assert problems(queue) == []


# Schedules


def test_a_schedule_whose_tick_is_late_is_a_problem(idle, clock):
    idle.schedule("often", every(100), "t").store()
    idle.schedule("paused", every(100), "t").pause()
    idle.schedule("rarely", every(10**6), "t").store()
    clock.advance(160)
    assert problems(idle, nodes=0) == []
    clock.advance(1)
    problem = only(idle, "schedule_overdue", nodes=0)
    due = idle.schedules()["often"].next_tick
    late = {"since": due, "seconds": 61}
    assert problem.facts == {"schedules": {"often": due}, "number": 1, "most": 60, **late}
    assert str(problem) == (
        f"1 schedule is overdue (often): the oldest tick without a task was at "
        f"{due:%Y-%m-%d %H:%M:%S} UTC."
    )
    assert problems(idle, nodes=0, schedule_overdue=None) == []
    assert problems(idle, nodes=0, schedule_overdue=timedelta(minutes=2)) == []


@pytest.mark.timing(scan_batch=2)
def test_all_schedules_are_read_a_page_at_a_time(idle, clock):
    for name in "abcde":
        idle.schedule(name, every(10), "t").store()
    clock.advance(100)
    problem = only(idle, "schedule_overdue", nodes=0)
    assert sorted(problem.facts["schedules"]) == [*"abcde"]
    assert str(problem).startswith("5 schedules are overdue (a, b, c and 2 more): ")


def test_a_schedule_that_cannot_be_read_is_a_problem(idle):
    idle.repository.put_notes([NoteChange("schedule/odd", "no JSON", 0)])
    problem = only(idle, "schedule_damaged", nodes=0)
    assert "damaged" in problem.facts["schedules"]["odd"]
    assert str(problem) == "1 schedule cannot be read (odd)."


# The repository


def test_a_repository_that_is_away_is_a_problem(queue, monkeypatch):
    def fails(*args):
        raise RepositoryUnavailable("down for a while")

    monkeypatch.setattr(queue.repository, "notes", fails)
    problem = only(queue, "repository")
    assert problem.facts == {"error": "down for a while", "error_type": "RepositoryUnavailable"}
    assert str(problem) == "The repository cannot be used: down for a while."


@pytest.mark.parametrize("repository", ["sqlite"], indirect=True)
@pytest.mark.parametrize("is_started", [True, False])
class TestFile:
    @pytest.fixture
    def one(self, queue, is_started):
        queue.executor("t")(lambda: None)
        if is_started:
            queue.start()
        else:
            assert queue.health(nodes=0)  # opens the file
        return queue

    def test_a_lost_file_is_a_problem(self, one, database):
        kept = database.with_name("kept.db")
        database.rename(kept)
        assert "was moved or deleted" in str(only(one, "repository", nodes=0))
        assert not one.healthy
        database.touch()
        assert "was replaced by another file" in str(only(one, "repository", nodes=0))
        kept.rename(database)
        assert one.health(nodes=0)
        assert one.healthy

    def test_a_newer_schema_is_a_problem(self, one, database):
        with closing(sqlite3.connect(database)) as connection:
            connection.execute("ALTER TABLE tasks ADD COLUMN mood TEXT")
            connection.execute(f"PRAGMA user_version = {schema.VERSION + 1}")
        problem = only(one, "repository", nodes=0)
        assert problem.facts["error_type"] == "SchemaMismatch"
        assert not one.healthy

    def test_a_disk_that_is_nearly_full_is_a_problem(self, one, monkeypatch):
        """Tasks can still be read, and a new process would do no better."""
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
        problem = only(one, "disk", nodes=0)
        assert str(problem).startswith("1.0 MiB are free on the disk of ")
        assert problem.facts == {"free": 1 << 20}
        assert one.healthy

    def test_a_large_file_is_a_problem(self, one, database):
        problem = only(one, "file_size", file_size=1000, nodes=0)
        assert problem.facts["most"] == 1000
        assert problem.facts["bytes"] >= database.stat().st_size
        assert str(problem).endswith(" bytes, more than 1,000.")
        assert one.health(file_size=10**9, nodes=0)


def test_a_missing_file_that_must_not_be_created_is_a_problem(make_queue, tmp_path):
    queue = make_queue(SQLiteRepository(tmp_path / "none.db", create=False))
    [problem] = queue.health().problems
    assert (problem.kind, problem.facts["error_type"]) == ("repository", "RepositoryUnavailable")
    assert "there is no file" in str(problem)
    assert list(tmp_path.iterdir()) == []


def test_a_repository_without_a_file_has_no_size(queue):
    if queue.repository.house.file_sizes():
        assert queue.health(file_size=1 << 40, nodes=0)
        return
    with pytest.raises(ConfigurationError, match="file_size requires a repository in a file"):
        queue.health(file_size=1)


# Arguments


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"oldest_due": -1}, "oldest_due must be"),
        ({"oldest_due": "5"}, "oldest_due: '5' has no unit"),
        ({"failed": 5}, r"failed must be a pair \(count, seconds\)"),
        ({"failed": (1, -1)}, "the time of failed must be"),
        ({"failed": (0.5, 60)}, "the count of failed must be"),
        ({"nodes": -1}, "nodes must be"),
        ({"nodes": {"t": -1}}, "nodes of 't' must be"),
        ({"nodes": {"": 1}}, "a type in nodes must not be empty"),
        ({"stuck": True}, "stuck must be"),
        ({"file_size": 0.5}, "file_size must be"),
        ({"schedule_overdue": math.nan}, "schedule_overdue must be"),
    ],
)
def test_wrong_thresholds_are_refused(wrong, words):
    queue = taskx.Queue(taskx.MemoryRepository())
    with pytest.raises(ConfigurationError, match=words):
        queue.health(**wrong)


def test_several_problems_are_listed_together(idle, clock):
    idle.submit("t")
    idle.schedule("often", every(100), "t").store()
    clock.advance(1000)
    found = problems(idle)
    assert [problem.kind for problem in found] == ["nodes", "oldest_due", "schedule_overdue"]
    assert str(idle.health()) == " ".join(map(str, found))
    assert idle.health().checked_at.timestamp() * 1000 == clock.now_ms()


# Documentation


def test_every_kind_is_in_the_table_of_the_page():
    page = Path(__file__).parent.parent.parent / "docs" / "health.rst"
    listed = re.findall(r"^``(\w+)``  ", page.read_text(), re.M)
    assert set(get_args(ProblemKind)) <= set(listed)


def test_the_records_are_plain():
    problem = Problem("nodes", "Nobody is here.", {"type": None})
    found = Health((problem,), taskx.tasks.clock.to_datetime(0))
    assert found.to_dict() == {
        "ok": False,
        "problems": [{"kind": "nodes", "sentence": "Nobody is here.", "facts": {"type": None}}],
        "checked_at": "1970-01-01T00:00:00+00:00",
    }
