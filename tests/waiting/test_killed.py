"""Tasks that wait survive the death of their processes: no answer is lost, and no sleep ends early."""

from __future__ import annotations

import subprocess
import sys

import pytest
from helpers import PATIENCE, ROOT

from .killing import check_answers, check_sleeps


@pytest.mark.process
def test_no_answer_is_lost_and_none_is_taken_twice(workers):
    workers.threads = 1
    assert check_answers(workers, count=25, every=0.3, pause=0.02) >= 1


@pytest.mark.process
def test_no_sleep_ends_early_and_all_end(workers):
    kills, calm, struck = check_sleeps(workers, 40, every=0.3, seconds=1.1, times=2, pause=0.01)
    assert kills >= 1
    assert len(calm) + len(struck) == 2 * 40


@pytest.mark.process
def test_a_call_that_must_not_happen_twice_survives_a_death_at_any_line():
    command = [sys.executable, "-m", "tests.waiting.once_killed", "200"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2 * PATIENCE)
    assert "never paid twice" in done.stdout, done.stderr
