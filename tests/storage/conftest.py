"""Fixtures of the storage tests."""

import pytest

from taskx.tasks import lifecycle

from .repositories import KINDS, MAKERS, insert


@pytest.fixture(params=KINDS)
def store(request, tmp_path, clock, timing):
    """An empty repository."""
    with MAKERS[request.param](tmp_path, clock, timing) as repository:
        yield repository


@pytest.fixture
def now(clock):
    return clock.now_ms()


@pytest.fixture
def add(store, clock):
    """Store a pending task."""

    def add(task_id, waiting_on=None, **options):
        new = insert(task_id, clock, **options)
        if waiting_on is not None:
            lifecycle.wait_for(new, waiting_on)
        assert list(store.apply([new])) == [True]
        return store.get_by_id(task_id)

    return add


@pytest.fixture
def run(store, add, clock):
    """Store a task and start it."""

    def run(task_id, node="node", **options):
        start = lifecycle.start(add(task_id, **options), clock.now_ms(), node)
        assert list(store.apply([start])) == [True]
        return store.get_by_id(task_id)

    return run
