"""Durable sleep: a task sleeps without a thread, and its moment survives crashes and restarts."""

from __future__ import annotations

import time
from datetime import datetime, timedelta, timezone

import pytest
from helpers import PATIENCE, eventually, nested, pool_of

from taskx import ConfigurationError, Retry, TaskFailed, TaskNotFound
from taskx.tasks import lifecycle
from taskx.tasks.findings import moment
from taskx.tasks.payload import MAX_DEPTH
from taskx.testing import ManualClock, ManualQueue

DAY = timedelta(days=1)


@pytest.fixture
def manual():
    queue = ManualQueue()

    @queue.executor("trial")
    def trial(ctx, days: int = 14):
        ctx.step("welcome", str, "welcome")
        ctx.sleep(timedelta(days=days), step="grace")
        return ctx.step("mail", str, "mail")

    return queue


@pytest.mark.every_store
def test_a_task_sleeps_for_days(repository):
    clock = ManualClock()
    repository.clock = clock
    queue = ManualQueue(repository, clock=clock)
    queue.executor("trial")(lambda ctx: ctx.sleep(14 * DAY, step="grace"))
    handle = queue.submit("trial")
    queue.run_all()
    task = handle.task()
    assert lifecycle.is_parked(task)
    assert (task.run_at - task.created_at, task.starts) == (14 * DAY, 1)
    queue.advance(13 * DAY)
    assert handle.task().starts == 1
    queue.advance(DAY)
    assert handle.task().status == "completed"
    assert len(handle.task().attempts) == 1


def test_the_moment_counts_from_the_first_run(manual):
    handle = manual.submit("trial")
    manual.run_all()
    moment = handle.task().run_at
    for _ in range(3):  # it is started too early, as by a host whose clock is ahead
        manual.clock.advance(DAY.total_seconds())
        now = manual.clock.now_ms()
        manual.repository.apply(
            [lifecycle.wake(handle.task(), now, held=1)._replace(changes={"held": 0})]
        )
        manual.run_all()
        assert handle.task().run_at == moment
    manual.advance(11 * DAY)
    assert handle.result() == "mail"
    assert handle.task().starts == 5


def test_until_a_moment():
    queue = ManualQueue()
    berlin = timezone(timedelta(hours=1))
    moment = (queue.clock.now() + 3 * DAY).astimezone(berlin)
    queue.executor("wait")(lambda ctx: ctx.sleep(until=moment, step="monday"))
    handle = queue.submit("wait")
    queue.run_all()
    assert handle.task().run_at == moment
    queue.advance(3 * DAY)
    assert handle.task().status == "completed"


@pytest.mark.parametrize("seconds", [0, -5, timedelta(days=-1), 0.01])
def test_a_short_sleep_holds_the_thread(seconds):
    queue = ManualQueue()

    @queue.executor("nap")
    def nap(ctx):
        ctx.sleep(seconds, step="nap")
        ctx.sleep(until=datetime(2000, 1, 1, tzinfo=timezone.utc), step="past")
        return "awake"

    handle = queue.submit("nap")
    queue.run_all()
    assert handle.result() == "awake"
    assert handle.task().starts == 1
    assert handle.task().checkpoints == {"steps": {"nap": None, "past": None}}


def test_a_huge_sleep_ends_with_the_calendar():
    queue = ManualQueue()
    queue.executor("nap")(lambda ctx: ctx.sleep(1e300, step="nap"))
    handle = queue.submit("nap")
    queue.run_all()
    assert handle.task().run_at.year == 9999


def test_without_a_name_it_is_what_it_was():
    queue = ManualQueue()
    queue.executor("nap")(lambda ctx: ctx.sleep(100))
    handle = queue.submit("nap")
    [ran] = queue.run_all()
    assert (ran.status, ran.duration) == ("completed", 100)
    assert handle.task().checkpoints is None


def test_a_sleep_in_a_loop_needs_names():
    queue = ManualQueue()

    @queue.executor("nap")
    def nap(ctx, same: bool):
        for n in range(3):
            ctx.sleep(5, step="nap" if same else f"nap {n}")
        return "awake"

    handle, same = (queue.submit("nap", {"same": same}) for same in (False, True))
    queue.advance(30)
    assert handle.result() == "awake"
    assert "was already called in this attempt" in same.task().error


def test_wrong_arguments():
    queue = ManualQueue()
    moment, west = datetime.now(timezone.utc), timezone(timedelta(hours=-5))
    calls = [
        lambda ctx: ctx.sleep(),
        lambda ctx: ctx.sleep(1, until=moment, step="both"),
        lambda ctx: ctx.sleep(until=moment),
        lambda ctx: ctx.sleep(until=moment.replace(tzinfo=None), step="naive"),
        lambda ctx: ctx.sleep(until=datetime(9999, 12, 31, 23, tzinfo=west), step="year 10000"),
        lambda ctx: ctx.sleep("1", step="text"),
    ]
    for number, call in enumerate(calls):
        queue.executor(f"nap {number}")(call)
        handle = queue.submit(f"nap {number}")
        queue.run_all()
        with pytest.raises(TaskFailed, match=ConfigurationError.__name__):
            handle.result()


class TestWake:
    @pytest.mark.every_store
    def test_it_skips_the_rest(self, repository):
        clock = ManualClock()
        repository.clock = clock
        queue = ManualQueue(repository, clock=clock)

        @queue.executor("nap")
        def nap(ctx):
            ctx.sleep(DAY, step="one")
            ctx.sleep(DAY, step="two")
            return "awake"

        handle = queue.submit("nap")
        queue.run_all()
        assert queue.wake(handle.id)
        assert not queue.wake(handle.id)  # it may start
        queue.run_all()
        queue.advance(DAY)  # it sleeps the second time in full
        assert handle.result() == "awake"
        assert not queue.wake(handle.id)

    def test_a_task_with_a_result_as_deep_as_it_may_be(self):
        queue = ManualQueue()

        @queue.executor("nap")
        def nap(ctx):
            found = ctx.step("found", lambda: nested(MAX_DEPTH))
            ctx.sleep(DAY, step="nap")
            return found

        handle = queue.submit("nap")
        queue.run_all()
        assert queue.wake(handle.id)
        queue.run_all()
        assert handle.result() == nested(MAX_DEPTH)

    def test_it_ends_the_wait_of_a_retry_and_a_delay(self):
        queue = ManualQueue()
        queue.executor("fine")(lambda: "fine")
        handle = queue.submit("fine", delay=DAY.total_seconds())
        assert queue.wake(handle.id)
        assert queue.run_next().status == "completed"

    @pytest.mark.every_store
    def test_it_ends_the_delay_of_a_task_that_waits_for_another_one_first(self, repository):
        clock = ManualClock()
        repository.clock = clock
        queue = ManualQueue(repository, clock=clock)
        queue.executor("nap")(lambda ctx: ctx.sleep(DAY, step="nap"))
        queue.executor("fine")(lambda: "fine")
        first = queue.submit("nap", concurrency_key="k")
        second = queue.submit("fine", concurrency_key="k", delay=9 * DAY)
        child = queue.submit("fine", depends_on=[first], delay=9 * DAY)
        queue.run_all()
        for handle in (second, child):
            assert queue.wake(handle.id)
            assert not queue.wake(handle.id)  # it waits for its time no more
        queue.run_all()
        assert second.task().status == child.task().status == "pending"
        queue.advance(DAY)
        assert second.result() == child.result() == "fine"

    def test_tasks_that_wait_for_no_time(self, queue):
        queue.declare("remote")
        parent = queue.submit("remote")
        child = queue.submit("remote", depends_on=[parent])
        assert not queue.wake(parent.id)
        assert not queue.wake(child.id)
        with pytest.raises(TaskNotFound):
            queue.wake("nothing")

    def test_a_requeue_goes_on_sleeping(self, manual):
        handle = manual.submit("trial")
        manual.run_all()
        moment = handle.task().run_at
        manual.cancel_task(handle.id)
        manual.requeue(handle.id)
        manual.run_all()
        assert handle.task().run_at == moment
        manual.cancel_task(handle.id)
        manual.clock.advance(DAY.total_seconds())
        manual.requeue(handle.id, from_step="grace")  # from the beginning
        manual.run_all()
        assert handle.task().run_at == moment + DAY


class TestPoll:
    def test_it_looks_until_there_is_something(self):
        queue, looks, there = ManualQueue(), [], {}

        @queue.executor("poll")
        def poll(ctx):
            def look():
                looks.append(ctx.task.starts)
                return there.get("it")

            return ctx.poll("shipped", look, every=timedelta(minutes=1))

        handle = queue.submit("poll")
        queue.advance(timedelta(minutes=10))
        assert len(looks) == 11
        there["it"] = {"by": "ship"}
        queue.advance(60)
        assert handle.result() == {"by": "ship"}
        assert len(handle.task().attempts) == 1

    @pytest.mark.parametrize("every", [30, 0.5])
    def test_its_time_out_counts_from_the_first_look(self, every):
        queue, began = ManualQueue(), []

        @queue.executor("poll", max_attempts=3)
        def poll(ctx):
            began.append(queue.clock.now())
            try:
                ctx.poll("shipped", lambda: None, every=every, timeout=100)
            except TimeoutError:
                if ctx.task.errors == 0:
                    raise ValueError from None  # the next attempt gets the same
                return round((queue.clock.now() - began[0]).total_seconds(), 2)

        handle = queue.submit("poll")
        queue.advance(1000)
        assert handle.result() == 100

    def test_its_time_out_counts_from_the_first_look_also_if_that_fails(self):
        queue, looks = ManualQueue(), []

        @queue.executor("poll", max_attempts=2)
        def poll(ctx):
            def look():
                looks.append(queue.clock.monotonic())
                if len(looks) == 1:
                    raise Retry(50)

            try:
                ctx.poll("shipped", look, every=30, timeout=100)
            except TimeoutError:
                return round(queue.clock.monotonic() - looks[0])

        handle = queue.submit("poll")
        queue.advance(1000)
        assert handle.result() == 100

    def test_a_task_that_is_woken_looks_and_keeps_its_time_out(self):
        queue, looks = ManualQueue(), []

        @queue.executor("poll")
        def poll(ctx):
            look = lambda: looks.append(queue.clock.now())  # noqa: E731
            return ctx.poll(
                "shipped", look, every=timedelta(hours=1), timeout=timedelta(minutes=30)
            )

        handle = queue.submit("poll")
        queue.run_all()
        queue.advance(timedelta(minutes=5))
        assert queue.wake(handle.id)
        queue.run_all()
        assert (len(looks), handle.task().status) == (2, "pending")
        queue.advance(timedelta(minutes=26))
        assert (len(looks), handle.task().error_type) == (3, "TimeoutError")

    def test_a_crash_does_not_prolong_a_quick_poll(self):
        queue, runs = ManualQueue(), []

        @queue.executor("poll", max_attempts=2)
        def poll(ctx):
            runs.append(queue.clock.monotonic())
            if len(runs) == 1:
                queue.clock.call_later(50, lambda: ctx.token.fire(lifecycle.CancelReason.STOP))
            try:
                ctx.poll("shipped", lambda: None, every=0.5, timeout=100)
            except TimeoutError:
                return round(queue.clock.monotonic() - runs[0])

        handle = queue.submit("poll")
        queue.advance(1000)
        assert handle.result() == 100
        assert len(runs) == 2


def test_a_started_queue_wakes_in_time(make_queue):
    queue = make_queue(worker_num=1)

    @queue.executor("nap")
    def nap(ctx):
        ctx.sleep(2, step="nap")  # one of less than a second would hold the thread
        return time.time()

    queue.start()
    began = queue.clock.now_ms() / 1000
    handle = queue.submit("nap")
    assert handle.result(PATIENCE) >= began + 2
    assert handle.task().starts == 2


def test_a_sleep_holds_no_thread(make_queue, clock):
    queue = make_queue(worker_num=1, clock=clock)
    queue.executor("nap")(lambda ctx: ctx.sleep(60, step="nap"))
    queue.executor("fine")(lambda: "fine")
    queue.start()
    handle = queue.submit("nap")
    eventually(lambda: lifecycle.is_parked(handle.task()) and not pool_of(queue).runs)
    assert queue.submit("fine").result(PATIENCE) == "fine"  # with one worker
    clock.advance(60)
    handle.result(PATIENCE)
    assert handle.task().starts == 2


def test_a_sleep_keeps_the_turn_of_its_key(manual):
    first, second = (manual.submit("trial", concurrency_key="k") for _ in range(2))
    manual.advance(14 * DAY)
    assert (first.task().status, second.task().starts) == ("completed", 1)
    manual.advance(14 * DAY)
    assert second.result() == "mail"


class TestWhy:
    def test_it_says_since_when_until_when_and_in_which_step(self, manual):
        handle = manual.submit("trial")
        manual.run_all()
        (reason,) = [reason for reason in handle.why() if reason.kind == "due"]
        task = handle.task()
        assert (reason.facts["since"], reason.facts["until"]) == (task.started_at, task.run_at)
        assert reason.facts["step"] == "grace"
        assert str(reason) == (
            f"It sleeps in step 'grace' since {moment(task.started_at)}, until {moment(task.run_at)}, "
            "for another 14 days, without a thread."
        )

    def test_the_next_task_of_the_key_says_until_when_the_first_one_sleeps(self, manual):
        first = manual.submit("trial", concurrency_key="eva")
        manual.run_all()
        second = manual.submit("trial", concurrency_key="eva")
        manual.run_all()
        until = first.task().run_at
        (reason,) = [reason for reason in second.why() if reason.kind == "turn"]
        assert reason.facts["until"] == until
        assert str(reason).endswith(f"and keeps it while it sleeps until {moment(until)}.")


def test_many_tasks_wake_exactly_at_their_moments():
    """None of 1,000 tasks was late, either: this took 3 seconds."""
    queue, late = ManualQueue(), list[int]()
    now = queue.clock.now_ms

    @queue.executor("naps")
    def naps(ctx):
        for n in range(3):
            began = ctx.step(f"began {n}", now)
            ctx.sleep(5, step=f"sleep {n}")
            ctx.step(f"woke {n}", lambda began=began: late.append(now() - began - 5000))

    for _ in range(100):
        queue.submit("naps")
        queue.advance(0.037)
    queue.advance(15)
    assert late == [0] * 300
