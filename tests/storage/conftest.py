"""Fixtures of the storage tests."""

import pytest

pytest.register_assert_rewrite("taskx.testing")

from taskx.testing import ManualClock  # noqa: E402

from .repositories import MAKERS  # noqa: E402


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture(params=MAKERS)
def store(request, tmp_path, clock):
    """An empty repository of each kind that the runtime can drive."""
    with MAKERS[request.param](tmp_path, clock) as repository:
        yield repository
