"""A small campaign about calls for many tasks."""

from __future__ import annotations

from .batches import right, run


def test_exactly_the_poison_fails_among_tasks_that_share_calls(tmp_path):
    counts = 400, 4, 1
    found = run(tmp_path, *counts, seed=7)
    assert found["ended"] == right(*counts)
    assert found["deaths"] == 3  # as often as max_crashes says, and no innocent task died with it
    assert found["calls for many"] >= 2
