"""A submit of a type and params takes a short way; it stores what the long way stores."""

from __future__ import annotations

from unittest.mock import ANY

import pytest

from taskx import (
    ConfigurationError,
    MemoryRepository,
    PayloadError,
    Queue,
    RetryPolicy,
    Task,
    TaskFilter,
)
from taskx.tasks.record import COLUMNS

#: Executors that differ in what they set in the records of their tasks.
OPTIONS = {
    "none": {},
    "attempts": {"max_attempts": 3, "max_crashes": 5, "timeout": 7},
    "priority": {"priority": 3},
    "retry": {"retry": RetryPolicy(max_attempts=4)},
    "tags": {"tags": ["a", "b"]},
    "expires": {"expires": 60},
}


@pytest.fixture
def queue():
    queue = Queue(MemoryRepository())
    for name, options in OPTIONS.items():
        queue.executor(name, **options)(lambda **params: params)
    queue.executor("strict")(lambda number: number)
    queue.declare("elsewhere")
    yield queue
    queue.close()


def row_of(queue: Queue, task_id: str) -> dict[str, object]:
    [row] = queue.repository.find("id", [task_id], COLUMNS)
    stored = dict(zip(COLUMNS, row, strict=True))
    if stored["expires_at"] is not None:
        stored["expires_at"] -= stored["created_at"]
    return {**stored, "id": None, "created_at": None}


@pytest.mark.parametrize("type", [*OPTIONS, "elsewhere"])
@pytest.mark.parametrize("params", [None, {}, {"a": 1, "b": ["ü", None]}])
def test_both_ways_store_the_same_record(queue, type, params):
    short = queue.submit(type, params)
    long = queue.submit(Task(type=type, params=params or {}))
    assert row_of(queue, short.id) == row_of(queue, long.id)


@pytest.mark.parametrize("params", [{"a": object()}, {"number": 1, "other": 2}, {}, [1], 5])
def test_both_ways_refuse_the_same_params_in_the_same_words(queue, params):
    errors = []
    for submit in (
        lambda: queue.submit("strict", params),
        lambda: queue.submit(Task(type="strict", params=params)),
    ):
        with pytest.raises(PayloadError) as caught:
            submit()
        errors.append(str(caught.value))
    assert errors[0] == errors[1]
    assert queue.repository.count(TaskFilter()) == 0


def test_a_wrong_id_is_named_before_wrong_params(queue):
    for wrong in (5, None, "i" * 5000):
        with pytest.raises(ConfigurationError, match="id "):
            queue.submit(Task(type="strict", params={"a": object()}, id=wrong))


def test_an_expiry_is_checked_although_it_is_equal_to_none(queue):
    queue.submit("strict", {"number": 1})
    with pytest.raises(ConfigurationError, match="expires_at"):
        queue.submit(Task(type="strict", params={"number": 1}, expires_at=ANY))
