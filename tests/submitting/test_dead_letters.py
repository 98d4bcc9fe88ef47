"""Dead letters: listing, requeuing and discarding them.

They are the changes of all matching tasks, of failed ones only: ``test_bulk.py`` has the other rules.
"""

from __future__ import annotations

from datetime import timedelta

import pytest
from helpers import PATIENCE, eventually, ids

from taskx import (
    ConfigurationError,
    Permanent,
    Task,
    TaskFilter,
    TaskStatus,
    chain,
)

# Tests count the starts of tasks, so a slow machine must hand no started task back.
pytestmark = pytest.mark.usefixtures("calm")


@pytest.fixture
def queue(make_queue, clock):
    """A queue that has run eight tasks, of which five failed, and has cancelled another."""
    queue = make_queue(worker_num=2, clock=clock)
    queue.mended = False

    def work(n):
        if not queue.mended and n >= 3:
            raise Permanent(f"{n} is too much")

    queue.executor("a")(work)
    queue.executor("b")(work)
    queue.submit("a", {"n": 0}, id="cancelled")
    queue.cancel_task("cancelled")
    for n in range(8):
        queue.submit("ab"[n % 2], {"n": n}, id=str(n), created_by="odd" if n % 2 else "even")
        clock.advance(1)
    queue.start()
    assert queue.drain(PATIENCE)
    clock.advance(1)
    return queue


def statuses(queue):
    return {task.id: task.status.value for task in queue.list_tasks()[0]}


def test_dead_letters_are_listed_newest_first_and_counted(queue):
    tasks, total = queue.dead_letters()
    assert ([task.id for task in tasks], total) == (["7", "6", "5", "4", "3"], 5)
    assert all(task.dead_letter and "too much" in task.error for task in tasks)
    tasks, total = queue.dead_letters(TaskFilter(type="a", limit=1))
    assert ([task.id for task in tasks], total) == (["6"], 2)


@pytest.mark.parametrize("change", ["requeue_dead_letters", "discard_dead_letters"])
def test_a_clock_that_was_set_back_hides_no_dead_letter(queue, clock, change):
    """Or another host wrote the tasks with a clock that is ahead."""
    clock.set_wall(clock.now() - timedelta(days=1))
    queue.mended = True
    assert getattr(queue, change)() == 5
    assert queue.drain(PATIENCE)
    assert queue.dead_letters()[1] == 0


@pytest.mark.parametrize("change", ["requeue_dead_letters", "discard_dead_letters"])
@pytest.mark.parametrize("batch", [1, 2, 3, 200])
def test_dead_letters_created_at_the_same_time_are_all_changed(make_queue, clock, batch, change):
    queue = make_queue(clock=clock)
    queue.executor("wrong")(lambda: 1 / 0)
    for name in ("a", "b", "b", "b", "b", "b", "c", "c", "d"):
        clock.advance(ord(name) - clock.monotonic() % 1000)
        queue.submit("wrong")
    queue.start()
    assert queue.drain(PATIENCE)
    assert getattr(queue, change)() == 9


@pytest.mark.parametrize("change", ["requeue_dead_letters", "discard_dead_letters"])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_task_deleted_during_the_listing_hides_no_other(queue, batch, change, monkeypatch):
    """Another program deletes some of them while they are listed."""
    queue.mended = True
    list_after = queue.repository.reads.list_after

    def disturbed(filter, after=None):
        monkeypatch.setattr(queue.repository.reads, "list_after", list_after)
        tasks, after = list_after(filter)
        for task in tasks:
            queue.delete(task.id)
        return tasks, after

    monkeypatch.setattr(queue.repository.reads, "list_after", disturbed)
    assert getattr(queue, change)() == 5 - batch
    assert queue.drain(PATIENCE)
    assert queue.dead_letters()[1] == 0


def test_a_requeued_child_does_not_wait_for_a_parent_outside_the_filter(make_queue):
    queue = make_queue()
    queue.executor("bad")(lambda: 1 / 0)
    queue.executor("fine")(lambda: "ran")
    queue.start()
    child = queue.submit("fine", depends_on=[queue.submit("bad")], on_parent_failure="fail")
    assert child.exception(PATIENCE)
    assert queue.requeue_dead_letters(TaskFilter(type="fine")) == 1
    assert queue.handle(child.id).result(PATIENCE) == "ran"


class TestFlows:
    """A requeue includes the tasks that were cancelled because of a dead letter."""

    @pytest.fixture
    def started(self, make_queue):
        queue = make_queue(worker_num=2)
        queue.mended, queue.ran = [], []

        @queue.executor("step")
        def step(ctx, n, wrong=False):
            if wrong and not queue.mended:
                raise Permanent("not yet")
            queue.ran.append(n)

        queue.start()
        return queue

    @staticmethod
    def step(n, **params):
        return Task(type="step", params={"n": n, **params})

    @pytest.fixture
    def flow(self, started):
        flow = started.submit_flow(chain(*(self.step(n, wrong=n == 1) for n in range(5))))
        assert started.drain(PATIENCE)
        assert self.statuses(flow) == ["completed", "failed", *["cancelled"] * 3]
        started.mended.append(True)
        return flow

    @staticmethod
    def statuses(flow):
        return [handle.task().status.value for handle in flow.handles]

    @pytest.mark.parametrize("how", ["all", "those of a filter", "one", "many"])
    def test_a_requeued_chain_runs_to_its_end(self, started, flow, how):
        failed = flow.ids[1]
        if how == "all":
            assert started.requeue_dead_letters() == 4
        elif how == "those of a filter":
            assert started.requeue_dead_letters(TaskFilter(limit=1)) == 4
        elif how == "many":
            assert started.requeue_many([failed]) == 4
        else:
            started.requeue(failed)
        assert started.drain(PATIENCE)
        assert self.statuses(flow) == ["completed"] * 5
        assert started.ran == [0, 1, 2, 3, 4]

    def test_requeuing_a_step_includes_the_later_steps(self, started, flow):
        """The step runs even though the step before it failed, because a user requeued it."""
        started.requeue(flow.ids[3])
        assert started.drain(PATIENCE)
        assert self.statuses(flow) == ["completed", "failed", "cancelled", *["completed"] * 2]

    def test_a_child_of_two_failed_parents_is_requeued_with_the_named_one(self, started):
        tasks = [Task(id=name, type="step", params={"n": 0, "wrong": True}) for name in "ab"]
        child = Task(id="c", type="step", params={"n": 1}, depends_on=["a", "b"])
        started.submit_many([*tasks, child])
        assert started.drain(PATIENCE)
        started.mended.append(True)
        started.requeue("b")
        assert started.drain(PATIENCE)
        assert statuses(started) == {"a": "failed", "b": "completed", "c": "cancelled"}
        started.requeue("a")
        assert started.drain(PATIENCE)
        assert set(statuses(started).values()) == {"completed"}

    def test_a_dead_letter_that_an_unfinished_task_needs_stays(self, started, gate):
        @started.executor("asks")
        def asks(ctx):
            gate()
            return ctx.parents[0].error

        bad = started.submit(self.step(0, wrong=True))
        other = started.submit(self.step(1, wrong=True))
        child = started.submit("asks", depends_on=[bad], on_parent_failure="run")
        gate.wait_for(1)
        eventually(other.done)
        assert started.discard_dead_letters() == 1
        assert [task.id for task in started.dead_letters()[0]] == [bad.id]
        gate.open()
        assert "not yet" in child.result(PATIENCE)
        assert started.discard_dead_letters() == 1


def test_dead_letters_can_be_discarded(queue):
    assert queue.discard_dead_letters(TaskFilter(type="b")) == 3
    assert ids(queue) == {"cancelled", "0", "1", "2", "4", "6"}
    assert queue.discard_dead_letters() == 2
    assert queue.dead_letters() == ([], 0)


@pytest.mark.parametrize("change", ["requeue_dead_letters", "discard_dead_letters"])
@pytest.mark.parametrize("batch", [2, 200])
@pytest.mark.parametrize(
    ("filter", "left"),
    [
        (TaskFilter(limit=1), ["6", "5", "4", "3"]),
        (TaskFilter(limit=3), ["4", "3"]),
        (TaskFilter(limit=2, offset=1), ["7", "4", "3"]),
        (TaskFilter(offset=3), ["7", "6", "5"]),
        (TaskFilter(type="b", limit=2), ["6", "4", "3"]),
        (TaskFilter(limit=0), ["7", "6", "5", "4", "3"]),
        (TaskFilter(limit=100), []),
        (TaskFilter(), []),
    ],
)
def test_a_limit_and_an_offset_choose_as_in_a_list(queue, change, batch, filter, left):
    queue.mended = True
    assert getattr(queue, change)(filter) == 5 - len(left)
    assert queue.drain(PATIENCE)
    assert [task.id for task in queue.dead_letters()[0]] == left


def test_without_a_limit_all_dead_letters_are_changed(make_queue):
    queue = make_queue(worker_num=1, overflow="spill")
    queue.executor("wrong")(lambda: 1 / 0)
    for _ in range(105):
        queue.submit("wrong")
    queue.start()
    assert queue.drain(PATIENCE)
    assert len(queue.dead_letters(TaskFilter(type="wrong"))[0]) == 100
    assert queue.discard_dead_letters(TaskFilter(type="wrong", limit=100)) == 100
    assert queue.dead_letters()[1] == 5
    queue.requeue_dead_letters(TaskFilter(type="wrong"))
    assert queue.drain(PATIENCE)
    assert {task.starts for task in queue.dead_letters()[0]} == {2}


def test_the_fields_of_a_filter_can_be_given_by_name(queue):
    queue.mended = True
    assert [task.id for task in queue.dead_letters(type="a", limit=1).tasks] == ["6"]
    assert queue.requeue_dead_letters(type="a") == 2
    assert queue.discard_dead_letters(created_by="odd", limit=2) == 2
    assert [task.id for task in queue.dead_letters(status="failed").tasks] == ["3"]
    for method in (queue.dead_letters, queue.requeue_dead_letters, queue.discard_dead_letters):
        with pytest.raises(ConfigurationError, match="must not have status completed"):
            method(status="completed")
        with pytest.raises(ConfigurationError, match=f"{method.__name__}.*not both: move type"):
            method(TaskFilter(), type="a")
        with pytest.raises(TypeError, match=f"{method.__name__}.* has no option typ"):
            method(typ="a")


@pytest.mark.parametrize("filter", ["x", {}, "", TaskStatus.FAILED, TaskFilter])
def test_other_objects_than_filters_are_refused(queue, filter):
    methods = (queue.dead_letters, queue.requeue_dead_letters, queue.discard_dead_letters)
    for method in (*methods, queue.list_tasks):
        with pytest.raises(ConfigurationError, match="filter must be a TaskFilter"):
            method(filter)
    assert queue.dead_letters()[1] == 5
