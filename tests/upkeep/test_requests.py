"""Requests to nodes: their stacks, and their stop."""

from __future__ import annotations

import json
import signal
import threading
import time

import pytest
from helpers import PATIENCE, eventually, node_of, parts_of
from storage.repositories import TinyRepository

from taskx import ConfigurationError, NodeNotFound, Queue
from taskx.node import threads
from taskx.queue.foreground import Signals
from taskx.stores.controls import REQUEST
from taskx.tasks.timing import DEFAULT_TIMING

ANSWER = "answer/"


def id_of(queue):
    return node_of(queue).record.id


@pytest.fixture
def elsewhere(monkeypatch):
    """Ask nodes through the repository, as if they were in other processes."""
    monkeypatch.setattr("taskx.stores.liveness.base.Liveness.has", lambda self, node: False)


@pytest.fixture
def holding(make_queue, gate):
    """A started queue with one worker whose task waits at the gate."""
    queue = make_queue(worker_num=1)

    @queue.executor("hold")
    def hold():
        gate()

    queue.start()
    queue.handle_of_hold = queue.submit("hold")
    gate.wait_for(1)
    return queue


def check_stacks(stacks, handle):
    first = stacks[0]
    assert (first.thread, first.task_id, first.type) == ("taskx-worker-1", handle.id, "hold")
    assert first.since == handle.task().started_at
    assert "in hold" in first.stack
    assert "taskx/attempt/runner.py" not in first.stack
    others = {one.thread: one for one in stacks[1:]}
    assert {one.task_id for one in others.values()} == {""}
    assert "taskx/node/housekeeper.py" in others["taskx-housekeeper"].stack
    assert "MainThread" in others


def test_the_threads_of_this_process_tell_what_they_do(holding):
    check_stacks(holding.stacks(), holding.handle_of_hold)
    check_stacks(holding.stacks(id_of(holding)), holding.handle_of_hold)


@pytest.mark.usefixtures("elsewhere")
def test_a_node_answers_with_its_stacks_and_nothing_is_left(holding, make_queue, repository):
    asking = make_queue()
    check_stacks(asking.stacks(id_of(holding), timeout=PATIENCE), holding.handle_of_hold)
    eventually(lambda: not {**repository.notes(REQUEST), **repository.notes(ANSWER)})


def test_a_queue_that_is_not_started_shows_its_process(queue):
    stacks = queue.stacks()
    assert "MainThread" in {one.thread for one in stacks}
    json.dumps([one.to_dict() for one in stacks])


def test_long_stacks_and_many_threads_are_cut(queue, monkeypatch):
    monkeypatch.setattr(threads, "MOST_THREADS", 2)
    monkeypatch.setattr(threads, "MOST_TEXT", 300)
    over, there = threading.Event(), threading.Barrier(4)

    def deep(depth):
        if depth:
            return deep(depth - 1)
        there.wait(PATIENCE)
        return over.wait(PATIENCE)

    made = [threading.Thread(target=deep, args=(200,), name=f"AA-{n}") for n in range(3)]
    for thread in made:
        thread.start()
    there.wait(PATIENCE)
    stacks = queue.stacks()
    over.set()
    for thread in made:
        thread.join()
    assert [one.thread for one in stacks] == ["AA-0", "AA-1"]
    assert all(len(one.stack) < 310 and "…" in one.stack for one in stacks)


@pytest.mark.usefixtures("elsewhere")
def test_a_node_that_does_not_answer_is_a_time_out(queue, started, repository, monkeypatch):
    monkeypatch.setattr("taskx.node.requests.obey", lambda pool: None)
    with pytest.raises(TimeoutError, match="has not answered within 0 s"):
        queue.stacks(id_of(started), timeout=0)
    assert repository.notes(REQUEST) == {}


def test_an_unknown_node_is_not_asked(started, repository):
    for call in (started.stacks, started.stop_node):
        with pytest.raises(NodeNotFound, match="no live node with id 'gone'"):
            call("gone")
    assert repository.notes(REQUEST) == {}


def test_a_node_that_is_asked_to_stop_lets_its_task_end(holding, make_queue, gate, caplog):
    caplog.set_level("INFO")
    other = make_queue()
    other.stop_node(id_of(holding))
    eventually(lambda: holding.stopped)
    assert "another process asks this queue to stop" in caplog.text
    gate.open()
    eventually(lambda: other.nodes() == [])
    assert holding.handle_of_hold.task().status == "completed"


def test_a_request_to_one_node_leaves_the_others_alone(make_queue):
    first, second = make_queue(), make_queue()
    for queue in (first, second):
        queue.executor("fine")(lambda: "fine")
        queue.start()
    first.stop_node(id_of(second))
    eventually(lambda: second.stopped)
    assert first.submit("fine").result(PATIENCE) == "fine"


def test_what_was_left_behind_is_removed_by_a_later_request(started, repository):
    old = int((time.time() - DEFAULT_TIMING.forget_requests_after - 5) * 1000)
    old_id = f"{old >> 16:08x}-{old & 0xFFFF:04x}-7000-8000-000000000000"
    for name in (f"{REQUEST}dead/{old_id}", f"{ANSWER}{old_id}", f"{ANSWER}damaged"):
        repository.put_note(name, "stacks", 0)
    parts_of(started).controls.request("other", "stacks")
    started.stop_node(id_of(started))
    left = {**repository.notes(REQUEST), **repository.notes(ANSWER)}
    assert {name.removeprefix(REQUEST).partition("/")[0] for name in left} <= {
        "other",
        id_of(started),
    }


def test_a_request_of_a_newer_version_is_removed(started, repository):
    parts_of(started).controls.request(id_of(started), "dance")
    eventually(lambda: not repository.notes(REQUEST))
    assert started.submit("fine").result(PATIENCE) == "fine"


def test_two_requests_to_a_program_are_one_signal():
    signals = Signals()
    signals.note_request()
    signals.note_request()
    assert signals.caught == [signal.SIGTERM]


def test_a_repository_of_eight_methods_has_no_requests():
    queue = Queue(TinyRepository())
    assert queue.stacks()
    for call in (queue.stacks, queue.stop_node):
        with pytest.raises(ConfigurationError, match="use SQLiteRepository"):
            call("n")


@pytest.mark.parametrize("wrong", ["", 5, []])
def test_an_id_that_is_no_id_is_refused(queue, wrong):
    for call in (queue.stacks, queue.stop_node):
        with pytest.raises(ConfigurationError, match="node_id"):
            call(wrong)


# Other processes

HOLD = """
import threading

@queue.executor("hold", max_concurrency=1)
def hold():
    note("holds")
    threading.Event().wait()

@queue.executor("fine")
def fine():
    return os.getpid()
"""

RUN = """
import sys, taskx
repository = taskx.open_repository(sys.argv[1])
queue = taskx.Queue(repository, taskx.Config(worker_num=1))
queue.executor("fine")(lambda: "fine")

class Ready(taskx.Hook):
    def queue_started(self, queue):
        print("started", flush=True)

ready = taskx.Queue(repository, hooks=[Ready()])
sys.exit(taskx.run(queue, ready))
"""


def test_a_process_is_tuned_and_tells_its_stacks(workers):
    queue = Queue(workers.repository)
    queue.declare("hold", "fine")
    [child] = workers.start(HOLD)
    [node] = queue.nodes()
    assert (node.pid, node.this, node.workers) == (child.process.pid, False, 4)
    handles = [queue.submit("hold") for _ in range(2)]
    eventually(workers.log)
    queue.tune("hold", max_concurrency=2)
    queue.tune(workers=6)
    eventually(lambda: len(workers.log()) == 2)
    eventually(lambda: queue.nodes()[0].workers == 6)

    def six_workers():
        found = queue.stacks(node.id, timeout=PATIENCE)
        return sum(one.thread.startswith("taskx-worker") for one in found) == 6 and found

    stacks = eventually(six_workers)  # their number is recorded before the last ones have begun
    assert {one.task_id for one in stacks if "in hold" in one.stack} == {h.id for h in handles}
    queue.stop_node(node.id)
    eventually(lambda: queue.nodes()[0].stopping)


def test_a_program_that_only_runs_queues_ends_when_a_node_is_asked_to_stop(spawn, url):
    from taskx import open_repository

    child = spawn(RUN, url)
    assert child.read() == "started"
    with open_repository(url) as repository:
        queue = Queue(repository)
        queue.declare("fine")
        assert queue.submit("fine").result(PATIENCE) == "fine"
        [node] = [node for node in queue.nodes() if "fine" in node.types]
        queue.stop_node(node.id)
        assert child.process.wait(PATIENCE) == 0
        assert queue.nodes() == []
        with pytest.raises(NodeNotFound):
            queue.stop_node(node.id)
