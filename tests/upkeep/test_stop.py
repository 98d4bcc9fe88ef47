"""Starting, draining and stopping a queue; the order of tasks; due times."""

from __future__ import annotations

import logging
import threading
import time
from datetime import datetime, timedelta, timezone, tzinfo
from itertools import count
from types import SimpleNamespace

import pytest
from helpers import (
    PATIENCE,
    SOON,
    SpySQLite,
    eventually,
    frequent_checks,
    no_batches,
    node_of,
    parts_of,
    pool_of,
    run_in_thread,
)

from taskx import (
    CancelReason,
    ConfigurationError,
    Hook,
    MemoryRepository,
    QueueStopped,
    RepositoryUnavailable,
    Task,
    TaskFilter,
    TaskStatus,
    every,
)
from taskx.node.node import LocalNode
from taskx.testing import ManualClock, ManualQueue

# Start


#: Threads that only some repositories need.
OF_THE_REPOSITORY = ("taskx-beat", "taskx-changes", "taskx-lease", "taskx-listen")


def test_a_second_start_does_nothing(queue):
    queue.executor("fine")(lambda: "fine")
    before = set(threading.enumerate())
    queue.start()
    queue.start()
    with queue:
        names = [thread.name for thread in set(threading.enumerate()) - before]
        started = sorted(name for name in names if name not in OF_THE_REPOSITORY)
        assert started == ["taskx-housekeeper", "taskx-worker-1", "taskx-worker-2"]
        assert queue.submit("fine").result(PATIENCE) == "fine"
    with pytest.raises(
        QueueStopped, match="a stopped queue cannot be started again: write queue = Queue"
    ):
        queue.start()


def test_a_start_that_fails_leaves_nothing_behind(make_queue, tmp_path):
    queue = make_queue(SpySQLite(tmp_path / "missing" / "tasks.db"))
    before = threading.active_count()
    with pytest.raises(RepositoryUnavailable):
        queue.start()
    assert threading.active_count() <= before
    (tmp_path / "missing").mkdir()
    queue.executor("fine")(lambda: "fine")
    with queue:
        assert queue.submit("fine").result(PATIENCE) == "fine"
    queue.close()


def test_creating_a_queue_starts_no_thread_and_creates_no_file(tmp_path, make_queue):
    before = threading.active_count()
    make_queue(SpySQLite(tmp_path / "tasks.db"))
    assert threading.active_count() <= before
    assert list(tmp_path.iterdir()) == []


# Drain


@no_batches
def test_drain_waits_until_all_tasks_have_ended(busy, gate):
    queue = busy()
    for n in range(20):
        queue.submit("note", {"n": n})
    assert queue.drain(0.05) is False
    assert queue.ran == []
    gate.open()
    assert queue.drain(PATIENCE) is True
    assert queue.ran == list(range(20))
    assert queue.drain() is True


def test_drain_waits_for_tasks_that_executors_submit(make_queue):
    queue = make_queue(worker_num=2)
    ran = []

    @queue.executor("chain")
    def chain(ctx, left):
        ran.append(left)
        if left:
            queue.submit("chain", {"left": left - 1})

    queue.start()
    queue.submit("chain", {"left": 30})
    assert queue.drain(PATIENCE)
    assert ran == list(range(30, -1, -1))


def test_drain_does_not_wait_for_delayed_tasks(started):
    delayed = started.submit("fine", delay=1000)
    assert started.drain(PATIENCE) is True
    assert delayed.task().status is TaskStatus.PENDING


@pytest.fixture
def by_hand(make_queue, clock):
    """A started queue with an executor ``note``, and a clock that the test moves."""
    queue = make_queue(worker_num=2, clock=clock)
    queue.ran = []
    queue.executor("note")(lambda n=0: queue.ran.append(n))
    queue.start()
    return queue


def test_drain_waits_for_tasks_that_are_due(by_hand, clock):
    """The housekeeper may not have seen them yet, and they may also wait for their turn."""
    for n in range(6):
        by_hand.submit("note", {"n": n}, delay=3600, concurrency_key="k")
    assert by_hand.drain(PATIENCE)
    assert by_hand.ran == []
    clock.advance(3600)
    assert by_hand.drain(PATIENCE)
    assert by_hand.ran == list(range(6))


def test_drain_waits_for_the_ticks_that_are_due(by_hand, clock):
    """Drain does not wait for later ticks."""
    often = by_hand.schedule("often", every(60), "note")
    for ticks in range(1, 6):
        clock.advance(60)
        assert by_hand.drain(PATIENCE)
        assert len(by_hand.ran) == ticks
    often.remove()
    clock.advance(60)
    assert by_hand.drain(PATIENCE)
    assert len(by_hand.ran) == 5


def test_drain_is_refused_where_it_could_not_return(queue, make_queue):
    with pytest.raises(ConfigurationError, match="start"):
        queue.drain()
    queue.executor("drains")(lambda: queue.drain())
    queue.start()
    for timeout in (-1, "1", float("nan")):
        with pytest.raises(ConfigurationError):
            queue.drain(timeout)
    assert "inside an executor" in queue.submit("drains").exception(PATIENCE).error
    queue.stop()
    with pytest.raises(QueueStopped):
        queue.drain()


# Order and due times


def test_a_delayed_task_starts_exactly_at_its_moment(make_queue, database):
    for repository in (MemoryRepository(), SpySQLite(database)):
        clock = ManualClock()
        queue = make_queue(repository, clock=clock, worker_num=1)
        queue.executor("fine")(lambda: "fine")
        queue.start()
        handle = queue.submit("fine", delay=10)
        at = queue.submit("fine", run_at=clock.now() + timedelta(seconds=10, milliseconds=1))
        clock.advance(9.999)
        assert queue.drain(PATIENCE)
        assert not handle.done()
        threading.Event().wait(0.2)  # longer than the housekeeper's polling interval
        assert handle.task().status is TaskStatus.PENDING
        clock.advance(0.001)
        assert handle.result(PATIENCE) == "fine"
        assert handle.task().started_at == handle.task().run_at
        assert at.task().status is TaskStatus.PENDING
        clock.advance(0.001)
        assert at.result(PATIENCE) == "fine"
        queue.stop()
        repository.close()


def test_a_task_with_run_at_in_the_past_starts_now(started):
    task = started.submit("fine").task()
    handle = started.submit("fine", run_at=task.created_at - timedelta(days=1))
    assert handle.result(PATIENCE) == "fine"


class SetBack(tzinfo):
    """A time zone whose clocks go back from three o'clock to two o'clock."""

    def utcoffset(self, moment):
        return timedelta(hours=1 if moment.fold else 2)

    dst = utcoffset


def test_the_hour_that_local_clocks_repeat_counts_twice(make_queue):
    """Each run_at is the moment that it names, and a delay is counted in real time."""
    clock = ManualClock(datetime(2024, 10, 26, 23, 30, tzinfo=timezone.utc))
    queue = make_queue(MemoryRepository(clock), clock=clock, worker_num=1)
    queue.executor("fine")(lambda: "fine")
    queue.start()
    local = datetime(2024, 10, 27, 2, 30, tzinfo=SetBack())
    handles = [
        queue.submit("fine", run_at=local),
        queue.submit("fine", run_at=local.replace(fold=1)),
        queue.submit("fine", delay=3 * 3600),
    ]
    for number, handle in enumerate(handles):
        assert [other.done() for other in handles[number:]] == [False] * (3 - number)
        clock.advance(3600)
        assert handle.result(PATIENCE) == "fine"
        assert handle.task().started_at == handle.task().run_at == clock.now()


def test_delayed_tasks_take_no_room_in_the_buffer(busy, gate, clock):
    queue = busy(buffer_size=1, clock=clock)
    handles = [queue.submit("note", {"n": n}, delay=1) for n in range(20)]
    queue.submit_many([Task(type="note", params={"n": n}) for n in (98,)])
    clock.advance(2)
    gate.open()
    for handle in handles:
        handle.result(PATIENCE)
    assert sorted(queue.ran) == [*range(20), 98]


def test_tasks_run_in_order_while_the_clock_is_set_back_and_forth(make_queue):
    """Each task runs once, and its duration is 0."""
    clock = ManualClock()
    queue = make_queue(MemoryRepository(), clock=clock, worker_num=1)
    ran = []

    @queue.executor("jump")
    def jump(n):
        ran.append(n)
        clock.set_wall(clock.now() + timedelta(hours=-1 if n % 2 else 1))

    # Before the first jump: a task submitted after the clock was set back may overtake others.
    handles = [queue.submit("jump", {"n": n}) for n in range(10)]
    queue.start()
    for handle in handles:
        handle.result(PATIENCE)
        assert handle.task().duration == 0
    assert ran == list(range(10))


# Stop


def listening(queue):
    """Submit a task that sleeps until it is told to end; wait until it has begun; return its handle."""
    begun = threading.Event()

    @queue.executor("listen")
    def listen(ctx):
        begun.set()
        ctx.sleep(5 * PATIENCE)

    handle = queue.submit("listen")
    assert begun.wait(PATIENCE)
    return handle


def test_stop_lets_running_tasks_end(started, gate, caplog):
    started.executor("hold")(lambda ctx: (gate(), str(ctx.token.reason))[1])
    handle = started.submit("hold")
    gate.wait_for(1)
    stopping = run_in_thread(lambda: started.stop(PATIENCE))
    eventually(lambda: pool_of(started).stopping)
    gate.open()
    assert stopping() == []
    assert (handle.task().status, handle.task().result) == (TaskStatus.COMPLETED, "None")
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_stop_with_cancel_interrupts_running_tasks(started):
    begun = threading.Event()

    @started.executor("listen", max_attempts=1)
    def listen(ctx):
        begun.set()
        ctx.progress(50, "half way")
        ctx.token.wait(PATIENCE)
        assert ctx.token.reason is CancelReason.STOP
        ctx.token.raise_if_cancelled()

    handle = started.submit("listen")
    assert begun.wait(PATIENCE)
    assert started.stop(PATIENCE, cancel=True) == []
    task = handle.task()
    assert task.status is TaskStatus.PENDING
    assert (task.errors, task.interruptions, task.crashes) == (0, 1, 0)
    assert (task.owner, task.error, task.progress, task.started_at) == ("", "", 0, None)
    assert task.attempt == 1
    [attempt] = task.attempts
    assert attempt.outcome == "interrupted"


@pytest.mark.parametrize("error", [ValueError("while tidying up"), SystemExit()], ids=repr)
def test_a_task_is_interrupted_whatever_its_executor_raises(started, error):
    begun = threading.Event()

    @started.executor("listen")
    def listen(ctx):
        begun.set()
        ctx.token.wait(PATIENCE)
        raise error

    handle = started.submit("listen")
    assert begun.wait(PATIENCE)
    started.stop(PATIENCE, cancel=True)
    task = handle.task()
    assert (task.status, task.errors, task.interruptions) == (TaskStatus.PENDING, 0, 1)


@pytest.mark.usefixtures("calm")
def test_an_interrupted_task_runs_again_on_another_queue(started, make_queue):
    handle = listening(started)
    started.stop(PATIENCE, cancel=True)
    again = make_queue()
    again.executor("listen")(lambda ctx: ctx.task.attempt)
    again.start()
    assert again.handle(handle.id).result(PATIENCE) == 1
    assert handle.task().starts == 2


def test_a_task_cancelled_before_the_stop_ends_as_cancelled(started, gate):
    started.executor("hold")(lambda ctx: (gate(), ctx.token.raise_if_cancelled()))
    handle = started.submit("hold")
    gate.wait_for(1)
    started.cancel_task(handle.id)
    stopping = run_in_thread(lambda: started.stop(PATIENCE, cancel=True))
    gate.open()
    stopping()
    assert handle.task().status is TaskStatus.CANCELLED


def test_stop_returns_by_its_timeout_and_names_running_tasks(started, gate, caplog):
    started.executor("stubborn")(lambda: (gate(), "late, and it counts")[1])
    handle = started.submit("stubborn")
    gate.wait_for(1)
    began = time.monotonic()
    assert started.stop(timeout=0.2) == [handle.id]
    assert time.monotonic() - began < SOON
    [warning] = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert handle.id in warning
    assert handle.task().status is TaskStatus.RUNNING
    assert started.stop(timeout=0.2) == [handle.id]
    gate.open()
    assert started.handle(handle.id).result(PATIENCE) == "late, and it counts"
    eventually(lambda: started.repository.liveness.nodes() == [])
    assert started.stop() == []


def test_stop_fires_the_tokens_before_its_timeout(started, monkeypatch):
    """They fire after four fifths of it, so that executors have the rest to end."""
    ahead = [0.0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + ahead[0])
    handle = listening(started)
    monkeypatch.setattr("taskx.node.node.time", clock)
    stopping = run_in_thread(lambda: started.stop(timeout=5 * PATIENCE))
    eventually(lambda: pool_of(started).stopping)
    assert handle.task().interruptions == 0
    ahead[0] = 4 * PATIENCE
    assert stopping() == []
    assert handle.task().interruptions == 1


def test_stop_hands_buffered_tasks_back(busy, gate, caplog, make_queue):
    queue = busy()
    handles = [queue.submit("note", {"n": n}) for n in range(5)]
    stopping = run_in_thread(lambda: queue.stop(PATIENCE))
    eventually(lambda: pool_of(queue).stopping)
    gate.open()
    assert stopping() == []
    tasks = [h.task() for h in handles]
    assert {(t.status, t.owner, t.starts) for t in tasks} == {(TaskStatus.PENDING, "", 0)}
    [warning] = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "5 task(s) left pending" in warning
    again = make_queue()
    again.executor("note")(lambda n: n)
    again.start()
    assert [again.handle(h.id).result(PATIENCE) for h in handles] == list(range(5))


def test_a_second_stop_does_nothing(queue):
    assert queue.stop() == []
    assert queue.stop() == []


def test_stop_can_be_called_from_many_threads(started):
    started.submit("fine")
    for result in [run_in_thread(lambda: started.stop(PATIENCE)) for _ in range(5)]:
        assert result() == []


def test_a_second_stop_can_be_more_impatient(started):
    handle = listening(started)
    first = run_in_thread(lambda: started.stop(timeout=10 * PATIENCE))
    eventually(lambda: pool_of(started).stopping)
    assert started.stop(timeout=PATIENCE, cancel=True) == []
    assert first() == []
    assert handle.task().interruptions == 1


def test_an_executor_can_stop_the_queue(started):
    returned = []

    @started.executor("last")
    def last():
        returned.append(started.stop(PATIENCE))
        return "bye"

    handle = started.submit("last")
    assert handle.result(PATIENCE) == "bye"
    assert returned == [[handle.id]]
    eventually(lambda: started.repository.liveness.nodes() == [])
    assert handle.task().status is TaskStatus.COMPLETED


def test_a_with_block_stops_the_queue_even_if_it_raises(queue):
    queue.executor("fine")(lambda: "fine")
    with pytest.raises(KeyError), queue:
        raise KeyError
    with pytest.raises(QueueStopped):
        queue.submit("fine")


@frequent_checks
def test_a_handle_works_after_the_stop(make_queue):
    clock = ManualClock()
    queue, again = make_queue(clock=clock), make_queue(clock=clock)
    queue.executor("fine")(lambda: "fine")
    queue.start()
    handle = queue.submit("fine", delay=60)
    queue.stop()
    waiting = run_in_thread(lambda: handle.result(PATIENCE))
    again.executor("fine")(lambda: "by another")
    again.start()
    clock.advance(60)
    assert waiting() == "by another"


def test_waiting_for_a_task_of_a_closed_queue_raises_queue_stopped(queue, repository, monkeypatch):
    """Its watcher thread ends, so that it does not open the repository again."""
    queue.declare("remote")
    handle = queue.submit("remote")
    waiting = run_in_thread(lambda: handle.exception(PATIENCE))
    eventually(lambda: parts_of(queue).watcher.watching)
    queue.close()
    assert isinstance(waiting(), QueueStopped)
    assert isinstance(queue.handle(handle.id).exception(PATIENCE), QueueStopped)
    eventually(lambda: "taskx-watch" not in {thread.name for thread in threading.enumerate()})
    repository.close()  # the last read opened it again


def test_a_close_while_the_repository_is_down_ends_all_handles(queue, repository):
    """The watcher's thread ends, even if the main thread has left it an ended task to tell of."""
    queue.declare("remote")
    handle, called, watcher = queue.submit("remote"), threading.Event(), parts_of(queue).watcher
    handle.add_done_callback(lambda handle: called.set())
    repository.down = True
    watcher._ended.append(handle.id)
    queue.close()
    assert called.wait(PATIENCE)
    assert isinstance(handle.exception(0), QueueStopped)
    eventually(lambda: "taskx-watch" not in {thread.name for thread in threading.enumerate()})


def test_a_drain_ends_when_another_thread_stops_the_queue(started, gate):
    started.executor("hold")(lambda: gate())
    started.submit("hold")
    gate.wait_for(1)
    draining = run_in_thread(started.drain)
    stopping = run_in_thread(lambda: started.stop(PATIENCE))
    with pytest.raises(QueueStopped):
        draining()
    gate.open()
    assert stopping() == []


def test_a_queue_told_to_stop_at_exit_fetches_no_more_tasks(started, repository):
    """The exit may wait for other queues before it stops this one."""
    pool = pool_of(started)
    pool.fetcher.alone = False
    started._node.tell_to_stop()
    eventually(pool.fetcher.refill)  # a fetch that was under way has ended
    repository.create(Task(id="x", type="fine"))
    pool.agenda.expect_more()
    pool.fetcher.refill()
    assert "x" not in pool.buffer
    assert repository.find("buffered_on", [pool.node.id], ("id",)) == []


@pytest.mark.timing(stop_extra=0.05)
def test_a_stop_takes_little_longer_if_every_step_hangs(started, monkeypatch):
    go_on = threading.Event()
    repository = started.repository
    for step in ("mark_stopping", "leave"):
        hung = getattr(repository.liveness, step)
        monkeypatch.setattr(
            repository.liveness, step, lambda node, hung=hung: (go_on.wait(PATIENCE), hung(node))
        )
    monkeypatch.setattr(repository, "count", lambda filter=None: go_on.wait(PATIENCE) and 0)
    began = time.monotonic()
    assert started.stop(0.05) == []
    assert time.monotonic() - began < SOON  # although each step would take a minute
    go_on.set()
    eventually(lambda: not repository.liveness.nodes())


@pytest.mark.parametrize("timeout", [-1, "1", None, float("inf")])
def test_an_invalid_timeout_of_stop_is_refused(queue, timeout):
    with pytest.raises(ConfigurationError):
        queue.stop(timeout)
    queue.executor("fine")(lambda: "fine")
    with queue:
        assert queue.submit("fine").result(PATIENCE) == "fine"


def test_a_stop_accepts_more_time_than_the_system_can_wait(started):
    assert started.submit("fine").result(1e10) == "fine"
    assert started.stop(1e300) == []
    assert started.repository.liveness.nodes() == []


def test_a_stop_after_an_interrupted_one_ends_the_node(make_queue, gate, monkeypatch):
    told = []
    stopped = type("Stopped", (Hook,), {"queue_stopped": lambda self, queue: told.append(queue)})
    queue = make_queue(hooks=[stopped()])
    queue.executor("hold")(lambda: gate())
    queue.start()
    handle = queue.submit("hold")
    gate.wait_for(1)
    node = node_of(queue)
    wait = node._wait_for_workers
    monkeypatch.setattr(node, "_wait_for_workers", interrupt)
    with pytest.raises(KeyboardInterrupt):
        queue.stop(PATIENCE)
    monkeypatch.setattr(node, "_wait_for_workers", wait)
    assert len(queue.repository.liveness.nodes()) == 1
    gate.open()
    assert queue.stop(PATIENCE) == []
    assert handle.result(PATIENCE) is None
    assert (queue.repository.liveness.nodes(), told) == ([], [queue])


class Stopped(Hook):
    """Calls a function, and then itself fails."""

    def __init__(self, call):
        self.call = call

    def queue_stopped(self, queue):
        self.call(queue)
        raise ValueError("the hook fails")


def test_a_second_stop_returns_after_the_hooks_were_told(make_queue, monkeypatch):
    told, telling, go_on = [], threading.Event(), threading.Event()
    queue = make_queue(hooks=[Stopped(told.append)])
    queue.start()
    hooks, tell = parts_of(queue).hooks, parts_of(queue).hooks.tell

    def tell_late(*event):
        telling.set()
        assert go_on.wait(PATIENCE)
        tell(*event)

    monkeypatch.setattr(hooks, "tell", tell_late)
    first = run_in_thread(lambda: queue.stop(PATIENCE))
    assert telling.wait(PATIENCE)
    assert not node_of(queue)._left.is_set()  # what a second call waits for
    second = run_in_thread(lambda: queue.stop(PATIENCE))
    go_on.set()
    assert second() == []
    assert told == [queue]
    assert first() == []


def test_a_hook_that_is_told_of_the_stop_may_stop_the_queue(make_queue):
    for queue in (make_queue(hooks=[hook := Stopped(None)]), ManualQueue(hooks=[hook])):
        still = []
        hook.call = lambda queue, still=still: still.append(queue.stop(10 * PATIENCE))
        queue.start()
        began = time.monotonic()
        assert queue.stop(PATIENCE) == []
        assert still == [[]]
        assert time.monotonic() - began < PATIENCE


def test_two_stops_end_a_node_only_once(started):
    node = node_of(started)
    assert started.stop(PATIENCE) == []
    ended = []
    node._ended = lambda: ended.append(1)
    node._end()
    assert ended == []


def interrupt(*args):
    raise KeyboardInterrupt


def test_stop_leaves_the_repository_open_and_close_closes_it(started):
    handle = started.submit("fine")
    started.stop()
    assert handle.task().id == handle.id
    started.close()
    assert handle.task().id == handle.id  # a later operation opens it again
    started.repository.close()


def test_a_stop_while_threads_start_ends_all_of_them(make_queue, monkeypatch):
    """The first one has ended before the second one is started."""
    queue = make_queue(worker_num=3)
    begin = LocalNode._begin

    def begun_late(node):
        pool = node._pool
        worker = pool._worker

        def made(number):
            thread = worker(number)
            start = thread.start

            def start_and_end():
                pool.begin_stop()
                start()
                thread.join(PATIENCE)

            if number == 1:
                thread.start = start_and_end
            return thread

        pool._worker = made
        begin(node)

    monkeypatch.setattr(LocalNode, "_begin", begun_late)
    queue.start()
    assert queue.stop(PATIENCE) == []
    assert pool_of(queue).workers_left == 0


@pytest.mark.every_store
def test_submits_during_a_stop_are_stored_or_refused(make_queue, repository):
    """Ten threads submit while the queue is stopped, in several rounds.

    The next queue runs the stored tasks that did not run.
    """
    all_left = []
    for _ in range(5):
        queue = make_queue(worker_num=2, buffer_size=1_000_000)
        ran, barrier = [], threading.Barrier(11)
        # Each task takes so long that some are left, however slow the submits are.
        queue.executor("n")(lambda ctx, n, ran=ran: (ctx.token.wait(0.02), ran.append(n))[1])
        queue.start()

        def submit(first, queue=queue, barrier=barrier):
            barrier.wait(PATIENCE)
            accepted = []
            try:
                for n in count(first, 10):
                    queue.submit("n", {"n": n})
                    accepted.append(n)
            except QueueStopped:
                return accepted

        threads = [
            run_in_thread(lambda first=first, submit=submit: submit(first)) for first in range(10)
        ]
        barrier.wait(PATIENCE)
        eventually(lambda: repository.count(TaskFilter()) > 50)
        assert queue.stop(PATIENCE) == []
        accepted = sorted(n for thread in threads for n in thread())
        kept = {task.params["n"]: task for task in repository.list(TaskFilter(limit=1_000_000))}
        assert sorted(kept) == accepted
        done = sorted(n for n, task in kept.items() if task.status is TaskStatus.COMPLETED)
        assert done == sorted(ran)
        left = [task for task in kept.values() if task.status is not TaskStatus.COMPLETED]
        assert {task.status for task in left} <= {TaskStatus.PENDING}
        all_left += left
        with make_queue() as another:
            another.executor("n")(lambda n: n)
            assert another.drain(PATIENCE)
        assert repository.count(TaskFilter(status="completed")) == len(kept)
        for task in kept.values():
            repository.delete(task.id)
    assert all_left
