"""Checkpoints: an executor stores steps and a cursor, and later attempts do not repeat them."""

from __future__ import annotations

import json
import threading

import pytest
from helpers import PATIENCE, eventually, parts_of, pool_of, run_in_thread
from storage.repositories import TinyRepository

from taskx import (
    CancelReason,
    ConfigurationError,
    Hook,
    PayloadError,
    RepositoryUnavailable,
    Retry,
    Snooze,
    TaskCancelled,
    TaskFailed,
    TaskStatus,
)
from taskx.tasks.writes import Delete, Update


class Work:
    """An executor that counts the calls of its steps. Each attempt ends with the next of ``ends``."""

    def __init__(self, queue, **options):
        self.calls = []
        self.values = []
        self.ends = []
        queue.executor("work", **{"max_attempts": 9, **options})(self.run)

    def do(self, name, value):
        self.calls.append(name)
        return value

    def run(self, ctx):
        first = ctx.step("first", self.do, "first", 1)
        second = ctx.step("second", self.do, name="second", value={"of": [first, None]})
        self.values.append((first, second))
        if self.ends:
            raise self.ends.pop(0)
        return second


@pytest.fixture
def work(queue):
    return Work(queue)


def checkpoints(queue, handle):
    return queue.get_task_status(handle.id).checkpoints


class TestStep:
    @pytest.mark.parametrize(
        "end", [Retry("again"), Retry(delay=0.01), Snooze(0.01), OSError("down")]
    )
    def test_a_step_is_called_once_over_all_attempts(self, queue, work, end):
        work.ends = [end, end]
        queue.start()
        handle = queue.submit("work")
        assert handle.result(PATIENCE) == {"of": [1, None]}
        assert work.calls == ["first", "second"]
        assert work.values == [(1, {"of": [1, None]})] * 3
        assert checkpoints(queue, handle) == {"steps": {"first": 1, "second": {"of": [1, None]}}}

    def test_a_step_is_stored_before_it_returns(self, queue):
        stored = []

        @queue.executor()
        def check(ctx):
            for n in range(3):
                ctx.step(f"step {n}", lambda n=n: n)
                stored.append(queue.get_task_status(ctx.task.id).checkpoints["steps"])

        queue.start()
        queue.submit("check").result(PATIENCE)
        assert stored == [
            {"step 0": 0},
            {"step 0": 0, "step 1": 1},
            {"step 0": 0, "step 1": 1, "step 2": 2},
        ]

    def test_a_step_survives_a_power_cut_but_the_cursor_may_not(self, queue, work, repository):
        """A step is stored durably, like a submit. The cursor is not."""
        queue.executor("move")(lambda ctx: setattr(ctx, "cursor", 5))
        queue.start()
        queue.submit("work").result(PATIENCE)
        queue.submit("move").result(PATIENCE)
        writes = [w for batch in repository.batches for w in batch if isinstance(w, Update)]
        assert [w.durable for w in writes if "checkpoints" in w.changes] == [True, True, False]

    @pytest.mark.parametrize("value", [None, False, 0, "", [], {}, "ä\u2028", 1.5])
    def test_a_step_gives_back_any_json_value(self, queue, value):
        calls, seen = [], []

        @queue.executor(max_attempts=2)
        def once(ctx):
            seen.append(ctx.step("value", lambda: calls.append(1) or value))
            assert ctx.task.attempt == 2

        queue.start()
        queue.submit("once").result(PATIENCE)
        assert seen == [value, value]
        assert calls == [1]

    def test_a_step_gives_the_same_value_in_every_attempt(self, queue):
        seen = []

        @queue.executor(max_attempts=3)
        def once(ctx):
            value = ctx.step("pair", lambda: (1, {"n": [2]}))
            seen.append(json.dumps(value))
            value[1]["n"].append(3)  # changes only this attempt's copy
            ctx.step("other", lambda: None)
            assert ctx.task.attempt == 3

        queue.start()
        queue.submit("once").result(PATIENCE)
        assert seen == ['[1, {"n": [2]}]'] * 3

    def test_a_step_that_raises_is_called_again(self, queue):
        calls = []

        def shaky():
            calls.append(1)
            if len(calls) < 4:
                raise OSError("not yet")
            return len(calls)

        @queue.executor(max_attempts=2)
        def patient(ctx):
            with pytest.raises(OSError, match="not yet"):
                ctx.step("shaky", shaky)
            return ctx.step("shaky", shaky)

        queue.start()
        handle = queue.submit("patient")
        assert handle.result(PATIENCE) == 4
        assert checkpoints(queue, handle) == {"steps": {"shaky": 4}}

    def test_two_steps_of_an_attempt_cannot_have_the_same_name(self, queue):
        """This holds even if the value is already stored by an earlier attempt."""

        @queue.executor(max_attempts=2)
        def twice(ctx):
            ctx.step("same", int)
            with pytest.raises(ConfigurationError, match="'same' was already called"):
                ctx.step("same", int)
            assert ctx.task.attempt == 2

        queue.start()
        queue.submit("twice").result(PATIENCE)

    @pytest.mark.parametrize("name", ["", "x" * 256, "a\0b", None, 5])
    def test_a_step_requires_a_name_that_can_be_stored(self, queue, name):
        @queue.executor()
        def named(ctx):
            ctx.step(name, pytest.fail, "it was called")

        queue.start()
        with pytest.raises(TaskFailed, match="ConfigurationError"):
            queue.submit("named").result(PATIENCE)

    @pytest.mark.parametrize(
        ("value", "path"),
        [
            ({"a": [1, {2}]}, "step 'it'.a[1]"),
            (float("nan"), "step 'it'"),
            ("x" * 2000, "step 'it'"),
        ],
    )
    def test_a_step_result_that_is_not_json_is_refused(self, make_queue, value, path):
        queue = make_queue(max_payload_size=1000)
        seen = []

        @queue.executor()
        def odd(ctx):
            with pytest.raises(PayloadError) as caught:
                ctx.step("it", lambda: value)
            seen.append(caught.value.path)

        queue.start()
        handle = queue.submit("odd")
        handle.result(PATIENCE)
        assert seen == [path]
        assert checkpoints(queue, handle) is None

    @pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
    def test_a_coroutine_function_as_a_step_is_refused_with_the_way_to_call_it(self, queue):
        async def load():
            return 1

        @queue.executor()
        def odd(ctx):
            ctx.step("it", load)

        queue.start()
        with pytest.raises(TaskFailed, match=r"use await, and for a step await ctx\.astep\(…\)"):
            queue.submit("odd").result(PATIENCE)

    def test_the_total_size_of_checkpoints_is_limited(self, make_queue):
        queue = make_queue(max_payload_size=1000)

        @queue.executor()
        def greedy(ctx):
            for n in range(10):
                ctx.step(f"step {n}", lambda: "ä" * 60)

        queue.start()
        handle = queue.submit("greedy")
        with pytest.raises(TaskFailed, match=r"checkpoints: 1,\d+ bytes as JSON, more than"):
            handle.result(PATIENCE)
        assert sorted(checkpoints(queue, handle)["steps"]) == [f"step {n}" for n in range(7)]

    def test_several_threads_can_store_steps(self, queue):

        @queue.executor()
        def wide(ctx):
            go = threading.Barrier(8)

            def part(n):
                go.wait(PATIENCE)
                return [ctx.step(f"{n}.{m}", lambda: n) for m in range(5)]

            return [wait() for wait in [run_in_thread(lambda n=n: part(n)) for n in range(8)]]

        queue.start()
        handle = queue.submit("wide")
        assert handle.result(PATIENCE) == [[n] * 5 for n in range(8)]
        assert checkpoints(queue, handle) == {
            "steps": {f"{n}.{m}": n for n in range(8) for m in range(5)}
        }

    def test_a_step_can_contain_another_step(self, queue):
        queue.executor("outer")(lambda ctx: ctx.step("out", lambda: ctx.step("in", lambda: 1) + 1))
        queue.start()
        handle = queue.submit("outer")
        assert handle.result(PATIENCE) == 2
        assert checkpoints(queue, handle) == {"steps": {"in": 1, "out": 2}}


class TestCancelledRuns:
    def test_no_step_begins_after_the_token_has_fired(self, queue, gate):
        calls = []

        @queue.executor()
        def late(ctx):
            calls.append("first")
            ctx.step("first", gate)
            ctx.step("second", calls.append, "second")

        queue.start()
        handle = queue.submit("late")
        gate.wait_for()
        handle.cancel()
        gate.open()
        eventually(lambda: handle.task().status is TaskStatus.CANCELLED)
        assert calls == ["first"]
        assert checkpoints(queue, handle) == {"steps": {"first": None}}  # the step was completed

    def test_no_step_begins_after_the_deadline_of_ctx_timeout(self, queue):
        calls = []

        @queue.executor()
        def narrow(ctx):
            with pytest.raises(TimeoutError), ctx.timeout(0):
                ctx.step("late", calls.append, 1)
            return ctx.step("after", lambda: "went on")

        queue.start()
        assert queue.submit("narrow").result(PATIENCE) == "went on"
        assert calls == []

    @pytest.mark.parametrize("how", ["step", "cursor"])
    @pytest.mark.parametrize("lost", ["taken over", "deleted"])
    def test_a_run_that_lost_its_task_stores_no_checkpoint(
        self, queue, gate, repository, how, lost
    ):
        reasons = []

        @queue.executor()
        def slow(ctx):
            ctx.step("before", lambda: 1)
            try:
                if how == "step":
                    ctx.step("after", gate)
                else:
                    gate()
                    ctx.cursor = 7
            except TaskCancelled as error:
                reasons.append((error.reason, ctx.token.reason))
                raise

        queue.start()
        handle = queue.submit("slow")
        gate.wait_for()
        task = handle.task()
        if lost == "deleted":
            assert repository.apply([Delete(task.id, {"starts": 1})])[0]
        else:
            later = {"status": "pending", "starts": 2, "owner": "", "held": 1, "run_at": 2**42}
            assert repository.apply([Update(task.id, {"starts": 1}, later)])[0]
        gate.open()
        eventually(lambda: reasons)
        assert queue.drain(PATIENCE)
        assert reasons == [(CancelReason.LEASE_LOST, CancelReason.LEASE_LOST)]
        if lost == "taken over":
            assert checkpoints(queue, handle) == {"steps": {"before": 1}}
            assert (handle.task().status, handle.task().starts) == (TaskStatus.PENDING, 2)

    def test_an_abandoned_thread_stores_no_checkpoint(self, make_queue, clock, gate):
        """Its attempt has ended, and another attempt may be running."""
        queue = make_queue(worker_num=2, clock=clock)
        reasons = []

        @queue.executor(timeout=60, grace=0.0)
        def slow(ctx):
            try:
                ctx.step("late", gate)
            except TaskCancelled as error:
                reasons.append(error.reason)
                raise

        queue.start()
        handle = queue.submit("slow")
        gate.wait_for()
        clock.advance(60)
        with pytest.raises(TaskFailed, match="still runs"):
            handle.result(PATIENCE)
        gate.open()
        eventually(lambda: not handle.task().stuck_on)
        assert reasons == [CancelReason.TIMEOUT]
        assert checkpoints(queue, handle) is None


class TestCursor:
    def test_a_misspelt_one_is_refused(self, queue):
        queue.executor("walk", max_attempts=1)(lambda ctx: setattr(ctx, "curser", 1))
        queue.start()
        with pytest.raises(TaskFailed, match="curser"):
            queue.submit("walk").result(PATIENCE)

    def test_the_next_attempt_continues_at_the_cursor(self, queue):
        done = []

        @queue.executor(max_attempts=9)
        def walk(ctx):
            for n in range(ctx.cursor or 0, 10):
                if n in (3, 7) and done.count("broken") < n // 3:
                    done.append("broken")
                    raise OSError(n)
                done.append(n)
                ctx.cursor = n + 1
            return ctx.cursor

        queue.start()
        handle = queue.submit("walk")
        assert handle.result(PATIENCE) == 10
        assert [n for n in done if n != "broken"] == list(range(10))
        assert checkpoints(queue, handle) == {"cursor": 10}

    def test_the_cursor_is_stored_when_it_is_set(self, queue):
        seen = []

        @queue.executor()
        def check(ctx):
            seen.append(ctx.cursor)
            for value in (1, {"page": "x"}, None, (2,)):
                ctx.cursor = value
                seen.append(queue.get_task_status(ctx.task.id).checkpoints.get("cursor"))
            ctx.step("a", lambda: 1)
            seen.append(ctx.cursor)

        queue.start()
        handle = queue.submit("check")
        handle.result(PATIENCE)
        assert seen == [None, 1, {"page": "x"}, None, [2], [2]]
        assert checkpoints(queue, handle) == {"steps": {"a": 1}, "cursor": [2]}

    def test_a_cursor_that_is_not_json_is_refused(self, queue):
        @queue.executor()
        def odd(ctx):
            ctx.cursor = 1
            with pytest.raises(PayloadError, match=r"cursor\.a: set is not JSON"):
                ctx.cursor = {"a": set()}
            return ctx.cursor

        queue.start()
        assert queue.submit("odd").result(PATIENCE) == 1

    def test_the_cursor_is_stored_before_a_cancel_is_raised(self, queue, gate):
        queue.executor("move")(lambda ctx: gate() or setattr(ctx, "cursor", 5) or "returned")
        queue.start()
        handle = queue.submit("move")
        gate.wait_for()
        handle.cancel()
        gate.open()
        eventually(lambda: handle.task().status is TaskStatus.CANCELLED)
        assert checkpoints(queue, handle) == {"cursor": 5}


class TestLaterAttempts:
    """Checkpoints survive everything that happens between attempts."""

    def test_another_queue_continues_after_a_stop(self, make_queue, gate, repository):
        calls = []

        def executor(ctx):
            ctx.step("once", calls.append, 1)
            if len(calls) == 1 and ctx.task.interruptions == 0:
                gate()
                ctx.sleep(PATIENCE)
            return "done"

        first, second = make_queue(worker_num=1), make_queue(worker_num=1)
        for queue in (first, second):
            queue.executor("work")(executor)
        first.start()
        handle = second.submit("work")
        gate.wait_for()
        stopping = run_in_thread(lambda: first.stop(PATIENCE, cancel=True))
        gate.open()
        assert stopping() == []
        second.start()
        assert handle.result(PATIENCE) == "done"
        assert (calls, handle.task().interruptions) == ([1], 1)

    def test_a_requeued_task_keeps_its_checkpoints(self, queue, work):
        work.ends = [ValueError("broken")]
        queue.start()
        handle = queue.submit("work", max_attempts=1)
        with pytest.raises(TaskFailed):
            handle.result(PATIENCE)
        queue.requeue(handle.id)
        assert queue.handle(handle.id).result(PATIENCE) == {"of": [1, None]}
        assert work.calls == ["first", "second"]

    def test_a_manual_update_keeps_the_checkpoints(self, queue, work, repository):
        work.ends = [ValueError("broken")]
        queue.start()
        handle = queue.submit("work", max_attempts=1)
        with pytest.raises(TaskFailed):
            handle.result(PATIENCE)
        task = handle.task()
        task.checkpoints, task.status = None, TaskStatus.PENDING
        repository.update(task)
        assert checkpoints(queue, handle)["steps"]["first"] == 1

    def test_hooks_see_the_checkpoints_of_their_event(self, make_queue):
        """A hook that is called late sees no later checkpoints."""
        seen, go_on = [], threading.Event()

        class Look(Hook):
            def started(self, task):
                assert go_on.wait(PATIENCE)
                seen.append(("started", task.checkpoints))

            def progressed(self, task, progress, message):
                seen.append(("progressed", task.checkpoints))

            def retried(self, task, error, delay):
                seen.append(("retried", task.checkpoints))

            def finished(self, task):
                seen.append(("finished", task.checkpoints))

        queue = make_queue(hooks=[Look()])
        hooks = parts_of(queue).hooks

        @queue.executor(max_attempts=2)
        def work(ctx):
            ctx.step("first", lambda: 1)
            if ctx.task.attempt == 1:
                raise Retry
            ctx.cursor = 5
            ctx.progress(50)
            eventually(lambda: hooks.progressed in [event[0] for event in list(hooks.waiting)])

        handle = queue.submit("work")
        queue.start()
        handle.result(PATIENCE)
        go_on.set()
        assert queue.drain(PATIENCE)
        one, both = {"steps": {"first": 1}}, {"steps": {"first": 1}, "cursor": 5}
        assert seen == [
            *(("started", None), ("retried", one), ("started", one)),
            *(("progressed", both), ("finished", both)),
        ]


class TestOutage:
    @pytest.mark.timing(retry_every=0.001)
    def test_a_step_is_stored_when_the_repository_is_back(self, queue, repository):
        calls, failures = [], []

        def fail_a_few_times(writes):
            if any("checkpoints" in getattr(write, "changes", ()) for write in writes):
                failures.append(1)
                if len(failures) < 4:
                    raise RepositoryUnavailable("away")

        repository.before = fail_a_few_times
        queue.executor("work")(lambda ctx: ctx.step("once", lambda: calls.append(1) or "stored"))
        queue.start()
        handle = queue.submit("work")
        assert handle.result(PATIENCE) == "stored"
        assert (calls, len(failures)) == ([1], 4)
        assert checkpoints(queue, handle) == {"steps": {"once": "stored"}}

    def test_a_step_that_waits_for_the_repository_can_be_cancelled(self, queue, repository, gate):
        def away(writes):
            if any("checkpoints" in getattr(write, "changes", ()) for write in writes):
                gate()
                raise RepositoryUnavailable("away")

        repository.before = away
        queue.executor("work")(lambda ctx: ctx.step("once", int))
        queue.start()
        handle = queue.submit("work")
        gate.wait_for()
        pool_of(queue).fire(handle.id)  # a cancel could not be stored either
        gate.open()
        eventually(lambda: handle.task().status is TaskStatus.CANCELLED)
        assert checkpoints(queue, handle) is None


def test_a_repository_with_eight_methods_refuses_checkpoints(make_queue):
    """The refusal comes before the step is called."""
    queue = make_queue(TinyRepository(), worker_num=1)

    @queue.executor()
    def work(ctx, how: str):
        if how == "step":
            ctx.step("once", pytest.fail, "it was called")
        elif how == "set":
            ctx.cursor = 5
        return ctx.cursor

    queue.start()
    for how in ("step", "set", "get"):
        with pytest.raises(
            TaskFailed, match="TinyRepository has only the eight methods and cannot store"
        ):
            queue.submit("work", {"how": how}).result(PATIENCE)


KILLED = """
import sys, threading
from taskx import Config, Queue, SQLiteRepository

path = sys.argv[1]
queue = Queue(SQLiteRepository(path), Config(worker_num=1))

def note(word):
    with open(path + ".log", "a") as log:
        log.write(word + "\\n")
    return word.upper()

@queue.executor()
def work(ctx):
    words = [ctx.step("a", note, "a"), ctx.step("b", note, "b")]
    for n in range(ctx.cursor or 0, 5):
        if n == 3 and ctx.task.crashes == 0:
            print("three", flush=True)
            threading.Event().wait()
        note(str(n))
        ctx.cursor = n + 1
    return [*words, ctx.step("c", note, "c")]

with queue:
    if not queue.list_tasks()[1]:
        queue.submit("work", id="it")
    print(queue.handle("it").result(60), flush=True)
"""


def test_a_task_of_a_killed_process_continues_at_its_checkpoints(spawn, database):
    child = spawn(KILLED, database)
    assert child.read() == "three"
    child.kill()
    child = spawn(KILLED, database)
    assert child.read() == "['A', 'B', 'C']"
    child.ends()
    log = (database.parent / "tasks.db.log").read_text().split()
    assert log == ["a", "b", "0", "1", "2", "3", "4", "c"]
