"""Attempts that follow one another: at once, after a while, or not at all."""

import logging
import threading
from datetime import timedelta

import pytest
from helpers import PATIENCE, eventually

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

STEADY = {"jitter": 0}


@pytest.fixture
def queue(make_queue, clock):
    """A queue whose time stands still, not started."""
    return make_queue(worker_num=2, clock=clock)


class Fails:
    """An executor that raises one error after the other, then returns."""

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
    """The task, when it has come to wait."""
    return eventually(
        lambda: (
            (task := queue.get_task_status(handle.id)).status is TaskStatus.PENDING
            and task.run_at is not None
            and task
        )
    )


class TestPolicy:
    @pytest.mark.every_store
    def test_of_an_executor_makes_its_tasks_wait_ever_longer(self, queue, clock):
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

    @pytest.mark.every_store
    def test_nothing_runs_before_its_time(self, queue, clock):
        fails = Fails(queue, OSError(), retry=RetryPolicy(base=10, **STEADY))
        queue.start()
        handle = queue.submit("fails")
        waiting(queue, handle)
        clock.advance(9.999)
        assert queue.drain(PATIENCE)
        assert fails.runs == 1
        clock.advance(0.001)
        assert handle.result(PATIENCE) == "done"

    def test_of_a_task_wins_over_its_executors(self, queue, clock):
        Fails(queue, OSError(), retry=RetryPolicy(2, base=10, **STEADY))
        queue.start()
        handle = queue.submit("fails", retry=RetryPolicy(5, backoff="fixed", base=60, **STEADY))
        task = waiting(queue, handle)
        assert task.run_at == clock.now() + timedelta(seconds=60)
        assert task.max_attempts == 5

    def test_max_attempts_given_beside_it_wins(self, queue):
        Fails(queue, retry=RetryPolicy(5), max_attempts=2)
        queue.start()
        assert queue.submit("fails").task().max_attempts == 2
        assert queue.submit("fails", retry=RetryPolicy(7)).task().max_attempts == 7
        assert queue.submit("fails", retry=RetryPolicy(7), max_attempts=1).task().max_attempts == 1

    def test_no_wait_means_at_once(self, queue):
        fails = Fails(queue, OSError(), OSError(), retry=RetryPolicy(3, base=0))
        queue.start()
        assert queue.submit("fails").result(PATIENCE) == "done"
        assert fails.runs == 3

    @pytest.mark.every_store
    def test_spent_attempts_make_a_dead_letter(self, queue):
        Fails(queue, *[OSError()] * 9, retry=RetryPolicy(3, base=0))
        queue.start()
        handle = queue.submit("fails")
        with pytest.raises(TaskFailed):
            handle.result(PATIENCE)
        task = handle.task()
        assert (task.errors, task.dead_letter) == (3, True)

    def test_other_errors_than_those_to_retry_on_fail_at_once(self, queue):
        Fails(
            queue, OSError(), ValueError("no use"), retry=RetryPolicy(9, base=0, retry_on=OSError)
        )
        queue.start()
        handle = queue.submit("fails")
        with pytest.raises(TaskFailed, match="no use"):
            handle.result(PATIENCE)
        assert (handle.task().errors, handle.task().dead_letter) == (2, True)

    def test_a_time_out_counts_as_timeout_error(self, queue, clock):
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
    def test_a_backoff_that_fails_is_logged_and_the_base_taken(self, queue, clock, caplog, error):
        def broken(attempt):
            raise error

        Fails(queue, OSError(), retry=RetryPolicy(backoff=broken, base=30))
        queue.start()
        task = waiting(queue, queue.submit("fails"))
        assert task.run_at == clock.now() + timedelta(seconds=30)
        assert error.__name__ in caplog.text

    @pytest.mark.every_store
    def test_a_task_that_waits_can_be_cancelled(self, queue, clock):
        fails = Fails(queue, OSError(), retry=RetryPolicy(base=10))
        queue.start()
        handle = queue.submit("fails")
        waiting(queue, handle)
        assert queue.cancel_task(handle.id) is True
        clock.advance(3600)
        assert queue.drain(PATIENCE)
        assert fails.runs == 1

    def test_the_wait_is_told_in_the_log(self, queue, caplog):
        Fails(queue, OSError("down"), retry=RetryPolicy(base=10, **STEADY))
        queue.start()
        handle = queue.submit("fails")
        waiting(queue, handle)
        [record] = eventually(lambda: [r for r in caplog.records if "is retried" in r.message])
        assert record.levelno == logging.WARNING
        assert f"{handle.id} (fails) is retried in 10 s after attempt 1: OSError: down" in (
            record.message
        )

    @pytest.mark.parametrize("wrong", [3, "exponential", {"max_attempts": 3}])
    def test_what_is_no_policy_is_refused_and_nothing_stored(self, queue, wrong):
        Fails(queue)
        with pytest.raises(ConfigurationError, match="RetryPolicy"):
            queue.submit("fails", retry=wrong)
        with pytest.raises(ConfigurationError, match="RetryPolicy"):
            queue.executor("other", retry=wrong)
        assert queue.list_tasks()[1] == 0

    def test_one_with_a_function_is_for_executors_only(self, queue):
        Fails(queue)
        with pytest.raises(ConfigurationError, match="give it to the executor"):
            queue.submit("fails", retry=RetryPolicy(backoff=lambda attempt: 1))
        assert queue.list_tasks()[1] == 0


class TestRetry:
    @pytest.mark.every_store
    def test_its_delay_wins_over_the_policy(self, queue, clock):
        Fails(queue, Retry("busy", delay=7), retry=RetryPolicy(base=100))
        queue.start()
        task = waiting(queue, queue.submit("fails"))
        assert task.run_at == clock.now() + timedelta(seconds=7)
        assert (task.errors, task.error) == (1, "Retry: busy")

    def test_without_a_delay_the_policy_says_it(self, queue, clock):
        policy = RetryPolicy(base=100, retry_on=OSError, **STEADY)
        Fails(queue, Retry("busy"), retry=policy)
        queue.start()
        task = waiting(queue, queue.submit("fails"))
        assert task.run_at == clock.now() + timedelta(seconds=100)

    def test_without_either_it_is_at_once(self, queue):
        Fails(queue, Retry(), max_attempts=2)
        queue.start()
        assert queue.submit("fails").result(PATIENCE) == "done"

    def test_it_spends_an_attempt(self, queue):
        Fails(queue, Retry("busy", delay=7))
        queue.start()
        with pytest.raises(TaskFailed, match="Retry: busy"):
            queue.submit("fails").result(PATIENCE)


@pytest.mark.every_store
class TestPermanent:
    def test_it_fails_at_once_whatever_is_left(self, queue):
        Fails(queue, Permanent("no such customer"), retry=RetryPolicy(9))
        queue.start()
        handle = queue.submit("fails")
        with pytest.raises(TaskFailed, match="no such customer"):
            handle.result(PATIENCE)
        assert (handle.task().errors, handle.task().dead_letter) == (1, True)

    def test_a_requeue_runs_it_again(self, queue):
        Fails(queue, Permanent("no such customer"), retry=RetryPolicy(9))
        queue.start()
        handle = queue.submit("fails")
        with pytest.raises(TaskFailed):
            handle.result(PATIENCE)
        queue.requeue(handle.id)
        assert queue.handle(handle.id).result(PATIENCE) == "done"


@pytest.mark.every_store
class TestSnooze:
    def test_it_runs_again_later_and_spends_nothing(self, queue, clock):
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

    def test_one_that_was_asked_to_stop_is_cancelled(self, queue, gate):
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

    def test_after_a_stop_it_is_an_interruption(self, queue, gate):
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


def test_a_wait_outlasts_the_process(database, clock):
    """What waits is on the record: another queue on the file runs it when it is due."""

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


def test_a_policy_stored_with_a_task_is_heeded_by_another_process(database, clock):
    """One that only declared the type may say how its tasks are retried."""
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
