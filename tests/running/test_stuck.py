"""Executors that do not heed a time-out: given up, barred from starting again, and replaced."""

from __future__ import annotations

import gc
import logging
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from helpers import (
    PATIENCE,
    earliest_due,
    eventually,
    housekeeper_of,
    node_of,
    pool_of,
    run_in_thread,
    services_of,
    whole_round,
)
from storage.repositories import TinyRepository

from taskx import (
    Config,
    ConfigurationError,
    Hook,
    InvalidTransition,
    MemoryRepository,
    Queue,
    RetryPolicy,
    SQLiteRepository,
    TaskFailed,
    TaskNotFound,
    TaskStatus,
    executor,
)
from taskx.core.clock import to_datetime
from taskx.core.options import DEFAULT_GRACE, Options
from taskx.core.writes import Update
from taskx.running.stuck import stack_of
from taskx.storage.queries import owners

TIMEOUT, GRACE = 60.0, 5.0


@pytest.fixture
def make(make_queue, clock, gate):
    """Makes a started queue with an executor whose first run waits at the gate, whatever happens."""

    def make(on=None, **config):
        queue = make_queue(on, clock=clock, **{"worker_num": 1, **config})
        queue.begun, queue.tokens = [], []

        @queue.executor("hang", timeout=TIMEOUT, grace=GRACE)
        def hang(ctx, name="x"):
            queue.begun.append(name)
            queue.tokens.append(ctx.token)
            if queue.begun.count(name) == 1:
                gate()
                ctx.progress(50, "late")
            return f"run {queue.begun.count(name)}"

        queue.executor("fine")(lambda: "fine")
        queue.start()
        return queue

    return make


@pytest.fixture
def hang(clock, gate):
    """Has a task hang until it is stuck; returns its handle."""

    def hang(queue, name="x", until=None, **options):
        handle = queue.submit("hang", {"name": name}, id=name, **options)
        gate.wait_for()
        clock.advance(TIMEOUT + GRACE)
        eventually(lambda: handle.task().status != TaskStatus.RUNNING)
        return handle

    return hang


def fails(handle):
    with pytest.raises(TaskFailed) as failed:
        handle.result(PATIENCE)
    return failed.value


def at_work(queue):
    return sum(thread.is_alive() for thread in pool_of(queue).threads)


# Given up


class TestGivenUp:
    def test_not_before_its_grace_is_over(self, make, clock, gate):
        queue = make()
        handle = queue.submit("hang")
        gate.wait_for()
        clock.advance(TIMEOUT)
        services_of(queue).alarms.ring()
        assert queue.tokens[0].reason == "timeout"
        clock.advance(GRACE - 0.1)
        services_of(queue).alarms.ring()
        assert handle.task().status is TaskStatus.RUNNING
        clock.advance(0.1)
        assert fails(handle).error == "timed out after 60 s; its thread still runs"

    @pytest.mark.every_store
    def test_the_record_says_where_its_thread_is(self, make, hang):
        queue = make()
        error = fails(hang(queue))
        task = queue.get_task_status("x")
        assert (task.dead_letter, task.errors, task.stuck_on) == (True, 1, node_of(queue).record.id)
        assert task.duration == TIMEOUT + GRACE
        assert "in hang\n    gate()" in error.remote_traceback
        assert "helpers.py" in error.remote_traceback
        assert "runner.py" not in error.remote_traceback
        [attempt] = task.attempts
        assert (attempt.outcome, attempt.error) == ("failed", error.error)
        assert attempt.worker == task.worker != ""

    @pytest.mark.every_store
    def test_what_comes_of_it_later_is_dropped(self, make, hang, gate, caplog):
        queue = make()
        handle = hang(queue)
        gate.open()
        eventually(lambda: not queue.get_task_status("x").stuck_on)
        task = handle.task()
        assert (task.status, task.result, task.progress) == (TaskStatus.FAILED, None, 0)
        eventually(lambda: "its thread has ended now; its late outcome is dropped" in caplog.text)
        assert pool_of(queue).runs == {}

    @pytest.mark.every_store
    def test_what_it_stores_later_is_not_stored(self, make_queue, clock, gate):
        queue = make_queue(worker_num=1, clock=clock)
        raised = []

        @queue.executor(timeout=TIMEOUT, grace=0)
        def late(ctx):
            gate()
            try:
                ctx.cursor = 5
            except BaseException as error:
                raised.append(type(error).__name__)
                raise

        queue.start()
        handle = late.submit()
        gate.wait_for()
        clock.advance(TIMEOUT)
        fails(handle)
        gate.open()
        assert eventually(lambda: raised) == ["TaskCancelled"]
        assert handle.task().checkpoints is None

    def test_one_that_ends_within_its_grace_is_not(self, make, clock, gate):
        queue = make()
        handle = queue.submit("hang")
        gate.wait_for()
        clock.advance(TIMEOUT)
        services_of(queue).alarms.ring()
        gate.open()
        assert handle.result(PATIENCE) == "run 1"
        clock.advance(GRACE)
        services_of(queue).alarms.ring()
        assert (handle.task().stuck_on, pool_of(queue).stuck.runs) == ("", {})

    def test_one_that_was_cancelled_is_not(self, make, clock, gate):
        """Its thread is left alone until it ends."""
        queue = make()
        handle = queue.submit("hang")
        gate.wait_for()
        assert handle.cancel() is False
        clock.advance(TIMEOUT + GRACE)
        services_of(queue).alarms.ring()
        eventually(lambda: not any(t.name == "taskx-stuck" for t in threading.enumerate()))
        assert handle.task().status is TaskStatus.RUNNING
        gate.open()
        handle.result(PATIENCE)

    @pytest.mark.every_store
    def test_cancelled_after_its_time_out_it_is_cancelled(self, make, clock, gate):
        """And, let run again, barred all the same."""
        queue = make()
        handle = queue.submit("hang", id="x", max_attempts=2)
        gate.wait_for()
        clock.advance(TIMEOUT)
        assert queue.tokens[0].reason == "timeout"
        queue.cancel_task("x")
        clock.advance(GRACE)
        eventually(lambda: handle.task().status is TaskStatus.CANCELLED)
        queue.requeue("x")
        assert not queue.repository.ready(["hang"], 9)
        gate.open()
        assert queue.handle("x").result(PATIENCE) == "run 2"

    def test_while_the_repository_is_away_it_is_given_up_later(self, make, clock, gate):
        queue = make()
        handle = queue.submit("hang")
        gate.wait_for()
        queue.repository.down = True
        clock.advance(TIMEOUT + GRACE)
        eventually(lambda: pool_of(queue).stuck.runs)
        gate.open()
        eventually(lambda: pool_of(queue).stuck.ended)
        queue.repository.down = False
        assert "still runs" in fails(handle).error
        eventually(lambda: not handle.task().stuck_on)

    def test_the_thread_that_submits_may_be_stuck(self, make, clock, gate):
        """No worker is short of a thread then."""
        queue = make(buffer_size=1, overflow="caller_runs")
        hold = threading.Event()
        queue.executor("hold")(lambda: hold.wait(PATIENCE))
        queue.submit("hold")
        eventually(lambda: queue.running == 1)
        waits = queue.submit("hold")
        submit = run_in_thread(lambda: queue.submit("hang", {"name": "x"}, id="x"))
        gate.wait_for()
        clock.advance(TIMEOUT + GRACE)
        fails(queue.handle("x"))
        assert (len(pool_of(queue).threads), queue.running) == (1, 1)
        hold.set()
        assert waits.result(PATIENCE)
        assert at_work(queue) == 1
        gate.open()
        assert submit().id == "x"
        assert queue.submit("fine").result(PATIENCE) == "fine"
        assert at_work(queue) == 1

    def test_hooks_are_told(self, make, hang, clock, gate):
        told = []

        class Told(Hook):
            def stuck(self, task):
                told.append(("stuck", task.id, task.stuck_on != ""))

            def retried(self, task, error, delay):
                told.append(("retried", task.id, error))

            def finished(self, task):
                told.append(("finished", task.id, task.status.value))

        queue = make(hooks=[Told()])
        hang(queue, "a", max_attempts=2)
        eventually(lambda: len(told) == 2)
        hang(queue, "b")
        eventually(lambda: len(told) == 4)
        assert told == [
            ("stuck", "a", True),
            ("retried", "a", "timed out after 60 s; its thread still runs"),
            ("stuck", "b", True),
            ("finished", "b", "failed"),
        ]

    def test_a_policy_that_takes_its_time_holds_up_no_other_task(self, make, hang, clock, gate):
        queue, asked, answer = make(), threading.Event(), threading.Event()

        def backoff(attempt):
            asked.set()
            assert answer.wait(PATIENCE)
            return 3600.0

        policy = RetryPolicy(2, backoff=backoff, jitter=0)
        queue.executor("slowly", timeout=TIMEOUT, grace=GRACE, retry=policy)(gate)
        handle = queue.submit("slowly")
        gate.wait_for()
        clock.advance(TIMEOUT + GRACE)
        assert asked.wait(PATIENCE)
        assert hang(queue, "other").task().status is TaskStatus.FAILED
        answer.set()
        eventually(lambda: handle.task().status is TaskStatus.PENDING)

    @pytest.mark.parametrize("collects", [True, False])
    def test_no_garbage_is_collected_while_the_threads_are_looked_at(self, monkeypatch, collects):
        """It could have the whole process stand still; what the program wants of it is kept."""
        seen = []

        def frames(real=sys._current_frames):
            seen.append(gc.isenabled())
            return real()

        monkeypatch.setattr(sys, "_current_frames", frames)
        (gc.enable if collects else gc.disable)()
        try:
            assert "in test_no_garbage_is_collected" in stack_of(threading.get_ident())
            assert (seen, gc.isenabled()) == ([False], collects)
        finally:
            gc.enable()

    def test_one_in_a_child_process_has_longer(self, make):
        """Its process is killed, and its thread is free: only what is wrapped around it may hang."""
        queue = make()
        in_thread, in_process = (
            pool_of(queue).stuck.watch(with_options(isolation=isolation), "worker")[0]
            for isolation in (None, "process")
        )
        assert in_thread == DEFAULT_GRACE < in_process - 5


def with_options(**options):
    """What is looked at of a run."""
    return SimpleNamespace(executor=SimpleNamespace(options=Options(**options)))


# Not again


@pytest.mark.every_store
class TestBarred:
    def test_a_retry_starts_when_the_thread_has_ended(self, make, hang, make_queue, gate):
        queue = make()
        handle = hang(queue, max_attempts=2)
        task = handle.task()
        assert (task.status, task.errors, task.owner) == (TaskStatus.PENDING, 1, "")
        assert task.attempts[0].outcome == "retried"
        other = make_queue()
        other.executor("hang")(lambda name: "elsewhere")
        other.executor("here")(lambda: "here")  # which the first one cannot take
        other.start()
        assert other.submit("here").result(PATIENCE) == "here"
        services_of(other).agenda.fetch_soon()
        for _ in range(3):
            housekeeper_of(other).recovery.recover()
            whole_round(other)
        assert queue.submit("fine").result(PATIENCE) == "fine"
        assert handle.task().starts == 1
        gate.open()
        assert handle.result(PATIENCE) in ("run 2", "elsewhere")
        assert (handle.task().starts, handle.task().stuck_on) == (2, "")

    def test_a_retry_goes_on_waiting_for_its_time(self, make, hang, clock, gate):
        queue = make()
        policy = RetryPolicy(2, backoff="fixed", base=3600, jitter=0)
        handle = hang(queue, retry=policy)
        run_at = handle.task().run_at
        gate.open()
        eventually(lambda: not handle.task().stuck_on)
        assert (handle.task().status, handle.task().run_at) == (TaskStatus.PENDING, run_at)
        assert earliest_due(queue.repository) is not None
        clock.advance(3600)
        assert handle.result(PATIENCE) == "run 2"

    def test_a_retry_whose_time_has_come_waits_for_the_thread(self, make, hang, clock, gate):
        queue = make()
        handle = hang(queue, retry=RetryPolicy(2, backoff="fixed", base=10, jitter=0))
        clock.advance(60)
        assert queue.submit("fine").result(PATIENCE) == "fine"
        assert handle.task().starts == 1
        gate.open()
        assert handle.result(PATIENCE) == "run 2"

    @pytest.mark.parametrize(
        "again",
        [
            lambda queue: queue.requeue("x"),
            lambda queue: queue.requeue_dead_letters(),
            lambda queue: queue.repository.update_status("x", TaskStatus.PENDING),
        ],
    )
    def test_a_requeue_waits_for_the_thread(self, make, hang, gate, again):
        queue = make()
        fails(hang(queue))
        again(queue)
        services_of(queue).agenda.fetch_soon()
        assert queue.submit("fine").result(PATIENCE) == "fine"
        task = queue.get_task_status("x")
        assert (task.status, task.starts) == (TaskStatus.PENDING, 1)
        gate.open()
        assert queue.handle("x").result(PATIENCE) == "run 2"

    def test_written_by_hand_it_waits_too(self, make, hang, gate):
        queue = make()
        task = hang(queue, max_attempts=2).task()
        queue.repository.update(task)
        failed = hang(queue, "y").task()
        failed.status = TaskStatus.PENDING
        queue.repository.update(failed)
        services_of(queue).agenda.fetch_soon()
        assert queue.submit("fine").result(PATIENCE) == "fine"
        assert queue.begun == ["x", "y"]
        gate.open()
        assert queue.handle("x").result(PATIENCE) == "run 2"
        assert queue.handle("y").result(PATIENCE) == "run 2"

    def test_when_its_parents_have_ended_it_waits_for_the_thread(self, make, hang, gate):
        queue = make(worker_num=2)
        queue.executor("parent")(lambda: None)
        queue.submit("parent", id="parent").result(PATIENCE)
        fails(hang(queue, depends_on=["parent"]))
        queue.pause("parent")
        queue.repository.delete("parent")
        parent = queue.submit("parent", id="parent")
        queue.requeue("x")
        queue.resume("parent")
        parent.result(PATIENCE)
        services_of(queue).dependents.scan_some()
        assert queue.submit("fine").result(PATIENCE) == "fine"
        assert queue.get_task_status("x").starts == 1
        gate.open()
        assert queue.handle("x").result(PATIENCE) == "run 2"

    def test_the_next_in_its_line_waits_for_the_thread(self, make, hang, gate):
        queue = make()
        fails(hang(queue, concurrency_key="k"))
        queue.submit("hang", {"name": "next"}, id="next", concurrency_key="k")
        services_of(queue).turns.scan_some()
        assert queue.submit("fine").result(PATIENCE) == "fine"
        assert queue.get_task_status("next").starts == 0
        gate.open()
        assert queue.handle("next").result(PATIENCE) == "run 1"

    @pytest.mark.every_store
    @pytest.mark.parametrize("how", ["delete", "of the repository", "discard", "prune"])
    def test_a_task_with_a_stuck_thread_keeps_its_record_and_its_turn(
        self, make, hang, gate, clock, how
    ):
        queue = make()
        fails(hang(queue, concurrency_key="k"))
        queue.submit("hang", {"name": "next"}, id="next", concurrency_key="k")
        old = queue.submit("hang", {"name": "old"}, id="old", delay=3600)
        old.cancel()
        clock.advance(1)
        after = to_datetime(clock.now_ms())
        remove = {
            "delete": lambda: queue.delete("x"),
            "of the repository": lambda: queue.repository.delete("x"),
            "discard": queue.discard_dead_letters,
            "prune": lambda: queue.prune(after),
        }[how]
        if how in ("discard", "prune"):
            assert remove() == (how == "prune")  # of the old one
        else:
            with pytest.raises(
                InvalidTransition, match="task x cannot be deleted: a thread of an ended attempt"
            ):
                remove()
        services_of(queue).turns.scan_some()
        assert queue.submit("fine").result(PATIENCE) == "fine"
        assert queue.get_task_status("next").starts == 0
        gate.open()
        assert queue.handle("next").result(PATIENCE) == "run 1"
        remove()
        with pytest.raises(TaskNotFound):
            queue.get_task_status("x")

    @pytest.mark.every_store
    def test_retention_passes_over_a_task_with_a_stuck_thread(self, make, hang, clock, repository):
        """Else as many of them as are looked for at once would hide all others."""
        queue = make()
        fails(hang(queue))
        clock.advance(1)
        assert repository.ended("failed", clock.now_ms(), 100) == []

    def test_requeued_behind_its_parent_it_leaves_its_turn_to_those_before_it(
        self, make, hang, gate
    ):
        queue = make(worker_num=2)
        bad = [True]
        queue.executor("parent")(lambda: 1 / 0 if bad.pop() else None)
        slow = queue.submit("fine", delay=3600)
        parent = queue.submit("parent", id="parent")
        earlier = queue.submit("fine", depends_on=[slow], concurrency_key="k")
        fails(parent)
        fails(hang(queue, depends_on=["parent"], on_parent_failure="run", concurrency_key="k"))
        queue.pause("parent")
        bad.append(False)
        assert queue.requeue_dead_letters() == 2
        gate.open()
        eventually(lambda: not queue.get_task_status("x").stuck_on)
        queue._clock.advance(3600)
        assert earlier.result(PATIENCE) == "fine"
        queue.resume("parent")
        assert queue.handle("x").result(PATIENCE) == "run 2"

    @pytest.mark.parametrize("many", [True, False])
    def test_cancelled_it_leaves_its_turn_when_its_thread_has_ended(self, make, hang, gate, many):
        queue = make()
        handle = hang(queue, concurrency_key="k", max_attempts=2)
        queue.submit("hang", {"name": "next"}, id="next", concurrency_key="k")
        if many:
            assert queue.cancel_many(["x"]) == 1
        else:
            assert handle.cancel()
        services_of(queue).turns.scan_some()
        assert queue.submit("fine").result(PATIENCE) == "fine"
        assert (handle.cancelled(), queue.get_task_status("next").starts) == (True, 0)
        gate.open()
        assert queue.handle("next").result(PATIENCE) == "run 1"

    def test_its_line_goes_on_with_its_retry(self, make, hang, gate):
        queue = make()
        handle = hang(queue, concurrency_key="k", max_attempts=2)
        queue.submit("hang", {"name": "next"}, id="next", concurrency_key="k")
        gate.open()
        assert handle.result(PATIENCE) == "run 2"
        assert queue.handle("next").result(PATIENCE) == "run 1"
        assert queue.begun == ["x", "x", "next"]

    def test_it_counts_for_the_limit_of_its_type(self, make, hang, gate):
        queue = make()
        begun = []
        queue.register_executor(
            executor("only", timeout=TIMEOUT, grace=GRACE, max_concurrency=1)(
                lambda name: begun.append(name) or (gate() if name == "x" else name)
            )
        )
        first = queue.submit("only", {"name": "x"})
        gate.wait_for()
        queue._clock.advance(TIMEOUT + GRACE)
        fails(first)
        second = queue.submit("only", {"name": "y"})
        assert queue.submit("fine").result(PATIENCE) == "fine"
        pool_of(queue).fetcher.refill()
        assert (begun, second.task().status) == (["x"], TaskStatus.PENDING)
        gate.open()
        assert second.result(PATIENCE) == "y"

    def test_it_has_left_its_place_before_its_retry_may_take_one(
        self, make, hang, gate, monkeypatch
    ):
        queue = make()
        begun, pool = [], pool_of(queue)

        @queue.executor("only", timeout=TIMEOUT, grace=GRACE, max_concurrency=1, max_attempts=2)
        def only():
            begun.append(1)
            return gate() if len(begun) == 1 else "again"

        handle = queue.submit("only")
        gate.wait_for()
        queue._clock.advance(TIMEOUT + GRACE)
        eventually(lambda: pool.stuck.runs)
        admitted, ended = [], pool.stuck.thread_ended
        monkeypatch.setattr(
            pool.stuck,
            "thread_ended",
            lambda run: (admitted.append(dict(pool.admission.admitted)), ended(run)),
        )
        gate.open()
        assert handle.result(PATIENCE) == "again"
        assert admitted == [{}]

    @pytest.mark.usefixtures("frequent_looks")
    def test_a_look_that_was_cut_short_is_made_up_for(self, make, hang, gate, monkeypatch):
        queue = make()
        handle = hang(queue, max_attempts=2)
        stuck = pool_of(queue).stuck
        monkeypatch.setattr(stuck, "lift", stuck.ended.clear)
        gate.open()
        eventually(lambda: not stuck.runs)
        assert handle.result(PATIENCE) == "run 2"

    def test_also_where_the_repository_has_eight_methods(self, make, hang, gate):
        queue = make(TinyRepository())
        fails(hang(queue))
        queue.requeue("x")
        assert queue.submit("fine").result(PATIENCE) == "fine"
        assert queue.get_task_status("x").starts == 1
        gate.open()
        assert queue.handle("x").result(PATIENCE) == "run 2"
        assert queue.drain(PATIENCE)
        assert owners(queue.repository) == []


# Replaced


class TestReplaced:
    def test_another_thread_takes_its_place(self, make, hang, gate):
        queue = make()
        for name in "abc":
            hang(queue, name)
            assert queue.submit("fine").result(PATIENCE) == "fine"
        assert (at_work(queue), queue.healthy, queue.running) == (4, True, 0)
        gate.open()
        eventually(lambda: at_work(queue) == 1)
        assert len(pool_of(queue).threads) == 1  # a later thread may have the ident of one of them
        assert queue.submit("fine").result(PATIENCE) == "fine"

    def test_no_more_than_max_stuck(self, make, hang, gate, caplog):
        queue = make(worker_num=2, max_stuck=1)
        hang(queue, "a")
        assert queue.healthy
        assert not [r for r in caplog.records if "more than max_stuck" in r.getMessage()]
        hang(queue, "b")
        eventually(lambda: not queue.healthy)
        [told] = eventually(
            lambda: [r for r in caplog.records if "more than max_stuck=1" in r.getMessage()]
        )
        assert told.levelno == logging.ERROR
        assert at_work(queue) == 3  # two of them stuck
        assert queue.submit("fine").result(PATIENCE) == "fine"
        gate.open()
        eventually(lambda: at_work(queue) == 2)
        assert queue.healthy
        assert queue.submit("fine").result(PATIENCE) == "fine"

    def test_with_none_to_be_replaced_work_waits(self, make, hang, gate):
        queue = make(max_stuck=0)
        hang(queue)
        waits = queue.submit("fine")
        assert not queue.healthy
        assert at_work(queue) == 1
        gate.open()
        assert waits.result(PATIENCE) == "fine"
        assert at_work(queue) == 1

    def test_one_that_was_not_started_or_has_none_is_healthy(self, make):
        assert Queue(MemoryRepository()).healthy
        assert make().healthy

    def test_max_stuck_is_checked(self):
        for wrong in (-1, 1.5, "1"):
            with pytest.raises(ConfigurationError, match="max_stuck"):
                Config(max_stuck=wrong)

    def test_where_no_thread_can_be_had_it_is_said(self, make, hang, gate, caplog, monkeypatch):
        queue = make()
        pool = pool_of(queue)
        worker = pool._worker

        def unstartable(number):
            thread = worker(number)

            def start():
                raise RuntimeError("can't start new thread")

            thread.start = start
            return thread

        monkeypatch.setattr(pool, "_worker", unstartable)
        hang(queue)
        eventually(lambda: "cannot start a replacement worker thread" in caplog.text)
        gate.open()
        assert queue.submit("fine").result(PATIENCE) == "fine"
        assert at_work(queue) == 1

    def test_a_suspect_that_is_stuck_lets_the_next_one_through(self, make, hang, gate):
        queue = make(worker_num=2)
        suspects = pool_of(queue).starter.suspects

        queue.pause("hang")
        queue.submit("hang", {"name": "x"}, id="x", max_crashes=5)
        assert list(queue.repository.apply([Update("x", {}, {"crashes": 1})])) == [True]
        queue.resume("hang")
        gate.wait_for()
        assert not suspects.admit(None)
        suspects.waiting.clear()
        queue._clock.advance(TIMEOUT + GRACE)
        eventually(lambda: queue.get_task_status("x").status is TaskStatus.FAILED)
        assert eventually(lambda: suspects.admit(None) or suspects.waiting.clear())


# Stopping


class TestStop:
    def test_it_is_named_among_what_still_runs(self, make, hang, gate, repository):
        queue = make()
        node = node_of(queue).record.id
        hang(queue, max_attempts=2)
        assert queue.stop(timeout=0.2) == ["x"]
        assert [known.id for known in repository.liveness.nodes()] == [node]
        assert repository.get_by_id("x").stuck_on == node
        gate.open()
        eventually(lambda: not repository.liveness.nodes())
        task = repository.get_by_id("x")
        assert (task.status, task.stuck_on, task.starts) == (TaskStatus.PENDING, "", 1)
        assert [stub.id for stub in repository.ready(["hang"], 9)] == ["x"]

    @pytest.mark.every_store
    def test_the_node_stays_until_a_thread_that_submits_has_ended(self, make, clock, gate):
        queue = make(buffer_size=1, overflow="caller_runs")
        hold = threading.Event()
        queue.executor("hold")(lambda: hold.wait(PATIENCE))
        held = []
        for count in (1, 2):  # one runs, one is in the buffer
            held.append(queue.submit("hold"))
            eventually(lambda: queue.running == 1)
            assert queue.buffered == count - 1
        submit = run_in_thread(lambda: queue.submit("hang", {"name": "x"}, id="x"))
        gate.wait_for()
        clock.advance(TIMEOUT + GRACE)
        fails(queue.handle("x"))
        hold.set()
        assert [handle.result(PATIENCE) for handle in held] == [True, True]
        eventually(lambda: not pool_of(queue).runs)
        assert queue.stop(timeout=0.5) == ["x"]
        [node] = queue.repository.liveness.nodes()
        assert queue.repository.get_by_id("x").stuck_on == node.id
        gate.open()
        submit()
        eventually(lambda: not queue.repository.liveness.nodes())
        assert queue.repository.get_by_id("x").stuck_on == ""

    def test_drain_does_not_wait_for_it(self, make, hang):
        queue = make()
        hang(queue, max_attempts=2)
        assert queue.drain(PATIENCE)


# Processes

PROGRAM = """
import datetime, os, signal, sys, threading
from taskx import Config, Queue, SQLiteRepository
from taskx.testing import ManualClock

clock = ManualClock(datetime.datetime.now(datetime.timezone.utc))
queue = Queue(SQLiteRepository(sys.argv[1]), Config(worker_num=2), clock=clock)
began, released = threading.Event(), threading.Event()

@queue.executor("hang", timeout=60, grace=60, max_attempts=2)
def hang():
    began.set()
    released.wait()
    return "never seen"

queue.start()
handle = queue.submit("hang", id="x")
began.wait()  # else the other process might take it
clock.advance(120)
print(handle.id, flush=True)
while True:
    if sys.stdin.readline() == "":
        signal.pause()
    released.set()
"""


@pytest.fixture
def barred(spawn, database):
    """A process on which a task is stuck, and a queue of this one that would run it."""
    program = spawn(PROGRAM, database)
    assert program.read() == "x"
    with SQLiteRepository(database) as repository, Queue(repository) as survivor:
        survivor.executor("hang")(lambda: "elsewhere")
        eventually(lambda: survivor.get_task_status("x").stuck_on)
        survivor.program = program
        yield survivor


class TestProcesses:
    def test_while_it_lives_it_starts_nowhere(self, barred):
        for _ in range(3):
            housekeeper_of(barred).recovery.recover()
        assert barred.get_task_status("x").starts == 1
        barred.executor("here")(lambda: "here")  # which the other process cannot take
        assert barred.submit("here").result(PATIENCE) == "here"
        barred.program.tell()
        assert barred.handle("x").result(PATIENCE) in ("elsewhere", "never seen")
        task = barred.get_task_status("x")
        assert (task.starts, task.crashes) == (2, 0)

    def test_killed_its_retry_starts_on_another_at_once(self, barred):
        barred.program.kill()
        began = time.monotonic()
        assert barred.handle("x").result(PATIENCE) == "elsewhere"
        assert time.monotonic() - began < 15
        task = barred.get_task_status("x")
        assert (task.starts, task.crashes, task.errors, task.stuck_on) == (2, 0, 1, "")
        eventually(lambda: len(barred.repository.liveness.nodes()) == 1)

    def test_a_requeue_from_elsewhere_waits_too(self, spawn, database):
        program = spawn(PROGRAM.replace("max_attempts=2", "max_attempts=1"), database)
        assert program.read() == "x"
        with SQLiteRepository(database) as repository, Queue(repository) as survivor:
            survivor.executor("hang")(lambda: "elsewhere")
            eventually(lambda: survivor.get_task_status("x").status is TaskStatus.FAILED)
            survivor.requeue("x")
            survivor.executor("here")(lambda: "here")  # which the other process cannot take
            assert survivor.submit("here").result(PATIENCE) == "here"
            assert survivor.get_task_status("x").starts == 1
            program.kill()
            assert survivor.handle("x").result(PATIENCE) == "elsewhere"
