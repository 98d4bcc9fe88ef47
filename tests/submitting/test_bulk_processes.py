"""Changes in bulk by several processes: some are killed, and some work at the same time."""

from __future__ import annotations

from itertools import pairwise

import pytest
from helpers import PATIENCE, run_in_thread

from taskx import Queue, Task, open_repository

TASKS, BATCH = 600, 200
PROGRAM = """
    import sys
    from taskx import Queue, open_repository

    queue = Queue(open_repository(sys.argv[1]))

    def told(bulk):
        print(bulk.changed, flush=True)
        sys.stdin.readline()

    queue.requeue_all(status="cancelled", rate="1/s", on_progress=told)
"""


@pytest.fixture
def stored(url):
    """A queue with 600 cancelled tasks on a repository that other processes can use."""
    with open_repository(url) as repository:
        queue = Queue(repository)
        queue.declare("t")
        queue.submit_many(Task(type="t") for _ in range(TASKS))
        assert queue.cancel_all(everything=True).changed == TASKS
        yield queue


def times(queue):
    """Return the times at which the pending tasks start, the earliest first."""
    return sorted(task.run_at for task in queue.iter_tasks(status="pending"))


def test_a_killed_bulk_leaves_whole_batches_and_another_process_goes_on(stored, url, spawn):
    child = spawn(PROGRAM, url)
    assert child.read() == "200"
    child.tell()
    assert child.read() == "400"
    child.kill()
    before = {task.id: task.run_at for task in stored.iter_tasks(status="pending")}
    assert len(before) == 2 * BATCH
    bulk = stored.requeue_all(status="cancelled", rate="1/s")
    assert (bulk.matched, bulk.changed) == (TASKS - 2 * BATCH, TASKS - 2 * BATCH)
    after = {task.id: task.run_at for task in stored.iter_tasks(status="pending")}
    assert len(after) == TASKS
    assert {task_id: after[task_id] for task_id in before} == before
    assert {(b - a).total_seconds() for a, b in pairwise(times(stored))} == {1}


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_a_bulk_that_is_killed_at_any_moment_is_completed_by_the_next(stored, url, spawn):
    """The kill comes while a batch is being written, or after a time was reserved for it."""
    for _ in range(2):
        child = spawn(PROGRAM, url)
        child.read()
        child.tell()
        child.kill()
        assert stored.count_tasks(status="pending") % BATCH == 0
    stored.requeue_all(status="cancelled", rate="1/s")
    assert stored.count_tasks(status="pending") == TASKS
    assert min((b - a).total_seconds() for a, b in pairwise(times(stored))) == 1


def test_several_processes_at_once_change_each_task_once(stored, url, spawn):
    """They share the rate, too."""
    children = [spawn(PROGRAM.replace("sys.stdin.readline()", ""), url) for _ in range(2)]
    own = run_in_thread(lambda: stored.requeue_all(status="cancelled", rate="1/s"))
    changed = own().changed
    for child in children:
        lines, errors = child.ends(PATIENCE)
        assert errors == ""
        changed += int(lines.split()[-1]) if lines else 0
    assert changed == stored.count_tasks(status="pending") == TASKS
    assert min((b - a).total_seconds() for a, b in pairwise(times(stored))) == 1
