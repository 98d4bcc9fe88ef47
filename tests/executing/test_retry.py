"""Retries: at once, after a wait, or not at all."""

import logging
import threading
from datetime import timedelta

import pytest
from helpers import PATIENCE, eventually, frequent_checks, parts_of

from taskx import (
    CancelReason,
    Config,
    ConfigurationError,
    Permanent,
    Queue,
    Retry,
    RetryPolicy,
    Snooze,
    SQLiteRepository,
    TaskFailed,
    TaskStatus,
)
from taskx.tasks.log import Digest

STEADY = {"jitter": 0}


@pytest.fixture
def queue(make_queue, clock):
    """A queue that is not started, with a clock that stands still."""
    return make_queue(worker_num=2, clock=clock)


class Fails:
    """An executor that raises the given errors, one in each attempt, and then returns."""

    def __init__(self, queue, *errors, **options):
        self.errors = list(errors)
        self.runs = 0
        queue.executor("fails", **options)(self.run)

    def run(self):
        self.runs += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


def waiting(queue, handle):
    """Return the task as soon as it waits for its retry."""
    return eventually(
        lambda: (
            (task := queue.get_task_status(handle.id)).status is TaskStatus.PENDING
            and task.run_at is not None
            and task
        )
    )


class TestPolicy:
    def test_the_wait_grows_with_each_attempt(self, queue, clock):
        fails = Fails(queue, *[OSError("down")] * 3, retry=RetryPolicy(4, base=10, **STEADY))
        queue.start()
        handle = queue.submit("fails")
        for attempt, wait in enumerate((10, 20, 40), 1):
            task = waiting(queue, handle)
            assert (task.errors, task.error, task.dead_letter) == (attempt, "OSError: down", False)
            assert task.run_at == clock.now() + timedelta(seconds=wait)
            assert fails.runs == attempt
            clock.advance(wait)
            eventually(lambda n=attempt: fails.runs == n + 1)
        assert handle.result(PATIENCE) == "done"
        outcomes = [attempt.outcome for attempt in handle.task().attempts]
        assert outcomes == ["retried", "retried", "retried", "completed"]

    def test_a_retry_does_not_start_before_its_time(self, queue, clock):
        fails = Fails(queue, OSError(), retry=RetryPolicy(base=10, **STEADY))
        queue.start()
        handle = queue.submit("fails")
        waiting(queue, handle)
        clock.advance(9.999)
        assert queue.drain(PATIENCE)
        assert fails.runs == 1
        clock.advance(0.001)
        assert handle.result(PATIENCE) == "done"

    def test_the_policy_of_a_task_wins_over_its_executors(self, queue, clock):
        Fails(queue, OSError(), retry=RetryPolicy(2, base=10, **STEADY))
        queue.start()
        handle = queue.submit("fails", retry=RetryPolicy(5, backoff="fixed", base=60, **STEADY))
        task = waiting(queue, handle)
        assert task.run_at == clock.now() + timedelta(seconds=60)
        assert task.max_attempts == 5

    @pytest.mark.every_store
    def test_max_attempts_wins_over_the_policy(self, queue):
        Fails(queue, retry=RetryPolicy(5), max_attempts=2)
        queue.start()
        assert queue.submit("fails").task().max_attempts == 2
        assert queue.submit("fails", retry=RetryPolicy(7)).task().max_attempts == 7
        assert queue.submit("fails", retry=RetryPolicy(7), max_attempts=1).task().max_attempts == 1

    def test_a_policy_without_a_wait_retries_at_once(self, queue):
        fails = Fails(queue, OSError(), OSError(), retry=RetryPolicy(3, base=0))
        queue.start()
        assert queue.submit("fails").result(PATIENCE) == "done"
        assert fails.runs == 3

    def test_an_error_that_is_not_in_retry_on_fails_at_once(self, queue):
        Fails(
            queue, OSError(), ValueError("no use"), retry=RetryPolicy(9, base=0, retry_on=OSError)
        )
        queue.start()
        handle = queue.submit("fails")
        with pytest.raises(TaskFailed, match="no use"):
            handle.result(PATIENCE)
        assert (handle.task().errors, handle.task().dead_letter) == (2, True)

    def test_a_time_out_counts_as_a_timeout_error_for_the_policy(self, queue, clock):
        begun = threading.Event()

        @queue.executor("slow", timeout=5, retry=RetryPolicy(9, give_up_on=TimeoutError))
        def slow(ctx):
            begun.set()
            ctx.token.wait(PATIENCE)
            ctx.token.raise_if_cancelled()

        queue.start()
        handle = queue.submit("slow")
        assert begun.wait(PATIENCE)
        clock.advance(5)
        with pytest.raises(TaskFailed, match="timed out"):
            handle.result(PATIENCE)
        assert handle.task().errors == 1

    @pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit])
    def test_a_back_off_function_that_fails_is_logged_and_base_is_used(
        self, queue, clock, caplog, error
    ):
        def broken(attempt):
            raise error

        Fails(queue, OSError(), retry=RetryPolicy(backoff=broken, base=30))
        queue.start()
        task = waiting(queue, queue.submit("fails"))
        assert task.run_at == clock.now() + timedelta(seconds=30)
        assert error.__name__ in caplog.text

    def test_a_task_that_waits_for_its_retry_can_be_cancelled(self, queue, clock):
        fails = Fails(queue, OSError(), retry=RetryPolicy(base=10))
        queue.start()
        handle = queue.submit("fails")
        waiting(queue, handle)
        assert queue.cancel_task(handle.id) is True
        clock.advance(3600)
        assert queue.drain(PATIENCE)
        assert fails.runs == 1

    def test_the_wait_before_a_retry_is_logged(self, queue, caplog):
        Fails(queue, OSError("down"), retry=RetryPolicy(base=10, **STEADY))
        queue.start()
        handle = queue.submit("fails")
        waiting(queue, handle)
        [record] = eventually(lambda: [r for r in caplog.records if "is retried" in r.message])
        assert record.levelno == logging.WARNING
        assert f"{handle.id} (fails) is retried in 10 s after attempt 1: OSError: down" in (
            record.message
        )

    def test_retries_are_counted_in_one_warning_a_minute_for_each_type(
        self, queue, clock, caplog, monkeypatch
    ):
        # The housekeeper may tell the first five retries just before the sixth one.
        monkeypatch.setattr(Digest, "tell", lambda digest, after=0.0: None)
        caplog.set_level(logging.INFO)
        Fails(
            queue, *[OSError("down")] * 8, retry=RetryPolicy(99, base=1, backoff="fixed", **STEADY)
        )
        always = queue.executor("always", retry=RetryPolicy(99, base=1, backoff="fixed", **STEADY))
        always(lambda: 1 / 0)
        queue.start()
        handles = [queue.submit("fails"), queue.submit("always")]

        def let_fail(attempt):
            for handle in handles:
                eventually(lambda handle=handle: handle.task().errors == attempt)
                waiting(queue, handle)

        def told(level):
            records = [r for r in caplog.records if r.levelno == level]
            return sorted(r.getMessage() for r in records if " is retried " in r.getMessage())

        for attempt in range(1, 6):
            let_fail(attempt)
            clock.advance(1)
        let_fail(6)
        eventually(lambda: len(told(logging.INFO)) == 10)  # the first of each is a warning
        first = [line.partition(" is")[0] for line in told(logging.WARNING)]
        assert first == sorted(
            f"task {h.id} ({kind})" for h, kind in zip(handles, ("fails", "always"), strict=True)
        )
        caplog.clear()
        clock.advance(56)
        let_fail(7)
        eventually(lambda: len(told(logging.WARNING)) == 2)
        assert told(logging.WARNING) == [
            f"{kind}: 6 retries in the last minute, the last one: task {handle.id} ({kind}) is retried in "
            f"1 s after attempt 7: {error} (params={{}})"
            for handle, kind, error in (
                (handles[1], "always", "ZeroDivisionError: division by zero"),
                (handles[0], "fails", "OSError: down"),
            )
        ]

    @frequent_checks
    def test_the_last_retries_are_told_when_no_other_follows(self, queue, clock, caplog):
        def warnings():
            return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]

        Fails(queue, *[OSError("down")] * 3, max_attempts=4)
        queue.start()
        assert queue.submit("fails").result(PATIENCE) == "done"
        assert len(warnings()) == 1
        clock.advance(61)
        eventually(lambda: len(warnings()) == 2)
        assert "fails: 2 retries in the last minute, the last one: task" in warnings()[1]
        clock.advance(61)
        eventually(lambda: not parts_of(queue).moves.retries._kinds)
        assert len(warnings()) == 2

    @frequent_checks
    def test_a_retry_that_is_told_later_says_so(self, queue, clock, caplog):
        def warnings():
            return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]

        Fails(queue, *[OSError("down")] * 2, max_attempts=3)
        queue.start()
        handle = queue.submit("fails")
        assert handle.result(PATIENCE) == "done"
        clock.advance(61)
        eventually(lambda: len(warnings()) == 2)
        words = f"task {handle.id} (fails) is retried"
        assert [line.partition(words)[0] for line in warnings()] == ["", "in the last minute: "]

    def test_a_stop_tells_the_last_retries(self, queue, caplog):
        Fails(queue, *[OSError("down")] * 3, max_attempts=4)
        with queue:
            assert queue.submit("fails").result(PATIENCE) == "done"
        warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert len(warnings) == 2
        assert warnings[1].startswith("fails: 2 retries in the last minute, the last one: task")

    @pytest.mark.parametrize("wrong", [3, "exponential", {"max_attempts": 3}])
    def test_an_invalid_policy_is_refused_and_nothing_is_stored(self, queue, wrong):
        Fails(queue)
        with pytest.raises(ConfigurationError, match="RetryPolicy"):
            queue.submit("fails", retry=wrong)
        with pytest.raises(ConfigurationError, match="RetryPolicy"):
            queue.executor("other", retry=wrong)
        assert queue.list_tasks()[1] == 0

    def test_only_an_executors_policy_can_have_a_back_off_function(self, queue):
        Fails(queue)
        with pytest.raises(ConfigurationError, match="give it to the executor"):
            queue.submit("fails", retry=RetryPolicy(backoff=lambda attempt: 1))
        assert queue.list_tasks()[1] == 0


class TestRetry:
    @pytest.mark.parametrize(
        ("retry", "error"),
        [(Retry("busy", delay=7), "Retry: busy"), (Retry(7), "Retry: again in 7 s")],
        ids=["a reason and a delay", "a number"],
    )
    def test_the_delay_of_a_retry_wins_over_the_policy(self, queue, clock, retry, error):
        Fails(queue, retry, retry=RetryPolicy(base=100))
        queue.start()
        task = waiting(queue, queue.submit("fails"))
        assert task.run_at == clock.now() + timedelta(seconds=7)
        assert (task.errors, task.error) == (1, error)

    def test_a_retry_without_a_delay_waits_as_the_policy_says(self, queue, clock):
        policy = RetryPolicy(base=100, retry_on=OSError, **STEADY)
        Fails(queue, Retry("busy"), retry=policy)
        queue.start()
        task = waiting(queue, queue.submit("fails"))
        assert task.run_at == clock.now() + timedelta(seconds=100)

    def test_a_retry_without_delay_and_policy_runs_at_once(self, queue):
        Fails(queue, Retry(), max_attempts=2)
        queue.start()
        assert queue.submit("fails").result(PATIENCE) == "done"

    def test_a_retry_uses_up_an_attempt(self, queue):
        Fails(queue, Retry("busy", delay=7))
        queue.start()
        with pytest.raises(TaskFailed, match="Retry: busy"):
            queue.submit("fails").result(PATIENCE)


class TestPermanent:
    def test_a_permanent_error_fails_the_task_at_once(self, queue):
        Fails(queue, Permanent("no such customer"), retry=RetryPolicy(9))
        queue.start()
        handle = queue.submit("fails")
        with pytest.raises(TaskFailed, match="no such customer"):
            handle.result(PATIENCE)
        assert (handle.task().errors, handle.task().dead_letter) == (1, True)


class TestSnooze:
    def test_a_snoozed_task_runs_later_and_uses_up_no_attempt(self, queue, clock):
        fails = Fails(queue, Snooze(60), Snooze(60), OSError("down"))
        queue.start()
        handle = queue.submit("fails")
        for number in (1, 2):
            task = waiting(queue, handle)
            assert (task.snoozes, task.errors, task.error, task.attempt) == (number, 0, "", 1)
            assert task.run_at == clock.now() + timedelta(seconds=60)
            clock.advance(60)
            eventually(lambda n=number: fails.runs == n + 1)
        with pytest.raises(TaskFailed, match="down"):
            handle.result(PATIENCE)
        outcomes = [attempt.outcome for attempt in handle.task().attempts]
        assert outcomes == ["snoozed", "snoozed", "failed"]

    @pytest.mark.parametrize("most", [0, 2])
    def test_a_task_that_snoozes_too_often_fails(self, make_queue, most):
        queue = make_queue()

        @queue.executor("sleepy", max_snoozes=most, max_attempts=9)
        def sleepy():
            raise Snooze(0)

        queue.start()
        handle = queue.submit("sleepy")
        words = f"again in 0 s: it has snoozed {most} times, and max_snoozes is {most}"
        with pytest.raises(TaskFailed, match=words):
            handle.result(PATIENCE)
        task = handle.task()
        assert (task.snoozes, task.errors, task.dead_letter) == (most, 1, True)

    def test_a_requeued_task_may_snooze_again(self, make_queue):
        queue = make_queue()

        @queue.executor("sleepy", max_snoozes=1)
        def sleepy(ctx):
            if not (ctx.task.snoozes and len(ctx.task.earlier_attempts) > 2):
                raise Snooze(0)

        queue.start()
        handle = queue.submit("sleepy")
        assert handle.exception(PATIENCE) is not None
        queue.requeue(handle.id)
        assert queue.handle(handle.id).result(PATIENCE) is None

    @pytest.mark.parametrize("most", [-1, "9", True, 1.5])
    def test_wrong_numbers_of_snoozes_are_refused(self, queue, most):
        with pytest.raises(ConfigurationError, match="max_snoozes"):
            queue.executor("sleepy", max_snoozes=most)

    def test_a_snooze_after_a_cancel_is_a_cancel(self, queue, gate):
        @queue.executor("sleepy")
        def sleepy(ctx):
            gate()
            raise Snooze(60)

        queue.start()
        handle = queue.submit("sleepy")
        gate.wait_for()
        assert queue.cancel_task(handle.id) is False
        gate.open()
        eventually(lambda: handle.task().status is TaskStatus.CANCELLED)

    def test_a_snooze_after_a_stop_is_an_interruption(self, queue, gate):
        @queue.executor("sleepy")
        def sleepy(ctx):
            gate()
            assert ctx.token.reason is CancelReason.STOP
            raise Snooze(60)

        queue.start()
        handle = queue.submit("sleepy")
        gate.wait_for()
        assert queue.stop(timeout=0.1, cancel=True) == [handle.id]
        gate.open()
        eventually(lambda: queue.get_task_status(handle.id).status is TaskStatus.PENDING)
        task = queue.get_task_status(handle.id)
        assert (task.snoozes, task.interruptions, task.run_at) == (0, 1, None)


def test_another_process_runs_a_waiting_retry_when_it_is_due(database, clock):
    def run(queue):
        return Fails(queue, OSError("down"), retry=RetryPolicy(base=10, **STEADY))

    with SQLiteRepository(database) as repository:
        queue = Queue(repository, Config(worker_num=1), clock=clock)
        run(queue)
        with queue:
            handle = queue.submit("fails")
            waiting(queue, handle)
    with SQLiteRepository(database) as repository:
        queue = Queue(repository, Config(worker_num=1), clock=clock)
        fails = run(queue)
        fails.errors.clear()
        with queue:
            assert queue.drain(PATIENCE)
            assert fails.runs == 0
            clock.advance(10)
            assert queue.handle(handle.id).result(PATIENCE) == "done"
            assert queue.get_task_status(handle.id).errors == 1


def test_another_process_uses_the_policy_stored_with_a_task(database, clock):
    """A process that has only declared the type can set the policy of its tasks."""
    with SQLiteRepository(database) as here, SQLiteRepository(database) as there:
        web = Queue(here, clock=clock)
        web.declare("fails")
        policy = RetryPolicy(4, backoff="linear", base=25, give_up_on=(KeyError,), **STEADY)
        handle = web.submit("fails", retry=policy)
        assert handle.task().retry == policy
        worker = Queue(there, Config(worker_num=1), clock=clock)
        Fails(worker, OSError(), KeyError("x"))
        with worker:
            task = waiting(web, handle)
            assert task.run_at == clock.now() + timedelta(seconds=25)
            clock.advance(25)
            with pytest.raises(TaskFailed, match="KeyError"):
                handle.result(PATIENCE)
