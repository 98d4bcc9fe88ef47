"""Listing tasks: one page of them, or all."""

from __future__ import annotations

import copy
import pickle
from datetime import timedelta

import attrs
import pytest

from taskx import (
    ConfigurationError,
    RepositoryUnavailable,
    Task,
    TaskFilter,
    TaskPage,
    TaskStatus,
)
from taskx.core.options import FilterOptions


@pytest.fixture
def queue(make_queue, clock):
    """A queue with five pending tasks, and one that was cancelled."""
    queue = make_queue(clock=clock)
    queue.declare("a", "b")
    for n in range(6):
        queue.submit("ab"[n % 2], {"n": n}, id=str(n), created_by="odd" if n % 2 else "even")
        clock.advance(1)
    queue.cancel_task("2")
    return queue


class TestPage:
    @pytest.mark.every_store
    def test_the_fields_of_a_filter_can_be_given_by_name(self, queue, clock):
        third = queue.get_task_status("2").created_at
        for fields, expected in [
            ({}, "543210"),
            ({"type": "a"}, "420"),
            ({"type": "a", "status": "pending"}, "40"),
            ({"status": TaskStatus.CANCELLED}, "2"),
            ({"created_by": "odd", "limit": 2}, "53"),
            ({"offset": 4}, "10"),
            ({"start_date": third, "end_date": third + timedelta(seconds=1)}, "32"),
        ]:
            found = queue.list_tasks(**fields)
            assert [task.id for task in found.tasks] == [*expected], fields
            assert found == queue.list_tasks(TaskFilter(**fields))

    def test_every_field_of_a_filter_can_be_given(self):
        assert FilterOptions.__optional_keys__ == {field.name for field in attrs.fields(TaskFilter)}

    def test_a_filter_and_its_fields_together_are_refused(self, queue):
        for method in (queue.list_tasks, queue.iter_tasks):
            with pytest.raises(ConfigurationError, match="not both: move type, limit into"):
                method(TaskFilter(status="failed"), type="a", limit=5)

    def test_a_wrong_field_is_named(self, queue):
        for method in (queue.list_tasks, queue.iter_tasks):
            with pytest.raises(TypeError, match=rf"{method.__name__}\(\) has no option kind"):
                method(kind="a")
            with pytest.raises(ConfigurationError, match=r"status must be one of .*'done'"):
                method(status="done")
            with pytest.raises(ConfigurationError, match="or give its fields by name: type="):
                method("a")

    def test_it_unpacks_as_tasks_and_total(self, queue):
        tasks, total = queue.list_tasks(limit=2)
        assert ([task.id for task in tasks], total) == (["5", "4"], 6)

    def test_it_says_what_was_cut_off(self, queue):
        page = queue.list_tasks(type="a", limit=1)
        assert (page.total, page.more) == (3, 2)
        assert repr(page).startswith("TaskPage(total=3, more=2, tasks=[Task(id='4', ")
        assert queue.list_tasks(type="a", offset=2).more == 0

    def test_it_survives_copying_and_pickling(self):
        page = TaskPage([Task(id="a")], 3, more=2)
        for again in (copy.copy(page), pickle.loads(pickle.dumps(page))):
            assert (again, again.more) == (page, 2)


class TestIteration:
    @pytest.mark.every_store
    def test_it_goes_through_all_tasks_newest_first(self, queue, in_batches):
        in_batches(lists=2)
        assert [task.id for task in queue.iter_tasks()] == [*"543210"]
        assert [task.id for task in queue.iter_tasks(TaskFilter(type="a"))] == [*"420"]
        assert [task.id for task in queue.iter_tasks(status="pending", limit=4)] == [*"5431"]

    def test_it_goes_beyond_the_hundred_of_a_list(self, make_queue):
        queue = make_queue()
        queue.declare("a")
        queue.submit_many(Task(type="a") for _ in range(501))
        assert queue.list_tasks().more == 401
        assert len({task.id for task in queue.iter_tasks()}) == 501

    @pytest.mark.every_store
    def test_tasks_that_come_and_go_meanwhile_change_nothing_else(self, queue, clock, in_batches):
        in_batches(lists=2)
        found = []
        for task in queue.iter_tasks():
            found.append(task.id)
            queue.delete(task.id)
            queue.submit("a", id=f"new {task.id}")
            clock.advance(1)
        assert found == [*"543210"]

    def test_an_error_of_the_repository_reaches_the_caller(self, queue, in_batches, monkeypatch):
        in_batches(lists=2)
        found = queue.iter_tasks()
        assert next(found).id == "5"

        def fail(filter, after=None):
            raise RepositoryUnavailable("gone")

        monkeypatch.setattr(queue.repository, "list_after", fail)
        assert next(found).id == "4"
        with pytest.raises(RepositoryUnavailable):
            next(found)
