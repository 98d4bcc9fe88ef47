"""A started queue finds the executors of waiting types that nobody has registered."""

from __future__ import annotations

import threading

import pytest
from helpers import PATIENCE, eventually, ids, run_in_thread, whole_round

from taskx import ConfigurationError, MemoryRepository, Queue, TaskStatus, UnknownTaskType, executor


@executor("found")
def found(number: int) -> int:
    return 2 * number


class Finder:
    """Finds one executor, fails for the type ``broken``, and notes the types that it was asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, type):
        self.asked.append(type)
        if type == "broken":
            raise ImportError("no module named 'broken'")
        return found if type == "found" else None


@pytest.mark.every_store
def test_a_waiting_task_of_an_unknown_type_runs_when_its_executor_is_found(repository, make_queue):
    other = Queue(repository)
    other.declare("found", "nobody", "broken")
    before = other.submit("found", {"number": 1})
    finder = Finder()
    queue = make_queue(find_executor=finder)
    queue.start()
    assert before.result(PATIENCE) == 2
    other.submit("nobody")
    other.submit("broken")
    after = other.submit("found", {"number": 2})
    assert after.result(PATIENCE) == 4
    eventually(lambda: {"nobody", "broken"} <= {*finder.asked})
    assert len(finder.asked) == len({*finder.asked})  # each type once


def test_a_finder_that_fails_is_logged_and_the_task_waits(repository, make_queue, caplog):
    other = Queue(repository)
    other.declare("broken")
    task = other.submit("broken")
    queue = make_queue(find_executor=Finder())
    queue.start()
    eventually(lambda: "no executor was found for type 'broken'" in caplog.text)
    assert task.task().status is TaskStatus.PENDING


def test_a_submit_finds_the_executor_of_its_type(make_queue):
    finder = Finder()
    queue = make_queue(find_executor=finder)
    assert queue.submit("found", {"number": 1}).task().type == "found"
    for _ in range(2):
        with pytest.raises(UnknownTaskType, match="no executor is registered for type 'nobody'"):
            queue.submit("nobody")
    assert finder.asked == ["found", "nobody"]


@pytest.mark.timing(poll_every=10 * PATIENCE, recover_every=10 * PATIENCE)
def test_an_idle_queue_looks_for_no_types(make_queue, monkeypatch):
    # These checks look for what other processes have stored. Each is made once.
    finder = Finder()
    queue = make_queue(find_executor=finder)
    queue.register_executor(found)
    queue.start()
    assert queue.submit("found", {"number": 1}).result(PATIENCE) == 2
    queue.drain(PATIENCE)
    for _ in range(2):
        whole_round(queue)
    eventually(lambda: not queue._agenda.more_stored)
    looked = []
    monkeypatch.setattr(queue._registry, "seek", lambda types: looked.append([*types]))
    for _ in range(3):
        whole_round(queue)
    assert looked == []
    assert finder.asked == []


def test_a_finder_must_be_a_function():
    with pytest.raises(ConfigurationError, match="find_executor must be a function, not 'name'"):
        Queue(MemoryRepository(), find_executor="name")


def test_two_first_submits_of_a_type_at_once_both_find_its_executor(repository):
    asked, go_on = threading.Event(), threading.Event()

    def find(type):
        asked.set()
        assert go_on.wait(PATIENCE)
        return found

    queue = Queue(repository, find_executor=find)
    first = run_in_thread(lambda: queue.submit("found", {"number": 1}))
    assert asked.wait(PATIENCE)
    second = run_in_thread(lambda: queue.submit("found", {"number": 2}))
    go_on.set()
    assert {first().id, second().id} == ids(queue)
