"""Questions about repositories of users: of eight methods, and of primitives."""

from __future__ import annotations

import pytest
from helpers import PATIENCE, eventually
from storage.repositories import TinyRepository

from taskx import ConfigurationError, TaskNotFound, every
from taskx.repository.example import ExampleRepository


@pytest.fixture
def queue(make_queue):
    return make_queue(TinyRepository(), worker_num=1)


def kinds(queue, handle):
    return [reason.kind for reason in queue.why(handle.id)]


def test_the_reasons_of_one_process(queue, gate):
    @queue.executor("hold")
    def hold():
        gate()

    later = queue.submit("hold", delay=3600)
    assert kinds(queue, later) == ["due", "no_node"]
    queue.start()
    runs = queue.submit("hold")
    gate.wait_for(1)
    waits, last = queue.submit("hold"), queue.submit("hold")
    [reason] = queue.why(runs.id)
    assert reason.kind == "running"
    assert "in hold" in reason.facts["stack"]
    assert kinds(queue, waits) == ["worker"]
    assert kinds(queue, last) == ["ahead", "worker"]
    gate.open()
    last.result(PATIENCE)
    assert kinds(queue, last) == ["completed"]
    with pytest.raises(TaskNotFound):
        queue.why("unknown")


def test_a_task_left_behind_by_another_process_is_taken_back_at_the_start(queue):
    queue.declare("t")
    handle = queue.submit("t")
    task = handle.task()
    task.status = "running"
    queue.repository.inner.update(task)
    assert kinds(queue, handle)[-1] == "running"


def test_a_repository_that_fails_is_a_reason_and_a_problem(queue, monkeypatch):
    queue.declare("t")
    handle = queue.submit("t")

    def fails(*args):
        raise OSError("the disk is away")

    monkeypatch.setattr(queue.repository.inner, "get_by_id", fails)
    monkeypatch.setattr(queue.repository.inner, "list", fails)
    [reason] = queue.why(handle.id)
    assert (reason.kind, reason.facts["error_type"]) == ("repository", "RepositoryUnavailable")
    first, *_ = queue.health(failed=(0, 60)).problems
    assert first.kind == "repository"


def test_the_health_of_one_process(queue):
    @queue.executor("breaks")
    def breaks():
        raise ValueError

    assert [problem.kind for problem in queue.health().problems] == ["nodes"]
    queue.start()
    assert queue.health()
    handle = queue.submit("breaks")
    eventually(lambda: handle.task().status.finished)
    assert queue.health()
    [problem] = queue.health(failed=(0, 60)).problems
    assert (problem.kind, problem.facts["types"]) == ("failed", {"breaks": 1})
    with pytest.raises(ConfigurationError, match="file_size requires a repository in a file"):
        queue.health(file_size=1)


def test_the_statistics_and_failures_of_one_process(queue, gate):
    @queue.executor("hold")
    def hold():
        gate()
        raise ValueError

    queue.submit("hold", delay=3600)
    queue.start()
    first, second = queue.submit("hold"), queue.submit("hold")
    gate.wait_for(1)
    found = queue.stats().types["hold"]
    assert (found.waiting, found.delayed, found.running, found.failed) == (1, 1, 1, 0)
    gate.open()
    for handle in (first, second):
        eventually(lambda handle=handle: handle.task().status.finished)
    found = eventually(lambda: (f := queue.stats()).types["hold"].failed == 2 and f)
    assert (found.types["hold"].error_share, found.complete) == (1.0, True)
    assert sum(queue.history().failed) == 2
    [group] = queue.failures()
    assert (group.error_type, group.place.function) == ("ValueError", "hold")
    assert {*group.task_ids} == {first.id, second.id}


# Primitives


def test_a_repository_of_primitives_answers_everything_that_ours_answer(make_queue, tmp_path, gate):
    with ExampleRepository(tmp_path / "example.db") as repository:
        queue = make_queue(repository, worker_num=1)
        queue.executor("hold", max_concurrency=1, limit_scope="global")(gate)
        queue.declare("rare")
        rare = queue.submit("rare")
        child = queue.submit("hold", depends_on=[rare.id])
        queue.start()
        holder = queue.submit("hold")
        gate.wait_for(1)
        waits = queue.submit("hold", concurrency_key="k")
        behind = queue.submit("hold", concurrency_key="k")
        asked = {one: kinds(queue, one) for one in (rare, child, holder, waits, behind)}
        assert [*asked.values()] == [["no_node"], ["parents"], ["running"], ["slot"], ["turn"]]
        queue.schedule("often", every(3600), "hold")
        assert [problem.facts["type"] for problem in queue.health().problems] == ["rare"]
        assert queue.health(nodes={"rare": 0}, failed=(0, 60))
        gate.open()
        queue.stop(PATIENCE)


def test_statistics_and_failures_are_read_by_primitives(make_queue, tmp_path):
    with ExampleRepository(tmp_path / "example.db") as repository:
        queue = make_queue(repository, worker_num=1)
        queue.declare("rare")

        @queue.executor("breaks")
        def breaks():
            raise ValueError

        for delay in (None, 3600):
            queue.submit("rare", delay=delay)
        queue.submit("breaks")
        queue.start()
        assert eventually(queue.failures)
        found = eventually(lambda: (f := queue.stats()).types["breaks"].failed and f)
        rare, broken = found.types["rare"], found.types["breaks"]
        assert (rare.waiting, rare.delayed, broken.failed, found.complete) == (1, 1, 1, True)
        assert broken.run_time is not None
        [group] = queue.failures()
        assert (group.type, group.place.function, group.count) == ("breaks", "breaks", 1)
        queue.stop(PATIENCE)


def test_a_group_of_failures_is_requeued(queue):
    """The repository may not keep tracebacks, so that it is the tasks that were read."""
    queue.mended = False

    @queue.executor("t")
    def work():
        assert queue.mended

    queue.start()
    for _ in range(3):
        queue.submit("t")
    assert queue.drain(PATIENCE)
    queue.mended = True
    [group] = queue.failures(at_most=2)
    assert queue.requeue_failures(group, dry_run=True).matched == 2
    assert queue.requeue_failures(group).changed == 2
    assert queue.drain(PATIENCE)
    assert queue.count_tasks(status="failed") == 1
