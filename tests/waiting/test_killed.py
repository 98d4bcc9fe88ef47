"""Tasks that wait survive the death of their processes: no answer is lost, and no sleep ends early."""

from __future__ import annotations

import subprocess
import sys

import pytest
from helpers import PATIENCE, ROOT, eventually

from taskx import Queue

from .killing import Killing, check_answers, check_sleeps


@pytest.mark.process
def test_no_answer_is_lost_and_none_is_taken_twice(workers):
    workers.threads = 1
    assert check_answers(workers, count=15, every=0.3, pause=0.02) >= 1


@pytest.mark.process
def test_no_sleep_ends_early_and_all_end(workers):
    # A sleep of less than a second is not stored: no process lives for so long.
    kills, calm, struck = check_sleeps(workers, 20, every=0.3, seconds=1.1, times=2, pause=0.01)
    assert kills >= 1
    assert len(calm) + len(struck) == 2 * 20


@pytest.mark.process
def test_a_tree_of_tasks_is_complete(workers):
    """Depth 6 and fan 4, on one process with two workers that is killed again and again, took 3 minutes."""
    queue, depth, fan = Queue(workers.repository), 3, 3
    queue.declare("tree")
    with Killing(workers).often(0.3):
        handle = queue.submit("tree", {"depth": depth, "fan": fan})
        assert handle.result(10 * PATIENCE) == fan**depth
        eventually(lambda: queue.count_tasks(status="pending") == 0)
    tasks = [*queue.iter_tasks(type="tree")]
    assert len(tasks) == sum(fan**n for n in range(depth + 1))
    assert {task.status for task in tasks} == {"completed"}
    assert {task.attempt for task in tasks} == {1}
    leaves = {task.id for task in tasks if not task.params["depth"]}
    assert {task_id for _, task_id in workers.log()} == leaves


@pytest.mark.process
def test_a_call_that_must_not_happen_twice_survives_a_death_at_any_line():
    command = [sys.executable, "-m", "tests.waiting.once_killed", "lines"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2 * PATIENCE)
    assert "never paid twice" in done.stdout, done.stderr
