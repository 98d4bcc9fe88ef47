"""Answers: a task asks somebody, waits without a thread, and goes on with what was answered."""

from __future__ import annotations

import logging
import sqlite3
import threading
from concurrent.futures import CancelledError
from contextlib import closing
from datetime import timedelta
from functools import partial

import pytest
from helpers import (
    PATIENCE,
    eventually,
    frequent_checks,
    housekeeper_of,
    parts_of,
    pool_of,
    run_in_thread,
)
from storage.repositories import TinyRepository

from taskx import (
    ConfigurationError,
    DuplicateTask,
    Hook,
    InvalidTransition,
    MemoryRepository,
    PayloadError,
    Queue,
    SQLiteRepository,
    TaskFailed,
    TaskNotFound,
    TaskStatus,
    answer,
    chain,
)
from taskx.tasks import lifecycle
from taskx.testing import ManualClock, ManualQueue

PENDING, CANCELLED = TaskStatus.PENDING, TaskStatus.CANCELLED
LONG = timedelta(days=3)


@pytest.fixture
def asking(make_queue):
    """A queue with one worker, which runs tasks that ask."""
    queue = make_queue(worker_num=1)

    @queue.executor("ask")
    def ask(ctx, names: list[str], timeout: float | None = None):
        return [ctx.ask(name, {"about": name}, timeout=timeout) for name in names]

    @queue.executor("wait")
    def wait(ctx, id: str, timeout: float | None = None):
        return ctx.wait(id, timeout=timeout)

    queue.executor("fine")(lambda: "fine")
    return queue


def waits(queue, task_id):
    """Wait until a task waits without a thread, and return its record."""
    runs = pool_of(queue).runs
    eventually(lambda: lifecycle.is_parked(queue.get_task_status(task_id)) and not runs)
    return queue.get_task_status(task_id)


def statuses(queue, *ids):
    return queue.repository.statuses(ids)


class TestAsking:
    @pytest.mark.every_store
    def test_a_task_goes_on_with_the_answer(self, asking):
        asking.start()
        handle = asking.submit("ask", {"names": ["one", "two"]})
        for name in ("one", "two"):
            answer_id = f"{handle.id}/{name}"
            eventually(lambda it=answer_id: statuses(asking, it) == {it: "pending"})
            [asked] = asking.list_tasks(type="answer", status="pending").tasks
            assert (asked.id, asked.params) == (answer_id, {"question": {"about": name}})
            assert asking.finish(answer_id, name.upper(), by="eva")
        assert handle.result(PATIENCE) == ["ONE", "TWO"]
        given = asking.get_task_status(f"{handle.id}/two")
        assert (given.status, given.result, given.worker) == ("completed", "TWO", "eva")
        assert [(change.by, change.action) for change in asking.changes()] == [
            ("eva", "finish")
        ] * 2

    @pytest.mark.every_store
    def test_an_answer_may_come_before_anybody_asks(self, asking):
        handle = asking.submit("ask", {"names": ["one"]})
        assert asking.finish(f"{handle.id}/one", "early")
        assert not asking.finish(f"{handle.id}/one", "late")
        asking.start()
        assert handle.result(PATIENCE) == ["early"]
        assert handle.task().starts == 1

    @pytest.mark.every_store
    def test_an_early_answer_to_a_task_that_waits_for_another_is_warned_of(self, asking, caplog):
        asking.start()
        handle = asking.submit("ask", {"names": ["one", "two"]}, id="r1")
        waits(asking, "r1")
        assert asking.finish("r1/two", 2)
        assert (
            "nobody has asked for r1/two yet; it is stored, but task r1 waits for r1/one"
            in caplog.text
        )
        caplog.clear()
        assert asking.finish("r1/one", 1)
        assert handle.result(PATIENCE) == [1, 2]
        assert "nobody has asked" not in caplog.text

    @pytest.mark.every_store
    def test_only_the_first_answer_counts(self, asking):
        asking.start()
        handle = asking.submit("ask", {"names": ["one"]})
        waits(asking, handle.id)
        calls = [partial(asking.finish, f"{handle.id}/one", n) for n in range(5)]
        given = [result() for result in [*map(run_in_thread, calls)]]
        [first] = [n for n, held in enumerate(given) if held]
        assert handle.result(PATIENCE) == [first]

    def test_a_waiting_task_holds_no_thread(self, asking):
        asking.start()
        waiting = [asking.submit("ask", {"names": ["one"]}) for _ in range(20)]
        for handle in waiting:
            waits(asking, handle.id)
        assert asking.submit("fine").result(PATIENCE) == "fine"  # with one worker
        assert asking.running == 0
        assert asking.drain(PATIENCE)  # it does not wait for answers

    def test_an_error_as_the_answer_is_raised_and_stored(self, asking):
        asking.start()
        handle = asking.submit("ask", {"names": ["one"]}, max_attempts=2)
        waits(asking, handle.id)
        assert asking.finish(f"{handle.id}/one", error="refused by Eva")
        with pytest.raises(TaskFailed, match="refused by Eva"):
            handle.result(PATIENCE)
        assert handle.task().errors == 2  # both attempts got it
        assert handle.task().error.startswith("TaskFailed")

    def test_a_cancelled_answer_is_told_to_the_task(self, asking):
        asking.start()
        handle = asking.submit("ask", {"names": ["one"]})
        waits(asking, handle.id)
        assert asking.cancel_task(f"{handle.id}/one")
        with pytest.raises(TaskFailed, match="CancelledError"):
            handle.result(PATIENCE)
        with pytest.raises(InvalidTransition, match="requeue that task, with from_step"):
            asking.requeue(f"{handle.id}/one")

    def test_an_answer_is_a_future_as_any_task(self, asking):
        asking.start()
        handle = asking.submit("ask", {"names": ["one"]})
        waits(asking, handle.id)
        future = asking.handle(f"{handle.id}/one")
        assert not future.done()
        asking.finish(future.id, 7)
        assert future.result(PATIENCE) == 7

    def test_tags_and_created_by_are_on_the_answer(self, make_queue):
        queue = make_queue()

        @queue.executor("ask")
        def ask(ctx):
            ctx.ask("one", tags=["finance"])

        queue.start()
        handle = queue.submit("ask", created_by="ann")
        waits(queue, handle.id)
        [asked] = queue.list_tasks(type="answer", tag="finance").tasks
        assert asked.created_by == "ann"

    def test_code_before_the_wait_runs_again_and_steps_do_not(self, make_queue):
        queue, called = make_queue(), []

        @queue.executor("ask")
        def ask(ctx):
            called.append("code")
            ctx.step("step", called.append, "step")
            return ctx.ask("one")

        queue.start()
        handle = queue.submit("ask")
        waits(queue, handle.id)
        queue.finish(f"{handle.id}/one", 1)
        assert handle.result(PATIENCE) == 1
        assert called == ["code", "step", "code"]


class TestTimeouts:
    """The clock of these tests is moved by hand."""

    def ask(self, queue, **options):
        @queue.executor("ask", **options)
        def ask(ctx, fails: bool = False):
            try:
                return ctx.ask("one", timeout=LONG)
            except TimeoutError as error:
                if fails and ctx.task.errors == 0:
                    raise ValueError("after it") from error
                return "nobody"

    @pytest.mark.every_store
    def test_nobody_answers_in_time(self, repository):
        clock = ManualClock()
        repository.clock = clock
        queue = ManualQueue(repository, clock=clock)
        self.ask(queue, max_attempts=2)
        handle = queue.submit("ask", {"fails": True})
        queue.advance(LONG - timedelta(seconds=1))
        assert handle.task().status is PENDING
        queue.advance(2)
        assert handle.result() == "nobody"  # the second attempt got the same, without a question
        expired = queue.get_task_status(f"{handle.id}/one")
        assert expired.status is CANCELLED
        assert "before an answer" in expired.error
        assert not queue.finish(expired.id, "late")

    def test_an_answer_after_its_time_is_refused_though_no_worker_has_looked_since(self):
        clock = ManualClock()
        queue = ManualQueue(clock=clock)
        queue.executor("ask")(lambda ctx: ctx.ask("one", timeout=LONG))
        handle = queue.submit("ask")
        queue.run_all()
        clock.advance(LONG)
        assert not queue.finish(f"{handle.id}/one", "late")
        assert queue.get_task_status(f"{handle.id}/one").status is CANCELLED
        queue.run_all()
        assert "TimeoutError: no answer to" in handle.task().error

    def test_the_time_counts_from_the_first_ask_whatever_crashes_follow(self):
        queue = ManualQueue()
        self.ask(queue)
        handle = queue.submit("ask")
        queue.run_all()
        before = queue.get_task_status(f"{handle.id}/one").expires_at
        queue.advance(timedelta(days=1))
        # Its process dies between the question and the park: the task runs again, and asks again.
        task = handle.task()
        queue.repository.apply([lifecycle.wake(task, queue.clock.now_ms())])
        queue.run_all()
        assert queue.get_task_status(f"{handle.id}/one").expires_at == before
        queue.advance(timedelta(days=2, seconds=1))
        assert handle.result() == "nobody"

    def test_the_time_out_of_an_event_is_that_of_the_waiter(self):
        queue = ManualQueue()

        @queue.executor("wait")
        def wait(ctx, days: int):
            try:
                return ctx.wait("event/x", timeout=timedelta(days=days))
            except TimeoutError:
                return f"not within {days} days"

        short, long = queue.submit("wait", {"days": 1}), queue.submit("wait", {"days": 3})
        queue.advance(timedelta(days=2))
        assert (short.result(), long.done()) == ("not within 1 days", False)
        queue.finish("event/x", "there")
        queue.run_all()
        assert long.result() == "there"

    def test_a_time_out_of_the_attempt_counts_the_execution_only(self):
        queue = ManualQueue()

        @queue.executor("ask", timeout=10)
        def ask(ctx):
            ctx.sleep(6)
            ctx.ask("one")
            ctx.sleep(3)

        handle = queue.submit("ask")
        queue.advance(LONG)
        queue.finish(f"{handle.id}/one")
        queue.advance(10)
        assert handle.task().status == "completed"
        assert handle.task().duration == 15  # of both runs


class TestNoAttemptAndNoStart:
    """A park ends no attempt, and nothing counts it."""

    def test_records_counts_and_hooks(self, make_queue):
        told = []

        class Listener(Hook):
            def submitted(self, task):
                told.append("submitted")

            def started(self, task):
                told.append("started")

            def finished(self, task):
                told.append(f"finished {task.type}")

        queue = make_queue(hooks=[Listener()])
        queue.executor("ask")(lambda ctx: [ctx.ask("one"), ctx.ask("two")])
        queue.start()
        handle = queue.submit("ask")
        for name in ("one", "two"):
            eventually(lambda it=name: statuses(queue, f"{handle.id}/{it}"))
            task = waits(queue, handle.id)
            assert task.earlier_attempts == []
            assert [attempt.outcome for attempt in task.attempts] == [""]
            queue.finish(f"{handle.id}/{name}", 1)
        handle.result(PATIENCE)
        assert queue.drain(PATIENCE)
        task = handle.task()
        assert (task.starts, task.attempt, len(task.attempts)) == (3, 1, 1)
        assert (task.errors, task.crashes, task.interruptions, task.snoozes) == (0, 0, 0, 0)
        assert told == ["submitted", "started", *["finished answer"] * 2, "finished ask"]
        [stats] = eventually(lambda: [of for of in queue.stats().types.values() if of.completed])
        assert (stats.completed, stats.start_latency is not None) == (1, True)

    def test_a_resume_takes_no_token_of_a_rate_and_a_slot(self):
        queue = ManualQueue()

        @queue.executor("ask", rate="1/h", max_concurrency=1)
        def ask(ctx):
            return ctx.ask("one")

        first, second = queue.submit("ask"), queue.submit("ask")
        queue.run_all()
        assert lifecycle.is_parked(first.task())
        assert second.task().starts == 0  # there is no token for an hour
        queue.finish(f"{first.id}/one", 1)
        assert "token" in {reason.kind for reason in queue.why(second.id)}
        assert "token" not in {reason.kind for reason in queue.why(first.id)}
        assert [task.id for task in queue.run_all()] == [first.id]
        queue.advance(3601)
        assert lifecycle.is_parked(second.task())

    @pytest.mark.every_store
    def test_a_waiting_task_keeps_the_turn_of_its_key(self, asking):
        asking.start()
        first, second = (
            asking.submit("ask", {"names": ["one"]}, concurrency_key="k") for _ in range(2)
        )
        waits(asking, first.id)
        assert asking.drain(PATIENCE)
        assert second.task().starts == 0
        [reason] = [r for r in asking.why(second.id) if r.kind == "turn"]
        assert f"keeps it while it waits for {first.id}/one" in str(reason)
        asking.cancel_task(first.id)  # it passes the turn on
        waits(asking, second.id)
        asking.finish(f"{second.id}/one", 2)
        assert second.result(PATIENCE) == [2]

    def test_a_late_resume_does_not_look_like_a_task_that_nobody_runs(self):
        queue = ManualQueue()
        queue.executor("ask")(lambda ctx: ctx.ask("one"))
        handle = queue.submit("ask")
        queue.advance(LONG)
        queue.finish(f"{handle.id}/one", 1)
        assert queue.health(nodes=0)  # it could have started a moment ago

    def test_progress_and_log_stay(self, make_queue):
        queue = make_queue()

        @queue.executor("ask", capture_log=True)
        def ask(ctx):
            ctx.progress(40, "asked")
            ctx.logger.info("before")
            ctx.ask("one")
            ctx.logger.info("after")

        queue.start()
        handle = queue.submit("ask")
        task = waits(queue, handle.id)
        assert (task.progress, task.message) == (40, "asked")
        queue.finish(f"{handle.id}/one")
        handle.result(PATIENCE)
        assert handle.task().log.count("before") == 2
        assert "after" in handle.task().log

    def test_a_park_is_no_crash_and_a_crash_after_it_is_one(self, asking):
        asking.start()
        handle = asking.submit("ask", {"names": ["one"]}, max_crashes=2)
        task = waits(asking, handle.id)
        asking.stop()
        now = asking.clock.now_ms()
        woken = lifecycle.wake(task, now)
        asking.repository.apply([woken])
        start = lifecycle.start(asking.get_task_status(handle.id), now, "dead")
        asking.repository.apply([start])
        running = asking.get_task_status(handle.id)
        writes = lifecycle.rescue([running], now, stopping=False)[0]
        asking.repository.apply(writes)
        task = asking.get_task_status(handle.id)
        assert (task.crashes, [one.outcome for one in task.attempts]) == (1, ["crashed"])
        assert not lifecycle.is_parked(task)  # the next run begins an attempt


class TestSwallowed:
    @pytest.mark.parametrize("then", ["return", "raise", "ask"])
    def test_an_executor_that_catches_the_exception_waits_all_the_same(
        self, make_queue, caplog, then
    ):
        queue, ends = make_queue(), []

        @queue.executor("ask", max_attempts=1)
        def ask(ctx):
            try:
                got = ctx.ask("one")
            except BaseException:  # noqa: BLE001
                if then == "raise":
                    raise ValueError("something else") from None
                if then == "ask":
                    ctx.ask("two")
                return "wrong"
            ends.append(got)
            return got

        queue.start()
        handle = queue.submit("ask")
        waits(queue, handle.id)
        assert statuses(queue, f"{handle.id}/two") == {}
        queue.finish(f"{handle.id}/one", "right")
        assert handle.result(PATIENCE) == "right"
        assert ("so what followed is ignored: ValueError" in caplog.text) is (then == "raise")

    def test_middleware_may_catch_it_too(self, make_queue):
        def layer(ctx, task, call_next):
            try:
                return call_next()
            except BaseException:  # noqa: BLE001
                return "wrong"

        queue = make_queue(middleware=[layer])
        queue.executor("ask")(lambda ctx: ctx.ask("one"))
        queue.start()
        handle = queue.submit("ask")
        waits(queue, handle.id)
        queue.finish(f"{handle.id}/one", "right")
        assert handle.result(PATIENCE) == "right"

    def test_a_thread_of_the_executor_may_ask(self, make_queue):
        queue = make_queue()

        @queue.executor("ask")
        def ask(ctx):
            got = []

            def inner():
                try:
                    got.append(ctx.ask("one"))
                except BaseException as error:  # noqa: BLE001
                    got.append(error)

            thread = threading.Thread(target=inner)
            thread.start()
            thread.join(PATIENCE)
            return got

        queue.start()
        handle = queue.submit("ask")
        waits(queue, handle.id)
        queue.finish(f"{handle.id}/one", "right")
        assert handle.result(PATIENCE) == ["right"]


class TestEnds:
    """What becomes of an open answer when the task that waits for it ends."""

    @pytest.mark.every_store
    def test_a_cancelled_task_cancels_its_open_answer(self, asking):
        asking.start()
        handle = asking.submit("ask", {"names": ["one"]})
        waits(asking, handle.id)
        assert asking.cancel_task(handle.id)  # at once, as it holds no thread
        eventually(lambda: asking.get_task_status(f"{handle.id}/one").status is CANCELLED)
        assert not asking.finish(f"{handle.id}/one", 1)

    @pytest.mark.every_store
    def test_a_deleted_task_leaves_no_open_answer(self, asking):
        asking.start()
        handle = asking.submit("ask", {"names": ["one"]})
        waits(asking, handle.id)
        asking.delete(handle.id)
        eventually(lambda: asking.get_task_status(f"{handle.id}/one").status is CANCELLED)

    def test_a_task_that_fails_for_good_cancels_its_open_answer(self, make_queue):
        clock = ManualClock()
        queue = ManualQueue(clock=clock)

        @queue.executor("ask", timeout=10, max_attempts=1)
        def ask(ctx):
            try:
                ctx.ask("one")
            finally:
                clock.advance(11)

        handle = queue.submit("ask")
        queue.run_all()
        assert handle.task().error == "timed out after 10 s"
        queue.run_all()
        assert queue.get_task_status(f"{handle.id}/one").status is CANCELLED

    def test_another_task_may_wait_for_the_same_answer(self, asking):
        asking.start()
        asker = asking.submit("ask", {"names": ["one"]})
        waits(asking, asker.id)
        other = asking.submit("wait", {"id": f"{asker.id}/one"})
        waits(asking, other.id)
        asking.cancel_task(asker.id)
        assert asking.drain(PATIENCE)
        assert asking.finish(f"{asker.id}/one", "for the other")  # it is open, as one task waits
        assert other.result(PATIENCE) == "for the other"

    def test_a_requeued_task_asks_again(self, asking):
        asking.start()
        handle = asking.submit("ask", {"names": ["one"], "timeout": 3600})
        waits(asking, handle.id)
        asking.cancel_task(handle.id)
        eventually(lambda: asking.get_task_status(f"{handle.id}/one").status is CANCELLED)
        asking.requeue(handle.id)
        waits(asking, handle.id)
        again = asking.get_task_status(f"{handle.id}/one")
        assert (again.status, again.error) == (PENDING, "")
        assert again.expires_at is not None
        asking.finish(again.id, "now")
        assert asking.handle(handle.id).result(PATIENCE) == ["now"]

    def test_a_requeue_from_the_answer_asks_again(self, make_queue):
        queue = make_queue()

        @queue.executor("ask")
        def ask(ctx):
            ctx.step("draft", int)
            got = ctx.ask("one")
            ctx.step("pay", int)
            if got == "no":
                raise ValueError
            return got

        queue.start()
        handle = queue.submit("ask")
        waits(queue, handle.id)
        queue.finish(f"{handle.id}/one", "no")
        with pytest.raises(TaskFailed):
            handle.result(PATIENCE)
        assert [*handle.task().checkpoints["steps"]] == ["draft", "one", "pay"]
        queue.requeue(handle.id, from_step="one")
        waits(queue, handle.id)
        assert [*handle.task().checkpoints["steps"]] == ["draft"]
        queue.finish(f"{handle.id}/one", "yes")
        assert queue.handle(handle.id).result(PATIENCE) == "yes"

    @pytest.mark.every_store
    @pytest.mark.parametrize("soon", [False, True])
    def test_a_requeued_task_asks_about_what_it_has_now(self, repository, soon):
        """Not about what it had before the cancel, of which its answer tells, which may be open yet."""
        clock = ManualClock()
        repository.clock = clock
        queue = ManualQueue(repository, clock=clock)

        @queue.executor("refund")
        def refund(ctx, order: int):
            letter = ctx.step("draft", str, order)
            return letter, ctx.ask("one", letter, timeout=order, tags=[f"order-{order}"])

        handle = queue.submit("refund", {"order": 7})
        queue.run_all()
        queue.cancel_task(handle.id)
        if not soon:
            queue.run_all()
        queue.requeue(handle.id, params={"order": 8}, from_step="draft")
        queue.run_all()
        asked = queue.get_task_status(f"{handle.id}/one")
        assert (asked.status, asked.params, asked.tags) == (
            PENDING,
            {"question": "8"},
            ("order-8",),
        )
        assert asked.expires_at == clock.now() + timedelta(seconds=8)
        queue.finish(asked.id, "yes")
        queue.run_all()
        assert queue.get_task_status(handle.id).result == ["8", "yes"]

    def test_a_requeue_from_a_step_forgets_the_answers_that_the_task_has_not_seen(self):
        queue = ManualQueue()

        @queue.executor("child")
        def child(ctx):
            return ctx.ask("two")

        @queue.executor("ask")
        def ask(ctx):
            ctx.fork("children", [child.task()])
            ctx.step("draft", int)
            return ctx.ask("one")

        handle = queue.submit("ask")
        queue.run_all()
        one, of_child = f"{handle.id}/one", f"{handle.id}/children/0/two"
        queue.finish(one, "to the first draft")
        queue.finish(of_child, "of the child")
        queue.cancel_task(handle.id)
        queue.requeue(handle.id, from_step="draft")
        queue.run_all()
        assert queue.get_task_status(one).status is PENDING
        assert queue.get_task_status(of_child).result == "of the child"

    def test_a_requeue_that_is_refused_removes_no_answer(self, make_queue):
        queue = make_queue()

        @queue.executor("ask")
        def ask(ctx):
            if ctx.ask("one") == "no":
                raise ValueError

        queue.start()
        handle = queue.submit("ask", unique_key="order 7")
        waits(queue, handle.id)
        queue.finish(f"{handle.id}/one", "no")
        with pytest.raises(TaskFailed):
            handle.result(PATIENCE)
        queue.submit("ask", unique_key="order 7")
        with pytest.raises(DuplicateTask):
            queue.requeue(handle.id, from_step="one")
        assert queue.get_task_status(f"{handle.id}/one").result == "no"

    @frequent_checks
    def test_what_a_dead_process_left_undone_is_found(self, asking, repository):
        """Its moves were committed, and nobody heard of them."""
        asking.start()
        handle = asking.submit("ask", {"names": ["one"]})
        waits(asking, handle.id)
        answered = asking.get_task_status(f"{handle.id}/one")
        [done] = repository.apply([lifecycle.finish(answered, 1, '"heard"', "", "")])
        assert done
        assert handle.result(PATIENCE) == ["heard"]
        other = asking.submit("ask", {"names": ["one"]})
        task = waits(asking, other.id)
        repository.apply(lifecycle.cancel(task.id, 1))
        eventually(lambda: asking.get_task_status(f"{other.id}/one").status is CANCELLED)


class TestEvents:
    @pytest.mark.every_store
    def test_all_waiters_of_an_event_go_on(self, asking):
        asking.start()
        waiters = [asking.submit("wait", {"id": "event/shipped:42"}) for _ in range(3)]
        for handle in waiters:
            waits(asking, handle.id)
        assert asking.finish("event/shipped:42", {"by": "ship"})
        assert [handle.result(PATIENCE) for handle in waiters] == [{"by": "ship"}] * 3
        late = asking.submit("wait", {"id": "event/shipped:42"})
        assert late.result(PATIENCE) == {"by": "ship"}

    @pytest.mark.every_store
    def test_an_event_that_nobody_waits_for_any_more_leaves_no_open_answer(self, asking):
        asking.start()
        first, second = (asking.submit("wait", {"id": "event/x"}) for _ in range(2))
        for handle in (first, second):
            waits(asking, handle.id)
        asking.cancel_task(first.id)
        assert asking.drain(PATIENCE)
        assert statuses(asking, "event/x") == {"event/x": "pending"}
        asking.cancel_task(second.id)
        eventually(lambda: statuses(asking, "event/x") == {})
        assert asking.finish("event/x", "later")  # it is not lost

    def test_a_task_may_wait_for_any_other_task(self, asking):
        asking.declare("remote")
        asking.start()
        remote = asking.submit("remote")
        handle = asking.submit("wait", {"id": remote.id})
        waits(asking, handle.id)
        [reason, *_] = asking.why(handle.id)
        assert reason.kind == "waiting"
        assert f"the end of task {remote.id} (remote, pending)" in str(reason)
        asking.cancel_task(remote.id)
        with pytest.raises(TaskFailed, match=f"CancelledError: task {remote.id} was cancelled"):
            handle.result(PATIENCE)
        done = asking.submit("fine")
        assert asking.submit("wait", {"id": done.id}).result(PATIENCE) == "fine"
        with pytest.raises(TaskFailed, match="TaskNotFound"):
            asking.submit("wait", {"id": "nothing"}).result(PATIENCE)


class TestRefused:
    def run(self, make_queue, ask, **options):
        queue = make_queue()
        queue.executor("ask", **options)(ask)
        queue.start()
        with pytest.raises(TaskFailed) as failed:
            queue.submit("ask", id="task").result(PATIENCE)
        assert statuses(queue, "task/one") == {}
        return failed.value.error

    def test_inside_ctx_timeout(self, make_queue):
        def ask(ctx):
            with ctx.timeout(5):
                ctx.ask("one")

        assert "cannot be used inside ctx.timeout()" in self.run(make_queue, ask)

    def test_inside_ctx_transaction(self, tmp_path):
        path = tmp_path / "app.db"
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("CREATE TABLE rows (n)")
        with closing(Queue(SQLiteRepository(path, prefix="taskx_"))) as queue:

            @queue.executor("ask")
            def ask(ctx):
                with ctx.transaction():
                    ctx.ask("one")

            queue.start()
            with pytest.raises(TaskFailed, match=r"used inside ctx\.transaction"):
                queue.submit("ask").result(PATIENCE)

    def test_the_same_name_twice(self, make_queue):
        queue = make_queue()
        queue.executor("ask")(lambda ctx: [ctx.ask("one"), ctx.ask("one")])
        queue.start()
        handle = queue.submit("ask")
        queue.finish(f"{handle.id}/one", 1)
        with pytest.raises(TaskFailed, match="was already called in this attempt"):
            handle.result(PATIENCE)

    def test_a_repository_of_eight_methods(self, make_queue):
        queue = make_queue(TinyRepository())
        queue.executor("ask")(lambda ctx: ctx.ask("one"))
        queue.start()
        with pytest.raises(TaskFailed, match="has only the eight methods"):
            queue.submit("ask").result(PATIENCE)
        with pytest.raises(ConfigurationError, match="has only the eight methods"):
            queue.finish("event/x", 1)
        with pytest.raises(ConfigurationError, match="has only the eight methods"):
            queue.submit(answer("budget"))

    @pytest.mark.parametrize(
        ("name", "problem"), [("", "requires a name"), ("n" * 255, "choose a shorter name")]
    )
    def test_a_name_that_cannot_be_an_id(self, make_queue, name, problem):
        assert problem in self.run(make_queue, lambda ctx: ctx.ask(name))

    def test_a_question_that_is_not_json(self, make_queue):
        assert "question" in self.run(make_queue, lambda ctx: ctx.ask("one", object()))

    def test_itself(self, make_queue):
        assert "wait for itself" in self.run(make_queue, lambda ctx: ctx.wait("task"))

    def test_an_executor_of_the_type_of_answers(self, queue):
        with pytest.raises(ConfigurationError, match="that of answers"):
            queue.executor("answer")(lambda: None)
        with pytest.raises(ConfigurationError, match="that of answers"):
            queue.declare("answer")


class TestFinish:
    def test_a_task_that_is_no_answer(self, asking):
        handle = asking.submit("fine")
        with pytest.raises(InvalidTransition, match="is no answer, but a task of type 'fine'"):
            asking.finish(handle.id, 1)

    @pytest.mark.parametrize("answer_id", ["nobody/one", "one", "event", "/one"])
    def test_an_id_that_nobody_can_ask_for(self, asking, answer_id):
        with pytest.raises(TaskNotFound):
            asking.finish(answer_id, 1)
        assert statuses(asking, answer_id) == {}

    def test_a_task_that_has_ended_asks_no_more(self, asking):
        handle = asking.submit("fine")
        asking.cancel_task(handle.id)
        with pytest.raises(InvalidTransition, match=f"task {handle.id} is cancelled"):
            asking.finish(f"{handle.id}/one", 1)

    def test_names_and_ids_with_slashes(self, asking):
        handle = asking.submit("ask", {"names": ["a/b"]}, id="map/7")
        assert asking.finish("map/7/a/b", "there")
        asking.start()
        assert handle.result(PATIENCE) == ["there"]

    def test_a_result_that_is_not_json(self, asking):
        handle = asking.submit("ask", {"names": ["one"]})
        with pytest.raises(PayloadError):
            asking.finish(f"{handle.id}/one", object())
        with pytest.raises(ConfigurationError, match="a result or an error"):
            asking.finish(f"{handle.id}/one", 1, error="both")

    def test_another_process_finishes(self, asking, make_queue):
        """Its queue is not started, and knows nothing about types."""
        asking.start()
        handle = asking.submit("ask", {"names": ["one"]})
        waits(asking, handle.id)
        assert make_queue().finish(f"{handle.id}/one", 1)
        assert handle.result(PATIENCE) == [1]


class TestDeclared:
    def chained(self, queue, **options):
        done = []

        @queue.executor("draft")
        def draft(fails: bool = False):
            done.append("draft")
            if fails:
                raise ValueError

        @queue.executor("publish")
        def publish(ctx):
            done.append([parent.result for parent in ctx.parents])
            return "published"

        flow = chain(draft, answer("legal", "May we?", **options), publish)
        return queue.submit_flow(flow), done

    @pytest.mark.every_store
    def test_a_person_inside_a_flow(self, make_queue):
        queue = make_queue()
        flow, done = self.chained(queue)
        _, legal, _ = flow.ids
        with pytest.raises(InvalidTransition, match="cannot be given yet"):
            queue.finish(legal, "too early")
        queue.start()
        eventually(lambda: queue.get_task_status(flow.ids[0]).status == "completed")
        assert queue.drain(PATIENCE)
        asked = queue.get_task_status(legal)
        assert (asked.type, asked.params) == ("answer", {"name": "legal", "question": "May we?"})
        assert queue.finish(legal, "yes")
        assert flow.result(PATIENCE) == "published"
        assert done == ["draft", ["yes"]]

    def test_it_ends_with_the_step_before_it(self, make_queue):
        queue = make_queue()
        queue.declare("draft")
        flow = queue.submit_flow(chain(*(answer(name) for name in ("first", "second"))))
        first, second = flow.ids
        queue.finish(first, error="no")
        assert statuses(queue, second) == {second: "cancelled"}
        assert flow.requeue() == 2
        assert queue.finish(first, "yes")
        assert queue.finish(second, "yes, too")
        assert flow.result(PATIENCE) == "yes, too"

    def test_a_requeue_asks_for_it_again_whatever_its_id(self):
        queue = ManualQueue()
        queue.declare("draft")
        flow = queue.submit_flow(
            chain(answer("legal", timeout=60, id="orders/7/legal"), answer("ok"))
        )
        queue.advance(120)
        assert flow.status() is CANCELLED
        assert flow.requeue() == 2
        assert queue.finish("orders/7/legal", "yes")

    def test_its_time_counts_from_when_it_can_be_given(self):
        queue = ManualQueue()
        queue.declare("draft")
        flow, _ = self.chained(queue, timeout=LONG)
        queue.pause("draft")
        queue.advance(2 * LONG)
        queue.resume("draft")
        queue.run_all()
        queue.advance(LONG - timedelta(seconds=1))
        assert queue.get_task_status(flow.ids[1]).status is PENDING
        queue.advance(2)
        assert [queue.get_task_status(i).status for i in flow.ids[1:]] == [CANCELLED] * 2

    def test_alone(self, make_queue):
        queue = make_queue()
        handle = queue.submit(answer("budget", timeout=3600))
        assert handle.task().expires_at is not None
        assert queue.finish(handle.id, 90)
        assert handle.result(PATIENCE) == 90


class TestMany:
    def test_a_bulk_requeue_leaves_out_what_tasks_have_asked_for(self, asking):
        asking.start()
        handle = asking.submit("ask", {"names": ["one"]})
        waits(asking, handle.id)
        asking.finish(f"{handle.id}/one", error="no")
        eventually(lambda: handle.task().status == "failed")
        declared = asking.submit(answer("budget"))
        asking.finish(declared.id, error="no")
        done = asking.requeue_all(status="failed")
        assert (done.changed, done.skipped) == (2, {"answer": 1})
        assert asking.finish(declared.id, "yes")

    def test_a_bulk_cancel_takes_waiting_tasks_and_their_answers(self, asking):
        asking.start()
        handles = [asking.submit("ask", {"names": ["one"]}) for _ in range(3)]
        for handle in handles:
            waits(asking, handle.id)
        asking.cancel_all(type="ask")
        eventually(lambda: asking.count_tasks(status="pending") == 0)
        assert asking.count_tasks(type="answer", status="cancelled") == 3


class TestShown:
    def test_answers_are_counted_apart_from_work(self, asking):
        asking.start()
        handle = asking.submit("ask", {"names": ["one"]})
        waits(asking, handle.id)
        asking.submit(answer("budget"))
        stats = asking.stats()
        assert (stats.answers, [*stats.types]) == (2, ["ask", "fine", "wait"])
        assert stats.types["ask"].blocked == 1
        assert asking.health(failed=(0, 60), oldest_due=0)
        asking.finish(f"{handle.id}/one", error="no")
        assert asking.health(oldest_due=None)
        eventually(lambda: handle.task().status == "failed")
        assert asking.health(failed=(1, 60))
        assert [*eventually(lambda: asking.history().types)] == ["ask"]

    def test_a_stop_does_not_count_them_as_left_pending(self, make_queue, caplog):
        queue = make_queue()
        queue.submit(answer("budget"))
        queue.start()
        queue.stop()
        assert "left pending" not in caplog.text

    def test_why(self, asking):
        asking.start()
        handle = asking.submit("ask", {"names": ["one"], "timeout": 3600})
        waits(asking, handle.id)
        [waiting] = asking.why(handle.id)
        assert waiting.kind == "waiting"
        assert f"It waits for the answer {handle.id}/one since " in str(waiting)
        assert ", until " in str(waiting)
        [asked] = asking.why(f"{handle.id}/one")
        assert asked.kind == "waiting"
        assert f"somebody to call queue.finish('{handle.id}/one', …)" in str(asked)

    def test_the_log_says_that_a_task_waits(self, asking, caplog):
        caplog.set_level(logging.DEBUG, "taskx")
        asking.start()
        handle = asking.submit("ask", {"names": ["one"]})
        words = f"task {handle.id} (ask) waits without a thread"
        eventually(lambda: words in caplog.text)  # it is logged when the run is over
        asking.finish(f"{handle.id}/one", 1)
        handle.result(PATIENCE)
        assert f"task {handle.id} (ask) goes on with attempt 1" in caplog.text


class TestKept:
    """Retention: an answer stays while a task may ask for it."""

    def test_an_early_answer_stays_while_its_task_is_unfinished(self):
        queue = ManualQueue()
        queue.executor("ask")(lambda ctx: ctx.ask("one"))
        handle = queue.submit("ask", delay=timedelta(days=30))
        queue.finish(f"{handle.id}/one", "early")
        queue.clock.advance(timedelta(days=29).total_seconds())
        assert queue.prune(queue.clock.now()) == 0
        queue.advance(timedelta(days=1))
        assert handle.result() == "early"
        queue.clock.advance(1)
        assert queue.prune(queue.clock.now()) == 2

    def test_an_event_stays_for_a_day(self):
        queue = ManualQueue()
        queue.finish("event/x", 1)
        queue.clock.advance(timedelta(hours=23).total_seconds())
        assert queue.prune(queue.clock.now()) == 0
        queue.clock.advance(timedelta(hours=2).total_seconds())
        assert queue.prune(queue.clock.now()) == 1


class TestOddMoments:
    def test_a_unique_key_is_not_replaced_in_the_middle_of_an_attempt(self, asking):
        from taskx import DuplicateTask

        asking.start()
        handle = asking.submit("ask", {"names": ["one"]}, unique_key="u")
        waits(asking, handle.id)
        with pytest.raises(DuplicateTask):
            asking.submit("ask", {"names": ["two"]}, unique_key="u", on_conflict="replace")

    def test_a_record_that_is_changed_by_hand_goes_on_waiting(self, asking, repository):
        asking.start()
        handle = asking.submit("ask", {"names": ["one"]})
        task = waits(asking, handle.id)
        task.priority, task.started_at = 7, None
        repository.update(task)
        task = waits(asking, handle.id)
        assert task.priority == 7
        asking.finish(f"{handle.id}/one", 1)
        assert handle.result(PATIENCE) == [1]

    @pytest.fixture
    def held(self, make_queue, gate):
        """A queue and a task that has asked, and whose executor then waits at the gate."""
        queue = make_queue()

        @queue.executor("ask")
        def ask(ctx):
            try:
                ctx.ask("one")
            finally:
                gate()

        queue.start()
        handle = queue.submit("ask")
        gate.wait_for()
        return queue, handle

    def test_a_stop_while_a_task_asks_is_no_interruption(self, held, gate):
        queue, handle = held
        pool_of(queue).runs[handle.id].token.fire(lifecycle.CancelReason.STOP)
        gate.open()
        assert waits(queue, handle.id).interruptions == 0

    def test_a_cancel_while_a_task_asks(self, held, gate):
        queue, handle = held
        assert not queue.cancel_task(handle.id)
        gate.open()
        with pytest.raises(CancelledError):
            handle.result(PATIENCE)
        eventually(lambda: queue.get_task_status(f"{handle.id}/one").status is CANCELLED)

    def test_a_resume_that_no_thread_executes_stays_a_resume(self, asking):
        asking.start()
        handle = asking.submit("ask", {"names": ["one"]})
        task = waits(asking, handle.id)
        asking.pause("ask")
        asking.finish(f"{handle.id}/one", 1)
        assert asking.drain(PATIENCE)
        pool = pool_of(asking)
        task = asking.get_task_status(handle.id)
        asking.stop()
        start = lifecycle.start(task, 1, "node")
        asking.repository.apply([start])
        running = asking.get_task_status(handle.id)
        asking.repository.apply(lifecycle.hand_back(running, 1, resumed=True))
        assert lifecycle.is_parked(asking.get_task_status(handle.id))
        assert not pool.runs

    def test_a_name_that_somebody_else_uses(self, make_queue):
        queue = make_queue()
        queue.executor("ask")(lambda ctx: ctx.ask("one"))
        queue.executor("fine")(lambda: None)
        queue.submit("fine", id="task/one")
        queue.submit("ask", id="task")
        queue.start()
        with pytest.raises(TaskFailed, match="is no answer"):
            queue.handle("task").result(PATIENCE)


def test_a_task_that_never_waits_is_not_asked_whether_it_does(make_queue):
    """Nobody reads who waits for whom, as long as no task waits."""
    queue = make_queue()
    queue.executor("fine")(lambda: None)
    queue.start()
    queue.submit("fine").result(PATIENCE)
    assert not parts_of(queue).moves.dependents.any
    assert housekeeper_of(queue) is not None


def test_the_queue_of_a_memory_repository_has_the_same_rules():
    queue = Queue(MemoryRepository())
    assert queue.finish("event/a", 1)
    assert not queue.finish("event/a", 2)
    queue.close()
