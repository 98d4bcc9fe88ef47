"""Tags of tasks, and lists of the tasks with a tag."""

from __future__ import annotations

from datetime import timedelta

import pytest
from helpers import PATIENCE
from storage.repositories import TinyRepository, thirteen_fields_only

from taskx import (
    ConfigurationError,
    DuplicateTask,
    MemoryRepository,
    Queue,
    Task,
    TaskFilter,
    every,
    executor,
)
from taskx.tasks.tags import MAX_TAG, MAX_TAGS


@pytest.fixture
def queue(make_queue):
    queue = make_queue()
    queue.declare("t", "u")
    return queue


def tags_of(queue, handle):
    return queue.get_task_status(handle.id).tags


def found(queue, **fields):
    return [task.id for task in queue.list_tasks(**fields).tasks]


class TestValues:
    def test_a_task_keeps_its_tags_in_order_and_each_once(self, queue):
        assert tags_of(queue, queue.submit("t", tags=["b", "größe", "a", "b"])) == (
            "b",
            "größe",
            "a",
        )
        assert tags_of(queue, queue.submit(Task(type="t", tags=("a",)))) == ("a",)
        assert tags_of(queue, queue.submit("t", tags=[])) == ()
        assert tags_of(queue, queue.submit("t")) == ()

    @pytest.mark.parametrize(
        "tags",
        [
            "nightly",
            7,
            {"a": 1},
            [7],
            [None],
            [""],
            ["a b"],
            ["a\tb"],
            ["a\0"],
            ["\ud800"],
            ["\N{NO-BREAK SPACE}"],
            ["x" * (MAX_TAG + 1)],
            [str(n) for n in range(MAX_TAGS + 1)],
        ],
    )
    def test_a_value_that_is_no_tag_is_refused_and_nothing_is_stored(self, queue, tags):
        for submit in (
            lambda: queue.submit("t", tags=tags),
            lambda: queue.submit(Task(type="t", tags=tags)),
            lambda: queue.submit_many([Task(type="t"), Task(type="t", tags=tags)]),
            lambda: queue.schedule("s", every(60), "t", tags=tags),
            lambda: executor("t", tags=tags),
            lambda: executor("t")(lambda: None).using(tags=tags),
        ):
            with pytest.raises(ConfigurationError, match="tag"):
                submit()
        assert queue.count_tasks() == 0

    @pytest.mark.parametrize("flow", [7, "a b", "x" * (MAX_TAG + 1)])
    def test_a_task_of_what_is_no_flow_is_refused(self, queue, flow):
        with pytest.raises(ConfigurationError, match="flow must be the id of a flow"):
            queue.submit(Task(type="t", flow=flow))
        assert queue.count_tasks() == 0

    def test_the_longest_and_the_most_tags_are_accepted(self, queue):
        tags = [str(n).rjust(MAX_TAG, "x") for n in range(MAX_TAGS)]
        handle = queue.submit("t", tags=tags)
        assert tags_of(queue, handle) == tuple(tags)
        assert found(queue, tag=tags) == [handle.id]

    def test_a_task_with_tags_survives_its_dict(self, queue):
        task = queue.get_task_status(queue.submit("t", tags=["a"]).id)
        assert task.to_dict()["tags"] == ["a"]
        assert Task.from_dict(task.to_dict()) == task
        assert Task.from_dict({}).tags == ()


class TestSources:
    def test_a_task_has_the_tags_of_its_executor_besides_its_own(self, queue):
        queue.executor("mail", tags=["mail", "slow"])(lambda: None)
        handles = [
            queue.submit("mail"),
            queue.submit("mail", tags=["slow", "a"]),
            *queue.submit_many([Task(type="mail", tags=["b"])]),
        ]
        assert [tags_of(queue, handle) for handle in handles] == [
            ("mail", "slow"),
            ("slow", "a", "mail"),
            ("b", "mail", "slow"),
        ]
        assert queue.count_tasks(tag="mail") == 3

    def test_the_tags_of_executor_and_submit_are_at_most_twenty(self, queue):
        queue.executor("mail", tags=["mail"])(lambda: None)
        with pytest.raises(ConfigurationError, match="at most 20 tags, not 21"):
            queue.submit("mail", tags=[str(n) for n in range(MAX_TAGS)])
        assert queue.count_tasks() == 0

    def test_tags_at_registration_replace_those_of_the_executor(self, queue):
        made = executor("mail", tags=["mail"])(lambda: None)
        queue.register_executor(made, tags=["post"])
        assert tags_of(queue, made.submit()) == ("post",)

    def test_later_tags_of_a_bound_executor_replace_earlier_ones(self, queue):
        given = ["a"]
        bound = queue.executor("mail")(lambda: None).using(tags=given)
        given.append("changed")
        assert tags_of(queue, bound.submit()) == ("a",)
        assert bound.task().tags == ("a",)
        assert tags_of(queue, bound.using(tags=["b"]).submit()) == ("b",)
        assert tags_of(queue, queue.submit(bound, tags=["c"])) == ("c",)

    def test_a_map_tags_its_tasks(self, queue):
        queue.executor("double")(lambda n: 2 * n)
        queue.start()
        assert [*queue.map("double", [{"n": 1}, {"n": 2}], tags=["a"])] == [2, 4]
        assert queue.count_tasks(tag="a") == 2

    def test_the_tasks_of_a_schedule_have_its_tags(self, queue):
        queue.executor("mail", tags=["mail"])(lambda: None)
        schedule = queue.schedule("s", every(60), "mail", tags=["nightly"])
        assert tags_of(queue, schedule.trigger()) == ("nightly", "mail")
        [other] = queue.schedules().values()
        assert other.tags == schedule.tags == ("nightly", "mail")
        assert queue.schedule("untagged", every(60), "t").tags == ()
        assert tags_of(queue, other.trigger()) == ("nightly", "mail")
        assert queue.count_tasks(tag=["mail", "nightly"]) == 2

    def test_a_replaced_task_gets_the_tags_of_the_new_one(self, queue):
        first = queue.submit("t", tags=["a", "b"], unique_key="k")
        for tags in (["b", "c"], []):
            again = queue.submit("t", tags=tags, unique_key="k", on_conflict="replace")
            assert again.id == first.id
            assert tags_of(queue, first) == tuple(tags)
            assert [queue.count_tasks(tag=tag) for tag in "abc"] == [
                *(int(tag in tags) for tag in "abc")
            ]

    def test_a_task_that_is_refused_leaves_no_tag(self, queue):
        queue.submit("t", id="a", unique_key="k")
        for options in ({"id": "a"}, {"unique_key": "k"}):
            with pytest.raises(DuplicateTask):
                queue.submit("t", tags=["x"], **options)
        assert queue.count_tasks(tag="x") == 0


class TestFilters:
    @pytest.mark.every_store
    def test_tasks_are_listed_by_one_tag_or_by_several(self, queue):
        queue.submit("t", id="0", tags=["a", "b"])
        queue.submit("u", id="1", tags=["a"])
        queue.submit("t", id="2", tags=["b", "a"])
        queue.submit("t", id="3")
        queue.cancel_task("2")
        for fields, expected in [
            ({"tag": "a"}, "210"),
            ({"tag": ["a"]}, "210"),
            ({"tag": ["b", "a"]}, "20"),
            ({"tag": ["a", "c"]}, ""),
            ({"tag": []}, "3210"),
            ({"tag": "a", "type": "t"}, "20"),
            ({"tag": "a", "status": "pending"}, "10"),
            ({"tag": ["a", "b"], "status": "cancelled"}, "2"),
            ({"tag": "a", "older": 3600}, ""),
            ({"tag": "a", "newer": 3600, "limit": 2, "offset": 1}, "10"),
        ]:
            assert found(queue, **fields) == [*expected], fields
            count = expected if "offset" not in fields else "210"
            assert queue.count_tasks(**fields) == len(count), fields
        assert [task.id for task in queue.iter_tasks(tag="a")] == ["2", "1", "0"]
        assert TaskFilter(tag="a") == TaskFilter(tag=["a"])

    def test_the_pages_of_a_tag_cover_its_tasks_once(self, queue):
        names = "abcdefghijklmno"
        queue.submit_many(
            [Task(type="t", id=name, tags=["x"] * (n % 2)) for n, name in enumerate(names)]
        )
        page = queue.list_tasks(tag="x", limit=2)
        pages = [page]
        while page.next:
            page = queue.list_tasks(tag="x", limit=2, after=page.next)
            pages.append(page)
        assert [task.id for page in pages for task in page.tasks] == [*"nljhfdb"]
        assert {page.total for page in pages} == {7}

    @pytest.mark.parametrize("tag", [7, ["a b"], [""], "", {"a": 1}, "x" * (MAX_TAG + 1)])
    def test_a_filter_by_what_is_no_tag_is_refused(self, queue, tag):
        with pytest.raises(ConfigurationError, match="tag"):
            queue.list_tasks(tag=tag)

    @pytest.mark.parametrize("flow", [7, "", "a b", "x" * (MAX_TAG + 1), ["a"]])
    def test_a_filter_by_what_is_no_flow_is_refused(self, queue, flow):
        with pytest.raises(ConfigurationError, match="flow must be the id of a flow"):
            queue.list_tasks(flow=flow)

    @pytest.mark.timing(most_searched=2)
    def test_a_search_in_params_looks_at_the_tasks_of_the_tag(self, queue):
        queue.submit("t", {"n": 1}, id="old", tags=["a"])
        queue.submit_many([Task(type="t", params={"n": 1}) for _ in range(3)])
        page = queue.list_tasks(params={"n": 1}, tag="a")
        assert ([task.id for task in page.tasks], page.exact) == (["old"], True)
        assert not queue.list_tasks(params={"n": 1}).exact


class TestLife:
    def test_tags_stay_when_a_task_runs_fails_and_is_requeued(self, queue):
        right = []

        @queue.executor("mail", tags=["mail"])
        def mail(ctx):
            assert ctx.task.tags == ("a", "mail")
            if not right:
                raise ValueError("wrong")

        handle = queue.submit("mail", tags=["a"])
        queue.start()
        assert isinstance(handle.exception(PATIENCE), Exception)
        assert queue.dead_letters(tag="a").total == queue.dead_letters(tag="mail").total == 1
        assert queue.dead_letters(tag="b").total == 0
        right.append(True)
        assert queue.requeue_dead_letters(tag=["a", "mail"]) == 1
        queue.handle(handle.id).result(PATIENCE)
        assert tags_of(queue, handle) == ("a", "mail")
        assert found(queue, tag="a", status="completed") == [handle.id]

    @pytest.mark.every_store
    def test_a_deleted_or_pruned_task_leaves_no_tag(self, make_queue, clock):
        queue = make_queue(clock=clock)
        queue.declare("t")
        for task_id in "abc":
            queue.submit("t", id=task_id, tags=["x"])
        queue.delete("a")
        queue.cancel_task("b")
        clock.advance(10)
        assert queue.prune(clock.now() - timedelta(seconds=5)) == 1
        queue.submit("t", id="d")  # may take the place of a task that is gone
        assert found(queue, tag="x") == ["c"]
        assert queue.count_tasks(tag="x") == 1

    def test_tags_change_with_an_update_by_hand(self, queue):
        task = queue.get_task_status(queue.submit("t", tags=["a"]).id)
        task.tags = ["b"]
        queue.repository.update(task)
        assert (queue.count_tasks(tag="a"), queue.count_tasks(tag="b")) == (0, 1)
        task.tags = ["b c"]
        with pytest.raises(ConfigurationError, match="white space"):
            queue.repository.update(task)


class TestOwnRepositories:
    def test_a_repository_of_eight_methods_keeps_tags_if_it_stores_every_field(self):
        queue = Queue(TinyRepository())
        queue.declare("t")
        for n in range(250):
            queue.submit("t", id=str(n), tags=["a"] if n % 100 == 0 else [])
        assert found(queue, tag="a") == ["200", "100", "0"]
        assert queue.count_tasks(tag="a") == 3
        first = queue.list_tasks(tag="a", limit=2)
        assert [task.id for task in queue.list_tasks(tag="a", after=first.next)[0]] == ["0"]

    def test_a_repository_that_loses_tags_is_told_so_and_nothing_is_stored(self):
        queue = Queue(thirteen_fields_only())
        queue.declare("t")
        with pytest.raises(ConfigurationError, match="does not keep tags; nothing was stored"):
            queue.submit("t", tags=["a"])
        assert queue.count_tasks() == 0

    def test_memory_keeps_nothing_of_tags_that_no_task_has(self):
        repository = MemoryRepository()
        queue = Queue(repository)
        queue.declare("t")
        queue.delete(queue.submit("t", tags=["a", "b"]).id)
        assert not repository._indexes["tag"]
