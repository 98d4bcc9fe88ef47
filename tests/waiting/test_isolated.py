"""Executors in child processes wait without a thread and without a process."""

from __future__ import annotations

import pytest
from helpers import PATIENCE, eventually, pool_of

from taskx import Task, TaskFailed, chain
from taskx.tasks import lifecycle

from . import isolated

pytestmark = pytest.mark.process


@pytest.fixture
def queue(make_queue):
    queue = make_queue(worker_num=1)
    for name in (
        "ask",
        "refused",
        "late",
        "nap",
        "look",
        "pay",
        "double",
        "family",
        "misfit",
        "careful",
        "split",
    ):
        function = getattr(isolated, name)
        queue.executor(isolation="process")(function)
    queue.start()
    return queue


def waits_for(queue, task_id, awaited=None):
    def done():
        [(waiting_on,)] = queue.repository.find("id", [task_id], ("waiting_on",))
        parked = lifecycle.is_parked(queue.get_task_status(task_id))
        return parked and waiting_on == awaited and not pool_of(queue).runs

    eventually(done)


@pytest.mark.parametrize("swallow", [False, True])
def test_asks(queue, swallow):
    handle = queue.submit("ask", {"swallow": swallow})
    waits_for(queue, handle.id, f"{handle.id}/one")
    [asked] = queue.list_tasks(type="answer", tag="finance").tasks
    assert asked.params == {"question": {"n": 1}}
    queue.finish(asked.id, 1)
    waits_for(queue, handle.id, f"{handle.id}/two")
    queue.finish(f"{handle.id}/two", {"b": 2})
    assert handle.result(PATIENCE) == [1, {"b": 2}]
    assert handle.task().checkpoints == {"steps": {"draft": "draft", "one": 1, "two": {"b": 2}}}
    assert len(handle.task().attempts) == 1


@pytest.mark.parametrize(
    ("what", "problem"),
    [
        ("timeout", "cannot be used inside ctx.timeout()"),
        ("missing", "TaskNotFound: no task with id 'nothing'"),
        ("question", "PayloadError: question"),
        ("name", "choose a shorter name"),
    ],
)
def test_is_refused(queue, what, problem):
    with pytest.raises(TaskFailed) as failed:
        queue.submit("refused", {"what": what}).result(PATIENCE)
    assert problem in failed.value.error


def test_gets_no_answer_in_time(queue):
    assert queue.submit("late").result(PATIENCE) == "nobody"


def test_sleeps_and_waits(queue):
    handle = queue.submit("nap")
    waits_for(queue, handle.id)
    assert queue.wake(handle.id)
    waits_for(queue, handle.id, "event/x")
    queue.finish("event/x", "there")
    assert handle.result(PATIENCE) == "there"


def test_polls(queue):
    handle = queue.submit("look")
    waits_for(queue, handle.id)
    assert queue.wake(handle.id)
    eventually(lambda: handle.task().starts == 2)
    waits_for(queue, handle.id)


def test_does_something_once(queue, tmp_path):
    log = tmp_path / "log"
    handle = queue.submit("pay", {"log": str(log)})
    for calls in (1, 2):
        eventually(lambda dots="." * calls: log.exists() and log.read_text() == dots)
        waits_for(queue, handle.id, f"{handle.id}/pay")
        queue.finish(f"{handle.id}/pay", again=True)
    assert handle.result(PATIENCE) == ["receipt", f"{handle.id}/pay"]


def test_gets_the_result_of_the_step_before(queue):
    flow = queue.submit_flow(chain(*(Task(type="double") for _ in range(3))))
    assert flow.result(PATIENCE) == 8


def test_has_children(queue):
    handle = queue.submit("family", {"numbers": [1, 2]})
    assert handle.result(PATIENCE) == ["2", "4"]
    assert handle.task().starts == 2


def test_needs_some_of_its_children(queue):
    queue.pause("double")
    handle = queue.submit("family", {"numbers": [1, 2], "needed": 1})
    waits_for(queue, handle.id, f"{handle.id}/two/all")
    queue.cancel_task(f"{handle.id}/two/0")
    queue.resume("double")
    assert handle.result(PATIENCE) == [f"task {handle.id}/two/0 was cancelled", "4"]


def test_has_children_that_are_refused(queue):
    with pytest.raises(TaskFailed, match="no executor is registered for type 'nothing'"):
        queue.submit("misfit").result(PATIENCE)


def test_an_error_of_its_children_can_be_caught(queue):
    taken = queue.submit("double", unique_key="taken", delay=3600)
    unknown, duplicate = queue.submit("careful").result(PATIENCE)
    assert unknown[0] == "UnknownTaskType"
    assert "no executor is registered for type 'nothing'" in unknown[1]
    assert duplicate[0] == "DuplicateTask"
    assert taken.id in duplicate[1]


def test_forks(queue):
    flow = queue.submit_flow(
        chain(Task(type="split"), Task(type="double", on_parent_failure="run"))
    )
    forked = f"{flow.ids[0]}/two/0"
    assert queue.handle(flow.ids[0]).result(PATIENCE) == [forked]
    assert queue.handle(forked).result(PATIENCE) == 2
    assert flow.result(PATIENCE) == [[forked], 2] * 2
