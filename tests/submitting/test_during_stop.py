"""Executors that still run while their queue stops: what they submit is kept for other nodes."""

from __future__ import annotations

import threading
from concurrent.futures import TimeoutError
from contextlib import suppress

import pytest
from helpers import PATIENCE, eventually, node_of, pool_of, run_in_thread

from taskx import QueueStopped, Task, TaskExecutor, TaskStatus, chain, every

OVERFLOWS = ["reject", "block", "spill", "caller_runs"]


def _map(queue):
    with suppress(TimeoutError):
        next(queue.map("later", [{"n": 1}], timeout=0))


#: The ways to give a queue a task of type ``later``.
WAYS = {
    "submit": lambda queue: queue.submit("later"),
    "own id": lambda queue: queue.submit("later", id="mine"),
    "executor": lambda queue: queue.later.submit(),
    "priority": lambda queue: queue.later.using(priority=5).submit(n=2),
    "unique key": lambda queue: queue.submit("later", unique_key="k", on_conflict="return"),
    "replace": lambda queue: [
        queue.submit("later", {"n": n}, unique_key="k", on_conflict="replace") for n in (1, 2)
    ],
    "concurrency key": lambda queue: queue.submit("later", concurrency_key="k"),
    "parent that runs": lambda queue: queue.submit("later", depends_on=["holds"]),
    "many": lambda queue: queue.submit_many([Task(type="later"), Task(type="later")]),
    "flow": lambda queue: queue.submit_flow(chain(Task(type="later"), Task(type="later"))),
    "map": _map,
    "schedule": lambda queue: queue.schedules()["hourly"].trigger(),
    "requeue": lambda queue: queue.requeue("cancelled"),
    "requeue many": lambda queue: queue.requeue_many(["cancelled"]),
}


@pytest.fixture
def stopping(make_queue, gate):
    """Return a function that stops a queue while its executor ``hold`` waits, and then acts in it."""

    def act(action, **config):
        queue = make_queue(worker_num=1, **config)
        queue.executor("hold")(lambda: [gate(), action(queue)][0])
        queue.later = queue.executor("later")(lambda n=0: n)
        queue.start()
        queue.schedule("hourly", every(3600), "later")
        queue.submit("later", id="cancelled", delay=3600)
        queue.cancel_task("cancelled")
        held = queue.submit("hold", id="holds")
        gate.wait_for(1)
        stop = run_in_thread(lambda: queue.stop(PATIENCE))
        eventually(lambda: pool_of(queue).buffer.closed)
        gate.open()
        assert stop() == []
        assert held.task().status is TaskStatus.COMPLETED, held.task().error
        return queue

    return act


@pytest.mark.every_store
@pytest.mark.parametrize(
    ("way", "overflow"),
    [(way, "reject") for way in WAYS]
    + [(way, overflow) for way in ("submit", "many") for overflow in OVERFLOWS[1:]],
)
def test_an_executor_submits_during_the_stop(stopping, make_queue, way, overflow):
    queue = stopping(WAYS[way], overflow=overflow, buffer_size=1)
    left = [*queue.iter_tasks(type="later", status="pending")]
    assert left
    assert {task.owner for task in left} == {""}
    other = make_queue()
    other.executor("later")(lambda n=0: n)
    with other:
        for task in left:
            other.handle(task.id).result(PATIENCE)


def test_the_stop_counts_what_was_submitted_meanwhile(stopping, caplog):
    stopping(lambda queue: queue.submit_many([Task(type="later"), Task(type="later")]))
    assert "stopped with 2 task(s) left pending" in caplog.text


def test_a_task_executor_of_the_classic_form_submits_during_the_stop(make_queue, gate):
    queue = make_queue(worker_num=1)
    queue.declare("later")

    class Hold(TaskExecutor):
        type = "hold"

        def execute(self, ctx, task):
            gate()
            queue.submit("later", id="next")

    queue.register_executor(Hold())
    queue.start()
    queue.submit("hold")
    gate.wait_for(1)
    stop = run_in_thread(lambda: queue.stop(PATIENCE))
    eventually(lambda: pool_of(queue).buffer.closed)
    gate.open()
    assert stop() == []
    assert queue.get_task_status("next").status is TaskStatus.PENDING


def test_an_executor_that_outlives_the_stop_submits_until_it_returns(make_queue, gate):
    queue = make_queue(worker_num=1)
    queue.executor("hold")(lambda: [gate(), queue.submit("later", id="next")][0])
    queue.declare("later")
    queue.start()
    held = queue.submit("hold")
    gate.wait_for(1)
    assert queue.stop(0) == [held.id]
    with pytest.raises(QueueStopped):  # this thread is in no executor
        queue.submit("later")
    gate.open()
    assert held.result(PATIENCE) is None
    assert queue.get_task_status("next").status is TaskStatus.PENDING
    assert node_of(queue)._left.wait(PATIENCE)


def test_an_executor_whose_token_has_fired_may_still_submit(make_queue):
    queue = make_queue(worker_num=1)
    queue.declare("later")
    begun = threading.Event()

    @queue.executor()
    def hold(ctx):
        begun.set()
        ctx.token.wait(PATIENCE)
        queue.submit("later", id="next")

    queue.start()
    held = hold.submit()
    assert begun.wait(PATIENCE)
    assert queue.stop(PATIENCE, cancel=True) == []
    assert held.task().status is TaskStatus.COMPLETED
    assert queue.get_task_status("next").status is TaskStatus.PENDING


def test_an_executor_that_has_stopped_its_queue_may_still_submit(make_queue):
    queue = make_queue(worker_num=1)
    queue.declare("later")
    queue.executor("last")(lambda: [queue.stop(PATIENCE), queue.submit("later", id="next").id][1])
    queue.start()
    assert queue.submit("last").result(PATIENCE) == "next"


def test_a_thread_that_an_executor_has_started_is_refused_during_the_stop(stopping):
    refused = []

    def act(queue):
        with pytest.raises(QueueStopped):
            run_in_thread(lambda: queue.submit("later"))()
        refused.append(True)

    queue = stopping(act)
    assert refused
    assert not [*queue.iter_tasks(type="later", status="pending")]


def test_a_queue_that_has_ended_refuses_the_executors_of_others(make_queue):
    ended, other = make_queue(), make_queue()
    ended.executor("fine")(lambda: None)
    with ended:
        pass
    assert node_of(ended)._left.wait(PATIENCE)
    other.executor("hold", max_attempts=1)(lambda: ended.submit("fine").id)
    other.start()
    handle = other.submit("hold")
    assert isinstance(handle.exception(PATIENCE), Exception)
    assert handle.task().error.startswith("QueueStopped")
