"""Tasks that depend on others: they wait for their parents, whose outcomes decide about them."""

from __future__ import annotations

import logging
import threading
from collections import deque
from itertools import pairwise

import pytest
from helpers import (
    PATIENCE,
    earliest_due,
    eventually,
    frequent_checks,
    housekeeper_of,
    ids,
    no_rounds,
    node_of,
    parts_of,
    pool_of,
    run_in_thread,
    whole_round,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from storage.repositories import TinyRepository

from taskx import (
    ConfigurationError,
    MemoryRepository,
    MongoRepository,
    PayloadError,
    Queue,
    RepositoryUnavailable,
    Task,
    TaskFilter,
    TaskNotFound,
    TaskStatus,
    chain,
    open_repository,
)
from taskx.node import ordering
from taskx.node.audit import Audit
from taskx.queue.requeuing import Requeues
from taskx.tasks import lifecycle
from taskx.tasks.timing import DEFAULT_TIMING
from taskx.tasks.writes import Update
from taskx.testing import ManualClock

NEVER = float("inf")


@pytest.fixture
def started(queue, gate):
    return start(queue, gate)


def start(queue, gate):
    """Start a queue: ``fine`` returns its number, ``bad`` raises, ``hold`` waits for the gate."""
    queue.ran = []

    @queue.executor("fine")
    def fine(ctx, n=0):
        queue.ran.append(n)
        return [n, *(parent.result for parent in ctx.parents)]

    @queue.executor("bad")
    def bad(ctx):
        raise ValueError("bad")

    @queue.executor("hold")
    def hold(ctx, n=0):
        gate()
        ctx.token.raise_if_cancelled()
        return n

    queue.start()
    return queue


@pytest.fixture
def nothing_noticed(repository):
    """Disable the notice of changes by others."""
    repository.version = lambda: 0


def end_by_hand(repository, task_id, status=TaskStatus.COMPLETED):
    """Let a task run and end with this status, without telling any queue."""
    repository.update_status(task_id, TaskStatus.RUNNING)
    repository.update_status(task_id, status)


def unreleased(make_queue):
    """Return a completed parent and its child; no queue was told that the child may start."""
    submitter = make_queue()
    submitter.declare("fine")
    parent = submitter.submit("fine")
    child = submitter.submit("fine", depends_on=[parent])
    end_by_hand(submitter.repository, parent.id)
    return parent, child


def start_fine(make_queue):
    """Start another queue that runs ``fine``."""
    queue = make_queue()
    queue.executor("fine")(lambda: None)
    queue.start()
    return queue


@pytest.mark.timing(audit_every=NEVER)
@pytest.mark.usefixtures("nothing_noticed")
class TestReleased:
    def test_a_child_starts_when_all_parents_have_completed(self, started, gate):
        parents = [started.submit("hold", {"n": n}) for n in (1, 2)]
        child = started.submit("fine", depends_on=parents)
        gate.wait_for(2)
        assert (child.task().status, started.ran) == (TaskStatus.PENDING, [])
        assert child.task().depends_on == [parent.id for parent in parents]
        gate.open()
        assert child.result(PATIENCE) == [0, 1, 2]

    @pytest.mark.every_store
    def test_a_chain_of_children_runs_one_after_the_other(self, started, gate):
        first = last = started.submit("hold")
        for n in range(1, 10):
            last = started.submit("fine", {"n": n}, depends_on=[last])
        gate.open()
        assert last.result(PATIENCE)[0] == 9
        assert started.ran == list(range(1, 10))
        assert first.done()

    @pytest.mark.every_store
    def test_a_child_starts_without_a_round_of_the_housekeeper(self, make_queue, gate):
        """The worker that ends a parent starts its child next: a link of a chain costs no nap.

        With two workers, the one that ends a parent may find the other one at a commit.
        """
        queue = start(make_queue(worker_num=1), gate)
        last = queue.submit("hold")
        for n in range(1, 10):
            last = queue.submit("fine", {"n": n}, depends_on=[last])
        gate.wait_for(1)
        with no_rounds(queue):
            gate.open()
            assert last.result(PATIENCE)[0] == 9

    def test_no_worker_waits_while_another_thread_decides_children(self, started, gate):
        parent = started.submit("hold")
        children = [started.submit("fine", depends_on=[parent]) for _ in range(5)]
        gate.wait_for(1)
        dependents = parts_of(started).moves.dependents
        with no_rounds(started), dependents._processing:
            gate.open()
            parent.result(PATIENCE)
            started.submit("fine").result(PATIENCE)
        assert [child.result(PATIENCE) for child in children] == [[0, 0]] * 5

    def test_a_child_does_not_wait_for_completed_parents(self, started):
        parent = started.submit("fine", {"n": 1})
        parent.result(PATIENCE)
        assert started.submit("fine", depends_on=[parent.id]).result(PATIENCE) == [0, [1]]

    def test_a_child_also_waits_for_its_own_delay(self, make_queue, gate):
        clock = ManualClock()
        queue = make_queue(clock=clock)
        queue.executor("fine")(lambda: None)
        queue.start()
        parent = queue.submit("fine", delay=1)
        child = queue.submit("fine", depends_on=[parent], delay=10)
        clock.advance(1)
        parent.result(PATIENCE)
        eventually(lambda: earliest_due(queue.repository) is not None)
        assert child.task().status is TaskStatus.PENDING
        clock.advance(9)
        child.result(PATIENCE)

    def test_drain_waits_for_children_of_running_parents(self, started, gate):
        last = started.submit("hold")
        for n in range(30):
            last = started.submit("fine", {"n": n}, depends_on=[last])
        gate.open()
        assert started.drain(PATIENCE)
        assert last.task().status is TaskStatus.COMPLETED

    def test_a_waiting_child_takes_no_room_in_the_buffer(self, make_queue, gate):
        queue = make_queue(worker_num=1, buffer_size=1)
        queue.executor("hold")(lambda: gate())
        queue.start()
        parent = queue.submit("hold")
        gate.wait_for(1)
        children = [queue.submit("hold", depends_on=[parent]) for _ in range(5)]
        queue.submit("hold")
        gate.open()
        for child in children:
            child.result(PATIENCE)

    @pytest.mark.every_store
    def test_one_parent_may_have_many_children_and_one_child_many_parents(self, started, gate):
        many = 100 if isinstance(started.repository, MongoRepository) else 1000  # a slow mock
        root = started.submit("hold")
        tasks = [
            Task(id=f"t{n}", type="fine", params={"n": n}, depends_on=[root.id])
            for n in range(many)
        ]
        join = Task(id="join", type="fine", depends_on=[task.id for task in tasks])
        handles = started.submit_many([*tasks, join])
        gate.open()
        result = handles[-1].result(3 * PATIENCE)
        assert [value[0] for value in result[1:]] == list(range(many))


@pytest.mark.timing(audit_every=NEVER)
@pytest.mark.usefixtures("nothing_noticed")
class TestParentFails:
    @pytest.fixture(params=["failed", "cancelled", "deleted"])
    def doomed(self, request, started):
        """A parent that will not complete, and a function that ends it."""
        parent = started.submit("bad", delay=3600)

        def end():
            if request.param == "deleted":
                started.delete(parent.id)
            elif request.param == "cancelled":
                parent.cancel()
            else:
                task = started.get_task_status(parent.id)
                end_by_hand(started.repository, task.id, TaskStatus.FAILED)
                parts_of(started).moves.dependents.parent_ended(task.id)
            return {"failed": "failed", "cancelled": "was cancelled", "deleted": "is gone"}[
                request.param
            ]

        return parent, end

    def test_children_and_grandchildren_are_cancelled_by_default(self, started, doomed):
        parent, end = doomed
        child = started.submit("fine", depends_on=[parent])
        grandchild = started.submit("fine", depends_on=[child], on_parent_failure="cancel")
        how = end()
        eventually(grandchild.cancelled)
        assert child.task().error == f"its parent {parent.id} {how}"
        assert grandchild.task().error == f"its parent {child.id} was cancelled"
        assert started.ran == []
        assert child.task().completed_at is not None

    def test_children_fail_if_they_asked_for_that(self, started, doomed):
        parent, end = doomed
        child = started.submit("fine", depends_on=[parent], on_parent_failure="fail")
        end()
        assert f"its parent {parent.id}" in str(child.exception(PATIENCE))
        assert (child.task().dead_letter, child.task().starts) == (True, 0)

    def test_children_run_if_they_asked_for_that(self, started, doomed):
        parent, end = doomed
        started.executor("alone")(lambda: "ran")
        child = started.submit("alone", depends_on=[parent], on_parent_failure="run")
        end()
        assert child.result(PATIENCE) == "ran"

    def test_cancelled_children_release_their_unique_keys(self, started, doomed):
        parent, end = doomed
        child = started.submit("fine", depends_on=[parent], unique_key="k", unique_scope="ever")
        end()
        eventually(child.cancelled)
        assert started.repository.find("unique_lock", ["k"], ("id",)) == []

    def test_a_cancelled_parent_that_is_handed_back_cancels_its_children(self, started):
        """The task was started ahead, and cancelled before a worker took it."""
        parent = started.submit("fine", delay=3600)
        child = started.submit("fine", depends_on=[parent])
        repository, starter = started.repository, pool_of(started).starter
        changes = {"status": "running", "held": 0, "starts": 1, "owner": node_of(started).record.id}
        assert repository.apply([Update(parent.id, {}, changes)]) == [True]
        run = starter._make_run(parent.task())
        starter.runs[parent.id] = run
        repository.apply(lifecycle.cancel(parent.id, 1))
        starter.hand_back([run])  # or the housekeeper does it
        eventually(parent.cancelled)
        eventually(child.cancelled)

    def test_a_child_is_decided_when_all_parents_have_ended(self, started, doomed, gate):
        parent, end = doomed
        other = started.submit("hold")
        child = started.submit("fine", depends_on=[other, parent])
        end()
        gate.wait_for(1)
        eventually(lambda: started.repository.distinct("waiting_on", "", 10) == [other.id])
        assert child.task().status is TaskStatus.PENDING
        gate.open()
        eventually(child.cancelled)

    def test_a_parent_that_failed_before_the_submit_counts_too(self, started):
        parent = started.submit("bad")
        assert parent.exception(PATIENCE)
        child = started.submit("fine", depends_on=[parent])
        eventually(child.cancelled)

    def test_a_retry_of_the_parent_is_not_a_failure(self, started):
        @started.executor("second", max_attempts=2)
        def second(ctx):
            if ctx.task.attempt == 1:
                raise ValueError("first")
            return "second"

        child = started.submit("fine", depends_on=[started.submit("second")])
        assert child.result(PATIENCE) == [0, "second"]


@pytest.mark.timing(audit_every=NEVER)
@pytest.mark.usefixtures("nothing_noticed")
class TestRequeue:
    def test_a_requeued_parent_runs_before_its_child(self, started, gate):
        parent = started.submit("hold")
        child = started.submit("fine", depends_on=[parent])
        gate.wait_for(1)
        parent.cancel()
        gate.open()
        eventually(child.cancelled)
        gate.close()
        started.requeue(parent.id)  # requeues the child, too
        gate.wait_for(1)
        # The other worker must not start the child.
        started.submit("fine", {"n": 1}).result(PATIENCE)
        assert started.ran == [1]
        gate.open()
        eventually(lambda: child.task().status is TaskStatus.COMPLETED)
        assert started.ran == [1, 0]

    def test_a_requeue_does_not_touch_children_that_a_user_cancelled(self, started, gate):
        parent = started.submit("hold")
        child = started.submit("fine", depends_on=[parent])
        gate.wait_for(1)
        child.cancel()
        parent.cancel()
        gate.open()
        eventually(parent.cancelled)
        started.requeue(parent.id)
        eventually(lambda: parent.task().status is TaskStatus.COMPLETED)
        assert child.task().status is TaskStatus.CANCELLED

    def test_a_requeued_child_runs_even_if_its_parent_failed(self, started):
        child = started.submit("bad", depends_on=[started.submit("bad")])
        eventually(child.cancelled)
        started.requeue(child.id)
        eventually(lambda: child.task().status is TaskStatus.FAILED)


class TestRefused:
    @pytest.fixture(autouse=True)
    def nothing_is_stored(self, started):
        yield
        assert ids(started) == set()

    def test_an_unknown_parent_is_refused(self, started):
        with pytest.raises(TaskNotFound, match="nobody"):
            started.submit("fine", depends_on=["nobody"])

    def test_a_task_cannot_depend_on_itself(self, started):
        with pytest.raises(ConfigurationError, match="itself"):
            started.submit("fine", id="a", depends_on=["a"])

    def test_a_circle_is_refused(self, started):
        edges = {"a": ["b", "d"], "b": ["c"], "c": ["a"], "d": []}
        tasks = [Task(id=i, type="fine", depends_on=parents) for i, parents in edges.items()]
        with pytest.raises(ConfigurationError, match="circle: a on b on c on a"):
            started.submit_many(tasks)

    @pytest.mark.parametrize(
        "parents",
        ["abc", b"a", 5, True, {"a": 1}, [""], [5], [None], ["x" * 256], lambda q: q.handle("a")],
    )
    def test_depends_on_must_be_a_list_of_ids(self, started, parents):
        if callable(parents):
            parents = parents(started)  # a handle instead of a list
        with pytest.raises(ConfigurationError, match="depends_on"):
            started.submit("fine", depends_on=parents)
        task = Task(type="fine", depends_on=parents)
        with pytest.raises(ConfigurationError, match="depends_on"):
            started.submit(task)
        with pytest.raises(ConfigurationError, match="depends_on"):
            started.submit_flow(chain(task))

    def test_an_unknown_policy_is_refused(self, started):
        with pytest.raises(ConfigurationError, match="on_parent_failure"):
            started.submit("fine", depends_on=["a"], on_parent_failure="ignore")
        with pytest.raises(ConfigurationError, match="on_parent_failure"):
            started.submit("fine", depends_on=[], on_parent_failure="ignore")

    def test_a_repository_of_eight_methods_refuses_depends_on(self):
        queue = Queue(TinyRepository())
        queue.executor("fine")(lambda: None)
        with queue:
            parent = queue.submit("fine")
            parent.result(PATIENCE)  # an ended task is in the repository only
        queue = Queue(queue.repository.inner)
        queue.executor("fine")(lambda: None)
        for parents in ([parent], [queue.submit("fine"), parent]):
            stored = ids(queue)
            with pytest.raises(ConfigurationError, match="depends_on; nothing was stored"):
                queue.submit("fine", depends_on=parents)
            assert ids(queue) == stored


class TestParents:
    def test_ctx_parents_are_whole_records_in_the_given_order(self, started):
        parents = [started.submit("fine", {"n": n}) for n in (3, 1, 2)]

        @started.executor("look")
        def look(ctx):
            return [[parent.id, parent.status, parent.result] for parent in ctx.parents]

        child = started.submit("look", depends_on=parents)
        assert child.result(PATIENCE) == [
            [parent.id, "completed", [n]] for parent, n in zip(parents, (3, 1, 2), strict=True)
        ]

    def test_a_task_without_parents_has_no_ctx_parents(self, started):
        assert started.submit("fine").result(PATIENCE) == [0]

    @frequent_checks
    def test_a_deleted_parent_is_an_error_in_ctx_parents(self, started):
        parent = started.submit("bad")
        assert parent.exception(PATIENCE)
        child = started.submit("fine", depends_on=[parent], on_parent_failure="run", delay=3600)
        eventually(lambda: started.repository.due(None, 1))
        started.delete(parent.id)
        task = child.task()
        task.run_at = None
        started.repository.update(task)
        assert "TaskNotFound" in str(child.exception(PATIENCE))

    @pytest.mark.every_store
    def test_pruning_keeps_the_parents_of_unfinished_children(self, started, gate):
        parent = started.submit("fine")
        parent.result(PATIENCE)
        child = started.submit("hold", depends_on=[parent])
        gate.wait_for(1)
        later = parent.task().completed_at.replace(year=parent.task().completed_at.year + 1)
        assert started.prune(later) == 0
        gate.open()
        child.result(PATIENCE)
        assert started.prune(later) == 2


def refresh(queue):
    """Do what a round of the housekeeper does when others have changed something."""
    parts_of(queue).moves.dependents.refresh()
    parts_of(queue).agenda.wake()


@pytest.mark.timing(audit_every=NEVER, recover_every=NEVER)  # else each round calls it
@pytest.mark.usefixtures("nothing_noticed")
class TestOthers:
    """Tasks that another process stored, without telling this process."""

    @pytest.fixture
    def family(self, started, make_queue):
        whole_round(started)
        other = make_queue()
        other.declare("fine")
        eventually(lambda: not parts_of(started).moves.dependents.waiting)
        parent = other.submit("fine", delay=3600)
        child = other.submit("fine", depends_on=[parent])
        assert not parts_of(started).moves.dependents.any
        return parent, child

    def test_a_refresh_finds_parents_that_ended_before_it(self, started, family):
        parent, child = family
        end_by_hand(started.repository, parent.id)
        refresh(started)
        eventually(lambda: child.task().status is TaskStatus.COMPLETED)

    def test_after_a_refresh_ends_are_reported(self, started, family):
        parent, child = family
        refresh(started)
        eventually(lambda: not parts_of(started).moves.dependents.waiting)
        started.cancel_task(parent.id)
        eventually(lambda: child.task().status is TaskStatus.CANCELLED)

    @pytest.mark.parametrize("how", [TaskStatus.RUNNING, TaskStatus.CANCELLED])
    def test_a_child_that_is_moved_by_hand_stops_waiting(self, started, family, how):
        started.repository.update_status(family[1].id, how)
        assert started.repository.find("waiting_on", [family[0].id], ("id",)) == []
        assert started.repository.distinct("waiting_on", "", 9) == []

    def test_ends_are_not_reported_if_no_child_waits(self, started, family):
        family[1].cancel()
        refresh(started)
        assert not parts_of(started).moves.dependents.any


@pytest.mark.timing(audit_every=NEVER)
@pytest.mark.usefixtures("nothing_noticed")
class TestRecovered:
    """The children of a task that a node lost are decided, too."""

    @pytest.fixture
    def family(self, started):
        parent = started.submit("fine", delay=3600, max_crashes=1)
        child = started.submit("fine", depends_on=[parent])
        eventually(lambda: not parts_of(started).moves.dependents.waiting)

        def runs_on(node):
            changes = {"status": "running", "held": 0, "starts": 1, "owner": node}
            assert started.repository.apply([Update(parent.id, {}, changes)]) == [True]

        return parent, child, runs_on

    @pytest.mark.every_store
    @frequent_checks
    def test_the_death_of_the_parents_process_decides_the_child(self, started, family):
        parent, child, runs_on = family
        runs_on("one of which nothing is known")
        eventually(child.cancelled)
        assert parent.task().status is TaskStatus.FAILED

    def test_a_lost_parent_that_was_to_be_cancelled_cancels_its_child(self, started, family):
        parent, child, runs_on = family
        runs_on(node_of(started).record.id)
        started.repository.apply(lifecycle.cancel(parent.id, 1))
        Audit(pool_of(started))._interrupt(parent.id)
        assert parent.task().status is TaskStatus.CANCELLED
        eventually(child.cancelled)


def test_a_late_decision_by_old_statuses_changes_nothing(started):
    """Another node has released the child in the meantime; it is still pending and could be cancelled."""
    started.stop()
    repository = started.repository
    submitter = Queue(repository)
    submitter.declare("fine")
    parent = submitter.submit("fine")
    child = submitter.submit("fine", depends_on=[parent])
    late = lifecycle.parents_moved(child.task(), {parent.id: "cancelled"}, 1)
    assert repository.apply(
        [lifecycle.parents_moved(child.task(), {parent.id: "completed"}, 1), late]
    ) == [True, False]
    assert child.task().status is TaskStatus.PENDING


class TestRequeuedMeanwhile:
    """A parent is requeued while another process decides about its child. No queue is started."""

    @pytest.fixture
    def process(self, make_queue):
        """Return a queue that acts in place of a process of its own."""

        def make():
            queue = make_queue()
            queue.declare("fine")
            return queue

        return make

    @pytest.fixture
    def family(self, process, repository):
        """A completed parent, a cancelled one, their child, and its child: nobody has decided yet."""
        queue = process()
        parents = [queue.submit("fine", id=name) for name in ("done", "lost")]
        child = queue.submit("fine", id="child", depends_on=parents)
        grandchild = queue.submit("fine", id="grandchild", depends_on=[child])
        end_by_hand(repository, "done")
        repository.update_status("lost", TaskStatus.CANCELLED)
        return [*parents, child, grandchild]

    def decide(self, queue):
        """Decide about all tasks that wait for parents which have ended."""
        parts_of(queue).moves.dependents.ended_elsewhere()
        parts_of(queue).moves.dependents.process()

    def statuses(self, family):
        return [handle.task().status.value for handle in family[1:]]

    @pytest.fixture
    def before(self, monkeypatch):
        """Return a function that has something done once, when ``lifecycle`` is asked for a write."""

        def do(function, action, task_id):
            make, left = getattr(lifecycle, function), [task_id]

            def patched(task, *rest, **more):
                if task.id in left:
                    left.remove(task.id)
                    action()
                return make(task, *rest, **more)

            monkeypatch.setattr(lifecycle, function, patched)

        return do

    @pytest.mark.parametrize("policy", ["cancel", "fail"])
    def test_a_decision_by_the_old_status_is_not_stored(self, process, repository, before, policy):
        queue = process()
        parents = [queue.submit("fine", id=name) for name in ("done", "lost")]
        child = queue.submit("fine", id="child", depends_on=parents, on_parent_failure=policy)
        end_by_hand(repository, "done")
        repository.update_status("lost", TaskStatus.CANCELLED)
        before("parents_moved", lambda: process().requeue("lost"), "child")
        self.decide(process())
        assert self.statuses([*parents, child]) == ["pending", "pending"]
        end_by_hand(repository, "lost")
        self.decide(process())
        assert [stub.id for stub in repository.ready(["fine"], 10)] == ["child"]

    def test_a_child_that_waits_for_the_requeued_parent_alone_goes_on_waiting(
        self, process, repository, before
    ):
        queue = process()
        parent = queue.submit("fine", id="lost")
        child = queue.submit("fine", id="child", depends_on=[parent])
        repository.update_status("lost", TaskStatus.CANCELLED)
        before("parents_moved", lambda: process().requeue("lost"), "child")
        self.decide(process())
        assert self.statuses(["", parent, child]) == ["pending", "pending"]

    @pytest.mark.parametrize("how", ["one", "many", "all"])
    def test_a_child_that_ends_while_its_parent_is_requeued_runs_again(
        self, process, family, before, how
    ):
        """The requeue has read the child before its end."""
        before("requeue", lambda: self.decide(process()), "lost")
        requeue = {
            "one": lambda queue: queue.requeue("lost"),
            "many": lambda queue: queue.requeue_many(["lost"]),
            "all": lambda queue: queue.requeue_all(status="cancelled", type="fine"),
        }[how]
        requeue(process())
        assert self.statuses(family) == ["pending", "pending", "pending"]

    def test_a_child_runs_again_although_the_process_of_the_requeue_dies_then(
        self, process, family, before, monkeypatch
    ):
        class Died(BaseException):
            pass

        def die(*_):
            raise Died

        def decide_and_die_soon():
            self.decide(process())
            monkeypatch.setattr(Requeues, "_orphans", die)

        before("requeue", decide_and_die_soon, "lost")
        with pytest.raises(Died):
            process().requeue("lost")
        assert self.statuses(family)[:2] == ["pending", "pending"]

    def test_a_child_that_is_submitted_while_its_parent_is_requeued_is_not_lost(
        self, process, family, before
    ):
        def submit():
            child = process().submit("fine", id="new", depends_on=["lost"])
            assert child.task().status is TaskStatus.CANCELLED
            family.append(child)

        before("requeue", submit, "lost")
        process().requeue("lost")
        assert self.statuses(family) == ["pending"] * 4

    def test_a_child_that_a_user_cancels_meanwhile_stays_cancelled(self, process, family, before):
        before("requeue", lambda: process().cancel_task("child"), "lost")
        process().requeue("lost")
        assert self.statuses(family) == ["pending", "cancelled", "cancelled"]

    def test_a_child_is_released_to_the_time_of_its_replacement(self, process, repository, before):
        """The replacement was read by nobody who decides by the old time."""
        queue = process()
        parent = queue.submit("fine", id="done")
        queue.submit("fine", id="child", depends_on=[parent], unique_key="k")
        end_by_hand(repository, "done")
        again = {"unique_key": "k", "on_conflict": "replace", "depends_on": [parent]}
        before("parents_moved", lambda: process().submit("fine", delay=3600, **again), "child")
        self.decide(process())
        self.decide(process())
        assert repository.ready(["fine"], 10) == []
        assert earliest_due(repository) is not None


class TestStopped:
    """A stopped queue has no housekeeper that would decide the children."""

    def test_children_of_the_last_task_are_decided_during_the_stop(self, started, monkeypatch):
        """The outcome was written after the housekeeper had ended."""
        parent = started.submit("fine", delay=3600)
        child = started.submit("fine", depends_on=[parent])
        stop = housekeeper_of(started).stop

        def late():
            stop()
            started.repository.update_status(parent.id, TaskStatus.CANCELLED)
            parts_of(started).moves.dependents.parent_ended(parent.id)

        monkeypatch.setattr(housekeeper_of(started), "stop", late)
        started.stop()
        assert child.task().status is TaskStatus.CANCELLED

    def test_a_cancel_on_a_stopped_queue_cancels_the_children(self, started):
        parents = [started.submit("fine", delay=3600) for _ in range(3)]
        children = [started.submit("fine", depends_on=[parent]) for parent in parents]
        started.stop()
        parents[0].cancel()
        started.delete(parents[1].id)
        started.cancel_many([parents[2].id])
        assert [child.task().status for child in children] == ["cancelled"] * 3


@pytest.mark.timing(audit_every=NEVER)
class TestDrained:
    """``drain`` waits for tasks whose parents have ended, even if no event reported the end."""

    def test_drain_waits_for_children_before_the_first_scan(
        self, repository, make_queue, monkeypatch
    ):
        _, child = unreleased(make_queue)
        queue = start_fine(make_queue)
        assert queue.drain(PATIENCE)
        assert child.task().status is TaskStatus.COMPLETED

    def test_drain_finds_children_that_no_event_reported(self, started):
        parent = started.submit("fine", delay=3600)
        child = started.submit("fine", depends_on=[parent])
        eventually(lambda: not parts_of(started).moves.dependents.waiting)
        end_by_hand(started.repository, parent.id)
        assert started.drain(PATIENCE)
        assert child.task().status is TaskStatus.COMPLETED

    @pytest.mark.timing(scan_batch=2)
    def test_drain_does_not_wait_for_children_of_delayed_parents(self, started):
        for n in range(5):
            started.submit("fine", {"n": n}, depends_on=[started.submit("fine", delay=3600)])
        assert started.drain(PATIENCE)
        assert started.ran == []
        first = started.repository.distinct("waiting_on", "", 1)[0]
        last = started.repository.distinct("waiting_on", "", 5)[-1]
        for ran, parent in enumerate((last, first), 1):
            end_by_hand(started.repository, parent)
            assert started.drain(PATIENCE)
            assert len(started.ran) == ran


@pytest.mark.timing(audit_every=NEVER)
def test_a_queue_that_starts_scans_all_parents(repository, make_queue):
    """An earlier process may have left work undone; no event reports it."""
    _, child = unreleased(make_queue)
    repository.version = lambda: 0
    start_fine(make_queue)
    eventually(lambda: child.task().status is TaskStatus.COMPLETED)


@pytest.mark.parametrize("step", [1, -1])
def test_the_registered_parent_is_seldom_among_the_first_to_end(step):
    """Each time it is, all parents must be read again."""
    parents = [f"00000000-0000-7000-8000-{n:012}" for n in range(1000)]
    statuses = dict.fromkeys(parents, "running")
    reads, waiting_on = 0, lifecycle.unfinished_parent(parents, statuses)
    for parent in parents[::step]:
        statuses[parent] = "completed"
        if parent == waiting_on:
            reads, waiting_on = reads + 1, lifecycle.unfinished_parent(parents, statuses)
    assert waiting_on is None
    assert reads < 50


def test_a_long_chain_that_is_cancelled_does_not_block_the_housekeeper(queue, monkeypatch):
    """The housekeeper does the rest in later calls, and a drain waits for it."""
    waiting = parts_of(queue).moves.dependents
    queue.declare("t")
    ids = [f"{n:02}" for n in range(20)]
    queue.submit_many(
        Task(id=i, type="t", depends_on=[f"{int(i) - 1:02}"] if i != "00" else []) for i in ids
    )
    waiting.process()
    queue.repository.update_status("00", TaskStatus.CANCELLED)
    waiting.parent_ended("00")
    for done in range(2, 20):
        waiting.process(0.0)
        assert list(queue.repository.statuses(ids).values()).count("cancelled") == done
        assert waiting.waiting
    for _ in range(2):
        waiting.process(0.0)
    assert not waiting.waiting
    assert {*queue.repository.statuses(ids).values()} == {"cancelled"}


class Touched(deque):
    """A deque that counts the ids that are read or removed."""

    count = 0

    def __getitem__(self, place):
        self.count += 1
        return super().__getitem__(place)

    def __iter__(self):
        self.count += len(self)
        return super().__iter__()

    def popleft(self):
        self.count += 1
        return super().popleft()


@pytest.fixture
def family_of_ten(queue):
    """A cancelled parent, whose end was reported, and ten children, which are decided two at a time."""
    queue.declare("t")
    parent = queue.submit("t")
    children = [queue.submit("t", depends_on=[parent]) for _ in range(10)]
    waiting = parts_of(queue).moves.dependents
    waiting.process()
    waiting.ended, waiting._due = Touched(), Touched()
    queue.repository.update_status(parent.id, TaskStatus.CANCELLED)
    waiting.parent_ended(parent.id)
    return waiting, children


@pytest.mark.timing(batch=2)
def test_a_step_reads_no_more_children_than_it_decides(queue, family_of_ten):
    """This holds for any number of due tasks; else a wide family would cost the square of its width."""
    waiting, children = family_of_ten
    get_many, read = queue.repository.get_many, []
    queue.repository.get_many = lambda ids: read.extend(ids) or get_many(ids)
    touched = []
    while waiting.told:
        waiting.ended.count = waiting._due.count = 0
        waiting.process(0.0)
        touched.append(waiting.ended.count + waiting._due.count)
    assert max(touched) <= 8  # each id is read and removed: two due children, two ended parents
    assert sum(touched) <= 2 * (1 + 2 * len(children))
    assert sorted(read) == sorted(child.id for child in children)
    assert all(child.cancelled() for child in children)


@pytest.mark.timing(batch=2)
def test_an_interrupt_during_a_decision_loses_no_child(queue, family_of_ten):
    waiting, children = family_of_ten
    get_many, strikes = queue.repository.get_many, [False, True, False, True]

    def struck(ids):
        if strikes and strikes.pop():
            raise KeyboardInterrupt
        return get_many(ids)

    queue.repository.get_many = struck
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            waiting.process()
        assert waiting.told
    waiting.process()
    assert not strikes
    assert all(child.cancelled() for child in children)


def test_an_interrupt_while_parents_are_read_carries_the_task_id(queue, monkeypatch):
    """The task is already stored."""
    queue.declare("t")
    parent = queue.submit("t")
    statuses, asked = queue.repository.statuses, []

    def interrupted(ids):
        asked.append(ids)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return statuses(ids)

    monkeypatch.setattr(queue.repository, "statuses", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        queue.submit("t", depends_on=[parent])
    assert queue.get_task_status(caught.value.task_id).depends_on == [parent.id]


@pytest.mark.parametrize(
    "error", [RepositoryUnavailable("away"), PayloadError("document", "large")]
)
def test_a_submit_does_not_raise_after_the_task_is_stored(started, monkeypatch, error):
    """A later check finds out if its parent has ended in the meantime."""
    parent = started.submit("fine", delay=3600)
    statuses, submitter, asked = started.repository.statuses, threading.get_ident(), []

    def fail(ids):
        if threading.get_ident() == submitter:  # the queue's own threads read statuses too
            asked.append(ids)
            if len(asked) == 2:  # the first read checks the parent, before the task is stored
                raise error
        return statuses(ids)

    monkeypatch.setattr(started.repository, "statuses", fail)
    child = started.submit("fine", depends_on=[parent])
    assert len(asked) == 2
    parent.cancel()
    eventually(child.cancelled)


@pytest.mark.timing(audit_every=0.05)
class TestMadeGood:
    """A scan finds ends that no event reported."""

    @pytest.mark.every_store
    @frequent_checks
    def test_a_scan_releases_the_child_of_a_process_that_died(self, repository, make_queue):
        """The parent ends without an event; a queue that starts scans all parents."""
        parent, child = unreleased(make_queue)
        assert repository.distinct("waiting_on", "", 10) == [parent.id]
        start_fine(make_queue)
        child.result(PATIENCE)

    def test_a_parent_that_is_ended_by_hand_is_found(self, started):
        """The slow scan finds it."""
        parent = started.submit("fine", delay=3600)
        child = started.submit("fine", depends_on=[parent])
        started.repository.update_status(parent.id, TaskStatus.CANCELLED)
        eventually(child.cancelled)

    def test_a_parent_that_ends_while_its_child_is_stored_is_found(self, started, monkeypatch):
        """It ends after its status was read and before the child is stored."""
        monkeypatch.setattr(ordering.Dependents, "_scan_page", lambda self: False)
        parent = started.submit("fine", delay=3600)
        repository = started.repository

        def end_the_parent(writes):
            if any(write.id == "child" for write in writes):
                repository.before = lambda writes: None
                end_by_hand(repository, parent.id)

        repository.before = end_the_parent
        child = started.submit("fine", id="child", depends_on=[parent])
        assert child.result(PATIENCE) == [0, None]

    @pytest.mark.timing(audit_every=float("inf"))
    def test_a_child_of_another_queue_on_the_same_repository_is_released(
        self, started, make_queue, gate
    ):
        """The writes of the other queue send no wake-up here."""
        parent = started.submit("hold")
        gate.wait_for(1)
        other = make_queue()
        other.declare("fine")
        child = other.submit("fine", depends_on=[parent])
        eventually(lambda: parts_of(started).moves.dependents.any)
        gate.open()
        assert started.handle(child.id).result(PATIENCE) == [0, 0]

    @pytest.mark.parametrize("how", [TaskStatus.COMPLETED, TaskStatus.CANCELLED])
    def test_a_parent_that_ends_while_its_child_registers_with_it_is_found(
        self, started, monkeypatch, how
    ):
        """It ends after its status was read and before the child is registered with it."""
        monkeypatch.setattr(ordering.Dependents, "_scan_page", lambda self: False)
        parents = [started.submit("fine", {"n": n}, delay=3600) for n in range(2)]
        repository = started.repository
        child = started.submit("fine", depends_on=parents)
        [first] = repository.distinct("waiting_on", "", 9)
        [other] = {parent.id for parent in parents} - {first}

        def end_the_other(writes):
            if any(write.id == child.id for write in writes):
                repository.before = lambda writes: None
                end_by_hand(repository, other, how)

        repository.before = end_the_other
        end_by_hand(repository, first)
        parts_of(started).moves.dependents.parent_ended(first)
        eventually(child.done)
        assert child.task().status is how

    def test_children_are_released_after_an_outage(self, started, gate):
        parent = started.submit("hold")
        child = started.submit("fine", depends_on=[parent])
        gate.wait_for(1)
        repository, find = started.repository, started.repository.find
        fails = [True, True]

        def failing(column, *args):
            if column == "waiting_on" and fails:
                fails.pop()
                raise RepositoryUnavailable("down for a moment")
            return find(column, *args)

        repository.find = failing
        gate.open()
        assert child.result(PATIENCE) == [0, 0]
        assert not fails

    @pytest.mark.timing(scan_batch=3)
    def test_many_parents_are_scanned_page_by_page(self, started):
        parents = [started.submit("fine", {"n": n}, delay=3600) for n in range(10)]
        children = [started.submit("fine", depends_on=[parent]) for parent in parents]
        for parent in parents:
            started.repository.update_status(parent.id, TaskStatus.CANCELLED)
        for child in children:
            eventually(child.cancelled)


PROGRAM = """
    import os, sys, threading
    from taskx import Config, Queue, open_repository
    from taskx.node.ordering import Dependents

    queue = Queue(open_repository(sys.argv[1]), Config(worker_num=2))
    what = sys.argv[2]

    @queue.executor("step")
    def step(ctx, n):
        return n + sum(parent.result for parent in ctx.parents)

    if what == "dies":
        def die(self, task_ids):
            print("dies", flush=True)
            os.kill(os.getpid(), 9)
        Dependents._decide = die
    queue.start()
    print("ready", flush=True)
    input()
    queue.stop()
"""


def test_another_process_releases_the_child_of_a_killed_process(url, spawn):
    """Another running process finds the child."""
    with open_repository(url) as repository:
        queue = Queue(repository)
        queue.declare("step")
        dying = spawn(PROGRAM, url, "dies")
        assert dying.read() == "ready"
        queue.pause("step")  # so that the parent does not end before the child is there
        parent = queue.submit("step", {"n": 1})
        child = queue.submit("step", {"n": 10}, depends_on=[parent])
        queue.resume("step")
        eventually(lambda: dying.process.poll() is not None)
        assert dying.process.returncode == -9
        assert repository.statuses([parent.id, child.id]) == {
            parent.id: "completed",
            child.id: "pending",
        }
        other = spawn(PROGRAM, url, "lives")
        assert other.read() == "ready"
        assert child.result(PATIENCE) == 11
        other.tell()


def test_several_processes_run_one_graph(url, spawn):
    """Each task adds the results of the three tasks before it."""
    with open_repository(url) as repository:
        queue = Queue(repository)
        queue.declare("step")
        children = [spawn(PROGRAM, url, "lives") for _ in range(3)]
        for child in children:
            assert child.read() == "ready"
        handles = []
        for _ in range(20):
            handles.append(queue.submit("step", {"n": 1}, depends_on=handles[-3:]))
        expected: list[int] = []
        for _ in range(20):
            expected.append(1 + sum(expected[-3:]))
        assert handles[-1].result(PATIENCE) == expected[-1]
        assert repository.count(TaskFilter(status=TaskStatus.COMPLETED)) == 20
        for child in children:
            child.tell()


@pytest.mark.slow
def test_a_long_chain_that_no_event_reported_ends_in_parts():
    """Each call does a part, because the housekeeper has other duties; the next calls do the rest."""
    queue = Queue(MemoryRepository())
    queue.declare("t")
    tasks = [Task(id=f"{n:04}", type="t") for n in range(1000)]
    for before, task in pairwise(tasks):
        task.depends_on = [before.id]
    queue.submit_many(tasks)
    repository, waiting = queue.repository, parts_of(queue).moves.dependents
    waiting.process()
    repository.update_status("0000", TaskStatus.CANCELLED)
    waiting.ended_elsewhere()
    pending, rounds = TaskFilter(status=TaskStatus.PENDING), 0
    while repository.count(pending):
        left = repository.count(pending)
        waiting.process(0.0)
        assert left - DEFAULT_TIMING.batch <= repository.count(pending) < left
        assert waiting.waiting or not repository.count(pending)
        rounds += 1
    assert rounds > 2


# Any graph, any outcome

graphs = st.integers(1, 12).flatmap(
    lambda size: st.tuples(
        *(
            st.tuples(
                st.sets(st.integers(0, max(0, n - 1)), max_size=3) if n else st.just(set()),
                st.sampled_from([None, "cancel", "fail", "run"]),
                st.sampled_from(["completed", "completed", "failed", "cancelled"]),
            )
            for n in range(size)
        )
    )
)


@pytest.mark.slow
@settings(max_examples=200)
@given(graphs, st.randoms(use_true_random=False), st.booleans())
def test_every_task_of_any_graph_ends(graph, random, told):
    """This holds for any order of ends, whether events report them or only the slow scan finds them."""
    queue = Queue(MemoryRepository())
    queue.declare("t")
    repository, waiting = queue.repository, parts_of(queue).moves.dependents
    queue.submit_many(
        Task(
            id=f"{n:02}",
            type="t",
            depends_on=[f"{p:02}" for p in parents],
            on_parent_failure=policy,
        )
        for n, (parents, policy, _) in enumerate(graph)
    )
    ran = set()
    while ready := repository.ready(["t"], 100):
        stub = random.choice(ready)
        ran.add(stub.id)
        end_by_hand(repository, stub.id, TaskStatus(graph[int(stub.id)][2]))
        if told:
            waiting.parent_ended(stub.id)
            waiting.process()
        else:
            while waiting._scan_page():
                continue
            waiting.process()  # decides what these ends have ended
    statuses: list[str] = []
    for n, (parents, policy, outcome) in enumerate(graph):
        runs = policy == "run" or all(statuses[p] == "completed" for p in parents)
        assert (f"{n:02}" in ran) == runs
        statuses.append(outcome if runs else "failed" if policy == "fail" else "cancelled")
    assert repository.statuses([f"{n:02}" for n in range(len(graph))]) == {
        f"{n:02}": status for n, status in enumerate(statuses)
    }
    assert repository.distinct("waiting_on", "", 10) == []


def test_a_log_handler_may_cancel_a_task_during_the_processing(queue):
    """The handler is called during the processing of a queue that is not started."""
    queue.declare("t")
    first, other = queue.submit("t"), queue.submit("t")
    children = [queue.submit("t", depends_on=[parent]) for parent in (first, other)]

    class Cancels(logging.Handler):
        def emit(self, record):
            if children[0].id in record.getMessage():
                queue.cancel_task(other.id)

    logger, handler = logging.getLogger("taskx"), Cancels()
    logger.addHandler(handler)
    try:
        assert run_in_thread(first.cancel)()
    finally:
        logger.removeHandler(handler)
    assert {child.task().status for child in children} == {TaskStatus.CANCELLED}
