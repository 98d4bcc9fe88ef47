"""The contract of units of work: tasks in transactions of callers, and transactions of executors.

A store that can take part has a class of tests for each of the two, with the fixtures that they need.
"""

from __future__ import annotations

import threading
from contextlib import suppress

import pytest
from helpers import eventually, parts_of, pool_of, run_in_thread

from taskx import (
    ConfigurationError,
    DuplicateTask,
    Hook,
    PayloadError,
    Task,
    TaskNotFound,
    TaskStatus,
    chain,
    group,
)

LONG = 60


class CallersTransactions:
    """Submits and cancels in a transaction of the caller.

    Fixtures:
        queue: has two workers and is not started. Its executor ``echo`` returns ``n``; tasks of the type
            ``elsewhere`` stay pending.
        begin: begins a transaction as a context manager, which gives the options of calls inside it.
            ``begin(undo=True)`` rolls back at its end, otherwise it commits.
        add: writes a row of the caller; it takes these options.
        rows: returns how many rows there are.
    """

    @pytest.fixture
    def outside(self):
        """Return what a call returns outside of the transaction."""
        return lambda call: run_in_thread(call)()

    def test_the_task_starts_after_the_commit(self, queue, begin, add, rows, outside):
        with queue:
            with begin() as within:
                add(within)
                handle = queue.submit("echo", {"n": 3}, **within)
                assert outside(lambda: int(queue.count_tasks())) == 0
            assert handle.result(timeout=LONG) == 3
        assert rows() == 1

    def test_a_rollback_leaves_no_task(self, queue, begin, add, rows):
        with begin(undo=True) as within:
            add(within)
            handle = queue.submit("echo", **within)
            queue.submit_many([Task(type="echo"), Task(type="echo")], **within)
            queue.submit_flow(chain(Task(type="echo"), Task(type="echo")), **within)
        assert (int(queue.count_tasks()), rows()) == (0, 0)
        with pytest.raises(TaskNotFound):
            queue.get_task_status(handle.id)

    def test_many_tasks_and_flows_are_stored_with_the_data(self, queue, begin):
        one, two, three = (Task(type="echo", params={"n": n}) for n in (1, 2, 3))
        with queue:
            with begin() as within:
                tasks = [Task(type="echo", params={"n": n}) for n in range(50)]
                many = queue.submit_many(tasks, **within)
                flow = queue.submit_flow(chain(group(one, two), three), **within)
            assert [handle.result(timeout=LONG) for handle in many] == [*range(50)]
            assert flow.result(timeout=LONG) == 3

    def test_all_options_work_there(self, queue, begin):
        options = {"tags": ["red"], "concurrency_key": "c", "expires": 1000, "priority": 7}
        with begin() as within:
            parent = queue.submit("elsewhere", **within)
            options |= {"depends_on": [parent], "unique_key": "k", **within}
            child = queue.submit("echo", {"n": 1}, **options)
            again = queue.submit("echo", unique_key="k", on_conflict="return", **within)
            assert again.id == child.id
        [task] = queue.list_tasks(tag="red")[0]
        assert (task.id, task.depends_on, task.priority) == (child.id, [parent.id], 7)
        assert (task.concurrency_key, task.expires_at is None) == ("c", False)

    def test_a_replaced_task_is_replaced_with_the_commit(self, queue, begin, outside):
        def params():
            return [task.params for task in queue.list_tasks()[0]]

        queue.submit("elsewhere", {"n": 1}, unique_key="k")
        with begin() as within:
            options = {"unique_key": "k", "on_conflict": "replace", **within}
            queue.submit("elsewhere", {"n": 2}, **options)
            assert outside(params) == [{"n": 1}]
        assert params() == [{"n": 2}]

    def test_a_task_that_waits_for_a_running_parent_starts_after_it(self, queue, begin, gate):
        queue.executor("parent")(lambda: gate())
        with queue:
            parent = queue.submit("parent")
            gate.wait_for()  # if it started now, a transaction on SQLite that has read could not write
            with begin() as within:
                child = queue.submit("echo", {"n": 5}, depends_on=[parent], **within)
            gate.open()
            assert child.result(timeout=LONG) == 5

    def test_a_full_buffer_refuses_nothing(self, queue, make_queue, begin, gate):
        queue = make_queue(worker_num=1, buffer_size=1, overflow="reject")
        queue.executor("wait")(lambda: gate())
        with queue:
            with begin() as within:
                handles = [queue.submit("wait", **within) for _ in range(20)]
            gate.open()
            for handle in handles:
                handle.result(timeout=LONG)

    def test_a_refused_task_leaves_the_transaction_as_it_was(self, queue, begin, add, rows):
        queue.submit("elsewhere", id="a", unique_key="k")
        with begin() as within:
            add(within)
            for taken in ({"id": "a"}, {"unique_key": "k"}):
                with pytest.raises(DuplicateTask):
                    queue.submit("echo", **taken, **within)
            with pytest.raises(PayloadError):
                queue.submit("echo", {"n": object()}, **within)
            with pytest.raises(DuplicateTask):
                queue.submit_many([Task(id=i, type="echo") for i in "bca"], **within)
            with pytest.raises(TaskNotFound):
                queue.submit("echo", depends_on=["none"], **within)
            with pytest.raises(TaskNotFound):
                queue.cancel_task("none", **within)
            queue.submit("echo", id="d", **within)
        assert {task.id for task in queue.list_tasks()[0]} == {"a", "d"}
        assert rows() == 1

    def test_hooks_are_told_after_the_commit(self, queue, make_queue, begin):
        told = []

        class Recorder(Hook):
            def submitted(self, task):
                told.append(task.id)

        queue = make_queue(hooks=[Recorder()])
        queue.declare("elsewhere")
        with begin(undo=True) as within:
            queue.submit("elsewhere", id="gone", **within)
        for task_id in ("kept", "last"):
            with begin() as within:
                queue.submit("elsewhere", id=task_id, **within)
                assert parts_of(queue).hooks.wait(LONG)
                assert task_id not in told
        eventually(lambda: sorted(told) == ["kept", "last"])  # in any order

    def test_a_cancel_takes_place_with_the_commit(self, queue, begin, outside):
        kept, gone = queue.submit("elsewhere"), queue.submit("elsewhere")
        with begin(undo=True) as within:
            assert queue.cancel_task(kept.id, **within) is True
        with begin() as within:
            assert queue.cancel_task(gone.id, **within) is True
            assert outside(gone.task).status is TaskStatus.PENDING
        assert kept.task().status is TaskStatus.PENDING
        assert gone.task().status is TaskStatus.CANCELLED

    def test_a_running_task_is_asked_to_stop_after_the_commit(self, queue, begin):
        began, asked = threading.Event(), threading.Event()

        @queue.executor("wait")
        def wait(ctx):
            began.set()
            ctx.on_cancel(asked.set)
            ctx.sleep(LONG)

        with queue:
            handle = queue.submit("wait")
            assert began.wait(LONG)
            with begin() as within:
                assert queue.cancel_task(handle.id, **within) is False
                assert not asked.is_set()
            assert asked.wait(LONG)

    def test_a_handle_is_of_use_after_a_wait_before_the_commit(self, queue, begin):
        with queue:
            ended = queue.submit("echo", {"n": 2})
            assert ended.result(timeout=LONG) == 2
            with begin() as within:
                handle = queue.submit("echo", {"n": 3}, **within)
                assert not handle.done()
                for call in (handle.result, handle.exception):
                    with pytest.raises(ConfigurationError, match="wait for it after that"):
                        call()
                assert queue.handle(ended.id).result(timeout=LONG) == 2
            assert handle.result(timeout=LONG) == 3

    def test_a_task_that_has_just_ended_needs_no_wait(self, queue, begin, monkeypatch):
        """Its outcome is stored, and the thread that stored it has not told anybody yet."""
        with queue:
            ended = queue.submit("echo", {"n": 2})
            assert ended.result(timeout=LONG) == 2
            monkeypatch.setattr(pool_of(queue).runs, "running", lambda task_id: True)
            with begin() as within:
                queue.submit("elsewhere", {"n": 3}, **within)
                assert queue.handle(ended.id).result(timeout=LONG) == 2


class ExecutorsTransactions:
    """Writes, checkpoints and the completion of an executor.

    Fixtures:
        run: runs a function as an executor, and returns the task's record after it.
        add: writes a row of the executor in its transaction: ``add(tx, number)``.
        rows: returns the numbers of the committed rows.
        repository: the store of the tasks.
    """

    def test_writes_and_completion_are_committed_together(self, run, rows, add, repository):
        status = []

        def work(ctx):
            ctx.progress(40, "nearly")
            with ctx.transaction() as tx:
                add(tx, 1)
                tx.complete({"answer": 42})
                assert rows() == []
            assert rows() == [1]
            status.append(repository.get_by_id(ctx.task.id).status)

        task = run(work)
        assert (status, task.status) == ([TaskStatus.COMPLETED], TaskStatus.COMPLETED)
        assert (task.result, task.progress, task.message) == ({"answer": 42}, 100, "nearly")
        assert " taskx-worker-" in task.worker
        assert task.completed_at is not None

    def test_an_error_undoes_writes_and_checkpoints(self, run, rows, add):
        seen = []

        def work(ctx):
            ctx.cursor = 1
            with suppress(ZeroDivisionError), ctx.transaction() as tx:
                add(tx, 1)
                ctx.cursor = 2
                ctx.step("one", lambda: "undone")
                tx.complete("never")
                raise ZeroDivisionError
            seen.append(ctx.cursor)
            with ctx.transaction() as tx:
                add(tx, 2)
                seen.append(ctx.step("one", lambda: "done"))
            return "returned"

        task = run(work)
        assert (task.result, seen, rows()) == ("returned", [1, "done"], [2])
        assert task.checkpoints == {"steps": {"one": "done"}, "cursor": 1}

    def test_a_failed_attempt_leaves_nothing_for_the_next(self, run, rows, add):
        cursors = []

        def work(ctx):
            cursors.append(ctx.cursor)
            with ctx.transaction() as tx:
                add(tx, ctx.task.attempt)
                ctx.cursor = ctx.task.attempt
                if ctx.task.attempt < 3:
                    raise OSError
                tx.complete()

        assert run(work, max_attempts=3).status is TaskStatus.COMPLETED
        assert (cursors, rows()) == ([None] * 3, [3])

    def test_a_loop_goes_on_exactly_where_it_stopped(self, run, rows, add):
        def work(ctx):
            for n in range(ctx.cursor or 0, 10):
                with ctx.transaction() as tx:
                    add(tx, n)
                    ctx.cursor = n + 1
                    if n == 3 * ctx.task.attempt:
                        raise OSError

        assert run(work, max_attempts=9).status is TaskStatus.COMPLETED
        assert rows() == [*range(10)]
