"""The nodes of a repository, and what they run."""

from __future__ import annotations

import json
import os
import platform
import socket
from datetime import timezone

import pytest
from helpers import PATIENCE, eventually, node_of
from storage.repositories import TinyRepository

import taskx
from taskx import ConfigurationError, NodeInfo, Queue, RunningTask, SQLiteRepository


@pytest.fixture
def holding(make_queue, gate):
    """A started queue whose tasks of type ``hold`` wait at the gate."""
    queue = make_queue(worker_num=1, buffer_size=7)
    queue.executor("hold", rate="30/s")(lambda: gate())
    queue.executor("wait")(lambda: None)
    queue.start()
    return queue


def test_a_node_tells_what_it_is_and_what_it_runs(holding, gate, make_queue):
    handle = holding.submit("hold")
    gate.wait_for(1)
    waits = [holding.submit("wait") for _ in range(3)]
    [node] = make_queue().nodes()
    task = handle.task()
    assert node == NodeInfo(
        id=node_of(holding).record.id,
        name=node_of(holding).record.name,
        this=True,
        alive=True,
        suspected=False,
        stopping=False,
        host=socket.gethostname(),
        pid=os.getpid(),
        version=taskx.__version__,
        python=platform.python_version(),
        started_at=node.started_at,
        last_beat=node.last_beat,
        types=("hold", "wait"),
        limits={"hold": {"rate": "30/s", "burst": 30, "limit_scope": "node"}},
        own_limits={},
        workers=1,
        worker_num=1,
        buffered=3,
        buffer_size=7,
        running=(
            RunningTask(
                id=handle.id, type="hold", since=task.started_at, thread=node.running[0].thread
            ),
        ),
        stuck=0,
        lease=node.lease,
    )
    assert node.lives
    assert node.lease == (None if node.last_beat is None else 30.0)
    assert node.running[0].thread in ("", "taskx-worker-1")
    assert node.started_at <= task.started_at
    assert node.started_at.tzinfo is timezone.utc
    assert [info.buffered for info in holding.nodes()] == [3]
    shown = json.loads(json.dumps(node.to_dict()))
    assert shown["running"][0]["since"] == task.started_at.isoformat()
    gate.open()
    for one in waits:
        one.result(PATIENCE)
    assert [info.buffered for info in make_queue().nodes()] == [0]


def test_the_thread_of_a_task_that_was_started_alone_is_named(make_queue, gate):
    queue = make_queue(worker_num=1)
    queue.executor("hold", max_crashes=1)(lambda: gate())
    queue.start()
    queue.submit("hold")
    gate.wait_for(1)
    [node] = queue.nodes()
    assert [task.thread for task in node.running] == ["taskx-worker-1"]


def test_the_stuck_threads_of_a_node_are_counted(make_queue, gate, clock):
    queue = make_queue(worker_num=1, clock=clock)
    queue.executor("hang", timeout=60, grace=0.0, max_attempts=2)(gate)
    queue.start()
    for number in (1, 2):
        handle = queue.submit("hang")
        gate.wait_for()
        [node] = queue.nodes()
        assert (node.stuck, len(node.running)) == (number - 1, 1)
        clock.advance(60)
        eventually(lambda: handle.task().stuck_on)  # noqa: B023
        [node] = make_queue().nodes()
        assert (node.stuck, len(node.running)) == (number, 0)
        assert node.to_dict()["stuck"] == number


def test_a_node_that_stopped_is_gone(holding):
    holding.stop()
    assert holding.nodes() == []


def test_a_queue_that_is_not_started_is_no_node(queue):
    assert queue.nodes() == []


def test_an_eight_method_repository_does_not_know_its_nodes():
    with pytest.raises(ConfigurationError, match="use SQLiteRepository"):
        Queue(TinyRepository()).nodes()


def test_the_node_of_an_older_version_tells_what_it_has_recorded(database):
    with SQLiteRepository(database) as repository, Queue(repository) as queue:
        [(name, note)] = repository.notes("node/").items()
        facts = json.loads(note.text)
        old = {key: facts[key] for key in ("name", "types", "stopping", "file", "lock")}
        assert repository.put_note(name, json.dumps(old), note.version)
        [node] = queue.nodes()
        assert (node.alive, node.host, node.pid, node.started_at) == (True, "", 0, None)
        facts["about"]["newer"] = True
        note = repository.notes("node/")[name]
        assert repository.put_note(name, json.dumps(facts), note.version)
        eventually(lambda: queue.nodes()[0].pid == os.getpid())
