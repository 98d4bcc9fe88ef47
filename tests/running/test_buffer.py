"""The buffer of a node: what a thread sees while another one takes and puts back tasks."""

from __future__ import annotations

import sys
import threading

import pytest

from taskx.node.buffer import Buffer

TASKS = [f"t{number}" for number in range(8)]


@pytest.fixture
def frequent_switches():
    """Let threads take turns as often as possible."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture
def buffer():
    """A buffer with eight fetched tasks."""
    buffer = Buffer(maxsize=10, fetch_size=10, wake=lambda: True)
    for order, task_id in enumerate(TASKS):
        buffer.add(task_id, "t", 0, 0, None, order)
    return buffer


@pytest.mark.usefixtures("frequent_switches")
def test_a_task_that_is_put_back_is_known_at_every_moment(buffer):
    """Otherwise the node would fetch it again, as the last one of its millisecond."""
    ended = threading.Event()

    def work():
        while not ended.is_set():
            buffer.put_back(buffer.take(len(TASKS)))
            buffer.started()

    worker = threading.Thread(target=work)
    worker.start()
    try:
        missing = [set(TASKS).difference(buffer.fetched_ids) for _ in range(20_000)]
    finally:
        ended.set()
        worker.join()
    assert not any(missing)
