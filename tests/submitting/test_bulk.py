"""Changes of all tasks that match a filter: requeue, cancel and delete, in batches."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from datetime import datetime, timedelta, timezone

import pytest
from helpers import PATIENCE, SpyMemory, eventually, ids, parts_of
from storage.repositories import TinyRepository

from taskx import (
    Bulk,
    ConfigurationError,
    Hook,
    Permanent,
    Queue,
    QueueStopped,
    RepositoryUnavailable,
    Task,
    TaskFilter,
    chain,
    group,
)
from taskx.tasks.writes import Update

# Tests count the starts of tasks.
pytestmark = pytest.mark.usefixtures("calm")

ALL = ("requeue_all", "cancel_all", "delete_all")


@pytest.fixture
def queue(make_queue, clock):
    """A queue with seven failed tasks, two completed ones and a cancelled one."""
    queue = make_queue(worker_num=2, clock=clock)
    queue.mended = False

    @queue.executor("a")
    @queue.executor("b")
    def work(n):
        if n >= 2 and not queue.mended:
            raise Permanent(f"{n} is too much")

    queue.submit("a", {"n": 0}, id="cancelled")
    queue.cancel_task("cancelled")
    for n in range(9):
        queue.submit("ab"[n % 2], {"n": n}, id=str(n))
        clock.advance(1)
    queue.start()
    assert queue.drain(PATIENCE)
    return queue


@pytest.fixture
def waiting(make_queue, clock):
    """A queue that is not started, with seven pending tasks."""
    queue = make_queue(clock=clock)
    queue.declare("a", "b")
    for n in range(7):
        queue.submit("ab"[n % 2], {"n": n}, id=str(n))
        clock.advance(1)
    return queue


def statuses(queue):
    return {task.id: task.status.value for task in queue.iter_tasks()}


def counts(queue):
    return dict(Counter(statuses(queue).values()))


def starts(queue):
    return {task.id: task.starts for task in queue.iter_tasks()}


def fail(queue, *task_ids):
    """Let pending tasks fail without running them."""
    for task_id in task_ids:
        queue.repository.update_status(task_id, "running")
        queue.repository.update_status(task_id, "failed")


class TestRequeue:
    def test_all_failed_tasks_run_again(self, queue):
        queue.mended = True
        bulk = queue.requeue_all()
        assert (bulk.action, bulk.matched, bulk.changed, bulk.skipped) == ("requeue", 7, 7, {})
        assert queue.drain(PATIENCE)
        assert counts(queue) == {"completed": 9, "cancelled": 1}

    def test_cancelled_tasks_run_again_if_asked_for(self, queue):
        assert queue.requeue_all(status="cancelled").changed == 1
        assert queue.drain(PATIENCE)
        assert statuses(queue)["cancelled"] == "completed"

    def test_a_filter_chooses_the_tasks(self, queue):
        queue.mended = True
        assert queue.requeue_all(type="b").changed == 3
        assert queue.requeue_all(TaskFilter(error="8 is")).changed == 1
        assert queue.drain(PATIENCE)
        assert [task.id for task in queue.dead_letters().tasks] == ["6", "4", "2"]

    @pytest.mark.parametrize("batch", [1, 2, 3])
    def test_a_task_that_fails_again_at_once_is_requeued_once(self, queue, batch, clock):
        bulk = queue.requeue_all(on_progress=lambda bulk: queue.drain(PATIENCE))
        assert bulk.changed == 7
        assert queue.drain(PATIENCE)
        assert {number for i, number in starts(queue).items() if i > "1" and len(i) == 1} == {2}

    @pytest.mark.timing(batch=2)
    def test_tasks_that_appear_meanwhile_are_left_alone(self, queue):

        def more(bulk):
            queue.submit("a", {"n": 5}, id=f"new {bulk.matched}")
            assert queue.drain(PATIENCE)

        queue.requeue_all(on_progress=more)
        assert queue.drain(PATIENCE)
        new = [number for task_id, number in starts(queue).items() if task_id.startswith("new")]
        assert new == [1] * 4

    def test_a_task_whose_key_is_held_is_skipped(self, queue):
        queue.submit("a", {"n": 5}, id="key", unique_key="k")
        assert queue.drain(PATIENCE)
        queue.submit("a", {"n": 5}, unique_key="k", delay=60)
        bulk = queue.requeue_all(id_prefix="key")
        assert (bulk.matched, bulk.changed, bulk.skipped) == (1, 0, {"unique_key": 1})

    def test_a_task_that_moved_meanwhile_is_skipped(self, queue, monkeypatch):
        commit = parts_of(queue).moves.commit

        def late(writes, tasks=None):
            monkeypatch.undo()
            queue.delete("5")
            return commit(writes, tasks)

        monkeypatch.setattr(parts_of(queue).moves, "commit", late)
        bulk = queue.requeue_all()
        assert (bulk.matched, bulk.changed, bulk.skipped) == (7, 6, {"changed": 1})

    def test_hooks_are_told_of_each_task(self, make_queue, queue):
        told = []

        class Note(Hook):
            def requeued(self, task):
                told.append(task.id)

        other = make_queue(hooks=[Note()])
        other.requeue_all(type="b")
        other.stop()
        assert sorted(told) == ["3", "5", "7"]

    def test_a_stopped_queue_requeues_nothing(self, queue):
        queue.stop()
        with pytest.raises(QueueStopped):
            queue.requeue_all()
        assert counts(queue)["failed"] == 7


class TestFamilies:
    """Parents and children of the requeued tasks."""

    @pytest.fixture
    def queue(self, make_queue):
        queue = make_queue(worker_num=2)
        queue.mended, queue.ran = False, []

        @queue.executor("step")
        def step(ctx, n=0, wrong=False):
            if wrong and not queue.mended:
                raise Permanent("not yet")
            assert all(parent.status == "completed" for parent in ctx.parents)
            queue.ran.append(n)

        queue.start()
        return queue

    @pytest.mark.parametrize("batch", [1, 2, 200])
    def test_the_rest_of_each_chain_runs_again(self, queue, batch):
        for _ in range(3):
            steps = (Task(type="step", params={"wrong": n == 0}) for n in range(3))
            queue.submit_flow(chain(*steps))
        assert queue.drain(PATIENCE)
        queue.mended = True
        bulk = queue.requeue_all()
        assert (bulk.matched, bulk.changed, bulk.more) == (3, 3, 6)
        assert queue.drain(PATIENCE)
        assert counts(queue) == {"completed": 9}

    @pytest.mark.parametrize("batch", [1, 3, 200])
    @pytest.mark.parametrize("requeue_batch", [2, 1000])
    @pytest.mark.parametrize("limit", [{}, {"limit": 100}])
    def test_children_wait_for_parents_of_the_same_filter(self, queue, batch, requeue_batch, limit):
        parents = {"0": [], "1": [], "2": ["0", "1"], "3": ["2"], "4": ["0", "3"], "5": ["3", "1"]}
        queue.submit_many(
            Task(
                id=task_id,
                type="step",
                params={"n": int(task_id), "wrong": True},
                depends_on=depends_on,
                on_parent_failure="fail",
            )
            for task_id, depends_on in parents.items()
        )
        assert queue.drain(PATIENCE)
        queue.mended = True
        bulk = queue.requeue_all(**limit)
        assert (bulk.matched, bulk.changed, bulk.more) == (6, 6, 0)
        assert queue.drain(PATIENCE)
        assert sorted(queue.ran) == [0, 1, 2, 3, 4, 5]

    @pytest.mark.parametrize("batch", [1, 2, 3])
    def test_a_family_that_fails_again_at_once_is_requeued_once(self, queue, batch):
        """Parents are requeued with their children: their own page must not requeue them again."""
        queue.submit_many(
            Task(
                id=str(n),
                type="step",
                params={"n": n, "wrong": True},
                depends_on=[str(n - 1)] if n else [],
                on_parent_failure="run",
            )
            for n in range(6)
        )
        assert queue.drain(PATIENCE)
        assert set(starts(queue).values()) == {1}
        bulk = queue.requeue_all(on_progress=lambda bulk: queue.drain(PATIENCE))
        assert (bulk.matched, bulk.changed) == (6, 6)
        assert queue.drain(PATIENCE)
        assert set(starts(queue).values()) == {2}

    def test_a_child_that_you_cancelled_stays_cancelled(self, queue):
        parent = queue.submit("step", {"wrong": True}, delay=60)
        child = queue.submit("step", depends_on=[parent])
        queue.cancel_task(child.id)
        fail(queue, parent.id)
        assert queue.requeue_all().more == 0
        assert child.task().status == "cancelled"


@pytest.mark.timing(batch=1)
def test_a_parent_that_was_stored_after_its_child_is_requeued_once(make_queue, clock):
    """Both have the same date, and the parent is listed first. It fails again before its child's page."""
    queue = make_queue(worker_num=1, clock=clock)
    queue.executor("wrong")(lambda: 1 / 0)
    child = Task(id="child", type="wrong", depends_on=["parent"], on_parent_failure="run")
    queue.submit_many([child, Task(id="parent", type="wrong")])
    queue.start()
    assert queue.drain(PATIENCE)
    assert [task.id for task in queue.iter_tasks()] == ["parent", "child"]
    assert queue.requeue_all(on_progress=lambda bulk: queue.drain(PATIENCE)).changed == 2
    assert queue.drain(PATIENCE)
    assert starts(queue) == {"parent": 2, "child": 2}


@pytest.mark.timing(requeue_batch=6)
@pytest.mark.parametrize("limit", [{}, {"limit": 9}])
def test_large_families_are_requeued_one_after_the_other(make_queue, limit):
    """Each one in a transaction of its own, so that a crash leaves no part of one."""
    queue = make_queue()
    queue.declare("t")
    for parent in "abcd":
        queue.submit("t", id=parent)
        children = queue.submit_many(Task(type="t", depends_on=[parent]) for _ in range(5))
        fail(queue, parent)
        ended = {"status": "cancelled", "error": f"its parent {parent} failed", "waiting_on": None}
        assert all(queue.repository.apply([Update(child.id, {}, ended) for child in children]))
    queue.repository.batches.clear()
    bulk = queue.requeue_all(**limit)
    assert (bulk.matched, bulk.changed, bulk.more) == (4, 4, 20)
    assert [len(batch) for batch in queue.repository.batches] == [6, 6, 6, 6]
    assert counts(queue) == {"pending": 24}


class TestRate:
    """The tasks start one after the other."""

    @pytest.fixture
    def failed(self, waiting):
        fail(waiting, *map(str, range(7)))
        return waiting

    @staticmethod
    def times(queue, clock):
        """Return the seconds from now at which pending tasks start, the newest task first."""
        waits = [t.run_at - clock.now() for t in queue.iter_tasks(status="pending")]
        return [wait.total_seconds() for wait in waits]

    @pytest.mark.parametrize("batch", [2, 200])
    def test_the_tasks_start_at_the_rate(self, failed, clock, batch):
        bulk = failed.requeue_all(rate="30/m")
        assert self.times(failed, clock) == [0, 2, 4, 6, 8, 10, 12]
        assert bulk.starts_until == clock.now() + timedelta(seconds=12)
        assert [task_id for task_id, _ in failed.repository.due(None, 9)] == list("543210")
        assert [stub.id for stub in failed.repository.ready(["a", "b"], 9)] == ["6"]

    def test_a_second_call_goes_on_after_the_first(self, failed, make_queue, clock):
        """It may be in another process, after the first one was killed."""
        failed.requeue_all(rate="30/m", limit=3)
        clock.advance(1)
        before = {task.id: task.run_at for task in failed.iter_tasks(status="pending")}
        other = make_queue(clock=clock)
        other.requeue_all(rate="30/m", type="b")
        assert self.times(other, clock)[3:] == [0, 2]  # other conditions
        assert other.requeue_all(rate=(1, 2), older=0.5, limit=1).changed == 1
        after = {task.id: task.run_at for task in other.iter_tasks(status="pending")}
        assert {task_id: after[task_id] for task_id in before} == before

    def test_the_same_conditions_continue_whatever_their_dates(self, failed, clock):
        failed.requeue_all(rate="30/m", newer=3)
        assert self.times(failed, clock) == [0, 2, 4]
        clock.advance(1)
        failed.requeue_all(rate=(30, 60.0), older=1)
        assert self.times(failed, clock) == [-1, 1, 3, 5, 7, 9, 11]

    def test_another_rate_begins_at_once(self, failed, clock):
        failed.requeue_all(rate="1/h", newer=3)
        failed.requeue_all(rate="1/s")
        assert self.times(failed, clock)[3:] == [0, 1, 2, 3]

    def test_what_is_over_is_forgotten(self, failed, clock):
        failed.requeue_all(rate="1/s", newer=3)
        clock.advance(100)
        failed.requeue_all(rate="1/m", limit=1)
        text = failed.repository.notes("bulk")["bulk"].text
        assert len(json.loads(text)) == 1
        failed.requeue_all(rate="1/s")
        assert self.times(failed, clock)[4:] == [0, 1, 2]

    def test_a_damaged_note_is_replaced(self, failed, clock):
        failed.repository.put_note("bulk", "[]", 0)
        failed.requeue_all(rate="1/s")
        assert max(self.times(failed, clock)) == 6

    @pytest.mark.timing(batch=1)
    def test_two_calls_at_once_share_the_rate(self, failed, make_queue, clock):
        """Between the read and the write of the note, another process reserves a time."""
        other = make_queue(clock=clock)
        put_note = failed.repository.put_note

        def late(*args):
            failed.repository.put_note = put_note
            other.requeue_all(rate="1/s", limit=1, offset=3)
            return put_note(*args)

        failed.repository.put_note = late
        failed.requeue_all(rate="1/s")
        assert sorted(self.times(failed, clock)) == [0, 1, 2, 3, 4, 5, 6]

    def test_a_rate_beyond_the_calendar_ends_with_it(self, failed):
        failed.requeue_all(rate=(1, timedelta(days=900_000)))
        assert max(task.run_at for task in failed.iter_tasks()).year == 9999

    def test_tasks_of_a_key_wait_for_their_turn_and_their_time(self, make_queue, clock):
        queue = make_queue(clock=clock)
        queue.declare("t")
        for n in range(2):
            queue.submit("t", id=str(n), concurrency_key="k")
            fail(queue, str(n))
            clock.advance(1)
        queue.requeue_all(rate="1/m")
        assert [task_id for task_id, _ in queue.repository.due(None, 9)] == ["0"]
        assert [task.run_at is not None for task in queue.iter_tasks()] == [True, True]

    def test_children_wait_for_their_parents_only(self, make_queue, clock):
        queue = make_queue(clock=clock)
        queue.declare("t")
        first, second = queue.submit_flow(chain(Task(type="t"), Task(type="t"))).ids
        fail(queue, first)
        queue.repository.update_status(second, "cancelled")
        task = queue.get_task_status(second)
        task.error = f"its parent {first} failed"
        queue.repository.update(task)
        assert queue.requeue_all(rate="1/h").more == 1
        assert queue.get_task_status(second).run_at is None

    @pytest.mark.parametrize("rate", ["fast", "0/m", (1, 0), 5])
    def test_a_wrong_rate_is_refused(self, failed, rate):
        with pytest.raises(ConfigurationError, match="rate"):
            failed.requeue_all(rate=rate)
        with pytest.raises(ConfigurationError, match="rate"):
            failed.requeue_all(rate=rate, dry_run=True)
        assert counts(failed) == {"failed": 7}


class TestCancel:
    def test_pending_tasks_are_cancelled(self, waiting):
        bulk = waiting.cancel_all(type="a")
        assert (bulk.action, bulk.matched, bulk.changed, bulk.asked) == ("cancel", 4, 4, 0)
        assert counts(waiting) == {"pending": 3, "cancelled": 4}

    def test_running_tasks_are_asked_to_stop(self, make_queue, gate):
        queue = make_queue(worker_num=2)
        queue.executor("hold")(lambda ctx: (gate(), ctx.token.raise_if_cancelled()))
        queue.start()
        handles = [queue.submit("hold") for _ in range(2)]
        gate.wait_for(2)
        queue.submit("hold", delay=60)
        bulk = queue.cancel_all(everything=True)
        assert (bulk.matched, bulk.changed, bulk.asked, bulk.skipped) == (3, 3, 2, {})
        bulk = queue.cancel_all(status="running")
        assert (bulk.matched, bulk.changed, bulk.skipped) == (2, 0, {"asked": 2})
        gate.open()
        eventually(lambda: all(handle.task().status == "cancelled" for handle in handles))

    def test_ended_tasks_are_not_looked_at(self, queue):
        before = statuses(queue)
        assert queue.cancel_all(type="a").matched == 0
        assert statuses(queue) == before
        with pytest.raises(ConfigurationError, match="must not have status failed"):
            queue.cancel_all(status="failed")

    @pytest.mark.parametrize("batch", [1, 200])
    def test_a_limit_chooses_the_newest(self, waiting, batch):
        waiting.repository.update_status("5", "running")
        bulk = waiting.cancel_all(type="b", limit=2)
        assert (bulk.matched, bulk.changed, bulk.asked) == (2, 2, 1)
        assert [i for i, s in statuses(waiting).items() if s == "cancelled"] == ["3"]

    def test_waiting_children_are_cancelled_with_their_parent(self, waiting):
        waiting.submit("a", id="child", depends_on=["0"])
        assert waiting.cancel_all(id_prefix="0").changed == 1
        assert statuses(waiting)["child"] == "cancelled"

    def test_hooks_are_told_of_the_ends(self, make_queue, waiting):
        told = []

        class Note(Hook):
            def finished(self, task):
                told.append((task.id, task.status.value))

        other = make_queue(hooks=[Note()])
        other.cancel_all(type="b")
        other.stop()
        assert sorted(told) == [("1", "cancelled"), ("3", "cancelled"), ("5", "cancelled")]

    def test_a_task_that_ends_meanwhile_is_skipped(self, waiting, monkeypatch):
        commit = parts_of(waiting).moves.commit

        def late(writes, tasks=None):
            monkeypatch.undo()
            fail(waiting, "3")
            return commit(writes, tasks)

        monkeypatch.setattr(parts_of(waiting).moves, "commit", late)
        bulk = waiting.cancel_all(everything=True)
        assert (bulk.matched, bulk.changed, bulk.skipped) == (7, 6, {"changed": 1})

    @pytest.mark.timing(batch=3)
    def test_a_task_that_starts_meanwhile_is_asked_to_stop(self, waiting):

        def start(bulk):
            if bulk.matched == 3:
                waiting.repository.update_status("0", "running")

        bulk = waiting.cancel_all(everything=True, on_progress=start)
        assert (bulk.matched, bulk.changed, bulk.asked) == (7, 7, 1)


class TestDelete:
    def test_matching_tasks_are_deleted(self, queue):
        bulk = queue.delete_all(status="failed", type="b")
        assert (bulk.action, bulk.matched, bulk.changed, bulk.skipped) == ("delete", 3, 3, {})
        assert ids(queue) == {"cancelled", "0", "1", "2", "4", "6", "8"}
        assert queue.delete_all(everything=True).changed == 7
        assert ids(queue) == set()

    def test_pending_tasks_are_deleted_too(self, waiting):
        assert waiting.delete_all(type="a").changed == 4
        assert ids(waiting) == {"1", "3", "5"}

    def test_running_tasks_stay(self, waiting):
        waiting.repository.update_status("3", "running")
        bulk = waiting.delete_all(everything=True)
        assert (bulk.matched, bulk.changed, bulk.skipped) == (7, 6, {"running": 1})
        assert ids(waiting) == {"3"}
        with pytest.raises(ConfigurationError, match="cancel them first"):
            waiting.delete_all(status="running")

    @pytest.mark.parametrize("batch", [1, 2, 200])
    def test_tasks_that_an_unfinished_task_needs_stay(self, waiting, batch):
        waiting.submit("a", id="x1", depends_on=["0"])
        waiting.submit("a", id="x2", depends_on=["x1"], created_by="me")
        bulk = waiting.delete_all(type="a", created_by="")
        assert (bulk.matched, bulk.changed, bulk.skipped) == (5, 3, {"needed": 2})
        assert ids(waiting) == {"0", "x1", "x2", "1", "3", "5"}

    @pytest.mark.parametrize("batch", [1, 2, 200])
    def test_whole_flows_are_deleted(self, waiting, batch):
        waiting.submit_flow(chain(*(Task(type="a") for _ in range(5))))
        waiting.submit_flow(chain(Task(type="a"), group(Task(type="a"), Task(type="a"))))
        assert waiting.delete_all(everything=True).changed == 15
        assert ids(waiting) == set()

    def test_children_of_deleted_tasks_that_wait_for_nothing_else_end(self, make_queue, waiting):
        child = waiting.submit("b", depends_on=["0"], on_parent_failure="run")
        assert waiting.delete_all(type="a").skipped == {"needed": 1}
        waiting.cancel_task(child.id)
        assert waiting.delete_all(type="a").changed == 1

    def test_a_task_that_moves_meanwhile_stays(self, queue, monkeypatch):
        commit = parts_of(queue).moves.commit

        def late(writes, tasks=None):
            monkeypatch.undo()
            queue.requeue("5")
            assert queue.drain(PATIENCE)  # it has failed again
            return commit(writes, tasks)

        monkeypatch.setattr(parts_of(queue).moves, "commit", late)
        bulk = queue.delete_all(status="failed")
        assert (bulk.matched, bulk.changed, bulk.skipped) == (7, 6, {"changed": 1})
        assert queue.get_task_status("5").starts == 2


class TestDeliberate:
    """The change of every task must be meant."""

    @pytest.mark.parametrize("method", ["cancel_all", "delete_all"])
    @pytest.mark.parametrize("fields", [{}, {"limit": 3}, {"type": None}, {"offset": 1}])
    def test_no_condition_is_refused(self, waiting, method, fields):
        before = statuses(waiting)
        for dry_run in (False, True):
            with pytest.raises(ConfigurationError, match=rf"{method}\(\).*say everything=True"):
                getattr(waiting, method)(**fields, dry_run=dry_run)
        with pytest.raises(ConfigurationError, match="everything=True"):
            getattr(waiting, method)(TaskFilter(limit=3))
        assert statuses(waiting) == before

    @pytest.mark.parametrize("method", ["cancel_all", "delete_all"])
    def test_everything_with_a_condition_is_refused(self, waiting, method):
        with pytest.raises(ConfigurationError, match=rf"{method}\(\).*not both: type"):
            getattr(waiting, method)(type="a", everything=True)

    def test_statuses_that_cannot_run_again_are_refused(self, queue):
        with pytest.raises(ConfigurationError, match="must not have status completed"):
            queue.requeue_all(status="completed")

    @pytest.mark.parametrize("method", ALL)
    def test_a_limit_of_the_count_is_no_limit_of_the_change(self, queue, method):
        before = statuses(queue)
        with pytest.raises(ConfigurationError, match=r"at_most.*say dry_run=True, or limit="):
            getattr(queue, method)(type="a", at_most=2)
        with pytest.raises(ConfigurationError, match="on_progress must be a function"):
            getattr(queue, method)(type="a", on_progress="print")
        assert statuses(queue) == before

    @pytest.mark.parametrize("method", ALL)
    def test_a_misspelt_field_is_refused(self, queue, method):
        with pytest.raises(TypeError, match=rf"{method}\(\) has no option typ"):
            getattr(queue, method)(typ="a")
        with pytest.raises(ConfigurationError, match=rf"{method}.*not both"):
            getattr(queue, method)(TaskFilter(), type="a")


class TestDryRun:
    def test_a_dry_run_only_counts(self, queue):
        before = statuses(queue)
        counted = {
            "requeue_all": {"status": "failed"},
            "delete_all": {"type": "a"},
            "cancel_all": {"type": "a"},
        }
        found = {
            name: getattr(queue, name)(**fields, dry_run=True) for name, fields in counted.items()
        }
        assert {name: bulk.matched for name, bulk in found.items()} == {
            "requeue_all": 7,
            "delete_all": 6,
            "cancel_all": 0,
        }
        assert all(bulk.dry_run and bulk.exact and not bulk.changed for bulk in found.values())
        assert statuses(queue) == before

    def test_a_count_can_be_capped(self, queue):
        bulk = queue.requeue_all(dry_run=True, at_most=3)
        assert (bulk.matched, bulk.exact) == (3, False)
        bulk = queue.requeue_all(dry_run=True, at_most=7)
        assert (bulk.matched, bulk.exact) == (7, True)
        with pytest.raises(ConfigurationError, match="at_most"):
            queue.requeue_all(dry_run=True, at_most=0)

    def test_a_limit_and_an_offset_count(self, queue):
        assert queue.requeue_all(dry_run=True, limit=3).matched == 3
        assert queue.requeue_all(dry_run=True, offset=5).matched == 2
        assert queue.requeue_all(dry_run=True, offset=9).matched == 0
        bulk = queue.requeue_all(dry_run=True, limit=2, at_most=3)
        assert (bulk.matched, bulk.exact) == (2, True)

    def test_a_dry_run_of_a_cancel_counts_pending_and_running_tasks(self, waiting):
        waiting.repository.update_status("3", "running")
        bulk = waiting.cancel_all(everything=True, dry_run=True)
        assert (bulk.matched, bulk.exact) == (7, True)
        bulk = waiting.cancel_all(everything=True, dry_run=True, at_most=6)
        assert (bulk.matched, bulk.exact) == (6, False)

    def test_a_stopped_queue_can_count(self, queue):
        queue.stop()
        assert queue.requeue_all(dry_run=True).matched == 7


class TestProgress:
    @pytest.mark.timing(batch=3)
    @pytest.mark.parametrize("method", ALL)
    def test_each_batch_is_told(self, queue, method):
        told = []
        if method == "cancel_all":
            queue.stop()
            queue = Queue(queue.repository)
            queue.requeue_all()
        bulk = getattr(queue, method)(
            status="pending" if method == "cancel_all" else "failed", on_progress=told.append
        )
        assert [(b.matched, b.changed) for b in told] == [(3, 3), (6, 6), (7, 7)]
        assert told[-1] == bulk
        assert bulk.reached == min(b.reached for b in told)

    @pytest.mark.timing(batch=3)
    def test_an_interrupt_leaves_whole_batches_and_the_next_call_goes_on(self, queue):
        queue.mended = True

        def interrupt(bulk):
            if bulk.changed == 6:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            queue.requeue_all(on_progress=interrupt)
        assert queue.drain(PATIENCE)
        assert counts(queue)["failed"] == 1
        assert queue.requeue_all().changed == 1
        assert queue.drain(PATIENCE)
        assert counts(queue) == {"completed": 9, "cancelled": 1}

    @pytest.mark.timing(batch=3)
    def test_a_call_can_go_on_where_another_stopped(self, queue):
        """Then it leaves out tasks that have failed again since."""
        told = []

        def interrupt(bulk):
            told.append(bulk)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            queue.requeue_all(on_progress=interrupt)
        assert queue.drain(PATIENCE)
        assert counts(queue)["failed"] == 7
        bulk = queue.requeue_all(end_date=told[0].reached)
        assert bulk.changed == 5  # the task of that date again, too
        assert queue.drain(PATIENCE)
        assert [starts(queue)[task_id] for task_id in "8765432"] == [2, 2, 3, 2, 2, 2, 2]

    @pytest.mark.timing(batch=3)
    def test_an_outage_leaves_whole_batches(self, queue, repository):
        queue.stop()
        other = Queue(repository)

        def goes_down(bulk):
            repository.down = True

        with pytest.raises(RepositoryUnavailable):
            other.requeue_all(on_progress=goes_down)
        repository.down = False
        assert counts(other) == {"pending": 3, "failed": 4, "completed": 2, "cancelled": 1}


@pytest.mark.timing(batch=4)
def test_only_one_batch_is_in_memory_and_in_a_transaction(make_queue, timing):
    repository = SpyMemory(timing=timing)
    queue = make_queue(repository)
    queue.declare("t")
    queue.submit_many(Task(type="t") for _ in range(10))
    read = []
    list_after = repository.reads.list_after
    repository.reads.list_after = lambda filter, after=None: (
        read.append(filter.limit),
        list_after(filter, after),
    )[1]
    repository.batches.clear()
    queue.cancel_all(status="pending")
    assert set(read) == {4}
    assert [len({write.id for write in batch}) for batch in repository.batches] == [4, 4, 2]


def test_a_record_is_json():
    now = datetime(2026, 11, 27, tzinfo=timezone.utc)
    bulk = Bulk(action="requeue", matched=2, changed=1, skipped={"changed": 1}, reached=now)
    data = json.loads(json.dumps(bulk.to_dict()))
    assert data["reached"] == "2026-11-27T00:00:00+00:00"
    assert (data["action"], data["skipped"], data["starts_until"]) == (
        *("requeue", {"changed": 1}),
        None,
    )


class TestEightMethods:
    @pytest.fixture
    def queue(self, make_queue):
        queue = make_queue(TinyRepository(), worker_num=1)
        queue.mended = False

        @queue.executor("t")
        def work(n):
            if not queue.mended:
                raise Permanent("no")

        queue.start()
        queue.handles = [queue.submit("t", {"n": n}, id=str(n)) for n in range(5)]
        assert queue.drain(PATIENCE)
        return queue

    @pytest.mark.parametrize("batch", [2, 200])
    def test_all_failed_tasks_run_again(self, queue, batch):
        queue.mended = True
        bulk = queue.requeue_all(type="t")
        assert (bulk.matched, bulk.changed) == (5, 5)
        assert queue.drain(PATIENCE)
        assert counts(queue) == {"completed": 5}

    def test_tasks_start_at_a_rate_in_one_call(self, queue):
        queue.stop()
        other = Queue(queue.repository)
        other.requeue_all(rate="1/h")
        times = sorted(task.run_at for task in other.iter_tasks())
        assert [(b - a).total_seconds() for a, b in itertools.pairwise(times)] == [3600] * 4

    def test_tasks_are_cancelled_and_deleted(self, queue):
        for n in range(3):
            queue.submit("t", {"n": n}, delay=60)
        assert queue.cancel_all(type="t").changed == 3
        assert queue.delete_all(type="t", status="cancelled").changed == 3
        assert queue.delete_all(everything=True).changed == 5
        assert ids(queue) == set()
