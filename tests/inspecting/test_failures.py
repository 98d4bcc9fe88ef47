"""Failed tasks in groups of the same cause, on every store."""

from __future__ import annotations

from datetime import timedelta

import pytest
from helpers import PATIENCE, eventually

import taskx
from taskx import ConfigurationError, Permanent, Place
from taskx.tasks.writes import Update


def broken(n):
    raise ValueError(f"{n} is too much")


def missing(n):
    return {}[n]


LINE = {call.__name__: call.__code__.co_firstlineno + 1 for call in (broken, missing)}


@pytest.fixture
def queue(make_queue, clock):
    """A queue on a clock that the test moves, with two types that fail in two functions."""
    queue = make_queue(worker_num=1, clock=clock)
    queue.mended = False

    def work(n):
        if not queue.mended:
            (broken if n < 3 else missing)(n)

    queue.executor("a")(work)
    queue.executor("b")(work)
    return queue


def fail(queue, clock, *tasks):
    """Run these tasks, each a pair of a type and a number, a second after each other."""
    for type, n in tasks:
        queue.submit(type, {"n": n}, id=f"{type}{n}")
        clock.advance(1)
    queue.start()
    assert queue.drain(PATIENCE)


def groups(queue, **options):
    """Return the groups, after a check that the answer is JSON."""
    found = queue.failures(**options)
    assert taskx.tasks.payload.encode(found.to_dict(), "failures")
    assert len(found) == len(found.groups)
    return list(found)


def place(function):
    return Place(__file__, LINE[function], function)


def test_without_failed_tasks_there_are_no_groups(queue):
    found = queue.failures()
    assert (list(found), found.since, found.complete) == ([], None, True)


def test_failed_tasks_are_grouped_by_type_error_and_place(queue, clock):
    fail(queue, clock, ("a", 0), ("a", 1), ("a", 2), ("a", 3), ("b", 1), ("b", 2))
    queue.mended = True
    queue.submit("a", {"n": 9}).result(PATIENCE)
    assert [(g.type, g.error_type, g.place, g.count) for g in groups(queue)] == [
        ("a", "ValueError", place("broken"), 3),
        ("b", "ValueError", place("broken"), 2),
        ("a", "KeyError", place("missing"), 1),
    ]


def test_a_group_has_its_first_and_last_failure_and_an_example(queue, clock):
    queue.start()
    for n in range(3):
        fail(queue, clock, ("a", n))
        clock.advance(60)
    [group] = groups(queue)
    tasks = [queue.get_task_status(task_id) for task_id in group.task_ids]
    assert [task.id for task in tasks] == ["a2", "a1", "a0"]
    assert (group.last, group.first) == (tasks[0].completed_at, tasks[-1].completed_at)
    assert group.times == [task.completed_at for task in tasks]
    assert (group.example, group.error) == ("a2", "ValueError: 2 is too much")


@pytest.mark.timing(batch=3)
class TestRequeuing:
    """A whole group runs again, also the tasks that were not read."""

    @pytest.fixture
    def group(self, queue, clock):
        """The group of ten tasks of one cause, of which two were read, among failures of other causes."""

        @queue.executor("often")
        def often(n):
            if not queue.mended:
                (broken if n < 10 else missing)(n)

        fail(queue, clock, ("a", 0), ("b", 1), *(("often", n) for n in (*range(10), 10, 11)))
        queue.mended = True
        [group] = [group for group in queue.failures(at_most=4) if group.place.function == "broken"]
        assert (group.type, group.count) == ("often", 2)
        return group

    def left(self, queue):
        return {(group.type, group.place.function): group.count for group in groups(queue)}

    @pytest.mark.every_store
    def test_tasks_that_were_not_read_belong_to_it(self, queue, group):
        before = self.left(queue)
        assert queue.requeue_failures(group, dry_run=True).matched == 10
        assert self.left(queue) == before
        told = []
        bulk = queue.requeue_failures(group, on_progress=told.append)
        assert (bulk.matched, bulk.changed, len(told)) == (10, 10, 4)
        assert queue.drain(PATIENCE)
        assert self.left(queue) == {
            ("a", "broken"): 1,
            ("b", "broken"): 1,
            ("often", "missing"): 2,
        }

    def test_its_tasks_start_at_a_rate(self, queue, group, clock):
        bulk = queue.requeue_failures(group, rate="1/h")
        assert bulk.starts_until == clock.now() + timedelta(hours=9)
        assert queue.count_tasks(type="often", status="failed") == 2

    @pytest.mark.every_store
    def test_a_second_call_goes_on_after_the_first(self, queue, group, clock):
        def interrupt(bulk):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            queue.requeue_failures(group, rate="1/h", on_progress=interrupt)
        assert queue.count_tasks(type="often", status="failed") == 9
        bulk = queue.requeue_failures(group, rate="1/h")
        assert bulk.starts_until == clock.now() + timedelta(hours=9)

    @pytest.mark.parametrize("other", [None, "often", ["id"]])
    def test_other_objects_than_groups_are_refused(self, queue, other):
        with pytest.raises(ConfigurationError, match=r"takes a group of queue\.failures"):
            queue.requeue_failures(other)


def test_a_group_without_an_error_type_is_requeued(queue, clock):
    for n in range(3):
        parent = queue.submit("a", {"n": n}, delay=60)
        queue.submit("b", {"n": n}, depends_on=[parent], on_parent_failure="fail")
        queue.cancel_task(parent.id)
    fail(queue, clock, ("b", 5))
    queue.mended = True
    group = eventually(lambda: [group for group in groups(queue) if group.count == 3])[0]
    assert (group.error_type, queue.requeue_failures(group).changed) == ("", 3)
    assert queue.drain(PATIENCE)
    assert [group.error_type for group in groups(queue)] == ["KeyError"]


def test_groups_can_be_limited_to_a_type_and_an_age(queue, clock):
    queue.start()
    fail(queue, clock, ("a", 0))
    clock.advance(60)
    late = clock.now()
    fail(queue, clock, ("a", 1), ("b", 1))
    assert [group.type for group in groups(queue, type="b")] == ["b"]
    assert [group.task_ids for group in groups(queue, type="a", since=late)] == [["a1"]]
    assert groups(queue, since=clock.now() + timedelta(seconds=1)) == []


def test_the_answer_says_if_it_looked_at_the_newest_only(queue, clock):
    fail(queue, clock, ("a", 0), ("a", 1), ("a", 2))
    found = queue.failures(at_most=2)
    assert [group.task_ids for group in found] == [["a2", "a1"]]
    assert found.since == queue.get_task_status("a1").created_at
    assert not found.complete
    assert queue.failures(at_most=4).complete


def test_a_task_that_never_raised_has_no_error_type_and_no_place(queue, clock):
    parent = queue.submit("a", {"n": 0}, delay=60)
    queue.submit("b", {"n": 0}, depends_on=[parent], on_parent_failure="fail")
    queue.cancel_task(parent.id)
    [group] = eventually(lambda: groups(queue))
    assert (group.type, group.error_type, group.place) == ("b", "", None)


def test_each_line_that_fails_is_a_group_of_its_own(make_queue):
    queue = make_queue()

    @queue.executor("c")
    def c(n):
        if n:
            raise Permanent("the second line")
        raise Permanent("the third line")

    with queue:
        for n in (0, 1):
            queue.submit("c", {"n": n})
        assert queue.drain(PATIENCE)
    lines = sorted(group.place.line for group in groups(queue))
    assert lines[1] - lines[0] == 1


def test_a_damaged_record_hides_no_other(queue, clock):
    fail(queue, clock, ("a", 0), ("a", 1))
    queue.stop()
    assert all(queue.repository.apply([Update("a0", {}, {"completed_at": None})]))
    assert [group.task_ids for group in groups(queue)] == [["a1"]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"type": ""}, "type"),
        ({"since": 3}, "since"),
        ({"since": taskx.testing.ManualClock().now().replace(tzinfo=None)}, "since"),
        ({"at_most": 0}, "at_most"),
    ],
)
def test_a_wrong_argument_is_refused(queue, options, words):
    with pytest.raises(ConfigurationError, match=words):
        queue.failures(**options)
