"""Listing tasks: one page of them, or all."""

from __future__ import annotations

import base64
import copy
import json
import pickle
from datetime import timedelta

import attrs
import pytest

from taskx import (
    ConfigurationError,
    MemoryRepository,
    RepositoryUnavailable,
    SQLiteRepository,
    Task,
    TaskCount,
    TaskFilter,
    TaskPage,
    TaskStatus,
    ZlibCodec,
)
from taskx.stores.base import BASIC_CONDITIONS
from taskx.tasks.options import AGES, FilterOptions


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
        fields = {field.name for field in attrs.fields(TaskFilter)}
        assert FilterOptions.__optional_keys__ == fields | AGES.keys()

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

    def test_it_can_be_made_with_other_values(self):
        page = TaskPage([Task(id="a")], 3, more=2, next="x", exact=False)
        other = page._replace(total=4, more=3)
        assert (other, vars(other)) == (([Task(id="a")], 4), {**vars(page), "more": 3})
        with pytest.raises(TypeError, match="mroe"):
            page._replace(mroe=1)


@pytest.fixture
def failed(queue):
    """A queue with five pending tasks, a cancelled and a failed one."""
    repository = queue.repository
    repository.update_status("1", TaskStatus.RUNNING, "")
    task = repository.get_by_id("1")
    task.status, task.error, task.error_type = TaskStatus.FAILED, "Timeout: no answer", "m.Timeout"
    repository.update(task)
    return queue


class TestConditions:
    """The conditions that a repository of eight methods, or one of an older version, does not know."""

    @pytest.mark.timing(batch=2)
    def test_every_condition_works_on_every_repository(self, failed):
        for fields, expected in [
            ({"error": "timeout"}, "1"),
            ({"error": "timeout", "status": "pending"}, ""),
            ({"id_prefix": "3"}, "3"),
            ({"params": {"n": 4}}, "4"),
            ({"params": {"n": 4}, "type": "b"}, ""),
            ({"params": {"n": 4}, "id_prefix": "4", "type": "a"}, "4"),
            ({"error": "", "type": "a"}, "420"),
            ({"id_prefix": "", "offset": 1, "limit": 3}, "432"),
            ({"id_prefix": "", "limit": 0}, ""),
        ]:
            found = failed.list_tasks(**fields)
            assert [task.id for task in found.tasks] == [*expected], fields
            assert [*failed.iter_tasks(**fields)] == [*found.tasks], fields
            if "limit" not in fields:
                assert failed.count_tasks(**fields) == found.total == len(expected)
                assert failed.count_tasks(**fields).exact

    def test_the_type_of_an_error_is_a_condition(self, failed):
        assert [task.id for task in failed.iter_tasks(error_type="m.Timeout")] == ["1"]
        assert failed.count_tasks(error_type="m.Time") == 0

    def test_the_parent_of_a_task_is_a_condition(self, queue):
        queue.submit("a", {"n": 7}, id="child", depends_on=["3", "4"])
        for parent, expected in (("3", ["child"]), ("4", ["child"]), ("5", []), ("child", [])):
            assert [task.id for task in queue.iter_tasks(parent=parent)] == expected
        assert queue.count_tasks(parent="3", params={"n": 7}) == 1
        assert queue.count_tasks(parent="3", params={"n": 8}) == 0

    def test_dead_letters_are_requeued_by_the_text_of_their_error(self, failed):
        assert [task.id for task in failed.dead_letters(error="ANSWER").tasks] == ["1"]
        assert failed.requeue_dead_letters(error="question") == 0
        assert failed.requeue_dead_letters(error="ANSWER") == 1
        assert failed.get_task_status("1").status is TaskStatus.PENDING

    def test_a_repository_that_does_not_know_a_condition_is_not_asked(self, make_queue):
        class Basic(MemoryRepository):
            conditions = BASIC_CONDITIONS

        queue = make_queue(Basic())
        queue.declare("a")
        queue.submit_many(Task(type="a", params={"n": n}) for n in range(3))
        assert queue.list_tasks(params={"n": 2}, type="a").total == 1
        for method in (queue.repository.list, queue.repository.count):
            with pytest.raises(
                ConfigurationError, match="Basic cannot filter by error, params; call"
            ):
                method(TaskFilter(params={"n": 2}, error="x", type="a"))

    def test_an_age_is_a_condition(self, queue, clock):
        for fields, expected in [
            ({"older": 3}, "3210"),
            ({"newer": timedelta(seconds=3)}, "543"),
            ({"newer": 4, "older": 2.5, "limit": 1}, "3"),
            ({"newer": timedelta.max}, "543210"),
            ({"older": timedelta.max}, ""),
            ({"older": None, "newer": None, "limit": 1}, "5"),
        ]:
            assert [task.id for task in queue.list_tasks(**fields).tasks] == [*expected], fields

    def test_an_age_excludes_the_date_that_means_the_same(self, queue, clock):
        now = queue.get_task_status("5").created_at
        with pytest.raises(ConfigurationError, match="older and end_date say the same"):
            queue.list_tasks(older=5, end_date=now)
        assert queue.list_tasks(older=1, start_date=now, end_date=None).total == 1
        for wrong in (-1, "1", float("nan"), True):
            with pytest.raises(ConfigurationError, match=r"newer must be a|newer: '1' has no unit"):
                queue.list_tasks(newer=wrong)

    def test_params_that_a_codec_hides_cannot_be_searched(self, make_queue, tmp_path):
        for repository in (
            MemoryRepository(codec=ZlibCodec()),
            SQLiteRepository(tmp_path / "coded.db", codec=ZlibCodec()),
        ):
            queue = make_queue(repository)
            for call in (queue.list_tasks, queue.count_tasks, queue.dead_letters):
                with pytest.raises(ConfigurationError, match="a codec hides them"):
                    call(params={"n": 1})
            assert queue.list_tasks(error="x").total == 0


class TestSearchInParams:
    """A search in params looks at the newest tasks only, and says so."""

    @pytest.mark.timing(most_searched=4)
    def test_a_page_says_since_when_it_searched(self, queue):
        since = queue.get_task_status("2").created_at
        page = queue.list_tasks(params={"n": 1})
        assert (page.tasks, page.total, page.exact, page.searched_since) == ([], 0, False, since)
        page = queue.list_tasks(params={"n": 2}, status="cancelled")
        assert ([task.id for task in page.tasks], page.exact, page.searched_since) == (
            ["2"],
            True,
            None,
        )
        older = queue.list_tasks(params={"n": 1}, end_date=since)
        assert ([task.id for task in older.tasks], older.exact) == (["1"], True)
        assert older.searched_since is None

    @pytest.mark.parametrize("most_searched", [5, 6])
    def test_the_last_task_searched_is_the_oldest(self, queue, most_searched):
        page = queue.list_tasks(params={"n": 0})
        found = most_searched == 6
        assert (page.total, page.exact, page.searched_since is None) == (found, found, found)

    @pytest.mark.timing(most_searched=4)
    def test_further_pages_search_since_the_same_moment(self, queue):
        for n in range(6, 8):
            queue.submit("a", {"n": 2}, id=str(n))
        page = queue.list_tasks(params={"n": 2}, limit=1)
        assert (page.total, page.exact) == (2, False)
        found, since = [], queue.get_task_status("4").created_at
        while page.tasks:
            assert page.searched_since == since
            found += [task.id for task in page.tasks]
            page = queue.list_tasks(params={"n": 2}, limit=1, after=page.next)
        assert (found, page.total, page.exact) == (["7", "6"], 2, False)
        assert [task.id for task in queue.iter_tasks(params={"n": 2})] == ["7", "6", "2"]

    @pytest.mark.every_store
    @pytest.mark.timing(most_searched=4)
    def test_a_limited_count_says_that_it_is_not_exact(self, queue):
        count = queue.count_tasks(params={"n": 1}, at_most=10)
        assert (count, count.exact) == (0, False)
        count = queue.count_tasks(params={"n": 1})
        assert (count, count.exact) == (1, True)

    @pytest.mark.timing(most_searched=1)
    def test_an_iteration_searches_all_tasks(self, queue):
        assert [task.id for task in queue.iter_tasks(params={"n": 0})] == ["0"]


class TestPages:
    """Pages that begin after the page before."""

    @pytest.mark.timing(batch=2)
    @pytest.mark.parametrize("fields", [{}, {"status": "pending"}, {"id_prefix": ""}], ids=str)
    def test_pages_cover_the_list_exactly_once(self, queue, fields):
        for limit in (1, 2, 3, 5, 6, 7):
            whole = [task.id for task in queue.list_tasks(**fields).tasks]
            found, page = [], queue.list_tasks(**fields, limit=limit)
            while True:
                found += [task.id for task in page.tasks]
                assert len(page.tasks) == limit or page.next is None
                assert (page.total, page.more) == (len(whole), len(whole) - len(found))
                if page.next is None:
                    break
                page = queue.list_tasks(**fields, limit=limit, after=page.next)
            assert found == whole

    def test_changes_before_a_page_neither_hide_nor_repeat_tasks(self, queue):
        first = queue.list_tasks(limit=2)
        queue.submit("a", id="new")
        queue.delete("4")
        second = queue.list_tasks(limit=2, after=first.next)
        assert [task.id for task in second.tasks] == ["3", "2"]
        assert (second.total, second.more) == (6, 2)

    def test_tasks_are_counted_with_the_first_page_only(self, queue, monkeypatch):
        first = queue.list_tasks(limit=2)

        def fail(*args):
            raise AssertionError("counted again")

        monkeypatch.setattr(queue.repository, "count", fail)
        monkeypatch.setattr(queue.repository.reads, "count_to", fail)
        assert queue.list_tasks(limit=2, after=first.next).total == 6

    def test_a_last_page_shows_the_true_total(self, queue):
        first = queue.list_tasks(limit=2)
        queue.delete("0")
        second = queue.list_tasks(limit=2, after=first.next)
        third = queue.list_tasks(limit=2, after=second.next)
        assert ([task.id for task in third.tasks], third.total, third.next) == (["1"], 5, None)
        for task_id in "32":
            queue.delete(task_id)
        queue.delete("1")
        empty = queue.list_tasks(limit=2, after=first.next)
        assert (empty.tasks, empty.total, empty.more, empty.next) == ([], 2, 0, None)

    def test_a_total_is_counted_up_to_a_number(self, queue):
        page = queue.list_tasks(limit=2, at_most=3)
        assert (page.total, page.more, page.exact) == (3, 1, False)
        page = queue.list_tasks(limit=3, at_most=3, after=page.next)
        assert (page.total, page.more, page.exact) == (5, 0, False)
        page = queue.list_tasks(limit=3, after=page.next)
        assert (page.total, page.exact, page.next) == (6, True, None)
        assert queue.list_tasks(limit=2, at_most=6).exact

    @pytest.mark.parametrize("wrong", ["", "x", "ü", "bnVsbA", "e30", "W10", 5, b"x", "===="])
    def test_a_text_that_is_not_a_place_is_refused(self, queue, wrong):
        with pytest.raises(ConfigurationError, match="after must be the `next` of a page, not"):
            queue.list_tasks(after=wrong)

    def test_a_place_that_was_changed_is_refused(self, queue):
        for place in (
            *(5, [1], [[], {}], {"$gt": ""}, ["a", "b", "c"], [2**70, 1], ["\ud800", 1]),
            *(
                '[{"$code": 1}, "a"]',
                '[1, {"$gt": ""}]',
                '[1, {"$oid": "x"}]',
                '[1, {"$binary": 5}]',
            ),
            '[{"$date": {"$numberLong": "99999999999999999999999"}}, "a"]',
        ):
            text = base64.urlsafe_b64encode(json.dumps([place, 1, 9, True, None]).encode()).decode()
            with pytest.raises(ConfigurationError, match="after is not a place in a list"):
                queue.list_tasks(after=text)

    def test_a_place_excludes_an_offset(self, queue):
        after = queue.list_tasks(limit=1).next
        with pytest.raises(ConfigurationError, match="after and offset exclude each other"):
            queue.list_tasks(offset=1, after=after)


class TestCount:
    def test_it_stops_at_the_largest_number(self, queue):
        for most, exact in ((1, False), (5, False), (6, True), (7, True)):
            count = queue.count_tasks(at_most=most)
            assert (count, count.exact) == (min(most, 6), exact)
        assert queue.count_tasks(TaskFilter(type="a", limit=1, offset=2)) == 3

    @pytest.mark.parametrize("wrong", [0, -1, 1.5, "3", True])
    def test_a_wrong_number_is_refused(self, queue, wrong):
        with pytest.raises(ConfigurationError, match="at_most must be a whole number"):
            queue.count_tasks(at_most=wrong)
        with pytest.raises(ConfigurationError, match="at_most must be a whole number"):
            queue.list_tasks(at_most=wrong)

    def test_it_survives_copying_and_pickling(self):
        count = TaskCount(3, exact=False)
        for again in (copy.copy(count), pickle.loads(pickle.dumps(count))):
            assert (again, again.exact) == (3, False)


class TestIteration:
    @pytest.mark.timing(batch=2)
    def test_it_goes_through_all_tasks_newest_first(self, queue):
        assert [task.id for task in queue.iter_tasks()] == [*"543210"]
        assert [task.id for task in queue.iter_tasks(TaskFilter(type="a"))] == [*"420"]
        assert [task.id for task in queue.iter_tasks(status="pending", limit=4)] == [*"5431"]

    def test_it_goes_beyond_the_hundred_of_a_list(self, make_queue):
        queue = make_queue()
        queue.declare("a")
        queue.submit_many(Task(type="a") for _ in range(501))
        assert queue.list_tasks().more == 401
        assert len({task.id for task in queue.iter_tasks()}) == 501

    @pytest.mark.timing(batch=2)
    def test_tasks_that_come_and_go_meanwhile_change_nothing_else(self, queue, clock):
        found = []
        for task in queue.iter_tasks():
            found.append(task.id)
            queue.delete(task.id)
            queue.submit("a", id=f"new {task.id}")
            clock.advance(1)
        assert found == [*"543210"]

    @pytest.mark.timing(batch=2)
    def test_an_error_of_the_repository_reaches_the_caller(self, queue, monkeypatch):
        found = queue.iter_tasks()
        assert next(found).id == "5"

        def fail(filter, after=None):
            raise RepositoryUnavailable("gone")

        monkeypatch.setattr(queue.repository.reads, "list_after", fail)
        assert next(found).id == "4"
        with pytest.raises(RepositoryUnavailable):
            next(found)
