"""Ctrl-C in a call that waits, as in the cell of a notebook: the call ends, and the queue goes on."""

from __future__ import annotations

import signal

import pytest

from taskx import SQLiteRepository, TaskFilter, TaskStatus

# Started with the path of the file, and a call. Both workers are busy, so the call waits.
PROGRAM = """
import concurrent.futures, sys, threading
from taskx import Config, Queue, SQLiteRepository

queue = Queue(SQLiteRepository(sys.argv[1]), Config(worker_num=2, buffer_size=2, overflow="block"))
gate, main = threading.Event(), threading.get_ident()
busy = threading.Semaphore(0)

def say(word):
    sys.stdout.write(word + "\\n")  # in one piece, as several threads print
    sys.stdout.flush()

@queue.executor()
def hold():
    busy.release()
    gate.wait(60)

@queue.executor()
def double(n):
    return 2 * n

def fill():
    while True:
        double.submit(n=1)

def tell_when_it_waits():
    # A signal may only be sent when the main thread waits.
    while not sys._current_frames()[main].f_code.co_filename.endswith("bell.py"):
        gate.wait(0.01)
    say("waits")

queue.start()
held = [hold.submit(), hold.submit()]
for _ in held:
    busy.acquire()
try:
    threading.Thread(target=tell_when_it_waits, daemon=True).start()
    CALL
except KeyboardInterrupt:
    say("interrupted")
assert queue.healthy and queue.running == 2
gate.set()
for handle in held:
    assert handle.result(60) is None
assert double.submit(n=21).result(60) == 42
assert list(queue.map(double, range(30), timeout=60)) == [*range(0, 60, 2)]
assert queue.follow(60) and queue.drain(60)
assert (queue.running, queue.buffered) == (0, 0)
assert queue.stop() == []
say("went on")
"""

CALLS = {
    "result": "held[0].result()",
    "exception": "held[0].exception()",
    "follow": "held[0].follow()",
    "wait": "concurrent.futures.wait(held)",
    "as_completed": "list(concurrent.futures.as_completed(held))",
    "map": "list(queue.map(double, range(10), name='interrupted'))",
    "unordered map": "list(queue.map(double, range(10), name='interrupted', ordered=False))",
    "drain": "queue.drain()",
    "queue.follow": "queue.follow()",
    "submit": "fill()",
}


@pytest.mark.parametrize("call", CALLS)
def test_a_queue_goes_on_after_ctrl_c_in_a_call_that_waits(spawn, database, call):
    child = spawn(PROGRAM.replace("CALL", CALLS[call]), database)
    assert child.read() == "waits"
    child.signal(signal.SIGINT)
    assert child.read() == "interrupted"
    assert child.read() == "went on"
    errors = child.ends()[1]
    assert child.process.returncode == 0, errors
    assert "Traceback" not in errors
    with SQLiteRepository(database) as repository:
        total = repository.count(TaskFilter())
        assert repository.count(TaskFilter(status=TaskStatus.COMPLETED)) == total
        nodes = repository.liveness.nodes()
    assert nodes == []


def test_ctrl_c_in_a_call_does_not_touch_running_tasks(spawn, database):
    child = spawn(PROGRAM.replace("CALL", CALLS["result"]), database)
    assert child.read() == "waits"
    child.signal(signal.SIGINT)
    assert child.read() == "interrupted"
    assert child.read() == "went on"
    child.ends()
    with SQLiteRepository(database) as repository:
        held = repository.list(TaskFilter(type="hold"))
    assert [(task.interruptions, task.starts) for task in held] == [(0, 1)] * 2
