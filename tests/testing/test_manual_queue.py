"""A manual queue: nothing runs until the test says so, and time is virtual."""

from __future__ import annotations

import asyncio
import logging
import threading
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures import as_completed, wait
from datetime import timedelta

import pytest
from helpers import run_in_thread
from strikes import every_strike

from taskx import (
    Config,
    ConfigurationError,
    DuplicateTask,
    Hook,
    PayloadError,
    QueueStopped,
    Retry,
    RetryPolicy,
    Snooze,
    SQLiteRepository,
    SystemClock,
    Task,
    TaskFailed,
    TaskStatus,
    UnknownTaskType,
    chain,
    every,
    group,
)
from taskx.testing import ManualClock, ManualQueue


@pytest.fixture
def queue():
    return ManualQueue()


@pytest.fixture
def ran(queue):
    """The numbers of the ``note`` tasks that have run, in order."""
    numbers = []
    queue.executor("note")(lambda n=0: numbers.append(n))
    return numbers


def statuses(queue):
    return [task.status.value for task in reversed(queue.list_tasks()[0])]


def test_nothing_runs_until_the_test_says_so(queue, ran):
    handles = [queue.submit("note", {"n": n}) for n in range(3)]
    assert (ran, statuses(queue)) == ([], ["pending"] * 3)
    assert queue.run_next().params == {"n": 0}
    assert (ran, statuses(queue)) == ([0], ["completed", "pending", "pending"])
    assert [task.params["n"] for task in queue.run_all()] == [1, 2]
    assert (ran, queue.run_next(), queue.run_all()) == ([0, 1, 2], None, [])
    assert [handle.result() for handle in handles] == [None] * 3


def test_no_thread_is_started(queue, ran, threads_begun):
    seen = []
    queue.executor("where", timeout=60)(lambda: seen.append(threading.current_thread()))
    queue.submit("where")
    queue.run_all()
    assert seen == [threading.current_thread()]
    assert threads_begun == []


def test_priority_and_order_are_those_of_a_started_queue(queue, ran):
    for n, priority in ((1, 0), (2, 5), (3, 0), (4, 5)):
        queue.submit("note", {"n": n}, priority=priority)
    queue.run_all()
    assert ran == [2, 4, 1, 3]


def test_a_submit_is_checked_as_always(queue, ran):
    with pytest.raises(PayloadError, match="does not take 'x'"):
        queue.submit("note", {"x": 1})
    with pytest.raises(PayloadError, match="JSON"):
        queue.submit("note", {"n": float("nan")})
    with pytest.raises(UnknownTaskType):
        queue.submit("other")
    assert queue.submitted() == []


def test_any_number_of_tasks_can_be_submitted():
    queue = ManualQueue(config=Config(buffer_size=1))
    queue.executor("fine")(lambda: None)
    for _ in range(5):
        queue.submit("fine")
    queue.run_next()
    for _ in range(5):
        queue.submit("fine")
    assert len(queue.run_all()) == 9


def test_an_error_is_on_the_record_and_raised_by_result(queue):
    @queue.executor("broken")
    def broken():
        raise ValueError("no")

    handle = broken.submit()
    assert queue.run_next().error == "ValueError: no"
    with pytest.raises(TaskFailed, match="ValueError: no"):
        handle.result()


def test_retries_wait_for_the_clock(queue):
    tried = []

    @queue.executor("flaky", retry=RetryPolicy(3, base=10, backoff="exponential"))
    def flaky():
        tried.append(queue.clock.monotonic())
        raise OSError("away")

    handle = flaky.submit()
    assert queue.run_all()[0].status is TaskStatus.PENDING
    assert queue.advance(9.999) == []
    assert [task.status.value for task in queue.advance(0.001)] == ["pending"]
    assert [task.status.value for task in queue.advance(60)] == ["failed"]
    assert [moment - tried[0] for moment in tried] == [0, 10, 30]
    assert handle.task().errors == 3


def test_delays_and_snoozes_wait_for_the_clock(queue):
    @queue.executor("later")
    def later(ctx):
        if ctx.task.snoozes < 2:
            raise Snooze(30)
        return ctx.task.snoozes

    handle = queue.submit("later", delay=3600)
    assert queue.run_all() == []
    queue.advance(3600 + 59)
    assert not handle.done()
    queue.advance(1)
    assert handle.result() == 2


def test_each_task_runs_at_its_moment(queue):
    start, moments = queue.clock.now(), []
    queue.executor("when")(lambda n: moments.append((n, queue.clock.now() - start)))
    for n in (5, 1, 3):
        queue.submit("when", {"n": n}, delay=n * 60)
    ran = queue.advance(600)
    assert [task.params["n"] for task in ran] == [1, 3, 5]
    assert moments == [(n, timedelta(minutes=n)) for n in (1, 3, 5)]
    assert queue.clock.now() - start == timedelta(minutes=10)


def test_a_time_out_fires_on_the_clock(queue):
    @queue.executor("slow", timeout=30)
    def slow(ctx):
        for _ in range(10):
            ctx.sleep(7)
        return "never"

    slow.submit()
    task = queue.run_next()
    assert (task.status, task.error) == (TaskStatus.FAILED, "timed out after 30 s")
    assert task.duration == 30


def test_a_loop_that_only_asks_its_token_comes_to_its_time_out(queue):
    @queue.executor("loop", timeout=0.5)
    def loop(ctx):
        while True:
            ctx.token.raise_if_cancelled()

    loop.submit()
    assert queue.run_next().error == "timed out after 0.5 s"


def test_an_executor_that_does_not_heed_its_time_out_is_stuck(queue, caplog):
    @queue.executor("deaf", timeout=5, grace=1)
    def deaf():
        queue.clock.advance(60)
        return "late"

    deaf.submit()
    task = queue.run_next()
    assert task.status is TaskStatus.FAILED
    assert task.error == "timed out after 5 s; its thread still runs"
    assert task.stuck_on == ""


def test_a_task_is_cancelled_before_it_runs(queue, ran):
    assert queue.submit("note").cancel()
    assert (queue.run_all(), ran, statuses(queue)) == ([], [], ["cancelled"])


def test_a_running_task_is_cancelled_at_a_moment_of_the_clock(queue):
    told = []

    @queue.executor("long")
    def long(ctx):
        ctx.on_cancel(lambda: told.append("callback"))
        ctx.sleep(3600)

    handle = long.submit()
    queue.clock.call_later(5, handle.cancel)
    task = queue.run_next()
    assert (task.status, task.duration, told) == (TaskStatus.CANCELLED, 5, ["callback"])
    assert handle.cancelled()


def test_a_wait_that_nothing_can_end_fails(queue):
    @queue.executor("stuck")
    def stuck(ctx):
        ctx.token.wait()

    stuck.submit()
    assert "waits for ever" in queue.run_next().error


def test_waiting_for_a_task_that_has_not_run_raises_at_once(queue, ran):
    handle = queue.submit("note")
    with pytest.raises(FutureTimeout, match="call run_next"):
        handle.result()
    with pytest.raises(FutureTimeout, match="call run_next"):
        wait([handle])
    queue.run_all()
    assert wait([handle]).done == {handle}


@pytest.mark.parametrize(
    "wait",
    [
        lambda queue: queue.submit("note").result(timeout=0.01),
        lambda queue: next(queue.map("note", [{}], timeout=0.01)),
    ],
    ids=["result", "map"],
)
def test_another_thread_waits_in_real_time_until_its_time_out(queue, ran, wait):
    waited = run_in_thread(lambda: wait(queue))
    with pytest.raises(FutureTimeout, match=r"within 0\.01 s"):
        waited()
    assert queue.clock.monotonic() == ManualClock().monotonic()


def test_a_coroutine_may_await_what_another_one_runs(queue, ran):
    async def waiter():
        return await queue.submit("note")

    async def main():
        waiting = asyncio.create_task(waiter())
        await asyncio.sleep(0)
        assert len(queue.run_all()) == 1
        return await waiting

    assert asyncio.run(main()) is None


def test_an_executor_may_wait_for_another_task(queue):
    @queue.executor("child")
    def child(n):
        if n == 2:
            raise Retry(delay=60)
        return n

    @queue.executor("parent")
    def parent():
        handles = [child.submit(n=n) for n in range(2)]
        assert child.submit(n=1).result(timeout=5) == 1
        assert len(list(as_completed(handles))) == 2
        return [handle.result() for handle in handles]

    handle = parent.submit()
    queue.run_all()
    assert handle.result() == [0, 1]


def test_waiting_inside_an_executor_lets_time_pass(queue):
    start = queue.clock.monotonic()

    @queue.executor("child")
    def child():
        return queue.clock.monotonic() - start

    @queue.executor("parent")
    def parent():
        late = queue.submit("child", delay=60)
        with pytest.raises(FutureTimeout):
            late.result(timeout=20)
        waited = queue.clock.monotonic() - start
        with pytest.raises(FutureTimeout, match="nothing is due"):
            queue.submit("elsewhere").result()
        return [waited, late.result()]

    queue.declare("elsewhere")
    handle = parent.submit()
    queue.run_all()
    assert handle.result() == [20, 60]


def test_flows_run_in_their_order(queue, ran):
    task = lambda n: Task(type="note", params={"n": n})  # noqa: E731
    handle = queue.submit_flow(chain(task(1), group(task(2), task(3)), task(4)))
    queue.run_next()
    assert ran == [1]
    queue.run_all()
    assert sorted(ran[1:3]) == [2, 3]
    assert (ran[3:], handle.wait()) == ([4], True)


def test_dependents_of_a_failed_task_are_cancelled(queue, ran):
    queue.executor("broken")(lambda: 1 / 0)
    parent = queue.submit("broken")
    child = queue.submit("note", depends_on=[parent])
    queue.run_all()
    assert (child.cancelled(), ran) == (True, [])


def test_unique_keys_hold(queue, ran):
    first = queue.submit("note", unique_key="k")
    with pytest.raises(DuplicateTask):
        queue.submit("note", unique_key="k")
    assert queue.submit("note", unique_key="k", on_conflict="return").id == first.id
    queue.run_all()
    assert queue.submit("note", unique_key="k").id != first.id


def test_concurrency_keys_and_limits_hold(queue):
    order = []

    @queue.executor("outer", max_concurrency=1)
    def outer(n):
        order.append(n)
        if n < 2:
            outer.submit(n=n + 1)
            assert queue.run_next() is None
        order.append(-n)

    @queue.executor("keyed")
    def keyed(n):
        order.append(n)
        assert queue.run_next() is None

    outer.submit(n=1)
    queue.run_all()
    assert order == [1, -1, 2, -2]
    order.clear()
    for n in range(3):
        queue.submit("keyed", {"n": n}, concurrency_key="k")
    queue.run_all()
    assert order == [0, 1, 2]


def test_a_rate_goes_by_the_clock(queue):
    start, moments = queue.clock.monotonic(), []
    queue.executor("api", rate="2/m", burst=1)(
        lambda: moments.append(queue.clock.monotonic() - start)
    )
    for _ in range(4):
        queue.submit("api")
    assert len(queue.run_all()) == 1
    queue.advance(90)
    assert moments == [0, 30, 60, 90]


def test_schedules_tick_as_time_passes(queue, ran):
    queue.schedule("hourly", "0 * * * *", "note", {"n": 1})
    queue.schedule("often", every(600), "note", {"n": 2})
    assert queue.run_all() == []
    queue.advance(3600 * 24)
    assert (ran.count(1), ran.count(2)) == (24, 24 * 6)


def test_a_tick_that_nothing_was_there_for_is_a_misfire(queue, ran):
    queue.schedule("skipped", every(60), "note", {"n": 1}, misfire="skip")
    queue.schedule("one", every(60), "note", {"n": 2}, misfire="one")
    queue.run_all()
    queue.clock.advance(600 - 15)
    queue.run_all()
    assert (ran.count(1), ran.count(2)) == (0, 1)


def test_pauses_hold(queue, ran):
    queue.submit("note")
    queue.pause("note")
    assert queue.run_all() == []
    queue.resume("note")
    assert len(queue.run_all()) == 1


def test_a_tuned_rate_holds_and_starts_no_thread(queue, ran, threads_begun):
    queue.tune("note", rate="1/m")
    queue.tune(workers=4)
    for _ in range(3):
        queue.submit("note")
    assert len(queue.run_all()) == 1
    queue.clock.advance(60)
    assert len(queue.run_all()) == 1
    queue.untune("note")
    assert len(queue.run_all()) == 1
    assert threads_begun == []


def test_a_failed_task_is_requeued(queue):
    fails = [True]

    @queue.executor("once")
    def once():
        if fails.pop() if fails else False:
            raise ValueError("first")

    once.submit()
    task = queue.run_next()
    queue.requeue(task.id)
    assert queue.run_next().status is TaskStatus.COMPLETED
    assert queue.requeue_dead_letters() == 0


def test_hooks_are_told_at_once_and_in_this_thread():
    class Told(Hook):
        def __init__(self):
            self.events = []

        def submitted(self, task):
            self.events.append(("submitted", threading.current_thread()))

        def finished(self, task):
            self.events.append((task.status.value, threading.current_thread()))

    told = Told()
    queue = ManualQueue(hooks=[told])
    queue.executor("fine")(lambda: None)
    queue.submit("fine")
    assert told.events == [("submitted", threading.current_thread())]
    queue.run_all()
    assert told.events[1:] == [("completed", threading.current_thread())]


def test_callbacks_have_been_called_when_a_task_has_run(queue, ran):
    seen = []
    handle = queue.submit("note")
    handle.add_done_callback(lambda handle: seen.append(handle.id))
    queue.run_next()
    assert seen == [handle.id]


def test_retention_goes_by_the_clock():
    queue = ManualQueue(config=Config(retention={"completed": 3600}))
    queue.executor("fine")(lambda: None)
    queue.submit("fine")
    queue.run_all()
    queue.advance(3500)
    assert queue.list_tasks()[1] == 1
    queue.advance(200)
    assert queue.list_tasks()[1] == 0


def test_run_all_fails_where_a_task_submits_itself_for_ever(queue):
    @queue.executor("again")
    def again():
        again.submit()

    again.submit()
    with pytest.raises(AssertionError, match=r"run 20 tasks and there are more.*again"):
        queue.run_all(most=20)


def test_start_and_drain_work_and_stop_ends(queue, ran):
    with queue:
        queue.submit("note")
        assert ran == []
        assert queue.drain()
        assert ran == [0]
    with pytest.raises(QueueStopped):
        queue.submit("note")
    with pytest.raises(QueueStopped):
        queue.run_all()


def test_tasks_run_from_a_file_too(tmp_path, ran):
    path = tmp_path / "tasks.db"
    with SQLiteRepository(path) as repository:
        queue = ManualQueue(repository)
        queue.executor("add")(lambda a, b: a + b)
        handle = queue.submit("add", {"a": 1, "b": 2})
        queue.submit("add", {"a": 1, "b": 2}, delay=60)
        queue.run_all()
        assert handle.result() == 3
        queue.stop()
    with SQLiteRepository(path) as repository:
        later = ManualQueue(repository, clock=queue.clock)
        later.executor("add")(lambda a, b: a + b)
        assert later.run_all() == []
        assert len(later.advance(60)) == 1
        later.stop()


def test_an_interrupt_reaches_the_test_and_leaves_the_task_pending(queue):
    @queue.executor("interrupted")
    def interrupted():
        raise KeyboardInterrupt

    handle = interrupted.submit()
    with pytest.raises(KeyboardInterrupt):
        queue.run_next()
    assert handle.task().status is TaskStatus.PENDING
    assert handle.task().interruptions == 1


def test_the_same_test_gives_the_same_history():
    def history():
        queue = ManualQueue(clock=ManualClock())

        @queue.executor("flaky", retry=RetryPolicy(4, base=3))
        def flaky(n):
            queue.clock.advance(0.25)
            if n % 2:
                raise OSError(str(n))

        queue.schedule("a", every(7), "flaky", {"n": 1})
        queue.schedule("b", every(7), "flaky", {"n": 2})
        for n in range(5):
            queue.submit("flaky", {"n": n}, id=str(n))
        ran = queue.advance(60)
        return [(task.id, task.status, task.run_at, task.duration) for task in ran]

    assert history() == history()


def test_nothing_is_logged_where_all_is_well(caplog):
    queue = ManualQueue(logger=logging.getLogger("quiet"))
    queue.executor("fine")(lambda: None)
    with caplog.at_level(logging.INFO, "quiet"):
        handle = queue.submit("fine")
        assert not handle.done()
        queue.run_all()
    assert [record for record in caplog.records if record.name == "quiet"] == []


def test_a_failure_is_raised_if_the_test_asks_for_it(queue):
    @queue.executor("odd", max_attempts=2)
    def odd(n):
        if n % 2:
            raise ValueError(f"{n} is odd")

    for n in range(4):
        odd.submit(n=n)
    with pytest.raises(TaskFailed, match="1 is odd") as raised:
        queue.run_all(check=True)
    assert raised.value.attempt == 2
    assert [task.status.value for task in queue.run_all(check=True)] == []
    queue.submit("odd", {"n": 5}, delay=60)
    with pytest.raises(TaskFailed, match="5 is odd"):
        queue.advance(60, check=True)


def test_an_executor_that_fails_the_test_fails_it(queue):
    queue.executor("never", max_attempts=3)(lambda: pytest.fail("must not be called"))
    handle = queue.submit("never")
    with pytest.raises(pytest.fail.Exception, match="must not be called"):
        queue.run_all()
    assert handle.task().errors == 1


def test_a_clock_of_another_kind_is_refused():
    with pytest.raises(ConfigurationError, match="ManualClock"):
        ManualQueue(clock=SystemClock())


@pytest.mark.parametrize("ordered", [True, False])
def test_a_map_whose_tasks_nobody_runs_says_so(queue, ordered):
    square = queue.executor("square")(lambda n: n * n)
    results = queue.map(square, [1, 2], ordered=ordered)
    with pytest.raises(FutureTimeout, match="nothing runs while a test waits"):
        next(results)
    queue.run_all()
    assert list(results) == [1, 4]


def test_a_stop_ends_after_an_interrupt_at_any_point():
    """A task that had been started, and that nothing executes, is handed back."""

    def run(point):
        queue = ManualQueue()
        queue.executor("work", max_attempts=1000)(lambda: None)
        queue.submit("work")
        try:
            queue.run_all()
        finally:
            left.extend(queue.stop())

    left = []
    assert len(list(every_strike(run, first=1000, step=131))) > 20
    assert left == []
