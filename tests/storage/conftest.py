"""Fixtures of the storage tests."""

import pytest

from taskx.testing import ManualClock

from .repositories import MAKERS


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture(params=MAKERS)
def store(request, tmp_path, clock):
    """An empty repository of each kind that the runtime can drive."""
    with MAKERS[request.param](tmp_path, clock) as repository:
        yield repository
