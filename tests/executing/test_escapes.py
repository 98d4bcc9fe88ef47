"""An error that escapes from an executor, a codec or TaskX itself fails only one attempt of one task."""

from __future__ import annotations

import threading

import pytest
from helpers import PATIENCE, eventually, no_rounds, node_of, parts_of, pool_of
from storage.repositories import coded

from taskx import (
    Codec,
    PayloadError,
    Retry,
    RetryPolicy,
    Task,
    TaskCancelled,
    TaskFailed,
    TaskStatus,
)
from taskx.attempt.alarms import Alarms
from taskx.attempt.runner import Runner, inside_executor
from taskx.tasks.clock import SYSTEM_CLOCK
from taskx.tasks.errors import CancelReason
from taskx.tasks.timing import DEFAULT_TIMING
from taskx.tasks.token import CancelToken
from taskx.testing import ManualClock

from . import isolated


class Panic(BaseException):
    """An error like a panic in an extension written in Rust."""


# Errors of executors


class Odd(Retry):
    @property
    def delay(self):
        raise Panic

    @delay.setter
    def delay(self, value):
        pass


def with_delay(value):
    error = Retry("x")
    error.delay = value
    return error


RAISED = {
    "retry": (lambda: isolated.RetryWithout(5), "RetryWithout: 5"),
    "snooze": (lambda: isolated.SnoozeWithout(5), "SnoozeWithout: 5"),
    "cancelled": (lambda: isolated.CancelledWithout(5), "CancelledWithout: 5"),
    "by hand": (
        lambda: TaskCancelled("enough"),
        "TaskCancelled: the task was told to stop: enough",
    ),
    "raises": (lambda: Odd("x"), "Odd: x"),
    "text": (lambda: with_delay("soon"), "Retry: x"),
    "nan": (lambda: with_delay(float("nan")), "Retry: x"),
}


@pytest.mark.parametrize("case", RAISED)
def test_an_error_without_the_attributes_of_its_class_fails_the_attempt(started, case):
    make, text = RAISED[case]

    @started.executor("raise", max_attempts=2)
    def raise_():
        raise make()

    handle = started.submit("raise")
    with pytest.raises(TaskFailed) as failed:
        handle.result(PATIENCE)
    assert failed.value.error == text
    task = handle.task()
    assert (task.errors, task.snoozes, task.crashes) == (2, 0, 0)
    assert started.drain(PATIENCE)


def test_a_retry_whose_class_sets_no_delay_waits_as_the_policy_says(make_queue):
    clock = ManualClock()
    queue = make_queue(worker_num=1, clock=clock)

    @queue.executor("raise", retry=RetryPolicy(2, base=100, jitter=0))
    def raise_():
        raise isolated.RetryWithout(5)

    queue.start()
    handle = queue.submit("raise")
    eventually(lambda: handle.task().errors)
    assert handle.task().status is TaskStatus.PENDING
    assert (handle.task().run_at - handle.task().created_at).total_seconds() == 100


# Defects of TaskX


@pytest.mark.parametrize("error", [RuntimeError("a defect"), Panic("a defect"), SystemExit(3)])
def test_an_error_that_escapes_from_the_runner_fails_its_attempt(started, monkeypatch, error):
    started.executor("bad", max_attempts=1)(lambda: None)
    run = Runner.run

    def broken(self, attempt, worker):
        if attempt.task.type == "bad":
            raise error
        return run(self, attempt, worker)

    monkeypatch.setattr(Runner, "run", broken)
    bad = started.submit("bad")
    with pytest.raises(TaskFailed, match=type(error).__name__):
        bad.result(PATIENCE)
    assert "in broken" in bad.task().traceback
    assert started.submit("fine").result(PATIENCE) == "fine"
    assert started.drain(PATIENCE)


def test_an_outcome_that_cannot_be_stored_as_it_is_fails_its_attempt(started, monkeypatch):
    run = Runner.run

    def of_no_number(self, attempt, worker):
        ending = run(self, attempt, worker)
        ending.returned, ending.snooze = False, "soon"
        return ending

    monkeypatch.setattr(Runner, "run", of_no_number)
    handle = started.submit("fine")
    with pytest.raises(TaskFailed, match="TypeError"):
        handle.result(PATIENCE)
    assert started.drain(PATIENCE)


@pytest.mark.timing(audit_every=0.05)
def test_an_interrupt_after_the_executor_has_returned_leaves_no_run_behind(
    make_queue, gate, monkeypatch
):
    """Ctrl-C strikes the thread that submits and runs the task: the audit makes the task pending again."""
    queue = make_queue(worker_num=1, buffer_size=1, overflow="caller_runs")
    queue.executor("hold")(lambda: gate())
    queue.executor("fine")(lambda: "fine")
    queue.start()
    hold = queue.submit("hold")
    gate.wait_for()
    queue.submit("fine")
    pool = pool_of(queue)

    def interrupted(run, ending):
        raise KeyboardInterrupt

    monkeypatch.setattr(pool, "conclude", interrupted)  # only the submitting thread calls it
    with no_rounds(queue):
        with pytest.raises(KeyboardInterrupt):
            queue.submit("fine", id="cut")
        assert list(pool.runs) == [hold.id]
        assert queue.get_task_status("cut").status is TaskStatus.RUNNING
    gate.open()
    assert queue.handle("cut").result(PATIENCE) == "fine"
    assert queue.get_task_status("cut").interruptions == 1


def test_a_panic_ends_no_thread_of_a_queue(started, monkeypatch):
    """Workers that start tasks and the housekeeper go on."""
    node = node_of(started)
    left = {"start": 3, "tick": 1}

    def panics_first(name, method):
        def call(*args):
            if left[name]:
                left[name] -= 1
                raise Panic
            return method(*args)

        return call

    starter, housekeeper = node.pool.starter, node._housekeeper
    monkeypatch.setattr(starter, "start", panics_first("start", starter.start))
    monkeypatch.setattr(housekeeper, "tick", panics_first("tick", housekeeper.tick))
    parts_of(started).agenda.wake()
    [handle] = started.submit_many([Task(type="fine")])
    assert handle.result(PATIENCE) == "fine"
    eventually(lambda: left == {"start": 0, "tick": 0})
    assert started.submit("fine", delay=0.01).result(PATIENCE) == "fine"
    assert {thread.is_alive() for thread in node.pool.threads} == {True}


# Time-outs


class TestTimeOuts:
    @pytest.fixture
    def no_threads(self, monkeypatch):
        """Make the start of the alarms' thread fail until the returned list is cleared."""
        left, start = [1], threading.Thread.start

        def refuse(thread):
            if left and thread.name == "taskx-alarms":
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", refuse)
        return left

    def test_without_a_thread_a_time_out_fires_when_the_executor_checks(
        self, make_queue, no_threads, caplog
    ):
        queue = make_queue(worker_num=1)

        @queue.executor("asks", timeout=0.01)
        def asks(ctx):
            ctx.sleep(PATIENCE)

        queue.start()
        with pytest.raises(TaskFailed, match="timed out after"):
            queue.submit("asks").result(PATIENCE)
        assert queue.drain(PATIENCE)
        assert "cannot start the thread for time-outs" in caplog.text

    @pytest.mark.timing(audit_every=0.05)
    def test_the_thread_for_time_outs_starts_as_soon_as_it_can(
        self, make_queue, no_threads, gate, clock
    ):
        """The housekeeper starts it, even if no other task with a time-out begins."""
        queue = make_queue(worker_num=1, clock=clock)
        fired = threading.Event()

        @queue.executor("deaf", timeout=60)
        def deaf(ctx):
            ctx.on_cancel(fired.set)
            gate()
            return fired.wait(PATIENCE)

        queue.start()
        handle = queue.submit("deaf")
        gate.wait_for()
        no_threads.clear()
        clock.advance(60)
        assert fired.wait(PATIENCE)
        gate.open()
        assert handle.result(PATIENCE) is True

    def test_the_next_task_with_a_time_out_starts_the_thread(self, no_threads):
        alarms, tokens = Alarms(SYSTEM_CLOCK, DEFAULT_TIMING), []
        for _ in range(2):
            tokens.append(CancelToken(SYSTEM_CLOCK.monotonic()))
            alarms.add(tokens[-1])
            no_threads.clear()
        eventually(lambda: [token._reason for token in tokens] == [CancelReason.TIMEOUT] * 2)

    def test_a_token_that_raises_does_not_keep_others_from_firing(self):
        alarms, told = Alarms(ManualClock(), DEFAULT_TIMING), []

        def panic():
            raise Panic

        alarms.go_on = lambda: None
        for call in (panic, lambda: told.append(1)):
            alarms.add(CancelToken(None), (0.0, call))
        alarms.ring()
        assert told == [1]

    def test_after_an_interrupt_the_next_time_out_starts_the_thread(self):
        alarms = Alarms(SYSTEM_CLOCK, DEFAULT_TIMING)
        lock = alarms._lock
        alarms._lock = LeftWithAnInterrupt(lock, after=2)
        first, second = CancelToken(SYSTEM_CLOCK.monotonic()), CancelToken(SYSTEM_CLOCK.monotonic())
        with pytest.raises(KeyboardInterrupt):
            alarms.add(first)
        alarms._lock = lock
        alarms.add(second)
        eventually(lambda: (first._reason, second._reason) == (CancelReason.TIMEOUT,) * 2)

    def test_an_interrupt_while_a_time_out_is_set_removes_it_again(
        self, make_queue, gate, monkeypatch
    ):
        """A time-out left behind would abandon a task that no thread executes."""
        queue = make_queue(worker_num=1, buffer_size=1, overflow="caller_runs")
        queue.executor("hold")(lambda: gate())
        queue.executor("timed", timeout=3600)(lambda: None)
        queue.start()
        queue.submit("hold")
        gate.wait_for()
        queue.submit("hold")
        alarms = parts_of(queue).runner.alarms
        add = alarms.add

        def interrupted(*args):
            add(*args)
            raise KeyboardInterrupt

        monkeypatch.setattr(alarms, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            queue.submit("timed")
        assert alarms._steps == {}
        assert not inside_executor()


class LeftWithAnInterrupt:
    """A lock whose ``with`` block number ``after``, counted from 1, ends with Ctrl-C."""

    def __init__(self, lock, after):
        self._lock, self._left = lock, after

    def __enter__(self):
        self._lock.acquire()

    def __exit__(self, *exc_info):
        self._lock.release()
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt


# Codecs


class Flaky(Codec):
    """A codec that raises ``error``, by default a panic, for some records."""

    name = "flaky"
    error: type[BaseException] = Panic

    def encode(self, data):
        if b"refuse" in data:
            raise self.error
        return data[::-1]

    def decode(self, data):
        if b"poison" in data[::-1]:
            raise self.error
        return data[::-1]


class TestCodecs:
    @pytest.fixture
    def codec(self):
        return Flaky()

    @pytest.fixture
    def repository(self, tmp_path, codec):
        with coded("memory", tmp_path, SYSTEM_CLOCK, codec) as made:
            yield made

    @pytest.fixture
    def echo(self, make_queue):
        queue = make_queue(worker_num=2)
        echo = queue.executor("echo")(lambda v: v)
        queue.start()
        return echo

    def test_a_record_that_makes_the_codec_panic_fails_only_its_task(self, echo, make_queue):
        # A task with a chosen id is read back from the repository before it starts.
        bad = echo._choose_queue().submit("echo", {"v": "poison"}, id="bad")
        assert [echo.submit(n).result(PATIENCE) for n in range(5)] == list(range(5))
        with pytest.raises(TaskFailed, match="codec 'flaky' cannot read it: Panic"):
            bad.result(PATIENCE)
        assert bad.task().damage

    def test_a_panic_while_a_result_is_stored_fails_only_its_attempt(self, echo, make_queue):
        bad = echo._choose_queue().executor("bad")(lambda: "refuse").submit()
        assert [echo.submit(n).result(PATIENCE) for n in range(5)] == list(range(5))
        with pytest.raises(TaskFailed, match="codec 'flaky' failed: Panic"):
            bad.result(PATIENCE)

    def test_a_panic_at_submit_is_a_payload_error(self, echo):
        with pytest.raises(PayloadError, match="codec 'flaky' failed: Panic"):
            echo.submit("refuse")
        assert echo.submit("fine").result(PATIENCE) == "fine"

    def test_an_interrupt_of_the_program_passes_through(self, make_queue, codec):
        queue = make_queue()
        queue.declare("echo")
        codec.error = KeyboardInterrupt
        with pytest.raises(KeyboardInterrupt):
            queue.submit("echo", {"v": "refuse"})
        codec.error = Panic
        handle = queue.submit("echo", {"v": "poison"})
        codec.error = KeyboardInterrupt
        with pytest.raises(KeyboardInterrupt):
            handle.task()
        codec.error = Panic
        assert handle.task().damage
