"""Children: a task submits others, waits for them without a thread, and gets their results."""

from __future__ import annotations

import sqlite3
import threading
from collections import Counter
from contextlib import closing
from datetime import date, datetime, timedelta, timezone
from typing import Any

import pytest
from helpers import PATIENCE, eventually, nested, parts_of
from storage.repositories import TinyRepository

from taskx import (
    ConfigurationError,
    InvalidTransition,
    MemoryRepository,
    Middleware,
    SQLiteRepository,
    Task,
    TaskFailed,
    TaskStatus,
    answer,
    chain,
)
from taskx.node.retention import prune_all
from taskx.tasks import children, lifecycle
from taskx.tasks.payload import MAX_DEPTH
from taskx.testing import InlineQueue, ManualClock, ManualQueue, run_executor

CANCELLED, COMPLETED, FAILED = TaskStatus.CANCELLED, TaskStatus.COMPLETED, TaskStatus.FAILED
PENDING = TaskStatus.PENDING
LONG = timedelta(days=3)
LATE = datetime(2100, 1, 1, tzinfo=timezone.utc)


def leaf(n: int):
    if n < 0:
        raise ValueError(f"{n} is negative")
    return 10 * n


def of_leaf(n: int) -> Task:
    """Return the task of a leaf: one of a thousand and more cannot start for long."""
    return Task(type="leaf", params={"n": n}, run_at=LATE if n >= 1000 else None)


def parent_of(queue, **options):
    """Register ``leaf`` and ``top``, which has as many children as ``numbers`` says."""
    queue.executor("leaf")(leaf)

    @queue.executor("top", **options)
    def top(ctx, numbers: list[int], on_failure="raise", needed=None):
        results = ctx.run_all(
            "leaves", [of_leaf(n) for n in numbers], on_failure=on_failure, needed=needed
        )
        return [repr(r) if isinstance(r, Exception) else r for r in results]

    return queue


@pytest.fixture
def queue():
    return parent_of(ManualQueue())


def ids(handle, count):
    return [f"{handle.id}/leaves/{n}" for n in range(count)]


def status(queue, task_id):
    return queue.get_task_status(task_id).status


class TestResults:
    @pytest.mark.every_store
    def test_in_the_order_of_the_tasks(self, make_queue):
        queue = parent_of(make_queue(worker_num=1))
        queue.start()
        handle = queue.submit("top", {"numbers": [3, 1, 2]})
        assert handle.result(PATIENCE) == [30, 10, 20]
        task = handle.task()
        assert (task.attempt, task.starts, task.checkpoints) == (1, 2, None)  # they are no steps
        eventually(lambda: status(queue, f"{handle.id}/leaves/all") == COMPLETED)

    @pytest.mark.every_store
    def test_however_many_pages_they_take(self, repository):
        clock = ManualClock()
        repository.clock = clock
        queue = parent_of(ManualQueue(repository, clock=clock))
        numbers = [*range(queue._timing.batch + 3)]
        handle = queue.submit("top", {"numbers": numbers})
        queue.run_all()
        assert handle.result() == [10 * n for n in numbers]
        assert queue.parks[handle.id] == 1  # it is started once more, not once for each child

    def test_a_child_costs_the_same_however_many_there_are(self, monkeypatch):
        """MongoDB gets a command for each of these calls: 0.99 for a child of 3,000."""

        def costs(count):
            repository, cost = MemoryRepository(), Counter()
            queue = parent_of(ManualQueue(repository))
            find, apply = repository.find, repository.apply

            def count_ids(column, values, *others):
                cost.update({"reads": 1, "ids": len(values)})
                return find(column, values, *others)

            def count_writes(writes, **options):
                cost.update({"commits": 1, "writes": len(writes)})
                return apply(writes, **options)

            monkeypatch.setattr(repository, "find", count_ids)
            monkeypatch.setattr(repository, "apply", count_writes)
            handle = queue.submit("top", {"numbers": [*range(count)]}, id="parent")
            queue.run_all()
            assert len(handle.result()) == count
            return {name: number / count for name, number in cost.items()}

        few, many = costs(50), costs(400)
        assert all(many[name] < 1.5 * few[name] for name in many), (few, many)
        assert many["writes"] < 3.1  # it is stored, started and ended

    def test_params_are_what_submit_takes(self, queue):
        """They are encoded by annotations, and may be as deep."""
        deep = nested(MAX_DEPTH - 1)

        @queue.executor("week")
        def week(first: date, notes: list[Any]) -> str:
            return f"{first:%W} {notes == deep}"

        params = {"first": date(2026, 1, 5), "notes": deep}

        @queue.executor("year")
        def year(ctx):
            return ctx.run_all("weeks", [Task(type="week", params=params)])

        @queue.executor("years")
        def years(ctx):
            ctx.fork("weeks", [Task(type="week", params=params)])

        handles = [queue.submit("year"), queue.submit("years")]
        queue.run_all()
        assert handles[0].result() == ["01 True"]
        assert queue.handle(f"{handles[1].id}/weeks/0").result() == "01 True"

    def test_of_no_tasks(self, queue):
        handle = queue.submit("top", {"numbers": []})
        queue.run_all()
        assert handle.result() == []
        assert queue.count_tasks() == 1

    def test_the_first_error_is_raised_when_all_have_ended(self, queue):
        handle = queue.submit("top", {"numbers": [1, -1, -2, 2]})
        ran = queue.run_all()
        assert len(ran) == 6
        with pytest.raises(
            TaskFailed, match="leaves/1 failed in attempt 1: ValueError: -1 is negative"
        ):
            handle.result()

    def test_that_of_a_failed_task_comes_before_that_of_a_cancelled_one(self, queue):
        handle = queue.submit("top", {"numbers": [1, -1]})
        queue.run_next()
        queue.cancel_task(f"{handle.id}/leaves/0")
        queue.run_all()
        assert "leaves/1 failed" in handle.task().error

    def test_errors_stand_in_their_places(self, queue):
        handle = queue.submit("top", {"numbers": [1, -1, 2, 3], "on_failure": "return"})
        queue.run_next()
        queue.cancel_task(f"{handle.id}/leaves/2")
        queue.delete(f"{handle.id}/leaves/3")
        queue.run_all()
        one, failed, cancelled, gone = handle.result()
        assert one == 10
        assert "TaskFailed" in failed
        assert "CancelledError" in cancelled
        assert "TaskNotFound" in gone

    def test_a_retry_gets_the_same_results(self, queue):
        calls = []

        @queue.executor("retried", max_attempts=2)
        def retried(ctx):
            got = ctx.run_all("leaves", [Task(type="leaf", params={"n": n}) for n in (1, 2)])
            calls.append(got)
            if len(calls) == 1:
                raise ValueError("once")
            return got

        handle = queue.submit("retried")
        assert len(queue.run_all()) == 5
        assert (handle.result(), calls) == ([10, 20], [[10, 20]] * 2)

    def test_several_lists_and_children_of_children(self, queue):
        @queue.executor("tree")
        def tree(ctx, depth: int):
            if not depth:
                return 1
            below = [Task(type="tree", params={"depth": depth - 1}) for _ in range(2)]
            return sum(ctx.run_all("left", below)) + sum(ctx.run_all("right", below))

        handle = queue.submit("tree", {"depth": 3})
        queue.run_all()
        assert handle.result() == 64

    def test_a_long_id_of_the_parent(self, queue):
        handle = queue.submit("top", {"numbers": [1]}, id="x" * 250)
        queue.run_all()
        assert handle.result() == [10]
        [child] = queue.list_tasks(type="leaf").tasks
        assert len(child.id) < 60


class TestSomeAreEnough:
    @pytest.mark.every_store
    def test_the_rest_is_cancelled(self, make_queue):
        queue, go_on = make_queue(worker_num=5), threading.Event()

        @queue.executor("wait")
        def wait(ctx, first: bool):
            if first:
                return "fast"
            eventually(lambda: go_on.is_set() or ctx.token.cancelled)
            ctx.token.raise_if_cancelled()
            return "slow"

        @queue.executor("top")
        def top(ctx):
            tasks = [Task(type="wait", params={"first": n == 1}) for n in range(4)]
            return list(map(repr, ctx.run_all("some", tasks, needed=1)))

        queue.start()
        handle = queue.submit("top")
        try:
            results = handle.result(PATIENCE)
        finally:
            go_on.set()
        assert results[1] == "'fast'"
        assert all("CancelledError" in results[n] for n in (0, 2, 3))
        for n in (0, 2, 3):
            eventually(lambda n=n: status(queue, f"{handle.id}/some/{n}") == CANCELLED)

    def test_it_goes_on_at_the_moment_at_which_enough_have_completed(self, queue):
        handle = queue.submit("top", {"numbers": [1, -1, 2, 1003, 1004], "needed": 2})
        ran = [task.id for task in queue.run_all()]
        assert ran == [handle.id, *ids(handle, 3), handle.id]
        one, failed, two, three, four = handle.result()
        assert (one, two) == (10, 20)
        assert "is negative" in failed
        assert "CancelledError" in three
        assert "CancelledError" in four

    def test_too_few_can_complete(self, queue):
        handle = queue.submit("top", {"numbers": [-1, 1, -2, 1002], "needed": 3})
        queue.run_all()
        assert "leaves/0 failed" in handle.task().error
        assert status(queue, f"{handle.id}/leaves/3") == CANCELLED

    def test_too_few_can_complete_and_errors_are_returned(self, queue):
        how = {"needed": 4, "on_failure": "return"}
        handle = queue.submit("top", {"numbers": [1, -1, 1002, 1003], **how})
        queue.run_all()
        one, failed, *rest = handle.result()
        assert one == 10
        assert "TaskFailed" in failed
        assert all("CancelledError" in error for error in rest)

    def test_a_later_attempt_gets_the_same_results(self, queue):
        calls = []

        @queue.executor("retried", max_attempts=2)
        def retried(ctx):
            calls.append([*map(repr, ctx.run_all("two", map(of_leaf, (1, 1002)), needed=1))])
            if len(calls) == 1:  # the other one had begun, and completes all the same
                parts_of(queue).moves.commit(_completed(queue, f"{handle.id}/two/1"))
                raise ValueError("once")

        handle = queue.submit("retried")
        queue.run_all()
        assert calls[0][0] == calls[1][0] == "10"
        assert all("CancelledError" in call[1] for call in calls)
        assert handle.task().status == COMPLETED

    def test_an_end_between_the_look_and_the_park_is_not_missed(self, queue):
        """The child ends after its parent has looked, and before the park is stored."""
        inner = parts_of(queue).moves
        ended = []

        def conclude(writes, outcome):
            if not ended and any(write.move == "park" for write in writes):
                ended.append(outcome.run.task.id)
                inner.commit(_completed(queue, f"{ended[0]}/leaves/0"))
            return type(inner).conclude(inner, writes, outcome)

        inner.conclude = conclude
        later = inner.later
        inner.later = lambda writes, outcome: (
            conclude(writes, outcome)
            if any(write.move == "park" for write in writes)
            else later(writes, outcome)
        )
        handle = queue.submit("top", {"numbers": [1, 2], "needed": 1})
        queue.run_next()
        queue.pause("leaf")
        queue.run_all()
        assert status(queue, handle.id) == COMPLETED
        assert ended == [handle.id]


def _completed(queue, task_id):
    """Return the writes that complete a task that waits or was cancelled, as a node elsewhere would."""
    from taskx.tasks.writes import Update

    changes = {"status": "completed", "result": "1", "completed_at": 1, "owner": ""}
    return [Update(task_id, {}, changes, move="complete")]


class TestWhatChildrenInherit:
    def test_flow_tags_and_creator(self, queue):
        options = {"tags": ["nightly"], "created_by": "ann"}
        handle = queue.submit(Task(type="top", params={"numbers": [1]}, flow="f1", **options))
        queue.run_next()
        child = queue.get_task_status(f"{handle.id}/leaves/0")
        assert (child.flow, child.tags, child.created_by) == ("f1", ("nightly",), "ann")

    @pytest.mark.parametrize(
        ("parent", "child", "expected"), [(5, 0, 5), (5, 7, 7), (5, 3, 5), (-5, 0, 0)]
    )
    def test_at_least_the_priority_of_the_parent(self, parent, child, expected):
        queue = ManualQueue()
        queue.executor("low", priority=child)(lambda: 1)
        queue.executor("top")(lambda ctx: ctx.run_all("low", [Task(type="low")]))
        handle = queue.submit("top", priority=parent)
        queue.run_next()
        assert queue.get_task_status(f"{handle.id}/low/0").priority == expected

    def test_middleware_sees_them_as_it_sees_any_submit(self):
        seen = []

        class Seen(Middleware):
            def submit(self, tasks, store):
                seen.append([task.type for task in tasks])
                return store(tasks)

        queue = parent_of(ManualQueue(middleware=[Seen()]))
        handle = queue.submit("top", {"numbers": [1, 2]})
        queue.run_all()
        assert (handle.result(), seen) == ([10, 20], [["top"], ["leaf", "leaf"]])


class TestTheEndOfTheParent:
    @pytest.mark.every_store
    def test_a_cancel_cancels_them(self, repository):
        clock = ManualClock()
        repository.clock = clock
        queue = parent_of(ManualQueue(repository, clock=clock))
        queue.executor("above")(
            lambda ctx: ctx.run_all("top", [Task(type="top", params={"numbers": [1, 2]})])
        )
        handle = queue.submit("above")
        queue.run_next()
        queue.run_next()
        assert queue.cancel_task(handle.id)
        assert queue.run_all() == []
        counts = {task.id: task.status for task in queue.list_tasks().tasks}
        assert len(counts) == 6
        assert {*counts.values()} == {CANCELLED}

    def test_a_running_child_is_asked_to_stop(self, make_queue):
        queue, began = make_queue(worker_num=2), threading.Event()

        @queue.executor("long")
        def long(ctx):
            began.set()
            eventually(lambda: ctx.token.cancelled)
            ctx.token.raise_if_cancelled()

        queue.executor("top")(lambda ctx: ctx.run_all("long", [Task(type="long")]))
        queue.start()
        handle = queue.submit("top")
        assert began.wait(PATIENCE)
        eventually(lambda: lifecycle.is_parked(handle.task()))
        queue.cancel_task(handle.id)
        eventually(lambda: status(queue, f"{handle.id}/long/0") == CANCELLED)

    def test_what_a_dead_process_left_undone_is_found(self, queue):
        """The process that has stored the cancel dies before it has cancelled the children."""
        handle = queue.submit("top", {"numbers": [1, 2]})
        queue.run_next()
        now = queue.clock.now_ms()
        queue.repository.apply(lifecycle.cancel(handle.id, now))
        queue.advance(3)
        assert status(queue, f"{handle.id}/leaves/1") in (CANCELLED, COMPLETED)
        assert status(queue, f"{handle.id}/leaves/all") == CANCELLED

    def test_the_list_itself_is_not_cancelled(self, queue):
        """Else its children would go on if it ended between the end of their parent and theirs."""
        handle = queue.submit("top", {"numbers": [1, 2]})
        queue.run_next()
        queue.repository.apply(lifecycle.cancel(handle.id, queue.clock.now_ms()))
        with pytest.raises(InvalidTransition, match="the list of a task's children: cancel that"):
            queue.cancel_task(f"{handle.id}/leaves/all")
        assert queue.cancel_all(type=lifecycle.CHILDREN).changed == 0
        queue.advance(3)
        assert {status(queue, f"{handle.id}/leaves/{n}") for n in (0, 1)} == {CANCELLED}

    def test_a_failure_leaves_them(self, queue):
        @queue.executor("fails")
        def fails(ctx):
            tasks = [Task(type="leaf", params={"n": n}, priority=-n) for n in range(2)]
            try:
                ctx.run_all("leaves", tasks, needed=1)
            finally:
                if ctx.task.starts > 1:
                    raise ValueError("all the same")

        queue.executor("forks")(lambda ctx: None)
        handle = queue.submit("fails")
        queue.run_all()
        assert status(queue, handle.id) == FAILED
        assert status(queue, f"{handle.id}/leaves/all") == COMPLETED

    def test_a_requeue_runs_those_again_that_have_not_completed(self):
        queue, broken, ran = ManualQueue(), [True], []

        @queue.executor("leaf")
        def leaf(n: int):
            ran.append(n)
            if n == 1 and broken:
                raise ValueError("broken")
            return n

        @queue.executor("top")
        def top(ctx):
            return ctx.run_all("leaves", [Task(type="leaf", params={"n": n}) for n in range(3)])

        handle = queue.submit("top")
        queue.run_all()
        assert status(queue, handle.id) == FAILED
        broken.clear()
        queue.requeue(handle.id)
        queue.run_all()
        assert queue.handle(handle.id).result() == [0, 1, 2]
        assert ran == [0, 1, 2, 1]
        assert status(queue, f"{handle.id}/leaves/all") == COMPLETED

    def test_a_requeue_after_a_cancel_goes_on(self, queue):
        handle = queue.submit("top", {"numbers": [1, 2]})
        queue.run_next()
        queue.run_next()
        queue.cancel_task(handle.id)
        queue.run_all()
        queue.requeue(handle.id)
        queue.run_all()
        assert queue.handle(handle.id).result() == [10, 20]

    def test_children_that_run_again_wait_for_their_parents_among_them(self):
        """Also for those that come later in the list, in another batch."""
        queue, broken, ran = ManualQueue(), [True], []
        first = queue._timing.batch  # the number of a child

        @queue.executor("leaf")
        def leaf(ctx, n: int):
            ran.append((n, [parent.result for parent in ctx.parents]))
            if n == first and broken:
                raise ValueError("broken")
            return n

        @queue.executor("top")
        def top(ctx):
            child = f"{ctx.task.id}/leaves/{first}"
            tasks = [Task(type="leaf", params={"n": n}) for n in range(first + 1)]
            tasks[0] = Task(type="leaf", params={"n": 0}, depends_on=[child], priority=9)
            return ctx.run_all("leaves", tasks)

        handle = queue.submit("top")
        queue.run_all()
        assert status(queue, handle.id) == FAILED
        broken.clear()
        ran.clear()
        queue.requeue(handle.id)
        queue.run_all()
        assert queue.handle(handle.id).result() == [*range(first + 1)]
        assert ran == [(first, []), (0, [first])]

    def test_an_answer_among_them_is_asked_for_again(self, queue):
        queue.executor("people")(
            lambda ctx: ctx.run_all("people", [answer("eva"), answer("bob", "Well?")])
        )
        handle = queue.submit("people")
        queue.run_all()
        eva, bob = (f"{handle.id}/people/{n}" for n in (0, 1))
        assert queue.finish(eva, "yes")
        assert queue.finish(bob, error="ill")
        queue.run_all()
        assert status(queue, handle.id) == FAILED
        queue.requeue(handle.id)
        queue.run_all()
        assert queue.get_task_status(bob).params == {"name": "bob", "question": "Well?"}
        assert queue.finish(bob, "yes, too")
        queue.run_all()
        assert queue.handle(handle.id).result() == ["yes", "yes, too"]

    @pytest.mark.parametrize("forks", [False, True])
    def test_a_requeue_while_a_child_is_still_stopping(self, make_queue, forks):
        """The parent waits until that child has ended: then it runs again."""
        queue = make_queue(worker_num=2)
        began, stopped, end, ran = *(threading.Event() for _ in range(3)), []

        @queue.executor("long")
        def long(ctx):
            ran.append(ctx.task.starts)
            if len(ran) == 1:
                began.set()
                stopped.wait(PATIENCE)
                ctx.token.raise_if_cancelled()
            return "done"

        @queue.executor("top")
        def top(ctx):
            if forks:
                ctx.fork("long", [Task(type="long")])
                if not end.is_set():
                    return ctx.ask("it")
                return ["done"]
            return ctx.run_all("long", [Task(type="long")])

        queue.start()
        handle = queue.submit("top")
        assert began.wait(PATIENCE)
        eventually(lambda: lifecycle.is_parked(handle.task()))
        queue.cancel_task(handle.id)
        eventually(lambda: status(queue, f"{handle.id}/long/all") == CANCELLED)
        end.set()
        queue.requeue(handle.id)
        eventually(lambda: lifecycle.is_parked(handle.task()))
        assert status(queue, f"{handle.id}/long/all") == CANCELLED
        stopped.set()
        assert queue.handle(handle.id).result(PATIENCE) == ["done"]
        assert queue.handle(f"{handle.id}/long/0").result(PATIENCE) == "done"
        assert len(ran) == 2

    def test_a_requeued_child_does_not_bind_the_list_to_it(self, queue):
        handle = queue.submit("top", {"numbers": [-1, 1], "on_failure": "return"})
        queue.run_next()
        queue.run_next()
        queue.requeue(f"{handle.id}/leaves/0")
        queue.cancel_task(handle.id)
        queue.run_all()
        assert status(queue, f"{handle.id}/leaves/0") == CANCELLED

    def test_the_list_itself_is_not_requeued(self, queue):
        handle = queue.submit("top", {"numbers": [1]})
        queue.run_next()
        queue.cancel_task(handle.id)
        queue.run_all()
        with pytest.raises(InvalidTransition, match="the list of a task's children: requeue that"):
            queue.requeue(f"{handle.id}/leaves/all")


class TestRecords:
    def test_they_stay_while_the_parent_is_unfinished(self, queue):
        queue.executor("top2")(lambda ctx: (_leaves(ctx), ctx.ask("go on")))
        handle = queue.submit("top2")
        queue.run_all()
        future = queue.clock.now() + LONG
        assert prune_all(queue._moves, queue._timing, future, None) == 0
        assert queue.delete_all(type="leaf").changed == 0
        queue.finish(f"{handle.id}/go on")
        queue.run_all()
        assert handle.result()
        assert prune_all(queue._moves, queue._timing, future, None) == 5
        assert queue.count_tasks() == 0

    def test_the_list_stays_while_the_parent_is_unfinished(self, queue):
        """Without it, the parent would submit the children again, whose ids exist."""
        handle = queue.submit("top", {"numbers": [1, 2]})
        queue.run_next()
        listed = f"{handle.id}/leaves/all"
        with pytest.raises(InvalidTransition, match="cannot be deleted before that task has ended"):
            queue.delete(listed)
        assert queue.delete_all(type=lifecycle.CHILDREN).skipped == {"needed": 1}
        queue.run_all()
        assert handle.result() == [10, 20]
        queue.delete(listed)
        assert queue.count_tasks(type=lifecycle.CHILDREN) == 0

    def test_all_are_deleted_with_the_parent(self, queue):
        queue.submit("top", {"numbers": [1, 2]})
        queue.run_next()
        assert queue.delete_all(everything=True).changed == 4

    def test_they_stay_while_the_parent_may_be_requeued(self, queue):
        handle = queue.submit("top", {"numbers": [1, -1]})
        queue.run_all()
        future = queue.clock.now() + LONG
        assert prune_all(queue._moves, queue._timing, future, "completed") == 0
        queue.delete(handle.id)
        assert prune_all(queue._moves, queue._timing, future, None) == 3

    def test_lists_are_no_work(self, queue):
        queue.executor("top2")(lambda ctx: ctx.run_all("asks", [Task(type="ask")]))
        queue.executor("ask")(lambda ctx: ctx.ask("it"))
        queue.submit("top2")
        queue.run_all()
        stats = queue.stats()
        assert "children" not in stats.types
        assert (stats.answers, stats.types["top2"].blocked) == (1, 1)
        assert queue.submitted("children") == []
        with pytest.raises(ConfigurationError, match="the type 'children' is that of lists"):
            queue.executor("children")(lambda: None)
        with pytest.raises(ConfigurationError, match="make lists of children"):
            queue.submit("children")

    def test_a_queue_is_drained_while_a_child_waits_for_somebody(self, make_queue):
        queue = make_queue(worker_num=1)
        queue.executor("ask")(lambda ctx: ctx.ask("it"))

        @queue.executor("top")
        def top(ctx):
            return ctx.run_all("asks", [Task(type="ask")] * 2, needed=1)[1]

        queue.start()
        handle = queue.submit("top")
        eventually(lambda: queue.count_tasks(type="answer") == 2)
        assert queue.drain(PATIENCE)
        queue.finish(f"{handle.id}/asks/1/it", "yes")
        assert handle.result(PATIENCE) == "yes"

    def test_why(self, queue):
        handle = queue.submit("top", {"numbers": [1, 2, 3]})
        queue.run_next()
        queue.run_next()
        [reason] = queue.why(handle.id)[:1]
        assert "It waits for 2 of 3 children (leaves)" in str(reason)
        assert "without a thread" in str(reason)
        assert (reason.facts["unfinished"], reason.facts["of"]) == (2, 3)
        [reason] = queue.why(f"{handle.id}/leaves/all")
        assert f"the children of task {handle.id}" in str(reason)


def _leaves(ctx):
    return ctx.run_all("leaves", [Task(type="leaf", params={"n": n}) for n in (1, 2)])


class TestRefused:
    def error(self, function, *, repository=None, **options):
        queue = ManualQueue(repository)
        queue.executor("leaf")(leaf)
        queue.executor("top")(function)
        handle = queue.submit("top", **options)
        queue.run_all()
        return handle.task().error

    def test_another_list_under_the_same_name(self):
        queue, counts = ManualQueue(), [3, 4]
        queue.executor("leaf")(leaf)

        @queue.executor("top")
        def top(ctx):
            tasks = [Task(type="leaf", params={"n": n}) for n in range(counts.pop(0))]
            return ctx.run_all("leaves", tasks)

        handle = queue.submit("top")
        queue.run_all()
        assert "was submitted with 3 tasks in an earlier call, and has 4 now" in handle.task().error

    def test_other_tasks_under_the_same_name(self):
        queue, numbers = ManualQueue(), [1, 2]
        queue.executor("leaf")(leaf)

        @queue.executor("top")
        def top(ctx):
            return ctx.run_all("leaves", [Task(type="leaf", params={"n": numbers.pop()})])

        handle = queue.submit("top")
        queue.run_all()
        assert "with 1 tasks in an earlier call, and has 1 now, others" in handle.task().error

    @pytest.mark.parametrize(
        ("name", "words"),
        [("x" * 81, "81 characters"), ("a/b", "a slash"), ("", "requires a name")],
    )
    def test_a_name_that_cannot_be_a_part_of_an_id(self, name, words):
        error = self.error(lambda ctx: ctx.run_all(name, [Task(type="leaf", params={"n": 1})]))
        assert words in error

    def test_the_same_name_twice(self):
        assert "already called in this attempt" in self.error(
            lambda ctx: (_leaves(ctx), _leaves(ctx))
        )

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ({"tasks": ["leaf"]}, "requires tasks, not 'leaf'"),
            ({"tasks": [Task(id="mine", type="leaf")]}, "new tasks, without ids"),
            ({"tasks": [Task(type="leaf")], "needed": 2}, "from 1 to the number of tasks, 1"),
            ({"tasks": [Task(type="leaf")], "needed": 0}, "needed must be a whole number"),
            ({"tasks": [Task(type="leaf")], "on_failure": "ignore"}, "on_failure must be"),
            ({"tasks": [Task(type="leaf", params={"m": 1})]}, "params"),
        ],
    )
    def test_arguments(self, given, words):
        error = self.error(lambda ctx: ctx.run_all("leaves", **given))
        assert words in error

    def test_more_than_a_hundred_levels(self):
        queue = ManualQueue()
        queue.executor("deep")(lambda ctx: ctx.run_all("deeper", [Task(type="deep")]))
        queue.submit("deep")
        ran = queue.run_all()
        assert "more than 100 levels" in next(task.error for task in ran if task.error)
        assert queue.count_tasks(type="deep") == 101

    def test_inside_ctx_timeout(self):
        def top(ctx):
            with ctx.timeout(5):
                _leaves(ctx)

        assert "ctx.run_all() cannot be used inside ctx.timeout()" in self.error(top)

    def test_inside_ctx_transaction(self, tmp_path):
        def top(ctx):
            with ctx.transaction():
                _leaves(ctx)

        path = tmp_path / "app.db"
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("CREATE TABLE rows (n)")
        with closing(SQLiteRepository(path, prefix="taskx_")) as repository:
            error = self.error(top, repository=repository)
        assert "ctx.run_all() cannot be used inside ctx.transaction()" in error

    def test_a_repository_of_eight_methods(self):
        error = self.error(_leaves, repository=TinyRepository())
        assert error.startswith("ConfigurationError")
        assert "cannot store" in error

    def test_the_concurrency_key_of_the_parent(self):
        child = Task(type="leaf", params={"n": 1}, concurrency_key="k")
        error = self.error(lambda ctx: ctx.run_all("leaves", [child]), concurrency_key="k")
        assert "would wait for it, as it keeps the turn" in error

    def test_an_id_that_another_task_has(self):
        queue = parent_of(ManualQueue())
        queue.submit("leaf", {"n": 1}, id="p/leaves/0")
        handle = queue.submit("top", {"numbers": [1]}, id="p")
        queue.run_all()
        assert handle.task().error_type == "taskx.tasks.errors.DuplicateTask"
        assert queue.count_tasks(type="children") == 0

    def test_an_answer_with_the_id_of_the_list(self):
        queue = parent_of(ManualQueue())
        handle = queue.submit("top", {"numbers": [1]})
        queue.finish(f"{handle.id}/leaves/all", 1)
        queue.run_all()
        assert "has the id of a list of children" in handle.task().error


class TestTheTestKit:
    def test_an_inline_queue(self):
        queue = parent_of(InlineQueue())
        handle = queue.submit("top", {"numbers": [1, 2]})
        assert handle.result() == [10, 20]

    def test_a_single_attempt(self):
        def top(ctx):
            return sum(ctx.run_all("leaves", [Task(type="leaf")] * 2))

        outcome = run_executor(top)
        assert (outcome.parked, outcome.error) == ("leaves", None)
        outcome = run_executor(top, steps={"leaves": [1, 2]})
        assert (outcome.parked, outcome.result) == ("", 3)


def test_ids():
    long = "x" * 200
    for parent, name in (("p", "pages"), (long, "pages"), (long, "y" * 80)):
        listed = children.list_id(parent, name)
        child = children.child_id(listed, 12_345)
        assert children.list_of(child) == listed
        assert len(child) <= 127
    assert children.list_id("p", "pages") == "p/pages/all"
    assert children.list_of("p/approval") == children.list_of("7") == children.list_of("p/7") == ""


class TestForks:
    @pytest.fixture
    def queue(self):
        return self.forking(ManualQueue())

    def forking(self, queue):
        queue.executor("leaf")(leaf)

        @queue.executor("fork")
        def fork(ctx, numbers: list[int]):
            return ctx.fork("leaves", [of_leaf(n) for n in numbers])

        @queue.executor("after")
        def after(ctx):
            return [parent.result for parent in ctx.parents]

        return queue

    @pytest.mark.every_store
    def test_the_dependents_of_a_task_wait_for_what_it_submits(self, repository):
        clock = ManualClock()
        repository.clock = clock
        queue = self.forking(ManualQueue(repository, clock=clock))
        flow = queue.submit_flow(
            chain(Task(type="fork", params={"numbers": [1, 2]}), Task(type="after"))
        )
        queue.run_all()
        forked, (first, last) = flow.ids[0], flow.handles
        children = ids(first, 2)
        assert first.result() == children
        assert last.result() == [children, 10, 20]
        assert [*last.task().depends_on] == [forked, *children]
        assert queue.parks[forked] == 0
        assert {task.id for task in queue.list_tasks(parent=children[1]).tasks} == {
            last.id,
            f"{forked}/leaves/all",
        }

    def test_they_end_with_it_if_a_child_does_not_complete(self, queue):
        flow = queue.submit_flow(
            chain(Task(type="fork", params={"numbers": [-1]}), Task(type="after"))
        )
        queue.run_all()
        assert status(queue, flow.ids[0]) == COMPLETED
        last = queue.get_task_status(flow.ids[1])
        assert (last.status, last.error) == (CANCELLED, f"its parent {flow.ids[0]}/leaves/0 failed")

    def test_a_second_attempt_submits_nothing_twice(self, queue):
        @queue.executor("again", max_attempts=2)
        def again(ctx):
            ctx.fork("leaves", [of_leaf(1)])
            if ctx.task.errors == 0:
                raise ValueError("once")

        flow = queue.submit_flow(chain(Task(type="again"), Task(type="after")))
        queue.run_all()
        assert flow.result() == [None, 10]
        assert queue.count_tasks(type="leaf") == 1

    def test_a_process_that_dies_before_the_dependents_wait(self, queue, monkeypatch):
        """The children are stored; that the dependents wait for them is stored by the next attempt."""
        waits, dies = lifecycle.wait_for_more, [True]

        def wait_for_more(*args):
            if dies:
                dies.clear()
                raise ValueError("it dies")
            return waits(*args)

        monkeypatch.setattr(lifecycle, "wait_for_more", wait_for_more)
        first = Task(type="fork", params={"numbers": [1]}, max_attempts=2)
        flow = queue.submit_flow(chain(first, Task(type="after")))
        queue.run_all()
        assert flow.result() == [[f"{flow.ids[0]}/leaves/0"], 10]

    def test_a_decision_about_a_dependent_that_was_read_before_does_not_count(self, queue):
        flow = queue.submit_flow(
            chain(Task(type="fork", params={"numbers": [1000]}), Task(type="after"))
        )
        read = queue.get_task_status(flow.ids[1])
        queue.run_next()
        moved = lifecycle.parents_moved(read, {flow.ids[0]: "completed"}, 1)
        assert not queue.repository.apply([moved])[0]
        queue.advance(3)
        assert status(queue, flow.ids[1]) == PENDING

    def test_a_cancel_cancels_them(self, queue):
        @queue.executor("long")
        def long(ctx):
            ctx.fork("leaves", [of_leaf(1)])
            ctx.ask("it")

        handle = queue.submit("long")
        queue.run_next()
        queue.cancel_task(handle.id)
        queue.run_all()
        assert status(queue, f"{handle.id}/leaves/0") == CANCELLED

    def test_of_no_tasks(self, queue):
        handle = queue.submit("fork", {"numbers": []})
        queue.run_all()
        assert handle.result() == []

    def test_too_many_pairs(self, queue, monkeypatch):
        monkeypatch.setattr(children, "MOST_PAIRS", 3)
        first = queue.submit("fork", {"numbers": [1, 2]})
        for _ in range(2):
            queue.submit("after", depends_on=[first.id])
        queue.run_all()
        assert "2 tasks would depend on 2 more tasks" in first.task().error

    def test_inside_ctx_timeout(self, queue):
        @queue.executor("inside")
        def inside(ctx):
            with ctx.timeout(5):
                ctx.fork("leaves", [of_leaf(1)])

        handle = queue.submit("inside")
        queue.run_all()
        assert "ctx.fork() cannot be used inside ctx.timeout()" in handle.task().error
