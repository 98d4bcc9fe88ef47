"""An inline queue: submit runs the task."""

from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import TimeoutError as FutureTimeout
from datetime import timedelta

import pytest

from taskx import (
    ConfigurationError,
    MemoryRepository,
    PayloadError,
    Queue,
    RetryPolicy,
    Snooze,
    SQLiteRepository,
    Task,
    TaskFailed,
    TaskStatus,
    chain,
)
from taskx.testing import InlineQueue, ManualClock, ManualQueue, inline, manual


@pytest.fixture
def queue():
    return InlineQueue()


def test_submit_runs_the_task_at_once_in_this_thread(queue):
    threads = []
    queue.executor("where")(lambda: threads.append(threading.current_thread()) or "here")
    handle = queue.submit("where")
    assert threads == [threading.current_thread()]
    assert (handle.done(), handle.result()) == (True, "here")
    assert handle.task().status is TaskStatus.COMPLETED


def test_params_are_checked_and_turned_into_json(queue):
    queue.executor("same")(lambda value: type(value).__name__)
    assert queue.submit("same", {"value": (1, 2)}).result() == "list"
    with pytest.raises(PayloadError, match="JSON"):
        queue.submit("same", {"value": object()})
    assert queue.list_tasks()[1] == 1


def test_an_error_is_not_raised_by_submit(queue):
    queue.executor("broken")(lambda: 1 / 0)
    handle = queue.submit("broken")
    assert handle.task().error.startswith("ZeroDivisionError")
    with pytest.raises(TaskFailed):
        handle.result()


def test_retries_are_over_when_submit_returns(queue):
    moments = []

    @queue.executor("flaky", retry=RetryPolicy(3, base=60, backoff="linear"))
    def flaky():
        moments.append(queue.clock.monotonic())
        raise OSError("away")

    assert flaky.submit().task().status is TaskStatus.FAILED
    assert [moment - moments[0] for moment in moments] == [0, 60, 180]


def test_a_time_out_needs_no_waiting(queue):
    queue.executor("slow", timeout=3600)(lambda ctx: ctx.sleep(7200))
    assert queue.submit("slow").task().error == "timed out after 3600 s"


def test_a_delayed_task_waits_for_the_clock_or_for_result(queue):
    queue.executor("fine")(lambda: queue.clock.monotonic())
    early = queue.submit("fine", delay=60)
    late = queue.submit("fine", delay=100)
    assert early.task().status is TaskStatus.PENDING
    queue.advance(60)
    assert early.done()
    assert late.result() - early.result() == 40


def test_a_snooze_waits_for_the_clock(queue):
    @queue.executor("poll")
    def poll(ctx):
        if not ctx.task.snoozes:
            raise Snooze(10)
        return "ready"

    handle = poll.submit()
    assert handle.task().status is TaskStatus.PENDING
    assert handle.result() == "ready"


def test_tasks_submit_others_and_wait_for_them(queue):
    @queue.executor("fib")
    def fib(n):
        return n if n < 2 else fib.submit(n=n - 1).result() + fib.submit(n=n - 2).result()

    assert fib.submit(n=7).result() == 13
    assert list(queue.map(fib, [5, 6])) == [5, 8]


def test_flows_and_batches_run_whole(queue):
    ran = []
    queue.executor("note")(lambda n: ran.append(n))
    queue.submit_many([Task(type="note", params={"n": n}) for n in (1, 2)])
    flow = queue.submit_flow(chain(*(Task(type="note", params={"n": n}) for n in (3, 4))))
    assert (ran, flow.wait(0)) == ([1, 2, 3, 4], True)


def test_tasks_that_are_changed_in_bulk_run_at_once(queue):
    mended = []

    @queue.executor("once")
    def once(to="nobody"):
        if to == "nobody" and not mended:
            raise ValueError("first")

    first, second, third = (once.submit() for _ in range(3))
    queue.requeue(first.id, params={"to": "ann"})
    assert queue.get_task_status(first.id).status is TaskStatus.COMPLETED
    mended.append(True)
    [group] = queue.failures(at_most=1)
    assert queue.requeue_failures(group).changed == 2
    assert {queue.get_task_status(task.id).status for task in (second, third)} == {"completed"}
    mended.clear()
    once.submit()
    mended.append(True)
    assert queue.requeue_all(type="once").changed == 1
    assert queue.count_tasks(status="completed") == 4
    parent = once.submit()
    waits = once.using(delay=60).submit()
    child = once.using(depends_on=[waits], on_parent_failure="run").submit()
    assert queue.cancel_all(status="pending", limit=2).changed == 2
    assert (queue.get_task_status(child.id).status, waits.task().status) == ("cancelled",) * 2
    assert queue.delete_all(everything=True).changed == 7
    assert parent.id not in [task.id for task in queue.iter_tasks()]


def test_a_requeued_or_resumed_task_runs_at_once(queue):
    fails = [True]

    @queue.executor("once")
    def once():
        if fails and fails.pop():
            raise ValueError("first")

    handle = once.submit()
    queue.requeue(handle.id)
    assert queue.handle(handle.id).result() is None
    queue.pause("once")
    paused = once.submit()
    assert paused.task().status is TaskStatus.PENDING
    queue.resume("once")
    assert paused.done()


def test_an_interrupt_is_raised_by_submit(queue):
    @queue.executor("interrupted")
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted.submit()
    assert queue.list_tasks()[0][0].interruptions == 1


def test_threads_each_run_what_they_submit(queue):
    queue.executor("slow")(lambda n: n * n)
    results = {}

    def work(n):
        results[n] = queue.submit("slow", {"n": n}).result(timeout=60)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: n * n for n in range(8)}


# An application's own queue


class Unusable(MemoryRepository):
    """A repository that must not be touched."""

    def apply(self, writes, *, all_or_nothing=False):
        raise AssertionError("the application's repository was written to")

    def find(self, *args, **options):
        raise AssertionError("the application's repository was read")

    ready = due = list = notes = notes_after = notes_named = put_notes = find


@pytest.fixture
def app_queue():
    return Queue(Unusable())


@pytest.fixture
def add(app_queue):
    @app_queue.executor("add")
    def add(a, b):
        return a + b

    return add


@pytest.mark.parametrize("mode", [inline, manual])
def test_an_applications_queue_is_replaced_and_restored(mode, app_queue, add):
    before = dict(vars(app_queue))
    with mode(app_queue) as q:
        assert q is app_queue
        assert isinstance(q, ManualQueue)
        handle = add.submit(a=1, b=2)
        q.run_all()
        assert handle.result() == 3
        assert [task.params for task in q.submitted("add")] == [{"a": 1, "b": 2}]
        q.attribute = 1
    assert type(app_queue) is Queue
    assert vars(app_queue) == before
    with pytest.raises(AssertionError, match="written to"):
        add.submit(a=1, b=2)


def test_each_test_begins_with_an_empty_store_and_open_queue(app_queue, add):
    for _ in range(2):
        with inline(app_queue) as q:
            assert q.list_tasks()[1] == 0
            with app_queue:
                add.submit(a=1, b=2)
            assert q.list_tasks()[1] == 1


def test_the_queue_is_restored_after_an_error(app_queue, add):
    with pytest.raises(ValueError, match="of the test"), inline(app_queue):
        raise ValueError("of the test")
    assert type(app_queue) is Queue


def test_the_queue_is_restored_before_the_node_of_the_test_leaves(app_queue, add, monkeypatch):
    repository, kinds = MemoryRepository(), []
    leave = repository.liveness.leave

    def leaving(node):
        kinds.append(type(app_queue))
        leave(node)

    monkeypatch.setattr(repository.liveness, "leave", leaving)
    with manual(app_queue, repository) as q:
        add.submit(a=1, b=2)
        q.run_all()
    assert kinds == [Queue]
    assert repository.nodes() == []


def test_modes_can_be_one_inside_the_other(app_queue, add):
    with manual(app_queue) as outer:
        waiting = add.submit(a=1, b=1)
        with inline(app_queue) as inner:
            assert add.submit(a=2, b=2).result() == 4
            assert len(inner.submitted()) == 1
        assert type(app_queue) is ManualQueue
        assert outer.submitted()[0].id == waiting.id
        assert [task.result for task in outer.run_all()] == [2]


def test_a_decorated_function_has_a_queue_of_its_own_at_each_call(app_queue, add):
    @inline(app_queue)
    def work():
        add.submit(a=1, b=1)
        return app_queue.list_tasks()[1]

    assert [work(), work()] == [1, 1]


@pytest.mark.parametrize("mode", [inline, manual])
def test_a_decorated_coroutine_function_has_the_queue_while_it_runs(mode, app_queue, add):
    @mode(app_queue)
    async def work(a):
        await asyncio.sleep(0)
        handle = add.submit(a=a, b=1)
        app_queue.run_all()
        return await handle

    assert [asyncio.run(work(1)), asyncio.run(work(a=2))] == [2, 3]
    assert type(app_queue) is Queue


@pytest.mark.parametrize("mode", [inline, manual])
def test_a_generator_is_not_decorated_as_its_body_runs_after_the_call(mode, app_queue):
    def plain():
        yield

    async def asynchronous():
        yield

    for function in plain, asynchronous:
        with pytest.raises(ConfigurationError, match="must be a plain function"):
            mode(app_queue)(function)


def test_executors_registered_inside_stay_registered(app_queue):
    with inline(app_queue):
        late = app_queue.executor("late")(lambda: "late")
    with inline(app_queue):
        assert late.submit().result() == "late"


def test_a_queue_of_ones_own_class_keeps_its_methods():
    class Own(Queue):
        def submit(self, *args, **options):
            return super().submit(*args, **{"created_by": "own", **options})

    queue = Own(Unusable())
    queue.executor("fine")(lambda: None)
    with inline(queue) as q:
        assert isinstance(q, Own)
        assert queue.submit("fine").task().created_by == "own"
    assert type(queue) is Own


def test_a_started_queue_goes_on_beside_its_test(tmp_path):
    with SQLiteRepository(tmp_path / "tasks.db") as repository:
        queue = Queue(repository)
        queue.executor("where")(lambda: threading.current_thread().name)
        with queue:
            before = queue.submit("where")
            with inline(queue):
                assert queue.submit("where").result() == threading.current_thread().name
                assert queue.list_tasks()[1] == 1
            assert before.result(timeout=60).startswith("taskx-worker")
            assert queue.submit("where").result(timeout=60).startswith("taskx-worker")
            assert queue.list_tasks()[1] == 2


def test_a_repository_and_a_clock_can_be_given(app_queue, add, tmp_path):
    clock = ManualClock()
    with SQLiteRepository(tmp_path / "tasks.db") as repository:
        with manual(app_queue, repository, clock=clock) as q:
            add.submit(a=1, b=2)
            q.run_all()
            assert q.clock is clock
            assert q.repository is repository
            add.submit(a=3, b=4)
        assert repository.nodes() == []
        with manual(app_queue, repository) as q:
            assert [task.result for task in q.run_all()] == [7]


def test_schedules_of_the_application_tick_in_the_test(app_queue, add):
    with manual(app_queue) as q:
        nightly = q.schedule("nightly", "0 3 * * *", add.task(a=1, b=1))
        q.advance(24 * 3600)
        assert len(q.submitted("add")) == 1
        nightly.trigger()
        q.assert_submitted("add", times=2)


def test_a_mistake_leaves_a_started_queue_alone():
    with Queue(MemoryRepository()) as queue:
        queue.executor("fine")(lambda: "fine")
        with pytest.raises(ConfigurationError), inline(queue, object()):
            pass
        assert type(queue) is Queue
        assert queue.submit("fine").result(timeout=60) == "fine"


@pytest.mark.parametrize("wrong", [None, "app.queue", MemoryRepository()])
def test_only_a_queue_can_be_replaced(wrong):
    with pytest.raises(ConfigurationError, match="expected a Queue"), inline(wrong):
        pass


# Other ways to wait


def test_a_map_in_any_order_and_displays_need_no_waiting(queue, capsys):
    square = queue.executor("square")(lambda n: n * n)
    assert sorted(queue.map(square, [1, 2, 3], ordered=False)) == [1, 4, 9]
    began = queue.clock.monotonic()
    assert queue.submit("square", {"n": 5}, delay=3600).follow() == 25
    assert queue.clock.monotonic() - began == pytest.approx(3600)
    assert queue.follow()


def test_follow_times_out_on_the_clock(queue, capsys):
    later = queue.submit(queue.executor("later")(lambda: None), delay=60)
    with pytest.raises(FutureTimeout, match="has not ended within 5 s"):
        later.follow(timeout=5)
    assert later.follow(timeout=60) is None


def test_a_handle_can_be_awaited(queue):
    square = queue.executor("square")(lambda n: n * n)

    async def main():
        return await square.submit(n=3)

    assert asyncio.run(main()) == 9


def test_an_awaited_task_that_is_delayed_moves_the_clock(queue):
    square = queue.executor("square")(lambda n: n * n)

    async def main():
        return await asyncio.gather(
            *(square.using(delay=delay).submit(n=3) for delay in (3600, 60))
        )

    before = queue.clock.now()
    assert asyncio.run(main()) == [9, 9]
    assert queue.clock.now() - before == timedelta(hours=1)


def test_awaiting_what_nothing_can_end_fails(queue):
    square = queue.executor("square")(lambda n: n * n)
    queue.pause("square")

    async def main():
        await square.submit(n=3)

    with pytest.raises(FutureTimeout, match="nothing is due that could end it"):
        asyncio.run(main())


def test_a_part_of_an_executor_times_out_on_the_clock(queue):
    @queue.executor("parts", timeout=100)
    def parts(ctx):
        with pytest.raises(TimeoutError, match="5 s"), ctx.timeout(5):
            ctx.sleep(60)
        return ctx.remaining()

    assert parts.submit().result() == 95


def isolated(n):
    return os.getpid() * n


@pytest.mark.process
def test_an_isolated_executor_runs_in_a_child_process(queue):
    queue.executor("isolated", isolation="process")(isolated)
    assert queue.submit("isolated", {"n": 1}).result() not in (0, os.getpid())
