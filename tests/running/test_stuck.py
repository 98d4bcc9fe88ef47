"""Stuck executors, which ignore their time-out: abandoned, barred from starting again, replaced."""

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
    SOON,
    earliest_due,
    eventually,
    frequent_checks,
    housekeeper_of,
    node_of,
    parts_of,
    pool_of,
    run_in_thread,
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
from taskx.node.stuck import stack_of
from taskx.stores.queries import owners
from taskx.tasks.clock import to_datetime
from taskx.tasks.options import DEFAULT_GRACE, Options
from taskx.tasks.writes import Update

# Tests count the starts of tasks, so a slow machine must hand no started task back.
pytestmark = pytest.mark.usefixtures("calm")

TIMEOUT, GRACE = 60.0, 5.0


@pytest.fixture
def make(make_queue, clock, gate):
    """Return a function that makes a started queue.

    The first run of each task of its executor ``hang`` waits at the gate and ignores its token.
    """

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
    """Return a function that has a task hang until it is stuck, and returns its handle."""

    def hang(queue, name="x", until=None, **options):
        handle = queue.submit("hang", {"name": name}, id=name, **options)
        gate.wait_for()
        clock.advance(TIMEOUT + GRACE)
        eventually(lambda: handle.task().status != TaskStatus.RUNNING)
        # The run is forgotten after the commit; until then, handles do not read how the task has ended.
        eventually(lambda: handle.id not in pool_of(queue).runs)
        return handle

    return hang


def time_outs_checked(queue):
    """Wait until the thread for time-outs has looked at the clock, at all tasks, from now on."""
    alarms, looked = parts_of(queue).runner.alarms, threading.Event()
    ring = alarms.ring

    def watched():
        nearest = ring()
        looked.set()
        return nearest

    alarms.ring = watched
    assert looked.wait(PATIENCE)
    del alarms.ring


def fails(handle):
    with pytest.raises(TaskFailed) as failed:
        handle.result(PATIENCE)
    return failed.value


def at_work(queue):
    return sum(thread.is_alive() for thread in pool_of(queue).threads)


# Abandoned attempts


class TestAbandoned:
    def test_an_attempt_is_abandoned_when_its_grace_period_is_over(self, make, clock, gate):
        queue = make()
        handle = queue.submit("hang")
        gate.wait_for()
        clock.advance(TIMEOUT)
        time_outs_checked(queue)
        assert queue.tokens[0].reason == "timeout"
        clock.advance(GRACE - 0.1)
        time_outs_checked(queue)
        assert handle.task().status is TaskStatus.RUNNING
        clock.advance(0.1)
        assert fails(handle).error == "timed out after 60 s; its thread still runs"

    def test_the_record_has_the_stack_of_the_stuck_thread(self, make, hang):
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

    def test_a_late_result_is_dropped(self, make, hang, gate, caplog):
        queue = make()
        handle = hang(queue)
        gate.open()
        eventually(lambda: not queue.get_task_status("x").stuck_on)
        task = handle.task()
        assert (task.status, task.result, task.progress) == (TaskStatus.FAILED, None, 0)
        eventually(lambda: "its thread has ended now; its late outcome is dropped" in caplog.text)
        eventually(lambda: not pool_of(queue).runs)  # it is forgotten after the commit

    def test_a_stop_says_that_what_a_stuck_thread_returns_is_dropped(
        self, make, hang, gate, caplog
    ):
        """Its task has failed for good: nobody hands it back."""
        queue = make(worker_num=2)
        hang(queue)
        running = queue.submit("hang", {"name": "y"}, id="y")
        gate.wait_for()
        assert set(queue.stop(timeout=0.5)) == {"x", "y"}
        said = "stopped with 1 task(s) still"
        assert f"{said} in a thread that is stuck; what that returns is dropped: x" in caplog.text
        assert f"{said} running; they are handed back when they end: {running.id}" in caplog.text

    def test_a_stuck_thread_cannot_store_checkpoints(self, make_queue, clock, gate):
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

    def test_an_attempt_that_ends_within_its_grace_period_completes(self, make, clock, gate):
        queue = make()
        handle = queue.submit("hang")
        gate.wait_for()
        clock.advance(TIMEOUT)
        time_outs_checked(queue)
        gate.open()
        assert handle.result(PATIENCE) == "run 1"
        clock.advance(GRACE)
        parts_of(queue).runner.alarms.ring()
        assert (handle.task().stuck_on, pool_of(queue).stuck.runs) == ("", {})

    def test_a_cancelled_attempt_is_not_abandoned(self, make, clock, gate):
        """The task stays running until its thread ends."""
        queue = make()
        handle = queue.submit("hang")
        gate.wait_for()
        assert handle.cancel() is False
        clock.advance(TIMEOUT + GRACE)
        time_outs_checked(queue)
        eventually(lambda: not any(t.name == "taskx-stuck" for t in threading.enumerate()))
        assert handle.task().status is TaskStatus.RUNNING
        gate.open()
        handle.result(PATIENCE)

    def test_an_attempt_cancelled_after_its_time_out_is_cancelled(self, make, clock, gate):
        """After a requeue it still waits for its thread."""
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

    def test_an_outcome_is_written_later_if_the_repository_is_down(self, make, clock, gate):
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

    def test_the_thread_of_a_submitter_can_be_stuck(self, make, clock, gate):
        """The worker threads stay as many as before."""
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
        eventually(lambda: (len(pool_of(queue).threads), queue.running) == (1, 1))
        hold.set()
        assert waits.result(PATIENCE)
        assert at_work(queue) == 1
        gate.open()
        assert submit().id == "x"
        assert queue.submit("fine").result(PATIENCE) == "fine"
        assert at_work(queue) == 1

    def test_hooks_hear_of_stuck_tasks(self, make, hang, clock, gate):
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

    def test_a_slow_retry_policy_holds_up_no_other_task(self, make, hang, clock, gate):
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
    def test_no_garbage_is_collected_while_stacks_are_read(self, monkeypatch, collects):
        """A collection could block the whole process. Afterwards it is on or off as before."""
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

    def test_a_run_in_a_child_process_has_a_longer_grace_period(self, make):
        """The child is killed, which frees the thread: only code around the child can hang."""
        queue = make()
        in_thread, in_process = (
            pool_of(queue).stuck.watch(with_options(isolation=isolation), "worker")[0]
            for isolation in (None, "process")
        )
        assert in_thread == DEFAULT_GRACE < in_process - 5


def with_options(**options):
    """Make the part of a run that ``watch`` reads."""
    return SimpleNamespace(executor=SimpleNamespace(options=Options(**options)))


# Barred from starting again


class TestBarred:
    def test_a_retry_starts_when_the_stuck_thread_has_ended(self, make, hang, make_queue, gate):
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
        parts_of(other).agenda.fetch_soon()
        for _ in range(3):
            housekeeper_of(other).recovery.recover()
            whole_round(other)
        assert queue.submit("fine").result(PATIENCE) == "fine"
        assert handle.task().starts == 1
        gate.open()
        assert handle.result(PATIENCE) in ("run 2", "elsewhere")
        assert (handle.task().starts, handle.task().stuck_on) == (2, "")

    def test_a_retry_also_waits_for_its_back_off(self, make, hang, clock, gate):
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

    @pytest.mark.parametrize(
        ("delay", "words"),
        [
            (0, "is retried when its stuck thread ends after attempt 1: "),
            (7, "is retried when its stuck thread ends, in 7 s at the earliest, after attempt 1: "),
        ],
    )
    def test_the_log_says_that_a_retry_waits_for_the_stuck_thread(
        self, make, hang, caplog, delay, words
    ):
        policy = RetryPolicy(2, backoff="fixed", base=delay, jitter=0)
        handle = hang(make(), retry=policy)
        eventually(lambda: f"task {handle.id} (hang) {words}timed out" in caplog.text)

    def test_a_due_retry_waits_for_the_stuck_thread(self, make, hang, clock, gate):
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
    def test_a_requeued_task_waits_for_the_stuck_thread(self, make, hang, gate, again):
        queue = make()
        fails(hang(queue))
        again(queue)
        parts_of(queue).agenda.fetch_soon()
        assert queue.submit("fine").result(PATIENCE) == "fine"
        task = queue.get_task_status("x")
        assert (task.status, task.starts) == (TaskStatus.PENDING, 1)
        gate.open()
        assert queue.handle("x").result(PATIENCE) == "run 2"

    def test_a_record_updated_by_hand_waits_for_the_stuck_thread(self, make, hang, gate):
        queue = make()
        task = hang(queue, max_attempts=2).task()
        queue.repository.update(task)
        failed = hang(queue, "y").task()
        failed.status = TaskStatus.PENDING
        queue.repository.update(failed)
        parts_of(queue).agenda.fetch_soon()
        assert queue.submit("fine").result(PATIENCE) == "fine"
        assert queue.begun == ["x", "y"]
        gate.open()
        assert queue.handle("x").result(PATIENCE) == "run 2"
        assert queue.handle("y").result(PATIENCE) == "run 2"

    def test_a_task_whose_parents_have_ended_waits_for_its_stuck_thread(self, make, hang, gate):
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
        parts_of(queue).moves.dependents.scan_some()
        assert queue.submit("fine").result(PATIENCE) == "fine"
        assert queue.get_task_status("x").starts == 1
        gate.open()
        assert queue.handle("x").result(PATIENCE) == "run 2"

    def test_the_next_task_of_its_concurrency_key_waits_for_the_stuck_thread(
        self, make, hang, gate
    ):
        queue = make()
        fails(hang(queue, concurrency_key="k"))
        queue.submit("hang", {"name": "next"}, id="next", concurrency_key="k")
        parts_of(queue).moves.turns.scan_some()
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
        parts_of(queue).moves.turns.scan_some()
        assert queue.submit("fine").result(PATIENCE) == "fine"
        assert queue.get_task_status("next").starts == 0
        gate.open()
        assert queue.handle("next").result(PATIENCE) == "run 1"
        remove()
        with pytest.raises(TaskNotFound):
            queue.get_task_status("x")

    def test_retention_passes_over_a_task_with_a_stuck_thread(self, make, hang, clock, repository):
        """Otherwise a batch full of such tasks would hide all others."""
        queue = make()
        fails(hang(queue))
        clock.advance(1)
        assert repository.ended("failed", clock.now_ms(), 100) == []

    @pytest.mark.every_store
    def test_a_task_requeued_behind_its_parent_leaves_its_turn_to_earlier_tasks(
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
        queue.clock.advance(3600)
        assert earlier.result(PATIENCE) == "fine"
        queue.resume("parent")
        assert queue.handle("x").result(PATIENCE) == "run 2"

    @pytest.mark.parametrize("many", [True, False])
    def test_a_cancelled_task_leaves_its_turn_when_its_thread_has_ended(
        self, make, hang, gate, many
    ):
        queue = make()
        handle = hang(queue, concurrency_key="k", max_attempts=2)
        queue.submit("hang", {"name": "next"}, id="next", concurrency_key="k")
        if many:
            assert queue.cancel_many(["x"]) == 1
        else:
            assert handle.cancel()
        parts_of(queue).moves.turns.scan_some()
        assert queue.submit("fine").result(PATIENCE) == "fine"
        assert (handle.cancelled(), queue.get_task_status("next").starts) == (True, 0)
        gate.open()
        assert queue.handle("next").result(PATIENCE) == "run 1"

    def test_a_retry_keeps_its_place_in_the_queue_of_its_key(self, make, hang, gate):
        queue = make()
        handle = hang(queue, concurrency_key="k", max_attempts=2)
        queue.submit("hang", {"name": "next"}, id="next", concurrency_key="k")
        gate.open()
        assert handle.result(PATIENCE) == "run 2"
        assert queue.handle("next").result(PATIENCE) == "run 1"
        assert queue.begun == ["x", "x", "next"]

    def test_a_stuck_task_counts_towards_the_limit_of_its_type(self, make, hang, gate):
        queue = make()
        begun = []
        queue.register_executor(
            executor("only", timeout=TIMEOUT, grace=GRACE, max_concurrency=1)(
                lambda name: begun.append(name) or (gate() if name == "x" else name)
            )
        )
        first = queue.submit("only", {"name": "x"})
        gate.wait_for()
        queue.clock.advance(TIMEOUT + GRACE)
        fails(first)
        second = queue.submit("only", {"name": "y"})
        assert queue.submit("fine").result(PATIENCE) == "fine"
        pool_of(queue).fetcher.refill()
        assert (begun, second.task().status) == (["x"], TaskStatus.PENDING)
        gate.open()
        assert second.result(PATIENCE) == "y"

    def test_a_stuck_task_frees_its_slot_before_its_retry_takes_one(
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
        queue.clock.advance(TIMEOUT + GRACE)
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

    @pytest.mark.every_store
    @frequent_checks
    def test_the_audit_lets_a_task_start_if_lifting_was_interrupted(
        self, make, hang, gate, monkeypatch
    ):
        class Lost(list):
            def append(self, run):
                pass

        queue = make()
        handle = hang(queue, max_attempts=2)
        stuck = pool_of(queue).stuck
        monkeypatch.setattr(stuck, "ended", Lost())
        gate.open()
        eventually(lambda: not stuck.runs)
        assert handle.result(PATIENCE) == "run 2"

    def test_a_stuck_task_is_barred_on_a_repository_of_eight_methods(self, make, hang, gate):
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
    def test_a_new_thread_replaces_a_stuck_one(self, make, hang, gate):
        queue = make()
        for name in "abc":
            hang(queue, name)
            assert queue.submit("fine").result(PATIENCE) == "fine"
        eventually(lambda: queue.running == 0)
        assert (at_work(queue), queue.healthy) == (4, True)
        gate.open()
        eventually(lambda: at_work(queue) == 1)
        assert len(pool_of(queue).threads) == 1  # a later thread may get the ident of an ended one
        assert queue.submit("fine").result(PATIENCE) == "fine"

    def test_at_most_max_stuck_threads_are_replaced(self, make, hang, gate, caplog):
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
        # The replacement may end before the stuck threads that have come back have told so.
        eventually(lambda: at_work(queue) == 2 and queue.healthy)
        assert queue.submit("fine").result(PATIENCE) == "fine"

    def test_with_max_stuck_0_tasks_wait_for_the_stuck_thread(self, make, hang, gate):
        queue = make(max_stuck=0)
        hang(queue)
        waits = queue.submit("fine")
        assert not queue.healthy
        assert at_work(queue) == 1
        gate.open()
        assert waits.result(PATIENCE) == "fine"
        assert at_work(queue) == 1

    def test_a_queue_without_stuck_threads_is_healthy(self, make):
        assert Queue(MemoryRepository()).healthy
        assert make().healthy

    def test_max_stuck_is_checked(self):
        for wrong in (-1, 1.5, "1"):
            with pytest.raises(ConfigurationError, match="max_stuck"):
                Config(max_stuck=wrong)

    def test_a_replacement_thread_that_cannot_start_is_logged(
        self, make, hang, gate, caplog, monkeypatch
    ):
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

    def test_a_stuck_suspect_lets_the_next_one_start(self, make, hang, gate):
        queue = make(worker_num=2)
        suspects = pool_of(queue).starter.suspects

        queue.pause("hang")
        queue.submit("hang", {"name": "x"}, id="x", max_crashes=2)
        assert list(queue.repository.apply([Update("x", {}, {"crashes": 1})])) == [True]
        queue.resume("hang")
        gate.wait_for()
        assert suspects.item.id == "x"
        queue.clock.advance(TIMEOUT + GRACE)
        eventually(lambda: queue.get_task_status("x").status is TaskStatus.FAILED)
        assert eventually(lambda: suspects.item is None)


# Stopping


class TestStop:
    def test_stop_names_a_stuck_task_as_still_running(self, make, hang, gate, repository):
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

    def test_the_node_stays_until_a_submitters_stuck_thread_has_ended(self, make, clock, gate):
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

    def test_drain_does_not_wait_for_a_stuck_thread(self, make, hang):
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
    """A process on which a task is stuck, and a queue in this process that could run it."""
    program = spawn(PROGRAM, database)
    assert program.read() == "x"
    with SQLiteRepository(database) as repository, Queue(repository) as survivor:
        survivor.executor("hang")(lambda: "elsewhere")
        eventually(lambda: survivor.get_task_status("x").stuck_on)
        survivor.program = program
        yield survivor


class TestProcesses:
    def test_a_stuck_task_starts_nowhere_while_its_process_lives(self, barred):
        for _ in range(3):
            housekeeper_of(barred).recovery.recover()
        assert barred.get_task_status("x").starts == 1
        barred.executor("here")(lambda: "here")  # which the other process cannot take
        assert barred.submit("here").result(PATIENCE) == "here"
        barred.program.tell()
        assert barred.handle("x").result(PATIENCE) in ("elsewhere", "never seen")
        task = barred.get_task_status("x")
        assert (task.starts, task.crashes) == (2, 0)

    def test_a_retry_starts_elsewhere_at_once_when_its_process_is_killed(self, barred):
        barred.program.kill()
        began = time.monotonic()
        assert barred.handle("x").result(PATIENCE) == "elsewhere"
        assert time.monotonic() - began < SOON
        task = barred.get_task_status("x")
        assert (task.starts, task.crashes, task.errors, task.stuck_on) == (2, 0, 1, "")
        eventually(lambda: len(barred.repository.liveness.nodes()) == 1)

    def test_a_task_requeued_by_another_process_waits_for_the_stuck_thread(self, spawn, database):
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
